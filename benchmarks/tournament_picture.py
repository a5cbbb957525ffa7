"""The picture of a tournament: losses over steps and over seconds, and a third panel."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from tournament_runs import Runs, best_of


def draw(runs: Runs, path: Path) -> None:
    """Draws the loss over steps and over seconds, and the second metric, into a PNG."""
    task = next(iter(runs.values()))[0].trainer.task
    figure = Figure(figsize=(14, 4.6), dpi=120, layout="constrained")
    by_step, by_second, last = figure.subplots(1, 3)
    draw_metric(by_step, runs, 0)
    draw_metric(by_second, runs, 0, over="seconds")
    for axes in (by_step, by_second):
        axes.set_yscale(task.scale)
    if task.panel is None:
        draw_metric(last, runs, 1)
    else:
        task.panel(last, runs)
    named = by_step.get_legend_handles_labels()
    figure.legend(*named, loc="outside lower center", ncols=min(len(runs), 5), frameon=False)
    figure.suptitle(f"{task.title}; each optimizer's best learning rate (others faint)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_metric(axes: Axes, runs: Runs, number: int, over: str = "steps") -> None:
    """Draws one metric of all runs, the best of each optimizer in front."""
    for group in runs.values():
        best = best_of(group)
        for run in sorted(group, key=lambda run: run is best):
            axes.plot(
                getattr(run, over),
                run.curve(number),
                color=run.trainer.contestant.colour,
                lw=2.2 if run is best else 1.0,
                alpha=1.0 if run is best else 0.35,
                label=run.label if run is best else None,
            )
    metric = next(iter(runs.values()))[0].trainer.task.metrics[number]
    label = "training step" if over == "steps" else "seconds of training"
    axes.set(xlabel=label, ylabel=metric.name)
    if metric.limits is not None:
        axes.set_ylim(*metric.limits)
    if metric.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
