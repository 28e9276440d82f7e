"""The host session: what it refuses, that state stays in its buffers, and that it computes what plain ORT does."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
from tiny_models import VOCAB_SIZE, sample_prompt

import QEfficient
from QEfficient.errors import InputError, OptionError, PackageError, QEfficientError, ShapeError
from QEfficient.targets.host_session import HostSession
from QEfficient.targets.manifest import Manifest
from QEfficient.targets.tuning import Tuning

CTX = 48
PROMPT = np.array([sample_prompt(6), sample_prompt(6, seed=1)])


@pytest.fixture(scope="session")
def exported(unfused_llama):
    """The graph as it was exported: prompts run side by side, so a batch has two rows here."""
    return unfused_llama


@pytest.fixture
def session(exported):
    session = HostSession(exported.package, Manifest.load(exported.package), Tuning(1))
    session.begin({"batch_size": 2, "ctx_len": CTX})
    return session


def feeds(ids, start=0):
    ids = np.asarray(ids, np.int64)
    return {"input_ids": ids, "position_ids": np.broadcast_to(np.arange(start, start + ids.shape[1]), ids.shape).copy()}


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    assert text.endswith(".")
    return text


BAD = {
    "float": (lambda f: f | {"input_ids": f["input_ids"].astype(np.float32)}, InputError, ["input_ids", "int64", "32"]),
    "int32": (lambda f: f | {"position_ids": f["position_ids"].astype(np.int32)}, InputError, ["position_ids"]),
    "list": (lambda f: f | {"input_ids": f["input_ids"].tolist()}, InputError, ["input_ids", "list"]),
    "rank 1": (lambda f: f | {"input_ids": f["input_ids"][0]}, InputError, ["input_ids", "rank 2"]),
    "rank 3": (lambda f: f | {"input_ids": f["input_ids"][None]}, InputError, ["input_ids", "rank 2"]),
    "name": (lambda f: f | {"attention_mask": f["input_ids"]}, InputError, ["unexpected ['attention_mask']"]),
    "missing": (lambda f: {"input_ids": f["input_ids"]}, InputError, ["missing ['position_ids']"]),
    "both": (lambda f: {"input_idz": f["input_ids"], "position_ids": f["position_ids"]}, InputError, ["idz", "_ids"]),
    "a state": (lambda f: f | {"past_key.0": np.zeros((2, 2, CTX, 16), np.float32)}, InputError, ["past_key.0"]),
    "batch of 3": (lambda f: {k: np.repeat(v[:1], 3, 0) for k, v in f.items()}, ShapeError, ["(3, 6)"]),
    "batch of 1": (lambda f: {k: v[:1] for k, v in f.items()}, ShapeError, ["(1, 6)"]),
    "one row": (lambda f: f | {"position_ids": f["position_ids"][:1]}, ShapeError, ["position_ids", "(1, 6)"]),
    "lengths": (lambda f: f | {"position_ids": f["position_ids"][:, :5]}, ShapeError, ["position_ids", "(2, 5)"]),
    "too long": (lambda f: feeds(np.ones((2, 9))), ShapeError, ["seq_len=9", "Prefill", "1..8"]),
    "no tokens": (lambda f: feeds(np.ones((2, 0))), ShapeError, ["seq_len=0"]),
}


@pytest.mark.parametrize(("change", "expected", "words"), BAD.values(), ids=BAD)
def test_refuses_what_does_not_fit(session, change, expected, words):
    good = feeds(PROMPT)
    before = session.run(good, "Prefill")["logits"].copy()
    state = session.state("past_key.1").copy()
    with pytest.raises(expected) as caught:
        session.run(change(good), "Prefill")
    assert type(caught.value) is expected
    message = one_line(caught.value)
    assert all(word in message for word in words), message
    # Refused before anything ran, and the session goes on as if it had not been asked.
    np.testing.assert_array_equal(session.state("past_key.1"), state)
    np.testing.assert_array_equal(session.run(good, "Prefill")["logits"], before)


def test_decode_takes_one_token(session):
    session.run(feeds(PROMPT), "Prefill")
    with pytest.raises(ShapeError, match=r"seq_len=2 does not fit the specialization Decode"):
        session.run(feeds(PROMPT[:, :2], 6), "Decode")


def test_begin_needs_every_dimension(session):
    with pytest.raises(ShapeError, match=r"begin\(\) needs values for \['batch_size', 'ctx_len'\]"):
        session.begin({})
    with pytest.raises(ShapeError, match=r"\['ctx_len'\]"):
        session.begin({"batch_size": 1})


def test_run_checks_the_context_of_begin(session):
    session.begin({"batch_size": 2, "ctx_len": CTX + 1})
    with pytest.raises(ShapeError, match="ctx_len=49"):
        session.run(feeds(PROMPT), "Prefill")


def test_run_before_begin(exported):
    fresh = HostSession(exported.package, Manifest.load(exported.package), Tuning(1))
    with pytest.raises(QEfficientError, match=r"call begin\(\) before run\(\)") as caught:
        fresh.run(feeds(PROMPT), "Prefill")
    one_line(caught.value)


def test_closing_frees_everything_without_the_collector(session):
    """A collection takes half a second where torch is loaded: nothing may need one."""
    session.run(feeds(PROMPT), "Prefill")
    gc.collect()
    gc.disable()
    try:
        programs = list(session._programs.values())
        held = [weakref.ref(program) for program in programs] + [weakref.ref(p._session) for p in programs]
        held += [weakref.ref(buffer[0]) for buffer in session._buffers.values()]
        assert len(held) > 2
        del programs
        session.close()
        assert [ref() for ref in held] == [None] * len(held)
    finally:
        gc.enable()


def test_use_after_close(session, exported):
    session.close()
    session.close()
    for use in (
        lambda: session.run(feeds(PROMPT), "Prefill"),
        lambda: session.begin({"batch_size": 2, "ctx_len": CTX}),
    ):
        with pytest.raises(QEfficientError, match="closed: load the package again") as caught:
            use()
        one_line(caught.value)


def test_unreadable_program_is_a_package_error(exported, llama_copy):
    (llama_copy / "program.onnx").write_bytes(b"not onnx at all")
    with pytest.raises(PackageError, match=r"ONNX Runtime cannot load .*program\.onnx") as caught:
        HostSession(llama_copy, Manifest.load(llama_copy), Tuning(1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("threads", [0, -1, "2", True, 1.5])
def test_threads_must_be_a_positive_number(exported, threads):
    with pytest.raises(OptionError, match="threads must be an integer of at least 1") as caught:
        QEfficient.load(exported.package, threads=threads)
    one_line(caught.value)


class Plain:
    """The same program in an ordinary ONNX Runtime session: every array is passed in and every output copied out."""

    def __init__(self, package, batch):
        self.manifest = Manifest.load(package)
        self.ort = ort.InferenceSession(str(package / "program.onnx"), providers=["CPUExecutionProvider"])
        sizes = {"batch_size": batch, "ctx_len": CTX}
        self.state = {s.input: np.zeros([sizes.get(d, d) for d in s.shape], s.dtype) for s in self.manifest.states}

    def run(self, step):
        names = [output.name for output in self.ort.get_outputs()]
        out = dict(zip(names, self.ort.run(None, {**step, **self.state}), strict=True))
        self.state = {s.input: out[s.output] for s in self.manifest.states}
        return out["logits"]


STEPS = [
    ("Prefill", PROMPT, 0),
    ("Prefill", PROMPT[:, :3], 6),
    ("Decode", PROMPT[:, 3:4], 9),
    ("Decode", PROMPT[:, :1], 10),
]


@pytest.mark.parametrize("in_place", [True, False])
def test_equals_a_plain_session(exported, in_place):
    manifest = Manifest.load(exported.package)
    assert all(state.in_place for state in manifest.states)
    if not in_place:  # every program allows two buffers as well
        manifest = manifest.replace(states=tuple(replace(state, in_place=False) for state in manifest.states))
    session, plain = HostSession(exported.package, manifest, Tuning(1)), Plain(exported.package, 2)
    session.begin({"batch_size": 2, "ctx_len": CTX})
    for name, ids, start in STEPS:
        logits = session.run(feeds(ids, start), name)["logits"]
        assert logits.shape == (2, 1, VOCAB_SIZE)
        np.testing.assert_array_equal(logits, plain.run(feeds(ids, start)))
        for state in manifest.states:
            np.testing.assert_array_equal(session.state(state.input), plain.state[state.input])
    assert all(session.state(state.input).any() for state in manifest.states)


def test_outputs_of_unknown_shape_are_not_mixed_up_with_states(exported):
    """A dimension that only the program knows: ONNX Runtime allocates the output and returns it among the states."""
    manifest = Manifest.load(exported.package)
    (logits,) = manifest.outputs
    session = HostSession(
        exported.package,
        manifest.replace(outputs=(replace(logits, shape=("batch_size", "surprise", VOCAB_SIZE)),)),
        Tuning(1),
    )
    session.begin({"batch_size": 2, "ctx_len": CTX})
    plain = Plain(exported.package, 2)
    for name, ids, start in STEPS:
        found = session.run(feeds(ids, start), name)
        assert set(found) == {"logits"}
        np.testing.assert_array_equal(found["logits"], plain.run(feeds(ids, start)))


def test_states_stay_at_their_address_and_are_not_copied(session, exported):
    states = [state.input for state in session.manifest.states]
    addresses = [session.state(name).ctypes.data for name in states]
    assert len(set(addresses)) == len(states)
    buffers = [session.state(name) for name in states]
    plain = Plain(exported.package, 2)
    for name, ids, start in STEPS:
        session.run(feeds(ids, start), name)
        plain.run(feeds(ids, start))
        assert [session.state(state).ctypes.data for state in states] == addresses
    for buffer, state in zip(buffers, states, strict=True):
        np.testing.assert_array_equal(buffer, plain.state[state])

    # What is written into the buffer is what the next step reads.
    step = feeds(PROMPT[:, 1:2], 11)
    kept = {state: array.copy() for state, array in plain.state.items()}
    untouched = plain.run(step).copy()
    session.state("past_value.0")[:, :, 2] += 1.0
    plain.state = kept
    plain.state["past_value.0"][:, :, 2] += 1.0
    changed = session.run(step, "Decode")["logits"]
    np.testing.assert_array_equal(changed, plain.run(step))
    assert np.abs(changed - untouched).max() > 1e-3


def test_begin_keeps_buffers_of_the_same_size(session):
    first = session.run(feeds(PROMPT), "Prefill")["logits"].copy()
    address = session.state("past_key.0").ctypes.data
    session.begin({"batch_size": 2, "ctx_len": CTX})
    assert session.state("past_key.0").ctypes.data == address
    # What the last request left does not show: positions from 0 on make a row new.
    np.testing.assert_array_equal(session.run(feeds(PROMPT), "Prefill")["logits"], first)

    session.begin({"batch_size": 1, "ctx_len": CTX})
    assert session.state("past_key.0").shape[0] == 1
    assert not session.state("past_key.0").any()
    # The program sums a batch of one in another order than a batch of two.
    alone = session.run(feeds(PROMPT[:1]), "Prefill")["logits"]
    np.testing.assert_allclose(alone, first[:1], atol=1e-5)
    session.begin({"batch_size": 2, "ctx_len": CTX})
    np.testing.assert_array_equal(session.run(feeds(PROMPT), "Prefill")["logits"], first)


def test_padding_writes_nothing(session):
    """D13: a position of -1 writes to no slot a query could see, and nothing is NaN.

    Rows without any token write to the last slot, which a query at the last position overwrites before it reads.
    """
    step = feeds(PROMPT)
    session.run(step, "Prefill")
    before = session.state("past_key.1").copy()
    step["position_ids"][0] = -1
    step["position_ids"][1, 3:] = -1
    logits = session.run(step, "Prefill")["logits"]
    assert np.isfinite(logits).all()
    after = session.state("past_key.1")
    np.testing.assert_array_equal(after[:, :, :-1], before[:, :, :-1])
    np.testing.assert_array_equal(after[1], before[1])
    assert np.isfinite(after).all()
    assert before[:, :, :6].any()
    assert not before[:, :, 6:].any()


# ---------------------------------------------------------------------------------- prompts on rows of their own


@pytest.fixture
def rows(llama):
    """A package with the host's fusions, opened with three rows of state."""
    session = HostSession(llama.package, Manifest.load(llama.package), Tuning(1))
    session.begin({"batch_size": 3, "ctx_len": CTX})
    return session


