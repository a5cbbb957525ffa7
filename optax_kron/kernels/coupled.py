"""Inverse p-th roots of positive definite matrices, of matrix products only.

The coupled iteration keeps `M = Xᵖ A` and takes both towards the root, `X ← X T`, `M ← Tᵖ M`, with
a polynomial `T = q(M)` that is near `M^(-1/p)`. All of them are polynomials of A, so they commute.
Polynomials of degree four need two products; those that the small eigenvalues need make these 30 to
80 times as large in a step, at p = 4, where Newton's method makes them 2.4 times as large.

Sources: Guo and Higham (2006), doi:10.1137/050643374; minimax polynomials in place of Newton's,
for the matrix sign, Amsel et al. (2025), arXiv:2505.16932.

A worked example, p = 4, eigenvalues of A in [0.1, 1]:

    step 1    q is within 1 % of x^(-1/4) on [0.05, 1.1]: X = q(A), M has eigenvalues in 1 ± 0.04
    end       E = M − I; Taylor's polynomial of degree four of (I + E)^(-1/4) makes X right to 1e-7
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Inexact

from optax_kron.kernels import contract, flow
from optax_kron.kernels.contract import matmul_exact

Matrix = Inexact[Array, "d d"]
Scalar = Float[Array, ""]

_DEGREE = 4
# The polynomials are meant for eigenvalues from so small a number up to _TOP.
_NEAR, _FAR = 0.06, 0.002
_TOP, _CAP = 1.1, 1.07  # the largest eigenvalue is only known to a few percent
_TAYLOR = 0.45  # size of E = M − I below which Taylor's polynomial is taken
_LANCZOS, _SQUARINGS = 16, 12


class Plan(NamedTuple):
    """How the iteration goes.

    Attributes:
      least: Lower ends of the intervals that the first steps' polynomials are meant for; the last
        one is repeated.
      growing: The number of such steps at most; Taylor's polynomial may come after them.
      tolerance: Bound of the Frobenius norm of `XᵖA − I`, but for rounding.
      symmetric: Whether M is made symmetric again at each step, for a last digit.
    """

    least: tuple[float, ...]
    growing: int
    tolerance: float
    symmetric: bool = False


# In float32, up to condition numbers of some hundreds.
EASY = Plan((_NEAR,), 2, 2e-3)
# In float64, up to those of 1e6 in four steps; and where the result is to be right to float64.
HARD = Plan((_FAR, _FAR, 0.01, _NEAR), 16, 1e-3)
EXACT = Plan((_NEAR, _FAR, _FAR, 0.01, _NEAR), 16, 1e-13, symmetric=True)
_STEPS = 20


class Scaled(NamedTuple):
    """A damped matrix, in units of its largest eigenvalue.

    Attributes:
      M: `(S + ε λ_max I) / λ_max`, but for rows of zeros, which are those of the identity.
      E: `M − I`.
      E2: `E²`.
      largest: λ_max.
      shift: `ε λ_max`.
      empty: Which rows of S are zero.
    """

    M: Matrix
    E: Matrix
    E2: Matrix
    largest: Scalar
    shift: Scalar
    empty: Bool[Array, " d"]


def scaled(matrix: Matrix, epsilon: Scalar, largest: Scalar | None = None) -> Scaled:
    """The matrix that the iteration starts from.

    Args:
      matrix: S, Hermitian, d > 1, with a largest magnitude of about one.
      epsilon: ε ≥ 0; λ_max is known to 3 %, up to d = 16 to 1e-3 of the gap below it.
      largest: λ_max, where it is known.
    """
    square = matmul_exact(matrix, matrix)
    if largest is None:
        largest = _largest_eigenvalue(matrix, square)
    shift = epsilon * largest
    # Rows of zeros, as of padding, have a known root. They would make the condition number large.
    empty = jnp.diagonal(matrix).real == 0
    identity = _identity(matrix)
    diagonal = (shift + jnp.where(empty, largest, 0)).astype(matrix.dtype)
    M = (matrix + diagonal[:, None] * identity) / largest.astype(matrix.dtype)
    # E² is known without another product.
    M2 = square + 2 * shift.astype(matrix.dtype) * matrix
    M2 = M2 + jnp.square(diagonal)[:, None] * identity
    E2 = M2 / jnp.square(largest).astype(matrix.dtype) - 2 * M + identity
    return Scaled(M, M - identity, E2, largest, shift, empty)


def unscaled(root: Matrix, start: Scaled, order: int) -> Matrix:
    """`(S + ε λ_max I)^(-1/p)`, given `M^(-1/p)`."""
    alone = jnp.where(start.empty, start.shift, 1) ** (-1 / order)
    root = (root + root.conj().T) * (start.largest ** (-1 / order) / 2).astype(root.dtype)
    return jnp.where(
        start.empty[:, None], alone.astype(root.dtype)[:, None] * _identity(root), root
    )


def inverse_root(start: Scaled, order: int, plan: Plan) -> Matrix:
    """`M^(-1/p)`, right to the rounding of M times its condition number.

    Where the plan's steps are not enough, or M is not positive definite, it is not the root.

    Cost: 2·d³ operations for each product, of which there are 5 + log₂ p, and 4 + log₂ p in each
    step but the first. Condition numbers up to 17 take one or two steps, up to 1e6 four or five.
    """

    def go_on(carry):
        steps, *_, E, E2 = carry
        more = (steps < plan.growing) | (_is_near(E, E2) & (steps < _STEPS))
        return more & (_remainder(E2, order) > plan.tolerance)

    def advance(T, M):
        M = matmul_exact(power(T, order), M)
        return (M + M.conj().T) / 2 if plan.symmetric else M

    def step(carry):
        steps, X, M, E, E2 = carry
        T = _polynomial(order, plan.least, steps, E, E2)
        M = advance(T, M)
        return steps + 1, matmul_exact(X, T), M, *_distance(M)

    zero = jnp.zeros([], jnp.int32)
    carry = zero, _identity(start.M), start.M, start.E, start.E2
    if plan is EASY:  # the first step apart: it saves a product, which takes time to compile
        T = _polynomial(order, plan.least, 0, start.E, start.E2)
        M = advance(T, start.M)
        carry = zero + 1, T, M, *_distance(M)
    _, X, _, E, E2 = flow.while_loop(go_on, step, carry)
    return matmul_exact(X, _evaluate(jnp.asarray(polynomials(order, ())[0], E.real.dtype), E, E2))


def _distance(M: Matrix) -> tuple[Matrix, Matrix]:
    E = M - _identity(M)
    return E, matmul_exact(E, E)


def _remainder(E2: Matrix, order: int) -> Scalar:
    """Bound of what Taylor's polynomial leaves: a constant times `‖E⁵‖ ≤ ‖E²‖^(5/2)`."""
    return order * float(abs(_taylor(order)[-1])) * _norm(E2) ** 2.5


