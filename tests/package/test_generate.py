"""Both forms of generate on a tiny Llama: equal to Hugging Face where it has an answer, one sentence where it errs."""

import io
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from tiny_models import VOCAB_SIZE, greedy_reference, sample_prompt
from transformers import (
    AutoTokenizer,
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
    TextStreamer,
)

import QEfficient
from QEfficient import QEFFAutoModelForCausalLM
from QEfficient.engine.text import CompiledCausalLM
from QEfficient.errors import ContextLengthError, InputError, OptionError, QEfficientError
from QEfficient.targets.host_session import HostSession
from QEfficient.targets.manifest import DimRange, Manifest, Specialization
from QEfficient.targets.tuning import Tuning

#: As the package of the fixture was compiled.
CTX_LEN = 48
PROMPTS = ["the end of the story", "He is", "a lot of other things that he said to them", "on", "in the sand"]


@pytest.fixture(scope="module")
def package(llama):
    with QEfficient.load(llama.package) as package:
        yield package


@pytest.fixture(scope="module")
def tokenizer(llama):
    return AutoTokenizer.from_pretrained(llama.checkpoint)


def padded(rows: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


ROWS = [sample_prompt(12), sample_prompt(5, seed=1), sample_prompt(9, seed=2)]


def greedy(llama, row: list[int], n: int) -> list[int]:
    return greedy_reference(llama.hf, row, n)[0]


# ---------------------------------------------------------------------------------------- equal to Hugging Face


def test_batch_equals_hugging_face(llama, package):
    batch = padded(ROWS)
    expected = llama.hf.generate(**batch, max_new_tokens=10, do_sample=False)
    found = package.generate(**batch, max_new_tokens=10)
    assert isinstance(found, torch.Tensor)
    assert found.dtype == expected.dtype
    assert found.tolist() == expected.tolist()
    as_numpy = package.generate(**{k: v.numpy() for k, v in batch.items()}, max_new_tokens=10)
    assert isinstance(as_numpy, np.ndarray)
    assert as_numpy.tolist() == expected.tolist()


def test_right_padding_gives_the_same_tokens(package):
    left, right = (package.generate(**padded(ROWS, side), max_new_tokens=6)[:, 12:] for side in ("left", "right"))
    assert left.tolist() == right.tolist()


def test_generation_config_object(llama, package):
    batch = padded(ROWS)
    plain = [greedy(llama, row, 14) for row in ROWS]
    ends = [plain[0][3], plain[1][6]]
    config = GenerationConfig(max_new_tokens=14, eos_token_id=ends, pad_token_id=1, do_sample=False)
    expected = llama.hf.generate(**batch, generation_config=config)
    found = package.generate(**batch, generation_config=config)
    assert found.tolist() == expected.tolist()
    # The rows end at different steps, and the pad token fills what is left.
    new = found[:, 12:]
    assert new[0].tolist()[4:] == [1] * (new.shape[1] - 4)
    assert package.generate(**batch, generation_config=config.to_dict()).tolist() == expected.tolist()
    # What the caller writes wins over the object.
    assert package.generate(**batch, generation_config=config, max_new_tokens=2).shape[1] == 14


def test_every_end_token_of_the_set_ends_a_row(llama, package):
    """D18, and D17: each row's text stops at its own end."""
    plain = [greedy(llama, row, 12) for row in ROWS]
    ends = list(dict.fromkeys(row[step] for row, step in zip(plain, (2, 5, 8), strict=True)))
    found = package.generate(**padded(ROWS), max_new_tokens=12, eos_token_id=ends, pad_token_id=0)[:, 12:].tolist()
    for row, tokens in zip(plain, found, strict=True):
        stop = next(i for i, token in enumerate(row) if token in ends) + 1
        assert tokens == row[:stop] + [0] * (len(tokens) - stop)
    assert package.generate(**padded(ROWS), max_new_tokens=12, eos_token_id=ends, ignore_eos=True)[:, 12:].tolist() == [
        *plain
    ]


def test_pad_fill_without_a_pad_token_is_the_first_end_token(llama, package):
    plain = [greedy(llama, row, 10) for row in ROWS[:2]]
    end = plain[0][1]
    found = package.generate(
        **padded(ROWS[:2]), max_new_tokens=10, eos_token_id=[end], generation_config={"pad_token_id": -1}
    )
    stop = plain[0].index(end) + 1
    assert found[0, 12:].tolist() == plain[0][:stop] + [end] * (10 - stop)


def test_prompt_form_equals_hugging_face(llama, package, tokenizer):
    result = package.generate(prompts=PROMPTS, generation_len=9)
    expected = [greedy(llama, tokenizer(prompt).input_ids, 9) for prompt in PROMPTS]
    assert result.ids == expected
    assert result.texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    assert result.finish_reasons == ["length"] * 5
    one = package.generate(prompts=PROMPTS[1], generation_len=9, tokenizer=tokenizer)
    assert (one.ids, one.texts) == (expected[1:2], result.texts[1:2])


def test_messages(llama, package, tokenizer):
    chats = [
        [{"role": "user", "content": "hello"}],
        [{"role": "system", "content": "be kind"}, {"role": "user", "content": "who"}],
    ]
    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    assert texts[0] == "user: hello\nassistant:"
    expected = [greedy(llama, tokenizer(text, add_special_tokens=False).input_ids, 6) for text in texts]
    assert package.generate(messages=chats, generation_len=6).ids == expected
    assert package.generate(messages=chats[1], generation_len=6).ids == expected[1:]
    assert package.generate(messages=chats, generation_len=6, tokenizer=tokenizer).ids == expected


def test_model_class_takes_the_same_forms(llama, shared_home, tokenizer):
    model = QEFFAutoModelForCausalLM.from_pretrained(llama.checkpoint, cache_home_dir=shared_home)
    assert model.compile(ctx_len=CTX_LEN, prefill_seq_len=8) == llama.package
    batch = padded(ROWS)
    expected = llama.hf.generate(**batch, max_new_tokens=4, do_sample=False)
    assert model.generate(**batch, max_new_tokens=4).tolist() == expected.tolist()
    assert model.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=4).tolist() == expected.tolist()
    result = model.generate(tokenizer=tokenizer, prompts=["He is"], generation_len=4)
    assert result.ids == [greedy(llama, tokenizer("He is").input_ids, 4)]


