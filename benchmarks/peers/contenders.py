"""Who takes part: engines, their interpreters, and the precisions in which each runs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peers.process import Launch, PeerError, one_answer

HERE = Path(__file__).resolve().parent
#: Where ``make bench-peers`` puts an environment per name.
ENVIRONMENTS = HERE / ".venvs"
OURS = "qefficient"


@dataclass(frozen=True)
class EngineInfo:
    """An engine as the report names it; ``environment`` is empty for engines of this project's own environment."""

    title: str
    script: str
    environment: str = ""


ENGINES = {
    OURS: EngineInfo("QEfficient", "qefficient_worker.py"),
    "torch": EngineInfo("HF torch", "torch_worker.py"),
    "optimum": EngineInfo("ONNX Runtime via Optimum", "optimum_worker.py", "optimum"),
    "genai": EngineInfo("onnxruntime-genai", "genai_worker.py", "genai"),
    "openvino": EngineInfo("OpenVINO GenAI", "openvino_worker.py", "openvino"),
    "llama": EngineInfo("llama.cpp", "llama_worker.py", "llama"),
    "sentences": EngineInfo("sentence-transformers", "sentences_worker.py", "optimum"),
}
#: Names that ``--peer NAME=PYTHON`` takes.
PEER_NAMES = sorted({info.environment for info in ENGINES.values() if info.environment})


@dataclass(frozen=True)
class Contender:
    """An engine in one precision; ``group`` is the class of precisions it is compared in."""

    engine: str
    precision: str
    group: str

    @property
    def key(self) -> str:
        return f"{self.engine}-{self.precision}"

    @property
    def title(self) -> str:
        return f"{ENGINES[self.engine].title} {_SPELLED.get(self.precision, self.precision)}"

    @property
    def ours(self) -> bool:
        return self.engine == OURS


_SPELLED = {
    "q4_0": "Q4_0",
    "q4_0-own": "Q4_0 by its quantizer",
    "q8_0": "Q8_0",
    "f32": "F32",
    "onnx": "ONNX",
    "onnx-int8": "ONNX int8",
}
#: Classes of weight precision, in the order they are measured. Only engines of one class are compared.
GROUPS = ("float", "int8", "int4")
#: Who makes text; the first one is what the quality of the others is compared with.
GENERATORS = tuple(
    Contender(engine, precision, group)
    for group, entries in {
        "float": (
            (OURS, "fp32"), ("torch", "fp32"), ("torch", "bf16"), ("optimum", "fp32"), ("genai", "fp32"),
            ("openvino", "fp32"), ("llama", "f32"), ("llama", "bf16"),
        ),
        "int8": ((OURS, "int8"), ("genai", "int8"), ("openvino", "int8"), ("llama", "q8_0")),
        "int4": ((OURS, "int4"), (OURS, "mixed"), ("genai", "int4"), ("openvino", "int4"), ("llama", "q4_0"),
                 ("llama", "q4_0-own")),
    }.items()
    for engine, precision in entries
)  # fmt: skip
EMBEDDERS = (
    Contender(OURS, "fp32", "float"),
    Contender("sentences", "torch", "float"),
    Contender("sentences", "onnx", "float"),
    Contender(OURS, "int8", "int8"),
    Contender("sentences", "onnx-int8", "int8"),
    Contender(OURS, "int4", "int4"),
    Contender(OURS, "mixed", "int4"),
)


def interpreters(given: Iterable[str]) -> dict[str, str]:
    """Environment name -> interpreter, from ``NAME=PYTHON`` arguments and the default places.

    Raises:
        ValueError: an argument is not of that form, or names no environment.
    """
    found = {name: str(ENVIRONMENTS / name / "bin" / "python") for name in PEER_NAMES}
    for entry in given:
        name, equals, path = entry.partition("=")
        if not equals or name not in PEER_NAMES:
            raise ValueError(f"--peer takes NAME=PYTHON with NAME one of {', '.join(PEER_NAMES)}; got {entry!r}")
        found[name] = path
    return found


def launch(engine: str, pythons: Mapping[str, str], work: Path, threads: int, **settings: str) -> Launch:
    """How workers of an engine are started."""
    info = ENGINES[engine]
    python = pythons[info.environment] if info.environment else sys.executable
    environment = {"QEFF_HOME": str(work / "home"), **settings}
    command = (python, str(HERE / info.script))
    return Launch(command, work / "logs" / f"{engine}.log", threads, tuple(environment.items()))


def installed(engines: Sequence[str], pythons: Mapping[str, str], work: Path) -> tuple[dict, dict[str, str]]:
    """(engine -> versions of what is measured, engine -> why it cannot take part)."""
    present: dict[str, dict[str, str]] = {}
    missing: dict[str, str] = {}
    for engine in engines:
        starter = launch(engine, pythons, work, 1)
        if not Path(starter.command[0]).exists():
            missing[engine] = "not installed"
            continue
        try:
            answer = one_answer(starter, "--versions", limit=60)
            present[engine] = {name: text for name, text in answer.items() if name != "seconds"}
        except PeerError as error:
            missing[engine] = f"not installed ({error})" if "PackageNotFound" in str(error) else str(error)
    return present, missing
