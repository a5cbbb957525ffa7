"""Random blocks for the tests of the kernels."""

import jax.numpy as jnp
import numpy as np

from optax_kron.kernels import linalg
from tests.reference import psgd as reference

# The shape of a block, and which of its factors are diagonal.
MATRIX = ((4, 3), (False, False))
TENSOR = ((3, 4, 2), (False, False, False))
MIXED = ((3, 4, 2), (False, True, False))
REPEATED = ((3, 4, 3, 4, 3), (False, True, False, True, False))
VECTOR = ((5,), (True,))
# Random rows of the norm bounds.
ROWS = np.random.default_rng(1234).standard_normal((linalg.PROBE_ROWS, 1024)).astype(np.float32)


def random(rng, shape, dtype=np.float64):
    """Standard normal, so `E|x|² = 1` for complex types too."""
    values = rng.standard_normal(shape)
    if np.issubdtype(dtype, np.complexfloating):
        values = (values + 1j * rng.standard_normal(shape)) / np.sqrt(2)
    return np.asarray(values, dtype)


def problem(layout, geometry, dtype=np.float64, seed=0):
    """Well conditioned factors with the structure of the geometry, a gradient and a probe."""
    rng = np.random.default_rng(seed)
    shape, diagonal = layout
    factors = []
    for d, is_diagonal in zip(shape, diagonal, strict=True):
        if is_diagonal:
            factors.append(np.asarray(rng.uniform(0.5, 2, d), np.finfo(dtype).dtype))
            continue
        Q = np.eye(d) + 0.3 * random(rng, (d, d), dtype)
        if geometry == "EQ":
            Q = np.triu(Q)
        elif geometry == "QUAD":
            Q = (Q + Q.conj().T) / 2
        elif geometry in reference.OF_P:
            Q = Q @ Q.conj().T
        factors.append(np.asarray(Q, dtype))
    return tuple(map(jnp.asarray, (*factors, random(rng, shape, dtype), random(rng, shape, dtype))))


def zeros(factors):
    return jnp.zeros(len(factors), np.finfo(factors[0].dtype).dtype)


def padded(array, shape, fill=0.0):
    array = np.asarray(array)
    result = np.zeros(shape, array.dtype)
    if fill:
        result = (
            np.ones(shape, array.dtype) if array.ndim == 1 else np.eye(shape[0], dtype=array.dtype)
        )
    result[tuple(slice(0, d) for d in array.shape)] = array
    return jnp.asarray(result)


def pad_block(factors, G, V, shape):
    """The block in the corner of a larger one: factors continue as the identity."""
    factors = tuple(padded(q, (d,) * q.ndim, fill=1.0) for q, d in zip(factors, shape, strict=True))
    return factors, padded(G, shape), padded(V, shape)


def corner(factor, d):
    return factor[(slice(0, d),) * factor.ndim]


def assert_close(actual, expected, rtol):
    """Close relative to the largest entry of each array."""
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.max(np.abs(b)))
