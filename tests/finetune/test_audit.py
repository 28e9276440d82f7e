"""The label audit: counts against a hand count, a decoded row with its spans, and a report that survives JSON."""

import json

import pytest
from rich.console import Console
from toy_tokenizers import CHATML, byte_tokenizer, spaced_tokenizer

from QEfficient.errors import InputError
from QEfficient.finetune import QEffConfig, QEffDataManager
from QEfficient.finetune.data.audit import LabelAudit


def audited(tmp_path, rows, tokenizer=None, **options):
    config = QEffConfig("m", rows, **{"train_frac": 1.0, "max_ctx_len": 32, **options})
    manager = QEffDataManager(config, tokenizer or byte_tokenizer(), cache_home_dir=tmp_path / "home")
    manager.prepare_dataset()
    return manager


ROWS = [
    {"prompt": "2+2=", "completion": "4"},
    {"prompt": "question " * 5, "completion": "yes"},
    {"prompt": "", "completion": "lost"},
]


def test_counts(tmp_path):
    train = audited(tmp_path, ROWS).audit.splits["train"]
    # "2+2=4" and the end token; the second question is cut so that its answer and end token fit into 32.
    assert (train.rows_in, train.rows, train.dropped, train.marks) == (3, 2, {"empty": 1}, {"prompt shortened": 1})
    assert (train.tokens, train.trained_tokens) == (6 + 32, 2 + 4)
    assert (train.shortest, train.longest, train.median) == (6, 32, 19)
    assert train.histogram == {8: 1, 32: 1}
    assert train.without_end == 0


def test_the_row_is_shown_with_its_spans(tmp_path):
    audit = audited(tmp_path, ROWS).audit
    assert [(span.text, span.trained, span.tokens) for span in audit.sample] == [("2+2=", False, 4), ("4</s>", True, 2)]
    assert "\n2+2=[[4</s>]]" in audit.to_text()
    assert "train: 2 of 3 rows, 38 tokens, 6 trained (15.8%)" in audit.to_text()
    assert "empty: 1; prompt shortened: 1" in audit.to_text()
    console = Console(width=200, force_terminal=True, color_system="standard")
    with console.capture() as capture:
        console.print(audit)
    styled = capture.get()
    assert "\x1b[1;32m4</s>" in styled
    assert "\x1b[2m2+2=" in styled
    with (plain := Console(width=200, color_system=None)).capture() as capture:
        plain.print(audit)
    assert "2+2=[[4</s>]]" in capture.get()


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(template=CHATML), spaced_tokenizer()])
def test_spans_joined_are_the_decoded_row(tmp_path, tokenizer):
    row = {"question": "what is this? ", "answer": " a [[mark]]" if tokenizer.chat_template else " an answer"}
    manager = audited(tmp_path, [row], tokenizer, max_ctx_len=200)
    train, _ = manager.prepare_dataset()
    assert "".join(span.text for span in manager.audit.sample) == tokenizer.decode(train.ids)
    assert sum(span.tokens for span in manager.audit.sample) == len(train.ids)
    assert (
        sum(span.tokens for span in manager.audit.sample if span.trained)
        == manager.audit.splits["train"].trained_tokens
    )


def test_the_report_file(tmp_path):
    manager = audited(tmp_path, [{"text": f"text {i}"} for i in range(20)], train_frac=0.75)
    path = manager.write_report(tmp_path / "out")
    assert path == tmp_path / "out" / "data_report.json"
    body = json.loads(path.read_text())
    assert (body["splits"]["train"]["rows"], body["splits"]["eval"]["rows"]) == (15, 5)
    assert body["splits"]["train"]["trained_share"] == pytest.approx(
        body["splits"]["train"]["trained_tokens"] / body["splits"]["train"]["tokens"], abs=1e-6
    )
    assert LabelAudit.from_dict(body).to_text() == manager.audit.to_text()
    assert [p.name for p in path.parent.iterdir()] == ["data_report.json"]


def test_classification_is_reported_without_spans(tmp_path):
    rows = [{"text": "good", "label": "pos"}, {"text": "bad", "label": "neg"}]
    audit = audited(tmp_path, rows, task="seq_classification").audit
    assert audit.classes == {"neg": 0, "pos": 1}
    assert "2 classes" in audit.to_text()
    assert not any(span.trained for span in audit.sample)


def test_a_report_needs_data(tmp_path):
    manager = QEffDataManager(QEffConfig("m", [{"text": "a"}]), byte_tokenizer(), cache_home_dir=tmp_path)
    with pytest.raises(InputError, match="before prepare_dataset"):
        manager.write_report(tmp_path)


def test_decisions_are_noted(tmp_path):
    with pytest.warns(UserWarning, match="lora_dropout"):
        manager = audited(
            tmp_path, [{"input_ids": [7, 8, 9]}], byte_tokenizer(pad=None), lora_config={"lora_dropout": 0.1}
        )
    text = manager.audit.to_text()
    for part in ("lora_dropout=0.1 is recorded", "eos_token pads", "every token is trained", "train no end token"):
        assert part in text
