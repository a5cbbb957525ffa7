"""Taps inside `jax.shard_map`: each device sees what it would see alone."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

import optax_kron as ok
from optax_kron.capture.execution.columns import ESTIMATES

DEVICES = 2
RNG = np.random.default_rng(5)
# Parameters and data of every device.
PARAMS = {
    name: jnp.asarray(RNG.normal(size=(DEVICES, *shape)), jnp.float32)
    for name, shape in {"in": (3, 4), "b": (4,), "scanned": (2, 4, 4), "out": (4, 2)}.items()
}
X = jnp.asarray(RNG.normal(size=(DEVICES, 5, 3)), jnp.float32)
Y = jnp.asarray(RNG.integers(2, size=(DEVICES, 5)))
SHARED, SPLIT = PartitionSpec(), PartitionSpec("data")


def loss_fn(params, x, y):
    """With a loop, a checkpoint and a branch, whose types have to agree."""

    def step(h, w):
        return jax.checkpoint(lambda h: jnp.tanh(h @ w))(h), None

    h, _ = jax.lax.scan(step, jnp.tanh(x @ params["in"] + params["b"]), params["scanned"])
    double, triple = (lambda h, c=c: c * h @ params["out"] for c in (2.0, 3.0))
    logits = jax.lax.cond(jnp.sum(h) > 0, double, triple, h)
    return ok.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def of_device(i, tree):
    return jax.tree.map(lambda x: x[i], tree)


def as_device(function):
    """A function of what one device has, as a part of a mesh."""

    def run(*args):
        return jax.tree.map(lambda x: x[None], function(*of_device(0, args)))

    return run


def taps_fn(fisher, reduce):
    layers = ok.find_layers(loss_fn, *of_device(0, (PARAMS, X, Y)), check=False)
    assert not layers.uncovered
    fn = ok.value_and_grad_with_taps(loss_fn, layers, fisher=fisher, reduce=reduce)
    return lambda *args: fn(*args, key=jax.random.key(0))


def programs(fn, mesh):
    """On a mesh: every device with parameters of its own, and all with the same."""
    settings = {"mesh": mesh, "check_vma": True}
    own = jax.shard_map(as_device(fn), in_specs=SPLIT, out_specs=SPLIT, **settings)

    def share(params, x, y):
        value, grads, taps = fn(params, *of_device(0, (x, y)))
        return value[None], grads, jax.tree.map(lambda x: x[None], taps)

    specs = {"in_specs": (SHARED, SPLIT, SPLIT), "out_specs": (SPLIT, SHARED, SPLIT)}
    return own, jax.shard_map(share, **specs, **settings)


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("fisher", ESTIMATES)
def test_types_agree(fisher, reduce):
    mesh = AbstractMesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    own, share = programs(taps_fn(fisher, reduce), mesh)
    jax.eval_shape(own, PARAMS, X, Y)
    jax.eval_shape(share, of_device(0, PARAMS), X, Y)


def assert_close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def main():
    """Compare with single devices, in a process with several."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    for reduce in (False, True):
        fn = taps_fn("exact", reduce)
        own, share = map(jax.jit, programs(fn, mesh))
        alone = [fn(*of_device(i, (PARAMS, X, Y))) for i in range(DEVICES)]
        assert_close(own(PARAMS, X, Y), jax.tree.map(lambda *x: jnp.stack(x), *alone))

        params = of_device(0, PARAMS)
        alone = [fn(params, X[i], Y[i]) for i in range(DEVICES)]
        values, grads, taps = share(params, X, Y)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *alone)
        # As dictionaries: what taps know of the gradient is that of all devices.
        assert_close((values, dict(taps)), (stacked[0], dict(stacked[2])))
        # Of what they share, JAX gives devices the sum of their gradients.
        assert_close(grads, jax.tree.map(lambda x: x.sum(0), stacked[1]))
        print(reduce)  # noqa: T201


def test_equal_to_single_devices():
    flags = os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={DEVICES}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.capture.test_shard_map"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "True"], done.stderr


if __name__ == "__main__":
    main()
