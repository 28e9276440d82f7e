"""The stand-ins of ``qairt-converter`` and ``qnn-context-binary-generator`` (contract, c.6)."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from stand_in import files
from stand_in.container import MARK
from stand_in.errors import Refused, need
from stand_in.graph import Graph

#: flag -> whether it takes a value.
CONVERTER = {
    "--input_network": True, "--output_path": True, "--config": True, "--float_bias_bitwidth": True,
    "--float_bitwidth": True, "--preserve_io_datatype": False, "--onnx_skip_simplification": False,
    "--target_backend": True, "--onnx_define_symbol": True, "--dump_config_template": True,
    "--onnx_defer_loading": False,
}  # fmt: skip
GENERATOR = {
    "--binary_file": True, "--backend_binary": True, "--output_dir": True, "--backend": True, "--dlc_path": True,
    "--config_file": True, "--data_format_config": True, "--log_level": True,
}  # fmt: skip
TYPES = {"int64", "int32", "float32", "float16", "uint8", "bool"}
BACKEND = {
    "compiler_compilation_target": str, "compiler_convert_to_FP16": bool, "compiler_do_DDR_to_multicast": bool,
    "compiler_enable_depth_first": bool, "compiler_hardware_version": str, "compiler_max_out_channel_split": str,
    "compiler_mdp_load_partition_config": str, "compiler_mxfp6_matmul_weights": bool, "compiler_mxint8_mdp_io": bool,
    "compiler_num_of_cores": int, "compiler_perfWarnings": bool, "compiler_printDDRStats": bool,
    "compiler_printPerfMetrics": bool, "compiler_retained_state": bool, "compiler_stat_level": int,
    "compiler_stats_batch_size": int, "compiler_time_passes": bool, "graph_names": list,
}  # fmt: skip
OPTIONAL = frozenset({"compiler_max_out_channel_split", "compiler_mdp_load_partition_config"})


def read(argv: Sequence[str], known: dict[str, bool], required: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    words = list(argv)
    while words:
        flag = words.pop(0)
        need(flag in known, f"unrecognized arguments: {flag}")
        need(flag not in found, f"argument {flag}: given twice")
        if known[flag]:
            need(words and not words[0].startswith("--"), f"argument {flag}: expected one argument")
        found[flag] = words.pop(0) if known[flag] else ""
    missing = [flag for flag in required if flag not in found]
    need(not missing, f"the following arguments are required: {', '.join(missing)}")
    return found


def convert(argv: Sequence[str], directory: Path) -> None:
    """ONNX and IO configuration to a marked DLC that remembers the graph's names and sizes."""
    given = read(argv, CONVERTER, ("--input_network", "--output_path", "--config", "--target_backend"))
    need(given.get("--float_bitwidth", "32") in ("16", "32"), "argument --float_bitwidth: invalid choice")
    need(given.get("--float_bias_bitwidth", "0") in ("0", "16", "32"), "argument --float_bias_bitwidth: invalid choice")
    need(given["--target_backend"] == "AIC", "argument --target_backend: invalid choice")
    graph = Graph(directory / given["--input_network"], most_opset=21, most_ir=10)
    path = directory / given["--config"]
    inside, outside = "Input Tensor Configuration", "Output Tensor Configuration"
    body = files.keys(files.parsed_yaml(path), {inside, outside}, where=path.name)
    shapes: dict[str, list[list[int]]] = {}
    for part, wanted in ((inside, list(graph.inputs)), (outside, [v.name for v in graph.model.graph.output])):
        need(isinstance(body[part], list), f"{path.name}: {part} is no list")
        names = [files.keys(e, {"Name", "Desired Model Parameters"}, where=path.name)["Name"] for e in body[part]]
        need(names == wanted, f"{path.name}: names differ from the network's {part.split()[0].lower()}s")
        for entry in body[part]:
            parameters = entry["Desired Model Parameters"]
            shape = {"Shape"} if part == inside else set()
            files.keys(parameters, {"DataType"} | shape, where=path.name)
            need(parameters["DataType"] in TYPES, f"{path.name}: DataType {parameters['DataType']}")
            whole = graph.types[entry["Name"]].startswith("int")
            need(whole == parameters["DataType"].startswith("int"), f"{path.name}: {entry['Name']} changes its kind")
            if shape:
                shapes[entry["Name"]] = sizes(str(parameters["Shape"]), path.name)
    count = max(len(found) for found in shapes.values())
    need(count <= 2, f"{path.name}: more than two shapes")
    for number in range(count):
        symbols: dict[str, int] = {}
        for name, found in shapes.items():
            dims = graph.inputs[name].shape.dim
            need(len(found) in (1, count), f"{path.name}: {name} has {len(found)} shapes")
            shape = found[min(number, len(found) - 1)]
            need(len(shape) == len(dims), f"{path.name}: {name} has another rank")
            for size, dim in zip(shape, dims, strict=True):
                known = symbols.setdefault(dim.dim_param, size) if dim.dim_param else dim.dim_value
                need(size == known, f"{path.name}: a size of {name}")
        graph.run(symbols)
    facts = {"graphs": count, "states": [*graph.states, *graph.states.values()]}
    (directory / given["--output_path"]).write_bytes(MARK + b"\n" + json.dumps(facts).encode())


