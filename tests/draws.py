"""Numbers drawn for tests."""

import numpy as np


def draw(*shape, seed=0, dtype=np.float64):
    """Normal numbers, the same for the same shape and seed; complex ones for a complex dtype."""
    rng = np.random.default_rng((seed, *shape))
    x = rng.normal(size=shape)
    if np.issubdtype(dtype, np.complexfloating):
        x = x + 1j * rng.normal(size=shape)
    return x.astype(dtype)
