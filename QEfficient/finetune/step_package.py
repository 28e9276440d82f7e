"""Step model -> compiled packages: one that returns gradients, one for evaluation, both from one capture."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from QEfficient.errors import OptionError
from QEfficient.exporter.adapters import base_name
from QEfficient.exporter.interface import Interface
from QEfficient.exporter.training.program import TASK, capture_step, write_training_graph
from QEfficient.finetune.step_model import StepModel
from QEfficient.models import keys
from QEfficient.models.packaging import compile_export
from QEfficient.onnx_io import load_model, save_model, weight_files
from QEfficient.progress import Progress, silent
from QEfficient.store.digest import json_digest
from QEfficient.store.files import place_file
from QEfficient.store.store import ArtifactStore
from QEfficient.targets.options import CompileOptions
from QEfficient.targets.registry import compiling_target, get_target
from QEfficient.transforms.onnx.base import OnnxTransform
from QEfficient.transforms.onnx.forward_only import ForwardOnly
from QEfficient.transforms.onnx.queue import TransformLike, resolve

logger = logging.getLogger("QEfficient")

EXPORTS = "exports"
#: How the frozen weights of a package are stored.
BASE_WEIGHTS = ("fp32", "int8", "int4")
RECOMPUTE = ("none", "products", "layers")


@dataclass(frozen=True)
class StepOptions:
    """How a training step is built. Sizes are upper bounds on the host and exact on fixed-shape targets.

    Attributes:
        target: ``host`` or another registered target.
        batch_size: rows of a micro-batch; None means any number on the host.
        seq_len: tokens of a row (``max_ctx_len``); None means up to the model's positions.
        recompute: what the backward pass computes again instead of keeping it: ``none``; ``products``, all but the
            results of matrix products and softmax; ``layers``, each layer's whole forward pass.
        base_weights: ``fp32`` keeps the checkpoint's own precision, ``int8`` and ``int4`` quantize what is frozen.
        block_size: columns that share a scale in ``int4``.
        loss_chunks: parts in which the vocabulary projection is done, so that only one part's logits exist; None takes
            4 for a vocabulary of 8,192 or more and 1 below.
        teacher_top: K of the distillation inputs; 0 leaves them out.
        transforms: the user's own ONNX transforms, run last.
        dry_run: write what the target's compiler takes without compiling; the packages cannot be loaded.
    """

    target: str = "host"
    batch_size: int | None = None
    seq_len: int | None = None
    recompute: str = "products"
    base_weights: str = "fp32"
    block_size: int = 32
    loss_chunks: int | None = None
    teacher_top: int = 0
    transforms: tuple[TransformLike, ...] = ()
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.base_weights not in BASE_WEIGHTS:
            raise OptionError(f"base_weights must be one of {BASE_WEIGHTS}, got {self.base_weights!r}.")
        if self.recompute not in RECOMPUTE:
            raise OptionError(f"recompute must be one of {RECOMPUTE}, got {self.recompute!r}.")
        for name in ("batch_size", "seq_len", "block_size", "loss_chunks"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise OptionError(f"{name} must be an integer of at least 1, got {value!r}.")
        if isinstance(self.teacher_top, bool) or not isinstance(self.teacher_top, int) or self.teacher_top < 0:
            raise OptionError(f"teacher_top must be an integer of at least 0, got {self.teacher_top!r}.")

    def queue(self, vocabulary: int | None = None) -> list[OnnxTransform]:
        """The ONNX transforms of the gradient package, in the order they run; no vocabulary means a classifier."""
        chosen: list[TransformLike] = []
        if self.base_weights != "fp32":
            bits = {"int8": 8, "int4": 4}[self.base_weights]
            chosen.append(f"QuantizeBase:bits={bits},block_size={self.block_size}")
        if vocabulary is not None:  # one chunk, too, rids the head of needless passes
            chosen.append(f"ChunkedLoss:chunks={self.loss_chunks or (8 if vocabulary >= 8192 else 1)}")
        if self.recompute != "none":
            chosen.append(f"Recompute:keep={'products' if self.recompute == 'products' else 'nothing'}")
        chosen.extend(get_target(self.target).transforms(TASK, self.compile_options()))
        return resolve([*chosen, *self.transforms])

    def compile_options(self) -> CompileOptions:
        lengths = None if self.seq_len is None else (self.seq_len,)
        return CompileOptions(target=self.target, batch_size=self.batch_size, seq_len=lengths, dry_run=self.dry_run)


@dataclass(frozen=True)
class StepPackages:
    """Where the stages' products are.

    Attributes:
        graph: directory of the exported joint graph (``model.onnx``, ``interface.json``).
        train: the compiled package that returns gradients.
        evaluate: the compiled package without a backward pass.
    """

    graph: Path
    train: Path
    evaluate: Path


def build_step(model: StepModel, options: StepOptions, store: ArtifactStore, report: Progress = silent) -> StepPackages:
    """Captures, transforms and compiles a training step, or finds what was made before in the store.

    Raises:
        ExportError: the model cannot be captured, or an operator has no ONNX form.
        TransformError, OptionError, TargetUnavailableError, ArtifactWriteError: as their names say.
    """
    asked = options.compile_options()
    compiling_target(asked)
    queue = options.queue(model.vocabulary)
    key, graph = export_step(model, store, report, teacher_top=options.teacher_top)
    train = compile_export(store, graph, key, asked, queue, report)
    forward_key, forward = _forward_graph(key, graph, store)
    fit = [t for t in queue if t.name in ("QuantizeBase", "FixTrainingOps", "FP16Clip")]
    evaluate = compile_export(store, forward, forward_key, asked, fit, report)
    return StepPackages(graph, train, evaluate)


def export_step(
    model: StepModel, store: ArtifactStore, report: Progress = silent, *, teacher_top: int = 0
) -> tuple[str, Path]:
    """The exported joint graph: (key, directory)."""
    key = json_digest(
        {
            "artefact": "training step",
            "model": model.identity,
            "teacher_top": teacher_top,
            "libraries": keys.library_versions(),
            "qefficient": keys.__version__,
            "code": keys.code_digest(),
        }
    )

    def build(directory: Path) -> dict[str, Any]:
        report("finding weights", 0, 3)
        names, trained = model.file_names, {model.file_names[name] for name in model.trained}
        with tempfile.TemporaryDirectory(prefix=".scratch-", dir=directory) as scratch:
            # First, for a checkpoint that lacks a tensor says so here, and capturing takes a while.
            weights = {n: ref for n, ref in model.find_weights(Path(scratch)).items() if n not in trained}
            frozen = model.aliases()
            report("capturing forward and backward", 1, 3)
            graph = capture_step(model.step(teacher_top), lambda name: names.get(name) or base_name(name))
            report("attaching weights", 2, 3)
            facts = {**model.facts, "name": model.name, "trained_modules": list(model.trained)}
            write_training_graph(graph, weights, frozen, directory, facts).save(directory)
        return {"meta": {"libraries": keys.library_versions(), "task": "training"}}

    waiting = lambda: report("waiting for another process", 0, 0)  # noqa: E731
    return key, store.build(EXPORTS, key, build, f"{model.name} (training step, ONNX)", waiting)


def _forward_graph(key: str, graph: Path, store: ArtifactStore) -> tuple[str, Path]:
    """The joint graph without its gradients, as an export of its own."""
    forward_key = json_digest({"artefact": "evaluation step", "of": key, "code": keys.code_digest()})

    def build(directory: Path) -> None:
        interface = Interface.load(graph)
        model = load_model(graph / "model.onnx")
        ForwardOnly().apply(model, directory)
        for location, file in weight_files(model).items():
            place_file(file, directory / location)
        save_model(model, directory / "model.onnx")
        kept = {str(value.name) for value in model.graph.outputs}
        outputs = tuple(spec for spec in interface.outputs if spec.name in kept)
        Interface(
            interface.task, interface.inputs, outputs, (), {**interface.facts, "evaluation": True}, interface.parameters
        ).save(directory)

    label = f"{Interface.load(graph).facts['name']} (evaluation step, ONNX)"
    return forward_key, store.build(EXPORTS, forward_key, build, label)


def transform_log(packages: Sequence[Path]) -> list[dict[str, Any]]:
    """What the ONNX transforms of packages recorded, in order."""
    from QEfficient.targets.manifest import Manifest

    return [record for package in packages for record in Manifest.load(package).transforms]
