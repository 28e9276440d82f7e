"""The store: whole entries or none, damage found, links left intact, old entries collected."""

import errno
import hashlib
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from blake3 import blake3

from QEfficient.errors import ArtifactWriteError, ExportError, OptionError
from QEfficient.store import digest as digest_module
from QEfficient.store import files as files_module
from QEfficient.store.store import ArtifactStore, copy_file, place_file

BIG = (1 << 20) + 1
KEY = "a" * 64
OTHER = "b" * 64


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "home")


def key(number: int) -> str:
    return f"{number:064x}"


def write_sample(directory: Path) -> None:
    (directory / "config.json").write_text("{}")
    (directory / "sub").mkdir()
    (directory / "sub" / "weights.bin").write_bytes(b"w" * BIG)


def build(store: ArtifactStore, size: int = 1000, number: int = 0) -> Path:
    return store.build("exports", key(number), lambda d: (d / "f").write_bytes(b"x" * size) and None)


def make_old(path: Path, seconds: float = 1000) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def flip_byte(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def leftovers(store: ArtifactStore) -> list[Path]:
    return list(store.layout.tmp.iterdir()) if store.layout.tmp.exists() else []


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- building and getting ---


def test_build_then_get(store):
    assert store.get("exports", KEY) is None
    path = store.build("exports", KEY, write_sample, label="gpt2 (export)")
    assert path == store.home / "exports" / KEY == store.get("exports", KEY)
    record = json.loads((path / "entry.json").read_text())
    assert record["files"] == {
        "config.json": {"size": 2, "blake3": blake3(b"{}").hexdigest()},
        "sub/weights.bin": {"size": BIG, "blake3": blake3(b"w" * BIG).hexdigest()},
    }
    assert record["meta"]["label"] == "gpt2 (export)"
    assert set(record["meta"]["libraries"]) >= {"qefficient", "python"}
    assert abs(record["meta"]["created"] - time.time()) < 60
    assert store.verify_all() == []
    assert leftovers(store) == []


def test_second_build_does_not_run_the_builder(store):
    path = store.build("exports", KEY, write_sample)
    assert store.build("exports", KEY, lambda d: pytest.fail("built twice")) == path
    assert store.build("packages", KEY, write_sample) != path


def test_builder_supplies_digests_and_meta(store, monkeypatch):
    data = os.urandom(BIG)
    supplied = blake3(data).hexdigest()

    def builder(directory: Path) -> dict:
        (directory / "w").write_bytes(data)
        return {"digests": {"w": supplied}, "meta": {"libraries": {"torch": "2.13"}, "task": "x"}}

    import QEfficient.store.store as store_module

    monkeypatch.setattr(store_module, "file_digest", lambda path: pytest.fail(f"rehashed {path}"))
    path = store.build("exports", KEY, builder)
    meta = json.loads((path / "entry.json").read_text())["meta"]
    assert (meta["libraries"], meta["task"]) == ({"torch": "2.13"}, "x")
    assert store.verify_all() == []
    assert store.entries()[0].meta == meta


def test_wrong_supplied_digest_is_found(store):
    def builder(directory: Path) -> dict:
        (directory / "w").write_bytes(b"data")
        return {"digests": {"w": "0" * 64}}

    store.build("exports", KEY, builder)
    assert len(store.verify_all()) == 1
    assert store.get("exports", KEY) is None


def _symlink(directory: Path) -> None:
    (directory / "link").symlink_to("/etc/passwd")


def _own_record(directory: Path) -> None:
    (directory / "entry.json").touch()


@pytest.mark.parametrize(
    "builder",
    [
        _symlink,
        _own_record,
        lambda d: os.mkfifo(d / "fifo"),
        lambda d: {"digests": {"absent": "0" * 64}},
        lambda d: (d / "f").touch() or {"digests": {"f": "nonsense"}},
        lambda d: {"typo": 1},
    ],
)
def test_builder_that_breaks_the_rules(store, builder):
    with pytest.raises(ValueError):
        store.build("exports", KEY, builder)
    assert store.get("exports", KEY) is None
    assert leftovers(store) == []


@pytest.mark.parametrize(("kind", "name"), [("../x", KEY), ("locks", KEY), ("Exports", KEY), ("exports", "../../x")])
def test_names_that_cannot_be_entries(store, kind, name):
    with pytest.raises(ValueError, match="cannot be"):
        store.build(kind, name, write_sample)


def test_permission_bits_are_left_alone(store):
    def builder(directory: Path) -> None:
        (directory / "f").write_bytes(b"1")
        os.chmod(directory / "f", 0o640)

    path = store.build("exports", KEY, builder)
    assert (path / "f").stat().st_mode & 0o777 == 0o640


# --- failures ---


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), FileNotFoundError(2, "no checkpoint")])
def test_builder_that_raises_leaves_nothing(store, error):
    def builder(directory: Path) -> None:
        write_sample(directory)
        raise error

    with pytest.raises(type(error)) as caught:
        store.build("exports", KEY, builder)
    assert caught.value is error
    assert store.get("exports", KEY) is None
    assert leftovers(store) == []
    assert store.build("exports", KEY, write_sample).is_dir()


