"""Preconditioned SGD with Kronecker factors (PSGD-Kron): one update of the factors of one block.

The factors, Q with `P = QᴴQ` or P itself, make `E[gᴴPg + vᴴP⁻¹v]` least, `v` white. With `g` a
gradient this whitens it, `P = E[ggᴴ]^-½`; with a Hessian-vector product `h = Hv` in place of `g` it
gives `P = |H|⁻¹`. Writing `T1` for what the first term and `T2` for what the second contributes to
the derivative, factor i moves along `D = T1 − T2` with step `precond_lr / L`; `L` is a running
bound of `‖T1 + T2‖`. Conventions for axes and factors are those of `kernels.contract`.

Sources: Li (2015), arXiv:1512.04202; Pooladzandi and Li (2024), arXiv:2402.04553; Li (2024),
arXiv:2402.11858; of PRO4P and QUAD4P the latter's reference implementation (2025).
"""

import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Inexact, Int

from optax_kron.kernels import contract, grams, linalg, triangular

# A geometry says in which coordinates the step is taken, and with it what T1 and T2 are. For one
# matrix, all axes but one left out:
#
#   geometry      T1, T2                                the step
#   EQ            (Qg)(Qg)ᴴ, (Q⁻ᴴv)(Q⁻ᴴv)ᴴ             Q ← Q − μ triu(D) Q, upper triangular
#   QEP           (QPg)(QPg)ᴴ, (Qv)(Qv)ᴴ               Q ← Q − μ D Q
#   QEQ           (Pg)(Pg)ᴴ, vvᴴ                       Q ← Q − μ Q D
#   Q0.5EQ1.5     (Pg)(Pg)ᴴ, vvᴴ                       Q ← Q − μ D Q, then a rotation to Hermitian
#   QUAD          (Pg)(Pg)ᴴ, vvᴴ                       Q ← (I − μD/2) Q (I − μD/2), Hermitian
#   PRO4P         (Pg)(Pg)ᴴ, vvᴴ                       P ← P − μ D P, then rotations to Hermitian
#   QUAD4P        (Pg)(Pg)ᴴ, vvᴴ                       P ← (I − μD) P (I − μD), Hermitian
#
# Only EQ solves with Q. When whitening, all but EQ take the mean of T2 over v: vvᴴ → I.
#
# In the last two the factors are those of P, applied once. For a Hermitian P the criterion c has
#
#   dc = tr dP (E[ggᴴ] − P⁻¹ E[vvᴴ] P⁻¹) = tr dP P⁻¹ E[D] P⁻¹,
#
# and E[D] = 0 where P E[ggᴴ] P = I: at E[ggᴴ]^-½, or with g = Hv at |H|⁻¹.
#
#   QUAD4P        dP = −μ (DP + PD), so dc = −2μ tr D P⁻¹ D: step by step the P of QEQ
#   PRO4P         P² ← P (I − μD)² P, as rotations keep PᴴP, so in the eigenbasis of P
#                 dP_ij = −2μ D_ij p_i p_j / (p_i + p_j), dc = −2μ Σ|D_ij|² / (p_i + p_j)
#
# So an entry of P between a large and a small eigenvalue moves as the large one in QEQ and QUAD4P,
# as their geometric mean in Q0.5EQ1.5, and as the small one in PRO4P: noise in D then spoils no
# small eigenvalue, and the fit of a wide spectrum is held up the least.
#
# A worked example, for a block g [128, 64] with two dense factors in EQ: X = Q₁ g Q₂ᵀ and
# Y = Q₁⁻ᴴ v Q₂⁻* are [128, 64]; T1 = XXᴴ and T2 = YYᴴ are [128, 128] for the first axis, and of
# the unfoldings [64, 128] of both, [64, 64], for the second.
GEOMETRIES = ("EQ", "QEP", "QEQ", "Q0.5EQ1.5", "QUAD", "PRO4P", "QUAD4P")

