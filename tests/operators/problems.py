"""Small losses with every kind of layer, and dense matrices of their curvature."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from optax_kron import find_layers, ggn_vector_product, losses, value_and_grad_with_taps
from optax_kron.layers.paths import by_path

N = 5


def draw(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape)


def labels(*shape, classes=3):
    return np.random.default_rng(0).integers(0, classes, size=(N, *shape))


def classify(logits, y):
    return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(logits, y))


def joint_bias(p, x, y):
    return classify(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] + p["c"], y)


def no_bias(p, x, y):
    return classify(jnp.tanh(x @ p["w"]) @ p["v"], y)


def shared_bias(p, x, y):
    """A bias of two kernels is a layer by itself."""
    return classify(jnp.tanh(x @ p["w"] + p["b"]) + x @ p["u"] + p["b"], y)


def bias_alone(p, x, y):
    return classify(x @ p["w"] + jnp.tanh(x + p["s"]) @ p["v"], y)


def convolution(p, x, y):
    h = jax.lax.conv_general_dilated(
        x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return classify(jnp.tanh(h + p["b"]).mean((1, 2)) @ p["v"], y)


def embedding(p, t, y):
    return classify(jnp.tanh(p["e"][t]).mean(1) @ p["v"], y)


def used_twice(p, x, y):
    return classify(jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]) @ p["v"], y)


def stacked(p, x, y):
    def layer(h, wb):
        w, b = wb
        return jnp.tanh(h @ w + b), None

    return classify(jax.lax.scan(layer, x, (p["w"], p["b"]))[0], y)


def tokens(p, x, y):
    return classify(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"], y)


def uncovered(p, x, y):
    """A parameter that is in no layer."""
    return classify(x @ (jnp.exp(p["a"]) * p["w"]) + x @ p["v"], y)


X, Y = draw(N, 3), labels()
PROBLEMS = {
    "joint_bias": (
        joint_bias,
        {"w": draw(3, 2), "b": draw(2), "v": draw(2, 3), "c": draw(3)},
        X,
        Y,
    ),
    "no_bias": (no_bias, {"w": draw(3, 2), "v": draw(2, 3)}, X, Y),
    "shared_bias": (shared_bias, {"w": draw(3, 3), "u": draw(3, 3, seed=1), "b": draw(3)}, X, Y),
    "bias_alone": (bias_alone, {"w": draw(3, 3), "s": draw(3), "v": draw(3, 3, seed=1)}, X, Y),
    "convolution": (
        convolution,
        {"k": draw(2, 2, 1, 2), "b": draw(2), "v": draw(2, 3)},
        draw(N, 3, 4, 1),
        Y,
    ),
    "embedding": (embedding, {"e": draw(4, 2), "v": draw(2, 3)}, labels(3, classes=4), Y),
    "used_twice": (used_twice, {"w": draw(3, 3), "v": draw(3, 3, seed=1)}, X, Y),
    "stacked": (stacked, {"w": draw(2, 3, 3), "b": draw(2, 3)}, X, Y),
    "tokens": (tokens, {"w": draw(3, 2), "b": draw(2), "v": draw(2, 3)}, draw(N, 4, 3), labels(4)),
    "uncovered": (uncovered, {"w": draw(3, 3), "v": draw(3, 3, seed=1), "a": draw(3)}, X, Y),
}


def problem(name):
    """The loss, the parameters, and its arguments."""
    return jax.tree.map(
        lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, PROBLEMS[name]
    )


def seen(name, fisher="exact"):
    """The layers of a problem, its gradient, and its exact taps if not told: compiled once."""
    return _seen(name, fisher, jax.config.jax_enable_x64)


@functools.cache
def _seen(name, fisher, x64):
    loss_fn, params, *args = problem(name)
    layers = find_layers(loss_fn, params, *args, check=False)
    fn = value_and_grad_with_taps(loss_fn, layers, fisher=fisher)
    _, grads, taps = jax.jit(fn)(params, *args, key=jax.random.key(0))
    return layers, grads, taps


def exact(name):
    """The generalized Gauss-Newton matrix [n, n]."""
    loss_fn, params, *args = problem(name)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    product = ggn_vector_product(loss_fn, params, *args)
    row = lambda v: jax.flatten_util.ravel_pytree(product(unravel(v)))[0]  # noqa: E731
    return jax.jit(jax.vmap(row))(jnp.eye(flat.size))


def indices(layer, params):
    """Where the entries of a layer's blocks are in the raveled parameters, [B, d_in·d_out]."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    order = layer.take(by_path(unravel(jnp.arange(flat.size, dtype=float))))
    return np.asarray(order, int).reshape(layer.blocks, -1)


def dense(layers, blocks, params):
    """The matrix [n, n] of blocks [B, d_in·d_out, d_in·d_out] of layers, zero elsewhere."""
    size = jax.flatten_util.ravel_pytree(params)[0].size
    matrix = np.zeros((size, size))
    for layer in layers:
        for rows, block in zip(indices(layer, params), blocks[layer.name], strict=True):
            matrix[np.ix_(rows, rows)] = block
    return matrix
