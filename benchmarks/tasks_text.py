"""The tasks of `tasks.py` on text, and what all of its tasks are made with."""

import sysconfig
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tournament_runs import Metric, Task

import optax_kron as ok

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