_BOUND_DECAY = 0.9
_DAMPING_FLOOR = 0.01  # in units of rounding, relative to the largest entry
# Where all gradients lie along few directions, factors would grow without bound along the others,
# and what is left of the gradient there, the last steps' own doing, would fill a clipped update.
_WHITENING_DAMPING = 0.01

Factors = tuple[contract.Factor, ...]
# Valid extent of each axis of a padded block; `None`: no padding.
Sizes = Sequence[Int[Array, ""]] | None
Scalar = Float[Array, ""]


def degree(geometry: str) -> int:
    """Of P in the factors: 2 where `P = QᴴQ`, 1 where they are those of P itself."""
    return 1 if geometry in ("PRO4P", "QUAD4P") else 2


def powers_of_scale(geometry: str, order: int) -> tuple[float, float]:
    """With which powers of the gradient's scale each of `order` factors goes, and each bound."""
    # P is inverse to the gradient. The terms are proportional to it in EQ, inverse as the square of
    # one Q in QEP, and without a scale where they are made of Pg and v.
    return -1 / degree(geometry) / order, {"EQ": 1.0, "QEP": -1 / order}.get(geometry, 0.0)


def noised(
    gradient: Inexact[Array, "*shape"], probe: Inexact[Array, "*shape"], damping: ArrayLike
) -> Inexact[Array, "*shape"]:
    """`G + (damping + eps|G|)∘V`: damping, and noise at the level of rounding, against overfitting.

    Args:
      gradient: `G`, or the Hessian-vector product.
      probe: `V`, white.
      damping: Absolute damping; limits how small a curvature is believed.
    """
    epsilon = jnp.finfo(gradient.dtype).eps
    return gradient + (damping + epsilon * jnp.abs(gradient)) * probe


