"""Schedule: nodes in an order that needs little memory; and how much memory an order needs."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from QEfficient.errors import OptionError
from QEfficient.transforms.onnx.base import OnnxTransform, TransformResult
from QEfficient.transforms.onnx.graph import values_read
from QEfficient.transforms.onnx.sizes import Sizes

#: Their result is their input's memory.
_VIEWS = {"Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten"}
#: Times its result that ONNX Runtime 1.31 holds while it runs (measured); no operator writes over an operand there.
_WORKSPACE = {"Where": 2}


@dataclass(frozen=True)
class Schedule(OnnxTransform):
    """Reorders nodes when that lowers the simulated peak of a step with the given sizes; otherwise changes nothing.

    Tried are: nodes that free memory as soon as they can run, nodes that take memory as late as they can, and both.
    A host session follows the order of the file with ``Manifest.runtime`` ``order`` "priority".

    Parameters:
        batch_size, seq_len: of the batch to plan for.
        rows: predictions in that batch; 0 for every token.
    """

    name: ClassVar[str] = "Schedule"
    batch_size: int = 4
    seq_len: int = 512
    rows: int = 0

    def __post_init__(self) -> None:
        for option, least in (("batch_size", 1), ("seq_len", 1), ("rows", 0)):
            value = getattr(self, option)
            if not (isinstance(value, int | float) and value >= least and value % 1 == 0):
                raise OptionError(f"Schedule's {option} must be a whole number of at least {least}, got {value!r}.")
            object.__setattr__(self, option, int(value))

    def apply(self, model: ir.Model, workspace: Path) -> TransformResult:
        """Raises OptionError when the graph has other symbolic dimensions than those of a training step."""
        graph = model.graph
        sizes = {
            "batch_size": self.batch_size,
            "seq_len": self.seq_len,
            "rows": self.rows or self.batch_size * self.seq_len,
        }
        memory = _Memory(graph, sizes)
        given = list(graph)
        early = memory.frees_early(given)
        late = memory.takes_late(given)
        orders = [given, early, late, memory.frees_early(late), memory.takes_late(early)]
        peaks = [memory.peak(order) for order in orders]
        best = min(range(len(orders)), key=lambda place: (peaks[place], place))
        facts = {"sizes": sizes, "peak_bytes_before": peaks[0], "peak_bytes_after": peaks[best]}
        if best:
            graph.remove(given)
            graph.extend(orders[best])
        return TransformResult(best > 0, facts)


def peak_bytes(model: ir.Model, sizes: Mapping[str, int]) -> int:
    """Most bytes that intermediate values and outputs occupy at once when nodes run in the order of the graph.

    Weights, inputs, what derives from weights alone, and a runtime's own overhead are not counted. Views share their
    input's memory.

    Raises:
        OptionError: a symbolic dimension has no size.
    """
    return _Memory(model.graph, sizes).peak(list(model.graph))


class _Memory:
    """The storages of a graph: which node makes and which nodes read each, and how large it is."""

    def __init__(self, graph: ir.Graph, sizes: Mapping[str, int]) -> None:
        measured = Sizes(sizes)
        self.order = list(graph)
        self.place = {node: number for number, node in enumerate(self.order)}
        storage: dict[ir.Value, int] = {}
        #: Bytes of each storage, and how many nodes read it; an output of the graph is read once more, at the end.
        self.size: list[int] = []
        self.readers: list[int] = []
        self.makes: dict[ir.Node, list[int]] = {}
        self.reads: dict[ir.Node, set[int]] = {}
        constant: set[ir.Value] = set()
        for node in self.order:
            read = list(values_read(node))
            self.reads[node] = {storage[v] for v in read if v in storage}
            self.makes[node] = []
            folded = node.op_type != "DequantizeLinear" and all(v.is_initializer() or v in constant for v in read)
            for value in node.outputs:
                if folded:
                    constant.add(value)
                elif node.op_type in _VIEWS and read and read[0] in storage:
                    storage[value] = storage[read[0]]
                elif node.op_type not in _VIEWS or (read and read[0].producer() is not None):
                    storage[value] = len(self.size)
                    self.makes[node].append(len(self.size))
                    self.size.append(measured.nbytes(value))
                    self.readers.append(0)
        for node in self.order:
            for number in self.reads[node]:
                self.readers[number] += 1
        for value in graph.outputs:
            if value in storage:
                self.readers[storage[value]] += 1
        self.next: dict[ir.Node, list[ir.Node]] = {node: [] for node in self.order}
        self.before: dict[ir.Node, list[ir.Node]] = {}
        for node in self.order:
            makers = (v.producer() for v in values_read(node))
            self.before[node] = [m for m in dict.fromkeys(makers) if m is not None and m in self.place]
            for maker in self.before[node]:
                self.next[maker].append(node)

    def peak(self, order: Iterable[ir.Node]) -> int:
        """Most bytes alive at once."""
        left, alive, most = list(self.readers), 0, 0
        for node in order:
            alive += sum(self.size[number] for number in self.makes[node])
            workspace = _WORKSPACE.get(node.op_type, 0) * sum(self.size[number] for number in self.makes[node])
            most = max(most, alive + workspace)
            for number in self.reads[node]:
                left[number] -= 1
            alive -= sum(self.size[number] for number in {*self.reads[node], *self.makes[node]} if not left[number])
        return most

    def frees_early(self, order: list[ir.Node]) -> list[ir.Node]:
        """The same order, but a node that takes no more than it frees runs as soon as its inputs are there."""
        left = list(self.readers)

        def gains(node: ir.Node) -> bool:
            freed = sum(self.size[number] for number in self.reads[node] if left[number] == 1)
            return freed > sum(self.size[number] for number in self.makes[node])

        def run(node: ir.Node) -> Iterable[ir.Node]:
            for number in self.reads[node]:
                left[number] -= 1
            # Whoever reads one of its operands last may gain from now on.
            return (n for m in self.before[node] for n in self.next[m])

        return _list_schedule(order, self.before, self.next, gains, run)

    def takes_late(self, order: list[ir.Node]) -> list[ir.Node]:
        """The same order, but a node that takes more than it frees runs just before its first reader."""
        alive = [False] * len(self.size)

        def gains(node: ir.Node) -> bool:
            # Backwards in time: its results vanish, and operands nobody reads later appear.
            taken = sum(self.size[number] for number in self.makes[node])
            return taken > sum(self.size[number] for number in self.reads[node] if not alive[number])

        def run(node: ir.Node) -> Iterable[ir.Node]:
            for number in self.reads[node]:
                alive[number] = True
            return (n for m in self.before[node] for n in self.next[m])

        return _list_schedule(order[::-1], self.next, self.before, gains, run)[::-1]


def _list_schedule(
    order: list[ir.Node],
    before: Mapping[ir.Node, list[ir.Node]],
    after: Mapping[ir.Node, list[ir.Node]],
    gains: Callable[[ir.Node], bool],
    run: Callable[[ir.Node], Iterable[ir.Node]],
) -> list[ir.Node]:
    """Kahn's algorithm: among the nodes that can run, one that gains; else the first of the given order.

    ``run`` is told of each node in turn and returns those that may gain since.
    """
    place = {node: number for number, node in enumerate(order)}
    missing = {node: len(set(before[node])) for node in order}
    ready: list[int] = []
    gaining: list[int] = []
    done: set[ir.Node] = set()
    result: list[ir.Node] = []

    def offer(node: ir.Node) -> None:
        heapq.heappush(gaining if gains(node) else ready, place[node])

    for node in order:
        if not missing[node]:
            offer(node)
    while ready or gaining:
        node = order[heapq.heappop(gaining or ready)]
        if node in done:
            continue
        done.add(node)
        result.append(node)
        touched = run(node)
        for follower in set(after[node]):
            missing[follower] -= 1
            if not missing[follower]:
                offer(follower)
        for other in touched:
            if other not in done and not missing[other] and gains(other):
                heapq.heappush(gaining, place[other])
    return result
