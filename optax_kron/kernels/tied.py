"""The Kronecker product nearest to a sum of two, of factors that never leave their own sizes.

For a table that is read and also is the head of the model, `diag(a_1) ⊗ S_1 + diag(a_2) ⊗ S_2`,
with one vector over the vocabulary and one matrix over the width of each use.
"""

# Derivation. Arranged as a matrix with a row for each entry of a and a column for each entry of S
# (Van Loan and Pitsianis), the sum is R = P Qᵀ of rank two, P = [a_1 a_2], Q = [vec S_1, vec S_2],
# and u ⊗ M becomes u vec(M)ᵀ, of rank one. So the nearest u and M are the top singular pair of R.
# u = P x lies in the span of the a's: R Rᵀ u = σ² u reads (QᵀQ)(PᵀP) x = σ² x, an eigenproblem of
# a matrix [2, 2] of inner products, solved in closed form. Given u, the best M is a projection,
# Rᵀ u / (uᵀ u) = Q y / (xᵀ y) with y = (PᵀP) x.
#
# All inner products of non-negative vectors, and of positive semi-definite matrices, are ≥ 0. So
# (Perron, Frobenius) x and y are ≥ 0: u is non-negative and M positive semi-definite, without care.
#
# Of a_1, a_2 [1, 50257] and S_1, S_2 [1, 768, 768] there are four inner products, and nothing else
# is made than u [1, 50257] and M [1, 768, 768].

import jax.numpy as jnp
from jaxtyping import Array, Float

from optax_kron.kernels import contract

Term = tuple[Float[Array, "B d ..."], Float[Array, "B e ..."]]


def nearest_product(first: Term, second: Term) -> Term:
    """The `u ⊗ M` nearest to `a_1 ⊗ S_1 + a_2 ⊗ S_2` in Frobenius norm, of each block.

    Args:
      first: `a_1` and `S_1`, each a stack of symmetric positive semi-definite matrices [B, d, d],
        or of the diagonals of diagonal ones [B, d].
      second: `a_2` and `S_2`, of the same shapes.

    Returns:
      u and M of these shapes, positive semi-definite. The entries of a diagonal u, or the trace of
      a dense one, add up to one, as the frequencies of rows do. What is left out is the second
      singular value. Cost: a few passes over the factors.
    """
    units, scales, inner = [], [], []
    for pair in zip(first, second, strict=True):  # of the a's, then of the S's
        unit, scale = zip(*map(_normalised, pair), strict=True)
        units.append(unit)
        scales.append(scale)
        inner.append([[_inner(x, y) for y in unit] for x in unit])
    sizes = [a * s for a, s in zip(*scales, strict=True)]
    largest = contract.safe_divisor(jnp.maximum(*sizes))
    share = [size / largest for size in sizes]
    P, Q = inner
    Q = [[share[i] * share[j] * Q[i][j] for j in (0, 1)] for i in (0, 1)]
    x = _perron([[Q[i][0] * P[0][j] + Q[i][1] * P[1][j] for j in (0, 1)] for i in (0, 1)])
    y = [P[i][0] * x[0] + P[i][1] * x[1] for i in (0, 1)]
    u = _combined(x, units[0])
    trace = contract.safe_divisor(_trace(u))
    weight = trace * largest / contract.safe_divisor(x[0] * y[0] + x[1] * y[1])
    M = _combined([weight * share[i] * y[i] for i in (0, 1)], units[1])
    return contract.scaled_blocks(u, 1 / trace), M


def _normalised(x: Float[Array, "B ..."]) -> tuple[Float[Array, "B ..."], Float[Array, " B"]]:
    """Factors of norm one, or zero, and their norms, also where squares would overflow."""
    axes = tuple(range(1, x.ndim))
    unit = contract.safe_divisor(contract.unit_of(x, axes))
    x = contract.scaled_blocks(x, 1 / unit)
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=axes))
    return contract.scaled_blocks(x, 1 / contract.safe_divisor(norm)), norm * unit


def _inner(x: Float[Array, "B ..."], y: Float[Array, "B ..."]) -> Float[Array, " B"]:
    return jnp.sum(x * y, axis=tuple(range(1, x.ndim)))


def _trace(x: Float[Array, "B d ..."]) -> Float[Array, " B"]:
    return jnp.sum(x, axis=1) if x.ndim == 2 else jnp.trace(x, axis1=1, axis2=2)


def _combined(weights, factors):
    first, second = (contract.scaled_blocks(x, w) for w, x in zip(weights, factors, strict=True))
    return first + second


def _perron(B: list[list[Float[Array, " B"]]]) -> list[Float[Array, " B"]]:
    """The eigenvector, ≥ 0, of the larger eigenvalue of matrices [2, 2] of entries ≥ 0."""
    (a, b), (c, d) = B
    half = (a - d) / 2
    root = jnp.sqrt(jnp.square(half) + b * c)
    # Of the two equal forms the one whose sum does not cancel. Of zeros all vectors are as good.
    x = [jnp.where(half >= 0, root + half, b), jnp.where(half >= 0, c, root - half)]
    none = (x[0] == 0) & (x[1] == 0)
    return [jnp.where(none, 1, x[0]), x[1]]
