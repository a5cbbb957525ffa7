"""Batches of taps: what layers saw of each, and the share of each in the whole."""

# Worked example. Three batches of 20, 20 and 10 examples, whose losses are means:
#
#   kfac(lambda: map(taps_of, cuts), layers)      shares 0.4, 0.4, 0.2: numbers of examples over 50
#   kfac([(0.4, a), (0.4, b), (0.2, c)], layers)  the same, with shares given
#   kfac([(1.0, a), (1.0, b), (1.0, c)], layers)  the sum, for losses that are sums
#
# Numbers of examples are known only when all batches have been read: `sums` adds up with the
# numbers themselves, and divides by their sum at the end. `ekfac` reads all batches twice.

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from jax.typing import ArrayLike

from optax_kron.layers import plan as plans
from optax_kron.layers.layer import Layer
from optax_kron.layers.plan import LayerPlan, Member
from optax_kron.layers.taps import Moments, Tap, Taps
from optax_kron.operators.curvature import structure_of
from optax_kron.operators.damping import check_number
from optax_kron.operators.vectors import Structure
from optax_kron.types import PyTree

Groups = Sequence[Tap | Moments]
Batch = Mapping[str, Groups] | tuple[ArrayLike, Mapping[str, Groups]]
Source = Mapping[str, Groups] | Iterable[Batch] | Callable[[], Iterable[Batch]]
T = TypeVar("T")


class Batches:
    """Batches of taps, checked against the layers.

    Args:
      owner: Name of the function that makes the operator, for messages.
      source: Taps; or taps or pairs `(weight, taps)`, in an iterable or from a function.
      layers: The layers that the taps belong to.
      params: The parameters, or `None`.
      times: How often the batches are read.

    Attributes:
      owner: Name of the function that makes the operator.
      plan: Plan of the layers.
      structure: Structure of the parameters.
    """

    plan: LayerPlan
    structure: Structure

    def __init__(
        self,
        owner: str,
        source: Source,
        layers: Iterable[Layer],
        params: PyTree | None,
        times: int = 1,
    ):
        self.owner = owner
        checked = plans.check_layers(owner, layers)
        known = getattr(layers, "structure", None)  # that `find_layers` has seen
        if not checked and known is None:
            raise ValueError(
                f"{owner}: there is not a single layer, and so no curvature. print(ok.find_layers("
                "...)) says why parameters are in no layer."
            )
        if not checked:
            warnings.warn(
                f"{owner}: there is not a single layer, so the curvature is zero. print(layers) "
                "says why parameters are in no layer.",
                stacklevel=3,
            )
        self._open = self._opener(source, times)
        # Layers by hand have no structure: the first batch tells the shapes of their parameters.
        self._ahead = self._open()
        first = next(self._ahead, None)
        if first is None:
            raise ValueError(f"{owner}: there are no taps.")
        self._ahead = itertools.chain([first], self._ahead)
        taps = self._pair(first)[1]
        sizes = {name: _sizes(groups[0]) for name, groups in taps.items() if groups}
        like = known if params is None else params
        self.structure = structure_of(owner, checked, like, sizes)
        self.plan = plans.plan_layers(owner, checked, self.structure.tree)

    def _opener(self, source: Source, times: int) -> Callable[[], Iterator[object]]:
        """A function that starts to read the batches, from the first on."""

        def read() -> Iterator[object]:
            batches = source() if callable(source) else source
            if isinstance(batches, Mapping):
                return iter([batches])
            if not isinstance(batches, Iterable):
                raise ValueError(
                    f"{self.owner}: taps must be the ok.Taps of ok.value_and_grad_with_taps, an "
                    f"iterable of those, or a function that returns one; got {batches!r:.100}."
                )
            return iter(batches)

        if times > 1 and isinstance(source, Iterator):
            raise ValueError(
                f"{self.owner}: the batches are read {times} times, and {type(source).__name__} "
                "can be read but once; pass a list, or a function that returns the iterator."
            )
        return read

    def sums(
        self,
        of: Callable[[Member, Groups], T],
        scaled: Callable[[T, ArrayLike], T],
        add: Callable[[T, T], T],
    ) -> dict[str, T]:
        """For each layer, the sum over batches of what is made of its taps, times their share.

        Args:
          of: Makes it, from the layer and its groups of taps.
          scaled: Multiplies it with a number.
          add: Adds two of it.
        """
        sums: dict[str, T] = {}
        total, weights = 0, []
        for weight, taps in self._read():
            weights.append(weight)
            share = self._examples(taps, len(weights)) if weight is None else weight
            total = total + share
            if len({w is None for w in weights}) > 1:
                raise ValueError(
                    f"{self.owner}: give all batches as pairs (weight, taps), or none."
                )
            for member in self.plan.members:
                name = member.layer.name
                new = scaled(of(member, taps[name]), share)
                sums[name] = add(sums[name], new) if name in sums else new
        if not weights:
            raise ValueError(
                f"{self.owner}: the function of batches returned none when called again."
            )
        if weights[0] is not None:
            return sums
        return {name: scaled(x, 1 / total) for name, x in sums.items()}

    def _read(self) -> Iterator[tuple[ArrayLike | None, Taps]]:
        """The batches; the first time without another call of the function that gives them."""
        batches, self._ahead = self._ahead, None
        for given in self._open() if batches is None else batches:
            weight, taps = self._pair(given)
            yield weight, self.plan.read_taps(taps)

    def _pair(self, given: object) -> tuple[ArrayLike | None, Taps]:
        """The weight of a batch, if it has one, and its taps in canonical form."""
        weight, taps = given if isinstance(given, tuple) and len(given) == 2 else (None, given)
        if not isinstance(taps, Mapping):
            got = f"{given!r:.40}"
            if isinstance(given, tuple):
                got = f"({', '.join(type(x).__name__ for x in given)})"
            raise ValueError(
                f"{self.owner}: each batch must be ok.Taps, or a pair (weight, ok.Taps); got {got}."
            )
        if weight is not None:
            check_number(f"{self.owner}: weights of batches", weight)
        return weight, taps if isinstance(taps, Taps) else Taps(taps)

    def _examples(self, taps: Taps, batch: int) -> int:
        """Number of examples in a batch."""
        members = self.plan.members
        number = 0
        for tap in taps[members[0].layer.name] if members else ():
            if isinstance(tap, Moments):
                if batch == 1:
                    return 1
                raise ValueError(
                    f"{self.owner}: second moments do not tell how many examples they are of; give "
                    "several batches as pairs (weight, taps), with each batch's share of the "
                    "examples."
                )
            number += tap.inputs.shape[1]
        return number


def _sizes(tap: Tap | Moments) -> tuple[int, int]:
    """d_in and d_out of a tap."""
    if isinstance(tap, Moments):
        return tap.input_factor.shape[1], tap.output_factor.shape[1]
    return tap.inputs.shape[-1], tap.output_grads.shape[-1]
