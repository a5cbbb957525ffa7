"""Influence functions: which training images help a prediction most, and which hurt it.

To first order, a little more weight on training image i changes the loss of a test image by
`-∇test · (H + λI)⁻¹ ∇i` per unit of weight. Here H is the curvature of the training loss as
`ok.operators.ekfac` sees it, and its damping λ is the weight decay: there is nothing to tune. An
image has the weight 1/N, so that the Nth part of its score is what its presence does to the loss.

Whether that is so is put to the test. Random tenths of the training images are left out, the net is
trained anew without them, and the test losses are compared with what the scores say, by rank. So
are those of two others: products of gradients without any curvature, and the exact Gauss-Newton
matrix, by conjugate gradients that EKFAC's inverse preconditions. And the images that help or hurt
a prediction most, as each of the three says, are left out together.

All training goes on to where the gradient is zero, or the changes would be those of training that
is not done. K-FAC comes first, then L-BFGS in coordinates that `inverse_sqrt` makes round. A flat
minimum moves far for small reasons, so weight decay is strong; with less of it all scores get
worse.

    python examples/influence.py --help
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import (
    Digits,
    load_data,
    make_parser,
    png_path,
    positive_number,
    progress_bar,
    whole_number,
)
from flax import linen as nn
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy.stats import spearmanr

import optax_kron as ok

RETRAIN_SHARE = 3  # from the optimum of all images to that without some take a third of the steps
AT_ONCE = 16  # nets that are trained anew side by side
SHARE = 0.1  # of the training images in a random group
LEFT_OUT = 10  # images that help or hurt most, left out together
SHOWN = 5  # of them in the picture
GRADIENTS, EKFAC, EXACT = "gradients alone", "EKFAC", "Gauss-Newton"
HELPS, HURTS = "#2e8b57", "#b5332e"
COLOURS = ("#1f5fa8", "#d1701c", "#7b3f9e", "#2e8b57")  # of the test images

Params = Any


class Net(nn.Module):
    """A hidden layer of 32 units, then a linear readout."""

    @nn.compact
    def __call__(self, images):
        """Maps images [batch, 8, 8, 1] to logits [batch, 10]."""
        x = nn.tanh(nn.Dense(32)(images.reshape(images.shape[0], -1)))
        return nn.Dense(10)(x)


def losses_of(params, images, labels):
    """Returns the cross-entropy of every image, [batch]."""
    logits = Net().apply(params, images)
    return ok.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


def loss_fn(params, images, labels):
    """Returns the mean cross-entropy."""
    return losses_of(params, images, labels).mean()


def gradients(params, images, labels):
    """Returns the gradient of every image's loss: parameters with a leading axis [batch]."""
    one = jax.grad(lambda params, *pair: loss_fn(params, *(x[None] for x in pair)))
    return jax.vmap(one, in_axes=(None, 0, 0))(params, images, labels)


# ---------------------------------------------------------------------------------------- training


@dataclass(frozen=True, eq=False)
class Problem:
    """What is trained on: images, labels and the weight decay λ; and the layers of the loss."""

    images: jax.Array
    labels: jax.Array
    decay: float
    layers: ok.Layers

    def objective(self, params: Params, weights: jax.Array) -> jax.Array:
        """What is minimised, with a weight for every image: 1, or 0 to leave it out."""
        loss = jnp.mean(weights * losses_of(params, self.images, self.labels))
        return loss + self.decay / 2 * optax.tree.norm(params, squared=True)

    def curvature(self, params: Params) -> ok.operators.Operator:
        """Returns EKFAC's approximation of the curvature of the mean loss."""
        with_taps = ok.value_and_grad_with_taps(loss_fn, self.layers, fisher="exact")
        _, _, taps = with_taps(params, self.images, self.labels)
        return ok.operators.ekfac(taps, self.layers)


