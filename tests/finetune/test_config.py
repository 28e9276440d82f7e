"""QEffConfig and QEffTrainingArgs: names, aliases, contradictions, files, and what must be refused."""

import copy
import dataclasses
import json
import subprocess
import sys
import warnings

import peft
import pytest
import transformers
from tiny_models import tiny_causal_lm

from QEfficient.errors import OptionError
from QEfficient.finetune import QEffConfig, QEffTrainingArgs, QEffTrainingArguments, arguments, config, lora


def test_configuring_needs_no_torch():
    code = (
        "import sys\nfrom QEfficient import QEffConfig\nQEffConfig('m', 'sample', lora_config={'r': 4})\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------- QEffConfig


def test_defaults_are_the_documented_ones():
    config = QEffConfig("m", "d.jsonl")
    assert (config.train_frac, config.max_ctx_len, config.seed, config.task) == (0.85, 512, 42, "generation")
    assert config.lora_config == {"r": 8, "target_modules": "all-linear"}
    assert (config.train_on, config.dataset_format, config.packing) == ("completion", "auto", False)


#: Option -> two values it can have, for every option that has another name.
VALUES = {
    "model_id": ("some/model", "other/model"),
    "dataset_name": ("a.jsonl", "b.jsonl"),
    "max_ctx_len": (64, 128),
    "lora_config": ({"r": 4, "target_modules": "all-linear"}, {"r": 2, "target_modules": "all-linear"}),
    "dataset_config": ("en", "de"),
    "sample_size": (3, 4),
    "columns": ({"prompt": "q"}, {"prompt": "question"}),
    "per_device_train_batch_size": (2, 4),
    "per_device_eval_batch_size": (2, 4),
    "num_train_epochs": (2, 5.0),
    "learning_rate": (1e-3, 1e-4),
    "epoch_decay": (0.5, 0.9),
    "optim": ("sgd", "adamw_torch"),
    "lr_scheduler_type": ("cosine", "constant"),
    "eval_strategy": ("epoch", "steps"),
    "use_cpu": (True, False),
    "activation_checkpointing_kwargs": ({"use_reentrant": True}, {"use_reentrant": False}),
    "train_sampling_strategy": ("sequential", "group_by_length"),
    "validate": (False, True),
    "beta": (0.2, 0.3),
    "teacher_model": ("a/teacher", "b/teacher"),
    "mixing": ("upsample", "exhaust"),
    "shuffle_buffer_size": (10, 20),
    "unfreeze_last_n": (1, 2),
    "dataset_num_proc": (1, 2),
    "target": ("qaic", "host"),
}
#: What an option cannot be without.
NEEDS = {
    "beta": {"method": "dpo"},
    "teacher_model": {"method": "distill"},
    "mixing": {"datasets": ["a.jsonl", "b.jsonl"]},
    "shuffle_buffer_size": {"streaming": True},
}


ALIASED = ((QEffConfig, config.ALIASES), (QEffTrainingArgs, arguments.ALIASES))
#: transformers keeps it as a field that mirrors the new name, so that in a copy the new name decides.
MIRROR = "gradient_checkpointing_kwargs"


@pytest.mark.parametrize(
    ("cls", "alias", "name"), [(cls, *pair) for cls, aliases in ALIASED for pair in aliases.items()]
)
def test_every_alias(cls, alias, name):
    """It sets the option, and saves under the option's name; a second value for the same option is an error."""
    more = {"model_id": "some/model"} if cls is QEffConfig and name != "model_id" else {}
    more |= NEEDS.get(name, {})
    one, other = VALUES[name]
    by_alias, by_name = cls(**more, **{alias: one}), cls(**more, **{name: one})
    assert getattr(by_alias, name) == one != getattr(cls(**more, **{name: other}), name)
    saved, expected = by_alias.to_dict(), by_name.to_dict()
    if alias == "batch_size":  # the only one that means more than its name
        assert saved.pop("per_device_eval_batch_size") == one
        expected.pop("per_device_eval_batch_size")
    assert saved == expected
    assert alias not in saved or alias == MIRROR
    assert cls(**more, **{alias: one, name: one}).to_dict()[name] == one
    for first, second in ((alias, name), (name, alias)):
        both = {**more, first: one, second: other}
        if alias == MIRROR:
            assert getattr(cls(**both), name) == both[name]
            continue
        with pytest.raises(OptionError, match="contradicts") as caught:
            cls(**both)
        assert f"{alias}=" in str(caught.value)
        assert f"{name}=" in str(caught.value)


def test_an_alias_may_repeat_but_not_contradict():
    assert QEffConfig(model_id="a", model_name="a").model_id == "a"
    with pytest.raises(OptionError, match=r"model_name='b' contradicts model_id='a'"):
        QEffConfig(model_id="a", model_name="b")
    with pytest.raises(OptionError, match="max_length=64 contradicts max_ctx_len=32"):
        QEffConfig("a", max_ctx_len=32, max_length=64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_fraction": 0.5}, "no option 'train_fraction'. Did you mean 'train_frac'"),
        ({"train_frac": 0}, "train_frac must be a number above 0 and at most 1, got 0"),
        ({"train_frac": 1.5}, "train_frac"),
        ({"train_frac": float("nan")}, "train_frac"),
        ({"train_frac": True}, "train_frac"),
        ({"max_ctx_len": 1}, "max_ctx_len must be an integer of at least 2"),
        ({"max_ctx_len": 12.5}, "max_ctx_len"),
        ({"task": "generate"}, "Did you mean 'generation'"),
        ({"train_on": "answers"}, "train_on must be one of"),
        ({"truncation": "cut"}, "truncation must be one of"),
        ({"dataset_format": "alpacca"}, "Did you mean 'alpaca'"),
        ({"packing": "yes"}, "packing must be True or False"),
        ({"sample_size": 0}, "sample_size"),
        ({"columns": ["a"]}, "columns must be a mapping"),
        ({"seed": -1}, "seed"),
        ({"trainable": []}, "trainable must be a list"),
        ({"trainable": ["*.bias"], "lora_config": {"r": 4}}, "trainable and lora_config"),
        ({"eval_split": "val", "train_frac": 0.5}, "give one of them"),
        ({"packing": True, "task": "seq_classification"}, "packing is not for"),
        ({"lora_config": {"rang": 4}}, "no option 'rang'. Did you mean 'rank'"),
        ({"lora_config": {"r": 0}}, "'r'"),
        ({"lora_config": {"r": 4, "rank": 8}}, "contradicts"),
        ({"lora_config": {"use_dora": "yes"}}, "'use_dora'"),
        ({"lora_config": {"use_qalora": True}}, "use_qalora=True, which is not supported"),
        ({"lora_config": {"trainable_token_indices": [-1]}}, "trainable_token_indices"),
        ({"lora_config": {"layers_to_transform": "last"}}, "layers_to_transform"),
        ({"lora_config": {"bias": "all"}}, "bias='all'"),
        ({"lora_config": {"lora_dropout": 1.0}}, "below 1"),
        ({"lora_config": {"target_modules": []}}, "target_modules"),
        ({"lora_config": {"peft_type": "IA3", "r": 8}}, "has r, which IA3 has not"),
        ({"lora_config": {"peft_type": "ia3", "target_modules": ["a"], "feedforward_modules": ["b"]}}, "lacks: add"),
        ({"lora_config": {"peft_type": "IA3", "targets": ["a"]}}, "no option 'targets'"),
        ({"lora_config": {"layers_to_transform": [1]}}, "target_modules must be a list of names"),
        ({"lora_config": {"rank_pattern": 5}}, "rank_pattern"),
        ({"lora_config": {"alpha_pattern": "x"}}, "alpha_pattern"),
        ({"lora_config": 8}, "lora_config must be a dict"),
        ({"lora_config": "nowhere.yaml"}, "no file nowhere.yaml"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        QEffConfig("m", "d.jsonl", **options)


def test_a_model_is_required():
    with pytest.raises(OptionError, match="needs model_id"):
        QEffConfig(dataset_name="d.jsonl")


def test_a_trainable_pattern_replaces_lora():
    config = QEffConfig("m", "d", trainable="*.bias")
    assert config.trainable == ("*.bias",)
    assert config.lora_config is None
    assert config.peft_options() is None


def test_lora_from_a_dict_of_another_tool_equals_pefts_own():
    config = QEffConfig("m", "d", lora_config={"lora_rank": 4, "alpha": 16, "lora_target": ["q_proj"], "dropout": 0})
    expected = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj"])
    assert peft.LoraConfig(**config.peft_options()).to_dict() == expected.to_dict()


@pytest.mark.parametrize(("alias", "name"), lora.LORA_ALIASES.items())
def test_every_alias_of_lora(alias, name):
    values = {
        "r": (4, 2),
        "lora_alpha": (16, 8),
        "lora_dropout": (0.0, 0.1),
        "target_modules": (["q_proj"], ["v_proj"]),
    }
    one, other = values[name]
    assert lora.read_lora({alias: one}) == lora.read_lora({name: one}) != lora.read_lora({name: other})
    with pytest.raises(OptionError, match=f"{name}=.* contradicts {alias}="):
        lora.read_lora({alias: one, name: other})


def test_lora_from_a_peft_object_and_from_pefts_own_file(tmp_path):
    asked = peft.LoraConfig(
        r=4, lora_alpha=32, target_modules=["v_proj", "q_proj"], use_rslora=True, task_type="CAUSAL_LM"
    )
    asked.save_pretrained(tmp_path)
    for given in (asked, tmp_path / "adapter_config.json", str(tmp_path / "adapter_config.json")):
        options = QEffConfig("m", "d", lora_config=given).peft_options()
        made = peft.LoraConfig(**options)
        assert (made.r, made.lora_alpha, made.target_modules, made.use_rslora) == (4, 32, {"q_proj", "v_proj"}, True)
        assert made.task_type == "CAUSAL_LM"


def test_dropout_trains_with_zero_and_says_so():
    with pytest.warns(UserWarning, match=r"lora_dropout=0\.05 is recorded, and training uses 0"):
        config = QEffConfig("m", "d", lora_config={"r": 4, "lora_dropout": 0.05})
    assert config.lora_config["lora_dropout"] == 0.05
    assert config.peft_options()["lora_dropout"] == 0.0
    assert len(config.notices()) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config.replace(seed=7).lora_config == config.lora_config


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json"])
def test_a_saved_file_loads_to_the_same(tmp_path, suffix):
    config = QEffConfig(
        tmp_path,
        "d.jsonl",
        lora_config={"r": 4, "lora_alpha": 16},
        columns={"prompt": "frage"},
        system_prompt="kurz: ja",
        seed=3,
    )
    path = config.save(tmp_path / "sub" / f"c.{suffix}")
    assert QEffConfig.load(path) == config
    assert [p.name for p in path.parent.iterdir()] == [f"c.{suffix}"]


def test_configuration_files_are_read_strictly(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model_id: m\ndataset: d.jsonl\ntrain_frac: 9e-1\nlora_config: {r: 4}\n")
    assert QEffConfig.load(path).train_frac == 0.9
    path.write_text("model_id: m\nmodel_id: n\n")
    with pytest.raises(OptionError, match="the key 'model_id' is given twice"):
        QEffConfig.load(path)
    path.write_text("model_id: [\n")
    with pytest.raises(OptionError, match="cannot be read as a configuration"):
        QEffConfig.load(path)
    path.write_text("model_id: !!python/object/apply:os.system [id]\n")
    with pytest.raises(OptionError, match="cannot be read"):
        QEffConfig.load(path)
    (tmp_path / "d.json").write_text('{"model_id": "m", "model_id": "n"}')
    with pytest.raises(OptionError, match="given twice"):
        QEffConfig.load(tmp_path / "d.json")
    with pytest.raises(OptionError, match=r"Did you mean .*c\.yaml"):
        QEffConfig.load(tmp_path / "cc.yaml")


def test_data_in_memory_is_described_and_not_reloaded(tmp_path):
    config = QEffConfig("m", [{"text": "a"}, {"text": "b"}])
    assert config.to_dict()["dataset_name"] == "<in memory: list, 2 rows>"
    with pytest.raises(OptionError, match="was saved from data in memory"):
        QEffConfig.load(config.save(tmp_path / "c.yaml"))


# ---------------------------------------------------------------------------------------- QEffTrainingArgs


def test_every_name_of_transformers_is_accepted_with_its_default():
    ours, theirs = QEffTrainingArgs("out"), transformers.TrainingArguments("out", use_cpu=True)
    changed = {"logging_steps", "remove_unused_columns", "dataloader_pin_memory"}
    for field in dataclasses.fields(theirs):
        if field.init and field.name not in changed:
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert QEffTrainingArguments is QEffTrainingArgs
    assert QEffTrainingArgs().output_dir == "./output"
    assert ours.report_to == []
    assert ours.device.type == "cpu"


def test_names_of_documents_and_of_older_versions():
    args = QEffTrainingArgs(
        "out", batch_size=4, lr=1e-3, epochs=2, warmup_ratio=0.1, group_by_length=True, evaluation_strategy="epoch",
        no_cuda=True, gradient_checkpointing=True, logging_dir="logs", overwrite_output_dir=True,
    )  # fmt: skip
    assert (args.per_device_train_batch_size, args.per_device_eval_batch_size) == (4, 4)
    assert (args.learning_rate, args.num_train_epochs, args.eval_strategy) == (1e-3, 2, "epoch")
    assert args.train_sampling_strategy == "group_by_length"
    # A tenth of the run, by transformers' own arithmetic.
    assert args.get_warmup_steps(200) == 20
    assert args.recompute is True
    assert str(args.logs_dir) == "logs"
    assert QEffTrainingArgs(batch_size=4, eval_batch_size=2).per_device_eval_batch_size == 2
    assert QEffTrainingArgs(target="cpu").target == "host"


def test_log_lines_of_short_runs():
    assert QEffTrainingArgs(max_steps=100).logging_steps == 1
    assert QEffTrainingArgs(max_steps=101).logging_steps == 10
    assert QEffTrainingArgs(max_steps=5, logging_steps=3).logging_steps == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sise": 4}, "no option 'batch_sise'. Did you mean 'batch_size'"),
        ({"warm_up_ratio": 0.1}, "Did you mean 'warmup_ratio'"),
        ({"batch_size": 4, "per_device_train_batch_size": 8}, "contradicts"),
        ({"batch_size": 0}, "per_device_train_batch_size must be an integer of at least 1"),
        ({"learning_rate": "1e-4"}, "learning_rate must be a finite number"),
        ({"warmup_ratio": 1.5}, "warmup_ratio"),
        ({"warmup_ratio": 0.1, "warmup_steps": 50}, "contradicts warmup_steps=50"),
        ({"group_by_length": True, "train_sampling_strategy": "sequential"}, "group_by_length contradicts"),
        ({"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy must be one of"),
        ({"target": "hots"}, "Did you mean 'host'"),
        ({"base_weights": "int2"}, "base_weights must be one of"),
        ({"validate": 1}, "validate must be True or False"),
        ({"bf16": True}, "bf16 is not supported on the host"),
        ({"device": "cuda"}, "target must be one of 'host', 'qaic', 'qnn', got 'cuda'"),
        ({"torch_dtype": "bfloat16"}, "torch_dtype='bfloat16' is not supported: a step computes in float32"),
        ({"load_in_8bit": 1}, "load_in_8bit must be True or False"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "load_in_8bit and load_in_4bit contradict"),
        ({"load_in_4bit": True, "base_weights": "int8"}, "load_in_4bit and base_weights='int8' contradict"),
        ({"fp16": True}, "fp16 is not supported on the host"),
        ({"qeff_fp16": True}, "the host computes in fp32"),
        ({"deepspeed": "ds.json"}, "deepspeed is not supported"),
        ({"fsdp": "full_shard"}, "fsdp is not supported"),
        ({"torch_compile": True}, "compiled to ONNX already"),
        ({"auto_find_batch_size": True}, "set batch_size yourself"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is not supported"),
        ({"use_liger_kernel": True}, "use_liger_kernel is not supported"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is not supported"),
        ({"device_ids": "0"}, "device_ids"),
        ({"lr_scheduler_type": "linar"}, "not a valid SchedulerType"),
        ({"load_best_model_at_end": True}, "save and eval strategy to match"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(OptionError, match=message) as caught:
        QEffTrainingArgs("out", **options)
    assert "\n" not in str(caught.value)


def test_copies_and_files_keep_every_value(tmp_path):
    args = QEffTrainingArgs(
        "out",
        batch_size=2,
        target_options={"threads": 2},
        gradient_checkpointing=True,
        base_weights="int4",
        warmup_ratio=0.1,
    )
    for made in (
        copy.deepcopy(args),
        QEffTrainingArgs.from_dict(args.to_dict()),
        QEffTrainingArgs.from_dict(json.loads(args.to_json_string())),
        QEffTrainingArgs.load(args.save(tmp_path / "args.yaml")),
        dataclasses.replace(args),
    ):
        assert made.to_dict() == args.to_dict()
    assert dataclasses.replace(args).recompute is True
    assert dataclasses.replace(args, recompute=False).recompute is False
    path = tmp_path / "a.yaml"
    path.write_text("output_dir: out\nlearning_rate: 1e-4\n")
    assert QEffTrainingArgs.load(path).learning_rate == 1e-4


def test_hugging_faces_trainer_takes_them(tmp_path):
    trainer = transformers.Trainer(tiny_causal_lm("llama"), QEffTrainingArgs(tmp_path, max_steps=1))
    assert trainer.args.device.type == "cpu"


def test_length_may_be_in_either_place_but_not_in_both():
    config, longer = QEffConfig("m", "d"), QEffTrainingArgs(max_ctx_len=128)
    assert config.with_arguments(longer).max_ctx_len == 128
    assert config.with_arguments(None) is config
    assert QEffConfig("m", "d", max_ctx_len=128).with_arguments(longer).max_ctx_len == 128
    with pytest.raises(OptionError, match="max_ctx_len=64 and the training arguments have 128"):
        QEffConfig("m", "d", max_ctx_len=64).with_arguments(longer)
