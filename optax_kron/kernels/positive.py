"""Inverses of symmetric positive definite matrices, of matrix products only.

`M = LLᵀ` is decomposed by halves, as the inverse Cholesky factor `R = L⁻¹`,

    M = [[A, Bᵀ], [B, C]]:   R₁ = R(A),   K = B R₁ᵀ,   R₂ = R(C − K Kᵀ),   R₂₁ = −R₂ K R₁,

and `M⁻¹ = RᵀR` of the same halves, which skips the products of zeros. Blocks up to 256 are
eliminated panel by panel. So nearly all operations are large matrix products, many matrices go
through them together, and on a CPU nothing calls LAPACK, whose threads are in the way of XLA's.
"""

import collections
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Complex, Float, Inexact

from optax_kron.kernels import contract, flow, linalg
from optax_kron.kernels.contract import matmul_exact

# A worked example, for stacks [3, 520, 520] and [8, 130, 130]:
#
#   520 is halved twice, to 130, which becomes 132 = 3 panels of 44: the base size. So the stacks
#   share one program of that base, the first at level 2, padded to [3, 528, 528], the second at
#   level 0, padded to [8, 132, 132].
#
#   level 2: A, B, C of [3, 264, 264] each. R(A) comes from level 1; then K = B R₁ᵀ, and
#            C − K Kᵀ goes to level 1 as well, after it.
#   level 1: A, B, C of [3, 132, 132] each. Those A join the second stack at level 0.
#   level 0: four eliminations one after the other, of 3 + 8, 3, 3 and 3 matrices of [132, 132].
#
# On their way back up the blocks become R [3, 528, 528], and M⁻¹ = RᵀR block by block.

_CLOSED_FORM = 2  # largest size that is inverted in closed form
_BASE = 256  # largest size that is not halved
_PANEL = 64
_ROUND = 4  # panels are multiples of it, so that more matrices share a program
_TOGETHER = 16  # at most so many matrices go through the products side by side
_SLACK = 0.25  # operations more than needed, for a smaller number of programs

Matrices = Float[Array, "N d d"]
# Matrices, and what is to be added to their diagonals.
Pool = tuple[Matrices, Float[Array, "N d"]]


def inverses(
    stacks: Sequence[Matrices], shifts: Sequence[Float[Array, " N"]]
) -> tuple[list[Matrices], list[Bool[Array, " N"]]]:
    """`(M + s·I)⁻¹` of every matrix of several stacks; those of a similar size share one program.

    Args:
      stacks: Symmetric matrices, each stack with its own N and d. An infinite entry of a diagonal
        counts as one that tends to infinity: its row of the inverse is zero.
      shifts: The shifts s of every stack.

    Returns:
      Arrays like the stacks, and for each whether its matrices' inverses are finite; of a matrix
      that is not positive definite they are not. Cost: 2·d³ operations for each matrix, up to twice
      that where d ≤ 256, and all in all a quarter more at most, to share programs; up to 2×2 in
      closed form.
    """
    results: dict[int, tuple[Array, Array]] = {}
    for base, levels in _programs(stacks):
        dtype = stacks[levels[-1][0]].dtype
        pools = [
            _pool([stacks[i] for i in members], [shifts[i] for i in members], base << n, dtype)
            for n, members in enumerate(levels)
        ]
        for members, pool in zip(levels, _invert(pools), strict=True):
            finite = contract.all_finite(pool, axis=(1, 2))
            start = 0
            for i in members:
                count, length, _ = stacks[i].shape
                inverse = pool[start : start + count, :length, :length]
                results[i] = inverse, finite[start : start + count]
                start += count
    indices = range(len(stacks))
    return [results[i][0] for i in indices], [results[i][1] for i in indices]


