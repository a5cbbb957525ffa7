"""What state of 16 bits costs: losses of the digits autoencoder, and bytes and times of model T.

Every optimizer runs in float32, and with factors and momentum in bfloat16 that are rounded to
nearest or stochastically. Losses are means over seeds of the weights after 200 full-batch steps, at
a constant learning rate that is about the best in float32. Times are medians of steps of model T
that alternate between the three.
"""

import argparse
import sys
from statistics import mean, median, stdev

import jax
import jax.numpy as jnp
import models
import optax
import timing
from rich.console import Console
from rich.progress import track
from rich.table import Table

import optax_kron as ok

HALF = {"factor_dtype": jnp.bfloat16, "momentum_dtype": jnp.bfloat16}
STORAGE = {
    "float32": {},
    "nearest": HALF,
    "stochastic": {**HALF, "rounding": "stochastic"},
}
# The learning rate on the digits, and other settings.
OPTIMIZERS = {
    "soap": (1e-2, {}),
    "soap, kl_soap": (1e-2, {"variant": "kl_soap"}),
    "shampoo": (1e-2, {}),
    "kron_psgd": (3e-3, {"geometry": "QEQ"}),
    "kfac": (1e-1, {"damping": 1e-2}),
    "ekfac": (1e-1, {"damping": 1e-2}),
}


def digits_loss(params, images):
    """The autoencoder's, marked with the distribution that it implies."""
    logits = models.autoencoder_logits(params, images)
    return jnp.mean(jnp.sum(ok.losses.sigmoid_binary_cross_entropy(logits, images), axis=-1))


def train(name, storage, steps, seed):
    """The loss after so many steps."""
    rate, settings = OPTIMIZERS[name]
    params, images = models.autoencoder_init(seed), jnp.asarray(models.digits_images())
    method, settings = getattr(ok, name.split(",")[0]), {**settings, **STORAGE[storage]}
    with_taps = None
    if name in ("kfac", "ekfac"):
        settings["layers"] = ok.find_layers(digits_loss, params, images)
        with_taps = ok.value_and_grad_with_taps(digits_loss, settings["layers"])
    tx = method(rate, **settings)

    def step(params, state, images, key):
        taps = {}
        if with_taps is None:
            grads = jax.grad(digits_loss)(params, images)
        else:
            _, grads, taps["taps"] = with_taps(params, images, key=key)
        updates, state = tx.update(grads, state, params, **taps)
        return optax.apply_updates(params, updates), state

    step, state = jax.jit(step, donate_argnums=(0, 1)), tx.init(params)
    for key in jax.random.split(jax.random.key(seed), steps):
        params, state = step(params, state, images, key)
    return float(digits_loss(params, images))


def digits_table(names, steps, seeds):
    """Mean losses, with the standard deviation over seeds."""
    table = Table("optimizer", *STORAGE, title=f"Digits autoencoder, loss after {steps} steps")
    for name in track(names, console=Console(stderr=True)):
        cells = []
        for storage in STORAGE:
            losses = [train(name, storage, steps, seed) for seed in range(seeds)]
            spread = f" ± {stdev(losses):.2f}" if seeds > 1 else ""
            cells.append(f"{mean(losses):.2f}{spread}")
        jax.clear_caches()
        table.add_row(name, *cells)
    return table


def step_row(name, steps):
    """State bytes, bytes of temporaries, compile seconds, and median times of model T."""
    params, *gradients = (models.random_tree(i, models.model_t_shapes()) for i in range(4))
    _, settings = OPTIMIZERS[name]
    runs = {}
    for storage, own in STORAGE.items():
        tx = getattr(ok, name.split(",")[0])(1e-3, **settings, **own)
        state = jax.jit(tx.init)(params)
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        update, figures = timing.compile_timed(tx.update, params, state, params, donate=(1,))
        temporary = update.memory_analysis().temp_size_in_bytes
        runs[storage] = [update, state, [], (size, temporary, figures["compile_s"])]
    for i in range(steps):
        for run in runs.values():
            seconds, (_, run[1]) = timing.clock(
                run[0], gradients[i % len(gradients)], run[1], params
            )
            run[2].append(seconds)
    first = median(runs["float32"][2])
    for storage, (_, _, seconds, (size, temporary, compiling)) in runs.items():
        ratio = median(seconds) / first
        figures = f"{size / 2**20:.1f}", f"{temporary / 2**20:.1f}", f"{compiling:.1f}"
        yield name, storage, *figures, f"{1e3 * median(seconds):.0f}", f"{ratio:.2f}"


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("digits", "steps"), nargs="+", default=["digits"])
    parser.add_argument("--optimizers", choices=OPTIMIZERS, nargs="+", default=list(OPTIMIZERS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3, help="of the weights")
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 110)
    if "digits" in args.task:
        console.print(digits_table(args.optimizers, args.steps, args.seeds))
    if "steps" in args.task:
        columns = ("state MiB", "temporary MiB", "compile s", "ms", "ratio")
        table = Table("optimizer", "storage", *columns, title="An update of model T")
        for name in args.optimizers:
            if "kfac" not in name:
                for row in step_row(name, args.steps):
                    table.add_row(*row)
        console.print(table)


if __name__ == "__main__":
    main()
