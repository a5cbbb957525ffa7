"""Which axis of an operand makes which axis of an equation's output, one element for one.

What is not listed couples all elements of its operands: that is always sound.
"""

import dataclasses
import math
from collections.abc import Sequence

from optax_kron.capture.program.equations import is_literal
from optax_kron.capture.program.graph import ELEMENTWISE, Node, Value
from optax_kron.capture.program.knowledge import Knowledge
from optax_kron.capture.rules.batch_axes import Coupled, Data, Label, Link, linked, meet
from optax_kron.capture.rules.pairs import Pairs
from optax_kron.capture.rules.selections import SELECTIONS, follow

_ALONG_ONE_AXIS = {
    "cumsum": "axis",
    "cumprod": "axis",
    "cummax": "axis",
    "cummin": "axis",
    "cumlogsumexp": "axis",
    "sort": "dimension",
    "split": "axis",
    "concatenate": "dimension",
}
_MATRIX_FUNCTIONS = frozenset(
    """
    cholesky eig eigh geqp3 geqrf hessenberg householder_product lu lu_pivots_to_permutation qr
    schur svd symmetric_product triangular_solve tridiagonal tridiagonal_solve
    """.split()  # noqa: SIM905
)


def back(node: Node, labels: list[Label], known: Knowledge) -> list[Label]:
    """The labels of a plain equation's operands from those of its outputs.

    Args:
      node: the equation.
      labels: of its outputs.
      known: of the program.
    """
    if node.name == "stop_gradient":
        return [None] * len(node.operands)
    result: list[Label] = [None] * len(node.operands)
    if node.images is not None:
        for i, label in zip(node.images, labels, strict=True):
            result[i] = label
        return result
    for output, label in zip(node.outputs, labels, strict=True):
        if label is None:
            continue
        for i, operand in enumerate(node.operands):
            found = _back_one(node, output, label, i, operand)
            lost = isinstance(found, Coupled) and node.name in SELECTIONS
            if lost and isinstance(label, Data):
                found = follow(node, output, label, i, operand, known)
            result[i] = meet(result[i], found, node)
    return result


def _back_one(node, output, label, i, operand):
    if is_literal(operand) or 0 in operand.shape:
        return None
    if isinstance(label, Coupled) or not label.on_axis:
        return label
    if node.name == "reshape":
        # It may transpose its operand first.
        order = node.params.get("dimensions") or range(operand.ndim)
        moved = reshape_label(label, output.shape, [operand.shape[a] for a in order])
        if moved is None:
            moved = _coarser(label, output.shape, [operand.shape[a] for a in order], node)
        if not isinstance(moved, Data):
            return moved
        return moved.moved(order[moved.axis])
    axis = source_axis(node, i, operand, output, label.axis)
    if axis is None or operand.shape[axis] != output.shape[label.axis]:
        return Coupled(label.marks, node)
    return label.moved(axis)


def reshape_label(label: Data, old: Sequence[int], new: Sequence[int]) -> Data | None:
    """Where the data are after a reshape; `None` if no axis holds them any more."""
    inner = label.after * math.prod(old[label.axis + 1 :])
    stride = 1
    for axis in reversed(range(len(new))):
        after, left = divmod(inner, stride)
        extent = stride * new[axis]
        if left == 0 and stride <= inner and inner * label.size <= extent:
            before, rest = divmod(new[axis], after * label.size)
            if rest == 0 and after > 0:
                return dataclasses.replace(label, axis=axis, before=before, after=after)
        stride = extent
    return None


