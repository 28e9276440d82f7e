"""The causal model that a cloud command line names."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from QEfficient.models.auto import QEFFAutoModelForCausalLM


def causal_model(values: argparse.Namespace, *, continuous_batching: bool = False) -> QEFFAutoModelForCausalLM:
    """From ``--local-model-dir``, else the hub; nothing is loaded yet. Raises as ``from_pretrained`` does."""
    from QEfficient.models.auto import QEFFAutoModelForCausalLM

    return QEFFAutoModelForCausalLM.from_pretrained(
        values.local_model_dir or values.model_name,
        continuous_batching=continuous_batching,
        trust_remote_code=values.trust_remote_code,
        token=values.hf_token,
        cache_dir=values.cache_dir,
    )
