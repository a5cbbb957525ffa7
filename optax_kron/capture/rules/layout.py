"""Primitives that move elements and compute nothing: reshapes, transposes, slices, joins.

For each of them up to four facts stand side by side: which axis of the operand an axis of the
output is, what is selected along it, which image of a parameter the output is, and what it makes of
known integers.
"""

# Of `x[2:4]`, with x [8, 3]:
#
#     axis      1 -> 1; 0 -> none, as it is cut
#     select    along axis 0, elements 2, 3 of x make 0, 1 of the output
#     view      rows 2:4 of a parameter
#     integers  x[2:4]

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from optax_kron.capture.program.graph import Node, Operand, Value
from optax_kron.capture.program.knowledge import Knowledge
from optax_kron.capture.rules.batch_axes import Batching, Link, Mixed, Separate, linked
from optax_kron.capture.rules.pairs import Pairs
from optax_kron.capture.rules.record import Primitive, SelectRule, along, same_axis
from optax_kron.capture.rules.views import NEW, Part, View, part_of, regroup
from optax_kron.layers.layer import AxisFactor, AxisFactors, spans


def _iota_integers(node: Node) -> np.ndarray:
    dimension, shape = node.params["dimension"], node.params["shape"]
    count = np.arange(shape[dimension])
    return np.broadcast_to(
        count.reshape([-1 if a == dimension else 1 for a in range(len(shape))]), shape
    )


# ----------------------------------------------------------------------------------------- reshapes


def _reshaped(node: Node, operand: Operand) -> list[int]:
    """The axes of the operand as a reshape reads them: it may transpose first."""
    return list(node.params.get("dimensions") or range(operand.ndim))


def _reshape_parts(node: Node, operand: Operand, output: Value, batching: Separate) -> Batching:
    """Where the examples are before a reshape."""
    order = _reshaped(node, operand)
    shape = [operand.shape[a] for a in order]
    moved = _reshape_batching(batching, output.shape, shape)
    moved = moved or _coarser(batching, output.shape, shape, node)
    return moved.moved(order[moved.number]) if isinstance(moved, Separate) else moved


def _reshape_batching(
    batching: Separate, old: Sequence[int], new: Sequence[int]
) -> Separate | None:
    """Where the examples are after a reshape; `None` if no axis holds them any more.

    [8, 15] with examples along axis 0 becomes [8, 5, 3]: axis 0 again; or [120]: axis 0, of which
    each example has 15 elements in a row, `after = 15`. In [4, 30] no axis holds them.
    """
    inner = batching.after * math.prod(old[batching.number + 1 :])
    stride = 1
    for axis in reversed(range(len(new))):
        after, left = divmod(inner, stride)
        extent = stride * new[axis]
        if left == 0 and stride <= inner and inner * batching.size <= extent:
            before, rest = divmod(new[axis], after * batching.size)
            if rest == 0 and after > 0:
                return dataclasses.replace(batching, axis=axis, before=before, after=after)
        stride = extent
    return None


