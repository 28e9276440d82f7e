"""Tiny random-weight models of many architectures, with weights scaled so that the context matters.

Freshly initialised transformers ignore almost all of their context: a broken cache or mask would go
unnoticed. The weights here are drawn large enough that early prompt tokens move the logits. Windows and
chunks are smaller than a 12-token prompt, and what usually starts as zero (biases, router corrections)
does not.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

VOCAB_SIZE = 128
MAX_POSITIONS = 128
NUM_LABELS = 3
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")

# ----------------------------------------------------------------------------------------------------
# Configurations. `eos_token_id` is None everywhere: a tiny model must never stop on its own.

_SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_DECODER = {
    **_SPECIAL_IDS,
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": False,
}
_GROUPED_QUERY = {**_DECODER, "num_key_value_heads": 2}

CAUSAL_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED_QUERY, "model_type": "llama", "head_dim": 16},
    "qwen2": {**_GROUPED_QUERY, "model_type": "qwen2"},
    "qwen3": {**_GROUPED_QUERY, "model_type": "qwen3", "head_dim": 32},
    # Three layers of window 4 see 9 tokens back: less than the whole prompt, more than one window.
    "mistral": {
        **_GROUPED_QUERY,
        "model_type": "mistral",
        "num_hidden_layers": 3,
        "head_dim": 16,
        "sliding_window": 4,
    },
    "gemma2": {
        **_GROUPED_QUERY,
        "model_type": "gemma2",
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "gemma3": {
        **_GROUPED_QUERY,
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "gpt2": {
        **_SPECIAL_IDS,
        "model_type": "gpt2",
        "vocab_size": VOCAB_SIZE,
        "n_positions": MAX_POSITIONS,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "tie_word_embeddings": True,
    },
    "phi3": {
        **_GROUPED_QUERY,
        "model_type": "phi3",
        "num_hidden_layers": 3,
        "original_max_position_embeddings": MAX_POSITIONS,
        "sliding_window": 5,
    },
    "opt": {
        **_SPECIAL_IDS,
        "model_type": "opt",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 96,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": True,
    },
    "bloom": {
        **_SPECIAL_IDS,
        "model_type": "bloom",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "n_layer": 2,
        "n_head": 4,
        "tie_word_embeddings": True,
    },
    "mixtral": {
        **_GROUPED_QUERY,
        "model_type": "mixtral",
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    # The first layer is dense, the second one routes.
    "qwen3_moe": {
        **_GROUPED_QUERY,
        "model_type": "qwen3_moe",
        "head_dim": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
    },
    # Compressed keys and values, with heads of 24 (keys) and 12 (values); group-limited routing.
    "deepseek_v3": {
        **_DECODER,
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
    },
    "mamba2": {
        **_SPECIAL_IDS,
        "model_type": "mamba2",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "expand": 2,
        "num_heads": 8,
        "head_dim": 16,
        "n_groups": 2,
        "state_size": 8,
        "conv_kernel": 4,
        "chunk_size": 8,
        "tie_word_embeddings": False,
    },
    # Layers: mamba + dense, attention + experts, mamba + dense.
    "jamba": {
        **_GROUPED_QUERY,
        "model_type": "jamba",
        "num_hidden_layers": 3,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 8,
    },
}

CAUSAL_TYPES: tuple[str, ...] = tuple(CAUSAL_CONFIGS)

CAUSAL_CONFIGS |= {
    "mamba": {
        **_SPECIAL_IDS,
        "model_type": "mamba",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "expand": 2,
        "state_size": 8,
        "conv_kernel": 4,
        "time_step_rank": 8,
        "tie_word_embeddings": True,
    },
    "falcon": {
        **_SPECIAL_IDS,
        "model_type": "falcon",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "multi_query": True,
        "parallel_attn": True,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": True,
    },
    "gpt_oss": {
        **_GROUPED_QUERY,
        "model_type": "gpt_oss",
        "head_dim": 16,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    },
    "qwen3_next": {
        **_GROUPED_QUERY,
        "model_type": "qwen3_next",
        "head_dim": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_conv_kernel_dim": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "lfm2": {
        **_GROUPED_QUERY,
        "model_type": "lfm2",
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "conv_L_cache": 3,
        "block_auto_adjust_ff_dim": False,
        "tie_word_embeddings": True,
    },
    "llama_tied": {
        **_GROUPED_QUERY,
        "model_type": "llama",
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "tie_word_embeddings": True,
    },
}

EXTRA_CAUSAL_TYPES: tuple[str, ...] = tuple(name for name in CAUSAL_CONFIGS if name not in CAUSAL_TYPES)

_ENCODER = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": 0,
}
# These count positions from pad_token_id + 1 on, so they need two more of them.
_ROBERTA_LIKE = {
    **_ENCODER,
    "max_position_embeddings": MAX_POSITIONS + 2,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}

ENCODER_CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {**_ENCODER, "model_type": "bert", "type_vocab_size": 2},
    "roberta": {**_ROBERTA_LIKE, "model_type": "roberta", "type_vocab_size": 1},
    "xlm-roberta": {**_ROBERTA_LIKE, "model_type": "xlm-roberta", "type_vocab_size": 1},
    "distilbert": {
        "model_type": "distilbert",
        "vocab_size": VOCAB_SIZE,
        "dim": 64,
        "hidden_dim": 96,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": MAX_POSITIONS,
        "pad_token_id": 0,
    },
    "mpnet": {**_ROBERTA_LIKE, "model_type": "mpnet"},
    # The local layers see 3 tokens to either side.
    "modernbert": {
        **_ENCODER,
        "model_type": "modernbert",
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "local_attention": 6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
    "deberta-v2": {
        **_ENCODER,
        "model_type": "deberta-v2",
        "type_vocab_size": 0,
        "relative_attention": True,
        "position_buckets": 8,
        "max_relative_positions": -1,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "pooler_hidden_size": 64,
    },
}

ENCODER_TYPES: tuple[str, ...] = tuple(ENCODER_CONFIGS)
CLASSIFIER_TYPES: tuple[str, ...] = ("bert", "deberta-v2", "llama")


def tiny_config(name: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of one of the names above, with single fields overridden."""
    fields = copy.deepcopy({**CAUSAL_CONFIGS, **ENCODER_CONFIGS}[name]) | overrides
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


