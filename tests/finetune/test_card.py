"""The model card: every number in it is one the run wrote down, and nothing else is in it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.numpy import load_file
from typer.testing import CliRunner

from QEfficient.cli.main import app
from QEfficient.finetune import QEffConfig, QEfficient, QEffTrainingArgs
from QEfficient.finetune.card import MARK


def command(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def tuned(checkpoint: Path, rows: Path, output: Path, config: Any, **options: Any) -> Path:
    settings = {"batch_size": 4, "learning_rate": 1e-2, "max_steps": 3, "num_cores": 1, "plot": False, **options}
    what = {"max_ctx_len": 64, "lora_config": {"r": 4, "target_modules": "all-linear"}, **config}
    qe = QEfficient(QEffConfig(str(checkpoint), str(rows), **what), QEffTrainingArgs(output, **settings))
    qe.refine(load=False, say=lambda message: None)
    return output


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned(tiny_checkpoint, rows_file, tmp_path_factory.mktemp("card") / "tuned", {})


def tables(text: str) -> dict[str, dict[str, list[str]]]:
    """Heading -> first cell -> the other cells."""
    found: dict[str, dict[str, list[str]]] = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        rows = [
            [c.strip() for c in line.strip("|").split(" | ")] for line in body.splitlines() if line.startswith("| ")
        ]
        found[title] = {row[0]: row[1:] for row in rows[1:]}
    return found


def test_the_numbers_are_those_of_the_run(run: Path) -> None:
    found = tables((run / "README.md").read_text())
    rows = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    held, trained = [r for r in rows if "eval_loss" in r], [r for r in rows if "loss" in r]
    assert [held[0]["step"], held[-1]["step"], len(trained)] == [0, 3, 3]
    figures = [f"{r['eval_perplexity']:.4f}" if r["eval_perplexity"] < 100 else f"{r['eval_perplexity']:,.0f}"
               for r in (held[0], held[-1])]  # fmt: skip
    assert found["Held-out rows"] == {
        "loss": [f"{held[0]['eval_loss']:.4f}", f"{held[-1]['eval_loss']:.4f}"], "perplexity": figures,
    }  # fmt: skip
    assert found["Training loss"] == {"1": [f"{trained[0]['loss']:.4f}"], "3": [f"{trained[-1]['loss']:.4f}"]}
    tensors = load_file(run / "adapter_model.safetensors")
    assert found["What was trained"] == {
        "parameters": [f"{sum(t.size for t in tensors.values()):,} in {len(tensors)} tensors"],
        "optimizer steps": ["3"], "lora_config.r": ["`4`"], "lora_config.target_modules": ["`all-linear`"],
    }  # fmt: skip
    report = json.loads((run / "data_report.json").read_text())["splits"]
    assert found["Data"] == {
        "rows.jsonl, training": ["39", "671", str(report["train"]["trained_tokens"])],
        "rows.jsonl, held out": ["7", "110", str(report["eval"]["trained_tokens"])],
    }
    assert found["Options"]["max_steps"] == ["`3`"]
    assert found["Options"]["learning_rate"] == ["`0.01`"]
    assert found["Options"]["max_ctx_len"] == ["`64`"]
    assert "num_train_epochs" not in found["Options"], "the run had a number of steps"
    tokens, own = sum(r["tokens"] for r in trained), sum(r["trained_tokens"] for r in trained)
    assert found["Cost"]["tokens in them"] == [f"{tokens:,}, {own:,} of them trained"]
    seconds = float(found["Cost"]["steps up to 3"][0].removesuffix(" s"))
    assert seconds == pytest.approx(sum(r["step_time_ms"] for r in trained) / 1000, rel=0.02, abs=1e-3)
    assert found["Cost"]["peak memory"] == [f"{trained[-1]['peak_rss_mb']:,.0f} MB"]
    proof = json.loads((run / "validate.json").read_text())
    differences = found["First step against torch autograd"]
    assert differences["loss, relative"] == [f"{proof['loss_difference']:.1e}"]
    import torch

    assert found["Versions"]["torch"] == [torch.__version__]


def test_the_header_is_one_the_hub_reads(run: Path, tiny_checkpoint: Path, rows_file: Path) -> None:
    """A local base model and local rows are nothing the hub knows, so the header names neither."""
    data = ModelCard.load(run / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
    assert data.tags == ["lora", "transformers", "qefficient"]
    assert (data.base_model, data.datasets) == (None, None)
    for place in (run.parent, rows_file.parent, tiny_checkpoint.parent):
        assert str(place) not in (run / "README.md").read_text()


def test_names_that_the_hub_knows(run: Path, tmp_path: Path) -> None:
    """As a run on a hub's model and data notes them; PEFT's own tags for an adapter."""
    copy = Path(shutil.copytree(run, tmp_path / "tuned", symlinks=True))
    record = json.loads((copy / "run.json").read_text())
    record |= {"base_model": {"name": "org/base", "hub": True}, "dataset": {"name": "org/rows", "hub": True}}
    (copy / "run.json").write_text(json.dumps(record))
    assert command("card", copy).stdout.strip() == str(copy / "README.md")
    data = ModelCard.load(copy / "README.md").data
    assert (data.base_model, data.datasets) == ("org/base", ["org/rows"])
    assert data.tags[0] == "base_model:adapter:org/base"


def test_what_was_not_measured_is_not_there(tiny_checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    """No held-out rows and no proof."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "validate.json").write_text('{"an": "earlier run\'s"}')
    output = tuned(tiny_checkpoint, rows_file, tmp_path / "out", {"train_frac": 1.0}, validate=False, max_steps=1)
    found = tables((output / "README.md").read_text())
    assert "Held-out rows" not in found
    assert list(found["Training loss"]) == ["1"], "one step, one line"
    assert "First step against torch autograd" not in found
    assert list(found["Data"]) == ["rows.jsonl, training"]
    assert not any("evaluations" in name for name in found["Cost"])


