"""branch_kfac on a state-space model: the samples of the state are the model's own hidden states.

An image of a digit is read row by row, as eight steps of a sequence. A state of 16 dimensions takes
in each row, `h ← tanh(A h + B u + c)`, and the last one is read out. At every step of training
branch_kfac gets the states of the batch at all times, which the capture of layers finds as what
goes into `A`. Beside it are gradient descent, which it becomes without a state, and AdamW. The map
from the state to the parameters is drawn anew at each step, so that in the mean branch_kfac is
gradient descent with a rate of its own; the example shows what the noise of that costs. Rules of
the comparison are those of digits.py.

    python examples/state_space.py --help
"""

import argparse
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from common import (
    ACCURACY,
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

STATE = 16


class StateSpace(nn.Module):
    """A recurrent net whose state follows the rows of an image."""

    @nn.compact
    def __call__(self, images):
        """Maps images [batch, 8, 8, 1] to logits [batch, 10]."""
        recurrent, drive = nn.Dense(STATE, name="recurrent"), nn.Dense(STATE, name="drive")
        state = jnp.zeros((len(images), STATE))
        for row in range(images.shape[1]):
            state = nn.tanh(recurrent(state) + drive(images[:, row, :, 0]))
        return nn.Dense(10, name="readout")(state)


def loss_fn(params, images, labels):
    """Returns the mean cross-entropy of the model's predictions."""
    logits = StateSpace().apply(params, images)
    return ok.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_task(arguments: argparse.Namespace) -> Task:
    """Returns the task: minibatches of the training images."""
    return digits_task(
        arguments,
        StateSpace(),
        loss_fn,
        "Digits, row by row: a state-space model",
        dataclasses.replace(ACCURACY, limits=(0, 1)),
        goal=0.9,
    )


def branch_kfac(task: Task) -> Contestant:
    """Returns branch_kfac, which gets the states of the batch at all times."""
    layers = ok.find_layers(task.loss_fn, task.init(), *task.batch(0))
    (recurrent,) = [layer for layer in layers if "recurrent" in layer.name]

    def states(taps: ok.Taps) -> dict[str, jax.Array]:
        (tap,) = taps[recurrent.name]
        return {"branches": tap.inputs[0, ..., :STATE].reshape(-1, STATE)}

    def make(schedule):
        return ok.branch_kfac(schedule, damping=0.1, blocks=4, clip=10.0)

    return Contestant("branch_kfac", make, (1e-2, 3e-2, 5e-2), "#2e8b57", [recurrent], states)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__, steps=1000, seed_of="weights and batches")
    add_comparison(parser, ("adamw", "sgd", "branch_kfac"), out="state_space.png")
    add_batch_size(parser)
    return parser.parse_args()


def main() -> None:
    """Trains, prints the table and writes the picture."""
    arguments = parse_arguments()
    console = Console()
    task = make_task(arguments)
    contestants = {
        "adamw": lambda: Contestant("adamw", optax.adamw, (1e-2, 3e-2), "#d1701c"),
        "sgd": lambda: Contestant("sgd", optax.sgd, (1e-1, 3e-1, 1.0), "#1f5fa8"),
        "branch_kfac": lambda: branch_kfac(task),
    }
    runs = compare(task, contestants, arguments.optimizer, console)
    draw(runs, arguments.out)
    console.print(f"Curves: {arguments.out}")


if __name__ == "__main__":
    main()
