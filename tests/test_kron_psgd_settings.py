"""Settings at the edges of what they allow, and states that outlive a change of settings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_kron as ok
from optax_kron.kernels import psgd
from optax_kron.transforms import kron_psgd

PARAMS = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}


def run(tx, grads, steps, state=None):
    state = tx.init(grads) if state is None else state

    def step(state, _):
        updates, state = tx.update(grads, state)
        return state, optax.tree.norm(updates)

    return jax.jit(lambda state: jax.lax.scan(step, state, length=steps))(state)


@pytest.mark.parametrize("impl", ["rbg", "threefry2x32"])
def test_any_default_prng_implementation(impl):
    old = jax.config.jax_default_prng_impl
    jax.config.update("jax_default_prng_impl", impl)
    try:
        tx = ok.scale_by_kron_psgd()
        updates, _ = tx.update(PARAMS, tx.init(PARAMS))
    finally:
        jax.config.update("jax_default_prng_impl", old)
    assert np.isfinite(optax.tree.norm(updates))


@pytest.mark.parametrize("seed", [-1, 2**32, 2**40 + 3])
def test_any_integer_is_a_seed(seed):
    ok.scale_by_kron_psgd(seed=seed).init(PARAMS)


@pytest.mark.parametrize("geometry", psgd.GEOMETRIES)
def test_without_damping_a_slice_of_zeros_does_not_stop_its_parameter(geometry):
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32).at[0].set(0)
    tx = ok.scale_by_kron_psgd(damping=0.0, geometry=geometry, update_probability=1.0)
    state, norms = run(tx, grads, 6000)
    assert np.all(np.asarray(norms) > 0)
    assert state.failed_refreshes == 0


@pytest.mark.parametrize(
    ("geometry", "size"), [(x, 1.0) for x in psgd.GEOMETRIES] + [("EQ", 1e-6), ("EQ", 1e6)]
)
def test_along_directions_without_a_gradient_damping_bounds_the_factors(geometry, size):
    left, _, right = np.linalg.svd(np.random.default_rng(0).normal(size=(6, 4)))
    grads = size * jnp.outer(left[:, 0], right[0])  # the same at every step
    unseen = jnp.outer(left[:, 1], right[1])

    @jax.jit
    def largest(relative_damping):
        tx = ok.scale_by_kron_psgd(
            geometry=geometry,
            damping=0.0,
            relative_damping=relative_damping,
            update_probability=1.0,
            cache_preconditioner=False,
        )
        (stack,) = run(tx, grads, 3000)[0].stacks.values()
        update = psgd.precondition([q[0] for q in stack.factors], unseen, geometry=geometry)
        return size / grads.size**0.5 * optax.tree.norm(update)  # in units of whitened gradients

    # That of white noise alone, 1 / relative_damping, but for the noise of the fit, largest in EQ.
    assert largest(0.01) < 500
    assert largest(0.1) < 30
    assert largest(0.0) > 4 * largest(0.01)


@pytest.mark.parametrize("geometry", psgd.GEOMETRIES)
def test_the_first_scale_is_that_of_p_in_every_geometry(geometry):
    tx = ok.scale_by_kron_psgd(init_scale=3.0, geometry=geometry, rms_clip=None, momentum=None)
    (stack,) = tx.init(PARAMS["kernel"]).stacks.values()
    update = psgd.precondition([q[0] for q in stack.factors], PARAMS["kernel"], geometry=geometry)
    np.testing.assert_allclose(update, 9 * PARAMS["kernel"], rtol=1e-5)


@pytest.mark.parametrize("geometry", psgd.GEOMETRIES)
def test_a_first_gradient_scaled_down_later_is_as_if_it_had_come_so(geometry):
    """Factors and bounds, once the usual size of the gradients is known."""
    tx = ok.scale_by_kron_psgd(geometry=geometry, cache_preconditioner=False)
    method = kron_psgd.KronPsgd(
        owner="kron_psgd",
        geometry=geometry,
        criterion="whiten_momentum",
        precond_lr=0.7,
        update_probability=1.0,
        damping=1e-9,
        relative_damping=0.01,
        init_scale=None,
        has_init_scale=False,
        cache=False,
        outlier_clip=None,
        precision=None,
        seed=0,
    )
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    (long,), (short,) = (
        tx.update(size * grads, tx.init(grads))[1].stacks.values() for size in (1.0, 2.0**-8)
    )
    rescaled = method.rescale(long, jnp.full(1, 2.0**-8))
    for x, y in zip(
        (*rescaled.factors, rescaled.bounds), (*short.factors, short.bounds), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * np.max(np.abs(y)))


def test_float16_factors_do_not_overflow_between_moves():
    grads = jnp.arange(1, 9) * 1e-6
    tx = ok.scale_by_kron_psgd(
        factor_dtype=jnp.float16, update_probability=0.5, cache_preconditioner=True
    )
    _, norms = run(tx, grads, 6)
    assert np.all(np.asarray(norms) > 0.1)


def test_the_cache_can_be_switched_off_with_a_state_that_has_one():
    grads = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)}
    with_cache = ok.scale_by_kron_psgd(update_probability=0.25, cache_preconditioner=True)
    without = ok.scale_by_kron_psgd(update_probability=0.25, cache_preconditioner=False)
    state, _ = run(with_cache, grads, 5)
    _, expected = run(with_cache, grads, 5, state)
    _, norms = run(without, grads, 5, state)
    np.testing.assert_allclose(norms, expected, rtol=1e-4)


@pytest.mark.parametrize("probability", [1.0, 0.9, 0.6, 0.4, 1 / 3, 0.03, 0.0])
def test_update_probability_is_the_share_of_steps_that_move_the_factors(probability):
    tx = ok.scale_by_kron_psgd(update_probability=probability)
    state, _ = run(tx, PARAMS, 300)
    # One move more at most: the first step always moves.
    assert 0 <= state.refreshes - 300 * probability <= 1.01


def test_inject_hyperparams_with_complex_parameters():
    params = {"a": jnp.ones((3, 2), jnp.complex64)}
    optax.inject_hyperparams(ok.kron_psgd)(1e-3).init(params)


@pytest.mark.parametrize("wrap", ["masked", "partition", "map_params"])
def test_a_tree_of_stacked_axes_inside_wrappers(wrap):
    inner = ok.scale_by_kron_psgd(blocking=ok.Blocking(stacked_axes={"kernel": 1, "bias": 0}))
    if wrap == "masked":
        tx = optax.masked(inner, {"kernel": True, "bias": False})
    elif wrap == "partition":
        tx = optax.partition({"a": inner, "b": optax.sgd(1.0)}, {"kernel": "a", "bias": "b"})
    else:
        tx = inner
    state = tx.init(PARAMS)
    tx.update(PARAMS, state, PARAMS)
    optax.tree.map_params(tx, lambda x: x, state)


def test_stacked_axes_that_lack_a_parameter():
    tx = ok.scale_by_kron_psgd(blocking=ok.Blocking(stacked_axes={"kernel": 1}))
    with pytest.raises(ValueError, match=r"no number at \['bias'\], only at \['kernel'\]"):
        tx.init(PARAMS)


@pytest.mark.parametrize(
    "name",
    [
        "momentum",
        "damping",
        "relative_damping",
        "rms_clip",
        "max_abs_clip",
        "init_scale",
        "weight_decay",
    ],
)
def test_a_schedule_where_none_is_taken(name):
    with pytest.raises(ValueError, match=f"{name} must be a number"):
        ok.kron_psgd(1e-3, **{name: lambda count: 0.5})
