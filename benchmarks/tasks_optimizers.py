"""Who takes part in `tasks.py`: every optimizer at its defaults, and which learning rates it gets.

The middle one of the rates is that to take where none is tried, the same for all tasks. AdamW and
Muon, beside which the rest is seen, have two more on either side, all others one.
"""

import os
from collections.abc import Callable
from pathlib import Path

import optax
import tasks_peer
from tournament_runs import Contestant, Task

import optax_kron as ok

COLOUR = "#888888"
PSGD_JAX = Path(os.environ.get("PSGD_JAX", "out/psgd-jax"))


def around(rate: float, count: int) -> tuple[float, ...]:
    """Returns so many rates in steps of about three, with the given one in the middle."""
    grid = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]
    middle = grid.index(rate)
    return tuple(grid[middle - count // 2 : middle + count // 2 + 1])


def by_gradients(make: Callable, rate: float, count: int = 3) -> Callable[[Task], Contestant]:
    """One that takes gradients alone."""
    return lambda task: Contestant(make, around(rate, count), COLOUR)


def by_layers(method: Callable, rate: float) -> Callable[[Task], Contestant]:
    """One that takes the layers of the loss."""

    def make(task: Task) -> Contestant:
        layers = task.find_layers()
        return Contestant(
            lambda schedule: method(schedule, layers=layers), around(rate, 3), COLOUR, layers
        )

    return make


def adaptive(method: Callable) -> Callable[[Task], Contestant]:
    """One that has no learning rate."""

    def make(task: Task) -> Contestant:
        layers = task.find_layers()
        return Contestant(lambda schedule: method(layers=layers), (1.0,), COLOUR, layers)

    return make


def soap(**settings) -> Callable[[Task], Contestant]:
    """A variant of SOAP."""
    return by_gradients(lambda schedule: ok.soap(schedule, **settings), 1e-2)


def psgd_jax(schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer of that name, with its defaults."""
    return tasks_peer.load(PSGD_JAX)(schedule)


OPTIMIZERS: dict[str, Callable[[Task], Contestant]] = {
    "adamw": by_gradients(optax.adamw, 1e-2, 5),
    "muon": by_gradients(optax.contrib.muon, 1e-2, 5),
    "kron_psgd": by_gradients(ok.kron_psgd, 1e-2),
    "psgd_jax": by_gradients(psgd_jax, 1e-2),
    "shampoo": by_gradients(ok.shampoo, 1e-2),
    "soap": soap(),
    "soap every": soap(refresh_every=1),
    "kl_soap": soap(variant="kl_soap"),
    "kl_soap every": soap(variant="kl_soap", refresh_every=1),
    "soap_muon": soap(variant="soap_muon"),
    "kl_shampoo": soap(variant="kl_shampoo"),
    "kfac": by_layers(ok.kfac, 1e-1),
    "ekfac": by_layers(ok.ekfac, 1e-1),
    "adaptive_kfac": adaptive(ok.adaptive_kfac),
}
