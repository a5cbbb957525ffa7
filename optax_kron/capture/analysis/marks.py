"""Marked losses of a program, and where each of them may hold its examples."""

# Per-example losses [8, 5] may be of 8 examples with 5 losses each (8 sequences of 5 tokens), of 5
# examples with 8 (time first). Losses [40] of a program that flattens [8, 5] to it may be of 40, of
# 8 (`after=5`) or of 5 (`before=8`). A mark is one loss with one of these choices.

import dataclasses
import itertools
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax import Array
from jaxtyping import Int

from optax_kron.capture.program import equations
from optax_kron.capture.program.graph import Branch, Graph, Node, Scope, Value
from optax_kron.capture.rules.batch_axes import BatchAxis
from optax_kron.capture.rules.table import record

_Elements = TypeVar("_Elements", Array, np.ndarray)


@dataclasses.dataclass(frozen=True, eq=False)
class Mark:
    """A marked loss.

    Attributes:
      node: Its equation, whose operands are the logits, the targets and more.
      scans: The scans around it, from the outside.
      branch: The branches around it.
      batch_axis: Where its per-example losses hold the examples.
    """

    node: Node
    scans: tuple[Node, ...]
    branch: Branch
    batch_axis: BatchAxis = dataclasses.field(default_factory=BatchAxis)

    def at(self, batch_axis: BatchAxis) -> "Mark":
        """The same loss, if it held its examples elsewhere."""
        return dataclasses.replace(self, batch_axis=batch_axis)

    @property
    def name(self) -> str:
        """Of the loss, which says its distribution."""
        return equations.loss_name(self.node.eqn)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the per-example losses, in one step of the scans around them."""
        return self.node.outputs[0].shape

    @property
    def alike(self) -> Hashable:
        """What marks share that hold their examples in the same way."""
        return self.shape, self.scans, self.batch_axis

    @property
    def other_axes(self) -> list[BatchAxis]:
        """What besides examples the recorded losses count, slow to fast: steps, axes and parts."""
        axes = [*self.scans, *range(len(self.shape))]
        others = [BatchAxis(axis=axis) for axis in axes]
        mine = self.batch_axis
        if mine.axis is None:
            return others
        parts = []
        if isinstance(mine.axis, int):
            length = self.shape[mine.axis]
            if mine.before > 1:
                parts.append(BatchAxis(axis=mine.axis, after=length // mine.before))
            if mine.after > 1:
                parts.append(BatchAxis(axis=mine.axis, before=length // mine.after))
        i = axes.index(mine.axis)
        return [*others[:i], *parts, *others[i + 1 :]]

    @property
    def examples(self) -> int:
        """Number N of examples."""
        return self.length(self.batch_axis)

    def length(self, axis: BatchAxis) -> int:
        """The number of elements along an axis of the recorded losses, or a factor of one."""
        if axis.axis is None:
            return 1
        if isinstance(axis.axis, Node):
            return axis.axis.loop.length
        return self.shape[axis.axis] // (axis.before * axis.after)

    def by_axis(self, x: _Elements) -> _Elements:
        """What is recorded of every per-example loss, [*steps of scans, *losses], by `other_axes`.

        Returns:
          [N, *other_axes].
        """
        mine, steps = self.batch_axis, len(self.scans)
        if mine.axis is None:
            return x[None]
        axis = steps + mine.axis if isinstance(mine.axis, int) else self.scans.index(mine.axis)
        size = x.shape[axis] // (mine.before * mine.after)
        slower, faster = ([n] if n > 1 else [] for n in (mine.before, mine.after))
        parts, first = [*slower, size, *faster], axis + len(slower)
        x = x.reshape(*x.shape[:axis], *parts, *x.shape[axis + 1 :])
        return x.transpose(first, *(a for a in range(x.ndim) if a != first))

    def by_example(self, x: _Elements) -> _Elements:
        """The same as [N, E], with the E losses of an example along one axis."""
        x = self.by_axis(x)
        return x.reshape(len(x), -1)

    @property
    def elements(self) -> Int[np.ndarray, "N E"]:
        """For each example, the numbers of its E per-example losses, as they are recorded."""
        shape = (*(scan.loop.length for scan in self.scans), *self.shape)
        return self.by_example(np.arange(math.prod(shape)).reshape(shape))

    def evaluate(self, *operands: Array) -> Array:
        """The per-example losses of operands that have the steps of all scans as leading axes."""
        evaluate = lambda *operands: self.node.bind(*operands)[0]  # noqa: E731
        for _ in self.scans:
            evaluate = jax.vmap(evaluate)
        return evaluate(*operands)


def find(graph: Graph) -> list[Mark]:
    """All marks that reach the loss, the graph's first output, in order."""
    return list(_find(graph, graph.outputs[:1], Scope()))


