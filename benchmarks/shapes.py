"""The model shapes that benchmarks measure, and checkpoints of these shapes with random weights.

Speed and memory depend on the shape and on the precision of weights, not on their values, so random weights need no
download. A checkpoint here is an ordinary Hugging Face directory; every engine converts the same one.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = ROOT / "examples" / "demo_model" / "model"
#: Converters of some engines insist on a tokenizer, although every prompt of a benchmark is token ids.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
#: Random numbers made once and laid over all tensors: an odd count, so that rows do not repeat.
_NOISE = (1 << 24) - 3
_SPREAD = 0.02


@dataclass(frozen=True)
class Shape:
    """A causal model: its name on the command line, its Hugging Face configuration, and its sizes in a run.

    Attributes:
        prompt, new: tokens of the prompt and tokens decoded after it, when speed is measured.
    """

    name: str
    title: str
    config: dict[str, Any]
    prompt: int = 512
    new: int = 64

    @property
    def context(self) -> int:
        """Room for prompt and new tokens, a multiple of 128."""
        return -(-(self.prompt + self.new) // 128) * 128

    @property
    def parameters(self) -> int:
        return sum(math.prod(size) for _, size in tensors(self.config))


def _llama(vocab: int, hidden: int, layers: int, heads: tuple[int, int], mlp: int, theta: float) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": hidden // heads[0],
        "intermediate_size": mlp,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        # Once for transformers 5 and once for transformers 4, which some peers still need.
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rope_theta": theta,
        "dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _qwen2(*sizes: Any) -> dict[str, Any]:
    config = {**_llama(*sizes), "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-6}
    for name in ("head_dim", "attention_bias", "mlp_bias"):
        del config[name]  # fixed by the architecture
    return config | {"use_sliding_window": False, "sliding_window": None, "max_window_layers": sizes[2]}


#: By name on the command line. Llama-3.2's scaled rotary frequencies are left out: other numbers, the same work.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("smollm2-135m", "SmolLM2-135M", _llama(49152, 576, 30, (9, 3), 1536, 1e5)),
        Shape("qwen2.5-0.5b", "Qwen2.5-0.5B", _qwen2(151936, 896, 24, (14, 2), 4864, 1e6)),
        Shape("llama-3.2-1b", "Llama-3.2-1B", _llama(128256, 2048, 16, (32, 8), 8192, 5e5)),
    )
}


def demo_shape() -> Shape:
    """The demo model of this repository: real weights, and small enough for a quick run."""
    config = json.loads((DEMO_MODEL / "config.json").read_text(encoding="utf-8"))
    return Shape("demo", "demo model (4.7M)", config, prompt=128, new=32)


def shape_named(name: str) -> Shape:
    """The shape of a name on the command line; KeyError for an unknown one."""
    return demo_shape() if name == "demo" else SHAPES[name]


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the checkpoint of a llama or qwen2 configuration."""
    hidden, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    query, kv = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, size in (("q_proj", query), ("k_proj", kv), ("v_proj", kv)):
            yield f"{prefix}.self_attn.{name}.weight", (size, hidden)
            if config["model_type"] == "qwen2":
                yield f"{prefix}.self_attn.{name}.bias", (size,)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, query)
        yield f"{prefix}.mlp.gate_proj.weight", (mlp, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (mlp, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, mlp)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden)


def write_checkpoint(shape: Shape, directory: Path, seed: int = 0) -> Path:
    """Writes a bf16 checkpoint of random weights; finds the one that is there already.

    Norm weights are 1 and everything else is drawn with the usual spread of initial weights, so that activations and
    logits are finite and of ordinary size.
    """
    if shape.name == "demo":
        return DEMO_MODEL
    if (directory / "config.json").is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    _write_weights(directory / "model.safetensors", list(tensors(shape.config)), seed)
    for name in TOKENIZER_FILES:
        shutil.copyfile(DEMO_MODEL / name, directory / name)
    (directory / "generation_config.json").write_text('{"do_sample": false}\n', encoding="utf-8")
    # Last: its presence says that the checkpoint is whole.
    (directory / "config.json").write_text(json.dumps(shape.config, indent=2), encoding="utf-8")
    return directory


def _write_weights(path: Path, entries: list[tuple[str, tuple[int, ...]]], seed: int) -> None:
    from QEfficient.safetensors_io import SafetensorsWriter

    noise = _bfloat16(np.random.default_rng(seed).standard_normal(_NOISE, dtype=np.float32) * np.float32(_SPREAD))
    writer = SafetensorsWriter(path, [(name, "BF16", size) for name, size in entries])
    start = 0
    for name, size in entries:
        count = math.prod(size)
        if name.endswith("norm.weight"):
            values = _bfloat16(np.ones(count, np.float32))
        else:
            values = np.resize(np.roll(noise, -start), count)
            start = (start + count) % _NOISE
        writer.write(name, memoryview(values.tobytes()))
    writer.close()


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper half of each float32, as bits: numpy has no bfloat16, and truncation is precise enough for noise."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)
