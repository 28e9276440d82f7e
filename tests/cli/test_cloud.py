"""``python -m QEfficient.cloud.…``: efficient-transformers' command lines do the same here, or say why not."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import greedy_reference, save_tiny, tiny_causal_lm, tiny_tokenizer
from transformers import AutoTokenizer

from QEfficient import QEFFAutoModelForCausalLM
from QEfficient.cli.cloud_flags import CloudFlags, cloud_values
from QEfficient.cloud.arguments import NOT_HERE, CloudParser, add_compile, compile_options
from QEfficient.errors import OptionError
from QEfficient.targets.options import CompileOptions

PROMPTS = ("the other", "an island in the sea", "he")
LENGTHS = ("--prompt-len", "8", "--ctx-len", "64")


def run(program: str, *arguments: object) -> None:
    importlib.import_module(f"QEfficient.cloud.{program}").main([str(a) for a in arguments])


def refused(capsys: pytest.CaptureFixture[str], program: str, *arguments: object) -> str:
    """The one sentence on stderr, with exit code 2 and nothing on stdout."""
    with pytest.raises(SystemExit, match=r"^2$"):
        run(program, *arguments)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("error: ")
    return captured.err


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # --cache-dir of these programs is where the hub's downloads go, as upstream.
    monkeypatch.setenv("QEFF_HOME", str(home))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    return tiny_tokenizer(save_tiny(tiny_causal_lm("llama"), path))


def shown(checkpoint: Path, prompts: tuple[str, ...], count: int) -> str:
    """What the programs print: Hugging Face's greedy text of each prompt."""
    model, tokenizer = tiny_causal_lm("llama"), AutoTokenizer.from_pretrained(checkpoint)
    texts = [
        tokenizer.decode(greedy_reference(model, tokenizer(p).input_ids, count)[0], skip_special_tokens=True)
        for p in prompts
    ]
    if len(texts) == 1:
        return f"{texts[0]}\n"
    return "".join(f"[{n}] {p}\n{t}\n\n" for n, (p, t) in enumerate(zip(prompts, texts, strict=True), 1))


def test_infer_with_dashes_or_underscores(checkpoint, capsys):
    for flags in (
        ("--model-name", checkpoint, "--prompt", "|".join(PROMPTS), "--generation-len", 5, *LENGTHS, "--num-cores", 14),
        (f"--model_name={checkpoint}", "--prompt", "|".join(PROMPTS), "--generation_len=5", "--prompt_len", 8,
         "--ctx_len=64", "--num_cores", 14, "--batch_size", 1, "--trust_remote_code", "--mos", -1),
    ):  # fmt: skip
        run("infer", *flags)
        assert capsys.readouterr().out == shown(checkpoint, PROMPTS, 5)


