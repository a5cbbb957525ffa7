"""Laplace approximations: how sure a net may be, from the curvature of its loss.

A net is trained on few, disturbed digits to its MAP estimate, with a standard normal prior of the
weights. There the loss is taken for a parabola: N times `ok.operators.ekfac` of the mean loss, plus
the precision of the prior, is the precision of a normal posterior; the prior is the damping. Once
that is done for the last layer alone, with the features fixed, and once for all layers. Predictions
are means over samples of the weights, from `sample`, of the net made linear at the MAP estimate.

The precision of the prior is the one of greatest evidence, the probability of the training labels
with the weights integrated out, which `inverse` and `logdet` give. Nothing is tuned on test images.
These are shown as they are, disturbed like the training images, and disturbed twice as much: each
is turned by a random angle and gets noise. A calibrated net is as often right as it is sure. The
MAP estimate is far too sure of hard images. The posterior of the last layer is less so, and that of
all layers least; of easy images the latter is not sure enough.

    python examples/laplace.py --help
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import (
    fitting_batch_size,
    load_data,
    make_parser,
    png_path,
    progress_bar,
    step_count,
)
from flax import linen as nn
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import PercentFormatter
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy import ndimage

import optax_kron as ok

DISTURBANCE = 30.0  # of the training images: degrees; and noise of a hundredth of that
DRAWS = 4  # disturbances of each test image
BATCH = 50  # images, when curvature is gathered
PRIOR = 1.0  # precision of the prior in training
PRECISIONS = np.logspace(-2, 3, 41)  # of which evidence chooses
BINS = 10  # of confidence
MAP, LAST, ALL = "MAP", "Laplace, last layer", "Laplace, all layers"
COLOURS = {MAP: "#d1701c", LAST: "#1f5fa8", ALL: "#2e8b57"}

Params = Any
Predict = Callable[[Any], jax.Array]  # from images to log-probabilities


class Net(nn.Module):
    """Two hidden layers of 128 units, then a linear readout."""

    @nn.compact
    def __call__(self, images):
        """Maps images [batch, 8, 8, 1] to logits [batch, 10]."""
        x = nn.tanh(nn.Dense(128)(images.reshape(images.shape[0], -1)))
        x = nn.tanh(nn.Dense(128)(x))
        return nn.Dense(10, name="readout")(x)


# -------------------------------------------------------------------------------------------- data


class Images(NamedTuple):
    """Images and their labels."""

    images: np.ndarray  # [images, 8, 8, 1]
    labels: np.ndarray  # [images]


def disturbed(given: Images, degrees: float, draws: int, seed: int) -> Images:
    """Turns each image by up to some degrees to either side, and adds noise; several times."""
    rng = np.random.default_rng(seed)
    images, labels = (np.concatenate([x] * draws) for x in given)
    turned = [
        ndimage.rotate(image, angle, axes=(0, 1), reshape=False, order=1)
        for image, angle in zip(images, rng.uniform(-degrees, degrees, len(images)), strict=True)
    ]
    noise = degrees / 100 * rng.standard_normal(images.shape)
    return Images(np.clip(turned + noise, 0, 1).astype(np.float32), labels)


# ---------------------------------------------------------------------------------------- training


def loss_fn(params, images, labels):
    """Returns the mean cross-entropy."""
    logits = Net().apply(params, images)
    return ok.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(data: Images, steps: int, seed: int, bars: Progress) -> Params:
    """Returns the MAP estimate: K-FAC on all images at once, the prior as weight decay."""
    key = jax.random.key(seed)
    params = Net().init(key, data.images[:1])
    layers = ok.find_layers(loss_fn, params, *data)
    with_taps = ok.value_and_grad_with_taps(loss_fn, layers)
    decay = PRIOR / len(data.labels)
    optimizer = optax.chain(
        optax.add_decayed_weights(decay),
        ok.kfac(optax.cosine_decay_schedule(0.1, steps), layers=layers, damping=decay),
    )

    @jax.jit
    def step(params, state, key):
        loss, grads, taps = with_taps(params, *data, key=key)
        updates, state = optimizer.update(grads, state, params, taps=taps)
        return optax.apply_updates(params, updates), state, loss

    state = optimizer.init(params)
    bar = bars.add_task("training", total=steps, metrics="")
    for i in range(steps):
        params, state, loss = step(params, state, jax.random.fold_in(key, i))
        if (i + 1) % 10 == 0 or i + 1 == steps:
            bars.update(bar, completed=i + 1, metrics=f"loss {loss:.3f}")
    return params


# ----------------------------------------------------------------------------------------- Laplace


@dataclass(frozen=True)
class Laplace:
    """A normal posterior of parameters.

    Attributes:
      mean: the MAP estimate of these parameters.
      logits: of parameters and images.
      curvature: of the loss that is summed over the training images.
      precision: of the prior.
      evidence: the logarithm of the marginal likelihood, for all of `PRECISIONS`.
    """

    mean: Params
    logits: Callable[[Params, jax.Array], jax.Array]
    curvature: ok.operators.Operator
    precision: float
    evidence: np.ndarray

    @property
    def effective(self) -> float:
        """The number of parameters that the data determine rather than the prior."""
        variances = self.curvature.inverse(self.precision).trace()
        return self.curvature.size - self.precision * float(variances)

    def predictor(self, samples: int, seed: int) -> Predict:
        """Returns what predicts with samples of the linearised net."""
        keys = jax.random.split(jax.random.key(seed), samples)

        def predict(images):
            logits, change = jax.linearize(lambda x: self.logits(x, images), self.mean)

            def sample(key):
                drawn = self.curvature.sample(key, self.precision)
                return jax.nn.log_softmax(logits + change(drawn))

            return jax.nn.logsumexp(jax.lax.map(sample, keys), axis=0) - jnp.log(samples)

        return predict


def laplace(
    logits: Callable[[Params, jax.Array], jax.Array], mean: Params, data: Images
) -> Laplace:
    """Fits a posterior: curvature from batches of data, then the prior of greatest evidence.

    Args:
      logits: of parameters and images.
      mean: the MAP estimate of these parameters.
      data: that it was trained on.
    """
    number = len(data.labels)
    stops = range(BATCH, number, BATCH)
    batches = list(zip(*(np.split(x, stops) for x in data), strict=True))

    def loss_fn(params, images, labels):
        found = logits(params, images)
        return ok.losses.softmax_cross_entropy_with_integer_labels(found, labels).mean()

    layers = ok.find_layers(loss_fn, mean, *batches[0])
    with_taps = ok.value_and_grad_with_taps(loss_fn, layers, fisher="exact")

    @jax.jit
    def curvature(params):
        def taps():
            return (with_taps(params, *batch)[2] for batch in batches)

        return number * ok.operators.ekfac(taps, layers)

    @jax.jit
    @jax.vmap
    def evidence(precision):
        fit = -number * loss_fn(mean, *data)
        length = optax.tree.norm(mean, squared=True)
        prior = (hessian.size * jnp.log(precision) - precision * length) / 2
        return fit + prior + hessian.inverse(precision).logdet() / 2

    hessian = curvature(mean)
    found = np.asarray(evidence(PRECISIONS))
    return Laplace(mean, logits, hessian, float(PRECISIONS[found.argmax()]), found)


def last_layer(params: Params, data: Images) -> Laplace:
    """Fits the posterior of the last layer, all others fixed."""
    others = dict(params["params"])
    readout = others.pop("readout")

    def logits(readout, images):
        return Net().apply({"params": {**others, "readout": readout}}, images)

    return laplace(logits, readout, data)


# ------------------------------------------------------------------------------------- calibration


@dataclass(frozen=True)
class Calibration:
    """How right and how sure predictions are.

    Attributes:
      accuracy: share of right predictions.
      nll: mean negative log-likelihood of the labels.
      confidence: mean probability of what is predicted.
      share: of the images, in each bin of confidence.
      sure: mean confidence in each bin.
      right: accuracy in each bin.
    """

    accuracy: float
    nll: float
    confidence: float
    share: np.ndarray
    sure: np.ndarray
    right: np.ndarray

    @property
    def ece(self) -> float:
        """The expected calibration error: the mean gap of confidence and accuracy in a bin."""
        return float(np.sum(self.share * np.abs(self.sure - self.right)))


def measure(predict: Predict, data: Images) -> Calibration:
    """Compares predictions with labels."""
    logs = np.asarray(predict(data.images), np.float64)
    confidence = np.exp(logs.max(axis=1))
    right = logs.argmax(axis=1) == data.labels
    bins = np.clip((confidence * BINS).astype(int), 0, BINS - 1)
    counts, sure, hits = (np.bincount(bins, weights, BINS) for weights in (None, confidence, right))
    return Calibration(
        accuracy=float(right.mean()),
        nll=float(-logs[np.arange(len(logs)), data.labels].mean()),
        confidence=float(confidence.mean()),
        share=counts / len(logs),
        sure=sure / np.maximum(counts, 1),
        right=hits / np.maximum(counts, 1),
    )


Results = dict[str, dict[float, Calibration]]  # by method, and degrees of disturbance


def measure_all(predictors: Mapping[str, Predict], test: Images, seed: int, bars: Progress):
    """Measures all methods at several disturbances, from none to twice that of training."""
    levels = np.linspace(0, 2 * DISTURBANCE, 7)
    results: Results = {name: {} for name in predictors}
    bar = bars.add_task("predicting", total=len(levels), metrics="")
    compiled = {name: jax.jit(predict) for name, predict in predictors.items()}
    for level in map(float, levels):
        data = disturbed(test, level, DRAWS, seed + 1)
        for name, predict in compiled.items():
            results[name][level] = measure(predict, data)
        bars.advance(bar)
    return results


# ---------------------------------------------------------------------------------- tables, picture


def posterior_table(posteriors: Mapping[str, Laplace]) -> Table:
    """Lists the posteriors."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("posterior", no_wrap=True)
    for heading in ("parameters", "of them\neffective", "precision\nof the prior", "log-evidence"):
        table.add_column(heading, justify="right")
    for name, found in posteriors.items():
        table.add_row(
            name,
            str(found.curvature.size),
            f"{found.effective:.0f}",
            f"{found.precision:.2f}",
            f"{found.evidence.max():.0f}",
        )
    return table