def train(problem: Problem, steps: int, seed: int, bars: Progress) -> Params:
    """Trains from scratch with K-FAC, and as many steps on to the optimum."""
    optimizer = optax.chain(
        optax.add_decayed_weights(problem.decay),
        ok.kfac(optax.cosine_decay_schedule(0.1, steps), layers=problem.layers, damping=1e-2),
    )
    with_taps = ok.value_and_grad_with_taps(loss_fn, problem.layers)

    @jax.jit
    def step(params, state, key):
        loss, grads, taps = with_taps(params, problem.images, problem.labels, key=key)
        updates, state = optimizer.update(grads, state, params, taps=taps)
        return optax.apply_updates(params, updates), state, loss

    key = jax.random.key(seed)
    params = Net().init(key, problem.images[:1])
    state = optimizer.init(params)
    bar = bars.add_task("training", total=steps, metrics="")
    for i in range(steps):
        params, state, loss = step(params, state, jax.random.fold_in(key, i))
        if (i + 1) % 10 == 0 or i + 1 == steps:
            bars.update(bar, completed=i + 1, metrics=f"loss {loss:.3f}")
    half = jax.jit(problem.curvature)(params).inverse_sqrt(problem.decay)
    everything = jnp.ones(len(problem.labels))
    return jax.jit(partial(settle, problem, steps=steps))(params, everything, half)


def settle(
    problem: Problem, params: Params, weights: jax.Array, half: ok.operators.Operator, steps: int
) -> Params:
    """Goes from somewhere near to the optimum for given weights of the images.

    L-BFGS works on z, with the parameters `params + half @ z` and `half` the inverse root of the
    damped curvature: seen from z, the objective curves about alike in all directions.
    """
    optimizer = optax.lbfgs()

    def at(z):
        return jax.tree.map(jnp.add, params, half @ z)

    def objective(z):
        return problem.objective(at(z), weights)

    def step(carry, _):
        z, state = carry
        value, grads = optax.value_and_grad_from_state(objective)(z, state=state)
        updates, state = optimizer.update(
            grads, state, z, value=value, grad=grads, value_fn=objective
        )
        return (optax.apply_updates(z, updates), state), None

    z = optax.tree.zeros_like(params)
    (z, _), _ = jax.lax.scan(step, (z, optimizer.init(z)), length=steps)
    return at(z)


def retrain(
    problem: Problem,
    params: Params,
    half: ok.operators.Operator,
    groups: np.ndarray,
    losses: Callable[[Params], jax.Array],
    steps: int,
    bars: Progress,
) -> tuple[np.ndarray, np.ndarray]:
    """Trains once without each group of images.

    Args:
      problem: what the net was trained on.
      params: the optimum with all images.
      half: as in `settle`.
      groups: whether an image is in a group, [groups, images].
      losses: of the test images, [tests].
      steps: of L-BFGS.
      bars: for the progress.

    Returns:
      The losses [groups, tests] of the nets, and the length [groups] of the gradient at the end.
    """

    @jax.jit
    @jax.vmap
    def without(group):
        weights = 1.0 - group
        settled = settle(problem, params, weights, half, steps)
        slope = optax.tree.norm(jax.grad(problem.objective)(settled, weights))
        return losses(settled), slope

    bar = bars.add_task("training without some", total=len(groups), metrics="")
    found = []
    for start in range(0, len(groups), AT_ONCE):
        some = groups[start : start + AT_ONCE].astype(np.float32)
        padded = np.pad(some, ((0, AT_ONCE - len(some)), (0, 0)))  # so that it compiles but once
        found.append([np.asarray(x)[: len(some)] for x in without(padded)])
        bars.advance(bar, len(some))
    changed, slopes = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return changed, slopes


# -------------------------------------------------------------------------------------- influence


@dataclass(frozen=True)
class Tests:
    """The test images that are looked at."""

    images: np.ndarray  # [tests, 8, 8, 1]
    labels: np.ndarray  # [tests]
    taken_for: np.ndarray  # [tests], what the net says
    losses: np.ndarray  # [tests]

    def describe(self) -> Iterator[str]:
        """Returns a name for each."""
        for label, said in zip(self.labels, self.taken_for, strict=True):
            yield f"a {label}" if said == label else f"a {label} taken for a {said}"


