"""Linear algebra that is safe in batches on every backend: of matrix products only.

What cannot be had of them goes through `lapack_safe`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Inexact

from optax_kron.kernels import contract, flow
from optax_kron.types import PyTree

Kind = Any  # of one type that can be sorted
Member = TypeVar("Member")

PROBE_ROWS = 32

_SUBSTITUTION_SIZE = 32
_PANEL_SIZE = 128
# Enough for a factor √2 at the worst spectrum, a weak spike over a flat rest: the longer the rows,
# the less of the spike is in them.
_PRODUCTS, _PRODUCTS_LONG, _LONG = 6, 10, 1024
_LARGEST_ROTATION, _MOST_ROTATIONS, _NEARLY_HERMITIAN = 1 / 3, 10, 1e-3


def lapack_safe(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Make a function that calls LAPACK on single matrices safe to vmap.

    Batched LAPACK calls of one program can wait for each other for ever in XLA's CPU runtime. So a
    vmapped call of the returned function takes one matrix after the other there, however deep the
    vmap; on other backends it is batched.

    JAX 0.10 needs it: its LAPACK calls hand parts of their batch to the threads that run the
    program and wait for them, and calls that don't need one another occupy all threads. In
    processes with eight such calls, on two cores and JAX 0.10.2, 3 of 3 hung in `inv` and in
    `solve`, 1 of 3 in `qr` and in `triangular_solve`, 1 of 7 in `cholesky`, none in `eigh` (7) and
    `svd` (3). On JAX 0.8.0, 0.11.2 and 0.12.0.1 none of 12 hung in the first four, nor did any that
    went through this function on 0.10.2 (`benchmarks/lapack_hang.py`). The same parts slow small
    matrices down (jax#36927), and corrupt memory in `eigh` on hundreds of cores, also in 0.11.0
    (jax#39292).

    Args:
      fn: Function from arrays to a pytree of arrays.
    """
    one_by_one = jax.custom_batching.sequential_vmap(fn)

    @functools.wraps(fn)
    def safe(*args: Array) -> PyTree:
        return flow.platform_dependent(*args, cpu=one_by_one, default=fn)

    return safe


def map_blocks(fn: Callable[..., PyTree], *stacks: PyTree) -> PyTree:
    """Map a function over the leading axis of its arguments: one at a time on CPU, else vmapped.

    Args:
      fn: Function of one block: from pytrees of arrays to a pytree of arrays.
      *stacks: Pytrees of arrays with a leading axis N.

    Returns:
      What `fn` returns, with a leading axis N on every leaf.
    """
    # On CPU the working set of one block stays in the cache, and memory for one is enough. Both
    # ways are right on every backend: the choice, of speed alone, is made for the default one at
    # trace time, so that only one of them is traced.
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda x: fn(*x), stacks)
    return jax.vmap(fn)(*stacks)


def joined(
    kinds: Mapping[tuple[Kind, int], Sequence[Member]],
    cost: Callable[[int, Sequence[Member]], float],
    *,
    slack: float,
    free: float = 0,
) -> list[tuple[int, list[Member]]]:
    """What shares a program, which takes longer to compile than many a matrix takes to be used.

    Args:
      kinds: Members by what they must have in common, and the size of their matrices.
      cost: Operations for some members, padded to a size.
      slack: How many operations more than needed there may be, relative to the total.
      free: And so many are not counted.

    Returns:
      The sizes of programs, the largest first, and their members, of this size or smaller.
    """
    room = free + slack * sum(cost(size, members) for (_, size), members in kinds.items())
    programs: list[tuple[Kind, int, list[Member]]] = []
    for (kind, size), members in sorted(kinds.items(), key=lambda x: x[0], reverse=True):
        if programs and programs[-1][0] == kind:
            _, larger, others = programs[-1]
            extra = cost(larger, members) - cost(size, members)
            if extra <= room:
                room -= extra
                others += members
                continue
        programs.append((kind, size, list(members)))
    return [(size, members) for _, size, members in programs]


def norm_bound(matrix: Inexact[Array, "d d"], rows: Float[Array, "r e"]) -> Float[Array, ""]:
    """A lower bound of the spectral norm of a Hermitian or skew-Hermitian matrix.

    Power iteration on a block of random rows, turned towards the row of largest norm: made of
    matrix products only. The bound never exceeds the norm by more than rounding, and stays within a
    factor √2 of it.

    Args:
      matrix: A Hermitian or skew-Hermitian matrix.
      rows: `PROBE_ROWS` standard normal rows of length e ≥ d; several blocks may share them.

    Returns:
      The bound; zero for a zero matrix. Cost: 384·d² operations.

    Source: Li (2024), arXiv:2402.11858, and its reference implementation.
    """
    # In units of the largest entry, squares neither overflow nor vanish.
    scale = jnp.max(jnp.abs(matrix)) + jnp.finfo(contract.real_dtype(matrix.dtype)).tiny
    row_norms = _row_norms(matrix / scale)
    top = matrix[jnp.argmax(row_norms)] / scale
    bound = power_bound(lambda x: (x @ matrix) / scale, top, rows)
    return scale * jnp.maximum(bound, jnp.max(row_norms))


