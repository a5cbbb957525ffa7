"""`optax_kron.kfac` beside kfac_jax, each with its own JAX: first call, step, loss.

Both sides run `measure_kfac.py`, which holds the settings, each measurement in a fresh process,
ours and the peer's in turn: what the machine does meanwhile hits both. Ratios (ours / peer's) are
taken between neighbours, and the median of the rounds is reported. Where inverses are made every
five steps, the time of a step is the mean over five, so that one refresh is in it, and of those the
median. A ratio below 1 is ours being faster; the last lines hold ratios and losses against bounds.

Without `--peer-python` ours runs alone; without `throughput` among the tasks it trains only.
"""

import argparse
import sys
from pathlib import Path
from statistics import median

import peers
from rich.console import Console
from rich.table import Table

REFRESH_EVERY = (1, 5)
TARGET_LOSS = 15.6
SCRIPT = Path(__file__).with_name("measure_kfac.py")
# The figure, how it is printed, and its unit.
ROWS = (
    ("first call s", "first_s", 1),
    ("prepare + first s", "begin_s", 1),
    ("ms/step", "step_s", 1e3),
    ("ms/step, no refresh", "plain_s", 1e3),
    ("state MiB", "state_bytes", 2**-20),
    ("matmul GFLOP/s", "matmul_flop_s", 1e-9),
)


def tasks_of(name, steps, seed):
    """One task for every interval between refreshes: its label, and options of measure_kfac.py."""
    options = ("--task", name, "--seed", seed, *(("--steps", steps) if steps else ()))
    return {f"{name} every {n}": (*options, "--refresh-every", n) for n in REFRESH_EVERY}


def ratios(pairs, key):
    """The first side's figure / the second's for each round, if there are two sides."""
    figures = [[side[key] for side in pair.values()] for pair in pairs]
    return [ours / theirs for ours, theirs in (row for row in figures if len(row) == 2)]


def times_table(results):
    """The median of the rounds on each side, and the ratio."""
    table = Table(title="Training steps of K-FAC (float32)")
    sides = list(next(iter(results.values()))[0])
    for column in ("", *sides, "ratio", "ratios of the rounds"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, pairs in results.items():
        for label, key, unit in ROWS:
            cells = [f"{median(unit * p[side][key] for p in pairs):.2f}" for side in sides]
            found = ratios(pairs, key)
            if found:
                cells += [f"{median(found):.2f}", " ".join(f"{x:.2f}" for x in found)]
            table.add_row(f"{name}: {label}", *cells)
        table.add_section()
    return table


def curves_table(results, every=20):
    """Losses of the first round every so many steps, one column for each side and interval."""
    table = Table(title="Digits autoencoder: loss")
    table.add_column("step", justify="right")
    curves = {}
    for name, pairs in results.items():
        for side, figures in pairs[0].items():
            curves[f"{side} {name.removeprefix('digits ')}"] = figures["losses"]
    for label in curves:
        table.add_column(label, justify="right")
    for step in range(0, len(next(iter(curves.values()))), every):
        table.add_row(str(step), *(f"{losses[step]:.3f}" for losses in curves.values()))
    return table


def criteria(task, results):
    """(what, figure, bound) for one task."""
    for name, pairs in results.items():
        if task == "digits":
            yield f"{name}: final loss", pairs[0]["optax_kron"]["losses"][-1], TARGET_LOSS
        elif ratios(pairs, "step_s"):
            yield f"{name}: time of a step, ratio", median(ratios(pairs, "step_s")), 0.8
            yield f"{name}: first call, ratio", median(ratios(pairs, "first_s")), 0.5


def parse_arguments():
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--peer-python", metavar="FILE", help="that has kfac_jax")
    return parser.parse_args()


def make_parser(doc):
    """The options that comparisons of training steps share."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    names = ("digits", "throughput")
    parser.add_argument("--tasks", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=3, help="of the throughput")
    parser.add_argument("--steps", type=int, help="of each measurement")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the drawn labels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    return parser


def main():
    """Measure, print tables and a line for each criterion; exit code 1 on a miss."""
    args = parse_arguments()
    sides = {"optax_kron": (sys.executable, "--library", "optax_kron")}
    if args.peer_python:
        sides["kfac_jax"] = (args.peer_python, "--library", "kfac_jax")
    console = Console(width=None if sys.stdout.isatty() else 110)
    found, figures = [], {}
    for task in args.tasks:
        tasks = tasks_of(task, args.steps, args.seed)
        rounds = args.rounds if task == "throughput" else 1
        results = figures[task] = peers.measure_pairs(sides, tasks, rounds, script=SCRIPT)
        if task == "digits":
            console.print(curves_table(results))
        console.print(times_table(results))
        found += criteria(task, results)
    return peers.report(console, found, figures, args.json)


if __name__ == "__main__":
    sys.exit(main())
