"""How each linear equation reads a parameter: which digits of it meet which axes.

A reader takes an equation and the number and view of the operand that shows a parameter. It returns
what to record and the slots of the operand and of the output, or `None` if no block describes it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from optax_kron.capture.program.graph import Node, Value
from optax_kron.capture.rules import views
from optax_kron.capture.rules.axes import dot_free_axes
from optax_kron.capture.rules.views import NEW, AxisFactor, AxisFactors, View


@dataclasses.dataclass(frozen=True)
class Slot:
    """A part of an axis, and what it enumerates.

    Attributes:
      role: "block", "input" or "output" digits of the kernel, or "free": data and positions.
      key: the kernel's digit; for free slots, a name that operand and output share.
      size: number of elements.
    """

    role: str
    key: Any
    size: int


Slots = tuple[Slot, ...]


@dataclasses.dataclass(frozen=True)
class Reading:
    """One linear use of a parameter.

    Attributes:
      kind: "dense", "conv", "embedding" or "bias".
      operand: the value to record; `None` for a bias, whose input is one.
      operand_slots: for each axis of the operand (for a convolution: of its patches).
      output_slots: for each axis of the output.
      column: of an embedding's indices, the one that says the row.
    """

    kind: str
    operand: Value | None
    operand_slots: tuple[Slots, ...]
    output_slots: tuple[Slots, ...]
    column: int = 0


def read(node: Node, i: int, view: View) -> Reading | None:
    """How an equation reads the parameter that its operand `i` shows."""
    reader = _READERS.get(node.name)
    return None if reader is None else reader(node, i, view)


def _slots(role: str, digits: AxisFactors, axis: int) -> Slots:
    """Slots of a role for the kernel's digits, free ones for digits that a broadcast made."""
    return tuple(
        Slot("free", (axis, n), d.size) if d.axis == NEW else Slot(role, d, d.size)
        for n, d in enumerate(digits)
    )


def _free(axis: int, size: int) -> Slots:
    return (Slot("free", (axis, 0), size),)


def _dot_general(node: Node, i: int, view: View) -> Reading | None:
    contracted, batch = node.params["dimension_numbers"]
    x = node.operands[1 - i]
    if not isinstance(x, Value):
        return None
    kernel_ndim = len(view.axes)
    kernel_free = dot_free_axes(kernel_ndim, (contracted[i], batch[i]))
    x_free = dot_free_axes(x.ndim, (contracted[1 - i], batch[1 - i]))
    x_slots: list[Slots] = [()] * x.ndim
    for axis, other in zip(contracted[i], contracted[1 - i], strict=True):
        if any(d.axis == NEW for d in view.axes[axis]):
            return None
        x_slots[other] = _slots("input", view.axes[axis], 0)
    output: list[Slots] = []
    for axis, other in zip(batch[i], batch[1 - i], strict=True):
        output.append(_slots("block", view.axes[axis], len(output)))
        x_slots[other] = output[-1]

    def add_kernel():
        for axis in kernel_free:
            output.append(_slots("output", view.axes[axis], len(output)))

    if i == 0:
        add_kernel()
    for axis in x_free:
        output.append(_free(len(output), x.shape[axis]))
        x_slots[axis] = output[-1]
    if i == 1:
        add_kernel()
    return Reading("dense", x, tuple(x_slots), tuple(output))


