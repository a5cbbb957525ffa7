"""Where states live is known beforehand, and they are taken from there."""

import functools

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


@pytest.mark.parametrize("kinds", [("Explicit", "Auto"), ("Auto", "Explicit")], ids=str)
def test_states_on_a_mesh_with_axes_of_both_kinds(kinds):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=tuple(AxisType[k] for k in kinds))
    tx, params = ok.soap(0.1), {"a": jnp.ones((8, 16)), "b": jnp.ones((8, 16)), "c": jnp.ones(3)}
    alone = jax.device_get(tx.init(params))
    with jax.set_mesh(mesh):
        specs = {"a": PartitionSpec("x"), "b": PartitionSpec("y", "x"), "c": PartitionSpec()}
        params = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in params.items()}
        shardings = ok.sharding.state_shardings(tx, params, mesh)
        types = jax.tree.map(jax.typeof, tx.init(params))
        placed = jax.jit(tx.init, out_shardings=shardings)(params)
        resized = ok.sharding.resize_state(tx, alone, params)
        assert jax.tree.map(jax.typeof, placed) == types
        assert jax.tree.map(jax.typeof, resized) == types


@pytest.mark.parametrize("make", [ok.kron_psgd, ok.soap], ids=lambda make: make.__name__)
def test_training_goes_on_with_more_or_fewer_devices(make):
    tx = make(0.1)
    params = {k: jnp.ones(shape) for k, shape in {"a": (4, 4), "b": (4, 4), "c": (4,)}.items()}

    @jax.jit
    def step(grads, state):
        return tx.update(grads, state, params)

    state, expected = tx.init(params), []
    for count in range(3):
        updates, state = step(random_like(params, count), state)
        expected.append(updates)
    moved = tx.init(params)
    for count, devices in enumerate((8, 4, 1)):
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


THREE_AND_ONE = {"a": (8, 8), "b": (8, 8), "c": (8, 8), "d": (8, 4)}
PLAIN = ok.soap(0.1, refresh_every=2)


@functools.cache
def updates_of_one_device():
    """Of four steps."""
    params = {k: jnp.ones(shape) for k, shape in THREE_AND_ONE.items()}
    state, every, update = PLAIN.init(params), [], jax.jit(PLAIN.update)
    for count in range(4):
        updates, state = update(random_like(params, count), state, params)
        every.append(jax.device_get(updates))
    return every


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("x"), PartitionSpec("y", "x")])
def test_blocks_may_be_spread_over_some_axes_alone(kind, spec):
    tx = ok.sharding.over_axes(optax.chain(optax.clip(10.0), PLAIN), ("x",))
    params = {k: jnp.ones(shape) for k, shape in THREE_AND_ONE.items()}
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, NamedSharding(mesh, spec))
        state = tx.init(placed)
        types = jax.tree.map(jax.typeof, state)
    for count, want in enumerate(updates_of_one_device()):
        with jax.set_mesh(mesh):
            grads = jax.device_put(random_like(params, count), NamedSharding(mesh, spec))
            updates, state = jax.jit(tx.update)(grads, state, placed)
        assert largest_difference(jax.device_get(updates), want) < 1e-4
        assert jax.tree.map(jax.typeof, state) == types
    rows = jax.tree.leaves(optax.tree.get(state, "stacks"))
    assert {len(x) for x in rows} == {2, 4}  # of one block and of three, on two devices
    assert all(len(x) == 2 * len(x.addressable_shards[0].data) for x in rows)


def test_axes_that_blocks_cannot_be_spread_over():
    params = jnp.ones((4, 4))
    for axes, names in ((("z",), "z"), ((), r"\(\)"), (("x", "z"), "z")):
        tx = ok.sharding.over_axes(ok.soap(0.1), axes)
        assert tx.init(params)  # without a mesh
        with (
            jax.set_mesh(jax.make_mesh((8,), ("x",))),
            pytest.raises(ValueError, match=rf"spread over the mesh axes \('x',\).*{names}"),
        ):
            tx.init(params)
    for axes in ("x", None):
        with pytest.raises(ValueError, match=f"a sequence of names; got {axes!r}"):
            ok.sharding.over_axes(ok.soap(0.1), axes)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize(
    "make", [ok.scale_by_kfac, ok.scale_by_ekfac], ids=lambda make: make.__name__
)
def test_of_a_table_in_blocks_each_device_has_its_rows(make, kind):
    table = ok.Layer("words", kernel="words", is_embedding=True)
    tx = make(layers=[table], block_size=16, damping_rule="exact", outlier_clip=None)
    whole = make(layers=[table], damping_rule="exact", outlier_clip=None)
    params = {"words": random_like(jnp.ones((128, 4)), 0)}
    indices = jnp.arange(64)[None, :, None, None] * 5 % 128
    taps = ok.Taps({"words": ok.Tap(indices, random_like(jnp.ones((1, 1, 64, 1, 4)), 1))})

    def run(tx, params):
        state = jax.jit(tx.init)(params)
        for count in range(3):
            grads = jax.tree.map(lambda x, count=count: jnp.cos((count + 1) * x), params)
            updates, state = jax.jit(tx.update)(grads, state, params, taps=taps)
        return updates, state

    expected, alone = run(whole, params)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        put = jax.device_put(params, NamedSharding(mesh, PartitionSpec("x")))
        updates, state = run(tx, put)
    assert largest_difference(jax.device_get(updates), expected) < 1e-5
    rows = [x for x in jax.tree.leaves((state.stacks, state.momentum)) if 16 in x.shape]
    assert rows
    assert all(x.addressable_shards[0].data.shape[0] == 1 for x in rows)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert held < 1.5 / 8 * sum(x.nbytes for x in jax.tree.leaves(alone))
