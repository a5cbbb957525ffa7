"""Inverse roots, and eigenbases that are followed by power iteration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron.kernels import coupled, eigenbases, roots
from tests.kernels.problems import random
from tests.reference import shampoo as reference


def unitary(d, dtype=np.float64, seed=0):
    return np.linalg.qr(random(np.random.default_rng((d, seed)), (d, d), dtype))[0]


def hermitian(values, dtype):
    Q = unitary(len(values), np.complex128 if np.issubdtype(dtype, np.complexfloating) else float)
    S = ((Q * values) @ Q.conj().T).astype(dtype)
    return (S + S.conj().T) / 2


SPECTRA = {
    "geometric": lambda d, cond: np.geomspace(1, 1 / cond, d),
    "spike": lambda d, cond: np.r_[1, np.full(d - 1, 1 / cond)],
    "one small": lambda d, cond: np.r_[np.ones(d - 1), 1 / cond],
}


@pytest.mark.parametrize("x64", [True, False])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("method", roots.METHODS)
def test_powers_of_a_root_invert_the_matrix(method, spectrum, x64):
    with jax.enable_x64(x64):
        for dtype in (np.float64, np.complex128) if x64 else (np.float32, np.complex64):
            for order, d in ((1, 5), (2, 64), (3, 5), (4, 64), (8, 5)):
                find = jax.jit(lambda S, p=order: roots.inverse_root(S, p, 0.0, method=method))
                for condition in (1e2, 1e6):
                    S = hermitian(SPECTRA[spectrum](d, condition), dtype)
                    X, residual = find(jnp.asarray(S))
                    assert X.dtype == dtype
                    powered = np.linalg.matrix_power(reference.psgd.wide(X), order)
                    error = np.linalg.norm(powered @ reference.psgd.wide(S) - np.eye(d), 2)
                    # A root in float32 is only right to its own rounding: cond · eps, and some.
                    assert error <= (1e-7 if x64 else 1e-3 if condition == 1e2 else 0.1), (order, d)
                    # Products are in float32, and end, where that is enough.
                    assert residual <= (1e-7 if x64 or method == "eigh" else 2e-3)


@pytest.mark.parametrize("method", roots.METHODS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_damping_is_relative_to_the_largest_eigenvalue(method, scale):
    S = hermitian(np.r_[3.0, 1.0, 0.5, 0.0], np.float64) * scale
    X, _ = roots.inverse_root(jnp.asarray(S), 4, 1e-3, method=method)
    # Newton's method estimates the largest eigenvalue, to 1 %.
    np.testing.assert_allclose(X, reference.power(S, -1 / 4, 1e-3), rtol=1e-2 / 4 + 1e-9)


def test_eigenvalues_that_rounding_made_negative_count_as_zero():
    values = np.array([1.0, 0.5, -1e-3])
    S = hermitian(values, np.float64)
    X, residual = roots.inverse_root(jnp.asarray(S), 4, 1e-6)
    Q = np.linalg.eigh(S)[1][:, ::-1]
    np.testing.assert_allclose(X, (Q * (np.maximum(values, 0) + 1e-6) ** -0.25) @ Q.T, rtol=1e-9)
    assert residual < 1e-9
    _, residual = roots.inverse_root(jnp.asarray(hermitian([1, 0.5, -0.3], np.float64)), 4, 1e-6)
    assert residual > 0.5


@pytest.mark.parametrize("method", roots.METHODS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_small_roots_and_those_of_diagonals(method, size):
    values = np.arange(1.0, size + 1)
    X, residual = roots.inverse_root(jnp.diag(values), 2, 0.0, method=method)
    np.testing.assert_allclose(X, np.diag(values**-0.5), atol=1e-12)
    x, r = roots.inverse_root(jnp.asarray(values), 2, 0.0, method=method)
    np.testing.assert_allclose(x, values**-0.5, atol=1e-12)
    assert max(residual, r) < 1e-12


@pytest.mark.parametrize("method", roots.METHODS)
@pytest.mark.parametrize("S", [np.zeros((3, 3)), np.full((3, 3), np.nan), np.zeros(3)], ids=str)
def test_what_has_no_root_shows_in_the_residual(method, S):
    _, residual = jax.jit(lambda S: roots.inverse_root(S, 4, 0.0, method=method))(jnp.asarray(S))
    assert not residual < 0.5


@pytest.mark.parametrize("method", roots.METHODS)
def test_roots_in_batches_and_branches_without_64_bits(method):
    with jax.enable_x64(False):
        S = jnp.stack([hermitian(np.geomspace(1, 1e-4, 6), np.float32)] * 3)

        def find(S):
            return jax.vmap(lambda S: roots.inverse_root(S, 4, 1e-6, method=method)[0])(S)

        direct = jax.jit(find)(S)
        branch = jax.jit(lambda S: jax.lax.cond(S[0, 0, 0] > 0, find, lambda S: S, S))(S)
        scanned, _ = jax.jit(lambda S: jax.lax.scan(lambda c, _: (find(S), None), S, length=2))(S)
        assert direct.dtype == branch.dtype == scanned.dtype == jnp.float32
        np.testing.assert_allclose(branch, direct, rtol=1e-6)
        np.testing.assert_allclose(scanned, direct, rtol=1e-6)


@pytest.mark.parametrize("condition", [10, 1e6])
@pytest.mark.parametrize("d", [17, 255, 257])
def test_roots_by_products_of_larger_matrices(d, condition):
    # Beyond 16 the largest eigenvalue is Lanczos's; 1e6 is done in float64.
    S = hermitian(np.geomspace(1, 1 / condition, d), np.float32)
    X, residual = jax.jit(lambda S: roots.inverse_root(S, 4, 0.0, method="newton"))(jnp.asarray(S))
    error = np.linalg.norm(np.linalg.matrix_power(np.asarray(X, float), 4) @ S - np.eye(d), 2)
    assert error <= (1e-3 if condition == 10 else 0.1)
    assert residual <= 2e-3


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("rank", [0, 2])
def test_rows_of_zeros_have_the_root_of_the_damping(scale, rank):
    # As of padding. They are exact, and do not make the condition number of the others large.
    S = np.zeros((5, 5), np.float32)
    S[:rank, :rank] = scale * hermitian(np.arange(1.0, rank + 1), np.float32) if rank else 0
    X, residual = roots.inverse_root(jnp.asarray(S), 4, 1e-3, method="newton")
    if not rank:
        assert not residual < 0.5
        return
    np.testing.assert_allclose(X, reference.power(S.astype(float), -1 / 4, 1e-3), rtol=1e-4)
    assert residual < 1e-3


@pytest.mark.parametrize("x64", [True, False])
def test_what_is_not_positive_has_no_root_by_products(x64):
    with jax.enable_x64(x64):
        S = hermitian(np.r_[np.ones(29), -0.01], np.float64 if x64 else np.float32)
        _, residual = jax.jit(lambda S: roots.inverse_root(S, 4, 1e-6, method="newton"))(
            jnp.asarray(S)
        )
        assert not residual < 0.5


def test_a_polynomial_takes_no_eigenvalue_beyond_where_it_is_meant_for():
    for order in (1, 2, 3, 4, 8):
        for least in (coupled.EASY.least, coupled.HARD.least, coupled.EXACT.least):
            for plain, left, right in coupled.polynomials(order, least)[1:]:
                x = np.geomspace(1e-9, 1.1, 2000)
                powers = np.stack([np.ones_like(x), x - 1, (x - 1) ** 2])
                q = plain @ powers + (left @ powers) * (right @ powers)
                assert np.all(q > 0)
                assert np.max(x * q**order) < 1.08


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("d", [1, 2, 5])
def test_an_eigenbasis_of_a_hermitian_matrix(d, dtype):
    S = hermitian(np.arange(1.0, d + 1), dtype)
    Q = eigenbases.descending(jnp.asarray(S))
    np.testing.assert_allclose(Q.conj().T @ Q, np.eye(d), atol=1e-12)
    np.testing.assert_allclose(Q.conj().T @ S @ Q, np.diag(np.arange(d, 0, -1.0)), atol=1e-12)
    values = eigenbases.rayleigh_quotients(Q, jnp.asarray(S))
    np.testing.assert_allclose(values, np.arange(d, 0, -1.0), atol=1e-12)


def test_a_hermitian_matrix_of_two_with_a_zero_corner():
    Q, values = eigenbases.hermitian_eigen(jnp.diag(jnp.array([1.0 + 0j, 2.0])))
    np.testing.assert_allclose(Q @ jnp.diag(values) @ Q.conj().T, np.diag([1, 2]), atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_power_iteration_finds_the_eigenbasis(dtype):
    values = np.array([8.0, 4.0, 2.0, 1.0])
    S = jnp.asarray(hermitian(values, dtype))
    Q = jnp.eye(4, dtype=dtype)
    for _ in range(60):
        Q, order = eigenbases.power_iteration(Q, S)
    np.testing.assert_array_equal(order, range(4))
    np.testing.assert_allclose(Q.conj().T @ S @ Q, np.diag(values), atol=1e-10)


def test_power_iteration_orders_the_columns_first():
    S = jnp.diag(jnp.array([1.0, 3.0, 2.0]))
    Q, order = eigenbases.power_iteration(jnp.eye(3), S)
    np.testing.assert_array_equal(order, [1, 2, 0])
    np.testing.assert_allclose(jnp.abs(Q), jnp.eye(3)[:, order], atol=1e-12)


@pytest.mark.parametrize("d", [1, 4])
def test_power_iteration_with_zero_keeps_the_basis(d):
    Q = jnp.asarray(unitary(d))
    new, order = eigenbases.power_iteration(Q, jnp.zeros((d, d)))
    np.testing.assert_array_equal(new, Q[:, order])


def test_matrices_of_similar_sizes_share_a_program_and_get_their_own_roots(x64):
    rng = np.random.default_rng(0)

    def gram(count, d):
        x = rng.standard_normal((count, d, d))
        return jnp.asarray(x @ x.swapaxes(1, 2))

    stacks = {"a": gram(2, 9), "b": gram(1, 7), "c": gram(1, 2), "d": gram(1, 9)}
    orders = {"a": 4, "b": 4, "c": 4, "d": 2}
    programs = []

    def find(S, order):
        programs.append((S.shape[0], order))
        return roots.inverse_root(S, order, 1e-3, method="newton")

    found = roots.together(stacks, orders, find)
    assert sorted(set(programs)) == [(2, 4), (9, 2), (9, 4)]
    for key, stack in stacks.items():
        made, residual = found[key]
        assert made.shape == stack.shape
        assert residual.shape == stack.shape[:1]
        for X, S in zip(made, stack, strict=True):
            expected = reference.power(np.asarray(S), -1 / orders[key], 1e-3)
            # The largest eigenvalue, which damping is relative to, is an estimate.
            np.testing.assert_allclose(X, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
