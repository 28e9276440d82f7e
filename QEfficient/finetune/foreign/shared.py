"""Values that several tools spell alike: optimizers, quantized weights, LoRA's targets, strategies of saving."""

from __future__ import annotations

from typing import Any

from QEfficient.errors import OptionError
from QEfficient.finetune.foreign.tool import Reading
from QEfficient.finetune.keywords import integer, is_number, short

#: Why a precision, an attention kernel and so on change nothing here.
PRECISION = "the step computes in float32, or in the precision of its target"
KERNELS = "attention and losses are operators of the compiled step"
DEVICES = "the target decides where the step runs"
CACHED = "prepared rows are kept in the cache by content"
SERVICES = "metrics.jsonl is written in any case; set report_to for a service"
SHARDING = "torchrun gives every process the whole step and a share of each batch"
OFFLINE = "training runs offline; `qefficient push` publishes the result"


def optimizer(reading: Reading, key: str) -> None:
    """``optim``; optimizers that keep their state in 8 bits become the one they approximate."""
    name = reading[key]
    if isinstance(name, str) and name.lower().startswith(("adamw", "paged_adamw")) and "torch" not in name:
        reading.note(f"{key}={name} keeps its state in float32 here.")
        name = "adamw_torch"
    reading.put(optim=name)


def quantized(reading: Reading, key: str, bits: int | None) -> None:
    """``base_weights`` for frozen weights of 4 or 8 bits.

    Raises:
        OptionError: another number of bits.
    """
    if bits is None:
        return
    if bits not in (4, 8):
        raise reading.error(key, "must be 4 or 8 bits")
    reading.put(base_weights=f"int{bits}")
    reading.note(f"{key} stores frozen weights as int{bits} in blocks, and not in the format of bitsandbytes.")


def train_share(reading: Reading, key: str) -> None:
    """``train_frac`` for the share of the rows that is held out.

    Raises:
        OptionError: not a share, but a number of rows.
    """
    held = reading[key] or 0
    if not is_number(held) or not 0 <= held < 1:
        raise reading.error(key, "must be a share below 1: a number of rows cannot be held out")
    reading.put(train_frac=round(1 - held, 12))


def template_notice(reading: Reading, key: str, name: Any) -> None:
    """``chat_template``, where the name is one of ours; otherwise the tokenizer's own stays, and that is said."""
    if name in ("chatml", "plain"):
        reading.put(chat_template=name)
    elif name:
        reading.note(f"{key}={name} is not looked up: the tokenizer's own chat template is used.")


def steps(reading: Reading, key: str, per_step: int) -> int | None:
    """Optimizer steps for a number of micro-batches, of which ``per_step`` make one."""
    count = reading[key]
    if count is None:
        return None
    return max(1, integer(key, count) // per_step)


def betas(value: Any) -> dict[str, Any]:
    """``adam_beta1`` and ``adam_beta2`` from a list of both; nothing for None.

    Raises:
        OptionError: not two of them.
    """
    if value is None:
        return {}
    if not isinstance(value, list) or len(value) != 2:
        raise OptionError(f"betas must be two numbers, got {short(value)}.")
    return {"adam_beta1": value[0], "adam_beta2": value[1]}


def required(reading: Reading, *keys: str) -> None:
    """OptionError for the first of these keys that the file lacks."""
    for key in keys:
        if reading[key] is None:
            raise OptionError(f"the file of {reading.title} has no {key}: add it.")
