"""From sources to labels: readers, format detection, masks, end tokens, lengths, the data manager and its cache."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizers import CHATML, CHATML_MARKED, byte_tokenizer, spaced_tokenizer, word_classifier_tokenizer
from transformers import AutoTokenizer

from QEfficient.errors import InputError, OptionError
from QEfficient.finetune import QEffConfig, QEffDataManager, QEffTrainingArgs
from QEfficient.finetune.data.encode import keep_answer
from QEfficient.finetune.data.files import read_file
from QEfficient.finetune.data.prepare import split_rows

ROOT = Path(__file__).parents[2]
EOS = 2


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("data-home")


def prepare(home, rows, tokenizer=None, custom=None, args=None, **options):
    """(manager, training rows, evaluation rows); by default without evaluation rows."""
    options = {"train_frac": 1.0, "max_ctx_len": 256, **options}
    if custom is not None and rows is None:
        config = QEffConfig("m", **options)
    else:
        config = QEffConfig("m", rows, **options)
    manager = QEffDataManager(config, tokenizer or byte_tokenizer(), custom, args, cache_home_dir=home)
    return manager, *manager.prepare_dataset()


def only(home, row, tokenizer=None, **options):
    """(text of all tokens, text of trained tokens, ids, labels) of one row."""
    tokenizer = tokenizer or byte_tokenizer()
    _, train, _ = prepare(home, [row], tokenizer, **options)
    ids, labels = train[0]["input_ids"], train[0]["labels"]
    return tokenizer.decode(ids), tokenizer.decode(labels[labels != -100]), ids.tolist(), labels.tolist()


def text_rows(rows):
    return [bytes(row["text"], "utf-8") for row in rows]


# ---------------------------------------------------------------------------------------------- sources

ROWS = [{"question": "a?", "answer": "b"}, {"question": 'c, "d"?', "answer": "e\nf"}]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    (tmp_path / "c.json").write_text(json.dumps({"data": ROWS}))
    (tmp_path / "d.json").write_text(json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}))
    (tmp_path / "e.json").write_text("\n".join(json.dumps(row) for row in ROWS))
    with gzip.open(tmp_path / "f.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps(row) for row in ROWS))
    data = datasets.Dataset.from_list(ROWS)
    # An independent writer of quoted fields.
    data.to_pandas().to_csv(tmp_path / "g.csv", index=False)
    data.to_pandas().to_csv(tmp_path / "h.tsv", index=False, sep="\t", encoding="utf-8-sig")
    data.to_parquet(tmp_path / "i.parquet")
    for path in sorted(tmp_path.iterdir()):
        rows = read_file(path)
        assert [rows[i] for i in range(len(rows))] == ROWS, path.name
    (tmp_path / "j.txt").write_text("one\n\ntwo\n")
    assert read_file(tmp_path / "j.txt") == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', "Line 3 of .* is not JSON"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', "Line 2 of .* a row must be an object"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": 5}\n',
            "Column 'text' of .* holds a number in row 2 and a string in row 1",
        ),
        ("a.jsonl", '{"text": "a", "n": 1}\n{"text": "b", "n": true}\n', "Column 'n'"),
        ("a.jsonl", "\n\n", "no rows in"),
        ("a.json", "", "no rows in"),
        ("a.json", "[1, 2]", "Row 1 of .* a row must be an object"),
        ("a.json", '{"a": [1, 2], "b": [1]}', "different lengths"),
        ("a.json", '[{"a": 1}', "is not JSON"),
        ("a.json", '"text"', "must hold a list of rows"),
        ("a.csv", "a,b\n1,2\n3\n", "Line 3 of .* does not have 2 fields"),
        ("a.csv", "a,a\n1,2\n", "name every column once"),
        ("a.csv", "", "no rows in"),
        ("a.jsonl", b'{"text": "\xff"}', "not UTF-8"),
        ("a.jsonl.gz", "not compressed", "cannot be decompressed"),
        ("a.parquet", "not parquet", "not a readable parquet"),
        ("a.docx", "x", "no data format"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        read_file(path)


def test_nulls_and_ints_beside_floats_are_not_mixed_types(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1, "t": null}\n{"a": 1.5, "t": "x"}\n{"t": "y"}\n')
    assert len(read_file(path)) == 3


def test_a_missing_file_names_the_nearest(tmp_path, home):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match=r"no data at .*Did you mean .*train\.jsonl"):
        prepare(home, str(tmp_path / "trian.jsonl"))


def test_directories_keep_the_users_splits(tmp_path, home):
    for name, count in (("train", 3), ("valid", 2), ("test", 1)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(count))
        )
    manager, train, evaluation = prepare(home, tmp_path, train_frac=0.85)
    assert (len(train), len(evaluation)) == (3, 2)
    assert any("'valid'" in note for note in manager.audit.notes)
    _, train, evaluation = prepare(home, tmp_path, train_split="test", eval_split="train", train_frac=0.85)
    assert (len(train), len(evaluation)) == (1, 3)
    assert prepare(home, tmp_path, train_frac=1.0)[2] is None
    (tmp_path / "valid.jsonl").unlink()
    assert len(prepare(home, tmp_path, train_frac=0.85)[2]) == 1
    with pytest.raises(OptionError, match=r"train_split='tset' is no split .*Did you mean 'test'"):
        prepare(home, tmp_path, train_split="tset")
    with pytest.raises(OptionError, match="must be measured on other rows"):
        prepare(home, tmp_path, eval_split="train", train_frac=0.85)


def test_a_train_only_directory_and_a_single_file_are_split(tmp_path, home):
    (tmp_path / "whatever.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(20)))
    for source in (tmp_path, tmp_path / "whatever.jsonl"):
        _, train, evaluation = prepare(home, source, train_frac=0.85)
        assert (len(train), len(evaluation)) == (17, 3)
        assert not set(train.numbers.tolist()) & set(evaluation.numbers.tolist())


def test_objects_in_memory(tmp_path, home):
    rows = [{"text": f"row {i}"} for i in range(10)]

    class Torch(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            return rows[index]

    expected = prepare(home, rows)[1]
    for given_rows in (tuple(rows), iter(rows), datasets.Dataset.from_list(rows), Torch()):
        assert np.array_equal(prepare(home, given_rows)[1].ids, expected.ids)
    both = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows[:7]), "validation": datasets.Dataset.from_list(rows[7:])}
    )
    _, train, evaluation = prepare(home, both, train_frac=0.85)
    assert (len(train), len(evaluation)) == (7, 3)
    both.save_to_disk(tmp_path / "saved")
    _, train, evaluation = prepare(home, tmp_path / "saved", train_frac=0.85)
    assert (len(train), len(evaluation)) == (7, 3)
    for bad, message in (
        ([], "no rows in"),
        ([1], "must be an object"),
        (5, "must be rows"),
        (None, "needs dataset_name"),
    ):
        with pytest.raises((InputError, OptionError), match=message):
            prepare(home, bad)


def test_an_unreachable_hub_name_says_what_to_do(home):
    with pytest.raises(InputError, match="cannot be loaded"):
        prepare(home, "nobody/such-data-set")


def test_the_sample_is_what_its_script_writes_and_its_sums_are_right(tmp_path):
    bundled = ROOT / "QEfficient" / "finetune" / "samples" / "arithmetic.jsonl"
    again = tmp_path / "again.jsonl"
    subprocess.run([sys.executable, ROOT / "examples" / "sample_data.py", again], check=True)
    assert again.read_bytes() == bundled.read_bytes()
    rows = read_file(bundled)
    assert len(rows) >= 400
    assert len({row["question"] for row in rows}) == len(rows)
    for row in rows:
        *lines, last = row["answer"].split("\n")
        for line in lines:
            words = line.rstrip(".").replace("$", "").split()
            at = words.index("=")
            left, operator, right = int(words[at - 3]), words[at - 2], int(words[at - 1])
            value = {"+": left + right, "-": left - right, "*": left * right, "/": left / right}[operator]
            assert value == int(words[at + 1]), row
        assert last == f"#### {int(words[at + 1])}"


# ---------------------------------------------------------------------------------------------- split, sample


@given(st.integers(1, 300), st.floats(0.01, 1.0), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_a_split_uses_every_row_once(count, share, seed):
    train, evaluation = split_rows(count, share, seed)
    assert sorted([*train, *evaluation]) == list(range(count))
    assert len(train) >= 1
    assert (len(evaluation) == 0) == (share == 1.0 or count == 1)
    assert abs(len(train) - count * share) <= 1
    again = split_rows(count, share, seed)
    assert np.array_equal(train, again[0])


def test_split_and_sample_depend_on_the_seed(home):
    rows = [{"text": f"row {i:03}"} for i in range(100)]
    first = prepare(home, rows, train_frac=0.5, seed=1)[1].numbers.tolist()
    assert first == prepare(home, rows, train_frac=0.5, seed=1)[1].numbers.tolist()
    assert first != prepare(home, rows, train_frac=0.5, seed=2)[1].numbers.tolist()
    # Not simply the first or last rows of the file.
    assert first != list(range(1, 51))
    sampled = prepare(home, rows, train_frac=0.5, seed=1, sample_size=10)[1].numbers.tolist()
    assert len(sampled) == 10
    assert set(sampled) < set(first)
    manager, train, _ = prepare(home, rows, sample_size=1000)
    assert len(train) == 100
    assert any("sample_size=1000 is more than" in note for note in manager.audit.notes)


# ---------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"input_ids": [5, 6], "text": "x"}, "tokenized"),
        ({"segments": [{"label": True, "text": "xy"}]}, "segments"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "messages"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt"),
        ({"instruction": "i", "input": "x", "output": "o"}, "alpaca"),
        ({"prompt": "p", "completion": "c"}, "prompt_completion"),
        ({"question": "p", "response": "c", "id": 5}, "prompt_completion"),
        ({"input": "p", "output": "c"}, "prompt_completion"),
        ({"text": "t"}, "text"),
        ({"content": "t"}, "text"),
    ],
)
def test_detection(home, row, name):
    manager, train, _ = prepare(home, [row], byte_tokenizer(template=CHATML))
    assert manager.audit.format == name
    assert len(train) == 1


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"frage": "p", "antwort": "c"}, {}, "the columns antwort, frage, which fits no known format .*columns="),
        ({"question": "p", "answer": "c", "response": "d"}, {}, "question/answer and question/response could each"),
        ({"prompt": "p", "chosen": "c", "rejected": "d"}, {}, "set method='dpo'"),
        ({"text": "p", "label": 1}, {}, "set task='seq_classification'"),
        ({"prompt": "p", "completion": "c"}, {"dataset_format": "alpaca"}, "dataset_format='alpaca' needs instruction"),
        ({"prompt": "p", "completion": "c"}, {"task": "seq_classification"}, "needs text .*and label"),
        ({"text": "t"}, {"columns": {"promt": "text"}}, "Did you mean 'prompt'"),
        ({"text": "t"}, {"columns": {"prompt": "txt"}}, "Did you mean 'text'"),
    ],
)
def test_what_fits_no_format_lists_columns_and_choices(home, row, options, message):
    with pytest.raises(OptionError, match=message):
        prepare(home, [row], **options)


def test_columns_choose_between_pairs_and_translate(home):
    row = {"question": "q", "answer": "a", "response": "r"}
    assert only(home, row, columns={"prompt": "question", "completion": "response"})[1] == "r</s>"
    assert only(home, {"frage": "q", "antwort": "a"}, columns={"question": "frage", "answer": "antwort"})[1] == "a</s>"
    preferred = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    options = {"columns": {"prompt": "prompt", "completion": "chosen"}, "dataset_format": "prompt_completion"}
    assert only(home, preferred, **options)[:2] == ("qgood</s>", "good</s>")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "p", "completion": "c"}, {"prompt": "p"}],
            "Row 2 has the columns prompt .*1 of 2 rows, such as row 1",
        ),
        ([{"messages": [{"content": "x"}]}], "Row 1 does not fit the format messages: .*role and content"),
        ([{"messages": [{"role": "robot", "content": "x"}]}], "'robot' is no known role"),
        ([{"conversations": [{"from": "alien", "value": "x"}]}], "'alien' is no known speaker"),
        ([{"prompt": 5, "completion": 6}], "prompt must be a string, got 5"),
        ([{"input_ids": [5, 6], "labels": [5]}], "labels has 1 values and input_ids has 2"),
        ([{"input_ids": [5, 6], "labels": [6, 7]}], "labels must be -100 or the token at the same place, unshifted"),
        ([{"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}], "a hole between real tokens"),
        ([{"input_ids": [5, 99999]}], "99999, and the tokenizer's vocabulary has"),
        ([{"input_ids": [5.5, 6]}], "one list of integers"),
        ([{"segments": [{"text": "x"}]}], "a label of true or false"),
    ],
)
def test_rows_that_do_not_fit_are_named(home, rows, message):
    with pytest.raises(InputError, match=message):
        prepare(home, rows, byte_tokenizer(template=CHATML))


CHAT_ROW = {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]}


@pytest.mark.parametrize("odd", [1, 37, 100])
def test_the_row_of_another_format_is_named(home, odd):
    rows = [{"prompt": f"p{n}", "completion": "c"} for n in range(100)]
    rows[odd - 1] = CHAT_ROW
    other = 2 if odd == 1 else 1
    message = (
        rf"Row {odd} has the columns messages \(format messages\), and 99 of 100 rows, such as row {other}, have the "
        r"columns completion, prompt \(format prompt_completion\): give every row the same columns"
    )
    with pytest.raises(InputError, match=message):
        prepare(home, rows, byte_tokenizer(template=CHATML))
    # Two pairs of columns are no choice between them where no row has both.
    rows[odd - 1] = {"question": "p", "label": 1}
    with pytest.raises(InputError, match=rf"Row {odd} has the columns label, question \(no known format\)"):
        prepare(home, rows)


def test_evaluation_rows_of_another_format_are_named(home):
    splits = {"train": [{"prompt": "p", "completion": "c"}], "validation": [CHAT_ROW]}
    with pytest.raises(InputError, match="Row 1 has the columns messages, and the format prompt_completion needs"):
        prepare(home, splits, train_frac=0.9)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "\ud800 x", "completion": "y"},
        {"prompt": "x", "completion": "y\udc00"},
        {"text": "x\ud800"},
        {"text": "\ud83d"},
        {"segments": [{"text": "x\ud800", "label": True}]},
        {"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "c"}]},
        {"messages": CHAT_ROW["messages"], "tools": [{"name": "\ud800"}]},
    ],
)
@pytest.mark.parametrize("template", [None, CHATML])
def test_half_a_character_is_named_with_its_row(home, row, template):
    good = {name: "fine" if isinstance(value, str) else value for name, value in row.items()}
    good = {**good, **{k: v for k, v in CHAT_ROW.items() if k in row}, **({"tools": None} if "tools" in row else {})}
    if "segments" in row:
        good = {"segments": [{"text": "fine \U0001f600", "label": True}]}
    if template is None and "messages" in row:
        pytest.skip("needs a template")
    with pytest.raises(InputError, match=r"Row 2 has '\\ud\w+', half of a surrogate pair") as error:
        prepare(home, [good, row], byte_tokenizer(template=template))
    str(error.value).encode()  # can be printed


def test_half_a_character_in_a_label_or_a_text_to_classify(home):
    good, tokenizer = {"text": "good", "label": "a"}, word_classifier_tokenizer()
    for bad in ({"text": "\ud800", "label": "b"}, {"text": "bad", "label": "\ud800"}):
        with pytest.raises(InputError, match=r"Row 2 has .*surrogate"):
            prepare(home, [good, bad], tokenizer, task="seq_classification")


def test_rows_split_off_for_evaluation_that_are_unusable_are_left_out_with_a_note(home):
    _, kept = split_rows(2, 0.9, 42)
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "c"}]
    rows[int(kept[0])] = {"prompt": "p", "completion": None}
    manager, train, evaluation = prepare(home, rows, train_frac=0.9)
    assert (len(train), evaluation) == (1, None)
    assert list(manager.audit.splits) == ["train"]
    note = "none of the rows split off for evaluation can be used (1 × empty), so there are none for evaluation."
    assert note in manager.audit.notes
    # What the user chose for evaluation is not left out.
    with pytest.raises(InputError, match=r"No row of the eval data can be trained on \(1 × empty\)"):
        prepare(home, {"train": rows, "validation": [{"prompt": "p", "completion": None}]}, train_frac=0.9)
    with pytest.raises(InputError, match="No row of the train data"):
        prepare(home, [{"prompt": "p", "completion": None}] * 2, train_frac=0.9)


def test_segments_without_a_true_label_are_called_that(home):
    for piece in ({"text": "x", "label": False}, {"text": "", "label": True}):
        with pytest.raises(InputError, match=r"2 × empty.*no segment with a text has label true") as error:
            prepare(home, [{"segments": [piece]}] * 2)
        assert "-100" not in str(error.value)


def test_empty_rows_are_left_out_and_counted(home):
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": " "}, {"prompt": None, "completion": "c"}]
    manager, train, _ = prepare(home, rows)
    assert len(train) == 1
    assert manager.audit.splits["train"].dropped == {"empty": 2}
    with pytest.raises(InputError, match="No row of the train data can be trained on \\(2 × empty\\)"):
        prepare(home, rows[1:])


# ---------------------------------------------------------------------------------------------- labels


def test_prompt_is_masked_and_the_end_is_trained(home):
    text, trained, _, labels = only(home, {"prompt": "2+2=", "completion": "4"})
    assert (text, trained) == ("2+2=4</s>", "4</s>")
    assert labels[-1] == EOS
    # Fields of two names are no cut text: a line break keeps them apart.
    assert only(home, {"question": "2+2?", "answer": "4"})[0] == "2+2?\n4</s>"
    assert only(home, {"prompt": "p", "completion": "c"}, byte_tokenizer(bos=True))[:2] == ("<s>pc</s>", "c</s>")
    assert only(home, {"prompt": "p", "completion": "c"}, byte_tokenizer(bos=True), train_on="all")[1] == "pc</s>"
    assert only(home, {"prompt": "p", "completion": "c"}, train_on="all")[1] == "c</s>"


@pytest.mark.parametrize("limit", [16, 64, 512])
def test_trained_tokens_do_not_depend_on_the_length(home, limit):
    # An answer and its end token: 5 trained tokens at any length (one peer trains 1 of 65 at 64 tokens).
    _, trained, ids, labels = only(home, {"instruction": "say " * 10, "output": "yes!"}, max_ctx_len=limit)
    assert trained == "yes!</s>"
    assert len(ids) <= limit
    assert sum(label != -100 for label in labels) == 5


def test_padding_that_equals_the_end_token_stays_untrained(home):
    tokenizer = byte_tokenizer(pad="</s>")
    manager, train, _ = prepare(
        home, [{"prompt": "p", "completion": "c"}, {"prompt": "pp", "completion": "ccc"}], tokenizer
    )
    batch = next(iter(manager.get_dataloader(train, 2, shuffle=False)))
    assert batch["labels"].tolist()[0] == [-100, train.ids[1], EOS, -100, -100, -100]
    assert batch["input_ids"][0, 3:].tolist() == [EOS] * 3


def test_alpaca_uses_every_column(home):
    row = {"instruction": "I", "input": "X", "output": "O", "system": "S", "history": [["q", "a"]]}
    text, trained, _, _ = only(home, row)
    assert text == "S\n\nq\na</s>\n\nI\nX\nO</s>"
    assert trained == "a</s>O</s>"
    assert only(home, row, train_on="last")[1] == "O</s>"
    with pytest.raises(InputError, match="both output and response"):
        prepare(home, [{"instruction": "I", "output": "O", "response": "R"}])


MESSAGES = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello <|im_end|> there"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "  so long "},
]


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_trained_turns_are_those_transformers_marks(home, template):
    tokenizer = byte_tokenizer(template=template)
    marked = byte_tokenizer(template=CHATML_MARKED)
    expected = marked.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    _, _, ids, labels = only(home, {"messages": MESSAGES}, tokenizer)
    assert ids == expected["input_ids"]
    assert [label != -100 for label in labels] == [bool(mask) for mask in expected["assistant_masks"]]
    assert sum(expected["assistant_masks"]) > 20
    assert only(home, {"messages": MESSAGES}, tokenizer, train_on="last")[1] == "  so long <|im_end|>"


def test_a_message_may_have_its_own_weight(home):
    tokenizer = byte_tokenizer(template=CHATML)
    messages = [*MESSAGES[:2], {**MESSAGES[2], "train": False}, MESSAGES[3], {**MESSAGES[4], "weight": 0.5}]
    _, train, _ = prepare(home, [{"messages": messages}], tokenizer)
    row = train[0]
    trained = row["labels"] != -100
    assert tokenizer.decode(row["labels"][trained]) == "  so long <|im_end|>"
    assert set(row["weights"][trained]) == {0.5}
    assert not row["weights"][~trained].any()


@pytest.mark.parametrize("speaker", ["gpt", "assistant", "model", "bot"])
def test_sharegpt_speakers(home, speaker):
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": speaker, "value": "a"}], "system": "S"}
    text, trained, _, _ = only(home, row, byte_tokenizer(template=CHATML))
    assert (
        text == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    )
    assert trained == "a<|im_end|>"


def test_tool_calls_are_trained_and_their_results_are_not(home):
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "{% for c in m.get('tool_calls', []) %}CALL {{ c['function']['name'] }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "result"},
            {"from": "gpt", "value": "a"},
        ]
    }
    assert only(home, row, byte_tokenizer(template=template))[1] == "CALL f<|im_end|>a<|im_end|>"


def test_no_system_prompt_is_invented_and_none_is_doubled(home):
    tokenizer = byte_tokenizer(template=CHATML)
    assert "system" not in only(home, {"messages": MESSAGES[1:3]}, tokenizer)[0]
    assert only(home, {"messages": MESSAGES[1:3]}, tokenizer, system_prompt="S")[0].startswith("<|im_start|>system\nS<")
    assert only(home, {"messages": MESSAGES}, tokenizer, system_prompt="S")[0].count("system") == 1
    assert only(home, {"prompt": "p", "completion": "c"}, system_prompt="S")[0] == "S\n\npc</s>"
    demo = AutoTokenizer.from_pretrained(ROOT / "examples" / "demo_model" / "model")
    with pytest.raises(OptionError, match="ignores system messages"):
        prepare(home, "sample", demo, system_prompt="S")


def test_training_text_never_ends_in_an_open_header(home):
    text = only(home, {"messages": MESSAGES}, byte_tokenizer(template=CHATML))[0]
    assert text.endswith("so long <|im_end|>\n")


def test_a_template_that_renders_a_beginning_differently(home):
    # Like templates that end the whole conversation with the end token, whatever the last turn's own mark is.
    closing = CHATML.removesuffix("{% endif %}") + "{% else %}</s>{% endif %}"
    text, trained, _, _ = only(home, {"messages": MESSAGES[1:]}, byte_tokenizer(template=closing))
    assert text.endswith("<|im_end|>\n</s>")
    assert "bye" not in trained
    assert trained.startswith("hello")
    assert trained.count("<|im_end|>") == 3  # one of them is the user's own text
    # Like templates that number the messages: the text of a beginning is no beginning of the text.
    numbered = "{{ messages | length }}{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    assert (
        only(home, {"messages": MESSAGES[3:]}, byte_tokenizer(template=numbered))[1] == "  so long <|im_end|>".strip()
    )
    twice = [{"role": "user", "content": "yes"}, {"role": "assistant", "content": "yes"}]
    with pytest.raises(InputError, match=r"Row 1 cannot be encoded: the place of the answer 'yes' .* is ambiguous"):
        prepare(home, [{"messages": twice}], byte_tokenizer(template=numbered))


def test_a_template_without_an_end_gets_one(home):
    bare = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    text, trained, _, _ = only(home, {"messages": MESSAGES[3:]}, byte_tokenizer(template=bare))
    assert trained.endswith("</s>")
    assert trained.count("</s>") == 1
    assert text.endswith("</s>")


def test_a_template_that_refuses_a_conversation_says_so(home):
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        InputError, match=r"Row 1 cannot be encoded: the chat template refuses it .roles must alternate"
    ):
        prepare(home, [{"messages": MESSAGES}], byte_tokenizer(template=strict))


def test_messages_without_a_template_offer_choices(home, tmp_path):
    with pytest.raises(OptionError, match=r"no chat template.*'chatml'"):
        prepare(home, [{"messages": MESSAGES}])
    manager, train, _ = prepare(home, [{"messages": MESSAGES[1:3]}], chat_template="plain")
    assert manager.tokenizer.decode(train.ids) == "User: hi\nAssistant: hello <|im_end|> there</s>\n"
    (tmp_path / "t.jinja").write_text(CHATML)
    manager, train, _ = prepare(home, [{"messages": MESSAGES}], chat_template=str(tmp_path / "t.jinja"))
    assert manager.tokenizer.chat_template == CHATML
    with pytest.raises(OptionError, match=r"chat_template must be .*Did you mean .*t\.jinja"):
        prepare(home, [{"messages": MESSAGES}], chat_template=str(tmp_path / "tt.jinja"))
    (tmp_path / "bad.jinja").write_text("{% for %}")
    with pytest.raises(OptionError, match="not a Jinja template"):
        prepare(home, [{"messages": MESSAGES}], chat_template=str(tmp_path / "bad.jinja"))


def test_the_users_tokenizer_is_left_alone(home):
    tokenizer = byte_tokenizer()
    manager, _, _ = prepare(home, [{"messages": MESSAGES}], tokenizer, chat_template="chatml")
    assert tokenizer.chat_template is None
    assert manager.tokenizer.chat_template is not None


def test_a_merge_across_the_boundary_is_not_trained_away(home):
    # The joint text has the token "ab", and inference will feed a prompt that ends in "a".
    tokenizer = byte_tokenizer(merges=(("a", "b"),))
    assert len(tokenizer("ab").input_ids) == 1
    manager, train, _ = prepare(home, [{"prompt": "xa", "completion": "bc"}], tokenizer)
    prompt = tokenizer("xa").input_ids
    assert train.ids[: len(prompt)].tolist() == prompt
    assert tokenizer.decode(train.ids) == "xabc</s>"
    assert (train.labels != -100).sum() == 3
    assert manager.audit.splits["train"].marks == {"encoded apart": 1}
    assert manager.prompt_ids("xa") == prompt


def test_a_tokenizer_that_adds_a_space_adds_it_once(home):
    tokenizer = spaced_tokenizer()
    _, train, _ = prepare(home, [{"prompt": "What? ", "completion": "this"}], tokenizer)
    assert tokenizer.decode(train.ids) == "What? this</s>"
    prompt = tokenizer("What? ").input_ids
    assert train.ids[: len(prompt)].tolist() == prompt
    assert tokenizer.convert_ids_to_tokens(train.labels[train.labels != -100].tolist()) == [*"this", "</s>"]


@given(st.text("ab \nxé<", min_size=1, max_size=12), st.text("ab \nxé<", min_size=1, max_size=12))
@settings(max_examples=80, deadline=None)
def test_prompt_ids_are_always_what_inference_feeds(prompt, completion):
    from QEfficient.finetune.data.encode import EncodeOptions, RowEncoder
    from QEfficient.finetune.data.examples import Exchange

    tokenizer = byte_tokenizer(merges=(("a", "b"), ("b", "a"), ("ab", "x")), bos=True)
    row = RowEncoder(tokenizer, EncodeOptions()).encode(Exchange(prompt, completion))
    fed = tokenizer(prompt).input_ids
    assert row.ids[: len(fed)] == fed
    assert row.weights == [0.0] * len(fed) + [1.0] * (len(row.ids) - len(fed))
    assert tokenizer.decode(row.ids) == f"<s>{prompt}{completion}</s>"


def test_demo_model_form(home):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "demo_model" / "model")
    manager, train, evaluation = prepare(home, "sample", tokenizer, train_frac=0.85)
    assert (len(train), len(evaluation)) == (408, 72)
    first = read_file(ROOT / "QEfficient" / "finetune" / "samples" / "arithmetic.jsonl")[int(train.numbers[0]) - 1]
    item = train[0]
    # The form of examples/demo_model/train.py.
    text = f"<|endoftext|>Question: {first['question']}\nAnswer: {first['answer']}<|endoftext|>"
    assert tokenizer.decode(item["input_ids"]) == text
    prompt = tokenizer(f"Question: {first['question']}\nAnswer:").input_ids
    assert item["input_ids"][: len(prompt)].tolist() == prompt == manager.prompt_ids(first["question"])
    assert (item["labels"][: len(prompt)] == -100).all()
    assert (item["labels"][len(prompt) :] == item["input_ids"][len(prompt) :]).all()


def test_text_is_trained_whole(home):
    assert only(home, {"text": "abc"})[:2] == ("abc</s>", "bc</s>")
    assert only(home, {"text": "abc"}, byte_tokenizer(bos=True))[1] == "abc</s>"
    assert only(home, {"text": "abc"}, byte_tokenizer(eos=None), train_on="all")[0] == "abc"


def test_segments_are_taken_as_written(home):
    row = {
        "segments": [{"label": False, "text": "q "}, {"label": True, "text": "a</s>"}, {"label": False, "text": " z"}]
    }
    assert only(home, row)[:2] == ("q a</s> z", "a</s>")


def test_tokenized_rows(home):
    padded = {
        "input_ids": [0, 0, 7, 8, 9, 0],
        "labels": [-100, -100, -100, 8, 9, -100],
        "attention_mask": [0, 0, 1, 1, 1, 0],
    }
    for row in (padded, {name: torch.tensor([value]) for name, value in padded.items()}):
        _, _, ids, labels = only(home, row)
        assert (ids, labels) == ([7, 8, 9], [-100, 8, 9])
    assert only(home, {"input_ids": [7, 8, 9], "completion_mask": [0, 1, 1]})[3] == [-100, 8, 9]
    manager, train, _ = prepare(home, [{"input_ids": [7, 8, 9]}])
    assert train.labels.tolist() == [-100, 8, 9]
    assert any("every token is trained" in note for note in manager.audit.notes)
    _, train, _ = prepare(home, [{"input_ids": [7, 8, 9], "weights": [1.0, 0.5, 0.0]}])
    assert train[0]["labels"].tolist() == [-100, 8, -100]
    assert train[0]["weights"].tolist() == [0.0, 0.5, 0.0]


def test_all_labels_masked_is_an_error_that_names_the_cause(home):
    with pytest.raises(InputError, match=r"2 × no trained token.*not all -100"):
        prepare(home, [{"input_ids": [7, 8], "labels": [-100, -100]}] * 2)
    silent = [MESSAGES[1], {**MESSAGES[2], "train": False}]
    with pytest.raises(InputError, match="No row of the train data can be trained on"):
        prepare(home, [{"messages": silent}], byte_tokenizer(template=CHATML))


def test_tokenizers_without_end_or_padding(home):
    row = {"prompt": "p", "completion": "c"}
    with pytest.raises(OptionError, match="no end-of-sequence token"):
        prepare(home, [row], byte_tokenizer(eos=None))
    assert only(home, row, byte_tokenizer(eos=None), train_on="all")[0] == "pc"
    # Before any row: one that is broken comes later.
    for template in (None, CHATML, "{{ messages[-1]['content'] + eos_token }}"):
        with pytest.raises(OptionError, match=r'no end-of-sequence token.*"eos_token" in its tokenizer_config\.json'):
            prepare(home, [{"prompt": 5, "completion": 6}], byte_tokenizer(eos=None, template=template))
    template = byte_tokenizer(eos=None, template="{{ messages[-1]['content'] + eos_token }}")
    with pytest.raises(OptionError, match="template writes an end-of-sequence token and the tokenizer has none"):
        prepare(home, [row], template, train_on="all")
    manager, _, _ = prepare(home, [row], byte_tokenizer(pad=None))
    assert manager.pad_token_id == EOS
    assert any("eos_token pads" in note for note in manager.audit.notes)


# ---------------------------------------------------------------------------------------------- lengths


@given(st.integers(0, 5000), st.integers(1, 5000), st.integers(2, 600))
def test_the_answer_is_kept_before_the_prompt(prompt, answer, limit):
    kept_prompt, kept_answer = keep_answer(prompt, answer, limit)
    assert kept_answer == min(answer, limit - 1)
    assert kept_prompt + kept_answer == min(prompt + answer, max(limit, 0)) or prompt == 0
    assert kept_prompt <= prompt


@pytest.mark.parametrize(("prompt", "answer", "limit"), [(1000, 6, 10), (100_000, 1100, 2048), (3, 4, 20)])
def test_lengths_that_peers_get_wrong(home, prompt, answer, limit):
    # A proportional share keeps 0 of 6 and 22 of 1100 answer tokens.
    _, trained, ids, _ = only(home, {"prompt": "p" * prompt, "completion": "c" * (answer - 1)}, max_ctx_len=limit)
    assert trained == "c" * (answer - 1) + "</s>"
    assert len(ids) == min(limit, prompt + answer)


def test_headers_survive_and_the_end_of_the_question_too(home):
    tokenizer = byte_tokenizer(template=CHATML)
    row = {"prompt": "x" * 300 + "the question?", "completion": "the answer"}
    text, trained, ids, _ = only(home, row, tokenizer, max_ctx_len=60, system_prompt="S")
    assert len(ids) == 60
    assert text.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nx")
    assert "xthe question?<|im_end|>\n<|im_start|>assistant\n" in text
    assert trained == "the answer<|im_end|>"


def test_old_turns_go_before_the_question_is_cut(home):
    tokenizer = byte_tokenizer(template=CHATML)
    manager, train, _ = prepare(home, [{"messages": MESSAGES}], tokenizer, max_ctx_len=60)
    text = tokenizer.decode(train.ids)
    assert text.startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nbye")
    assert "hello" not in text
    assert manager.audit.splits["train"].marks == {"turns left out": 1}


def test_answers_that_do_not_fit_are_refused_with_the_length_they_need(home):
    rows = [{"prompt": "p" * 5, "completion": "c" * n} for n in (3, 30, 20)]
    with pytest.raises(InputError, match=r"answers of 2 of 3 train rows .*row 2 needs 31 without.*more than 31"):
        prepare(home, rows, max_ctx_len=16)
    assert len(prepare(home, rows, max_ctx_len=32)[1]) == 3
    manager, train, _ = prepare(home, rows, max_ctx_len=16, truncation="drop")
    assert len(train) == 1
    assert manager.audit.splits["train"].dropped == {"longer than max_ctx_len": 2}
    with pytest.raises(InputError, match=r"2 of 3 train rows are longer .*the longest, row 2, has 36 tokens"):
        prepare(home, rows, max_ctx_len=16, truncation="error")
    manager, train, _ = prepare(home, rows, max_ctx_len=16, truncation="cut_answer")
    assert train.lengths.tolist() == [9, 16, 16]
    # A cut answer does not end, so nothing says it does.
    assert EOS not in train[1]["input_ids"]
    assert manager.audit.splits["train"].marks["answer cut"] == 2
    assert any("2 of 3 train rows are cut" in note for note in manager.audit.notes)
    assert any("train no end token" in note for note in manager.audit.notes)


def test_long_texts_are_cut_and_reported(home):
    manager, train, _ = prepare(home, [{"text": "x" * 100}, {"text": "y"}], max_ctx_len=16)
    assert train.lengths.tolist() == [16, 2]
    assert manager.audit.splits["train"].marks == {"text cut": 1}


def test_long_tokenized_rows_keep_the_answer(home):
    row = {"input_ids": [1, *range(10, 30), 40, 41, EOS], "completion_mask": [0] * 21 + [1] * 3}
    assert only(home, row, byte_tokenizer(bos=True), max_ctx_len=8)[2] == [1, 26, 27, 28, 29, 40, 41, EOS]
    with pytest.raises(InputError, match="needs 4 without"):
        prepare(home, [row], max_ctx_len=3)


@given(st.integers(0, 60), st.integers(1, 25), st.integers(30, 50))
@settings(max_examples=40, deadline=None)
def test_no_row_is_longer_than_the_limit_and_no_answer_is_lost(prompt, answer, limit):
    from QEfficient.finetune.data.encode import EncodeOptions, RowEncoder
    from QEfficient.finetune.data.examples import Exchange

    tokenizer = byte_tokenizer(bos=True, merges=(("é"[0], "x"), ("a", "b")))
    question = "abéx"[: prompt % 4] + "éab" * (prompt // 3) + "?"
    row = RowEncoder(tokenizer, EncodeOptions(max_ctx_len=limit)).encode(Exchange(question, "c" * answer))
    assert len(row.ids) <= limit
    assert sum(map(bool, row.weights)) == answer + 1
    assert row.ids[0] == 1


# ---------------------------------------------------------------------------------------------- classification


def test_classification_rows(home):
    rows = [
        {"text": "good film", "label": "pos"},
        {"text": "bad", "label": "neg"},
        {"text": "a the very good plot", "label": "pos"},
    ]
    tokenizer = word_classifier_tokenizer()
    manager, train, _ = prepare(home, rows, tokenizer, task="seq_classification", max_ctx_len=5)
    assert manager.label_names == {"neg": 0, "pos": 1}
    expected = tokenizer([row["text"] for row in rows], truncation=True, max_length=5)["input_ids"]
    assert [row["input_ids"].tolist() for row in train] == expected
    batch = next(iter(manager.get_dataloader(train, 3, shuffle=False)))
    assert batch["labels"].tolist() == [1, 0, 1]
    assert batch["labels"].shape == (3,)
    pairs = [{"sentence1": "good", "sentence2": "bad", "label": 0}, {"sentence1": "a", "sentence2": "the", "label": 1}]
    _, train, _ = prepare(home, pairs, tokenizer, task="seq_classification")
    assert train[0]["input_ids"].tolist() == tokenizer("good", "bad")["input_ids"]
    with pytest.raises(InputError, match="classes cannot be learned from one"):
        prepare(home, rows[:1], tokenizer, task="seq_classification")


def test_an_evaluation_label_must_have_been_trained(home):
    data = {
        "train": [{"text": "good", "label": "pos"}, {"text": "bad", "label": "neg"}],
        "test": [{"text": "plot", "label": "meh"}],
    }
    with pytest.raises(InputError, match="Evaluation row 1 has the label 'meh'"):
        prepare(home, data, word_classifier_tokenizer(), task="seq_classification", train_frac=0.85)


# ---------------------------------------------------------------------------------------------- cache


def test_the_cache_is_keyed_by_content(tmp_path, monkeypatch):
    from QEfficient.finetune.data import prepare as preparing

    runs = []
    work = preparing.Preparation.run
    monkeypatch.setattr(preparing.Preparation, "run", lambda self, progress: (runs.append(1), work(self, progress))[1])
    path = tmp_path / "a.jsonl"

    def again(tokenizer=None, **options):
        before = len(runs)
        manager, train, _ = prepare(tmp_path / "home", path, tokenizer, **options)
        return len(runs) > before, train, manager

    path.write_text('{"prompt": "p", "completion": "c"}\n')
    assert again()[0]
    worked, train, manager = again()
    assert not worked
    assert train.labels.tolist() == [-100, train.ids[1], EOS]
    assert manager.audit.to_text() == again()[2].audit.to_text()
    assert again(max_ctx_len=64)[0]
    assert again(train_on="all")[0]
    assert again(byte_tokenizer(merges=(("a", "b"),)))[0]
    assert again(byte_tokenizer(template=CHATML))[0]
    assert not again()[0]
    path.write_text('{"prompt": "p", "completion": "d"}\n')
    assert again()[0]


def test_nothing_is_left_of_a_preparation_that_failed(tmp_path):
    with pytest.raises(InputError):
        prepare(tmp_path, [{"prompt": "p", "completion": "c" * 100}], max_ctx_len=8)
    assert [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"] == []


# ---------------------------------------------------------------------------------------------- custom classes


class Words:
    """Uses every way a method can be declared."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    @staticmethod
    def load_data(csv_file, count):
        assert csv_file == "words.csv"
        return [f"w{i}" for i in range(count)]

    def preprocess(self, row, max_ctx_len):
        if row == "w0":
            return None
        ids = self.tokenizer(row)["input_ids"][:max_ctx_len]
        return {"input_ids": [ids], "labels": [[-100, *ids[1:]]]}

    @classmethod
    def split(cls, dataset, train_ratio=0.5):
        cut = int(len(dataset) * train_ratio)
        return dataset[:cut], dataset[cut:]


