"""K-FAC: second moments of what a layer saw, their damping, and their inverses.

Conventions. A layer is `B` blocks of a linear map from `d_in` to `d_out` numbers, read at `S`
positions of each of `N` examples. Its inputs `a` are [B, N, S, d_in]; the gradients `g` with
respect to its outputs, one for each of `V` columns, are [V, B, N, S, d_out]. The curvature of a
block's parameters, as a matrix [d_in, d_out], is `A ⊗ G`: the *input factor* `A` is the mean of
`a aᵀ`, the *output factor* `G` the sum of `g gᵀ` over columns and the mean over examples. Factors
are symmetric [d, d]; that of an axis too wide for a matrix is diagonal, [d]: the diagonal of the
moment, of which nothing else is ever formed. All arrays are real.

Where a weight is used at several positions there are two approximations: "expand" takes every
position of every example as a case of its own; "reduce" averages `a` and sums `g` over the
positions.

Sources: Martens and Grosse (2015), arXiv:1503.05671; Grosse and Martens (2016), arXiv:1602.01407;
Eschenhagen et al. (2023), arXiv:2311.00636.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from optax_kron.kernels import contract, eigenbases, positive

# A worked example: a convolution of 3×3 pixels from 16 to 32 channels, with a bias, on 64 images
# of 8×8. Its patches are inputs [1, 64, 64, 145] (3·3·16 and a one for the bias), the gradients of
# a sampled label are [1, 1, 64, 64, 32]. A [1, 145, 145] is a mean over 64·64 cases, G [1, 32, 32]
# over 64 examples of sums over 64 positions. "reduce" has 64 cases in both.
APPROXIMATIONS = ("expand", "reduce")
DAMPING_RULES = ("pi", "trace", "exact")
TRACE_FLOOR = 1e-12  # least damping of the rule "trace": of factors that are zero

Factor = Float[Array, "d d"] | Float[Array, " d"]
Factors = Float[Array, "N d d"] | Float[Array, "N d"]
# Of the examples, of their positions, or of the positions of each block.
Weights = Float[Array, " N"] | Float[Array, "N S"] | Float[Array, "B N S"]


def input_moment(
    inputs: Float[Array, "B N S d_in"],
    weights: Weights | None = None,
    *,
    approx: str = "expand",
    diagonal: bool = False,
    precision: contract.Precision = None,
) -> Factors:
    """`A = Σ_n w_n Σ_s a aᵀ / (S Σ_n w_n)`, of each block.

    Args:
      inputs: Inputs `a` of the layer.
      weights: Weights w ≥ 0; `None`: all equal. All zero: the moment is zero.
      approx: "expand"; or "reduce": `a` is its mean over the positions, and S = 1.
      diagonal: Whether to return only the diagonals, from squares.
      precision: Precision of the matrix product.

    Returns:
      A factor, or its diagonal, for each block. Cost: 2·B·N·S·d_in² operations, or 2·B·N·S·d_in.
    """
    if approx == "reduce" and weights is not None and weights.ndim > 1:
        # The mean over positions is weighted, and an example weighs as much as they do together.
        weights = _by_block(weights)
        total = jnp.sum(weights, axis=2, keepdims=True)
        share = weights / jnp.where(total > 0, total, 1)
        inputs = jnp.sum(inputs * share[..., None].astype(inputs.dtype), axis=2, keepdims=True)
        weights = total
    elif approx == "reduce":
        inputs = jnp.mean(inputs, axis=2, keepdims=True)
    if weights is None:
        _, examples, positions, _ = inputs.shape
        return _gram(inputs[None], precision, diagonal=diagonal) / (examples * positions)
    share = _shares(inputs.shape, weights, inputs.dtype)
    return _gram(inputs[None], precision, share[None, ..., None], diagonal=diagonal)


def index_frequencies(
    indices: Int[Array, "B N S 1"], length: int, weights: Weights | None = None, *, dtype: DTypeLike
) -> Float[Array, "B length"]:
    """The input factor of a table: `A` of one-hot inputs, which is diagonal, from their indices.

    It is that of "expand" also where positions are otherwise reduced: a mean of one-hot vectors has
    a second moment that is not diagonal.

    Args:
      indices: The rows that are read; one beyond the table counts for nothing.
      length: Number of rows of the table.
      weights: Weights as in `input_moment`.
      dtype: Dtype of the result.

    Returns:
      The weighted frequency of each index. Cost: B·N·S additions.
    """
    share = _shares(indices.shape, weights, dtype)

    def count(rows, share):
        return jnp.zeros(length, dtype).at[rows].add(share, mode="drop")

    rows = indices[..., 0]
    return jax.vmap(count)(rows, jnp.broadcast_to(share, rows.shape))


def total_weight(weights: Weights, positions: int) -> Float[Array, " B_or_1"]:
    """`Σ_n Σ_s w` of weights as in `input_moment`: of each block, or of all alike."""
    weights = _by_block(weights)
    return jnp.sum(weights, axis=(1, 2)) * (positions // weights.shape[2])


def _by_block(weights: Weights) -> Float[Array, "B_or_1 N S_or_1"]:
    return weights if weights.ndim == 3 else weights.reshape(1, len(weights), -1)


def _shares(
    shape: Sequence[int], weights: Weights | None, dtype: DTypeLike
) -> Float[Array, "B_or_1 N S_or_1"]:
    """The share of a position of an example in a mean over [B, N, S, ...]."""
    _, examples, positions, _ = shape
    if weights is None:
        return jnp.full((1, examples, 1), 1 / (examples * positions), dtype)
    total = total_weight(weights, positions)[:, None, None]
    return (_by_block(weights) / jnp.where(total > 0, total, 1)).astype(dtype)


def output_moment(
    output_grads: Float[Array, "V B N S d_out"],
    *,
    approx: str = "expand",
    diagonal: bool = False,
    precision: contract.Precision = None,
) -> Factors:
    """`G = (1/N) Σ_v Σ_n Σ_s g gᵀ`, of each block; the identity if there are no columns.

    Args:
      output_grads: Gradients `g` with respect to the outputs.
      approx: "expand"; or "reduce": `g` is its sum over the positions.
      diagonal: Whether to return only the diagonals, from squares.
      precision: Precision of the matrix product.

    Returns:
      A factor, or its diagonal, for each block, at least float32. Products of 16-bit gradients are
      exact, and are added up in float32. Cost: 2·V·B·N·S·d_out² operations, or 2·V·B·N·S·d_out.
    """
    if approx == "reduce":
        output_grads = jnp.sum(contract.widen(output_grads), axis=3, keepdims=True)
    columns, blocks, examples, _, size = output_grads.shape
    if columns == 0:
        dtype = contract.wide_dtype(output_grads.dtype)
        return contract.identities(blocks, size, dtype, diagonal=diagonal)
    return _gram(output_grads, precision, diagonal=diagonal) / examples


def _gram(
    x: Float[Array, "V B N S d"],
    precision: contract.Precision,
    scale: Float[Array, "1 B_or_1 N S_or_1 1"] | int = 1,
    *,
    diagonal: bool = False,
) -> Factors:
    """`Σ_v Σ_n Σ_s scale·x xᵀ` of each block, or its diagonal, at least float32.

    The units of a GPU or TPU multiply 16-bit numbers exactly, at twice the rate of others: so these
    are widened only where they are scaled first.
    """
    if diagonal or not isinstance(scale, int):
        x = contract.widen(x)
    if diagonal:
        return jnp.sum(x * scale * x, axis=(0, 2, 3))
    added_in = jnp.float32 if jnp.finfo(x.dtype).bits < 32 else None
    multiply = {"precision": precision, "preferred_element_type": added_in}
    if x.shape[1] == 1:
        # As a product of matrices, not a stack of one: the CPU would transpose that beforehand.
        rows = x.reshape(-1, x.shape[-1])
        return jnp.matmul((x * scale).reshape(rows.shape).T, rows, **multiply)[None]
    return jnp.einsum("vbnsi,vbnsj->bij", x * scale, x, **multiply)


def second_moments(
    inputs: Float[Array, "B N S d_in"],
    output_grads: Float[Array, "V B N S d_out"],
    weights: Weights | None = None,
    *,
    approx: str = "expand",
    precision: contract.Precision = None,
) -> tuple[Float[Array, "B d_in d_in"], Float[Array, "B d_out d_out"]]:
    """`A` and `G` of one batch; arguments as `input_moment` and `output_moment`."""
    return (
        input_moment(inputs, weights, approx=approx, precision=precision),
        output_moment(output_grads, approx=approx, precision=precision),
    )


def pi_damping(
    input_mean: Float[Array, "*shape"], output_mean: Float[Array, "*shape"], damping: ArrayLike
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """What the rule "pi" adds to the diagonals: `π√λ` to A and `√λ/π` to G.

    `π² = (tr A / d_in) / (tr G / d_out)`; 1 where a trace is not positive.

    Args:
      input_mean: `mean_eigenvalues` of the input factors.
      output_mean: `mean_eigenvalues` of the output factors.
      damping: The damping λ ≥ 0 of `A ⊗ G`.

    Returns:
      What is added to A and to G, whose product is λ.
    """
    both = (input_mean > 0) & (output_mean > 0)
    # The quotient of square roots, for that of the traces themselves may overflow.
    over, under = (jnp.sqrt(jnp.where(both, mean, 1)) for mean in (input_mean, output_mean))
    pi = over / under
    sqrt = jnp.sqrt(jnp.asarray(damping, pi.dtype))
    return pi * sqrt, sqrt / pi


def trace_damping(mean: Float[Array, "*shape"], damping: ArrayLike) -> Float[Array, "*shape"]:
    """What the rule "trace" adds to the diagonal of a factor: `max(damping·tr(M)/d, 1e-12)`."""
    return jnp.maximum(jnp.asarray(damping, mean.dtype) * mean, TRACE_FLOOR)


def mean_eigenvalues(factors: Sequence[Factors]) -> Float[Array, " total"]:
    """`tr(M)/d` of all factors of several stacks, one stack behind the other."""
    traces = jnp.sum(contract.ragged_rows([diagonal_rows(x) for x in factors]), axis=1)
    sizes = np.repeat([x.shape[-1] for x in factors], [len(x) for x in factors])
    return traces / sizes.astype(traces.dtype)


def diagonal_rows(factor: Factors) -> Float[Array, "N d_or_1"]:
    """The diagonals of dense factors; of diagonal ones, which may be long, the sum."""
    return jnp.sum(factor, axis=1, keepdims=True) if factor.ndim == 2 else diagonals(factor)


def diagonals(matrices: Float[Array, "N d d"]) -> Float[Array, "N d"]:
    """The diagonals of matrices: a slice with a stride, where NumPy's would be a gather."""
    count, size, _ = matrices.shape
    return matrices.reshape(count, -1)[:, :: size + 1]


