"""A small classifier, and runs of it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_kron as ok

SIZES = (12, 10, 8, 4)


def batch(count=64, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, SIZES[0])).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(np.argmax(x[:, : SIZES[-1]], axis=1))


def params(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    made = {}
    for i, (d, e) in enumerate(itertools.pairwise(SIZES)):
        kernel = rng.normal(size=(d, e)) / np.sqrt(d)
        made[f"dense{i}"] = {"kernel": jnp.asarray(kernel, dtype), "bias": jnp.zeros(e, dtype)}
    return made


def loss_fn(params, x, y, scale=1.0):
    for name in sorted(params):
        layer = params[name]
        hidden = x @ layer["kernel"] + layer["bias"][None]
        x = jax.nn.relu(hidden)
    losses = ok.losses.softmax_cross_entropy_with_integer_labels(hidden, y)
    return scale * jnp.mean(losses)


@functools.cache
def layers():
    return ok.find_layers(loss_fn, params(), *batch())


def run(tx, start, batches, with_taps=False, scale=1.0, change=lambda grads: grads):
    """Train; returns the state, parameters, and the last gradients, updates and all losses."""
    state, losses, states = tx.init(start), [], []

    @jax.jit
    def step(params, state, x, y):
        if with_taps:
            fn = ok.value_and_grad_with_taps(loss_fn, layers(), fisher="exact")
            loss, grads, taps = fn(params, x, y, scale)
            extra = {"taps": taps}
        else:
            loss, grads = jax.value_and_grad(loss_fn)(params, x, y, scale)
            extra = {}
        grads = change(grads)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, grads, updates, loss

    for x, y in batches:
        start, state, grads, updates, loss = step(start, state, x, y)
        losses.append(float(loss))
        states.append(state)
    return {
        "state": state,
        "states": states,
        "params": start,
        "gradients": grads,
        "updates": updates,
        "losses": losses,
    }
