"""Learning rates of nets of several widths: does the best one move?

Nets 64-w-w-w-10 with tanh learn scikit-learn's digits in minibatches of 256, without biases, from
normal weights of variance 1 / inputs, at learning rates a factor of two apart. With `fixed_norm`
a rate is the angle by which a kernel turns, whatever its width; the last kernel, whose size is to
be learned, has no fixed norm, and a rate of 0.01. The loss is that of all training images after the
last step, in the mean over seeds; the table has the best rate of each width, and the picture the
losses of all.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import optax_kron as ok
from examples import common, data

WIDTHS = (128, 256, 512)
RATES = tuple(2.0**k for k in range(-11, -1))
LAST_RATE = 0.01  # of the last kernel beside fixed norms
FIXED = [True, True, True, False]


def fixed(direction, rate, last_rate):
    """A direction at fixed norms, of all kernels but the last."""
    return ok.fixed_norm(direction, rate, mask=FIXED, other_learning_rate=last_rate)


# Of a schedule, and of that of the last kernel beside fixed norms.
OPTIMIZERS = {
    "adam": lambda rate, _: optax.adam(rate),
    "fixed_norm(adam)": lambda *rates: fixed(optax.scale_by_adam(), *rates),
    "soap": lambda rate, _: ok.soap(rate),
    "fixed_norm(soap)": lambda *rates: fixed(ok.scale_by_soap(), *rates),
}


def init(seed, width):
    """The kernels."""
    sizes = (64, width, width, width, 10)
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    return [
        jax.random.normal(key, (n, m)) / n**0.5
        for key, n, m in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def loss_fn(params, images, labels):
    """The mean cross-entropy."""
    x = images
    for kernel in params[:-1]:
        x = jnp.tanh(x @ kernel)
    logits = x @ params[-1]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def final_loss(make, rate, params, order, images, labels):
    """The loss of all images after a run with a cosine schedule from a rate."""
    steps = len(order)

    def schedule(peak):
        return lambda count: 0.5 * peak * (1 + jnp.cos(jnp.pi * count / steps))

    optimizer = make(schedule(rate), schedule(LAST_RATE))

    def step(carry, chosen):
        params, state = carry
        grads = jax.grad(loss_fn)(params, images[chosen], labels[chosen])
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), order)
    return loss_fn(params, images, labels)


def measure(name, width, steps, seeds):
    """Losses at all rates, [rates], in the geometric mean over seeds."""
    digits = data.load_data()
    images, labels = digits.train_images.reshape(-1, 64), digits.train_labels
    run = jax.jit(partial(final_loss, OPTIMIZERS[name]))
    losses = np.empty((seeds, len(RATES)))
    for seed in range(seeds):
        order = data.batch_order(len(images), 256, steps, seed)
        for i, rate in enumerate(RATES):
            losses[seed, i] = run(rate, init(seed, width), order, images, labels)
    return np.exp(np.log(losses).mean(axis=0))


def draw(results, path):
    """Losses over rates, a panel for each optimizer and a curve for each width."""
    figure = Figure(figsize=(13, 3.8), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(OPTIMIZERS), sharey=True)
    for axes, name in zip(panels, OPTIMIZERS, strict=True):
        for width, shade in zip(WIDTHS, ("#9cc4e8", "#4a8cc9", "#12406e"), strict=True):
            losses = results[name, width]
            axes.plot(RATES, losses, color=shade, lw=2, label=f"width {width}")
            best = int(np.nanargmin(losses))
            axes.plot(RATES[best], losses[best], "o", color=shade)
        axes.set(title=name, xlabel="learning rate", xscale="log", yscale="log")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="training loss")
    panels[0].legend(frameon=False)
    common.save(figure, path)


def main():
    """Measure, print and draw; the exit status tells whether a fixed norm keeps the best rate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_common(parser, steps=60, out="out/widths.png")
    parser.add_argument("--seeds", type=common.positive_integer, default=3, help="from 0 on")
    given = parser.parse_args()
    runs = [(name, width) for name in OPTIMIZERS for width in WIDTHS]
    results = {run: measure(*run, given.steps, given.seeds) for run in track(runs)}
    table = Table("", *(f"width {w}" for w in WIDTHS), "moves by", "losses", box=box.SIMPLE)
    moved = {}
    for name in OPTIMIZERS:
        best = [int(np.nanargmin(results[name, width])) for width in WIDTHS]
        moved[name] = 2.0 ** (max(best) - min(best))
        lowest = " ".join(f"{np.nanmin(results[name, width]):.2g}" for width in WIDTHS)
        table.add_row(name, *(f"{RATES[i]:.4g}" for i in best), f"{moved[name]:g}", lowest)
    Console().print(table)
    draw(results, Path(given.out))
    return int(any(moved[name] > 2 for name in OPTIMIZERS if name.startswith("fixed_norm")))


if __name__ == "__main__":
    sys.exit(main())
