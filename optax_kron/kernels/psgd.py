"""Preconditioned SGD with Kronecker factors (PSGD-Kron): one update of the factors of one block.

The factors fit `P = QᴴQ` so that `E[gᴴPg + vᴴP⁻¹v]` is least, `v` white. With `g` a gradient this
whitens it, `P = E[ggᴴ]^-½`; with a Hessian-vector product `h = Hv` in place of `g` it gives
`P = |H|⁻¹`. Writing `T1` for what the first term and `T2` for what the second contributes to the
derivative, factor i moves along `D = T1 − T2` with step `precond_lr / L`; `L` is a running bound of
`‖T1 + T2‖`. Conventions for axes and factors are those of `kernels.contract`.

Sources: Li (2015), arXiv:1512.04202; Pooladzandi and Li (2024), arXiv:2402.04553; Li (2024),
arXiv:2402.11858.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from optax_kron.kernels import contract, grams, linalg

GEOMETRIES = ("EQ", "QEP", "QEQ", "Q0.5EQ1.5", "QUAD")

_BOUND_DECAY = 0.9

Factors = tuple[Array, ...]
Sizes = Sequence[Array] | None


def noised(gradient: Array, probe: Array, damping: ArrayLike) -> Array:
    """`G + (damping + eps|G|)∘V`: damping, and noise at the level of rounding, against overfitting.

    Args:
      gradient: `G`, or the Hessian-vector product, any shape.
      probe: `V`, white, of the same shape.
      damping: absolute; limits how small a curvature is believed.
    """
    epsilon = jnp.finfo(gradient.dtype).eps
    return gradient + (damping + epsilon * jnp.abs(gradient)) * probe


def initial_scale(
    gradient: Array, damping: ArrayLike, probe: Array | None = None, sizes: Sizes = None
) -> Array:
    """The scale s at which `Q = s·I` roughly whitens the first gradient.

    `s = (mean|g|⁴ + damping⁴)^(-1/8)`; for a Hessian-vector product, times `(mean|v|²)^(1/4)`.

    Args:
      gradient: the first gradient or Hessian-vector product of the block.
      damping: absolute, as in `noised`.
      probe: the probe `v` in Newton mode.
      sizes: valid extents of a padded block, whose padding is zero.

    Returns:
      A real scalar, finite for every finite gradient.
    """
    count = _count(gradient, sizes)
    magnitude = jnp.abs(gradient)
    # Relative to the largest entry, fourth powers neither overflow nor vanish.
    largest = jnp.maximum(jnp.max(magnitude, initial=0), damping)
    largest = jnp.maximum(largest, jnp.finfo(magnitude.dtype).tiny)
    fourth = jnp.sum((magnitude / largest) ** 4) / count + (damping / largest) ** 4
    fourth = jnp.maximum(fourth, jnp.finfo(magnitude.dtype).tiny)
    scale = largest**-0.5 * fourth**-0.125
    if probe is not None:
        scale = scale * (jnp.sum(contract.squared_magnitude(probe)) / count) ** 0.25
    return scale


def balance(factors: Factors, sizes: Sizes = None) -> Factors:
    """Rescale the factors of a block to one common `max|q|`, their geometric mean; `P` is kept.

    The padding of the factors stays as it is: rescaled again and again, it could overflow.
    """
    if len(factors) < 2:
        return factors
    masks = [
        None if sizes is None else contract.along_axis(_mask(q, sizes, axis, bool), 0, q.ndim)
        for axis, q in enumerate(factors)
    ]
    largest = jnp.stack(
        [jnp.max(_masked(jnp.abs(q), mask, 0)) for q, mask in zip(factors, masks, strict=True)]
    )
    # A mean of logarithms does not overflow where a product would.
    logarithms = jnp.log(jnp.maximum(largest, jnp.finfo(largest.dtype).tiny))
    scales = jnp.exp(jnp.mean(logarithms) - logarithms)
    return tuple(
        q * _masked(scale, mask, 1) for q, scale, mask in zip(factors, scales, masks, strict=True)
    )


def _masked(value: Array, mask: Array | None, otherwise: float) -> Array:
    return value if mask is None else jnp.where(mask, value, otherwise)


def update_factors(
    factors: Factors,
    bounds: Array,
    gradient: Array,
    probe: Array,
    rows: Array,
    *,
    geometry: str,
    precond_lr: ArrayLike,
    newton: bool = False,
    sizes: Sizes = None,
    precision: contract.Precision = None,
) -> tuple[Factors, Array]:
    """One step of the fit of `P` for one block.

    Args:
      factors: one per axis, dense [d_i, d_i] (upper triangular in `EQ`, Hermitian in `QUAD`) or
        diagonal [d_i].
      bounds: running bound L of the curvature of the fit along each axis, real [k], from zero.
      gradient: the `noised` gradient, momentum or Hessian-vector product, [d_1, ..., d_k].
      probe: `V`, white, of the same shape; in Newton mode, the probe of the product.
      rows: standard normal [linalg.PROBE_ROWS, ≥ max d_i], for the norm bounds.
      geometry: in which geometry Q moves, one of `GEOMETRIES`.
      precond_lr: relative size of the step, in (0, 1).
      newton: fit `|H|⁻¹` rather than whiten.
      sizes: valid extent of each axis if the block is padded: gradient, probe and the factors'
        off-diagonal must be zero in the padding, and the factors stay as they are there.
      precision: of the matrix products.

    Returns:
      New factors and new bounds. Cost: about 4·n·d_i + 2·d_i³ operations for each dense factor (a
      little more in `QEP`, `Q0.5EQ1.5`, `QUAD`), and for all `4·n·Σd_i`.
    """
    if geometry == "QEP":
        factors = balance(factors, sizes)
    roots = _roots(factors, gradient, probe, geometry, newton, precision)
    move = functools.partial(
        _move_factor, rows=rows, geometry=geometry, precond_lr=precond_lr, precision=precision
    )
    curvatures = [
        _curvature(roots[axis], factor, axis, gradient, geometry, sizes)
        for axis, factor in enumerate(factors)
    ]
    moved = {}
    for axes in _alike(factors):
        group = [(factors[axis], bounds[axis], curvatures[axis]) for axis in axes]
        if len(group) == 1:
            moved[axes[0]] = move(*group[0])
            continue
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *group)
        results = jax.vmap(move)(*stacked)
        moved |= {axis: jax.tree.map(lambda x, i=i: x[i], results) for i, axis in enumerate(axes)}
    new_factors, new_bounds = zip(*(moved[axis] for axis in range(len(factors))), strict=True)
    return new_factors, jnp.stack(new_bounds)


def _roots(factors, gradient, probe, geometry, newton, precision):
    """For every factor, tensors X, Y with `T1 = C_i(X)` and `T2 = C_i(Y)`.

    `Y` is `None` where `E[C_i(V)]` takes its place.
    """
    if geometry == "EQ":
        first = contract.apply_factors(factors, gradient, precision=precision)
        second = linalg.solve_upper_adjoint(factors, probe, precision=precision)
        return [(first, second)] * len(factors)
    first = contract.precondition(factors, gradient, precision=precision)
    second = probe if newton else None
    if geometry != "QEP":
        return [(first, second)] * len(factors)

    def seen_from_output(factor, tensor, axis):
        if tensor is None:
            return None
        return contract.apply_factor(factor, tensor, axis, precision=precision)

    return [
        (seen_from_output(factor, first, axis), seen_from_output(factor, second, axis))
        for axis, factor in enumerate(factors)
    ]


def _white(factor, axis, gradient, sizes):
    """The diagonal of `E[C_i(V)] = (n / d_i) I`, zero in the padding; [d_i]."""
    real = contract.real_dtype(factor.dtype)
    length = factor.shape[-1]
    if sizes is None:
        return jnp.full(length, gradient.size // max(length, 1), real)
    return _mask(factor, sizes, axis, real) * (
        _count(gradient, sizes) / jnp.asarray(sizes[axis], real)
    )


def _curvature(roots, factor, axis, gradient, geometry, sizes):
    """`T1` and `T2` of one factor."""
    first = contract.unfold(roots[0], axis)
    if roots[1] is not None:
        return grams.GramPair(first, contract.unfold(roots[1], axis), None)
    weights = _white(factor, axis, gradient, sizes)
    if geometry != "QEP":
        return grams.GramPair(first, None, weights)
    if factor.ndim == 1:
        return grams.GramPair(first, None, weights * jnp.square(factor))
    # E[C_i(V)] seen from the output of Q is Q diag(w) Qᴴ, with a root of its own.
    return grams.GramPair(first, factor * jnp.sqrt(weights)[None], None)


def _alike(factors):
    """The axes in groups of equal factors, which are handled as one: fewer kernels to compile."""
    groups = {}
    for axis, factor in enumerate(factors):
        groups.setdefault(factor.shape, []).append(axis)
    return groups.values()


def _move_factor(factor, bound, curvature, *, rows, geometry, precond_lr, precision):
    """A new factor and its bound."""
    if factor.ndim == 1:
        t1, t2 = curvature.diagonals()
        bound, step = _bound_and_step(jnp.max(t1 + t2, initial=0), bound, precond_lr, factor)
        return _move_diagonal(factor, t1 - t2, step, geometry), bound
    norm = curvature.norm_bound(rows, precision=precision)
    bound, step = _bound_and_step(norm, bound, precond_lr, factor)
    return _move_dense(factor, curvature, step, geometry, rows, precision), bound


def _bound_and_step(norm, bound, precond_lr, factor):
    """The running bound of the curvature, and the step that it allows."""
    norm = norm.astype(bound.dtype)
    bound = jnp.maximum(_BOUND_DECAY * bound + (1 - _BOUND_DECAY) * norm, norm)
    step = precond_lr / jnp.maximum(bound, jnp.finfo(bound.dtype).tiny)
    return bound, step.astype(contract.real_dtype(factor.dtype))


def _move_diagonal(factor, difference, step, geometry):
    if geometry == "QUAD":
        return jnp.square(1 - step / 2 * difference) * factor
    return (1 - step * difference) * factor


def _move_dense(factor, pair, step, geometry, rows, precision):
    if geometry == "EQ":
        return pair.subtract_upper(factor, step, precision=precision)

    def product(left, right):
        return jnp.matmul(left, right, precision=precision)

    difference = pair.combine(-1, precision=precision)
    match geometry:
        case "QEP":
            return factor - step * product(difference, factor)
        case "QEQ":
            return factor - step * product(factor, difference)
        case "Q0.5EQ1.5":
            moved = factor - step * product(difference, factor)
            return linalg.procrustes_step(moved, rows, precision=precision)
        case "QUAD":
            half = factor - step / 2 * product(difference, factor)
            half = half - step / 2 * product(half, difference)
            return (half + half.conj().T) / 2
    raise ValueError(f"geometry must be one of {', '.join(GEOMETRIES)}; got {geometry!r}.")


def _mask(factor, sizes, axis, dtype):
    return (jnp.arange(factor.shape[-1]) < sizes[axis]).astype(dtype)


def _count(tensor, sizes):
    """Number of elements outside the padding, as a real scalar (an empty block counts as one)."""
    real = contract.real_dtype(tensor.dtype)
    if sizes is None:
        return jnp.asarray(max(tensor.size, 1), real)
    count = jnp.asarray(1, real)
    for size in sizes:
        count = count * jnp.asarray(size, real)
    return count
