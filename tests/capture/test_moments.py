"""Second moments formed inside the traced function against those of the taps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron.capture.find import find_layers
from optax_kron.capture.taps import value_and_grad_with_taps
from optax_kron.layers.moments import moments_of

from . import joined_patterns  # noqa: F401  (which adds to the patterns)
from .patterns import PATTERNS

CHOSEN = (
    "leading_axes",
    "mapped_over_data",
    "cast_to_bf16",
    "outputs_split",
    "kernel_split",
    "weight_used_twice",
    "bias_of_two_kernels",
    "subtracted_bias",
    "conv_grouped",
    "conv_strided",
    "positions",
    "layer_norm",
    "recurrent",
    "scanned_rematerialized_layers",
    "branches",
    "laplacian_by_forward_mode",
    "scanned_convolutions",
    "lookup_in_a_branch_of_a_scan",
    "lookup_that_clips",
    "tied_embedding",
    "tied_embedding_around_scanned_layers",
    "tied_embedding_under_vmap_read_twice",
    "tied_embeddings_of_an_ensemble",
    "flattened_tokens",
    "masked_losses",
    "masked_steps",
    "fused_heads",
    "joined_inputs",
    "stacked_layers_then_scanned",
    "joined_in_a_scan",
    "class_token",
    "scaled_by_numbers",
    "scaled_in_a_branch_of_a_scan",
    "scaled_joined_and_scanned",
)
chosen = pytest.mark.parametrize(
    "pattern", [p for p in PATTERNS if p.name in CHOSEN], ids=lambda p: p.name
)


@chosen
def test_reduced_taps_are_the_moments_of_taps(pattern):
    # Without columns there is a case of its own.
    fisher = "forward" if pattern.name in ("conv_strided", "positions") else "mc"
    layers = find_layers(pattern.loss_fn, pattern.params, *pattern.args, check=False)

    def both(params, *args):
        seen = [
            value_and_grad_with_taps(
                pattern.loss_fn, layers, fisher=fisher, samples=2, reduce=reduce
            )(params, *args, key=jax.random.key(0))
            for reduce in (False, True)
        ]
        (_, grads, taps), (_, same, moments) = seen
        wanted = {
            layer.name: tuple(moments_of(layer, tap) for tap in taps[layer.name])
            for layer in layers
        }
        return (grads, wanted), (same, dict(moments))

    expected, found = jax.jit(both)(pattern.params, *pattern.args)
    assert jax.tree.structure(expected) == jax.tree.structure(found)
    tolerance = 0.02 if "bf16" in pattern.name else 2e-5
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = jnp.max(jnp.abs(b)) + 1e-30
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance)


def test_no_array_holds_what_each_example_gave():
    """The largest array of a scanned stack's program does not grow with the batch times layers."""
    from optax_kron import losses

    layers, width = 16, 8

    def loss_fn(params, x, y):
        @jax.checkpoint
        def layer(h, w):
            return jnp.tanh(h @ w), None

        h, _ = jax.lax.scan(layer, x, params)
        return jnp.mean(losses.squared_error(h, y))

    params = jnp.zeros((layers, width, width))
    x = jax.ShapeDtypeStruct((512, width), jnp.float32)
    found = find_layers(loss_fn, params, x, x)
    memory = {}
    for reduce in (False, True):
        fn = value_and_grad_with_taps(loss_fn, found, reduce=reduce)
        step = jax.jit(lambda p, x, y, fn=fn: fn(p, x, y, key=jax.random.key(0)))
        memory[reduce] = step.lower(params, x, x).compile().memory_analysis()
    raw = 4 * layers * 512 * width  # bytes of the inputs of all layers
    assert memory[False].output_size_in_bytes > 2 * raw
    assert memory[True].output_size_in_bytes < raw / 2