def power_bound(
    apply: Callable[[Inexact[Array, "r d"]], Inexact[Array, "r d"]],
    top: Inexact[Array, " d"],
    rows: Float[Array, "r e"],
) -> Float[Array, ""]:
    """Lower bound of the norm of a normal operator by power iteration on a block of rows.

    Args:
      apply: Function that multiplies rows by the operator, whose norm is in [1, d].
      top: A row of large norm, towards which the random rows are turned.
      rows: `PROBE_ROWS` standard normal rows of length e ≥ d.

    Returns:
      The bound. Cost: six calls of `apply`, ten beyond d = 1024.
    """
    tiny = jnp.finfo(contract.real_dtype(top.dtype)).tiny
    rows = rows[:, : top.shape[-1]].astype(top.dtype)
    # Each random row is turned so that it adds to the large row rather than cancels it.
    overlap = rows @ top.conj()
    turn = jnp.where(overlap == 0, 1, overlap / (jnp.abs(overlap) + tiny))
    rows = top[None] + turn.conj()[:, None] * rows

    def step(_, rows):
        # Six products with a norm of up to d would overflow.
        return apply(rows / (jnp.max(jnp.abs(rows)) + tiny))

    products = _PRODUCTS if top.shape[-1] <= _LONG else _PRODUCTS_LONG
    rows = flow.fori_loop(0, products - 1, step, rows)
    # ‖x M‖ ≤ ‖M‖ for a row x of length one: the last product is what makes this a lower bound.
    return jnp.max(_row_norms(apply(rows / (_row_norms(rows)[:, None] + tiny))))


def _row_norms(matrix: Inexact[Array, "r d"]) -> Float[Array, " r"]:
    return jnp.sqrt(jnp.sum(contract.squared_magnitude(matrix), axis=-1))


def procrustes_step(
    q: Inexact[Array, "d d"], rows: Float[Array, "r e"], *, precision: contract.Precision = None
) -> Inexact[Array, "d d"]:
    """One second-order rotation of `Q` towards a Hermitian matrix; `QᴴQ` is kept to third order.

    With `R = (Qᴴ − Q) / bound(Qᴴ − Q)` skew-Hermitian, the step `exp(aR) Q ≈ Q + a(RQ + (a/2)R²Q)`
    raises `Re tr Q` fastest at `a = −tr(RQ) / tr(R²Q)`, kept within [0, 1/8].

    Args:
      q: The matrix `Q`.
      rows: Random rows for `norm_bound`.
      precision: Precision of the matrix products.

    Returns:
      The rotated matrix. Cost: 4·d³ operations.

    Source: Li (2024), arXiv:2402.11858.
    """
    skew = q.conj().T - q
    skew = skew / (norm_bound(skew, rows) + jnp.finfo(skew.dtype).tiny)
    rotated = jnp.matmul(skew, q, precision=precision)
    twice = jnp.matmul(skew, rotated, precision=precision)
    slope, curvature = jnp.trace(rotated).real, jnp.trace(twice).real
    # Re tr of the step is a parabola in a, with a maximum only where it is concave.
    largest = jnp.asarray(0.125, slope.dtype)
    exact = jnp.clip(-slope / jnp.where(curvature < 0, curvature, -1), 0, largest)
    size = jnp.where(curvature < 0, exact, largest)
    return q + size * (rotated + (size / 2) * twice)


