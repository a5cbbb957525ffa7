"""Every optimizer reaches the solution of small targets at a constant learning rate."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from .table import (
    ROWS,
    TARGETS,
    Problem,
    every_row,
    parabola,
    perceptron,
    quick_jit,
    stepper,
    together,
    train,
    updater,
)

CASES = [
    pytest.param(row, name, id=f"{row}-{name}")
    for row in ROWS
    for name in row.targets
    if name != "parabola"
]


@functools.lru_cache
def _trained_together(row, learning_rate, steps):
    """The parameters of all targets of a row that take so many steps at this rate, and the losses.

    One program takes half the time of several to compile, and blocks know nothing of one another.
    An optimizer that mixes them has other steps for each target, and so a program for each.
    """
    names = [name for name, x in row.targets.items() if x[:2] == (learning_rate, steps)]
    problem = together({name: TARGETS[name]() for name in names if name != "parabola"})
    assert not row.mixes or len(problem.params) == 1
    tx = row.make(problem, learning_rate)
    params, _, losses = train(row, tx, problem, steps)
    return params, losses


@pytest.mark.parametrize(("row", "name"), CASES)
def test_reaches_the_solution(row, name):
    target = row.targets[name]
    params, losses = _trained_together(row, target.learning_rate, target.steps)
    chex.assert_tree_all_finite(losses)
    chex.assert_trees_all_close(params[name], TARGETS[name]().solution, atol=target.atol)


@functools.lru_cache
def _parabola(row):
    """A function that trains on a parabola of any scale, after some zero gradients."""
    problem, target = parabola(), row.targets["parabola"]

    @quick_jit
    def run(scale, zeros):
        scaled = Problem(problem.params, lambda x: scale * problem.loss(x))
        tx = row.make(scaled, target.learning_rate)
        update = updater(row, tx, scaled)

        def step(carry, i):
            params, state = carry
            loss, grads = jax.value_and_grad(scaled.loss)(params)
            updates, state = update(jnp.where(i < zeros, 0.0, grads), state, params)
            return (optax.apply_updates(params, updates), state), (loss, updates)

        carry = (problem.params, tx.init(problem.params))
        return jax.lax.scan(step, carry, jnp.arange(target.steps))

    return run


@pytest.mark.parametrize("row", [row for row in ROWS if not row.mixes], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e12])
def test_reaches_the_solution_at_any_scale_of_the_loss(row, scale):
    (params, state), (losses, _) = _parabola(row)(scale, 0)
    chex.assert_tree_all_finite((state, losses))
    assert optax.tree.get(state, "failed_refreshes") == 0
    # Tiny gradients sink below the damping before the solution is reached to the last digit.
    atol = row.targets["parabola"].atol if scale >= 1 else 0.1
    chex.assert_trees_all_close(params, parabola().solution, atol=atol)


@every_row
def test_zero_gradients_give_zero_updates_and_training_starts_after_them(row):
    (params, state), (losses, updates) = _parabola(row)(1.0, 5)
    chex.assert_trees_all_equal(updates[:5], jnp.zeros_like(updates[:5]))
    chex.assert_tree_all_finite((state, losses))
    chex.assert_trees_all_close(params, parabola().solution, atol=0.1)


@every_row
def test_thirty_updates_of_a_network_finish_and_lower_the_loss(row):
    problem = perceptron()
    tx = row.make(problem, 0.02)
    step = jax.jit(stepper(row, tx, problem))
    carry, losses = (problem.params, jax.jit(tx.init)(problem.params)), []
    for _ in range(30):
        carry, loss = step(carry)
        losses.append(loss)
    chex.assert_tree_all_finite((carry, losses))
    assert np.mean(losses[-3:]) < 0.8 * losses[0], losses
    chex.assert_trees_all_equal_shapes_and_dtypes(carry[0], problem.params)
    assert optax.tree.get(carry[1], "count") == 30
