"""KFOC: the Kronecker product that is nearest to a layer's curvature, in Frobenius norm.

Conventions are those of `kernels.kfac`. With `M = Σ_s a gᵀ`, the gradient of one datum and column,
the curvature is `F = (1/N) Σ_v Σ_n vec(M) vec(M)ᵀ`. Van Loan's rearrangement of F is a matrix whose
best approximation of rank one is the best Kronecker product of F. Its top singular pair is found by
power iteration, of which each half step is a mean over the data,

    A ← (1/N) Σ_v Σ_n M G Mᵀ / ‖G‖²,     G ← (1/N) Σ_v Σ_n Mᵀ A M / ‖A‖²,

so that neither F nor its rearrangement is ever formed, and A and G stay positive semidefinite.

Sources: Van Loan and Pitsianis (1993), Approximation with Kronecker products; Schnaus, Lee and
Triebel (2021), Kronecker-factored optimal curvature.
"""

import jax
import jax.numpy as jnp
from jax import Array

from optax_kron.kernels import contract


def factors(
    inputs: Array,
    output_grads: Array,
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 200,
    precision: contract.Precision = None,
) -> tuple[Array, Array]:
    """A and G of one block.

    Args:
      inputs: [N, S, d_in].
      output_grads: [V, N, S, d_out].
      tolerance: the iteration ends when the norm of `A ⊗ G` changes by less, relatively.
      max_iterations: and after so many at the latest.
      precision: of the matrix products.

    Returns:
      `A` [d_in, d_in] and `G` [d_out, d_out], of equal norm; zeros for a curvature of zero. Cost of
      an iteration: 4·N·S·(d_in² + V·d_out²) + 4·N·S²·(d_in + V·d_out) operations.
    """
    dtype = jnp.result_type(inputs, output_grads)
    d_in, d_out = inputs.shape[-1], output_grads.shape[-1]

    def of_input(output_factor):
        pairs = jnp.einsum(
            "vnso,op,vntp->nst", output_grads, output_factor, output_grads, precision=precision
        )
        return _mean(inputs[None], pairs, precision)

    def of_output(input_factor):
        pairs = jnp.einsum("nsi,ij,ntj->nst", inputs, input_factor, inputs, precision=precision)
        return _mean(output_grads, pairs, precision)

    def step(carry):
        count, norm, _, _, G = carry
        A, _ = _normalised(of_input(G))
        G, new = _normalised(of_output(A))
        return count + 1, new, jnp.abs(new - norm), A, G

    def goes_on(carry):
        count, norm, change, _, _ = carry
        return (count < max_iterations) & (change > tolerance * norm)

    # The identity is orthogonal to no positive semidefinite matrix, and so not to the solution.
    G, _ = _normalised(jnp.eye(d_out, dtype=dtype))
    infinite = jnp.full((), jnp.inf, dtype)
    start = (0, jnp.zeros((), dtype), infinite, jnp.zeros((d_in, d_in), dtype), G)
    _, norm, _, A, G = jax.lax.while_loop(goes_on, step, start)
    return jnp.sqrt(norm) * A, jnp.sqrt(norm) * G


def _mean(x: Array, pairs: Array, precision: contract.Precision) -> Array:
    """`(1/N) Σ_v Σ_n xᵀ P x` of x [V, N, S, d] and pairs of positions P [N, S, S]."""
    beside = jnp.einsum("nst,vntj->vnsj", pairs, x, precision=precision)
    return jnp.einsum("vnsi,vnsj->ij", x, beside, precision=precision) / x.shape[1]


def _normalised(x: Array) -> tuple[Array, Array]:
    """A matrix of Frobenius norm one, and the norm that it had; zero stays zero."""
    largest = jnp.max(jnp.abs(x), initial=0)  # whose square might overflow
    scaled = x / jnp.where(largest > 0, largest, 1)
    norm = jnp.sqrt(jnp.sum(jnp.square(scaled)))
    return scaled / jnp.where(norm > 0, norm, 1), largest * norm
