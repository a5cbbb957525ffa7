"""The records of all primitives that are known, by name, and where examples are before an equation.

To teach capture a primitive, or a new fact of one, write a function beside those of its kind, and
name it in their records. A primitive without a record is sound: it mixes examples, and holds no
layer.
"""

from optax_kron.capture.program.graph import Node, Operand, Value
from optax_kron.capture.program.knowledge import IntegerRule, Knowledge
from optax_kron.capture.rules import elementwise, indexing, layout, linear, opaque, reductions
from optax_kron.capture.rules.batch_axes import Batching, Mixed, Separate, merge
from optax_kron.capture.rules.record import Primitive

_TABLE = {
    **elementwise.RECORDS,
    **layout.RECORDS,
    **linear.RECORDS,
    **indexing.RECORDS,
    **reductions.RECORDS,
    **opaque.RECORDS,
}
_UNKNOWN = Primitive()


def record(node: Node) -> Primitive:
    """What is known of an equation's primitive."""
    if node.name in _TABLE:
        return _TABLE[node.name]
    return reductions.REDUCTION if node.name.startswith(("reduce_", "arg")) else _UNKNOWN


def integer_rule(node: Node) -> IntegerRule | None:
    """What an equation makes of known integers, as `Knowledge` asks."""
    return record(node).integers


def batchings_before(node: Node, batchings: list[Batching], known: Knowledge) -> list[Batching]:
    """The batchings of a plain equation's operands from those of its outputs.

    Args:
      node: The equation.
      batchings: The batchings of its outputs.
      known: What is known of the program.
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
        lacks = axis is None or operand.shape[axis] == 1
        return Mixed(batching.marks, node, shared=rules.shares and lacks)
    return rules.select(node, i, output, batching, known)
