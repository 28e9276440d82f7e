"""The adapter part of a configuration: a dict, a file or a peft object becomes one checked dict, without peft."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from QEfficient.errors import OptionError
from QEfficient.finetune.keywords import boolean, canonical, integer, is_number, mapping, number, short, text
from QEfficient.finetune.settings_file import read_settings

#: What is trained when nothing is said.
DEFAULT_LORA: dict[str, Any] = {"r": 8, "target_modules": "all-linear"}

#: Spellings of other tools -> peft's name.
LORA_ALIASES = {
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
}

#: peft's keys of LoRA that can be trained.
NAMES = [
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "bias",
    "use_rslora",
    "use_dora",
    "trainable_token_indices",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "task_type",
]

#: peft's keys of IA3, which ``peft_type: IA3`` chooses.
IA3_NAMES = [
    "peft_type",
    "target_modules",
    "feedforward_modules",
    "exclude_modules",
    "modules_to_save",
    "init_ia3_weights",
    "fan_in_fan_out",
    "task_type",
]
#: What is said of every other kind of adapter.
_KINDS = "LoRA (also with use_rslora or use_dora) and IA3 can be trained"

#: peft's keys that say who wrote a file, not what is trained.
_ABOUT_THE_FILE = frozenset(["auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"])

#: peft's keys that are not supported here, with the value that switches each off where that is not empty.
_OFF: dict[str, Any] = {"megatron_core": "megatron.core", "qalora_group_size": 16, "runtime_config": None}
_UNSUPPORTED = frozenset(
    [
        "use_qalora",
        "use_bdlora",
        "lora_bias",
        "layer_replication",
        "megatron_config",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "velora_config",
        "alora_invocation_tokens",
        "monteclora_config",
        "arrow_config",
        "kasa_config",
        "target_parameters",
        "ensure_weight_tying",
    ]
)


def read_lora(value: Any) -> dict[str, Any] | None:
    """Adapter options under peft's names, checked; None when ``value`` is None (full fine-tuning).

    Only those of IA3 have the key ``peft_type``.

    Args:
        value: a mapping, an object with ``to_dict()`` such as ``peft.LoraConfig``, or the path of a YAML or JSON
            file. Keys as in peft; keys that are not given keep peft's defaults.

    Raises:
        OptionError: an unknown or unsupported key, a value out of range, or an unreadable file.
    """
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        return None
    if isinstance(value, str | os.PathLike):
        value = read_settings(os.fspath(value), "LoRA options")
    elif not isinstance(value, Mapping):
        to_dict = getattr(value, "to_dict", None)
        if not callable(to_dict) or isinstance(value, type):
            raise OptionError(
                f"lora_config must be a dict, a peft.LoraConfig, the path of a file or None, got {short(value)}."
            )
        value = to_dict()
    given = mapping("lora_config", value)
    kind = given.pop("peft_type", None)
    kind = getattr(kind, "value", kind)
    named = str(kind or "LORA").upper()
    if named == "LORA":
        return _checked(canonical(_supported(given), NAMES, LORA_ALIASES, "lora_config"))
    if named != "IA3":
        raise OptionError(f"lora_config has peft_type={short(kind)}, and only {_KINDS}.")
    for name in given:
        if LORA_ALIASES.get(name, name) in NAMES and LORA_ALIASES.get(name, name) not in IA3_NAMES:
            raise OptionError(f"lora_config has {name}, which IA3 has not: leave it out, or leave peft_type out.")
    kept = {name: value for name, value in given.items() if name not in _ABOUT_THE_FILE}
    return _checked_ia3(canonical(kept, IA3_NAMES, LORA_ALIASES, "lora_config"))


def _supported(given: Mapping[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in given.items():
        if name in _ABOUT_THE_FILE or (name in _OFF and value in (None, {}, _OFF[name])):
            continue
        if name in _UNSUPPORTED or name in _OFF:
            # A file or object written by peft lists every key, most of them switched off.
            if value in (None, False, {}, []):
                continue
            raise OptionError(f"lora_config has {name}={short(value)}, which is not supported: leave it out.")
        kept[name] = value
    return kept


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    # A key set to None is peft's way of writing that it is not set.
    found = {name: value for name, value in given.items() if value is not None}
    if "r" in found:
        found["r"] = integer("lora_config['r']", found["r"])
    # The adapter is scaled by alpha / r: 0 would train nothing.
    if "lora_alpha" in found and not (is_number(found["lora_alpha"]) and found["lora_alpha"] > 0):
        raise OptionError(f"lora_config['lora_alpha'] must be a number above 0, got {short(found['lora_alpha'])}.")
    if "lora_dropout" in found and number("lora_config['lora_dropout']", found["lora_dropout"]) >= 1:
        raise OptionError(f"lora_config['lora_dropout'] must be below 1, got {found['lora_dropout']}.")
    if found.get("bias", "none") != "none":
        raise OptionError(f"lora_config has bias={short(found['bias'])}, which is not supported: use bias='none'.")
    for name in ("layers_to_transform", "trainable_token_indices"):
        if name in found:
            found[name] = _numbers(name, found[name])
    for name in ("rank_pattern", "alpha_pattern"):
        if name in found:
            mapping(f"lora_config[{name!r}]", found[name])
    for name in ("layers_to_transform", "layers_pattern"):
        if name in found and isinstance(found.get("target_modules", "all-linear"), str):
            raise OptionError(
                f"lora_config has {name}, with which target_modules must be a list of names, such as ['q_proj', "
                "'v_proj']."
            )
    return {**DEFAULT_LORA, **_checked_common(found, ("use_rslora", "use_dora", "fan_in_fan_out"))}


def _checked_ia3(given: dict[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in given.items() if value is not None}
    # None of them is a choice: every vector then scales a module's output.
    none = list(found.pop("feedforward_modules")) if found.get("feedforward_modules") in ([], (), set()) else None
    found = _checked_common(found, ("init_ia3_weights", "fan_in_fan_out"))
    targets, fed = found.get("target_modules"), found.get("feedforward_modules")
    if isinstance(targets, list) and isinstance(fed, list) and (extra := [name for name in fed if name not in targets]):
        raise OptionError(f"lora_config['feedforward_modules'] has {extra[0]!r}, which target_modules lacks: add it.")
    return {"peft_type": "IA3", **found, **({} if none is None else {"feedforward_modules": none})}


def _checked_common(found: dict[str, Any], switches: tuple[str, ...]) -> dict[str, Any]:
    """Checks the keys that all kinds of adapters have."""
    for name in ("target_modules", "exclude_modules", "modules_to_save", "feedforward_modules"):
        if name in found:
            found[name] = _module_names(name, found[name])
    if isinstance(found.get("modules_to_save"), str):
        found["modules_to_save"] = [found["modules_to_save"]]  # peft would take its letters for names
    for name in switches:
        if name in found:
            boolean(f"lora_config[{name!r}]", found[name])
    if "task_type" in found:
        found["task_type"] = str(getattr(found["task_type"], "value", found["task_type"]))
    return found


def _numbers(name: str, value: Any) -> Any:
    """Numbers of layers or tokens: one, a list, or (of tokens) a mapping of modules to lists."""
    where = f"lora_config[{name!r}]"
    if name == "layers_to_transform" and not isinstance(value, list | tuple):
        return integer(where, value, minimum=0)
    if name == "trainable_token_indices" and isinstance(value, Mapping):
        return {text(where, module): _numbers(name, list(rows)) for module, rows in value.items()}
    if not isinstance(value, list | tuple) or not value:
        raise OptionError(f"{where} must be a list of numbers, got {short(value)}.")
    return sorted({integer(where, number, minimum=0) for number in value})


def _module_names(name: str, value: Any) -> str | list[str]:
    if isinstance(value, str):
        return text(f"lora_config[{name!r}]", value)
    if isinstance(value, list | tuple | set | frozenset) and value and all(isinstance(item, str) for item in value):
        # peft keeps a set, whose order changes from run to run.
        return sorted(value) if isinstance(value, set | frozenset) else list(dict.fromkeys(value))
    raise OptionError(f"lora_config[{name!r}] must be a module name or a list of them, got {short(value)}.")
