"""Singular values under polynomials: beside float64 ones by NumPy's decomposition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron.kernels import orthogonal
from optax_kron.kernels.orthogonal import best_quintic, coefficients

# As Muon and textbooks have them.
PLAIN = {
    "muon": (3.4445, -4.7750, 2.0315),
    "newton_schulz": (1.875, -1.25, 0.375),
    "newton_schulz_cubic": (1.5, -0.5, 0.0),
}


def draw(shape, seed=0, is_complex=False, condition=None):
    rng = np.random.default_rng((seed, *shape))
    X = rng.normal(size=shape) + (1j * rng.normal(size=shape) if is_complex else 0)
    if condition is None:
        return X
    U, S, V = np.linalg.svd(X, full_matrices=False)
    return U * np.geomspace(1, 1 / condition, len(S)) @ V


def applied(x, rows):
    for a, b, c in rows:
        x = a * x + b * x**3 + c * x**5
    return x


def expected(X, rows):
    """`U f(Σ / ‖Σ‖) Vᴴ`."""
    U, S, V = np.linalg.svd(np.asarray(X, complex if np.iscomplexobj(X) else float), False)
    return U * applied(S / np.linalg.norm(S), rows) @ V


def run(X, rows, **settings):
    return np.asarray(orthogonal.orthogonalize(jnp.asarray(X), np.asarray(rows), **settings))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(
    ("shape", "is_complex"), [((8, 3), False), ((4, 4), False), ((3, 4), True), ((3, 9), True)]
)
def test_singular_values_go_through_the_polynomials(name, shape, is_complex):
    X, rows = draw(shape, is_complex=is_complex), [PLAIN[name]] * 4
    np.testing.assert_array_equal(coefficients(name, 4), rows)
    # Rounding of 1e-16 grows with the slopes at zero, 3.4⁴ at most.
    np.testing.assert_allclose(run(X, coefficients(name, 4)), expected(X, rows), atol=1e-13)


@pytest.mark.usefixtures("x64")
def test_the_best_polynomials_lead_to_the_polar_factor():
    X = draw((9, 4), condition=100)
    U, _, V = np.linalg.svd(X, full_matrices=False)
    np.testing.assert_allclose(run(X, coefficients("polar_express", 9)), U @ V, atol=1e-12)


@pytest.mark.parametrize("interval", [(0.024, 1.0), (0.3, 1.7), (0.97, 1.03), (1.0, 1.0)])
def test_the_best_polynomial_has_equal_errors_at_four_points(interval):
    row = best_quintic(*interval)
    x = np.linspace(*interval, 20001)
    error = applied(x, [row]) - 1
    largest = np.max(np.abs(error))
    assert largest <= np.max(np.abs(applied(x / interval[1], [PLAIN["newton_schulz"]]) - 1))
    if largest < 1e-9:  # no more than rounding
        return
    extreme = np.flatnonzero(np.abs(error) > (1 - 1e-6) * largest)
    signs = np.sign(error[extreme])
    assert [signs[0], *signs[1:][np.diff(signs) != 0]] == [-1, 1, -1, 1]


def test_singular_values_from_the_least_that_is_meant_come_near_one():
    x = np.geomspace(1e-3, 1, 5000)
    errors = [np.max(np.abs(applied(x, coefficients("polar_express", n)) - 1)) for n in (3, 5, 8)]
    assert np.all(np.array(errors) < [0.9, 0.15, 1e-4])
    # Nor does rounding upwards of one lead astray.
    assert np.max(applied(np.array([1.005]), coefficients("polar_express", 7))) < 1.02
    muon = applied(np.geomspace(1e-2, 1, 5000), coefficients("muon", 5))
    assert np.min(muon) > 0.68
    assert np.max(muon) < 1.14


@pytest.mark.parametrize("name", ["muon", "polar_express"])
@pytest.mark.parametrize("shape", [(24, 8), (9, 8)], ids=str)
def test_small_singular_values_survive_rounding(name, shape):
    """Also where many steps see a Gram matrix alone, whose rounding they blow up."""
    rows = coefficients(name, 12)
    X = draw(shape, condition=1e6)
    got, want = run(X.astype(np.float32), rows), expected(X, rows)
    # Down to 4e-4, the square of which is no more than the rounding unit of a Gram matrix.
    big = np.linalg.svd(X, full_matrices=False)[0][:, :5]
    np.testing.assert_allclose(big.T @ got, big.T @ want, atol=2e-2)
    assert np.linalg.norm(got, 2) < 1.3


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_the_scale_makes_no_difference(scale):
    X, rows = draw((6, 3)).astype(np.float32), coefficients("muon", 5)
    got = run(np.float32(scale) * X, rows)
    np.testing.assert_allclose(got, run(X, rows) if scale else 0 * X, rtol=1e-4, atol=1e-5)


def test_rotations_commute_with_it():
    X, rows = draw((6, 6)).astype(np.float32), coefficients("muon", 5)
    Q = np.linalg.qr(draw((6, 6), 1))[0].astype(np.float32)
    np.testing.assert_allclose(run(Q @ X, rows), Q @ run(X, rows), atol=1e-4)
    np.testing.assert_allclose(run(X @ Q, rows), run(X, rows) @ Q, atol=1e-4)


def test_products_may_be_of_another_dtype():
    X, rows = draw((8, 4)).astype(np.float32), coefficients("muon", 5)
    got = run(X, rows, dtype=jnp.bfloat16)
    assert got.dtype == np.float32
    # Eight bits, in five steps of slope up to 3.4, where small singular values are rounded most.
    np.testing.assert_allclose(got, expected(X, rows), atol=0.1)
    assert np.max(np.abs(got - expected(X, rows))) > 1e-4
    complex_one = run(X + 1j * X[::-1], rows, dtype=jnp.bfloat16)
    assert complex_one.dtype == np.complex64


def test_products_are_on_the_smaller_side_and_few():
    def sizes(shape, **settings):
        X = jax.ShapeDtypeStruct(shape, jnp.float32)
        rows = coefficients("muon", 5)
        program = jax.make_jaxpr(lambda X: orthogonal.orthogonalize(X, rows, **settings))(X)
        names = [e.outvars[0].aval.shape for e in program.eqns if "dot" in str(e.primitive)]
        return {shape: names.count(shape) for shape in set(names)}

    if jax.default_backend() == "cpu":
        assert sizes((32, 8)) == {(8, 8): 18, (32, 8): 1}
        assert sizes((8, 32)) == sizes((32, 8))
    assert sizes((9, 8)) == {(8, 8): 10, (9, 8): 5}
    assert sizes((32, 8), dtype=jnp.bfloat16) == {(8, 8): 10, (32, 8): 5}
