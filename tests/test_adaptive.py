"""K-FAC that tunes itself: on quadratics it is what theory says, and no fault gets in."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_kron as ok

from .draws import draw

OTHER = ok.Layer("other", bias="other")  # so that "x" is in no layer, and P is the identity there


class Quadratic:
    """`½ xᴴAx − Re(bᴴx)` over six numbers, with everything that an update takes, by hand."""

    def __init__(self, dtype=np.float64):
        root = draw(6, 6, dtype=dtype)
        self.A, self.b = jnp.asarray(root @ root.conj().T), jnp.asarray(draw(6, dtype=dtype))
        self.real = jnp.finfo(dtype).dtype
        self.params = {"x": jnp.zeros(6, dtype), "other": jnp.zeros(2, self.real)}
        tap = ok.Tap(jnp.ones((1, 1), self.real), jnp.ones((1, 2), self.real))
        self.taps = ok.Taps({"other": tap})

    def loss(self, params):
        x = params["x"]
        return jnp.real(jnp.vdot(x, self.A @ x) / 2 - jnp.vdot(self.b, x))

    def product(self, v):
        return {"x": self.A @ v["x"], "other": 0 * v["other"]}

    def extras(self, params):
        return {
            "taps": self.taps,
            "value": self.loss(params),
            "value_fn": self.loss,
            "ggn_fn": self.product,
        }

    def gradient(self, params):
        return {"x": self.A @ params["x"] - self.b, "other": jnp.zeros(2, self.real)}

    def step(self, tx, params, state, **changes):
        extras = self.extras(params) | changes
        updates, state = tx.update(self.gradient(params), state, params, **extras)
        return optax.apply_updates(params, updates), state, updates


adaptive = functools.partial(
    ok.adaptive_kfac,
    layers=[OTHER],
    damping_decrease=0.8,
    min_damping=1e-30,
    outlier_clip=None,
    cg_steps=0,
)
undamped = functools.partial(adaptive, initial_damping=1e-30)


def conjugate_gradients(A, b, steps):
    """The iterates of the method of Hestenes and Stiefel, from zero."""
    x, r = np.zeros_like(b), b
    p, every = r, []
    for _ in range(steps):
        a = np.vdot(r, r).real / np.vdot(p, A @ p).real
        x, new = x + a * p, r - a * (A @ p)
        p, r = new + np.vdot(new, new).real / np.vdot(r, r).real * p, new
        every.append(x)
    return every


@pytest.mark.parametrize("dtype", [np.float64, np.complex128], ids=str)
def test_without_damping_steps_are_those_of_conjugate_gradients(dtype, x64):
    """Where the preconditioner is the identity: the last update is the last search direction."""
    problem, tx = Quadratic(dtype), undamped()
    params, state = problem.params, tx.init(problem.params)
    step = jax.jit(functools.partial(problem.step, tx))
    expected = conjugate_gradients(np.asarray(problem.A), np.asarray(problem.b), 6)
    for x in expected:
        params, state, _ = step(params, state)
        # Rates and momenta are known to the square root of what is left of the loss.
        np.testing.assert_allclose(params["x"], x, atol=1e-7 * np.abs(expected[-1]).max())
    solution = np.linalg.solve(problem.A, problem.b)
    np.testing.assert_allclose(params["x"], solution, atol=1e-8 * np.abs(solution).max())
    assert state.metrics.accepted_steps == 6


@pytest.mark.parametrize("dtype", [np.float64, np.complex128], ids=str)
def test_conjugate_gradients_within_a_step(dtype, x64):
    """The first of which is that along the natural gradient, here the gradient."""
    problem = Quadratic(dtype)
    expected = conjugate_gradients(np.asarray(problem.A), np.asarray(problem.b), 6)
    for more in (1, 3, 5):
        tx, x = undamped(cg_steps=more), expected[more]
        params, state, _ = jax.jit(functools.partial(problem.step, tx))(
            problem.params, tx.init(problem.params)
        )
        np.testing.assert_allclose(params["x"], x, atol=1e-7 * np.abs(expected[-1]).max())
        np.testing.assert_allclose(state.metrics.reduction_ratio, 1, rtol=1e-6)
        decrease = -problem.loss({**params, "x": x})
        np.testing.assert_allclose(state.metrics.predicted_decrease, decrease, rtol=1e-5)


def test_conjugate_gradients_are_preconditioned(x64):
    """Of one dense layer P is exact but for its damping, so that λ alone is left for them."""
    loss_fn, params, batch = regression()
    layers = ok.find_layers(loss_fn, params, *batch)
    settings = {"initial_damping": 0.1, "damping_increase": 1.0, "l2": 0.01}
    inputs = np.append(batch[0], np.ones((9, 1)), axis=1)
    # The squared error has a curvature of two.
    least = inputs.T @ inputs / 9 + (0.1 + 0.01) / 2 * np.eye(5)
    solution = np.linalg.solve(least, inputs.T @ np.asarray(batch[1]) / 9)
    errors = []
    exact = {"adaptive_kfac": {}, "adaptive_ekfac": {"basis": "eigh"}}
    for method, own in exact.items():
        for more in (0, 1, 4):
            tx = getattr(ok, method)(layers=layers, cg_steps=more, **settings, **own)
            step = jax.jit(stepper(loss_fn, tx, layers, batch))
            new, state, _ = step(params, tx.init(params))
            errors.append(np.abs(new["kernel"] - solution[:4]).max())
            assert (state.preconditioner.count, state.preconditioner.refreshes) == (1, 1)
    assert errors[0] > 1.3 * errors[1] > 1e-3
    assert errors[2] < 1e-6
    # The damping of EKFAC is that of the model: nothing is left to do.
    assert max(errors[3:]) < 1e-6


def test_l2_gives_the_solution_of_ridge_regression(x64):
    problem, tx = Quadratic(), undamped(l2=0.5)
    params, state = problem.params, tx.init(problem.params)
    step = jax.jit(functools.partial(problem.step, tx))
    for _ in range(4):
        params, state, _ = step(params, state)
        # What the term adds to the loss is counted too.
        np.testing.assert_allclose(state.metrics.reduction_ratio, 1, rtol=1e-4)
    for _ in range(4):
        params, state, _ = step(params, state)
    solution = np.linalg.solve(problem.A + 0.5 * np.eye(6), problem.b)
    np.testing.assert_allclose(params["x"], solution, rtol=1e-8)
    assert state.metrics.rejected_steps == 0


def regression():
    """Least squares by a dense layer with a bias, of which K-FAC's curvature is exact."""
    x, y = jnp.asarray(draw(9, 4)), jnp.asarray(draw(9, 3, seed=1))

    def loss_fn(params, x, y):
        out = x @ params["kernel"] + params["bias"][None]
        return jnp.mean(jnp.sum(ok.losses.squared_error(out, y), axis=-1))

    return loss_fn, {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}, (x, y)


