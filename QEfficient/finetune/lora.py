"""The LoRA part of a configuration: a dict, a file or a peft object becomes one checked dict, without peft."""

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

#: peft's keys that can be trained.
NAMES = [
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "bias",
    "use_rslora",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "task_type",
]

#: peft's keys that say who wrote a file, not what is trained.
_ABOUT_THE_FILE = frozenset(
    ["peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"]
)

#: peft's keys that are not supported here, with the value that switches each off where that is not empty.
_OFF: dict[str, Any] = {"megatron_core": "megatron.core", "qalora_group_size": 16, "runtime_config": None}
_UNSUPPORTED = frozenset(
    [
        "use_dora",
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
        "trainable_token_indices",
        "target_parameters",
        "ensure_weight_tying",
    ]
)


def read_lora(value: Any) -> dict[str, Any] | None:
    """LoRA options under peft's names, checked; None when ``value`` is None (full fine-tuning).

    Args:
        value: a mapping, an object with ``to_dict()`` such as ``peft.LoraConfig``, or the path of a YAML or JSON
            file. Keys as in peft; keys that are not given keep peft's defaults.

    Raises:
        OptionError: an unknown or unsupported key, a value out of range, or an unreadable file.
    """
    if value is None:
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
    given = _supported(mapping("lora_config", value))
    return _checked(canonical(given, NAMES, LORA_ALIASES, "lora_config"))


def _supported(given: Mapping[str, Any]) -> dict[str, Any]:
    kind = getattr(given.get("peft_type"), "value", given.get("peft_type"))
    if kind not in (None, "LORA"):
        raise OptionError(f"lora_config has peft_type={short(kind)}, and only LORA can be trained: leave it out.")
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
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        if name in found:
            found[name] = _module_names(name, found[name])
    for name in ("use_rslora", "fan_in_fan_out"):
        if name in found:
            boolean(f"lora_config[{name!r}]", found[name])
    if found.get("bias", "none") != "none":
        raise OptionError(f"lora_config has bias={short(found['bias'])}, which is not supported: use bias='none'.")
    if "task_type" in found:
        found["task_type"] = str(getattr(found["task_type"], "value", found["task_type"]))
    return {**DEFAULT_LORA, **found}


def _module_names(name: str, value: Any) -> str | list[str]:
    if isinstance(value, str):
        return text(f"lora_config[{name!r}]", value)
    if isinstance(value, list | tuple | set | frozenset) and value and all(isinstance(item, str) for item in value):
        # peft keeps a set, whose order changes from run to run.
        return sorted(value) if isinstance(value, set | frozenset) else list(dict.fromkeys(value))
    raise OptionError(f"lora_config[{name!r}] must be a module name or a list of them, got {short(value)}.")
