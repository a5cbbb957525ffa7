"""The norm constraint of a natural gradient: how far a step may change what the model says."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from optax_kron.kernels import contract
from optax_kron.layers.taps import Moments, Tap, Taps
from optax_kron.transforms import _blocks

# Of norm_constraint="auto", for a learning rate of one and a loss that is a mean over examples.
# With a rate of 0.1 it allows for what norm_constraint=9e-4 does.
AUTO_NORM = 0.09


def loss_weight(taps: Taps, dtype: DTypeLike) -> tuple[Array, int]:
    """How often the loss holds that of an example: 1 if it is their mean, N if it is their sum.

    It is the sum of the examples' weights, of the layer in which it is largest. By hand, taps
    without weights are those of a mean.

    Returns:
      It, and how often it holds that at most if it is no multiple of a sum.
    """

    def of_group(tap):
        if isinstance(tap, Moments):
            return jnp.max(tap.weight).astype(dtype)
        if tap.weights is None:
            return jnp.ones([], dtype)
        weights = tap.weights.astype(dtype)
        return jnp.max(jnp.sum(weights, axis=(1, 2))) if weights.ndim == 3 else jnp.sum(weights)

    totals = [jnp.sum(jnp.stack([of_group(tap) for tap in groups])) for groups in taps.values()]
    total = jnp.max(jnp.stack([*totals, jnp.zeros([], dtype)]))
    examples = [tap.inputs.shape[1] for g in taps.values() for tap in g if isinstance(tap, Tap)]
    return jnp.where(total > 0, total, 1), max(examples, default=1)


def scale(
    pairs: Sequence[tuple[Array, Array]],
    learning_rate: Any,
    norm_constraint: ArrayLike,
    dtype: DTypeLike,
) -> Array:
    """`min(1, √(c / (lr²·Σ⟨g, P⁻¹g⟩)))`, also where the products overflow.

    Args:
      pairs: blocks [N, ...] of gradients g, and of natural gradients P⁻¹g.
      learning_rate: lr.
      norm_constraint: c.
      dtype: of the result.
    """
    largest = [
        jnp.max(jnp.stack([jnp.zeros([], dtype), *(_largest(x).astype(dtype) for x in arrays)]))
        for arrays in zip(*pairs, strict=True)
    ]
    units = [jnp.where(x > 0, x, 1) for x in largest]
    products = [_product(*map(_over, pair, units)).astype(dtype) for pair in pairs]
    total = sum(products, jnp.zeros([], dtype))
    # Both roots are in units of those of the largest entries.
    length = jnp.abs(jnp.asarray(learning_rate, dtype)) * jnp.sqrt(total)
    bound = jnp.sqrt(jnp.asarray(norm_constraint, dtype))
    for unit in units:
        bound = bound / jnp.sqrt(unit)
    return jnp.where(length > bound, bound / jnp.where(length > bound, length, 1), 1)


def _product(gradients: Array, natural: Array) -> Array:
    """`Σ ⟨g, P⁻¹g⟩` over blocks [N, ...], none of them below its rounding error.

    Where P is more than 1 / ε times larger along g than across it, P⁻¹g is made of what rounding
    left across g, and the product may be anything, even negative; it would not bound the step.
    """
    products = jnp.real(gradients * jnp.conj(natural))
    products = jnp.sum(products, axis=tuple(range(1, natural.ndim)))
    least = jnp.finfo(products.dtype).eps * _blocks.norms(gradients) * _blocks.norms(natural)
    return jnp.sum(jnp.maximum(products, least.astype(products.dtype)))


def _largest(x: Array) -> Array:
    return jnp.max(jnp.abs(x), initial=0)


def _over(x: Array, unit: Array) -> Array:
    return x / unit.astype(contract.real_dtype(x.dtype))
