"""The data sets that come with this library by name: where their rows are, and what they mean.

Each loads from the hub, from a file of one's own in the same columns (``custom_dataset_config={"file": …}``), or, with
``dataset_config="mini"``, a few rows that are installed with the library and need no network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from QEfficient.errors import OptionError
from QEfficient.finetune.config import QEffConfig
from QEfficient.finetune.data.files import Rows, Unreadable
from QEfficient.finetune.data.sources import Splits, bundled_rows, from_hub, from_path
from QEfficient.finetune.user_code import load_function

MINI = "mini"

#: A calculation in an answer of GSM8K: <<48/2=24>>.
_CALCULATION = re.compile(r"(?<=<<)([^<>=]*=)([^<>]*)(?=>>)")


def gsm8k(
    config: QEffConfig, tokenizer: Any, file: str | None = None, mask_results: bool = False
) -> Mapping[str, Rows]:
    """Grade school mathematics (Cobbe et al. 2021, arXiv:2110.14168): ``question`` and ``answer``.

    With ``mask_results`` the value inside ``<<48/2=24>>`` is not trained: the model learns when to call a calculator,
    not its results.
    """
    splits = _load(config, "gsm8k", "openai/gsm8k", "main", file)
    if not mask_results:
        return splits
    end = getattr(tokenizer, "eos_token", None) or ""
    return _each(splits, lambda row: [_without_results(row, end)])


def alpaca(config: QEffConfig, file: str | None = None) -> Mapping[str, Rows]:
    """Instructions with their answers (Taori et al. 2023): ``instruction``, ``input``, ``output``."""
    return _load(config, "alpaca", "tatsu-lab/alpaca", None, file)


def imdb(config: QEffConfig, file: str | None = None) -> Mapping[str, Rows]:
    """Film reviews, 0 bad and 1 good (Maas et al. 2011): ``text`` and ``label``, for ``task="seq_classification"``."""
    splits = dict(_load(config, "imdb", "stanfordnlp/imdb", None, file))
    splits.pop("unsupervised", None)  # its labels are all -1
    return splits


def grammar(config: QEffConfig, file: str | None = None) -> Mapping[str, Rows]:
    """Sentences and their corrections: ``input`` and ``target``, or ``sentence`` and a list of ``corrections``.

    On the hub that is JFLEG (Napoles et al. 2017, arXiv:1702.04066), whose ``validation`` rows are trained on, there
    being no others, and whose ``test`` rows are for evaluation.
    """
    splits = dict(_load(config, "grammar", "jhu-clsp/jfleg", None, file))
    if "train" not in splits and "validation" in splits:
        splits["train"] = splits.pop("validation")
    return _each(splits, _corrections)


def custom_dataset(config: QEffConfig, tokenizer: Any, preproc_file: str | None = None) -> Mapping[str, Rows]:
    """Rows that a function of the user's makes: ``preproc_file="file.py:function"``, as in efficient-transformers.

    The function is called with (settings, tokenizer, split, context_length=…), where ``settings`` has every key of
    ``custom_dataset_config`` as an attribute, once for ``train_split`` and, when there is one, for ``test_split``.
    It returns rows of any format; tokenized ones have ``input_ids``, ``attention_mask``, ``labels``.
    """
    if preproc_file is None:
        raise OptionError(
            "custom_dataset needs preproc_file in custom_dataset_config: 'file.py:function', a function of "
            "(dataset_config, tokenizer, split, context_length) that returns rows."
        )
    function = load_function(preproc_file, "preproc_file")
    settings = custom_settings(config.custom_dataset_config)
    splits = {"train": settings.train_split, "validation": settings.test_split}
    return {
        name: function.call(settings, tokenizer, split, context_length=config.max_ctx_len)
        for name, split in splits.items()
        if split is not None
    }


def custom_settings(values: Mapping[str, Any] | None) -> SimpleNamespace:
    """The keys of ``custom_dataset_config`` as attributes, the splits with their defaults."""
    return SimpleNamespace(**{"train_split": "train", "test_split": None, **(values or {})})


def _load(config: QEffConfig, name: str, hub_id: str, subset: str | None, file: str | None) -> Splits:
    if file is not None:
        if config.dataset_config == MINI:
            raise OptionError(f"dataset_config='{MINI}' and file={str(file)!r} both say where rows are: give one.")
        return from_path(Path(file).expanduser(), config)
    if config.dataset_config == MINI:
        return {"train": bundled_rows(name)}
    return from_hub(
        hub_id,
        config.dataset_config or subset,
        f"or set dataset_config='{MINI}' for a few rows that are installed, or custom_dataset_config={{'file': …}}",
    )


def _each(splits: Mapping[str, Rows], change: Callable[[Mapping[str, Any]], list[Any]]) -> dict[str, Rows]:
    """Every row of every split changed; rows that could not be read stay what they are."""
    found: dict[str, list[Any]] = {name: [] for name in splits}
    for name, rows in splits.items():
        for index in range(len(rows)):
            row: Any = rows[index]
            found[name] += [row] if isinstance(row, Unreadable) else change(row)
    return dict(found)


def _without_results(row: Mapping[str, Any], end: str) -> Any:
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str):
        return dict(row)  # said with the row's number when rows are read
    segments = [{"label": False, "text": f"{question}\n"}]
    place = 0
    for match in _CALCULATION.finditer(answer):
        segments.append({"label": True, "text": answer[place : match.start(2)]})
        segments.append({"label": False, "text": match[2]})
        place = match.end(2)
    segments.append({"label": True, "text": answer[place:] + end})
    return {"segments": [segment for segment in segments if segment["text"]]}


def _corrections(row: Mapping[str, Any]) -> list[Any]:
    """A row per correction; a row without columns for that as it is, to be refused by its number."""
    source = row.get("input", row.get("sentence"))
    targets = row.get("target", row.get("corrections"))
    targets = [targets] if isinstance(targets, str) else targets
    if not isinstance(source, str) or not isinstance(targets, list | tuple):
        return [dict(row)]
    return [{"prompt": f"Correct this sentence: {source}", "completion": target} for target in targets]
