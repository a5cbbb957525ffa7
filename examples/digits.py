"""AdamW and kron_psgd side by side: a small convolutional net on real images of digits.

Both optimizers start from the same weights, see the same batches in the same order, use the same
cosine schedule, and get three learning rates each. The run with the lowest final training loss is
the optimizer's best; test accuracy plays no part in the choice. Losses are means over all training
images, accuracies over 500 images that are never trained on. Seconds count training steps alone:
compilation is listed on its own and evaluation is not counted. The time per step is a median.

    python examples/digits.py --help
"""

import argparse

import flax.linen as nn
import optax
from common import (
    Contestant,
    Task,
    add_batch_size,
    add_comparison,
    compare,
    digits_task,
    draw,
    make_parser,
)
from rich.console import Console

import optax_kron as ok


class ConvNet(nn.Module):
    """Three 3x3 convolutions, the last two halving the image, then a linear readout."""

    @nn.compact
    def __call__(self, images):
        """Maps images [batch, 8, 8, 1] to logits [batch, 10]."""
        x = nn.tanh(nn.Conv(32, (3, 3))(images))
        x = nn.tanh(nn.Conv(32, (3, 3), strides=2)(x))
        x = nn.tanh(nn.Conv(32, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def loss_fn(params, images, labels):
    """Returns the mean cross-entropy of the net's predictions, a loss that K-FAC can read."""
    logits = ConvNet().apply(params, images)
    return ok.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_task(arguments: argparse.Namespace) -> Task:
    """Returns the task: minibatches of the training images."""
    return digits_task(arguments, ConvNet(), loss_fn, "Digits: a small convolutional net")


# In steps of about three around the best: less and more are both worse.
ADAMW = Contestant("adamw", optax.adamw, (1e-2, 3e-2, 1e-1), "#d1701c")


def kron_psgd(seed: int) -> Contestant:
    """Returns kron_psgd, as a preconditioner that is chained with the learning rate."""

    def make(schedule):
        return optax.chain(ok.kron_psgd(seed=seed), optax.scale_by_learning_rate(schedule))

    return Contestant("kron_psgd", make, (3e-3, 1e-2, 3e-2), "#1f5fa8")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__, steps=200, seed_of="weights, batches and optimizer")
    add_comparison(parser, ("adamw", "kron_psgd"), out="digits.png")
    add_batch_size(parser)
    return parser.parse_args()


def main() -> None:
    """Trains, prints the table and writes the picture."""
    arguments = parse_arguments()
    console = Console()
    contestants = {"adamw": lambda: ADAMW, "kron_psgd": lambda: kron_psgd(arguments.seed)}
    runs = compare(make_task(arguments), contestants, arguments.optimizer, console)
    draw(runs, arguments.out)
    console.print(f"Curves: {arguments.out}")


if __name__ == "__main__":
    main()
