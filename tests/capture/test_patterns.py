"""The taps of every pattern against gradients of single examples."""

import math

import pytest

from optax_kron.capture.find import find_layers

from .helpers import assert_examples
from .patterns import PATTERNS, N

every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)


@every_pattern
def test_layers_are_those_expected(pattern):
    layers = find_layers(pattern.loss_fn, pattern.params, *pattern.args)
    assert {u.path for u in layers.uncovered} == set(pattern.uncovered), layers
    if pattern.layers is not None:
        assert len(layers) == pattern.layers, layers


@every_pattern
def test_taps_give_the_gradient_of_every_example(pattern):
    if pattern.layers == 0 or not pattern.has_examples:
        return
    # Each of the T losses of a datum weighs 1/(NT): its column is scaled by the root of 1/T.
    scale = math.sqrt(pattern.args[-1].size / N) if pattern.scale is None else pattern.scale
    assert_examples(
        pattern.loss_fn,
        pattern.params,
        pattern.args,
        find_layers(pattern.loss_fn, pattern.params, *pattern.args, check=False),
        column=pattern.data_loss,
        scale=scale,
        axis=pattern.axis,
        # bfloat16 has eight bits, which jit and no jit round in other places; all else is float32.
        rtol=0.05 if "bf16" in pattern.name else 2e-5,
    )
