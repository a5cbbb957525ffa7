"""What a tournament is made of: a task, contestants, and the runs of a compiled training step.

`tournament.py` says what is measured and how to read it.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import optax

import optax_kron as ok


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
      scale: of the axis of the loss.
      panel: draws the right panel of the picture, in place of the second metric.
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
    scale: str = "log"
    panel: Callable[[Any, "Runs"], None] | None = None

    def find_layers(self) -> ok.Layers:
        """Returns the layers of the loss."""
        return ok.find_layers(self.loss_fn, self.init(), *self.batch(0))

    def format(self, values: Iterable[float]) -> str:
        """The values of the metrics in a line."""
        pairs = zip(self.metrics, values, strict=True)
        return "  ".join(f"{m.name} {m.pattern.format(v)}" for m, v in pairs)


@dataclass(frozen=True)
class Contestant:
    """An optimizer and the learning rates that it gets.

    Attributes:
      make: from a schedule to the optimizer.
      rates: peak learning rates.
      colour: of its curves.
      layers: of the loss, if something of what they saw goes into the updates.
      extras: what goes into the updates, from the taps.
    """

    make: Callable[[optax.Schedule], optax.GradientTransformation]
    rates: tuple[float, ...]
    colour: str
    layers: Iterable[ok.Layer] | None = None
    extras: Callable[[ok.Taps], dict[str, Any]] = lambda taps: {"taps": taps}


@dataclass
class Trainer:
    """One optimizer, compiled once and run with as many learning rates as wanted."""

    task: Task
    name: str
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
            value, grads, taps = with_taps(params, *batch, key=key)
            extra = self.contestant.extras(taps) | {
                "value": value,  # these three for adaptive ones alone
                "value_fn": lambda params: self.task.loss_fn(params, *batch),
                "ggn_fn": ok.ggn_vector_product(self.task.loss_fn, params, *batch),
            }
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
        return f"{self.trainer.name}, rate {self.learning_rate:g}"

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


Runs = dict[str, list[Run]]


def best_of(runs: list[Run]) -> Run:
    """Returns the run with the lowest final training loss; a diverged run never wins."""
    return min(runs, key=lambda run: run.final_loss)
