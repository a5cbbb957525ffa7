"""Layout-only images of an array: which part of it is where, in symbols.

A `View` says, for every axis of a value, which factors of the origin's axes it enumerates. A factor
of an axis is `(index // stride) % size`: reshapes split and merge factors, transposes move them,
and broadcasts add factors that belong to no axis. So a view costs nothing, whatever the size of the
array, and every step can be undone.
"""

# For a kernel w [6, 4], with factors written as axis:stride:size,
#
#     w                        [6, 4]       (0:1:6)          (1:1:4)
#     .reshape(2, 3, 4)        [2, 3, 4]    (0:3:2) (0:1:3)  (1:1:4)
#     .transpose(2, 0, 1)      [4, 2, 3]    (1:1:4) (0:3:2)  (0:1:3)
#     .reshape(8, 3)           [8, 3]       (1:1:4, 0:3:2)   (0:1:3)
#
# so that the rows of the last are w's columns and halves, and its columns thirds of w's rows.

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from optax_kron.capture.program.graph import Node, Operand, Value
from optax_kron.layers.layer import AxisFactor, AxisFactors, spans

NEW = -1  # axis of factors that a broadcast made


class Scale(NamedTuple):
    """A value of one element that multiplies a parameter before its use.

    Attributes:
      value: The value.
      power: One; minus one where the parameter is divided by it.
      scans: The scans around it, from the outside.
    """

    value: Value
    power: int
    scans: tuple[Node, ...]


@dataclasses.dataclass(frozen=True)
class View:
    """A value as an image of its origin.

    Attributes:
      origin: The value that it shows, a parameter or the output of a layer.
      part: For each axis of the origin, the range of indices that is shown.
      axes: For each axis of the value, its factors.
      steps: Factors that the steps of a scan enumerate, by scan.
      scale: The number by which it shows all of the origin multiplied.
      scales: Values of one element by which it does, too.
    """

    origin: Value
    part: tuple[tuple[int, int], ...]
    axes: tuple[AxisFactors, ...]
    steps: tuple[tuple[Node, AxisFactors], ...] = ()
    scale: float = 1
    scales: tuple[Scale, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value."""
        return tuple(math.prod(d.size for d in factors) for factors in self.axes)

    def stepped(self, scan: Node) -> "View":
        """What one step of a scan sees of a value that it scans over."""
        return dataclasses.replace(
            self, axes=self.axes[1:], steps=(*self.steps, (scan, self.axes[0]))
        )

    def times(self, number: float, scales: tuple[Scale, ...] = ()) -> "View":
        """What is shown, multiplied by a number, and by values of one element."""
        return dataclasses.replace(self, scale=self.scale * number, scales=(*self.scales, *scales))


@dataclasses.dataclass(frozen=True)
class Part:
    """What a value shows of an origin in a part of it, beside others.

    Attributes:
      view: What is shown, with the axes of the value.
      axis: The axis of the value along which others are beside it.
      start: Where it starts along that axis.
    """

    view: View
    axis: int
    start: int

    @property
    def stop(self) -> int:
        """Where it ends along the axis."""
        return self.start + self.view.shape[self.axis]

    def overlaps(self, image: View) -> bool:
        """Whether it is in an image of the value."""
        low, high = image.part[self.axis]
        return max(low, self.start) < min(high, self.stop)


def whole(origin: Value) -> View:
    """A value as an image of itself."""
    shape = origin.shape
    axes = tuple((AxisFactor(i, 1, d),) if d != 1 else () for i, d in enumerate(shape))
    return View(origin, spans(shape), axes)


def scaled(view: View, one: Operand, power: int, scans: tuple[Node, ...]) -> View | None:
    """What is shown, times a power of what has one element; `None` if it may vanish, or worse.

    Args:
      view: What is shown.
      one: A number, or a value of one element.
      power: One, or minus one.
      scans: The scans around a value.
    """
    if isinstance(one, Value):
        real = jnp.issubdtype(one.dtype, jnp.floating)
        return view.times(1, (Scale(one, power, scans),)) if real else None
    number = np.asarray(one.number)
    if number.dtype.kind == "c" or not np.isfinite(number) or not number:
        return None
    return view.times(float(number) ** power)


def merge(factors: Iterable[AxisFactor]) -> AxisFactors:
    """AxisFactors in the order of the origin, neighbours made one."""
    merged: list[AxisFactor] = []
    for factor in sorted(factors, key=lambda d: (d.axis, -d.stride)):
        last = merged[-1] if merged else None
        if last and last.axis == factor.axis and last.stride == factor.stride * factor.size:
            merged[-1] = AxisFactor(factor.axis, factor.stride, last.size * factor.size)
        else:
            merged.append(factor)
    return tuple(merged)


def regroup(factors: Sequence[AxisFactor], sizes: Sequence[int]) -> list[AxisFactors] | None:
    """Distribute factors over axes of given sizes, splitting them where need be.

    `None` if a factor would have to be split by a number that does not divide it.
    """
    # From the fastest axis on: each takes factors until their sizes multiply to its own.
    left = [d for d in factors if d.size != 1]
    groups = []
    for size in reversed(sizes):
        group: list[AxisFactor] = []
        missing = size
        while missing > 1:
            if not left:
                return None
            factor = left.pop()
            if missing % factor.size == 0:
                group.insert(0, factor)
                missing //= factor.size
            elif factor.size % missing == 0:
                group.insert(0, AxisFactor(factor.axis, factor.stride, missing))
                left.append(
                    AxisFactor(factor.axis, factor.stride * missing, factor.size // missing)
                )
                missing = 1
            else:
                return None
        groups.append(tuple(group))
    return groups[::-1] if not left else None


def part_of(view: View, wanted: Sequence[tuple[int, int]]) -> View | None:
    """Ranges of the axes, if they are ranges of the origin's axes too."""
    part, axes = list(view.part), list(view.axes)
    for a, (start, limit) in enumerate(wanted):
        if (start, limit) == (0, view.shape[a]):
            continue
        if not axes[a] or axes[a][0].axis == NEW:
            return None
        # Of the factors of an axis only the slowest can be cut, at whole runs of the others.
        slow, *rest = axes[a]
        inner = math.prod(d.size for d in rest)
        low, high = part[slow.axis]
        if start % inner or limit % inner or slow.stride * slow.size != high - low:
            return None
        first, last = start // inner, limit // inner
        part[slow.axis] = (low + first * slow.stride, low + last * slow.stride)
        kept = AxisFactor(slow.axis, slow.stride, last - first)
        axes[a] = (*([kept] if kept.size != 1 else []), *rest)
    return dataclasses.replace(view, part=tuple(part), axes=tuple(axes))
