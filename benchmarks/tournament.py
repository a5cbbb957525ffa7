"""Optimizers side by side on a task of the examples, each at several learning rates.

    python benchmarks/tournament.py digits --out out/digits.png

All runs of a task start from the same weights, see the same batches in the same order and use the
same cosine schedule. The table has a row for each optimizer and peak rate; the star marks an
optimizer's run of lowest final training loss (measurements on test data play no part in the
choice). "to 97%" is when the target of the task was first reached. Seconds count training steps
alone: compilation is listed on its own and evaluation is not counted. The time of a step is a
median. The picture has the same curves over steps and over seconds, the best run of each optimizer
in front.
"""

import time
from collections.abc import Callable, Iterable, Mapping

import jax
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from tournament_contestants import TOURNAMENTS, parse_arguments
from tournament_picture import draw
from tournament_runs import Contestant, Run, Runs, Task, Trainer, best_of

POINTS = 40  # of each curve, beside the one before training


def train(trainer: Trainer, learning_rate: float, bars: Progress) -> Run:
    """Trains from scratch at one learning rate, with a progress bar."""
    run, task = Run(trainer, learning_rate), trainer.task
    bar = bars.add_task(run.label, total=task.steps, metrics="")
    params, opt_state = trainer.initialise()
    seconds, step = 0.0, 0
    while True:
        values = [float(value) for value in trainer.evaluate(params)]
        run.steps.append(step)
        run.seconds.append(seconds)
        run.values.append(values)
        bars.update(bar, completed=step, metrics=task.format(values))
        if step == task.steps:
            run.params = params
            return run
        stop = min(step + max(task.steps // POINTS, 1), task.steps)
        begin = time.perf_counter()
        for i in range(step, stop):
            params, opt_state = trainer.step(params, opt_state, learning_rate, i)
        jax.block_until_ready(params)
        seconds += time.perf_counter() - begin
        step = stop


def compare(
    task: Task, contestants: Mapping[str, Callable[[], Contestant]], wanted: str, console: Console
) -> Runs:
    """Trains with one contestant, or all, at all of its rates; prints the table of the runs.

    Args:
      task: what to train.
      contestants: by name; only those that are wanted are made.
      wanted: a name, or "all".
      console: for the progress and the table.
    """
    runs = {}
    for name, make in contestants.items():
        if wanted not in (name, "all"):
            continue
        contestant = make()
        with console.status(f"compiling {name}"):
            trainer = Trainer(task, name, contestant)
        columns = (TextColumn("{task.description:<22}"), BarColumn(bar_width=20))
        texts = (MofNCompleteColumn(), TextColumn("{task.fields[metrics]}"))
        with Progress(*columns, *texts, console=console) as bars:
            runs[name] = [train(trainer, rate, bars) for rate in contestant.rates]
    console.print(make_table(runs))
    console.print(
        "* the optimizer's lowest final training loss. Seconds exclude compilation and evaluation."
    )
    for line in passes(runs):
        console.print(line)
    return runs


def make_table(runs: Runs) -> Table:
    """Lists every run, the best one of each optimizer in bold with a star."""
    task = next(iter(runs.values()))[0].trainer.task
    goal, reached = task.target
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in (
        "optimizer",
        "peak\nrate",
        f"steps\nto {goal}",
        f"seconds\nto {goal}",
        *(metric.heading for metric in task.metrics),
        "ms per\nstep",
        "compile\nseconds",
        "state\nKiB",
    ):
        table.add_column(column, justify="left" if column == "optimizer" else "right", no_wrap=True)
    for name, group in runs.items():
        for run in group:
            best = run is best_of(group)
            at = run.first(reached)
            final = zip(task.metrics, run.values[-1], strict=True)
            table.add_row(
                f"{name} *" if best else name,
                f"{run.learning_rate:g}",
                "never" if at is None else str(run.steps[at]),
                "never" if at is None else f"{run.seconds[at]:.2f}",
                *(metric.pattern.format(value) for metric, value in final),
                f"{run.milliseconds:.1f}",
                f"{run.trainer.compile_seconds:.1f}",
                f"{run.trainer.state_bytes / 2**10:.0f}",
                style="bold" if best else "dim",
                end_section=run is group[-1],
            )
    return table


def passes(runs: Runs) -> Iterable[str]:
    """Says in sentences when the other optimizers pass the loss at which AdamW ends."""
    best = {name: best_of(group) for name, group in runs.items()}
    if "adamw" not in best:
        return
    adamw = best.pop("adamw")
    goal = adamw.final_loss
    text = adamw.trainer.task.metrics[0].pattern.format(goal)
    for name, run in best.items():
        at = run.first(lambda values: values[0] <= goal)
        if at is None:
            yield f"{name} does not reach adamw's final loss of {text}."
        else:
            yield (
                f"{name} first passes adamw's final loss of {text} after {run.steps[at]} steps and "
                f"{run.seconds[at]:.1f} s; adamw takes {adamw.steps[-1]} steps and "
                f"{adamw.seconds[-1]:.1f} s."
            )


def main() -> None:
    """Trains, prints the table and writes the picture."""
    arguments = parse_arguments(__doc__)
    tournament, console = TOURNAMENTS[arguments.tournament], Console()
    task = tournament.make_task(arguments)
    runs = compare(task, tournament.make_contestants(task), arguments.optimizer, console)
    draw(runs, arguments.out)
    console.print(f"Curves: {arguments.out}")


if __name__ == "__main__":
    main()
