"""Finds a checkpoint: a local directory, or a Hugging Face hub id through the hub's own cache."""

from __future__ import annotations

from pathlib import Path

from QEfficient.errors import ModelLoadError

#: What a package needs from a repository; pickled weights and other frameworks stay on the hub.
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]


def resolve(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    marker: str | None = "config.json",
) -> Path:
    """The directory that holds the checkpoint.

    Args:
        marker: a file that a local directory must have; None for any.

    Raises:
        ModelLoadError: the path does not exist or is empty; the id is malformed, unknown, gated, or neither
            reachable nor in the cache.
    """
    name = str(name_or_path)
    if isinstance(name_or_path, str) and not name.strip():  # as a path it would mean the working directory
        raise ModelLoadError("the model name is empty: pass a directory or a hub id such as 'org/name'.")
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not any(path.iterdir()):
            raise ModelLoadError(f"{path} is an empty directory: expected config.json and model.safetensors.")
        if marker == "config.json" and not (path / marker).is_file() and (path / "adapter_config.json").is_file():
            raise ModelLoadError(
                f"{path} is an adapter, not a whole model: run `qefficient merge {path} --output DIRECTORY`, or load "
                "it with QEFFAutoPeftModelForCausalLM."
            )
        if marker is not None and not (path / marker).is_file():
            raise ModelLoadError(f"{path} has no {marker}: it is not a Hugging Face checkpoint directory.")
        return path
    if path.exists():
        raise ModelLoadError(f"{path} is a file: pass the checkpoint's directory.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise ModelLoadError(f"{name} does not exist: pass an existing directory or a hub id such as 'org/name'.")
    return _download(name, revision, token, cache_dir, local_files_only)


def _download(
    name: str, revision: str | None, token: str | None, cache_dir: str | Path | None, local_files_only: bool
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=PATTERNS,
            )
        )
    except HFValidationError:
        raise ModelLoadError(
            f"{name!r} is neither an existing directory nor a valid hub id such as 'org/name'."
        ) from None
    except GatedRepoError:
        raise ModelLoadError(f"{name} is gated: accept its terms on the hub and pass token=.") from None
    except RevisionNotFoundError:
        raise ModelLoadError(f"{name} has no revision {revision!r} on the hub.") from None
    except RepositoryNotFoundError:
        raise ModelLoadError(
            f"{name} is no local directory, and the hub has no such model (or it is private)."
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise ModelLoadError(
            f"{name} is no local directory, is not in the local hub cache, and the hub cannot be reached "
            f"({type(error).__name__}): pass a directory, or connect once to download it."
        ) from None
