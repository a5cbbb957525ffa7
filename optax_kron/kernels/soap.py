"""SOAP and its KL variants on one block: statistics, and updates in their eigenbases.

A block G [d_1, ..., d_k] of n elements has, along axis i, a statistic S_i [d_i, d_i] with an
eigenbasis Q_i, or a diagonal one, whose basis is the identity and is written as `None`. For a block
[3, 5] with a dense factor along its first axis alone:

    bases (Q_1 [3, 3], None)    values (λ_1 [3], λ_2 [5])    in its bases: Q_1ᴴ G [3, 5]

Sources: Vyas et al. (2024), arXiv:2409.11321; for the KL variants, Lin et al. (2025),
arXiv:2509.03378.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Inexact

from optax_kron.kernels import contract, eigenbases, packed
from optax_kron.types import PyTree

Bases = Sequence[Inexact[Array, "d d"] | None]
Values = Sequence[Float[Array, " d"]] | None  # KL variants alone keep them

# In units of rounding: errors of numbers that are rounded, relative to the root mean square of what
# they are added up with; and of sums, relative to the norm of that. Of a gradient of low rank they
# are 1.1 times rounding at most in orthonormal bases, but those are so to 40 times rounding.
_ROUNDED, _SUMMED = 8.0, 64.0
# In its own bases a first gradient is diagonal; beside that it is what errors of the bases make.
_FIRST_NOISE = 1e-3


def whitened_moments(
    bases: Bases,
    values: Sequence[Float[Array, " d"]],
    gradient: Inexact[Array, "..."],
    extents: Float[Array, " k"],
    relative_damping: ArrayLike,
    *,
    pseudo_inverse: bool = False,
    precision: contract.Precision = None,
) -> tuple[list[Inexact[Array, "d d"] | None], list[Float[Array, " d"]]]:
    """Second moments of a gradient that is whitened along all axes but one.

    `M_i = (d_i / n) C_i(G with S_j^-½ along every j ≠ i)`, of which the product over the axes fits
    the covariance of the gradient best in the sense of Kullback and Leibler.

    Args:
      bases: Q_i per axis, orthonormal columns.
      values: Eigenvalues of S_i per axis, also of diagonal axes.
      gradient: G.
      extents: Lengths of the axes without padding.
      relative_damping: Least eigenvalue, relative to the largest of its axis.
      pseudo_inverse: Whether directions below it are left out, of the moments and of d and n.
      precision: Precision of the matrix products.

    Returns:
      M_i per axis, `None` where the axis is diagonal; and their diagonals in the bases. Cost:
      6·n·Σd_i operations over the dense axes.
    """
    rotated = contract.into_bases(bases, gradient, precision=precision)
    roots = [inverse_square_root(x, relative_damping, pseudo_inverse) for x in values]
    if pseudo_inverse:
        # Means over what is left: over all directions, moments of two axes would contradict one
        # another where their ranks differ, and the factors drift apart without end.
        extents = jnp.stack([jnp.maximum(jnp.sum(root > 0), 1) for root in roots])
    shares = extents / jnp.prod(extents)
    moments, diagonals = [], []
    for axis, Q in enumerate(bases):
        whitened = rotated
        for other, root in enumerate(roots):
            if other != axis:
                whitened = contract.apply_factor(root, whitened, other)
        share = shares[axis].astype(values[axis].dtype)
        diagonals.append(share * contract.gram(whitened, axis, diagonal=True))
        if Q is None:
            moments.append(None)
            continue
        back = contract.apply_factor(Q, whitened, axis, precision=precision)
        moments.append(share * contract.gram(back, axis, precision=precision))
    return moments, diagonals


def whiten(
    values: Sequence[Float[Array, " d"]],
    rotated: Inexact[Array, "..."],
    relative_damping: ArrayLike,
    pseudo_inverse: bool = False,
) -> Inexact[Array, "..."]:
    """`S_i^-½` along every axis of a block in the eigenbases; arguments as `whitened_moments`."""
    for axis, x in enumerate(values):
        root = inverse_square_root(x, relative_damping, pseudo_inverse)
        rotated = contract.apply_factor(root, rotated, axis)
    return rotated


def adam(
    second_moment: Float[Array, "..."],
    rotated: Inexact[Array, "..."],
    eps: ArrayLike,
    least: ArrayLike,
    largest: ArrayLike,
) -> Inexact[Array, "..."]:
    """Adam's update of a momentum in the eigenbases.

    Args:
      second_moment: Of the gradient in the bases, without the bias of its average.
      rotated: The momentum in the bases.
      eps: What is added to the square root of the second moment.
      least: Where the second moment is no larger, the update is zero, see `noise_floor`.
      largest: No element of the update is larger: what Adam's can be in bases that stay.
    """
    divisor = jnp.sqrt(second_moment) + jnp.asarray(eps, second_moment.dtype)
    scaled = rotated / jnp.where(divisor > 0, divisor, 1)
    # A second moment that was gathered in other bases can be far less than the momentum's square;
    # so can one that did not take a gradient in, whose square its dtype cannot hold.
    excess = jnp.abs(scaled) / jnp.asarray(largest).astype(second_moment.dtype)
    scaled = scaled / jnp.maximum(excess, 1)
    return jnp.where(second_moment > least, scaled, 0)


def noise_floor(
    bases: Bases,
    second_moment: Float[Array, "..."],
    newly: Bool[Array, ""],
    extents: Float[Array, " k"],
) -> Float[Array, "..."]:
    """Second moments up to which there are rounding errors of the rotation alone, or nothing.

    To divide by them would blow up noise: of a gradient of low rank, most of the update would be
    that. Errors of an element are relative to what it is a sum of, which has the norm of the fiber
    that goes through it along an axis; a share of the others' spreads over the block.

    Args:
      bases: As they are stored.
      second_moment: Of the gradient in the bases.
      newly: Whether the gradient is the first one.
      extents: Lengths of the axes without padding.
    """
    dtype = second_moment.dtype
    rounding = [float(jnp.finfo(Q.dtype).eps) for Q in bases if Q is not None]
    if not rounding:
        return jnp.zeros([], dtype)
    extents = extents.astype(dtype)
    rounded = (_ROUNDED * max(rounding)) ** 2
    summed = (_SUMMED * float(jnp.finfo(dtype).eps)) ** 2
    size = jnp.prod(extents)
    share = jnp.maximum(rounded, summed * jnp.sqrt(size))
    share = jnp.where(newly, jnp.maximum(share, _FIRST_NOISE**2), share)
    least = share * (jnp.sum(second_moment) / size)
    for axis, Q in enumerate(bases):
        if Q is not None:
            fibers = jnp.sum(second_moment, axis=axis, keepdims=True)
            least = jnp.maximum(least, jnp.maximum(rounded / extents[axis], summed) * fibers)
    return least


def first_scale(gradient: Inexact[Array, "..."], extents: Float[Array, " k"]) -> Float[Array, ""]:
    """Of multiples of the identity whose product is the mean square of a gradient's elements."""
    largest = contract.unit_of(gradient)
    unit = gradient / jnp.where(largest > 0, largest, 1)
    mean = jnp.sum(contract.squared_magnitude(unit)) / jnp.prod(extents).astype(largest.dtype)
    return largest ** (2 / gradient.ndim) * mean ** (1 / gradient.ndim)


