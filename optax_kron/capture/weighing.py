"""How much each datum weighs in the input factor of a layer, and each of its positions.

A mask of padding weighs the losses of single positions. Where a layer's positions are those of the
losses, one for one, each counts as much as its own loss. Where they are not, as before attention or
along the steps of a recurrent network, what is masked may still be seen by others, and all
positions of a datum count the same.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from optax_kron.capture.analysis import Analysis
from optax_kron.capture.canonical import STEP, Canonical
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
        self._labels: dict[tuple[Place, ...], Labels] = {}

    def of(self, use: Use, form: Canonical, marks: frozenset[int]) -> Array:
        """What each datum weighs at a use, [N], or each of its positions, [N, S].

        Args:
          use: of a parameter.
          form: canonical, of the use.
          marks: that the use, and those it shares data with, reach.
        """
        numbers = sorted(marks)
        losses = [self._analysis.marks[m] for m in numbers]
        types = [contract.wide_dtype(self._weights[m].dtype) for m in numbers]
        dtype = max(types, key=lambda d: d.itemsize)
        weights = [self._weights[m].astype(dtype) for m in numbers]
        apart = self._apart(use, form, losses)
        if not apart:
            sums = [mark.by_datum(w).sum(1) for mark, w in zip(losses, weights, strict=True)]
            return functools.reduce(jnp.add, sums)
        total = losses[0].by_digit(functools.reduce(jnp.add, weights))
        others = [i for i in range(1, total.ndim) if i not in apart]
        total = jnp.sum(total, axis=others)
        # As much as one of all positions would, if all weighed the same.
        return form.spread(total, list(apart.values())) * (total.size // total.shape[0])

    def inside(self, use: Use, label: Data, marks: frozenset[int]) -> Array | None:
        """The same inside of the scans around a use; `None` where steps have weights of their own.

        Args:
          use: of a parameter.
          label: where its output holds the data.
          marks: as for `of`.
        """
        losses = [self._analysis.marks[m] for m in sorted(marks)]
        positions = self._apart(use, Canonical(use, label), losses).values()
        if any(position[0] == STEP for position in positions):
            return None
        return self.of(use, Canonical(use, label, inside=True), marks)

    def _apart(self, use: Use, form: Canonical, losses: Sequence[Mark]) -> dict[int, Any]:
        """The digits of the losses that are positions of the use too, by number, with those."""
        first = losses[0]
        if any(mark.alike != first.alike for mark in losses):
            return {}
        found = {}
        for i, place in enumerate(first.digits):
            label = self._labels_at(first, place)[use.output]
            position = form.position(label) if isinstance(label, Data) else None
            if position is not None:
                found[i + 1] = position
        return found

    def _labels_at(self, first: Mark, place: Place) -> Labels:
        """The labels if marks like the first held the data at another place."""
        marks = self._analysis.marks
        places = tuple(place if mark.alike == first.alike else mark.place for mark in marks)
        if places not in self._labels:
            nodes = [mark.node for mark in marks]
            self._labels[places] = Labels(
                self._analysis.graph, dict(zip(nodes, places, strict=True))
            )
        return self._labels[places]
