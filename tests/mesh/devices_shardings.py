"""Gradients that lie on several devices, without a mesh that the library is told of."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_kron as ok
from optax_kron.transforms import stacks

BAD = (np.nan, np.inf, -np.inf)


@pytest.fixture(scope="module")
def rows_on_devices():
    """Places the rows of an array, 16 of them, on eight devices."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    return lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("x")))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", [0, 7, 15])
def test_what_is_not_finite_is_seen_on_every_device(bad, where, rows_on_devices):
    x = np.ones((16, 3), np.float32)
    assert jax.jit(stacks.all_finite)({"x": rows_on_devices(x)})
    x[where, 1] = bad
    for dtype in (jnp.float32, jnp.bfloat16, jnp.complex64):
        given = rows_on_devices(jnp.asarray(x, dtype))
        assert not jax.jit(stacks.all_finite)({"x": given})
        assert not jnp.all(jax.jit(stacks.finite_blocks)([given]))


@pytest.mark.parametrize(
    "make", [ok.kron_psgd, ok.soap, ok.shampoo], ids=lambda make: make.__name__
)
@pytest.mark.parametrize("where", [0, 9])
def test_a_gradient_that_is_not_finite_on_one_device_is_skipped(make, where, rows_on_devices):
    tx = make(0.1)
    params = rows_on_devices(jnp.ones((16, 4)))
    state = jax.jit(tx.init)(params)
    update = jax.jit(tx.update)
    for step in range(3):
        grads = np.ones((16, 4), np.float32)
        if step == 1:
            grads[where, 2] = np.nan
        updates, state = update(rows_on_devices(grads), state, params)
        assert jnp.all(jnp.isfinite(updates))
        assert jnp.any(updates != 0) == (step != 1)
    assert optax.tree.get(state, "skipped_steps") == 1


@pytest.mark.parametrize(
    "make", [ok.kron_psgd, ok.soap, ok.shampoo], ids=lambda make: make.__name__
)
def test_what_fills_a_stack_up_is_no_part_of_a_parameter(make):
    tx = make(0.1, blocking=ok.Blocking(stacked_axes=1))
    gradient = jnp.array([[1.0], [2.0], [3.0]])
    expected, _ = tx.update(gradient, tx.init(gradient), gradient)
    with jax.set_mesh(jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))):
        updates, _ = tx.update(gradient, tx.init(gradient), gradient)
    assert np.all(expected != 0)
    np.testing.assert_allclose(jax.device_get(updates), jax.device_get(expected), rtol=1e-6)