def _write_to_full_device(directory: Path) -> None:
    write_sample(directory)
    with open("/dev/full", "wb", buffering=0) as device:
        device.write(b"x")


def _quota(directory: Path) -> None:
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def _native_writer(directory: Path) -> None:
    raise RuntimeError('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })')


def _wrapped(directory: Path) -> None:
    try:
        _write_to_full_device(directory)
    except OSError as error:
        raise ExportError("could not export") from error


@pytest.mark.parametrize("builder", [_write_to_full_device, _quota, _native_writer, _wrapped])
def test_full_disk_is_one_clear_error(store, builder):
    with pytest.raises(ArtifactWriteError, match=r"no space left to write gpt2 to .*QEFF_HOME") as caught:
        store.build("exports", KEY, builder, label="gpt2")
    assert str(store.home) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert leftovers(store) == []
    assert store.entries() == []


def test_disk_that_is_full_when_the_record_is_written(store, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(ArtifactWriteError, match="no space left"):
        store.build("exports", KEY, write_sample)
    assert store.get("exports", KEY) is None
    assert leftovers(store) == []


def test_home_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for home in (tmp_path / "file", Path("/proc/none")):
        with pytest.raises(ArtifactWriteError, match="QEFF_HOME"):
            ArtifactStore(home).build("exports", KEY, write_sample)


def test_leftovers_of_a_killed_build_are_cleared(store):
    workplace = store.layout.workplace("exports", KEY)
    workplace.mkdir(parents=True)
    (workplace / "junk").write_text("half")
    path = store.build("exports", KEY, write_sample)
    assert not (path / "junk").exists()


# --- damage ---


@pytest.mark.parametrize("name", ["config.json", "sub/weights.bin"])
@pytest.mark.parametrize("age", [0, 1000])
def test_flipped_byte_is_found_by_verify_and_get(store, name, age, caplog):
    path = store.build("exports", KEY, write_sample)
    make_old(path / name, age)
    assert store.get("exports", KEY) == path
    flip_byte(path / name)
    problems = store.verify_all()
    assert len(problems) == 1
    assert name in problems[0].message
    assert store.get("exports", KEY, verify=False) == path
    assert store.get("exports", KEY) is None
    assert name in caplog.text
    assert not path.exists()
    assert store.build("exports", KEY, write_sample) == path
    assert store.verify_all() == []


def test_flipped_byte_with_forged_mtime_is_found_by_verify_all(store):
    # get() trusts the memo here; that is what makes 16 GB cheap, and what verify_all is for.
    path = store.build("exports", KEY, write_sample)
    weights = path / "sub/weights.bin"
    make_old(weights)
    assert store.get("exports", KEY) == path
    before = weights.stat().st_mtime_ns
    flip_byte(weights)
    os.utime(weights, ns=(before, before))
    assert store.get("exports", KEY) == path
    assert [problem.path for problem in store.verify_all()] == [path]


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: (p / "config.json").unlink(),
        lambda p: (p / "config.json").write_text("{}x"),
        lambda p: (p / "entry.json").unlink(),
        lambda p: (p / "entry.json").write_text('{"format": "qefficient-entry"'),
        lambda p: (p / "entry.json").write_text((p / "entry.json").read_text().replace("exports", "exportz")),
        lambda p: (p / "entry.json").write_text((p / "entry.json").read_text().replace(": 2", ": NaN")),
        lambda p: os.truncate(p / "sub/weights.bin", 5),
        lambda p: shutil.rmtree(p / "sub"),
        lambda p: [(p / "config.json").unlink(), (p / "config.json").symlink_to("/etc/hostname")],
    ],
)
def test_damaged_entry_is_reported_removed_and_rebuilt(store, damage):
    path = store.build("exports", KEY, write_sample)
    damage(path)
    assert [problem.path for problem in store.verify_all()] == [path]
    assert store.get("exports", KEY, verify=False) is None
    assert not path.exists()
    assert store.build("exports", KEY, write_sample) == path
    assert store.verify_all() == []