def stepper(loss_fn, tx, layers, batch, fisher="exact"):
    """A step of training, as users write it."""
    with_taps = ok.value_and_grad_with_taps(loss_fn, layers, fisher=fisher)

    def step(params, state, key=None):
        loss, grads, taps = with_taps(params, *batch, key=key)
        updates, state = tx.update(
            grads,
            state,
            params,
            taps=taps,
            value=loss,
            value_fn=lambda p: loss_fn(p, *batch),
            ggn_fn=ok.ggn_vector_product(loss_fn, params, *batch),
        )
        return optax.apply_updates(params, updates), state, loss

    return step


@pytest.mark.parametrize("method", ["adaptive_kfac", "adaptive_ekfac"])
def test_one_step_solves_a_linear_regression(method, x64):
    loss_fn, params, batch = regression()
    layers = ok.find_layers(loss_fn, params, *batch)
    least = {"initial_damping": 1e-14, "min_damping": 1e-14}
    tx = getattr(ok, method)(layers=layers, basis="eigh", **least)
    step = jax.jit(stepper(loss_fn, tx, layers, batch))
    params, state, _ = step(params, tx.init(params))
    solution = np.linalg.lstsq(np.append(batch[0], np.ones((9, 1)), axis=1), batch[1])[0]
    np.testing.assert_allclose(params["kernel"], solution[:4], atol=1e-6)
    np.testing.assert_allclose(params["bias"], solution[4], atol=1e-6)
    metrics = state.metrics
    np.testing.assert_allclose(metrics.learning_rate, 1, rtol=1e-4)
    assert metrics.momentum == 0
    np.testing.assert_allclose(metrics.reduction_ratio, 1, rtol=1e-4)


