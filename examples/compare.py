"""All optimizers of the library, and AdamW, on one small character transformer over real text.

The model, the text and the rules are those of characters.py. Heads of attention are merged, and
scanned layers stacked, by `ok.Blocking`; K-FAC and EKFAC find the layers in the loss; branch_kfac
is given what the last layer reads, at the last positions, for samples of a state.

    python examples/compare.py --help
"""

import argparse
from collections.abc import Callable

import jax
import optax
from characters import WIDTH, make_task
from common import Contestant, Task, add_comparison, compare, draw, make_parser
from rich.console import Console

import optax_kron as ok

# Heads and their width become one axis again; the layers of a scan are independent blocks.
BLOCKING = ok.Blocking(
    merge_below=WIDTH, stacked_axes=lambda path, shape: 1 if "layers" in path else 0
)
BRANCHES = 64  # of the positions that branch_kfac gets


def by_gradients(name: str, rates: tuple[float, ...], colour: str, **settings) -> Contestant:
    """An optimizer that needs gradients alone."""
    method = settings.pop("method", name)

    def make(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
        return getattr(ok, method)(schedule, blocking=BLOCKING, **settings)

    return Contestant(name, make, rates, colour)


def by_layers(name: str, task: Task, rates: tuple[float, ...], colour: str) -> Contestant:
    """K-FAC or EKFAC for the layers of the loss."""
    layers = ok.find_layers(task.loss_fn, task.init(), *task.batch(0))

    def make(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
        return getattr(ok, name)(schedule, layers=layers, damping=1e-2, norm_constraint=1e-3)

    return Contestant(name, make, rates, colour, layers)


def by_branches(task: Task, rates: tuple[float, ...], colour: str) -> Contestant:
    """branch_kfac, whose state is what the last layer reads."""
    layers = ok.find_layers(task.loss_fn, task.init(), *task.batch(0))
    (readout,) = [layer for layer in layers if "readout" in layer.name]

    def branches(taps: ok.Taps) -> dict[str, jax.Array]:
        (tap,) = taps[readout.name]
        return {"branches": tap.inputs[0, :, -1, :WIDTH][:BRANCHES]}

    return Contestant(
        "branch_kfac",
        lambda schedule: ok.branch_kfac(schedule, damping=0.1),
        rates,
        colour,
        [readout],
        branches,
    )


def contestants(task: Task) -> dict[str, Callable[[], Contestant]]:
    """All of them by name, made when wanted."""
    return {
        "adamw": lambda: Contestant("adamw", optax.adamw, (3e-3, 1e-2), "#d1701c"),
        "kron_psgd": lambda: by_gradients("kron_psgd", (3e-3, 1e-2), "#1f6fb4", geometry="QEQ"),
        "shampoo": lambda: by_gradients("shampoo", (3e-3, 1e-2), "#7b3fa0"),
        "soap": lambda: by_gradients("soap", (3e-3, 1e-2), "#c2273d"),
        "kl_soap": lambda: by_gradients(
            "kl_soap", (3e-3, 1e-2), "#e58fa0", method="soap", variant="kl_soap"
        ),
        "kl_shampoo": lambda: by_gradients(
            "kl_shampoo", (3e-3, 1e-2), "#b79ad1", method="soap", variant="kl_shampoo"
        ),
        "kfac": lambda: by_layers("kfac", task, (1e-1, 3e-1), "#2e8b57"),
        "ekfac": lambda: by_layers("ekfac", task, (1e-1, 3e-1), "#83c59f"),
        "branch_kfac": lambda: by_branches(task, (3e-3, 1e-2), "#888888"),
    }


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__, steps=300, seed_of="weights, windows and sampled labels")
    add_comparison(parser, contestants(None), out="compare.png")
    return parser.parse_args()


def main() -> None:
    """Trains, prints the table and writes the picture."""
    arguments = parse_arguments()
    console = Console()
    task = make_task(arguments)
    runs = compare(task, contestants(task), arguments.optimizer, console)
    draw(runs, arguments.out, scale="linear")
    console.print(f"Curves: {arguments.out}")


if __name__ == "__main__":
    main()
