"""The documented flags of the Cloud AI compiler that are passed on from the user, with their types and ranges.

The vendor's own table is not public beyond its first rows: these are the flags its pages, its configurator and
efficient-transformers' callers name. Flags this library decides itself (`qaic_command.py`) are not here, nor are those
that only print and exit, quantize to INT8, or name files outside the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from QEfficient.errors import OptionError
from QEfficient.suggest import did_you_mean


@dataclass(frozen=True)
class Flag:
    """A flag's kind: ``switch``, ``int``, ``float``, ``power`` (1, 2, 4, …), ``text`` or ``names``, and limits."""

    kind: str
    least: float = 0
    most: float | None = None
    choices: tuple[str, ...] = ()


#: Option (dashes are underscores) -> what it takes. Those with a field of their own, such as ``mos``, are not in it.
FLAGS: dict[str, Flag] = {
    "ols": Flag("power", 1, 16),
    "mdts_mos": Flag("int", 1),
    "aic_depth_first_mem": Flag("int", 8, 32),
    "keep_original_precision_for_nodes": Flag("names"),
    "execute_nodes_in_fp16": Flag("names"),
    "multicast_weights": Flag("switch"),
    "allocator_dealloc_delay": Flag("int", 0, 10),
    "size_split_granularity": Flag("int", 512, 2048),
    "vtcm_working_set_limit_ratio": Flag("float", 0, 1),
    "sdp_cluster_sizes": Flag("text"),
    "combine_inputs": Flag("text"),
    "combine_outputs": Flag("text"),
    "compile_threads": Flag("int", 1),
    "use_producer_dma": Flag("text"),
    "io_crc": Flag("switch"),
    "always_expand_onnx_functions": Flag("switch"),
    "stats_batchsize": Flag("int", 1),
    "stats_level": Flag("int", 0, 100),
    "ddr_stats": Flag("switch"),
    "aic_pmu_recipe": Flag("text"),
    "aic_profiling_type": Flag("text", choices=("stats", "trace", "latency")),
    "time_passes": Flag("switch"),
    "aic_perf_warnings": Flag("switch"),
    "aic_perf_metrics": Flag("switch"),
    "split_retained_state_io": Flag("switch"),
    "user_tiled": Flag("switch"),
    "io_encrypt": Flag("text"),
    "qpc_crc": Flag("switch"),
}


def check_flag(name: str, value: Any) -> Any:
    """The value in its canonical type; text from a command line is converted.

    Raises:
        OptionError: no such flag, or the value is of another type or out of range.
    """
    if name not in FLAGS:
        hint = did_you_mean(name, FLAGS) or " Take it out: an unknown flag would stop the compiler."
        raise OptionError(f"the Cloud AI compiler has no documented flag {name!r}.{hint}")
    flag = FLAGS[name]
    if flag.kind == "switch":
        if value in (True, False, "true", "false", "True", "False"):
            return value in (True, "true", "True")
        raise OptionError(f"{name} is a switch: pass True or False, got {value!r}.")
    if flag.kind == "names":
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not names or not all(isinstance(n, str) and n for n in names):
            raise OptionError(f"{name} takes a list of node kinds, got {value!r}.")
        return tuple(names)
    if flag.kind == "text":
        text = str(value)
        if isinstance(value, bool) or not text or any(c.isspace() and c != " " for c in text):
            raise OptionError(f"{name} takes a text, got {value!r}.")
        if flag.choices and text not in flag.choices:
            raise OptionError(f"{name} must be one of {', '.join(flag.choices)}, got {text!r}.")
        return text
    return _number(name, flag, value)


def _number(name: str, flag: Flag, value: Any) -> float:
    wanted = "a number" if flag.kind == "float" else "a whole number"
    try:
        number = float(value) if flag.kind == "float" else int(value)
    except (TypeError, ValueError):
        raise OptionError(f"{name} takes {wanted}, got {value!r}.") from None
    if isinstance(value, bool) or (flag.kind != "float" and not isinstance(value, str) and number != value):
        raise OptionError(f"{name} takes {wanted}, got {value!r}.")
    limits = f"at least {flag.least:g}" if flag.most is None else f"from {flag.least:g} to {flag.most:g}"
    if not number >= flag.least or (flag.most is not None and number > flag.most):
        raise OptionError(f"{name} must be {limits}, got {value!r}.")
    if flag.kind == "power" and number & (number - 1):  # type: ignore[operator]
        raise OptionError(f"{name} must be 1, 2, 4, 8 or 16, got {value!r}.")
    return number


def in_table_order(flags: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
    """The flags as the table lists them, switches that are off left out; the later of two of one name wins."""
    given = dict(flags)
    return tuple((name, given[name]) for name in FLAGS if name in given and given[name] is not False)


def arguments(flags: tuple[tuple[str, Any], ...]) -> list[str]:
    """``(("ols", 2), ("ddr_stats", True))`` -> ``["-ols=2", "-ddr-stats"]``."""
    out = []
    for name, value in flags:
        word = "-" + name.replace("_", "-")
        text = ",".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)
        out.append(word if value is True else f"{word}={text}")
    return out
