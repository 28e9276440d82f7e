"""A compiled package together with adapters: the same program and weights by reference, and the adapters' files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from QEfficient.engine.adapter_file import FILES, AdapterFile
from QEfficient.engine.adapters import ADAPTERS_DIR
from QEfficient.errors import ModelLoadError
from QEfficient.models.packaging import PACKAGES
from QEfficient.store.digest import file_digest, json_digest
from QEfficient.store.files import copy_file, place_file
from QEfficient.store.store import ArtifactStore
from QEfficient.targets.manifest import FileRecord, Manifest


def with_adapters(store: ArtifactStore, package: Path, adapters: Mapping[str, AdapterFile], active: str | None) -> Path:
    """The package that carries these adapters, in the store; ``package`` itself when there are none.

    Nothing is compiled: packages that differ in their adapters share every other byte.

    Raises:
        InputError: an adapter does not fit the package.
        ModelLoadError: an adapter's file was changed while it was read.
    """
    if not adapters:
        return package
    manifest = Manifest.load(package)
    for adapter in adapters.values():
        adapter.check(manifest.parameters)
    digests = {name: {file: file_digest(a.directory / file) for file in FILES} for name, a in adapters.items()}
    key = json_digest({"artefact": "package", "package": manifest.key, "adapters": digests, "active": active})

    def build(place: Path) -> dict[str, Any]:
        records = dict(manifest.files)
        for name in manifest.files:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            place_file(package / name, place / name)
        for name, adapter in adapters.items():
            (place / ADAPTERS_DIR / name).mkdir(parents=True)
            for file, digest in digests[name].items():
                path = place / ADAPTERS_DIR / name / file
                copy_file(adapter.directory / file, path)
                if file_digest(path) != digest:
                    raise ModelLoadError(f"{adapter.directory / file} was changed while it was read: try again.")
                records[path.relative_to(place).as_posix()] = FileRecord(path.stat().st_size, digest)
        lora = {**manifest.model["lora"], "adapters": list(adapters), "active": active}
        manifest.replace(key=key, model={**manifest.model, "lora": lora}, files=records).save(place)
        return {
            "digests": {name: record.blake3 for name, record in records.items()},
            "meta": {"target": manifest.target, "task": manifest.task},
        }

    names = ", ".join(adapters)
    return store.build(PACKAGES, key, build, f"{manifest.model['name']} ({manifest.task}, adapters: {names})")
