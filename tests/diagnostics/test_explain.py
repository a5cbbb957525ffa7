"""The cause of staged failures is named, and healthy runs are left alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_kron as ok

from .runs import batch, layers, params, run

BATCHES = tuple(batch(seed=i) for i in range(30))


def explained(done, tx, **more):
    """With all that a run can tell."""
    told = {name: done[name] for name in ("gradients", "updates", "losses")}
    return ok.diagnostics.explain(done["state"], done["params"], tx, **told, **more)


def spoilt(batches):
    """A NaN in every fifth batch, the last one among them."""
    return [
        (x.at[0, 0].set(jnp.nan), y) if i % 5 == 4 else (x, y) for i, (x, y) in enumerate(batches)
    ]


def with_dead_units():
    weights = params()
    weights["dense1"]["bias"] = jnp.full_like(weights["dense1"]["bias"], -100.0)
    return weights


# ------------------------------------------------------------------------------------ healthy runs

HEALTHY = {
    "kron_psgd": (lambda: ok.kron_psgd(3e-3), False),
    "kfac": (lambda: ok.kfac(0.1, layers=layers()), True),
    "soap": (lambda: ok.soap(3e-3), False),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_said_of_healthy_runs(name):
    make, with_taps = HEALTHY[name]
    tx = make()
    done = run(tx, params(), BATCHES, with_taps)
    assert done["losses"][-1] < done["losses"][0]
    told = explained(done, tx, batch=BATCHES[-1])
    assert not told, told
    assert str(told) == "Nothing looks wrong."
    assert not ok.diagnostics.explain(done["state"])


# -------------------------------------------------------------------------------- the staged ones


@pytest.mark.parametrize(
    ("make", "with_taps"),
    [
        (lambda: ok.kron_psgd(1.0), False),
        (lambda: ok.soap(3.0), False),
        (lambda: ok.kfac(30.0, layers=layers(), norm_constraint=None), True),
    ],
    ids=["kron_psgd", "soap", "kfac"],
)
def test_a_learning_rate_that_is_too_high(make, with_taps):
    tx = make()
    done = run(tx, params(), BATCHES, with_taps)
    told = explained(done, tx)
    assert told.causes == ("learning_rate_too_high",)
    assert "the loss rose" in told[0].evidence
    assert "learning_rate_too_high" not in ok.diagnostics.explain(done["state"]).causes


@functools.cache
def hardly_damped(make):
    """Eight examples cannot tell of the twelve directions of the inputs."""
    tx = make(0.1, layers=layers(), damping=1e-12, norm_constraint=None)
    return tx, run(tx, params(), [batch(8)] * 10, with_taps=True)


def test_layers_that_a_run_loses_as_it_diverges_are_no_cause_of_it():
    tx, weights = ok.kron_psgd(1.0), {"a": jnp.ones((4, 3)), "b": jnp.ones((5, 3))}
    _, state = tx.update(weights, tx.init(weights), weights)
    told = {"gradients": {**weights, "a": jnp.zeros((4, 3))}}
    assert ok.diagnostics.explain(state, weights, **told).causes == ("dead_parameters",)
    told["losses"] = [1.0, *[10.0] * 9]
    assert ok.diagnostics.explain(state, weights, **told).causes == ("learning_rate_too_high",)


@pytest.mark.parametrize("make", [ok.kfac, ok.ekfac])
def test_a_damping_that_is_too_low(make):
    tx, done = hardly_damped(make)
    told = explained(done, tx)
    assert told.causes == ("damping_too_low",)
    assert "dense0/kernel" in told[0].where


def test_a_damping_that_is_too_low_shows_before_losses_do():
    _, done = hardly_damped(ok.kfac)
    assert ok.diagnostics.explain(done["states"][1]).causes == ("damping_too_low",)


def test_a_damping_that_is_injected_is_seen():
    make = functools.partial(ok.ekfac, layers=layers(), norm_constraint=None)
    state = optax.inject_hyperparams(make)(learning_rate=0.1, damping=1e-12).init(params())
    tx, done = hardly_damped(ok.ekfac)
    assert not ok.diagnostics.explain(done["states"][1])  # which does not know it
    assert ok.diagnostics.explain(done["states"][1], params(), tx).causes == ("damping_too_low",)
    state = state._replace(inner_state=done["states"][1])
    assert ok.diagnostics.explain(state).causes == ("damping_too_low",)


def test_nan_in_the_data():
    tx, batches = ok.soap(3e-3), spoilt(BATCHES)
    done = run(tx, params(), batches)
    told = explained(done, tx, batch={"x": batches[-1][0], "y": batches[-1][1]})
    assert told.causes == ("nan_data",)
    assert told[0].where == ("x",)
    assert "skipped 6 of 30 steps" in told[0].evidence
    # Without the batch, it may as well be the loss function.
    told = explained(done, tx)
    assert told.causes == ("nan_data",)
    assert set(told[0].where) >= {"dense0/kernel"}
    # And without parameters or losses, a run that has diverged.
    assert ok.diagnostics.explain(done["state"]).causes == ("not_finite_steps",)


def test_steps_that_apply_if_finite_drops_count_too():
    state = optax.apply_if_finite(ok.kron_psgd(3e-3), 100).init(params())
    assert not ok.diagnostics.explain(state, params())
    state = state._replace(total_notfinite=jnp.asarray(3))
    assert ok.diagnostics.explain(state, params()).causes == ("nan_data",)


@pytest.mark.parametrize(
    ("make", "with_taps"),
    [(lambda: ok.kron_psgd(3e-3), False), (lambda: ok.kfac(0.1, layers=layers()), True)],
    ids=["kron_psgd", "kfac"],
)
def test_a_dead_layer(make, with_taps):
    tx = make()
    done = run(tx, with_dead_units(), BATCHES[:12], with_taps)
    told = explained(done, tx)
    assert told.causes == ("dead_parameters",)
    assert set(told[0].where) >= {"dense0/kernel", "dense1/kernel", "dense1/bias"}
    assert "dense2/bias" not in told[0].where
    assert ok.diagnostics.explain(done["state"]).causes == ("dead_parameters",)


def test_a_layer_that_dies_later():
    tx, weights = ok.kron_psgd(3e-3), {"a": jnp.ones((4, 3)), "b": jnp.ones((5, 3))}
    update, state = jax.jit(tx.update), tx.init(weights)
    for step in range(200):
        gradient = jax.tree.map(lambda x, step=step: x + step % 7, weights)
        if step > 20:
            gradient["a"] = jnp.zeros((4, 3))
        _, state = update(gradient, state, weights)
    told = ok.diagnostics.explain(state, weights)
    assert told.causes == ("dead_parameters",)
    assert told[0].where == ("a",)


def test_refreshes_that_fail():
    """Inputs whose squares are not finite, while gradients are."""
    tx = ok.kfac(0.1, layers=layers())
    wide = [(x.at[:, 0].set(1e22), y) for x, y in BATCHES[:10]]
    done = run(tx, params(), wide, with_taps=True)
    told = explained(done, tx)
    assert told.causes == ("refresh_failing",)
    assert "dense0/kernel" in told[0].where


def test_a_loss_of_the_wrong_scale():
    """A loss scale that is taken out of gradients, but not of taps."""
    tx = ok.kfac(0.1, layers=layers())

    def unscaled(grads):
        return jax.tree.map(lambda x: x / 1024, grads)

    done = run(tx, params(), BATCHES[:10], with_taps=True, scale=1024.0, change=unscaled)
    assert explained(done, tx).causes == ("wrong_loss_scale",)
    assert ok.diagnostics.explain(done["state"]).causes == ("wrong_loss_scale",)


@pytest.mark.parametrize("make", [ok.soap, ok.shampoo, ok.kron_psgd])
def test_gradients_that_vanish_beside_what_is_added_to_them(make):
    tx = make(1e-3)
    done = run(tx, params(), BATCHES[:10], scale=1e-12)
    assert explained(done, tx).causes == ("wrong_loss_scale",)
    assert not ok.diagnostics.explain(done["state"])  # eps is in tx


def test_gradients_whose_squares_overflow():
    tx, weights = ok.soap(1e-3), {"x": jnp.ones((4, 3))}
    state, gradient = tx.init(weights), {"x": jnp.full((4, 3), 1e20)}
    for _ in range(3):
        _, state = tx.update(gradient, state, weights)
    told = ok.diagnostics.explain(state, weights, gradients=gradient)
    assert told.causes == ("wrong_loss_scale",)


def test_an_overflow_of_float16():
    tx = ok.kron_psgd(3e-3)
    half = [(x.astype(jnp.float16), y) for x, y in BATCHES[:10]]
    scale = jnp.asarray(2.0**15, jnp.float16)
    done = run(tx, params(dtype=jnp.float16), half, scale=scale * 16)
    assert explained(done, tx).causes == ("float16_overflow",)
    assert ok.diagnostics.explain(done["state"]).causes == ("float16_overflow",)


def test_factors_of_float16_that_overflow():
    tx = ok.shampoo(1e-3, factor_dtype=jnp.float16)
    weights = {"x": jnp.ones((4, 3))}
    state = tx.init(weights)
    for _ in range(5):
        _, state = tx.update({"x": jnp.full((4, 3), 1e4)}, state, weights)
    assert ok.diagnostics.explain(state, weights).causes == ("float16_overflow",)


def test_a_mask_that_hides_all():
    tx = optax.masked(ok.soap(1e-3), jax.tree.map(lambda _: False, params()))
    done = run(tx, params(), BATCHES[:10])
    assert explained(done, tx).causes == ("mask_hides_all",)
    assert ok.diagnostics.explain(done["state"]).causes == ("mask_hides_all",)
    labels = jax.tree.map(lambda _: "b", params())
    tx = optax.partition({"a": ok.kron_psgd(1e-3), "b": optax.sgd(1e-3)}, labels)
    assert ok.diagnostics.explain(tx.init(params()), params()).causes == ("mask_hides_all",)


@pytest.mark.filterwarnings("ignore:kfac")
def test_no_layer_at_all():
    tx = ok.kfac(0.1, layers=[])
    assert ok.diagnostics.explain(tx.init(params()), params(), tx).causes == ("no_layers",)


def test_covariances_without_an_inverse():
    tx, weights = ok.branch_kfac(1e-3, damping=0.0), {"x": jnp.ones((4, 3))}
    state, branches = tx.init(weights), jnp.ones((5, 8))  # which do not vary at all
    for _ in range(5):
        _, state = tx.update(weights, state, weights, branches=branches)
    assert ok.diagnostics.explain(state).causes == ("damping_too_low",)


def test_updates_that_are_changed_after_adaptive_kfac():
    state = ok.adaptive_kfac(layers=layers()).init(params())
    metrics = state.metrics._replace(mismatched_updates=jnp.asarray(3))
    told = ok.diagnostics.explain(state._replace(metrics=metrics))
    assert told.causes == ("updates_changed",)
    metrics = state.metrics._replace(rejected_steps=jnp.asarray(20))
    told = ok.diagnostics.explain(state._replace(metrics=metrics))
    assert told.causes == ("steps_rejected",)


# ------------------------------------------------------------------------------------------- words


def test_losses_that_rise_by_chance_are_left_alone():
    state = ok.kron_psgd(1e-3).init(params())
    rng = np.random.default_rng(0)
    for _ in range(100):
        noisy = 1 + 0.2 * rng.normal(size=50)
        assert not ok.diagnostics.explain(state, losses=noisy)


def test_an_explanation_says_what_to_do_in_every_form():
    tx = optax.masked(ok.soap(1e-3), jax.tree.map(lambda _: False, params()))
    told = ok.diagnostics.explain(tx.init(params()))
    assert isinstance(told, tuple)
    assert str(told).startswith("mask_hides_all: ")
    assert "Of a mask True says what is optimized" in str(told)
    assert told._repr_html_().startswith("<ul><li>mask_hides_all: ")
    assert ok.diagnostics.explain(ok.soap(1e-3).init(params()))._repr_html_() == (
        "<p>Nothing looks wrong.</p>"
    )


def test_losses_of_another_shape_are_refused_in_words():
    with pytest.raises(ValueError, match=r"losses must be \[n\], oldest first; got shape \(\)"):
        ok.diagnostics.explain(ok.soap(1e-3).init(params()), losses=1.0)


def test_newton_mode_knows_no_scale_of_the_loss():
    """Its damping is beside Hessian-vector products, whatever the gradients."""
    params = {"w": jnp.full((3, 3), 0.05)}
    tx = ok.kron_psgd(0.02, criterion="newton", damping=1e-2)
    state, losses = tx.init(params), []

    def loss_fn(params):
        return 0.5 * jnp.sum(jnp.square(params["w"]))

    for _ in range(20):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        losses.append(float(loss))
        hvp_fn = ok.hessian_vector_product(loss_fn, params)
        updates, state = tx.update(grads, state, params, hvp_fn=hvp_fn)
        params = optax.apply_updates(params, updates)
    assert not ok.diagnostics.explain(state, params, tx, losses=losses)


def test_the_length_of_complex_updates_is_told():
    params, updates = {"w": jnp.full((3, 2), 1 + 1j)}, {"w": jnp.full((3, 2), 1 + 100j)}
    tx = ok.kron_psgd(1e-3)
    found = ok.diagnostics.explain(
        tx.init(params), params, tx, updates=updates, losses=2.0 ** np.arange(10)
    )
    assert "the last update is 71 times the parameters" in str(found)