def test_entry_under_a_foreign_key_does_not_count(store):
    path = store.build("exports", KEY, write_sample)
    shutil.copytree(path, path.with_name(OTHER))
    assert [problem.path.name for problem in store.verify_all()] == [OTHER]
    assert store.get("exports", OTHER) is None


def test_big_file_is_hashed_once_after_it_settled(store, monkeypatch):
    calls: list[Path] = []
    original = digest_module.file_digest
    monkeypatch.setattr(digest_module, "file_digest", lambda p: calls.append(Path(p)) or original(p))
    path = store.build("exports", KEY, write_sample)
    make_old(path / "sub/weights.bin")
    for _ in range(3):
        assert store.get("exports", KEY) == path
    assert [call.name for call in calls].count("weights.bin") == 1


def test_linked_checkpoint_with_known_digest_is_never_rehashed_by_get(store, tmp_path, monkeypatch):
    weights = tmp_path / "weights"
    weights.write_bytes(b"w" * BIG)
    make_old(weights)

    def builder(directory: Path) -> dict:
        assert place_file(weights, directory / "w") == "link"
        return {"digests": {"w": store.memo.digest(weights)}}

    path = store.build("exports", KEY, builder)
    monkeypatch.setattr(digest_module, "file_digest", lambda p: pytest.fail(f"rehashed {p}"))
    assert store.get("exports", KEY) == path


def test_verify_all_reports_what_does_not_belong(store):
    path = store.build("exports", KEY, write_sample)
    foreign = [store.home / "notes.txt", path.parent / "readme", path / "extra"]
    for file in foreign:
        file.touch()
    unfinished = path.parent / OTHER
    unfinished.mkdir()
    stale = store.layout.workplace("packages", OTHER)
    stale.mkdir()
    reported = {problem.path for problem in store.verify_all()}
    assert reported == {foreign[0], foreign[1], path, unfinished, stale}
    with store.layout.lock("packages", OTHER):
        assert stale not in {problem.path for problem in store.verify_all()}


# --- links and copies ---


def test_place_file_links_the_real_file(tmp_path):
    source = tmp_path / "blob"
    source.write_bytes(b"data")
    (tmp_path / "name").symlink_to(source)
    assert place_file(tmp_path / "name", tmp_path / "dest") == "link"
    assert not (tmp_path / "dest").is_symlink()
    assert os.path.samefile(source, tmp_path / "dest")


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK])
@pytest.mark.parametrize("kernel_copy", [True, False])
def test_place_file_copies_where_links_are_refused(tmp_path, monkeypatch, number, kernel_copy):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3_000_000))

    def refuse(*args, **kwargs):
        raise OSError(number, "refused")

    monkeypatch.setattr(os, "link", refuse)
    if not kernel_copy:
        monkeypatch.setattr(os, "copy_file_range", refuse)
    assert place_file(source, tmp_path / "dest") in ("reflink", "copy")
    assert sha(source) == sha(tmp_path / "dest")
    assert not os.path.samefile(source, tmp_path / "dest")


def test_place_file_across_filesystems(tmp_path):
    # /dev/shm is a filesystem of its own on every Linux machine.
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        source = Path(other, "source")
        source.write_bytes(os.urandom(2_000_000))
        assert place_file(source, tmp_path / "dest") == "copy"
        assert sha(source) == sha(tmp_path / "dest")


def test_reflink_is_used_where_the_filesystem_has_it(tmp_path, monkeypatch):
    (tmp_path / "source").write_bytes(b"data")
    requests: list[int] = []
    monkeypatch.setattr(files_module.fcntl, "ioctl", lambda fd, request, arg: requests.append(request))
    assert copy_file(tmp_path / "source", tmp_path / "dest") == "reflink"
    # linux/fs.h: _IOW(0x94, 9, int)
    assert requests == [1 << 30 | 4 << 16 | 0x94 << 8 | 9]


@pytest.mark.parametrize("function", [place_file, copy_file])
def test_nothing_is_ever_overwritten(tmp_path, function):
    (tmp_path / "source").write_bytes(b"new")
    (tmp_path / "dest").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        function(tmp_path / "source", tmp_path / "dest")
    assert (tmp_path / "dest").read_bytes() == b"old"