def test_a_run_without_an_adapter(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "tuned", symlinks=True))
    (copy / "adapter_model.safetensors").unlink()
    settings = yaml.safe_load((copy / "refine_config.yaml").read_text()) | {"lora_config": None, "trainable": ["*mlp*"]}
    (copy / "refine_config.yaml").write_text(yaml.safe_dump(settings))
    assert command("card", copy).exit_code == 0
    card = ModelCard.load(copy / "README.md")
    assert (card.data.library_name, card.data.tags) == ("transformers", ["qefficient"])
    assert list(tables(card.text)["What was trained"]) == ["parameters", "optimizer steps", "trainable"]


def test_a_card_of_ones_own_stays(run: Path, tiny_checkpoint: Path, rows_file: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "tuned", symlinks=True))
    (copy / "README.md").write_text("mine")
    result = command("card", copy)
    assert result.exit_code == 2
    assert "was not written by qefficient, so it stays" in result.stderr
    shown = command("card", copy, "--dry-run")
    assert shown.exit_code == 0
    assert shown.stdout.strip() == (run / "README.md").read_text().strip()
    assert (copy / "README.md").read_text() == "mine"
    (copy / "README.md").write_text(f"older\n{MARK}\n")
    assert command("card", copy).exit_code == 0
    assert (copy / "README.md").read_text() == (run / "README.md").read_text()
    # A run, too, replaces its own card only.
    (run / "README.md").write_text("mine now")
    tuned(tiny_checkpoint, rows_file, run, {}, max_steps=4)
    assert (run / "README.md").read_text() == "mine now"
    assert json.loads((run / "run.json").read_text())["steps"] == 4


@pytest.mark.parametrize("name", ["nowhere", "empty", "a file"])
def test_no_card_without_a_run(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a file").touch()
    result = command("card", tmp_path / name)
    assert result.exit_code == 2
    assert "holds no finished run" in result.stderr
    assert not list((tmp_path / "empty").iterdir())
