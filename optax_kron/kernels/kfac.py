"""K-FAC: second moments of what a layer saw, their damping, and their inverses.

Conventions. A layer is `B` blocks of a linear map from `d_in` to `d_out` numbers, read at `S`
positions of each of `N` data. Its inputs `a` are [B, N, S, d_in]; the gradients `g` with respect to
its outputs, one for each of `V` columns, are [V, B, N, S, d_out]. The curvature of a block's
parameters, as a matrix [d_in, d_out], is `A ⊗ G`: the *input factor* `A` is the mean of `a aᵀ`, the
*output factor* `G` the sum of `g gᵀ` over columns and the mean over data. Factors are symmetric
[d, d]; that of an axis too wide for a matrix is diagonal, [d]: the diagonal of the moment, of which
nothing else is ever formed. All arrays are real.

Where a weight is used at several positions there are two approximations: "expand" takes every
position of every datum as a case of its own; "reduce" averages `a` and sums `g` over the positions.

Sources: Martens and Grosse (2015), arXiv:1503.05671; Grosse and Martens (2016), arXiv:1602.01407;
Eschenhagen et al. (2023), arXiv:2311.00636.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from optax_kron.kernels import contract, eigenbases, positive

APPROXIMATIONS = ("expand", "reduce")
DAMPING_RULES = ("pi", "trace", "exact")
TRACE_FLOOR = 1e-12  # least damping of the rule "trace": of factors that are zero


def input_moment(
    inputs: Array,
    weights: Array | None = None,
    *,
    approx: str = "expand",
    diagonal: bool = False,
    precision: contract.Precision = None,
) -> Array:
    """`A = Σ_n w_n Σ_s a aᵀ / (S Σ_n w_n)`, of each block.

    Args:
      inputs: [B, N, S, d_in].
      weights: ≥ 0, of the data [N], of their positions [N, S], or of those of each block
        [B, N, S]; `None`: all equal. All zero: the moment is zero.
      approx: "expand"; or "reduce": `a` is its mean over the positions, and S = 1.
      diagonal: return only the diagonal, from squares.
      precision: of the matrix product.

    Returns:
      [B, d_in, d_in], or [B, d_in]. Cost: 2·B·N·S·d_in² operations, or 2·B·N·S·d_in.
    """
    if approx == "reduce" and weights is not None and weights.ndim > 1:
        weights = _by_block(weights)
        own = jnp.sum(weights, axis=2, keepdims=True)
        share = weights / jnp.where(own > 0, own, 1)
        inputs = jnp.sum(inputs * share[..., None].astype(inputs.dtype), axis=2, keepdims=True)
        weights = own
    elif approx == "reduce":
        inputs = jnp.mean(inputs, axis=2, keepdims=True)
    if weights is None:
        _, data, positions, _ = inputs.shape
        return _gram(inputs[None], precision, diagonal=diagonal) / (data * positions)
    share = _shares(inputs.shape, weights, inputs.dtype)
    return _gram(inputs[None], precision, share[None, ..., None], diagonal=diagonal)


def index_frequencies(
    indices: Array, length: int, weights: Array | None = None, *, dtype: DTypeLike
) -> Array:
    """The input factor of a table: `A` of one-hot inputs, which is diagonal, from their indices.

    It is that of "expand" also where positions are otherwise reduced: a mean of one-hot vectors has
    a second moment that is not diagonal. An index beyond the table counts for nothing.

    Args:
      indices: int [B, N, S, 1].
      length: number of rows of the table.
      weights: as in `input_moment`.
      dtype: of the result.

    Returns:
      Weighted frequency of each index, [B, length]. Cost: B·N·S additions.
    """
    share = _shares(indices.shape, weights, dtype)

    def count(rows, share):
        return jnp.zeros(length, dtype).at[rows].add(share, mode="drop")

    rows = indices[..., 0]
    return jax.vmap(count)(rows, jnp.broadcast_to(share, rows.shape))


def total_weight(weights: Array, positions: int) -> Array:
    """`Σ_n Σ_s w` of weights as in `input_moment`: of each block [B], or of all alike [1]."""
    weights = _by_block(weights)
    return jnp.sum(weights, axis=(1, 2)) * (positions // weights.shape[2])


def _by_block(weights: Array) -> Array:
    """Weights [B or 1, N, S or 1]."""
    if weights.ndim == 3:
        return weights
    return weights.reshape(1, len(weights), -1)


def _shares(shape: Sequence[int], weights: Array | None, dtype: DTypeLike) -> Array:
    """What a position of a datum counts in a mean over [B, N, S, ...]: [B or 1, N, S or 1]."""
    _, data, positions, _ = shape
    if weights is None:
        return jnp.full((1, data, 1), 1 / (data * positions), dtype)
    total = total_weight(weights, positions)[:, None, None]
    return (_by_block(weights) / jnp.where(total > 0, total, 1)).astype(dtype)


def output_moment(
    output_grads: Array,
    *,
    approx: str = "expand",
    diagonal: bool = False,
    precision: contract.Precision = None,
) -> Array:
    """`G = (1/N) Σ_v Σ_n Σ_s g gᵀ`, of each block; the identity if there are no columns.

    Args:
      output_grads: [V, B, N, S, d_out].
      approx: "expand"; or "reduce": `g` is its sum over the positions.
      diagonal: return only the diagonal, from squares.
      precision: of the matrix product.

    Returns:
      [B, d_out, d_out], or [B, d_out]. Cost: 2·V·B·N·S·d_out² operations, or 2·V·B·N·S·d_out.
    """
    if approx == "reduce":
        output_grads = jnp.sum(output_grads, axis=3, keepdims=True)
    if output_grads.shape[0] == 0:
        _, blocks, _, _, size = output_grads.shape
        return identities(blocks, size, output_grads.dtype, diagonal=diagonal)
    return _gram(output_grads, precision, diagonal=diagonal) / output_grads.shape[2]


def identities(count: int, size: int, dtype: DTypeLike, *, diagonal: bool = False) -> Array:
    """So many identity matrices, [N, d, d], or their diagonals, [N, d]."""
    if diagonal:
        return jnp.ones((count, size), dtype)
    return jnp.tile(jnp.eye(size, dtype=dtype), (count, 1, 1))


def _gram(
    x: Array, precision: contract.Precision, scale: ArrayLike = 1, *, diagonal: bool = False
) -> Array:
    """`Σ_v Σ_n Σ_s scale·x xᵀ` of [V, B, N, S, d], [B, d, d], or its diagonal [B, d]."""
    if diagonal:
        return jnp.sum(x * scale * x, axis=(0, 2, 3))
    if x.shape[1] == 1:
        # As a product of matrices, not a stack of one: the CPU would transpose that beforehand.
        rows = x.reshape(-1, x.shape[-1])
        return jnp.matmul((x * scale).reshape(rows.shape).T, rows, precision=precision)[None]
    return jnp.einsum("vbnsi,vbnsj->bij", x * scale, x, precision=precision)


def second_moments(
    inputs: Array,
    output_grads: Array,
    weights: Array | None = None,
    *,
    approx: str = "expand",
    precision: contract.Precision = None,
) -> tuple[Array, Array]:
    """Both factors of one batch; arguments as `input_moment` and `output_moment`.

    Returns:
      `A` [B, d_in, d_in], and `G` [B, d_out, d_out].
    """
    return (
        input_moment(inputs, weights, approx=approx, precision=precision),
        output_moment(output_grads, approx=approx, precision=precision),
    )


def pi_damping(input_mean: Array, output_mean: Array, damping: ArrayLike) -> tuple[Array, Array]:
    """What the rule "pi" adds to the diagonals: `π√λ` to A and `√λ/π` to G.

    `π² = (tr A / d_in) / (tr G / d_out)`; 1 where a trace is not positive.

    Args:
      input_mean: `mean_eigenvalues` of the input factors, of any shape.
      output_mean: that of the output factors.
      damping: λ ≥ 0.

    Returns:
      Two arrays of that shape, whose product is λ.
    """
    both = (input_mean > 0) & (output_mean > 0)
    # The quotient of roots, for that of the traces themselves may overflow.
    over, under = (jnp.sqrt(jnp.where(both, mean, 1)) for mean in (input_mean, output_mean))
    pi = over / under
    root = jnp.sqrt(jnp.asarray(damping, pi.dtype))
    return pi * root, root / pi


def trace_damping(mean: Array, damping: ArrayLike) -> Array:
    """What the rule "trace" adds to the diagonal of a factor: `max(damping·tr(M)/d, 1e-12)`."""
    return jnp.maximum(jnp.asarray(damping, mean.dtype) * mean, TRACE_FLOOR)


def mean_eigenvalues(factors: Sequence[Array]) -> Array:
    """`tr(M)/d` of all factors of several stacks, [N, d, d] or [N, d] each: [ΣN]."""
    traces = jnp.sum(contract.ragged_rows([diagonal_rows(x) for x in factors]), axis=1)
    sizes = np.repeat([x.shape[-1] for x in factors], [len(x) for x in factors])
    return traces / sizes.astype(traces.dtype)


def diagonal_rows(factor: Array) -> Array:
    """The diagonals of factors [N, d, d]; of diagonal ones, which may be long, the sum [N, 1]."""
    return jnp.sum(factor, axis=1, keepdims=True) if factor.ndim == 2 else diagonals(factor)


def diagonals(matrices: Array) -> Array:
    """Those of [N, d, d], [N, d]: a slice with a stride, where NumPy's would be a gather."""
    count, size, _ = matrices.shape
    return matrices.reshape(count, -1)[:, :: size + 1]