def test_failed_copy_leaves_no_partial_file(tmp_path, monkeypatch):
    (tmp_path / "source").write_bytes(b"x" * 100)

    def full(*args):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match="full"):
        copy_file(tmp_path / "source", tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


def test_copy_is_independent(tmp_path):
    source, dest = tmp_path / "source", tmp_path / "dest"
    source.write_bytes(b"before")
    copy_file(source, dest)
    source.write_bytes(b"after!")
    assert dest.read_bytes() == b"before"


def test_resaving_a_linked_source_leaves_the_entry_intact(store, tmp_path):
    source = tmp_path / "model.safetensors"
    source.write_bytes(b"v1" * BIG)
    path = store.build("exports", KEY, lambda d: place_file(source, d / "w") and None)
    assert os.path.samefile(source, path / "w")
    replacement = tmp_path / "model.tmp"
    replacement.write_bytes(b"v2" * BIG)
    os.replace(replacement, source)
    assert store.get("exports", KEY) == path
    assert (path / "w").read_bytes() == b"v1" * BIG
    assert store.verify_all() == []


def test_linked_source_written_in_place_is_found_by_get(store, tmp_path):
    source = tmp_path / "model.safetensors"
    source.write_bytes(b"v1" * BIG)
    make_old(source)
    path = store.build("exports", KEY, lambda d: place_file(source, d / "w") and None)
    assert store.get("exports", KEY) == path
    flip_byte(source)
    assert store.get("exports", KEY) is None
    assert source.exists()


# --- waiting ---


def test_waiting_thread_is_told_once_and_gets_the_result(store):
    started, release, waits, results = threading.Event(), threading.Event(), [], []

    def slow(directory: Path) -> None:
        started.set()
        assert release.wait(30)
        write_sample(directory)

    def wait() -> None:
        waits.append(time.monotonic())
        release.set()

    first = threading.Thread(target=lambda: results.append(store.build("exports", KEY, slow)))
    first.start()
    assert started.wait(30)
    results.append(store.build("exports", KEY, lambda d: pytest.fail("built twice"), on_wait=wait))
    first.join(30)
    assert results == [store.home / "exports" / KEY] * 2
    assert len(waits) == 1


def test_builder_may_build_other_entries(store):
    def outer(directory: Path) -> None:
        inner = store.build("exports", OTHER, write_sample)
        place_file(inner / "config.json", directory / "config.json")

    store.build("packages", KEY, outer)
    assert store.verify_all() == []


# --- listing and collecting ---


def test_sizes_count_shared_files_once(store, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.write_bytes(b"c" * 5000)

    def first(directory: Path) -> None:
        place_file(checkpoint, directory / "c")
        (directory / "g").write_bytes(b"g" * 700)

    one = store.build("exports", key(1), first)

    def second(directory: Path) -> None:
        place_file(one / "g", directory / "g")
        place_file(one / "g", directory / "again")
        place_file(checkpoint, directory / "c")
        (directory / "p").write_bytes(b"p" * 90)

    two = store.build("packages", key(2), second)
    a, b = store.entries()
    record_1, record_2 = ((path / "entry.json").stat().st_size for path in (one, two))
    assert (a.size_apparent, a.size_unique, a.size_reclaimable) == (
        5700 + record_1,
        5700 + record_1,
        record_1,
    )
    assert (b.size_apparent, b.size_unique) == (6490 + record_2, 90 + record_2)
    assert b.size_reclaimable == 90 + record_2
    # Both together also free the file they share, but not the checkpoint.
    assert store.gc(everything=True).freed_bytes == 790 + record_1 + record_2
    assert checkpoint.read_bytes() == b"c" * 5000


def test_get_marks_an_entry_as_used(store):
    path = build(store)
    make_old(path / "entry.json", 9999)
    assert store.entries()[0].last_used < time.time() - 9000
    store.get("exports", key(0))
    assert store.entries()[0].last_used > time.time() - 60
    assert store.verify_all() == []


def test_gc_by_age(store):
    old, new = build(store, number=1), build(store, number=2)
    make_old(old / "entry.json", 10 * 86400)
    assert [entry.path for entry in store.gc(max_age_days=9, dry_run=True).removed] == [old]
    assert old.exists()
    assert [entry.path for entry in store.gc(max_age_days=9).removed] == [old]
    assert (old.exists(), new.exists()) == (False, True)


def test_gc_by_size_removes_least_recently_used_first(store):
    paths = [build(store, size=100_000, number=n) for n in range(4)]
    for path, age in zip(paths, (10, 40, 20, 30), strict=True):
        make_old(path / "entry.json", age * 1000)
    report = store.gc(max_bytes=250_000)
    assert [entry.path for entry in report.removed] == [paths[1], paths[3]]
    assert 200_000 <= report.freed_bytes < 202_000
    assert [path.exists() for path in paths] == [True, False, True, False]
    assert store.gc(max_bytes=250_000).removed == []


def test_gc_by_size_ignores_what_a_checkpoint_holds(store, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.write_bytes(b"c" * BIG)
    path = store.build("exports", KEY, lambda d: place_file(checkpoint, d / "c") and None)
    assert store.gc(max_bytes=10_000).removed == []
    checkpoint.unlink()
    assert [entry.path for entry in store.gc(max_bytes=10_000).removed] == [path]


def test_gc_without_limits_only_tidies(store, tmp_path):
    path = build(store)
    store.layout.workplace("exports", OTHER).mkdir(parents=True)
    store.layout.lock_file("packages", OTHER).touch()
    gone = tmp_path / "gone"
    gone.write_bytes(b"x" * BIG)
    make_old(gone)
    store.memo.digest(gone)
    gone.unlink()
    for dry_run in (True, False):
        report = store.gc(dry_run=dry_run)
        assert (report.removed, len(report.stale_tmp), report.orphan_memos) == ([], 1, 1)
        # The workplace's own lock goes too, once the workplace is gone.
        assert report.orphan_locks == (1 if dry_run else 2)
    assert path.exists()
    assert store.verify_all() == []
    assert [lock.name for lock in store.layout.locks.iterdir()] == [f"exports-{key(0)}.lock"]


def test_gc_skips_entries_in_use(store):
    path, other = build(store, number=1), build(store, number=2)
    stale = store.layout.workplace("packages", OTHER)
    stale.mkdir(parents=True)
    held = threading.Event()
    release = threading.Event()

    def hold() -> None:
        with store.layout.lock("exports", key(1)), store.layout.lock("packages", OTHER):
            held.set()
            release.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(30)
    report = store.gc(everything=True)
    release.set()
    holder.join(30)
    assert ([e.path for e in report.skipped], [e.path for e in report.removed]) == ([path], [other])
    assert path.exists()
    assert stale.exists()


def test_gc_keeps_an_entry_that_was_used_since_it_was_listed(store, monkeypatch):
    path = build(store)
    make_old(path / "entry.json", 9999)
    original = store.layout.try_lock

    def used_meanwhile(kind: str, name: str):
        os.utime(path / "entry.json")
        return original(kind, name)

    monkeypatch.setattr(store.layout, "try_lock", used_meanwhile)
    assert [entry.path for entry in store.gc(max_age_days=0.01).skipped] == [path]
    assert path.exists()


def test_gc_everything_removes_damaged_entries_and_spares_foreign_files(store):
    path = build(store)
    (path / "entry.json").unlink()
    foreign = store.home / "exports" / "my-notes"
    foreign.mkdir()
    tmp_of_somebody = store.layout.tmp / "my-project"
    tmp_of_somebody.mkdir()
    assert store.gc(everything=True, dry_run=True).damaged == [path]
    assert store.gc(everything=True).damaged == [path]
    assert not path.exists()
    assert foreign.exists()
    assert tmp_of_somebody.exists()


def test_interrupted_gc_leaves_nothing_half_finished(store, monkeypatch):
    path = store.build("exports", KEY, write_sample)

    def killed(target, *args, **kwargs):
        os.unlink(Path(target, "config.json"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            store.gc(everything=True)
    assert not path.exists()
    assert store.get("exports", KEY) is None
    assert len(leftovers(store)) == 1
    assert len(store.gc().stale_tmp) == 1
    assert store.verify_all() == []


@pytest.mark.parametrize("limits", [{"max_age_days": -1}, {"max_bytes": -1}])
def test_gc_refuses_negative_limits(store, limits):
    with pytest.raises(OptionError):
        store.gc(**limits)


def test_empty_home(store):
    assert (store.entries(), store.verify_all(), store.gc(everything=True).removed) == ([], [], [])
    assert not store.home.exists()
