"""Linear algebra that is safe in batches on every backend: of matrix products only.

What cannot be had of them goes through `lapack_safe`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optax_kron.kernels import contract, flow

PROBE_ROWS = 32

_SUBSTITUTION_SIZE = 32
_PANEL_SIZE = 128
# Enough for a factor √2 at the worst spectrum, a weak spike over a flat rest: the longer the rows,
# the less of the spike is in them.
_PRODUCTS, _PRODUCTS_LONG, _LONG = 6, 10, 1024


def lapack_safe(fn: Callable) -> Callable:
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
      fn: maps arrays to a pytree of arrays.
    """
    one_by_one = jax.custom_batching.sequential_vmap(fn)

    @functools.wraps(fn)
    def safe(*args: Array):
        return flow.platform_dependent(*args, cpu=one_by_one, default=fn)

    return safe


def map_blocks(fn: Callable, *stacks: Any) -> Any:
    """Map a function over the leading axis of its arguments: one at a time on CPU, else vmapped.

    On CPU the working set of one block stays in the cache, and memory for one is enough. Both ways
    are right on every backend: the choice, of speed alone, is made for the default one at trace
    time, so that only one of them is traced.

    Args:
      fn: maps pytrees of arrays [...] to a pytree of arrays.
      *stacks: pytrees of arrays [N, ...].

    Returns:
      What `fn` returns, with a leading axis N on every leaf.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda x: fn(*x), stacks)
    return jax.vmap(fn)(*stacks)


def norm_bound(matrix: Array, rows: Array) -> Array:
    """A lower bound of the spectral norm of a Hermitian or skew-Hermitian matrix.

    Power iteration on a block of random rows, turned towards the row of largest norm: made of
    matrix products only. The bound never exceeds the norm by more than rounding, and stays within a
    factor √2 of it.

    Args:
      matrix: [d, d], normal (Hermitian or skew-Hermitian).
      rows: standard normal [PROBE_ROWS, ≥ d], real or complex; blocks may share them.

    Returns:
      A real scalar; zero for a zero matrix. Cost: 384·d² operations.

    Source: Li (2024), arXiv:2402.11858, and its reference implementation.
    """
    scale = jnp.max(jnp.abs(matrix)) + jnp.finfo(contract.real_dtype(matrix.dtype)).tiny
    row_norms = _row_norms(matrix / scale)
    top = matrix[jnp.argmax(row_norms)] / scale
    bound = power_bound(lambda x: (x @ matrix) / scale, top, rows)
    return scale * jnp.maximum(bound, jnp.max(row_norms))


def power_bound(apply: Callable[[Array], Array], top: Array, rows: Array) -> Array:
    """Lower bound of the norm of a normal operator by power iteration on a block of rows.

    Args:
      apply: maps rows [r, d] to their product [r, d] with the operator, whose norm is in [1, d].
      top: [d], a row of large norm, towards which the random rows are turned.
      rows: standard normal [PROBE_ROWS, ≥ d].

    Returns:
      A real scalar. Cost: six calls of `apply`, ten beyond d = 1024.
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
    return jnp.max(_row_norms(apply(rows / (_row_norms(rows)[:, None] + tiny))))


def _row_norms(matrix: Array) -> Array:
    return jnp.sqrt(jnp.sum(contract.squared_magnitude(matrix), axis=-1))


def procrustes_step(q: Array, rows: Array, *, precision: contract.Precision = None) -> Array:
    """One second-order rotation of `Q` towards a Hermitian matrix; `QᴴQ` is kept to third order.

    With `R = (Qᴴ − Q) / bound(Qᴴ − Q)` skew-Hermitian, the step `exp(aR) Q ≈ Q + a(RQ + (a/2)R²Q)`
    raises `Re tr Q` fastest at `a = −tr(RQ) / tr(R²Q)`, kept within [0, 1/8].

    Args:
      q: [d, d].
      rows: standard normal rows for `norm_bound`.
      precision: of the matrix products.

    Returns:
      [d, d]. Cost: 4·d³ operations.

    Source: Li (2024), arXiv:2402.11858.
    """
    skew = q.conj().T - q
    skew = skew / (norm_bound(skew, rows) + jnp.finfo(skew.dtype).tiny)
    rotated = jnp.matmul(skew, q, precision=precision)
    twice = jnp.matmul(skew, rotated, precision=precision)
    slope, curvature = jnp.trace(rotated).real, jnp.trace(twice).real
    largest = jnp.asarray(0.125, slope.dtype)
    exact = jnp.clip(-slope / jnp.where(curvature < 0, curvature, -1), 0, largest)
    size = jnp.where(curvature < 0, exact, largest)
    return q + size * (rotated + (size / 2) * twice)


