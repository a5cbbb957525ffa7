"""Evaluate a program of 16 bits in 32: what it computes, without what it loses by rounding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_kron.capture.program import equations
from optax_kron.capture.program.equations import is_literal
from optax_kron.capture.program.graph import Broadcast, Graph, Node

# Whose result is another if its operand has more bits.
_OF_BITS = frozenset(["bitcast_convert_type"])


def is_narrow(dtype: Any) -> bool:
    """Whether a dtype has real numbers of fewer than 32 bits."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def wide(dtype: Any) -> Any:
    """The dtype in 32 bits, if it has fewer."""
    return jnp.dtype(jnp.float32) if is_narrow(dtype) else dtype


def widened(array: Any) -> Any:
    """An array in 32 bits, if it has fewer."""
    return array.astype(jnp.float32) if is_narrow(array.dtype) else array


def has_narrow(graph: Graph) -> bool:
    """Whether some values of a program have fewer than 32 bits."""
    values = [*graph.inputs, *(value for node in graph.walk() for value in node.outputs)]
    return any(is_narrow(value.dtype) for value in values)


def bind_widely(node: Node, *operands: Any) -> list[Any]:
    """Evaluate an equation in 32 bits where the program has fewer.

    Equations that hold programs of their own, as derivatives of the user's do, are evaluated as
    they are.

    Args:
      node: The equation.
      *operands: Arrays for its values.
    """
    operands = tuple(map(widened, operands))
    avals = [x.aval for x in (*node.operands, *node.outputs)]
    if not any(is_narrow(aval.dtype) for aval in avals):
        return node.bind(*operands)
    if isinstance(node, Broadcast):
        return node.bind(*operands)
    if node.kind == "plain" and node.name not in _OF_BITS and not equations.holds_program(node.eqn):
        return _bind(node, operands)
    given = (x.astype(v.dtype) for x, v in zip(operands, node.values, strict=True))
    return [widened(x) for x in node.bind(*given)]


def _bind(node: Node, operands: tuple[Any, ...]) -> list[Any]:
    filled = iter(operands)
    arguments = [
        jnp.asarray(x.val, wide(x.aval.dtype)) if is_literal(x) else next(filled)
        for x in node.operands
    ]
    params = {name: _wide_param(name, value) for name, value in node.params.items()}
    return equations.bind_with(node.eqn, arguments, params)


def _wide_param(name: str, value: Any) -> Any:
    if name == "precision" and value is not None:
        return (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    if isinstance(value, np.dtype | type) and is_narrow(value):
        return jnp.dtype(jnp.float32)
    return value
