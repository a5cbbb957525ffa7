"""How much each example weighs in the input factor of a layer, and each of its positions.

A mask of padding weighs the losses of single positions. Where a layer's positions are those of the
losses, one for one, but for reshapes, transposes, slices and reversals on the way, each counts as
much as its own loss. Where they are not, as before attention or along the steps of a recurrent
network, what is masked may still be seen by others, and all positions of an example count the same;
so they do where positions change places in another way.
"""

# Losses [8, 5] under `sum(where=mask) / mask.sum()` have weights [8, 5], zero where masked. A layer
# at the same 8 * 5 tokens gets them as they are, times 5, [N, S] = [8, 5]; one before attention
# gets their sum over tokens, [N] = [8].

import functools
from collections.abc import Hashable, Iterable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from optax_kron.capture.analysis.canonical import Canonical
from optax_kron.capture.analysis.layers import Analysis
from optax_kron.capture.analysis.marks import Mark
from optax_kron.capture.analysis.positions import number_apart
from optax_kron.capture.analysis.uses import Use
from optax_kron.capture.rules.batch_axes import Read, Separate
from optax_kron.capture.rules.indexing import reaching
from optax_kron.capture.rules.pairs import Pairs, classes
from optax_kron.kernels import contract, explicit

ExampleWeights = Float[Array, " N"] | Float[Array, "N S"]


class LossWeights:
    """Per-example weights of a loss, as each layer sees them.

    Args:
      analysis: The analysis of the loss.
      weights: Derivative of the loss with respect to each mark's per-example losses.
      indices: At which rows were read between the layers and the losses.
    """

    def __init__(self, analysis: Analysis, weights: Sequence[Array], indices: Mapping[Read, Array]):
        self._analysis, self._indices = analysis, indices
        self._weights = explicit.whole(list(weights))

    @property
    def arrays(self) -> list[Array]:
        """The derivatives that it was made of."""
        return self._weights

    def of(self, use: Use, form: Canonical, reached: frozenset[int]) -> ExampleWeights:
        """The weight of each example at a use, or of each of its positions.

        Args:
          use: of a parameter.
          form: canonical, of the use.
          reached: the marks that the use, and those it shares examples with, reach.
        """
        dtype = max(
            (contract.wide_dtype(self._weights[m].dtype) for m in reached),
            key=lambda dtype: dtype.itemsize,
        )
        batching = self._analysis.batching(use)
        of_marks = []
        for numbers in self._alike(reached, batching):
            weights = added(self._weights[m].astype(dtype) for m in numbers)
            of_marks.append(self._of_mark(use, form, weights, batching, numbers[0]))
        if any(w.ndim == 2 for w in of_marks):
            of_marks = [w.reshape(len(w), -1) for w in of_marks]
        return added(of_marks)

    def _of_mark(
        self, use: Use, form: Canonical, weights: Array, batching: Separate, number: int
    ) -> ExampleWeights:
        """The same of one mark, or of several alike whose weights were added."""
        mark = self._analysis.marks[number]

        def reach(x: Array) -> Array:
            return reaching(batching.link(number), x, self._indices, batching.size)

        if form.member is not None:
            x = form.by_member(reach(mark.by_example(weights).sum(1)))
            return x[:, 0] if _is_even(batching, number) else form.spread(x, [form.member])
        positions = self._analysis.positions.of(use, form, mark)
        apart = [p for p in positions.values() if p is not None]
        if not apart:
            return reach(mark.by_example(weights).sum(1))
        x = mark.by_axis(weights)
        x = x.reshape(len(x), *map(mark.length, positions))
        together = [axis for axis, p in enumerate(positions.values(), 1) if p is None]
        # As much as one of all positions would, if all weighed the same.
        return form.spread(reach(x.sum(together)), apart) * number_apart(positions)

    def inside(
        self, use: Use, batching: Separate, reached: frozenset[int]
    ) -> ExampleWeights | None:
        """The same inside of the scans around a use; `None` where steps have weights of their own.

        Args:
          use: of a parameter.
          batching: where its output holds the examples.
          reached: as for `of`.
        """
        form = Canonical(use, batching)
        for number, *_ in self._alike(reached, batching):
            mark: Mark = self._analysis.marks[number]
            positions = self._analysis.positions.of(use, form, mark)
            if any(p is not None and p.is_step for p in positions.values()):
                return None
        return self.of(use, Canonical(use, batching, inside=True), reached)

    def _alike(self, reached: frozenset[int], batching: Separate) -> list[list[int]]:
        """Marks in groups that hold their examples in the same way, and are reached in the same."""
        groups: dict[Hashable, list[int]] = {}
        for number in sorted(reached):
            alike = self._analysis.marks[number].alike, batching.link(number)
            groups.setdefault(alike, []).append(number)
        return list(groups.values())


def added(arrays: Iterable[Array]) -> Array:
    """The sum of at least one array."""
    return functools.reduce(jnp.add, arrays)


def _is_even(batching: Separate, number: int) -> bool:
    """Whether all elements of an example reach the same examples of a mark."""
    owner = batching.classes
    assert owner is not None
    counts = np.bincount(owner)
    pairs = batching.link(number).pairs
    if pairs is None or counts.min() < counts.max():
        return False
    together = Pairs(owner[pairs.elements], pairs.examples)
    return len(pairs) == counts[0] * len(together)


def ranks(analysis: Analysis, number: int) -> Int[np.ndarray, " N"]:
    """For each example of a mark its number among those that belong to one example of a layer.

    Where rows are read at indices that are known only then, all of them may be one row.
    """
    count = analysis.marks[number].examples
    alone = np.zeros(count, int)
    together = []
    for use in analysis.uses:
        batching = analysis.batching(use)
        if number not in batching.marks:
            continue
        link = batching.link(number)
        steps = [*(pairs for pairs, _ in link.reads), link.pairs]
        injective = all(pairs is None or pairs.is_injective for pairs in steps)
        if batching.classes is None and injective and all(r.distinct for _, r in link.reads):
            continue
        if link.reads:
            return np.arange(count)
        pairs = batching.pairs(number)
        owner = np.arange(batching.size) if batching.classes is None else batching.classes
        together.append(Pairs(pairs.examples, owner[pairs.elements]))
    groups = classes(count, together)
    if groups is None:
        return alone
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups)
    alone[order] = np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return alone
