"""What the examples share: data, command line, training with several optimizers, table and curves.

An example describes a `Task` and `Contestant`s; `compare` trains with each of these from the same
weights on the same batches, at a few learning rates with the same cosine schedule. The run with the
lowest final training loss is the contestant's best. Seconds count training steps alone: compilation
is listed on its own and evaluation is not counted. The time per step is a median.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_kron as ok

TRAIN_IMAGES, TEST_IMAGES = 1297, 500
POINTS = 40  # of each curve, beside the one before training


# -------------------------------------------------------------------------------------------- data


class Digits(NamedTuple):
    """Scikit-learn's handwritten digits: 8x8 grey images in [0, 1] and their labels."""

    train_images: np.ndarray  # [1297, 8, 8, 1] float32
    train_labels: np.ndarray  # [1297] int32
    test_images: np.ndarray  # [500, 8, 8, 1] float32
    test_labels: np.ndarray  # [500] int32


def load_data() -> Digits:
    """Returns the 1797 images in one fixed split, each digit in its share on both sides."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype(np.float32).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int32)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images,
        labels,
        train_size=TRAIN_IMAGES,
        test_size=TEST_IMAGES,
        random_state=0,
        stratify=labels,
    )
    return Digits(train_images, train_labels, test_images, test_labels)


def batch_order(num_images: int, batch_size: int, steps: int, seed: int) -> np.ndarray:
    """Returns which images each step sees, [steps, batch_size]: shuffled anew in every epoch."""
    rng = np.random.default_rng(seed)
    per_epoch = num_images // batch_size
    epochs = -(-steps // per_epoch)
    shuffled = [rng.permutation(num_images)[: per_epoch * batch_size] for _ in range(epochs)]
    return np.concatenate(shuffled).reshape(-1, batch_size)[:steps].astype(np.int32)


# ---------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Metric:
    """A number that is followed through training.

    Attributes:
      name: as the axis of a plot is called.
      heading: as the column of the table is called.
      pattern: how a value is written.
      limits: of the axis of its plot.
      percent: whether it is a share.
    """

    name: str
    heading: str
    pattern: str
    limits: tuple[float, float] | None = None
    percent: bool = False


LOSS = Metric("training loss", "final\nloss", "{:.1e}")
ACCURACY = Metric("test accuracy", "final\naccuracy", "{:.1%}", limits=(0.9, 1.0), percent=True)


@dataclass(frozen=True)
class Task:
    """What is trained, and how progress is told.

    Attributes:
      title: of the picture.
      init: returns fresh parameters.
      loss_fn: `loss_fn(params, *batch)`, the mean over a batch.
      batch: the arrays of step i; i is traced.
      evaluate: from parameters to the values of the metrics.
      metrics: the training loss first.
      target: label of the table's columns, and whether the metrics' values have reached it.
      steps: per run.
      seed: of the weights and of sampled labels.
    """

    title: str
    init: Callable[[], Any]
    loss_fn: Callable[..., jax.Array]
    batch: Callable[[Any], tuple[jax.Array, ...]]
    evaluate: Callable[[Any], tuple[jax.Array, ...]]
    metrics: tuple[Metric, ...]
    target: tuple[str, Callable[[list[float]], bool]]
    steps: int
    seed: int

    def format(self, values: Iterable[float]) -> str:
        """The values of the metrics in a line."""
        pairs = zip(self.metrics, values, strict=True)
        return "  ".join(f"{m.name} {m.pattern.format(v)}" for m, v in pairs)


def digits_task(
    arguments: argparse.Namespace,
    net: Any,
    loss_fn: Callable[..., jax.Array],
    title: str,
    accuracy: Metric = ACCURACY,
    goal: float = 0.97,
) -> Task:
    """Minibatches of the training digits.

    Args:
      arguments: with steps, batch_size and seed.
      net: a Flax module, from images [batch, 8, 8, 1] to logits [batch, 10].
      loss_fn: of its parameters, images and labels.
      title: of the picture.
      accuracy: the second metric, on the test images.
      goal: the accuracy whose time is told.
    """
    data = load_data()
    steps, seed = arguments.steps, arguments.seed
    order = batch_order(len(data.train_labels), arguments.batch_size, steps, seed)
    data, order = jax.device_put((data, order))

    def evaluate(params):
        predictions = net.apply(params, data.test_images).argmax(axis=-1)
        loss = loss_fn(params, data.train_images, data.train_labels)
        return loss, (predictions == data.test_labels).mean()

    return Task(
        title=title,
        init=lambda: net.init(jax.random.key(seed), data.train_images[:1]),
        loss_fn=loss_fn,
        batch=lambda i: (data.train_images[order[i]], data.train_labels[order[i]]),
        evaluate=evaluate,
        metrics=(LOSS, accuracy),
        target=(f"{goal:.0%}", lambda values: values[1] >= goal),
        steps=steps,
        seed=seed,
    )


@dataclass(frozen=True)
class Contestant:
    """An optimizer and the learning rates that it gets.

    Attributes:
      name: in the table.
      make: from a schedule to the optimizer.
      rates: peak learning rates.
      colour: of its curves.
      layers: of the loss, if something of what they saw goes into the updates.
      extras: what goes into the updates, from the taps.
    """

    name: str
    make: Callable[[optax.Schedule], optax.GradientTransformation]
    rates: tuple[float, ...]
    colour: str
    layers: Iterable[ok.Layer] | None = None
    extras: Callable[[ok.Taps], dict[str, Any]] = lambda taps: {"taps": taps}


@dataclass
class Trainer:
    """One optimizer, compiled once and run with as many learning rates as wanted."""

    task: Task
    contestant: Contestant

    def __post_init__(self):
        """Compiles the training step, noting how long that takes and how large the state is."""
        self.evaluate = jax.jit(self.task.evaluate)
        self.initialise = jax.jit(self._initialise)
        params, opt_state = self.initialise()
        self.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state))
        start = time.perf_counter()
        step = jax.jit(self._step, donate_argnums=(0, 1))  # old parameters and state are reused
        self.step = step.lower(params, opt_state, 1.0, 0).compile()
        self.compile_seconds = time.perf_counter() - start

    def _optimizer(self, learning_rate):
        """The optimizer with a cosine schedule from a peak, which may be traced, to zero."""
        schedule = optax.cosine_decay_schedule(learning_rate, self.task.steps)
        return optax.with_extra_args_support(self.contestant.make(schedule))

    def _initialise(self):
        """Returns fresh parameters and optimizer state; the state does not depend on the rate."""
        params = self.task.init()
        return params, self._optimizer(1.0).init(params)

    def _step(self, params, opt_state, learning_rate, i):
        """Takes step i. The rate is an argument, so one compiled program serves every rate.

        Each step is a call of its own, since XLA's convolutions are slow inside loops on CPUs.
        """
        batch, layers, extra = self.task.batch(i), self.contestant.layers, {}
        if layers is None:
            grads = jax.grad(self.task.loss_fn)(params, *batch)
        else:
            key = jax.random.fold_in(jax.random.key(self.task.seed), i)
            with_taps = ok.value_and_grad_with_taps(self.task.loss_fn, layers)
            _, grads, taps = with_taps(params, *batch, key=key)
            extra = self.contestant.extras(taps)
        optimizer = self._optimizer(learning_rate)
        updates, opt_state = optimizer.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state


@dataclass
class Run:
    """The curves of one optimizer at one learning rate, one point per evaluation."""

    trainer: Trainer
    learning_rate: float
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)  # of the metrics
    params: Any = None  # after the last step

    @property
    def label(self) -> str:
        """The optimizer and its peak learning rate."""
        return f"{self.trainer.contestant.name}, rate {self.learning_rate:g}"

    @property
    def final_loss(self) -> float:
        """The last training loss; infinite if the run diverged."""
        loss = self.values[-1][0]
        return loss if math.isfinite(loss) else math.inf

    @property
    def milliseconds(self) -> float:
        """The median time of a step, which short disturbances of the machine leave alone."""
        return 1e3 * float(np.median(np.diff(self.seconds) / np.diff(self.steps)))

    def curve(self, metric: int) -> list[float]:
        """The values of one metric."""
        return [values[metric] for values in self.values]

    def first(self, reached: Callable[[list[float]], bool]) -> int | None:
        """Returns the index of the first point at which reached(values) holds."""
        return next((i for i, values in enumerate(self.values) if reached(values)), None)


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


Runs = dict[str, list[Run]]
Drawing = Callable[[Axes, Runs], None]


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
        with console.status(f"compiling {contestant.name}"):
            trainer = Trainer(task, contestant)
        with progress_bar(console) as bars:
            runs[name] = [train(trainer, rate, bars) for rate in contestant.rates]
    console.print(make_table(runs))
    console.print(
        "* the optimizer's lowest final training loss. Seconds exclude compilation and evaluation."
    )
    for line in passes(runs):
        console.print(line)
    return runs


def best_of(runs: list[Run]) -> Run:
    """Returns the run with the lowest final training loss; a diverged run never wins."""
    return min(runs, key=lambda run: run.final_loss)


# ---------------------------------------------------------------------------------------- pictures


def progress_bar(console: Console | None = None) -> Progress:
    """Returns a bar whose tasks carry a text, `metrics`."""
    return Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[metrics]}"),
        console=console,
    )


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


def draw(runs: Runs, path: Path, scale: str = "log", third: Drawing | None = None) -> None:
    """Draws the loss over steps and over seconds, and the second metric, into a PNG.

    Args:
      runs: of every optimizer.
      path: of the PNG.
      scale: of the loss.
      third: draws the panel on the right, in place of the second metric.
    """
    task = next(iter(runs.values()))[0].trainer.task
    figure = Figure(figsize=(14, 4.6), dpi=120, layout="constrained")
    by_step, by_second, last = figure.subplots(1, 3)
    draw_metric(by_step, runs, 0)
    draw_metric(by_second, runs, 0, over="seconds")
    for axes in (by_step, by_second):
        axes.set_yscale(scale)
    if third is None:
        draw_metric(last, runs, 1)
    else:
        third(last, runs)
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


# ------------------------------------------------------------------------------------ command line


def make_parser(doc: str, steps: int, seed_of: str) -> argparse.ArgumentParser:
    """Returns a parser of what every example takes: --steps and --seed."""
    parser = argparse.ArgumentParser(
        description=doc.partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=step_count, default=steps, help="training steps per run")
    parser.add_argument("--seed", type=whole_number, default=0, help=f"of {seed_of}")
    return parser


def add_comparison(parser: argparse.ArgumentParser, names: Iterable[str], out: str) -> None:
    """Adds what a comparison takes: --optimizer and --out."""
    parser.add_argument(
        "--optimizer", choices=(*names, "all"), default="all", help="what to train with"
    )
    parser.add_argument("--out", type=png_path, default=out, help="where the curves go")


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """Adds --batch-size, of the training images of digits."""
    parser.add_argument(
        "--batch-size", type=fitting_batch_size, default=256, help="images per step"
    )


def whole_number(text: str, least: int = 0) -> int:
    """Reads a whole number from the command line."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(
            f"expected a whole number of at least {least}, got {text!r}"
        )
    return value


def step_count(text: str) -> int:
    """Reads a number of training steps, at least one, from the command line."""
    return whole_number(text, least=1)


def positive_number(text: str) -> float:
    """Reads a number above zero from the command line."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def fitting_batch_size(text: str) -> int:
    """Reads a batch size that the training images can fill from the command line."""
    value = whole_number(text, least=1)
    if value > TRAIN_IMAGES:
        raise argparse.ArgumentTypeError(
            f"expected at most {TRAIN_IMAGES} training images, got {value}"
        )
    return value


def png_path(text: str) -> Path:
    """Reads the path of a PNG from the command line."""
    path = Path(text)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise argparse.ArgumentTypeError(f"expected the path of a .png file, got {text!r}")
    return path
