"""Eight small tasks that differ, for `tasks.py`: models, data, and how many steps are taken.

They differ in what makes training hard: many classes of parameters (a transformer), convolutions,
a narrow middle (an autoencoder, in full batches), recurrence, a product of two unknown matrices,
derivatives in the loss, a known condition number with noise, and experts whose kernels are stacked.
Each takes some seconds with AdamW on two cores.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tasks_text import byte_gpt, drawn, lstm, make
from tournament_runs import Task

import optax_kron as ok
from examples import autoencoder, data, digits, equations
from examples import byte_gpt as gpt


def images_task(title, init, loss_fn, steps, batch_size, seed) -> Task:
    """Labels of the digits, on minibatches."""
    images = data.load_data()
    order = data.batch_order(len(images.train_labels), batch_size, steps, seed)
    images, order = jax.device_put((images, order))

    def batch(i):
        return images.train_images[order[i]], images.train_labels[order[i]]

    evaluated = (images.train_images, images.train_labels)
    return make(title, init, loss_fn, batch, evaluated, steps, seed)


def conv_net(seed: int, *, steps=150, batch_size=100) -> Task:
    """The net of examples/digits.py."""
    image = jnp.zeros((1, 8, 8, 1))

    def init():
        return digits.ConvNet().init(jax.random.key(seed), image)

    return images_task("digits, conv net", init, digits.loss_fn, steps, batch_size, seed)


def experts(seed: int, *, steps=200, width=32, count=4, batch_size=100) -> Task:
    """Attention over the rows of an image, then experts that are mixed by a gate."""
    shapes = {
        "rows": (8, width),
        "positions": (8, width),
        "qkv": (width, 3 * width),
        "out": (width, width),
        "gate": (width, count),
        "up": (count, width, 2 * width),
        "down": (count, 2 * width, width),
        "norm1": (width,),
        "norm2": (width,),
        "head": (width, 10),
    }

    def loss_fn(params, images, labels):
        x = images.reshape(-1, 8, 8) @ params["rows"] + params["positions"]
        x = x + gpt.attention(gpt.rms_norm(x, 1 + params["norm1"]), params, 4, None)
        normed = gpt.rms_norm(x, 1 + params["norm2"])
        gate = jax.nn.softmax(normed @ params["gate"])
        hidden = jax.nn.gelu(jnp.einsum("btd,edh->beth", normed, params["up"]))
        made = jnp.einsum("beth,ehd->betd", hidden, params["down"])
        x = x + jnp.einsum("bte,betd->btd", gate, made)
        logits = x.mean(axis=1) @ params["head"]
        return ok.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    init = partial(drawn, shapes, seed)
    return images_task("digits, experts", init, loss_fn, steps, batch_size, seed)


def digits_autoencoder(seed: int, *, steps=200) -> Task:
    """The net of examples/autoencoder.py, on all images at every step."""
    images = autoencoder.load_images()

    def init():
        return autoencoder.Autoencoder().init(jax.random.key(seed), images[:1])

    title, loss_fn = "digits autoencoder", autoencoder.loss_fn
    return make(title, init, loss_fn, lambda i: (images,), (images,), steps, seed)


def factorisation(seed: int, *, steps=300, rows=192, columns=128, rank=16, batch_size=1024) -> Task:
    """Two factors of a matrix with singular values from 1 to 1e-2, from some elements a step."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.standard_normal((rows, rank)))
    right, _ = np.linalg.qr(rng.standard_normal((columns, rank)))
    matrix = (left * np.logspace(0, -2, rank)) @ right.T
    matrix = jnp.asarray(matrix / matrix.std(), jnp.float32)
    places = jnp.asarray(rng.integers(0, rows * columns, (steps, batch_size)))

    def loss_fn(params, chosen):
        i, j = chosen // columns, chosen % columns
        products = (params["left"][i] * params["right"][j]).sum(axis=-1)
        return ok.losses.squared_error(products, matrix[i, j]).mean()

    init = partial(drawn, {"left": (rows, rank), "right": (columns, rank)}, seed)
    everywhere = (jnp.arange(rows * columns),)
    title = "matrix factorisation"
    return make(title, init, loss_fn, lambda i: (places[i],), everywhere, steps, seed)


def poisson(seed: int, *, steps=300) -> Task:
    """The network and the equation of examples/pinn.py, in float32."""
    equation = equations.EQUATIONS["poisson"]
    graph, params = equations.make_model(seed, jnp.float32)
    loss_fn = equations.make_loss(equation, graph)
    points = equations.draw_points(equation, np.random.default_rng(seed), 512, 128)
    points = tuple(jnp.asarray(x, jnp.float32) for x in points)
    init = partial(jax.tree.map, jnp.copy, params)
    return make("Poisson equation", init, loss_fn, lambda i: points, points, steps, seed)


def noisy_quadratic(seed: int, *, steps=300, rows=96, columns=64, batch_size=64) -> Task:
    """A linear regression with noise, whose curvature has a condition number of 1e6."""
    rng = np.random.default_rng(seed)

    def root(size):  # a factor of the curvature's Kronecker product, of condition 1e3
        turn, _ = np.linalg.qr(rng.standard_normal((size, size)))
        return jnp.asarray((turn * np.logspace(0, -1.5, size)) @ turn.T, jnp.float32)

    left, right = root(rows), root(columns)
    kernel = jnp.asarray(0.3 * rng.standard_normal((rows, columns)), jnp.float32)

    def loss_fn(params, inputs, noise):
        outputs = (inputs @ params["kernel"]) @ right
        targets = (inputs @ kernel) @ right + noise
        return ok.losses.squared_error(outputs, targets).sum(axis=-1).mean()

    def batch(i):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), i))
        inputs = jax.random.normal(keys[0], (batch_size, rows)) @ left
        return inputs, 0.1 * jax.random.normal(keys[1], (batch_size, columns))

    # The mean over inputs whose second moment is exact, without the noise, which none can learn.
    evaluated = (rows**0.5 * left, jnp.zeros((rows, columns)))
    init = partial(drawn, {"kernel": (rows, columns)}, seed)
    return make("noisy quadratic", init, loss_fn, batch, evaluated, steps, seed)


PROBLEMS: dict[str, Callable[[int], Task]] = {
    "byte_gpt": byte_gpt,
    "conv_net": conv_net,
    "autoencoder": digits_autoencoder,
    "lstm": lstm,
    "factorisation": factorisation,
    "poisson": poisson,
    "quadratic": noisy_quadratic,
    "experts": experts,
}
