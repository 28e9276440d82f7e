"""Log-probabilities under the reference of a preference method: the model as it is before training, computed once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from QEfficient.finetune.compiled_step import CompiledStep
from QEfficient.finetune.data.collate import collate
from QEfficient.finetune.data.columns import WithColumns
from QEfficient.finetune.data.loader import Rows
from QEfficient.finetune.methods.base import sequence_logprobs
from QEfficient.progress import Progress, silent
from QEfficient.store.digest import json_digest
from QEfficient.store.store import ArtifactStore

KIND = "reference"
_FILE = "logprobs.npy"


def with_reference(
    pairs: Rows,
    step: CompiledStep,
    store: ArtifactStore,
    identity: Mapping[str, Any],
    *,
    batch_size: int,
    pad_token_id: int = 0,
    progress: Progress = silent,
) -> WithColumns:
    """The pairs with a column ``reference``, float32 [pairs, 2]: log p of both answers under the untrained model.

    Args:
        pairs: rows that are pairs, as `PairRows` has them.
        step: with the weights that training begins with; a LoRA adapter is switched off.
        identity: JSON values that decide the result: the data, the model, its precision.
        batch_size: pairs computed at once.
    """

    def build(directory: Path) -> None:
        found = np.zeros((len(pairs), 2), np.float32)
        # Without LoRA, what trains still has its first values: it is the reference itself.
        adapter = not step.can_switch_off
        for begin in range(0, len(pairs), batch_size):
            progress("log-probabilities of the reference", begin, len(pairs))
            part = [pairs[i] for i in range(begin, min(begin + batch_size, len(pairs)))]
            batch = {n: torch.from_numpy(a) for n, a in collate(part, pad_token_id=pad_token_id).items()}
            found[begin : begin + len(part)] = sequence_logprobs(step, batch, adapter=adapter).reshape(2, -1).T
        np.save(directory / _FILE, found, allow_pickle=False)

    key = json_digest({"artefact": "reference log-probabilities", **identity})
    place = store.build(KIND, key, build, "log-probabilities of the reference")
    return WithColumns(pairs, reference=np.load(place / _FILE, allow_pickle=False))
