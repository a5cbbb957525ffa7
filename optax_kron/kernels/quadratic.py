"""The minimum of a quadratic model over the span of a few directions.

Of two directions d [n] with products Bd [n], and a gradient g [n], all as lists of arrays:

    M [2, 2] = ⟨d_i, (B + λI) d_j⟩    b [2] = ⟨g, d_i⟩    x [2] = argmin ½ xᵀMx + bᵀx

Everything is divided by its largest entry first, so that no square overflows or vanishes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Inexact

from optax_kron.kernels import contract

Leaves = Sequence[Inexact[Array, "..."]]

# A direction is taken to lie in the span of those before it where the part of its squared length
# beyond them, in the metric of the model, is less than so many rounding errors.
_DEPENDENT = 100.0


class Minimum(NamedTuple):
    """Where a quadratic model of k directions is least.

    Attributes:
      coefficients: x [k].
      weights: The same for directions that are divided by their largest entry, [k].
      units: These largest entries, [k]; one for a direction of zeros.
      decrease: Of the model, from zero to its minimum, []; NaN if not all is finite.
      finite: Whether all that went into it is, []; if not, coefficients and weights are zero.
    """

    coefficients: Float[Array, " k"]
    weights: Float[Array, " k"]
    units: Float[Array, " k"]
    decrease: Float[Array, ""]
    finite: Bool[Array, ""]


def minimize(M: Float[Array, "k k"], b: Float[Array, " k"]) -> Float[Array, " k"]:
    """`argmin ½ xᵀMx + bᵀx`, by elimination, leaving out what is not positive.

    A direction without curvature, `M_ii ≤ 0`, gets a coefficient of zero, and so does one that
    depends on those before it. For small k: the loops are unrolled.
    """
    diagonal = jnp.diagonal(M)
    positive = diagonal > 0
    scale = jnp.where(positive, 1 / jnp.sqrt(jnp.where(positive, diagonal, 1)), 0)
    M, b = scale[:, None] * M * scale[None], scale * b
    tolerance = _DEPENDENT * jnp.finfo(M.dtype).eps
    x, conjugate = jnp.zeros_like(b), []
    for i, e in enumerate(jnp.eye(len(b), dtype=b.dtype)):
        for c, length in conjugate:
            e = e - jnp.sum(c * M[:, i]) / length * c
        length = jnp.sum(e[:, None] * M * e[None])
        usable = positive[i] & (length > tolerance)
        e, length = jnp.where(usable, e, 0), jnp.where(usable, length, 1)
        conjugate.append((e, length))
        x = x - jnp.sum(e * b) / length * e
    return scale * x


def minimum(
    gradient: Leaves, directions: Sequence[Leaves], products: Sequence[Leaves], shift: ArrayLike
) -> Minimum:
    """The minimum of `½ δᵀ(B + shift·I)δ + gᵀδ` over `δ = Σ_i x_i d_i`.

    Of complex numbers the inner products are their real parts.

    Args:
      gradient: g.
      directions: The d_i, each like g.
      products: The products B d_i, likewise.
      shift: Added to the diagonal of B, ≥ 0.

    Returns:
      It, in float32, or in float64 if any array has that precision. Cost: 2k² + 3k operations per
      entry, and no array is formed.
    """
    every = [gradient, *directions, *products]
    dtype = contract.widest_dtype(x for leaves in every for x in leaves)
    d, d_units = zip(*(_scaled(x, dtype) for x in directions), strict=True)
    p, p_units = zip(*(_scaled(x, dtype) for x in products), strict=True)
    curvatures = jnp.stack([b / a for a, b in zip(d_units, p_units, strict=True)])
    unit = contract.safe_divisor(jnp.max(jnp.append(curvatures, jnp.asarray(shift, dtype))))
    M = _inner_products(d, p, dtype) * (curvatures / unit)[None]
    return _minimum(gradient, (d, d_units), M, unit, shift)


def minimum_of_form(
    gradient: Leaves,
    directions: Sequence[Leaves],
    form: Callable[[Sequence[Leaves]], Float[Array, "k k"]],
    shift: ArrayLike,
) -> Minimum:
    """`minimum`, where B is known by the inner products of directions in its metric.

    Args:
      gradient: g.
      directions: The d_i, each like g.
      form: From directions to `⟨d_i, B d_j⟩`; linear in each, as these come divided by units.
      shift: Added to the diagonal of B, ≥ 0.
    """
    dtype = contract.widest_dtype(x for leaves in (gradient, *directions) for x in leaves)
    d, d_units = zip(*(_scaled(x, dtype) for x in directions), strict=True)
    M = form(d).astype(dtype)
    unit = contract.safe_divisor(jnp.max(jnp.append(jnp.abs(M), jnp.asarray(shift, dtype))))
    return _minimum(gradient, (d, d_units), M / unit, unit, shift)


def _minimum(gradient, directions, M, unit, shift) -> Minimum:
    """From directions with their units, and their inner products `⟨d_i, B d_j⟩` over a unit."""
    (d, d_units), dtype = directions, M.dtype
    g, g_unit = _scaled(gradient, dtype)
    M = M + _inner_products(d, d, dtype) * (jnp.asarray(shift, dtype) / unit)
    b = jnp.stack([inner(g, x, dtype) for x in d])
    finite = contract.all_finite(M) & contract.all_finite(b)
    x = jnp.where(finite, minimize((M + M.T) / 2, b), 0)
    weights = jnp.where(finite, x * (g_unit / unit), 0)
    units = jnp.stack(d_units)
    coefficients = jnp.where(finite, weights / units, 0)
    decrease = jnp.where(finite, g_unit * (g_unit / unit) * -jnp.sum(b * x) / 2, jnp.nan)
    return Minimum(coefficients, weights, units, decrease, finite)


def _inner_products(xs, ys, dtype):
    """Those of all pairs, [k, k]."""
    return jnp.stack([jnp.stack([inner(x, y, dtype) for y in ys]) for x in xs])


def _scaled(leaves: Leaves, dtype: jnp.dtype) -> tuple[Leaves, Float[Array, ""]]:
    """The leaves, widened and divided by the largest magnitude of all; and that."""
    leaves = [contract.widen(x) for x in leaves]
    largest = [contract.unit_of(x).astype(dtype) for x in leaves]
    unit = contract.safe_divisor(jnp.max(jnp.stack([jnp.zeros([], dtype), *largest])))
    return [x / unit.astype(contract.real_dtype(x.dtype)) for x in leaves], unit


def inner(xs: Leaves, ys: Leaves, dtype: jnp.dtype) -> Float[Array, ""]:
    """The real part of `Σ conj(x)·y`, of arrays that are as wide as sums are to be."""
    total = jnp.zeros([], dtype)
    for x, y in zip(xs, ys, strict=True):
        product = x.conj() * y
        total += jnp.sum(product.real).astype(dtype)
    return total