def inverses(
    factors: Sequence[Factors], shifts: Sequence[Float[Array, " N"]]
) -> tuple[list[Factors], list[Bool[Array, " N"]]]:
    """The inverse of every damped factor of several stacks; not finite if it is not definite.

    Args:
      factors: Stacks of symmetric matrices, or of the diagonals of diagonal ones.
      shifts: What is added to the diagonals of each stack.

    Returns:
      Arrays like the factors, and for each whether its inverses are finite. Cost: as
      `positive.inverses`.
    """
    dense = [i for i, factor in enumerate(factors) if factor.ndim == 3]
    # All dense ones at once, so that stacks of similar sizes share a program.
    dense_results = positive.inverses([factors[i] for i in dense], [shifts[i] for i in dense])
    results = dict(zip(dense, zip(*dense_results, strict=True), strict=True))
    for i, (factor, shift) in enumerate(zip(factors, shifts, strict=True)):
        if factor.ndim == 2:
            damped = factor + shift[:, None]
            definite = damped > 0
            inverse = jnp.where(definite, 1 / jnp.where(definite, damped, 1), jnp.nan)
            results[i] = inverse, contract.all_finite(inverse, axis=1)
    indices = range(len(factors))
    return [results[i][0] for i in indices], [results[i][1] for i in indices]


