"""``run.json``: with what a run was made - libraries, machine, size of what trains - noted by the run itself."""

from __future__ import annotations

import json
import os
import platform
import re
from pathlib import Path
from typing import Any

from QEfficient.errors import InputError
from QEfficient.finetune.arguments import QEffTrainingArgs
from QEfficient.finetune.checkpoint import RUN
from QEfficient.finetune.compiled_step import CompiledStep
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.data.database import is_database
from QEfficient.finetune.data.named import dataset_names
from QEfficient.finetune.settings_file import write_text
from QEfficient.models.keys import library_versions
from QEfficient.targets.tuning import processor
from QEfficient.version import __version__

#: What `QEfficient.refine` writes beside ``run.json``: what was tuned, how, and the proof of the first step.
CONFIG_FILE, ARGUMENTS_FILE, PROOF_FILE = "refine_config.yaml", "training_args.yaml", "validate.json"
#: Both of the first two as one file, which `qefficient finetune` runs again.
RUN_FILE = "run.yaml"
LIBRARIES = ("torch", "transformers", "peft", "datasets", "onnxruntime")
#: Where names are told from files, a hub id has an owner.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def write_record(directory: Path, config: QEffConfig, args: QEffTrainingArgs, step: CompiledStep, steps: int) -> Path:
    """Writes ``run.json`` atomically; returns its path.

    Args:
        steps: optimizer steps of the whole run.
    """
    parameters = list(step.parameters())
    body: dict[str, Any] = {
        "steps": steps,
        "base_model": _named(config.model_id),
        "dataset": _named(config.dataset_name),
        "trained_tensors": len(parameters),
        "trained_parameters": sum(parameter.numel() for parameter in parameters),
        "target": args.target,
        "processes": args.world_size,
        "machine": {
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "libraries": {"qefficient": __version__, "python": platform.python_version(), **library_versions(LIBRARIES)},
    }
    return write_text(directory / RUN, json.dumps(body, indent=1) + "\n", "the record of the run")


def forget_record(directory: Path) -> None:
    """Removes what an earlier run measured, before a new one begins: its numbers are not the new one's."""
    for name in (RUN, PROOF_FILE):
        (directory / name).unlink(missing_ok=True)


def read_record(directory: Path) -> dict[str, Any]:
    """What `write_record` wrote; InputError when there was no run."""
    try:
        body = json.loads((directory / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        body = None
    if not isinstance(body, dict) or "libraries" not in body:
        raise InputError(
            f"{directory} holds no finished run: it has no {RUN}, which qefficient finetune writes at the end; name "
            "the --output of a run."
        )
    return body


def _named(name: object) -> dict[str, Any]:
    """A model or data set as others may know it: a hub id, or the last part of a local name."""
    if not isinstance(name, str):
        return {"name": "data in memory", "hub": False}
    hub = (
        _HUB_ID.fullmatch(name) is not None
        and not Path(name).expanduser().exists()
        and name not in dataset_names()
        and not is_database(name)
    )
    return {"name": name if hub else "a database" if is_database(name) else Path(name).name, "hub": hub}
