"""Kernels that cannot be looked into: those that the user has declared, and cuDNN's attention."""

from optax_kron.capture.program import equations
from optax_kron.capture.program.graph import Node, Value
from optax_kron.capture.rules.record import Primitive


def _declared_axis(node: Node, i: int, output: Value, axis: int) -> int | None:
    """Of a function that the user has declared to keep examples apart: as declared."""
    declared = node.declared
    assert declared is not None  # or it had another name
    return declared.inputs[i] if declared.outputs[node.outputs.index(output)] == axis else None


def _attention_axis(node: Node, i: int, output: Value, axis: int) -> int | None:
    """Of cuDNN's attention: the first axis of queries, keys, values and bias counts the examples.

    Not of keys and values in pages, which examples may share: then tables of pages have elements.
    Each query has a row of the output, in each head, in whichever order these axes are.
    """
    paged = any(0 not in table.shape for table in node.operands[8:10])
    if axis == 0:
        return 0 if i < 4 and not paged else None
    return axis if i == 0 and output.shape == node.operands[0].shape and axis < 3 else None


RECORDS = {
    equations.DECLARED: Primitive(_declared_axis),
    # Inside of what `jax.nn.dot_product_attention(implementation="cudnn")` calls.
    "dot_product_attention_fwd_wrapper": Primitive(_attention_axis),
}
