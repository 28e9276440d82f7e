"""Merging: adapter and base model become one plain checkpoint, after a check that it answers as the two did."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from QEfficient.engine.adapter_file import same_model
from QEfficient.errors import (
    InputError,
    ModelLoadError,
    OptionError,
    TrainingError,
    UnsupportedModelError,
)
from QEfficient.exporter.adapters import adapter_parameters
from QEfficient.exporter.quiet import quiet
from QEfficient.finetune.checkpoint import ADAPTER_WEIGHTS, publish, staging
from QEfficient.finetune.classes import ClassifierSource, choose_classes
from QEfficient.finetune.resize import ResizedSource, rows_of
from QEfficient.models.base import check_destination
from QEfficient.models.factories import no_loading_bars, translate_load_errors
from QEfficient.models.hub import resolve
from QEfficient.models.source import TOKENIZER_FILES, CheckpointSource
from QEfficient.progress import Progress, silent
from QEfficient.safetensors_io import checkpoint_weights, read_header
from QEfficient.store.files import remove_tree, write_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPORT_FILE = "merge.json"
ADAPTER_CONFIG = "adapter_config.json"
#: Largest difference of a logit, relative to the largest logit, that still is rounding.
TOLERANCE = 1e-3
#: Share of the adapter's own effect that rounding may take before it is worth a warning.
LOST = 0.1
#: torch's words for a tensor of another shape.
_MISMATCH = re.compile(
    r"size mismatch for (?:base_model\.model\.)?(.+?): copying a param with shape torch\.Size\((.+?)\) from "
    r"checkpoint, the shape in current model is torch\.Size\((.+?)\)"
)
PROMPTS = (
    "Once upon a time there was a",
    "The capital of France is",
    "Question: Tom has 3 apples and buys 4 more. How many apples does he have?\nAnswer:",
    "def add(a, b):\n    return",
)
_FACTORIES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "FEATURE_EXTRACTION": "AutoModel",
}
#: safetensors dtype -> torch's, of the precisions a merged model may be stored in.
_HALF = {"BF16": torch.bfloat16, "F16": torch.float16}


@dataclass
class MergeReport:
    """What `merge_adapter` did; also in ``merge.json``.

    Attributes:
        dtype: precision of the written weights.
        max_difference: largest difference of any logit before and after, of the weights as written.
        relative_difference: the same, divided by the largest logit.
        adapter_effect: largest difference of any logit with and without the adapter: what the check could have missed.
        prompts: how many were compared.
    """

    adapter: str
    base_model: str
    destination: str
    dtype: str
    max_difference: float
    relative_difference: float
    adapter_effect: float
    prompts: int
    tolerance: float
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        first = (
            f"merged {self.adapter} into {self.base_model} ({self.dtype}): logits of {self.prompts} prompts differ by "
            f"at most {self.max_difference:.1e}, {self.relative_difference:.1e} of the largest; the adapter moves them "
            f"by {self.adapter_effect:.1e}"
        )
        return "\n".join([first, *self.notes])


def merge_adapter(
    adapter_dir: str | Path,
    destination: str | Path,
    base_model: str | Path | None = None,
    prompts: Sequence[str] | None = None,
    *,
    tolerance: float = TOLERANCE,
    trust_remote_code: bool = False,
    report: Progress = silent,
) -> MergeReport:
    """Writes base model and adapter as one checkpoint that transformers loads without PEFT.

    The sum is formed in float32. It is stored in the base checkpoint's own precision if the logits still agree then,
    else in float32.

    Args:
        adapter_dir: a directory or hub id with ``adapter_config.json`` and ``adapter_model.safetensors``.
        destination: a new or empty directory; complete or absent afterwards.
        base_model: directory or hub id, instead of the one the adapter's configuration names.
        prompts: texts whose logits are compared; None takes a few of our own.
        tolerance: largest difference of a logit, relative to the largest logit.

    Raises:
        OptionError: the destination is in use, or the tolerance is no positive number.
        ModelLoadError: adapter or base model cannot be read, or do not fit each other.
        UnsupportedModelError: an adapter of a kind that cannot be merged.
        InputError: prompts for a model without a tokenizer, or empty ones.
        TrainingError: the merged model computes something else; nothing is written.
    """
    target = Path(destination)
    check_destination(target)
    if not tolerance > 0:
        raise OptionError(f"tolerance must be a number above 0, got {tolerance!r}.")
    place, settings = _adapter(adapter_dir)
    source = _base(place, settings, base_model, trust_remote_code)
    trained_on = settings.get("base_model_name_or_path")
    tokenizer, tokenizer_dir = _tokenizer(place, source)
    report("loading the model", 0, 4)
    model = _with_adapter(source, place, settings)
    inputs = _inputs(tokenizer, prompts, model)
    report("logits before", 1, 4)
    before = _logits(model, inputs)
    with model.disable_adapter():
        effect = _largest(_logits(model, inputs), before)
    report("merging", 2, 4)
    merged = _merged(model, place)
    difference, largest = _largest(_logits(merged, inputs), before), max(float(x.abs().max()) for x in before)
    if not difference <= tolerance * largest:  # not-a-number fails, too
        raise TrainingError(
            f"merging would change the logits by up to {difference:.1e}, where the largest is {largest:.1e} (allowed "
            f"{tolerance:.0e} of it): nothing was written; keep the adapter apart and load it with "
            "QEFFAutoPeftModelForCausalLM."
        )
    done = MergeReport(
        str(adapter_dir), source.name, str(target), "float32", difference, difference / max(largest, 1e-30), effect,
        len(inputs), tolerance,
    )  # fmt: skip
    if base_model is not None and trained_on and not same_model(str(trained_on), str(base_model)):
        done.notes.append(
            f"warning: the adapter was trained on {trained_on} and is merged into {base_model}: unless both have the "
            "same weights, the result is meaningless"
        )
    _store_smaller(merged, source, inputs, before, largest, done)
    report("writing", 3, 4)
    _write(merged, tokenizer_dir, target, done)
    return done


# ---------------------------------------------------------------------- what is merged


def _adapter(adapter_dir: str | Path) -> tuple[Path, dict[str, Any]]:
    place = resolve(adapter_dir, marker=None)
    if not (place / ADAPTER_CONFIG).is_file():
        if (place / "config.json").is_file():
            raise ModelLoadError(
                f"{adapter_dir} is a full checkpoint and no adapter (it has no {ADAPTER_CONFIG}): there is nothing to "
                "merge, use it as it is."
            )
        raise ModelLoadError(f"{adapter_dir} has no {ADAPTER_CONFIG}: it is not an adapter.")
    if not (place / ADAPTER_WEIGHTS).is_file():
        raise ModelLoadError(f"{adapter_dir} has no {ADAPTER_WEIGHTS}: save the adapter as safetensors.")
    try:
        settings = json.loads((place / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = None
    if not isinstance(settings, dict):
        raise ModelLoadError(f"{place / ADAPTER_CONFIG} is not a JSON object: save the adapter again.")
    return place, settings


def _base(
    place: Path, settings: dict[str, Any], base_model: str | Path | None, trust_remote_code: bool
) -> CheckpointSource:
    name = base_model or settings.get("base_model_name_or_path")
    if not name:
        raise ModelLoadError(f"{place / ADAPTER_CONFIG} does not name its base model: pass base_model.")
    source = CheckpointSource(resolve(name), str(name), trust_remote_code)
    if not (place / "config.json").is_file():
        return source
    from transformers import AutoConfig

    with translate_load_errors(str(place)):
        own = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    if settings.get("task_type") != "SEQ_CLS":
        tokens = rows_of(own)
        larger = tokens > rows_of(source.config())
        return ResizedSource(source.directory, source.name, trust_remote_code, tokens) if larger else source
    pad = own.get_text_config().pad_token_id
    return ClassifierSource(source, choose_classes(own, own.label2id), 0 if pad is None else pad)


def _with_adapter(source: CheckpointSource, place: Path, settings: dict[str, Any]) -> Any:
    from peft import PeftModel

    task = settings.get("task_type") or "CAUSAL_LM"
    if task not in _FACTORIES:
        raise UnsupportedModelError(f"{place} is an adapter for {task}, and {sorted(_FACTORIES)} can be merged.")
    base = source.load(_FACTORIES[task])
    try:
        with quiet():
            model = PeftModel.from_pretrained(base, str(place)).eval()
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"the adapter in {place} does not fit {source.name}: {_reason(error)}") from error
    missing = sorted(set(adapter_parameters(model)) - set(read_header(place / ADAPTER_WEIGHTS)))
    if missing:  # PEFT would leave them at random values and warn
        raise ModelLoadError(f"the adapter in {place} lacks {len(missing)} of its tensors, e.g. {missing[0]}.")
    return model


def _reason(error: Exception) -> str:
    """The first tensor of another shape, else the first line that is not only a heading."""
    if found := _MISMATCH.search(str(error)):
        return f"{found[1]} has the shape {found[2]} in the adapter, and this base model needs {found[3]}."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.endswith(":")), (*lines, type(error).__name__)[0])[:300]


def _merged(model: Any, place: Path) -> nn.Module:
    if not hasattr(model.base_model, "merge_and_unload"):
        raise UnsupportedModelError(
            f"{place} is a {model.active_peft_config.peft_type.value} adapter: it has no merge."
        )
    try:
        with quiet():
            merged: nn.Module = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise TrainingError(f"{place} cannot be merged: {' '.join(str(error).split())[:300]}") from error
    return merged.eval()


# ---------------------------------------------------------------------- how it is checked


def _tokenizer(place: Path, source: CheckpointSource) -> tuple[PreTrainedTokenizerBase | None, Path | None]:
    """The adapter's tokenizer (its chat template may differ), else the base model's, else none; and where it is."""
    for directory in (place, source.directory):
        if any((directory / name).is_file() for name in (*TOKENIZER_FILES, "tokenizer.model", "vocab.txt")):
            from transformers import AutoTokenizer

            with translate_load_errors(str(directory)):
                return AutoTokenizer.from_pretrained(directory), directory
    return None, None


def _inputs(tokenizer: PreTrainedTokenizerBase | None, prompts: Sequence[str] | None, model: Any) -> list[torch.Tensor]:
    if isinstance(prompts, str) or (prompts is not None and not (prompts and all(prompts))):
        raise InputError("prompts must be a list of texts, none of them empty.")
    if tokenizer is not None:
        found = [tokenizer(text, return_tensors="pt")["input_ids"] for text in prompts or PROMPTS]
        return [ids for ids in found if ids.numel()]
    if prompts is not None:
        raise InputError("neither adapter nor base model has a tokenizer to read the prompts: leave them out.")
    generator = torch.Generator().manual_seed(0)
    size = model.get_base_model().get_input_embeddings().num_embeddings
    return [torch.randint(size, (1, 16), generator=generator) for _ in PROMPTS]


def _logits(model: nn.Module, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    out = []
    with torch.no_grad(), quiet():
        for ids in inputs:
            found = model(input_ids=ids, attention_mask=torch.ones_like(ids))
            out.append((found.logits if hasattr(found, "logits") else found.last_hidden_state).float())
    return out


def _largest(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest difference; not-a-number if there is one."""
    return float(torch.stack([(a - b).abs().max() for a, b in zip(found, expected, strict=True)]).max())


