"""The Kronecker product nearest to a sum of two, against a singular value decomposition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron.kernels.tied import nearest_product
from tests.draws import draw

# Of a and of S: which are diagonal. A tied embedding has the first, a wide one the second.
KINDS = {"one": (True, False), "both": (True, True), "none": (False, False)}
kinds = pytest.mark.parametrize("diagonal", KINDS.values(), ids=KINDS)


def factor(size, diagonal, seed):
    """Positive semi-definite factors of three blocks, of half the rank."""
    x = draw(3, size, size // 2, seed=seed)
    gram = x @ x.swapaxes(1, 2)
    return np.diagonal(gram, axis1=1, axis2=2) if diagonal else gram


def terms(diagonal, seeds=(0, 1)):
    return [(factor(7, diagonal[0], s), factor(4, diagonal[1], s + 10)) for s in seeds]


def rows(x):
    return np.asarray(x, np.float64).reshape(len(x), -1)


def rearranged(term):
    """A product as a matrix with a row for each entry of the first factor."""
    return np.einsum("bi,bj->bij", *map(rows, term))


def traces(x):
    return np.sum(x if x.ndim == 2 else np.diagonal(x, axis1=1, axis2=2), axis=1)


@kinds
def test_no_product_is_nearer(diagonal):
    first, second = terms(diagonal)
    found = jax.jit(nearest_product)(first, second)
    U, s, W = np.linalg.svd(rearranged(first) + rearranged(second))
    best = s[:, :1, None] * U[:, :, :1] * W[:, :1]
    np.testing.assert_allclose(rearranged(found), best, rtol=1e-11, atol=1e-12 * np.max(best))
    np.testing.assert_allclose(traces(found[0]), 1, rtol=1e-12)
    for x, size in zip(found, (7, 4), strict=True):
        values = x if x.ndim == 2 else np.linalg.eigvalsh(x)
        assert np.min(values) > -1e-14 * np.max(values), size


@kinds
@pytest.mark.parametrize(
    "shares", [(1.0, 0.0), (0.0, 1.0), (1.0, 1e-12), (1e-12, 1.0), (1e-300, 1e-300)]
)
def test_one_of_two_counts_alone_where_the_other_is_nothing(diagonal, shares):
    pair = [(a, x * s) for (a, x), s in zip(terms(diagonal), shares, strict=True)]
    found = rearranged(nearest_product(*pair))
    total = sum(map(rearranged, pair))
    if min(shares) < max(shares):
        np.testing.assert_allclose(found, total, atol=1e-11 * np.max(total))
    assert np.all(np.isfinite(found))
    assert np.max(found) > 0


def test_terms_of_one_direction_add_up():
    (a, S), _ = terms((True, False))
    found = nearest_product((a, S), (3 * a, 0.5 * S))
    np.testing.assert_allclose(rearranged(found), 2.5 * rearranged((a, S)), rtol=1e-12)


def test_equal_terms_at_right_angles_leave_one_of_them():
    first = np.eye(2)[None, 0], np.diag([1.0, 0.0])[None]
    second = np.eye(2)[None, 1], np.diag([0.0, 1.0])[None]
    found = rearranged(nearest_product(first, second))
    np.testing.assert_allclose(np.linalg.norm(found), 1, rtol=1e-12)


def test_nothing_stays_nothing():
    zero = np.zeros((3, 7)), np.zeros((3, 4, 4))
    for x in nearest_product(zero, zero):
        np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize("scales", [(1e-25, 1e12), (1e18, 1e18), (1e-30, 1e-30)])
def test_float32_neither_over_nor_underflows_on_the_way(scales):
    exact = terms((True, False))
    narrow = [
        tuple(jnp.asarray(x * s, jnp.float32) for x, s in zip(t, scales, strict=True))
        for t in exact
    ]
    u, M = nearest_product(*narrow)
    assert u.dtype == M.dtype == jnp.float32
    wanted_u, wanted_M = nearest_product(*exact)
    scale = scales[0] * scales[1]
    assert np.all(np.isfinite(u))
    assert np.all(np.isfinite(M))
    if 1e-37 < scale < 1e37:  # the product itself is one of float32
        np.testing.assert_allclose(u, wanted_u, rtol=1e-5)
        np.testing.assert_allclose(rows(M) / scale, rows(wanted_M), atol=1e-5 * np.max(wanted_M))


@pytest.mark.parametrize("where", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_shows_in_its_block_alone(where, value):
    pair = [list(map(np.array, term)) for term in terms((True, False))]
    pair[where[0]][where[1]][1, -1] = value
    u, M = nearest_product(*pair)
    finite = np.isfinite(rows(u)).all(1) & np.isfinite(rows(M)).all(1)
    np.testing.assert_array_equal(finite, [True, False, True])