def initial_scale(
    gradient: contract.Tensor,
    damping: ArrayLike,
    probe: contract.Tensor | None = None,
    sizes: Sizes = None,
) -> Scalar:
    """The scale s at which `Q = s·I` roughly whitens the first gradient.

    `s = (mean|g|⁴ + damping⁴)^(-1/8)`; for a Hessian-vector product, times `(mean|v|²)^(1/4)`.

    Args:
      gradient: The first gradient or Hessian-vector product of the block.
      damping: Absolute damping, as in `noised`.
      probe: The probe `v` in Newton mode.
      sizes: Valid extents of a padded block, whose padding is zero.

    Returns:
      The scale, finite for every finite gradient.
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
        None if sizes is None else contract.along_axis(_mask(q, sizes[axis]), 0, q.ndim)
        for axis, q in enumerate(factors)
    ]

    def inside(value, mask, padding):
        return value if mask is None else jnp.where(mask, value, padding)

    magnitudes = [jnp.max(inside(jnp.abs(q), m, 0)) for q, m in zip(factors, masks, strict=True)]
    largest = jnp.stack(magnitudes)
    # A mean of logarithms does not overflow where a product would.
    logarithms = jnp.log(jnp.maximum(largest, jnp.finfo(largest.dtype).tiny))
    scales = jnp.exp(jnp.mean(logarithms) - logarithms)
    return tuple(q * inside(s, m, 1) for q, s, m in zip(factors, scales, masks, strict=True))


def refit(
    factors: Factors,
    bounds: Float[Array, " k"],
    initialized: Bool[Array, ""],
    gradient: contract.Tensor,
    probe: contract.Tensor,
    rows: Float[Array, "r e"],
    balance_due: Bool[Array, ""],
    *,
    geometry: str,
    precond_lr: ArrayLike,
    damping: ArrayLike,
    relative_damping: ArrayLike,
    newton: bool,
    sizes: Sizes = None,
    precision: contract.Precision = None,
) -> tuple[Factors, Float[Array, " k"]]:
    """The factors of a block after a gradient: scaled to the first, moved, and balanced if due.

    Args:
      factors: As in `update_factors`, like all arguments that are not listed here.
      bounds: Of the curvature of the fit.
      initialized: Whether the factors have their scale from a gradient already.
      gradient: Or the momentum, or a Hessian-vector product.
      probe: White noise, or what the Hessian was multiplied with.
      rows: Standard normal.
      balance_due: Whether the factors are to be of one size again.
      geometry: One of `GEOMETRIES`.
      precond_lr: Relative step.
      damping: Curvature, in units of the gradient, below which none is believed.
      relative_damping: The same in units of the gradient's root mean square; the larger one holds.
      newton: Whether a Hessian is fitted.
      sizes: Lengths of the axes without padding.
      precision: Precision of the matrix products.
    """
    real = contract.real_dtype(gradient.dtype)
    # Without a floor, a slice of exact zeros would let its factor grow until P overflows.
    floor = float(_DAMPING_FLOOR * jnp.finfo(real).eps) * contract.unit_of(gradient)
    length = contract.norm(gradient, tuple(range(gradient.ndim))).reshape(())
    relative = jnp.asarray(relative_damping, real) * length / jnp.sqrt(_count(gradient, sizes))
    damping = jnp.maximum(jnp.maximum(jnp.asarray(damping, real), relative), floor)
    scale = initial_scale(gradient, damping, probe if newton else None, sizes)
    power, _ = powers_of_scale(geometry, len(factors))
    scale = jnp.where(initialized, 1, scale ** (-2 * power))
    moved, bounds = update_factors(
        tuple(q * scale.astype(contract.real_dtype(q.dtype)) for q in factors),
        bounds,
        noised(gradient, probe, damping),
        probe,
        rows,
        geometry=geometry,
        precond_lr=precond_lr,
        newton=newton,
        sizes=sizes,
        precision=precision,
    )
    balanced = balance(moved, sizes)
    new: Factors = tuple(jnp.where(balance_due, x, y) for x, y in zip(balanced, moved, strict=True))
    return new, bounds


def precondition(
    factors: Factors, x: contract.Tensor, *, geometry: str, precision: contract.Precision = None
) -> contract.Tensor:
    """`P·X`, of the factors of `P` or as `Qᴴ·(Q·X)`; in EQ by panels that skip the zeros of Q.

    Arguments as `update_factors`.
    """
    if degree(geometry) == 1:
        return apply_cached(factors, x, precision=precision)
    kernel = triangular.precondition if geometry == "EQ" else contract.precondition
    return kernel(tuple(map(contract.widen, factors)), x, precision=precision)


def apply_cached(
    cached: Factors, x: contract.Tensor, *, precision: contract.Precision = None
) -> contract.Tensor:
    """`P·X`, of the factors of `P`, such as `square_factors` has made."""
    return contract.apply_factors(tuple(map(contract.widen, cached)), x, precision=precision)


def square_factors(factors: Factors, *, precision: contract.Precision = None) -> Factors:
    """`P = QᴴQ` of every factor, for the cache."""
    return tuple(
        contract.square(contract.widen(q), precision=precision).astype(cache_dtype(q.dtype))
        for q in factors
    )


def keeps_cache(geometry: str, asked: bool | None) -> bool:
    """Whether P is kept beside factors of Q: as asked, or by default where no half of Q is zero."""
    return degree(geometry) == 2 and (geometry != "EQ" if asked is None else bool(asked))


def default_damping(newton: bool) -> float:
    """The `relative_damping` where none is asked for: a fit of `|H|⁻¹` stays what it says."""
    return 0.0 if newton else _WHITENING_DAMPING


def cache_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of a cached P: that of the factors, but float32 where float16 would overflow."""
    return jnp.dtype(jnp.float32 if dtype == jnp.float16 else dtype)


