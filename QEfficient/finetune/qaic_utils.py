"""QAICCompiler and QAICLoader: the target room under the names fine-tuning code for Cloud AI 100 uses."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from QEfficient.errors import OptionError
from QEfficient.exporter.interface import Interface
from QEfficient.finetune.step_session import StepSession
from QEfficient.models import keys
from QEfficient.models.base import check_destination, given_export
from QEfficient.models.packaging import complete, write_package
from QEfficient.progress import silent
from QEfficient.store.copy import copy_tree
from QEfficient.store.digest import DigestMemo
from QEfficient.store.files import write_errors
from QEfficient.store.home import cache_home
from QEfficient.targets.options import CompileOptions
from QEfficient.targets.qaic import QaicTarget
from QEfficient.targets.registry import require_compiler


class QAICCompiler:
    """Compiles an exported graph for Cloud AI 100 into a directory of its own, past the cache.

    Args:
        num_cores: cores per device, 1 to 16; a Cloud AI 100 Standard card has 14.
        fp16: compute in 16 bits, otherwise in float32.
        mxfp6_matmul: keep the constant weights of matrix products as MXFP6.
    """

    def __init__(self, num_cores: int = 14, fp16: bool = True, mxfp6_matmul: bool = False) -> None:
        if not isinstance(fp16, bool):
            raise OptionError(f"fp16 must be True or False, got {fp16!r}.")
        self.fp16 = fp16
        self._options = CompileOptions(target=QaicTarget.name, num_cores=num_cores, mxfp6_matmul=mxfp6_matmul)

    def compile(
        self,
        onnx_path: str | Path,
        qpc_path: str | Path,
        custom_io_path: str | Path | None = None,
        dry_run: bool = False,
        *,
        batch_size: int = 1,
        seq_len: int | None = None,
    ) -> Path:
        """Compiles the graph as it is; the transforms the target wants (`QaicTarget.transforms`) ran before.

        Args:
            onnx_path: the ``model.onnx`` of an exported step, with its ``interface.json`` beside it.
            qpc_path: a new or empty directory.
            custom_io_path: an IO list to use instead of the one written for the graph.
            dry_run: write everything the compiler takes, and do not run it.
            batch_size, seq_len: exact sizes of a batch; ``seq_len`` None is the model's number of positions.

        Returns:
            ``qpc_path``, now a package.

        Raises:
            TargetUnavailableError: the Apps SDK is not here, and no dry run was asked for.
            OptionError: an option or a path does not fit.
            ArtifactWriteError: the disk is full or not writable; nothing is left at ``qpc_path``.
        """
        place = Path(qpc_path)
        lengths = None if seq_len is None else (seq_len,)
        asked = self._options.replace(batch_size=batch_size, seq_len=lengths, dry_run=dry_run)
        target = QaicTarget(fp16=self.fp16, custom_io=None if custom_io_path is None else Path(custom_io_path))
        require_compiler(target, asked)
        check_destination(place)
        export_key, directory = given_export(Path(onnx_path))
        interface = Interface.load(directory)
        options = target.normalise(complete(asked, interface))
        key = keys.package_key(export_key, [], options.to_json(), {**target.toolchain(), "fp16": str(self.fp16)})
        with write_errors("The package", place):
            place.absolute().parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.absolute().parent) as scratch:
                built = Path(scratch) / "package"
                built.mkdir()
                memo = DigestMemo(cache_home())
                write_package(built, directory, interface, target, options, [], key, memo, silent)
                copy_tree(built, place)
        return place


class QAICLoader:
    """Loads a compiled training package.

    Args:
        qpc_path: the package directory.
        device_ids: cards to load it on; only for packages of a Cloud AI target.
    """

    def __init__(self, qpc_path: str | Path, device_ids: Sequence[int] | None = None) -> None:
        self.qpc_path, self.device_ids = Path(qpc_path), device_ids
        self._session: StepSession | None = None

    def load_model(self) -> None:
        """Checks every file of the package and loads it; a second call loads it anew.

        Raises:
            PackageError: not a package, damaged, or not a training step.
            TargetUnavailableError: it is a dry run, or needs an SDK or a device that is not here.
            OptionError: device ids that do not fit the package, or for one that runs on the host.
        """
        if self._session is not None:
            self._session.close()
            self._session = None
        self._session = StepSession(self.qpc_path, device_ids=self.device_ids)

    def get_session(self) -> StepSession:
        """The loaded session; loads first when that has not happened."""
        if self._session is None:
            self.load_model()
        assert self._session is not None
        return self._session