def solve_upper_adjoint(
    uppers: Sequence[Array], tensor: Array, *, precision: contract.Precision = None
) -> Array:
    """`Q_i^-H` along every axis of a tensor: forward substitution by panels.

    Only matrix products, so that it batches on every backend. The diagonal panels of all factors
    are inverted together (by substitution up to 32×32, then by doubling).

    Args:
      uppers: one per axis, with a nonzero diagonal: upper triangular [d_i, d_i], or the diagonal
        [d_i] of a real diagonal matrix.
      tensor: [d_1, ..., d_k].
      precision: of the matrix products.

    Returns:
      A tensor of the shape of `tensor`. Cost of a dense factor: about 2·n·d_i + 4·d_i·128².
    """
    if tensor.size == 0:
        return tensor
    sizes = {i: _panel_size(q.shape[0]) for i, q in enumerate(uppers) if q.ndim == 2}
    padded = {i: _pad_to_panels(uppers[i], size) for i, size in sizes.items()}
    groups = _inverse_panels(
        {i: _diagonal_blocks(padded[i], p) for i, p in sizes.items()}, precision
    )
    for axis, upper in enumerate(uppers):
        if upper.ndim == 1:
            tensor = tensor / contract.along_axis(upper, axis, tensor.ndim)
            continue
        size, whole = upper.shape[0], padded[axis].shape[0]
        right = jnp.pad(contract.unfold(tensor, axis), ((0, whole - size), (0, 0)))
        solved = _substitute_panels(padded[axis], groups[axis].conj().mT, right, precision)
        tensor = contract.fold(solved[:size], axis, tensor.shape)
    return tensor


def _pad_to_panels(upper: Array, panel: int) -> Array:
    """Continue a triangular matrix by the identity, up to a whole number of panels."""
    size = upper.shape[0]
    return continue_by_identity(upper, size + -size % panel)


def continue_by_identity(matrices: Array, size: int) -> Array:
    """Matrices [..., d, d] as the upper left blocks of [..., size, size], the identity beside."""
    length = matrices.shape[-1]
    if length == size:
        return matrices
    rest = np.diag((np.arange(size) >= length).astype(matrices.dtype))
    widths = [(0, 0)] * (matrices.ndim - 2) + [(0, size - length)] * 2
    return jnp.pad(matrices, widths) + rest.reshape((1,) * (matrices.ndim - 2) + rest.shape)


def _inverse_panels(panels: Mapping[int, Array], precision) -> dict[int, Array]:
    """Inverses of the diagonal panels [d / p, p, p] of each matrix, all of one size p together."""
    inverses = {}
    for size in sorted({x.shape[-1] for x in panels.values()}):
        group = {i: x for i, x in panels.items() if x.shape[-1] == size}
        inverted = invert_upper(jnp.concatenate(list(group.values())), precision=precision)
        ends = np.cumsum([len(x) for x in group.values()])
        inverses |= dict(zip(group, jnp.split(inverted, ends[:-1]), strict=True))
    return inverses


def _substitute_panels(upper: Array, adjoints: Array, right: Array, precision) -> Array:
    """Solve `Qᴴ X = R` for [d, m], given the inverse adjoints of Q's diagonal panels."""
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


def invert_upper(blocks: Array, *, precision: contract.Precision = None) -> Array:
    """Invert a batch of upper triangular matrices by substitution and doubling.

    Args:
      blocks: [N, p, p], upper triangular; p ≤ 32, or 32 times a power of two.
      precision: of the matrix products.

    Returns:
      [N, p, p], upper triangular.
    """
    whole = blocks.shape[-1]
    size = min(whole, _SUBSTITUTION_SIZE)
    inverse = _block_diagonal(_substitute(_diagonal_blocks(blocks, size)))
    index = np.arange(whole)
    while size < whole:
        # [[X, Y], [0, Z]]⁻¹ = [[X⁻¹, −X⁻¹ Y Z⁻¹], [0, Z⁻¹]]: one product for all pairs at once.
        block, pair = index // size, index // (2 * size)
        corners = (pair[:, None] == pair) & (block[:, None] != block)
        right = jnp.matmul(jnp.where(corners[None], blocks, 0), inverse, precision=precision)
        inverse = inverse - jnp.matmul(inverse, right, precision=precision)
        size *= 2
    return inverse


def _substitute(blocks: Array) -> Array:
    """Inverses of upper triangular [..., p, p], row by row from the last."""
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
    panel = _PANEL_SIZE
    while panel > 2 * _SUBSTITUTION_SIZE and -size % panel > size // 8:
        panel //= 2
    return panel


def _diagonal_blocks(matrices: Array, size: int) -> Array:
    """[..., d, d] to its diagonal blocks [..., d / size, size, size]."""
    *batch, whole, _ = matrices.shape
    tiles = matrices.reshape(*batch, whole // size, size, whole // size, size)
    same = np.arange(whole // size)
    return jnp.moveaxis(tiles[..., same, :, same, :], 0, -3)


def _block_diagonal(blocks: Array) -> Array:
    """Diagonal blocks [..., k, p, p] to matrices [..., k·p, k·p]; inverse of `_diagonal_blocks`."""
    *batch, count, size, _ = blocks.shape
    same = np.eye(count, dtype=blocks.dtype)[:, None, :, None]
    tiles = blocks[..., None, :] * same.reshape((1,) * len(batch) + same.shape)
    return tiles.reshape(*batch, count * size, count * size)
