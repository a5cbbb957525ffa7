"""Nothing is traced twice, and hyperparameters may be traced values."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from .table import (
    CORE_ROWS,
    Problem,
    avals,
    core_rows,
    largest_difference,
    quick_jit,
    random_like,
    regression,
    train,
    trained,
    updater,
)

TUNABLE = [pytest.param(row, name, id=f"{row}-{name}") for row in CORE_ROWS for name in row.tunable]


@core_rows
def test_second_call_does_not_retrace(row):
    assert trained(row).traces == 1


@core_rows
def test_state_holds_no_weakly_typed_value(row):
    problem, tx, _, params, state, _ = trained(row)
    weak_params = {**params, "bias": jax.ShapeDtypeStruct((2,), jnp.float32, weak_type=True)}
    weak = jax.eval_shape(tx.init, weak_params)
    _, after = jax.eval_shape(updater(row, tx, problem), weak_params, weak, weak_params)
    for tree in (tx.init(params), state, weak, after):
        found = [
            jax.tree_util.keystr(path)
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
            if x.weak_type
        ]
        assert not found


@core_rows
def test_every_numeric_setting_may_be_traced(row):
    problem, _, _, params, _, _ = trained(row)

    def run(values, grads, params):
        tx = row.factory(**{**row.all_settings(problem), **values})
        state = tx.init(params)
        updates, after = updater(row, tx, problem)(grads, state, params)
        return updates, state, after

    updates, before, after = jax.eval_shape(run, dict(row.tunable), params, params)
    assert avals(after) == avals(before)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@functools.lru_cache
def _tuned(row):
    """The row with every tunable setting injected, and switched on, after two updates."""
    problem = regression()
    tx = optax.inject_hyperparams(row.factory)(0.01, **row.all_settings(problem, **row.switched_on))
    traces = []

    @quick_jit
    def update(grads, state, params):
        traces.append(1)
        return updater(row, tx, problem)(grads, state, params)

    params, state = problem.params, tx.init(problem.params)
    for i in range(2):
        moved = optax.tree.scale(2.0 - i, params)  # curvature that changes
        _, state = update(random_like(params, i), state, moved)
    grads = random_like(params, 2)
    return update, traces, grads, params, state, update(grads, state, params)[0]


@pytest.mark.parametrize(("row", "name"), TUNABLE)
def test_injected_hyperparameter_can_be_changed_without_retracing(row, name):
    update, traces, grads, params, state, expected = _tuned(row)
    old, new = state.hyperparams[name], row.tunable[name]
    changed = {**state.hyperparams, name: jnp.full_like(old, new)}
    updates, _ = update(grads, state._replace(hyperparams=changed), params)
    assert len(traces) == 1
    if name == "learning_rate":
        expected = jax.tree.map(lambda u: u * new / old, expected)
        chex.assert_trees_all_close(updates, expected, rtol=1e-4)
    else:
        assert largest_difference(updates, expected) > 1e-5


@core_rows
@pytest.mark.parametrize("injected", [False, True])
def test_schedule_scales_the_updates_and_may_be_zero(row, injected):
    problem, tx, constant_update, params, _, _ = trained(row)
    schedule = optax.join_schedules(
        [optax.constant_schedule(0.0), optax.constant_schedule(0.03)], [1]
    )
    factory = optax.inject_hyperparams(row.factory) if injected else row.factory
    scheduled = factory(schedule, **row.all_settings(problem))
    update = quick_jit(updater(row, scheduled, problem))
    constant_state, state = tx.init(params), scheduled.init(params)
    for i, factor in enumerate((0.0, 3.0)):
        grads = random_like(params, i)
        expected, constant_state = constant_update(grads, constant_state, params)
        updates, state = update(grads, state, params)
        expected = optax.tree.scale(factor, expected)
        chex.assert_trees_all_close(updates, expected, rtol=1e-4)
    inner = state.inner_state if injected else state
    chex.assert_trees_all_close(inner[0], constant_state[0], rtol=1e-4, atol=1e-6)
    if injected:
        np.testing.assert_allclose(state.hyperparams["learning_rate"], 0.03, rtol=1e-5)


def _low_precision(dtype):
    problem = regression()
    params, args = optax.tree.cast((problem.params, problem.args), dtype)
    return Problem(params, problem.loss_fn, args)


@core_rows
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_injected_hyperparameters_of_low_precision_keep_the_state_stable(row, dtype):
    problem = _low_precision(dtype)
    tx = optax.inject_hyperparams(row.factory)(0.01, **row.all_settings(problem))
    state = jax.eval_shape(tx.init, problem.params)
    update = updater(row, tx, problem)
    updates, after = jax.eval_shape(update, problem.params, state, problem.params)
    assert avals(after) == avals(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, problem.params)


@core_rows
def test_injected_hyperparameters_of_float16_train(row):
    problem = _low_precision(jnp.float16)
    tx = optax.inject_hyperparams(row.factory)(0.01, **row.all_settings(problem))
    _, state, losses = train(row, tx, problem, 30)
    chex.assert_tree_all_finite((losses, state))
    assert losses[-1] < 0.95 * losses[0]
