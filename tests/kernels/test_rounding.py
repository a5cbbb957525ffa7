"""Stochastic rounding: exact where it can be, right in the mean, and open to derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron.kernels import rounding

narrow = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
stochastic = jax.jit(rounding.stochastic, static_argnums=1)
ALL = jnp.arange(2**16, dtype=jnp.uint16)


@narrow
def test_all_numbers_of_the_dtype_stay_as_they_are(dtype):
    """Zeros with their signs, subnormal ones, infinities and NaN are among them."""
    numbers = jax.lax.bitcast_convert_type(ALL, dtype)
    for random in (ALL, ~ALL, jnp.full_like(ALL, 2**16 - 1)):
        found = stochastic(numbers.astype(jnp.float32), dtype, random)
        assert found.dtype == dtype
        kept = np.asarray(found).view(np.uint16) == np.asarray(ALL)
        assert np.all(kept | np.isnan(np.asarray(numbers, np.float32)))
        np.testing.assert_array_equal(jnp.isnan(found), jnp.isnan(numbers))


@narrow
@pytest.mark.parametrize(
    "x", [1 + 2**-13, -3.3, 1.9999, 65500.0, 7e-5, 3.3e-6, -7.7e-8, 1e-8], ids=str
)
def test_the_mean_over_all_random_bits_is_the_number(x, dtype):
    x = np.float32(x)
    found = np.asarray(stochastic(jnp.full(ALL.shape, x), dtype, ALL), np.float64)
    low, high = np.unique(found)[[0, -1]]
    nearest = np.float64(np.asarray(jnp.asarray(x, dtype)))
    assert nearest in (low, high)
    assert low <= x <= high
    assert set(found) == {low, high}
    # Of subnormal numbers the probabilities are rounded to 2⁻¹⁶; all others are exact.
    least = float(jnp.finfo(dtype).tiny)
    assert abs(found.mean() - x) <= (0 if abs(x) >= least else (high - low) * 2**-16)


def test_what_does_not_fit_becomes_infinite_and_wide_dtypes_round_to_nearest():
    assert np.isinf(stochastic(jnp.float32(1e6), jnp.float16, jnp.uint16(0)))
    x = jnp.asarray([1 + 2.0**-30, -1e300, 0.1])
    for dtype in (jnp.float32, jnp.float64):
        np.testing.assert_array_equal(stochastic(x, dtype, ALL[-3:]), x.astype(dtype))
    z = jnp.asarray([1 + 2.0**-13j])
    np.testing.assert_array_equal(stochastic(z, jnp.complex64, ALL[-1:]), z.astype(jnp.complex64))


def test_the_derivative_is_that_of_the_identity():
    x, t = jnp.float32(1.2345), jnp.float32(2.0)
    _, found = jax.jvp(lambda x: stochastic(x, jnp.bfloat16, ALL[7]), (x,), (t,))
    assert (found, found.dtype) == (2, jnp.bfloat16)
    assert jax.grad(lambda x: stochastic(x, jnp.bfloat16, ALL[7]).astype(jnp.float32))(x) == 1
