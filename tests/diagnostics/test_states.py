"""States are found in any tree, and metrics are scalars of them with stable names."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_kron as ok
from optax_kron.diagnostics.states import find_states

from ..contract.table import CORE_ROWS, mixed

PARAMS = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
LABELS = {"kernel": "a", "bias": "b"}
GROUPS = {"a": ok.soap(1e-3), "b": ok.kron_psgd(1e-3)}
COUNTERS = {"steps", "refreshes", "failed_refreshes", "skipped_steps", "outlier_steps"}
WRAPPERS = {
    "bare": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "masked": lambda tx: optax.masked(tx, {"kernel": True, "bias": False}),
    "partition": lambda tx: optax.partition({"a": tx, "b": optax.sgd(0.1)}, LABELS),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(lambda rate: tx)(rate=0.1),
    "fixed_norm": lambda tx: ok.fixed_norm(tx, 0.1),
    "all": lambda tx: optax.MultiSteps(
        optax.apply_if_finite(optax.chain(optax.clip(1.0), WRAPPERS["partition"](tx)), 3), 2
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_state_is_found_in_every_wrapper(name):
    tx = WRAPPERS[name](ok.scale_by_soap())
    state = tx.init(PARAMS)
    (found,) = [x for x in find_states(state) if x.is_kron]
    assert found.kind == "soap"
    assert found.name == ""
    assert set(ok.diagnostics.metrics(state)) >= COUNTERS
    rows = ok.diagnostics.summary(state, PARAMS, tx).parameters
    assert [row.parameter for row in rows if row.blocks][-1] == "kernel"
    assert "kernel" in ok.diagnostics.factors(state, PARAMS, tx)
    assert not ok.diagnostics.explain(state, PARAMS, tx)


def test_the_state_is_found_in_train_states():
    @flax.struct.dataclass
    class TrainState:
        params: dict
        opt_state: tuple

    tx = ok.soap(1e-3)
    state = TrainState(PARAMS, tx.init(PARAMS))
    assert ok.diagnostics.metrics(state)["steps"] == 0
    table = ok.diagnostics.summary(state, PARAMS, tx)
    assert [row.parameter for row in table.parameters] == ["bias", "kernel"]


@pytest.mark.parametrize("of", [lambda x: x, lambda x: x.opt_state], ids=["optimizer", "state"])
def test_the_state_is_found_in_an_optimizer_of_nnx(of):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    tx = ok.shampoo(1e-3)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    weights = nnx.state(model, nnx.Param)
    assert ok.diagnostics.metrics(of(optimizer))["steps"] == 1
    table = ok.diagnostics.summary(of(optimizer), weights, tx)
    assert [row.parameter for row in table.parameters] == ["bias", "kernel"]
    assert table.parameters[1].age == 0
    assert ok.diagnostics.factors(of(optimizer), weights)["kernel"][0].array.shape == (3, 3)
    assert not ok.diagnostics.explain(of(optimizer), weights, tx)


def test_names_tell_states_apart_and_depend_on_the_transformation_alone():
    tx = optax.chain(optax.clip(1.0), optax.partition(GROUPS, LABELS))
    state = tx.init(PARAMS)
    names = set(ok.diagnostics.metrics(state))
    assert names >= {f"{group}/{name}" for group in "ab" for name in COUNTERS}
    assert all(name.startswith(("a/", "b/")) for name in names)
    _, state = tx.update(PARAMS, state, PARAMS)
    assert set(ok.diagnostics.metrics(state)) == names


def test_states_of_a_fallback_are_found_behind_its_own():
    tx = ok.kfac(0.1, layers=[ok.Layer("x", kernel="kernel")], fallback=ok.kron_psgd())
    state = tx.init(PARAMS)
    assert [x.kind for x in find_states(state)] == ["kfac", "kron_psgd"]
    metrics = ok.diagnostics.metrics(state)
    assert {"steps", "fallback/0/steps"} <= set(metrics)
    rows = ok.diagnostics.summary(state, PARAMS, tx).parameters
    assert [(row.parameter, row.optimizer) for row in rows] == [
        ("kernel", "kfac"),
        ("bias", "fallback/0"),
    ]


def test_the_adaptive_optimizers_tell_what_they_have_chosen():
    tx = ok.adaptive_kfac(layers=[ok.Layer("x", kernel="kernel")], initial_damping=0.25)
    metrics = ok.diagnostics.metrics(tx.init({"kernel": jnp.ones((3, 2))}))
    assert set(metrics) >= COUNTERS | set(ok.AdaptiveMetrics._fields) | {"since_refresh"}
    assert metrics["damping"] == 0.25


def test_the_wrapper_fixed_norm_has_counters_of_its_own():
    tx = ok.fixed_norm(ok.scale_by_soap(), 0.1)
    nothing = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
    _, state = tx.update(nothing, tx.init(PARAMS), PARAMS)
    metrics = ok.diagnostics.metrics(state)
    assert metrics["fixed_norm/steps"] == 1
    assert metrics["skipped_steps"] == 1


@pytest.mark.parametrize("row", CORE_ROWS, ids=str)
def test_metrics_are_scalars_of_every_optimizer(row):
    problem = mixed()
    state = row.make(problem).init(problem.params)
    metrics = ok.diagnostics.metrics(state)
    assert set(metrics) >= {"steps", "failed_refreshes", "skipped_steps", "outlier_steps"}
    assert all(isinstance(x, jax.Array) and x.shape == () for x in metrics.values())


def test_metrics_are_counted_as_the_state_counts():
    tx = ok.shampoo(1e-3, refresh_every=2)
    update = jax.jit(tx.update)
    state = tx.init(PARAMS)
    grads = {"kernel": jnp.full((3, 2), 3.0), "bias": jnp.full(2, 4.0)}
    for _ in range(5):
        _, state = update(grads, state)
    _, state = update(jax.tree.map(lambda x: x * jnp.inf, grads), state)
    metrics = {name: float(x) for name, x in ok.diagnostics.metrics(state).items()}
    assert metrics["steps"] == 5
    assert metrics["refreshes"] == 3  # of the first, second and fourth step
    assert metrics["skipped_steps"] == 1
    np.testing.assert_allclose(metrics["usual_gradient_norm"], np.sqrt(6 * 9 + 2 * 16), rtol=1e-6)


def test_metrics_of_large_gradients_do_not_overflow():
    tx = ok.kron_psgd(1e-3)
    _, state = tx.update({"x": jnp.full(3, 1e30)}, tx.init({"x": jnp.ones(3)}))
    usual = ok.diagnostics.metrics(state)["usual_gradient_norm"]
    np.testing.assert_allclose(usual, np.sqrt(3) * 1e30, rtol=1e-6)


def test_a_step_with_metrics_is_compiled_once():
    tx = ok.shampoo(1e-3)

    @jax.jit
    def step(weights, state):
        updates, state = tx.update(weights, state, weights)
        return optax.apply_updates(weights, updates), state, ok.diagnostics.metrics(state)

    weights, state = PARAMS, tx.init(PARAMS)
    for i in range(3):
        weights, state, metrics = step(weights, state)
        assert metrics["steps"] == i + 1
    assert step._cache_size() == 1


@pytest.mark.parametrize("inside", [False, True])
def test_metrics_outlive_a_state_that_is_donated(inside):
    tx = ok.soap(1e-3)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        _, state = tx.update(PARAMS, state)
        return state, ok.diagnostics.metrics(state) if inside else None

    state, kept = tx.init(PARAMS), []
    for _ in range(3):
        state, metrics = step(state)
        kept.append(metrics if inside else ok.diagnostics.metrics(state))
    assert [int(metrics["steps"]) for metrics in kept] == [1, 2, 3]


def test_metrics_add_less_than_a_hundredth_to_a_step():
    tx, weights = ok.soap(1e-3), {f"x{i}": jnp.ones((64, 64)) for i in range(8)}
    state = tx.init(weights)

    def with_metrics(grads, state):
        updates, state = tx.update(grads, state)
        return updates, state, ok.diagnostics.metrics(state)

    lowered = [jax.jit(fn).lower(weights, state) for fn in (tx.update, with_metrics)]
    plain, more = (program.cost_analysis() for program in lowered)
    assert plain["flops"] < more["flops"] < 1.01 * plain["flops"]
    assert more["bytes accessed"] < 1.01 * plain["bytes accessed"]


def test_a_tree_without_any_state_is_refused_in_words():
    with pytest.raises(ValueError, match="no state of an optimizer of optax_kron"):
        ok.diagnostics.metrics(optax.adam(1e-3).init(PARAMS))


@pytest.mark.parametrize("function", [ok.diagnostics.summary, ok.diagnostics.factors])
def test_ensembles_and_traced_states_are_refused_in_words(function):
    tx = ok.soap(1e-3)
    many = jax.vmap(tx.init)(jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS))
    with pytest.raises(ValueError, match=r"one of an ensemble.*jax\.tree\.map"):
        function(many, PARAMS)
    with pytest.raises(ValueError, match="the state is traced"):
        jax.jit(lambda state: function(state, PARAMS))(tx.init(PARAMS))


def test_metrics_of_an_ensemble_are_those_of_its_members():
    members = jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS)
    states = jax.vmap(ok.soap(1e-3).init)(members)
    assert jax.vmap(ok.diagnostics.metrics)(states)["steps"].tolist() == [0, 0]


def test_metrics_of_an_ensemble_as_a_whole_are_refused_in_words():
    states = jax.vmap(ok.soap(1e-3).init)(jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS))
    with pytest.raises(ValueError, match=r"one of an ensemble.*jax\.vmap\(metrics\)"):
        ok.diagnostics.metrics(states)


MAKERS = {
    "kron_psgd": ok.kron_psgd(1e-3),
    "soap": ok.soap(1e-3),
    "shampoo": ok.shampoo(1e-3),
    "orthogonalize": ok.orthogonalize(momentum=0.9),
}


@pytest.mark.parametrize("other", MAKERS)
@pytest.mark.parametrize("maker", MAKERS)
def test_a_transformation_of_another_optimizer_is_refused_in_words(maker, other):
    state = MAKERS[maker].init(PARAMS)
    for function in (ok.diagnostics.summary, ok.diagnostics.factors, ok.diagnostics.explain):
        if maker == other:
            function(state, PARAMS, MAKERS[other])
            continue
        with pytest.raises(ValueError, match="it is of another optimizer"):
            function(state, PARAMS, MAKERS[other])


def test_a_transformation_whose_init_is_compiled():
    tx = ok.soap(1e-3)
    compiled = optax.GradientTransformationExtraArgs(jax.jit(tx.init), tx.update)
    state = compiled.init(PARAMS)
    with pytest.raises(ValueError, match=r"as jax\.jit compiles it"):
        ok.diagnostics.summary(state, PARAMS, compiled)
    ok.diagnostics.summary(state, PARAMS, tx)
