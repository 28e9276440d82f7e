"""Captured training steps of tiny models, a hand-written step that needs no capture, and how to run them."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common
import onnxruntime as ort
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import NUM_LABELS, VOCAB_SIZE, tiny_causal_lm, tiny_classifier

from QEfficient.exporter.training.program import capture_step
from QEfficient.exporter.training.steps import ClassificationStep, TokenStep, output_head
from QEfficient.transforms.pytorch.patching import use_our_attention

FAMILIES = ("llama", "gpt2", "gemma2", "qwen3_moe", "bert")
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "bert": ["query", "value"], "qwen3_moe": _ATTENTION}


def file_name(name: str) -> str:
    """A parameter's name in files: PEFT's additions stay on adapters only."""
    if "lora_" not in name:
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return name.replace(".default.", ".")


def capture(family: str) -> bytes:
    """The serialised step of a tiny model with LoRA on its linear layers.

    "llama-full" trains every parameter instead, "llama-teacher" has a second loss on four teacher tokens per row, and
    "llama-wide" has a vocabulary of 32,000.
    """
    kind, _, variant = family.partition("-")
    options = {"vocab_size": 32000} if variant == "wide" else {}
    make = tiny_classifier if kind == "bert" else tiny_causal_lm
    model: Any = make(kind, attn_implementation="eager", **options).eval()
    base = model
    if variant != "full":
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=_TARGETS.get(kind, "all-linear")))
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero, it would make every gradient of lora_A zero
                parameter.data.normal_(0, 0.1)
    use_our_attention(base)
    if kind == "bert":
        step: Any = ClassificationStep(model)
    else:
        step = TokenStep(model, output_head(base), teacher_top=4 if variant == "teacher" else 0)
    graph = capture_step(step, file_name)
    values = {file_name(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    for name, value in graph.model.graph.initializers.items():
        if value.const_value is None:
            value.const_value = ir.tensor(values[name].detach().numpy(), name=name)
    return ir.to_proto(graph.model).SerializeToString()


def load(content: bytes) -> ir.Model:
    return ir.from_proto(onnx.load_from_string(content))


def feeds(model: ir.Model, batch: int = 3, seq: int = 17, rows: int = 20, seed: int = 0) -> dict[str, np.ndarray]:
    """Random data inputs: one row padded, prediction rows in order, some of them twice."""
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, seq), np.int64)
    mask[-1, int(seq * 0.6) :] = 0
    made = {
        "input_ids": rng.integers(1, VOCAB_SIZE, (batch, seq)),
        "attention_mask": mask,
        "position_ids": np.where(mask > 0, np.arange(seq), 0),
        "rows": np.sort(rng.integers(0, batch * seq, rows)),
        "row_labels": rng.integers(0, VOCAB_SIZE, rows),
        "row_weights": rng.random(rows).astype(np.float32),
        "labels": rng.integers(0, NUM_LABELS, batch),
        "weights": rng.random(batch).astype(np.float32),
        "teacher_ids": rng.integers(0, VOCAB_SIZE, (rows, 4)),
        "teacher_logprobs": np.log(rng.dirichlet(np.ones(5), rows)[:, :4]).astype(np.float32),
        "teacher_weights": rng.random(rows).astype(np.float32),
    }
    return {str(value.name): made[str(value.name)] for value in model.graph.inputs}


def run(
    model: ir.Model, inputs: dict[str, np.ndarray], optimized: Path | None = None, basic: bool = False
) -> dict[str, np.ndarray]:
    """All outputs; ``optimized`` is where ONNX Runtime writes the graph it really runs.

    ``basic`` leaves out the fusions that would compute int4 products with int8 activations.
    """
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if basic:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, inputs), strict=True))


def worst(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """The largest difference of any output, relative to that output's largest value."""
    assert got.keys() == wanted.keys()
    return max(float(np.abs(got[k] - wanted[k]).max() / max(np.abs(wanted[k]).max(), 1e-6)) for k in wanted)


def mlp_step(layers: int, width: int) -> ir.Model:
    """A step written by hand: ``layers`` times x + tanh(tanh(x W)), then loss sum(row_weights * (x * norm)^2).

    Inputs ``x`` and ``row_weights`` [rows, width]; gradients of every ``layers.<n>.weight``. Weights are
    positive, so where the inputs are nothing cancels: an infinite ``row_weights`` gives infinite gradients and no NaN.
    """
    rng = np.random.default_rng(0)
    tape = ir.tape.Tape()

    def op(kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        value = tape.op(kind, inputs, attributes)
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["rows", width])
        return value

    x, row_weights = (ir.val(name, ir.DataType.FLOAT, ["rows", width]) for name in ("x", "row_weights"))
    one, two = (tape.initializer(ir.tensor(np.float32(x), name=name)) for x, name in ((1, "one"), (2, "two")))
    norm = tape.initializer(ir.tensor(np.full(width, 0.5, np.float32), name="model.norm.weight"))
    inputs, kept, value = [x, row_weights], [], x
    for n in range(layers):
        array = (rng.random((width, width)) / width).astype(np.float32)
        weight = tape.initializer(ir.tensor(array, name=f"model.layers.{n}.weight"))
        inner = op("Tanh", op("MatMul", value, weight))
        outer = op("Tanh", inner)
        kept.append((value, weight, inner, outer))
        value = op("Add", value, outer)
    final = op("Mul", value, norm)
    weighted = op("Mul", final, row_weights)
    loss = tape.op("ReduceSum", [op("Mul", weighted, final)], {"keepdims": 0})
    outputs, gradient = [loss], op("Mul", op("Mul", weighted, two), norm)
    for n, (before, weight, inner, outer) in reversed(list(enumerate(kept))):
        d_inner = op("Mul", gradient, op("Sub", one, op("Mul", outer, outer)))
        d_product = op("Mul", d_inner, op("Sub", one, op("Mul", inner, inner)))
        outputs.append(op("Gemm", before, d_product, transA=1))
        outputs[-1].name, outputs[-1].shape = f"grad/model.layers.{n}.weight", ir.Shape([width, width])
        gradient = op("Add", gradient, op("Gemm", d_product, weight, transB=1))
    loss.name, loss.type, loss.shape = "loss", ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    graph = ir.Graph(
        inputs, outputs, nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 21}, name="s"
    )
    model = ir.Model(graph, ir_version=10)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    return load(ir.to_proto(model).SerializeToString())


_MEASURE = """
    import json, sys
    import numpy as np
    import onnxruntime as ort
    from pathlib import Path
    from QEfficient.targets.host import TRAINING_RUNTIME
    from QEfficient.targets.host_runtime import set_up
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    set_up(options, TRAINING_RUNTIME)
    session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
    inputs = dict(np.load(sys.argv[2]))
    def status(field):  # not getrusage: its peak is inherited from the process that started this one
        line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field))
        return int(line.split()[1]) * 1024
    before = status("VmRSS")
    session.run(None, inputs)
    print(json.dumps({"loaded": before, "peak": status("VmHWM")}))
"""


def memory(model: ir.Model, inputs: dict[str, np.ndarray], directory: Path) -> tuple[int, int]:
    """Bytes a process of its own holds after loading, and how many more at the peak of one step."""
    ir.save(model, directory / "model.onnx")
    np.savez(directory / "inputs.npz", **inputs)
    command = [sys.executable, "-c", textwrap.dedent(_MEASURE), directory / "model.onnx", directory / "inputs.npz"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(done.stdout.splitlines()[-1])
    return found["loaded"], found["peak"] - found["loaded"]