def test_a_prompt_on_one_row_writes_no_other(rows, exported):
    assert rows.manifest.specialization("Prefill").by_row
    assert all(state.in_place for state in rows.manifest.states)
    addresses = [rows.state(state.input).ctypes.data for state in rows.manifest.states]
    logits = rows.run(feeds(PROMPT[1:]), "Prefill", row=1)["logits"].copy()
    reference = Plain(exported.package, 2)
    np.testing.assert_allclose(logits[0], reference.run(feeds(PROMPT))[1], rtol=0, atol=2e-5)
    for state in rows.manifest.states:
        found = rows.state(state.input)
        assert not found[0].any()
        assert not found[2].any()
        np.testing.assert_allclose(found[1], reference.state[state.input][1], rtol=0, atol=1e-5)
    assert [rows.state(state.input).ctypes.data for state in rows.manifest.states] == addresses
    # All rows together, two of them idle: the middle one goes on where its prompt ended.
    step = {"input_ids": np.array([[5], [7], [9]]), "position_ids": np.array([[-1], [6], [-1]])}
    found = rows.run(step, "Decode")["logits"][1].copy()
    np.testing.assert_allclose(found, reference.run(feeds([[7], [7]], 6))[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("row", [-1, 3])
def test_a_row_that_is_not_there(rows, row):
    with pytest.raises(ShapeError, match=f"row {row} is not one of the 3 rows"):
        rows.run(feeds(PROMPT[:1]), "Prefill", row=row)


def test_several_prompts_at_once_are_refused_where_each_has_a_row(rows):
    with pytest.raises(ShapeError, match=r"batch_size|\(2, 6\)"):
        rows.run(feeds(PROMPT), "Prefill")
