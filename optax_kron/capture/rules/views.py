"""Layout-only images of an array: which part of it is where, in symbols.

A `View` says, for every axis of a value, which digits of the origin's axes it enumerates. A digit
of an axis is `(index // stride) % size`: reshapes split and merge digits, transposes move them, and
broadcasts add digits that belong to no axis. So a view costs nothing, whatever the size of the
array, and every step can be undone.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from optax_kron.capture.program.graph import Node
from optax_kron.layers.layer import AxisFactor, AxisFactors, spans

NEW = -1  # axis of digits that a broadcast made


@dataclasses.dataclass(frozen=True)
class View:
    """A value as an image of its origin.

    Attributes:
      origin: the value that it shows, a parameter or the output of a layer.
      part: for each axis of the origin, the range of indices that is shown.
      axes: for each axis of the value, its digits.
      steps: digits that the steps of a scan enumerate, by scan.
    """

    origin: Any
    part: tuple[tuple[int, int], ...]
    axes: tuple[AxisFactors, ...]
    steps: tuple[tuple[Any, AxisFactors], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value."""
        return tuple(math.prod(d.size for d in digits) for digits in self.axes)

    def stepped(self, scan: Any) -> "View":
        """What one step of a scan sees of a value that it scans over."""
        return dataclasses.replace(
            self, axes=self.axes[1:], steps=(*self.steps, (scan, self.axes[0]))
        )


def whole(origin: Any) -> View:
    """A value as an image of itself."""
    shape = origin.shape
    axes = tuple((AxisFactor(i, 1, d),) if d != 1 else () for i, d in enumerate(shape))
    return View(origin, spans(shape), axes)


def merge(digits: Iterable[AxisFactor]) -> AxisFactors:
    """AxisFactors in the order of the origin, neighbours made one."""
    merged: list[AxisFactor] = []
    for digit in sorted(digits, key=lambda d: (d.axis, -d.stride)):
        last = merged[-1] if merged else None
        if last and last.axis == digit.axis and last.stride == digit.stride * digit.size:
            merged[-1] = AxisFactor(digit.axis, digit.stride, last.size * digit.size)
        else:
            merged.append(digit)
    return tuple(merged)


def regroup(digits: Sequence[AxisFactor], sizes: Sequence[int]) -> list[AxisFactors] | None:
    """Distribute digits over axes of given sizes, splitting them where need be."""
    left = [d for d in digits if d.size != 1]
    groups = []
    for size in reversed(sizes):
        group: list[AxisFactor] = []
        missing = size
        while missing > 1:
            if not left:
                return None
            digit = left.pop()
            if missing % digit.size == 0:
                group.insert(0, digit)
                missing //= digit.size
            elif digit.size % missing == 0:
                group.insert(0, AxisFactor(digit.axis, digit.stride, missing))
                left.append(AxisFactor(digit.axis, digit.stride * missing, digit.size // missing))
                missing = 1
            else:
                return None
        groups.append(tuple(group))
    return groups[::-1] if not left else None


def follow(node: Node, view: View) -> list[View] | None:
    """The views that a layout-only equation makes of its operand; `None` for any other."""
    if node.name in ("split", "unstack"):
        return _split(node, view)
    rule = _RULES.get(node.name)
    axes = None if rule is None else rule(node, view)
    if axes is None:
        return None
    return [axes if isinstance(axes, View) else dataclasses.replace(view, axes=tuple(axes))]


def _split(node, view):
    axis, start, images = node.params["axis"], 0, []
    for size in node.params.get("sizes", (1,) * view.shape[axis]):
        ranges = list(spans(view.shape))
        ranges[axis] = (start, start + size)
        image = _ranges(view, ranges)
        if image is None:
            return None
        if node.name == "unstack":
            axes = (*image.axes[:axis], *image.axes[axis + 1 :])
            image = dataclasses.replace(image, axes=axes)
        images.append(image)
        start += size
    return images


def _reshape(node, view):
    order = node.params.get("dimensions") or range(len(view.axes))
    return regroup([d for a in order for d in view.axes[a]], node.outputs[0].shape)


def _transpose(node, view):
    return [view.axes[a] for a in node.params["permutation"]]


def _squeeze(node, view):
    dropped = {a % len(view.axes) for a in node.params["dimensions"]}
    return [digits for a, digits in enumerate(view.axes) if a not in dropped]


def _broadcast(node, view):
    shape, dimensions = node.params["shape"], list(node.params["broadcast_dimensions"])
    axes = []
    for a, size in enumerate(shape):
        old = view.axes[dimensions.index(a)] if a in dimensions else ()
        grown = size != math.prod(d.size for d in old)
        axes.append((AxisFactor(NEW, 1, size),) if grown else old)
    return axes


def _cast(node, view):
    inexact = all(v.dtype.kind in "fcV" for v in (node.values[0], node.outputs[0]))
    return view.axes if inexact else None


def _same(node, view):
    return view.axes


def _slice(node, view):
    strides = node.params["strides"]
    if strides is not None and any(stride != 1 for stride in strides):
        return None
    ranges = zip(node.params["start_indices"], node.params["limit_indices"], strict=True)
    return _ranges(view, list(ranges))


def _ranges(view: View, ranges: Sequence[tuple[int, int]]) -> View | None:
    """Ranges of the axes, if they are ranges of the origin's axes too."""
    part, axes = list(view.part), list(view.axes)
    for a, (start, limit) in enumerate(ranges):
        if (start, limit) == (0, view.shape[a]):
            continue
        if not axes[a] or axes[a][0].axis == NEW:
            return None
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


_RULES = {
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _cast,
    "copy": _same,
    "copy_p": _same,
    "name": _same,
    "reduce_precision": _same,
    "slice": _slice,
}
