"""Products and convolutions: what they do to axes, and as layers of a parameter."""

from typing import NamedTuple

from optax_kron.capture.program.graph import Node, Value
from optax_kron.capture.rules import views
from optax_kron.capture.rules.contraction import (
    Contraction,
    DenseInputs,
    PatchInputs,
    RoleFactors,
    free,
    role_factors,
)
from optax_kron.capture.rules.record import Primitive
from optax_kron.capture.rules.views import NEW, View


class _Dot(NamedTuple):
    """The axes of one operand of a `dot_general`.

    Its output has the batch axes, then the free ones of the left operand, then of the right one.
    """

    contracted: tuple[int, ...]
    batch: tuple[int, ...]
    free: tuple[int, ...]


def _dot(dimension_numbers, i: int, ndim: int) -> _Dot:
    contracted, batch = (tuple(axes[i]) for axes in dimension_numbers)
    used = {*contracted, *batch}
    return _Dot(contracted, batch, tuple(a for a in range(ndim) if a not in used))


def _dot_axis(node: Node, i: int, output: Value, axis: int) -> int | None:
    """Of `dot_general`: batch axes of both operands, free axes of one."""
    return _dot_axis_of(node.params["dimension_numbers"], node, i, output, axis)


def _dot_axis_of(dimension_numbers, node: Node, i: int, output: Value, axis: int) -> int | None:
    mine = _dot(dimension_numbers, i, node.operands[i].ndim)
    if axis < len(mine.batch):
        return mine.batch[axis]
    # Free axes of the left operand follow the batch axes; those of the right one are the last.
    first = len(mine.batch) if i == 0 else output.ndim - len(mine.free)
    return mine.free[axis - first] if 0 <= axis - first < len(mine.free) else None


def _ragged_dot_axis(node: Node, i: int, output: Value, axis: int) -> int | None:
    """Of `ragged_dot_general`: as of a dot, if only free rows are ragged.

    Which of them meet which matrix is said by integers; none meets another.
    """
    numbers = node.params["ragged_dot_dimension_numbers"]
    (left, _), (left_batch, _) = dims = numbers.dot_dimension_numbers
    if i != 0 or not set(numbers.lhs_ragged_dimensions).isdisjoint((*left, *left_batch)):
        return None
    return _dot_axis_of(dims, node, 0, output, axis)


def _dot_layer(node: Node, i: int, view: View) -> Contraction | None:
    """A kernel: contracted axes are inputs, batch axes count blocks, free axes are outputs.

    Of `einsum("ntbi,bio->nbto")`, with x [8, 5, 2, 3] and a kernel [2, 3, 4]: 2 blocks of 3 inputs
    and 4 outputs, and the free axes 8 and 5 of x.
    """
    x = node.operands[1 - i]
    if not isinstance(x, Value):
        return None
    kernel = _dot(node.params["dimension_numbers"], i, len(view.axes))
    other = _dot(node.params["dimension_numbers"], 1 - i, x.ndim)
    # A sum over an axis that a broadcast made is a sum of inputs, which no factor of the kernel is.
    if any(f.axis == NEW for axis in kernel.contracted for f in view.axes[axis]):
        return None
    operand_axes: list[RoleFactors] = [()] * x.ndim
    output_axes: list[RoleFactors] = []
    for mine, axis in zip(kernel.contracted, other.contracted, strict=True):
        operand_axes[axis] = role_factors("input", view.axes[mine], 0)
    for mine, axis in zip(kernel.batch, other.batch, strict=True):
        output_axes.append(role_factors("block", view.axes[mine], len(output_axes)))
        operand_axes[axis] = output_axes[-1]
    for number in (0, 1):
        if number == i:
            for axis in kernel.free:
                output_axes.append(role_factors("output", view.axes[axis], len(output_axes)))
        else:
            for axis in other.free:
                output_axes.append(free(len(output_axes), x.shape[axis]))
                operand_axes[axis] = output_axes[-1]
    return Contraction("dense", DenseInputs(x), tuple(operand_axes), tuple(output_axes))


def _conv_axis(node: Node, i: int, output: Value, axis: int) -> int | None:
    """Of `conv_general_dilated`: the batch axis of the images."""
    numbers = node.params["dimension_numbers"]
    batch = axis == numbers.out_spec[0] and node.params["batch_group_count"] == 1
    return numbers.lhs_spec[0] if batch and i == 0 else None


def _conv_layer(node: Node, i: int, view: View) -> Contraction | None:
    """A convolution is a dense layer on patches; each group of features is a block.

    The patches of images [8, 10, 10, 3] under a window of 5 x 5 are [8, 75, 6, 6], and the kernel
    is one of 75 inputs at 36 positions.
    """
    params, numbers = node.params, node.params["dimension_numbers"]
    images = node.operands[0]
    if i != 1 or params["batch_group_count"] != 1 or not isinstance(images, Value):
        return None
    if any(f.axis == NEW for factors in view.axes for f in factors):
        return None
    groups = params["feature_group_count"]
    out_axis, in_axis, *spatial = numbers.rhs_spec
    split = views.regroup(view.axes[out_axis], (groups, view.shape[out_axis] // groups))
    if split is None:
        return None
    # Group g maps its share of the input features to its share of the output features, which come
    # group by group: the slow factor of the output features is the group.
    blocks = role_factors("block", split[0], 0)
    inputs = [f for axis in (in_axis, *spatial) for f in role_factors("input", view.axes[axis], 0)]
    out_batch, out_feature, *out_spatial = numbers.out_spec
    output = [free(a, size) for a, size in enumerate(node.outputs[0].shape)]
    output[out_feature] = (*blocks, *role_factors("output", split[1], 0))
    patches = (output[out_batch], (*blocks, *inputs), *(output[a] for a in out_spatial))
    return Contraction("conv", PatchInputs(images, node), patches, tuple(output))


RECORDS = {
    "dot_general": Primitive(_dot_axis, layer=_dot_layer, shares=True),
    "ragged_dot_general": Primitive(_ragged_dot_axis),
    "conv_general_dilated": Primitive(_conv_axis, layer=_conv_layer),
}
