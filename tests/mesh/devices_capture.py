"""Layers and taps of losses whose parameters and data have explicit shardings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard

import optax_kron as ok

# Of parameters, and of data: over one of two mesh axes, or both.
CASES = {
    "data parallel": (PartitionSpec(), PartitionSpec(("data", "model"))),
    "fsdp": (PartitionSpec("data"), PartitionSpec("data")),
    "tensor parallel": (PartitionSpec(None, "model"), PartitionSpec("data")),
}
BATCH, TOKENS, WIDTH, WORDS = 16, 6, 8, 24


def on_mesh():
    return not jax.sharding.get_abstract_mesh().empty


def whole(x):
    """A parameter on all devices, as FSDP has it in the forward pass."""
    return reshard(x, PartitionSpec()) if on_mesh() else x


def rows(table, indices):
    if not on_mesh():
        return table[indices]
    spec = PartitionSpec(*jax.typeof(indices).sharding.spec, None)
    return table.at[indices].get(out_sharding=spec)


def normal(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape) / 2, jnp.float32) for shape in shapes]


def attention():
    """One attention block on embedded tokens, with a scale that is in no layer."""

    def loss_fn(params, tokens, labels):
        p = {name: whole(x) for name, x in params.items()}
        x = rows(p["table"], tokens)
        q, k, v = (x @ p[name] for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k))
        x = (x + jnp.einsum("bts,bsd->btd", weights, v)) * p["scale"][None, None]
        logits = x @ p["head"] + p["bias"][None, None]
        return jnp.mean(ok.losses.softmax_cross_entropy_with_integer_labels(logits, labels))

    shapes = dict.fromkeys("qkv", (WIDTH, WIDTH))
    shapes |= {"table": (WORDS, WIDTH), "head": (WIDTH, WORDS), "scale": (WIDTH,), "bias": (WORDS,)}
    params = dict(zip(shapes, normal(*shapes.values()), strict=True))
    tokens, labels = np.random.default_rng(1).integers(0, WORDS, size=(2, BATCH, TOKENS))
    return loss_fn, params, (jnp.asarray(tokens), jnp.asarray(labels))


def convolution():
    """A convolution, whose taps are patches, and a readout."""

    def loss_fn(params, images, y):
        kernel, readout = whole(params["kernel"]), whole(params["readout"])
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=dims)
        out = jnp.tanh(x).reshape(len(x), -1) @ readout
        return jnp.mean(jnp.sum(ok.losses.squared_error(out, y), axis=-1))

    kernel, readout, images, y = normal((8, 3, 2, 4), (24, 8), (BATCH, 2, 3, 2), (BATCH, 8))
    return loss_fn, {"kernel": kernel[:3], "readout": readout}, (images, y)


def scan():
    """The same layer three times, each with a kernel of its own, in a scan."""

    def loss_fn(params, x, y):
        def step(x, kernel):
            return jnp.tanh(x @ kernel), None

        out, _ = jax.lax.scan(step, x, whole(params["kernels"]))
        return jnp.mean(jnp.sum(ok.losses.squared_error(out, y), axis=-1))

    kernels, x, y = normal((3, WIDTH, WIDTH), (BATCH, WIDTH), (BATCH, WIDTH))
    return loss_fn, {"kernels": kernels}, (x, y)


def placed(tree, mesh, spec):
    """Arrays on the mesh, sharded where their axes are long enough."""

    def place(x):
        axes = [*spec, *[None] * x.ndim][: x.ndim]
        fits = all(
            axis is None or size % mesh.shape[axis] == 0
            for axis, size in zip(axes, x.shape, strict=True)
            if not isinstance(axis, tuple)
        )
        return jax.device_put(
            x, NamedSharding(mesh, PartitionSpec(*axes) if fits else PartitionSpec())
        )

    return jax.tree.map(place, tree)


def check(problem, params_spec, data_spec, fisher, *, reduce=False, find=False):
    loss_fn, params, args = problem
    key = jax.random.key(3)
    # On one device other tests check them on numbers.
    layers = ok.find_layers(loss_fn, params, *args, check=False)
    fn = ok.value_and_grad_with_taps(loss_fn, layers, fisher=fisher, reduce=reduce)
    expected = jax.jit(fn)(params, *args, key=key)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        params, args = placed(params, mesh, params_spec), placed(args, mesh, data_spec)
        if find:
            found = ok.find_layers(loss_fn, params, *args)
            assert [x.name for x in found] == [x.name for x in layers]
            layers = found
        fn = ok.value_and_grad_with_taps(loss_fn, layers, fisher=fisher, reduce=reduce)
        actual = jax.jit(fn)(params, *args, key=key)
    actual, expected = jax.device_get((actual, expected))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        # Sums over examples in another order.
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_layers_and_taps_of_attention_are_those_of_one_device(case):
    check(attention(), *CASES[case], "empirical", find=True)


@pytest.mark.parametrize("fisher", ["exact", "mc", "sketch", "forward"])
def test_other_estimates_of_the_fisher_information(fisher):
    check(attention(), *CASES["fsdp"], fisher)


@pytest.mark.parametrize("make", [attention, convolution, scan], ids=lambda make: make.__name__)
def test_moments_formed_inside(make):
    check(make(), *CASES["fsdp"], "empirical", reduce=True)


@pytest.mark.parametrize("make", [convolution, scan], ids=lambda make: make.__name__)
def test_taps_of_convolutions_and_scans(make):
    check(make(), *CASES["fsdp"], "exact", find=True)


def _centred(x, kernel):
    x = x @ kernel
    return x - jnp.mean(x, axis=0, keepdims=True)


def _averaged(x, kernel):
    x = x @ kernel
    return x - jax.lax.pmean(x, "data")


@pytest.mark.parametrize("inside", [jnp.matmul, _centred, _averaged])
def test_of_a_shard_map_what_is_inside_is_declared_and_what_is_before_it_found(inside):
    spec = PartitionSpec("data")

    def loss_fn(params, x, y):
        x = jnp.tanh(x @ params["first"])
        there = jax.shard_map(inside, in_specs=(spec, PartitionSpec()), out_specs=spec)
        x = jnp.tanh(there(x, params["inside"])) @ params["last"]
        return jnp.mean(jnp.sum(ok.losses.squared_error(x, y), axis=-1))

    *kernels, x, y = normal(*[(WIDTH, WIDTH)] * 3, *[(BATCH, WIDTH)] * 2)
    params = dict(zip(("first", "inside", "last"), kernels, strict=True))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params, (x, y) = placed(params, mesh, ()), placed((x, y), mesh, spec)
        layers = ok.find_layers(loss_fn, params, x, y)
        # Not before examples of one device, or of all, are mixed.
        before = ["first"] if inside is jnp.matmul else []
        assert [layer.name for layer in layers] == [*before, "last"]
        assert "inside" in [one.path for one in layers.uncovered]
        loss, grads, _ = jax.jit(ok.value_and_grad_with_taps(loss_fn, layers, fisher="exact"))(
            params, x, y
        )
        expected = jax.jit(jax.value_and_grad(loss_fn))(params, x, y)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
    for name in params:
        np.testing.assert_allclose(grads[name], expected[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["kfac", "ekfac", "kfoc"])
def test_operators_act_on_sharded_parameters_as_on_one_device(name):
    loss_fn, params, args = scan()
    layers = ok.find_layers(loss_fn, params, *args, check=False)

    def act(params, *args):
        fn = ok.value_and_grad_with_taps(loss_fn, layers, fisher="exact")
        _, grads, taps = fn(params, *args)
        op = getattr(ok.operators, name)(taps, layers)
        return op @ grads, op.inverse(0.1) @ grads, op.trace(), op.sample(jax.random.key(0), 0.1)

    expected = jax.device_get(jax.jit(act)(params, *args))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        spec = PartitionSpec(None, "data")
        params, args = placed(params, mesh, spec), placed(args, mesh, PartitionSpec("data"))
        actual = jax.jit(act)(params, *args)
        for product in actual[:2]:
            assert jax.typeof(product["kernels"]) == jax.typeof(params["kernels"])
    actual = jax.device_get(actual)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