def calibration_table(results: Results) -> Table:
    """Lists all methods on images as they are, disturbed as in training, and twice as much."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("test images", "predictions"):
        table.add_column(heading, no_wrap=True)
    for heading in ("accuracy", "mean\nconfidence", "nll", "ECE"):
        table.add_column(heading, justify="right")
    rows = {
        "undisturbed": 0.0,
        "like training": DISTURBANCE,
        "twice that": 2 * DISTURBANCE,
    }
    for text, level in rows.items():
        for name, by_level in results.items():
            found = by_level[level]
            table.add_row(
                text if name == MAP else "",
                name,
                f"{found.accuracy:.1%}",
                f"{found.confidence:.1%}",
                f"{found.nll:.3f}",
                f"{found.ece:.3f}",
                end_section=name == ALL,
            )
    return table


def draw(path: Path, results: Results, test: Images, seed: int) -> None:
    """Draws reliability, and what becomes of it with the disturbance, into a PNG."""
    figure = Figure(figsize=(17, 5.6), dpi=110, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(3, 1.9), wspace=0.03)
    draw_reliability(left, {name: found[DISTURBANCE] for name, found in results.items()})
    draw_disturbance(right, results, test, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_reliability(figure: SubFigure, results: Mapping[str, Calibration]) -> None:
    """Draws, for each method, accuracy over confidence, and how often what confidence occurs."""
    figure.suptitle("Test images disturbed like the training images", fontsize=14)
    grid = figure.subplots(2, len(results), sharex=True, sharey="row", height_ratios=(3.2, 1))
    middle = (np.arange(BINS) + 0.5) / BINS
    for (upper, lower), (name, found) in zip(grid.T, results.items(), strict=True):
        seen, colour = found.share > 0, COLOURS[name]
        upper.bar(middle, found.right, 0.92 / BINS, color=colour, label="accuracy")
        gaps = (found.sure - found.right)[seen]
        upper.bar(
            middle[seen],
            gaps,
            0.92 / BINS,
            bottom=found.right[seen],
            color="none",
            edgecolor="#222222",
            hatch="////",
            lw=0.6,
            label="gap to confidence",
        )
        upper.plot([0, 1], [0, 1], color="#222222", lw=1, ls="--")
        upper.set_title(f"{name}\nECE {found.ece:.3f}, nll {found.nll:.2f}", fontsize=12)
        upper.legend(frameon=False, loc="upper left", fontsize=10)
        lower.bar(middle, found.share, 0.92 / BINS, color=colour, alpha=0.55)
        for value, text, style in (
            (found.accuracy, "accuracy", "-"),
            (found.confidence, "mean confidence", ":"),
        ):
            lower.axvline(value, color="#222222", lw=1.4, ls=style, label=text)
        lower.set(xlabel="confidence", xlim=(0, 1))
        finish(upper)
        finish(lower)
    grid[0, 0].set(ylabel="accuracy", ylim=(0, 1))
    grid[1, 0].set_ylabel("share of images")
    grid[1, 0].legend(frameon=False, fontsize=9, loc="upper left")


def draw_disturbance(figure: SubFigure, results: Results, test: Images, seed: int) -> None:
    """Draws confidence and likelihood over the strength of the disturbance, and how that looks."""
    upper, lower = figure.subfigures(2, 1, height_ratios=(4.4, 1), hspace=0.02)
    upper.suptitle("Test images disturbed less and more", fontsize=14)
    sure, likely = upper.subplots(1, 2)
    for name, found in results.items():
        style = {"color": COLOURS[name], "lw": 2.2, "marker": "o", "ms": 4, "label": name}
        sure.plot(list(found), [x.confidence for x in found.values()], **style)
        likely.plot(list(found), [x.nll for x in found.values()], **style)
    found = results[MAP]
    right = [x.accuracy for x in found.values()]
    sure.plot(list(found), right, color="#222222", lw=1.4, ls="--", label="accuracy of MAP")
    sure.set(title="mean confidence", ylim=(0, 1))
    sure.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    likely.set(title="negative log-likelihood (nll)", ylim=(0, None))
    for axes in (sure, likely):
        axes.axvline(DISTURBANCE, color="#888888", lw=1, ls=":", label="as in training")
        axes.set_xlabel("degrees of rotation, and noise")
        finish(axes)
    sure.legend(frameon=False, fontsize=9, loc="lower left")
    likely.legend(frameon=False, fontsize=9, loc="upper left")
    for axes, level in zip(lower.subplots(1, len(found)), found, strict=True):
        image = disturbed(Images(*(x[:1] for x in test)), level, 1, seed).images[0, ..., 0]
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel(f"{level:.0f}", fontsize=10)


def finish(axes: Axes) -> None:
    """Makes axes plain."""
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


# -------------------------------------------------------------------------------------------- main


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__, steps=300, seed_of="weights, disturbances and samples")
    parser.add_argument(
        "--images", type=fitting_batch_size, default=300, help="that are trained on"
    )
    parser.add_argument("--samples", type=step_count, default=200, help="of the weights")
    parser.add_argument(
        "--out", type=png_path, default="laplace.png", help="where the picture goes"
    )
    return parser.parse_args()


def main() -> None:
    """Trains, fits both posteriors, prints the tables and writes the picture."""
    arguments = parse_arguments()
    seed, console = arguments.seed, Console()
    data = load_data()
    count = arguments.images
    train_data = Images(data.train_images[:count], data.train_labels[:count])
    train_data = disturbed(train_data, DISTURBANCE, 1, seed)
    with progress_bar(console) as bars:
        params = train(train_data, arguments.steps, seed, bars)
    with console.status("fitting the posteriors"):
        posteriors = {
            LAST: last_layer(params, train_data),
            ALL: laplace(Net().apply, params, train_data),
        }
    console.print(posterior_table(posteriors))
    predictors: dict[str, Predict] = {
        MAP: lambda images: jax.nn.log_softmax(Net().apply(params, images))
    }
    for name, posterior in posteriors.items():
        predictors[name] = posterior.predictor(arguments.samples, seed)
    test = Images(data.test_images, data.test_labels)
    with progress_bar(console) as bars:
        results = measure_all(predictors, test, seed, bars)
    console.print(calibration_table(results))
    console.print("nll: negative log-likelihood of a label. ECE: expected calibration error.")
    draw(arguments.out, results, test, seed)
    console.print(f"Reliability: {arguments.out}")


if __name__ == "__main__":
    main()