def rotate_to_hermitian(
    matrix: Inexact[Array, "d d"],
    rows: Float[Array, "r e"],
    inside: Bool[Array, " d"],
    *,
    precision: contract.Precision = None,
) -> Inexact[Array, "d d"]:
    """Third-order rotations of `P` until it is nearly Hermitian, at least one and at most ten.

    With `R` as in `procrustes_step`, a rotation is `U = I + aR + (aR)²/2 + (aR)³/8`: no Taylor
    series, but unitary to `‖aR‖⁶/64`. `Re tr UP` is largest at the positive root a of
    `t₁ + t₂a + (3/8)t₃a²`, `t_k = Re tr(RᵏP)`; a is kept below 1/3. Unless `t₁` is positive and
    `t₃` negative, P is Hermitian to rounding, and stays as it is.

    Args:
      matrix: The matrix `P`. Rotations keep the sign of the determinant of a real one.
      rows: Random rows for `norm_bound`.
      inside: Which rows count for `max|P|`, others than padding.
      precision: Precision of the matrix products.

    Returns:
      The rotated matrix, with `max|P − Pᴴ| ≤ 1e-3 max|P|` if ten rotations suffice. Cost: 6·d³
      operations for each.

    Source: Li (2025), the reference implementation of arXiv:2402.11858.
    """

    def rotate(carry):
        count, p = carry
        skew = p.conj().T - p
        skew = skew / (norm_bound(skew, rows) + jnp.finfo(skew.dtype).tiny)
        powers, traces = [p], []
        for _ in range(3):
            powers.append(jnp.matmul(skew, powers[-1], precision=precision))
            traces.append(jnp.trace(powers[-1]).real)
        t1, t2, t3 = traces
        # In units of t1 squares neither overflow nor vanish, and this form of the root cancels
        # nothing: t2 is negative near positive definite matrices.
        unit = jnp.where(t1 > 0, t1, 1)
        t2, t3 = t2 / unit, jnp.minimum(t3 / unit, 0)
        size = jnp.minimum(2 / (jnp.sqrt(t2**2 - 1.5 * t3) - t2), _LARGEST_ROTATION)
        size = jnp.where((t1 > 0) & (t3 < 0), size, 0)
        p, rp, r2p, r3p = powers
        return count + 1, p + size * (rp + size / 2 * (r2p + size / 4 * r3p))

    def is_unfinished(carry):
        count, p = carry
        largest = jnp.max(jnp.where(inside[:, None], jnp.abs(p), 0))
        far = jnp.max(jnp.abs(p - p.conj().T)) > _NEARLY_HERMITIAN * largest
        return (count == 0) | (far & (count < _MOST_ROTATIONS))

    return flow.while_loop(is_unfinished, rotate, (jnp.zeros([], jnp.int32), matrix))[1]


# A worked example of the triangular solve, for Q [700, 700] and a tensor [700, 40, 20]:
#
#   panels    Q is continued by the identity to [768, 768], 6 panels of 128;
#   diagonal  its diagonal panels [6, 128, 128] are inverted together: each is cut into 4 blocks of
#             32, whose inverses [6, 4, 32, 32] are found row by row, then doubled to 64 and 128;
#   right     unfold(tensor, 0) is [700, 800], padded with zeros to [768, 800];
#   loop      6 steps, each X_i = Q_ii^-H (R_i − Σ_{j<i} Q_jiᴴ X_j) [128, 800]: two products.


def solve_upper_adjoint(
    uppers: Sequence[contract.Factor],
    tensor: contract.Tensor,
    *,
    precision: contract.Precision = None,
) -> contract.Tensor:
    """`Q_i^-H` along every axis of a tensor: forward substitution by panels.

    Only matrix products, so that it batches on every backend. The diagonal panels of all factors
    are inverted together (by substitution up to 32×32, then by doubling).

    Args:
      uppers: One upper triangular factor per axis, with a nonzero diagonal, or a diagonal one.
      tensor: The tensor to solve for.
      precision: Precision of the matrix products.

    Returns:
      A tensor of the same shape. Cost of a dense factor: about 2·n·d_i + 4·d_i·128².
    """
    if tensor.size == 0:
        return tensor
    panels = {i: _panel_size(q.shape[0]) for i, q in enumerate(uppers) if q.ndim == 2}
    padded = {i: _pad_to_panels(uppers[i], panel) for i, panel in panels.items()}
    inverses = _inverse_panels(
        {i: _diagonal_blocks(padded[i], panel) for i, panel in panels.items()}, precision
    )
    for axis, upper in enumerate(uppers):
        if upper.ndim == 1:
            tensor = tensor / contract.along_axis(upper, axis, tensor.ndim)
            continue
        size = upper.shape[0]
        right = contract.unfold(tensor, axis)
        right = jnp.pad(right, ((0, len(padded[axis]) - size), (0, 0)))
        solved = _substitute_panels(padded[axis], inverses[axis].conj().mT, right, precision)
        tensor = contract.fold(solved[:size], axis, tensor.shape)
    return tensor


def _pad_to_panels(upper: Inexact[Array, "d d"], panel: int) -> Inexact[Array, "p p"]:
    """A triangular matrix, continued by the identity up to a whole number of panels."""
    length, padding = upper.shape[0], -upper.shape[0] % panel
    if not padding:
        return upper
    identity = np.diag((np.arange(length + padding) >= length).astype(upper.dtype))
    return jnp.pad(upper, (0, padding)) + identity


