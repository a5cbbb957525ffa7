"""Which axis of a value counts the data: a pass backwards from the marked losses.

Shapes don't tell. What does is where a value goes: element `n` along the axis of the data reaches
the loss of datum `n` and of no other. Every value of the program gets one of

- no label: it reaches no mark, as a regulariser does not;
- `Data`: along that axis (or that digit of it, where axes were flattened together) each element
  belongs to one datum;
- `Coupled`: it touches several data at once, as parameters do, and activations before a batch norm.

An unknown equation couples its inputs: that is always sound.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from optax_kron.capture.graph import ELEMENTWISE, Graph, Node, Value, is_literal


@dataclasses.dataclass(frozen=True)
class Data:
    """Where a value holds its data.

    Attributes:
      marks: the losses that it reaches.
      size: number of data.
      axis: of the value; or, if all of the value belongs to one datum, the scan whose steps count
        the data, or `None` where there is only one.
      before: how often the data are repeated along the axis by a slower digit.
      after: number of elements that each datum has along the axis, in a row.
    """

    marks: frozenset[int]
    size: int
    axis: Any = None
    before: int = 1
    after: int = 1

    @property
    def on_axis(self) -> bool:
        """Whether the data lie along an axis of the value."""
        return isinstance(self.axis, int)

    def moved(self, axis: int) -> "Data":
        """The same along another axis."""
        return dataclasses.replace(self, axis=axis)


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


class Labels:
    """The labels of all values of a graph."""

    def __init__(self, graph: Graph, axes: dict[Node, int | None]):
        """Label a graph.

        Args:
          graph: of the whole loss.
          axes: for each mark, the axis of its per-example losses that counts the data; `None` if
            all of them belong to one datum.
        """
        self._of: dict[Value, Label] = {}
        self._marks = axes
        self._numbers = {node: i for i, node in enumerate(axes)}
        self._visit(graph)

    def __getitem__(self, value: Value) -> Label:
        return self._of.get(value)

    def data(self, value: Value) -> Data:
        """Where a value holds its data, if it does."""
        label = self[value]
        if not isinstance(label, Data):
            raise TypeError(f"{value} is not known to hold data along an axis; it is {label}")
        return label

    def _join(self, value: Any, label: Label, node: Any = None) -> bool:
        """Add a use to a value; return whether that changed its label."""
        if label is None or is_literal(value) or not jnp.issubdtype(value.dtype, jnp.inexact):
            return False  # no derivative passes through integers and booleans
        old = self._of.get(value)
        new = meet(old, label, node)
        self._of[value] = new  # type: ignore[assignment]
        return new != old

    def _visit(self, graph: Graph) -> None:
        for node in reversed(graph.nodes):
            labels = [self[v] for v in node.outputs]
            if node in self._marks:
                labels = self._mark_labels(node)
            inside = node.kind in ("scan", "remat", "cond") and node.has_marks
            if all(label is None for label in labels) and not inside:
                continue
            for value, label in zip(node.operands, self._back(node, labels), strict=True):
                self._join(value, label, node)

    def _mark_labels(self, node: Node) -> list[Label]:
        mark, axis = frozenset([self._numbers[node]]), self._marks[node]
        if isinstance(axis, Node):
            size = axis.params["length"]
        else:
            size = 1 if axis is None else node.outputs[0].shape[axis]
        return [meet(self[v], Data(mark, size, axis), node) for v in node.outputs]

    def _back(self, node: Node, labels: list[Label]) -> list[Label]:
        """The labels of a node's operands from those of its outputs."""
        if node.kind == "scan":
            return self._back_scan(node, labels)
        if node.kind == "while":
            return self._back_while(node, labels)
        if node.kind == "cond":
            merged: list[Label] = [None] * (len(node.operands) - 1)
            for body in node.bodies:
                inner = self._through(body, labels)
                merged = [meet(a, b, node) for a, b in zip(merged, inner, strict=True)]
            return [_couple(labels, node), *merged]
        if node.kind == "mark":
            return [_of_mark(node, x, labels[0]) for x in node.operands]
        if len(node.bodies) == 1:
            return self._through(node.bodies[0], labels)
        return back(node, labels)

    def _through(self, body: Graph, labels: Sequence[Label]) -> list[Label]:
        for value, label in zip(body.outputs, labels, strict=True):
            self._join(value, label)
        self._visit(body)
        return [self[v] for v in body.inputs]

    def _back_scan(self, node: Node, labels: list[Label]) -> list[Label]:
        (body,) = node.bodies
        constants, carries = node.params["num_consts"], node.params["num_carry"]

        def enter(label):  # from stacked outputs to those of one step
            if not (isinstance(label, Data) and label.on_axis):
                return label
            if label.axis > 0:
                return label.moved(label.axis - 1)
            if label.before == label.after == 1:
                return dataclasses.replace(label, axis=node)
            return Coupled(label.marks, node)

        def leave(label):  # from the inputs of one step to stacked ones
            if not isinstance(label, Data) or label.axis is None:
                return label
            if label.axis is node:
                return dataclasses.replace(label, axis=0)
            return label.moved(label.axis + 1) if label.on_axis else label

        outputs = [*labels[:carries], *map(enter, labels[carries:])]
        while True:
            inputs = self._through(body, outputs)
            carried = [
                meet(a, self._apart(b, node), node)
                for a, b in zip(
                    outputs[:carries], inputs[constants : constants + carries], strict=True
                )
            ]
            if carried == outputs[:carries]:
                break
            outputs[:carries] = carried
        shared = [self._apart(label, node) for label in inputs[:constants]]
        return [*shared, *carried, *map(leave, inputs[constants + carries :])]

    def _apart(self, label: Label, node: Node) -> Label:
        """What all steps of a scan share is coupled if the steps are the data."""
        if isinstance(label, Data) and label.axis is node:
            return Coupled(label.marks, node)
        return label

    def _back_while(self, node: Node, labels: list[Label]) -> list[Label]:
        body = node.bodies[1]
        tests, constants = node.params["cond_nconsts"], node.params["body_nconsts"]
        outputs = list(labels)
        while True:
            inputs = self._through(body, outputs)
            carried = [meet(a, b, node) for a, b in zip(outputs, inputs[constants:], strict=True)]
            if carried == outputs:
                return [*[None] * tests, *inputs[:constants], *carried]
            outputs = carried


