"""Orthogonalization by matrix products only: polynomials that bring all singular values to one.

An odd polynomial of a matrix acts on its singular values, `p(U Σ Vᴴ) = U p(Σ) Vᴴ`. One of degree
five, `X ← X (a I + b A + c A²)` with `A = XᴴX`, repeated, takes X of norm one to the orthonormal
factor `U Vᴴ` of its polar decomposition, or near it.

Sources: Jordan et al. (2024), Muon, https://kellerjordan.github.io/posts/muon; Amsel et al. (2025),
arXiv:2505.16932; Björck and Bowie (1971), doi:10.1137/0708036, for the classical ones.

A worked example, X [1024, 256], five steps on a CPU:

    A = XᴴX [256, 256]                          one product of 2·1024·256² operations
    four steps A ← P A P, Q ← Q P, a last Q     products of 2·256³, in place of two of 2·1024·256²
    X Q [1024, 256]                             one product of 2·1024·256²
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Inexact

from optax_kron.kernels import contract

POLYNOMIALS = ("muon", "polar_express", "newton_schulz", "newton_schulz_cubic")

_MUON = 3.4445, -4.7750, 2.0315
_QUINTIC, _CUBIC = (15 / 8, -10 / 8, 3 / 8), (3 / 2, -1 / 2, 0.0)
# Polar Express: the least singular value that is meant; an interval no wider than this is what a
# polynomial is best on; and by how much more than one rounding may make a singular value.
_LEAST, _CUSHION, _SAFETY = 1e-3, 0.024, 1.01
_NARROW = 1e-5  # relative width of an interval on which Taylor's polynomial is the best one
# How much larger than rounding errors of a Gram matrix may get in steps that see it alone, times
# the rounding unit; and how much longer than wide a matrix is for which those steps are cheaper.
_GROWTH, _TALL = 0.03, 1.5


def orthogonalize(
    matrix: Inexact[Array, "m n"],
    polynomials: Float[np.ndarray, "steps 3"],
    *,
    dtype: DTypeLike | None = None,
    precision: contract.Precision = None,
) -> Inexact[Array, "m n"]:
    """`U f(Σ) Vᴴ` for `X / ‖X‖_F = U Σ Vᴴ`, with f the polynomials one after the other.

    Args:
      matrix: X, of any scale. Of zeros, or of what underflows, the result is zero.
      polynomials: Coefficients a, b, c of each, as `coefficients` returns them.
      dtype: Real dtype of the products; `None`: that of the matrix.
      precision: Precision of the products.

    Returns:
      An array like the matrix. Cost, with n ≤ m: 4·m·n² + 2·n³ operations a step; on a CPU, in
      float32 and wider and for m ≥ 1.5·n, 4·m·n² in all and 8·n³ a step.
    """
    if matrix.shape[0] < matrix.shape[1]:
        wide = orthogonalize(matrix.mT, polynomials, dtype=dtype, precision=precision)
        return wide.mT
    X = _normalized(matrix)
    if dtype is not None:
        X = X.astype(contract.complex_like(dtype, jnp.iscomplexobj(X)))
    for group in _groups(polynomials, X, precision):
        X = _steps(X, group, precision)
    return X.astype(matrix.dtype)


def _normalized(matrix: Inexact[Array, "m n"]) -> Inexact[Array, "m n"]:
    """X over its Frobenius norm; squares neither overflow nor vanish."""
    X = matrix / contract.safe_divisor(contract.unit_of(matrix))
    squares = jnp.sum(contract.squared_magnitude(X))
    return X / contract.safe_divisor(jnp.sqrt(squares)).astype(X.dtype)


def _steps(
    X: Inexact[Array, "m n"], polynomials: Float[np.ndarray, "g 3"], precision: contract.Precision
) -> Inexact[Array, "m n"]:
    """Some steps, all but the last of which see the Gram matrix alone."""
    product = functools.partial(jnp.matmul, precision=precision)
    A, Q = product(X.conj().mT, X), None
    for i, (a, b, c) in enumerate(polynomials.tolist()):
        # Without `a`, which is added to a single step exactly.
        P = b * A + c * product(A, A) if c else b * A
        if len(polynomials) == 1:
            return a * X + product(X, P)
        P = a * jnp.eye(len(P), dtype=P.dtype) + P
        Q = P if Q is None else product(Q, P)
        if i + 1 < len(polynomials):
            A = product(product(P, A), P)
    assert Q is not None  # there are several steps
    return product(X, Q)


def _groups(polynomials, X, precision) -> list[Float[np.ndarray, "g 3"]]:
    """The steps, taken apart into those that see one Gram matrix.

    Its rounding errors grow as its small eigenvalues do, a² times in a step. They must stay small:
    negative eigenvalues would be driven away from one. Products of accelerators round more.
    """
    eps = float(jnp.finfo(X.dtype).eps)
    exact = jax.default_backend() == "cpu" and precision in (None, jax.lax.Precision.HIGHEST)
    groups, growth = [], np.inf
    for row in polynomials:
        if not exact or len(X) < _TALL * X.shape[1] or growth * eps > _GROWTH:
            groups.append([])
            growth = 1.0
        groups[-1].append(row)
        growth *= row[0] ** 2
    return [np.array(group) for group in groups]


def coefficients(name: str, steps: int) -> Float[np.ndarray, "steps 3"]:
    """The coefficients a, b, c of `a x + b x³ + c x⁵` for each of some steps.

    Args:
      name: "muon", steep at zero, and within 0.68 and 1.14 in the end, not at one; "polar_express",
        for each step the best one for what the last ones leave of [1e-3, 1]; "newton_schulz" and
        "newton_schulz_cubic", Taylor's polynomials of degree five and three, which end at one.
      steps: How many.
    """
    if name == "polar_express":
        return _polar_express(steps)
    row = {"muon": _MUON, "newton_schulz": _QUINTIC, "newton_schulz_cubic": _CUBIC}[name]
    return np.tile(np.array(row), (steps, 1))


@functools.cache
def _polar_express(steps: int) -> Float[np.ndarray, "steps 3"]:
    """Polynomials, each of them the best one on the interval to which the last one leads."""
    rows, lower, upper = [], _LEAST, 1.0
    for step in range(steps):
        row = best_quintic(max(lower, _CUSHION * upper), upper)
        low, high = (float(row @ [x, x**3, x**5]) for x in (lower, upper))
        row = row * 2 / (low + high)  # below the cushion there is more to gain than to lose above
        lower = 2 * low / (low + high)
        upper = 2 - lower
        if step + 1 < steps:
            row = row / _SAFETY ** np.array([1, 3, 5])
        rows.append(row)
    return np.array(rows).reshape(-1, 3)


def best_quintic(lower: float, upper: float) -> Float[np.ndarray, " 3"]:
    """The odd polynomial of degree five that is nearest to one on an interval, by Remez's exchange.

    Its error takes its largest size, with changing signs, at both ends and at two points between.
    """
    powers = np.array([1, 3, 5])
    if upper - lower < _NARROW * upper:
        return np.array(_QUINTIC) / upper**powers
    x = np.linspace(lower, upper, 4)
    error, last, row = np.inf, np.nan, np.array(_QUINTIC)
    for _ in range(50):
        signs = np.array([1, -1, 1, -1])[:, None]
        *row, error = np.linalg.solve(np.hstack([x[:, None] ** powers, signs]), np.ones(4))
        if abs(error - last) < 1e-15:
            break
        last = error
        # Where the slope a + 3 b x² + 5 c x⁴ is zero.
        inner = np.sort(np.roots([5 * row[2], 3 * row[1], row[0]]).real)
        x = np.array([lower, *np.sqrt(inner), upper])
    return np.array(row)
