"""The nearest Kronecker product against the singular value decomposition of the rearrangement."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron.kernels import kfac, kfoc


@pytest.fixture(autouse=True)
def _x64(x64):
    """All of it is in float64."""


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def curvature(a, g):
    gradients = np.einsum("nsi,vnso->vnio", a, g)
    flat = gradients.reshape(-1, a.shape[-1] * g.shape[-1])
    return flat.T @ flat / a.shape[0]


def singular_values(matrix, d_in, d_out):
    blocks = matrix.reshape(d_in, d_out, d_in, d_out).transpose(0, 2, 1, 3)
    return np.linalg.svd(blocks.reshape(d_in**2, d_out**2), compute_uv=False)


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("columns", [1, 2])
def test_the_residual_is_that_of_the_best_rank_one(positions, columns):
    a, g = draw(7, positions, 4), draw(columns, 7, positions, 3, seed=1)
    # The norm is quadratic in the error of the factors: this leaves 1e-8 of them.
    A, G = jax.jit(kfoc.factors, static_argnames=("tolerance", "max_iterations"))(
        a, g, tolerance=1e-15, max_iterations=2000
    )
    exact = curvature(a, g)
    residual = np.sum((exact - np.kron(A, G)) ** 2)
    np.testing.assert_allclose(residual, np.sum(singular_values(exact, 4, 3)[1:] ** 2), rtol=1e-10)
    A_kfac, G_kfac = kfac.second_moments(jnp.asarray(a)[None], jnp.asarray(g)[:, None])
    assert residual < np.sum((exact - np.kron(A_kfac[0], G_kfac[0])) ** 2)
    for factor in (A, G):
        assert np.linalg.eigvalsh(factor).min() > -1e-12
        np.testing.assert_allclose(factor, factor.T, atol=1e-12)


def test_a_single_example_is_exact():
    a, g = draw(1, 1, 4), draw(2, 1, 1, 3, seed=1)
    np.testing.assert_allclose(np.kron(*kfoc.factors(a, g)), curvature(a, g), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e18])
def test_scales_far_from_one(scale):
    a, g = (jnp.asarray(x, jnp.float32) for x in (draw(5, 2, 3), draw(1, 5, 2, 4, seed=1)))
    A, G = kfoc.factors(a, scale * g)
    assert np.isfinite(A).all()
    assert np.isfinite(G).all()
    if scale == 0:
        assert not np.any(A)
        return
    plain = np.kron(*kfoc.factors(a, g))
    product = np.kron(np.asarray(A, np.float64), np.asarray(G, np.float64)) / np.float64(scale) ** 2
    if scale > 1:  # squares of 1e-25 are below float32
        np.testing.assert_allclose(product, plain, rtol=1e-3, atol=1e-3 * np.abs(plain).max())


@pytest.mark.parametrize("columns", [1, 2])
def test_a_table_is_the_best_with_a_diagonal_input_factor(columns):
    indices = np.random.default_rng(0).integers(0, 6, size=(9, 4, 1))  # the last is beyond
    g = draw(columns, 9, 4, 3)
    settings = {"length": 5, "tolerance": 1e-15, "max_iterations": 2000}
    A, G = kfoc.factors(jnp.asarray(indices), jnp.asarray(g), **settings)
    exact = curvature(np.eye(6)[indices[..., 0]][..., :5], g)
    # What is off the diagonal of A is out of reach; the rest is one singular value problem.
    blocks = exact.reshape(5, 3, 5, 3)
    diagonal = np.stack([blocks[i, :, i].ravel() for i in range(5)])
    values = np.linalg.svd(diagonal, compute_uv=False)
    beyond = np.sum(exact**2) - np.sum(diagonal**2)
    residual = np.sum((exact - np.kron(np.diag(A), G)) ** 2)
    np.testing.assert_allclose(residual, beyond + np.sum(values[1:] ** 2), rtol=1e-10)
