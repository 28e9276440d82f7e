"""Opens a package: checks that it is ours and whole, loads it on its target, returns the runner for its task."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from QEfficient.errors import ArtifactWriteError, OptionError, PackageError
from QEfficient.store.digest import DigestMemo, file_digest
from QEfficient.store.home import cache_home
from QEfficient.targets.base import CardSettings, Session, card_settings
from QEfficient.targets.manifest import Manifest
from QEfficient.targets.registry import get_target
from QEfficient.targets.tuning import Tuning, available_cores, recall

if TYPE_CHECKING:
    from QEfficient.engine.tokenizer import PackageTokenizer

#: Task of the manifest -> the class that runs it.
RUNNERS = {
    "text-generation": "QEfficient.engine.text:CompiledCausalLM",
    "feature-extraction": "QEfficient.engine.encoder:CompiledEncoder",
    "text-classification": "QEfficient.engine.encoder:CompiledClassifier",
}
#: Files that running a package reads beside its program. One the manifest does not list was put there by somebody.
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates",
)


#: Beyond this a session spends its time starting threads; a mistyped number should not look like a hang.
MAX_THREADS = 256


class LoadedPackage:
    """A package ready to run. Use as a context manager, or call `close` to free its memory."""

    def __init__(self, directory: Path, manifest: Manifest, session: Session) -> None:
        self.directory, self.manifest, self.session = directory, manifest, session
        self._tokenizer: PackageTokenizer | None = None

    @property
    def tokenizer(self) -> PackageTokenizer:
        """The tokenizer that came with the package; InputError when it came with none."""
        if self._tokenizer is None:
            from QEfficient.engine.tokenizer import PackageTokenizer

            self._tokenizer = PackageTokenizer.from_directory(self.directory)
        return self._tokenizer

    def limit_chunk(self, tokens: int) -> None:
        """Runs at most so many tokens in one step, where a package can choose: prompts, texts to embed."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the package; see the subclass for its task."""
        raise NotImplementedError

    def close(self) -> None:
        self.session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.manifest.model.get('name')!r}, target={self.manifest.target!r})"


def open_package(
    directory: str | Path,
    *,
    verify: bool = True,
    threads: int | None = None,
    tuning: Tuning | None = None,
    device_ids: Sequence[int] | None = None,
    timeout: float = CardSettings.timeout,
) -> LoadedPackage:
    """Loads a package directory made by ``compile()`` or ``save_pretrained()``.

    Needs onnxruntime, numpy and tokenizers only: neither torch nor transformers is imported.

    Args:
        directory: the package.
        verify: compare the size and BLAKE3 digest of every file with the manifest; False only for packages that
            were just checked.
        threads: threads for the program; None uses what was measured by ``qefficient tune``, else every core this
            process may run on.
        tuning: how to run it, instead of what was measured.
        device_ids: Cloud AI devices to load it on, as many as it was compiled for; None takes those it was compiled
            with, or the first ones.
        timeout: seconds that one step on a card may take.

    Raises:
        PackageError: not a package, of a newer format, incomplete, changed, or for a target that is not here.
        TargetUnavailableError: it needs an SDK or a device that is not here.
        OptionError: ``threads``, ``device_ids`` or ``timeout`` are no such thing, or do not fit the package.
    """
    card = card_settings(device_ids, timeout)
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise OptionError(f"threads must be an integer of at least 1, or None for every core, got {threads!r}.")
    if threads is not None and threads > MAX_THREADS:
        raise OptionError(f"threads={threads} is more than any machine here can use: pass at most {MAX_THREADS}.")
    place = Path(directory).expanduser()
    manifest = Manifest.load(place)
    verify_files(place, manifest, digests=verify)
    if manifest.task not in RUNNERS:
        raise PackageError(f"{place} does {manifest.task!r}, which this version cannot run: upgrade QEfficient.")
    try:
        target = get_target(manifest.target)
    except OptionError:
        raise PackageError(
            f"{place} was compiled for the target {manifest.target!r}, which this version does not have: upgrade "
            "QEfficient or compile the package for another target."
        ) from None
    if tuning is None:
        tuning = recall(manifest, available_cores())
    module, _, name = RUNNERS[manifest.task].partition(":")
    # The target's runtime opens a program outside the interpreter's lock; importing takes a tenth of that time.
    importing = threading.Thread(target=importlib.import_module, args=(module,))
    importing.start()
    try:
        session = target.load(place, manifest, threads=threads, tuning=tuning, card=card)
    finally:
        importing.join()
    runner: LoadedPackage = getattr(importlib.import_module(module), name)(place, manifest, session)
    if tuning is not None and tuning.chunk is not None:
        runner.limit_chunk(tuning.chunk)
    return runner


def _remembering() -> Callable[[Path], str]:
    """Digests of files, remembered where there is a cache to remember them in: running a package needs none."""
    try:
        return DigestMemo(cache_home()).digest
    except ArtifactWriteError:
        return file_digest


def verify_files(directory: Path, manifest: Manifest, *, digests: bool = True) -> None:
    """Checks that every file of the manifest is there with its size and, with ``digests``, its content.

    A big file that was checked before and has not been written since is not read again (`DigestMemo`).

    Raises:
        PackageError: naming the first file that is missing or differs.
    """
    if manifest.program not in manifest.files:
        raise PackageError(f"{directory} lists no program: compile the package again.")
    digest = _remembering() if digests else None
    for name, record in manifest.files.items():
        path = directory / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise PackageError(f"{directory} lists the file {name!r} outside itself: refused.")
        if not path.is_file():
            raise PackageError(f"{directory} is incomplete, {name} is missing: compile or copy it again.")
        if path.stat().st_size != record.size:
            raise PackageError(f"{path} is {path.stat().st_size} bytes, not {record.size}: the package is corrupt.")
        if digest is not None and digest(path) != record.blake3:
            raise PackageError(f"{path} was changed after it was compiled: refused (compile the package again).")
    for name in SIDE_FILES:
        if name not in manifest.files and (directory / name).exists():
            raise PackageError(f"{directory / name} was added after the package was compiled: refused (remove it).")
