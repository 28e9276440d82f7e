"""Digests: equal to BLAKE3 computed directly, canonical for JSON, remembered only while it is safe."""

import json
import math
import os
import time
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from QEfficient.errors import ArtifactWriteError
from QEfficient.store import digest as digest_module
from QEfficient.store.digest import DigestMemo, file_digest, json_digest
from QEfficient.store.home import cache_home

BIG = (1 << 20) + 1
LONG_AGO = time.time() - 1000

scalars = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, 1.0, -0.0, 0.0]) | st.text(max_size=2)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)


def big_file(path: Path, fill: bytes = b"a", age: float = 1000) -> Path:
    path.write_bytes(fill * BIG)
    os.utime(path, (time.time() - age,) * 2)
    return path


def count_hashing(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    calls: list[Path] = []

    def counting(path: Path, threads: int | None = None) -> str:
        calls.append(path)
        return file_digest(path, threads)

    monkeypatch.setattr(digest_module, "file_digest", counting)
    return calls


def reversed_keys(value):
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(list(value))}
    return [reversed_keys(item) for item in value] if isinstance(value, list) else value


def strict(value):
    """A form in which two values are equal exactly if JSON tells them apart by nothing."""
    if isinstance(value, dict):
        return ("object", frozenset((key, strict(item)) for key, item in value.items()))
    if isinstance(value, list):
        return ("array", tuple(strict(item) for item in value))
    return (type(value).__name__, repr(value))


@pytest.mark.parametrize("size", [0, 1, 1 << 14, BIG, 5_000_001])
def test_file_digest_is_blake3_of_the_bytes(tmp_path, size):
    data = os.urandom(size)
    path = tmp_path / "file"
    path.write_bytes(data)
    expected = blake3(data).hexdigest()
    assert [file_digest(path), file_digest(path, threads=1), file_digest(path, threads=2)] == [expected] * 3


def test_file_digest_matches_the_published_vector_for_no_input(tmp_path):
    (tmp_path / "empty").touch()
    assert file_digest(tmp_path / "empty") == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"


def test_json_digest_is_blake3_of_canonical_text():
    assert json_digest({"b": "é", "a": [1, None]}) == blake3(b'{"a":[1,null],"b":"\\u00e9"}').hexdigest()


@given(values)
def test_json_digest_ignores_key_order(value):
    assert json_digest(value) == json_digest(reversed_keys(value))
    assert json_digest(value) == json_digest(json.loads(json.dumps(value)))


@given(values, values)
def test_json_digest_tells_values_apart(left, right):
    assert (json_digest(left) == json_digest(right)) == (strict(left) == strict(right))


@given(st.dictionaries(st.text(max_size=3), values, min_size=1, max_size=4), st.data())
def test_json_digest_sees_any_changed_value(value, data):
    key = data.draw(st.sampled_from(sorted(value)))
    assert json_digest(value) != json_digest({**value, key: {"was": value[key]}})


@pytest.mark.parametrize(
    "value", [{1: 2}, {"a": {3}}, [Path("x")], b"x", math.nan, [math.inf], {"a": {None: 1}}, object()]
)
def test_json_digest_refuses_what_json_cannot_hold(value):
    with pytest.raises(TypeError):
        json_digest(value)


def test_tuples_count_as_arrays():
    assert json_digest({"shape": (1, 2)}) == json_digest({"shape": [1, 2]})


def test_big_file_is_hashed_once(tmp_path, monkeypatch):
    calls = count_hashing(monkeypatch)
    path = big_file(tmp_path / "weights")
    results = {DigestMemo(tmp_path / "home").digest(path) for _ in range(3)}
    assert results == {blake3(b"a" * BIG).hexdigest()}
    assert len(calls) == 1


def test_hub_blob_is_hashed_with_blake3_and_remembered_through_its_link(tmp_path, monkeypatch):
    # The name of a hub blob is a SHA-256: it must not be taken for the digest.
    calls = count_hashing(monkeypatch)
    blob = tmp_path / "models--x" / "blobs" / ("0" * 64)
    blob.parent.mkdir(parents=True)
    big_file(blob)
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    memo = DigestMemo(tmp_path / "home")
    assert memo.digest(link) == memo.digest(blob) == blake3(b"a" * BIG).hexdigest()
    assert len(calls) == 1


