"""Which axis of a value counts the examples, as a pass backwards from the marked losses finds it.

Shapes don't tell. What does is where a value goes: element `n` along the batch axis reaches the
loss of example `n` and of no other. Every value of the program gets a `Batching`:

- `None`: it reaches no mark, as a regulariser does not;
- `Separate`: along that axis (or that factor of it, where axes were flattened together) each
  element belongs to one example;
- `Mixed`: it touches several examples at once, as parameters do, and activations before a batch
  norm.

An unknown equation mixes its operands: that is always sound.

Where a program selects some of its examples, those before the selection and those after it are not
the same. A `Link` says for each mark which elements of an axis reach which of its examples.
Elements that reach the same example of a mark, as the halves of a batch of pairs do, are one
example. An element that reaches several is one example too, to which all of these losses belong;
one that reaches none is an example without weight.
"""

# For per-example losses [8], read from below:
#
#     h = x @ w                 x [8, 5, 3]     Separate(axis=0): each x[n] reaches loss n alone
#     h = h.reshape(40, 4)      h [40, 4]       Separate(axis=0, size=8, after=5): 5n + t is of n
#     h = h @ v                 v [4, 4]        Mixed: all examples meet it
#     h = h.reshape(8, 5, 4)    h [8, 5, 4]     Separate(axis=0)
#     loss = l2_loss(h[:, -1].sum(-1))          where the examples are is known: axis 0 of [8]
#
# With `h - h.mean(0)` in between, what is before it were Mixed: its mean reaches all losses. With
# `h[::2]` and losses [4], x [8, 5, 3] has a link: elements 0, 2, 4, 6 reach losses 0, 1, 2, 3.

import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from optax_kron.capture.program.graph import Node, Operand
from optax_kron.capture.rules.pairs import Pairs, as_factor, classes


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchAxis:
    """Where a value holds examples.

    The axis has `before * N * after` elements for N examples: element `i` belongs to example
    `(i // after) % N`.

    Attributes:
      axis: The axis of the value; or, if all of the value belongs to one example, the scan whose
        steps count the examples, or `None` where there is only one.
      before: How often the examples are repeated along the axis by a slower factor.
      after: Number of elements that each example has along the axis, in a row.
    """

    axis: int | Node | None = None
    before: int = 1
    after: int = 1

    @property
    def on_axis(self) -> bool:
        """Whether the examples lie along an axis of the value."""
        return isinstance(self.axis, int)

    @property
    def number(self) -> int:
        """Of the axis, where the examples lie along one."""
        assert isinstance(self.axis, int)
        return self.axis


@dataclasses.dataclass(frozen=True)
class Read:
    """Rows that an equation reads at indices which are known only when it runs.

    Attributes:
      index: What tells reads apart: where the indices come from, and how they are used.
      size: Number of rows that there are.
      length: Number of rows that are read.
      distinct: Whether no row is read twice.
      node: The equation.
      operand: The one of its operands that holds the indices.
      column: Of indices [..., columns], the one that says the row; `None` if they are one scalar,
        at which the rows start.
    """

    index: Hashable
    size: int
    length: int
    distinct: bool
    node: Node = dataclasses.field(compare=False)
    operand: Operand = dataclasses.field(compare=False)
    column: int | None = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class Link:
    """How the elements along an axis reach the examples of a mark.

    Attributes:
      reads: The reads between the axis and the losses, from the losses on, each with the pairs of
        what it made and of the examples, or of the rows of the read before it; `None` for one to
        one.
      pairs: The pairs of the elements, and of the examples or the rows of the last read.
    """

    reads: tuple[tuple[Pairs | None, Read], ...] = ()
    pairs: Pairs | None = None


_DIRECT = Link()


