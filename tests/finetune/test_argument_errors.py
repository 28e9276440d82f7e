"""Arguments that cannot work are refused when they are given, each in one sentence."""

import copy
import dataclasses

import pytest
from transformers.integrations import integration_utils
from typer.testing import CliRunner

from QEfficient.cli.main import app
from QEfficient.errors import OptionError
from QEfficient.finetune import QEffConfig, QEfficient, QEffTrainingArgs
from QEfficient.finetune.options import read_value, split_options

NAN, INF = float("nan"), float("inf")


def refused(make, message):
    with pytest.raises(OptionError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "max_steps must be an integer of at least 1, or -1 for no limit, got 0"),
        ({"max_steps": -5}, "or -1 for no limit, got -5"),
        ({"max_steps": "3"}, "or -1 for no limit, got '3'"),
        ({"max_steps": 2.5}, "or -1 for no limit, got 2.5"),
        ({"max_steps": True}, "or -1 for no limit, got True"),
        ({"early_stopping_patience": 2}, "early_stopping_patience needs evaluations"),
        ({"early_stopping_patience": 0, "eval_strategy": "epoch"}, "early_stopping_patience must be an integer of at"),
        ({"early_stopping_threshold": -1.0}, "early_stopping_threshold must be a finite number of at least 0"),
        ({"epoch_decay": 0.0}, "epoch_decay must be above 0 and at most 1, got 0.0"),
        ({"epoch_decay": 1.5}, "epoch_decay must be above 0 and at most 1, got 1.5"),
        ({"output_dir": 3}, "output_dir must be a non-empty string, got 3"),
        ({"qpc_path": 3}, "qpc_path must be a non-empty string, got 3"),
        ({"logging_dir": 3}, "logging_dir must be a non-empty string, got 3"),
        ({"gradient_checkpointing": "yes"}, "gradient_checkpointing must be True or False"),
        ({"adam_epsilon": NAN}, "adam_epsilon must be a finite number of at least 0, got nan"),
        ({"adam_epsilon": "nan"}, "adam_epsilon must be a finite number"),
        ({"adam_epsilon": 0}, "adam_epsilon must be above 0"),
        ({"adam_beta1": 1.5}, "adam_beta1 must be below 1, got 1.5"),
        ({"adam_beta2": -0.1}, "adam_beta2 must be a finite number of at least 0"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"seed": "a"}, "seed must be an integer of at least 0, got 'a'"),
        ({"data_seed": 0.5}, "data_seed must be an integer"),
        ({"save_steps": NAN}, "save_steps must be a finite number"),
        ({"save_steps": -2}, "save_steps must be a finite number of at least 0, got -2"),
        ({"save_steps": 2.5}, "save_steps must be a whole number, or a share of the run below 1, got 2.5"),
        ({"save_steps": "a"}, "save_steps must be a finite number"),
        ({"eval_steps": -1}, "eval_steps must be a finite number"),
        ({"save_total_limit": 0}, "save_total_limit must be an integer of at least 1, got 0"),
        ({"save_total_limit": -1}, "save_total_limit must be an integer of at least 1, got -1"),
        ({"logging_steps": -1}, "logging_steps must be a finite number of at least 0, got -1"),
        ({"batch_size": 2.0}, "per_device_train_batch_size must be an integer of at least 1, got 2.0"),
        ({"eval_batch_size": True}, "per_device_eval_batch_size must be an integer"),
        ({"warmup_steps": -1}, "warmup_steps must be a finite number of at least 0"),
        ({"warmup_steps": "many"}, "warmup_steps must be a finite number"),
        ({"warmup_steps": 2.5}, "warmup_steps must be a whole number, or a share of the run below 1"),
        ({"max_grad_norm": NAN}, "max_grad_norm must be a finite number"),
        ({"learning_rate": INF}, "learning_rate must be a finite number of at least 0, got inf"),
        ({"dataloader_num_workers": "a"}, "dataloader_num_workers must be an integer"),
        ({"load_best_model_at_end": "yes"}, "load_best_model_at_end must be True or False"),
        ({"metric_for_best_model": "blue"}, "metric_for_best_model must be one of 'loss', 'perplexity', 'accuracy'"),
        ({"metric_for_best_model": "eval_los"}, "Did you mean 'eval_loss'"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type='cosine_with_min_lr' does not work with"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        ({"lr_scheduler_kwargs": {"min_lr": 1e-6}}, "lr_scheduler_type='linear' does not work with"),
        ({"lr_scheduler_kwargs": 3}, "lr_scheduler_kwargs must be a mapping"),
        ({"report_to": "nowhere"}, "report_to must be one of"),
        ({"push_to_hub": True}, "push_to_hub is not supported, because training runs offline, and `qefficient push"),
    ],
    ids=str,
)
def test_refused_when_given(options, message):
    refused(lambda: QEffTrainingArgs(**{"output_dir": "out", **options}), message)


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": -1},
        {"max_steps": 1, "save_steps": 0.5, "warmup_steps": 3, "logging_steps": 5.0},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}, "max_steps": 9},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
        {"lr_scheduler_type": "polynomial", "learning_rate": 1e-3},
        {"report_to": None},
        {"report_to": "all"},
        {"save_total_limit": 1, "save_strategy": False, "max_grad_norm": 0},
    ],
    ids=str,
)
def test_what_works_is_taken(options):
    assert QEffTrainingArgs("out", **options).to_dict()["output_dir"] == "out"


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("comet_ml", "comet-ml"), ("flyte", "flytekit")])
def test_a_report_to_what_is_not_installed(monkeypatch, name, package):
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["tensorboard"])
    monkeypatch.setattr(integration_utils, "is_flytekit_available", lambda: False)
    refused(lambda: QEffTrainingArgs("out", report_to="kubeflow"), "inside a Kubeflow TrainJob only")
    refused(lambda: QEffTrainingArgs("out", report_to=["tensorboard", name]), f"pip install {package}, or leave it out")
    assert QEffTrainingArgs("out", report_to="tensorboard").report_to == ["tensorboard"]


