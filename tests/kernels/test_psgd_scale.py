"""Balance, initial scale, damping noise, and blocks that are padded."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron.kernels import psgd
from tests.kernels.problems import (
    MATRIX,
    MIXED,
    ROWS,
    assert_close,
    corner,
    pad_block,
    padded,
    problem,
    random,
    zeros,
)
from tests.reference import psgd as reference

every_geometry = pytest.mark.parametrize("geometry", psgd.GEOMETRIES)


@pytest.mark.parametrize("newton", [False, True])
@every_geometry
def test_padding_does_not_leak(geometry, newton):
    *factors, G, V = problem(MIXED, geometry)
    big_factors, big_G, big_V = pad_block(factors, G, V, (5, 6, 2))
    step = functools.partial(psgd.update_factors, geometry=geometry, newton=newton, precond_lr=0.3)
    expected, expected_bounds = step(tuple(factors), zeros(factors), G, V, ROWS)
    sizes = tuple(map(jnp.int32, G.shape))
    new, bounds = step(big_factors, zeros(factors), big_G, big_V, ROWS, sizes=sizes)
    # The same sums with zeros added: only their order differs.
    assert_close([corner(q, d) for q, d in zip(new, G.shape, strict=True)], expected, 1e-13)
    assert_close(bounds, expected_bounds, 1e-13)
    for q, old, d in zip(new, big_factors, G.shape, strict=True):
        outside = np.asarray(padded(np.zeros((d,) * q.ndim), q.shape, fill=1.0)) != 0
        if q.ndim == 2:
            outside = (np.arange(len(q)) >= d)[:, None] | (np.arange(len(q)) >= d)
        np.testing.assert_array_equal(np.asarray(q)[outside], np.asarray(old)[outside])


@every_geometry
def test_vmap_over_blocks_of_different_extent(geometry):
    small, large = problem(MATRIX, geometry), problem(((5, 6), MATRIX[1]), geometry, seed=1)
    blocks = [pad_block(block[:-2], *block[-2:], (5, 6)) for block in (small, large)]
    sizes = [tuple(map(jnp.int32, block[-1].shape)) for block in (small, large)]
    L = zeros(small[:-2])

    def step(block, sizes):
        factors, G, V = block
        return psgd.update_factors(
            factors, L, G, V, ROWS, geometry=geometry, precond_lr=0.3, sizes=sizes
        )

    def stack(*trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    single = jax.jit(step)
    each = [single(*one) for one in zip(blocks, sizes, strict=True)]
    stacked = jax.jit(jax.vmap(step))(stack(*blocks), stack(*sizes))
    chex.assert_trees_all_close(stacked, stack(*each), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float64, np.complex64])
def test_balance(dtype):
    *factors, X, _ = problem(MIXED, "QEQ", dtype)
    factors = (factors[0] * 100, factors[1] * 3, factors[2] / 1e4)
    balanced = psgd.balance(factors)
    rtol = 100 * np.finfo(dtype).eps
    assert_close(balanced, reference.balance(factors), rtol)
    assert_close([reference.precondition(balanced, X)], [reference.precondition(factors, X)], rtol)
    largest = [np.max(np.abs(q)) for q in balanced]
    np.testing.assert_allclose(largest, largest[0], rtol=rtol)
    chex.assert_trees_all_equal_shapes_and_dtypes(balanced, factors)


def test_balance_spans_scales():
    """The product of the largest entries overflows float32; their geometric mean does not."""
    factors = (jnp.full(2, 1e20), jnp.full(3, 1e25), jnp.eye(2) * 1e-5)
    balanced = psgd.balance(tuple(q.astype(jnp.float32) for q in factors))
    assert_close(balanced, reference.balance(factors), 1e-4)


def test_balance_ignores_padding():
    *factors, G, V = problem(MIXED, "QEQ")
    factors = [1e-3 * q for q in factors]
    big_factors, *_ = pad_block(factors, G, V, (5, 6, 2))
    balanced = psgd.balance(big_factors, tuple(map(jnp.int32, G.shape)))
    expected = reference.balance(factors)
    assert_close([corner(q, d) for q, d in zip(balanced, G.shape, strict=True)], expected, 1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.complex64, np.float64])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-9, 1.0, 1e30])
def test_initial_scale(scale, dtype):
    rng = np.random.default_rng(0)
    G, V = (random(rng, (4, 5), dtype) for _ in range(2))
    G = np.asarray(scale * G, dtype)
    for probe in (None, V):
        for damping in (1e-9, 0.0) if scale else (1e-9,):
            actual = psgd.initial_scale(G, damping, None if probe is None else jnp.asarray(probe))
            expected = reference.initial_scale(G, damping, probe)
            assert actual.dtype == np.finfo(dtype).dtype
            np.testing.assert_allclose(actual, expected, rtol=30 * np.finfo(dtype).eps)
    chex.assert_tree_all_finite(psgd.initial_scale(0 * G, 0.0))


def test_initial_scale_ignores_padding():
    *factors, G, V = problem(MIXED, "EQ")
    _, big_G, big_V = pad_block(factors, G, V, (5, 6, 2))
    actual = psgd.initial_scale(big_G, 1e-9, big_V, tuple(map(jnp.int32, G.shape)))
    np.testing.assert_allclose(actual, reference.initial_scale(G, 1e-9, V), rtol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_noised(dtype):
    rng = np.random.default_rng(0)
    G, V = (random(rng, (3, 4), dtype) for _ in range(2))
    actual = psgd.noised(jnp.asarray(G), jnp.asarray(V), 0.1)
    assert actual.dtype == dtype
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(actual, reference.noised(G, V, 0.1, eps), rtol=4 * eps)
    # Without damping what is left is the noise at the level of rounding.
    change = psgd.noised(jnp.asarray(G), jnp.asarray(V), 0.0) - G
    assert 0 < np.max(np.abs(change)) <= 5 * eps * np.max(np.abs(G))
