"""Gradients that are zero, huge, tiny or not finite, and curvature that is not finite."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from .table import (
    ROWS,
    Problem,
    complex_parabola,
    core_rows,
    every_row,
    get,
    largest_difference,
    norms,
    quick_jit,
    random_like,
    regression,
    trained,
    updater,
)

BAD_VALUES = [(np.nan, 0), (np.nan, -1), (np.inf, -1), (-np.inf, 0)]
SPOILABLE = [row for row in ROWS if row.spoilt_extras is not None]


def _spoil(grads, name, value, position=-1):
    """The first or last entry of one leaf becomes the value."""
    leaf = np.array(grads[name])
    leaf[(position,) * leaf.ndim] = value
    return {**grads, name: jnp.asarray(leaf)}


def _kept(state):
    """What a skipped step must leave as it is: all but its counter."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if "skipped_steps" not in jax.tree_util.keystr(path)
    }


def _start(row, when):
    _, tx, update, params, state, _ = trained(row)
    return update, params, tx.init(params) if when == "first" else state


@every_row
@pytest.mark.parametrize("when", ["first", "later"])
def test_gradient_that_is_not_finite_changes_nothing_but_its_counter(row, when):
    update, params, state = _start(row, when)
    grads = random_like(params)
    expected_updates, expected = update(grads, state, params)
    before, skipped = state, int(get(state, "skipped_steps"))
    for name in grads:
        for value, position in BAD_VALUES:
            updates, state = update(_spoil(grads, name, value, position), state, params)
            skipped += 1
            chex.assert_trees_all_equal(updates, optax.tree.zeros_like(grads))
            chex.assert_trees_all_equal(_kept(state), _kept(before))
            assert get(state, "skipped_steps") == skipped
    updates, state = update(grads, state, params)
    chex.assert_trees_all_equal(updates, expected_updates)
    chex.assert_trees_all_equal(_kept(state), _kept(expected))
    assert get(state, "count") == get(before, "count") + 1


@core_rows
def test_one_element_of_many_that_is_not_finite_is_seen(row):
    # XLA's maximum of a thousand numbers or more loses NaN.
    problem = regression(72, 64)
    params = {**problem.params, "long": jnp.ones(1500), "tensor": jnp.ones((16, 16, 16))}
    problem = Problem(params, problem.loss_fn, problem.args)
    tx = row.make(problem)
    update = quick_jit(updater(row, tx, problem))
    grads = random_like(params)
    first = tx.init(params)
    _, later = update(grads, first, params)
    for name in grads:
        for old in (first, later):
            updates, after = update(_spoil(grads, name, np.nan), old, params)
            chex.assert_trees_all_equal(updates, optax.tree.zeros_like(grads))
            chex.assert_trees_all_equal(_kept(after), _kept(old))
            assert get(after, "skipped_steps") == 1


@core_rows
@pytest.mark.filterwarnings("ignore:.*no parameter belongs to a layer")  # complex ones have none
def test_not_finite_imaginary_part(row):
    if not row.supports_complex:
        pytest.skip("real only")
    problem = complex_parabola()
    params, tx = problem.params, row.make(problem)
    update = quick_jit(updater(row, tx, problem))
    grads = random_like(params)
    updates, state = update(grads, tx.init(params), params)
    chex.assert_tree_all_finite(updates)
    updates, after = update(_spoil(grads, "matrix", complex(1, np.nan)), state, params)
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(grads))
    chex.assert_trees_all_equal(_kept(after), _kept(state))


@core_rows
def test_training_goes_on_between_faults_and_beside_a_leaf_without_gradient(row):
    problem = regression()
    unused = jnp.ones((3, 2))
    problem = Problem({**problem.params, "unused": unused}, problem.loss_fn, problem.args)
    tx = row.make(problem, 0.02)

    @quick_jit
    def run(params, state):
        def faulty(carry, i):
            params, state = carry
            loss, grads = jax.value_and_grad(problem.loss)(params)
            grads = jax.tree.map(lambda g: jnp.where(i % 5 == 0, jnp.nan, g), grads)
            updates, state = updater(row, tx, problem)(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(faulty, (params, state), jnp.arange(50))

    (params, state), losses = run(problem.params, tx.init(problem.params))
    chex.assert_tree_all_finite((params, state, losses))
    assert get(state, "skipped_steps") == 10
    assert get(state, "count") == 40
    assert losses[-1] < 0.8 * losses[0]
    if not row.mixes:
        chex.assert_trees_all_equal(params["unused"], unused)


@pytest.mark.parametrize("row", SPOILABLE, ids=str)
@pytest.mark.parametrize("when", ["first", "later"])
def test_refresh_that_is_not_finite_keeps_the_last_factors(row, when):
    update, params, state = _start(row, when)
    problem, tx, *_ = trained(row)
    spoilt_update = quick_jit(updater(row, tx, problem, row.spoilt_extras))
    grads = random_like(params)

    def curvature(state):
        return [get(state, name) for name in row.curvature]

    updates, after = spoilt_update(grads, state, params)
    chex.assert_tree_all_finite((updates, after))
    chex.assert_trees_all_equal(curvature(after), curvature(state))
    failures = int(get(after, "failed_refreshes"))
    assert failures > get(state, "failed_refreshes")
    assert get(after, "skipped_steps") == get(state, "skipped_steps")
    assert get(after, "count") == get(state, "count") + 1
    updates, recovered = update(grads, after, params)
    chex.assert_tree_all_finite((updates, recovered))
    assert optax.tree.norm(updates) > 0
    assert get(recovered, "failed_refreshes") == failures
    assert largest_difference(curvature(recovered), curvature(after)) > 0


@every_row
def test_no_failure_is_counted_on_healthy_steps(row):
    *_, state, _ = trained(row)
    assert get(state, "failed_refreshes") == 0
    assert get(state, "skipped_steps") == 0
    assert get(state, "count") == 4


@core_rows
def test_zero_gradient_makes_no_nan_on_the_way(row, nan_is_an_error):
    zeros = {"matrix": jnp.zeros((3, 2)), "vector": jnp.zeros(2)}
    problem = norms(zeros)
    tx = row.make(problem)
    update = quick_jit(updater(row, tx, problem))
    state = tx.init(zeros)
    for grads in (zeros, random_like(zeros), zeros):
        updates, state = update(grads, state, zeros)
        chex.assert_tree_all_finite((updates, state))


@every_row
@pytest.mark.parametrize("when", ["first", "later"])
def test_zero_gradient_gives_a_finite_update(row, when):
    update, params, state = _start(row, when)
    zeros = optax.tree.zeros_like(params)
    for _ in range(3):
        updates, state = update(zeros, state, params)
        chex.assert_tree_all_finite((updates, state))
        if when == "first":
            chex.assert_trees_all_equal(updates, zeros)
    updates, state = update(random_like(params), state, params)
    chex.assert_tree_all_finite((updates, state))
    assert optax.tree.norm(updates) > 0


@every_row
@pytest.mark.parametrize("when", ["first", "later"])
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30])
def test_extreme_gradients_poison_nothing(row, scale, when):
    update, params, state = _start(row, when)
    for size in (scale, scale, 1.0, 1.0):
        updates, state = update(random_like(params, 0, size), state, params)
        chex.assert_tree_all_finite((updates, state))
    assert optax.tree.norm(updates, ord=np.inf) > 0
