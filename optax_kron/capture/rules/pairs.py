"""Which elements of an axis reach which examples, where equations select, repeat or join them."""

# A batch of three, of which `x[:2]` and `x[1:]` are used by the losses of two examples, is related
# to them by the pairs (0, 0), (1, 1), (1, 0), (2, 1): all three elements hang together, as one
# example. `x[0::2]` and `x[1::2]` of a batch of four give (0, 0), (2, 1), (1, 0), (3, 1): two
# examples, and to each of them two elements belong.

from collections.abc import Sequence

import numpy as np


class Pairs:
    """A relation between the elements of an axis and examples, or elements of another axis.

    Args:
      elements: Numbers of elements, one for each pair.
      examples: Numbers of the examples, one for each pair.

    Attributes:
      elements: Sorted.
      examples: Beside them.
    """

    def __init__(self, elements: np.ndarray, examples: np.ndarray):
        order = np.lexsort((examples, elements))
        elements, examples = np.asarray(elements)[order], np.asarray(examples)[order]
        # Once each: neighbours that are equal count as one.
        new = np.ones(len(order), bool)
        new[1:] = (np.diff(elements) != 0) | (np.diff(examples) != 0)
        self.elements = elements[new].astype(np.int64)
        self.examples = examples[new].astype(np.int64)

    @classmethod
    def identity(cls, size: int) -> "Pairs":
        """Each element of an axis with the example of the same number."""
        return cls(np.arange(size), np.arange(size))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Pairs)
            and np.array_equal(self.elements, other.elements)
            and np.array_equal(self.examples, other.examples)
        )

    def __hash__(self) -> int:
        return hash((self.elements.tobytes(), self.examples.tobytes()))

    def __len__(self) -> int:
        return len(self.elements)

    def __or__(self, other: "Pairs") -> "Pairs":
        return Pairs(
            np.concatenate([self.elements, other.elements]),
            np.concatenate([self.examples, other.examples]),
        )

    def is_identity(self, size: int) -> bool:
        """Whether each of `size` elements belongs to the example of its own number."""
        count = np.arange(size)
        return np.array_equal(self.elements, count) and np.array_equal(self.examples, count)

    @property
    def is_injective(self) -> bool:
        """Whether no two pairs share an element or an example."""
        return len(np.unique(self.elements)) == len(self) == len(np.unique(self.examples))

    def after(self, made: "Pairs") -> "Pairs":
        """The relation of what the elements were made from.

        Args:
          made: Pairs of an element of the operand, and one of the output that is made from it.
        """
        # The pairs of one element stand in a row: from `start`, `count` of them. All these rows one
        # after the other make the result.
        start = np.searchsorted(self.elements, made.examples, "left")
        count = np.searchsorted(self.elements, made.examples, "right") - start
        first = np.cumsum(count) - count
        index = np.arange(count.sum()) + np.repeat(start - first, count)
        return Pairs(np.repeat(made.elements, count), self.examples[index])

    def mapping(self, size: int) -> np.ndarray | None:
        """For each of `size` elements its only example, -1 for none; `None` if one has several."""
        if len(np.unique(self.elements)) < len(self):
            return None
        found = np.full(size, -1)
        found[self.elements] = self.examples
        return found


def classes(size: int, relations: Sequence[Pairs]) -> np.ndarray | None:
    """Which of `size` elements hang together by sharing examples.

    Args:
      size: Number of elements.
      relations: Of the elements to the examples of several losses.

    Returns:
      For each element the number of its class, counted in the order of their first elements. `None`
      if each element is a class of its own.
    """
    if all(pairs.is_injective for pairs in relations):
        return None
    # Each element points to the least one that it is known to hang together with.
    parent = np.arange(size)
    while True:  # halves the depth of each tree in every pass
        before = parent.copy()
        for pairs in relations:
            least = np.full(pairs.examples.max(initial=-1) + 1, size)
            np.minimum.at(least, pairs.examples, parent[pairs.elements])
            reached = least[pairs.examples]
            np.minimum.at(parent, parent[pairs.elements], reached)
            np.minimum.at(parent, pairs.elements, reached)
        parent = parent[parent]
        if np.array_equal(parent, before):
            break
    first, numbers = np.unique(parent, return_inverse=True)
    return None if len(first) == size else numbers


def as_factor(found: np.ndarray) -> tuple[int, int, int] | None:
    """Classes as one factor of their axis: how many repeat them, how many there are, their length.

    `None` if they are spread over the axis in another way.
    """
    # [0 0 1 1 0 0 1 1]: the first run is 2 long, so that slow = [0 1 0 1] has 2 values, twice.
    length = len(found)
    after = int(np.argmax(found != found[0])) or length
    if length % after:
        return None
    slow = found[::after]
    size = int(found.max()) + 1
    if len(slow) % size or len(np.unique(slow[:size])) < size:
        return None
    before = len(slow) // size
    expected = np.repeat(np.tile(slow[:size], before), after)
    return (before, size, after) if np.array_equal(expected, found) else None
