"""Inverses of symmetric positive definite matrices, of matrix products only.

`M = LLᵀ` is decomposed by halves, as the inverse `R = L⁻¹`,

    M = [[A, Bᵀ], [B, C]]:   R₁ = root(A),   K = B R₁ᵀ,   R₂ = root(C − K Kᵀ),   R₂₁ = −R₂ K R₁,

and `M⁻¹ = RᵀR` of the same halves, which skips the products of zeros. Blocks up to 256 are
eliminated panel by panel. So nearly all operations are large matrix products, many matrices go
through them together, and on a CPU nothing calls LAPACK, whose threads are in the way of XLA's.
"""

import collections
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from optax_kron.kernels import flow

_CLOSED_FORM = 2  # largest size that is inverted in closed form
_BASE = 256  # largest size that is not halved
_PANEL = 64
_ROUND = 4  # panels are multiples of it, so that more matrices share a program
_TOGETHER = 16  # at most so many matrices go through the products side by side
_SLACK = 0.25  # operations more than needed, for a smaller number of programs
# Rounding of the products goes into what is left of a matrix: they may not be cut to fewer bits.
_PRECISION = jax.lax.Precision.HIGHEST

# Matrices [N, d, d], and what is to be added to their diagonals [N, d].
Pool = tuple[Array, Array]


