"""The taps of every pattern against gradients of single examples."""

import math

import pytest

from optax_kron.capture.find import find_layers

from . import joined_patterns  # noqa: F401  (which adds to the patterns)
from .helpers import assert_examples
from .patterns import PATTERNS, N

every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)


# The check on numbers compiles a program of its own; these take all that it does differently.
CHECKED = (
    "perceptron",
    "cast_to_bf16",
    "embedding",
    "tied_embedding_pooled_under_a_head_with_bias",
    "conv_grouped",
    "recurrent",
    "branches",
)


# Up to JAX 0.8 the derivative of every cast from real to complex numbers warns, also of jax.grad.
@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@every_pattern
def test_layers_and_their_taps(pattern):
    """The layers are those expected, and their taps give the gradient of every example."""
    layers = find_layers(
        pattern.loss_fn, pattern.params, *pattern.args, check=pattern.name in CHECKED
    )
    assert {u.path for u in layers.uncovered} == set(pattern.uncovered), layers
    if pattern.layers is not None:
        assert len(layers) == pattern.layers, layers
    if not len(layers) or not pattern.has_examples:
        return
    # Each of the T losses of an example weighs 1/(NT): its column is scaled by the root of 1/T.
    scale = math.sqrt(pattern.args[-1].size / N) if pattern.scale is None else pattern.scale
    assert_examples(
        pattern.loss_fn,
        pattern.params,
        pattern.args,
        layers,
        column=pattern.data_loss,
        scale=scale,
        axis=pattern.axis,
        # bfloat16 has eight bits, which jit and no jit round in other places; all else is float32.
        rtol=0.05 if "bf16" in pattern.name else 2e-5,
    )
