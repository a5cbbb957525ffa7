"""Parameter trees of every kind: missing leaves, no leaves, scalars, empty axes, axes of one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from .table import avals, core_rows, norms, quick_jit, random_like, updater

ODD_SHAPES = {
    "scalar": (),
    "one": (1,),
    "one_by_one": (1, 1),
    "row": (1, 4),
    "column": (4, 1),
    "ones": (1, 1, 1, 1),
    "five_axes": (2, 1, 2, 1, 3),
    "no_elements": (0,),
    "no_rows": (0, 3),
    "empty_axis": (2, 0, 3),
}
ODD = {name: jnp.ones(shape) for name, shape in ODD_SHAPES.items()}
TREES = {
    "odd_shapes": {**ODD, "none": None, "masked": (optax.MaskedNode(), {})},
    "none": {"a": None, "b": jnp.ones((2, 3)), "c": (None, jnp.ones(2))},
    "masked_node": {"a": optax.MaskedNode(), "b": jnp.ones((2, 3))},
    "bare_array": jnp.ones((2, 3)),
    "bare_scalar": jnp.ones(()),
    "nested": (jnp.ones(3), [jnp.ones((3, 2)), {"x": jnp.ones((2, 3))}]),
    "empty_dict": {},
    "empty_tuple": (),
    "only_none": None,
    "no_leaves": {"a": {}, "b": [None, optax.MaskedNode()]},
    "only_empty_axes": {"a": jnp.ones((0, 3)), "b": jnp.ones((0,))},
}
TO_RUN = ("odd_shapes", "empty_dict", "only_empty_axes")


@core_rows
@pytest.mark.parametrize("name", TREES)
def test_shapes_and_structure_are_kept(row, name):
    params = TREES[name]
    problem = norms(params)
    tx = row.make(problem)
    state = tx.init(params)
    assert avals(jax.eval_shape(tx.init, params)) == avals(state)
    updates, after = jax.eval_shape(updater(row, tx, problem), params, state, params)
    assert avals(updates) == avals(params)
    assert avals(after) == avals(state)
    chex.assert_trees_all_equal(optax.tree.map_params(tx, lambda x: x, state), state)


@core_rows
@pytest.mark.parametrize("name", TO_RUN)
def test_every_element_is_updated(row, name):
    params = TREES[name]
    problem = norms(params)
    tx = row.make(problem)
    update = quick_jit(updater(row, tx, problem))
    state = tx.init(params)
    for i in range(2):
        updates, state = update(random_like(params, i), state, params)
        assert avals(updates) == avals(params)
        chex.assert_tree_all_finite((updates, state))
        assert all(np.all(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(updates))
