"""Partition files: how a model is spread over several devices, by slicing tensors or as stages of a pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from QEfficient.errors import OptionError

if TYPE_CHECKING:
    import onnx_ir as ir

#: Operators the compiler never folds, although all their inputs may be constant.
_NEVER_FOLDED = {"Loop", "Const", "Identity", "If", "DequantizeLinear"}
#: Functions with fewer nodes are inlined by the compiler; these two it knows as operators.
_INLINED = 100
_KNOWN = {"CustomRMSNorm", "CastToUInt4"}


def tensor_slices(devices: int, cores: int | None) -> dict[str, Any]:
    """One partition whose tensors are cut over all devices; QNN's form has no ``numCores``."""
    return {"connections": _connected(devices), "partitions": [_partition(0, range(devices), cores)]}


def pipeline(devices: int, cores: int, stages: Sequence[Sequence[str]]) -> dict[str, Any]:
    """A partition for each stage, with the names of its nodes; the devices are shared out evenly, in order."""
    share = devices // len(stages)
    partitions = [
        {**_partition(i, range(i * share, (i + 1) * share), cores), "nodeList": list(names)}
        for i, names in enumerate(stages)
    ]
    return {"connections": _connected(devices), "partitions": partitions}


def devices_of(content: object, cores: int) -> int:
    """The number of devices a user's partition file names.

    Args:
        cores: the most that a device may use.

    Raises:
        OptionError: no partitions, a device without an id or with too many cores, a connection to a device that is in
            no partition.
    """
    given = content if isinstance(content, Mapping) else {}
    partitions, connections = given.get("partitions"), given.get("connections", [])
    if not isinstance(partitions, list) or not partitions:
        raise OptionError("mdp_load_partition_config names no partitions: it needs a list 'partitions' of them.")
    found = set()
    for partition in partitions:
        devices = partition.get("devices") if isinstance(partition, dict) else None
        if not isinstance(devices, list) or not all(isinstance(d, dict) and "deviceId" in d for d in devices):
            raise OptionError(
                "mdp_load_partition_config: every partition needs a list 'devices' of objects with deviceId."
            )
        for device in devices:
            number, count = device["deviceId"], device.get("numCores", cores)
            if isinstance(number, bool) or not isinstance(number, int):
                raise OptionError(f"mdp_load_partition_config: deviceId must be a whole number, got {number!r}.")
            if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= cores:
                raise OptionError(
                    f"mdp_load_partition_config gives device {number} numCores={count!r}, and num_cores is {cores}: "
                    "change one of them."
                )
            found.add(number)
    ends = [c["devices"] for c in connections if isinstance(c, dict) and isinstance(c.get("devices"), list)]
    for number in (number for devices in ends for number in devices):
        if number not in found:
            raise OptionError(
                f"mdp_load_partition_config connects device {number!r}, which is in no partition: add it."
            )
    return len(found)


def contract_json(content: object) -> str:
    """JSON as the toolchains are used to: four spaces, no space after a colon, sorted keys, no final newline."""
    return json.dumps(content, indent=4, separators=(",", ":"), sort_keys=True)


def layers_per_stage(layers: int, stages: int) -> list[int]:
    """How many layers each stage gets.

    The rest of the division goes to stage 0 when there are two stages, otherwise to the middle ones from the centre
    outwards, left first, and the last of ``stages - 1`` to stage 0: the last stage also carries the head.
    """
    counts, rest = [layers // stages] * stages, layers % stages
    if stages == 2:
        counts[0] += rest
        return counts
    centre = (stages - 1) // 2
    middle = sorted(range(1, stages - 1), key=lambda i: (abs(i - centre), i))
    for stage in [*middle, 0][:rest]:
        counts[stage] += 1
    return counts


def node_stages(model: ir.Model, stages: int) -> list[list[str]]:
    """The names of the nodes of each stage in graph order, without those the compiler folds away.

    Raises:
        OptionError: the model has fewer layers than stages.
    """
    from QEfficient.transforms.onnx.name_layers import layer_number

    numbers = [layer_number(str(node.name)) for node in model.graph]
    found = sorted({number for number in numbers if number is not None})
    if len(found) < stages:
        raise OptionError(
            f"mdp_num_partitions={stages} is more than the {len(found)} layers of this model: use fewer stages."
        )
    stage_of: dict[int, int] = {}
    for stage, count in enumerate(layers_per_stage(len(found), stages)):
        for _ in range(count):
            stage_of[found[len(stage_of)]] = stage
    lists: list[list[str]] = [[] for _ in range(stages)]
    at: dict[ir.Node, int] = {}
    folded: set[ir.Value] = {value for value in model.graph.initializers.values() if not value.is_graph_input()}
    current = 0
    for node, number in zip(model.graph, numbers, strict=True):
        current = stage_of[number] if number is not None else current
        makers = (value.producer() for value in node.inputs if value is not None)
        # Whatever the names say, a stage can only need what an earlier one made.
        at[node] = max([current, *(at[maker] for maker in makers if maker is not None)])
        if _folds(node, folded):
            folded.update(node.outputs)
        elif node.name:
            lists[at[node]] += _names(model, node)
    return lists


def _folds(node: ir.Node, folded: set[ir.Value]) -> bool:
    if node.op_type == "Constant":
        return True
    read = [value for value in node.inputs if value is not None]
    return node.op_type not in _NEVER_FOLDED and bool(read) and all(value in folded for value in read)


def _names(model: ir.Model, node: ir.Node) -> list[str]:
    function = model.functions.get(node.op_identifier())
    if function is None or node.op_type in _KNOWN or len(function) >= _INLINED:
        return [str(node.name)]
    return [f"{node.name}/{inner.name}" for inner in function if inner.name]


def _connected(devices: int) -> list[dict[str, Any]]:
    return [{"devices": list(range(devices)), "type": "p2p"}]


def _partition(number: int, devices: Sequence[int], cores: int | None) -> dict[str, Any]:
    members = [{"deviceId": i} if cores is None else {"deviceId": i, "numCores": cores} for i in devices]
    return {"name": f"Partition{number}", "devices": members}
