"""Eight small tasks that differ, for `tasks.py`: models, data, and how many steps are taken.

They differ in what makes training hard: many classes of parameters (a transformer), convolutions,
a narrow middle (an autoencoder, in full batches), recurrence, a product of two unknown matrices,
derivatives in the loss, a known condition number with noise, and experts whose kernels are stacked.
Each takes some seconds with AdamW on two cores.
"""

import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tournament_runs import Metric, Task

import optax_kron as ok
from examples import autoencoder, data, digits, equations

BYTES = 128
LOSS = (Metric("training loss", "final\nloss", "{:.4g}"),)


def make(title, init, loss_fn, batch, evaluated, steps, seed) -> Task:
    """Returns a task whose metric is the loss on `evaluated`; its target is set by AdamW."""
    return Task(
        title=title,
        init=init,
        loss_fn=loss_fn,
        batch=batch,
        evaluate=lambda params: (loss_fn(params, *evaluated),),
        metrics=LOSS,
        target=("AdamW's", lambda values: False),
        steps=steps,
        seed=seed,
    )


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, jax.Array]:
    """Returns normal kernels, of a variance that keeps the sizes of activations; vectors are 0."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: jax.random.normal(key, shape) / shape[-2] ** 0.5
        if len(shape) > 1
        else jnp.zeros(shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def windows(count: int, length: int, seed: int) -> jax.Array:
    """Returns random windows of the standard library's sources, [count, length] of ASCII."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:120]
    text = np.frombuffer(b"\n".join(file.read_bytes() for file in files), np.uint8)
    text = text[text < BYTES].astype(np.int32)
    starts = np.random.default_rng(seed).integers(0, len(text) - length, count)
    return jnp.asarray(text[starts[:, None] + np.arange(length)])


def text_task(title, init, logits_of, steps, context, batch_size, seed) -> Task:
    """Each byte from those before it."""
    seen = windows(steps * batch_size, context + 1, seed).reshape(steps, batch_size, -1)

    def loss_fn(params, text):
        logits = logits_of(params, text[:, :-1])
        loss = ok.losses.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:])
        return loss.mean()

    evaluated = (windows(64, context + 1, seed + 1),)
    return make(title, init, loss_fn, lambda i: (seen[i],), evaluated, steps, seed)


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns x [..., d] at a root mean square of one, times 1 + scale [d]."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * (1 + scale)


def attention(x: jax.Array, params, heads: int, mask: jax.Array | None) -> jax.Array:
    """Returns what each position [batch, T, d] takes from those that the mask lets it see."""
    batch, length, width = x.shape
    qkv = (x @ params["qkv"]).reshape(batch, length, 3, heads, width // heads)
    scores = jnp.einsum("bthd,bshd->bhts", qkv[:, :, 0], qkv[:, :, 1]) * (width // heads) ** -0.5
    weights = jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, -1e9))
    mixed = jnp.einsum("bhts,bshd->bthd", weights, qkv[:, :, 2])
    return mixed.reshape(batch, length, width) @ params["out"]


def byte_gpt(seed: int, *, steps=200, context=64, layers=4, width=128, batch_size=16) -> Task:
    """A GPT on bytes, with learned positions and a head of its own."""
    block = {
        "norm1": (width,),
        "qkv": (width, 3 * width),
        "out": (width, width),
        "norm2": (width,),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }

    def init():
        shapes = {"bytes": (BYTES, width), "positions": (context, width), "norm": (width,)}
        params = drawn({**shapes, "head": (width, BYTES)}, seed)
        blocks = [drawn(block, seed + 1 + i) for i in range(layers)]
        # What each block adds is small at first, as there are many.
        small = {"out", "down"}
        return params | {
            f"block{i}": {k: v / (2 * layers) ** 0.5 if k in small else v for k, v in b.items()}
            for i, b in enumerate(blocks)
        }

    mask = jnp.tril(jnp.ones((context, context), bool))

    def logits_of(params, text):
        x = params["bytes"][text] + params["positions"]
        for i in range(layers):
            block = params[f"block{i}"]
            x = x + attention(rms_norm(x, block["norm1"]), block, 4, mask)
            hidden = jax.nn.gelu(rms_norm(x, block["norm2"]) @ block["up"])
            x = x + hidden @ block["down"]
        return rms_norm(x, params["norm"]) @ params["head"]

    return text_task("byte GPT", init, logits_of, steps, context, batch_size, seed)


def lstm(seed: int, *, steps=300, context=32, width=96, batch_size=32) -> Task:
    """A recurrent net on bytes, whose four gates are one kernel."""
    shapes = {
        "bytes": (BYTES, 32),
        "gates": (32 + width, 4 * width),
        "bias": (4 * width,),
        "head": (width, BYTES),
    }

    def logits_of(params, text):
        def cell(carry, x):
            hidden, memory = carry
            gates = jnp.concatenate([x, hidden], axis=-1) @ params["gates"] + params["bias"][None]
            keep, add, show, new = jnp.split(gates, 4, axis=-1)
            memory = jax.nn.sigmoid(keep + 1) * memory + jax.nn.sigmoid(add) * jnp.tanh(new)
            hidden = jax.nn.sigmoid(show) * jnp.tanh(memory)
            return (hidden, memory), hidden

        zeros = jnp.zeros((text.shape[0], width))
        inputs = jnp.swapaxes(params["bytes"][text], 0, 1)
        _, hidden = jax.lax.scan(cell, (zeros, zeros), inputs)
        return jnp.swapaxes(hidden, 0, 1) @ params["head"]

    init = partial(drawn, shapes, seed)
    return text_task("LSTM on bytes", init, logits_of, steps, context, batch_size, seed)


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
        x = x + attention(rms_norm(x, params["norm1"]), params, 4, None)
        normed = rms_norm(x, params["norm2"])
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