def choose(params: Params, data: Digits) -> Tests:
    """Returns two wrong predictions and two right ones: of four digits, those of most loss."""
    said = np.asarray(Net().apply(params, data.test_images).argmax(axis=-1))
    losses = np.asarray(losses_of(params, data.test_images, data.test_labels))
    worst = np.argsort(-losses)
    right = said == data.test_labels
    chosen: list[int] = []
    for wanted in (False, False, True, True):
        new = ~np.isin(data.test_labels, data.test_labels[chosen])
        fitting = worst[new[worst]]
        chosen.append(next((i for i in fitting if right[i] == wanted), fitting[0]))
    return Tests(data.test_images[chosen], data.test_labels[chosen], said[chosen], losses[chosen])


def influences(
    problem: Problem, params: Params, curvature: ok.operators.Operator, tests: Tests
) -> dict[str, np.ndarray]:
    """Returns every training image's score for every test image, [tests, images], by method."""
    inverse = curvature.inverse(problem.decay)
    exact = ok.operators.ggn(loss_fn, params, problem.images, problem.labels)
    damped = exact + problem.decay * ok.operators.identity(params)

    def solve(vector):
        return jax.scipy.sparse.linalg.cg(damped.mv, vector, M=inverse.mv, tol=1e-5, maxiter=300)[0]

    solvers = {GRADIENTS: lambda vector: vector, EKFAC: inverse.mv, EXACT: solve}

    def scores(solver, tested, trained):
        directions = jax.vmap(solver)(tested)
        products = jax.tree.map(
            lambda a, b: -jnp.einsum("t...,n...->tn", a, b), directions, trained
        )
        return sum(jax.tree.leaves(products))

    tested = jax.jit(gradients)(params, tests.images, tests.labels)
    trained = jax.jit(gradients)(params, problem.images, problem.labels)
    return {
        name: np.asarray(jax.jit(partial(scores, solver))(tested, trained))
        for name, solver in solvers.items()
    }


def random_groups(images: int, count: int, seed: int) -> np.ndarray:
    """Returns which images are in each group, [count, images]."""
    rng = np.random.default_rng(seed)
    groups = np.zeros((count, images), bool)
    for group in groups:
        group[rng.choice(images, round(SHARE * images), replace=False)] = True
    return groups


def extreme_groups(scores: np.ndarray) -> np.ndarray:
    """Returns the images that help each test image most, then those that hurt it most.

    Args:
      scores: [tests, images].

    Returns:
      Which images are in each group, [2, tests, images].
    """
    ranks = scores.argsort(axis=1).argsort(axis=1)
    return np.stack([ranks < LEFT_OUT, ranks >= scores.shape[1] - LEFT_OUT])


@dataclass(frozen=True)
class Validation:
    """What became of the test losses without some of the training images.

    Attributes:
      groups: random ones, [groups, images].
      actual: changes of the test losses without them, [tests, groups].
      extremes: losses [2, tests] without the images that help, and hurt, each test image most; by
        method.
      slopes: length of the gradient at the end of each training.
    """

    groups: np.ndarray
    actual: np.ndarray
    extremes: Mapping[str, np.ndarray]
    slopes: np.ndarray

    def predicted(self, scores: np.ndarray) -> np.ndarray:
        """What scores [tests, images] say of the actual changes."""
        return -scores @ self.groups.T / self.groups.shape[1]

    def correlations(self, scores: np.ndarray) -> np.ndarray:
        """Spearman's correlation of predicted and actual changes, [tests]."""
        pairs = zip(self.predicted(scores), self.actual, strict=True)
        return np.array([spearmanr(*pair).statistic for pair in pairs])


