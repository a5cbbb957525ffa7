"""Data in several batches: what layers saw of each, and their share in the whole."""

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from optax_kron.layers import plan as plans
from optax_kron.layers.layer import Layer
from optax_kron.layers.plan import LayerPlan, Member
from optax_kron.layers.taps import Moments, Taps
from optax_kron.operators.base import Structure, check_number
from optax_kron.operators.curvature import structure_of

PyTree = Any
Source = Taps | Iterable[Any] | Callable[[], Iterable[Any]]


class Batches:
    """Batches of taps, checked against the layers.

    Args:
      owner: for messages.
      source: taps; or taps or pairs `(weight, taps)`, in an iterable or from a function.
      layers: that they belong to.
      params: the parameters, or `None`.
      times: how often the batches are read.

    Attributes:
      owner: for messages.
      plan: of the layers.
      structure: of the parameters.
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
        if not checked and getattr(layers, "structure", None) is None:
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
        layers = layers if hasattr(layers, "structure") else checked
        if isinstance(source, Mapping):
            source = [source]
        self._open: Callable[[], Iterable[Any]] = source if callable(source) else lambda: source
        opened: Any = self._open()
        if not isinstance(opened, Iterable):
            raise ValueError(
                f"{owner}: taps must be the ok.Taps of ok.value_and_grad_with_taps, an iterable of "
                f"those, or a function that returns one; got {opened!r:.100}."
            )
        self._next = iter(opened)
        if times > 1 and self._next is opened and not callable(source):
            raise ValueError(
                f"{owner}: the batches are read {times} times, and {type(opened).__name__} can be "
                "read but once; pass a list, or a function that returns the iterator."
            )
        first = next(self._next, None)
        if first is None:
            raise ValueError(f"{owner}: there are no taps.")
        self._first = [first]
        taps = self._pair(first)[1]
        sizes = {name: _sizes(groups[0]) for name, groups in taps.items() if groups}
        self.structure = structure_of(owner, layers, params, sizes)
        self.plan = plans.plan_layers(owner, checked, self.structure.tree)

    @property
    def members(self) -> list[Member]:
        """The layers."""
        return [m for group in self.plan.stacks.values() for m in group]

    def sums(
        self,
        of: Callable[[Member, Sequence[Any]], Any],
        scaled: Callable[[Any, Any], Any],
        add: Callable[[Any, Any], Any],
    ) -> dict[str, Any]:
        """For each layer, the sum over batches of what is made of its taps, times their share.

        Args:
          of: makes it, from the layer and its groups of taps.
          scaled: multiplies it with a number.
          add: adds two of it.
        """
        found: dict[str, Any] = {}
        whole, weights = 0, []
        for weight, taps in self._read():
            weights.append(weight)
            share = self._number(taps, len(weights)) if weight is None else weight
            whole = whole + share
            if len({w is None for w in weights}) > 1:
                raise ValueError(
                    f"{self.owner}: give all batches as pairs (weight, taps), or none."
                )
            for member in self.members:
                name = member.layer.name
                new = scaled(of(member, taps[name]), share)
                found[name] = add(found[name], new) if name in found else new
        if not weights:
            raise ValueError(
                f"{self.owner}: the function of batches returned none when called again."
            )
        if weights[0] is not None:
            return found
        return {name: scaled(x, 1 / whole) for name, x in found.items()}

    def _read(self) -> Iterator[tuple[Any, Taps]]:
        first, self._first = self._first, []
        rest = self._next if first else iter(self._open())
        for given in itertools.chain(first, rest):
            weight, taps = self._pair(given)
            yield weight, self.plan.read_taps(taps)

    def _pair(self, given):
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

    def _number(self, taps: Taps, batch: int) -> int:
        """Of data in a batch."""
        groups = taps[self.members[0].layer.name] if self.members else ()
        if not any(isinstance(tap, Moments) for tap in groups):
            return sum(tap.inputs.shape[1] for tap in groups)
        if batch > 1:
            raise ValueError(
                f"{self.owner}: second moments do not tell how many data they are of; give "
                "several batches as pairs (weight, taps), with each batch's share of the data."
            )
        return 1


def _sizes(tap: Any) -> tuple[int, int]:
    """d_in and d_out of a tap."""
    if isinstance(tap, Moments):
        return tap.input_factor.shape[1], tap.output_factor.shape[1]
    return tap.inputs.shape[-1], tap.output_grads.shape[-1]