def _find(graph: Graph, outputs: Sequence[Value], scope: Scope) -> Iterator[Mark]:
    """Marks that reach some outputs; `scope` is around the graph."""
    reaching, alive = [], set(outputs)
    for node in reversed(graph.nodes):
        if not record(node).stops and not alive.isdisjoint(node.outputs):
            reaching.append(node)
            alive.update(node.values)
    for node in reversed(reaching):
        if node.kind == "mark":
            yield Mark(node, *scope)
        elif node.holds_steps:
            for i, body in enumerate(node.bodies):
                inside = {"scan": scope.in_scan(node), "cond": scope.in_branch(node, i)}
                yield from _find(body, body.outputs, inside.get(node.kind, scope))


def flattened(graph: Graph) -> set[tuple[int, ...]]:
    """The lengths of axes that reshapes make one: (8, 5) where [8, 5, 3] becomes [40, 3]."""
    lengths = set()
    for node in graph.walk():
        if node.name != "reshape" or 0 in node.outputs[0].shape:
            continue
        shape = node.operands[0].shape
        for length in node.outputs[0].shape:
            for start, stop in itertools.combinations(range(len(shape) + 1), 2):
                sizes = tuple(s for s in shape[start:stop] if s > 1)
                if len(sizes) > 1 and math.prod(sizes) == length:
                    lengths.add(sizes)
    return lengths


def _factors(axis: BatchAxis, sizes: tuple[int, ...]) -> list[BatchAxis]:
    """The factors of given sizes of an axis, or of a factor of one, slow to fast."""
    return [
        dataclasses.replace(
            axis,
            before=axis.before * math.prod(sizes[:i]),
            after=axis.after * math.prod(sizes[i + 1 :]),
        )
        for i in range(len(sizes))
    ]


def splits(
    axis: BatchAxis, length: int, flattened: Iterable[tuple[int, ...]]
) -> list[list[BatchAxis]]:
    """What an axis of some losses may have been before axes were made one, slow to fast.

    Args:
      axis: An axis of losses, or a factor of one.
      length: Number of elements along it.
      flattened: The lengths of axes that the program makes one.
    """
    if not axis.on_axis:
        return []
    possible = {
        sizes[start:stop]
        for sizes in flattened
        for start, stop in itertools.combinations(range(len(sizes) + 1), 2)
        if stop - start > 1 and math.prod(sizes[start:stop]) == length
    }
    return [_factors(axis, sizes) for sizes in sorted(possible)]


def candidates(mark: Mark, flattened: Iterable[tuple[int, ...]]) -> list[BatchAxis]:
    """Where a mark may hold the examples, the likeliest first.

    Args:
      mark: A marked loss.
      flattened: The lengths of axes that the program makes one.
    """
    likely: list[BatchAxis] = []
    for axis in (*range(len(mark.shape)), *reversed(mark.scans)):
        likely.append(BatchAxis(axis=axis))
        if mark.length(likely[-1]) == 1:
            likely.append(BatchAxis())  # where there is one example, all belongs to it
    for axis, length in enumerate(mark.shape):
        for sizes in sorted(flattened):
            if math.prod(sizes) == length:
                likely.extend(_factors(BatchAxis(axis=axis), sizes))
    return list(dict.fromkeys(likely)) or [BatchAxis()]