def test_inner_products_and_products_give_the_same_steps(x64):
    """The first are what `ok.ggn_vector_product` has; any other function gives the second."""
    loss_fn, params, batch = regression()
    layers = ok.find_layers(loss_fn, params, *batch)
    tx = ok.adaptive_kfac(layers=layers, l2=0.1, cg_steps=0)
    with_taps = ok.value_and_grad_with_taps(loss_fn, layers, fisher="exact")

    def run(wrap):
        p, state = params, tx.init(params)
        for _ in range(3):
            loss, grads, taps = with_taps(p, *batch)
            ggn_fn = wrap(ok.ggn_vector_product(loss_fn, p, *batch))
            extras = {"value": loss, "value_fn": lambda q: loss_fn(q, *batch), "ggn_fn": ggn_fn}
            updates, state = tx.update(grads, state, p, taps=taps, **extras)
            p = optax.apply_updates(p, updates)
        return p, state.metrics

    class Inner:
        """Would give other products, if it were asked for them."""

        def __init__(self, product):
            self.inner_products = product.inner_products

        def __call__(self, v):
            return jax.tree.map(jnp.zeros_like, v)

    known, expected = run(Inner), run(lambda product: lambda v: product(v))
    chex.assert_trees_all_close(known, expected, rtol=1e-6)
    assert expected[1].accepted_steps == 3
    assert expected[1].momentum != 0


# ------------------------------------------------------------------------------- faults


@functools.cache
def running():
    """Three steps, in float32: after them the last update is not zero."""
    problem, tx = Quadratic(np.float32), adaptive(initial_damping=0.1)
    params, state = problem.params, tx.init(problem.params)

    @functools.partial(jax.jit, static_argnames=("spoilt", "by", "count"))
    def step(params, state, spoilt=None, by=jnp.nan, count=lambda: None):
        extras = problem.extras(params)
        grads = problem.gradient(params)

        def value_fn(p):
            jax.debug.callback(count)
            loss = problem.loss(p)
            return loss + by if spoilt == "value_fn" else loss

        def ggn_fn(v):
            jax.debug.callback(count)
            product = problem.product(v)
            return product | {"x": product["x"] * by} if spoilt == "ggn_fn" else product

        if spoilt == "grads":
            grads["x"] = grads["x"].at[2].set(by)
        if spoilt == "value":
            extras["value"] = extras["value"] * by
        if spoilt == "taps":
            bad = ok.Tap(jnp.ones((1, 1)), jnp.full((1, 2), by))
            extras["taps"] = ok.Taps({"other": bad})
        extras |= {"value_fn": value_fn, "ggn_fn": ggn_fn}
        updates, state = tx.update(grads, state, params, **extras)
        return updates, state

    for _ in range(3):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert np.any(state.last_update["x"] != 0)
    return step, params, state


def called(step, *args, **settings):
    """What a step returns, and how often it called a function of the user."""
    calls = []
    result = step(*args, **settings, count=lambda: calls.append(1))
    jax.block_until_ready(result)
    jax.effects_barrier()
    return *result, len(calls)


@pytest.mark.parametrize("by", [np.nan, np.inf])
@pytest.mark.parametrize("spoilt", ["grads", "value", "taps"])
def test_what_is_not_finite_leaves_the_state_and_calls_nothing(spoilt, by):
    step, params, before = running()
    updates, state, calls = called(step, params, before, spoilt=spoilt, by=by)
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(params))
    skipped = before.preconditioner.skipped_steps
    assert state.preconditioner.skipped_steps == skipped + 1
    inner = state.preconditioner._replace(skipped_steps=skipped)
    chex.assert_trees_all_equal(state._replace(preconditioner=inner), before)
    assert calls == 0


@pytest.mark.parametrize("by", [np.nan, np.inf])
def test_products_that_are_not_finite_skip_the_step(by):
    step, params, before = running()
    updates, state, calls = called(step, params, before, spoilt="ggn_fn", by=by)
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(params))
    assert optax.tree.get(state, "skipped_steps") == optax.tree.get(before, "skipped_steps") + 1
    chex.assert_tree_all_finite(state)
    chex.assert_trees_all_equal(state.last_update, before.last_update)
    chex.assert_trees_all_equal(state.metrics, before.metrics)
    assert calls == 2  # the products alone


@pytest.mark.parametrize("by", [np.nan, np.inf, 1e3])
def test_step_that_raises_the_loss_is_not_taken(by):
    step, params, before = running()
    updates, state, calls = called(step, params, before, spoilt="value_fn", by=by)
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(params))
    chex.assert_trees_all_equal(state.last_update, optax.tree.zeros_like(params))
    old, new = before.metrics, state.metrics
    assert (new.accepted_steps, new.rejected_steps) == (old.accepted_steps, old.rejected_steps + 1)
    np.testing.assert_allclose(new.damping, 1.5**3 * old.damping, rtol=1e-6)
    assert new.reduction_ratio < 0 if by == 1e3 else new.reduction_ratio == 0
    assert state.preconditioner.count == before.preconditioner.count + 1
    assert calls == 3
    # The next step is along the gradient alone.
    _, state = step(params, state)
    assert state.metrics.momentum == 0
    assert state.metrics.accepted_steps == old.accepted_steps + 1
    assert np.any(state.last_update["x"] != 0)