@pytest.mark.parametrize("prefix", ["", "eval_"])
@pytest.mark.parametrize(("metric", "greater"), [("loss", False), ("perplexity", False), ("accuracy", True)])
def test_the_best_model_by_each_metric(prefix, metric, greater):
    assert QEffTrainingArgs("out", metric_for_best_model=prefix + metric).greater_is_better is greater


def test_a_metric_that_the_task_lacks():
    generation, classes = QEffConfig("m", "d"), QEffConfig("m", "d", task="seq_classification")
    accuracy = QEffTrainingArgs("out", metric_for_best_model="eval_accuracy")
    perplexity = QEffTrainingArgs("out", metric_for_best_model="perplexity")
    refused(lambda: generation.with_arguments(accuracy), "use 'loss' or 'perplexity'")
    refused(lambda: classes.with_arguments(perplexity), "use 'loss' or 'accuracy'")
    assert classes.with_arguments(accuracy) is classes
    assert generation.with_arguments(perplexity) is generation


@pytest.mark.parametrize("name", ["recompute", "activation_checkpointing", "gradient_checkpointing"])
def test_recomputing_by_each_of_its_names(name):
    """The Trainer must not switch it on in a torch model, which it does by the names of transformers."""
    args = QEffTrainingArgs("out", **{name: True})
    for made in (args, copy.deepcopy(args), dataclasses.replace(args), QEffTrainingArgs.from_dict(args.to_dict())):
        assert (made.recompute, made.activation_checkpointing, made.gradient_checkpointing) == (True, False, False)
    assert QEffTrainingArgs("out", **{name: False}).recompute is False


def test_recomputing_trains(tiny_checkpoint, tmp_path):
    rows = [{"prompt": f"a b {n}:", "completion": "c d"} for n in range(6)]
    args = QEffTrainingArgs(tmp_path, max_steps=1, batch_size=2, recompute=True, validate=False, plot=False)
    run = QEfficient(QEffConfig(str(tiny_checkpoint), rows, max_ctx_len=64), args)
    run.refine(load=False, say=lambda message: None)
    assert run.trainer.state.global_step == 1


@pytest.mark.parametrize("alpha", [0, -1, NAN, "16", True])
def test_an_adapter_that_would_be_scaled_to_nothing(alpha):
    refused(lambda: QEffConfig("m", "d", lora_config={"lora_alpha": alpha}), "must be a number above 0")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: QEffConfig("m", base_weights="int8"),
            "'base_weights'. It belongs to QEffTrainingArgs: give it there.",
        ),
        (lambda: QEffConfig("m", warmup_ratio=0.1), "It belongs to QEffTrainingArgs"),
        (lambda: QEffConfig("m", lora_dropout=0.1), "It belongs to lora_config: give it there."),
        (lambda: QEffConfig("m", lora_dropot=0.1), "Did you mean 'lora_dropout' in lora_config?"),
        (lambda: QEffConfig("m", learning_rat=0.1), "Did you mean 'learning_rate' in QEffTrainingArgs?"),
        (lambda: QEffTrainingArgs("out", train_frac=0.5), "It belongs to QEffConfig: give it there."),
        (lambda: QEffTrainingArgs("out", packin=True), "Did you mean 'packing' in QEffConfig?"),
        (lambda: QEffConfig("m", lora_config={"learning_rate": 1}), "It belongs to QEffTrainingArgs"),
        (lambda: split_options({"model_id": "m", "lora_dropout": 0.1}), "It belongs to lora_config"),
        (lambda: split_options({"model_id": "m", "learning_rat": 0.1}), "Did you mean 'learning_rate'?"),
    ],
)
def test_an_option_in_the_wrong_place(make, message):
    refused(make, message)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("learning_rate", "1e-4", 1e-4), ("lr", "inf", INF), ("train_frac", "5e-1", 0.5), ("adam_epsilon", "x", "x"),
        ("max_steps", "3", 3), ("run_name", "2024", "2024"), ("tokenizer_name", "null", None),
        ("packing", "true", True), ("columns", "{prompt: q}", {"prompt": "q"}), ("unknown", "a", "a"),
    ],
)  # fmt: skip
def test_settings_of_the_command_line_have_the_options_type(name, text, value):
    assert read_value(name, text) == value


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("adam_epsilon=nan", "adam_epsilon must be a finite number of at least 0, got nan"),
        ("max_steps=0", "or -1 for no limit, got 0"),
        ("lora_dropot=0.1", "Did you mean 'lora_dropout' in lora_config"),
    ],
)
def test_the_command_line_refuses_them_too(setting, message):
    done = CliRunner().invoke(app, ["finetune", "m", "--dataset", "sample", "--set", setting])
    assert done.exit_code == 2
    assert message in done.stderr


def test_the_help_shows_where_everything_goes():
    shown = CliRunner().invoke(app, ["finetune", "--help"], env={"COLUMNS": "200"}).output
    assert "(./output)" in shown
