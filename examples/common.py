"""What the examples share: the command line, and pictures of curves. Their loops are their own."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from data import TRAIN_IMAGES
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"adamw": "#d71", "adam": "#d71", "kron_psgd": "#1f5fa8", "kfac": "#284", "ekfac": "#8c9"}
COLOURS |= {"shampoo": "#7b3fa0", "soap": "#c2273d", "kl_soap": "#e58fa0", "kl_shampoo": "#b79ad1"}
COLOURS |= {"sgd": "#1f9fa8", "branch_kfac": "#777", "lbfgs": "#ba0", "adaptive_kfac": "#111"}

Curves = Mapping[str, Sequence[tuple[int, float]]]  # (step, training loss) by name


def draw_curves(axes: Axes, curves: Curves) -> None:
    """Draws training losses over steps."""
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), color=COLOURS.get(name), lw=2, label=name)
    axes.set(xlabel="training step", ylabel="loss")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


class Calibration(NamedTuple):
    """How right and how sure predictions are."""

    accuracy: float
    confidence: float  # the mean
    nll: float  # negative log-likelihood of the labels, the mean
    error: float  # expected calibration error: mean gap of confidence and accuracy in a bin
    bins: np.ndarray  # accuracy in bins of equal width of confidence


def calibration(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> Calibration:
    """Compares probabilities [images, classes] with labels [images]."""
    sure, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    which = np.minimum((sure * bins).astype(int), bins - 1)
    count, confidence, hits = (np.bincount(which, w, bins) for w in (None, sure, right))
    error = np.abs(confidence - hits).sum() / len(labels)
    nll = -np.log(probabilities[np.arange(len(labels)), labels]).mean()
    return Calibration(right.mean(), sure.mean(), nll, error, hits / np.maximum(count, 1))


def draw_reliability(axes: Axes, name: str, found: Calibration) -> None:
    """Draws accuracy over confidence, beside that of a calibrated net."""
    middle = (np.arange(len(found.bins)) + 0.5) / len(found.bins)
    axes.bar(middle, found.bins, 0.9 / len(found.bins), label="accuracy")
    axes.plot([0, 1], [0, 1], color="#222222", ls="--", lw=1, label="calibrated")
    axes.set(title=f"{name}: calibration error {found.error:.3f}", xlabel="confidence", ylim=(0, 1))
    axes.legend(frameon=False, loc="upper left")


def save_curves(path: Path, title: str, curves: Curves, scale: str = "log") -> None:
    """Writes a picture of nothing but curves."""
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    draw_curves(axes, curves)
    axes.set(title=title, yscale=scale)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG, with the folder that it lies in, and says where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"Picture: {path}")


def make_parser(doc: str, steps: int, out: str) -> argparse.ArgumentParser:
    """Returns a parser of what every example takes: --steps, --seed and --out."""
    parser = argparse.ArgumentParser(description=doc.partition("\n\n")[0])
    add_common(parser, steps, out)
    return parser


def add_common(parser: argparse.ArgumentParser, steps: int, out: str) -> None:
    """Adds --steps, --seed and --out, with defaults that the help tells."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--steps", type=positive_integer, default=steps, help="of training")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--out", type=png_path, default=out, help="where the picture goes")


def add_optimizer(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Adds --optimizer, one of some names or all."""
    parser.add_argument("--optimizer", choices=(*names, "all"), default="all", help="to train with")


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """Adds --batch-size, of the training images of digits."""
    parser.add_argument("--batch-size", type=image_count, default=256, help="images in a step")


def positive_integer(text: str) -> int:
    """Reads an integer of at least 1 from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def image_count(text: str) -> int:
    """Reads how many of the training images are wanted."""
    if (value := positive_integer(text)) > TRAIN_IMAGES:
        message = f"expected at most {TRAIN_IMAGES} training images, got {value}"
        raise argparse.ArgumentTypeError(message)
    return value


def png_path(text: str) -> Path:
    """Reads the path of a PNG from the command line."""
    path = Path(text)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise argparse.ArgumentTypeError(f"expected the path of a .png file, got {text!r}")
    return path