def test_gradient_of_zero_gives_no_step():
    problem, tx = Quadratic(np.float32), adaptive(initial_damping=0.1)
    params = problem.params
    extras = problem.extras(params)
    updates, state = tx.update(optax.tree.zeros_like(params), tx.init(params), params, **extras)
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(params))
    chex.assert_tree_all_finite(state)
    np.testing.assert_allclose(state.metrics.damping, 0.1, rtol=1e-6)
    assert state.metrics.rejected_steps == 0


# ------------------------------------------------------------------------------- damping


def test_damping_follows_the_ratio_within_its_bounds(x64):
    problem = Quadratic()
    tx = adaptive(initial_damping=0.1, min_damping=0.07, max_damping=0.2)
    state, params = tx.init(problem.params), problem.params
    step = jax.jit(functools.partial(problem.step, tx))
    dampings = []
    for _ in range(3):
        params, state, _ = step(params, state)
        assert state.metrics.reduction_ratio > 0.75
        dampings.append(float(state.metrics.damping))
    np.testing.assert_allclose(dampings, [0.08, 0.07, 0.07], rtol=1e-6)
    before = problem.loss(params)
    for share, factor in ((0.5, 1.0), (0.1, 1.5)):
        small = jax.jit(
            lambda p, s, share=share: problem.step(
                tx, p, s, value_fn=lambda q: before + share * (problem.loss(q) - before)
            )
        )
        _, new, _ = small(params, state)
        np.testing.assert_allclose(new.metrics.damping, factor * 0.07, rtol=1e-6)
        assert new.metrics.accepted_steps == 4
    for _ in range(4):
        _, state, _ = jax.jit(lambda p, s: problem.step(tx, p, s, value_fn=lambda q: before + 1))(
            params, state
        )
    np.testing.assert_allclose(state.metrics.damping, 0.2, rtol=1e-6)


def test_a_damping_that_hides_every_step_in_rounding_falls():
    """Of a loss of about 1e-8, under a damping as of one of about one."""
    problem = Quadratic(np.float32)
    problem.A, problem.b = 1e-8 * problem.A, 1e-8 * problem.b
    problem.loss = lambda params: Quadratic.loss(problem, params) + 1e-7
    tx = adaptive(initial_damping=0.1)
    params, state = problem.params, tx.init(problem.params)
    step = jax.jit(lambda params, state: problem.step(tx, params, state)[:2])
    for _ in range(150):
        params, state = step(params, state)
    solution = np.linalg.solve(problem.A, problem.b)
    assert np.linalg.norm(params["x"] - solution) < 0.05 * np.linalg.norm(solution)


def test_new_damping_has_the_inverses_made_anew(x64):
    loss_fn, params, batch = regression()
    layers = ok.find_layers(loss_fn, params, *batch)
    refreshes = {}
    for factor in (1.5, 1e9):
        # Without memory factors are settled at once, and refreshes are rare by themselves.
        tx = ok.adaptive_kfac(
            layers=layers,
            initial_damping=1e3,
            damping_decrease=0.8,
            decay=0.0,
            refresh_every=100,
            refresh_factor=factor,
        )
        step = jax.jit(stepper(loss_fn, tx, layers, batch))
        p, state = params, tx.init(params)
        for _ in range(6):
            p, state, _ = step(p, state)
        np.testing.assert_allclose(state.metrics.damping, 1e3 * 0.8**6, rtol=1e-5)
        refreshes[factor] = int(state.preconditioner.refreshes)
    # λ is 1, 0.8, 0.64 (anew), 0.51, 0.41 (anew), 0.33 times what it was.
    assert refreshes == {1.5: 3, 1e9: 1}


# ------------------------------------------------------------------------------- programs