@dataclasses.dataclass(frozen=True)
class Separate(BatchAxis):
    """A value whose elements belong to one example each.

    Attributes:
      marks: Numbers of the losses that it reaches.
      size: Number of elements along the axis, or along the factor of it that counts examples.
      links: How these reach the examples of a mark, by mark; without one they are those in order.
    """

    marks: frozenset[int]
    size: int
    links: tuple[tuple[int, Link], ...] = ()

    def moved(self, axis: int) -> "Separate":
        """The same along another axis."""
        return dataclasses.replace(self, axis=axis)

    def link(self, mark: int) -> Link:
        """How the elements reach the examples of a mark."""
        return dict(self.links).get(mark, _DIRECT)

    @property
    def length(self) -> int:
        """Of the axis."""
        return self.before * self.size * self.after

    @functools.cached_property
    def classes(self) -> np.ndarray | None:
        """Which example each element of the factor belongs to; `None`: each is one of its own."""
        return classes(self.size, [link.pairs for _, link in self.links if link.pairs is not None])

    @property
    def examples(self) -> int:
        """Number N of examples."""
        return self.size if self.classes is None else int(self.classes.max()) + 1

    @property
    def is_plain(self) -> bool:
        """Whether each element of the axis is an example of its own."""
        return self.length == self.size and self.classes is None

    def pairs(self, mark: int) -> Pairs:
        """Which elements of the factor reach which examples of a mark, or rows of the last read."""
        return self.link(mark).pairs or Pairs.identity(self.size)

    def along_axis(self) -> dict[int, Link]:
        """The links of all elements of the axis, by mark, with their pairs."""
        if self.length == self.size:
            return {m: Link(self.link(m).reads, self.pairs(m)) for m in sorted(self.marks)}
        count = np.arange(self.length)
        made = Pairs(count, count // self.after % self.size)
        return {m: Link(self.link(m).reads, self.pairs(m).after(made)) for m in sorted(self.marks)}

    def made_from(self, made: Pairs, axis: int, length: int, node: Node) -> "Batching":
        """The batching of what the elements along the axis were selected from.

        Args:
          made: pairs of an element of the operand, and one of the output that is made from it.
          axis: of the operand.
          length: of that axis.
          node: the equation.
        """
        links = {
            mark: Link(link.reads, _known(link.pairs).after(made))
            for mark, link in self.along_axis().items()
        }
        return linked(axis, length, links, node)

    def read_from(self, read: Read, axis: int) -> "Separate":
        """The batching of what rows are read from, one by each element of the axis."""
        links = [
            (mark, Link((*link.reads, (link.pairs, read))))
            for mark, link in ((mark, self.link(mark)) for mark in sorted(self.marks))
        ]
        return Separate(self.marks, read.size, tuple(links), axis=axis)


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A value that several examples share.

    Attributes:
      marks: Numbers of the losses that it reaches.
      node: The equation that made it so.
      reason: What that does, if more is known than that it mixes examples.
      shared: Whether nothing in it is of one example: equations give all of it to all of them.
    """

    marks: frozenset[int]
    node: Node | None = dataclasses.field(default=None, compare=False)
    reason: str | None = dataclasses.field(default=None, compare=False)
    shared: bool = dataclasses.field(default=False, compare=False)

    @property
    def why(self) -> str:
        """What is to be told of it."""
        if self.shared and self.node:
            return f"all examples share what it makes, in {self.node.name}"
        if self.node and self.node.name in _CLOSED:
            return f"{self.node.name} may mix examples; if not, ok.per_example says so"
        if self.node and self.node.declared:
            return "ok.per_example was told that all examples share it, or of another axis"
        return self.reason or (f"{self.node.name} mixes examples" if self.node else "mixed")


Batching = Separate | Mixed | None
# Equations that nobody can look into, whose authors know.
_CLOSED = ("pallas_call", "custom_partitioning", "ffi_call", "pure_callback", "io_callback")


def _known(pairs: Pairs | None) -> Pairs:
    assert pairs is not None  # as `along_axis` gives them
    return pairs


def linked(axis: int | Node, length: int, links: Mapping[int, Link], node: Node | None) -> Batching:
    """The batching of an axis whose elements reach the examples of marks by some links.

    Args:
      axis: The axis of the value.
      length: Its length.
      links: The links, by mark.
      node: The equation that reads the value.
    """
    links = {m: link for m, link in links.items() if link.pairs is None or len(link.pairs)}
    if not links:
        return None
    marks = frozenset(links)
    pairs = {m: link.pairs or Pairs.identity(length) for m, link in links.items()}
    found = classes(length, list(pairs.values()))
    if _is_one(found, list(pairs.values())):
        return _combined(marks, node)
    before, size, after = (found is not None and as_factor(found)) or (1, length, 1)
    if size < length:
        # The examples are a factor of the axis: what reaches them is told of its elements.
        value = np.arange(length) // after % size
        pairs = {m: Pairs(value[p.elements], p.examples) for m, p in pairs.items()}
    kept = tuple(
        (m, Link(links[m].reads, None if pairs[m].is_identity(size) else pairs[m]))
        for m in sorted(links)
    )
    kept = tuple((m, link) for m, link in kept if link != _DIRECT)
    return Separate(marks, size, kept, axis=axis, before=before, after=after)


def _combined(marks: frozenset[int], node: Node | None) -> Mixed:
    return Mixed(marks, node, f"{node.name} combines examples" if node else None)


def _is_one(found: np.ndarray | None, relations: Sequence[Pairs]) -> bool:
    """Whether all that reaches a loss is one example, while the losses are of several."""
    if all(len(np.unique(pairs.examples)) == 1 for pairs in relations):
        return False
    reached = [p.elements if found is None else found[p.elements] for p in relations]
    return len(np.unique(np.concatenate(reached))) == 1


def merge(first: Batching, second: Batching, node: Node | None = None) -> Batching:
    """The batching of a value that is used in two ways."""
    if first is None or second is None:
        return first if second is None else second
    marks = first.marks | second.marks
    if isinstance(first, Separate) and isinstance(second, Separate):
        return _both(first, second, node)
    mixed = first if isinstance(first, Mixed) else second
    assert isinstance(mixed, Mixed)
    shared = all(isinstance(b, Mixed) and b.shared for b in (first, second))
    return Mixed(marks, mixed.node, mixed.reason, shared)


def _both(first: Separate, second: Separate, node: Node | None) -> Batching:
    marks = first.marks | second.marks
    same = dataclasses.replace(first, marks=marks)
    if same == dataclasses.replace(second, marks=marks):
        return same
    if first.axis is None or first.axis != second.axis or first.length != second.length:
        return Mixed(marks, node)
    one, other = first.along_axis(), second.along_axis()
    for mark, link in other.items():
        if mark in one:
            if one[mark].reads != link.reads:
                return _combined(marks, node)
            link = Link(link.reads, _known(one[mark].pairs) | _known(link.pairs))
        one[mark] = link
    return linked(first.axis, first.length, one, node)


def share_examples(first: Separate, second: Separate) -> bool:
    """Whether two values reach an example of a mark in common."""
    return any(_overlap(first, second, mark) for mark in first.marks & second.marks)


def _overlap(first: Separate, second: Separate, mark: int) -> bool:
    if first.link(mark).reads or second.link(mark).reads:
        return True
    return len(np.intersect1d(first.pairs(mark).examples, second.pairs(mark).examples)) > 0


def same_examples(first: Separate, second: Separate) -> bool:
    """Whether two values that share examples have the same ones, in the same order."""
    if first.examples != second.examples:
        return False
    return all(_by_example(first, m) == _by_example(second, m) for m in first.marks & second.marks)


def _by_example(batching: Separate, mark: int) -> Link:
    """The link of the examples of a value, in place of its elements."""
    if batching.classes is None:
        return batching.link(mark)
    pairs = batching.pairs(mark)
    return Link(batching.link(mark).reads, Pairs(batching.classes[pairs.elements], pairs.examples))
