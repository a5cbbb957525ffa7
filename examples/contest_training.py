"""How contest.py trains: programs that serve for all factors of the rates, and curves of means."""

import time
from functools import partial

import jax
import numpy as np
import optax
from byte_gpt import loss_fn

EVERY = 10  # steps that a point of the curves is the mean of


def compile_step(make, rate, params, batch):
    """Returns a step, of any factor of the rates, its first state, and seconds of compiling."""

    def step(factor, params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = make(partial(rate, factor)).update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, start = jax.jit(make(partial(rate, 1.0)).init)(params), time.perf_counter()
    step = jax.jit(step).lower(1.0, params, state, batch).compile()
    return step, state, time.perf_counter() - start


def train(step, factor, params, state, windows):
    """Returns the mean loss of every ten steps, and the milliseconds of a step."""
    jax.block_until_ready(step(factor, params, state, windows[0]))
    losses, start = [], time.perf_counter()
    for i, batch in enumerate(windows):
        params, state, loss = step(factor, params, state, batch)
        losses.append(loss if i % EVERY else jax.block_until_ready(loss))
    losses = np.array(jax.device_get(losses))
    milliseconds = 1e3 * (time.perf_counter() - start) / len(losses)
    return [float(losses[i : i + EVERY].mean()) for i in range(0, len(losses), EVERY)], milliseconds
