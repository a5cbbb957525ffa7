"""Between devices goes one exchange in and one out for each kind of block, and single numbers."""

import collections
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_kron as ok

OPTIMIZERS = {
    "kron_psgd": ok.kron_psgd(1.0),
    "soap": ok.soap(1.0, refresh_every=2),
    "shampoo": ok.shampoo(1.0, refresh_every=2, stagger=True),
}
SPECS = {"replicated": PartitionSpec(), "rows": PartitionSpec("x")}
KINDS = "all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute"


def collectives(text):
    """Of an optimized program: how many of each kind there are, and the arrays all-reduced."""
    found = re.findall(rf"= (.*?) ({KINDS})(?:-start)?\(", text)
    shapes = [
        s for shape, kind in found if kind == "all-reduce" for s in re.findall(r"\[.*?\]", shape)
    ]
    return collections.Counter(kind for _, kind in found), shapes


def loop_bodies(text):
    """The computations that loops run, at any depth."""
    computations = dict(re.findall(r"^%?([\w.-]+) .*?\{\n(.*?)^\}", text, re.DOTALL | re.MULTILINE))
    names = set(re.findall(r"body=%?([\w.-]+)", text))
    while True:
        called = {
            name
            for body in names
            for name in re.findall(r"%([\w.-]+)", computations.get(body, ""))
            if name in computations
        }
        if called <= names:
            return [computations[name] for name in names]
        names |= called


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_exchange_in_and_one_out_for_each_kind_of_block(name, kind, spec):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    shapes = {"a": (8, 8), "b": (8, 8), "c": (8, 8), "d": (16, 8), "e": (16, 8), "f": (8,)}
    tx = OPTIMIZERS[name]
    with jax.set_mesh(mesh):
        params = {
            k: jax.device_put(jnp.ones(s), NamedSharding(mesh, SPECS[spec]))
            for k, s in shapes.items()
        }
        state = jax.jit(tx.init)(params)
        text = jax.jit(tx.update).lower(params, state, params).compile().as_text()
    counts, reduced = collectives(text)
    kinds_of_blocks = 3
    assert counts["all-gather"] + counts["all-to-all"] <= 2 * kinds_of_blocks
    if spec == "replicated":  # there every device has its rows already
        assert counts["all-gather"] + counts["all-to-all"] <= kinds_of_blocks
    assert counts["all-reduce"] >= 1  # is it finite?
    assert set(reduced) == {"[]"}  # of numbers
    assert set(counts) <= {"all-gather", "all-to-all", "all-reduce"}
    bodies = loop_bodies(text)
    assert bodies
    assert not any(re.search(rf"({KINDS})(-start)?\(", body) for body in bodies)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize(("make", "gathers"), [(ok.kfac, 1), (ok.ekfac, 3)], ids=["kfac", "ekfac"])
def test_moments_are_summed_once_and_updates_of_a_kind_of_layer_gathered_once(make, gathers, kind):
    """Examples are sharded; EKFAC needs both bases of all layers wherever there are examples."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    names = [f"layer{i}" for i in range(8)]
    layers = [ok.Layer(name, name) for name in names]
    tx = make(0.1, layers=layers, refresh_every=2)
    with jax.set_mesh(mesh):
        whole, rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (None, "x")))
        params = jax.device_put({name: jnp.ones((6, 6)) for name in names}, whole)
        examples = jax.device_put(jnp.ones((1, 16, 1, 6)), rows)
        grads = jax.device_put(
            jnp.ones((1, 1, 16, 1, 6)), NamedSharding(mesh, PartitionSpec(None, None, "x"))
        )
        weights = jax.device_put(jnp.full(16, 1 / 16), whole)
        taps = ok.Taps({name: (ok.Tap(examples, grads, weights),) for name in names})
        state = jax.jit(tx.init)(params)
        update = jax.jit(lambda g, s, p, t: tx.update(g, s, p, taps=t))
        text = update.lower(params, state, params, taps).compile().as_text()
    counts, reduced = collectives(text)
    assert counts["all-gather"] <= gathers
    assert set(counts) == {"all-gather", "all-reduce"}
    assert set(reduced) <= {"[]", "[6,6]", "[1,6,6]", "[8]", "[1]"}
    assert not any(re.search(rf"({KINDS})(-start)?\(", body) for body in loop_bodies(text))