def inverse_factors(
    matrices: Inexact[Array, "N d d"], shifts: Float[Array, " N"]
) -> Inexact[Array, "N d d"]:
    """`R = L⁻¹` of every `M + s·I = L Lᴴ`.

    Args:
      matrices: M, Hermitian, d ≤ 256, or 128 if complex.
      shifts: s.

    Returns:
      Lower triangular arrays, with NaN for a matrix that is not positive definite. Cost: 2·d³
      operations for each matrix; four times those of real numbers if complex.
    """
    if jnp.iscomplexobj(matrices):
        return _extracted(inverse_factors(_embedded(matrices), shifts))
    size = matrices.shape[-1]
    padded = _shifted(*_pool([matrices], [shifts], padded_size(size), matrices.dtype))
    return _inverse_factors(padded, _side_by_side([len(matrices)]))[:, :size, :size]


def padded_size(size: int) -> int:
    """The least size, of at most 256, that needs no padding and is no smaller than this one."""
    multiple = _panels(size) * _ROUND
    return -(-size // multiple) * multiple


def _embedded(matrices: Complex[Array, "N d d"]) -> Float[Array, "N 2*d 2*d"]:
    """Real matrices with `[[x, −y], [y, x]]` for every `x + iy`: their Cholesky factor is as real.

    For the diagonal of a Cholesky factor is real, so that those of it are triangular.
    """
    re, im = matrices.real, matrices.imag
    cells = jnp.stack([jnp.stack([re, -im], axis=-1), jnp.stack([im, re], axis=-1)], axis=-2)
    size = 2 * matrices.shape[-1]
    return jnp.swapaxes(cells, 2, 3).reshape(len(matrices), size, size)


def _extracted(matrices: Float[Array, "N 2*d 2*d"]) -> Complex[Array, "N d d"]:
    """The inverse of `_embedded`."""
    left = matrices[:, :, ::2]
    return jax.lax.complex(left[:, ::2], left[:, 1::2])


def _programs(stacks: Sequence[Matrices]) -> list[tuple[int, list[list[int]]]]:
    """Which stacks are padded to one base size: the size, and stacks by how often they are halved.

    A program takes longer to compile than many a matrix takes to be inverted, so stacks join that
    of the next larger base while the operations grow by `_SLACK` at most.
    """
    kinds = collections.defaultdict(list)
    for i, stack in enumerate(stacks):
        base, halvings = _base(stack.shape[-1])
        # Those in closed form join no others.
        kind = str(stack.dtype), min(base, _CLOSED_FORM + 1)
        kinds[kind, base].append((i, halvings))

    def cost(base, members):
        # A block that is not halved is eliminated with all its zeros, at twice the operations.
        return sum(len(stacks[i]) * (base << n) ** 3 * (1 if n else 2) for i, n in members)

    return [
        (base, [[i for i, k in members if k == n] for n in range(1 + max(k for _, k in members))])
        for base, members in linalg.joined(kinds, cost, slack=_SLACK)
    ]


def _base(size: int) -> tuple[int, int]:
    """The padded size of the blocks that a matrix is halved down to, and how often it is halved."""
    if size <= _CLOSED_FORM:
        return size, 0
    halvings = max(0, (-(-size // _BASE) - 1).bit_length())
    return padded_size(-(-size >> halvings)), halvings


def _panels(size: int) -> int:
    """Number of panels of a block that is not halved."""
    return -(-size // _PANEL)


def _pool(
    stacks: Sequence[Matrices], shifts: Sequence[Float[Array, " N"]], size: int, dtype: DTypeLike
) -> Pool:
    """All matrices of some stacks, zeros beside them, with the diagonals that they need.

    Those continue them by the identity. To add them here would make one large kernel of all stacks.
    """
    padded = [jnp.pad(x, ((0, 0), *[(0, size - x.shape[-1])] * 2)) for x in stacks]
    lengths = np.repeat([x.shape[-1] for x in stacks], [len(x) for x in stacks])
    inside = np.arange(size) < lengths[:, None]
    # The empty arrays are for a level without stacks.
    shift = jnp.concatenate([*shifts, jnp.zeros(0, dtype)]).astype(dtype)
    diagonals = jnp.where(inside, shift[:, None], 1)
    return jnp.concatenate([*padded, jnp.zeros((0, size, size), dtype)]), diagonals


def _invert(pools: Sequence[Pool]) -> list[Matrices]:
    """Inverses of pools of sizes b, 2b, 4b, ..., of which all but the last may be empty."""
    if pools[0][0].shape[-1] <= _CLOSED_FORM:
        factor = jax.vmap(_small_inverse_factor)(_shifted(*pools[0]))
        return [matmul_exact(factor.mT, factor)]
    counts = _eliminations([len(matrices) for matrices, _ in pools])
    return [inverse for _, inverse in _decompose(pools, _side_by_side(counts))]


def _side_by_side(counts: Sequence[int]) -> int:
    """How many matrices all eliminations of a program have side by side, so as to be compiled once.

    One more counts for each run of the loop, whose steps cost something of their own.
    """
    return min(
        range(_TOGETHER, 0, -1), key=lambda n: sum(-(-count // n) * (n + 1) for count in counts)
    )


def _shifted(matrices: Matrices, diagonals: Float[Array, "N d"]) -> Matrices:
    return matrices + diagonals[:, None] * np.eye(diagonals.shape[1], dtype=diagonals.dtype)[None]


def _eliminations(counts: Sequence[int]) -> list[int]:
    """How many matrices every elimination has, one after the other, of so many at each level."""
    if len(counts) == 1:
        return list(counts)
    *smaller, below, halved = counts
    first = _eliminations([*smaller, below + halved])
    return first + _eliminations([0] * len(smaller) + [halved])


def _decompose(pools: Sequence[Pool], together: int) -> list[tuple[Matrices, Matrices]]:
    """`R = L⁻¹` of `M = LLᵀ`, and `RᵀR = M⁻¹`, of pools as in `_invert`."""
    *smaller, (matrices, diagonals) = pools
    if not smaller:
        factor = _inverse_factors(_shifted(matrices, diagonals), together)
        return [(factor, matmul_exact(factor.mT, factor))]
    # The upper left halves go down one level, behind the matrices that begin there.
    half = matrices.shape[-1] // 2
    *smallest, (below, below_diagonals) = smaller
    joined = (
        jnp.concatenate([below, matrices[:, :half, :half]]),
        jnp.concatenate([below_diagonals, diagonals[:, :half]]),
    )
    *others, (factors, inverses) = _decompose([*smallest, joined], together)
    count = len(below)
    first, first_inverse = factors[count:], inverses[count:]
    # Only now is the Schur complement known: it goes down alone, with nothing left below it.
    lower = matmul_exact(matrices[:, half:, :half], first.mT)
    schur = matrices[:, half:, half:] - matmul_exact(lower, lower.mT)
    empty = [(m[:0], d[:0]) for m, d in smallest]
    *_, (second, second_inverse) = _decompose([*empty, (schur, diagonals[:, half:])], together)
    corner = -matmul_exact(second, matmul_exact(lower, first))
    cross = matmul_exact(second.mT, corner)
    factor = _block(first, jnp.zeros_like(first), corner, second)
    top = first_inverse + matmul_exact(corner.mT, corner)
    inverse = _block(top, cross.mT, cross, second_inverse)
    return [*others, (factors[:count], inverses[:count]), (factor, inverse)]


def _block(a: Matrices, b: Matrices, c: Matrices, d: Matrices) -> Matrices:
    """`[[a, b], [c, d]]`."""
    rows = [jnp.concatenate([a, b], axis=-1), jnp.concatenate([c, d], axis=-1)]
    return jnp.concatenate(rows, axis=-2)


def _inverse_factors(matrices: Matrices, together: int) -> Matrices:
    """`L⁻¹` of matrices of the base size, so many at a time."""
    count, size, _ = matrices.shape
    runs = -(-count // together)
    rest = runs * together - count
    if rest:
        padding = jnp.broadcast_to(jnp.eye(size, dtype=matrices.dtype), (rest, size, size))
        matrices = jnp.concatenate([matrices, padding])

    def decompose(x):
        return flow.platform_dependent(x, cpu=_eliminate, default=_by_cholesky)

    if runs == 1:
        return decompose(matrices)[:count]
    factors = jax.lax.map(decompose, matrices.reshape(runs, together, size, size))
    return factors.reshape(-1, size, size)[:count]


def _by_cholesky(matrices: Matrices) -> Matrices:
    lower = jax.lax.linalg.cholesky(matrices, symmetrize_input=False)
    identity = jnp.broadcast_to(jnp.eye(matrices.shape[-1], dtype=matrices.dtype), matrices.shape)
    return jax.lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)


def _eliminate(matrices: Matrices) -> Matrices:
    """`L⁻¹`: what the elimination of `[M, I]`, panel by panel of rows, makes of the identity.

    Columns that are done with on the left make room for those that begin on the right.
    """
    size = matrices.shape[-1]
    panel = size // _panels(size)
    if size == panel:
        return _eliminate_panel(matrices)
    rows, columns = np.arange(size)[None, :, None], np.arange(size)[None, None]

    # [N, d, d] throughout: the columns of panel i hold M before step i, those of I from then on.
    def eliminate(i, rest):
        start = i * panel
        left = jax.lax.dynamic_slice_in_dim(rest, start, panel, axis=2)
        factor = _eliminate_panel(jax.lax.dynamic_slice_in_dim(left, start, panel, axis=1))
        done = (columns >= start) & (columns < start + panel)
        rest = jnp.where(done, (rows == columns).astype(rest.dtype), rest)
        block = matmul_exact(factor, jax.lax.dynamic_slice_in_dim(rest, start, panel, axis=1))
        lower = jnp.where(rows >= start + panel, matmul_exact(left, factor.mT), 0)
        rest = rest - matmul_exact(lower, block)
        return jax.lax.dynamic_update_slice_in_dim(rest, block, start, axis=1)

    return jnp.tril(flow.fori_loop(0, size // panel, eliminate, matrices))


def _eliminate_panel(matrices: Matrices) -> Matrices:
    """`L⁻¹` of one panel, row by row."""
    size = matrices.shape[-1]
    rows, columns = np.arange(size)[None, :, None], np.arange(size)[None, None]

    def eliminate(i, rest):
        left = jax.lax.dynamic_slice_in_dim(rest, i, 1, axis=2)
        row = jax.lax.dynamic_slice_in_dim(rest, i, 1, axis=1)
        pivot = jax.lax.dynamic_slice_in_dim(row, i, 1, axis=2)
        # A pivot that is not positive makes all that follows NaN: that is how the caller is told.
        scale = jax.lax.rsqrt(jnp.where(pivot > 0, pivot, jnp.nan))
        row = jnp.where(columns == i, 1, row) * scale
        below = jnp.where(columns == i, 0, rest) - left * scale * row
        return jnp.where(rows > i, below, jnp.where(rows == i, row, rest))

    return jnp.tril(flow.fori_loop(0, size, eliminate, matrices))


def _small_inverse_factor(matrix: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """`L⁻¹` of `M = LLᵀ`, up to 2×2."""

    def sqrt(x):
        return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), jnp.nan)

    first = sqrt(matrix[0, 0])
    if matrix.shape[0] == 1:
        return (1 / first).reshape(1, 1)
    below = matrix[1, 0] / first
    second = sqrt(matrix[1, 1] - below * below)
    zero = jnp.zeros_like(first)
    return jnp.stack([1 / first, zero, -below / (first * second), 1 / second]).reshape(2, 2)
