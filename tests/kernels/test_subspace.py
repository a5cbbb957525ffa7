"""Subspace iteration of matrix products, beside LAPACK's QR decomposition in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron.kernels import positive, subspace

# Real and complex, alone in a panel and in several of unequal widths.
SIZES = (1, 2, 3, 31, 33, 130, 257)


@pytest.fixture(autouse=True)
def nothing_is_promoted(strict_promotion):
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(params=["cpu", "accelerator", "coarse accelerator"])
def arithmetic(request, monkeypatch):
    """What is done on a CPU; or on an accelerator, also with products of three digits."""
    if request.param != "cpu":
        monkeypatch.setattr(
            subspace,
            "_exact_rows",
            lambda rows, panels: subspace._polished_rows(rows, panels, None),
        )
    if request.param == "coarse accelerator":

        def product(x, y, precision):
            del precision
            narrow = jnp.bfloat16 if not jnp.iscomplexobj(x) else jnp.complex64
            x, y = (z.astype(narrow).astype(z.dtype) for z in (x, y))
            return jnp.matmul(x, y)

        monkeypatch.setattr(subspace, "_product", product)
    return request.param


def unitary(rng, d, dtype=np.float64):
    x = rng.standard_normal((d, d))
    if np.issubdtype(dtype, np.complexfloating):
        x = x + 1j * rng.standard_normal((d, d))
    return np.linalg.qr(x)[0]


def orthonormality_error(bases):
    Q = np.asarray(bases).astype(np.complex128)
    return np.max(np.abs(np.swapaxes(Q, -1, -2).conj() @ Q - np.eye(Q.shape[-1])))


@functools.cache
def compiled(arithmetic):
    """One program for each, as what is compiled does not know what it was made under."""
    return jax.jit(lambda *stacks: subspace.follow(*stacks))


def follow(Q, S, arithmetic="cpu"):
    (one,) = compiled(arithmetic)([jnp.asarray(Q)], [jnp.asarray(S)])
    return jax.tree.map(np.asarray, one)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("arithmetic", ["cpu", "accelerator"], indirect=True)
def test_a_step_is_that_of_a_qr_decomposition(d, dtype, arithmetic):
    rng = np.random.default_rng(d)
    U = unitary(rng, d, np.dtype(dtype))
    S = (U * np.geomspace(1, 1e-2, d)) @ U.conj().T
    noise = rng.standard_normal((d, d)) / d**0.5
    Q = np.linalg.qr(U + 0.02 * noise)[0]
    Q = Q[:, rng.permutation(d)]
    Q, S = Q.astype(dtype), S.astype(dtype)
    wide = np.result_type(dtype, np.float64)
    product = S.astype(wide) @ Q
    order = np.argsort(-np.sum(Q.conj() * product, axis=0).real, kind="stable")
    expected = np.linalg.qr(product[:, order])[0]

    one = follow(Q[None], S[None], arithmetic)
    assert one.bases.dtype == dtype
    assert np.all(one.usable)
    np.testing.assert_array_equal(one.order[0], order)
    # Up to the signs, or phases, of columns.
    overlap = np.sum(expected.conj() * one.bases[0], axis=0)
    # Rounding of the products, relative to the largest eigenvalue, beside one of 1e-2.
    tolerance = 300 * np.finfo(dtype).eps
    np.testing.assert_allclose(expected * overlap, one.bases[0], atol=tolerance)


def drifting(kind, rng, d):
    """What a statistic takes in at a step."""
    if kind == "rank one":
        x = rng.standard_normal((d, 1))
    elif kind == "ones":
        x = np.ones((d, 1))
    elif kind == "rank five":
        x = rng.standard_normal((d, 5))
    elif kind == "steep":  # eigenvalues from 1 to 1e-12
        x = np.geomspace(1, 1e-6, d)[:, None] * rng.standard_normal((d, d))
    elif kind == "jumps":
        x = 10.0 ** rng.integers(-6, 3) * rng.standard_normal((d, 3))
    else:  # some rows are dead
        x = (np.arange(d) % 3 > 0)[:, None] * rng.standard_normal((d, d))
    return (x @ x.T).astype(np.float32)


@pytest.mark.parametrize("kind", ["rank one", "ones", "rank five", "steep", "jumps", "dead rows"])
@pytest.mark.parametrize("d", [2, 3, 31, 400, 512])
def test_bases_of_statistics_without_full_rank_stay_orthonormal(d, kind, arithmetic):
    rng = np.random.default_rng(d)
    Q, S = np.eye(d, dtype=np.float32)[None], np.zeros((1, d, d), np.float32)
    for _ in range(6):
        S = 0.95 * S + 0.05 * drifting(kind, rng, d)
        one = follow(Q, S, arithmetic)
        assert np.all(one.usable)
        assert orthonormality_error(one.bases) < 1e-5
        Q = one.bases


@pytest.mark.parametrize("multiple", [0.0, 1e-30, 3.0, 1e30])
@pytest.mark.parametrize("d", [1, 2, 40])
def test_a_basis_stays_where_there_is_no_direction(d, multiple):
    Q = unitary(np.random.default_rng(0), d).astype(np.float32)
    one = follow(Q[None], multiple * np.eye(d, dtype=np.float32)[None])
    # Of a multiple of the identity all Rayleigh quotients are equal but for rounding.
    np.testing.assert_allclose(one.bases[0], Q[:, one.order[0]], atol=2e-6)


def test_directions_without_curvature_keep_their_columns():
    rng = np.random.default_rng(0)
    Q = unitary(rng, 20).astype(np.float32)
    x = rng.standard_normal((20, 1)).astype(np.float32)
    x -= Q[:, 5:] @ (Q[:, 5:].T @ x)  # in the span of the first five columns
    one = follow(Q[None], (x @ x.T)[None])
    np.testing.assert_allclose(np.sort(one.order[0][-15:]), range(5, 20))
    kept = np.sum(np.asarray(one.bases[0]) * Q[:, one.order[0]], axis=0)[5:]
    # What holds them is as much as the rounding error of one number of S Q.
    np.testing.assert_allclose(kept, 1, atol=5e-2)


def test_a_thousand_refreshes_leave_bases_orthonormal():
    def step(carry, key):
        bases, statistics = carry
        new = []
        for S in statistics:
            x = jax.random.normal(key, (1, len(S[0]), 3)) * jnp.exp(
                jax.random.normal(key, (1, 1, 1))
            )
            new.append(0.95 * S + 0.05 * x @ x.mT)
        done = subspace.follow(bases, new)
        usable = jnp.all(jnp.concatenate([one.usable for one in done]))
        return ([one.bases for one in done], new), usable

    start = [jnp.eye(d)[None] for d in (9, 24)], [jnp.zeros((1, d, d)) for d in (9, 24)]
    keys = jax.random.split(jax.random.key(0), 1000)
    (bases, _), usable = jax.jit(lambda c: jax.lax.scan(step, c, keys))(start)
    assert np.all(usable)
    for Q in bases:
        assert orthonormality_error(Q) < 1e-5


@pytest.mark.usefixtures("x64")
def test_several_steps_are_one_after_the_other():
    rng = np.random.default_rng(0)
    stacks = []
    for count, d in ((2, 5), (1, 150)):
        x = rng.standard_normal((count, d, d))
        stacks.append((np.stack([unitary(rng, d) for _ in range(count)]), x @ x.swapaxes(1, 2)))
    bases, matrices = ([jnp.asarray(x) for x in y] for y in zip(*stacks, strict=True))
    together = jax.jit(lambda *stacks: subspace.follow(*stacks, steps=3))(bases, matrices)
    orders = [np.tile(np.arange(Q.shape[1]), (len(Q), 1)) for Q in bases]
    for _ in range(3):
        done = compiled("cpu")(bases, matrices)
        bases = [one.bases for one in done]
        orders = [
            np.take_along_axis(order, np.asarray(one.order), axis=1)
            for order, one in zip(orders, done, strict=True)
        ]
    for one, Q, order in zip(together, bases, orders, strict=True):
        np.testing.assert_allclose(one.bases, Q, atol=1e-9)
        np.testing.assert_array_equal(one.order, order)
        assert np.all(one.usable)


def test_what_fails_at_one_of_several_steps_is_told():
    S = jnp.full((1, 3, 3), jnp.nan)
    (one,) = subspace.follow([jnp.eye(3)[None]], [S], steps=2)
    assert not one.usable[0]


def test_it_finds_the_eigenbasis():
    rng = np.random.default_rng(0)
    values = 2.0 ** -np.arange(8)
    U = unitary(rng, 8)
    S = ((U * values) @ U.T).astype(np.float32)[None]
    Q = np.eye(8, dtype=np.float32)[None]
    for _ in range(40):
        Q = follow(Q, S).bases
    np.testing.assert_allclose(Q[0].T @ S[0] @ Q[0], np.diag(values), atol=1e-6)


def test_what_is_not_finite_is_told_and_stays_in_its_block():
    S = np.stack([np.full((40, 40), np.nan), np.diag(np.arange(40.0))]).astype(np.float32)
    one = follow(np.tile(np.eye(40, dtype=np.float32), (2, 1, 1)), S)
    np.testing.assert_array_equal(one.usable, [False, True])
    np.testing.assert_allclose(np.abs(one.bases[1]), np.eye(40)[::-1].T, atol=1e-6)


def test_nothing_of_it_calls_lapack():
    stacks = [jnp.ones((2, d, d)) for d in (3, 150)]
    text = jax.jit(subspace.follow).lower(stacks, stacks).compile().as_text()
    assert 'custom_call_target="lapack' not in text


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_it_has_a_derivative_backwards(dtype):
    rng = np.random.default_rng(0)
    Q, x, weights = (jnp.asarray(unitary(rng, 5, dtype))[None] for _ in range(3))
    S = (x * np.arange(1, 6, dtype=dtype)[None, None]) @ x.conj().mT
    slope = jnp.asarray(np.diag(np.arange(5)), dtype)[None]

    @jax.jit
    def loss(t):
        (one,) = subspace.follow([Q], [S + t.astype(dtype) * slope])
        return jnp.sum((weights * one.bases).real)

    t, step = jnp.zeros([]), 1e-5
    difference = (loss(t + step) - loss(t - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(loss)(t), difference, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("d", [1, 2, 30, 128])
def test_inverse_cholesky_factors(d, dtype):
    rng = np.random.default_rng(d)
    U = unitary(rng, d, dtype)
    M = (U * np.geomspace(1, 1e-3, d)) @ U.conj().T
    factor = positive.inverse_factors(jnp.asarray(M)[None], jnp.full(1, 0.5))
    expected = np.linalg.inv(np.linalg.cholesky(M + 0.5 * np.eye(d)))
    np.testing.assert_allclose(factor[0], expected, atol=1e-12)
