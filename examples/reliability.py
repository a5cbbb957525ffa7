"""How sure predictions of classes are, and how right."""

from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes


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
