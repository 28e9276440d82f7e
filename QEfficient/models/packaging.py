"""Export directory -> package: completes options, runs the transform queue, lets the target compile, seals it."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from QEfficient.errors import OptionError, PackageError, TransformError
from QEfficient.exporter.interface import INTERFACE_FILE, ONNX_FILE, Interface
from QEfficient.models import keys
from QEfficient.progress import Progress
from QEfficient.store.digest import DigestMemo, file_digest
from QEfficient.store.entry import ENTRY_FILE
from QEfficient.store.files import copy_file, place_file
from QEfficient.store.store import ArtifactStore
from QEfficient.targets.base import CompileRequest, Target
from QEfficient.targets.manifest import FileRecord, Manifest, TensorSpec
from QEfficient.targets.options import CompileOptions
from QEfficient.targets.registry import compiling_target

if TYPE_CHECKING:
    import onnx_ir as ir

    from QEfficient.transforms.onnx.base import OnnxTransform

logger = logging.getLogger("QEfficient")

PACKAGES = "packages"
#: Files of an export that are not copied into a package; weights are placed by the target.
_EXPORT_ONLY = {ONNX_FILE, INTERFACE_FILE, ENTRY_FILE}
#: Context length when none is asked for: enough for a short conversation, small enough for any machine.
DEFAULT_CTX_LEN = 1024


def compile_export(
    store: ArtifactStore,
    directory: Path,
    export_key: str,
    asked: CompileOptions,
    queue: Sequence[OnnxTransform],
    report: Progress,
) -> Path:
    """Compiles the export in ``directory``, or finds the package in the store.

    Raises:
        OptionError: the options contradict the model or the target.
        TransformError, ArtifactWriteError: as their names say.
    """
    interface = Interface.load(directory)
    target = compiling_target(asked)
    options = target.normalise(complete(asked, interface))
    ignored = options.cloud_only_set()
    if target.name == "host" and ignored:
        hint = "" if options.simulate is not None else " (simulate='qaic' computes with some of them)"
        logger.warning("recorded, but without effect on the host target: %s%s", ", ".join(ignored), hint)
    # What the target adds to the queue follows from its options and the code, which are in the key.
    key = keys.package_key(export_key, [t.identity() for t in queue], options.identity(), target.toolchain())
    found = store.get(PACKAGES, key)
    if found is not None:
        return found
    label = f"{interface.facts['name']} ({interface.task}, {target.name})"

    def build(place: Path) -> dict[str, Any]:
        return write_package(place, directory, interface, target, options, queue, key, store.memo, report)

    return store.build(PACKAGES, key, build, label, lambda: report("waiting for another process", 0, 0))


def complete(options: CompileOptions, interface: Interface) -> CompileOptions:
    """Fills in what depends on the model and refuses what contradicts it.

    Raises:
        OptionError: an option of the other kind of model, a length beyond the model's positions, or a batching mode
            the graph was not exported for.
    """
    name, limit = interface.facts["name"], interface.facts.get("max_positions")
    _check_kind(options, interface.task)
    if interface.task != "text-generation":
        lengths = options.seq_len or ((limit,) if limit else None)
        _within("seq_len", max(lengths) if lengths else None, limit, name)
        return options.replace(seq_len=lengths)
    indexed = any(spec.name == "batch_index" for spec in interface.inputs)
    _check_slots(options, indexed)
    if not indexed and options.full_batch_size is not None:
        raise OptionError("full_batch_size needs a graph with batch_index: export with continuous_batching=True.")
    _within("ctx_len", options.ctx_len, limit, name)
    default = min(DEFAULT_CTX_LEN, limit or DEFAULT_CTX_LEN)
    if options.ctx_len is None and options.prefill_seq_len is not None:
        default = max(default, options.prefill_seq_len)
        _within("prefill_seq_len", options.prefill_seq_len, limit, name)
    return options.replace(ctx_len=options.ctx_len or default)


def refuse_early(
    options: CompileOptions, task: str, variant: dict[str, Any], config: dict[str, Any], name: str
) -> None:
    """What `complete` would refuse after the export, where a checkpoint's config.json already tells.

    Raises:
        OptionError: as `complete`.
    """
    _check_kind(options, task)
    if task == "text-generation":
        _check_slots(options, bool(variant.get("batch_index")))
    own = config.get("text_config") or config
    limit = next((own[key] for key in ("max_position_embeddings", "n_positions", "max_seq_len") if key in own), None)
    # A config class may read these otherwise; the export knows exactly and `complete` asks it.
    if isinstance(limit, int) and limit > 0:
        for field in ("ctx_len", "prefill_seq_len"):
            _within(field, getattr(options, field), limit, name)
        _within("seq_len", max(options.seq_len) if options.seq_len else None, limit, name)


def _check_kind(options: CompileOptions, task: str) -> None:
    if task == "text-generation":
        if options.seq_len is not None:
            raise OptionError("seq_len is for encoders: a causal model takes prefill_seq_len and ctx_len.")
        return
    if options.simulate is not None and options.mxint8_kv_cache:
        raise OptionError("mxint8_kv_cache is about a KV state, and an encoder keeps none: leave it out.")
    for field in ("ctx_len", "prefill_seq_len", "full_batch_size", "kv_cache_batch_size"):
        if getattr(options, field) is not None:
            raise OptionError(f"{field} is for causal models: an encoder takes seq_len and batch_size.")


def _check_slots(options: CompileOptions, indexed: bool) -> None:
    if indexed and options.full_batch_size is None:
        raise OptionError("this graph was exported for continuous batching: pass full_batch_size.")


def _within(option: str, value: int | None, limit: int | None, name: str) -> None:
    if value is not None and limit is not None and value > limit:
        raise OptionError(f"{option}={value} is more than the {limit} positions {name} was made for: lower it.")


def write_package(
    place: Path,
    directory: Path,
    interface: Interface,
    target: Target,
    options: CompileOptions,
    queue: Sequence[OnnxTransform],
    key: str,
    memo: DigestMemo,
    report: Progress,
) -> dict[str, Any]:
    """Writes one package into the empty directory ``place``; returns what the store wants to know.

    Args:
        directory: the export.
        options: completed and normalised.

    Raises:
        OptionError, TransformError, TargetUnavailableError, ArtifactWriteError: as their names say.
    """
    manifest = Manifest(
        target=target.name,
        task=interface.task,
        model=interface.facts,
        program="",
        inputs=interface.inputs,
        outputs=interface.outputs,
        states=interface.states,
        specializations=target.specializations(options, interface.task),
        options=options.to_json(),
        transforms=[],
        libraries={**keys.library_versions(), **target.toolchain(), "qefficient": keys.__version__},
        parameters=interface.parameters,
        key=key,
    )
    with tempfile.TemporaryDirectory(prefix=".scratch-", dir=place) as scratch:
        workshop = Workshop(interface, Path(scratch), report)
        # The queue of a training step is complete: it decides itself where the target's transforms stand.
        wanted = () if interface.task == "training" else target.transforms(interface.task, options)
        onnx_path, lifted = workshop.run(directory / ONNX_FILE, [*queue, *_resolved(wanted)])
        manifest = manifest.replace(parameters=(*interface.parameters, *lifted))

        originals = frozenset(_identity(path) for path in directory.iterdir() if path.is_file())

        def variant(program: str, names: Sequence[str]) -> ir.Model:
            return workshop.variant(onnx_path, _resolved(names), program)

        with _blaming(queue):
            manifest = target.compile(CompileRequest(onnx_path, place, manifest, options, report, variant, originals))
    manifest = manifest.replace(transforms=workshop.records)
    if queue and target.check().can_run and not options.dry_run:
        with _blaming(queue):
            target.load(place, manifest).close()
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.name not in _EXPORT_ONLY and path.suffix != ".safetensors":
            copy_file(path, place / path.name)
    report("digests", 0, 0)
    # Weights are usually the export's own files under another name: their digests are known by content.
    known = {_identity(p): memo.digest(p) for p in directory.iterdir() if p.suffix == ".safetensors"}
    digests = {}
    for path in sorted(p for p in place.rglob("*") if p.is_file()):
        digests[path.relative_to(place).as_posix()] = known.get(_identity(path)) or file_digest(path)
    manifest.replace(files={n: FileRecord((place / n).stat().st_size, d) for n, d in digests.items()}).save(place)
    return {"digests": digests, "meta": {"target": target.name, "task": interface.task}}


@contextlib.contextmanager
def _blaming(queue: Sequence[OnnxTransform]) -> Iterator[None]:
    """Names the transforms when what they left is no valid graph, so that one they broke never becomes a package."""
    try:
        yield
    except PackageError as error:
        if not queue:
            raise
        names = ", ".join(transform.name for transform in queue)
        raise TransformError(f"the graph is not valid any more after the transforms {names}: {error}") from error


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


class Workshop:
    """Runs transform queues on copies of a graph, with a directory for each, and keeps the manifest records."""

    def __init__(self, interface: Interface, scratch: Path, report: Progress) -> None:
        self.interface, self.scratch, self.report = interface, scratch, report
        self.records: list[dict[str, Any]] = []
        self._count = 0

    def run(self, onnx_path: Path, queue: Sequence[OnnxTransform]) -> tuple[Path, tuple[TensorSpec, ...]]:
        """The graph after the queue, and inputs that were added; without a queue the graph itself."""
        if not queue:
            return onnx_path, ()
        from QEfficient.onnx_io import save_model, weight_files

        model = self.variant(onnx_path, queue, "")
        result = self._room("transformed")
        for location, file in weight_files(model).items():
            place_file(file, result / location)
        save_model(model, result / ONNX_FILE)
        return result / ONNX_FILE, self._lifted(model)

    def variant(self, onnx_path: Path, queue: Sequence[OnnxTransform], program: str) -> ir.Model:
        """The graph after the queue, in memory; ``program`` is what it is for, in the manifest's words."""
        from QEfficient.onnx_io import load_model
        from QEfficient.transforms.onnx.queue import run_queue

        model = load_model(onnx_path)
        records = run_queue(model, queue, self._room("work"), self.report)
        self.records += [{**record, "program": program} for record in records] if program else records
        return model

    def _room(self, name: str) -> Path:
        self._count += 1
        place = self.scratch / f"{self._count}-{name}"
        place.mkdir()
        return place

    def _lifted(self, model: ir.Model) -> tuple[TensorSpec, ...]:
        interface = self.interface
        known = {t.name for t in (*interface.inputs, *interface.parameters)} | {s.input for s in interface.states}
        return tuple(
            TensorSpec(str(value.name), value.dtype.numpy().name, tuple(value.shape.numpy()))
            for value in model.graph.inputs
            if value.name not in known
            and value.dtype is not None
            and value.shape is not None
            and value.shape.is_static()
        )


def _resolved(names: Sequence[str]) -> list[OnnxTransform]:
    if not names:
        return []
    from QEfficient.transforms.onnx.queue import resolve

    return resolve(names)


def write_side_files(
    place: Path, tokenizer: Sequence[Path], generation_config: dict[str, Any], config: dict[str, Any]
) -> None:
    """Puts what a package carries besides program and weights beside an export."""
    for path in tokenizer:
        copy_file(path, place / path.name)
    for name, body in (("generation_config.json", generation_config), ("config.json", config)):
        (place / name).write_text(json.dumps(body, indent=2, sort_keys=True) + "\n", encoding="utf-8")