# ----------------------------------------------------------------------------------------------------
# Weights.


def _fan_in(module: nn.Module, parameter: torch.Tensor) -> int:
    """How many inputs each output of this weight sums over."""
    if isinstance(module, nn.Conv1d):
        return parameter.shape[1] * parameter.shape[2]
    if isinstance(module, Conv1D):  # GPT-2 keeps its linear weights as [in, out]
        return parameter.shape[0]
    if getattr(module, "is_transposed", False):  # experts as [expert, in, out]
        return parameter.shape[-2]
    return parameter.shape[-1]


def sharpen(model: PreTrainedModel, seed: int = 0) -> None:
    """Redraw the weights in place so that activations are of unit scale and depend on the whole context."""
    generator = torch.Generator().manual_seed(seed)
    tied = model.config.tie_word_embeddings and model.get_output_embeddings() is not None
    embedding_std = 0.5 if tied else 1.0
    if model.config.model_type.startswith("gemma"):  # these multiply it by sqrt(hidden_size)
        embedding_std = 0.09

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator)

    done: set[int] = set()  # tied weights: the first owner, the embedding, decides
    for path, module in model.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            is_buffer = not isinstance(tensor, nn.Parameter)
            if id(tensor) in done or not tensor.is_floating_point() or (is_buffer and "bias" not in name):
                continue
            done.add(id(tensor))
            if isinstance(module, nn.Embedding):
                tensor.copy_(noise(tensor) * embedding_std)
            elif "bias" in name and "dt_" not in f"{path}.{name}":
                tensor.copy_(noise(tensor) * 0.1)
            elif name == "sinks":
                tensor.copy_(noise(tensor) * 0.5)
            elif tensor.dim() >= 2 and name != "A_log":
                tensor.copy_(noise(tensor) * 1.2 / _fan_in(module, tensor) ** 0.5)
            else:  # norms, and the decay, step and skip parameters of state-space layers: keep their meaning
                offset = 0.0 if tensor.any() else 1.0  # some norms multiply by 1 + weight
                tensor.add_(noise(tensor) * 0.1)
                outside_the_layers = not any(part.isdigit() for part in path.split("."))
                if name == "weight" and outside_the_layers and tied:
                    # The output head is the embedding, and the residual stream is mostly the embedding of the
                    # last token: that token would win for ever. Random signs in the final norm prevent it.
                    tensor.copy_((tensor + offset) * noise(tensor).sign() - offset)


def _build(auto_class: Any, name: str, seed: int, overrides: dict[str, Any]) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = auto_class.from_config(tiny_config(name, **overrides)).float().eval()
        sharpen(model, seed)
    return model


