"""Eigenvalue corrections against the diagonal of the dense curvature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron.kernels import ekfac, kfac

RTOL = 1e-10  # of float64 on small, well conditioned problems


@pytest.fixture(autouse=True)
def _x64(x64):
    """All of it is in float64."""


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def basis(size, seed=0):
    return np.linalg.qr(draw(size, size, seed=seed))[0]


def curvature(a, g):
    """`(1/N) Σ_v Σ_n vec(Σ_s a gᵀ) vec(Σ_s a gᵀ)ᵀ` of one block [in·out, in·out]."""
    gradients = np.einsum("nsi,vnso->vnio", a, g)
    flat = gradients.reshape(-1, a.shape[-1] * g.shape[-1])
    return flat.T @ flat / a.shape[0]


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("bases", ["both", "none", "input", "output"])
def test_eigenvalues_are_the_diagonal_of_the_curvature(positions, bases):
    a, g = draw(2, 4, positions, 5), draw(3, 2, 4, positions, 6, seed=1)
    qa = np.stack([basis(5, s) for s in (1, 2)]) if bases in ("both", "input") else None
    qg = np.stack([basis(6, s) for s in (3, 4)]) if bases in ("both", "output") else None
    actual = jax.jit(ekfac.eigenvalues)(a, g, qa, qg)
    for b in range(2):
        q = np.kron(np.eye(5) if qa is None else qa[b], np.eye(6) if qg is None else qg[b])
        expected = np.diag(q.T @ curvature(a[b], g[:, b]) @ q).reshape(5, 6)
        np.testing.assert_allclose(actual[b], expected, rtol=RTOL)


def test_no_other_diagonal_in_the_basis_is_nearer():
    a, g = draw(1, 4, 3, 3), draw(2, 1, 4, 3, 2, seed=1)
    A, G = kfac.second_moments(jnp.asarray(a), jnp.asarray(g))
    (qa, va), (qg, vg) = (kfac.eigenbasis(m[0]) for m in (A, G))
    values = np.asarray(ekfac.eigenvalues(a, g, qa[None], qg[None])[0]).ravel()
    exact, q = curvature(a[0], g[:, 0]), np.kron(qa, qg)
    of_kfac = np.kron(va, vg)

    def distance(diagonal):
        return np.sum((exact - q * diagonal @ q.T) ** 2)

    gap = np.sum((of_kfac - values) ** 2)
    np.testing.assert_allclose(distance(of_kfac), distance(values) + gap, rtol=RTOL)
    np.testing.assert_allclose(values.sum(), np.trace(exact), rtol=RTOL)
    assert gap > 1e-3 * np.sum(exact**2)  # the correction is one


@pytest.mark.parametrize("positions", [1, 4])
def test_values_of_a_table_are_those_of_one_hot_inputs(positions):
    rows = np.random.default_rng(0).integers(0, 6, size=(2, 5, positions, 1))  # 5 is beyond
    g = draw(3, 2, 5, positions, 4, seed=1)
    qg = np.stack([basis(4, s) for s in (3, 4)])
    actual = jax.jit(ekfac.table_eigenvalues, static_argnums=2)(rows, g, 5, qg)
    expected = ekfac.eigenvalues(np.eye(6)[rows[..., 0]][..., :5], g, None, qg)
    np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=1e-12)


def test_a_change_of_basis_carries_values_over():
    values = np.abs(draw(5, 3))
    old, new = (basis(5, 1), basis(3, 2)), (basis(5, 3), basis(3, 4))
    overlaps = [n.T @ o for n, o in zip(new, old, strict=True)]
    q, r = np.kron(*old), np.kron(*new)
    dense = q * values.ravel() @ q.T
    expected = np.diag(r.T @ dense @ r).reshape(5, 3)
    np.testing.assert_allclose(ekfac.carried_over(values, *overlaps), expected, rtol=RTOL)
    np.testing.assert_allclose(ekfac.carried_over(values, None, None), values)
    same = [o.T @ o for o in old]
    np.testing.assert_allclose(ekfac.carried_over(values, *same), values, rtol=RTOL)