def inverse_square_root(
    values: Float[Array, " d"], relative_damping: ArrayLike, pseudo_inverse: bool = False
) -> Float[Array, " d"]:
    """`λ^-½` of eigenvalues no less than a share of the largest; zero if all of them are zero.

    Smaller ones are raised to that share, or in a pseudo-inverse left out: zero as well.
    """
    least = jnp.asarray(relative_damping, values.dtype) * jnp.max(values)
    raised = jnp.maximum(values, least)
    is_positive = (values >= least) & (values > 0) if pseudo_inverse else raised > 0
    return jnp.where(is_positive, jax.lax.rsqrt(jnp.where(is_positive, raised, 1)), 0)


def first_statistics(
    statistics: Sequence[Inexact[Array, "r c"] | None],
    values: Sequence[Float[Array, " d"]],
    gradient: Inexact[Array, "..."],
    extents: Float[Array, " k"],
    is_first: Bool[Array, ""],
) -> tuple[list[Inexact[Array, "r c"] | None], list[Float[Array, " d"]]]:
    """Statistics and their eigenvalues, of which the first are multiples of the identity.

    At one that fits the gradient, the first factors are no larger or smaller than those to come.

    Args:
      statistics: S_i per axis, whole or packed, in the dtype of the arithmetic.
      values: Their eigenvalues, also of diagonal axes.
      gradient: G.
      extents: Lengths of the axes without padding.
      is_first: Whether there has been no gradient before.
    """
    scale = first_scale(gradient, extents)
    new_values = [jnp.where(is_first, scale, x) for x in values]
    new = [
        S if S is None else jnp.where(is_first, scale * packed.identity_like(S), S)
        for S in statistics
    ]
    return new, new_values


