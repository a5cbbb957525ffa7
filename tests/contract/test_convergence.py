"""Every optimizer reaches the solution of small targets at a constant learning rate."""

import chex
import jax
import numpy as np
import optax
import pytest

from .table import ROWS, TARGETS, every_row, perceptron, stepper, train

CASES = [
    pytest.param(row, name, target, id=f"{row}-{name}")
    for row in ROWS
    for name, target in row.targets.items()
]


@pytest.mark.parametrize(("row", "name", "target"), CASES)
def test_reaches_the_solution(row, name, target):
    problem = TARGETS[name]()
    tx = row.make(problem, target.learning_rate)
    params, _, losses = train(row, tx, problem, target.steps)
    chex.assert_tree_all_finite(losses)
    chex.assert_trees_all_close(params, problem.solution, atol=target.atol)


@every_row
def test_thirty_updates_of_a_network_finish_and_lower_the_loss(row):
    problem = perceptron()
    tx = row.make(problem, 0.02)
    step = jax.jit(stepper(row, tx, problem))
    carry, losses = (problem.params, tx.init(problem.params)), []
    for _ in range(30):
        carry, loss = step(carry)
        losses.append(loss)
    chex.assert_tree_all_finite((carry, losses))
    assert np.mean(losses[-3:]) < 0.8 * losses[0], losses
    chex.assert_trees_all_equal_shapes_and_dtypes(carry[0], problem.params)
    assert optax.tree.get(carry[1], "count") == 30
