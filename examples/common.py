"""What both digits examples need: the images, the order of the batches, and a progress bar."""

import argparse
from typing import NamedTuple

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TRAIN_IMAGES, TEST_IMAGES = 1297, 500


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


def progress_bar() -> Progress:
    """Returns a bar whose tasks carry `loss` and `accuracy` as fields."""
    return Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.2e}  accuracy {task.fields[accuracy]:6.1%}"),
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


def fitting_batch_size(text: str) -> int:
    """Reads a batch size that the training images can fill from the command line."""
    value = whole_number(text, least=1)
    if value > TRAIN_IMAGES:
        raise argparse.ArgumentTypeError(
            f"expected at most {TRAIN_IMAGES} training images, got {value}"
        )
    return value
