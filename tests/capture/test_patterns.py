"""The taps of every pattern against gradients of single examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron.capture.find import find_layers
from optax_kron.capture.layers import by_path
from optax_kron.capture.taps import value_and_grad_with_taps

from .patterns import PATTERNS, N

every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)


def per_example(layer, tap):
    """Gradients of every datum [N, B, d_in, d_out], from one tap."""
    inputs = tap.inputs
    if layer.is_embedding:
        inputs = jax.nn.one_hot(inputs[..., 0], layer.d_in)
    return jnp.einsum(
        "bnsi,vbnso->nbio", inputs.astype(jnp.float32), tap.output_grads.astype(jnp.float32)
    )


def assert_close(actual, expected, rtol, name=""):
    """Close relative to the largest entry."""
    scale = jnp.max(jnp.abs(expected)) + 1e-30
    np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=rtol, err_msg=name)


@every_pattern
def test_layers_are_those_expected(pattern):
    layers = find_layers(pattern.loss_fn, pattern.params, *pattern.args)
    assert {u.path for u in layers.uncovered} == set(pattern.uncovered), layers
    if pattern.layers is not None:
        assert len(layers) == pattern.layers, layers


@every_pattern
def test_taps_give_the_gradient_of_every_example(pattern):
    layers = find_layers(pattern.loss_fn, pattern.params, *pattern.args, check=False)
    fn = value_and_grad_with_taps(pattern.loss_fn, layers, fisher="empirical")
    value, grads, taps = jax.jit(fn)(pattern.params, *pattern.args)
    expected_value, expected = jax.value_and_grad(pattern.loss_fn)(pattern.params, *pattern.args)
    # bfloat16 has eight bits, which jit and no jit round in other places; all else is float32.
    rtol = 0.05 if "bf16" in pattern.name else 2e-5
    np.testing.assert_allclose(value, expected_value, rtol=rtol)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, rtol)
    single = jax.jit(jax.grad(pattern.data_loss or pattern.loss_fn))
    examples = [
        by_path(single(pattern.params, *(a[n : n + 1] for a in pattern.args))) for n in range(N)
    ]
    if pattern.name == "batch_norm":
        return  # there is no gradient of a single example
    for layer in layers:
        found = sum(per_example(layer, tap) for tap in taps[layer.name])
        # Each of the T losses of a datum weighs 1/(NT): its column is scaled by the root of 1/T.
        elements = pattern.args[-1].size / N
        wanted = elements**0.5 * jnp.stack([layer.take(g) for g in examples])
        assert_close(found, wanted, rtol, layer.name)
