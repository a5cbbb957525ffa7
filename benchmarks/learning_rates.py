"""Train the digits autoencoder with one optimizer at several learning rates; print the curves.

Every learning rate starts from the same weights. A step is the loss, its gradient, the optimizer's
update and its application in one jitted call on all 1797 images; the loss is the training loss. A
column of the table is the curve at one rate, above the median time of its step and the seconds of
compiling; the last line names the rate of the lowest final loss.
"""

import argparse
import sys

import jax
import measure
from rich.console import Console
from rich.progress import track
from rich.table import Table


def curves_table(title, runs, every=20):
    """Losses every so many steps, one column for each (label, figures)."""
    table = Table(title=title)
    table.add_column("step", justify="right")
    for label, _ in runs:
        table.add_column(label, justify="right")
    for step in range(0, len(runs[0][1]["losses"]), every):
        table.add_row(str(step), *(f"{figures['losses'][step]:.3f}" for _, figures in runs))
    table.add_section()
    table.add_row("ms/step", *(f"{1e3 * figures['median_s']:.1f}" for _, figures in runs))
    table.add_row("compile s", *(f"{figures['compile_s']:.2f}" for _, figures in runs))
    return table


def best_run(runs):
    """The (label, figures) with the lowest finite final loss."""
    final = [(figures["losses"][-1], i) for i, (_, figures) in enumerate(runs)]
    finite = [pair for pair in final if abs(pair[0]) < float("inf")]
    return runs[min(finite)[1]] if finite else runs[0]


def train(args, peak):
    """One run at one learning rate."""
    rate = measure.learning_rate_schedule(args.schedule, peak, args.steps)
    tx = measure.make_optimizer(
        args.optimizer, rate, args.probability, args.geometry, args.precond_lr
    )
    figures = measure.train_autoencoder(tx, steps=args.steps, seed=args.seed)
    jax.clear_caches()
    return f"{peak:g}", figures


def main():
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", choices=("optax_kron", "adamw"), default="optax_kron")
    parser.add_argument("--geometry", default="EQ")
    parser.add_argument("--probability", type=float, help="of a factor update; default: library's")
    parser.add_argument("--precond-lr", type=float)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--schedule", choices=("constant", "cosine"), default="constant")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 110)
    rates = track(args.learning_rates, "training", console=Console(stderr=True))
    runs = [train(args, peak) for peak in rates]
    name = args.optimizer if args.optimizer == "adamw" else f"kron_psgd {args.geometry}"
    console.print(curves_table(f"{name}, {args.schedule} learning rate", runs))
    label, figures = best_run(runs)
    console.print(f"best: learning rate {label}, loss {figures['losses'][-1]:.3f}")


if __name__ == "__main__":
    main()
