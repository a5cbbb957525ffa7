"""Evaluate a program of 16 bits in 32: what it computes, without what it loses by rounding."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from optax_kron.capture.program import equations
from optax_kron.capture.program.graph import Broadcast, Graph, Node, Value

# Whose result is another if its operand has more bits.
_OF_BITS = frozenset(["bitcast_convert_type"])


def is_narrow(dtype: DTypeLike) -> bool:
    """Whether a dtype has real numbers of fewer than 32 bits."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def wide(dtype: DTypeLike) -> DTypeLike:
    """The dtype in 32 bits, if it has fewer."""
    return jnp.dtype(jnp.float32) if is_narrow(dtype) else dtype


def widened(array: Array) -> Array:
    """An array in 32 bits, if it has fewer."""
    return array.astype(jnp.float32) if is_narrow(array.dtype) else array


def has_narrow(graph: Graph) -> bool:
    """Whether some values of a program have fewer than 32 bits."""
    values = [*graph.inputs, *(value for node in graph.walk() for value in node.outputs)]
    return any(is_narrow(value.dtype) for value in values)


def bind_widely(node: Node, *operands: Array) -> list[Array]:
    """Evaluate an equation in 32 bits where the program has fewer.

    Equations that hold programs of their own, as derivatives of the user's do, are evaluated as
    they are.

    Args:
      node: The equation.
      *operands: Arrays for its values.
    """
    wide_operands = tuple(map(widened, operands))
    if not any(is_narrow(x.dtype) for x in (*node.operands, *node.outputs)):
        return node.bind(*wide_operands)
    if isinstance(node, Broadcast):
        return node.bind(*wide_operands)
    if node.kind == "plain" and node.name not in _OF_BITS and not equations.holds_program(node.eqn):
        return _bind(node, wide_operands)
    given = (x.astype(v.dtype) for x, v in zip(wide_operands, node.values, strict=True))
    return [widened(x) for x in node.bind(*given)]


def _bind(node: Node, operands: tuple[Array, ...]) -> list[Array]:
    arrays = iter(operands)
    arguments = [
        next(arrays) if isinstance(x, Value) else jnp.asarray(x.number, wide(x.dtype))
        for x in node.operands
    ]
    params = {name: _wide_param(name, value) for name, value in node.params.items()}
    return equations.bind_with(node.eqn, arguments, params)


def _wide_param(name: str, value: object) -> object:
    if name == "precision" and value is not None:
        return (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    # Casts to fewer bits, and sums in them, are what rounds.
    if isinstance(value, np.dtype | type) and is_narrow(value):
        return jnp.dtype(jnp.float32)
    return value
