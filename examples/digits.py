"""AdamW and kron_psgd side by side: a small convolutional net on real images of digits.

Both optimizers start from the same weights, see the same batches in the same order, use the same
cosine schedule, and get three learning rates each. The run with the lowest final training loss is
the optimizer's best; test accuracy plays no part in the choice. Losses are means over all training
images, accuracies over 500 images that are never trained on. Seconds count training steps alone:
compilation is listed on its own and evaluation is not counted. The time per step is a median.

    python examples/digits.py --help
"""

import argparse
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import (
    Digits,
    batch_order,
    fitting_batch_size,
    load_data,
    progress_bar,
    step_count,
    whole_number,
)
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import optax_kron as ok

# In steps of about three around each optimizer's best: less and more are both worse.
LEARNING_RATES = {"adamw": (1e-2, 3e-2, 1e-1), "kron_psgd": (3e-3, 1e-2, 3e-2)}
COLOURS = {"adamw": "#d1701c", "kron_psgd": "#1f5fa8"}
TARGET = 0.97  # test accuracy whose cost the table lists
STEPS_PER_POINT = 5  # training steps between two points of the curves


class ConvNet(nn.Module):
    """Three 3x3 convolutions, the last two halving the image, then a linear readout."""

    @nn.compact
    def __call__(self, images):
        """Maps images [batch, 8, 8, 1] to logits [batch, 10]."""
        x = nn.tanh(nn.Conv(32, (3, 3))(images))
        x = nn.tanh(nn.Conv(32, (3, 3), strides=2)(x))
        x = nn.tanh(nn.Conv(32, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def make_optimizer(name: str, learning_rate, steps: int, seed: int):
    """Returns the optimizer: without a rate, kron_psgd is a preconditioner to chain."""
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    if name == "kron_psgd":
        return optax.chain(ok.kron_psgd(seed=seed), optax.scale_by_learning_rate(schedule))
    return optax.adamw(schedule)


def loss_fn(params, images, labels):
    """Returns the mean cross-entropy of the net's predictions."""
    logits = ConvNet().apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def evaluate(params, data: Digits):
    """Returns the loss on all training images and the accuracy on the test images."""
    predictions = ConvNet().apply(params, data.test_images).argmax(axis=-1)
    loss = loss_fn(params, data.train_images, data.train_labels)
    return loss, (predictions == data.test_labels).mean()


@dataclass
class Trainer:
    """One optimizer, compiled once and run with as many learning rates as wanted."""

    name: str
    data: Digits
    batches: jax.Array  # [steps, batch_size] int32
    seed: int

    def __post_init__(self):
        """Compiles the training step, noting how long that takes and how large the state is."""
        self.initialise = jax.jit(self._initialise)
        params, opt_state = self.initialise()
        self.state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state))
        start = time.perf_counter()
        step = jax.jit(self._step, donate_argnums=(0, 1))  # old parameters and state are reused
        self.step = step.lower(params, opt_state, 1.0, 0).compile()
        self.compile_seconds = time.perf_counter() - start

    def _initialise(self):
        """Returns fresh parameters and optimizer state; the state does not depend on the rate."""
        params = ConvNet().init(jax.random.key(self.seed), self.data.train_images[:1])
        return params, make_optimizer(self.name, 1.0, len(self.batches), self.seed).init(params)

    def _step(self, params, opt_state, learning_rate, i):
        """Takes step i. The rate is an argument, so one compiled program serves every rate.

        Each step is a call of its own, since XLA's convolutions are slow inside loops on CPUs.
        """
        optimizer = make_optimizer(self.name, learning_rate, len(self.batches), self.seed)
        images = self.data.train_images[self.batches[i]]
        labels = self.data.train_labels[self.batches[i]]
        grads = jax.grad(loss_fn)(params, images, labels)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state


