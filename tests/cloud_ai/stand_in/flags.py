"""The documented flags of the Cloud AI compiler (contract, tables b.1 and b.2) and how a command line is read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from stand_in.errors import Refused, need

SWITCH, TEXT = r"", r".+"
INT, FLOAT = r"-?\d+", r"\d+(\.\d+)?"
#: flag -> pattern of its value; the empty pattern is a switch.
FLAGS: dict[str, str] = {
    # b.1
    "-aic-hw": SWITCH, "-aic-hw-version": r"2\.0|ai100|ai200", "-m": TEXT, "-model": TEXT,
    "-retained-state": r"|true", "-convert-to-fp16": SWITCH, "-mxfp6-matmul": SWITCH,
    "-aic-num-cores": r"[1-9]|1[0-6]", "-network-specialization-config": TEXT, "-custom-IO-list-file": TEXT,
    "-mdp-load-partition-config": TEXT, "-sub-functions": SWITCH, "-aic-binary-dir": TEXT,
    # b.2
    "-mos": r"-1|1|2|4|8|1[0-6]|14", "-ols": r"1|2|4|8|16", "-mdts-mos": r"[1-9]\d*",
    "-aic-enable-depth-first": SWITCH, "-aic-depth-first-mem": r"[89]|[12]\d|3[0-2]", "-allow-mxint8-mdp-io": SWITCH,
    "-mdp-dump-partition-config": TEXT, "-node-precision-info": TEXT,
    "-keep-original-precision-for-nodes": TEXT, "-execute-nodes-in-fp16": TEXT, "-multicast-weights": SWITCH,
    "-allocator-dealloc-delay": r"\d|10", "-size-split-granularity": r"\d{3,4}",
    "-vtcm-working-set-limit-ratio": r"0(\.\d+)?|1(\.0+)?", "-sdp-cluster-sizes": TEXT, "-combine-inputs": TEXT,
    "-combine-outputs": TEXT, "-compile-threads": r"[1-9]\d*", "-use-producer-dma": TEXT, "-io-crc": SWITCH,
    "-always-expand-onnx-functions": SWITCH, "-onnx-define-symbol": r"\w+,[1-9]\d*", "-batchsize": r"[1-9]\d*",
    "-stats-batchsize": r"[1-9]\d*", "-stats-level": r"\d{1,3}", "-ddr-stats": SWITCH, "-aic-pmu-recipe": TEXT,
    "-aic-profiling-type": r"stats|trace|latency", "-time-passes": SWITCH, "-aic-perf-warnings": SWITCH,
    "-aic-perf-metrics": SWITCH, "-version-extended": SWITCH, "-v": SWITCH, "-vv": SWITCH, "-vvv": SWITCH,
    "-compile-only": SWITCH, "-split-retained-state-io": SWITCH, "-user-tiled": SWITCH, "-io-encrypt": TEXT,
    "-qpc-crc": SWITCH,
}  # fmt: skip
REPEATABLE = {"-onnx-define-symbol"}


def read(argv: Sequence[str]) -> dict[str, list[str]]:
    """Flag -> its values, or a refusal that names the nearest known flag."""
    found: dict[str, list[str]] = {}
    for word in argv:
        flag, equals, value = word.partition("=")
        if flag not in FLAGS:
            near = difflib.get_close_matches(flag, FLAGS, 1)
            raise Refused(f"Unknown command line argument '{word}'. Did you mean '{near[0] if near else '-h'}'?")
        pattern = FLAGS[flag]
        if not equals:
            need(re.fullmatch(pattern, ""), f"for the {flag} option: requires a value!")
        else:
            need(value and re.fullmatch(pattern, value), f"for the {flag} option: '{value}' value invalid!")
        need(flag not in found or flag in REPEATABLE, f"for the {flag} option: may only occur zero or one times!")
        found.setdefault(flag, []).append(value)
    return found
