"""Images of digits for the examples, in one fixed split, and which of them a step sees."""

from typing import NamedTuple

import numpy as np
from scipy import ndimage
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
    sizes = {"train_size": TRAIN_IMAGES, "test_size": TEST_IMAGES}
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, **sizes, random_state=0, stratify=labels
    )
    return Digits(train_images, train_labels, test_images, test_labels)


def batch_order(num_images: int, batch_size: int, steps: int, seed: int) -> np.ndarray:
    """Returns which images each step sees, [steps, batch_size]: shuffled anew in every epoch."""
    rng = np.random.default_rng(seed)
    per_epoch = num_images // batch_size
    epochs = -(-steps // per_epoch)
    shuffled = [rng.permutation(num_images)[: per_epoch * batch_size] for _ in range(epochs)]
    return np.concatenate(shuffled).reshape(-1, batch_size)[:steps].astype(np.int32)


def disturbed(images: np.ndarray, degrees: float, seed: int) -> np.ndarray:
    """Turns each image by up to some degrees to either side, and adds noise."""
    rng = np.random.default_rng(seed)
    angles = rng.uniform(-degrees, degrees, len(images))
    turn = {"axes": (0, 1), "reshape": False, "order": 1}
    turned = [ndimage.rotate(x, angle, **turn) for x, angle in zip(images, angles, strict=True)]
    noise = degrees / 100 * rng.standard_normal(images.shape)
    return np.clip(turned + noise, 0, 1).astype(np.float32)
