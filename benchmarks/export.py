"""Memory and time of an export at growing model sizes: does memory stay flat when the model does not?

For each shape a bf16 safetensors checkpoint of random bytes is written to disk; one process exports it into an empty
cache, a second process exports it again and finds the result. Memory is the kernel's peak resident set (VmHWM) of the
exporting process above what it needs after its imports. Run alone on the machine.

    python benchmarks/export.py --output docs/export_cost.md
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

console = Console(stderr=True)

#: Name -> LLaMA configuration. The 8 B shape is that of Llama-3.1-8B, the 1 B shape that of Llama-3.2-1B.
SHAPES: dict[str, dict[str, int]] = {
    "0.1B": {"hidden_size": 768, "intermediate_size": 2048, "layers": 12, "heads": 12, "kv": 4, "vocab_size": 32000},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "layers": 16, "heads": 32, "kv": 8, "vocab_size": 128256},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "layers": 32, "heads": 32, "kv": 8, "vocab_size": 128256},
}
#: Shapes whose head shares the embedding's weights.
TIED = {"1B"}
SHARD_BYTES = 5_000_000_000

WORKER = """
import json, sys, time
started = time.perf_counter()
def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024
directory, home, cold = sys.argv[1], sys.argv[2], sys.argv[3] == "cold"
from QEfficient import QEFFAutoModelForCausalLM
if cold:  # everything an export imports, so that the baseline holds the libraries
    import QEfficient.exporter.program, QEfficient.exporter.conversion, QEfficient.models.factories
    import transformers.models.llama.modeling_llama
    from transformers import AutoModelForCausalLM
baseline = status("VmRSS")
began = time.perf_counter()
path = QEFFAutoModelForCausalLM.from_pretrained(directory, cache_home_dir=home).export(progress=False)
now = time.perf_counter()
print(json.dumps(dict(path=str(path), baseline=baseline, peak=status("VmHWM"), export_s=now - began,
                      process_s=now - started, torch="torch" in sys.modules)))
"""


def configuration(name: str) -> dict:
    """The Hugging Face configuration of a shape."""
    shape = SHAPES[name]
    return {
        "hidden_size": shape["hidden_size"],
        "intermediate_size": shape["intermediate_size"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv"],
        "vocab_size": shape["vocab_size"],
        "tie_word_embeddings": name in TIED,
    }


def tensors(config: dict) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a LLaMA checkpoint."""
    hidden, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    out = [("model.embed_tokens.weight", (vocab, hidden))]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, shape in (
            ("self_attn.q_proj", (hidden, hidden)),
            ("self_attn.k_proj", (kv, hidden)),
            ("self_attn.v_proj", (kv, hidden)),
            ("self_attn.o_proj", (hidden, hidden)),
            ("mlp.gate_proj", (mlp, hidden)),
            ("mlp.up_proj", (mlp, hidden)),
            ("mlp.down_proj", (hidden, mlp)),
            ("input_layernorm", (hidden,)),
            ("post_attention_layernorm", (hidden,)),
        ):
            out.append((f"{prefix}.{name}.weight", shape))
    out.append(("model.norm.weight", (hidden,)))
    if not config["tie_word_embeddings"]:
        out.append(("lm_head.weight", (vocab, hidden)))
    return out


def write_checkpoint(directory: Path, config: dict) -> tuple[int, int]:
    """A sharded bf16 checkpoint of random bytes; returns (parameters, bytes)."""
    from QEfficient.safetensors_io import SafetensorsWriter

    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    room = SHARD_BYTES
    for name, shape in tensors(config):
        size = 2 * math.prod(shape)
        if shards[-1] and size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append((name, shape))
        room -= size
    noise = bytearray(os.urandom(1 << 26))
    noise[1::2] = bytes(0x3C for _ in range(len(noise) // 2))  # exponents near 1: finite bf16 numbers
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        writer = SafetensorsWriter(directory / file, [(name, "BF16", shape) for name, shape in shard])
        for name, shape in shard:
            size = 2 * math.prod(shape)
            data = (noise * (size // len(noise) + 1))[:size]
            writer.write(name, memoryview(data))
            weight_map[name] = file
            total += size
        writer.close()
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    body = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2, **config,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(body, indent=2))
    return total // 2, total


def run(directory: Path, home: Path, mode: str) -> dict:
    """One export in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(directory), str(home), mode], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"the export failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--workdir", type=Path, help="where to put the checkpoints (default: a temporary directory)")
    parser.add_argument("--output", type=Path, help="write the table to this Markdown file")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.workdir, prefix="export-bench-") as scratch:
        for name in arguments.shapes:
            directory, home = Path(scratch, name), Path(scratch, f"home-{name}")
            directory.mkdir()
            console.print(f"{name}: writing the checkpoint")
            parameters, size = write_checkpoint(directory, configuration(name))
            time.sleep(2.5)  # a file this young is hashed again at every look (see store/digest.py)
            console.print(f"{name}: exporting {parameters / 1e9:.2f} B parameters")
            cold = run(directory, home, "cold")
            warm = [run(directory, home, "warm") for _ in range(3)]
            onnx = Path(cold["path"])
            rows.append(
                {
                    "name": name,
                    "parameters": parameters,
                    "size": size,
                    "graph": onnx.stat().st_size,
                    **cold,
                    "above": cold["peak"] - cold["baseline"],
                    "warm_s": sorted(w["process_s"] for w in warm)[1],
                    "warm_torch": any(w["torch"] for w in warm),
                }
            )
            console.print(rows[-1])
            shutil.rmtree(directory)
            shutil.rmtree(home)
    text = table(rows)
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


def table(rows: list[dict]) -> str:
    """The result as Markdown, with the command and the machine."""
    lines = [
        "# What an export costs",
        "",
        f"Made by `python benchmarks/export.py` on {time.strftime('%Y-%m-%d')}, {platform.machine()}, "
        f"{os.cpu_count()} cores, Python {platform.python_version()}. Checkpoints in bf16 safetensors on disk, "
        "empty cache; digests of all weight bytes included. Warm: a new process finds the export in the cache "
        "(whole process after interpreter start, median of 3; torch is not imported).",
        "",
        "| shape | parameters | checkpoint | after imports | peak above that | cold export | graph file | warm |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['parameters'] / 1e9:.2f} B | {row['size'] / 1e9:.2f} GB "
            f"| {row['baseline'] / 1e6:.0f} MB | {row['above'] / 1e6:.0f} MB | {row['export_s']:.1f} s "
            f"| {row['graph'] / 1e3:.0f} kB | {row['warm_s']:.2f} s |"
        )
    if len(rows) > 1:
        growth = (rows[-1]["above"] - rows[0]["above"]) / 1e6
        lines += ["", f"Growth of the peak from {rows[0]['name']} to {rows[-1]['name']}: {growth:+.0f} MB."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
