"""Publishes what a run or a merge left: model, tokenizer and card go to the hub, everything else stays here."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from QEfficient.errors import ArtifactWriteError, InputError, OptionError
from QEfficient.finetune.checkpoint import ADAPTER_WEIGHTS, OPTIMIZER, SCHEDULER, STATE
from QEfficient.finetune.run_record import ARGUMENTS_FILE, CONFIG_FILE, RUN_FILE

#: Patterns of files beside a model that are not published -> why.
STAYS: Mapping[str, str] = {
    **dict.fromkeys((CONFIG_FILE, ARGUMENTS_FILE, RUN_FILE, "merge.json"), "names places on this machine"),
    "data_report.json": "quotes rows of the data",
    **dict.fromkeys((OPTIMIZER, SCHEDULER, STATE, "rng_state*.pth", "*.bin", "*.pt"), "state of the training"),
    ".*": "hidden",
}


@dataclass(frozen=True)
class Parcel:
    """What would be uploaded.

    Attributes:
        files: name -> size in bytes.
        left: name -> why it stays.
        base_model: what the adapter's configuration names, when it is no hub id.
    """

    directory: Path
    files: Mapping[str, int]
    left: Mapping[str, str]
    base_model: str | None = None

    @property
    def size(self) -> int:
        return sum(self.files.values())


def pack(directory: str | Path) -> Parcel:
    """Looks through a directory; uploads nothing.

    Raises:
        InputError: it holds no trained model.
    """
    place = Path(directory)
    if not place.is_dir() or not (any(place.glob("model*.safetensors")) or (place / ADAPTER_WEIGHTS).is_file()):
        raise InputError(
            f"{place} holds neither {ADAPTER_WEIGHTS} nor model.safetensors: name the --output of qefficient finetune "
            "or merge."
        )
    files, left = {}, {}
    for path in sorted(place.iterdir()):
        reason = next((why for pattern, why in STAYS.items() if fnmatch(path.name, pattern)), None)
        if reason is None and not path.is_file():
            reason = "a directory"
        if reason is None:
            files[path.name] = path.stat().st_size
        else:
            left[path.name] = reason
    return Parcel(place, files, left, _local_base(place / "adapter_config.json"))


def push(parcel: Parcel, repo_id: str, *, private: bool = False) -> str:
    """Creates the model repository if it is not there, and uploads the parcel as one commit; returns its address.

    Args:
        private: of a repository that is created now; one that exists stays as it is.

    Raises:
        ArtifactWriteError: the hub cannot be reached or refuses; its repository has all files of this call or none.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    api = HfApi()
    try:
        made = api.create_repo(repo_id, private=private, repo_type="model", exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=parcel.directory,
            repo_type="model",
            # Patterns, to the hub's library: a name with brackets would mean others.
            allow_patterns=[glob.escape(name) for name in parcel.files],
            commit_message=f"{parcel.directory.resolve().name}, trained with qefficient",
        )
    except OfflineModeIsEnabled:
        raise ArtifactWriteError(
            f"nothing was uploaded to {repo_id}: HF_HUB_OFFLINE is set, so unset it to publish."
        ) from None
    except HfHubHTTPError as error:
        raise ArtifactWriteError(f"nothing was uploaded to {repo_id}: {_refusal(error)}.") from None
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise ArtifactWriteError(
            f"nothing was uploaded to {repo_id}, because the hub cannot be reached ({type(error).__name__}): try again "
            "when it can."
        ) from None
    return str(made)


def check_access(repo_id: str) -> None:
    """OptionError for a malformed repository name, or when nobody is logged in; asks the hub nothing."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise OptionError(f"{repo_id!r} is no name of a repository: write for example 'my-name/my-model'.") from None
    if get_token() is None:
        raise OptionError(
            "publishing needs a token of the hub, and there is none: run `hf auth login`, or set HF_TOKEN to one that "
            "may write."
        )


def _refusal(error: Exception) -> str:
    """The hub's answer in one clause."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the hub refuses the token ({status}), so use one that may write there"
    message = getattr(error, "server_message", None) or str(error)
    return f"the hub answers {status or 'with an error'} ({' '.join(message.split())[:200].rstrip('.')})"


def _local_base(config: Path) -> str | None:
    """The base model of an adapter, when it is a place on this machine."""
    if not config.is_file():
        return None
    base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    return base if isinstance(base, str) and Path(base).expanduser().exists() else None