def apply_inverses(
    input_inverse: Factor,
    output_inverse: Factor,
    x: Float[Array, "d_in d_out"],
    *,
    precision: contract.Precision = None,
) -> Float[Array, "d_in d_out"]:
    """`A⁻¹ X G⁻¹`, which is `(A ⊗ G)⁻¹` applied to X. Cost: 2·d_in·d_out·(d_in + d_out)."""
    return contract.apply_factors((input_inverse, output_inverse), x, precision=precision)


def eigenbasis(factor: Factor) -> tuple[Float[Array, "d d"] | None, Float[Array, " d"]]:
    """`eigenbases.hermitian_eigen` of a factor; values below zero, of rounding, become zero."""
    basis, values = eigenbases.hermitian_eigen(factor)
    return basis, jnp.maximum(values, 0)


def apply_eigen(
    input_basis: Float[Array, "d_in d_in"] | None,
    output_basis: Float[Array, "d_out d_out"] | None,
    values: Float[Array, "d_in d_out"],
    x: Float[Array, "d_in d_out"],
    damping: ArrayLike,
    *,
    precision: contract.Precision = None,
) -> Float[Array, "d_in d_out"]:
    """`(F + λI)⁻¹` applied to X, of an F that is diagonal in the product of two bases.

    Args:
      input_basis: Basis of the input factor; `None`: the identity.
      output_basis: Basis of the output factor; `None`: the identity.
      values: The diagonal; that of `A ⊗ G` is the outer product of eigenvalues.
      x: The matrix X.
      damping: λ ≥ 0. Where it is zero, and a value zero but for rounding, so is the result.
      precision: Precision of the matrix products.

    Returns:
      The product. Cost: 4·d_in·d_out·(d_in + d_out) operations.
    """
    damped = values + jnp.asarray(damping, x.dtype)

    def divide(x):
        # A damping that is known to be positive leaves nothing to divide by zero.
        if isinstance(damping, int | float) and damping > 0:
            return x / damped
        rounding = max(x.shape) * jnp.finfo(x.dtype).eps * jnp.max(values, initial=0)
        null = (damped == 0) | ((jnp.asarray(damping) == 0) & (values <= rounding))
        return jnp.where(null, 0, x / jnp.where(null, 1, damped))

    return contract.in_bases((input_basis, output_basis), divide, x, precision=precision)
