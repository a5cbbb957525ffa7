"""Inverse p-th roots `S^(-1/p)` of Hermitian positive semidefinite matrices.

By LAPACK's eigendecomposition, which is the faster on a CPU; or by the coupled Newton iteration,
of matrix products only, for accelerators. All are damped relative to the largest eigenvalue:
`(S + ε λ_max I)^(-1/p)`.

Of a root, float32 leaves little where the condition number is 1e6: its p-th power is right to that
number times the rounding. So CPUs and CUDA compute in float64, also while JAX has it switched off.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from optax_kron.kernels import contract, eigenbases, flow

METHODS = ("eigh", "newton")

# Eigenvalues that rounding of the entries has made negative are no farther from zero than this.
_INDEFINITE = 0.1  # relative to the largest
_STEPS = 100  # of Newton's method, at most; it stops by itself
_SQUARINGS = 8
# A power of a root loses the digits that the condition number takes; so does the check of it.
_PRECISION = jax.lax.Precision.HIGHEST


def inverse_root(
    matrix: Array, order: int, epsilon: ArrayLike, *, method: str = "eigh"
) -> tuple[Array, Array]:
    """`(S + ε λ_max I)^(-1/p)`.

    Args:
      matrix: S, Hermitian [d, d], or the diagonal [d] of a diagonal matrix.
      order: p ≥ 1.
      epsilon: ε ≥ 0.
      method: "eigh" or "newton"; of a diagonal neither.

    Returns:
      The root, in the shape of the matrix. With "eigh" eigenvalues down to -λ_max/10 count as zero,
      while "newton" needs a positive definite matrix; with ε = 0 both do. And how far it is from
      one, `max |Xᵖ(S + ελI) − I|`, which is large or not finite if the computation failed. Cost:
      for "eigh" about 11·d³ operations, for "newton" 2·d³·(2 + log₂ p) in each of 10 to 60 steps;
      for the check 2·d³·(1 + log₂ p).

    Sources: Gupta et al. (2018), arXiv:1802.09568; Guo and Higham (2006), doi:10.1137/050643374.
    """
    largest = jnp.max(jnp.abs(matrix))
    # Relative to the largest entry nothing overflows, or vanishes beside it.
    unit = matrix / jnp.where(largest == 0, jnp.nan, largest)
    epsilon = jnp.asarray(epsilon, largest.dtype)

    def compute(matrix, epsilon):
        return _inverse_root(matrix, order, epsilon, method)

    if matrix.ndim == 1:
        damped = jnp.maximum(unit, 0) + epsilon
        root = damped ** (-1 / order)
        residual = jnp.max(jnp.abs(root**order * damped - 1))
    else:
        wide = _in_float64(compute)
        root, residual = flow.platform_dependent(
            unit, epsilon, cpu=wide, cuda=wide, default=compute
        )
    return root * largest ** (-1 / order), residual


def _in_float64(fn: Callable[..., tuple[Array, Array]]) -> Callable[..., tuple[Array, Array]]:
    """The function with its arguments at double the precision, and its results at theirs.

    It is lowered where types of 64 bits are off: no indices may come about in it (argmax, sort).
    Batched it is traced anew, as rules of batching would not keep to those types either.
    """

    @jax.custom_batching.custom_vmap
    def wide(matrix, epsilon):
        with jax.enable_x64(True):
            double = jnp.complex128 if jnp.iscomplexobj(matrix) else jnp.float64
            root, error = fn(matrix.astype(double), epsilon.astype(jnp.float64))
            return root.astype(matrix.dtype), error.astype(epsilon.dtype)

    @wide.def_vmap
    def batched(size, is_batched, *operands):
        operands = [
            x if own else jnp.broadcast_to(x, (size, *x.shape))
            for x, own in zip(operands, is_batched, strict=True)
        ]
        return _in_float64(jax.vmap(fn))(*operands), (True, True)

    return wide


def _inverse_root(matrix: Array, order: int, epsilon: Array, method: str) -> tuple[Array, Array]:
    """Of a matrix, in its own precision."""
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
        root = _multiply(basis * (shifted ** (-1 / order))[None], basis.conj().T)
        # What the root would make of the matrix, were both exact.
        near = values > -_INDEFINITE * jnp.max(values)
        expected = jnp.where(near, (values + shift) / shifted, 1)
        identity = _multiply(basis * expected[None], basis.conj().T)
    return root, jnp.max(jnp.abs(_multiply(_power(root, order), damped) - identity))


def _newton(matrix: Array, order: int) -> Array:
    """Inverse root of a positive definite matrix: X of `X ← X T`, `M ← Tᵖ M`, where M → I.

    `T = ((p + 1) I − M) / p`, from `M = z A`, `X = z^(1/p) I`, `z = (p + 1) / (2 ‖A‖)`. It goes on
    as long as M comes nearer to the identity: rounding ends that, sooner or later.
    """
    size, real = matrix.shape[0], contract.real_dtype(matrix.dtype)
    identity = jnp.eye(size, dtype=matrix.dtype)
    norm = jnp.max(jnp.sum(jnp.abs(matrix), axis=1))  # no less than the spectral norm
    scale = (order + 1) / (2 * norm)

    def distance(M):
        return jnp.max(jnp.abs(M - identity))

    def better(carry):
        steps, _, _, last, error = carry
        # Until the smallest eigenvalues have grown, the error is one, up to rounding.
        nearing = (error < last) | (error > 0.5)
        return (steps < _STEPS) & nearing & (error > size * jnp.finfo(real).eps / 8)

    def step(carry):
        steps, X, M, _, last = carry
        T = ((order + 1) * identity - M) / order
        M = _multiply(_power(T, order), M)
        M = (M + M.conj().T) / 2
        error = distance(M)
        kept = (error < last) | (error > 0.5)
        return steps + 1, jnp.where(kept, _multiply(X, T), X), M, last, error

    M = scale.astype(matrix.dtype) * matrix
    X = (scale ** (1 / order)).astype(matrix.dtype) * identity
    start = jnp.zeros([], jnp.int32), X, M, jnp.asarray(jnp.inf, real), distance(M)
    return flow.while_loop(better, step, start)[1]


def _largest_eigenvalue(matrix: Array) -> Array:
    """Of a positive semidefinite matrix: at most 1 % less, of matrix products only.

    The mean of the eigenvalues, weighted with their 256th powers.
    """

    def square(_, power):
        power = power / jnp.maximum(jnp.trace(power).real, jnp.finfo(power.dtype).tiny)
        return _multiply(power, power)

    weights = flow.fori_loop(0, _SQUARINGS, square, matrix)
    total = jnp.trace(weights).real
    return jnp.sum((matrix.conj() * weights).real) / jnp.where(total > 0, total, 1)


def _power(matrix: Array, exponent: int) -> Array:
    """A whole power, from 1, by squaring."""
    result = None
    while exponent:
        if exponent % 2:
            result = matrix if result is None else _multiply(result, matrix)
        exponent //= 2
        if exponent:
            matrix = _multiply(matrix, matrix)
    assert result is not None  # exponents are positive
    return result


def _multiply(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=_PRECISION)
