"""Which axis of a value counts the data, as a pass backwards from the marked losses finds it.

Shapes don't tell. What does is where a value goes: element `n` along the axis of the data reaches
the loss of datum `n` and of no other. Every value of the program gets one of

- no label: it reaches no mark, as a regulariser does not;
- `Data`: along that axis (or that digit of it, where axes were flattened together) each element
  belongs to one datum;
- `Coupled`: it touches several data at once, as parameters do, and activations before a batch norm.

An unknown equation couples its inputs: that is always sound.

Where a program selects some of its examples, those before the selection and those after it are not
the same. A `Link` says for each mark which elements of an axis reach which of its data. Elements
that reach the same datum, as the halves of a batch of pairs do, are one example. An element that
reaches several data is one example too, to which all of these losses belong; one that reaches none
is an example without weight.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from optax_kron.capture.rules.pairs import Pairs, classes, digits


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
class Read:
    """Rows that an equation reads at indices which are known only when it runs.

    Attributes:
      index: what tells reads apart: where the indices come from, and how they are used.
      size: number of rows that there are.
      length: number of rows that are read.
      distinct: whether no row is read twice.
      node: the equation.
      operand: the one of its operands that holds the indices.
      column: of indices [..., columns], the one that says the row; `None` if they are one scalar,
        at which the rows start.
    """

    index: Any
    size: int
    length: int
    distinct: bool
    node: Any = dataclasses.field(compare=False)
    operand: Any = dataclasses.field(compare=False)
    column: int | None = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class Link:
    """How the elements along an axis reach the data of a mark.

    Attributes:
      reads: those between the axis and the losses, from the losses on, each with the pairs of what
        it made and of the data, or of the rows of the read before it; `None` for one to one.
      pairs: of the elements, and of the data or the rows of the last read.
    """

    reads: tuple[tuple[Pairs | None, Read], ...] = ()
    pairs: Pairs | None = None


_DIRECT = Link()


@dataclasses.dataclass(frozen=True)
class Data(Place):
    """A value whose elements belong to one datum each.

    Attributes:
      marks: the losses that it reaches.
      size: number of elements that the data's digit of the axis has.
      links: how these reach the data of a mark, by mark; without one they are the data in order.
    """

    marks: frozenset[int]
    size: int
    links: tuple[tuple[int, Link], ...] = ()

    def moved(self, axis: int) -> "Data":
        """The same along another axis."""
        return dataclasses.replace(self, axis=axis)

    def link(self, mark: int) -> Link:
        """How the elements reach the data of a mark."""
        return dict(self.links).get(mark, _DIRECT)

    @property
    def length(self) -> int:
        """Of the axis."""
        return self.before * self.size * self.after

    @functools.cached_property
    def classes(self) -> np.ndarray | None:
        """Which example each element of the digit belongs to; `None`: each is one of its own."""
        return classes(self.size, [link.pairs for _, link in self.links if link.pairs is not None])

    @property
    def examples(self) -> int:
        """Number N of examples."""
        return self.size if self.classes is None else int(self.classes.max()) + 1

    @property
    def is_plain(self) -> bool:
        """Whether each element of the axis is an example of its own."""
        return self.length == self.size and self.classes is None

    def digit_links(self) -> dict[int, Link]:
        """The links of all values of the digit, by mark, with their pairs."""
        links = {mark: self.link(mark) for mark in sorted(self.marks)}
        whole = Pairs.identity(self.size)
        return {mark: Link(link.reads, link.pairs or whole) for mark, link in links.items()}

    def along_axis(self) -> dict[int, Link]:
        """The links of all elements of the axis, by mark, with their pairs."""
        links = self.digit_links()
        if self.length == self.size:
            return links
        made = Pairs(np.arange(self.length), np.arange(self.length) // self.after % self.size)
        return {mark: Link(x.reads, x.pairs.after(made)) for mark, x in links.items()}  # type: ignore

    def made_from(self, made: Pairs, axis: int, length: int, node: Any) -> "Label":
        """The label of what the elements along the axis were selected from.

        Args:
          made: pairs of an element of the operand, and one of the output that is made from it.
          axis: of the operand.
          length: of that axis.
          node: the equation.
        """
        links = self.along_axis()
        before = {m: Link(x.reads, x.pairs.after(made)) for m, x in links.items()}  # type: ignore
        return linked(axis, length, before, node)

    def read_from(self, read: Read, axis: int) -> "Data":
        """The label of what rows are read from, one by each element of the axis."""
        links = [
            (mark, Link((*link.reads, (link.pairs, read))))
            for mark, link in ((mark, self.link(mark)) for mark in sorted(self.marks))
        ]
        return Data(self.marks, read.size, tuple(links), axis=axis)


@dataclasses.dataclass(frozen=True)
class Coupled:
    """A value that several data share.

    Attributes:
      marks: the losses that it reaches.
      node: the equation that made it so.
      reason: what that does, if more is known than that it couples data.
    """

    marks: frozenset[int]
    node: Any = dataclasses.field(default=None, compare=False)
    reason: str | None = dataclasses.field(default=None, compare=False)

    @property
    def why(self) -> str:
        """What is to be told of it."""
        return self.reason or f"data are coupled by {self.node.name}"


Label = Data | Coupled | None


def linked(axis: Any, length: int, links: Mapping[int, Link], node: Any) -> Label:
    """The label of an axis whose elements reach the data of marks by some links.

    Args:
      axis: of the value.
      length: of the axis.
      links: by mark.
      node: the equation that reads the value.
    """
    links = {m: link for m, link in links.items() if link.pairs is None or len(link.pairs)}
    if not links:
        return None
    marks = frozenset(links)
    pairs = {m: link.pairs or Pairs.identity(length) for m, link in links.items()}
    found = classes(length, list(pairs.values()))
    if _is_one(found, list(pairs.values())):
        return Coupled(marks, node, f"data are combined by {node.name}" if node else None)
    before, size, after = digits(found) or (1, length, 1) if found is not None else (1, length, 1)
    if size < length:
        # The examples are a digit of the axis: what reaches them is told of its values.
        value = np.arange(length) // after % size
        pairs = {m: Pairs(value[p.elements], p.data) for m, p in pairs.items()}
    kept = tuple(
        (m, Link(links[m].reads, None if pairs[m].is_identity(size) else pairs[m]))
        for m in sorted(links)
    )
    kept = tuple((m, link) for m, link in kept if link != _DIRECT)
    return Data(marks, size, kept, axis=axis, before=before, after=after)


def _is_one(found: np.ndarray | None, relations: Sequence[Pairs]) -> bool:
    """Whether all that reaches a loss is one example, while the losses are of several."""
    if all(len(np.unique(pairs.data)) == 1 for pairs in relations):
        return False
    reached = [p.elements if found is None else found[p.elements] for p in relations]
    return len(np.unique(np.concatenate(reached))) == 1


def meet(first: Label, second: Label, node: Any = None) -> Label:
    """The label of a value that is used in two ways."""
    if first is None or second is None:
        return first if second is None else second
    marks = first.marks | second.marks
    if isinstance(first, Data) and isinstance(second, Data):
        return _both(first, second, node)
    coupled = [label for label in (first, second) if isinstance(label, Coupled)]
    return Coupled(marks, coupled[0].node, coupled[0].reason)


def _both(first: Data, second: Data, node: Any) -> Label:
    marks = first.marks | second.marks
    same = dataclasses.replace(first, marks=marks)
    if same == dataclasses.replace(second, marks=marks):
        return same
    if first.axis is None or first.axis != second.axis or first.length != second.length:
        return Coupled(marks, node)
    one, other = first.along_axis(), second.along_axis()
    for mark, link in other.items():
        if mark in one:
            if one[mark].reads != link.reads:
                return Coupled(marks, node, f"data are combined by {node.name}" if node else None)
            link = Link(link.reads, one[mark].pairs | link.pairs)  # type: ignore[operator]
        one[mark] = link
    return linked(first.axis, first.length, one, node)


def shares_data(first: Data, second: Data) -> bool:
    """Whether two values reach data in common."""
    return any(_overlap(first, second, mark) for mark in first.marks & second.marks)


def _overlap(first, second, mark):
    one, other = first.link(mark), second.link(mark)
    if one.reads or other.reads:
        return True
    reached = [
        np.arange(label.size) if label.link(mark).pairs is None else label.link(mark).pairs.data
        for label in (first, second)
    ]
    return len(np.intersect1d(*reached)) > 0


def same_examples(first: Data, second: Data) -> bool:
    """Whether two values that share data have the same examples, in the same order."""
    if first.examples != second.examples:
        return False
    return all(_by_example(first, m) == _by_example(second, m) for m in first.marks & second.marks)


def _by_example(label, mark):
    """The link of the examples of a value, in place of its elements."""
    link = label.link(mark)
    if label.classes is None:
        return link
    pairs = link.pairs or Pairs.identity(label.size)
    return Link(link.reads, Pairs(label.classes[pairs.elements], pairs.data))
