"""``qefficient push``: which files go to the hub, who is asked, and what is said when it fails.

Nothing here reaches the hub: a stand-in takes the place of its client and notes the calls.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects
from typer.testing import CliRunner

from QEfficient.cli.main import app

PUBLISHED = [
    "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "loss.png", "run.json",
    "tokenizer.json", "validate.json", "weights [old].txt",
]  # fmt: skip
#: What a run leaves besides, and a few files of users and of transformers.
KEPT = [
    ".env", ".lock", "checkpoint-2/adapter_model.safetensors", "checkpoint-2/optimizer.pt", "data_report.json",
    "logs/metrics.jsonl", "optimizer.pt", "qpc/train/weights.bin", "refine_config.yaml", "rng_state_0.pth", "run.yaml",
    "scheduler.pt", "trainer_state.json", "training_args.bin", "training_args.yaml",
]  # fmt: skip


class Hub:
    """A stand-in for huggingface_hub.HfApi; it picks files as the real one does."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.uploaded: list[str] = []

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        if self.error is not None:
            raise self.error
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id.rpartition('/')[2]}")

    def upload_folder(self, *, folder_path: Path, allow_patterns: list[str], **options: Any) -> None:
        self.calls.append(("upload_folder", options))
        files = [p.relative_to(folder_path).as_posix() for p in sorted(folder_path.rglob("*")) if p.is_file()]
        self.uploaded = list(filter_repo_objects(files, allow_patterns=allow_patterns))


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    place = tmp_path / "tuned"
    for name in (*PUBLISHED, *KEPT):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("x" * 1500)
    (place / "weights o.txt").mkdir()  # a directory that the pattern "weights [old].txt" would match
    (place / "weights o.txt" / "private").write_text("x")
    (place / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    return place


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, getattr(stand_in, name))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token that opens nothing")
    return stand_in


def push(*words: object, answer: str | None = None) -> Any:
    return CliRunner().invoke(app, ["push", *(str(word) for word in words)], input=answer, env={"COLUMNS": "200"})


def test_model_tokenizer_and_card_go_and_nothing_else(tuned: Path, hub: Hub) -> None:
    result = push(tuned, "tuned", "--private", "--yes")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == "https://huggingface.co/me/tuned"
    assert hub.uploaded == PUBLISHED
    (created, made), (uploaded, sent) = hub.calls
    assert (created, made) == (
        "create_repo", {"repo_id": "tuned", "private": True, "repo_type": "model", "exist_ok": True},
    )  # fmt: skip
    # A name without an owner is the token's own; the hub says whose that is.
    assert (uploaded, sent["repo_id"], sent["repo_type"]) == ("upload_folder", "me/tuned", "model")


def test_what_is_shown_before_it_is_asked(tuned: Path, hub: Hub) -> None:
    result = push(tuned, "me/tuned", answer="n\n")
    assert result.exit_code == 1
    assert hub.calls == []
    for name in PUBLISHED:
        assert f"  {name}  " in result.stderr
    for name, reason in (("run.yaml", "names places"), ("data_report.json", "quotes rows"), ("qpc", "a directory")):
        assert f"{name} ({reason}" in result.stderr
    assert f"names the base model as {tuned.parent}, which is on this machine only" in result.stderr
    assert "Upload 9 files, 12" in result.stderr
    assert push(tuned, "me/tuned", answer="").exit_code == 1, "nobody there to answer"
    assert hub.calls == []
    assert push(tuned, "me/tuned", answer="y\n").exit_code == 0
    assert hub.uploaded == PUBLISHED


def test_a_dry_run_asks_nobody(tuned: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    result = push(tuned, "me/tuned", "--dry-run")
    assert result.exit_code == 0
    assert "9 files" in result.stderr
    assert hub.calls == []


def refused(result: Any, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_what_is_refused_before_anything_is_asked(tuned: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(push(tuned.parent, "me/tuned", "--yes"), "holds neither adapter_model.safetensors nor model.safetensors")
    refused(push(tuned / "nowhere", "me/tuned", "--yes"), "holds neither")
    refused(push(tuned, "me/my/model", "--yes"), "'me/my/model' is no name of a repository")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refused(push(tuned, "me/tuned", "--yes"), "run `hf auth login`, or set HF_TOKEN")
    assert hub.calls == []


def answered(status: int) -> HfHubHTTPError:
    import httpx2
    from huggingface_hub.utils import hf_raise_for_status

    response = httpx2.Response(status, request=httpx2.Request("POST", "https://huggingface.co/api/repos/create"))
    with pytest.raises(HfHubHTTPError) as caught:
        hf_raise_for_status(response)
    return caught.value


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: answered(403), "nothing was uploaded to me/tuned: the hub refuses the token (403)"),
        (lambda: answered(401), "nothing was uploaded to me/tuned: the hub refuses the token (401)"),
        (lambda: answered(500), "nothing was uploaded to me/tuned: the hub answers 500"),
        (lambda: ConnectionError("no route"), "because the hub cannot be reached (ConnectionError): try again"),
        (lambda: OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
    ],
    ids=["403", "401", "500", "no network", "offline"],
)  # fmt: skip
def test_what_the_hub_refuses(tuned: Path, hub: Hub, error: Any, message: str) -> None:
    hub.error = error()
    refused(push(tuned, "me/tuned", "--yes"), message)
    assert hub.uploaded == []
