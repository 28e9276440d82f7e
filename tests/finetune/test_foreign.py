"""Files of other tools: what each becomes, worked out by hand from that tool's documentation, and what is refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from QEfficient.cli.main import app
from QEfficient.errors import OptionError, QEfficientError
from QEfficient.finetune.foreign import tables
from QEfficient.finetune.foreign.read import TOOLS, read_options, recognise
from QEfficient.finetune.foreign.tool import translate
from QEfficient.finetune.layers import read_layers
from QEfficient.finetune.options import PLACES, split_options
from QEfficient.finetune.refine import QEfficient

FILES = Path(__file__).parent / "foreign"
ROOT = Path(__file__).parents[2]
INFO = {
    "demo": {
        "file_name": "talks.json",
        "formatting": "sharegpt",
        "columns": {"messages": "chat", "system": "rules"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "plain": {"file_name": "plain.json", "columns": {"prompt": "task", "response": "answer"}},
    "hub": {"hf_hub_url": "some/talks", "subset": "en", "split": "small"},
    "pairs": {
        "file_name": "pairs.json",
        "ranking": True,
        "columns": {"prompt": "task", "chosen": "good", "rejected": "bad"},
    },
    "paired_talks": {
        "file_name": "pairs.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "chat", "chosen": "good", "rejected": "bad"},
    },
    "judged": {"file_name": "judged.json", "columns": {"kto_tag": "fine"}},
    "judged_talks": {"file_name": "judged.json", "formatting": "sharegpt", "columns": {"kto_tag": "fine"}},
}


@pytest.fixture
def folder(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """The sample files, with data and a model that are there."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "dataset_info.json").write_text(json.dumps(INFO))
    talk = [
        {
            "rules": "Be brief.",
            "chat": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "ok"}],
        }
        for n in range(10)
    ]
    (data / "talks.json").write_text(json.dumps(talk))
    for name, count in (("train", 12), ("valid", 3)):
        rows = [{"prompt": f"word {n}:", "completion": " elm" * (1 + n % 3)} for n in range(count)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file in FILES.iterdir():
        text = file.read_text().replace("DIRECTORY", str(data)).replace("MODEL", str(tiny_checkpoint))
        (tmp_path / file.name).write_text(text)
    return tmp_path


EXPECTED = {
    "axolotl.yaml": {
        "model_id": "NousResearch/Llama-3.2-1B", "base_weights": "int4",
        "lora_config": {"r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["gate_proj", "q_proj"]},
        "dataset_name": "chats", "dataset_format": "sharegpt", "train_on": "completion", "train_frac": 0.9,
        "output_dir": "./outputs/qlora-out", "max_ctx_len": 2048, "packing": True, "gradient_accumulation_steps": 4,
        "per_device_train_batch_size": 2, "num_train_epochs": 2, "optim": "adamw_torch", "learning_rate": 2e-4,
        "recompute": True, "logging_steps": 1, "warmup_steps": 10, "eval_strategy": "steps", "eval_steps": 0.125,
        # Not in the file: defaults of axolotl.
        "lr_scheduler_type": "cosine", "weight_decay": 0.0, "max_grad_norm": 1.0, "save_strategy": "epoch",
        "save_total_limit": 4, "seed": 42, "truncation": "drop", "per_device_eval_batch_size": 2,
    },
    "llamafactory.yaml": {
        "model_id": "Qwen/Qwen3-4B-Instruct-2507", "trust_remote_code": True,
        "dataset_name": "DATA/talks.json", "dataset_format": "messages",
        "columns": {"messages": "chat", "system": "rules"}, "sample_size": 1000, "train_frac": 0.8,
        "output_dir": "saves/qwen3-4b/lora/sft", "logging_steps": 10, "save_steps": 500, "plot": True,
        "overwrite_output_dir": True, "report_to": "none", "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8, "learning_rate": 1e-4, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1,
        "eval_strategy": "steps", "eval_steps": 500,
        # Not in the file: defaults of LLaMA-Factory, alpha twice the rank among them.
        "lora_config": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]},
        "max_ctx_len": 2048, "train_on": "completion", "truncation": "cut_answer", "num_train_epochs": 3.0,
        "weight_decay": 0.0, "max_grad_norm": 1.0, "optim": "adamw_torch_fused", "seed": 42,
    },
    "torchtune.yaml": {
        "model_id": "/models/Llama-3.2-1B-Instruct", "output_dir": "/tmp/torchtune/lora",
        "max_ctx_len": 1024, "truncation": "cut_answer", "dataset_name": "pairs.json",
        "dataset_format": "prompt_completion", "columns": {"prompt": "question", "completion": "answer"},
        "packing": True, "train_on": "completion", "train_frac": 1.0, "per_device_train_batch_size": 4,
        "learning_rate": 3e-4, "lr_scheduler_type": "cosine", "warmup_steps": 100, "num_train_epochs": 2,
        "max_steps": 100, "gradient_accumulation_steps": 8, "logging_steps": 1, "recompute": False,
        # Not in the file: alpha 16 of the model's builder, decay 0.01 of torch's AdamW, no clipping.
        "lora_config": {
            "r": 64, "lora_alpha": 16, "lora_dropout": 0.0,
            "target_modules": ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        },
        "optim": "adamw_torch", "weight_decay": 0.01, "max_grad_norm": 0.0, "save_strategy": "epoch",
        "per_device_eval_batch_size": 4,
    },
    "mlx.yaml": {
        "model_id": "TINY", "dataset_name": "DATA", "eval_split": "valid", "optim": "adamw_torch",
        "adam_beta1": 0.9, "adam_beta2": 0.98, "adam_epsilon": 1e-6, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4, "output_dir": "adapters", "max_ctx_len": 48,
        # 50, 10, 20 and 100 micro-batches, 4 to a step; the last two of 50 do no step.
        "max_steps": 12, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps",
        "save_steps": 25,
        # The last of two layers; alpha is 20 times the rank.
        "lora_config": {
            "r": 8, "lora_alpha": 160.0, "lora_dropout": 0.0, "layers_to_transform": [1],
            "target_modules": ["self_attn.q_proj", "self_attn.v_proj"],
        },
        "learning_rate": 1e-4, "warmup_steps": 2, "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-6},
        # Not in the file: prompts are trained, nothing is clipped, decay 0.01 of mlx's AdamW.
        "train_on": "all", "max_grad_norm": 0.0, "weight_decay": 0.01, "truncation": "cut_answer", "seed": 0,
        "per_device_eval_batch_size": 2,
    },
    "qeff.json": {
        "dataset_name": "custom_dataset",
        "custom_dataset_config": {
            "train_split": "train", "test_split": "validation", "preproc_file": "my_rows.py:make_rows",
            "disc_style": "sarcasm",
        },
        # Not in the file: defaults of efficient-transformers; 1000 micro-batches, 4 to a step.
        "learning_rate": 3e-4, "epoch_decay": 0.85, "weight_decay": 0.0, "num_train_epochs": 1,
        "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 4,
        "seed": 42, "target": "host", "save_strategy": "steps", "save_steps": 250, "eval_strategy": "epoch",
        "lora_config": {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.filterwarnings("ignore:lora_dropout")
def test_a_file_of_each(name, folder, tiny_checkpoint):
    """Recognised without being told, translated as written down here, and accepted."""
    found, notices = read_options(folder / name)
    places = {"DATA/talks.json": str(folder / "data" / "talks.json"), "DATA": str(folder / "data")}
    places["TINY"] = str(tiny_checkpoint)
    expected = {
        key: places.get(value, value) if isinstance(value, str) else value for key, value in EXPECTED[name].items()
    }
    assert found == expected
    tool = TOOLS[name.partition(".")[0]]
    assert f"was read as a file of {tool.title}" in notices[0]
    assert read_options(folder / name, tool.name)[0] == found
    split_options({"model_id": "m", **found})


def test_what_is_said(folder):
    said = read_options(folder / "axolotl.yaml")[1][1:]
    assert said == [
        "load_in_4bit stores frozen weights as int4 in blocks, and not in the format of bitsandbytes.",
        "optimizer=adamw_bnb_8bit keeps its state in float32 here.",
        "special_tokens.pad_token has no effect: padding is neither attended to nor trained.",
        "dataset_prepared_path has no effect: prepared rows are kept in the cache by content.",
        "eval_sample_packing has no effect: rows are padded to the longest of their batch.",
        "bf16 has no effect: the step computes in float32, or in the precision of its target.",
        "attn_implementation has no effect: attention and losses are operators of the compiled step.",
    ]
    said = read_options(folder / "llamafactory.yaml")[1]
    assert "template=qwen3_nothink is not looked up: the tokenizer's own chat template is used." in said
    assert any(notice.startswith("max_samples draws rows by seed") for notice in said)
    assert any("biased unless bias_correction" in notice for notice in read_options(folder / "mlx.yaml")[1])


#: The least that each tool can run, and what it then does that we would not.
LEAST = {
    "axolotl": (
        {"base_model": "m", "learning_rate": "1e-5", "datasets": [{"path": "d.jsonl", "type": "completion"}]},
        {"lora_config": None, "num_train_epochs": 1.0, "per_device_train_batch_size": 1, "warmup_steps": 0.03,
         "lr_scheduler_type": "cosine", "truncation": "drop", "max_ctx_len": 512, "train_on": "all",
         "dataset_format": "text", "eval_strategy": "no", "train_frac": 1.0, "learning_rate": 1e-5},
    ),
    "llamafactory": (
        {"model_name_or_path": "m", "dataset": "some/data", "dataset_dir": "ONLINE"},
        {"max_ctx_len": 2048, "train_frac": 1.0, "learning_rate": 5e-5, "per_device_train_batch_size": 8,
         "lora_config": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}},
    ),
    "torchtune": (
        {"model": {"_component_": "torchtune.models.llama2.llama2_7b"}, "checkpointer": {"checkpoint_dir": "m"},
         "dataset": {"_component_": "torchtune.datasets.alpaca_dataset"}, "batch_size": 2, "epochs": 1,
         "optimizer": {"_component_": "torch.optim.SGD", "lr": 1e-3}},
        {"lora_config": None, "dataset_name": "tatsu-lab/alpaca", "train_on": "all", "truncation": "error",
         "optim": "sgd", "weight_decay": 0.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0},
    ),
    "mlx": (
        {"model": "m", "data": "some/data", "num_layers": -1},
        {"max_steps": 1000, "learning_rate": 1e-5, "per_device_train_batch_size": 4, "max_ctx_len": 2048, "seed": 0,
         "train_on": "all", "weight_decay": 0.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
         "lora_config": {"r": 8, "lora_alpha": 160.0, "lora_dropout": 0.0, "target_modules": "all-linear"}},
    ),
    "qeff": (
        {"model_name": "m"},
        {"dataset_name": "alpaca_dataset", "learning_rate": 3e-4, "epoch_decay": 0.85, "num_train_epochs": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
def test_what_a_file_leaves_out_is_as_in_that_tool(tool):
    written, expected = LEAST[tool]
    found = translate(TOOLS[tool], written).options
    assert {key: found.get(key) for key in expected} == expected
    split_options(found)


@pytest.mark.parametrize(
    ("tool", "key", "near"),
    [
        ("axolotl", "micro_batchsize", "micro_batch_size"),
        ("llamafactory", "lora_ranks", "lora_rank"),
        ("torchtune", "gradient_acumulation_steps", "gradient_accumulation_steps"),
        ("mlx", "max_seq_len", "max_seq_length"),
        ("qeff", "modelname", "model_name"),
    ],
)
def test_unknown_keys_name_the_nearest(tool, key, near):
    with pytest.raises(OptionError, match=f"'{key}' is no key of .* Did you mean '{near}'"):
        translate(TOOLS[tool], {**LEAST[tool][0], key: 1})


@pytest.mark.parametrize(
    ("tool", "more", "said"),
    [
        ("axolotl", {"rl": "grpo"}, "rl='grpo' of axolotl is not available; these are: dpo, kto, orpo"),
        ("axolotl", {"rl": "dpo"}, "type='completion' .* cannot be read for dpo"),
        ("axolotl", {"rl": "dpo", "reward_model": True}, "contradict each other"),
        ("axolotl", {"rl": "kto", "datasets": [{"path": "a", "type": "chatml.icr"}]}, "cannot be read for kto"),
        ("axolotl", {"dpo_label_smoothing": 0.1}, "each method has the loss of its paper"),
        ("axolotl", {"adapter": "lora"}, "add lora_target_linear: true"),
        ("axolotl", {"load_in_4bit": True}, "needs an adapter"),
        ("axolotl", {"learning_rate": None}, "has no learning_rate: add it"),
        ("axolotl", {"val_set_size": 200}, "a number of rows cannot be held out"),
        ("axolotl", {"special_tokens": {"eos_token": "</s>"}}, "set them in the tokenizer's own files"),
        ("axolotl", {"datasets": [{"path": "a", "type": "alpacca"}]}, "type='alpacca' of a data set"),
        ("axolotl", {"datasets": [{"path": "a", "typ": "alpaca"}]}, "no 'typ' .* Did you mean 'type'"),
        ("axolotl", {"datasets": [{"path": "json", "type": "alpaca"}]}, "names no data_files"),
        ("axolotl", {"datasets": [{"path": "a", "type": "alpaca", "split": "train[:5%]"}]}, "a part of a split"),
        ("axolotl", {"datasets": [{"path": "a", "type": "chat_template", "roles": {"user": ["boss"]}}]}, "'boss'"),
        ("axolotl", {"datasets": [{"path": "a", "type": "chat_template", "train_on_eos": "all"}]}, "train_on_eos"),
        ("axolotl", {"excess_length_strategy": "cut"}, "must be one of 'drop', 'truncate', 'raise'"),
        ("llamafactory", {"stage": "ppo"}, "stage='ppo' of LLaMA-Factory is not available; these are: kto, rm"),
        ("llamafactory", {"stage": "dpo", "pref_loss": "ipo"}, "pref_loss='ipo' .* these are: orpo, sigmoid"),
        ("llamafactory", {"stage": "dpo", "pref_ftx": 0.1}, "each method has the loss of its paper"),
        ("llamafactory", {"add_tokens": "<a>,<b>"}, "add resize_vocab: true"),
        ("llamafactory", {"dataset": "a,b", "mix_strategy": "interleave_over", "interleave_probs": "1"}, "2 numbers"),
        ("llamafactory", {"streaming": True, "val_size": 0.1}, "val_size of a stream must be"),
        ("llamafactory", {"finetuning_type": "freeze"}, "must be lora or full"),
        ("llamafactory", {"quantization_bit": 3}, "must be 4 or 8 bits"),
        ("llamafactory", {"pissa_init": True}, "pissa_init is not available"),
        ("llamafactory", {"eval_dataset": "x"}, "set val_size"),
        ("torchtune", {"dataset": {"_component_": "torchtune.datasets.samsum_dataset"}}, "cannot be read"),
        ("torchtune", {"optimizer": {"_component_": "torch.optim.Adagrad", "lr": 1}}, "must be one of AdamW"),
        ("torchtune", {"output_dir": "${nowhere}"}, "leads nowhere"),
        ("torchtune", {"optimizer_in_bwd": True}, "optimizer_in_bwd is not available"),
        ("mlx", {"fine_tune_type": "dora"}, "must be lora or full"),
        ("mlx", {"optimizer": "muon"}, "must be one of 'adam', 'adamw', 'sgd'"),
        ("mlx", {"lr_schedule": {"name": "step_decay"}}, "must be cosine_decay"),
        ("mlx", {"hf_dataset": {"path": "a"}}, "has no train_split"),
        ("mlx", {"resume_adapter_file": "x"}, "continues from its last checkpoint"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_one_sentence(tool, more, said):
    with pytest.raises(OptionError, match=said) as caught:
        translate(TOOLS[tool], {**LEAST[tool][0], **more})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("value", ["word", -3, 2.5, [1], [{}], {"a": 1}, True], ids=str)
def test_any_value_of_any_key_is_read_or_refused(tool, value):
    """Also what is of another type altogether: nothing but our own errors leaves the reader."""
    least = LEAST[tool][0]
    for key in TOOLS[tool].keys:
        section, _, inner = key.rpartition(".")
        changed = {**least, key: value} if not section else {**least, section: {**least.get(section, {}), inner: value}}
        with contextlib.suppress(QEfficientError):
            translate(TOOLS[tool], changed)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", {"dataset_format": "alpaca", "columns": {"instruction": "task", "output": "answer"}}),
        ("hub", {"dataset_name": "some/talks", "dataset_config": "en", "train_split": "small"}),
    ],
)
def test_data_sets_of_llamafactory(folder, name, expected):
    least = {"model_name_or_path": "m", "dataset": name, "dataset_dir": str(folder / "data")}
    assert expected.items() <= translate(TOOLS["llamafactory"], least).options.items()


@pytest.mark.parametrize(
    ("stage", "name", "columns"),
    [
        ("dpo", "pairs", {"instruction": "task", "chosen": "good", "rejected": "bad"}),
        ("rm", "paired_talks", {"conversations": "chat", "chosen": "good", "rejected": "bad"}),
        ("kto", "judged", {"completion": "output", "label": "fine"}),
        ("kto", "judged_talks", {"kto_tag": "fine"}),
    ],
)
def test_judged_answers_of_llamafactory(folder, stage, name, columns):
    least = {"model_name_or_path": "m", "dataset": name, "dataset_dir": str(folder / "data"), "stage": stage}
    found = translate(TOOLS["llamafactory"], least).options
    assert found["method"] == {"rm": "reward"}.get(stage, stage)
    assert found["dataset_format"] == ("unpaired_preference" if stage == "kto" else "preference")
    assert found["columns"] == columns
    split_options(found)


def test_options_of_preference_training():
    """What each tool's spelling of a method's options becomes; another method's options are left out."""
    pairs = {"datasets": [{"path": "d.jsonl", "type": "chatml.intel"}]}
    judged = {"datasets": [{"path": "d.jsonl", "type": "llama3.ultra"}]}
    for tool, more, expected in (
        ("axolotl", {**pairs, "rl": "dpo", "rl_beta": 0.3}, {"method": "dpo", "beta": 0.3}),
        ("axolotl", {**pairs, "rl": "orpo", "orpo_alpha": 0.2}, {"method": "orpo", "beta": 0.2}),
        ("axolotl", {**pairs, "reward_model": True, "rl_beta": 0.3}, {"method": "reward", "beta": None}),
        ("axolotl", {**judged, "rl": "kto", "kto_desirable_weight": 0.5, "kto_undesirable_weight": 2.0},
         {"method": "kto", "desirable_weight": 0.5, "undesirable_weight": 2.0,
          "dataset_format": "unpaired_preference"}),
        ("llamafactory", {"stage": "dpo", "pref_loss": "orpo", "pref_beta": 0.4, "dataset": None},
         {"method": "orpo", "beta": 0.4}),
        ("llamafactory", {"stage": "kto", "kto_chosen_weight": 0.5, "dataset": None},
         {"method": "kto", "desirable_weight": 0.5, "undesirable_weight": None}),
    ):  # fmt: skip
        found = translate(TOOLS[tool], {**LEAST[tool][0], **more}).options
        assert {key: found.get(key) for key in expected} == expected
        split_options({"dataset_name": "d", **found})


def test_new_tokens_streams_and_shares():
    least, tokens = LEAST["llamafactory"][0], ["<a>", "<b>", "<c>"]
    more = {"resize_vocab": True, "add_tokens": "<a>,<b>", "add_special_tokens": "<c>"}
    assert translate(TOOLS["llamafactory"], {**least, **more}).options["new_tokens"] == tokens
    assert translate(TOOLS["axolotl"], {**LEAST["axolotl"][0], "tokens": tokens}).options["new_tokens"] == tokens
    found = translate(TOOLS["llamafactory"], {**least, "streaming": True, "val_size": 20, "max_steps": 3}).options
    assert (found["streaming"], found["shuffle_buffer_size"], found["eval_rows"]) == (True, 16384, 20)
    assert "train_frac" not in found
    split_options(found)
    more = {"dataset": "a,b", "mix_strategy": "interleave_over", "interleave_probs": "0.7,0.3"}
    found = translate(TOOLS["llamafactory"], {**least, **more}).options
    assert [(entry["dataset_name"], entry["weight"]) for entry in found["datasets"]] == [("a", 0.7), ("b", 0.3)]
    assert found["mixing"] == "interleave_over"
    split_options(found)


def test_data_sets_of_axolotl_may_train_on_different_parts():
    sets = [{"path": "a", "type": "alpaca"}, {"path": "b", "type": "completion"}]
    found = translate(TOOLS["axolotl"], {**LEAST["axolotl"][0], "datasets": sets}).options
    assert [entry["train_on"] for entry in found["datasets"]] == ["completion", "all"]
    assert "train_on" not in found
    split_options(found)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("damo", "no data set 'damo'. Did you mean 'demo'"),
        ("pairs", "has pairs of answers, and stage=sft needs single ones"),
    ],
)
def test_data_sets_of_llamafactory_that_cannot_be_read(folder, name, said):
    least = {"model_name_or_path": "m", "dataset": name, "dataset_dir": str(folder / "data")}
    with pytest.raises(OptionError, match=said):
        translate(TOOLS["llamafactory"], least)


@pytest.mark.parametrize(
    ("tool", "more"),
    [
        ("axolotl", {"datasets": [{"path": "a", "type": "alpaca"}, {"path": "b", "type": "alpaca"}]}),
        ("llamafactory", {"dataset": "a,b"}),
        ("torchtune", {"dataset": [LEAST["torchtune"][0]["dataset"]] * 2}),
        ("mlx", {"hf_dataset": [{"path": "a", "train_split": "train"}, {"path": "b", "train_split": "train"}]}),
    ],
)
def test_several_data_sets(tool, more):
    """A list where a run can mix data sets; otherwise a sentence, and never the first of them alone."""
    written = {**LEAST[tool][0], **more}
    if "datasets" in PLACES["QEffConfig"]:
        assert len(translate(TOOLS[tool], written).options["datasets"]) == 2
        return
    with pytest.raises(OptionError, match="has 2 data sets, and a run here has one: keep the first"):
        translate(TOOLS[tool], written)


# ------------------------------------------------------------------------------------------ recognition, tables


def test_our_own_files_are_ours(tmp_path):
    for file in (ROOT / "configs").glob("*.yaml"):
        assert recognise(read_layers(file)) is None, file
    ours = tmp_path / "run.yaml"
    ours.write_text("model_name_or_path: m\ndataset: d.jsonl\nlora_config: {lora_rank: 4}\ncutoff_len: 64\n")
    assert read_options(ours) == (read_layers(ours), [])
    # One key of another tool in a file of ours is a mistake, and told as one.
    ours.write_text("model_id: m\ndataset: d.jsonl\nadapter: lora\nsample_packing: true\n")
    with pytest.raises(OptionError, match="no option 'adapter'"):
        split_options(read_options(ours)[0])


def test_keys_of_two_tools_are_nobodys():
    assert recognise({"adapter": "lora", "sample_packing": True, "finetuning_type": "lora"}) is None
    assert recognise({"adapter": "lora"}) is None


def test_tables_are_consistent():
    """Every option exists, every default and mark is a key, and a mark is neither ours nor another tool's."""
    ours = {name for place in ("QEffConfig", "QEffTrainingArgs") for name in PLACES[place]}
    for tool in TOOLS.values():
        assert set(tool.same.values()) <= ours, tool.name
        assert set(tool.defaults) <= {*tool.same, *tool.handled}, tool.name
        groups = (tool.same, tool.handled, tool.no_effect, tool.refused)
        assert len(tool.keys) == sum(map(len, groups)), f"a key of {tool.name} stands twice"
        for other in TOOLS.values():
            assert other is tool or not tool.marks & other.marks
        assert not tool.marks & ours, tool.marks & ours
        inner = {key.rpartition(".")[2] for key in tool.keys} | {key.partition(".")[0] for key in tool.keys}
        assert tool.marks <= inner | {"preproc_file"}, tool.name


def test_the_page_is_up_to_date():
    page = ROOT / "docs" / "migration.md"
    assert page.read_text(encoding="utf-8") == tables.filled(page.read_text(encoding="utf-8")), "run `make docs`"


def test_the_page_has_every_key():
    text = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    for tool in TOOLS.values():
        part = text.split(f"<!-- table {tool.name} -->")[1].split("<!-- end -->")[0]
        # Hugging Face's names are one row of LLaMA-Factory's table.
        missing = [key for key in tool.keys if f"`{key}`" not in part and tool.same.get(key) != key]
        assert not missing, f"{tool.name}: {missing}"


# ------------------------------------------------------------------------------------------ whole runs


def run(*words: object) -> tuple[str, str]:
    result = CliRunner().invoke(app, ["finetune", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def shared_words(tiny_checkpoint: Path, output: Path) -> list[str]:
    """A tiny model in the place of the file's, few steps, no picture."""
    return [
        f"model_id={tiny_checkpoint}", f"output_dir={output}", "max_steps=2", "max_ctx_len=64", "validate=false",
        "plot=false", "chat_template=plain", "gradient_accumulation_steps=1",
    ]  # fmt: skip


def test_a_run_of_a_file_of_llamafactory(folder, tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    _, said = run(folder / "llamafactory.yaml", *shared_words(tiny_checkpoint, out), "eval_strategy=no")
    assert "was read as a file of LLaMA-Factory 0.9.6" in said
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["target_modules"]) == (8, 16, ["q_proj", "v_proj"])
    report = json.loads((out / "data_report.json").read_text())
    assert (report["splits"]["train"]["rows"], report["splits"]["eval"]["rows"]) == (8, 2)


@pytest.mark.parametrize(("name", "train", "held"), [("mlx.yaml", 12, 3), ("torchtune.yaml", 12, 0)])
def test_the_data_of(name, train, held, folder, tiny_checkpoint, tmp_path):
    """Read as the file says, up to where training would begin."""
    file = folder / name
    text = file.read_text().replace("pairs.json", str(folder / "data" / "train.jsonl"))
    file.write_text(text.replace("question", "prompt").replace("answer", "completion"))
    options, _ = read_options(file, model=str(tiny_checkpoint))
    changed = {"chat_template": "plain", "max_ctx_len": 64, "output_dir": str(tmp_path / "out"), "dry_run": True}
    QEfficient(*split_options({**options, **changed})).refine(load=False)
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())["splits"]
    assert {split: part["rows"] for split, part in report.items()} == {
        "train": train,
        **({"eval": held} if held else {}),
    }
    answers_only = report["train"]["trained_tokens"] < report["train"]["tokens"] - train
    assert answers_only == (name == "torchtune.yaml"), "mlx-lm trains prompts, too"


def test_a_run_of_a_custom_dataset_of_efficient_transformers(folder, tiny_checkpoint, tmp_path):
    code = folder / "my_rows.py"
    code.write_text(
        "def make_rows(dataset_config, tokenizer, split, context_length=None):\n"
        "    ids = tokenizer(dataset_config.disc_style)['input_ids']\n"
        "    row = {'input_ids': ids, 'attention_mask': [1] * len(ids), 'labels': ids}\n"
        "    return [row] * {'train': 6, 'validation': 2}[split]\n"
    )
    file = folder / "qeff.json"
    file.write_text(file.read_text().replace("my_rows.py", str(code)))
    run(file, *shared_words(tiny_checkpoint, tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())["splits"]
    assert (report["train"]["rows"], report["eval"]["rows"]) == (6, 2)
    rates = [json.loads(line) for line in (tmp_path / "out" / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert rates[1]["learning_rate"] == pytest.approx(3e-4)


def test_the_translation_as_a_file(folder, tmp_path):
    """What --write-config writes is a file of ours that stands for the same options, and nothing is run."""
    written = tmp_path / "ours.yaml"
    shown, said = run(folder / "axolotl.yaml", "--write-config", written, "learning_rate=1e-3")
    assert shown.strip() == str(written)
    assert "bf16 has no effect" in said
    expected = {**read_options(folder / "axolotl.yaml")[0], "learning_rate": 1e-3}
    assert yaml.safe_load(written.read_text()) == expected
    assert read_options(written) == (expected, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*(file.name for file in FILES.iterdir()), "data", "ours.yaml"]
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--from", "axolotl", "x.yaml"], "no file"), (["--from", "axolotl"], "name the file"),
     (["--from", "axolot", "FILE"], "Did you mean 'axolotl'")],
)  # fmt: skip
def test_bad_commands(folder, words, said):
    words = [str(folder / "axolotl.yaml") if word == "FILE" else word for word in words]
    result = CliRunner().invoke(app, ["finetune", *words])
    assert result.exit_code == 2
    assert said in result.stderr
