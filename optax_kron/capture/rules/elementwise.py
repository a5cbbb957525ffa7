"""Primitives that work element by element: casts, sums, scales, and all functions of numbers.

A parameter that is added is a bias; one that is multiplied is a scale, a layer of as many blocks as
it has elements.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from optax_kron.capture.program.graph import ELEMENTWISE, Node, Value
from optax_kron.capture.rules.contraction import Contraction, Cut, DenseInputs, role_factors
from optax_kron.capture.rules.record import Primitive, same_axis
from optax_kron.capture.rules.views import Part, View
from optax_kron.layers.layer import AxisFactors


def _same_view(node: Node, view: View) -> list[View]:
    return [view]


def _cast_view(node: Node, view: View) -> list[View] | None:
    # A cast is linear between inexact numbers alone.
    kinds = node.operands[0].dtype.kind, node.outputs[0].dtype.kind
    return [view] if all(kind in "fcV" for kind in kinds) else None


def _negated_view(node: Node, view: View) -> list[View]:
    return [view.times(-1)]


def _mul_layer(node: Node, i: int, view: View) -> Contraction | None:
    """A scale is a layer with one input and one output for every feature."""
    x, out = node.operands[1 - i], node.outputs[0]
    if not isinstance(x, Value) or x.shape != out.shape or view.shape != out.shape:
        return None
    axes = tuple(role_factors("block", factors, a) for a, factors in enumerate(view.axes))
    return Contraction("dense", DenseInputs(x), axes, axes)


def _added_layer(node: Node, i: int, view: View) -> Contraction:
    return as_bias(view)


def as_bias(view: View) -> Contraction:
    """A bias by itself: the last axis of the parameter is the output, the others count blocks."""
    last = max((f.axis for factors in view.axes for f in factors), default=0)

    def roles(axis: int, factors: AxisFactors):
        made = role_factors("block", factors, axis)
        return tuple(
            dataclasses.replace(f, role="output")
            if f.role == "block" and f.of_kernel.axis == last
            else f
            for f in made
        )

    return Contraction("bias", None, (), tuple(roles(a, f) for a, f in enumerate(view.axes)))


def placed(part: Part, whole: Value) -> Contraction:
    """A parameter in a part of a value that has more in it: a bias of that part."""
    contraction = as_bias(part.view)
    if part.view.shape == whole.shape:
        return contraction
    cut = Cut(part.axis - whole.ndim, part.start, part.stop)
    return dataclasses.replace(contraction, output_cuts=(cut,))


def _integers(fn: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """What a function of NumPy makes of integers; numbers are broadcast."""
    return lambda node, *operands: np.broadcast_to(fn(*operands), node.outputs[0].shape)


def _select_integers(node: Node, which: np.ndarray, *cases: np.ndarray) -> np.ndarray:
    return np.where(which, cases[1], cases[0]) if which.dtype == bool else np.choose(which, cases)


_FUNCTIONS = {
    "max": np.maximum,
    "min": np.minimum,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "and": np.bitwise_and,
}
_same = _integers(lambda x: x)
_copy = Primitive(same_axis, view=_same_view, integers=_same)
_tag = Primitive(same_axis, view=_same_view)

RECORDS = {
    **dict.fromkeys(ELEMENTWISE, Primitive(same_axis)),
    **{name: Primitive(same_axis, integers=_integers(fn)) for name, fn in _FUNCTIONS.items()},
    "copy": _copy,
    "copy_p": _copy,
    "name": _tag,
    "reduce_precision": _tag,
    "convert_element_type": Primitive(same_axis, view=_cast_view, integers=_same),
    "stop_gradient": Primitive(integers=_same, stops=True),
    "select_n": Primitive(same_axis, integers=_select_integers),
    "add": Primitive(same_axis, layer=_added_layer, integers=_integers(np.add), signs=(1, 1)),
    "add_any": Primitive(same_axis, layer=_added_layer, signs=(1, 1)),
    "sub": Primitive(same_axis, layer=_added_layer, integers=_integers(np.subtract), signs=(1, -1)),
    "neg": Primitive(same_axis, view=_negated_view),
    "mul": Primitive(same_axis, layer=_mul_layer, integers=_integers(np.multiply), powers=(1, 1)),
    "div": Primitive(same_axis, powers=(1, -1)),
}
