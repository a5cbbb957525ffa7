"""The models that the benchmarks use, as plain JAX.

*Model T* is a stack of parameter shapes in the proportions of a small transformer (3.4 million
parameters). It has no forward pass: the benchmarks feed its optimizers random gradients, so that
only the optimizer is timed.

*The digits autoencoder* is trained for real: a tanh network 64-256-128-32-8-32-128-256-64 on
scikit-learn's 1797 images of digits (pixels / 16), full batch. The loss is the sigmoid
cross-entropy summed over the pixels of an image, averaged over the images. Weights start as N(0, 1
/ d_in), biases at zero.

*The throughput autoencoder* has the same form, 784-1000-500-250-30-250-500-1000-784 (2.8 million
parameters), and uniform random numbers for 512 images: it is timed, not trained.

Nothing here depends on more than long-standing parts of JAX, and random numbers are NumPy's: old
and new versions of JAX run the very same code on the very same numbers.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax

WIDTH, HIDDEN, VOCABULARY, LAYERS = 256, 1024, 1024, 4
AUTOENCODER_SIZES = (64, 256, 128, 32, 8, 32, 128, 256, 64)
THROUGHPUT_SIZES = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
THROUGHPUT_BATCH = 512


def _dense_shapes(d_in, d_out):
    return {"kernel": (d_in, d_out), "bias": (d_out,)}


def _layer_shapes():
    attention = {name: _dense_shapes(WIDTH, WIDTH) for name in ("query", "key", "value", "output")}
    norm = {"scale": (WIDTH,), "shift": (WIDTH,)}
    return {
        "attention": attention,
        "up": _dense_shapes(WIDTH, HIDDEN),
        "down": _dense_shapes(HIDDEN, WIDTH),
        "norm_attention": norm,
        "norm_mlp": norm,
    }


def model_t_shapes():
    """Model T as a tree of shapes (tuples of integers)."""
    layers = {f"layer_{i}": _layer_shapes() for i in range(LAYERS)}
    return {"embedding": (VOCABULARY, WIDTH), **layers}


def random_tree(seed, shapes, scale=0.02):
    """Arrays of float32 normal numbers with the given tree of shapes."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        return jnp.asarray(scale * rng.standard_normal(shape, dtype=np.float32))

    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def digits_images():
    """The images of scikit-learn's digits in [0, 1], float32 [1797, 64]."""
    from sklearn.datasets import load_digits

    return (load_digits().data / 16).astype(np.float32)


def digits():
    """The same images as an array, and their labels, int32 [1797]."""
    from sklearn.datasets import load_digits

    labels = load_digits().target.astype(np.int32)
    return jnp.asarray(digits_images()), jnp.asarray(labels)


def random_images(seed=0, batch=THROUGHPUT_BATCH, pixels=THROUGHPUT_SIZES[0]):
    """Uniform random numbers in [0, 1), float32 [batch, pixels]."""
    return np.random.default_rng(seed).random((batch, pixels), dtype=np.float32)


def autoencoder_init(seed, sizes=AUTOENCODER_SIZES):
    """A list of {"kernel", "bias"}, one per dense layer."""
    rng = np.random.default_rng(seed)
    return [
        {
            "kernel": jnp.asarray(rng.standard_normal((d_in, d_out), np.float32) / d_in**0.5),
            "bias": jnp.zeros(d_out),
        }
        for d_in, d_out in pairwise(sizes)
    ]


def autoencoder_logits(params, images):
    """The reconstruction of images, before the sigmoid."""
    x = images
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def autoencoder_loss(params, images):
    """Sigmoid cross-entropy of the reconstruction, summed over pixels, mean over images."""
    logits = autoencoder_logits(params, images)
    return optax.sigmoid_binary_cross_entropy(logits, images).sum(axis=-1).mean()