def first_bases(
    statistics: Bases, bases: Bases, values: Values, *, precision: contract.Precision = None
) -> tuple[tuple[Inexact[Array, "d d"] | None, ...], tuple[Float[Array, " d"], ...] | None]:
    """The eigenbases of statistics, and their eigenvalues along axes with one."""
    new_bases, new_values = list(bases), None if values is None else list(values)
    for axis, S in enumerate(statistics):
        if S is None:
            continue
        new_bases[axis] = Q = eigenbases.descending(S)
        if new_values is not None:
            new_values[axis] = eigenbases.rayleigh_quotients(Q, S, precision=precision)
    return tuple(new_bases), None if new_values is None else tuple(new_values)


def next_bases(
    find: Callable[..., tuple[Array, Array]],
    statistics: Bases,
    bases: Bases,
    values: Values,
    second_moment: Float[Array, "..."] | None,
    *,
    precision: contract.Precision = None,
) -> tuple[
    tuple[Inexact[Array, "d d"] | None, ...],
    tuple[Float[Array, " d"], ...] | None,
    Float[Array, "..."] | None,
]:
    """Other eigenbases, and what is kept in terms of them.

    Args:
      find: `eigenbases.power_iteration` or `eigenbases.decompose`.
      statistics: S_i per axis.
      bases: Q_i per axis.
      values: Eigenvalues of S_i per axis, or `None`.
      second_moment: Of the gradient in the bases, or `None`. Where columns of a basis change
        places, so does what is kept along them.
      precision: Precision of the matrix products.
    """
    new_bases, new_values = list(bases), None if values is None else list(values)
    for axis, (Q, S) in enumerate(zip(bases, statistics, strict=True)):
        if Q is None or S is None:
            continue
        new_Q, order = find(Q, S, precision=precision)
        new_bases[axis] = new_Q
        if second_moment is not None:
            second_moment = jnp.take(second_moment, order, axis=axis)
        if new_values is not None:
            new_values[axis] = eigenbases.rayleigh_quotients(new_Q, S, precision=precision)
    return tuple(new_bases), None if new_values is None else tuple(new_values), second_moment


def averages(
    old: Sequence[PyTree], new: Sequence[PyTree], decay: Float[Array, ""]
) -> tuple[PyTree, ...]:
    """`decay·old + (1 − decay)·new` of each pair of arrays; `None` stays so."""
    pairs = zip(old, new, strict=True)
    return tuple(None if x is None else decay * x + (1 - decay) * y for x, y in pairs)


def balanced(
    statistics: Sequence[Inexact[Array, "..."] | None], values: Sequence[Float[Array, " d"]]
) -> tuple[tuple[Inexact[Array, "..."] | None, ...], tuple[Float[Array, " d"], ...]]:
    """Factors of KL statistics of about one size, as only their product has a meaning.

    Where gradients take another share of the directions of one axis than of the other, moments of
    the two ask for unlike products, and without this one factor would grow and the other shrink by
    some per cent at every step. Scales are powers of two with a product of one: they round nothing.

    Args:
      statistics: S_i per axis, whole or packed.
      values: Their eigenvalues.
    """
    largest = jnp.stack([jnp.max(x) for x in values])
    is_known = jnp.all(jnp.isfinite(largest) & (largest >= jnp.finfo(largest.dtype).tiny))
    logarithms = jnp.log2(jnp.where(is_known, largest, 1))
    powers = jnp.round(jnp.mean(logarithms) - logarithms)
    powers = powers.at[-1].set(-jnp.sum(powers[:-1])).astype(jnp.int32)
    scales = [jnp.ldexp(jnp.ones([], x.dtype), p) for x, p in zip(values, powers, strict=True)]
    pairs = zip(scales, statistics, strict=True)
    scaled = tuple(S if S is None else c.astype(S.dtype) * S for c, S in pairs)
    return scaled, tuple(c * x for c, x in zip(scales, values, strict=True))
