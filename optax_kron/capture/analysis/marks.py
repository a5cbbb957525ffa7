"""Marked losses of a program, and where each of them may hold its data."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax import Array

from optax_kron.capture.program import equations
from optax_kron.capture.program.graph import Branch, Graph, Node, Value
from optax_kron.capture.rules.batch_axes import Place


@dataclasses.dataclass(eq=False)
class Mark:
    """A marked loss.

    Attributes:
      node: its equation, whose operands are the logits, the targets and more.
      scans: the scans around it, from the outside.
      branch: the branches around it.
      place: where its per-example losses hold the data.
    """

    node: Node
    scans: tuple[Node, ...]
    branch: Branch
    place: Place = dataclasses.field(default_factory=Place)

    @property
    def name(self) -> str:
        """Of the loss, which says its distribution."""
        return equations.loss_name(self.node.eqn)

    @property
    def alike(self) -> Any:
        """What marks share that hold their data in the same way."""
        return self.node.outputs[0].shape, self.scans, self.place

    @property
    def digits(self) -> list[Place]:
        """What besides the data the recorded losses count, slow to fast: steps, axes, and parts."""
        axes = [*self.scans, *range(self.node.outputs[0].ndim)]
        found = [Place(axis=axis) for axis in axes]
        if self.place.axis is None:
            return found
        before, after = self.place.before, self.place.after
        parts = []
        if isinstance(self.place.axis, int):
            length = self.node.outputs[0].shape[self.place.axis]
            parts += [Place(axis=self.place.axis, after=length // before)] if before > 1 else []
            parts += [Place(axis=self.place.axis, before=length // after)] if after > 1 else []
        i = axes.index(self.place.axis)
        return [*found[:i], *parts, *found[i + 1 :]]

    @property
    def count(self) -> int:
        """Number N of data."""
        return 1 if self.place.axis is None else self.length(self.place)

    def length(self, place: Place) -> int:
        """The number of elements along a place of the recorded losses."""
        if not place.on_axis:
            return place.axis.loop.length
        return self.node.outputs[0].shape[place.axis] // (place.before * place.after)

    def by_digit(self, x: Any) -> Any:
        """What is recorded of every per-example loss, [*steps of scans, *losses], by `digits`.

        Returns:
          [N, *digits].
        """
        place, steps = self.place, len(self.scans)
        if place.axis is None:
            return x[None]
        axis = steps + place.axis if place.on_axis else self.scans.index(place.axis)
        size = x.shape[axis] // (place.before * place.after)
        slower, faster = ([n] if n > 1 else [] for n in (place.before, place.after))
        parts, count = [*slower, size, *faster], axis + len(slower)
        x = x.reshape(*x.shape[:axis], *parts, *x.shape[axis + 1 :])
        return x.transpose(count, *(a for a in range(x.ndim) if a != count))

    def by_datum(self, x: Any) -> Any:
        """The same as [N, E], with the E losses of a datum along one axis."""
        x = self.by_digit(x)
        return x.reshape(len(x), -1)

    @property
    def data(self) -> np.ndarray:
        """For each datum, the numbers [N, E] of its E per-example losses."""
        steps = tuple(scan.loop.length for scan in self.scans)
        shape = (*steps, *self.node.outputs[0].shape)
        return self.by_datum(np.arange(math.prod(shape)).reshape(shape))

    def evaluate(self, *operands: Array) -> Array:
        """The per-example losses of operands that have the steps of all scans as leading axes."""
        evaluate = lambda *operands: self.node.bind(*operands)[0]  # noqa: E731
        for _ in self.scans:
            evaluate = jax.vmap(evaluate)
        return evaluate(*operands)


def find(graph: Graph) -> list[Mark]:
    """All marks that reach the loss, the graph's first output, in order."""
    return list(_find(graph, graph.outputs[:1], (), ()))


def _find(graph, outputs, scans, branch) -> Iterator[Mark]:
    """Marks that reach some outputs; `scans` and `branch` are around the graph."""
    reaching, alive = [], set(outputs)
    for node in reversed(graph.nodes):
        if node.name != "stop_gradient" and not alive.isdisjoint(node.outputs):
            reaching.append(node)
            alive.update(node.values)
    for node in reversed(reaching):
        if node.kind == "mark":
            yield Mark(node, scans, branch)
        elif node.kind == "cond":
            for i, body in enumerate(node.bodies):
                yield from _find(body, body.outputs, scans, (*branch, (node, i)))
        elif node.kind in ("scan", "remat"):
            (body,) = node.bodies
            inside = (*scans, node) if node.kind == "scan" else scans
            yield from _find(body, body.outputs, inside, branch)


def flattened(graph: Graph) -> set[tuple[int, ...]]:
    """The lengths of axes that reshapes make one."""
    found = set()
    for node in graph.walk():
        if node.name != "reshape" or 0 in node.outputs[0].shape:
            continue
        shape = node.operands[0].shape if isinstance(node.operands[0], Value) else ()
        for length in node.outputs[0].shape:
            for start, stop in itertools.combinations(range(len(shape) + 1), 2):
                sizes = tuple(s for s in shape[start:stop] if s > 1)
                if len(sizes) > 1 and math.prod(sizes) == length:
                    found.add(sizes)
    return found


def splits(place: Place, length: int, flattened: Iterable[tuple[int, ...]]) -> list[list[Place]]:
    """What a place of some losses may have been before axes were made one, slow to fast.

    Args:
      place: of losses.
      length: number of elements along it.
      flattened: the lengths of axes that the program makes one.
    """
    if not place.on_axis:
        return []
    found = set()
    for sizes in flattened:
        for start, stop in itertools.combinations(range(len(sizes) + 1), 2):
            if stop - start > 1 and math.prod(sizes[start:stop]) == length:
                found.add(sizes[start:stop])
    return [
        [
            dataclasses.replace(
                place,
                before=place.before * math.prod(sizes[:i]),
                after=place.after * math.prod(sizes[i + 1 :]),
            )
            for i in range(len(sizes))
        ]
        for sizes in sorted(found)
    ]


def candidates(mark: Mark, flattened: Iterable[tuple[int, ...]]) -> list[Place]:
    """Where a mark may hold the data, the likeliest first.

    Args:
      mark: a marked loss.
      flattened: the lengths of axes that the program makes one.
    """
    shape = mark.node.outputs[0].shape
    found: list[Place] = []
    for axis in (*range(len(shape)), *reversed(mark.scans)):
        found.append(Place(axis=axis))
        if mark.length(found[-1]) == 1:
            found.append(Place())  # where there is one datum, all belongs to it
    for axis, length in enumerate(shape):
        for sizes in sorted(flattened):
            if math.prod(sizes) == length:
                found.extend(
                    Place(axis=axis, before=math.prod(sizes[:i]), after=math.prod(sizes[i + 1 :]))
                    for i in range(len(sizes))
                )
    return list(dict.fromkeys(found)) or [Place()]
