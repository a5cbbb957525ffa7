"""Types of states and updates, shardings included, stay what they are on an explicit mesh."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_kron as ok
from optax_kron.kernels import psgd
from optax_kron.kernels.explicit import spec_of
from optax_kron.transforms.soap import VARIANTS

from ..contract.table import largest_difference, quick_jit

DENSE = [ok.Layer("dense", kernel="", block_axes=(0,))]


def taps(params):
    """By hand, of a layer whose kernel is [2, 8, 4]."""
    inputs, grads = jnp.ones((2, 3, 1, 8)), jnp.ones((1, 2, 3, 1, 4))
    return {"taps": ok.Taps({"dense": ok.Tap(inputs, grads)})}


OPTIMIZERS = {
    **{f"kron_psgd {x}": (ok.kron_psgd(1.0, geometry=x), None) for x in psgd.GEOMETRIES},
    "kron_psgd newton": (
        ok.kron_psgd(1.0, criterion="newton"),
        lambda params: {"hvp_fn": lambda v: v},
    ),
    **{x: (ok.soap(1.0, variant=x), None) for x in VARIANTS},
    "soap eigh": (ok.soap(1.0, basis="eigh", refresh_every=2, stagger=True), None),
    "shampoo": (ok.shampoo(1.0, root_method="eigh"), None),
    "shampoo newton": (ok.shampoo(1.0, root_method="newton", grafting=None), None),
    "fixed_norm": (ok.fixed_norm(ok.scale_by_soap(), 0.1), None),
    "kfac": (ok.kfac(1.0, layers=DENSE), taps),
    "ekfac": (ok.ekfac(1.0, layers=DENSE), taps),
    "orthogonalize": (
        ok.orthogonalize(momentum=0.9, nesterov=True, fallback=optax.scale_by_adam()),
        None,
    ),
    "branch_kfac": (ok.branch_kfac(1.0), lambda params: {"branches": jnp.ones((6, 4))}),
}
SPECS = {
    "middle": PartitionSpec(None, "x"),
    "first": PartitionSpec("x"),
    "replicated": PartitionSpec(),
}


@pytest.fixture
def mesh():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        yield mesh


def types(tree):
    return jax.tree.map(jax.typeof, tree)


def abstract_types(tree):
    """Of what `jax.eval_shape` returns."""

    def kind(x):
        axes = [*spec_of(x), *[None] * x.ndim]
        return x.shape, x.dtype, axes[: x.ndim]

    return jax.tree.map(kind, tree)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_types_are_stable(name, spec, mesh):
    tx, extras = OPTIMIZERS[name]
    shape = (8, 8, 4) if spec == "first" and extras is not taps else (2, 8, 4)
    spec = SPECS["middle" if spec == "first" and extras is taps else spec]
    params = jnp.ones(shape, jnp.float16, out_sharding=NamedSharding(mesh, spec))
    given = {} if extras is None else extras(params)
    state = tx.init(params)
    # Without compiling: types are known as soon as a program is traced.
    expected = abstract_types(jax.eval_shape(lambda *x: x, params, state))
    assert abstract_types(jax.eval_shape(tx.init, params)) == expected[1]
    update = jax.eval_shape(lambda g, s, p: tx.update(g, s, p, **given), params, state, params)
    assert abstract_types(update) == expected
    assert jax.tree.structure(tx.init(jax.ShapeDtypeStruct(shape, jnp.float16)))


@pytest.mark.parametrize("name", ["kron_psgd EQ", "soap", "kfac"])
def test_types_are_stable_with_and_without_jit(name, mesh):
    tx, extras = OPTIMIZERS[name]
    sharding = NamedSharding(mesh, SPECS["middle"])
    params = jnp.ones((2, 8, 4), jnp.float16, out_sharding=sharding)
    given = {} if extras is None else extras(params)
    state = tx.init(params)
    assert types(jax.jit(tx.init)(params)) == types(state)
    update = quick_jit(lambda grads, state: tx.update(grads, state, params, **given))
    assert types(update(params, state)) == types((params, state))
    assert types(tx.update(params, state, params, **given)) == types((params, state))


WRAPPED = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "masked": lambda tx: optax.masked(tx, {"a": True, "b": False}),
    "partition": lambda tx: optax.partition(
        {"own": tx, "other": optax.adam(1.0)}, {"a": "own", "b": "other"}
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(ok.soap)(
        learning_rate=optax.linear_schedule(1.0, 0.1, 5)
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_keep_working(name, mesh):
    tx = WRAPPED[name](ok.soap(1.0))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    params = {k: jnp.ones((8, 4), out_sharding=sharding) for k in "ab"}
    state = tx.init(params)
    expected = abstract_types(jax.eval_shape(lambda *x: x, params, state))
    assert abstract_types(jax.eval_shape(tx.update, params, state, params)) == expected


@pytest.mark.parametrize("name", ["kron_psgd EQ", "soap", "shampoo", "kfac"])
def test_trees_without_leaves(name, mesh):
    tx, _ = OPTIMIZERS[name]
    if name == "kfac":
        tx = ok.kfac(1.0, layers=[])
    for params in ({}, {"empty": jnp.zeros((0, 8))}):
        updates, state = tx.update(params, tx.init(params), params)
        assert types(updates) == types(params)
        assert optax.tree.map_params(tx, lambda x: x, state) is not None


def test_of_explicit_and_automatic_axes_the_explicit_ones_take_part():
    kinds = AxisType.Explicit, AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=kinds)
    params = {k: jnp.ones((4, 4)) for k in "abc"}
    tx = ok.soap(1.0)
    update = quick_jit(tx.update)
    expected, _ = update(params, tx.init(params))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec("x")))
        state = tx.init(params)
        updates, state = update(params, state)
        assert types(updates) == types(params)
    assert {len(x) for x in jax.tree.leaves(optax.tree.get(state, "stacks"))} == {4}
    assert largest_difference(jax.device_get(updates), expected) < 1e-6


@pytest.mark.parametrize("make", [ok.kfac, ok.ekfac], ids=lambda make: make.__name__)
@pytest.mark.parametrize("fallback", [None, optax.scale_by_adam()], ids=["none", "adam"])
def test_what_is_in_no_layer_may_be_sharded(make, fallback, mesh):
    tx = make(1.0, layers=[ok.Layer("a", kernel="a")], fallback=fallback)
    taps = {"taps": ok.Taps({"a": ok.Tap(jnp.ones((5, 8)), jnp.ones((5, 8)))})}
    shapes = {"a": (8, 8), "b": (8, 3), "c": (8,), "d": (16,), "e": (2,)}
    params = {
        k: jnp.ones(s, out_sharding=SPECS["replicated" if k == "e" else "first"])
        for k, s in shapes.items()
    }
    state = tx.init(params)
    update = quick_jit(lambda grads, state: tx.update(grads, state, params, **taps))
    if make is ok.ekfac:  # what is in no layer goes the same way as with K-FAC: no need to run it
        expected = abstract_types(jax.eval_shape(lambda *x: x, params, state))
        assert abstract_types(jax.eval_shape(update, params, state)) == expected
    else:
        assert types(update(params, state)) == types((params, state))


@pytest.mark.parametrize("name", ["fixed_norm", "orthogonalize", "kron_psgd newton", "soap"])
def test_vectors_may_be_sharded_in_different_ways(name, mesh):
    tx, extras = OPTIMIZERS[name]
    specs = {"a": PartitionSpec("x"), "b": PartitionSpec(), "c": PartitionSpec("x"), "s": None}
    params = {
        k: jnp.ones(16, out_sharding=NamedSharding(mesh, spec))
        if spec is not None
        else jnp.ones(())
        for k, spec in specs.items()
    }
    params["w"] = jnp.ones((16, 4), out_sharding=NamedSharding(mesh, PartitionSpec("x")))
    given = {} if extras is None else extras(params)
    updates, _ = tx.update(params, tx.init(params), params, **given)  # without jax.jit too
    jax.jit(lambda g, s, p: tx.update(g, s, p, **given))(params, tx.init(params), params)
    assert types(updates) == types(params)