def test_a_custom_class_or_object(home):
    tokenizer = byte_tokenizer()
    options = {"custom_dataset_config": {"count": 9}, "train_frac": 0.75}
    for custom in (Words, Words(tokenizer)):
        _, train, evaluation = prepare(home, "words.csv", tokenizer, custom, **options)
        assert [tokenizer.decode(row["input_ids"]) for row in train] == [f"w{i}" for i in range(1, 7)]
        assert [tokenizer.decode(row["input_ids"]) for row in evaluation] == ["w7", "w8"]


def test_whole_sets_torch_datasets_and_data_frames(home):
    class Whole:
        @classmethod
        def load_data(cls):
            import pandas

            return pandas.DataFrame({"q": ["a", "b"], "a": ["c", "d"]})

        def preprocess(self, frame):
            return frame.rename(columns={"q": "question", "a": "answer"})

    class Mapped(torch.utils.data.Dataset):
        def load_data(self):
            return self

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return {"question": "ab"[index], "answer": "cd"[index]}

    for custom in (Whole, Mapped, Mapped()):
        _, train, _ = prepare(home, None, custom=custom)
        assert byte_tokenizer().decode(train.ids) == "a\nc</s>b\nd</s>"


def test_mistakes_in_a_custom_class(home):
    class Broken:
        @staticmethod
        def load_data(path):
            return {}.no_such_method

    with pytest.raises(AttributeError, match="no_such_method") as caught:
        prepare(home, "x", custom=Broken)
    assert caught.traceback[-1].path == Path(__file__)

    class Asks:
        @staticmethod
        def load_data(tokeniser):
            return []

    with pytest.raises(OptionError, match=r"Asks.load_data asks for 'tokeniser'.*Did you mean 'tokenizer'"):
        prepare(home, "x", custom=Asks)

    class Nothing:
        def loaddata(self):
            return []

    with pytest.raises(OptionError, match=r"Nothing has no load_data method.*Did you mean 'loaddata'"):
        prepare(home, "x", custom=Nothing)

    class Hole:
        @staticmethod
        def load_data():
            # The published sketch of such a class pads the prompt and then appends the answer.
            return [{"input_ids": [7, 0, 0, 8, EOS], "attention_mask": [1, 0, 0, 1, 1]}]

    with pytest.raises(InputError, match="a hole between real tokens"):
        prepare(home, None, custom=Hole)

    class One:
        @staticmethod
        def load_data():
            return [{"text": "a"}]

        @staticmethod
        def split(rows):
            return rows

    with pytest.raises(OptionError, match=r"One\.split must return two"):
        prepare(home, None, custom=One)


