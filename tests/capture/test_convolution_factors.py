"""The input factor of a convolution is the second moment of its patches, written out with loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron import losses
from optax_kron.capture.find import find_layers
from optax_kron.capture.taps import value_and_grad_with_taps
from optax_kron.layers.moments import moments_of

N, HEIGHT, WIDTH, CHANNELS, OUT = 2, 6, 5, 4, 4
KERNEL = (3, 2)

SETTINGS = [
    {"stride": (1, 1)},
    {"stride": (2, 1)},
    {"stride": (3, 2), "padding": ((2, 1), (0, 3))},
    {"padding": ((1, 1), (1, 0))},
    {"kernel_dilation": (2, 3)},
    {"input_dilation": (2, 3)},
    {"input_dilation": (1, 2), "stride": (2, 2), "padding": ((0, 2), (1, 1))},
    {"input_dilation": (3, 1), "kernel_dilation": (2, 2), "stride": (2, 1)},
    {"padding": ((-1, 0), (0, -1))},
]


def explicit_patches(x, stride, padding, kernel_dilation, input_dilation, groups):
    """[groups, positions, kernel height, kernel width, channels of a group] of one image."""
    sizes, starts = [], []
    for axis in range(2):
        low, high = padding[axis]
        length = (x.shape[axis] - 1) * input_dilation[axis] + 1 + low + high
        reach = (KERNEL[axis] - 1) * kernel_dilation[axis] + 1
        sizes.append((length - reach) // stride[axis] + 1)
        starts.append(low)
    per_group = x.shape[-1] // groups
    patches = np.zeros((groups, sizes[0] * sizes[1], *KERNEL, per_group))
    for position, output in enumerate(itertools.product(*map(range, sizes))):
        for taps in itertools.product(*map(range, KERNEL)):
            where = [
                output[a] * stride[a] + taps[a] * kernel_dilation[a] - starts[a] for a in range(2)
            ]
            # Between the elements of a dilated input, and beyond its ends, are zeros.
            if any(where[a] % input_dilation[a] for a in range(2)):
                continue
            index = [where[a] // input_dilation[a] for a in range(2)]
            if all(0 <= index[a] < x.shape[a] for a in range(2)):
                pixel = x[tuple(index)].reshape(groups, per_group)
                patches[(slice(None), position, *taps)] = pixel
    return patches


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_input_factor_is_the_moment_of_explicit_patches(setting):
    for groups in (1, 2) if "stride" in setting else (2, 4):
        compare(setting, groups)


def compare(setting, groups):
    """The input factor that capture gives, beside that of explicit patches."""
    defaults = dict.fromkeys(("stride", "kernel_dilation", "input_dilation"), (1, 1))
    s = {**defaults, "padding": ((0, 0), (0, 0)), **setting}
    rng = np.random.default_rng(0)
    images = rng.normal(size=(N, HEIGHT, WIDTH, CHANNELS))
    with jax.enable_x64(True):
        params = {"w": jnp.asarray(rng.normal(size=(*KERNEL, CHANNELS // groups, OUT)))}

        def loss_fn(params, x):
            out = jax.lax.conv_general_dilated(
                x,
                params["w"],
                window_strides=s["stride"],
                padding=s["padding"],
                lhs_dilation=s["input_dilation"],
                rhs_dilation=s["kernel_dilation"],
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )
            return jnp.mean(jnp.sum(losses.squared_error(out), axis=(1, 2, 3)))

        (layer,) = layers = find_layers(loss_fn, params, images, check=False)
        fn = value_and_grad_with_taps(loss_fn, layers, fisher="empirical")
        _, _, taps = jax.jit(fn)(params, images)
        (tap,) = taps[layer.name]
        factor = moments_of(layer, tap).input_factor
    patches = np.stack([explicit_patches(x, groups=groups, **s) for x in images], axis=1)
    flat = patches.reshape(groups, -1, np.prod(KERNEL) * (CHANNELS // groups))
    expected = np.einsum("gpi,gpj->gij", flat, flat) / flat.shape[1]
    np.testing.assert_allclose(factor, expected, rtol=1e-12, atol=1e-14)
