"""GenerationSettings: merge order, HF's names, and every option that must be refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from QEfficient.engine.settings import GenerationSettings
from QEfficient.errors import OptionError

resolve = GenerationSettings.resolve


def test_later_sources_win():
    got = resolve(
        {"temperature": 0.5, "top_k": 7, "top_p": 0.8, "do_sample": True},
        GenerationConfig(top_k=8, top_p=0.9),
        {"top_p": 0.95},
    )
    assert (got.temperature, got.top_k, got.top_p, got.do_sample) == (0.5, 8, 0.95, True)


def test_empty_sources_give_hf_defaults():
    hf = GenerationConfig()._get_default_generation_params()
    got = resolve({}, None, {})
    for name in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty"):
        assert getattr(got, name) == hf[name]
    assert got == GenerationSettings() == resolve({}, GenerationConfig(), {}) == resolve(hf | {"max_length": None})


def test_none_is_unset_in_a_config_and_off_as_a_keyword():
    assert resolve({"top_k": 7}, {"top_k": None}, {}).top_k == 7
    off = resolve(
        {"top_k": 7, "eos_token_id": 2, "temperature": 0.5, "do_sample": True, "max_new_tokens": 9},
        None,
        {"top_k": None, "eos_token_id": None, "temperature": None, "max_new_tokens": None},
    )
    assert (off.top_k, off.eos_token_id, off.temperature, off.max_new_tokens) == (0, (), 1.0, None)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2, (2,)),
        ([2, 5, 2], (2, 5)),
        ((7,), (7,)),
        (np.array([2, 3]), (2, 3)),
        (np.int64(4), (4,)),
        (torch.tensor([8, 9]), (8, 9)),
        (-1, ()),
        ([], ()),
    ],
)
def test_eos_forms(value, expected):
    assert resolve({}, None, {"eos_token_id": value}).eos_token_id == expected


def test_stop_strings_and_fill():
    got = resolve({"eos_token_id": [5, 6], "pad_token_id": -1}, None, {"stop_strings": "\n\n"})
    assert got.stop_strings == ("\n\n",)
    assert got.pad_token_id is None
    assert got.fill_id == 5
    assert resolve({"eos_token_id": 5, "pad_token_id": 0}).fill_id == 0
    assert resolve({}).fill_id is None
    assert resolve({}, None, {"stop_strings": ["a", "b"]}).stop_strings == ("a", "b")


def test_ignore_eos_keeps_the_ids_but_stops_on_none():
    got = resolve({"eos_token_id": 5}, None, {"ignore_eos": True})
    assert got.eos_token_id == (5,)
    assert got.stop_ids == ()
    assert resolve({"eos_token_id": 5}).stop_ids == (5,)


def test_lengths():
    assert resolve({}).new_tokens(10) is None
    assert resolve({"max_length": 30}).new_tokens(10) == 20
    assert resolve({"max_length": 30, "max_new_tokens": 4}).new_tokens(10) == 4
    assert resolve({"max_new_tokens": 4}, None, {"max_length": 30}).new_tokens(10) == 20
    assert resolve({"max_length": 30}, None, {"max_new_tokens": 3}).new_tokens(10) == 3
    assert resolve({}, None, {"max_new_tokens": 3, "max_length": 30}).new_tokens(10) == 3
    with pytest.raises(OptionError, match="10 tokens already"):
        resolve({"max_length": 10}).new_tokens(10)


UNSUPPORTED = {
    "num_beams": 4,
    "num_return_sequences": 2,
    "penalty_alpha": 0.6,
    "no_repeat_ngram_size": 3,
    "typical_p": 0.9,
    "epsilon_cutoff": 1e-4,
    "eta_cutoff": 1e-4,
    "min_length": 5,
    "max_time": 1.0,
    "bad_words_ids": [[3]],
    "suppress_tokens": [1],
    "forced_eos_token_id": 2,
    "sequence_bias": {(1,): 2.0},
    "guidance_scale": 1.5,
    "prompt_lookup_num_tokens": 3,
    "output_scores": True,
    "return_dict_in_generate": True,
    "top_h": 0.4,
    "token_healing": True,
}


@pytest.mark.parametrize(("name", "value"), UNSUPPORTED.items())
def test_unsupported_is_refused_from_every_source(name, value):
    for sources in (({name: value}, None, {}), ({}, {name: value}, {}), ({}, None, {name: value})):
        with pytest.raises(OptionError, match=f"^{name}=.* is not supported: leave it out or pass {name}="):
            resolve(*sources)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("assistant_model", object()),
        ("logits_processor", [lambda ids, scores: scores]),
        ("prefix_allowed_tokens_fn", print),
        ("early_stopping", True),
        ("length_penalty", 2.0),
    ],
)
def test_unsupported_keywords(name, value):
    with pytest.raises(OptionError, match="not supported"):
        resolve({}, None, {name: value})


def test_every_hf_default_is_accepted_and_every_hf_key_is_known():
    full = GenerationConfig().to_dict() | GenerationConfig()._get_default_generation_params()
    resolve(full, full, full)
    resolve(json.loads(GenerationConfig().to_json_string(use_diff=False)))


def test_a_keyword_can_switch_off_what_the_checkpoint_asks_for():
    bart = {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "no_repeat_ngram_size": 3}
    with pytest.raises(OptionError, match="num_beams=4 in the package's generation config"):
        resolve(bart)
    resolve(bart, None, {"num_beams": 1, "no_repeat_ngram_size": 0})


def test_harmless_keys():
    harmless = {
        "transformers_version": "5.1",
        "_from_model_config": True,
        "bos_token_id": 1,
        "use_cache": False,
    }
    harmless |= {"cache_implementation": "static", "output_attentions": False, "logits_processor": []}
    assert resolve(harmless, harmless, harmless) == GenerationSettings()


@pytest.mark.parametrize(("name", "near"), [("temprature", "temperature"), ("max_tokens", "max_new_tokens")])
def test_unknown_keyword_names_the_nearest(name, near):
    with pytest.raises(OptionError, match=f"no generation option '{name}'. Did you mean '{near}'"):
        resolve({}, None, {name: 1})
    with pytest.raises(OptionError, match=near):
        resolve({}, {name: 1}, {})


def test_a_checkpoints_own_keys_pass_also_through_its_generation_config():
    own = {"alignment_heads": [[1, 2]], "eos_token_id": 3}
    assert resolve(own, GenerationConfig(**own), {}).eos_token_id == (3,)
    with pytest.raises(OptionError, match="alignment_heads"):
        resolve({}, GenerationConfig(**own), {})


@pytest.mark.parametrize("bad", [3, "greedy", [("top_k", 1)], GenerationConfig])
def test_generation_config_of_the_wrong_type(bad):
    with pytest.raises(OptionError, match="generation_config must be"):
        resolve({}, bad, {})


BAD = [
    *[("max_new_tokens", v) for v in (0, -1, True, 2.0, "5")],
    *[("max_length", v) for v in (0, False)],
    *[("min_new_tokens", v) for v in (-1, True)],
    *[("do_sample", v) for v in (1, "yes")],
    *[("temperature", v) for v in (-0.1, float("nan"), float("inf"), "hot", True)],
    *[("top_k", v) for v in (-1, 1.5, True)],
    *[("top_p", v) for v in (0, 0.0, 1.1, -1, "x", True)],
    *[("min_p", v) for v in (-0.1, 1.1, True)],
    *[("repetition_penalty", v) for v in (0, -1.0, float("nan"))],
    *[("seed", v) for v in (-1, 1.0, True)],
    *[("eos_token_id", v) for v in ("2", [1, "2"], [True], 1.5)],
    *[("pad_token_id", v) for v in ("0", True)],
    *[("stop_strings", v) for v in ("", ["a", ""], [1], 3)],
    *[("ignore_eos", v) for v in (1, "no")],
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_values(name, value):
    with pytest.raises(OptionError, match=name):
        resolve({}, None, {name: value})


def test_edges_are_accepted():
    got = resolve({}, None, {"do_sample": True, "temperature": 0, "top_p": 1, "top_k": 0, "min_p": 0, "seed": 0})
    assert not got.sampling
    assert resolve({}, None, {"do_sample": True}).sampling
    assert not resolve({}).sampling


def test_contradiction():
    with pytest.raises(OptionError, match="min_new_tokens=5 is more than max_new_tokens=4"):
        resolve({}, None, {"min_new_tokens": 5, "max_new_tokens": 4})


def test_sampling_options_without_sampling_are_told():
    with pytest.warns(UserWarning, match=r"^temperature, min_p has no effect"):
        resolve({}, None, {"temperature": 0.5, "min_p": 0.1, "top_k": 50})


@pytest.mark.parametrize("sources", [({"temperature": 0.5}, None, {}), ({}, None, {"do_sample": True, "top_p": 0.5})])
@pytest.mark.filterwarnings("error")
def test_no_needless_warning(sources):
    resolve(*sources)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerationSettings().top_k = 3
