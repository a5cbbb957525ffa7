"""Sums and differences of Gram matrices, without forming them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron.kernels import grams
from tests.kernels.problems import ROWS, random

every_kind = pytest.mark.parametrize("kind", ["root", "weights"])
# Narrow roots and wide ones; the large one spans several panels.
every_case = pytest.mark.parametrize(
    ("d", "width", "dtype"),
    [
        (1, 1, np.float32),
        (5, 2, np.float32),
        (5, 2, np.complex128),
        (5, 9, np.float32),
        (5, 9, np.complex128),
        (300, 40, np.complex128),
    ],
)


def problem(d, width, kind, dtype):
    """A pair, and its T1 and T2 in double precision."""
    rng = np.random.default_rng(d + width)
    F, S = random(rng, (d, width), dtype), 2 * random(rng, (d, width + 1), dtype)
    weights = np.asarray(rng.uniform(0.5, 2, d), np.finfo(dtype).dtype)
    T1 = np.einsum("ik,jk->ij", F.astype(complex), F.conj())
    if kind == "weights":
        return grams.GramPair(jnp.asarray(F), jnp.asarray(weights)), T1, np.diag(weights)
    T2 = np.einsum("ik,jk->ij", S.astype(complex), S.conj())
    return grams.GramPair(jnp.asarray(F), jnp.asarray(S)), T1, T2


def assert_close(actual, expected, dtype):
    assert actual.dtype == dtype
    # Sums of some hundred products, relative to the largest.
    atol = 50 * np.finfo(dtype).eps * np.max(np.abs(expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


@every_case
@every_kind
def test_combine(d, width, kind, dtype):
    pair, T1, T2 = problem(d, width, kind, dtype)
    assert_close(pair.combine(1, precision=None), T1 + T2, dtype)
    assert_close(pair.combine(-1, precision=None), T1 - T2, dtype)
    start, stop = d // 3, d // 3 + (d + 1) // 2
    part = pair.combine(-1, start, stop, precision=None)
    assert_close(part, (T1 - T2)[start:stop, start:], dtype)


@every_case
@every_kind
def test_norm_bound(d, width, kind, dtype):
    pair, T1, T2 = problem(d, width, kind, dtype)
    norm = np.linalg.norm(T1 + T2, 2)
    bound = jax.jit(lambda pair: pair.norm_bound(ROWS, precision=None))(pair)
    # The bound is a norm of rounded sums of some hundred products.
    assert bound <= norm * (1 + 100 * np.finfo(dtype).eps)
    assert bound >= norm / np.sqrt(2)


@pytest.mark.parametrize("dtype", [np.float32, np.complex128])
@pytest.mark.parametrize("scale", [0.0, 1e-15, 1e15])
@every_kind
def test_norm_bound_scales(kind, scale, dtype):
    pair, T1, T2 = problem(20, 3, kind, dtype)
    second = np.finfo(dtype).dtype.type(scale**2) if kind == "weights" else dtype(scale)
    pair = grams.GramPair(pair.first * dtype(scale), pair.second * second)
    bound = jax.jit(lambda pair: pair.norm_bound(ROWS, precision=None))(pair)
    norm = scale**2 * np.linalg.norm(T1 + T2, 2)
    assert norm / np.sqrt(2) <= bound <= norm * (1 + 100 * np.finfo(dtype).eps)


@pytest.mark.parametrize("height", [1.6, 1.7, 2.0, 3.0])
def test_norm_bound_of_a_weak_spike(height):
    """One direction a little above many equal ones: the hardest case for a power iteration."""
    for d in (128, 1024):
        u = random(np.random.default_rng(0), (d, 1))
        u *= np.sqrt(height - 1) / np.linalg.norm(u)
        pair = grams.GramPair(jnp.asarray(u, jnp.float32), jnp.ones(d, jnp.float32))
        bound = pair.norm_bound(ROWS, precision=None)
        assert height / np.sqrt(2) <= bound <= height * (1 + 1e-5)


@pytest.mark.parametrize("d", [1024, 8192])
def test_norm_bound_of_a_large_matrix_of_equal_magnitudes(d):
    """The norm is d times the largest entry, the most that it can be: its powers are large."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (d, 1))
    weights = jnp.full(d, 1e-3, jnp.float32)
    pair = grams.GramPair(jnp.asarray(signs, jnp.float32), weights)
    rows = random(np.random.default_rng(1), (len(ROWS), d), np.float32)
    bound = pair.norm_bound(rows, precision=None)
    assert d / np.sqrt(2) <= bound <= d * (1 + 1e-5)


@every_case
@every_kind
def test_subtract_upper(d, width, kind, dtype):
    pair, T1, T2 = problem(d, width, kind, dtype)
    Q = np.triu(random(np.random.default_rng(0), (d, d), dtype))
    step = np.finfo(dtype).dtype.type(0.1 / np.linalg.norm(T1 + T2, 2))
    actual = pair.subtract_upper(jnp.asarray(Q), step, precision=None)
    assert_close(actual, Q - step * np.triu(T1 - T2) @ Q, dtype)
    np.testing.assert_array_equal(np.tril(actual, -1), 0)
