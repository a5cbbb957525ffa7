"""AdamW, kron_psgd and K-FAC side by side: a deep autoencoder on real images of digits.

A tanh network 64-256-128-32-8-32-128-256-64 squeezes each of the 1797 images of digits through
eight numbers: a narrow, badly conditioned problem, on which second-order methods shine. Every step
sees all images; the loss is the cross-entropy of the pixels, summed over an image and averaged over
images. Since pixels are grey, it cannot fall below the entropy of the images themselves. Rules of
the comparison are those of digits.py.

    python examples/autoencoder.py --help
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import (
    Contestant,
    Metric,
    Task,
    add_comparison,
    best_of,
    compare,
    draw,
    load_data,
    make_parser,
)
from rich.console import Console

import optax_kron as ok

WIDTHS = (256, 128, 32, 8, 32, 128, 256, 64)
SHOWN = 8  # images in the picture


class Autoencoder(nn.Module):
    """A dense tanh network whose outputs are the logits of its inputs."""

    @nn.compact
    def __call__(self, images):
        """Maps images [batch, 64] to logits [batch, 64]."""
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        x = images
        for width in WIDTHS[:-1]:
            x = nn.tanh(nn.Dense(width, kernel_init=init)(x))
        return nn.Dense(WIDTHS[-1], kernel_init=init)(x)


def loss_fn(params, images):
    """Returns the cross-entropy of the pixels: summed over an image, averaged over images."""
    logits = Autoencoder().apply(params, images)
    return ok.losses.sigmoid_binary_cross_entropy(logits, images).sum(axis=-1).mean()


def load_images() -> np.ndarray:
    """Returns all images of digits as rows, [1797, 64]."""
    data = load_data()
    return np.concatenate([data.train_images, data.test_images]).reshape(-1, 64)


def make_task(arguments: argparse.Namespace, images: jax.Array) -> Task:
    """Returns the task: all images at every step."""
    pixels = jnp.clip(images, 1e-6, 1 - 1e-6)
    floor = -jnp.sum(pixels * jnp.log(pixels) + (1 - pixels) * jnp.log(1 - pixels), axis=-1).mean()
    print(f"entropy of the images, below which no loss falls: {floor:.2f}")
    return Task(
        title="Digits autoencoder with eight numbers in the middle",
        init=lambda: Autoencoder().init(jax.random.key(arguments.seed), images[:1]),
        loss_fn=loss_fn,
        batch=lambda i: (images,),
        evaluate=lambda params: (loss_fn(params, images),),
        metrics=(Metric("training loss", "final\nloss", "{:.2f}", limits=(14, 30)),),
        target=("17.5", lambda values: values[0] <= 17.5),
        steps=arguments.steps,
        seed=arguments.seed,
    )


def kfac(task: Task, console: Console) -> Contestant:
    """Returns K-FAC for the layers of the loss, which are printed."""
    layers = ok.find_layers(task.loss_fn, task.init(), *task.batch(0))
    console.print(str(layers), highlight=False, soft_wrap=True)

    def make(schedule):
        return ok.kfac(schedule, layers=layers, momentum=0.9, damping=1e-2, refresh_every=5)

    return Contestant("kfac", make, (3e-2, 1e-1, 3e-1), "#2e8b57", layers)


def kron_psgd(seed: int) -> Contestant:
    """Returns kron_psgd with the geometry that fits this network best."""

    def make(schedule):
        return ok.kron_psgd(schedule, geometry="QEQ", seed=seed)

    return Contestant("kron_psgd", make, (1e-3, 3e-3, 1e-2), "#1f5fa8")


def draw_images(axes, runs, images) -> None:
    """Draws some images above what the best run of each optimizer makes of them."""
    shown = np.asarray(images[:: len(images) // SHOWN][:SHOWN])
    rows = {"images": shown}
    for name, group in runs.items():
        logits = Autoencoder().apply(best_of(group).params, shown)
        rows[name] = np.asarray(jax.nn.sigmoid(logits))
    tiles = [np.pad(row.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1))) for row in rows.values()]
    axes.imshow(np.concatenate([np.concatenate([*row], axis=1) for row in tiles]), cmap="gray_r")
    axes.set(xticks=[], yticks=[10 * i + 4.5 for i in range(len(rows))], yticklabels=list(rows))
    axes.set_xlabel("what is left of eight images")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__, steps=200, seed_of="weights, sampled labels and optimizer")
    add_comparison(parser, ("adamw", "kron_psgd", "kfac"), out="autoencoder.png")
    return parser.parse_args()


def main() -> None:
    """Trains, prints the table and writes the picture."""
    arguments = parse_arguments()
    console = Console()
    images = jax.device_put(load_images())
    task = make_task(arguments, images)
    contestants = {
        "adamw": lambda: Contestant("adamw", optax.adamw, (1e-3, 3e-3, 1e-2), "#d1701c"),
        "kron_psgd": lambda: kron_psgd(arguments.seed),
        "kfac": lambda: kfac(task, console),
    }
    runs = compare(task, contestants, arguments.optimizer, console)
    draw(runs, arguments.out, "linear", lambda axes, runs: draw_images(axes, runs, images))
    console.print(f"Curves: {arguments.out}")


if __name__ == "__main__":
    main()
