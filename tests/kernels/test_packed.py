"""The packed form of Hermitian matrices: exact, half as large, and made of no gathers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron.kernels import contract, packed
from tests.kernels.problems import random

every_size = pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 65])
every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.complex64])
# As one program each, for the sake of time.
pack, unpack = jax.jit(packed.pack), jax.jit(packed.unpack)
gram = jax.jit(packed.gram, static_argnums=1)


@pytest.fixture(autouse=True)
def _x64(x64):
    """Tests may use float64."""


def hermitian(size, dtype, batch=()):
    A = random(np.random.default_rng(size), (*batch, size, size), dtype)
    return jnp.asarray(A + np.conj(np.swapaxes(A, -1, -2)))


@every_dtype
@every_size
def test_unpacking_gives_the_matrices_back_to_the_bit(size, dtype):
    S = hermitian(size, dtype, (2, 3))
    made = pack(S)
    assert made.dtype == dtype
    assert made.size == 2 * 3 * size * (size + 1) // 2
    assert packed.size_of(made) == size
    np.testing.assert_array_equal(unpack(made), S)


def test_zeros_keep_their_signs_and_what_is_not_finite_its_place():
    S = hermitian(5, np.float32).at[3, 1].set(-0.0).at[1, 3].set(-0.0).at[2, 2].set(jnp.nan)
    S = S.at[4, 0].set(jnp.inf).at[0, 4].set(jnp.inf).at[4, 4].set(-0.0)
    found = packed.unpack(packed.pack(S))
    assert np.asarray(found).tobytes() == np.asarray(S).tobytes()


def test_the_form_is_the_one_of_the_docstring():
    a, b, c, d, e, g, h, i, j, k = range(1, 11)
    S = jnp.asarray([[a, b, d, g], [b, c, e, h], [d, e, i, j], [g, h, j, k]])
    np.testing.assert_array_equal(packed.pack(S), [[i, j], [a, k], [b, c], [d, e], [g, h]])


@every_dtype
@pytest.mark.parametrize("shape", [(3, 4, 2), (65,), (1, 0)], ids=str)
def test_gram_is_the_packed_form_of_the_whole_one(shape, dtype):
    X = jnp.asarray(random(np.random.default_rng(0), shape, dtype))
    for axis in range(len(shape)):
        expected = contract.gram(X, axis)
        found = unpack(gram(X, axis))
        assert found.dtype == dtype
        # Sums of up to 64 products of numbers near 1.
        np.testing.assert_allclose(found, expected, rtol=0, atol=300 * np.finfo(dtype).eps)


@pytest.mark.parametrize("size", [4, 5])
def test_derivatives_are_those_of_the_halves_that_are_read(size):
    S = hermitian(size, np.float64)

    def symmetric(A):
        return (A + A.T) / 2

    weights = jnp.asarray(random(np.random.default_rng(2), (size, size)))
    plain = jax.grad(lambda A: jnp.sum(weights * symmetric(A) ** 2))(S)
    through = jax.grad(lambda A: jnp.sum(weights * packed.unpack(packed.pack(symmetric(A))) ** 2))(
        S
    )
    np.testing.assert_allclose(through, plain, rtol=1e-12)


def test_there_are_no_gathers_and_a_stack_is_packed_as_its_blocks_are():
    S = hermitian(65, np.float32, (4,))
    program = str(jax.make_jaxpr(lambda S: packed.unpack(packed.pack(S)))(S))
    assert "gather" not in program
    assert "scatter" not in program
    np.testing.assert_array_equal(packed.pack(S), jax.vmap(packed.pack)(S))


def test_small_matrices_are_kept_as_they_are():
    for size in (packed.LEAST_SIZE - 1, packed.LEAST_SIZE):
        S = hermitian(size, np.float32)
        stored = packed.keep(S)
        assert (stored.shape == S.shape) == (size < packed.LEAST_SIZE)
        np.testing.assert_array_equal(packed.whole(stored), S)
