"""State of 16 bits: small changes add up if rounded stochastically, and are lost if not."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_kron as ok

HALF = {"factor_dtype": jnp.bfloat16, "momentum_dtype": jnp.bfloat16}
STOCHASTIC = {**HALF, "rounding": "stochastic"}
SHAPE = (6, 4)
PARAMS = {"a": jnp.zeros(SHAPE), "b": jnp.zeros(SHAPE)}
LAYERS = [ok.Layer("a", kernel="a"), ok.Layer("b", kernel="b")]
# Seldom refreshed, as what is made of the averages is not looked at.
SLOW = {"momentum": 0.99, "decay": 0.99, "refresh_every": 500}
OF_LAYERS = {**SLOW, "layers": LAYERS, "bias_correction": False}
MAKE = {
    "shampoo": functools.partial(ok.scale_by_shampoo, **SLOW),
    "soap": functools.partial(ok.scale_by_soap, **SLOW),
    "kron_psgd": functools.partial(ok.scale_by_kron_psgd, momentum=0.99, precond_lr=3e-4),
    "kfac": functools.partial(ok.scale_by_kfac, **OF_LAYERS),
    "ekfac": functools.partial(ok.scale_by_ekfac, **OF_LAYERS, basis="power"),
}
every_optimizer = pytest.mark.parametrize("name", MAKE)


def taps_of(x):
    """Of one example for each layer, whose inputs and gradients are x everywhere."""
    inputs, outputs = (jnp.broadcast_to(x, (1, d)) for d in SHAPE)
    return ok.Taps({name: ok.Tap(inputs, outputs) for name in PARAMS})


def run(name, steps=600, **settings):
    """The state after a gradient of ones and many of 1.2, and the taps of such, where it has any.

    A step of an average is 0.01 of what is left of 0.2, at first 2⁻⁹ of the average itself.
    """
    tx = MAKE[name](**settings)

    def step(state, x):
        grads = jax.tree.map(lambda p: jnp.full_like(p, x), PARAMS)
        extra = {"taps": taps_of(x)} if "kfac" in name else {}
        return tx.update(grads, state, **extra)[1], None

    sizes = jnp.where(jnp.arange(steps) == 0, 1.0, 1.2)
    return jax.jit(lambda state: jax.lax.scan(step, state, sizes))(tx.init(PARAMS))[0]


def check_mean(x, expected):
    """In the mean over a stack; single numbers err by 2 %, independently."""
    assert x.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.mean(np.asarray(x, np.float64)), expected, rtol=5e-3)


@pytest.mark.parametrize("name", ["shampoo", "soap", "kfac", "ekfac"])
def test_small_changes_add_up(name):
    state = run(name, **STOCHASTIC)
    (stack,) = state.stacks.values()
    if "kfac" in name:
        check_mean(stack.input_factor, 1.44)
        check_mean(stack.output_factor, 1.44)
    else:
        check_mean(state.momentum["6x4"], 1.2)
        check_mean(stack.statistics[0], 4 * 1.44)
        check_mean(stack.statistics[1], 6 * 1.44)
        # What is symmetric is rounded alike on both sides.
        np.testing.assert_array_equal(stack.statistics[0], stack.statistics[0].mT)
    if name == "ekfac":  # there is one direction, in which the gradients' squared norms are
        check_mean(jnp.max(stack.inverse.values, (1, 2)), 24 * 1.2**4)


def test_factors_of_psgd_move_by_less_than_half_of_their_last_bit():
    def mean_diagonal(state):
        factors = state.stacks["6x4"].factors
        wide = [np.asarray(q, np.float64) for q in factors]
        return np.mean([q.trace(axis1=1, axis2=2).mean() / q.shape[1] for q in wide])

    found, exact = (mean_diagonal(run("kron_psgd", **own)) for own in (STOCHASTIC, {}))
    # They start at one. Of 20 random walks, 5e-3 each, the mean errs by 1e-3.
    assert 0.5 * (1 - exact) < 1 - found < 2 * (1 - exact)


def test_roundings_are_those_of_the_seed():
    """And of a program, compiled once, that takes the state over; and of a saved state."""
    tx = MAKE["shampoo"](**STOCHASTIC)
    params = {"kernel": jnp.ones(SHAPE), "twin": jnp.ones(SHAPE)}
    grads = jax.tree.map(lambda x: x / 3, params)
    eager, state = tx.init(params), tx.init(params)
    update = jax.jit(tx.update, donate_argnums=1)
    for _ in range(2):
        _, eager = tx.update(grads, eager)
        _, state = update(grads, state)
    assert update._cache_size() == 1
    chex.assert_trees_all_equal(state, eager)
    leaves, treedef = jax.tree.flatten(state)
    assert all(type(x) is type(leaves[0]) and x.dtype.kind in "biufV" for x in leaves)
    saved = treedef.unflatten([np.array(x) for x in leaves])
    _, eager = tx.update(grads, eager)
    chex.assert_trees_all_equal(tx.update(grads, saved)[1], eager)
    other = MAKE["shampoo"](**STOCHASTIC, seed=1)
    _, another = other.update(grads, other.init(params))
    _, first = tx.update(grads, tx.init(params))
    momentum, different = first.momentum["6x4"], another.momentum["6x4"]
    assert jnp.any(momentum != different)
    assert jnp.any(momentum[0] != momentum[1])  # blocks that are alike are rounded independently


@every_optimizer
def test_a_key_is_all_that_is_added_and_only_if_asked(name):
    def avals(state):
        return jax.tree.map(lambda x: (x.shape, x.dtype), state._replace(key=None))

    default, nearest, stochastic = (
        jax.eval_shape(MAKE[name](**own).init, PARAMS)
        for own in ({}, {**HALF, "rounding": "nearest"}, STOCHASTIC)
    )
    assert (default.key is None) == (nearest.key is None) == (name != "kron_psgd")
    assert stochastic.key.shape == (2,)
    assert avals(nearest) == avals(stochastic)


def test_what_overflows_in_16_bits_is_dropped_and_counted():
    tx = MAKE["shampoo"](factor_dtype=jnp.float16, rounding="stochastic")
    big = {"a": jnp.full(SHAPE, 1e4), "b": jnp.ones(SHAPE)}
    _, state = tx.update(big, tx.init(PARAMS))
    chex.assert_tree_all_finite(state)
    assert state.failed_refreshes == 1
    np.testing.assert_array_equal(state.stacks["6x4"].initialized, [False, True])


@every_optimizer
def test_bad_settings_are_named(name):
    with pytest.raises(
        ValueError, match=r"rounding must be one of nearest, stochastic; got 'up'\."
    ):
        MAKE[name](rounding="up")
    with pytest.raises(ValueError, match=r"seed must be an integer or a PRNG key; got 0\.5"):
        MAKE[name](seed=0.5)