def _inverse_panels(
    panels: Mapping[int, Inexact[Array, "k p p"]], precision: contract.Precision
) -> dict[int, Inexact[Array, "k p p"]]:
    """Inverses of the diagonal panels of each matrix, those of one size p all together."""
    inverses = {}
    for size in sorted({x.shape[-1] for x in panels.values()}):
        group = {i: x for i, x in panels.items() if x.shape[-1] == size}
        inverted = _invert_upper(jnp.concatenate(list(group.values())), precision)
        ends = np.cumsum([len(x) for x in group.values()])
        inverses |= dict(zip(group, jnp.split(inverted, ends[:-1]), strict=True))
    return inverses


def _substitute_panels(
    upper: Inexact[Array, "d d"],
    adjoints: Inexact[Array, "k p p"],
    right: Inexact[Array, "d m"],
    precision: contract.Precision,
) -> Inexact[Array, "d m"]:
    """Solve `Qᴴ X = R`, given the inverse adjoints of Q's diagonal panels, d = k·p."""
    panel, (size, width) = adjoints.shape[-1], right.shape

    def solve_panel(i, solved):
        start = i * panel
        # Rows of `solved` from this panel on are still zero: only those above it count.
        columns = jax.lax.dynamic_slice(upper, (0, start), (size, panel))
        above = jnp.matmul(columns.conj().T, solved, precision=precision)
        rest = jax.lax.dynamic_slice(right, (start, 0), (panel, width)) - above
        panel_solved = jnp.matmul(adjoints[i], rest, precision=precision)
        return jax.lax.dynamic_update_slice(solved, panel_solved, (start, 0))

    if len(adjoints) == 1:
        return jnp.matmul(adjoints[0], right, precision=precision)
    return flow.fori_loop(0, len(adjoints), solve_panel, jnp.zeros_like(right))


def _invert_upper(
    blocks: Inexact[Array, "N p p"], precision: contract.Precision
) -> Inexact[Array, "N p p"]:
    """Inverses of upper triangular matrices; p ≤ 32, or 32 times a power of two."""
    length = blocks.shape[-1]
    size = min(length, _SUBSTITUTION_SIZE)
    inverse = _block_diagonal(_substitute(_diagonal_blocks(blocks, size)))
    index = np.arange(length)
    while size < length:
        # [[X, Y], [0, Z]]⁻¹ = [[X⁻¹, −X⁻¹ Y Z⁻¹], [0, Z⁻¹]]: one product for all pairs at once.
        block, pair = index // size, index // (2 * size)
        corners = (pair[:, None] == pair) & (block[:, None] != block)
        right = jnp.matmul(jnp.where(corners[None], blocks, 0), inverse, precision=precision)
        inverse = inverse - jnp.matmul(inverse, right, precision=precision)
        size *= 2
    return inverse


def _substitute(blocks: Inexact[Array, "*batch p p"]) -> Inexact[Array, "*batch p p"]:
    """Inverses of upper triangular matrices, row by row from the last."""
    size = blocks.shape[-1]
    columns = np.arange(size).reshape((1,) * (blocks.ndim - 2) + (size,))

    def solve_row(step, inverse):
        i = size - 1 - step
        row = jax.lax.dynamic_index_in_dim(blocks, i, axis=-2, keepdims=False)
        pivot = jax.lax.dynamic_index_in_dim(row, i, axis=-1)
        # Rows of `inverse` from i up are still zero, so that only the solved ones add up.
        known = jnp.sum(row[..., :, None] * inverse, axis=-2)
        solved = ((columns == i).astype(blocks.dtype) - known) / pivot
        return jax.lax.dynamic_update_index_in_dim(inverse, solved, i, axis=-2)

    return flow.fori_loop(0, size, solve_row, jnp.zeros_like(blocks))


def _panel_size(size: int) -> int:
    """The matrix itself up to 32; else 64 or 128, the larger that pads little."""
    if size <= _SUBSTITUTION_SIZE:
        return size
    return _PANEL_SIZE if -size % _PANEL_SIZE <= size // 8 else _PANEL_SIZE // 2


def _diagonal_blocks(
    matrices: Inexact[Array, "*batch d d"], size: int
) -> Inexact[Array, "*batch k size size"]:
    """The diagonal blocks of matrices, k = d / size."""
    *batch, length, _ = matrices.shape
    count = length // size
    tiles = matrices.reshape(*batch, count, size, count, size)
    same = np.arange(count)
    return jnp.moveaxis(tiles[..., same, :, same, :], 0, -3)


def _block_diagonal(blocks: Inexact[Array, "N k p p"]) -> Inexact[Array, "N d d"]:
    """Matrices with these diagonal blocks, d = k·p; the inverse of `_diagonal_blocks`."""
    stack, count, size, _ = blocks.shape
    same = np.eye(count, dtype=blocks.dtype).reshape(1, count, 1, count, 1)
    return (blocks[..., None, :] * same).reshape(stack, count * size, count * size)