def test_a_scan_with_donated_state_is_the_same_every_time(x64):
    problem, tx = Quadratic(), adaptive(initial_damping=0.1)
    kinds = jax.tree.map(jax.typeof, tx.init(problem.params))

    @functools.partial(jax.jit, donate_argnums=0)
    def run(carry):
        def step(carry, _):
            params, state, _ = problem.step(tx, *carry)
            return (params, state), problem.loss(params)

        return jax.lax.scan(step, carry, length=5)

    start = jax.tree.map(jnp.array, problem.params)
    results = [run((jax.tree.map(jnp.array, start), tx.init(start))) for _ in range(2)]
    chex.assert_trees_all_equal(*results)
    (params, state), losses = results[0]
    assert jax.tree.map(jax.typeof, state) == kinds
    assert np.all(np.diff(losses) < 0)
    # A state that comes from a checkpoint, without jit.
    leaves, structure = jax.tree.flatten(state)
    restored = structure.unflatten(jnp.asarray(np.asarray(x)) for x in leaves)
    again, _, _ = problem.step(tx, params, restored)
    expected, _, _ = jax.jit(functools.partial(problem.step, tx))(params, state)
    chex.assert_trees_all_close(again, expected, rtol=1e-9)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=str)
def test_narrow_parameters_keep_their_dtype(dtype):
    loss_fn, params, batch = regression()
    params, batch = (jax.tree.map(lambda x: x.astype(dtype), t) for t in (params, batch))
    layers = ok.find_layers(loss_fn, params, *batch, check=False)
    tx = ok.adaptive_kfac(layers=layers)
    step = jax.jit(stepper(loss_fn, tx, layers, batch))
    state, losses = tx.init(params), []
    kinds = jax.tree.map(jax.typeof, (params, state))
    for _ in range(6):
        params, state, loss = step(params, state)
        losses.append(float(loss))
        assert jax.tree.map(jax.typeof, (params, state)) == kinds
    best = regression_minimum(batch)
    assert losses[-1] < best + 0.03 * (losses[0] - best)
    assert state.preconditioner.skipped_steps == 0


def regression_minimum(batch):
    x, y = (np.asarray(a, np.float64) for a in batch)
    x = np.append(x, np.ones((9, 1)), axis=1)
    return np.sum((y - x @ np.linalg.lstsq(x, y)[0]) ** 2) / 9


def test_settings_may_be_injected():
    problem = Quadratic(np.float32)
    tx = optax.inject_hyperparams(ok.adaptive_kfac, static_args=("layers",))(
        layers=[OTHER], damping_decrease=0.5, initial_damping=0.1
    )
    step = jax.jit(functools.partial(problem.step, tx))
    _, state, _ = step(problem.params, tx.init(problem.params))
    np.testing.assert_allclose(optax.tree.get(state, "metrics").damping, 0.05, rtol=1e-6)


def test_ranks_and_dtypes_are_explicit(strict_promotion):
    problem, tx = Quadratic(np.float32), adaptive(l2=0.1)
    with jax.numpy_rank_promotion("raise"):
        step = jax.jit(functools.partial(problem.step, tx))
        params, _, _ = step(problem.params, tx.init(problem.params))
    assert problem.loss(params) < problem.loss(problem.params)


def test_updates_that_are_scaled_further_down_a_chain_are_counted():
    problem = Quadratic(np.float32)
    for scale, counted in ((1.0, 0), (0.5, 3)):
        tx = optax.chain(adaptive(initial_damping=1.0), optax.scale(scale))
        params, state = problem.params, tx.init(problem.params)
        step = jax.jit(functools.partial(problem.step, tx))
        for i in range(5):
            spoilt = {"value": jnp.nan} if i == 2 else {}  # skipped: the parameters stay
            params, state, _ = step(params, state, **spoilt)
        assert optax.tree.get(state, "mismatched_updates") == counted
        assert optax.tree.get(state, "skipped_steps") == 1


@pytest.mark.parametrize("name", ["value", "value_fn", "ggn_fn", "taps"])
def test_missing_argument_is_named(name):
    problem, tx = Quadratic(np.float32), adaptive()
    state = tx.init(problem.params)
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        problem.step(tx, problem.params, state, **{name: None})


