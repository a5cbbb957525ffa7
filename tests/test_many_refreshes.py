"""Bases that are followed by matrix products stay orthonormal, however often they are refreshed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_kron as ok

REFRESHES = 10_000
SHAPE = (24, 8)
SETTINGS = {"refresh_every": 1, "momentum": None, "outlier_clip": None}


def by_soap():
    tx = ok.scale_by_soap(**SETTINGS)
    return tx, tx.update, lambda stack: stack.bases


def by_ekfac():
    """Of gradients that two examples gave, each a row of inputs times one of output-gradients."""
    layer = ok.Layer("dense", kernel="")
    tx = ok.scale_by_ekfac(
        layers=[layer], correct_every=REFRESHES, norm_constraint=None, **SETTINGS
    )

    def update(gradient, state):
        tap = ok.Tap(gradient[:, :2].T, gradient[:2])
        return tx.update(gradient, state, taps=ok.Taps({"dense": tap}))

    return tx, update, lambda stack: (stack.inverse.input_basis, stack.inverse.output_basis)


@pytest.mark.parametrize("make", [by_soap, by_ekfac])
def test_ten_thousand_refreshes_leave_bases_orthonormal(make):
    """Of gradients of low rank, whose lengths change by orders of magnitude: so bases jump."""
    tx, update, bases_of = make()

    def step(state, key):
        keys = jax.random.split(key, 3)
        left, right = (jax.random.normal(k, (d, 3)) for k, d in zip(keys, SHAPE, strict=False))
        _, state = update(jnp.exp(3 * jax.random.normal(keys[2])) * left @ right.T, state)
        return state, None

    keys = jax.random.split(jax.random.key(0), REFRESHES)
    state = jax.jit(lambda keys: jax.lax.scan(step, tx.init(jnp.zeros(SHAPE)), keys)[0])(keys)
    assert int(state.refreshes) == REFRESHES
    assert int(state.failed_refreshes) == 0
    (stack,) = state.stacks.values()
    for Q in bases_of(stack):
        Q = np.asarray(Q[0], np.float64)
        np.testing.assert_allclose(Q.T @ Q, np.eye(len(Q)), atol=1e-5)