def _coarser(batching: Separate, old: Sequence[int], new: Sequence[int], node: Node) -> Batching:
    """After a reshape of axes of which selections were made together, the slowest counts examples.

    Of each of its elements all are one example that the faster axes enumerate.
    """
    inner = batching.after * math.prod(old[batching.number + 1 :])
    stride = 1
    for axis in reversed(range(len(new))):
        top = stride * new[axis]
        is_slowest = batching.before == 1 and top == inner * batching.size
        if batching.links and is_slowest and stride % inner == 0:
            parts = stride // inner
            links = {}
            for mark in sorted(batching.marks):
                pairs = batching.pairs(mark)
                coarse = Pairs(pairs.elements // parts, pairs.examples)
                links[mark] = Link(batching.link(mark).reads, coarse)
            return linked(axis, new[axis], links, node)
        stride = top
    return Mixed(batching.marks, node)


def _reshape_view(node: Node, view: View) -> list[View] | None:
    """Factors of all axes in a row, distributed anew."""
    order = node.params.get("dimensions") or range(len(view.axes))
    return _with_axes(view, regroup([f for a in order for f in view.axes[a]], _shape(node)))


def _reshape_integers(node: Node, x: np.ndarray) -> np.ndarray:
    return x.reshape(_shape(node))


def _shape(node: Node) -> tuple[int, ...]:
    return node.outputs[0].shape


def _with_axes(view: View, axes: Iterable[AxisFactors] | None) -> list[View] | None:
    return None if axes is None else [dataclasses.replace(view, axes=tuple(axes))]


def _squeeze_axis(node: Node, i: int, output: Value, axis: int) -> int:
    return _kept(node, node.operands[i].ndim)[axis]


def _squeeze_view(node: Node, view: View) -> list[View] | None:
    return _with_axes(view, (view.axes[a] for a in _kept(node, len(view.axes))))


def _kept(node: Node, ndim: int) -> list[int]:
    dropped = {a % ndim for a in node.params["dimensions"]}
    return [a for a in range(ndim) if a not in dropped]


def _transpose_axis(node: Node, i: int, output: Value, axis: int) -> int:
    return node.params["permutation"][axis]


def _transpose_view(node: Node, view: View) -> list[View] | None:
    return _with_axes(view, (view.axes[a] for a in node.params["permutation"]))


def _transpose_integers(node: Node, x: np.ndarray) -> np.ndarray:
    return x.transpose(node.params["permutation"])


def _broadcast_axis(node: Node, i: int, output: Value, axis: int) -> int | None:
    dimensions = list(node.params["broadcast_dimensions"])
    return dimensions.index(axis) if i == 0 and axis in dimensions else None


def _broadcast_view(node: Node, view: View) -> list[View] | None:
    """Axes that grow have a new factor, of no axis of the origin."""
    shape, dimensions = node.params["shape"], list(node.params["broadcast_dimensions"])
    axes = []
    for a, size in enumerate(shape):
        old = view.axes[dimensions.index(a)] if a in dimensions else ()
        grown = size != math.prod(f.size for f in old)
        axes.append((AxisFactor(NEW, 1, size),) if grown else old)
    return _with_axes(view, axes)


def _broadcast_integers(node: Node, x: np.ndarray) -> np.ndarray:
    shape, dimensions = node.params["shape"], node.params["broadcast_dimensions"]
    made = [1] * len(shape)
    for axis, size in zip(dimensions, x.shape, strict=True):
        made[axis] = size
    return np.broadcast_to(x.reshape(made), shape)


# ----------------------------------------------------------------------------- selections and joins


def _selecting(
    made: Callable[[Node, int, Value, int], tuple[np.ndarray, np.ndarray]],
) -> SelectRule:
    """The rule of a primitive that selects elements along an axis, known ones.

    Args:
      made: A function of (node, number of the operand, output, axis): which elements of the operand
        make which of the output, that may lie outside of it.
    """

    def select(node: Node, i: int, output: Value, batching: Separate, known: Knowledge) -> Batching:
        operand, axis = node.operands[i], batching.number
        if not operand.ndim:  # what pads, the same for all examples
            return Mixed(batching.marks, node)
        # What of the output lies outside of it, as after a cut, is made by no element.
        elements, numbers = made(node, i, output, axis)
        there = (numbers >= 0) & (numbers < output.shape[axis])
        pairs = Pairs(elements[there], numbers[there])
        return batching.made_from(pairs, axis, operand.shape[axis], node)

    return select


def _count(node: Node, i: int, axis: int) -> np.ndarray:
    return np.arange(node.operands[i].shape[axis])


@_selecting
def _slice_select(node: Node, i: int, output: Value, axis: int):
    elements = _count(node, i, axis)[_slices(node)[axis]]
    return elements, np.arange(len(elements))


def _slices(node: Node) -> tuple[slice, ...]:
    starts, limits = node.params["start_indices"], node.params["limit_indices"]
    strides = node.params["strides"] or (1,) * len(starts)
    return tuple(map(slice, starts, limits, strides))


def _slice_view(node: Node, view: View) -> list[View] | None:
    """Runs of rows, of which each is there."""
    slices = _slices(node)
    if any(s.step != 1 for s in slices):
        return None
    image = part_of(view, [(s.start, s.stop) for s in slices])
    return None if image is None else [image]


def _slice_integers(node: Node, x: np.ndarray) -> np.ndarray:
    return x[_slices(node)]


@_selecting
def _rev_select(node: Node, i: int, output: Value, axis: int):
    elements = _count(node, i, axis)
    return elements, elements[::-1]


def _rev_axis(node: Node, i: int, output: Value, axis: int) -> int | None:
    return None if axis in node.params["dimensions"] else axis


def _rev_integers(node: Node, x: np.ndarray) -> np.ndarray:
    return np.flip(x, node.params["dimensions"])


@_selecting
def _pad_select(node: Node, i: int, output: Value, axis: int):
    """Of `pad`, also by negative widths, which cut."""
    low, _, between = node.params["padding_config"][axis]
    elements = _count(node, i, axis)
    return elements, low + elements * (between + 1)


def _pad_axis(node: Node, i: int, output: Value, axis: int) -> int | None:
    """Of `pad`, where it does nothing."""
    plain = tuple(node.params["padding_config"][axis]) == (0, 0, 0)
    return axis if i == 0 and plain else None


@_selecting
def _concatenate_select(node: Node, i: int, output: Value, axis: int):
    elements = _count(node, i, axis)
    return elements, elements + sum(x.shape[axis] for x in node.operands[:i])


def _concatenate_join(node: Node, i: int, view: View) -> Part:
    axis = node.params["dimension"]
    return Part(view, axis, sum(x.shape[axis] for x in node.operands[:i]))


def _concatenate_integers(node: Node, *arrays: np.ndarray) -> np.ndarray:
    return np.concatenate(arrays, node.params["dimension"])


@_selecting
def _split_select(node: Node, i: int, output: Value, axis: int):
    elements = _count(node, i, axis)
    return elements, elements - sum(node.params["sizes"][: node.outputs.index(output)])


def _split_view(node: Node, view: View) -> list[View] | None:
    """Of `split`: each output shows a run of rows."""
    axis, start, images = node.params["axis"], 0, []
    for size in node.params.get("sizes", (1,) * view.shape[axis]):
        wanted = list(spans(view.shape))
        wanted[axis] = (start, start + size)
        image = part_of(view, wanted)
        if image is None:
            return None
        images.append(image)
        start += size
    return images


def _unstack_axis(node: Node, i: int, output: Value, axis: int) -> int:
    return axis + (axis >= node.params["axis"])


def _unstack_view(node: Node, view: View) -> list[View] | None:
    """Of `unstack`: a split into rows, each without its axis."""
    axis, images = node.params["axis"], _split_view(node, view)
    if images is None:
        return None
    return [
        dataclasses.replace(image, axes=(*image.axes[:axis], *image.axes[axis + 1 :]))
        for image in images
    ]


def _stack_axis(node: Node, i: int, output: Value, axis: int) -> int | None:
    made = node.params["axis"]
    return None if axis == made else axis - (axis > made)


def _stack_join(node: Node, i: int, view: View) -> Part:
    axis = node.params["axis"]
    axes = (*view.axes[:axis], (), *view.axes[axis:])
    return Part(dataclasses.replace(view, axes=axes), axis, i)


@_selecting
def _tile_select(node: Node, i: int, output: Value, axis: int):
    numbers = np.arange(output.shape[axis])
    return numbers % node.operands[i].shape[axis], numbers


def _tile_view(node: Node, view: View) -> list[View] | None:
    """Axes that are repeated have a new slowest factor, of no axis of the origin."""
    axes = zip(node.params["reps"], view.axes, strict=True)
    return _with_axes(
        view, ((AxisFactor(NEW, 1, n), *factors) if n != 1 else factors for n, factors in axes)
    )


# ------------------------------------------------------------------------------------------ records

RECORDS = {
    "iota": Primitive(integers=_iota_integers),
    "reshape": Primitive(parts=_reshape_parts, view=_reshape_view, integers=_reshape_integers),
    "transpose": Primitive(_transpose_axis, view=_transpose_view, integers=_transpose_integers),
    "squeeze": Primitive(_squeeze_axis, view=_squeeze_view, integers=_reshape_integers),
    "broadcast_in_dim": Primitive(
        _broadcast_axis, view=_broadcast_view, integers=_broadcast_integers, shares=True
    ),
    "slice": Primitive(same_axis, select=_slice_select, view=_slice_view, integers=_slice_integers),
    "rev": Primitive(_rev_axis, select=_rev_select, integers=_rev_integers),
    "pad": Primitive(_pad_axis, select=_pad_select),
    "concatenate": Primitive(
        along("dimension"),
        select=_concatenate_select,
        integers=_concatenate_integers,
        join=_concatenate_join,
    ),
    "split": Primitive(along("axis"), select=_split_select, view=_split_view),
    "unstack": Primitive(_unstack_axis, view=_unstack_view),
    "stack": Primitive(_stack_axis, join=_stack_join),
    "tile": Primitive(same_axis, select=_tile_select, view=_tile_view),
}
