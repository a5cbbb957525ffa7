"""On a mesh of eight devices every optimizer does what it does on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_kron as ok

from ..contract.table import ROWS, Problem, largest_difference, random_like, updater

# Compiled otherwise, programs differ in rounding, which some optimizers blow up at first.
jax.config.update("jax_enable_x64", True)

KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}
SPECS = {"automatic": PartitionSpec(), "explicit": PartitionSpec(None, ("x", "y"))}
# One for each kind of state, of extra argument and of schedule.
TO_RUN = (
    "kron_psgd-EQ",
    "kron_psgd-newton",
    "shampoo-eigh",
    "soap-kl_soap",
    "kfac-captured",
    "ekfac-captured",
    "branch_kfac",
    "orthogonalize",
    "adagrad",
)
# Where refreshes are made of these, and a spoilt one fails.
STATISTICS = {
    "shampoo-eigh": "statistics",
    "soap-kl_soap": "statistics",
    "kfac-captured": "input_factor",
    "ekfac-captured": "input_factor",
}
CASES = [(row, "explicit") for row in ROWS if row.name in TO_RUN]
# Automatic axes differ in how gradients become stacks, and taps moments.
CASES += [(row, "automatic") for row, _ in CASES if row.name in ("kron_psgd-EQ", "ekfac-captured")]


def mesh_of(kind):
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(KINDS[kind],) * 2)


@functools.cache
def problem():
    """Three layers of one shape, one with a bias, a scale; 16 examples.

    All are square: of a longer axis the statistics have no unique eigenvectors at first.
    """
    rng = np.random.default_rng(0)
    shapes = {"a": (8, 8), "b": (8, 8), "c": (8, 8), "out": (8, 8), "bias": (8,), "scale": ()}
    params = {k: jnp.asarray(rng.normal(size=s)) * 0.3 for k, s in shapes.items()}
    x, y = (jnp.asarray(rng.normal(size=s)) for s in ((16, 8), (16, 8)))

    def loss(params, x, y):
        for name in "abc":
            x = jnp.tanh(x @ params[name])
        out = params["scale"] * (x @ params["out"]) + params["bias"][None]
        return jnp.mean(jnp.sum(ok.losses.squared_error(out, y), axis=-1))

    return Problem(params, loss, (x, y))


def place(mesh, tree, spec):
    """The arrays of a tree on the mesh, matrices with one sharding and all else replicated."""

    def put(x):
        return jax.device_put(x, NamedSharding(mesh, spec if x.ndim == 2 else PartitionSpec()))

    return jax.tree.map(put, tree)


def spoil(state, name):
    """The state with NaN in one block of some statistics."""

    def put(x):
        where = np.arange(x.size).reshape(x.shape) == 0
        return jax.device_put(jnp.where(where, jnp.nan, x), x.sharding)

    stacks = optax.tree.get(state, "stacks")
    stacks = {
        k: x._replace(**{name: jax.tree.map(put, getattr(x, name))}) for k, x in stacks.items()
    }
    return optax.tree.set(state, stacks=stacks)


def scaled_products(extras, factor, *args):
    """The extra arguments, with Hessian-vector products, where there are any, times a factor."""
    found = extras(*args)
    if "hvp_fn" in found:
        product = found["hvp_fn"]
        found["hvp_fn"] = lambda v: optax.tree.scale(factor, product(v))
    return found


@functools.cache
def trained(row, mesh=None, spec=None, steps=20):
    """Updates and the state of some steps.

    A gradient is not finite at the fourth, and at the eleventh, where it can be, the curvature.
    After the sixth a statistic is spoilt, from which nothing can be made any more.
    """
    known = problem()
    double = {} if row.name in ("branch_kfac", "orthogonalize") else {"factor_dtype": jnp.float64}
    tx = row.make(known, **double)
    params = known.params if mesh is None else place(mesh, known.params, spec)
    state, every = tx.init(params), []
    types = jax.tree.map(jax.typeof, state)

    @jax.jit
    def step(grads, params, state, factor):
        extras = functools.partial(scaled_products, row.extras, factor)
        updates, state = updater(row, tx, known, extras)(grads, state, params)
        return updates, optax.apply_updates(params, updates), state

    for count in range(steps):
        grads = random_like(known.params, count, scale=np.nan if count == 3 else 1.0)
        grads = grads if mesh is None else place(mesh, grads, spec)
        updates, params, state = step(grads, params, state, np.nan if count == 10 else 1.0)
        every.append(jax.device_get(updates))
        if count == 5 and row.name in STATISTICS:
            state = spoil(state, STATISTICS[row.name])
        assert jax.tree.map(jax.typeof, state) == types
        assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)
    return every, state


@pytest.mark.parametrize(("row", "kind"), CASES, ids=str)
def test_updates_are_those_of_one_device(row, kind):
    expected, one = trained(row)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        got, state = trained(row, mesh, SPECS[kind])
    scale = max(np.max(np.abs(x)) for x in jax.tree.leaves(expected))
    assert largest_difference(got, expected) < 1e-12 * scale
    assert optax.tree.get(one, "skipped_steps") > 0
    if row.name in (*STATISTICS, "kron_psgd-newton"):
        assert optax.tree.get(one, "failed_refreshes") > 0
    for name in ("count", "refreshes", "failed_refreshes", "skipped_steps", "outlier_steps"):
        counters = (optax.tree.get_all_with_path(s, name) for s in (one, state))
        for (_, mine), (_, other) in zip(*counters, strict=True):
            assert int(mine) == int(other), name
    if row.name != "branch_kfac":  # which keeps nothing of blocks
        rows = jax.tree.leaves(optax.tree.get(state, "stacks"))
        assert all(len(x) == 8 * len(x.addressable_shards[0].data) for x in rows)


def test_roundings_are_those_of_one_device():
    """Of four blocks there are eight on the mesh, as stacks are filled up."""
    storage = {"factor_dtype": jnp.bfloat16, "momentum_dtype": jnp.bfloat16}
    tx = ok.scale_by_shampoo(grafting=None, rounding="stochastic", **storage)
    params, mesh = {k: problem().params[k] for k in ("a", "b", "c", "out")}, mesh_of("explicit")

    def trained(grads):
        state = jax.jit(tx.update)(grads, jax.jit(tx.init)(grads))[1]
        return jax.device_get((state.momentum["8x8"], state.stacks["8x8"].statistics))

    expected = trained(params)
    with jax.set_mesh(mesh):
        found = trained(place(mesh, params, SPECS["explicit"]))
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_array_equal(one, other[: len(one)])


@pytest.mark.parametrize("kind", KINDS)
def test_adaptive_steps_are_those_of_one_device(kind):
    """With examples on all devices; the model's products are sums over them."""
    known, mesh = problem(), mesh_of(kind)
    layers = ok.find_layers(known.loss_fn, known.params, *known.args)
    tx = ok.adaptive_kfac(layers=layers)
    with_taps = ok.value_and_grad_with_taps(known.loss_fn, layers, fisher="exact")

    @jax.jit
    def step(params, state, batch):
        value, grads, taps = with_taps(params, *batch)
        extras = {
            "value": value,
            "value_fn": lambda p: known.loss_fn(p, *batch),
            "ggn_fn": ok.ggn_vector_product(known.loss_fn, params, *batch),
        }
        updates, state = tx.update(grads, state, params, taps=taps, **extras)
        return optax.apply_updates(params, updates), state

    def trained(params, batch):
        state = tx.init(params)
        for _ in range(8):
            params, state = step(params, state, batch)
        return jax.device_get((params, state.metrics))

    expected, metrics = trained(known.params, known.args)
    with jax.set_mesh(mesh):
        params = place(mesh, known.params, PartitionSpec())
        batch = place(mesh, known.args, PartitionSpec(("x", "y")))
        found, other = trained(params, batch)
    # Of float64; coefficients are quotients of sums, which are taken in another order.
    assert largest_difference(found, expected) < 1e-9
    assert other.accepted_steps == metrics.accepted_steps > 0
