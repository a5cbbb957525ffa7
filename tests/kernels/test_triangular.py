"""Products with triangular factors against those with whole matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron.kernels import triangular
from tests.kernels.problems import random
from tests.reference import psgd as reference

# 300 and 259 are no multiples of four panels; 5 and 255 are too short for any.
SHAPES = ((300, 3), (2, 259), (3, 256, 2), (255, 5), (5, 0), (256,))
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [np.float64, np.complex128])


def problem(shape, dtype):
    rng = np.random.default_rng(0)
    uppers = [np.triu(random(rng, (d, d), dtype)) / np.sqrt(max(d, 1)) for d in shape]
    return uppers, random(rng, shape, dtype)


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    # Sums of some hundred products of numbers near 1, twice.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


@every_dtype
@every_shape
def test_a_factor_and_its_adjoint_along_each_axis(shape, dtype):
    with jax.enable_x64(True):
        uppers, X = problem(shape, dtype)
        for axis, upper in enumerate(uppers):
            for adjoint in (False, True):
                matrix = upper.conj().T if adjoint else upper
                expected = np.moveaxis(np.tensordot(matrix, X, (1, axis)), 0, axis)
                actual = triangular.apply_upper(
                    jnp.asarray(upper), jnp.asarray(X), axis, adjoint=adjoint
                )
                assert actual.dtype == dtype
                assert_close(actual, expected)


@every_dtype
@every_shape
def test_precondition_is_the_square_of_every_factor(shape, dtype):
    with jax.enable_x64(True):
        uppers, X = problem(shape, dtype)
        assert_close(triangular.precondition(uppers, X), reference.precondition(uppers, X))


def test_a_long_tensor_is_multiplied_with_the_square():
    with jax.enable_x64(True):
        uppers, X = problem((256, 1100), np.float64)
        factors = [uppers[0], np.abs(X[0])]
        assert_close(triangular.precondition(factors, X), reference.precondition(factors, X))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("adjoint", [False, True])
def test_most_of_the_lower_half_is_skipped(axis, adjoint):
    upper = np.triu(np.ones((256, 256), np.float32))
    panel = np.arange(256) // 64
    upper[panel[:, None] > panel[None]] = np.nan
    X = jnp.ones((256, 256), jnp.float32)
    assert jnp.all(jnp.isfinite(triangular.apply_upper(upper, X, axis, adjoint=adjoint)))


def test_a_stack_at_once():
    with jax.enable_x64(True):
        uppers, X = problem((3, 256, 2), np.float64)
        stack = [jnp.stack([q, 2 * q]) for q in uppers]
        actual = jax.vmap(triangular.precondition)(stack, jnp.stack([X, X]))
        expected = reference.precondition(uppers, X)
        assert_close(actual, np.stack([expected, 64 * expected]))
