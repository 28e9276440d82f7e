"""Methods beyond cross entropy: the curves of 20 steps against TRL's trainers, or torch where TRL has none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from step_models import base_model
from tiny_models import save_tiny, tiny_tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

from QEfficient import QEffConfig, QEfficient, QEffTrainingArgs
from QEfficient.errors import InputError, OptionError

WORDS = ["ash", "birch", "cedar", "elm", "fir", "gum", "holly", "ivy"]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
#: One schedule for both sides: 20 steps in the rows' order.
HOW: dict[str, Any] = {
    "per_device_train_batch_size": 4, "max_steps": 20, "learning_rate": 5e-3, "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential", "seed": 1, "logging_steps": 1,
}  # fmt: skip
THEIRS = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}


def pairs(count: int = 24) -> list[dict[str, str]]:
    """The chosen answer repeats the prompt's word, the rejected one another; of different lengths."""
    return [
        {
            "prompt": f"{WORDS[n % 8]} {n}:",
            "chosen": " " + " ".join([WORDS[n % 8]] * (1 + n % 3)),
            "rejected": " " + " ".join([WORDS[(n + 3) % 8]] * (1 + n % 2)),
        }
        for n in range(count)
    ]


def judged(count: int) -> list[dict[str, Any]]:
    """Half of the answers are good."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if n % 2 else "rejected"], "label": bool(n % 2)}
        for n, row in enumerate(pairs(count))
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of its own: TRL's trainers align the files' special tokens."""
    return tiny_tokenizer(save_tiny(base_model("llama"), tmp_path_factory.mktemp("methods") / "tiny"))


def run(checkpoint: Path, place: Path, rows: Any, how: dict[str, Any] = HOW, **what: Any) -> QEfficient:
    options = {"train_frac": 1.0, "max_ctx_len": 64, "lora_config": LORA, **what}
    facade = QEfficient(
        QEffConfig(str(checkpoint), rows, **options), QEffTrainingArgs(place, **{"validate": False, **how})
    )
    facade.refine(load=False, say=lambda message: None)
    return facade


def curve(history: list[dict[str, Any]], *names: str) -> np.ndarray:
    """[steps, names] of the rows that log a loss."""
    return np.array([[row[name] for name in names] for row in history if "loss" in row])


def adapted(checkpoint: Path) -> Any:
    """The adapter as QEfficient draws it."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager")
    torch.manual_seed(HOW["seed"])
    return get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM"))


def trl_curve(trainer: type, config: Any, model: Any, rows: list[dict[str, Any]], tokenizer: Any, *names: str) -> Any:
    made = trainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    made.train()
    return curve(made.state.log_history, *names)


def batches_of(facade: QEfficient) -> list[dict[str, torch.Tensor]]:
    """The batches of the run's 20 steps, as tensors."""
    train, _ = facade.data_manager.prepare_dataset()
    loader = facade.data_manager.get_dataloader(train, HOW["per_device_train_batch_size"])
    return [{n: torch.from_numpy(a) for n, a in batch.items()} for _ in range(4) for batch in loader][:20]


def torch_curve(model: Any, batches: list[dict[str, torch.Tensor]], loss_of: Callable[..., torch.Tensor]) -> np.ndarray:
    """Losses of AdamW steps in torch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=HOW["learning_rate"], weight_decay=0.0)
    losses = []
    for batch in batches:
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


SEEN = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def test_dpo_is_trls(checkpoint, tmp_path):
    ours = run(checkpoint, tmp_path / "out", pairs(), {**HOW, "validate": True}, method="dpo", beta=0.3)
    config = DPOConfig(str(tmp_path / "trl"), beta=0.3, max_length=64, **HOW, **THEIRS)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    theirs = trl_curve(DPOTrainer, config, adapted(checkpoint), pairs(), tokenizer, *SEEN)
    mine = curve(ours.trainer.state.log_history, *SEEN)
    assert len(mine) == 20
    assert mine[-1, 0] < 0.1 < 0.69 < mine[0, 0]  # it learned, from log 2
    # Before the first step policy and reference are equal but for rounding, which decides whose reward is greater.
    mine[0, -1] = theirs[0, -1]
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)
    assert ours.proof.passed


def orpo_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The paper's equations 4 to 7 with beta = 0.3. TRL's trainer adds the prompt's tokens to the cross entropy."""
    labels = batch["labels"][:, 1:]
    own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    own = torch.where(labels != -100, own.gather(2, labels.clamp(min=0)[..., None])[..., 0], 0.0)
    sizes = (labels != -100).sum(1)
    chosen, rejected = (own.sum(1) / sizes).chunk(2)
    odds = chosen.exp() / (1 - chosen.exp()) / (rejected.exp() / (1 - rejected.exp()))
    entropy = -own[: len(chosen)].sum() / sizes[: len(chosen)].sum()
    return entropy - 0.3 * torch.sigmoid(odds.log()).log().mean()


