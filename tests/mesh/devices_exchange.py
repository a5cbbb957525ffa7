"""Blocks go to their devices, and back, exactly, however leaves are sharded and cut."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_kron as ok
from optax_kron.blocking import plan_blocks
from optax_kron.transforms import exchange, mesh

CUT = ok.Blocking(block_size=16, max_cut=64, max_size=64)
STACKED = ok.Blocking(block_size=16, stacked_axes=1)
# Shapes and shardings of a tree, how it is cut, and the stacks that are exchanged.
CASES = {
    "both axes": ({"a": ((32, 64), ("x", "y")), "b": ((64, 32), ("y", "x"))}, CUT, 1),
    "one axis": ({"a": ((32, 64), (None, "y")), "b": ((32, 64), ("x",))}, CUT, 1),
    "one axis, all devices": ({"a": ((32, 64), (None, ("y", "x")))}, CUT, 1),
    "layers": ({"a": ((4, 32, 16), ("x", None, "y")), "b": ((3, 16, 16), (None, "y"))}, STACKED, 1),
    "padded": ({"a": ((24, 8), ("y", "x"))}, ok.Blocking(block_size=20), 1),
    "transposed": ({"a": ((8, 48), ("x", "y")), "b": ((48, 8), ("y",))}, ok.Blocking(), 1),
    "diagonal": ({"a": ((128, 32), ("y", "x"))}, CUT, 1),
    "vectors": (
        {"a": ((16,), ("x",)), "b": ((40,), ()), "c": ((24,), (("x", "y"),))},
        ok.Blocking(),
        1,
    ),
    "one is on all": ({"a": ((32, 32), ("x",)), "b": ((8, 8), ())}, ok.Blocking(), 1),
    "merged": ({"a": ((2, 4, 8), ("x",))}, ok.Blocking(merge_below=16), 0),
    "scalar": ({"a": ((), ())}, CUT, 0),
}


@pytest.fixture
def devices():
    made = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(made):
        yield made


def tree_of(shapes, devices, dtype=jnp.float32):
    """Numbers all of which differ, also in bfloat16 as far as they go."""
    return {
        k: jax.device_put(
            jnp.arange(np.prod(shape), dtype=dtype).reshape(shape) + i,
            NamedSharding(devices, PartitionSpec(*spec)),
        )
        for i, (k, (shape, spec)) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda x: x.__name__)
@pytest.mark.parametrize("name", CASES)
def test_blocks_there_and_leaves_back(name, dtype, devices):
    shapes, blocking, exchanged = CASES[name]
    tree, share = tree_of(shapes, devices, dtype), mesh.ambient()
    plan = plan_blocks(tree, blocking, share.devices)
    routes = exchange.routes(plan, share, tree)
    assert len(routes) == exchanged

    @jax.jit
    def there(tree):
        return exchange.split(plan, share, tree, jnp.float32)

    stacks = there(tree)
    expected = plan.split(jax.device_get(tree), jnp.float32)
    assert list(stacks) == list(expected)
    for label, stack in stacks.items():
        np.testing.assert_array_equal(stack, expected[label])
        assert jax.typeof(stack).sharding.spec[0] == ("x", "y")
    if exchanged == len(plan.stacks):
        zeros = jax.tree.map(jnp.zeros_like, tree)
        back = jax.jit(lambda *x: exchange.join(plan, share, routes, *x))(stacks, zeros)
        for k, x in tree.items():
            np.testing.assert_array_equal(np.asarray(back[k]), np.asarray(x))
            assert jax.typeof(back[k]) == jax.typeof(x)


def test_stacks_without_an_exchange_are_left_as_they_are(devices):
    shapes = {"a": ((32, 32), ("x", "y")), "b": ((8,), ())}
    tree, share = tree_of(shapes, devices), mesh.ambient()
    plan = plan_blocks(tree, CUT, share.devices)
    routes = exchange.routes(plan, share, tree)
    assert list(routes) == ["16x16"]
    stacks = exchange.split(plan, share, tree, jnp.float32)
    like = {k: jnp.zeros_like(x) for k, x in tree.items()}
    back = exchange.join(plan, share, routes, stacks, like)
    np.testing.assert_array_equal(back["a"], tree["a"])
    np.testing.assert_array_equal(back["b"], 0 * tree["b"])


def test_shards_and_blocks_without_a_common_divisor_are_gathered(devices):
    shapes = {"a": ((1024, 1024), ("x", "y"))}  # tiles of 2×2
    tree, share = tree_of(shapes, devices), mesh.ambient()
    plan = plan_blocks(tree, ok.Blocking(block_size=342), share.devices)
    assert not exchange.routes(plan, share, tree)
    stacks = jax.jit(lambda tree: exchange.split(plan, share, tree, jnp.float32))(tree)
    expected = plan.split(jax.device_get(tree), jnp.float32)
    np.testing.assert_array_equal(stacks["342x342"], expected["342x342"])


@pytest.mark.parametrize("name", ["kron_psgd", "soap", "shampoo"])
def test_no_device_gets_more_than_it_needs(name, devices):
    # 16 blocks, of which each device owns two: all that goes in is what the blocks are made of.
    shapes = {"a": ((64, 64), ("x", "y")), "b": ((2, 32, 64), (None, "y", "x"))}
    blocking = ok.Blocking(block_size=16, stacked_axes={"a": 0, "b": 1})
    tx, params = getattr(ok, name)(1.0, blocking=blocking), tree_of(shapes, devices)
    state = jax.jit(tx.init)(params)
    text = jax.jit(tx.update).lower(params, state, params).compile().as_text()
    moved = re.findall(r"= \((f32\[[^)]*)\) all-to-all\(", text)
    elements = [
        sum(np.prod(list(map(int, s.split(",")))) for s in re.findall(r"f32\[([\d,]+)\]", x))
        for x in moved
    ]
    assert len(elements) == 2
    per_device = 2 * 64 * 64 / 8
    assert max(elements) <= 2 * per_device
    assert not re.findall(r"all-gather|collective-permute|reduce-scatter", text)
