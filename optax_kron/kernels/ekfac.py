"""EKFAC: the second moments of gradients in the eigenbasis of K-FAC's factors.

Conventions are those of `kernels.kfac`. In the basis of columns `Q_a` of A and `Q_g` of G, K-FAC
takes the product of their eigenvalues for the diagonal of the curvature. EKFAC takes that diagonal
itself, from the gradient of every example, summed over its positions before it is squared:

    λ = (1/N) Σ_v Σ_n (Q_aᵀ (Σ_s a gᵀ) Q_g)².

No other diagonal in that basis is nearer to the curvature, in Frobenius norm, and its trace is that
of the curvature. Both "expand" and "reduce" have the same λ, as nothing is approximated in it.

Source: George et al. (2018), arXiv:1806.03884.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from optax_kron.kernels import contract, flow

_IN_MEMORY = 2**22  # numbers, of gradients of single examples at a time


def eigenvalues(
    inputs: Float[Array, "B N S d_in"],
    output_grads: Float[Array, "V B N S d_out"],
    input_basis: Float[Array, "B d_in d_in"] | None,
    output_basis: Float[Array, "B d_out d_out"] | None,
    *,
    precision: contract.Precision = None,
) -> Float[Array, "B d_in d_out"]:
    """`λ` of every block.

    Args:
      inputs: Inputs `a` of the layer.
      output_grads: Gradients `g` with respect to its outputs.
      input_basis: Basis Q_a; `None`: the identity.
      output_basis: Basis Q_g; `None`: the identity.
      precision: Precision of the matrix products.

    Returns:
      The diagonals. Cost: 2·B·N·S·(d_in² + V·d_out²) operations for the bases, and
      2·B·N·d_in·d_out where S = 1, else 2·V·B·N·S·d_in·d_out, with the gradients of one column and
      a few examples in memory at a time: 4 million numbers at most, or one example's.
    """
    _, blocks, examples, positions, d_out = output_grads.shape
    a = _rotated(inputs, input_basis, precision)
    g = _rotated(output_grads, output_basis, precision)
    if positions == 1:
        # (a gᵀ)² = a² (g²)ᵀ elementwise: one product, with no gradient of an example formed.
        squares = jnp.sum(jnp.square(g[:, :, :, 0]), axis=0)
        total = jnp.einsum("bni,bno->bio", jnp.square(a[:, :, 0]), squares, precision=precision)
        return total / examples

    # Chunks of n examples: a [N / n, B, n, S, d_in], g [N / n, V, B, n, S, d_out].
    together = _divisor(examples, _IN_MEMORY // (blocks * a.shape[-1] * d_out))

    def add_chunk(total, chunk):
        x, y = chunk

        def add_column(total, y):
            gradients = jnp.einsum("bnsi,bnso->bnio", x, y, precision=precision)
            return total + jnp.sum(jnp.square(gradients), axis=1), None

        return flow.scan(add_column, total, y)

    def cut(x, axis):
        shape = (*x.shape[:axis], examples // together, together, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    zero = jnp.zeros((blocks, a.shape[-1], d_out), jnp.result_type(a, g))
    total, _ = flow.scan(add_chunk, zero, (cut(a, 1), cut(g, 2)))
    return total / examples


def table_eigenvalues(
    indices: Int[Array, "B N S 1"],
    output_grads: Float[Array, "V B N S d_out"],
    length: int,
    output_basis: Float[Array, "B d_out d_out"] | None,
    *,
    precision: contract.Precision = None,
) -> Float[Array, "B length d_out"]:
    """`λ` of a table, whose input factor is diagonal: of one-hot inputs, from their indices.

    Args:
      indices: The rows that are read; one beyond the table counts for nothing.
      output_grads: Gradients `g` with respect to the outputs.
      length: Number of rows of the table.
      output_basis: Basis Q_g; `None`: the identity.
      precision: Precision of the matrix products.

    Returns:
      The diagonals. Cost: 2·V·B·N·S·d_out² operations for the basis, and 2·V·B·N·S²·d_out.
    """
    rows = indices[..., 0]
    g = _rotated(output_grads, output_basis, precision)
    # A row that an example reads twice has the sum of both gradients, which then is squared: each
    # of them times the sum over all positions that read the same row.
    same = (rows[..., :, None] == rows[..., None, :]).astype(g.dtype)
    beside = jnp.einsum("bnst,vbnto->vbnso", same, g, precision=precision)
    squares = jnp.sum(g * beside, axis=0)

    def collect(rows, squares):
        zero = jnp.zeros((length, squares.shape[-1]), squares.dtype)
        return zero.at[rows].add(squares, mode="drop")

    return jax.vmap(collect)(rows, squares) / indices.shape[1]


def carried_over(
    values: Float[Array, "d_in d_out"],
    input_overlap: Float[Array, "d_in d_in"] | None,
    output_overlap: Float[Array, "d_out d_out"] | None,
    *,
    precision: contract.Precision = None,
) -> Float[Array, "d_in d_out"]:
    """What is known of `λ` after a change of basis: the diagonal of `Q_newᵀ Q diag(λ) Qᵀ Q_new`.

    Args:
      values: λ in the old basis.
      input_overlap: `Q_newᵀ Q` of the input factor; `None`: no change.
      output_overlap: `Q_newᵀ Q` of the output factor; `None`: no change.
      precision: Precision of the matrix products.

    Returns:
      λ in the new basis, of the same sum. Cost: 2·d_in·d_out·(d_in + d_out) operations.
    """
    for axis, overlap in enumerate((input_overlap, output_overlap)):
        if overlap is not None:
            # Squares of a rotation's entries add up to one in each row and column.
            values = contract.apply_factor(jnp.square(overlap), values, axis, precision=precision)
    return values


def _divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is not larger than another; 1 at least."""
    return next(n for n in range(max(min(number, most), 1), 0, -1) if number % n == 0)


def _rotated(
    x: Float[Array, "*V B N S d"],
    basis: Float[Array, "B d d"] | None,
    precision: contract.Precision,
) -> Float[Array, "*V B N S d"]:
    """`Qᵀx` of all vectors."""
    return x if basis is None else jnp.einsum("...bnsi,bij->...bnsj", x, basis, precision=precision)
