"""Which axis of a value counts the data, as a pass backwards from the marked losses finds it.

Shapes don't tell. What does is where a value goes: element `n` along the axis of the data reaches
the loss of datum `n` and of no other. Every value of the program gets one of

- no label: it reaches no mark, as a regulariser does not;
- `Data`: along that axis (or that digit of it, where axes were flattened together) each element
  belongs to one datum;
- `Coupled`: it touches several data at once, as parameters do, and activations before a batch norm.

An unknown equation couples its inputs: that is always sound.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a value holds data.

    Attributes:
      axis: of the value; or, if all of the value belongs to one datum, the scan whose steps count
        the data, or `None` where there is only one.
      before: how often the data are repeated along the axis by a slower digit.
      after: number of elements that each datum has along the axis, in a row.
    """

    axis: Any = None
    before: int = 1
    after: int = 1

    @property
    def on_axis(self) -> bool:
        """Whether the data lie along an axis of the value."""
        return isinstance(self.axis, int)


@dataclasses.dataclass(frozen=True)
class Data(Place):
    """A value whose elements belong to one datum each.

    Attributes:
      marks: the losses that it reaches.
      size: number of elements that the data's digit of the axis has.
      source: which datum each of these is, -1 for none; `None`: they are the data in order.
    """

    marks: frozenset[int]
    size: int
    source: tuple[int, ...] | None = None

    def moved(self, axis: int) -> "Data":
        """The same along another axis."""
        return dataclasses.replace(self, axis=axis)

    def among(self, elements: Iterable[int], size: int) -> "Data":
        """The same before these of `size` elements were selected, along all of an axis."""
        source = [-1] * size
        for element, datum in zip(elements, self.source or range(self.size), strict=True):
            source[element] = datum
        return dataclasses.replace(self, size=size, source=tuple(source))


@dataclasses.dataclass(frozen=True)
class Coupled:
    """A value that several data share; `node` is the equation that made it so."""

    marks: frozenset[int]
    node: Any = dataclasses.field(default=None, compare=False)


Label = Data | Coupled | None


def meet(first: Label, second: Label, node: Any = None) -> Label:
    """The label of a value that is used in two ways."""
    if first is None or second is None:
        return first if second is None else second
    marks = first.marks | second.marks
    if isinstance(first, Data) and isinstance(second, Data):
        same = dataclasses.replace(first, marks=marks)
        return same if same == dataclasses.replace(second, marks=marks) else Coupled(marks, node)
    coupled = [label for label in (first, second) if isinstance(label, Coupled)]
    return Coupled(marks, coupled[0].node)