def test_a_length_in_the_arguments_counts(home):
    row = [{"prompt": "p" * 50, "completion": "c"}]
    options = {"args": QEffTrainingArgs(max_ctx_len=20)}
    manager = QEffDataManager(QEffConfig("m", row, train_frac=1.0), byte_tokenizer(), cache_home_dir=home, **options)
    assert manager.prepare_dataset()[0].lengths.tolist() == [20]


def test_several_processes_make_the_same_rows(home):
    """Augmentation, bad rows and drops included; and the first bad row is named, whoever reads it."""
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a" * n}]}
        for n in range(1, 60)
    ]
    rows[20]["messages"], rows[40]["messages"] = [{"role": "nobody", "content": "x"}], []

    def made(processes: int, **options: Any) -> tuple[Any, Any]:
        config = QEffConfig(
            "m", rows, dataset_num_proc=processes, max_ctx_len=64, chat_template="chatml", truncation="drop", **options
        )
        manager = QEffDataManager(config, byte_tokenizer(), cache_home_dir=home / str(processes))
        train, _ = manager.prepare_dataset()
        return [{k: v.tolist() for k, v in row.items()} for row in train], manager.audit.to_dict()

    one, two = (made(p, on_bad_row="skip", augment=["system_dropout:0.5"]) for p in (1, 2))
    assert one == two
    assert len(one[0]) > 10
    assert len(one[1]["bad_rows"]) >= 1
    for processes in (1, 2):
        with pytest.raises(InputError, match=r"Row 21 .*nobody"):
            made(processes, train_frac=1.0)