def sizes(shape: str, where: str) -> list[list[int]]:
    """``(1, 32), (1, 1)`` -> [[1, 32], [1, 1]]."""
    need(re.fullmatch(r"\([\d, ]+\)(, \([\d, ]+\))*", shape), f"{where}: Shape {shape}")
    return [[int(n) for n in re.findall(r"\d+", part)] for part in re.findall(r"\(([^)]*)\)", shape)]


def generate(argv: Sequence[str], directory: Path, *, twice: bool = False) -> None:
    """DLC and backend configuration to a marked program."""
    required = [flag for flag in GENERATOR if flag not in ("--data_format_config", "--log_level")]
    given = read(argv, GENERATOR, required)
    need(given.get("--log_level", "error") in ("error", "warn", "info", "verbose", "debug"), "invalid --log_level")
    need(Path(given["--backend"]).is_file(), f"unable to load backend {given['--backend']}")
    head, _, body = (
        (directory / given["--dlc_path"]).read_bytes().partition(b"\n")
        if (directory / given["--dlc_path"]).is_file()
        else (b"", b"", b"")
    )
    need(head == MARK, f"unable to read {given['--dlc_path']}")
    dlc = json.loads(body)
    config = files.keys(files.parsed_json(directory / given["--config_file"]), {"backend_extensions"}, where="config")
    where = files.keys(config["backend_extensions"], {"config_file_path", "shared_library_path"}, where="config")
    need(Path(where["shared_library_path"]).is_file(), f"unable to load {where['shared_library_path']}")
    content = files.parsed_json(directory / where["config_file_path"])
    backend = files.keys(content, set(BACKEND) - OPTIONAL, OPTIONAL, "backend")
    for key, setting in backend.items():
        need(type(setting) is BACKEND[key], f"backend: {key} must be {BACKEND[key].__name__}")
    need(1 <= backend["compiler_num_of_cores"] <= 16, "backend: compiler_num_of_cores")
    names = ["model"] if dlc["graphs"] == 1 else ["model_configuration_1", "model_configuration_2"]
    need(backend["graph_names"] == names, f"backend: graph_names must be {names}")
    if "compiler_mdp_load_partition_config" in backend:
        split = files.parsed_json(directory / backend["compiler_mdp_load_partition_config"])
        files.keys(split, {"connections", "partitions"}, where="partition")
    if "--data_format_config" in given:
        formats = files.keys(files.parsed_json(directory / given["--data_format_config"]), {"graphs"}, where="formats")
        need([g.get("graph_name") for g in formats["graphs"]] == names, "formats: graph names")
        for entry in formats["graphs"]:
            for tensor in files.keys(entry, {"graph_name", "tensors"}, where="formats")["tensors"]:
                files.keys(tensor, {"tensor_name", "dataFormat"}, where="formats")
                need(tensor["tensor_name"] in dlc["states"], f"formats: {tensor['tensor_name']} is no state")
                need(tensor["dataFormat"] == "QNN_TENSOR_DATA_FORMAT_MX", "formats: dataFormat")
    place = directory / given["--output_dir"]
    place.mkdir(parents=True, exist_ok=True)
    name = given["--backend_binary"] + (".bin" if twice else "")
    (place / name).write_bytes(MARK + b"\n" + json.dumps(dlc).encode())


def main(tool: str, *, twice: bool = False) -> int:
    try:
        if tool == "qairt-converter":
            convert(sys.argv[1:], Path.cwd())
        else:
            generate(sys.argv[1:], Path.cwd(), twice=twice)
    except Refused as error:
        print(f"ERROR - {error}", file=sys.stderr)
        return error.code
    return 0
