"""EKFAC beside K-FAC: the digits autoencoder's loss, and the time of a full step.

Both run `measure_kfac.py`, which holds the settings, each measurement in a fresh process, in turn;
ratios (EKFAC / K-FAC) are taken between neighbours. Both have the same settings. On the digits that
includes a norm constraint, as is usual for K-FAC: without one the first steps, from factors of a
few batches, throw both back, and EKFAC, whose damping is all added to the eigenvalues, more so. The
last lines hold EKFAC's loss against K-FAC's, and the ratios of times against bounds.
"""

import sys
from statistics import median

import kfac_peers
import peers
from rich.console import Console

NORM_CONSTRAINTS = (None, 1e-2, 1e-1)
REFRESH_EVERY = 5
SIDES = {side: (sys.executable, "--library", side) for side in ("ekfac", "optax_kron")}


def tasks_of(task, steps, seed):
    """The measurements of a task: their labels, and options of measure_kfac.py."""
    common = ("--task", task, "--seed", seed, "--refresh-every", REFRESH_EVERY)
    common += ("--steps", steps) if steps else ()
    if task == "throughput":
        return {task: common}
    return {
        f"norm constraint {c}": (*common, *(("--norm-constraint", c) if c else ()))
        for c in NORM_CONSTRAINTS
    }


def criteria(task, results):
    """(what, figure, bound) for one task."""
    if task == "throughput":
        pairs = results[task]
        yield "time of a step, ratio", median(kfac_peers.ratios(pairs, "step_s")), 1.3
        yield "first call, ratio", median(kfac_peers.ratios(pairs, "first_s")), 1.3
        return
    for name, pairs in results.items():
        final = {side: figures["losses"][-1] for side, figures in pairs[0].items()}
        yield f"{name}: EKFAC's final loss", final["ekfac"], final["optax_kron"]


def main():
    """Measure, print tables and a line for each criterion; exit code 1 on a miss."""
    args = kfac_peers.make_parser(__doc__).parse_args()
    console = Console(width=None if sys.stdout.isatty() else 110)
    found, figures = [], {}
    for task in args.tasks:
        rounds = args.rounds if task == "throughput" else 1
        tasks = tasks_of(task, args.steps, args.seed)
        results = peers.measure_pairs(SIDES, tasks, rounds, script=kfac_peers.SCRIPT)
        figures[task] = results
        if task == "digits":
            console.print(kfac_peers.curves_table(results))
        console.print(kfac_peers.times_table(results))
        found += criteria(task, results)
    return peers.report(console, found, figures, args.json)


if __name__ == "__main__":
    sys.exit(main())