def _polynomial(order, least, steps, E, E2):
    """That of one step: of a table, or where E is small Taylor's."""
    row = jnp.where(_is_near(E, E2), 0, jnp.minimum(steps + 1, len(least)))
    return _evaluate(jnp.asarray(polynomials(order, least), E.real.dtype)[row], E, E2)


def _is_near(E: Matrix, E2: Matrix) -> Bool[Array, ""]:
    """Whether Taylor's polynomial is the better one."""
    # The ratio is a mean of all |e| that counts the largest most, and no larger than these. If it
    # misses a few small eigenvalues, Taylor's polynomial makes those larger as well.
    return _norm(E2) < _TAYLOR * _norm(E)


def _evaluate(coefficients, E: Matrix, E2: Matrix) -> Matrix:
    identity = _identity(E)
    plain, left, right = (x * identity + y * E + z * E2 for x, y, z in coefficients.astype(E.dtype))
    return plain + matmul_exact(left, right)


def _norm(E: Matrix) -> Scalar:
    return jnp.sqrt(jnp.sum(contract.squared_magnitude(E)))


def _identity(matrix: Matrix) -> Matrix:
    return jnp.eye(matrix.shape[0], dtype=matrix.dtype)


def polynomials(order: int, least: Sequence[float]) -> np.ndarray:
    """Coefficients [n, 3, 3] of Taylor's polynomial, then of those meant for 1 + e from `least` on.

    Of each they are those of 1, e and e² in a, b and c of `a + b·c`.
    """
    taylor = _taylor(order)
    first = np.array([taylor[:3], [0, 0, 1], [0, *taylor[3:5]]])
    return np.stack([first, *(_growing(order, x) for x in least)])


@functools.cache
def _taylor(order: int) -> np.ndarray:
    """Coefficients of `(1 + e)^(-1/p)`, and that of the first term left out."""
    terms = [1.0]
    for k in range(_DEGREE + 1):
        terms.append(terms[-1] * (-1 / order - k) / (k + 1))
    return np.array(terms)