def _coarser(label: Data, old: Sequence[int], new: Sequence[int], node: Node) -> Label:
    """After a reshape of axes of which selections were made together, the slowest counts data.

    Of each of its elements all are one example that the faster axes enumerate.
    """
    inner = label.after * math.prod(old[label.axis + 1 :])
    stride = 1
    for axis in reversed(range(len(new))):
        top = stride * new[axis]
        if label.links and label.before == 1 and top == inner * label.size and stride % inner == 0:
            parts = stride // inner
            found = {}
            for mark, link in label.digit_links().items():
                assert link.pairs is not None
                found[mark] = Link(link.reads, Pairs(link.pairs.elements // parts, link.pairs.data))
            return linked(axis, new[axis], found, node)
        stride = top
    return Coupled(label.marks, node)


def source_axis(node: Node, i: int, operand: Value, output: Value, axis: int) -> int | None:
    """The axis of operand `i` whose elements make those along an axis of the output, one by one.

    `None` if there is no such axis: then every element of the operand may reach all of that axis.
    """
    name, params = node.name, node.params
    if name in ELEMENTWISE:
        return axis if operand.ndim == output.ndim else None
    if name in _ALONG_ONE_AXIS:
        return axis if params[_ALONG_ONE_AXIS[name]] % max(output.ndim, 1) != axis else None
    if name in _MATRIX_FUNCTIONS:
        return axis if axis < batch_axes(node) else None
    rule = _RULES.get(name)
    if rule is None and (name.startswith("reduce_") or name.startswith("arg")):
        rule = _reduce if "axes" in params else None
        rule = _reduce_window if "window_dimensions" in params else rule
    return None if rule is None else rule(params, i, operand, output, axis)


def batch_axes(node: Node) -> int:
    """How many leading axes of a function of matrices count matrices.

    Its first operand holds matrices (vectors of pivots or of diagonals, for two of them). Of the
    other operands and the outputs, some hold a vector or a number for each matrix.
    """
    vectors = node.name in ("lu_pivots_to_permutation", "tridiagonal_solve")
    return max(0, node.operands[0].ndim - (1 if vectors else 2))


def _reduce(params, i, operand, output, axis):
    kept = [a for a in range(operand.ndim) if a not in params["axes"]]
    return kept[axis]


def _reduce_window(params, i, operand, output, axis):
    plain = params["window_dimensions"][axis] == 1 and tuple(params["padding"][axis]) == (0, 0)
    return axis if plain and i == 0 else None


def _broadcast(params, i, operand, output, axis):
    dimensions = list(params["broadcast_dimensions"])
    return dimensions.index(axis) if i == 0 and axis in dimensions else None


def _transpose(params, i, operand, output, axis):
    return params["permutation"][axis]


def _squeeze(params, i, operand, output, axis):
    kept = [a for a in range(operand.ndim) if a not in params["dimensions"]]
    return kept[axis]


def _same_if_whole(params, i, operand, output, axis):
    return axis if operand.ndim == output.ndim else None  # the caller compares the lengths


def _slice(params, i, operand, output, axis):
    return axis


def _pad(params, i, operand, output, axis):
    return axis if i == 0 and tuple(params["padding_config"][axis]) == (0, 0, 0) else None


def _rev(params, i, operand, output, axis):
    return None if axis in params["dimensions"] else axis


def _top_k(params, i, operand, output, axis):
    return axis if axis != params.get("axis", -1) % output.ndim else None


def _fft(params, i, operand, output, axis):
    return axis if axis < output.ndim - len(params["fft_lengths"]) else None


def _dot_general(params, i, operand, output, axis):
    (left, right), (left_batch, right_batch) = params["dimension_numbers"]
    batch = (left_batch, right_batch)[i]
    if axis < len(batch):
        return batch[axis]
    axis -= len(batch)
    free = dot_free_axes(node_operands=operand.ndim, used=((left, right)[i], batch))
    other = output.ndim - len(batch) - len(free)  # free axes of the other operand
    if i == 0:
        return free[axis] if axis < len(free) else None
    return free[axis - other] if axis >= other else None


def _ragged_dot(params, i, operand, output, axis):
    # Which rows of the first operand meet which matrix is said by integers; none meets another.
    numbers = params["ragged_dot_dimension_numbers"]
    dims = numbers.dot_dimension_numbers
    (left, _), (left_batch, _) = dims
    ragged = set(numbers.lhs_ragged_dimensions)
    if i != 0 or not ragged.isdisjoint((*left, *left_batch)):
        return None
    return _dot_general({"dimension_numbers": dims}, 0, operand, output, axis)


def dot_free_axes(node_operands: int, used: tuple[Sequence[int], Sequence[int]]) -> list[int]:
    """The axes of an operand of `dot_general` that are neither contracted nor batch."""
    contracted, batch = used
    return [a for a in range(node_operands) if a not in contracted and a not in batch]


def _conv(params, i, operand, output, axis):
    numbers = params["dimension_numbers"]
    batch = axis == numbers.out_spec[0] and params["batch_group_count"] == 1
    return numbers.lhs_spec[0] if batch and i == 0 else None


def _gather(params, i, operand, output, axis):
    numbers = params["dimension_numbers"]
    offsets, collapsed = numbers.offset_dims, numbers.collapsed_slice_dims
    batching = tuple(numbers.operand_batching_dims)
    if axis in offsets:
        if i != 0:
            return None
        kept = [a for a in range(operand.ndim) if a not in collapsed and a not in batching]
        return kept[offsets.index(axis)]
    position = [a for a in range(output.ndim) if a not in offsets].index(axis)
    if i == 1:
        return position
    indices_batching = tuple(numbers.start_indices_batching_dims)
    return batching[indices_batching.index(position)] if position in indices_batching else None


def _scatter(params, i, operand, output, axis):
    if i == 0:
        return axis  # what is not overwritten stays where it is
    numbers = params["dimension_numbers"]
    batching = tuple(numbers.operand_batching_dims)
    if axis in batching:
        position = batching.index(axis)
        indices_axis = numbers.scatter_indices_batching_dims[position]
        if i == 1:
            return indices_axis
        scattered = [a for a in range(operand.ndim) if a not in numbers.update_window_dims]
        return scattered[indices_axis]
    if axis in numbers.scatter_dims_to_operand_dims or axis in numbers.inserted_window_dims:
        return None
    window = [
        a for a in range(output.ndim) if a not in numbers.inserted_window_dims and a not in batching
    ]
    return numbers.update_window_dims[window.index(axis)] if i == 2 else None


def _unstack(params, i, operand, output, axis):
    return axis + (axis >= params["axis"])


def _stack(params, i, operand, output, axis):
    return None if axis == params["axis"] else axis - (axis > params["axis"])


def _tile(params, i, operand, output, axis):
    return axis  # the caller compares the lengths


_SCATTERS = ("add", "sub", "mul", "min", "max")
_RULES = {
    "stack": _stack,
    "unstack": _unstack,
    "tile": _tile,
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "slice": _slice,
    "dynamic_slice": _same_if_whole,
    "dynamic_update_slice": _same_if_whole,
    "pad": _pad,
    "rev": _rev,
    "top_k": _top_k,
    "fft": _fft,
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _conv,
    "gather": _gather,
    "scatter": _scatter,
    **{f"scatter{sign}{kind}": _scatter for sign in "-_" for kind in _SCATTERS},
}