def inverses(stacks: Sequence[Array], shifts: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    """`(M + s·I)⁻¹` of every matrix of several stacks; those of a similar size share one program.

    Args:
      stacks: [N, d, d], each with its own N and d; symmetric matrices. An infinite entry of a
        diagonal counts as one that tends to infinity: its row of the inverse is zero.
      shifts: s [N] of every stack.

    Returns:
      Arrays like the stacks, and for each whether its matrices' inverses are finite, bool [N]; of a
      matrix that is not positive definite they are not. Cost: 2·d³ operations for each matrix, up
      to twice that where d ≤ 256, and all in all a quarter more at most, to share programs; up to
      2×2 in closed form.
    """
    found: dict[int, Array] = {}
    finite: dict[int, Array] = {}
    for base, levels in _programs(stacks):
        dtype = stacks[levels[-1][0]].dtype
        pools = [
            _pool([stacks[i] for i in members], [shifts[i] for i in members], base << n, dtype)
            for n, members in enumerate(levels)
        ]
        for members, pool in zip(levels, _invert(pools), strict=True):
            largest = jnp.max(jnp.abs(pool), axis=(1, 2))
            start = 0
            for i in members:
                count, length, _ = stacks[i].shape
                found[i] = pool[start : start + count, :length, :length]
                finite[i] = jnp.isfinite(largest[start : start + count])
                start += count
    return [found[i] for i in range(len(stacks))], [finite[i] for i in range(len(stacks))]


def _programs(stacks: Sequence[Array]) -> list[tuple[int, list[list[int]]]]:
    """Which stacks are padded to one base size: the size, and stacks by how often they are halved.

    A program takes longer to compile than many a matrix takes to be inverted, so stacks join that
    of the next larger base while the operations grow by `_SLACK` at most.
    """
    kinds = collections.defaultdict(list)
    for i, stack in enumerate(stacks):
        base, halvings = _base(stack.shape[-1])
        kinds[str(stack.dtype), base].append((i, halvings))

    def cost(base, members):
        return sum(
            len(stacks[i]) * (base << halvings) ** 3 * (1 if halvings else 2)
            for i, halvings in members
        )

    room = _SLACK * sum(cost(base, members) for (_, base), members in kinds.items())
    programs: list[tuple[str, int, list]] = []
    for (dtype, base), members in sorted(kinds.items(), reverse=True):
        if base > _CLOSED_FORM and programs and programs[-1][0] == dtype:
            _, larger, joined = programs[-1]
            extra = cost(larger, members) - cost(base, members)
            if extra <= room:
                room -= extra
                joined.extend(members)
                continue
        programs.append((dtype, base, list(members)))
    return [
        (base, [[i for i, k in members if k == n] for n in range(1 + max(k for _, k in members))])
        for _, base, members in programs
    ]


def _base(size: int) -> tuple[int, int]:
    """The padded size of the blocks that a matrix is halved down to, and how often it is halved."""
    if size <= _CLOSED_FORM:
        return size, 0
    halvings = max(0, (-(-size // _BASE) - 1).bit_length())
    block = -(-size >> halvings)
    panels = _panels(block) * _ROUND
    return -(-block // panels) * panels, halvings


def _panels(size: int) -> int:
    """Number of panels of a block that is not halved."""
    return -(-size // _PANEL)


def _pool(stacks: Sequence[Array], shifts: Sequence[Array], size: int, dtype: DTypeLike) -> Pool:
    """All matrices of some stacks, zeros beside them, with the diagonals that they need.

    Those continue them by the identity. To add them here would make one large kernel of all stacks.
    """
    padded = [jnp.pad(x, ((0, 0), *[(0, size - x.shape[-1])] * 2)) for x in stacks]
    lengths = np.repeat([x.shape[-1] for x in stacks], [len(x) for x in stacks])
    inside = np.arange(size) < lengths[:, None]
    shift = jnp.concatenate([*shifts, jnp.zeros(0, dtype)]).astype(dtype)
    diagonals = jnp.where(inside, shift[:, None], 1)
    return jnp.concatenate([*padded, jnp.zeros((0, size, size), dtype)]), diagonals


def _invert(pools: Sequence[Pool]) -> list[Array]:
    """Inverses of pools of sizes b, 2b, 4b, ..., of which all but the last may be empty."""
    if pools[0][0].shape[-1] <= _CLOSED_FORM:
        root = jax.vmap(_small_root)(_shifted(*pools[0]))
        return [_multiply(root.mT, root)]
    counts = _eliminations([len(matrices) for matrices, _ in pools])
    # All eliminations of the program have as many matrices side by side, so as to be compiled once;
    # one more for each run of the loop, whose steps cost something of their own.
    together = min(
        range(_TOGETHER, 0, -1), key=lambda n: sum(-(-count // n) * (n + 1) for count in counts)
    )
    return [inverse for _, inverse in _decompose(pools, together)]


def _shifted(matrices: Array, diagonals: Array) -> Array:
    """Matrices [N, d, d] and [N, d] added to their diagonals."""
    return matrices + diagonals[:, None] * np.eye(diagonals.shape[1], dtype=diagonals.dtype)[None]


def _eliminations(counts: Sequence[int]) -> list[int]:
    """How many matrices every elimination has, one after the other, of so many at each level."""
    if len(counts) == 1:
        return list(counts)
    *smaller, below, halved = counts
    first = _eliminations([*smaller, below + halved])
    return first + _eliminations([0] * len(smaller) + [halved])


def _multiply(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=_PRECISION)


def _decompose(pools: Sequence[Pool], together: int) -> list[tuple[Array, Array]]:
    """`R = L⁻¹` of `M = LLᵀ`, and `RᵀR = M⁻¹`, of pools as in `_invert`."""
    *smaller, (matrices, diagonals) = pools
    if not smaller:
        root = _roots(_shifted(matrices, diagonals), together)
        return [(root, _multiply(root.mT, root))]
    half = matrices.shape[-1] // 2
    *smallest, (own, own_diagonals) = smaller
    joined = (
        jnp.concatenate([own, matrices[:, :half, :half]]),
        jnp.concatenate([own_diagonals, diagonals[:, :half]]),
    )
    *found, (roots, inverses) = _decompose([*smallest, joined], together)
    first, first_inverse = roots[len(own) :], inverses[len(own) :]
    lower = _multiply(matrices[:, half:, :half], first.mT)
    rest = matrices[:, half:, half:] - _multiply(lower, lower.mT)
    empty = [(m[:0], d[:0]) for m, d in smallest]
    *_, (second, second_inverse) = _decompose([*empty, (rest, diagonals[:, half:])], together)
    corner = -_multiply(second, _multiply(lower, first))
    cross = _multiply(second.mT, corner)
    root = _block(first, jnp.zeros_like(first), corner, second)
    top = first_inverse + _multiply(corner.mT, corner)
    inverse = _block(top, cross.mT, cross, second_inverse)
    return [*found, (roots[: len(own)], inverses[: len(own)]), (root, inverse)]


def _roots(matrices: Array, together: int) -> Array:
    """`L⁻¹` of [N, b, b], so many at a time."""
    count, size, _ = matrices.shape
    runs = -(-count // together)
    rest = runs * together - count
    if rest:
        padding = jnp.broadcast_to(jnp.eye(size, dtype=matrices.dtype), (rest, size, size))
        matrices = jnp.concatenate([matrices, padding])

    def decompose(x):
        return flow.platform_dependent(x, cpu=_eliminate, default=_lapack_root)

    if runs == 1:
        return decompose(matrices)[:count]
    roots = jax.lax.map(decompose, matrices.reshape(runs, together, size, size))
    return roots.reshape(-1, size, size)[:count]


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
    rows, columns = np.arange(size)[None, :, None], np.arange(size)[None, None]

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

    return jnp.tril(flow.fori_loop(0, size // panel, eliminate, matrices))


def _eliminate_panel(matrices: Array) -> Array:
    """`L⁻¹` of one panel, row by row."""
    size = matrices.shape[-1]
    rows, columns = np.arange(size)[None, :, None], np.arange(size)[None, None]

    def eliminate(i, rest):
        left = jax.lax.dynamic_slice_in_dim(rest, i, 1, axis=2)
        row = jax.lax.dynamic_slice_in_dim(rest, i, 1, axis=1)
        pivot = jax.lax.dynamic_slice_in_dim(row, i, 1, axis=2)
        scale = jax.lax.rsqrt(jnp.where(pivot > 0, pivot, jnp.nan))
        row = jnp.where(columns == i, 1, row) * scale
        below = jnp.where(columns == i, 0, rest) - left * scale * row
        return jnp.where(rows > i, below, jnp.where(rows == i, row, rest))

    return jnp.tril(flow.fori_loop(0, size, eliminate, matrices))


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
