"""KFOC: the Kronecker product that is nearest to a layer's curvature, in Frobenius norm.

Conventions are those of `kernels.kfac`. With `M = Σ_s a gᵀ`, the gradient of one example and
column, the curvature is `F = (1/N) Σ_v Σ_n vec(M) vec(M)ᵀ`. Van Loan's rearrangement of F is a
matrix whose best approximation of rank one is the best Kronecker product of F. Its top singular
pair is found by power iteration, of which each half step is a mean over the examples,

    A ← (1/N) Σ_v Σ_n M G Mᵀ / ‖G‖²,     G ← (1/N) Σ_v Σ_n Mᵀ A M / ‖A‖²,

so that neither F nor its rearrangement is ever formed, and A and G stay positive semidefinite.

Sources: Van Loan and Pitsianis (1993), Approximation with Kronecker products; Schnaus, Lee and
Triebel (2021), Kronecker-factored optimal curvature.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from optax_kron.kernels import contract, flow

Factor = Float[Array, "d d"] | Float[Array, " d"]
# A from G, and G from A.
HalfSteps = tuple[Callable[[Factor], Factor], Callable[[Factor], Factor]]


def factors(
    inputs: Float[Array, "N S d_in"] | Int[Array, "N S 1"],
    output_grads: Float[Array, "V N S d_out"],
    *,
    length: int | None = None,
    diagonal: tuple[bool, bool] = (False, False),
    tolerance: float = 1e-6,
    max_iterations: int = 200,
    precision: contract.Precision = None,
) -> tuple[Factor, Factor]:
    """A and G of one block.

    Args:
      inputs: Inputs of the layer; of a table the indices of its rows, of which those beyond it
        count for nothing.
      output_grads: Gradients with respect to the outputs.
      length: Number of rows of the table, whose A is diagonal; `None`: it is none.
      diagonal: Whether A, and whether G, is to be diagonal: the nearest among those.
      tolerance: The iteration ends when the norm of `A ⊗ G` changes by less, relatively.
      max_iterations: The largest number of iterations.
      precision: Precision of the matrix products.

    Returns:
      `A` and `G`, or their diagonals, of equal norm; zeros for a curvature of zero. Cost of an
      iteration: 4·N·S·(d_in² + V·d_out²) + 4·N·S²·(d_in + V·d_out) operations; of a table without
      the terms of d_in, of diagonal factors without their squares.
    """
    d_out = output_grads.shape[-1]
    if length is None:
        of_input, of_output = _half_steps(inputs, output_grads, diagonal, precision)
        dtype, d_in = jnp.result_type(inputs, output_grads), inputs.shape[-1]
        shape = (d_in,) if diagonal[0] else (d_in, d_in)
    else:
        of_input, of_output = _table_half_steps(
            inputs, output_grads, length, diagonal[1], precision
        )
        dtype, shape = output_grads.dtype, (length,)

    def step(carry):
        count, norm, _, _, G = carry
        A, _ = _normalised(of_input(G))
        G, new = _normalised(of_output(A))
        return count + 1, new, jnp.abs(new - norm), A, G

    def go_on(carry):
        count, norm, change, _, _ = carry
        return (count < max_iterations) & (change > tolerance * norm)

    # The identity is orthogonal to no positive semidefinite matrix, and so not to the solution.
    G, _ = _normalised(jnp.ones(d_out, dtype) if diagonal[1] else jnp.eye(d_out, dtype=dtype))
    infinite = jnp.full((), jnp.inf, dtype)
    start = (0, jnp.zeros((), dtype), infinite, jnp.zeros(shape, dtype), G)
    _, norm, _, A, G = flow.while_loop(go_on, step, start)
    return jnp.sqrt(norm) * A, jnp.sqrt(norm) * G


# The half steps never form M [d_in, d_out]. With M = Σ_s a_s g_sᵀ,
#
#   M G Mᵀ = Σ_st a_s (g_sᵀ G g_t) a_tᵀ:
#
# a matrix [S, S] of pairs of positions for each example, summed over columns, in the place of G.


def _half_steps(
    inputs: Float[Array, "N S d_in"],
    output_grads: Float[Array, "V N S d_out"],
    diagonal: tuple[bool, bool],
    precision: contract.Precision,
) -> HalfSteps:
    """The half steps but for the scale of their results."""

    def of_input(output_factor):
        product = _applied(output_factor, output_grads, precision)
        pairs = jnp.einsum("vnso,vnto->nst", output_grads, product, precision=precision)
        return _mean(inputs[None], pairs, diagonal[0], precision)

    def of_output(input_factor):
        product = _applied(input_factor, inputs, precision)
        pairs = jnp.einsum("nsi,nti->nst", inputs, product, precision=precision)
        return _mean(output_grads, pairs, diagonal[1], precision)

    return of_input, of_output


def _table_half_steps(
    indices: Int[Array, "N S 1"],
    output_grads: Float[Array, "V N S d_out"],
    length: int,
    diagonal: bool,
    precision: contract.Precision,
) -> HalfSteps:
    """The same for a table, with a diagonal A; `diagonal`: whether G is, too."""
    rows = indices[..., 0]
    # What counts in A is where an example reads one row: at one position or at several.
    same = (rows[:, :, None] == rows[:, None, :]).astype(output_grads.dtype)
    beside = jnp.einsum("nst,vnto->vnso", same, output_grads, precision=precision)
    examples = output_grads.shape[1]

    def of_input(output_factor):
        product = _applied(output_factor, output_grads, precision)
        products = jnp.einsum("vnso,vnso->ns", product, beside, precision=precision)
        return jnp.zeros(length, products.dtype).at[rows].add(products, mode="drop") / examples

    def of_output(input_factor):
        weights = input_factor.at[rows].get(mode="fill", fill_value=0)[..., None]
        return _products(output_grads * weights, beside, diagonal, precision) / examples

    return of_input, of_output


def _applied(
    factor: Factor, x: Float[Array, "*batch d"], precision: contract.Precision
) -> Float[Array, "*batch d"]:
    """A factor, or its diagonal, applied to vectors."""
    return x * factor if factor.ndim == 1 else jnp.matmul(x, factor.T, precision=precision)


def _mean(
    x: Float[Array, "V N S d"],
    pairs: Float[Array, "N S S"],
    diagonal: bool,
    precision: contract.Precision,
) -> Factor:
    """`(1/N) Σ_v Σ_n xᵀ P x` of vectors x and pairs of positions P."""
    beside = jnp.einsum("nst,vntj->vnsj", pairs, x, precision=precision)
    return _products(x, beside, diagonal, precision) / x.shape[1]


def _products(
    x: Float[Array, "V N S d"],
    y: Float[Array, "V N S d"],
    diagonal: bool,
    precision: contract.Precision,
) -> Factor:
    """`Σ_v Σ_n Σ_s x yᵀ` of vectors, or its diagonal."""
    if diagonal:
        return jnp.sum(x * y, axis=(0, 1, 2))
    return jnp.einsum("vnsi,vnsj->ij", x, y, precision=precision)


def _normalised(x: Factor) -> tuple[Factor, Float[Array, ""]]:
    """A matrix of Frobenius norm one, and the norm that it had; zero stays zero."""
    largest = contract.unit_of(x)  # whose square might overflow
    scaled = x / jnp.where(largest > 0, largest, 1)
    norm = jnp.sqrt(jnp.sum(jnp.square(scaled)))
    return scaled / jnp.where(norm > 0, norm, 1), largest * norm
