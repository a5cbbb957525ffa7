"""K-FAC and EKFAC with their default settings on minibatches, beside AdamW at its best.

A tanh network 64-128-64-10 and a small convolutional net learn scikit-learn's digits for ten
epochs, in minibatches of 32, 125 and 512 of the 1297 training images. K-FAC and EKFAC have the
learning rates 0.01, 0.03 and 0.1, constant, and else what they have by default. AdamW has five,
each constant and with a cosine schedule, and stands in the table with the one of the lowest
training loss. Losses are those on all training images after the last step, and in parentheses those
on the 500 others; means over seeds, of weights, batches and drawn labels. The last lines tell what
must not be: a run that ends above its start, and a task in which no rate beats AdamW's best.
"""

import argparse
import itertools
import sys

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import optax_kron as ok
from examples import data

EPOCHS = 10
ADAMW_RATES, NATURAL_RATES = (1e-3, 3e-3, 1e-2, 2e-2, 3e-2), (0.01, 0.03, 0.1)
OPTIMIZERS = ("kfac", "ekfac")


def mlp_init(seed, images):
    """Weights of N(0, 1 / d_in), biases of zero."""
    del images
    return models.autoencoder_init(seed, (64, 128, 64, 10))


def mlp_logits(params, images):
    """A tanh network on pixels."""
    return models.autoencoder_logits(params, images.reshape(len(images), -1))


def conv_init(seed, images):
    """Kernels of N(0, 1 / inputs), biases of zero."""
    del images
    shapes = [(3, 3, 1, 8), (3, 3, 8, 16), (3, 3, 16, 16), (64, 10)]
    kernels = models.random_tree(seed, shapes, scale=1.0)
    return [
        {"kernel": kernel / np.sqrt(np.prod(shape[:-1])), "bias": jnp.zeros(shape[-1])}
        for kernel, shape in zip(kernels, shapes, strict=True)
    ]


def conv_logits(params, images):
    """Three convolutions of 3x3, of which the last two halve the image, and a linear readout."""
    *convolutions, last = params
    x = images
    for layer, stride in zip(convolutions, (1, 2, 2), strict=True):
        x = jax.lax.conv_general_dilated(
            x, layer["kernel"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jnp.tanh(x + layer["bias"])
    return x.reshape(len(x), -1) @ last["kernel"] + last["bias"]


NETS = {"mlp": (mlp_init, mlp_logits), "conv": (conv_init, conv_logits)}


def runner(net, name, batch_size, images):
    """From weights, batches [steps, batch], rates [steps] and a key to the losses before and after.

    It is compiled once: rates are arguments, and multiply the updates of the bare optimizer.
    """
    logits_of = NETS[net][1]

    def loss_fn(params, x, y):
        logits = logits_of(params, x)
        return ok.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    x, y = images.train_images, images.train_labels
    if name == "adamw":
        tx = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(1e-4))
    else:
        example = NETS[net][0](0, x), x[:batch_size], y[:batch_size]
        layers = ok.find_layers(loss_fn, *example)
        tx = getattr(ok, name)(layers=layers)
        taps_fn = ok.value_and_grad_with_taps(loss_fn, layers)

    def step(carry, seen):
        params, state = carry
        rows, rate, key = seen
        extra = {}
        if name == "adamw":
            grads = jax.grad(loss_fn)(params, x[rows], y[rows])
        else:
            _, grads, extra["taps"] = taps_fn(params, x[rows], y[rows], key=key)
        updates, state = tx.update(grads, state, params, **extra)
        updates = jax.tree.map(lambda u: -rate * u, updates)
        return (optax.apply_updates(params, updates), state), None

    def losses(params):
        test = loss_fn(params, images.test_images, images.test_labels)
        return jnp.stack([loss_fn(params, x, y), test])

    @jax.jit
    def run(params, order, rates, key):
        keys = jax.random.split(key, len(order))
        (last, _), _ = jax.lax.scan(step, (params, tx.init(params)), (order, rates, keys))
        return jnp.stack([losses(params), losses(last)])

    return run


def runs(net, name, batch_size, images, seeds):
    """Losses at the start, at the end and held out, [seeds, 3], by rate, and schedule of AdamW."""
    run = runner(net, name, batch_size, images)
    steps = EPOCHS * (len(images.train_labels) // batch_size)
    shapes = {"": np.ones(steps)}
    if name == "adamw":
        shapes["cosine"] = np.asarray(optax.cosine_decay_schedule(1.0, steps)(np.arange(steps)))
    found = {}
    for rate in ADAMW_RATES if name == "adamw" else NATURAL_RATES:
        for label, shape in shapes.items():
            rows = []
            for seed in range(seeds):
                order = data.batch_order(len(images.train_labels), batch_size, steps, seed)
                params = NETS[net][0](seed, images.train_images)
                rates = jnp.asarray(rate * shape, jnp.float32)
                (start, _), (final, test) = run(params, order, rates, jax.random.key(seed))
                rows.append([float(start), float(final), float(test)])
            found[f"{rate:g} {label}".strip()] = np.array(rows)
    return found


def best(found):
    """The label of the lowest mean training loss."""
    means = {label: np.nan_to_num(x[:, 1].mean(), nan=np.inf) for label, x in found.items()}
    return min(means, key=means.__getitem__)


def misses_of(task, found):
    """What must not be, in words."""
    bar = found["adamw"][best(found["adamw"])][:, 1].mean()
    for name, by_rate in found.items():
        if name == "adamw":
            continue
        for label, x in by_rate.items():
            if not (x[:, 1] <= x[:, 0]).all():
                yield f"{task}: {name}({label}) ends above its start"
        if not by_rate[best(by_rate)][:, 1].mean() < bar:
            yield f"{task}: no rate of {name} beats AdamW's {bar:.2g}"


def row_of(net, batch, found):
    """A row of the table: of AdamW its best, of the others every rate."""
    label = best(found["adamw"])
    shown = {"adamw": {label: found["adamw"][label]}} | {k: found[k] for k in found if k != "adamw"}
    means = [x.mean(axis=0) for by_rate in shown.values() for x in by_rate.values()]
    cells = [f"{final:.2g} ({test:.2g})" for _, final, test in means]
    return net, str(batch), f"{means[0][0]:.2f}", f"{cells[0]} at {label}", *cells[1:]


def main():
    """Print the table and the misses; exit code 1 if there are any."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 125, 512])
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    images = jax.device_put(data.load_data())
    table = Table(title="Training loss after ten epochs (held-out loss)")
    for name in ("net", "batch", "start", "AdamW's best"):
        table.add_column(name)
    for name in args.optimizers:
        for rate in NATURAL_RATES:
            table.add_column(f"{name} {rate:g}", justify="right")
    misses = []
    for net, batch in itertools.product(args.nets, args.batches):
        optimizers = ("adamw", *args.optimizers)
        found = {name: runs(net, name, batch, images, args.seeds) for name in optimizers}
        row = row_of(net, batch, found)
        table.add_row(*row)
        print(*row, sep="  ", file=sys.stderr, flush=True)
        misses += misses_of(f"{net}, batches of {batch}", found)
    Console(width=None if sys.stdout.isatty() else 170).print(table)
    print("\n".join(misses) or "none ends above its start; each beats AdamW's best at some rate")
    return int(bool(misses))


if __name__ == "__main__":
    sys.exit(main())