def tiny_causal_lm(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A float32 causal language model that never stops on its own; `overrides` are config fields."""
    model = _build(AutoModelForCausalLM, name, seed, overrides)
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id, generation.do_sample = None, 0, False
    for field in ("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"):
        if hasattr(generation, field):
            setattr(generation, field, None)
    return model


def tiny_encoder(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A float32 encoder without a head."""
    return _build(AutoModel, name, seed, overrides)


def tiny_classifier(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A float32 sequence classifier with `NUM_LABELS` classes, of an encoder or of a causal type."""
    return _build(AutoModelForSequenceClassification, name, seed, {"num_labels": NUM_LABELS, **overrides})


# ----------------------------------------------------------------------------------------------------
# References.


def sample_prompt(length: int = 12, seed: int = 0) -> list[int]:
    """Random token ids without the special ones."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(len(SPECIAL_TOKENS), VOCAB_SIZE, (length,), generator=generator).tolist()


@torch.no_grad()
def greedy_reference(model: PreTrainedModel, prompt_ids: list[int], n: int) -> tuple[list[int], np.ndarray]:
    """The `n` greedy tokens that Hugging Face generates after one prompt, and their logits [n, vocab]."""
    ids = torch.tensor([prompt_ids])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=n,
        max_new_tokens=n,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = output.sequences[0, len(prompt_ids) :].tolist()
    return tokens, torch.cat(output.logits).float().numpy()


@torch.no_grad()
def context_sensitivity(model: PreTrainedModel, prompt_ids: list[int]) -> float:
    """The largest change of the last logits when one token of the first half of the prompt changes."""
    half = len(prompt_ids) // 2
    rows = torch.tensor([prompt_ids] * (half + 1))
    specials = len(SPECIAL_TOKENS)
    for position in range(half):
        token = prompt_ids[position]
        rows[position + 1, position] = (token - specials + 1) % (VOCAB_SIZE - specials) + specials
    logits = model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits[:, -1].float()
    return float((logits[1:] - logits[0]).abs().max())


# ----------------------------------------------------------------------------------------------------
# Checkpoints and tokenizers.


def save_tiny(
    model: PreTrainedModel,
    path: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int | None = None,
) -> Path:
    """Write the model as a checkpoint folder, optionally in another dtype or in shards; it stays as it is."""
    model = copy.deepcopy(model)  # saving changes the config of the model
    if dtype is not None:
        model.to(dtype=dtype)
    if max_shard_size is None:
        model.save_pretrained(path)
    else:
        model.save_pretrained(path, max_shard_size=max_shard_size)
    return Path(path)


# Frequent pairs, learned in this order; "Ġ" is how a byte-level tokenizer writes a space.
_MERGES = (
    "h e,Ġ t,Ġt he,i n,Ġ a,o n,r e,Ġ w,e r,o u,a n,Ġ s,a t,e n,Ġ o,i s,o r,e s,l l,i t,in g,l o,Ġ c,n d,Ġ h,"
    "e d,a r,s t,an d,Ġ b,Ġ f,Ġ m,Ġ p,Ġ d,Ġ in,Ġ is,Ġo f,Ġt o,l e,v e"
)


def tiny_tokenizer(path: str | Path, vocab_size: int = VOCAB_SIZE, specials: Sequence[str] = SPECIAL_TOKENS) -> Path:
    """Write tokenizer.json and tokenizer_config.json of a byte-level BPE tokenizer with `vocab_size` ids.

    `specials` are "<pad>", "<s>", "</s>" and "<unk>" in the order of their ids. With 300 ids or more all
    bytes are in the vocabulary; with fewer only printable ASCII and the line break are, the rest is "<unk>".
    """
    from tokenizers.pre_tokenizers import ByteLevel

    printable = [*(chr(code) for code in range(0x21, 0x7F)), "Ġ", "Ċ"]
    symbols = printable + sorted(set(ByteLevel.alphabet()) - set(printable))
    merges = [tuple(pair.split()) for pair in _MERGES.split(",")]
    everything = len(specials) + len(symbols) + len(merges)
    if vocab_size < everything:
        symbols = printable
    if vocab_size < len(specials) + len(symbols):
        raise ValueError(f"vocab_size must be at least {len(specials) + len(symbols)}")
    merges = merges[: vocab_size - len(specials) - len(symbols)]
    tokens = [*specials, *symbols, *("".join(pair) for pair in merges)]
    tokens += [f"<extra_{index}>" for index in range(vocab_size - len(tokens))]

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    added = [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, token in enumerate(specials)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }
    config = {
        "tokenizer_class": "TokenizersBackend",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
    }
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        (path / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
