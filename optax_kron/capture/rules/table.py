"""The records of all primitives that are known, by name.

To teach capture a primitive, or a new fact of one, write the function beside those of its kind, and
name it here. A primitive without a record is sound: it mixes examples, and holds no layer.
"""

import numpy as np

from optax_kron.capture.program.graph import ELEMENTWISE, Node, Operand, Value
from optax_kron.capture.program.knowledge import IntegerRule, Knowledge
from optax_kron.capture.rules import indexing, layout, linear, reductions
from optax_kron.capture.rules.batch_axes import Batching, Mixed, Separate, merge
from optax_kron.capture.rules.record import Primitive
from optax_kron.capture.rules.reductions import along_setting

_UNKNOWN = Primitive()
_REDUCTION = Primitive(axis=reductions.reduce_axis)
_INTEGERS: dict[str, IntegerRule] = {
    name: layout.elementwise(fn)
    for name, fn in {
        "sub": np.subtract,
        "max": np.maximum,
        "min": np.minimum,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
        "eq": np.equal,
        "ne": np.not_equal,
        "and": np.bitwise_and,
    }.items()
}
_same = layout.elementwise(lambda x: x)
_image = Primitive(layout.same_axis, view=layout.same_view, integers=_same)
_cumulative = Primitive(along_setting("axis"))
_matrices = Primitive(reductions.matrices())
_scatter = Primitive(indexing.scatter_axis)


def _named(names: str, record: Primitive) -> dict[str, Primitive]:
    return dict.fromkeys(names.split(), record)


_TABLE: dict[str, Primitive] = {
    # Elementwise.
    **{name: Primitive(layout.same_axis, integers=_INTEGERS.get(name)) for name in ELEMENTWISE},
    **_named("copy copy_p", _image),
    **_named("name reduce_precision", Primitive(layout.same_axis, view=layout.same_view)),
    "convert_element_type": Primitive(layout.same_axis, view=layout.cast_view, integers=_same),
    "stop_gradient": Primitive(integers=_same, stops=True),
    "select_n": Primitive(layout.same_axis, integers=layout.select_integers),
    "add": Primitive(
        layout.same_axis,
        layer=linear.bias_layer,
        integers=layout.elementwise(np.add),
        adds=True,
    ),
    "add_any": Primitive(layout.same_axis, layer=linear.bias_layer, adds=True),
    "mul": Primitive(
        layout.same_axis, layer=linear.mul_layer, integers=layout.elementwise(np.multiply)
    ),
    # Layouts.
    "iota": Primitive(integers=layout.iota_integers),
    "reshape": Primitive(
        parts=layout.reshape_parts, view=layout.reshape_view, integers=layout.reshape_integers
    ),
    "transpose": Primitive(
        layout.transpose_axis, view=layout.transpose_view, integers=layout.transpose_integers
    ),
    "squeeze": Primitive(
        layout.squeeze_axis, view=layout.squeeze_view, integers=layout.reshape_integers
    ),
    "broadcast_in_dim": Primitive(
        layout.broadcast_axis, view=layout.broadcast_view, integers=layout.broadcast_integers
    ),
    "slice": Primitive(
        layout.same_axis,
        select=layout.slice_select,
        view=layout.slice_view,
        integers=layout.slice_integers,
    ),
    "rev": Primitive(layout.rev_axis, select=layout.rev_select, integers=layout.rev_integers),
    "pad": Primitive(layout.pad_axis, select=layout.pad_select),
    "concatenate": Primitive(
        along_setting("dimension"),
        select=layout.concatenate_select,
        integers=layout.concatenate_integers,
    ),
    "split": Primitive(along_setting("axis"), select=layout.split_select, view=layout.split_view),
    "unstack": Primitive(layout.unstack_axis, view=layout.unstack_view),
    "stack": Primitive(layout.stack_axis),
    "tile": Primitive(layout.same_axis, select=layout.tile_select),
    # Products.
    "dot_general": Primitive(linear.dot_axis, layer=linear.dot_layer),
    "ragged_dot_general": Primitive(linear.ragged_dot_axis),
    "conv_general_dilated": Primitive(linear.conv_axis, layer=linear.conv_layer),
    # Lookups.
    "gather": Primitive(
        indexing.gather_axis, select=indexing.gather_select, layer=indexing.gather_layer
    ),
    "dynamic_slice": Primitive(
        layout.same_axis,
        select=indexing.dynamic_slice_select,
        layer=indexing.dynamic_slice_layer,
    ),
    "dynamic_update_slice": Primitive(layout.same_axis),
    "scatter": _scatter,
    **{f"scatter{s}{kind}": _scatter for s in "-_" for kind in ("add", "sub", "mul", "min", "max")},
    # What works along some axes.
    **_named("cumprod cummax cummin cumlogsumexp", _cumulative),
    "cumsum": Primitive(along_setting("axis"), integers=reductions.cumsum_integers),
    "sort": Primitive(along_setting("dimension")),
    "top_k": Primitive(along_setting("axis", -1)),
    "fft": Primitive(reductions.fft_axis),
    **_named(
        "cholesky eig eigh geqp3 geqrf hessenberg householder_product lu qr schur svd "
        "symmetric_product triangular_solve tridiagonal",
        _matrices,
    ),
    **_named(
        "lu_pivots_to_permutation tridiagonal_solve", Primitive(reductions.matrices(vectors=True))
    ),
}


def record(node: Node) -> Primitive:
    """What is known of an equation's primitive."""
    if node.name in _TABLE:
        return _TABLE[node.name]
    return _REDUCTION if node.name.startswith(("reduce_", "arg")) else _UNKNOWN


def integer_rule(node: Node) -> IntegerRule | None:
    """What an equation makes of known integers, as `Knowledge` asks."""
    return record(node).integers


def batchings_before(node: Node, batchings: list[Batching], known: Knowledge) -> list[Batching]:
    """The batchings of a plain equation's operands from those of its outputs.

    Args:
      node: the equation.
      batchings: of its outputs.
      known: of the program.
    """
    before: list[Batching] = [None] * len(node.operands)
    if record(node).stops:
        return before
    if node.images is not None:
        for i, batching in zip(node.images, batchings, strict=True):
            before[i] = batching
        return before
    for output, batching in zip(node.outputs, batchings, strict=True):
        if batching is None:
            continue
        for i, operand in enumerate(node.operands):
            before[i] = merge(before[i], _before(node, i, operand, output, batching, known), node)
    return before


def _before(
    node: Node,
    i: int,
    operand: Operand,
    output: Value,
    batching: Separate | Mixed,
    known: Knowledge,
) -> Batching:
    if not isinstance(operand, Value) or 0 in operand.shape:
        return None
    if isinstance(batching, Mixed) or not batching.on_axis:
        return batching
    rules = record(node)
    if rules.parts is not None:
        return rules.parts(node, operand, output, batching)
    axis = rules.axis and rules.axis(node, i, output, batching.number)
    if axis is not None and operand.shape[axis] == output.shape[batching.number]:
        return batching.moved(axis)
    # Of a parameter, whichever of its rows are selected, all examples may meet each.
    if rules.select is None or not known.depends_on_examples(operand):
        return Mixed(batching.marks, node)
    return rules.select(node, i, output, batching, known)
