"""The tasks of `tasks.py` on text, and what all of its tasks are made with."""

from functools import partial

import jax
import jax.numpy as jnp
from tournament_runs import Metric, Task

import optax_kron as ok
from examples import byte_gpt as gpt

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


def text_task(title, init, loss_fn, steps, context, batch_size, seed) -> Task:
    """Each byte from those before it."""
    seen = gpt.load_windows(steps, batch_size, context, seed)
    evaluated = gpt.load_windows(1, 64, context, seed + 1)
    return make(title, init, loss_fn, lambda i: (seen[i],), evaluated, steps, seed)


def byte_gpt(seed: int, *, steps=200, context=64, layers=4, width=128, batch_size=16) -> Task:
    """The GPT of examples/contest.py."""
    init = partial(gpt.init, jax.random.key(seed), layers, width, context)
    return text_task("byte GPT", init, gpt.loss_fn, steps, context, batch_size, seed)


def lstm(seed: int, *, steps=300, context=32, width=96, batch_size=32) -> Task:
    """A recurrent net on bytes, whose four gates are one kernel."""
    shapes = {
        "bytes": (gpt.BYTES, 32),
        "gates": (32 + width, 4 * width),
        "bias": (4 * width,),
        "head": (width, gpt.BYTES),
    }

    def loss_fn(params, windows):
        def cell(carry, x):
            hidden, memory = carry
            gates = jnp.concatenate([x, hidden], axis=-1) @ params["gates"] + params["bias"][None]
            keep, add, show, new = jnp.split(gates, 4, axis=-1)
            memory = jax.nn.sigmoid(keep + 1) * memory + jax.nn.sigmoid(add) * jnp.tanh(new)
            hidden = jax.nn.sigmoid(show) * jnp.tanh(memory)
            return (hidden, memory), hidden

        zeros = jnp.zeros((windows.shape[0], width))
        inputs = jnp.swapaxes(params["bytes"][windows[:, :-1]], 0, 1)
        _, hidden = jax.lax.scan(cell, (zeros, zeros), inputs)
        logits = jnp.swapaxes(hidden, 0, 1) @ params["head"]
        loss = ok.losses.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
        return loss.mean()

    init = partial(drawn, shapes, seed)
    return text_task("LSTM on bytes", init, loss_fn, steps, context, batch_size, seed)