def inverses(factors: Sequence[Array], amounts: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    """The inverse of every damped factor of several stacks; not finite if it is not definite.

    Args:
      factors: [N, d, d], symmetric; or [N, d], the diagonals of diagonal matrices.
      amounts: what is added to the diagonals, [N] for each stack.

    Returns:
      Arrays like the factors, and for each whether its inverses are finite, bool [N]. Cost: as
      `positive.inverses`.
    """
    dense = [i for i, factor in enumerate(factors) if factor.ndim == 3]
    found = positive.inverses([factors[i] for i in dense], [amounts[i] for i in dense])
    pairs = iter(zip(*found, strict=True))
    found = []
    for factor, amount in zip(factors, amounts, strict=True):
        if factor.ndim == 3:
            found.append(next(pairs))
            continue
        damped = factor + amount[:, None]
        sound = damped > 0
        inverse = jnp.where(sound, 1 / jnp.where(sound, damped, 1), jnp.nan)
        found.append((inverse, jnp.all(jnp.isfinite(inverse), axis=1)))
    return [inverse for inverse, _ in found], [sound for _, sound in found]


def apply_inverses(
    input_inverse: Array, output_inverse: Array, x: Array, *, precision: contract.Precision = None
) -> Array:
    """`A⁻¹ X G⁻¹`, which is `(A ⊗ G)⁻¹` applied to X.

    Args:
      input_inverse: [d_in, d_in] or [d_in].
      output_inverse: [d_out, d_out] or [d_out].
      x: [d_in, d_out].
      precision: of the matrix products.

    Returns:
      [d_in, d_out]. Cost: 2·d_in·d_out·(d_in + d_out) operations.
    """
    return contract.apply_factors((input_inverse, output_inverse), x, precision=precision)


def eigenbasis(factor: Array) -> tuple[Array | None, Array]:
    """`eigenbases.hermitian_eigen` of a factor; values below zero, of rounding, become zero."""
    basis, values = eigenbases.hermitian_eigen(factor)
    return basis, jnp.maximum(values, 0)


def apply_eigen(
    input_basis: Array | None,
    output_basis: Array | None,
    values: Array,
    x: Array,
    damping: ArrayLike,
    *,
    precision: contract.Precision = None,
) -> Array:
    """`(F + λI)⁻¹` applied to X, of an F that is diagonal in the product of two bases.

    Args:
      input_basis: columns [d_in, d_in], or `None` for the identity.
      output_basis: columns [d_out, d_out], or `None` for the identity.
      values: the diagonal, [d_in, d_out]; that of `A ⊗ G` is the outer product of eigenvalues.
      x: [d_in, d_out].
      damping: λ ≥ 0. Where it is zero, and a value zero but for rounding, so is the result.
      precision: of the matrix products.

    Returns:
      [d_in, d_out]. Cost: 4·d_in·d_out·(d_in + d_out) operations.
    """
    damped = values + jnp.asarray(damping, x.dtype)

    def divide(x):
        if isinstance(damping, int | float) and damping > 0:
            return x / damped
        rounding = max(x.shape) * jnp.finfo(x.dtype).eps * jnp.max(values, initial=0)
        null = (damped == 0) | ((jnp.asarray(damping) == 0) & (values <= rounding))
        return jnp.where(null, 0, x / jnp.where(null, 1, damped))

    return contract.in_bases((input_basis, output_basis), divide, x, precision=precision)