@functools.cache
def _growing(order: int, least: float) -> np.ndarray:
    """Coefficients, as in `polynomials`, of one near `(1 + e)^(-1/p)`, 1 + e in [least, _TOP].

    The relative error is about as large everywhere, by Lawson's algorithm. It is made of
    Chebyshev's polynomials on [0, _TOP], as those powers of e would cancel one another.
    """
    turns = (1 - np.cos(np.linspace(0, np.pi, 100))) / 2
    x = np.union1d(np.geomspace(least, _TOP, 100), least + (_TOP - least) * turns)
    n, root = 2 * x / _TOP - 1, x ** (1 / order)
    t = 2 * n**2 - 1
    terms = np.stack([np.ones_like(n), n, t, t * n, t * t], axis=1) * root[:, None]
    weights = np.full(len(x), 1 / len(x))
    best, coefficients = math.inf, np.zeros(_DEGREE + 1)
    for _ in range(100):
        scale = np.sqrt(weights)
        found = np.linalg.lstsq(terms * scale[:, None], scale, rcond=None)[0]
        errors = np.abs(terms @ found - 1)
        if errors.max() < best:
            best, coefficients = errors.max(), found
        weights = weights * errors / np.sum(weights * errors)
    # No eigenvalue may end above _TOP, where the next polynomial is steep.
    a, b, c, d, e = coefficients * min(1, _CAP ** (1 / order) / (1 + best))
    # In powers of e: n = s·e + (s − 1), with s = 2 / _TOP.
    s = 2 / _TOP
    one, N, T = (
        np.eye(3)[0],
        np.array([s - 1, s, 0]),
        2 * np.array([(s - 1) ** 2, 2 * s * (s - 1), s * s]),
    )
    T = T - one
    return np.stack([a * one + b * N + c * T, T, d * N + e * T])


def _largest_eigenvalue(matrix: Matrix, square: Matrix) -> Scalar:
    """That of a positive semidefinite matrix, given its square: by Lanczos's method with that.

    It is the mean of the eigenvalues of a matrix of up to 16×16, weighted with their 4096th powers.
    """
    size, real = matrix.shape[0], contract.real_dtype(matrix.dtype)
    if size > _LANCZOS:
        square = _tridiagonal(square)
    tiny = jnp.finfo(real).tiny

    def double(_, power):
        power = power / jnp.maximum(jnp.trace(power).real, tiny).astype(power.dtype)
        return matmul_exact(power, power)

    weights = flow.fori_loop(0, _SQUARINGS, double, square)
    total = jnp.trace(weights).real
    return jnp.sqrt(jnp.sum((square.conj() * weights).real) / jnp.where(total > 0, total, 1))


def _tridiagonal(matrix: Matrix) -> Float[Array, "m m"]:
    """Lanczos's tridiagonal matrix: its largest eigenvalue is nearly that of a Hermitian matrix."""
    size, real = matrix.shape[0], contract.real_dtype(matrix.dtype)
    start = np.random.default_rng(0).standard_normal(size)
    start = jnp.asarray((start / np.linalg.norm(start)).astype(real)).astype(matrix.dtype)
    rows = np.arange(_LANCZOS)

    def step(i, carry):
        last, v, beta, diagonal, beside = carry
        w = matrix @ v - beta.astype(v.dtype) * last
        alpha = jnp.sum((v.conj() * w).real)
        w = w - alpha.astype(v.dtype) * v
        beta = jnp.sqrt(jnp.sum(contract.squared_magnitude(w)))
        # Where the vectors span all that the matrix acts on, there is nothing left.
        following = jnp.where(beta > 0, w / jnp.where(beta > 0, beta, 1).astype(v.dtype), 0)
        diagonal = jnp.where(rows == i, alpha, diagonal)
        beside = jnp.where(rows == i, beta, beside)
        return v, following, beta, diagonal, beside

    zeros = jnp.zeros(_LANCZOS, real)
    carry = jnp.zeros_like(start), start, jnp.zeros([], real), zeros, zeros
    *_, diagonal, beside = flow.fori_loop(0, _LANCZOS, step, carry)
    return jnp.diag(diagonal) + jnp.diag(beside[:-1], 1) + jnp.diag(beside[:-1], -1)


def power(matrix: Matrix, exponent: int) -> Matrix:
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