def test_infer_with_slots_and_prompts_from_a_file(checkpoint, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    run("infer", "--model-name", "org/unused", "--local-model-dir", checkpoint, "--prompts-txt-file-path", file,
        "--full-batch-size", 2, "--generation-len", 4, *LENGTHS)  # fmt: skip
    assert capsys.readouterr().out == shown(checkpoint, PROMPTS, 4)


def test_hardware_flags_reach_the_package_and_share_its_key(checkpoint, home):
    flags = (
        "--mxfp6",
        "--mxint8",
        "--mos",
        2,
        "--aic-enable-depth-first",
        "--device-group",
        "[0,1]",
        "--num-cores",
        16,
    )
    run("infer", "--model-name", checkpoint, "--prompt", "he", "--generation-len", 1, *LENGTHS, *flags)
    before = packages(home)
    model = QEFFAutoModelForCausalLM.from_pretrained(checkpoint)
    package = model.compile(
        ctx_len=64,
        prefill_seq_len=8,
        mxfp6_matmul=True,
        mxint8_kv_cache=True,
        mos=2,
        aic_enable_depth_first=True,
        device_group=[0, 1],
        num_cores=16,
    )
    assert package in before
    assert packages(home) == before
    options = json.loads((package / "manifest.json").read_text())["options"]
    assert (options["mxfp6_matmul"], options["mos"], options["device_group"]) == (True, 2, [0, 1])


def packages(home: Path) -> set[Path]:
    return {path for path in (home / "packages").iterdir() if path.is_dir()}


def test_export_compile_execute(checkpoint, tmp_path, capsys):
    run("export", "--model-name", checkpoint)
    onnx = capsys.readouterr().out.strip()
    run(
        "compile",
        "--onnx-path",
        onnx,
        "--qpc-path",
        tmp_path / "qpc",
        "--num-cores",
        16,
        "--device_group",
        "[0]",
        *LENGTHS,
    )
    assert capsys.readouterr().out.strip() == str(tmp_path / "qpc")
    run(
        "execute", "--model-name", "gpt2", "--qpc_path", tmp_path / "qpc", "--prompt", PROMPTS[0], "--generation-len", 6
    )
    captured = capsys.readouterr()
    assert captured.out == shown(checkpoint, PROMPTS[:1], 6)
    assert "note: without effect" in captured.err
    assert "--model-name" in captured.err


def test_unknown_flags_are_refused_and_never_passed_on(checkpoint, capsys):
    base = ("--model-name", checkpoint, "--prompt", "x")
    assert "'--prompt-len'" in refused(capsys, "infer", *base, "--promt-len", 32)
    assert "'--mxfp6'" in refused(capsys, "infer", *base, "--mxfp")
    assert "--convert-to-fp16" in refused(capsys, "infer", *base, "--convert_to_fp16")
    assert "belongs to no flag" in refused(capsys, "infer", *base, "stray")


@pytest.mark.parametrize("flag", NOT_HERE)
def test_flags_of_features_that_are_not_here(checkpoint, capsys, flag):
    for spelling in (flag, flag.replace("-", "_").replace("__", "--", 1), f"{flag}=x"):
        sentence = refused(capsys, "infer", "--model-name", checkpoint, "--prompt", "x", spelling)
        assert f"{flag} is not available" in sentence


def asked(*arguments: object) -> CompileOptions:
    parser = CloudParser("infer", "")
    add_compile(parser)
    return compile_options(parser.read([str(a) for a in arguments]))


def test_options_of_the_card(tmp_path):
    found = asked(
        "--target", "qaic", "--ccl_enabled", "--comp-ctx-lengths-prefill", "64,128", "--comp_ctx_lengths_decode=128",
        "--use-onnx-subfunctions", "--num-cores", 14, "--mxint8",
    )  # fmt: skip
    assert (found.target, found.ccl_enabled, found.use_onnx_subfunctions, found.num_cores) == ("qaic", True, True, 14)
    assert (found.comp_ctx_lengths_prefill, found.comp_ctx_lengths_decode) == ((64, 128), (128,))
    assert found.mxint8_kv_cache
    assert (asked().target, asked("--enable-qnn").target, asked("--enable_qnn").qnn_config) == ("host", "qnn", None)
    (tmp_path / "qnn.json").write_text('{"converter_args_extension": "--float_bitwidth 16"}')
    assert asked("--enable-qnn", tmp_path / "qnn.json").qnn_config == {
        "converter_args_extension": "--float_bitwidth 16"
    }


def test_lengths_of_the_other_command_line():
    """`qefficient compile` takes them in one word, as here, or one by one."""
    given = CloudFlags(comp_ctx_lengths_prefill=["64,128", "256"])
    assert cloud_values(given)["comp_ctx_lengths_prefill"] == (64, 128, 256)
    with pytest.raises(OptionError, match="--comp-ctx-lengths-decode takes whole numbers, got '64,,1'"):
        cloud_values(CloudFlags(comp_ctx_lengths_decode=["64,,1"]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--comp-ctx-lengths-decode", "64,x"), "'x' is not an integer of at least 1"),
        (("--comp-ctx-lengths-decode", ""), "'' is not an integer"),
        (("--enable-qnn", "--target", "qaic"), "contradict each other"),
        (("--enable-qnn", "/nothing/qnn.json"), "qnn.json"),
    ],
)
def test_options_of_the_card_that_are_wrong(words, said, capsys):
    assert said in refused(capsys, "infer", "--model-name", "gpt2", "--prompt", "x", *words)


def test_bad_values(checkpoint, tmp_path, capsys):
    base = ("--model-name", checkpoint)
    assert "--model-name" in refused(capsys, "infer", "--prompt", "x")
    assert "either --prompt or" in refused(capsys, "infer", *base)
    assert "prompt 2 is empty" in refused(capsys, "infer", *base, "--prompt", "a||b")
    assert "'many' is not an integer" in refused(capsys, "infer", *base, "--prompt", "x", "--ctx-len", "many")
    assert "'0' is not" in refused(capsys, "infer", *base, "--prompt", "x", "--batch-size", 0)
    assert "prefill_seq_len=32" in refused(capsys, "infer", *base, "--prompt", "x", "--ctx-len", 16)
    assert "does not exist" in refused(capsys, "export", "--model-name", tmp_path / "nothing")
    assert "does not exist" in refused(capsys, "compile", "--onnx-path", tmp_path / "model.onnx")
    assert "manifest.json" in refused(capsys, "execute", "--qpc-path", tmp_path, "--prompt", "x")
    assert "'hots'" in refused(capsys, "infer", *base, "--prompt", "x", "--target", "hots")


def test_verbose_shows_the_traceback(capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        run("export", "--model-name", "/nothing", "-v")
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("program", ["infer", "export", "compile", "execute"])
def test_runs_as_a_module_and_helps(program):
    done = subprocess.run(
        [sys.executable, "-m", f"QEfficient.cloud.{program}", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--" in done.stdout
    assert done.stderr == ""