def validate(
    problem: Problem,
    params: Params,
    curvature: ok.operators.Operator,
    tests: Tests,
    scores: Mapping[str, np.ndarray],
    count: int,
    steps: int,
    seed: int,
    bars: Progress,
) -> Validation:
    """Trains without random groups, and without the images that matter most to a test image."""
    chosen = {name: extreme_groups(values) for name, values in scores.items()}
    groups = random_groups(len(problem.labels), count, seed)
    images = groups.shape[1]
    everything = np.concatenate([groups, *(x.reshape(-1, images) for x in chosen.values())])
    losses, slopes = retrain(
        problem,
        params,
        curvature.inverse_sqrt(problem.decay),
        everything,
        lambda settled: losses_of(settled, tests.images, tests.labels),
        -(-steps // RETRAIN_SHARE),
        bars,
    )
    number = len(tests.labels)
    rest = losses[count:].reshape(len(chosen), 2, number, number)
    own = np.diagonal(rest, axis1=2, axis2=3)  # each test image's loss without its own groups
    extremes = dict(zip(chosen, own, strict=True))
    return Validation(groups, (losses[:count] - tests.losses).T, extremes, slopes)


# ---------------------------------------------------------------------------------- tables, picture


def correlation_table(scores: Mapping[str, np.ndarray], found: Validation) -> Table:
    """Lists how well each method ranks what leaving groups out does."""
    title = f"Rank correlation of predicted\nand actual changes, {len(found.groups)} groups"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("scores", no_wrap=True)
    for heading in ("mean", "lowest", "highest"):
        table.add_column(heading, justify="right")
    for name, values in scores.items():
        each = found.correlations(values)
        numbers = (f"{x:.2f}" for x in (each.mean(), each.min(), each.max()))
        table.add_row(name, *numbers, style="bold" if name == EKFAC else None)
    return table


def extremes_table(tests: Tests, found: Validation) -> Table:
    """Lists the test losses after training without the images that matter most."""
    title = f"Loss after training without {LEFT_OUT} images"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("test image", no_wrap=True)
    table.add_column("scores", no_wrap=True)
    for heading in ("with\nall", "without those\nthat help", "without those\nthat hurt"):
        table.add_column(heading, justify="right")
    for i, text in enumerate(tests.describe()):
        for name, losses in found.extremes.items():
            first, last = name == GRADIENTS, name == EXACT
            numbers = (f"{x:.2f}" for x in losses[:, i])
            before = f"{tests.losses[i]:.2f}"
            table.add_row(text if first else "", name, before, *numbers, end_section=last)
    return table


def draw(
    path: Path,
    problem: Problem,
    tests: Tests,
    scores: Mapping[str, np.ndarray],
    found: Validation,
) -> None:
    """Draws the images that matter most, and predicted against actual changes, into a PNG."""
    figure = Figure(figsize=(17, 8), dpi=110, layout="constrained")
    one, helps, hurts, changes = figure.subfigures(
        1, 4, width_ratios=(1.25, SHOWN, SHOWN, 4), wspace=0.02
    )
    draw_tests(one, tests)
    effects = scores[EKFAC] / len(problem.labels)
    draw_extremes(helps, problem, effects, HELPS, "The training images that help most")
    draw_extremes(hurts, problem, effects, HURTS, "The training images that hurt most")
    changes.suptitle(f"Training without {SHARE:.0%} of them", fontsize=14)
    axes = changes.subplots(2, 1)
    for name, panel in zip((GRADIENTS, EKFAC), axes, strict=True):
        draw_changes(panel, name, scores[name], tests, found)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_tests(figure: SubFigure, tests: Tests) -> None:
    """Draws the test images, one below the other."""
    figure.suptitle("Test image\n", fontsize=14)
    column = figure.subplots(len(tests.labels), 1)
    for axes, text, image, loss in zip(
        column, tests.describe(), tests.images, tests.losses, strict=True
    ):
        draw_image(axes, image, f"{text}\nloss {loss:.2f}", "#222222")


def draw_extremes(
    figure: SubFigure, problem: Problem, effects: np.ndarray, colour: str, title: str
) -> None:
    """Draws, in a row for each test image, the training images with the greatest effects."""
    figure.suptitle(f"{title}\nand what each does to the loss, by EKFAC", fontsize=14, color=colour)
    sign = 1 if colour == HELPS else -1
    for row, values in zip(figure.subplots(len(effects), SHOWN), effects, strict=True):
        for axes, i in zip(row, np.argsort(sign * values)[:SHOWN], strict=True):
            text = f"a {problem.labels[i]}:  {values[i]:+.3f}"
            draw_image(axes, np.asarray(problem.images[i]), text, colour)


def draw_image(axes: Axes, image: np.ndarray, text: str, colour: str) -> None:
    """Draws a digit in a frame."""
    axes.imshow(image[..., 0], cmap="gray_r", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.set_title(text, fontsize=11, color=colour)
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2.2)


def draw_changes(
    axes: Axes, name: str, scores: np.ndarray, tests: Tests, found: Validation
) -> None:
    """Draws predicted against actual changes of the test losses, a point for each group."""
    predicted = found.predicted(scores)
    for x, y, text, colour in zip(predicted, found.actual, tests.describe(), COLOURS, strict=False):
        axes.scatter(x, y, s=26, color=colour, alpha=0.75, lw=0, label=text)
    if name == EKFAC:
        both = np.concatenate([found.actual, predicted])
        low, high = both.min(), both.max()
        axes.plot([low, high], [low, high], color="#222222", lw=1, ls="--", label="as predicted")
    mean = found.correlations(scores).mean()
    axes.set_title(f"{name}: rank correlation {mean:.2f}", fontsize=12)
    units = "" if name == EKFAC else ", in other units"
    axes.set(xlabel=f"predicted change of the loss{units}", ylabel="actual change")
    axes.legend(frameon=False, fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


# -------------------------------------------------------------------------------------------- main


def group_count(text: str) -> int:
    """Reads how many groups, enough to rank, from the command line."""
    return whole_number(text, least=3)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__, steps=300, seed_of="weights, sampled labels and groups")
    parser.add_argument(
        "--weight-decay", type=positive_number, default=1e-2, help="and the damping: λ"
    )
    parser.add_argument("--groups", type=group_count, default=24, help="left out, each for itself")
    parser.add_argument("--out", type=png_path, default="influence.png", help="of the picture")
    return parser.parse_args()


def main() -> None:
    """Trains, scores, validates, prints the tables and writes the picture."""
    arguments = parse_arguments()
    console = Console()
    data = load_data()
    images, labels = jax.device_put((data.train_images, data.train_labels))
    layers = ok.find_layers(loss_fn, Net().init(jax.random.key(0), images[:1]), images, labels)
    problem = Problem(images, labels, arguments.weight_decay, layers)
    console.print(str(layers), highlight=False, soft_wrap=True)
    with progress_bar(console) as bars:
        params = train(problem, arguments.steps, arguments.seed, bars)
        curvature = jax.jit(problem.curvature)(params)
        tests = choose(params, data)
        scores = influences(problem, params, curvature, tests)
        found = validate(
            problem,
            params,
            curvature,
            tests,
            scores,
            count=arguments.groups,
            steps=arguments.steps,
            seed=arguments.seed,
            bars=bars,
        )
    slope = optax.tree.norm(jax.grad(problem.objective)(params, jnp.ones(len(labels))))
    said = Net().apply(params, data.test_images).argmax(axis=-1)
    console.print(
        f"\nTest accuracy {np.mean(said == data.test_labels):.1%}. Length of the gradient at the "
        f"end of training: {slope:.0e};\nwithout some images {np.median(found.slopes):.0e} in the "
        f"median and {found.slopes.max():.0e} at most.\n"
    )
    console.print(correlation_table(scores, found))
    console.print(extremes_table(tests, found))
    draw(arguments.out, problem, tests, scores, found)
    console.print(f"Images: {arguments.out}")


if __name__ == "__main__":
    main()
