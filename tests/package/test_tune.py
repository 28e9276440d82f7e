"""`qefficient tune`: candidates are measured in turn, the choice is remembered, and packages open with it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import greedy_reference, sample_prompt
from typer.testing import CliRunner

from QEfficient.cli.main import app
from QEfficient.engine import tune as tuning_run
from QEfficient.engine.package import open_package
from QEfficient.engine.tune import Trial, tune
from QEfficient.errors import OptionError, PackageError
from QEfficient.targets import tuning
from QEfficient.targets.manifest import Manifest
from QEfficient.targets.tuning import Tuning, available_cores


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    place = tmp_path / "home"
    monkeypatch.setenv("QEFF_HOME", str(place))
    return place


def test_every_choice_is_measured_and_the_best_comes_first(llama, monkeypatch):
    """Speeds are made up, so that the outcome is known: sleeping threads win, then steps of 4 tokens."""
    monkeypatch.setattr(tuning_run, "_CHUNKS", (2, 4, 999))
    opened = []
    real = tuning_run.open_package

    def spy(directory, **options):
        opened.append(options["tuning"])
        return real(directory, **options)

    def rates(package):
        choice = package.session.tuning
        return (100 if choice.spinning else 200) * (3 if choice.chunk == 4 else 1), 50.0

    monkeypatch.setattr(tuning_run, "open_package", spy)
    monkeypatch.setattr(tuning_run, "_rates", rates)
    trials = tune(llama.package, rounds=2)
    assert trials[0].tuning == Tuning(available_cores(), spinning=False, chunk=4)
    assert (trials[0].prompt, trials[0].decode) == (600.0, 50.0)
    assert [t.seconds for t in trials[1:]] == sorted(t.seconds for t in trials[1:])
    assert len({t.tuning for t in trials}) == len(trials)
    assert {choice.chunk for choice in opened} == {None, 2, 4}, "no step is larger than the package takes"
    first = [choice for choice in opened if choice.chunk is None][: len(set(opened))]
    assert first[0] == Tuning(available_cores()), "the default is measured first"
    assert opened.count(opened[0]) == 2
    assert opened[0] != opened[1], "all choices run once before any runs again"


def test_the_default_stays_unless_another_choice_is_clearly_faster():
    default, other = Trial(Tuning(2), 100.0, 10.0), Trial(Tuning(2, spinning=False), 102.0, 10.1)
    assert tuning_run._best([default, other]) is default
    assert tuning_run._best([default, replace(other, decode=11.0)]).tuning == other.tuning


def test_it_really_runs(llama, bert):
    for package, decodes in ((llama.package, True), (bert.package, False)):
        trials = tune(package, rounds=1)
        assert all(trial.prompt > 0 for trial in trials)
        assert all((trial.decode > 0) == decodes for trial in trials)
        # The tiny model takes no prompt steps as large as those tried; texts go together in groups of any size.
        assert any(trial.tuning.chunk for trial in trials) != decodes


@pytest.mark.parametrize("rounds", [0, -1, True, 1.5])
def test_rounds_must_be_a_number_of_runs(llama, rounds):
    with pytest.raises(OptionError, match="rounds must be an integer"):
        tune(llama.package, rounds=rounds)


def test_not_a_package(tmp_path):
    with pytest.raises(PackageError, match=r"manifest\.json"):
        tune(tmp_path)


def test_the_choice_is_remembered_for_this_package_and_number_of_cores(llama, bert, home):
    one, other = Manifest.load(llama.package), Manifest.load(bert.package)
    assert tuning.recall(one, 2) is None
    choice = Tuning(1, spinning=False, pinned=True, chunk=3)
    path = tuning.remember(one, 2, choice)
    assert path.is_relative_to(home)
    assert tuning.recall(one, 2) == choice
    assert tuning.recall(one, 4) is None
    assert tuning.recall(other, 2) is None
    assert tuning.forget(one, 2)
    assert not tuning.forget(one, 2)
    assert tuning.recall(one, 2) is None


@pytest.mark.parametrize(
    "text",
    ["", "not json", "[]", '{"threads": 9}', '{"threads": "2"}', '{"threads": 0}', '{"threads": 1, "more": 2}',
     '{"threads": 1, "spinning": "yes"}', '{"threads": 1, "chunk": "4"}'],
)  # fmt: skip
def test_a_spoiled_choice_counts_as_none(llama, home, text):
    manifest = Manifest.load(llama.package)
    tuning.remember(manifest, 2, Tuning(1)).write_text(text)
    assert tuning.recall(manifest, 2) is None


def test_packages_open_with_the_choice(llama, home):
    manifest, cores = Manifest.load(llama.package), available_cores()
    tuning.remember(manifest, cores, Tuning(1, spinning=False, pinned=True, chunk=3))
    widths = []
    with open_package(llama.package) as package:
        assert package.session.tuning == Tuning(1, spinning=False, pinned=True, chunk=3)
        run = package.session.run

        def spy(feeds, *args, **kwargs):
            widths.append(feeds["input_ids"].shape[1])
            return run(feeds, *args, **kwargs)

        package.session.run = spy
        prompt = sample_prompt(7)
        found = package.generate(input_ids=np.array([prompt]), max_new_tokens=4)
        assert found[0, 7:].tolist() == greedy_reference(llama.hf, prompt, 4)[0]
    assert widths == [3, 3, 1, 1, 1, 1]
    with open_package(llama.package, threads=2) as package:
        assert package.session.tuning.threads == 2, "what the caller says wins"


def test_a_home_that_cannot_be_used_is_no_reason_not_to_run(llama, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "file"))
    with open_package(llama.package) as package:
        assert package.generate(input_ids=np.array([sample_prompt(3)]), max_new_tokens=2).shape == (1, 5)


def test_command(llama, home, monkeypatch):
    trials = [Trial(Tuning(1, spinning=False), 100.0, 10.0), Trial(Tuning(1), 90.0, 9.0)]
    monkeypatch.setattr(tuning_run, "tune", lambda package, rounds, report: trials)
    run = CliRunner()

    def output(*flags):
        result = run.invoke(app, ["tune", str(llama.package), *flags])
        assert result.exit_code == 0, result.output
        return result.stdout

    assert "nothing was chosen" in output("--show")
    assert output().splitlines()[-1] == "1 thread, sleeping"
    assert output("--show").strip() == "1 thread, sleeping"
    assert json.loads(next((home / "tuning").iterdir()).read_text())["spinning"] is False
    assert output("--forget").strip() == "forgotten"
    assert "nothing was chosen" in output("--forget")
    both = run.invoke(app, ["tune", str(llama.package), "--show", "--forget"])
    assert both.exit_code != 0
