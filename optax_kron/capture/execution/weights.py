"""How much each datum weighs in the input factor of a layer, and each of its positions.

A mask of padding weighs the losses of single positions. Where a layer's positions are those of the
losses, one for one, but for reshapes, transposes, slices and reversals on the way, each counts as
much as its own loss. Where they are not, as before attention or along the steps of a recurrent
network, what is masked may still be seen by others, and all positions of a datum count the same; so
they do where positions change places in another way.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from optax_kron.capture.analysis import marks
from optax_kron.capture.analysis.canonical import Canonical, Position
from optax_kron.capture.analysis.labelling import Labels
from optax_kron.capture.analysis.layers import Analysis
from optax_kron.capture.analysis.marks import Mark
from optax_kron.capture.analysis.uses import Use
from optax_kron.capture.rules.batch_axes import Data, Place, Read
from optax_kron.capture.rules.pairs import Pairs, classes
from optax_kron.capture.rules.selections import reaching
from optax_kron.kernels import contract


class Weighing:
    """What the data of a loss weigh.

    Args:
      analysis: of the loss.
      weights: derivative of the loss with respect to each mark's per-example losses.
      indices: at which rows were read between the layers and the losses.
    """

    def __init__(self, analysis: Analysis, weights: Sequence[Array], indices: Mapping[Read, Array]):
        self._analysis, self._weights, self._indices = analysis, weights, indices
        self._flattened = marks.flattened(analysis.graph)
        self._labels: dict[tuple[Any, Place], Labels] = {}

    def of(self, use: Use, form: Canonical, reached: frozenset[int]) -> Array:
        """What each datum weighs at a use, [N], or each of its positions, [N, S].

        Args:
          use: of a parameter.
          form: canonical, of the use.
          reached: the marks that the use, and those it shares data with, reach.
        """
        dtype = max(
            (contract.wide_dtype(self._weights[m].dtype) for m in reached),
            key=lambda dtype: dtype.itemsize,
        )
        found = []
        label = self._analysis.label(use)
        for numbers in self._alike(reached, label):
            mark = self._analysis.marks[numbers[0]]
            weights = sum(self._weights[m].astype(dtype) for m in numbers)
            found.append(self._of_mark(use, form, mark, weights, label, numbers[0]))
        if any(w.ndim == 2 for w in found):
            found = [w.reshape(len(w), -1) for w in found]
        return functools.reduce(jnp.add, found)

    def _of_mark(self, use, form, mark, weights, label, number):
        def reach(x):
            return reaching(label.link(number), x, self._indices, label.size)

        positions = self._positions(use, form, mark)
        own = [p for p in positions.values() if p is not None]
        if form.member is not None:
            x = form.by_member(reach(mark.by_datum(weights).sum(1)))
            return x[:, 0] if _is_even(label, number) else form.spread(x, [form.member])
        if not own:
            return reach(mark.by_datum(weights).sum(1))
        x = mark.by_digit(weights)
        x = x.reshape(len(x), *map(mark.length, positions))
        others = [axis for axis, p in enumerate(positions.values(), 1) if p is None]
        # As much as one of all positions would, if all weighed the same.
        return form.spread(reach(x.sum(others)), own) * _number(positions)

    def inside(self, use: Use, label: Data, reached: frozenset[int]) -> Array | None:
        """The same inside of the scans around a use; `None` where steps have weights of their own.

        Args:
          use: of a parameter.
          label: where its output holds the data.
          reached: as for `of`.
        """
        form = Canonical(use, label)
        for number, *_ in self._alike(reached, label):
            positions = self._positions(use, form, self._analysis.marks[number])
            if any(p is not None and p.is_step for p in positions.values()):
                return None
        return self.of(use, Canonical(use, label, inside=True), reached)

    def _alike(self, reached: frozenset[int], label: Data) -> list[list[int]]:
        """Marks in groups that hold their data in the same way, and are reached in the same."""
        groups: dict[Any, list[int]] = {}
        for number in sorted(reached):
            alike = self._analysis.marks[number].alike, label.link(number)
            groups.setdefault(alike, []).append(number)
        return list(groups.values())

    def _positions(self, use: Use, form: Canonical, mark: Mark) -> dict[Place, Position | None]:
        """The digits of some losses, slow to fast, and which positions of a use they are."""
        found: dict[Place, Position | None] = {}
        for place in mark.digits:
            found |= self._positions_at(use, form, mark, place)
        return found

    def _positions_at(self, use, form, mark, place) -> dict[Place, Position | None]:
        """The same of one digit, or of several that it was made of."""
        label = self._labels_at(mark, place)[use.output]
        whole = form.position(label) if isinstance(label, Data) else None
        if whole is not None:
            return {place: whole}
        best: dict[Place, Position | None] = {place: None}
        for parts in marks.splits(place, mark.length(place), self._flattened):
            apart: dict[Place, Position | None] = {}
            for part in parts:
                apart |= self._positions_at(use, form, mark, part)
            best = max(best, apart, key=_number)
        return best

    def _labels_at(self, mark: Mark, place: Place) -> Labels:
        """The labels if marks like this one, and they alone, held the data at another place."""
        key = mark.alike, place
        if key not in self._labels:
            nodes = [m.node for m in self._analysis.marks if m.alike == mark.alike]
            self._labels[key] = Labels(
                self._analysis.graph, dict.fromkeys(nodes, place), self._analysis.known
            )
        return self._labels[key]


def _number(positions: Mapping[Place, Position | None]) -> int:
    """How many positions weigh apart."""
    return math.prod(p.size for p in positions.values() if p is not None)


def _is_even(label: Data, number: int) -> bool:
    """Whether all elements of an example reach the same data of a mark."""
    found = label.classes
    assert found is not None
    counts = np.bincount(found)
    pairs = label.link(number).pairs
    if pairs is None or counts.min() < counts.max():
        return False
    together = Pairs(found[pairs.elements], pairs.data)
    return len(pairs) == counts[0] * len(together)


def ranks(analysis: Analysis, number: int) -> np.ndarray:
    """For each datum of a mark its number among those that belong to one example of a layer.

    Where rows are read at indices that are known only then, all of them may be one row.
    """
    count = analysis.marks[number].count
    alone = np.zeros(count, int)
    together = []
    for use in analysis.uses:
        label = analysis.label(use)
        if number not in label.marks:
            continue
        link = label.link(number)
        steps = [*(pairs for pairs, _ in link.reads), link.pairs]
        injective = all(pairs is None or pairs.is_injective for pairs in steps)
        if label.classes is None and injective and all(read.distinct for _, read in link.reads):
            continue
        if link.reads:
            return np.arange(count)
        pairs = link.pairs or Pairs.identity(label.size)
        owner = np.arange(label.size) if label.classes is None else label.classes
        together.append(Pairs(pairs.data, owner[pairs.elements]))
    found = classes(count, together)
    if found is None:
        return alone
    order = np.argsort(found, kind="stable")
    sizes = np.bincount(found)
    alone[order] = np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return alone
