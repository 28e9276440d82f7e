"""What a card's session does beyond plain prompts: slots, adapters, drafts, windows, devices, hand-off."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_card_session import NEW, PROMPTS, generated
from tiny_models import sample_prompt, tiny_causal_lm

import QEfficient
from QEfficient.errors import ContextLengthError, InputError, OptionError, PackageError, QEfficientError, ShapeError
from QEfficient.finetune import QAICLoader
from QEfficient.finetune.step_model import from_module
from QEfficient.finetune.step_package import export_step
from QEfficient.finetune.step_session import StepSession
from QEfficient.models.packaging import compile_export
from QEfficient.progress import silent
from QEfficient.store.store import ArtifactStore
from QEfficient.targets.manifest import Manifest
from QEfficient.targets.options import CompileOptions
from QEfficient.targets.qaic import QaicTarget
from QEfficient.targets.registry import get_target
from QEfficient.transforms.onnx.queue import resolve

LENGTHS = {"prefill_seq_len": 8, "ctx_len": 64}


@pytest.fixture(scope="module")
def host(models) -> str:
    return models["causal"].compile(**LENGTHS)


@pytest.fixture(scope="module")
def expected(host) -> list[list[int]]:
    with QEfficient.load(host) as package:
        return generated(package)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 3},
        {"prefill_seq_len": 1},
        {"full_batch_size": 2},
        {"full_batch_size": 2, "prefill_seq_len": 1},
        {"full_batch_size": 2, "kv_cache_batch_size": 5},
        {"num_speculative_tokens": 3},
        {"full_batch_size": 3, "num_speculative_tokens": [0, 3]},
        {"comp_ctx_lengths_prefill": [16], "comp_ctx_lengths_decode": [24]},
        {"num_devices": 4, "mdp_num_partitions": 2, "full_batch_size": 3},
    ],
    ids=lambda options: ",".join(f"{key}={value}" for key, value in options.items()),
)
def test_every_kind_of_package_gives_the_same_tokens(models, card, expected, options):
    """Four prompts, so that fewer slots or rows are filled more than once, and some rows stay idle."""
    with QEfficient.load(models["causal"].compile(target="qaic", **{**LENGTHS, **options})) as package:
        assert generated(package) == expected
        assert generated(package, PROMPTS[3:]) == expected[3:]  # state of before is in every row


def test_rows_beyond_the_slots_keep_a_prefix(models, card):
    """A prefix in row 4 is continued by either slot while the other decodes another row, as on the host."""
    model, options = models["causal"], {"full_batch_size": 2, "kv_cache_batch_size": 5, **LENGTHS}
    prefix, other = PROMPTS[1], PROMPTS[1][::-1]
    steps = []
    for target in ("host", "qaic"):
        with QEfficient.load(model.compile(target=target, **options)) as package:
            session, found = package.session, []
            session.begin({"full_batch_size": 5, "ctx_len": 64})
            for row, ids in ((4, prefix), (1, other)):
                feeds = {"input_ids": np.array([ids]), "position_ids": np.arange(8)[None], "batch_index": [[row]]}
                feeds["batch_index"] = np.array(feeds["batch_index"])
                found.append(session.run(feeds, "Prefill")["logits"].copy())
            for rows in ([[4], [1]], [[0], [4]]):
                positions = np.array([[8], [8]]) if rows[1] == [1] else np.array([[0], [9]])
                feeds = {"input_ids": np.array([[7], [9]]), "position_ids": positions, "batch_index": np.array(rows)}
                found.append(session.run(feeds, "Decode")["logits"].copy())
            steps.append(np.concatenate(found))
    np.testing.assert_allclose(steps[1], steps[0], atol=5e-3)
    assert np.abs(steps[0][2] - steps[0][5]).max() > 0.1  # the two slots continue the prefix differently


def test_kept_logits_are_the_hosts_log_probabilities(models, card, host):
    """A draft of three and the token before it in one step, beside one token at a time on the host."""
    draft = sample_prompt(4, 7)
    with QEfficient.load(host) as package:
        session, expected = package.session, []
        session.begin({"batch_size": 1, "ctx_len": 64})
        for position, token in enumerate(PROMPTS[1] + draft):
            feeds = {"input_ids": np.array([[token]]), "position_ids": np.array([[position]])}
            expected.append(session.run(feeds, "Decode")["logits"][0, -1].copy())
    with QEfficient.load(models["causal"].compile(target="qaic", num_speculative_tokens=[0, 3], **LENGTHS)) as package:
        session = package.session
        session.begin({"batch_size": 1, "ctx_len": 64})
        session.run({"input_ids": np.array([PROMPTS[1]]), "position_ids": np.arange(8)[None]}, "Prefill")
        feeds = {"input_ids": np.array([draft]), "position_ids": np.arange(8, 12)[None]}
        found = session.run(feeds, "Decode")["logits"]
        assert card.chosen[-1] == 2
        session.run({name: array[:, :1] for name, array in feeds.items()}, "Decode")
        assert card.chosen[-1] == 1

    def log_probabilities(logits):
        logits = np.asarray(logits, np.float64)
        return (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )

    assert found.shape == (1, 4, 128)
    np.testing.assert_allclose(log_probabilities(found[0]), log_probabilities(expected[8:]), atol=5e-3)


def test_the_shortest_context_that_covers_the_positions_is_computed(models, card, expected):
    """Prefill_0, _1 compute 16 and 64 slots, Decode_0, _1 24 and 96: the last of a list is the whole context."""
    windows = {"comp_ctx_lengths_prefill": [16], "comp_ctx_lengths_decode": [24]}
    with QEfficient.load(models["causal"].compile(target="qaic", **windows, **LENGTHS)) as package:
        assert generated(package, [PROMPTS[3]]) == [expected[3]]
        # Chunks end at positions 7, 15, 20; tokens are decoded at 21 to 27.
        assert card.chosen == [0, 0, 1, 2, 2, 2, 3, 3, 3, 3]
        with pytest.raises(ContextLengthError, match="ctx_len=64"):
            generated(package, [sample_prompt(65)], new=1)
        feeds = {"input_ids": np.zeros((1, 8), np.int64), "position_ids": np.arange(57, 65)[None]}
        with pytest.raises(ContextLengthError, match="position 64 is beyond 64"):
            package.session.run(feeds, "Prefill")


def test_adapters_are_sent_once_and_then_kept(models, card, tmp_path):
    model = models["adapters"]
    for seed, name in enumerate(("one", "two")):
        config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(tiny_causal_lm("llama", seed), config).save_pretrained(tmp_path / name)
    found = []
    for options in ({}, {"target": "qaic"}):
        with QEfficient.load(model.compile(**options, **LENGTHS)) as package:
            for name in ("one", "two"):
                package.load_adapter(tmp_path / name, name)
            found.append([generated(package, adapter_name=name) for name in (None, "one", "two", "one")])
            parameters = {spec.name for spec in package.manifest.parameters}
    assert found[0] == found[1]
    assert len({str(tokens) for tokens in found[0]}) == 3
    sent = [bool(parameters & set(step)) for step in card.sent]
    # The base, "one", base again after it, and so on: each switch is sent with one step of its prompt.
    assert sum(sent) == 4
    assert all(step.keys() >= parameters for step, any_ in zip(card.sent, sent, strict=True) if any_)


def test_states_handed_from_a_prefill_package_to_a_decode_package(models, card, expected):
    packages = [models["causal"].compile(target="qaic", prefill_only=only, **LENGTHS) for only in (True, False)]
    prefill, decode = (QaicTarget().load(package, Manifest.load(package)) for package in packages)
    prompt = PROMPTS[2]
    for session in (prefill, decode):
        session.begin({"batch_size": 1, "ctx_len": 64})
    feeds = {"input_ids": np.array([prompt[:8]]), "position_ids": np.arange(8)[None]}
    prefill.run(feeds, "Prefill")
    rest = np.zeros((2, 1, 8), np.int64)
    rest[0, 0, 0], rest[1] = prompt[8], [8] + [-1] * 7
    results, states = prefill.run_and_read({"input_ids": rest[0], "position_ids": rest[1]}, "Prefill")
    assert {array.dtype.name for array in states.values()} == {"float16"}
    decode.write_states(states)
    tokens = [int(results["logits"][0, -1].argmax())]
    for position in range(9, 9 + NEW - 1):
        feeds = {"input_ids": np.array([[tokens[-1]]]), "position_ids": np.array([[position]])}
        tokens.append(int(decode.run(feeds, "Decode")["logits"][0, -1].argmax()))
    assert tokens == expected[2]
    assert [len(step) for step in card.sent[-(NEW - 1) :]] == [6] + [2] * (NEW - 2)
    with pytest.raises(InputError, match=r"past_key\.0 must be float16"):
        decode.write_states({name: array[:, :, :9] for name, array in states.items()})
    prefill.close()
    decode.close()


@pytest.mark.parametrize(("only", "word"), [(True, "prompts only"), (False, "answers only")])
def test_half_a_package_generates_nothing(models, card, only, word):
    with pytest.raises(PackageError, match=word):
        QEfficient.load(models["causal"].compile(target="qaic", prefill_only=only, **LENGTHS))


def test_compressed_state_stays_on_the_card(models, card, expected):
    """MXINT8 has no public layout on the host. The stand-in rounds to it: numbers differ, and little."""
    plain, small = (
        QEfficient.load(models["causal"].compile(target="qaic", mxint8_kv_cache=small, **LENGTHS))
        for small in (False, True)
    )
    feeds = {"input_ids": np.array([PROMPTS[1]]), "position_ids": np.arange(8)[None]}
    logits = []
    for package in (plain, small):
        package.session.begin({"batch_size": 1, "ctx_len": 64})
        package.session.run(feeds, "Prefill")
        step = {"input_ids": np.array([[5]]), "position_ids": np.array([[8]])}
        logits.append(package.session.run(step, "Decode")["logits"])
    assert 0 < np.abs(logits[0] - logits[1]).max() < 0.2
    with pytest.raises(QEfficientError, match="cannot leave the card"):
        small.session.run_and_read(feeds, "Prefill")


def test_wrong_inputs_are_refused_before_the_card_sees_them(models, card):
    with QEfficient.load(models["causal"].compile(target="qaic", **LENGTHS)) as package:
        session = package.session
        ids = np.zeros((1, 8), np.int64)
        with pytest.raises(QEfficientError, match=r"begin\(\)"):
            session.run({"input_ids": ids, "position_ids": ids}, "Prefill")
        with pytest.raises(ShapeError, match="ctx_len=65"):
            session.begin({"batch_size": 1, "ctx_len": 65})
        session.begin({"batch_size": 1, "ctx_len": 64})
        for feeds, error, word in (
            ({"input_ids": ids}, InputError, "missing"),
            ({"input_ids": ids, "position_ids": ids, "past": ids}, InputError, "unexpected"),
            ({"input_ids": ids.astype(np.int32), "position_ids": ids}, InputError, "int64"),
            ({"input_ids": ids[:, :5], "position_ids": ids[:, :5]}, ShapeError, "seq_len=5"),
        ):
            with pytest.raises(error, match=word):
                session.run(feeds, "Prefill")
        with pytest.raises(InputError, match="row"):
            session.run({"input_ids": ids, "position_ids": ids}, "Prefill", row=0)
        assert card.sent == []
    with pytest.raises(QEfficientError, match="closed"):
        session.begin({"batch_size": 1, "ctx_len": 64})


def test_a_training_step_through_the_loader(card, tmp_path):
    """`QAICLoader`: loss and gradients of the host's step, and of new values at the next call."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    tuned = from_module(get_peft_model(tiny_causal_lm("llama"), config))
    step = export_step(tuned, ArtifactStore(tmp_path / "home"))[1]
    store, options = ArtifactStore(tmp_path / "home"), CompileOptions(batch_size=2, seq_len=(8,))
    host = compile_export(store, step, "step", options, [], silent)
    asked = options.replace(target="qaic")
    queue = resolve(get_target("qaic").transforms("training", asked))
    package = compile_export(store, step, "step", asked, queue, silent)
    loader = QAICLoader(package, device_ids=[1])
    loader.load_model()
    batch = {"input_ids": np.array([PROMPTS[1], PROMPTS[1][::-1]])}
    batch["labels"] = np.where(np.arange(8) < 3, -100, batch["input_ids"])  # 10 of the 14 rows there are room for
    rng = np.random.default_rng(0)
    with StepSession(host) as expected, loader.get_session() as found:
        assert found.manifest.stand_in
        values = {
            spec.name: (rng.standard_normal(spec.shape) * 0.1).astype(np.float32) for spec in found.manifest.parameters
        }
        peaks = []
        for session in (expected, found):
            session.set_parameters(values)
        for _ in range(2):
            a, b = (session.run(batch) for session in (expected, found))
            np.testing.assert_allclose(b.loss, a.loss, rtol=2e-3)
            np.testing.assert_allclose(b.logprobs, a.logprobs, atol=2e-2)
            assert a.gradients.keys() == b.gradients.keys()
            for name, gradient in a.gradients.items():
                np.testing.assert_allclose(b.gradients[name], gradient, atol=2e-3 * np.abs(gradient).max() + 1e-6)
            peaks.append(max(np.abs(gradient).max() for gradient in a.gradients.values()))
            for array in values.values():
                array *= 2  # in place, as an optimiser does
        assert peaks[1] > 1.5 * peaks[0]  # the gradients of the first values would not have passed
    with pytest.raises(OptionError, match="device_ids"):
        QAICLoader(package, device_ids=[0, 1]).load_model()
    with pytest.raises(OptionError, match="runs on the host"):
        QAICLoader(host, device_ids=[0]).load_model()
