"""``qefficient cache``: what people type and what they see."""

import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from QEfficient.cli.cache import app, human_size, parse_size
from QEfficient.errors import OptionError
from QEfficient.store.store import ArtifactStore


def run(*arguments: object, **env: str):
    # Wide, so that no table cell is cut.
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", **env})


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    store = ArtifactStore(tmp_path / "home")
    for number, label in enumerate(["gpt2 [fp32]", "llama (package)"], 1):
        size = number * 100_000
        store.build(
            "exports",
            f"{number:064x}",
            lambda d, n=size: (d / "f").write_bytes(b"x" * n) and None,
            label=label,
        )
    return store


def age(path: Path, days: float) -> None:
    os.utime(path / "entry.json", (time.time() - days * 86400,) * 2)


def test_ls_shows_entries(store):
    result = run("ls", "--cache-dir", store.home)
    assert result.exit_code == 0
    for text in (
        "gpt2 [fp32]",
        "llama (package)",
        "exports",
        "100.",
        "200.",
        "kB",
        str(store.home),
        "2 entries",
    ):
        assert text in result.stdout


def test_ls_of_an_empty_cache_from_the_environment(tmp_path):
    result = run("ls", QEFF_HOME=str(tmp_path / "elsewhere"))
    assert result.exit_code == 0
    assert f"{tmp_path / 'elsewhere'} is empty" in result.stdout


def test_verify_exit_code_says_whether_all_is_well(store):
    result = run("verify", "--cache-dir", store.home)
    assert (result.exit_code, "2 entries, all intact" in result.stdout) == (0, True)
    damaged = store.entries()[0].path / "f"
    damaged.write_bytes(b"y" * damaged.stat().st_size)
    result = run("verify", "--cache-dir", store.home)
    assert result.exit_code == 1
    assert "f does not have the bytes that were written" in result.stdout
    assert "1 problems" in result.stdout
    assert damaged.exists()


def test_gc_by_age_and_dry_run(store):
    old, new = (entry.path for entry in store.entries())
    age(old, 40)
    result = run("gc", "--max-age-days", 30, "--dry-run", "--cache-dir", store.home)
    assert "Would remove 1 entries" in result.stdout
    assert old.exists()
    result = run("gc", "--max-age-days", 30, "--cache-dir", store.home)
    assert "Removed 1 entries" in result.stdout
    assert "gpt2 [fp32]" in result.stdout
    assert (old.exists(), new.exists()) == (False, True)


def test_gc_by_size(store):
    small, large = (entry.path for entry in store.entries())
    age(large, 1)
    result = run("gc", "--max-size", "150kB", "--cache-dir", store.home)
    assert result.exit_code == 0
    assert (small.exists(), large.exists()) == (True, False)


def test_gc_without_limits_keeps_entries_and_all_removes_them(store):
    store.layout.workplace("exports", "f" * 64).mkdir()
    result = run("gc", "--cache-dir", store.home)
    assert "Removed 0 entries (0 B), 1 leftovers of killed runs" in result.stdout
    assert len(store.entries()) == 2
    assert run("gc", "--all", "--cache-dir", store.home).exit_code == 0
    assert store.entries() == []


@pytest.mark.parametrize("command", ["ls", "verify", "gc"])
def test_help_teaches(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--cache-dir" in result.stdout
    assert "QEFF_HOME" in result.stdout


def test_bare_command_shows_the_commands():
    assert all(name in run().output for name in ("ls", "verify", "gc"))


@pytest.mark.parametrize("command", ["ls", "verify", "gc"])
def test_bad_cache_directory_is_one_line(tmp_path, command):
    (tmp_path / "file").touch()
    result = run(command, "--cache-dir", tmp_path / "file")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: The cache directory")
    assert result.stderr.count("\n") == 1


def test_bad_options_are_one_line(store):
    for options in (["--max-size", "ten"], ["--max-age-days", "-1"]):
        result = run("gc", *options, "--cache-dir", store.home)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
    assert len(store.entries()) == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("10GB", 10 * 10**9),
        ("1.5 GB", 1_500_000_000),
        ("512MiB", 512 << 20),
        ("1KiB", 1024),
        ("2k", 2000),
        ("3T", 3 * 10**12),
        ("7", 7),
        ("7B", 7),
        ("0", 0),
    ],
)
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "ten", "-1GB", "1XB", "1iB", "GB", "1e3", "nan"])
def test_parse_size_refuses(text):
    with pytest.raises(OptionError, match="10GB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_999, "1.0 MB"),
        (1_500_000_000, "1.5 GB"),
        (16 * 10**12, "16.0 TB"),
        (5 * 10**15, "5000.0 TB"),
    ],
)
def test_human_size(size, text):
    assert human_size(size) == text
