"""The tables of `tasks.py`, from the figures of its runs."""

import itertools
import math

from rich import box
from rich.table import Table

Runs = list[dict]
Results = dict[tuple[str, str], Runs]
TOLERANCE = 0.05  # of a loss beside the best one, for rates that count as good


def final(run: dict) -> float:
    """Returns the last loss of a run, infinite if it is not finite."""
    loss = run["losses"][-1]
    return math.inf if loss is None else loss


def best(runs: Runs) -> dict:
    """Returns the run of the lowest last loss."""
    return min(runs, key=final)


def untuned(runs: Runs) -> dict:
    """Returns the run at the rate that the optimizer has on every task, which is the middle one."""
    return runs[len(runs) // 2]


def steps_to(run: dict, target: float) -> float:
    """Returns when a loss was first reached, between evaluations on a line; infinite if never."""
    points = zip(run["steps"], run["losses"], strict=True)
    for (start, before), (end, after) in itertools.pairwise(points):
        if after is not None and after <= target:
            if before is None or before <= after:
                return end
            return start + (end - start) * (before - target) / (before - after)
    return math.inf


def good_rates(runs: Runs) -> float:
    """Returns the factor between the least and the largest rate as good as the best one."""
    limit = final(best(runs)) * (1 + TOLERANCE)
    rates = [run["rate"] for run in runs if final(run) <= limit]
    return max(rates) / min(rates) if rates else math.nan


def shares(results: Results, task: str, optimizer: str) -> tuple[float, float]:
    """Returns the shares of AdamW's steps and of its seconds after which its loss was reached."""
    adamw = best(results[task, "adamw"])
    run = best(results[task, optimizer])
    steps, total = steps_to(run, final(adamw)), adamw["steps"][-1]
    return steps / total, steps * run["step_seconds"] / (total * adamw["step_seconds"])


def share(value: float) -> str:
    """Writes a share."""
    return f"{value:.2f}" if math.isfinite(value) else "never"


def make_table(results: Results) -> Table:
    """Returns a row for each task and optimizer."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    headings = ("task", "optimizer", "best\nrate", "steps", "seconds", "loss", "loss,\nuntuned")
    for heading in (*headings, "rates", "ms per\nstep", "compile\nseconds", "state\nKiB"):
        justify = "left" if heading in ("task", "optimizer") else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    names = [name for _, name in results]
    for (task, name), runs in results.items():
        run = best(runs)
        table.add_row(
            task if name == names[0] else "",
            name,
            f"{run['rate']:g}" if len(runs) > 1 else "",
            *map(share, shares(results, task, name)),
            f"{final(run):.4g}",
            f"{final(untuned(runs)):.4g}",
            f"{good_rates(runs):.0f}" if len(runs) > 1 else "",
            f"{1e3 * run['step_seconds']:.1f}",
            f"{run['compile_seconds']:.1f}",
            f"{run['state_bytes'] / 2**10:.0f}",
            end_section=name == names[-1],
        )
    return table


def summarise(results: Results) -> Table:
    """Returns a row for each optimizer: on how many tasks it was faster than AdamW, and how much.

    The mean is geometric; a target that was not reached counts as twice AdamW's steps.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    headings = ("optimizer", "fewer\nsteps", "less\ntime", "mean\nsteps", "untuned:\nlower loss")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    tasks = list(dict.fromkeys(task for task, _ in results))
    for name in dict.fromkeys(name for _, name in results):
        pairs = [shares(results, task, name) for task in tasks]
        logarithms = [math.log(min(steps, 2.0)) for steps, _ in pairs]
        lower = sum(
            final(untuned(results[task, name])) < final(best(results[task, "adamw"]))
            for task in tasks
        )
        table.add_row(
            name,
            f"{sum(steps < 1 for steps, _ in pairs)} of {len(tasks)}",
            f"{sum(seconds < 1 for _, seconds in pairs)} of {len(tasks)}",
            f"{math.exp(sum(logarithms) / len(tasks)):.2f}",
            f"{lower} of {len(tasks)}",
        )
    return table
