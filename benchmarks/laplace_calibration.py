"""Calibration of a MAP estimate and two Laplace approximations, on images disturbed more or less.

The net, its training and the posterior of all layers are those of `examples/laplace.py`. Beside it
is the posterior of the last layer alone, with the features fixed. Test images are shown as they
are, disturbed like the training images, and up to twice as much, four times each: turned by a
random angle, with noise. Nothing is tuned on them: the prior is the one of greatest evidence.

In the tables, nll is the mean negative log-likelihood of the labels, ECE the expected calibration
error, the mean gap of confidence and accuracy in ten bins of confidence: lower is better for both.
The MAP estimate is far too sure of hard images. The posterior of the last layer is less so, and
that of all layers least; of easy images the latter is not sure enough.
"""

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import optax_kron as ok
from examples import common, data, laplace

LEVELS = tuple(float(x) for x in np.linspace(0, 2 * laplace.DEGREES, 7))  # degrees of disturbance
NAMED = {0: "undisturbed", laplace.DEGREES: "like training", 2 * laplace.DEGREES: "twice that"}
DRAWS = 4  # disturbances of each test image
MAP, LAST, ALL = "MAP", "Laplace, last layer", "Laplace, all layers"
COLOURS = {MAP: "#d1701c", LAST: "#1f5fa8", ALL: "#2e8b57"}


def fit(logits_fn, params, images, labels):
    """Returns a posterior: what `laplace.predict` takes, and a row of the table of posteriors."""

    def loss_fn(params, images, labels):
        logits = logits_fn(params, images)
        return ok.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    curvature, precision, evidence = laplace.fit(loss_fn, params, images, labels)
    variances = curvature.inverse(precision).trace()
    effective = curvature.size - precision * float(variances)
    row = str(curvature.size), f"{effective:.0f}", f"{precision:.2f}", f"{evidence:.0f}"
    return (logits_fn, params, curvature, precision), row


def fit_both(params, images, labels):
    """Returns the posteriors of the last layer, all others fixed, and of all layers."""
    others = dict(params["params"])
    readout = others.pop("readout")

    def last_layer(readout, images):
        return laplace.Net().apply({"params": {**others, "readout": readout}}, images)

    return {
        LAST: fit(last_layer, readout, images, labels),
        ALL: fit(laplace.Net().apply, params, images, labels),
    }


def measure(params, posteriors, samples: int, seed: int):
    """Returns what `common.calibration` measures, by method and level of disturbance."""
    keys = jax.random.split(jax.random.key(seed), samples)
    test, results = data.load_data(), {name: {} for name in COLOURS}
    images = np.tile(test.test_images, (DRAWS, 1, 1, 1))
    labels = np.tile(test.test_labels, DRAWS)
    predictors = {MAP: jax.jit(lambda x: jax.nn.softmax(laplace.Net().apply(params, x)))}
    for name, (posterior, _) in posteriors.items():
        predictors[name] = jax.jit(lambda x, own=posterior: laplace.predict(*own, x, keys))
    for level in track(LEVELS, "predicting"):
        shown = data.disturbed(images, level, seed + 1)
        for name, predict in predictors.items():
            results[name][level] = common.calibration(np.asarray(predict(shown)), labels)
    return results


def print_tables(console: Console, posteriors, results) -> None:
    """Prints the posteriors, then all methods at three levels of disturbance."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("posterior", no_wrap=True)
    for heading in ("parameters", "of them\neffective", "precision\nof the prior", "log-evidence"):
        table.add_column(heading, justify="right")
    for name, (_, row) in posteriors.items():
        table.add_row(name, *row)
    console.print(table)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("test images", "predictions"):
        table.add_column(heading, no_wrap=True)
    for heading in ("accuracy", "mean\nconfidence", "nll", "ECE"):
        table.add_column(heading, justify="right")
    for level, text in NAMED.items():
        for name, by_level in results.items():
            accuracy, sure, nll, error, _ = by_level[level]
            cells = f"{accuracy:.1%}", f"{sure:.1%}", f"{nll:.3f}", f"{error:.3f}"
            table.add_row(text if name == MAP else "", name, *cells, end_section=name == ALL)
    console.print(table)


def draw(path, results) -> None:
    """Draws confidence, likelihood and calibration error over the strength of the disturbance."""
    figure = Figure(figsize=(14, 4.6), dpi=120, layout="constrained")
    panels = figure.subplots(1, 3)
    titles = {
        "confidence": "mean confidence",
        "nll": "negative log-likelihood",
        "error": "expected calibration error",
    }
    for axes, (number, title) in zip(panels, titles.items(), strict=True):
        for name, by_level in results.items():
            curve = [getattr(by_level[level], number) for level in LEVELS]
            axes.plot(LEVELS, curve, "o-", color=COLOURS[name], lw=2.2, ms=4, label=name)
        axes.set(title=title, ylim=(0, None), xlabel="degrees of rotation, and noise")
        axes.axvline(laplace.DEGREES, color="#888888", lw=1, ls=":", label="as in training")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    accuracy = [results[MAP][level][0] for level in LEVELS]
    panels[0].plot(LEVELS, accuracy, color="#222222", lw=1.4, ls="--", label="accuracy of MAP")
    panels[0].set_ylim(0, 1)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False
    )
    common.save(figure, path)


def main() -> None:
    """Trains, fits both posteriors, prints the tables and draws the curves."""
    parser = common.make_parser(__doc__, steps=300, out="laplace_calibration.png")
    parser.add_argument("--images", type=common.image_count, default=300, help="trained on")
    parser.add_argument("--samples", type=common.positive_integer, default=200, help="of weights")
    arguments = parser.parse_args()
    digits, count, seed = data.load_data(), arguments.images, arguments.seed
    images = data.disturbed(digits.train_images[:count], laplace.DEGREES, seed)
    labels = digits.train_labels[:count]
    params = laplace.train(images, labels, arguments.steps, jax.random.key(seed))
    posteriors = fit_both(params, images, labels)
    results = measure(params, posteriors, arguments.samples, seed)
    print_tables(Console(), posteriors, results)
    draw(arguments.out, results)


if __name__ == "__main__":
    main()
