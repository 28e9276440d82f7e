"""Freezing by layer: which parameters train when the first or all but the last blocks of a model stay as they are."""

from __future__ import annotations

from typing import Any

from torch import nn

from QEfficient.errors import OptionError, UnsupportedModelError
from QEfficient.finetune.initial import is_head


def blocks_of(model: Any) -> tuple[str, int]:
    """(name, length) of the list of a model's repeated layers, such as ``("model.layers", 32)``.

    Raises:
        UnsupportedModelError: no module list is as long as the configuration says, or several are.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    # An expert or head list inside a block may be as long: the outermost counts.
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outer) != 1 or not count:
        raise UnsupportedModelError(
            f"the layers of {type(model).__name__} cannot be told from its configuration: name what trains with "
            "trainable."
        )
    return outer[0], int(count)


def last_blocks(model: Any, count: int) -> list[str]:
    """Parameters of the last ``count`` blocks (the first, when it is below 0), and of a classifier's head.

    Raises:
        OptionError: the model has fewer. UnsupportedModelError: as `blocks_of`.
    """
    place, total = _checked(model, "unfreeze_last_n", abs(count))
    chosen = range(total - count, total) if count > 0 else range(-count)
    inside = tuple(f"{place}.{number}." for number in chosen)
    return [name for name, _ in model.named_parameters() if name.startswith(inside) or is_head(model, name)]


def all_but_first_blocks(model: Any, count: int) -> list[str]:
    """Parameters outside of the first ``count`` blocks and of what runs before them: the embeddings.

    A head that shares the embedding's weights stays with them.

    Raises:
        OptionError: the model has fewer. UnsupportedModelError: as `blocks_of`.
    """
    place, _ = _checked(model, "freeze_layers", count)
    inside = tuple(f"{place}.{number}." for number in range(count))
    embeddings = {
        id(parameter)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or "embed" in name.rpartition(".")[2].lower()
        for parameter in module.parameters()
    }
    return [n for n, p in model.named_parameters() if not n.startswith(inside) and id(p) not in embeddings]


def _checked(model: Any, option: str, count: int) -> tuple[str, int]:
    place, total = blocks_of(model)
    if count > total:
        raise OptionError(f"{option} is {count}, and {type(model).__name__} has {total} layers: lower it.")
    return place, total