def test_default_length_is_hugging_faces(llama, package):
    row = torch.tensor([ROWS[1]])
    expected = llama.hf.generate(input_ids=row, do_sample=False)
    assert expected.shape[1] == 5 + 20
    assert package.generate(input_ids=row).tolist() == expected.tolist()


# ---------------------------------------------------------------------------------------- stopping and streaming


def test_stop_strings(llama, package, tokenizer):
    ids = tokenizer(PROMPTS[0]).input_ids
    plain = greedy(llama, ids, 20)
    stop = tokenizer.decode(plain[4:6])
    expected = llama.hf.generate(
        torch.tensor([ids]), max_new_tokens=20, stop_strings=[stop], tokenizer=tokenizer, do_sample=False
    )
    found = package.generate(torch.tensor([ids]), max_new_tokens=20, stop_strings=[stop], tokenizer=tokenizer)
    assert found.tolist() == expected.tolist()
    assert len(ids) < found.shape[1] < len(ids) + 20
    result = package.generate(prompts=PROMPTS[:1], generation_len=20, stop_strings=stop)
    assert result.ids[0] == expected[0, len(ids) :].tolist()
    assert result.finish_reasons == ["stop_string"]
    assert result.texts[0] == tokenizer.decode(plain[:20]).partition(stop)[0]
    assert stop not in result.texts[0]


