"""Optax's wrappers take every optimizer, and pass its extra arguments on."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from .table import (
    avals,
    core_rows,
    get,
    norms,
    quick_jit,
    random_like,
    regression,
    trained,
    updater,
)

MASK = {"kernel": True, "bias": False}


def program_text(fn, *args):
    """What a function computes, as text, without the addresses of the functions in it."""
    return re.sub(r"0x[0-9a-f]+", "0x", str(jax.make_jaxpr(fn)(*args)))


@core_rows
def test_unexpected_extra_arguments_are_accepted_and_change_nothing(row):
    problem, tx, _, params, state, _ = trained(row)
    extras = row.make_extras(problem, params)
    plain = functools.partial(tx.update, **extras)
    more = functools.partial(tx.update, **extras, value=1.0, unforeseen="x", grad={"y": None})
    programs = [program_text(f, params, state, params) for f in (plain, more)]
    assert programs[0] == programs[1]


@core_rows
def test_parameters_are_optional_in_update(row):
    problem, tx, _, params, state, _ = trained(row)
    extras = row.make_extras(problem, params)
    without, _ = jax.eval_shape(functools.partial(tx.update, **extras), params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(without, params)


def _program(row, tx, problem):
    """What an update computes, as text."""
    params = problem.params
    return program_text(updater(row, tx, problem), params, tx.init(params), params)


@core_rows
def test_alias_is_the_mathematics_chained_with_a_learning_rate(row):
    problem = regression()
    settings, rate = row.all_settings(problem), optax.scale_by_learning_rate(0.01)
    expected = _program(row, row.factory(0.01, **settings), problem)
    for bare in (row.factory(**settings), row.scale_by(**settings)):
        assert _program(row, optax.chain(bare, rate), problem) == expected


@core_rows
def test_without_learning_rate_updates_are_neither_scaled_nor_flipped(row):
    problem, tx, update, params, _, _ = trained(row)
    bare = row.factory(**row.all_settings(problem))
    grads = random_like(params)
    expected, _ = update(grads, tx.init(params), params)
    updates, _ = quick_jit(updater(row, bare, problem))(grads, bare.init(params), params)
    chex.assert_trees_all_close(optax.tree.scale(-0.01, updates), expected, rtol=1e-5)


@core_rows
def test_map_params_takes_nothing_for_shaped_like_the_parameters(row):
    problem, tx, _, params, trained_state, _ = trained(row)
    rest = []

    def refuse(leaf, param):
        raise AssertionError(f"{leaf.shape} of {param.shape}: all that is kept is of blocks")

    def record_rest(leaf):
        rest.extend(jax.tree.leaves(leaf))
        return leaf

    for state in (tx.init(problem.params), trained_state):
        rest.clear()
        same = optax.tree.map_params(tx, lambda leaf: leaf, state)
        chex.assert_trees_all_equal_structs(same, state)
        chex.assert_trees_all_equal(same, state)
        same = optax.tree.map_params(tx, refuse, state, params, transform_non_params=record_rest)
        chex.assert_trees_all_equal(same, state)
        assert len(rest) == len(jax.tree.leaves(state))


@core_rows
def test_map_params_inside_wrappers(row):
    problem = regression()
    plain = row.make(problem)
    for tx in (
        optax.masked(plain, MASK),
        optax.chain(optax.clip(1.0), plain),
        optax.inject_hyperparams(row.factory)(0.01, **row.all_settings(problem)),
        optax.apply_if_finite(plain, 3),
    ):
        state = tx.init(problem.params)
        chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda leaf: leaf, state), state)


@core_rows
@pytest.mark.parametrize("mask", [MASK, lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)])
def test_masked(row, mask):
    problem = regression()
    tx = optax.masked(row.make(problem), mask)
    params = problem.params
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(updater(row, tx, problem), params, state, params)
    assert avals(after) == avals(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@core_rows
def test_partition_gives_each_group_its_own_optimizer(row):
    problem, _, _, params, _, _ = trained(row)
    plain = row.make(problem)
    alone = optax.masked(plain, MASK)
    labels = {"kernel": "first", "bias": "second"}
    tx = optax.partition({"first": plain, "second": optax.sgd(0.5)}, labels)

    @quick_jit
    def both(grads, states, params):
        first, second = (updater(row, t, problem) for t in (alone, tx))
        return first(grads, states[0], params), second(grads, states[1], params)

    states = (alone.init(params), tx.init(params))
    for i in range(2):
        grads = random_like(params, i)
        (masked, state_alone), (updates, state) = both(grads, states, params)
        states = (state_alone, state)
        chex.assert_trees_all_equal(masked["bias"], grads["bias"])
        chex.assert_trees_all_close(updates["bias"], -0.5 * grads["bias"], rtol=1e-6)
        chex.assert_trees_all_close(updates["kernel"], masked["kernel"], rtol=1e-4)
        assert np.all(np.asarray(updates["kernel"]) != np.asarray(grads["kernel"]))


@core_rows
def test_multi_steps_averages_gradients(row):
    problem, tx, update, params, _, _ = trained(row)
    multi = optax.MultiSteps(row.make(problem), 2)
    multi_update = quick_jit(updater(row, multi, problem))
    multi_state, state = multi.init(params), tx.init(params)
    for i in range(2):
        first, second = random_like(params, 2 * i), random_like(params, 2 * i + 1)
        updates, multi_state = multi_update(first, multi_state, params)
        chex.assert_trees_all_equal(updates, optax.tree.zeros_like(params))
        chex.assert_trees_all_close(multi_state.inner_opt_state, state, rtol=1e-3, atol=1e-6)
        updates, multi_state = multi_update(second, multi_state, params)
        mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
        expected, state = update(mean, state, params)
        chex.assert_trees_all_close(updates, expected, rtol=1e-3, atol=1e-6)


@core_rows
def test_apply_if_finite_guards_the_state(row):
    problem, _, _, params, _, _ = trained(row)
    tx = optax.apply_if_finite(row.make(problem), 3)
    update = quick_jit(updater(row, tx, problem))
    grads = random_like(params)
    _, state = update(grads, tx.init(params), params)
    bad = {**grads, "bias": grads["bias"].at[0].set(jnp.nan)}
    updates, after = update(bad, state, params)
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(grads))
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    assert after.total_notfinite == 1
    updates, after = update(grads, after, params)
    assert get(after, "count") == 2
    assert optax.tree.norm(updates) > 0


@core_rows
def test_chained_with_clipping(row):
    problem, tx, update, params, _, _ = trained(row)
    clip = optax.clip_by_global_norm
    chained = optax.chain(clip(1.0), row.make(problem), clip(1e-3))
    grads = random_like(params, scale=10.0)
    updates, _ = quick_jit(updater(row, chained, problem))(grads, chained.init(params), params)
    clipped = optax.tree.scale(1 / optax.tree.norm(grads), grads)
    expected, _ = update(clipped, tx.init(params), params)
    expected = optax.tree.scale(1e-3 / optax.tree.norm(expected), expected)
    chex.assert_trees_all_close(updates, expected, rtol=1e-3)


@core_rows
def test_weight_decay_is_decoupled_and_masked(row):
    problem, tx, update, params, _, _ = trained(row)
    settings = row.all_settings(problem, weight_decay=0.5, mask=MASK)
    decayed = row.factory(0.01, **settings)
    bare = optax.chain(row.factory(**settings), optax.scale_by_learning_rate(0.01))
    assert _program(row, bare, problem) == _program(row, decayed, problem)
    grads = random_like(params)
    updates, _ = quick_jit(updater(row, decayed, problem))(grads, decayed.init(params), params)
    expected, _ = update(grads, tx.init(params), params)
    expected["kernel"] -= 0.01 * 0.5 * params["kernel"]
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-7)


@core_rows
def test_masked_node_and_none_share_a_tree(row):
    params = {"a": jnp.ones((2, 3)), "b": {"c": None, "d": jnp.ones(2)}}
    problem = norms(params)
    tx = optax.masked(row.make(problem), {"a": True, "b": False})
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(updater(row, tx, problem), params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    assert avals(after) == avals(state)
