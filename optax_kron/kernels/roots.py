"""Inverse p-th roots `S^(-1/p)` of Hermitian positive semidefinite matrices.

By LAPACK's eigendecomposition, which is the faster on a CPU; or by the coupled Newton iteration,
of matrix products only, for accelerators. All are damped relative to the largest eigenvalue:
`(S + ε λ_max I)^(-1/p)`.

Of an inverse root, float32 leaves little where the condition number is 1e6: its p-th power is right
to that number times the rounding. So CPUs and CUDA compute in float64, also while JAX has it
switched off.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Inexact

from optax_kron.kernels import contract, eigenbases, flow
from optax_kron.kernels.contract import matmul_exact

METHODS = ("eigh", "newton")

# Eigenvalues that rounding of the entries has made negative are no farther from zero than this.
_INDEFINITE = 0.1  # relative to the largest
_STEPS = 100  # of Newton's method, at most; it stops by itself
_SQUARINGS = 8

Matrix = Inexact[Array, "d d"]
Scalar = Float[Array, ""]


def inverse_root(
    matrix: contract.Factor, order: int, epsilon: ArrayLike, *, method: str = "eigh"
) -> tuple[contract.Factor, Scalar]:
    """`(S + ε λ_max I)^(-1/p)`.

    Args:
      matrix: S, Hermitian, or the diagonal of a diagonal matrix.
      order: The order p ≥ 1 of the root.
      epsilon: The damping ε ≥ 0, relative to the largest eigenvalue.
      method: "eigh" or "newton"; of a diagonal neither.

    Returns:
      The inverse root, in the shape of the matrix. With "eigh" eigenvalues down to -λ_max/10 count
      as zero, while "newton" needs a positive definite matrix; with ε = 0 both do. And how far it
      is from one, `max |Xᵖ(S + ελI) − I|`, which is large or not finite if the computation failed.
      Cost: for "eigh" about 11·d³ operations, for "newton" 2·d³·(2 + log₂ p) in each of 10 to 60
      steps; for the check 2·d³·(1 + log₂ p).

    Sources: Gupta et al. (2018), arXiv:1802.09568; Guo and Higham (2006), doi:10.1137/050643374.
    """
    largest = contract.largest_magnitude(matrix)
    # Relative to the largest entry nothing overflows, or vanishes beside it.
    unit = matrix / jnp.where(largest == 0, jnp.nan, largest)
    epsilon = jnp.asarray(epsilon, largest.dtype)

    def compute(matrix, epsilon):
        return _inverse_root(matrix, order, epsilon, method)

    if matrix.ndim == 1:
        damped = jnp.maximum(unit, 0) + epsilon
        root = damped ** (-1 / order)
        residual = contract.largest_magnitude(root**order * damped - 1)
    else:
        wide = _in_float64(compute)
        root, residual = flow.platform_dependent(
            unit, epsilon, cpu=wide, cuda=wide, default=compute
        )
    return root * largest ** (-1 / order), residual


def _in_float64(
    fn: Callable[[Matrix, Scalar], Sequence[Array]],
) -> Callable[[Matrix, Scalar], Sequence[Array]]:
    """The function with its arguments at double the precision, and its results at theirs.

    It is lowered where types of 64 bits are off: no indices may come about in it (argmax, sort).
    Batched it is traced anew, as rules of batching would not keep to those types either.
    """

    @jax.custom_batching.custom_vmap
    def wide(matrix, epsilon):
        with jax.enable_x64(True):
            double = jnp.complex128 if jnp.iscomplexobj(matrix) else jnp.float64
            root, residual = fn(matrix.astype(double), epsilon.astype(jnp.float64))
            return root.astype(matrix.dtype), residual.astype(epsilon.dtype)

    @wide.def_vmap
    def batched(size, is_batched, *operands):
        operands = [
            x if has_axis else jnp.broadcast_to(x, (size, *x.shape))
            for x, has_axis in zip(operands, is_batched, strict=True)
        ]
        return _in_float64(jax.vmap(fn))(*operands), (True, True)

    return wide


def _inverse_root(
    matrix: Matrix, order: int, epsilon: Scalar, method: str
) -> tuple[Matrix, Scalar]:
    """The inverse root of a matrix, in its own precision, and its residual."""
    identity = jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    if method == "newton" and matrix.shape[0] > 1:
        damped = matrix + epsilon * _largest_eigenvalue(matrix).astype(matrix.dtype) * identity
        root = _newton(damped, order)
    else:
        basis, values = eigenbases.hermitian_eigen(matrix)
        assert basis is not None  # a matrix has one
        shift = epsilon * jnp.max(values)
        damped = matrix + shift.astype(matrix.dtype) * identity
        shifted = jnp.maximum(values, 0) + shift
        root = matmul_exact(basis * (shifted ** (-1 / order))[None], basis.conj().T)
        # What the root would make of the matrix, were both exact.
        near = values > -_INDEFINITE * jnp.max(values)
        expected = jnp.where(near, (values + shift) / shifted, 1)
        identity = matmul_exact(basis * expected[None], basis.conj().T)
    # A power of a root loses the digits that the condition number takes; so does the check of it.
    error = matmul_exact(_power(root, order), damped) - identity
    return root, contract.largest_magnitude(error)


def _newton(matrix: Matrix, order: int) -> Matrix:
    """Inverse root of a positive definite matrix: X of `X ← X T`, `M ← Tᵖ M`, where M → I.

    `T = ((p + 1) I − M) / p`, from `M = z A`, `X = z^(1/p) I`, `z = (p + 1) / (2 ‖A‖)`. It goes on
    as long as M comes nearer to the identity: rounding ends that, sooner or later.
    """
    # M = XᵖA throughout, as all of them are polynomials of A and commute: where M = I, X is the
    # root. The z puts the eigenvalues of M into (0, (p + 1) / 2], where the iteration converges;
    # there the largest go to one first, and the smallest grow by a factor ((p + 1) / p)ᵖ a step.
    size, real = matrix.shape[0], contract.real_dtype(matrix.dtype)
    identity = jnp.eye(size, dtype=matrix.dtype)
    norm = jnp.max(jnp.sum(jnp.abs(matrix), axis=1))  # no less than the spectral norm
    scale = (order + 1) / (2 * norm)
    tolerance = size * jnp.finfo(real).eps / 8

    def distance(M):
        return contract.largest_magnitude(M - identity)

    def approaching(error, last):
        # Until the smallest eigenvalues have grown, the error is one, up to rounding.
        return (error < last) | (error > 0.5)

    def go_on(carry):
        steps, _, _, last, error = carry
        nearing = approaching(error, last)
        return (steps < _STEPS) & nearing & (error > tolerance)

    def step(carry):
        steps, X, M, _, last = carry
        T = ((order + 1) * identity - M) / order
        M = matmul_exact(_power(T, order), M)
        M = (M + M.conj().T) / 2
        error = distance(M)
        nearing = approaching(error, last)
        return steps + 1, jnp.where(nearing, matmul_exact(X, T), X), M, last, error

    M = scale.astype(matrix.dtype) * matrix
    X = (scale ** (1 / order)).astype(matrix.dtype) * identity
    start = jnp.zeros([], jnp.int32), X, M, jnp.asarray(jnp.inf, real), distance(M)
    return flow.while_loop(go_on, step, start)[1]


def _largest_eigenvalue(matrix: Matrix) -> Scalar:
    """That of a positive semidefinite matrix: at most 1 % less, of matrix products only.

    The mean of the eigenvalues, weighted with their 256th powers.
    """

    def square(_, power):
        power = power / jnp.maximum(jnp.trace(power).real, jnp.finfo(power.dtype).tiny)
        return matmul_exact(power, power)

    weights = flow.fori_loop(0, _SQUARINGS, square, matrix)
    total = jnp.trace(weights).real
    return jnp.sum((matrix.conj() * weights).real) / jnp.where(total > 0, total, 1)


def _power(matrix: Matrix, exponent: int) -> Matrix:
    """A whole power, from 1, by squaring."""
    result = None
    while exponent:
        if exponent % 2:
            result = matrix if result is None else matmul_exact(result, matrix)
        exponent //= 2
        if exponent:
            matrix = matmul_exact(matrix, matrix)
    assert result is not None  # exponents are positive
    return result
