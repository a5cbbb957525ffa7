"""One measurement of one library in a process of its own; the last line it prints is JSON.

`step` times `update` of model T on random gradients (see `timing.py`). `autoencoder` trains the
digits autoencoder with full training steps (loss, gradient and update in one jitted call,
parameters and state donated) and records the loss after every step and the median time of a step.

The script runs unchanged with every library's own versions of JAX and Optax; it imports only the
library it measures.
"""

import argparse
import json
import subprocess
from pathlib import Path

import jax
import models
import numpy as np
import optax
import timing


def make_optimizer(library, learning_rate, probability=None, geometry="EQ", precond_lr=None):
    """A complete optimizer; `None` leaves the library's own schedule or size of factor updates."""
    if library == "adamw":
        return optax.adamw(learning_rate)
    if library == "psgd_jax":
        from psgd_jax.kron import kron

        extra = {} if probability is None else {"preconditioner_update_probability": probability}
        extra |= {} if precond_lr is None else {"preconditioner_lr": precond_lr}
        return kron(learning_rate, b1=0.9, **extra)
    if library == "optax_kron":
        import optax_kron

        extra = {} if probability is None else {"update_probability": probability}
        extra |= {} if precond_lr is None else {"precond_lr": precond_lr}
        return optax_kron.kron_psgd(learning_rate, momentum=0.9, geometry=geometry, **extra)
    raise ValueError(f"unknown library {library!r}: expected adamw, psgd_jax or optax_kron")


def from_library(method, learning_rate, settings):
    """An optimizer of optax_kron by name; `block_size` among its settings becomes a blocking."""
    import optax_kron

    settings = dict(settings)
    if "block_size" in settings:
        settings["blocking"] = optax_kron.Blocking(block_size=settings.pop("block_size"))
    return getattr(optax_kron, method)(learning_rate, **settings)


def measure_step(library, *, probability, geometry="EQ", steps=20, warmup=3):
    """Compile time, step time and state of one optimizer's update on model T."""
    shapes = models.model_t_shapes()
    params, *gradients = (models.random_tree(i, shapes) for i in range(5))
    tx = make_optimizer(library, 1e-3, probability, geometry)
    return timing.time_updates(tx, params, gradients, steps=steps, warmup=warmup)


def learning_rate_schedule(name, peak, steps):
    """A constant learning rate or a cosine from `peak` to zero."""
    return peak if name == "constant" else optax.cosine_decay_schedule(peak, steps)


def train_autoencoder(tx, *, steps=200, seed=0):
    """Train the digits autoencoder: its losses after 0, 1, ... steps and its step times."""
    images = jax.numpy.asarray(models.digits_images())
    params = models.autoencoder_init(seed)

    def train_step(params, state, images):
        loss, grads = jax.value_and_grad(models.autoencoder_loss)(params, images)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = jax.jit(tx.init)(params)
    step, figures = timing.compile_timed(train_step, params, state, images, donate=(0, 1))
    losses, seconds = [], []
    for _ in range(steps):
        elapsed, (params, state, loss) = timing.clock(step, params, state, images)
        losses.append(float(loss))
        seconds.append(elapsed)
    losses.append(float(jax.jit(models.autoencoder_loss)(params, images)))
    return {**figures, "losses": losses, "median_s": float(np.median(seconds))}


def launch(python, *options, script=__file__, limit=1200):
    """Run a script, this one, under an interpreter; return its figures. Warnings go to stderr."""
    command = [python, str(Path(script)), *map(str, options)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit)
    if result.returncode:
        raise SystemExit(f"failed ({result.returncode}): {' '.join(command)}\n{result.stdout}")
    return json.loads(result.stdout.splitlines()[-1])


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", required=True, choices=("optax_kron", "psgd_jax", "adamw"))
    parser.add_argument("--task", required=True, choices=("step", "autoencoder"))
    parser.add_argument("--geometry", default="EQ", help="optax_kron's geometry")
    parser.add_argument("--probability", type=float, help="of a factor update; default: library's")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--schedule", choices=("constant", "cosine"), default="constant")
    parser.add_argument("--precond-lr", type=float, help="autoencoder only; default: library's")
    parser.add_argument("--steps", type=int, help="timed (step) or trained (autoencoder)")
    parser.add_argument("--seed", type=int, default=0, help="of the autoencoder's weights")
    return parser.parse_args()


def main():
    """Run one measurement."""
    args = parse_arguments()
    if args.task == "step":
        figures = measure_step(
            args.library,
            probability=args.probability,
            geometry=args.geometry,
            steps=args.steps or 20,
        )
    else:
        steps = args.steps or 200
        rate = learning_rate_schedule(args.schedule, args.learning_rate, steps)
        tx = make_optimizer(args.library, rate, args.probability, args.geometry, args.precond_lr)
        figures = train_autoencoder(tx, steps=steps, seed=args.seed)
    print(json.dumps({**figures, **timing.machine()}))


if __name__ == "__main__":
    main()
