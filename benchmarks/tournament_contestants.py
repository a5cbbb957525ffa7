"""Who takes part in which tournament, with which settings and peak learning rates."""

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import optax
import tournament_tasks as tasks
from tournament_runs import Contestant, Task

import examples
import optax_kron as ok

ORANGE, BLUE, GREEN = "#d1701c", "#1f5fa8", "#2e8b57"
Contestants = Mapping[str, Callable[[], Contestant]]  # made when wanted


def adamw(*rates: float) -> Contestant:
    """AdamW, with rates in steps of about three: less and more than the best are worse."""
    return Contestant(optax.adamw, rates, ORANGE)


def by_layers(method, task: Task, rates, colour, **settings) -> Contestant:
    """K-FAC or EKFAC for the layers of the loss, which are printed."""
    layers = task.find_layers()
    print(layers)
    return Contestant(
        lambda schedule: method(schedule, layers=layers, **settings), rates, colour, layers
    )


def by_branches(task: Task, layer: str, branches, rates, colour, **settings) -> Contestant:
    """branch_kfac, whose state is taken from the inputs of one layer: [batch, ..., inputs]."""
    (found,) = [candidate for candidate in task.find_layers() if layer in candidate.name]
    return Contestant(
        lambda schedule: ok.branch_kfac(schedule, **settings),
        rates,
        colour,
        [found],
        lambda taps: {"branches": branches(taps[found.name][0].inputs[0])},
    )


def digits(task: Task | None) -> Contestants:
    """AdamW and kron_psgd, as a preconditioner that is chained with the learning rate."""

    def make(schedule):
        return optax.chain(ok.kron_psgd(seed=task.seed), optax.scale_by_learning_rate(schedule))

    return {
        "adamw": lambda: adamw(1e-2, 3e-2, 1e-1),
        "kron_psgd": lambda: Contestant(make, (3e-3, 1e-2, 3e-2), BLUE),
    }


def digits_kfac(task: Task | None) -> Contestants:
    """AdamW and K-FAC."""
    return {
        "adamw": lambda: adamw(1e-2, 3e-2, 1e-1),
        "kfac": lambda: by_layers(ok.kfac, task, (1e-2, 3e-2, 1e-1), GREEN, damping=1e-3),
    }


def autoencoder(task: Task | None) -> Contestants:
    """AdamW, kron_psgd with the geometry that fits this network best, and K-FAC."""
    settings = {"momentum": 0.9, "damping": 1e-2, "refresh_every": 5}

    def psgd(schedule):
        return ok.kron_psgd(schedule, geometry="QEQ", seed=task.seed)

    return {
        "adamw": lambda: adamw(1e-3, 3e-3, 1e-2),
        "kron_psgd": lambda: Contestant(psgd, (1e-3, 3e-3, 1e-2), BLUE),
        "kfac": lambda: by_layers(ok.kfac, task, (3e-2, 1e-1, 3e-1), GREEN, **settings),
    }


# Without the constraint, steps would have to be shorter all along to survive the first.
CONSTRAINED = {"damping": 1e-2, "norm_constraint": 1e-3}


def characters(task: Task | None) -> Contestants:
    """AdamW and K-FAC."""
    return {
        "adamw": lambda: adamw(1e-3, 3e-3, 1e-2),
        "kfac": lambda: by_layers(ok.kfac, task, (3e-2, 1e-1, 3e-1), GREEN, **CONSTRAINED),
    }


def state_space(task: Task | None) -> Contestants:
    """AdamW, gradient descent, and branch_kfac, which gets the states of the batch at all times."""
    settings = {"damping": 0.1, "blocks": 4, "clip": 10.0}
    size = examples.state_space.STATE

    def states(inputs):
        return inputs[..., :size].reshape(-1, size)

    return {
        "adamw": lambda: adamw(1e-2, 3e-2),
        "sgd": lambda: Contestant(optax.sgd, (1e-1, 3e-1, 1.0), BLUE),
        "branch_kfac": lambda: by_branches(
            task, "recurrent", states, (1e-2, 3e-2, 5e-2), GREEN, **settings
        ),
    }


def everyone(task: Task | None) -> Contestants:
    """All optimizers; branch_kfac gets what the last layer reads at the last positions."""
    width, slow, fast = examples.characters.WIDTH, (3e-3, 1e-2), (1e-1, 3e-1)
    # Heads and their width become one axis again; the layers of a scan are independent blocks.
    blocking = ok.Blocking(
        merge_below=width, stacked_axes=lambda path, shape: 1 if "layers" in path else 0
    )

    def by_gradients(method, colour, **settings):
        return lambda: Contestant(partial(method, blocking=blocking, **settings), slow, colour)

    return {
        "adamw": lambda: adamw(*slow),
        "kron_psgd": by_gradients(ok.kron_psgd, "#1f6fb4", geometry="QEQ"),
        "shampoo": by_gradients(ok.shampoo, "#7b3fa0"),
        "soap": by_gradients(ok.soap, "#c2273d"),
        "kl_soap": by_gradients(ok.soap, "#e58fa0", variant="kl_soap"),
        "kl_shampoo": by_gradients(ok.soap, "#b79ad1", variant="kl_shampoo"),
        "kfac": lambda: by_layers(ok.kfac, task, fast, GREEN, **CONSTRAINED),
        "ekfac": lambda: by_layers(ok.ekfac, task, fast, "#83c59f", **CONSTRAINED),
        "branch_kfac": lambda: by_branches(
            task, "readout", lambda inputs: inputs[:, -1, :width], slow, "#888888", damping=0.1
        ),
    }


class Tournament(NamedTuple):
    """A task, its contestants, default number of steps, and whether it has minibatches of digits.

    Contestants are made from the task when wanted; their names are known without it.
    """

    make_task: Callable[[argparse.Namespace], Task]
    make_contestants: Callable[[Task | None], Contestants]
    steps: int
    minibatches: bool = False


TOURNAMENTS = {
    "digits": Tournament(tasks.convolutional_task, digits, 200, minibatches=True),
    "digits_kfac": Tournament(tasks.convolutional_task, digits_kfac, 200, minibatches=True),
    "autoencoder": Tournament(tasks.autoencoder_task, autoencoder, 200),
    "characters": Tournament(tasks.characters_task, characters, 300),
    "state_space": Tournament(tasks.state_space_task, state_space, 1000, minibatches=True),
    "compare": Tournament(tasks.characters_task, everyone, 300),
}


def parse_arguments(doc: str) -> argparse.Namespace:
    """Reads the command line, which starts with the name of a tournament."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    names = parser.add_subparsers(dest="tournament", required=True)
    for name, tournament in TOURNAMENTS.items():
        text = (tournament.make_contestants.__doc__ or "").splitlines()[0]
        own = names.add_parser(name, help=text, description=text)
        examples.common.add_common(own, tournament.steps, f"{name}.png")
        examples.common.add_optimizer(own, tournament.make_contestants(None))
        if tournament.minibatches:
            examples.common.add_batch_size(own)
    return parser.parse_args()