def _of_mark(node: Node, operand: Any, label: Label) -> Label:
    """Logits, targets and losses agree in the axes that they share: the leading ones."""
    if is_literal(operand) or not isinstance(label, Data) or not label.on_axis:
        return label
    axis, losses = label.axis, node.outputs[0]
    if axis < operand.ndim and operand.shape[axis] == losses.shape[axis]:
        return label
    return Coupled(label.marks, node)


def _couple(labels: Sequence[Label], node: Node) -> Label:
    """What reaches all that any of the outputs reaches."""
    marks = [label.marks for label in labels if label is not None]
    if not marks:
        return None
    return Coupled(frozenset().union(*marks), node)


# ------------------------------------------------------------------------------ plain equations

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
    cholesky eig eigh householder_product lu lu_pivots_to_permutation qr schur svd triangular_solve
    tridiagonal_solve
    """.split()  # noqa: SIM905
)


def back(node: Node, labels: list[Label]) -> list[Label]:
    """The labels of a plain equation's operands from those of its outputs."""
    if node.name == "stop_gradient":
        return [None] * len(node.operands)
    if node.name == "optimization_barrier":
        return list(labels)
    result: list[Label] = [None] * len(node.operands)
    for output, label in zip(node.outputs, labels, strict=True):
        if label is None:
            continue
        for i, operand in enumerate(node.operands):
            result[i] = meet(result[i], _back_one(node, output, label, i, operand), node)
    return result


def _back_one(node, output, label, i, operand):
    if is_literal(operand):
        return None
    if isinstance(label, Coupled) or not label.on_axis:
        return label
    if node.name == "reshape":
        moved = reshape_label(label, output.shape, operand.shape)
        return Coupled(label.marks, node) if moved is None else moved
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
        return axis if axis < min(operand.ndim, output.ndim) - 2 else None
    rule = _RULES.get(name)
    if rule is None and (name.startswith("reduce_") or name.startswith("arg")):
        rule = _reduce if "axes" in params else None
        rule = _reduce_window if "window_dimensions" in params else rule
    return None if rule is None else rule(params, i, operand, output, axis)


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
    return axis if axis != output.ndim - 1 else None


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
    numbers = params["dimension_numbers"]
    batching = tuple(numbers.operand_batching_dims)
    if axis in batching:
        position = batching.index(axis)
        indices_axis = numbers.scatter_indices_batching_dims[position]
        if i == 0:
            return axis
        if i == 1:
            return indices_axis
        scattered = [a for a in range(operand.ndim) if a not in numbers.update_window_dims]
        return scattered[indices_axis]
    if axis in numbers.scatter_dims_to_operand_dims or axis in numbers.inserted_window_dims:
        return None
    window = [
        a for a in range(output.ndim) if a not in numbers.inserted_window_dims and a not in batching
    ]
    if i == 0:
        return axis
    return numbers.update_window_dims[window.index(axis)] if i == 2 else None


_RULES = {
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
    "conv_general_dilated": _conv,
    "gather": _gather,
    "scatter": _scatter,
    "scatter-add": _scatter,
    "scatter_add": _scatter,
    "scatter-mul": _scatter,
}