def test_changed_big_file_is_hashed_again(tmp_path):
    memo = DigestMemo(tmp_path / "home")
    path = big_file(tmp_path / "weights")
    memo.digest(path)
    big_file(path, b"b", age=500)
    assert memo.digest(path) == blake3(b"b" * BIG).hexdigest()


def test_replaced_file_of_same_size_and_mtime_is_hashed_again(tmp_path):
    # The inode tells: this is what unpacking an archive over a file does.
    memo = DigestMemo(tmp_path / "home")
    path = big_file(tmp_path / "weights")
    memo.digest(path)
    other = big_file(tmp_path / "other", b"b")
    os.utime(other, ns=(path.stat().st_mtime_ns,) * 2)
    os.replace(other, path)
    assert memo.digest(path) == blake3(b"b" * BIG).hexdigest()


@pytest.mark.parametrize("age", [0, 1.0, -3600])
def test_recent_mtime_is_not_remembered(tmp_path, age):
    memo = DigestMemo(tmp_path / "home")
    path = big_file(tmp_path / "weights", age=age)
    memo.digest(path)
    assert memo.lookup(path) is None
    assert memo.remember(path, "0" * 64) is False


def test_file_that_changes_while_hashed_is_not_remembered(tmp_path, monkeypatch):
    path = big_file(tmp_path / "weights")

    def slow(target: Path, threads: int | None = None) -> str:
        result = file_digest(target, threads)
        big_file(path, b"b", age=500)
        return result

    monkeypatch.setattr(digest_module, "file_digest", slow)
    memo = DigestMemo(tmp_path / "home")
    memo.digest(path)
    assert memo.lookup(path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"path": 3}'])
def test_unreadable_memo_means_hash_again(tmp_path, text):
    memo = DigestMemo(tmp_path / "home")
    path = big_file(tmp_path / "weights")
    memo.digest(path)
    [record] = memo.directory.iterdir()
    record.write_text(text)
    assert memo.digest(path) == blake3(b"a" * BIG).hexdigest()


def test_memo_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "home").write_text("not a directory")
    path = big_file(tmp_path / "weights")
    assert DigestMemo(tmp_path / "home").digest(path) == blake3(b"a" * BIG).hexdigest()


def test_prune_removes_records_of_changed_and_vanished_files(tmp_path):
    memo = DigestMemo(tmp_path / "home")
    kept, changed, gone = (big_file(tmp_path / name) for name in ("kept", "changed", "gone"))
    for path in (kept, changed, gone):
        memo.digest(path)
    big_file(changed, b"b", age=500)
    gone.unlink()
    killed_writer = memo.directory / "x.json.1.tmp"
    killed_writer.touch()
    os.utime(killed_writer, (time.time() - 9999,) * 2)
    (memo.directory / "y.json.2.tmp").touch()
    assert memo.prune(dry_run=True) == memo.prune() == 3
    assert memo.prune() == 0
    assert memo.lookup(kept) is not None
    assert len(list(memo.directory.iterdir())) == 2


def test_home_precedence(tmp_path, monkeypatch):
    monkeypatch.setenv("QEFF_HOME", str(tmp_path / "env"))
    assert cache_home(tmp_path / "arg") == tmp_path / "arg"
    assert cache_home() == tmp_path / "env"
    monkeypatch.setenv("QEFF_HOME", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_home() == tmp_path / "xdg" / "qefficient"
    assert all((tmp_path / name).is_dir() for name in ("env", "arg", "xdg/qefficient"))


@pytest.mark.parametrize("below", ["", "/below"])
def test_home_that_is_a_file(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactWriteError, match=r"is not a directory: .*QEFF_HOME"):
        cache_home(Path(f"{tmp_path}/file{below}"))


def test_home_that_is_read_only(tmp_path, monkeypatch):
    # Root may write anywhere, so the kernel's answer is replaced.
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(ArtifactWriteError, match=r"is not writable: .*QEFF_HOME"):
        cache_home(tmp_path)


def test_home_that_cannot_be_created():
    # Not even root can create a directory in /proc.
    with pytest.raises(ArtifactWriteError, match=r"cannot be created .*QEFF_HOME"):
        cache_home(Path("/proc/qefficient"))
