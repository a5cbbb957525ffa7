"""Momentum: a moving average of gradients, as stacks of blocks."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from optax_kron.blocking import BlockPlan
from optax_kron.kernels import contract

Stacks = Mapping[str, Array]


def start(
    plan: BlockPlan, decay: ArrayLike | None, dtype: DTypeLike | None
) -> Stacks | Array | None:
    """Zeros [N, *block shape] by signature, in the dtype of the parameters unless one is asked.

    `None` without a decay; a decay of zero has its average too, as the structure of a state does
    not depend on values.
    """
    if decay is None:
        return None
    if not plan.leaves:
        return jnp.zeros([])  # One leaf where the stacks would be, as optax.tree.map_params needs.

    def zeros(label, signature):
        own = jnp.result_type(*(leaf.dtype for _, leaf in plan.members(label)))
        chosen = own if dtype is None else contract.complex_like(dtype, signature.is_complex)
        return jnp.zeros((plan.count(label), *signature.shape), chosen)

    return {label: zeros(label, signature) for label, signature in plan.stacks.items()}


def step(gradients: Stacks, average: Stacks, decay: ArrayLike) -> Stacks:
    """`decay·average + (1 − decay)·gradients`, in the dtype of the average."""

    def move(m, g):
        return (decay * m.astype(g.dtype) + (1 - decay) * g).astype(m.dtype)

    return jax.tree.map(move, average, gradients)


def correct(average: Stacks, decay: ArrayLike, count: Array, dtype: DTypeLike) -> Stacks:
    """Divide by `1 − decay^count`, as an average that started from zero needs.

    Args:
      average: the stacks.
      decay: of the average, in [0, 1).
      count: gradients averaged so far, int [].
      dtype: real dtype of the result.
    """
    divisor = weight(decay, count, dtype)

    def divide(m):
        return m.astype(contract.complex_like(dtype, jnp.iscomplexobj(m))) / divisor

    return jax.tree.map(divide, average)


def weight(decay: ArrayLike, count: Array, dtype: DTypeLike) -> Array:
    """`1 − decay^count`: what all that has been averaged counts; arguments as `correct`."""
    # Before the first accepted gradient the average is zero, and no correction is due.
    return 1 - jnp.asarray(decay, dtype) ** jnp.maximum(count, 1).astype(dtype)
