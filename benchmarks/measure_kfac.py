"""One measurement of one K-FAC, or EKFAC, in a process of its own; the last line it prints is JSON.

Both libraries train an autoencoder of `models.py` with full steps: the loss, its gradient, labels
drawn from the model and what they give back, the factors, the inverses, the update and its
application, in one jitted call whose parameters and state are donated. `digits` trains on all 1797
images and records the loss before every step; `throughput` is timed on random numbers.

Settings on both sides: fixed learning rate 0.1, momentum 0.9, damping 1e-2 (split between the two
factors by their traces), factors updated every step with an average of decay 0.95, one draw of
labels, inverses every `--refresh-every` steps, float32; else each library's defaults. EKFAC adds
the whole damping to its eigenvalues. `--norm-constraint` is for ours alone.

The script runs unchanged with each library's own versions of JAX and Optax; it imports only the
library that it measures.
"""

import argparse
import functools
import json
import time

import jax
import models
import numpy as np
import optax
import timing

LEARNING_RATE, MOMENTUM, DAMPING = 0.1, 0.9, 1e-2
WARMUP = 25  # of the timed steps: until refreshes of young factors are over


def prepare_optax_kron(params, images, refresh_every, norm_constraint, method="kfac"):
    """A function of (state, images, key) to (state, loss), and its state."""
    import optax_kron as ok

    def loss_fn(params, images):
        logits = models.autoencoder_logits(params, images)
        return ok.losses.sigmoid_binary_cross_entropy(logits, images).sum(axis=-1).mean()

    layers = ok.find_layers(loss_fn, params, images)
    grad_fn = ok.value_and_grad_with_taps(loss_fn, layers, fisher="mc")
    tx = getattr(ok, method)(
        LEARNING_RATE,
        layers=layers,
        momentum=MOMENTUM,
        damping=DAMPING,
        refresh_every=refresh_every,
        norm_constraint=norm_constraint,
    )

    def train_step(carried, images, key):
        params, state = carried
        loss, grads, taps = grad_fn(params, images, key=key)
        updates, state = tx.update(grads, state, params, taps=taps)
        return (optax.apply_updates(params, updates), state), loss

    return jax.jit(train_step, donate_argnums=0), (params, jax.jit(tx.init)(params))


def prepare_kfac_jax(params, images, refresh_every, norm_constraint):
    """A function of (state, images, key) to (state, loss), and its state."""
    import kfac_jax

    del norm_constraint

    def loss_fn(params, images):
        logits = models.autoencoder_logits(params, images)
        kfac_jax.register_multi_bernoulli_predictive_distribution(logits, images)
        return optax.sigmoid_binary_cross_entropy(logits, images).sum(axis=-1).mean()

    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(loss_fn),
        l2_reg=0.0,
        learning_rate_schedule=lambda _: LEARNING_RATE,
        momentum_schedule=lambda _: MOMENTUM,
        damping_schedule=lambda _: DAMPING,
        estimation_mode="fisher_gradients",
        inverse_update_period=refresh_every,
        num_burnin_steps=0,  # none without an iterator of data
    )
    state = optimizer.init(params, jax.random.PRNGKey(0), images)

    def train_step(carried, images, key):
        params, state, statistics = optimizer.step(*carried, key, batch=images)
        return (params, state), statistics["loss"]

    return train_step, (params, state)


PREPARE = {
    "optax_kron": prepare_optax_kron,
    "ekfac": functools.partial(prepare_optax_kron, method="ekfac"),
    "kfac_jax": prepare_kfac_jax,
}


def task_data(task, seed):
    """Parameters and images."""
    if task == "digits":
        return models.autoencoder_init(seed), jax.numpy.asarray(models.digits_images())
    params = models.autoencoder_init(seed, models.THROUGHPUT_SIZES)
    return params, jax.numpy.asarray(models.random_images())


def train(library, task, *, refresh_every, steps, norm_constraint=None, seed=0):
    """Train: losses before each step, seconds of preparing, of the first step and of the others.

    Args:
      library: "optax_kron", which is `kfac`, "ekfac" or "kfac_jax".
      task: "digits" or "throughput".
      refresh_every: steps from one inversion of the factors to the next.
      steps: in all; the first `WARMUP` are not timed.
      norm_constraint: of ours; `None`: none.
      seed: of the weights and of the drawn labels.

    Returns:
      A dict: `losses`; `prepare_s`, to find the layers and make the state; `first_s`, the first
      step, with tracing and compiling; `step_s`, the median over cycles of `refresh_every` steps of
      a cycle's mean; `plain_s`, the median step, which has no refresh in it but with
      `refresh_every=1`.
    """
    params, images = task_data(task, seed)
    keys = list(jax.random.split(jax.random.PRNGKey(seed), steps))
    jax.block_until_ready((params, images, keys))
    start = time.perf_counter()
    step, carried = PREPARE[library](params, images, refresh_every, norm_constraint)
    jax.block_until_ready(carried)
    prepared = time.perf_counter() - start
    losses, seconds = [], []
    for key in keys:
        elapsed, (carried, loss) = timing.clock(step, carried, images, key)
        losses.append(float(loss))
        seconds.append(elapsed)
    losses.append(float(jax.jit(models.autoencoder_loss)(carried[0], images)))
    timed = seconds[WARMUP:]
    cycles = np.reshape(timed[: len(timed) // refresh_every * refresh_every], (-1, refresh_every))
    return {
        "losses": losses,
        "prepare_s": prepared,
        "first_s": seconds[0],
        "begin_s": prepared + seconds[0],
        "step_s": float(np.median(cycles.mean(axis=1))),
        "plain_s": float(np.median(timed)),
        "state_bytes": timing.tree_bytes(carried[1]),
    }


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", required=True, choices=PREPARE)
    parser.add_argument("--task", required=True, choices=("digits", "throughput"))
    parser.add_argument("--refresh-every", type=int, default=1)
    parser.add_argument("--norm-constraint", type=float)
    parser.add_argument("--steps", type=int, help="default: 200 of digits, 65 of throughput")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the drawn labels")
    return parser.parse_args()


def main():
    """Run one measurement."""
    args = parse_arguments()
    steps = args.steps or (200 if args.task == "digits" else 65)
    figures = train(
        args.library,
        args.task,
        refresh_every=args.refresh_every,
        steps=steps,
        norm_constraint=args.norm_constraint,
        seed=args.seed,
    )
    print(json.dumps({**figures, **timing.machine()}))


if __name__ == "__main__":
    main()