def update_factors(
    factors: Factors,
    bounds: Float[Array, " k"],
    gradient: contract.Tensor,
    probe: contract.Tensor,
    rows: Float[Array, "r e"],
    *,
    geometry: str,
    precond_lr: ArrayLike,
    newton: bool = False,
    sizes: Sizes = None,
    precision: contract.Precision = None,
) -> tuple[Factors, Float[Array, " k"]]:
    """One step of the fit of `P` for one block.

    Args:
      factors: One factor per axis, of Q or P; dense ones are upper triangular in `EQ`, Hermitian
        in `QUAD` and `QUAD4P`.
      bounds: Running bound L of the curvature of the fit along each axis, from zero.
      gradient: The `noised` gradient, momentum or Hessian-vector product.
      probe: `V`, white; in Newton mode, the probe of the product.
      rows: `linalg.PROBE_ROWS` standard normal rows for the norm bounds, no axis longer than they.
      geometry: The geometry in which Q or P moves, one of `GEOMETRIES`.
      precond_lr: Relative size of the step, in (0, 1).
      newton: Whether to fit `|H|⁻¹` rather than to whiten.
      sizes: Valid extent of each axis if the block is padded: gradient, probe and the factors'
        off-diagonal must be zero in the padding, and the factors stay as they are there.
      precision: Precision of the matrix products.

    Returns:
      New factors and new bounds. Cost: about 4·n·d_i + 2·d_i³ operations for each dense factor (a
      little more in `QEP`, `Q0.5EQ1.5`, `QUAD`, `QUAD4P`; in `PRO4P` 6·d_i³ for each rotation), and
      for all `4·n·Σd_i`, or half of it where factors are those of P.
    """
    if geometry == "QEP":
        factors = balance(factors, sizes)
    pairs = _gram_pairs(factors, gradient, probe, geometry, newton, sizes, precision)
    move = functools.partial(
        _move_factor, rows=rows, geometry=geometry, precond_lr=precond_lr, precision=precision
    )
    moved = {}
    for axes in _axes_alike(factors):
        group = [(factors[axis], bounds[axis], pairs[axis]) for axis in axes]
        if len(group) == 1:
            moved[axes[0]] = move(*group[0])
            continue
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *group)
        results = jax.vmap(move)(*stacked)
        moved |= {axis: jax.tree.map(lambda x, i=i: x[i], results) for i, axis in enumerate(axes)}
    new_factors, new_bounds = zip(*(moved[axis] for axis in range(len(factors))), strict=True)
    return new_factors, jnp.stack(new_bounds)


def _gram_pairs(
    factors: Factors,
    gradient: contract.Tensor,
    probe: contract.Tensor,
    geometry: str,
    newton: bool,
    sizes: Sizes,
    precision: contract.Precision,
) -> list[grams.GramPair]:
    """`T1` and `T2` of every factor, by the unfoldings of tensors X and Y."""
    if geometry == "EQ":
        first = triangular.apply_uppers(factors, gradient, precision=precision)
        second = linalg.solve_upper_adjoint(factors, probe, precision=precision)
    else:
        first = precondition(factors, gradient, geometry=geometry, precision=precision)
        second = probe if newton else None

    def from_output(x, axis):
        # In QEP both terms are those of the output of Q_i, not of its input.
        if x is None or geometry != "QEP":
            return x
        return contract.apply_factor(factors[axis], x, axis, precision=precision)

    tensors = [(from_output(first, i), from_output(second, i)) for i in range(len(factors))]
    pairs = []
    for axis, (factor, (X, Y)) in enumerate(zip(factors, tensors, strict=True)):
        X = contract.unfold(X, axis)
        if Y is not None:
            Y = contract.unfold(Y, axis)
        else:
            Y = _white(factor, axis, gradient, sizes)
            if geometry == "QEP":
                # E[C_i(V)] seen from the output of Q is Q diag(w) Qᴴ, with Q √w its square root.
                Y = Y * jnp.square(factor) if factor.ndim == 1 else factor * jnp.sqrt(Y)[None]
        pairs.append(grams.GramPair(X, Y))
    return pairs