class AfterToken(StoppingCriteria):
    """A user's own criterion, written for torch as all of Hugging Face's are."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1:] == torch.tensor(self.token)).any(dim=1)


def test_hugging_face_stopping_criteria(llama, package, tokenizer):
    ids = tokenizer(PROMPTS[0]).input_ids
    plain = greedy(llama, ids, 16)
    kinds = {
        "MaxLengthCriteria": (MaxLengthCriteria(len(ids) + 5), 5),
        "EosTokenCriteria": (EosTokenCriteria(plain[3]), plain.index(plain[3]) + 1),
        "subclass": (AfterToken(plain[6]), plain.index(plain[6]) + 1),
        "StopStringCriteria": (StopStringCriteria(tokenizer, [tokenizer.decode(plain[2:4])]), 4),
    }
    for name, (criterion, stop) in kinds.items():
        for form in (criterion, [criterion], StoppingCriteriaList([criterion])):
            result = package.generate(prompts=PROMPTS[:1], generation_len=16, stopping_criteria=form)
            assert result.ids[0] == plain[:stop], name
            assert result.finish_reasons == ["criteria"]
        for ids_in in (torch.tensor([ids]), np.array([ids])):
            out = package.generate(ids_in, max_new_tokens=16, stopping_criteria=StoppingCriteriaList([criterion]))
            assert out[0, len(ids) :].tolist() == plain[:stop], name
        hf = llama.hf.generate(
            torch.tensor([ids]), max_new_tokens=16, do_sample=False, stopping_criteria=StoppingCriteriaList([criterion])
        )
        assert hf[0, len(ids) :].tolist() == plain[:stop], name


def test_a_plain_function_stops_each_row_alone(package):
    seen = []

    def after_three(ids, scores):
        seen.append(ids.shape)
        return len(ids[0]) >= 15

    found = package.generate(**padded(ROWS[:2]), max_new_tokens=12, stopping_criteria=after_three, pad_token_id=0)
    assert found.shape == (2, 12 + 10)
    assert (found[0, 15:] == 0).all()
    assert {shape[0] for shape in seen} == {1}


def test_hugging_face_streamers(package, tokenizer):
    expected = package.generate(prompts=PROMPTS[:1], generation_len=12).texts[0]
    console = io.StringIO()
    with redirect_stdout(console):
        package.generate(
            prompts=PROMPTS[:1],
            generation_len=12,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    assert console.getvalue() == expected + "\n"
    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=30)
    for ids_in in (torch.tensor([tokenizer(PROMPTS[0]).input_ids]), np.array([tokenizer(PROMPTS[0]).input_ids])):
        package.generate(ids_in, max_new_tokens=12, streamer=pieces)
        assert "".join(pieces) == expected
    console = io.StringIO()
    with redirect_stdout(console):
        package.generate(prompts=PROMPTS[:1], generation_len=12, stream=True)
    assert console.getvalue() == expected + "\n"


# ---------------------------------------------------------------------------------------- sampling


def test_sampling_is_reproducible_and_rows_do_not_meet(package):
    settings = {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.95, "max_new_tokens": 12}

    def run(rows, seed):
        return package.generate(**padded(rows), **settings, seed=seed)[:, -12:].tolist()

    together = run(ROWS, 7)
    assert run(ROWS, 7) == together
    # Row i draws from the stream of seed and i: alone, beside others and beside other others.
    assert run(ROWS[:1], 7)[0] == together[0]
    assert run([ROWS[0], ROWS[2], ROWS[1]], 7)[0] == together[0]
    assert run(ROWS, 8) != together
    same = run([ROWS[0]] * 4, 7)
    assert same[0] == together[0]
    assert len({tuple(row) for row in same}) == 4


def test_temperature_zero_and_top_k_one_are_greedy(llama, package):
    batch = padded(ROWS)
    expected = llama.hf.generate(**batch, max_new_tokens=6, do_sample=False).tolist()
    for settings in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}):
        assert package.generate(**batch, max_new_tokens=6, do_sample=True, seed=3, **settings).tolist() == expected


def test_repetition_penalty_equals_hugging_face(llama, package):
    for row in ROWS:
        ids = torch.tensor([row])
        expected = llama.hf.generate(ids, max_new_tokens=12, do_sample=False, repetition_penalty=1.7)
        assert package.generate(ids, max_new_tokens=12, repetition_penalty=1.7).tolist() == expected.tolist()
    assert expected.tolist() != llama.hf.generate(ids, max_new_tokens=12, do_sample=False).tolist()


def test_min_new_tokens_forbids_the_end_token(llama, package):
    ids = torch.tensor([ROWS[0]])
    end = greedy(llama, ROWS[0], 1)[0]
    expected = llama.hf.generate(
        ids, max_new_tokens=9, min_new_tokens=5, eos_token_id=end, pad_token_id=0, do_sample=False
    )
    found = package.generate(ids, max_new_tokens=9, min_new_tokens=5, eos_token_id=end, pad_token_id=0)
    assert found.tolist() == expected.tolist()
    assert found.shape[1] >= 12 + 5


# ---------------------------------------------------------------------------------------- scheduling and limits


def test_five_prompts_in_groups_of_two(llama, shared_home, tokenizer):
    """D15: every prompt is answered once, in order, whatever the batch size."""
    model = QEFFAutoModelForCausalLM.from_pretrained(llama.checkpoint, cache_home_dir=shared_home)
    model.compile(ctx_len=CTX_LEN, prefill_seq_len=8, batch_size=2)
    result = model.generate(prompts=PROMPTS, generation_len=8)
    assert result.ids == [greedy(llama, tokenizer(prompt).input_ids, 8) for prompt in PROMPTS]
    shapes = {value.shape for value in [model._ready().session.state("past_key.0")]}
    assert shapes == {(1, 2, CTX_LEN, 16)}  # the last group is one prompt


def test_more_prompts_than_slots(llama, shared_home, tokenizer):
    """D9: with continuous batching, what a refilled slot makes belongs to the prompt that entered it."""
    model = QEFFAutoModelForCausalLM.from_pretrained(
        llama.checkpoint, continuous_batching=True, cache_home_dir=shared_home
    )
    model.compile(ctx_len=CTX_LEN, prefill_seq_len=8, full_batch_size=2)
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    plain = [greedy(llama, row, 10) for row in ids]
    ends = [plain[0][2], plain[3][5]]
    result = model.generate(prompts=PROMPTS, generation_len=10, eos_token_id=ends)
    expected = []
    for row in plain:
        stop = next((i + 1 for i, token in enumerate(row) if token in ends), 10)
        expected.append(row[:stop])
    assert result.ids == expected
    assert len({len(row) for row in expected}) > 1  # slots did become free at different steps


def test_package_of_one_exact_batch_size(unfused_llama, tokenizer):
    """What a target with fixed shapes compiles: 5 prompts through a batch of exactly 4, then 3 rows that only fill."""
    manifest = Manifest.load(unfused_llama.package)
    fixed = tuple(
        Specialization(spec.name, spec.symbols | {"batch_size": DimRange.exactly(4)})
        for spec in manifest.specializations
    )
    manifest = manifest.replace(specializations=fixed)
    package = CompiledCausalLM(unfused_llama.package, manifest, HostSession(unfused_llama.package, manifest, Tuning(1)))
    for prompts in (PROMPTS, PROMPTS[:4], PROMPTS[2:3]):
        result = package.generate(prompts=prompts, generation_len=5)
        assert result.ids == [greedy(unfused_llama, tokenizer(prompt).input_ids, 5) for prompt in prompts]


def test_no_length_runs_to_the_end_of_the_context(llama, package, tokenizer):
    """D10: each prompt has the room that its own length leaves; the last token needs none."""
    result = package.generate(prompts=[PROMPTS[1], PROMPTS[2]])
    lengths = [len(tokenizer(prompt).input_ids) for prompt in (PROMPTS[1], PROMPTS[2])]
    assert lengths[0] != lengths[1]
    assert [len(ids) for ids in result.ids] == [CTX_LEN - length + 1 for length in lengths]
    assert result.finish_reasons == ["length", "length"]
    for prompt, ids in zip((PROMPTS[1], PROMPTS[2]), result.ids, strict=True):
        assert ids == greedy(llama, tokenizer(prompt).input_ids, len(ids))


def test_prompt_that_fills_the_context(llama, package):
    """D14: a prompt of ctx_len tokens beside a short one; both answer as Hugging Face does."""
    rows = [sample_prompt(CTX_LEN), sample_prompt(3, seed=4)]
    found = package.generate(**padded(rows), max_new_tokens=1)
    assert found[:, -1].tolist() == [greedy(llama, row, 1)[0] for row in rows]


def test_more_tokens_than_fit_is_an_error_that_says_how_many(package):
    row = np.array([sample_prompt(40)])
    assert package.generate(row, max_new_tokens=9).shape == (1, 49)
    with pytest.raises(ContextLengthError, match=r"40 tokens and 10 new ones do not fit ctx_len=48: ask for at most 9"):
        package.generate(row, max_new_tokens=10)
    with pytest.raises(ContextLengthError, match=r"49 tokens does not fit ctx_len=48: shorten it or compile with"):
        package.generate(np.array([sample_prompt(49)]), max_new_tokens=1)


def test_metrics(package, tokenizer):
    result = package.generate(prompts=PROMPTS, generation_len=8)
    metrics = result.metrics
    assert metrics.prompt_tokens == sum(len(tokenizer(prompt).input_ids) for prompt in PROMPTS)
    assert metrics.generated_tokens == sum(map(len, result.ids)) == 40
    assert metrics.decoded_tokens == 40 - 5
    assert 0 < metrics.prefill_s <= metrics.ttft_s < metrics.total_s
    assert 0 < metrics.decode_s < metrics.total_s
    assert metrics.prefill_s + metrics.decode_s <= metrics.total_s
    assert metrics.decode_tokens_per_s == pytest.approx(35 / metrics.decode_s)
    assert metrics.prefill_tokens_per_s == pytest.approx(metrics.prompt_tokens / metrics.prefill_s)
    assert metrics.peak_rss_mb > 50
    assert package.last_metrics is metrics
    package.generate(np.array([ROWS[0]]), max_new_tokens=3)
    assert (package.last_metrics.prompt_tokens, package.last_metrics.generated_tokens) == (12, 3)


# ---------------------------------------------------------------------------------------- what is refused


GOOD = np.array([sample_prompt(4)])
WRONG = {
    "nothing": ({}, InputError, ["input_ids, prompts and messages"]),
    "prompts and input_ids": ({"input_ids": GOOD, "prompts": "a"}, InputError, ["input_ids and prompts"]),
    "prompts and messages": ({"prompts": "a", "messages": [{"role": "user", "content": "a"}]}, InputError, ["and"]),
    "two lengths": (
        {"prompts": "a", "generation_len": 3, "max_new_tokens": 4},
        OptionError,
        ["generation_len=3", "max_new_tokens=4", "one"],
    ),
    "unknown": ({"prompts": "a", "temprature": 1.0}, OptionError, ["'temprature'", "Did you mean 'temperature'?"]),
    "mask with prompts": ({"prompts": "a", "attention_mask": GOOD}, InputError, ["attention_mask", "input_ids"]),
    "beams": ({"prompts": "a", "num_beams": 4}, OptionError, ["num_beams=4", "leave it out"]),
    "beams in config": ({"prompts": "a", "generation_config": {"num_beams": 4}}, OptionError, ["num_beams=4"]),
    "negative id": ({"input_ids": np.array([[5, -3]])}, InputError, ["-3", "vocabulary of 128"]),
    "id beyond vocabulary": ({"input_ids": np.array([[5], [VOCAB_SIZE]])}, InputError, ["row 1", "128"]),
    "empty prompt": ({"prompts": ["a", ""]}, InputError, ["prompt 1 is empty"]),
    "no prompts": ({"prompts": []}, InputError, ["prompts is empty"]),
    "no messages": ({"messages": []}, InputError, ["messages is empty"]),
    "int prompts": ({"prompts": [1, 2]}, InputError, ["prompt 0", "int", "strings"]),
    "an int": ({"prompts": 5}, InputError, ["prompts", "int"]),
    "a message": ({"messages": {"role": "user", "content": "a"}}, InputError, ["messages", "list", "dict"]),
    "a message of no conversation": ({"messages": ["hello"]}, InputError, ["messages", "'role'"]),
    "ragged": ({"input_ids": [[1, 2, 3], [4]]}, InputError, ["input_ids", "unequal", "attention_mask"]),
    "floats": ({"input_ids": GOOD.astype(np.float32)}, InputError, ["input_ids", "float32", "integers"]),
    "torch floats": ({"input_ids": torch.ones(1, 3)}, InputError, ["input_ids", "float32", "integers"]),
    "rank 1": ({"input_ids": GOOD[0]}, InputError, ["rank 2", "(4,)"]),
    "rank 3": ({"input_ids": GOOD[None]}, InputError, ["rank 2", "(1, 1, 4)"]),
    "no ids": ({"input_ids": np.zeros((1, 0), np.int64)}, InputError, ["input_ids is empty", "(1, 0)"]),
    "strings": ({"input_ids": ["hello"]}, InputError, ["input_ids", "integers"]),
    "mask of another shape": (
        {"input_ids": GOOD, "attention_mask": np.ones((1, 5), np.int64)},
        InputError,
        ["attention_mask", "(1, 5)", "(1, 4)"],
    ),
    "mask of zeros": (
        {"input_ids": np.ones((2, 3), np.int64), "attention_mask": np.array([[1, 1, 1], [0, 0, 0]])},
        InputError,
        ["row 1", "attention_mask"],
    ),
    "mask of twos": ({"input_ids": GOOD, "attention_mask": GOOD * 0 + 2}, InputError, ["attention_mask", "0 and 1"]),
    "streamer for two": ({"prompts": ["a", "b"], "stream": True}, InputError, ["one row", "2"]),
    "two streamers": ({"prompts": "a", "stream": True, "streamer": object()}, InputError, ["stream=True"]),
    "no streamer": ({"prompts": "a", "streamer": object()}, InputError, ["put", "end"]),
    "criteria": ({"prompts": "a", "stopping_criteria": 5}, OptionError, ["stopping_criteria", "int"]),
    "zero tokens": ({"prompts": "a", "max_new_tokens": 0}, OptionError, ["max_new_tokens", "at least 1"]),
    "zero length": ({"prompts": "a", "generation_len": 0}, OptionError, ["at least 1"]),
    "fractional": ({"prompts": "a", "max_new_tokens": 2.5}, OptionError, ["max_new_tokens", "2.5"]),
    "temperature": ({"prompts": "a", "do_sample": True, "temperature": -1}, OptionError, ["temperature", "-1"]),
    "max_length": ({"input_ids": GOOD, "max_length": 4}, OptionError, ["max_length=4", "max_new_tokens"]),
    "config": ({"prompts": "a", "generation_config": 5}, OptionError, ["generation_config", "int"]),
    "tokenizer": ({"prompts": "a", "tokenizer": 5}, InputError, ["tokenizer", "int"]),
}


@pytest.mark.parametrize(("arguments", "expected", "words"), WRONG.values(), ids=WRONG)
def test_refuses_in_one_sentence(package, monkeypatch, arguments, expected, words):
    def no_run(*args):
        raise AssertionError("the program ran before its input was checked")

    monkeypatch.setattr(package.session, "run", no_run)
    with pytest.raises(QEfficientError) as caught:
        package.generate(**arguments)
    assert type(caught.value) is expected
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_stop_strings_without_a_tokenizer(llama_copy):
    import json

    from blake3 import blake3

    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (llama_copy / name).unlink()
    body = json.loads((llama_copy / "manifest.json").read_text())
    body["files"] = {n: r for n, r in body["files"].items() if (llama_copy / n).exists()}
    del body["digest"]
    body["digest"] = blake3(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (llama_copy / "manifest.json").write_text(json.dumps(body))
    with QEfficient.load(llama_copy) as package:
        assert package.generate(GOOD, max_new_tokens=2).shape == (1, 6)
        for arguments in ({"prompts": "a"}, {"input_ids": GOOD, "stop_strings": ["x"]}):
            with pytest.raises(InputError, match="has no tokenizer: pass input_ids, or a tokenizer with tokenizer="):
                package.generate(**arguments)
