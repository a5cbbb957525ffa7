"""Where states live is known beforehand, and they are taken from there."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_kron as ok

from ..contract.table import largest_difference, random_like

SPECS = {"kernel": PartitionSpec("x"), "bias": PartitionSpec()}


def abstract(mesh):
    shapes = {"kernel": (8, 8), "bias": (8,)}
    return {
        k: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, SPECS[k]))
        for k, shape in shapes.items()
    }


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_shardings_are_those_of_init(kind):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
    tx = optax.chain(ok.soap(0.1, refresh_every=2), optax.ema(0.9))
    shardings = ok.sharding.state_shardings(tx, abstract(mesh), mesh)
    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda x: jax.device_put(jnp.ones(x.shape), x.sharding), abstract(mesh)
        )
        state = tx.init(params)
        placed = jax.jit(tx.init, out_shardings=shardings)(params)
        _, new = jax.jit(tx.update, out_shardings=(None, shardings))(params, placed, params)
    for tree in (state, placed, new):
        for x, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
            assert x.sharding.is_equivalent_to(sharding, x.ndim)
    stacks = jax.tree.leaves(optax.tree.get(new, "stacks"))
    assert all(len(x.addressable_shards[0].data) * 8 == len(x) for x in stacks)


@pytest.mark.parametrize("make", [ok.kron_psgd, ok.soap], ids=lambda make: make.__name__)
def test_training_goes_on_with_more_or_fewer_devices(make):
    tx = make(0.1)
    params = {k: jnp.ones(s) for k, s in {"a": (4, 4), "b": (4, 4), "c": (4,), "d": (3, 4)}.items()}

    @jax.jit
    def step(grads, state):
        return tx.update(grads, state, params)

    state, expected = tx.init(params), []
    for count in range(4):
        updates, state = step(random_like(params, count), state)
        expected.append(updates)
    moved = tx.init(params)
    for count, devices in enumerate((1, 8, 4, 1)):
        mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,))
        with jax.set_mesh(mesh):
            moved = ok.sharding.resize_state(tx, jax.device_get(moved), params)
            updates, moved = step(random_like(params, count), moved)
        assert largest_difference(updates, expected[count]) < 1e-6
    assert largest_difference(jax.device_get(moved), state) < 1e-5


def test_a_state_of_other_parameters_is_refused():
    tx = ok.soap(0.1)
    state = tx.init(jnp.ones((4, 4)))
    with pytest.raises(ValueError, match="another structure"):
        ok.sharding.resize_state(tx, state, jnp.ones((5, 4)))
    with pytest.raises(ValueError, match="another structure"):
        ok.sharding.resize_state(ok.shampoo(0.1), state, jnp.ones((4, 4)))
    tx = optax.ema(0.9)
    with pytest.raises(ValueError, match=r"ema has shape \(4, 4\); expected \(4, 5\)"):
        ok.sharding.resize_state(tx, tx.init(jnp.ones((4, 4))), jnp.ones((4, 5)))
