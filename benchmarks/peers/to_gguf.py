"""Converts a llama or qwen2 checkpoint to GGUF, for llama.cpp; needs ``gguf`` and numpy, neither torch nor a tokenizer.

Every matrix is stored in the one type that was asked for, the embedding and the head included, as this library's int4
and int8 packages have them. (llama.cpp's own quantizer keeps those two at a higher precision, which reads more bytes
per token.) Norms and biases stay float32. The file has no vocabulary: prompts are token ids.

    python to_gguf.py path/to/checkpoint model.gguf q4_0
"""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

#: Precision on our side -> names of gguf's tensor type and file type.
TYPES = {
    "q4_0": ("Q4_0", "MOSTLY_Q4_0"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "f32": ("F32", "ALL_F32"),
}
_OUTER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_INNER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


def gguf_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor; ValueError for one these architectures do not have."""
    found = _LAYER.fullmatch(name)
    if found and found[2] in _INNER:
        return f"blk.{found[1]}.{_INNER[found[2]]}.{found[3]}"
    base, _, kind = name.rpartition(".")
    if base in _OUTER:
        return f"{_OUTER[base]}.{kind}"
    raise ValueError(f"the tensor {name} belongs to neither llama nor qwen2")


def interleave(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of a query or key projection for llama.cpp's llama.

    Hugging Face rotates channel i with channel i + half of a head, GGUF's llama rotates neighbours: row 2i takes the
    old row i, row 2i + 1 the old row i + half. (GGUF's qwen2 rotates as Hugging Face does and needs none of this.)
    """
    half = tensor.shape[0] // heads // 2
    split = tensor.reshape(heads, 2, half, *tensor.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(tensor.shape)


def read_safetensors(path: Path) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """(name, shape, function that reads it as float32) of every tensor in a file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            yield name, shape, lambda raw=data[begin:end], entry=entry: _floats(raw, entry["dtype"], entry["shape"])


def _floats(raw: np.ndarray, dtype: str, shape: list[int]) -> np.ndarray:
    if dtype == "BF16":
        bits = raw.view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(shape)
    kinds = {"F32": np.float32, "F16": np.float16}
    if dtype not in kinds:
        raise ValueError(f"weights of type {dtype} are not supported")
    return raw.view(kinds[dtype]).astype(np.float32).reshape(shape)


def convert(source: Path, destination: Path, precision: str) -> Path:
    """Writes the GGUF file of a checkpoint directory, tensor by tensor."""
    import gguf

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    architecture = config["model_type"]
    if architecture not in ("llama", "qwen2"):
        raise ValueError(f"this converter knows llama and qwen2, not {architecture}")
    matrix_type = getattr(gguf.GGMLQuantizationType, TYPES[precision][0])
    found = [entry for path in sorted(source.glob("*.safetensors")) for entry in read_safetensors(path)]
    found = [entry for entry in found if not (entry[0] == "lm_head.weight" and config["tie_word_embeddings"])]
    partial = destination.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, architecture)
    _describe(writer, config, getattr(gguf.LlamaFileType, TYPES[precision][1]))
    types = [matrix_type if len(shape) == 2 else gguf.GGMLQuantizationType.F32 for _, shape, _ in found]
    for (name, shape, _), kind in zip(found, types, strict=True):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(f"rows of {name} have {shape[-1]} values, {precision} needs a multiple of {block}")
        count = int(np.prod(shape)) // block * size
        writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.float32), count, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for (name, _, read), kind in zip(found, types, strict=True):
        writer.write_tensor_data(gguf.quants.quantize(_arranged(name, read(), config), kind))
    writer.close()
    partial.rename(destination)
    return destination


def _arranged(name: str, tensor: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    if config["model_type"] == "llama" and ".self_attn.q_proj." in name:
        return interleave(tensor, config["num_attention_heads"])
    if config["model_type"] == "llama" and ".self_attn.k_proj." in name:
        return interleave(tensor, config["num_key_value_heads"])
    return tensor


def _describe(writer: Any, config: dict[str, Any], file_type: Any) -> None:
    """Sizes and constants, under the names llama.cpp reads."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rotary positions of type {rope['rope_type']} are not supported")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(file_type)


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[3] not in TYPES:
        sys.exit(f"usage: to_gguf.py CHECKPOINT OUTPUT.gguf {{{','.join(TYPES)}}}")
    print(convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