def _white(
    factor: contract.Factor, axis: int, gradient: contract.Tensor, sizes: Sizes
) -> Float[Array, " d"]:
    """The diagonal of `E[C_i(V)] = (n / d_i) I`, zero in the padding."""
    real = contract.real_dtype(factor.dtype)
    length = factor.shape[-1]
    if sizes is None:
        return jnp.full(length, gradient.size // max(length, 1), real)
    mask = _mask(factor, sizes[axis]).astype(real)
    return mask * (_count(gradient, sizes) / jnp.asarray(sizes[axis], real))


def _axes_alike(factors: Factors) -> Iterable[list[int]]:
    """The axes in groups of equal factors, which are handled as one: fewer kernels to compile."""
    groups = {}
    for axis, factor in enumerate(factors):
        groups.setdefault(factor.shape, []).append(axis)
    return groups.values()


def _move_factor(
    factor: contract.Factor,
    bound: Scalar,
    pair: grams.GramPair,
    *,
    rows: Float[Array, "r e"],
    geometry: str,
    precond_lr: ArrayLike,
    precision: contract.Precision,
) -> tuple[contract.Factor, Scalar]:
    """A new factor and its bound."""
    if factor.ndim == 2:
        norm = pair.norm_bound(rows, precision=precision)
        bound, step = _bound_and_step(norm, bound, precond_lr, factor)
        return _move_dense(factor, pair, step, geometry, rows, precision), bound
    t1, t2 = pair.diagonals()
    bound, step = _bound_and_step(jnp.max(t1 + t2, initial=0), bound, precond_lr, factor)
    difference = t1 - t2
    if geometry in ("QUAD", "QUAD4P"):
        return jnp.square(1 - step / degree(geometry) * difference) * factor, bound
    return (1 - step * difference) * factor, bound


def _bound_and_step(
    norm: Scalar, bound: Scalar, precond_lr: ArrayLike, factor: contract.Factor
) -> tuple[Scalar, Scalar]:
    """The running bound of the curvature, and the step that it allows."""
    norm = norm.astype(bound.dtype)
    # It rises at once, lest a step overshoot, and forgets slowly.
    bound = jnp.maximum(_BOUND_DECAY * bound + (1 - _BOUND_DECAY) * norm, norm)
    step = precond_lr / jnp.maximum(bound, jnp.finfo(bound.dtype).tiny)
    return bound, jnp.asarray(step).astype(contract.real_dtype(factor.dtype))


def _move_dense(
    factor: Inexact[Array, "d d"],
    pair: grams.GramPair,
    step: Scalar,
    geometry: str,
    rows: Float[Array, "r e"],
    precision: contract.Precision,
) -> Inexact[Array, "d d"]:
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
        case "PRO4P":
            moved = factor - step * product(difference, factor)
            t1, t2 = pair.diagonals()
            inside = t1 + t2 > 0  # both are zero in the padding
            return linalg.rotate_to_hermitian(moved, rows, inside, precision=precision)
        case "QUAD" | "QUAD4P":
            share = step / degree(geometry)  # so that P moves as far in both
            half = factor - share * product(difference, factor)
            half = half - share * product(half, difference)
            # Rounding would leave the Hermitian matrices little by little.
            return (half + half.conj().T) / 2
    raise ValueError(f"geometry must be one of {', '.join(GEOMETRIES)}; got {geometry!r}.")


def _mask(factor: contract.Factor, size: Int[Array, ""]) -> Bool[Array, " d"]:
    """Where the axis of a factor is not padding."""
    return jnp.arange(factor.shape[-1]) < size


def _count(tensor: contract.Tensor, sizes: Sizes) -> Scalar:
    """Number of elements outside the padding (an empty block counts as one)."""
    real = contract.real_dtype(tensor.dtype)
    if sizes is None:
        return jnp.asarray(max(tensor.size, 1), real)
    count = jnp.asarray(1, real)
    for size in sizes:
        count = count * jnp.asarray(size, real)
    return count
