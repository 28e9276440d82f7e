"""Command lines as efficient-transformers has them: dashes or underscores, nothing passed on unseen."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from QEfficient.errors import InputError, OptionError
from QEfficient.lines import read_lines
from QEfficient.suggest import did_you_mean
from QEfficient.targets.options import CompileOptions

#: Flags of efficient-transformers for what this version does not have -> what that is.
NOT_HERE = {
    "--image-url": "image input",
    "--image-path": "image input",
    "--img-size": "image input",
    "--custom-io-file-path": "a custom IO file",
    "--dynamo": "a choice of exporter",
}


class CloudParser(argparse.ArgumentParser):
    """Parses as argparse does, but mistakes are an `OptionError` of one sentence, the nearest flag in it."""

    def __init__(self, name: str, description: str) -> None:
        super().__init__(prog=f"python -m QEfficient.cloud.{name}", description=description, allow_abbrev=False)
        self.add_argument("-v", "--verbose", action="store_true", help="show the Python traceback of an error")

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message} (see {self.prog} --help).")

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parses a command line; raises OptionError."""
        words = [_with_dashes(word) for word in arguments]
        known = [flag for action in self._actions for flag in action.option_strings]
        for word in words:
            flag = word.partition("=")[0]
            if flag in NOT_HERE:
                raise OptionError(
                    f"{flag} is not available: this version does not have {NOT_HERE[flag]}; leave it out."
                )
        values, rest = self.parse_known_args(words)
        for word in rest:
            flag = word.partition("=")[0]
            if flag.startswith("-"):
                # Upstream hands such a flag to its compiler, where a misspelling goes unnoticed.
                raise OptionError(f"there is no flag {flag}.{did_you_mean(flag, known)}")
            raise OptionError(f"{word!r} belongs to no flag: quote a value that contains spaces.")
        return values


def verbose(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for tracebacks; known before it is parsed, for mistakes in it."""
    return "-v" in arguments or "--verbose" in arguments


def add_model(parser: CloudParser, required: bool = True) -> None:
    """Which checkpoint, and how to get it."""
    parser.add_argument("--model-name", required=required, help="hub id such as org/name, or a directory")
    parser.add_argument("--local-model-dir", type=Path, help="directory to load instead of asking the hub")
    parser.add_argument("--cache-dir", type=Path, help="where the hub's downloads are kept")
    parser.add_argument("--hf-token", help="token for gated and private models")
    parser.add_argument("--trust-remote-code", action="store_true", help="allow the checkpoint's own code to run")


def add_prompts(parser: CloudParser) -> None:
    """What to generate from."""
    parser.add_argument("--prompt", help="text to continue; several are separated by |")
    parser.add_argument("--prompts-txt-file-path", type=Path, help="file with one prompt per line")
    parser.add_argument("--generation-len", type=positive, help="most tokens per prompt; to the end of the context")


def add_compile(parser: CloudParser) -> None:
    """Shapes, and the options that only a Cloud AI target acts on. No defaults of our own but the two lengths."""
    parser.add_argument("--target", default="host", help="where the package runs (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, help="rows per call (default: any number)")
    parser.add_argument("--prompt-len", type=positive, default=32, help="prompt tokens per step (default: %(default)s)")
    parser.add_argument(
        "--ctx-len", type=positive, default=128, help="prompt and answer in tokens (default: %(default)s)"
    )
    parser.add_argument("--full-batch-size", type=positive, help="slots for continuous batching")
    add_device_group(parser)
    parser.add_argument(
        "--num-cores", "--aic-num-cores", type=positive, help="cores of the accelerator (Cloud AI only)"
    )
    for flags, text in (
        (("--mxfp6-matmul", "--mxfp6"), "weights as MXFP6"),
        (("--mxint8-kv-cache", "--mxint8"), "KV cache as MXINT8"),
        (("--aic-enable-depth-first",), "schedule depth first"),
        (("--allow-mxint8-mdp-io",), "MXINT8 between accelerators"),
        (("--use-onnx-subfunctions",), "repeated layers as functions of the graph"),
        (("--ccl-enabled",), "several context lengths to compute with"),
    ):
        parser.add_argument(*flags, action="store_true", help=f"{text} (Cloud AI only)")
    for phase in ("prefill", "decode"):
        parser.add_argument(
            f"--comp-ctx-lengths-{phase}",
            type=lengths,
            metavar="N,N",
            help=f"these lengths for {phase} (Cloud AI only)",
        )
    parser.add_argument(
        "--enable-qnn",
        nargs="?",
        const=True,
        metavar="CONFIG",
        help="the target qnn, with a configuration file of yours",
    )
    parser.add_argument("--mos", type=int, help="effort to reduce on-chip memory; -1 is unset (Cloud AI only)")


def add_device_group(parser: CloudParser) -> None:
    parser.add_argument("--device-group", metavar="[0,1]", help="ids of the accelerators (Cloud AI only)")


def compile_options(values: argparse.Namespace) -> CompileOptions:
    """The options a command line asks for; OptionError when they contradict each other."""
    from QEfficient.cli.compile_flags import device_ids

    qnn = values.enable_qnn is not None
    if qnn and values.target not in ("host", "qnn"):
        raise OptionError(f"--enable-qnn and --target {values.target} contradict each other: leave one of them out.")
    return CompileOptions.from_kwargs(
        target="qnn" if qnn else values.target,
        qnn_config=values.enable_qnn if isinstance(values.enable_qnn, str) else None,
        ccl_enabled=values.ccl_enabled,
        comp_ctx_lengths_prefill=values.comp_ctx_lengths_prefill,
        comp_ctx_lengths_decode=values.comp_ctx_lengths_decode,
        use_onnx_subfunctions=values.use_onnx_subfunctions,
        batch_size=values.batch_size,
        prefill_seq_len=values.prompt_len,
        ctx_len=values.ctx_len,
        full_batch_size=values.full_batch_size,
        device_group=None if values.device_group is None else device_ids(values.device_group),
        num_cores=values.num_cores,
        mxfp6_matmul=values.mxfp6_matmul,
        mxint8_kv_cache=values.mxint8_kv_cache,
        aic_enable_depth_first=values.aic_enable_depth_first,
        allow_mxint8_mdp_io=values.allow_mxint8_mdp_io,
        # efficient-transformers writes -1 for "not given".
        mos=None if values.mos == -1 else values.mos,
    )


def prompts(values: argparse.Namespace) -> list[str]:
    """The prompts a command line names; InputError when there is none or an empty one."""
    from QEfficient.cli.common import check_texts

    if (values.prompt is None) == (values.prompts_txt_file_path is None):
        raise InputError("pass either --prompt or --prompts-txt-file-path.")
    if values.prompt is None:
        return read_lines(values.prompts_txt_file_path)
    texts: list[str] = values.prompt.split("|")
    check_texts("prompt", texts)
    return texts


def _with_dashes(word: str) -> str:
    """``--model_name=a_b`` -> ``--model-name=a_b``."""
    if not word.startswith("--"):
        return word
    flag, separator, value = word.partition("=")
    return flag.replace("_", "-") + separator + value


def lengths(text: str) -> list[int]:
    """Numbers with commas between them, for argparse."""
    return [positive(part.strip()) for part in text.split(",")]


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)