def _conv(node: Node, i: int, view: View) -> Reading | None:
    """A convolution is a dense layer on patches; each group of features is a block."""
    params, numbers = node.params, node.params["dimension_numbers"]
    if i != 1 or params["batch_group_count"] != 1:
        return None
    if any(d.axis == NEW for digits in view.axes for d in digits):
        return None
    groups, out = params["feature_group_count"], node.outputs[0]
    out_axis, in_axis, *spatial = numbers.rhs_spec
    split = views.regroup(
        view.axes[out_axis], (groups, math.prod(d.size for d in view.axes[out_axis]) // groups)
    )
    if split is None:
        return None
    blocks = _slots("block", split[0], 0)
    features = [*blocks, *_slots("input", view.axes[in_axis], 0)]
    for axis in spatial:
        features.extend(_slots("input", view.axes[axis], 0))
    out_batch, out_feature, *out_spatial = numbers.out_spec
    output: list[Slots] = [_free(a, size) for a, size in enumerate(out.shape)]
    output[out_feature] = (*blocks, *_slots("output", split[1], 0))
    patches = (output[out_batch], tuple(features), *(output[a] for a in out_spatial))
    return Reading("conv", node.operands[0], patches, tuple(output))


def _gather(node: Node, i: int, view: View) -> Reading | None:
    """Rows of a table: the input is an index, in place of a one-hot vector."""
    if i != 0:
        return None
    numbers, sizes = node.params["dimension_numbers"], node.params["slice_sizes"]
    batching = tuple(numbers.operand_batching_dims)
    indexed = _indexed(view, sizes, numbers.start_index_map)
    if indexed is None or not (clips(node) or len(numbers.start_index_map) == 1):
        return None
    collapsed = tuple(numbers.collapsed_slice_dims)
    digit = _row_digit(view, indexed, sizes, batching)
    if digit is None or any(a != indexed for a in collapsed):
        return None
    indices, out = node.operands[1], node.outputs[0]
    kept = [a for a in range(len(view.axes)) if a not in (*collapsed, *batching)]
    output: list[Slots] = [_free(a, size) for a, size in enumerate(out.shape)]
    for axis, kernel_axis in zip(numbers.offset_dims, kept, strict=True):
        if kernel_axis != indexed:
            output[axis] = _slots("output", view.axes[kernel_axis], axis)
    positions = [a for a in range(out.ndim) if a not in numbers.offset_dims]
    for kernel_axis, axis in zip(batching, numbers.start_indices_batching_dims, strict=True):
        output[positions[axis]] = _slots("block", view.axes[kernel_axis], positions[axis])
    indices_slots = (*(output[a] for a in positions), (Slot("input", digit, 1),))
    column = numbers.start_index_map.index(indexed)
    return Reading("embedding", indices, indices_slots, tuple(output), column)


def clips(node: Node) -> bool:
    """Whether a lookup brings indices beyond the table back to its ends."""
    modes = jax.lax.GatherScatterMode
    # What is promised to be inside is not checked: XLA clips it.
    return node.params["mode"] in (modes.CLIP, modes.PROMISE_IN_BOUNDS)


def _dynamic_slice(node: Node, i: int, view: View) -> Reading | None:
    """One row of a table, at an index that is a scalar."""
    starts, sizes = node.operands[1:], node.params["slice_sizes"]
    indexed = _indexed(view, sizes, range(len(view.axes)))
    if i != 0 or indexed is None or not isinstance(starts[indexed], Value):
        return None
    digit = _row_digit(view, indexed, sizes, ())
    if digit is None:
        return None
    output = [_slots("output", digits, a) for a, digits in enumerate(view.axes)]
    output[indexed] = _free(indexed, 1)
    index = ((Slot("input", digit, 1),),)
    return Reading("embedding", starts[indexed], index, tuple(output))


def _indexed(view: View, sizes, axes) -> int | None:
    """Which of some axes an index moves along: where a slice is whole, it is clipped to zero."""
    moving = [a for a in axes if sizes[a] != view.shape[a]] or list(axes)
    return moving[0] if len(moving) == 1 else None


def _row_digit(view: View, indexed: int, sizes, batching) -> AxisFactor | None:
    """The kernel's digit that a lookup of whole rows along an axis enumerates, if there is one."""
    rows = [a for a in range(len(view.shape)) if a != indexed and a not in batching]
    if sizes[indexed] != 1 or any(sizes[a] != view.shape[a] for a in rows):
        return None
    if sum(view.shape[a] > 1 for a in rows) > 1:
        return None  # a matrix for each index: as one row it would have an enormous factor
    digits = view.axes[indexed]
    if any(d.axis == NEW for d in digits) or len(digits) != 1 or digits[0].stride != 1:
        return None
    return digits[0]


def _mul(node: Node, i: int, view: View) -> Reading | None:
    """A scale is a layer with one input and one output for every feature."""
    x, out = node.operands[1 - i], node.outputs[0]
    if not isinstance(x, Value) or x.shape != out.shape or view.shape != out.shape:
        return None
    slots = tuple(_slots("block", digits, a) for a, digits in enumerate(view.axes))
    return Reading("dense", x, slots, slots)


def bias(view: View) -> Reading:
    """A bias by itself: the last axis of the parameter is the output, the others count blocks."""
    last = max((d.axis for digits in view.axes for d in digits), default=0)

    def slots(axis, digits):
        made = _slots("block", digits, axis)
        return tuple(
            Slot("output", s.key, s.size) if s.role == "block" and s.key.axis == last else s
            for s in made
        )

    return Reading("bias", None, (), tuple(slots(a, d) for a, d in enumerate(view.axes)))


_READERS: dict[str, Callable[[Node, int, View], Reading | None]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    "mul": _mul,
}
