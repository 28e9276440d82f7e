"""The files beside the graph, each against its schema (contract, part c)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from stand_in.errors import Refused, need
from stand_in.graph import Graph

PRECISIONS = {"float", "float16", "bfloat16", "mxint8"}
#: A symbol that no input uses and that is tolerated all the same.
TOLERATED = {"full_batch_exec_size"}


def text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise Refused(f"Unable to open file {path}") from None


def parsed_json(path: Path) -> Any:
    try:
        return json.loads(text(path))
    except ValueError as error:
        raise Refused(f"[json.exception.parse_error.101] {path.name}: {error}") from None


def parsed_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(text(path))
    except yaml.YAMLError as error:
        raise Refused(f"{path.name}: {error}") from None


def keys(
    entry: object, required: set[str], optional: frozenset[str] = frozenset(), where: str = ""
) -> Mapping[str, Any]:
    need(isinstance(entry, dict), f"{where}: type must be object")
    assert isinstance(entry, dict)
    need(required <= set(entry), f"{where}: missing {sorted(required - set(entry))}")
    need(set(entry) <= required | optional, f"{where}: unexpected {sorted(set(entry) - required - optional)}")
    return entry


def specializations(path: Path, graph: Graph, *, knows_names: bool) -> list[dict[str, int]]:
    """The sizes of each entry; every symbol of the inputs has one, and nothing else does."""
    body = keys(parsed_json(path), {"specializations"}, where=path.name)["specializations"]
    need(isinstance(body, list) and body, f"{path.name}: specializations must be a non-empty array")
    named = [isinstance(entry, dict) and "symbols" in entry for entry in body]
    need(all(named) or not any(named), f"{path.name}: entries of two forms")
    if all(named) and not knows_names:
        raise Refused("[json.exception.type_error.302] type must be string, but is object", 255)
    entries, names = [], []
    for entry in body:
        if all(named):
            keys(entry, {"name", "symbols"}, where=path.name)
            names.append(entry["name"])
            need(isinstance(entry["name"], str) and entry["name"], f"{path.name}: name must be string")
        sizes = entry["symbols"] if all(named) else entry
        need(isinstance(sizes, dict) and sizes, f"{path.name}: an entry without symbols")
        for symbol, size in sizes.items():
            need(
                isinstance(size, str),
                f"[json.exception.type_error.302] type must be string, but is {type(size).__name__}",
            )
            need(size.isdecimal() and int(size) > 0, f"{path.name}: {symbol} is '{size}'")
        extra = set(sizes) - graph.symbols - TOLERATED
        need(not extra, f"{path.name}: symbol {sorted(extra)} is not in the network")
        missing = graph.symbols - set(sizes)
        need(not missing, f"{path.name}: no value for symbol {sorted(missing)}")
        entries.append({symbol: int(size) for symbol, size in sizes.items()})
    need(len(set(names)) == len(names), f"{path.name}: two entries of one name")
    shapes = [tuple(sorted((k, v) for k, v in entry.items() if k in graph.symbols)) for entry in entries]
    need(len(set(shapes)) == len(shapes), f"{path.name}: two entries of equal sizes")
    return entries


def custom_io(path: Path, graph: Graph) -> dict[str, str]:
    """Name -> precision: names are the graph's, each once; a state travels as its output does; whole stays whole."""
    body = parsed_yaml(path)
    need(isinstance(body, list) and body, f"{path.name}: not a list of entries")
    precision: dict[str, str] = {}
    for entry in body:
        keys(entry, {"IOName", "Precision"}, frozenset({"Layout"}), path.name)
        name, kind = entry["IOName"], entry["Precision"]
        need(name in graph.types, f"{path.name}: IOName {name} not found in the network")
        need(name not in precision, f"{path.name}: IOName {name} listed twice")
        need(kind in PRECISIONS, f"{path.name}: Precision {kind} is not supported")
        need("float" in graph.types[name], f"{path.name}: {name} is {graph.types[name]}")
        precision[name] = kind
    for source, result in graph.states.items():
        need(precision.get(source) == precision.get(result), f"{path.name}: {source} and {result} differ in precision")
    return precision


def partition(path: Path, graph: Graph, cores: int) -> int:
    """The number of devices: they and links exist, cores fit, every node is named once and after those it needs."""
    body = keys(parsed_json(path), {"connections", "partitions"}, where=path.name)
    need(isinstance(body["connections"], list), f"{path.name}: connections must be an array")
    need(isinstance(body["partitions"], list) and body["partitions"], f"{path.name}: partitions must be an array")
    ids: list[int] = []
    placed: dict[str, int] = {}
    for number, entry in enumerate(body["partitions"]):
        keys(entry, {"name", "devices"}, frozenset({"nodeList"}), path.name)
        need(isinstance(entry["name"], str), f"{path.name}: name must be string")
        need(isinstance(entry["devices"], list) and entry["devices"], f"{path.name}: a partition without devices")
        for device in entry["devices"]:
            keys(device, {"deviceId", "numCores"}, where=path.name)
            need(type(device["deviceId"]) is int and device["deviceId"] >= 0, f"{path.name}: deviceId must be integer")
            need(type(device["numCores"]) is int and 1 <= device["numCores"] <= 16, f"{path.name}: numCores")
            need(device["numCores"] <= cores, f"{path.name}: more cores than -aic-num-cores")
            ids.append(device["deviceId"])
        for name in entry.get("nodeList", ()):
            need(name in graph.node_names, f"{path.name}: node {name} not found in the network")
            need(name not in placed, f"{path.name}: node {name} in two places")
            placed[name] = number
    need(len(set(ids)) == len(ids) and sorted(ids) == list(range(len(ids))), f"{path.name}: device ids {ids}")
    for link in body["connections"]:
        keys(link, {"devices", "type"}, where=path.name)
        need(link["type"] in ("p2p", "host"), f"{path.name}: type {link['type']}")
        need(isinstance(link["devices"], list) and len(link["devices"]) >= 2, f"{path.name}: a link of one device")
        need(set(link["devices"]) <= set(ids), f"{path.name}: a link to an unknown device")
    if len(body["partitions"]) > 1:
        graph.check_pipeline(placed)
    return len(ids)


def node_precision(path: Path, graph: Graph) -> None:
    body = parsed_yaml(path)
    need(isinstance(body, dict) and body, f"{path.name}: not a mapping")
    for key, names in body.items():
        need(key in ("FP16NodeInstanceNames", "FP32NodeInstanceNames"), f"{path.name}: unknown key {key}")
        need(isinstance(names, list) and all(n in graph.first_outputs for n in names), f"{path.name}: unknown node")