def test_orpo_is_the_papers(checkpoint, tmp_path):
    ours = run(checkpoint, tmp_path / "out", pairs(), method="orpo", beta=0.3)
    theirs = torch_curve(adapted(checkpoint), batches_of(ours), orpo_loss)
    np.testing.assert_allclose(curve(ours.trainer.state.log_history, "loss")[:, 0], theirs, rtol=1e-4, atol=1e-4)


def test_kto_is_trls(checkpoint, tmp_path):
    """In one batch, where TRL's mismatched answers are ours: each prompt with the answer before it."""
    how = {**HOW, "per_device_train_batch_size": 8}
    weights = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.8}
    ours = run(checkpoint, tmp_path / "out", judged(8), how, method="kto", **weights)
    config = KTOConfig(str(tmp_path / "trl"), max_length=64, **weights, **how, **THEIRS)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    theirs = trl_curve(KTOTrainer, config, adapted(checkpoint), judged(8), tokenizer, "loss", "grad_norm", "kl")
    mine = curve(ours.trainer.state.log_history, "loss", "grad_norm", "kl")
    assert mine[:, 2].max() > 0.1  # the divergence is estimated, not 0 throughout
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_reward_is_trls(checkpoint, tmp_path):
    ours = run(checkpoint, tmp_path / "out", pairs(), {**HOW, "validate": True}, method="reward")
    assert ours.proof.passed
    saved = tmp_path / "start"
    torch.manual_seed(HOW["seed"])
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=1, attn_implementation="eager")
    model = get_peft_model(model, LoraConfig(**LORA, task_type="SEQ_CLS"))
    start = run(checkpoint, saved, pairs(), {**HOW, "max_steps": 1, "learning_rate": 0.0}, method="reward")
    named = dict(model.named_parameters())
    for name, value in start.trainer._step.named_parameters():  # the head and LoRA's A are drawn at random
        named[name].data.copy_(value.detach())
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model.config.pad_token_id = tokenizer.pad_token_id
    config = RewardConfig(str(tmp_path / "trl"), max_length=64, **HOW, **THEIRS)
    rows = [{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]} for r in pairs()]
    theirs = trl_curve(RewardTrainer, config, model, rows, tokenizer, "loss", "grad_norm", "accuracy", "margin")
    mine = curve(ours.trainer.state.log_history, "loss", "grad_norm", "accuracy", "margin")
    assert mine[-1, 0] < 0.1
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_reward_model_scores_in_transformers(checkpoint, tmp_path):
    """The saved adapter, loaded by PEFT, tells chosen from rejected answers as the run's evaluation says."""
    out = tmp_path / "out"
    how = {**HOW, "eval_strategy": "steps", "eval_steps": 20}
    ours = run(checkpoint, out, pairs(), how, method="reward", train_frac=0.75)
    found = next(row for row in reversed(ours.trainer.state.log_history) if "eval_loss" in row)
    model = ours.load_tuned().eval()
    assert model.config.num_labels == 1
    _, held = ours.data_manager.prepare_dataset()

    def score(item: Any) -> float:
        return float(model(torch.from_numpy(np.array(item["input_ids"]))[None]).logits)

    scores = np.array([[score(pair["chosen"]), score(pair["rejected"])] for pair in held])
    assert len(scores) == 6
    margins = scores[:, 0] - scores[:, 1]
    assert found["eval_loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=1e-5)
    assert found["eval_margin"] == pytest.approx(margins.mean(), abs=1e-5)
    assert found["eval_accuracy"] == (margins > 0).mean()


def distilled_loss(model: Any, teacher: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """0.3 * cross entropy + 0.7 * KL(teacher, student)."""
    labels = batch["labels"][:, 1:]
    kept = labels != -100
    named = {name: batch[name] for name in ("input_ids", "attention_mask")}
    own = model(**named).logits[:, :-1][kept].log_softmax(-1)
    with torch.no_grad():
        wanted = teacher(**named).logits[:, :-1][kept].log_softmax(-1)
    divergence = functional.kl_div(own, wanted, log_target=True, reduction="batchmean")
    return 0.3 * functional.nll_loss(own, labels[kept]) + 0.7 * divergence


def test_distilled_probabilities_are_torchs(checkpoint, tmp_path):
    teacher_place = tiny_tokenizer(save_tiny(base_model("llama", seed=5), tmp_path / "teacher"))
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs()]
    teacher = AutoModelForCausalLM.from_pretrained(teacher_place)
    options = {"method": "distill", "teacher_model": str(teacher_place), "distillation_weight": 0.7}
    how = {**HOW, "validate": True}
    ours = run(checkpoint, tmp_path / "out", rows, how, teacher_top=teacher.config.vocab_size, **options)
    loss = functools.partial(distilled_loss, teacher=teacher)
    theirs = torch_curve(adapted(checkpoint), batches_of(ours), lambda model, batch: loss(model, batch=batch))
    np.testing.assert_allclose(curve(ours.trainer.state.log_history, "loss")[:, 0], theirs, rtol=1e-4, atol=1e-4)
    assert ours.proof.passed


def test_a_teacher_answers_the_prompts(checkpoint, tmp_path):
    """What is trained on is what transformers generates with the teacher for the same prompts."""
    rows = [{"prompt": f"{word} {n}:", "completion": " unused"} for n, word in enumerate(WORDS * 4)]
    config = QEffConfig(
        str(checkpoint), rows, method="distill", distillation="response", teacher_model=str(checkpoint),
        train_frac=1.0, max_ctx_len=100,
    )  # fmt: skip
    _, data = QEfficient(config, QEffTrainingArgs(tmp_path / "out")).parts()
    train, _ = data.prepare_dataset()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    teacher = AutoModelForCausalLM.from_pretrained(checkpoint)
    numbers = np.asarray(train.numbers).tolist()
    for number, row in enumerate(rows, start=1):
        prompt = data.prompt_ids(row["prompt"])
        group = rows[(number - 1) // 8 * 8 :][:8]  # answered together, within what the longest prompt leaves
        longest = max(len(data.prompt_ids(r["prompt"])) for r in group)
        wanted = teacher.generate(torch.tensor([prompt]), max_new_tokens=99 - longest, do_sample=False, eos_token_id=2)
        made = wanted[0, len(prompt) :].tolist()
        assert (number in numbers) == (2 in made)  # an answer that did not end is not learned
        if 2 in made and made != [2]:
            item = train[numbers.index(number)]
            trained = np.asarray(item["input_ids"])[np.asarray(item["labels"]) != -100]
            answer = tokenizer.decode(made, skip_special_tokens=True)
            assert tokenizer.decode(trained, skip_special_tokens=True) == answer
    left_out = data.audit.splits["train"].dropped["the teacher did not finish"]
    assert 0 < left_out < len(rows)
    assert len(numbers) + left_out == len(rows)


def test_without_a_reference_its_probabilities_are_0(checkpoint, tmp_path):
    """The first loss, by hand from transformers' log-probabilities."""
    ours = run(checkpoint, tmp_path / "out", pairs(4), {**HOW, "max_steps": 1}, method="dpo", reference_free=True)
    train, _ = ours.data_manager.prepare_dataset()
    model = AutoModelForCausalLM.from_pretrained(checkpoint)

    def logprob(item: Any) -> float:
        ids, labels = (torch.from_numpy(np.array(item[n]))[None] for n in ("input_ids", "labels"))
        found = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return float(found[labels[0, 1:] != -100].sum())

    z = np.array([0.1 * (logprob(pair["chosen"]) - logprob(pair["rejected"])) for pair in train])
    assert curve(ours.trainer.state.log_history, "loss")[0, 0] == pytest.approx(np.log1p(np.exp(-z)).mean(), rel=1e-5)


def test_accumulation_and_a_short_last_batch_change_nothing(checkpoint, tmp_path):
    """Windows of 4 pairs, in one batch or in 3 + 1: the same weights."""
    whole = run(checkpoint, tmp_path / "a", pairs(4), {**HOW, "max_steps": 3}, method="dpo")
    how = {**HOW, "max_steps": 3, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    parts = run(checkpoint, tmp_path / "b", pairs(4), how, method="dpo")
    wanted = dict(whole.trainer._step.named_parameters())
    for name, value in parts.trainer._step.named_parameters():
        np.testing.assert_allclose(value.detach(), wanted[name].detach(), rtol=1e-4, atol=1e-5)


def test_full_fine_tuning_keeps_its_reference(checkpoint, tmp_path):
    """Without an adapter the reference is what the weights were; a run that goes on still knows it."""
    how = {**HOW, "learning_rate": 1e-3}
    options = {"method": "dpo", "lora_config": None}
    whole = run(checkpoint, tmp_path / "whole", pairs(8), {**how, "max_steps": 4}, **options)
    run(checkpoint, tmp_path / "parts", pairs(8), {**how, "max_steps": 2, "save_steps": 2}, **options)
    parts = run(checkpoint, tmp_path / "parts", pairs(8), {**how, "max_steps": 4}, **options)
    mine, theirs = (curve(r.trainer.state.log_history, "loss", "rewards/margins") for r in (parts, whole))
    assert mine[0, 0] == pytest.approx(np.log(2), abs=1e-6)
    np.testing.assert_allclose(mine, theirs, rtol=1e-6)


@pytest.mark.parametrize(
    ("what", "wanted"),
    [
        ({"method": "ppo"}, "method"),
        ({"beta": 0.2}, "beta is an option of method='dpo' and 'orpo' and 'kto', not of 'sft'"),
        ({"method": "dpo", "beta": 0}, "beta must be a number above 0"),
        ({"method": "dpo", "teacher_model": "x"}, "teacher_model is an option of method='distill'"),
        ({"method": "dpo", "packing": True}, "packing is not for method='dpo'"),
        ({"method": "dpo", "train_on": "all"}, "train_on='all'"),
        ({"method": "dpo", "task": "seq_classification"}, "task='generation'"),
        ({"method": "distill"}, "needs teacher_model"),
        ({"method": "distill", "teacher_model": "x", "distillation": "soft"}, "distillation"),
        ({"method": "distill", "teacher_model": "x", "distillation_weight": 1.5}, "from 0 to 1"),
        ({"method": "distill", "teacher_model": "x", "teacher_top": 0}, "teacher_top"),
    ],
)
def test_options_that_do_not_fit_are_said(what, wanted):
    with pytest.raises(OptionError, match=wanted.replace("(", r"\(")):
        QEffConfig("m", "sample", **what)


def test_data_that_does_not_fit_the_method_is_said(checkpoint, tmp_path):
    def prepare(rows: Any, **what: Any) -> None:
        config = QEffConfig(str(checkpoint), rows, max_ctx_len=64, **what)
        QEfficient(config, QEffTrainingArgs(tmp_path)).parts()[1].prepare_dataset()

    with pytest.raises(OptionError, match="set method='dpo', 'orpo' or 'reward'"):
        prepare(pairs())
    with pytest.raises(OptionError, match="set method='kto'"):
        prepare(judged(4))
    with pytest.raises(OptionError, match="needs chosen and rejected"):
        prepare([{"prompt": "a", "completion": "b"}], method="dpo")
    with pytest.raises(InputError, match="two rows or more"):
        prepare(judged(1), method="kto", train_frac=1.0)
    teacher = tiny_tokenizer(tmp_path / "other", vocab_size=120)
    save_tiny(base_model("llama"), teacher)
    rows = [{"prompt": "a b", "completion": "c d"}] * 4
    with pytest.raises(OptionError, match="another vocabulary"):
        run(checkpoint, tmp_path / "out", rows, method="distill", teacher_model=str(teacher), teacher_top=2)
