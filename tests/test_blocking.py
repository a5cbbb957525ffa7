"""Leaves to stacks of blocks and exactly back; which axes get a dense factor."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_kron as ok
from optax_kron.blocking import plan_blocks

shapes = st.lists(st.integers(0, 7), max_size=5).map(tuple)
blockings = st.builds(
    ok.Blocking,
    max_size=st.integers(0, 8),
    max_skew=st.none() | st.floats(0, 4),
    block_size=st.none() | st.integers(1, 5),
    merge_below=st.none() | st.integers(1, 40),
    stacked_axes=st.none() | st.integers(0, 2),
    dense_axes=st.none() | st.integers(0, 3),
    max_cut=st.none() | st.integers(1, 7),
)


def numbers(shape, start=1):
    """Distinct nonzero numbers, so that a misplaced element shows."""
    return np.arange(start, start + int(np.prod(shape)), dtype=np.float32).reshape(shape)


@settings(deadline=None, max_examples=60)
@given(st.lists(shapes, max_size=4), blockings)
def test_joining_undoes_splitting(leaf_shapes, blocking):
    tree = {f"leaf{i}": numbers(shape) for i, shape in enumerate(leaf_shapes)}
    plan = plan_blocks(tree, blocking)
    joined = plan.join(plan.split(tree, jnp.float32), like=tree)
    assert jax.tree.structure(joined) == jax.tree.structure(tree)
    for name, leaf in tree.items():
        assert joined[name].shape == leaf.shape
        np.testing.assert_array_equal(joined[name], leaf)


@settings(deadline=None, max_examples=60)
@given(shapes, blockings)
def test_blocks_hold_each_element_once_and_zeros_in_the_padding(shape, blocking):
    plan = plan_blocks(numbers(shape), blocking)
    for label, stack in plan.split(numbers(shape), jnp.float32).items():
        assert stack.shape == (plan.count(label), *plan.stacks[label].shape)
        assert sorted(stack[stack != 0].tolist()) == numbers(shape).ravel().tolist()
        mask = plan.mask(label)
        valid = np.broadcast_to(True if mask is None else mask, stack.shape)
        np.testing.assert_array_equal(stack != 0, valid)
        if blocking.block_size is not None and blocking.max_cut is None:
            merged_whole = max(stack.shape[1:], default=1)
            assert merged_whole <= blocking.block_size


@settings(deadline=None, max_examples=40)
@given(shapes.filter(lambda s: 0 not in s), st.integers(0, 9), st.none() | st.floats(0, 3))
def test_dense_or_diagonal(shape, max_size, max_skew):
    plan = plan_blocks(numbers(shape), ok.Blocking(max_size=max_size, max_skew=max_skew))
    (signature,) = plan.stacks.values()
    n = int(np.prod(shape))
    for d, diagonal in zip(signature.shape, signature.diagonal, strict=True):
        skewed = d == n if max_skew is None else d * d > max_skew * n
        assert diagonal == (d <= 1 or d > max_size or skewed)


@pytest.mark.parametrize(
    ("shape", "blocking", "expected"),
    [
        ((3, 3, 64, 128), ok.Blocking(merge_below=1024), (576, 128)),
        ((3, 3, 64, 128), ok.Blocking(), (128, 64, 3, 3)),
        ((100, 256), ok.Blocking(block_size=64), (64, 50)),
        ((100, 256), ok.Blocking(block_size=64, max_cut=128), (256, 50)),
        ((), ok.Blocking(), (1,)),
        ((4, 8, 16), ok.Blocking(stacked_axes=1), (16, 8)),
        ((4, 8), ok.Blocking(stacked_axes=5), (1,)),
    ],
)
def test_shape_of_a_block(shape, blocking, expected):
    (signature,) = plan_blocks(jnp.zeros(shape), blocking).stacks.values()
    assert signature.shape == expected


def test_equal_signatures_share_a_stack_across_leaves_and_orientations():
    tree = {"a": jnp.zeros((8, 4)), "b": jnp.zeros((4, 8)), "c": jnp.zeros((2, 8, 4))}
    blocking = ok.Blocking(stacked_axes={"a": 0, "b": 0, "c": 1})
    plan = plan_blocks(tree, blocking)
    assert list(plan.stacks) == ["8x4"]
    assert plan.count("8x4") == 4


def test_stacked_axes_may_be_a_function_of_path_and_shape():
    tree = {"scanned": {"kernel": jnp.zeros((5, 3, 2))}, "head": jnp.zeros((5, 3, 2))}
    blocking = ok.Blocking(stacked_axes=lambda path, shape: int("scanned" in path))
    plan = plan_blocks(tree, blocking)
    assert {label: plan.count(label) for label in plan.stacks} == {"3x2": 5, "5x3x2": 1}


def test_none_and_masked_leaves_are_no_leaves():
    tree = {"a": jnp.zeros((3, 2)), "b": None, "c": optax.MaskedNode()}
    plan = plan_blocks(tree, ok.Blocking())
    assert plan.count("3x2") == 1
    joined = plan.join(plan.split(tree, jnp.float32), like=tree)
    assert joined["b"] is None
    assert isinstance(joined["c"], optax.MaskedNode)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_size": -1}, "max_size must be an integer ≥ 0; got -1"),
        ({"block_size": 0}, "block_size must be an integer ≥ 1; got 0"),
        ({"block_size": 2.5}, "block_size must be an integer ≥ 1; got 2.5"),
        ({"max_cut": 0}, "max_cut must be an integer ≥ 1; got 0"),
        ({"merge_below": True}, "merge_below must be an integer ≥ 1; got True"),
        ({"max_skew": -0.5}, "max_skew must be None or ≥ 0; got -0.5"),
        ({"stacked_axes": -1}, "stacked_axes must be an integer ≥ 0; got -1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ok.Blocking(**settings)


def test_stacked_axes_of_another_structure():
    with pytest.raises(ValueError, match="stacked_axes must have the structure"):
        plan_blocks({"a": jnp.zeros(3)}, ok.Blocking(stacked_axes={"b": 1}))


def test_integer_parameters_are_refused_by_path():
    with pytest.raises(ValueError, match=r"Parameter \['steps'\] has dtype int32"):
        plan_blocks({"steps": jnp.zeros(3, jnp.int32)}, ok.Blocking())


@pytest.mark.parametrize(
    ("shape", "dense", "expected"),
    [
        ((4, 3), 1, (True, False)),
        ((3, 3), 1, (True, False)),
        ((5, 4, 3), 2, (True, False, False)),
        ((4, 3), 0, (True, True)),
        ((4, 3), 5, (False, False)),
        ((4,), 1, (True,)),
    ],
)
def test_the_shortest_axes_get_the_dense_factors(shape, dense, expected):
    plan = plan_blocks(jnp.zeros(shape), ok.Blocking(dense_axes=dense))
    (signature,) = plan.stacks.values()
    assert signature.diagonal == expected


@pytest.mark.parametrize("dense", [-1, 1.5, "one"])
def test_the_number_of_dense_axes_is_whole(dense):
    with pytest.raises(ValueError, match="dense_axes must be"):
        ok.Blocking(dense_axes=dense)
