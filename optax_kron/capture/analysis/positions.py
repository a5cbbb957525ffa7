"""Which positions of a layer are which elements of the losses: each then weighs as its own."""

# Losses [8, 5] of 8 sequences of 5 tokens, and a layer whose outputs are [8, 5, 4]: if token `t` of
# the layer reaches the loss of token `t` alone, then it weighs what that loss weighs, and padding
# that is masked in the loss does not count in the layer. To find out, the batchings are found once
# more, as if the tokens were the examples: where the layer's output keeps those apart, its axis is
# that of the tokens. Before attention it does not: each token of a layer reaches the loss of all.

import math
from collections.abc import Hashable, Mapping, Sequence

from optax_kron.capture.analysis import marks as marked
from optax_kron.capture.analysis.batching import Batchings
from optax_kron.capture.analysis.canonical import Canonical, Position
from optax_kron.capture.analysis.marks import Mark
from optax_kron.capture.analysis.uses import Use
from optax_kron.capture.program.graph import Graph
from optax_kron.capture.program.knowledge import Knowledge
from optax_kron.capture.rules.batch_axes import BatchAxis, Separate

# By axis of some losses, or factor of one, slow to fast: which positions of a use it is, if any.
LossPositions = Mapping[BatchAxis, Position | None]


class Positions:
    """Which positions of uses are elements of the losses; found when first asked for, and kept.

    Args:
      graph: The graph of the loss.
      marks: The marks of the graph.
      known: What is known of the graph.
    """

    def __init__(self, graph: Graph, marks: Sequence[Mark], known: Knowledge):
        self._graph, self._marks, self._known = graph, marks, known
        self._flattened = marked.flattened(graph)
        self._batchings: dict[Hashable, Batchings] = {}
        self._found: dict[tuple[Use, Mark], LossPositions] = {}

    def of(self, use: Use, form: Canonical, mark: Mark) -> LossPositions:
        """Which positions of a use the elements of the losses of a mark are.

        Args:
          use: of a parameter.
          form: canonical, of the use.
          mark: that the use reaches.
        """
        if (use, mark) not in self._found:
            found: dict[BatchAxis, Position | None] = {}
            for axis in mark.other_axes:
                found |= self._at(use, form, mark, axis)
            self._found[use, mark] = found
        return self._found[use, mark]

    def _at(self, use: Use, form: Canonical, mark: Mark, axis: BatchAxis) -> LossPositions:
        """The same of one axis, or of several that it was made of."""
        batching = self._batchings_at(mark, axis)[use.output]
        position = form.position(batching) if isinstance(batching, Separate) else None
        if position is not None:
            return {axis: position}
        best: LossPositions = {axis: None}
        for factors in marked.splits(axis, mark.length(axis), self._flattened):
            apart: dict[BatchAxis, Position | None] = {}
            for factor in factors:
                apart |= self._at(use, form, mark, factor)
            best = max(best, apart, key=number_apart)
        return best

    def _batchings_at(self, mark: Mark, axis: BatchAxis) -> Batchings:
        """The batchings if marks like this one, and no others, held examples along an axis."""
        key = mark.alike, axis
        if key not in self._batchings:
            alike = [m.at(axis) for m in self._marks if m.alike == mark.alike]
            self._batchings[key] = Batchings(self._graph, alike, self._known)
        return self._batchings[key]


def number_apart(positions: LossPositions) -> int:
    """How many positions weigh apart."""
    return math.prod(p.size for p in positions.values() if p is not None)
