"""Options from files that build on files and from a command line: the later wins, under any of an option's names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from QEfficient.errors import OptionError, TrainingError
from QEfficient.finetune import arguments, config, lora, option_table
from QEfficient.finetune.arguments import QEffTrainingArgs
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.layers import overlay, read_layers, read_words
from QEfficient.finetune.options import resolved, split_options
from QEfficient.finetune.presets import PRESETS, budget_mb, fitted


def write(path: Path, **values: object) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------- files that build on files


def test_a_file_over_its_bases(tmp_path):
    (tmp_path / "shared").mkdir()
    write(tmp_path / "shared" / "root.yaml", model_id="m", lr=1e-3, lora_config={"lora_rank": 4, "lora_alpha": 8})
    write(tmp_path / "shared" / "data.yaml", dataset_name="rows.jsonl", max_length=64, base="root.yaml")
    write(tmp_path / "other.yaml", weight_decay=0.1, dataset="other.jsonl")
    run = write(
        tmp_path / "run.yaml", base=["shared/data.yaml", "other.yaml"], learning_rate=5e-4, lora_config={"r": 16}
    )
    found = read_layers(run)
    assert found == {
        "model_id": "m",
        "learning_rate": 5e-4,
        "lora_config": {"lora_alpha": 8, "r": 16},
        "max_length": 64,
        "weight_decay": 0.1,
        "dataset": "other.jsonl",
    }
    what, how = split_options(found)
    assert (what.dataset_name, what.max_ctx_len, what.lora_config["r"]) == ("other.jsonl", 64, 16)
    assert how.learning_rate == 5e-4


def test_json_and_extends(tmp_path):
    (tmp_path / "base.json").write_text('{"model_id": "m", "columns": {"prompt": "q", "completion": "a"}}')
    run = write(tmp_path / "run.yaml", extends="base.json", columns={"completion": "answer"})
    assert read_layers(run) == {"model_id": "m", "columns": {"prompt": "q", "completion": "answer"}}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"run.yaml": {"base": "run.yaml"}}, ["run.yaml -> run.yaml", "builds on itself"]),
        ({"run.yaml": {"base": "a.yaml"}, "a.yaml": {"base": "run.yaml"}}, ["run.yaml -> a.yaml -> run.yaml"]),
        ({"run.yaml": {"base": "b.yaml"}, "a.yaml": {}}, ["no file", "b.yaml"]),
        ({"run.yaml": {"base": 3}}, ["base in", "a file or a list of files", "3"]),
        ({"run.yaml": {"base": ["a.yaml", None]}}, ["a file or a list of files"]),
        ({"run.yaml": {"base": "a.yaml", "extends": "a.yaml"}}, ["both base and extends"]),
        ({"run.yaml": {"base": "a.txt"}, "a.txt": {}}, ["must end in .yaml"]),
    ],
)
def test_what_files_are_refused(tmp_path, files, words):
    for name, values in files.items():
        write(tmp_path / name, **values)
    with pytest.raises(OptionError) as error:
        read_layers(tmp_path / "run.yaml")
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("alias", "name"), [*config.ALIASES.items(), *arguments.ALIASES.items(), ("warmup_ratio", "warmup_steps")]
)
def test_an_option_replaces_its_other_names(alias, name):
    """Every alias there is: what the upper layer says is the only thing said."""
    assert overlay({alias: 1, "other": 2}, {name: 3}) == {"other": 2, name: 3}
    assert overlay({name: 1, "other": 2}, {alias: 3}) == {"other": 2, alias: 3}


@pytest.mark.parametrize(("alias", "name"), lora.LORA_ALIASES.items())
def test_so_do_options_of_lora(alias, name):
    assert overlay({"lora_config": {alias: 1, "bias": "none"}}, {"peft_config": {name: 2}}) == {
        "peft_config": {"bias": "none", name: 2}
    }


def test_none_and_lists_replace():
    assert overlay({"lora_config": {"r": 4}, "trainable": ["a"]}, {"lora_config": None, "trainable": ["b"]}) == {
        "lora_config": None,
        "trainable": ["b"],
    }


# ---------------------------------------------------------------------------------- words of a command line


def test_words():
    found = read_words(
        [
            "--learning_rate",
            "1e-4",
            "--batch-size=2",
            "lora_config.r=16",
            "--lora_config.target_modules",
            "[q_proj]",
            "--packing",
            "--no-validate",
            "--metric_for_best_model",
            "loss",
            "--max-grad-norm",
            "-1",
            "run_name=7",
        ]
    )
    assert found == {
        "learning_rate": 1e-4,
        "batch_size": 2,
        "lora_config": {"r": 16, "target_modules": ["q_proj"]},
        "packing": True,
        "validate": False,
        "metric_for_best_model": "loss",
        "max_grad_norm": -1,
        "run_name": "7",
    }


def test_a_real_option_that_begins_with_no():
    assert read_words(["--no_cuda", "--no-packing"]) == {"no_cuda": True, "packing": False}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["learning_rate"], "write name=value"),
        (["--=3"], "write name=value"),
        (["-x"], "write name=value"),
        (["3=4"], "write name=value"),
        (["--lr=1", "--lr=2"], "given twice, as 1 and as 2"),
        (["--lora_config=x.yaml", "--lora_config.r=2"], "lora_config is given both as 'x.yaml'"),
        (["--x=[1"], "cannot be read as a value"),
    ],
)
def test_words_that_are_refused(words, said):
    with pytest.raises(OptionError, match=said.replace("[", r"\[")):
        read_words(words)


def test_the_resolved_options_make_the_same_run(tmp_path):
    options = {
        "model_id": "m", "dataset_name": "rows.jsonl", "lr": 3e-4, "warmup_ratio": 0.1, "group_by_length": True,
        "lora_rank": 4, "seed": 7, "batch_size": 2, "max_steps": 9, "output_dir": str(tmp_path),
        "columns": {"text": "t"},
    }  # fmt: skip
    options["lora_config"] = {"lora_rank": options.pop("lora_rank"), "target_modules": ["q_proj"]}
    what, how = split_options(options)
    path = write(tmp_path / "run.yaml", **resolved(what, how))
    again_what, again_how = split_options(read_layers(path))
    assert again_what == what
    assert again_how.to_dict() == how.to_dict()
    assert how.get_warmup_steps(100) == 10


# ---------------------------------------------------------------------------------- fitting into memory


@dataclass
class Figures:
    peak_mb: float
    step_mb: float


def machine(options, fixed=500.0, per_row=100.0, fails_above=10_000.0):
    """A made-up run: recompute halves what a row takes, int8 and int4 shrink what is fixed."""
    fixed *= {"fp32": 1.0, "int8": 0.5, "int4": 0.3}[options.get("base_weights") or "fp32"]
    step = options["per_device_train_batch_size"] * per_row * (0.5 if options.get("recompute") else 1)
    if fixed + step > fails_above:
        raise TrainingError("killed")
    return Figures(fixed + step, step)


BASE = {"model_id": "m", "dataset_name": "d", "batch_size": 8, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (2000, (8, 2, None, None)),
        (1300, (8, 2, None, None)),
        (1299, (4, 4, None, None)),
        (650, (1, 16, None, None)),
        (560, (1, 16, True, None)),
        (500, (4, 4, True, "int8")),
        (250, (2, 8, True, "int4")),
    ],
)
def test_the_first_that_fits(budget, expected):
    found = fitted(BASE, budget, machine)
    what, how = split_options(found)
    rows, window, recompute, weights = expected
    assert (how.per_device_train_batch_size, how.gradient_accumulation_steps) == (rows, window)
    assert (how.recompute, how.base_weights) == (bool(recompute), weights or "fp32")
    assert rows * window == 16
    assert machine(found).peak_mb <= budget
    assert what == split_options(BASE)[0]


def test_a_batch_that_cannot_be_run_at_all_is_halved():
    assert fitted(BASE, 900, lambda options: machine(options, fails_above=950))["per_device_train_batch_size"] == 4


def test_nothing_fits():
    with pytest.raises(
        OptionError, match=r"no batch of this run fits into 150 MB \(the least of those tried was 550 MB\)"
    ):
        fitted(BASE, 150, machine)


def test_what_was_asked_for_stays():
    found = fitted({**BASE, "base_weights": "int8"}, 400, machine)
    assert found["base_weights"] == "int8"
    with pytest.raises(OptionError, match="no batch"):
        fitted({**BASE, "base_weights": "int8"}, 260, machine)


def test_budgets():
    assert budget_mb("host-8gb") == 6400
    assert budget_mb("auto") > 0
    assert all(budget_mb(name) > 0 for name in PRESETS)
    with pytest.raises(OptionError, match="Did you mean 'host-8gb'"):
        budget_mb("host-8g")


def test_the_shipped_files_are_valid():
    """Every file in configs/ resolves, but for the model and the data, which a user names."""
    files = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert files
    for file in files:
        options = {"model_id": "m", "dataset_name": "d", **read_layers(file)}
        options.pop("preset", None)
        what, _ = split_options(options)
        assert isinstance(what, QEffConfig)


def test_the_page_of_all_options_is_up_to_date():
    page = Path(__file__).parents[2] / "docs" / "finetuning_options.md"
    assert page.read_text(encoding="utf-8") == option_table.page(), "run `make docs`"


def test_every_option_and_alias_is_on_the_page():
    text = option_table.page()
    for cls in (QEffConfig, QEffTrainingArgs):
        for field in dataclasses.fields(cls):
            assert not field.init or f"`{field.name}`" in text, field.name
    for alias in (*config.ALIASES, *arguments.ALIASES, *arguments.RENAMED, *lora.NAMES, *lora.LORA_ALIASES):
        assert f"`{alias}`" in text, alias