def _store_smaller(
    model: nn.Module,
    source: CheckpointSource,
    inputs: Sequence[torch.Tensor],
    before: Sequence[torch.Tensor],
    largest: float,
    done: MergeReport,
) -> None:
    """Rounds the weights to the base checkpoint's precision and keeps that if the check still passes."""
    stored = {ref.dtype for ref in checkpoint_weights(source.directory).values()} & {"F64", "F32", *_HALF}
    if len(stored) != 1 or not stored <= set(_HALF):
        return
    wanted = _HALF[stored.pop()]
    exact: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rounded = parameter.to(wanted).float()
            if not torch.equal(rounded, parameter):  # the weights that nothing was merged into are exact already
                exact[name] = parameter.clone()
                parameter.copy_(rounded)
        short = str(wanted).removeprefix("torch.")
        difference = _largest(_logits(model, inputs), before)
        if difference <= done.tolerance * largest:
            done.dtype, done.max_difference, done.relative_difference = short, difference, difference / largest
            if difference > LOST * done.adapter_effect:
                wanted_tolerance = 0.9 * LOST * done.adapter_effect / largest  # 0.9: printing may round it up
                done.notes.append(
                    f"warning: rounding to {short} changes the logits by {difference:.1e}, and the adapter moves them "
                    f"by {done.adapter_effect:.1e} only, so part of what it learned is lost: --tolerance "
                    f"{wanted_tolerance:.1e} (tolerance= in Python) stores float32"
                )
            return
        named = dict(model.named_parameters())
        for name, value in exact.items():
            named[name].copy_(value)
    done.notes.append(
        f"stored in float32: in the base checkpoint's {short} the logits would differ by {difference:.1e} "
        f"({difference / largest:.1e} of the largest); a larger tolerance accepts that"
    )


# ---------------------------------------------------------------------- what is written


def _write(model: Any, tokenizer_dir: Path | None, target: Path, done: MergeReport) -> None:
    place = staging(target.absolute().parent, target.name)
    try:
        remove_tree(place)
        place.mkdir(parents=True)
        with quiet(), no_loading_bars():
            model.to(getattr(torch, done.dtype)).save_pretrained(place)
        for name in (*TOKENIZER_FILES, "tokenizer.model", "vocab.txt", "vocab.json", "merges.txt"):
            if tokenizer_dir is not None and (tokenizer_dir / name).is_file():
                (place / name).write_bytes((tokenizer_dir / name).read_bytes())
        (place / REPORT_FILE).write_text(json.dumps(asdict(done), indent=1) + "\n", encoding="utf-8")
        publish(place, target.absolute())
    except (OSError, SafetensorError) as error:
        raise write_error("the merged model", target, error, cached=False) from error
    finally:
        remove_tree(place)