@dataclass
class Run:
    """The curves of one optimizer at one learning rate, one point per evaluation."""

    trainer: Trainer
    learning_rate: float
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The optimizer and its peak learning rate."""
        return f"{self.trainer.name}, rate {self.learning_rate:g}"

    @property
    def milliseconds(self) -> float:
        """The median time of a step, which short disturbances of the machine leave alone."""
        return 1e3 * float(np.median(np.diff(self.seconds) / np.diff(self.steps)))

    def first(self, reached) -> int | None:
        """Returns the index of the first point at which reached(loss, accuracy) holds."""
        points = enumerate(zip(self.loss, self.accuracy, strict=True))
        return next((i for i, point in points if reached(*point)), None)


def train(trainer: Trainer, learning_rate: float, bars: Progress) -> Run:
    """Trains from scratch at one learning rate, with a progress bar."""
    run = Run(trainer, learning_rate)
    total = len(trainer.batches)
    bar = bars.add_task(run.label, total=total, loss=math.nan, accuracy=math.nan)
    params, opt_state = trainer.initialise()
    seconds, step = 0.0, 0
    while True:
        loss, accuracy = map(float, evaluate(params, trainer.data))
        run.steps.append(step)
        run.seconds.append(seconds)
        run.loss.append(loss)
        run.accuracy.append(accuracy)
        bars.update(bar, completed=step, loss=loss, accuracy=accuracy)
        if step == total:
            return run
        stop = min(step + STEPS_PER_POINT, total)
        begin = time.perf_counter()
        for i in range(step, stop):
            params, opt_state = trainer.step(params, opt_state, learning_rate, i)
        jax.block_until_ready(params)
        seconds += time.perf_counter() - begin
        step = stop


def best_of(runs: list[Run]) -> Run:
    """Returns the run with the lowest final training loss; a diverged run never wins."""
    return min(runs, key=lambda run: run.loss[-1] if math.isfinite(run.loss[-1]) else math.inf)


def make_table(runs: dict[str, list[Run]]) -> Table:
    """Lists every run, the best one of each optimizer in bold with a star."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in (
        "optimizer",
        "peak\nrate",
        "steps\nto 97%",
        "seconds\nto 97%",
        "final\nloss",
        "final\naccuracy",
        "ms per\nstep",
        "compile\nseconds",
        "state\nKiB",
    ):
        table.add_column(column, justify="left" if column == "optimizer" else "right", no_wrap=True)
    for name, group in runs.items():
        for run in group:
            best = run is best_of(group)
            at = run.first(lambda loss, accuracy: accuracy >= TARGET)
            table.add_row(
                f"{name} *" if best else name,
                f"{run.learning_rate:g}",
                "never" if at is None else str(run.steps[at]),
                "never" if at is None else f"{run.seconds[at]:.2f}",
                f"{run.loss[-1]:.1e}",
                f"{run.accuracy[-1]:.1%}",
                f"{run.milliseconds:.1f}",
                f"{run.trainer.compile_seconds:.1f}",
                f"{run.trainer.state_bytes / 2**10:.0f}",
                style="bold" if best else "dim",
                end_section=run is group[-1],
            )
    return table


def compare(adamw: Run, kron: Run) -> str:
    """Says in a sentence when kron_psgd passes the loss at which AdamW ends."""
    goal = adamw.loss[-1]
    at = kron.first(lambda loss, accuracy: loss <= goal)
    if at is None:
        return f"kron_psgd does not reach adamw's final loss of {goal:.1e}."
    return (
        f"kron_psgd first passes adamw's final loss of {goal:.1e} after {kron.steps[at]} steps and "
        f"{kron.seconds[at]:.1f} s; adamw takes {adamw.steps[-1]} steps and "
        f"{adamw.seconds[-1]:.1f} s."
    )


def draw(runs: dict[str, list[Run]], path: Path) -> None:
    """Draws loss over steps, loss over seconds and accuracy over steps into a PNG."""
    figure = Figure(figsize=(14, 4.6), dpi=120, layout="constrained")
    by_step, by_second, accuracy = figure.subplots(1, 3)
    for name, group in runs.items():
        best = best_of(group)
        for run in sorted(group, key=lambda run: run is best):
            style = {
                "color": COLOURS[name],
                "lw": 2.2 if run is best else 1.0,
                "alpha": 1.0 if run is best else 0.35,
                "label": run.label if run is best else None,
            }
            by_step.plot(run.steps, run.loss, **style)
            by_second.plot(run.seconds, run.loss, **style)
            accuracy.plot(run.steps, run.accuracy, **style)
    by_step.set(xlabel="training step", ylabel="training loss", yscale="log")
    by_second.set(xlabel="seconds of training", ylabel="training loss", yscale="log")
    accuracy.set(xlabel="training step", ylabel="test accuracy", ylim=(0.9, 1.0))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    accuracy.axhline(TARGET, color="grey", lw=1, ls="--")
    for axes in (by_step, by_second, accuracy):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    by_step.legend(frameon=False)
    by_second.legend(frameon=False)
    figure.suptitle(
        "Digits: a small convolutional net, best of three learning rates (others faint)"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def png_path(text: str) -> Path:
    """Reads the path of a PNG from the command line."""
    path = Path(text)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise argparse.ArgumentTypeError(f"expected the path of a .png file, got {text!r}")
    return path


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=step_count, default=200, help="training steps per run")
    parser.add_argument(
        "--optimizer", choices=(*LEARNING_RATES, "both"), default="both", help="what to train with"
    )
    parser.add_argument(
        "--batch-size", type=fitting_batch_size, default=256, help="images per step"
    )
    parser.add_argument(
        "--seed", type=whole_number, default=0, help="of weights, batches and optimizer"
    )
    parser.add_argument("--out", type=png_path, default="digits.png", help="where the curves go")
    return parser.parse_args()


def main() -> None:
    """Trains, prints the table and writes the picture."""
    arguments = parse_arguments()
    names = list(LEARNING_RATES) if arguments.optimizer == "both" else [arguments.optimizer]
    data = load_data()
    batches = batch_order(
        len(data.train_labels), arguments.batch_size, arguments.steps, arguments.seed
    )
    data, batches = jax.device_put((data, jnp.asarray(batches)))
    console = Console()
    runs = {}
    for name in names:
        with console.status(f"compiling {name}"):
            trainer = Trainer(name, data, batches, arguments.seed)
        with progress_bar() as bars:
            runs[name] = [train(trainer, rate, bars) for rate in LEARNING_RATES[name]]
    console.print(make_table(runs))
    console.print(
        "* lowest final training loss of the three. Seconds exclude compilation and evaluation."
    )
    if len(runs) == 2:
        console.print(compare(best_of(runs["adamw"]), best_of(runs["kron_psgd"])))
    draw(runs, arguments.out)
    console.print(f"Curves: {arguments.out}")


if __name__ == "__main__":
    main()
