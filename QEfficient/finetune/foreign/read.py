"""Which tool a file is of, and its options in our names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from QEfficient.errors import OptionError
from QEfficient.finetune.foreign.axolotl import AXOLOTL
from QEfficient.finetune.foreign.llamafactory import LLAMA_FACTORY
from QEfficient.finetune.foreign.mlx import MLX
from QEfficient.finetune.foreign.qeff import QEFF
from QEfficient.finetune.foreign.tool import Tool, translate
from QEfficient.finetune.foreign.torchtune import COMPONENT, TORCHTUNE
from QEfficient.finetune.layers import read_layers
from QEfficient.finetune.settings_file import read_settings
from QEfficient.suggest import did_you_mean

TOOLS: dict[str, Tool] = {tool.name: tool for tool in (AXOLOTL, LLAMA_FACTORY, TORCHTUNE, MLX, QEFF)}
#: What only our own files have: such a file is never taken for another tool's.
_OURS = frozenset(["model_id", "dataset_name", "max_ctx_len", "lora_config", "base", "extends"])


def read_options(
    path: str | Path, tool: str | None = None, model: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Options in our names from a file of ours or of another tool.

    Args:
        tool: a name of `TOOLS`; None recognises the tool, and reads a file that is no other tool's as ours.
        model: the model to tune, where it is another one than the file says.

    Returns:
        The options, and what to tell the user about them, a sentence each.

    Raises:
        OptionError: no such tool or file, or something in it that cannot be translated.
    """
    if tool is not None and tool not in TOOLS:
        raise OptionError(f"--from takes {', '.join(TOOLS)}, got {tool!r}.{did_you_mean(tool, TOOLS)}")
    values = read_settings(path, "fine-tuning options")
    found = TOOLS[tool] if tool is not None else recognise(values)
    if found is None:
        return read_layers(path), []
    reading = translate(found, values, model)
    notices = [f"{path} was read as a file of {found.title} {found.version}, with its defaults.", *reading.notices]
    return reading.options, notices


def recognise(values: Mapping[str, Any]) -> Tool | None:
    """The tool whose file this unmistakably is: it has enough keys that no other tool has, and none of another's."""
    if _OURS & values.keys():
        return None
    signs = set(values)
    if any(isinstance(value, Mapping) and COMPONENT in value for value in values.values()):
        signs.add(COMPONENT)
    found = [tool for tool in TOOLS.values() if signs & tool.marks]
    return found[0] if len(found) == 1 and len(signs & found[0].marks) >= found[0].enough else None
