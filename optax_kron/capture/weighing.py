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
from jax import Array

from optax_kron.capture import marks
from optax_kron.capture.analysis import Analysis
from optax_kron.capture.canonical import Canonical, Position
from optax_kron.capture.labelling import Labels
from optax_kron.capture.labels import Data, Place
from optax_kron.capture.marks import Mark
from optax_kron.capture.uses import Use
from optax_kron.kernels import contract


class Weighing:
    """What the data of a loss weigh.

    Args:
      analysis: of the loss.
      weights: derivative of the loss with respect to each mark's per-example losses.
    """

    def __init__(self, analysis: Analysis, weights: Sequence[Array]):
        self._analysis, self._weights = analysis, weights
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
        for numbers in self._alike(reached):
            mark = self._analysis.marks[numbers[0]]
            weights = sum(self._weights[m].astype(dtype) for m in numbers)
            found.append(self._of_mark(use, form, mark, weights))
        if any(w.ndim == 2 for w in found):
            found = [w.reshape(len(w), -1) for w in found]
        return functools.reduce(jnp.add, found)

    def _of_mark(self, use, form, mark, weights):
        positions = self._positions(use, form, mark)
        if not any(positions.values()):
            return mark.by_datum(weights).sum(1)
        x = mark.by_digit(weights)
        x = x.reshape(len(x), *map(mark.length, positions))
        others = [axis for axis, p in enumerate(positions.values(), 1) if p is None]
        own = [p for p in positions.values() if p is not None]
        # As much as one of all positions would, if all weighed the same.
        return form.spread(x.sum(others), own) * _number(positions)

    def inside(self, use: Use, label: Data, reached: frozenset[int]) -> Array | None:
        """The same inside of the scans around a use; `None` where steps have weights of their own.

        Args:
          use: of a parameter.
          label: where its output holds the data.
          reached: as for `of`.
        """
        form = Canonical(use, label)
        for number, *_ in self._alike(reached):
            positions = self._positions(use, form, self._analysis.marks[number])
            if any(p is not None and p.is_step for p in positions.values()):
                return None
        return self.of(use, Canonical(use, label, inside=True), reached)

    def _alike(self, reached: frozenset[int]) -> list[list[int]]:
        """Marks in groups that hold their data in the same way."""
        groups: dict[Any, list[int]] = {}
        for number in sorted(reached):
            groups.setdefault(self._analysis.marks[number].alike, []).append(number)
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
                self._analysis.graph, dict.fromkeys(nodes, place), selections=True
            )
        return self._labels[key]


def _number(positions: Mapping[Place, Position | None]) -> int:
    """How many positions weigh apart."""
    return math.prod(p.size for p in positions.values() if p is not None)
