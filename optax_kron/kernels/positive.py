"""Inverses of symmetric positive definite matrices, of matrix products only.

`M = LLᵀ` is decomposed by halves, as the inverse `R = L⁻¹`,

    M = [[A, Bᵀ], [B, C]]:   R₁ = root(A),   K = B R₁ᵀ,   R₂ = root(C − K Kᵀ),   R₂₁ = −R₂ K R₁,

and `M⁻¹ = RᵀR` of the same halves, which skips the products of zeros. Blocks up to 512 are
eliminated panel by panel. So nearly all operations are large matrix products, many matrices go
through them together, and on a CPU nothing calls LAPACK, whose threads are in the way of XLA's.
"""

import collections
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optax_kron.kernels import linalg

_CLOSED_FORM = 2  # largest size that is inverted in closed form
_BASE = 512  # largest size that is not halved
_PANEL = 64
_ROUND = 4  # panels are multiples of it, so that more matrices share a program
_TOGETHER = 8  # matrices that go through the products side by side
# Rounding of the products goes into what is left of a matrix: they may not be cut to fewer bits.
_PRECISION = jax.lax.Precision.HIGHEST


def inverses(stacks: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    """The inverse of every matrix of several stacks; those of a similar size share one program.

    Args:
      stacks: [N, d, d], each with its own N and d; symmetric matrices.

    Returns:
      Arrays like the stacks, and for each whether its matrices' inverses are finite, bool [N]: that
      of a matrix which is not positive definite is not. Cost: 2·d³ operations for each matrix, up
      to twice that where d ≤ 512; up to 2×2 in closed form.
    """
    pools = collections.defaultdict(list)
    for i, stack in enumerate(stacks):
        pools[_padded(stack.shape[-1]), stack.dtype].append(i)
    found: dict[int, Array] = {}
    finite: dict[int, Array] = {}
    for (size, _), members in pools.items():
        pool = _invert(
            jnp.concatenate([linalg.continue_by_identity(stacks[i], size) for i in members])
        )
        largest = jnp.max(jnp.abs(pool), axis=(1, 2))
        start = 0
        for i in members:
            count, length, _ = stacks[i].shape
            found[i] = pool[start : start + count, :length, :length]
            finite[i] = jnp.isfinite(largest[start : start + count])
            start += count
    return [found[i] for i in range(len(stacks))], [finite[i] for i in range(len(stacks))]


def _padded(size: int) -> int:
    """The size that halves down to blocks of one size, and these to panels."""
    if size <= _CLOSED_FORM:
        return size
    blocks = 1
    while -(-size // blocks) > _BASE:
        blocks *= 2
    panels = blocks * _panels(-(-size // blocks))
    return -(-size // (panels * _ROUND)) * panels * _ROUND


def _panels(size: int) -> int:
    """Number of panels of a block that is not halved."""
    return -(-size // _PANEL)


def _invert(pool: Array) -> Array:
    """Inverses of [N, d, d], so many at a time that there is room for what is between."""
    count, size, _ = pool.shape
    if size <= _CLOSED_FORM:
        root = jax.vmap(_small_root)(pool)
        return _multiply(root.mT, root)
    batches = -(-count // _TOGETHER)
    if batches <= 1:
        return _decompose(pool)[1]
    together = -(-count // batches)
    rest = batches * together - count
    padding = jnp.broadcast_to(jnp.eye(size, dtype=pool.dtype), (rest, size, size))
    pool = jnp.concatenate([pool, padding]).reshape(batches, together, size, size)
    inverted = jax.lax.map(lambda x: _decompose(x)[1], pool)
    return inverted.reshape(-1, size, size)[:count]


def _multiply(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=_PRECISION)


def _decompose(matrices: Array) -> tuple[Array, Array]:
    """`R = L⁻¹` of `M = LLᵀ`, and `RᵀR = M⁻¹`, of [N, d, d]."""
    size = matrices.shape[-1]
    if size <= _BASE:
        root = jax.lax.platform_dependent(matrices, cpu=_eliminate, default=_lapack_root)
        return root, _multiply(root.mT, root)
    half = size // 2
    first, first_inverse = _decompose(matrices[:, :half, :half])
    below = _multiply(matrices[:, half:, :half], first.mT)
    rest = matrices[:, half:, half:] - _multiply(below, below.mT)
    second, second_inverse = _decompose(rest)
    corner = -_multiply(second, _multiply(below, first))
    cross = _multiply(second.mT, corner)
    root = _block(first, jnp.zeros_like(first), corner, second)
    top = first_inverse + _multiply(corner.mT, corner)
    return root, _block(top, cross.mT, cross, second_inverse)


def _block(a: Array, b: Array, c: Array, d: Array) -> Array:
    """`[[a, b], [c, d]]`."""
    upper, lower = (jnp.concatenate(pair, axis=-1) for pair in ((a, b), (c, d)))
    return jnp.concatenate([upper, lower], axis=-2)


def _lapack_root(matrices: Array) -> Array:
    lower = jax.lax.linalg.cholesky(matrices, symmetrize_input=False)
    identity = jnp.broadcast_to(jnp.eye(matrices.shape[-1], dtype=matrices.dtype), matrices.shape)
    return jax.lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)


def _eliminate(matrices: Array) -> Array:
    """`L⁻¹`: what the elimination of `[M, I]`, panel by panel of rows, makes of the identity.

    Columns that are done with on the left make room for those that begin on the right.
    """
    size = matrices.shape[-1]
    panel = size // _panels(size)
    if size == panel:
        return _eliminate_panel(matrices)
    rows, columns = np.arange(size)[:, None], np.arange(size)

    def eliminate(i, rest):
        start = i * panel
        left = jax.lax.dynamic_slice_in_dim(rest, start, panel, axis=2)
        root = _eliminate_panel(jax.lax.dynamic_slice_in_dim(left, start, panel, axis=1))
        done = (columns >= start) & (columns < start + panel)
        rest = jnp.where(done, (rows == columns).astype(rest.dtype), rest)
        block = _multiply(root, jax.lax.dynamic_slice_in_dim(rest, start, panel, axis=1))
        lower = jnp.where(rows >= start + panel, _multiply(left, root.mT), 0)
        rest = rest - _multiply(lower, block)
        return jax.lax.dynamic_update_slice_in_dim(rest, block, start, axis=1)

    return jnp.tril(jax.lax.fori_loop(0, size // panel, eliminate, matrices))


def _eliminate_panel(matrices: Array) -> Array:
    """`L⁻¹` of one panel, row by row."""
    size = matrices.shape[-1]
    rows, columns = np.arange(size)[:, None], np.arange(size)

    def eliminate(i, rest):
        left = jax.lax.dynamic_slice_in_dim(rest, i, 1, axis=2)
        row = jax.lax.dynamic_slice_in_dim(rest, i, 1, axis=1)
        pivot = jax.lax.dynamic_slice_in_dim(row, i, 1, axis=2)
        scale = jax.lax.rsqrt(jnp.where(pivot > 0, pivot, jnp.nan))
        row = jnp.where(columns == i, 1, row) * scale
        below = jnp.where(columns == i, 0, rest) - left * scale * row
        return jnp.where(rows > i, below, jnp.where(rows == i, row, rest))

    return jnp.tril(jax.lax.fori_loop(0, size, eliminate, matrices))


def _small_root(matrix: Array) -> Array:
    """`L⁻¹` of `M = LLᵀ`, up to 2×2."""

    def root(x):
        return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), jnp.nan)

    first = root(matrix[0, 0])
    if matrix.shape[0] == 1:
        return (1 / first).reshape(1, 1)
    below = matrix[1, 0] / first
    second = root(matrix[1, 1] - below * below)
    zero = jnp.zeros_like(first)
    return jnp.stack([1 / first, zero, -below / (first * second), 1 / second]).reshape(2, 2)