def test_errors_say_what_was_expected():
    problem, tx = Quadratic(np.float32), adaptive()
    params, state = problem.params, tx.init(problem.params)
    extras = problem.extras(params)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, state, **extras)
    with pytest.raises(ValueError, match=r"value must be the loss, a real scalar; got shape"):
        problem.step(tx, params, state, value=jnp.ones(2))
    with pytest.raises(ValueError, match="value_fn must be a function; got float"):
        problem.step(tx, params, state, value_fn=1.0)
    with pytest.raises(ValueError, match=r"value_fn\(params\) must be the loss.*got tuple"):
        problem.step(tx, params, state, value_fn=lambda p: (problem.loss(p), 1))
    with pytest.raises(ValueError, match="ggn_fn"):
        problem.step(tx, params, state, ggn_fn=lambda v: {"x": v["x"]})
    for name, bad in {
        "initial_damping": 0.0,
        "damping_decrease": 1.5,
        "damping_increase": 0.5,
        "refresh_factor": 0.5,
        "l2": -1.0,
        "decay": 2.0,
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be a number in"):
            ok.adaptive_kfac(layers=[OTHER], **{name: bad})


@pytest.mark.parametrize("make", [ok.adaptive_kfac, ok.adaptive_ekfac])
def test_what_the_model_chooses_is_no_argument(make):
    match = f"^{make.__name__}: there is no learning_rate to choose, .*; got 0.1"
    for given in ({}, {"learning_rate": 0.1}):
        with pytest.raises(TypeError, match=match):
            make(*([] if given else [0.1]), layers=[OTHER], **given)
    for name in ("momentum", "damping", "norm_constraint", "weight_decay"):
        with pytest.raises(TypeError, match=f"there is no {name} to choose, .*; got 0.5"):
            make(layers=[OTHER], **{name: 0.5})
    assert "learning_rate" not in inspect.signature(make).parameters


def test_what_a_gauss_newton_matrix_does_not_act_on_is_named():
    params = {"w": jnp.ones(3)}
    product = ok.ggn_vector_product(lambda p: jnp.sum(ok.losses.squared_error(p["w"])), params)
    assert isinstance(product, ok.GaussNewton)
    for bad in ([], params):
        with pytest.raises(ValueError, match="inner_products takes a list of trees like the param"):
            product.inner_products(bad)
    shapes = [({"w": jnp.ones(2)}, r"at w it has shape \(2,\), and the parameters \(3,\)")]
    shapes += [({"v": jnp.ones(3)}, "at w it has shape .no such leaf")]
    shapes += [(params | {"v": jnp.ones(3)}, r"at v it has shape \(3,\), .* .no such leaf")]
    for bad, message in shapes:
        for call in (product, lambda v: product.inner_products([params, v])):
            with pytest.raises(ValueError, match=message):
                call(bad)


@pytest.mark.parametrize("method", ["adaptive_kfac", "adaptive_ekfac"])
def test_errors_of_the_preconditioner_name_the_optimizer(method):
    problem, make = Quadratic(np.float32), getattr(ok, method)
    with pytest.raises(ValueError, match=f"^{method}: decay must be a number in"):
        make(layers=[OTHER], decay=2.0)
    with pytest.raises(ValueError, match=f"^{method}: damping_rule must be one of"):
        make(layers=[OTHER], damping_rule="plain")
    tx = make(layers=[OTHER])
    with pytest.raises(ValueError, match=f"^{method}: .*taps"):
        problem.step(tx, problem.params, tx.init(problem.params), taps=None)


@pytest.mark.parametrize("hidden", ["x", "other"])
def test_hidden_parameters_are_refused_in_words(hidden):
    params = Quadratic(np.float32).params
    labels = {name: "frozen" if name == hidden else "trained" for name in params}
    masked = optax.masked(adaptive(), {name: name != hidden for name in params})
    partition = optax.partition({"trained": adaptive(), "frozen": optax.set_to_zero()}, labels)
    for tx in (masked, partition):
        with pytest.raises(ValueError, match=rf"neither optax.masked.*'{hidden}'.* is hidden"):
            tx.init(params)


def test_bounds_of_the_damping_are_in_order():
    with pytest.raises(ValueError, match="initial_damping must be at most max_damping; got"):
        adaptive(initial_damping=1.0, max_damping=0.1)
    with pytest.raises(ValueError, match="min_damping must be at most initial_damping; got"):
        adaptive(initial_damping=1.0, min_damping=jnp.array(2.0))
    adaptive(initial_damping=1.0, min_damping=1.0, max_damping=1.0)


@pytest.mark.parametrize("dtype", ["float16", "int32", "complex64"])
def test_products_of_another_dtype_are_refused(dtype):
    problem, tx = Quadratic(np.float32), adaptive()
    state = tx.init(problem.params)

    def ggn_fn(v):
        return problem.product(v) | {"x": problem.product(v)["x"].astype(dtype)}

    with pytest.raises(ValueError, match=f"ggn_fn must return .* array of {dtype} where .*float32"):
        problem.step(tx, problem.params, state, ggn_fn=ggn_fn)
