"""Contractions against literal Kronecker products."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optax_kron.kernels import contract
from tests.kernels.problems import random
from tests.reference import psgd as reference

DTYPES = (np.float32, np.float64, np.complex64, np.complex128)
# A result is a sum of at most a few hundred products of numbers near 1: its error is some tens of
# roundings of the largest partial sum.
TOLERANCE = {4: 2e-5, 8: 1e-13}

shapes = st.lists(st.sampled_from([0, 1, 2, 3, 5]), min_size=1, max_size=5)
layouts = shapes.flatmap(
    lambda shape: st.tuples(
        st.just(tuple(shape)),
        st.tuples(*[st.booleans() for _ in shape]),
        st.sampled_from(DTYPES),
        st.integers(0, 2**16),
    )
)


def problem(shape, diagonal, dtype, seed):
    """Random factors (a real vector where `diagonal` says so) and a random tensor."""
    rng = np.random.default_rng(seed)
    real = np.finfo(dtype).dtype
    factors = [
        random(rng, (d,), real) if is_diagonal else random(rng, (d, d), dtype)
        for d, is_diagonal in zip(shape, diagonal, strict=True)
    ]
    return factors, random(rng, shape, dtype)


def assert_close(actual, expected, dtype):
    """Close relative to the largest entry; same shape; no change of dtype."""
    chex.assert_shape(actual, expected.shape)
    assert actual.dtype == dtype
    scale = np.max(np.abs(expected), initial=0.0)
    tolerance = TOLERANCE[np.finfo(dtype).dtype.itemsize]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def kron_times(factors, tensor):
    matrix = reference.kron(factors)
    return (matrix @ reference.wide(tensor).reshape(-1)).reshape(tensor.shape)


def adjoint(factors):
    return [reference.dense(factor).conj().T for factor in factors]


def apply_adjoint(factors, X):
    for axis, factor in enumerate(factors):
        X = contract.apply_factor(factor, X, axis, adjoint=True)
    return X


KERNELS = {
    "apply_factors": contract.apply_factors,
    "apply_adjoint": apply_adjoint,
    "precondition": contract.precondition,
}
EXPECTED = {
    "apply_factors": lambda factors, X: kron_times(factors, X),
    "apply_adjoint": lambda factors, X: kron_times(adjoint(factors), X),
    "precondition": lambda factors, X: kron_times(adjoint(factors), kron_times(factors, X)),
}


@settings(max_examples=15, deadline=None)
@given(layouts)
@pytest.mark.parametrize("name", EXPECTED)
def test_factors_act_as_their_kronecker_product(name, layout):
    shape, diagonal, dtype, seed = layout
    factors, X = problem(shape, diagonal, dtype, seed)
    actual = KERNELS[name](tuple(map(jnp.asarray, factors)), jnp.asarray(X))
    assert_close(actual, EXPECTED[name](factors, X), dtype)


@settings(max_examples=15, deadline=None)
@given(layouts, st.booleans(), st.data())
def test_gram(layout, diagonal, data):
    shape, _, dtype, seed = layout
    axis = data.draw(st.integers(0, len(shape) - 1))
    _, X = problem(shape, shape, dtype, seed)
    actual = contract.gram(jnp.asarray(X), axis, diagonal=diagonal)
    expected = np.tensordot(
        reference.wide(X),
        reference.wide(X).conj(),
        (others := [i for i in range(len(shape)) if i != axis], others),
    )
    if diagonal:
        expected = np.diag(expected).real
        assert not np.iscomplexobj(actual) or np.all(np.imag(actual) == 0)
        actual = actual.astype(dtype)
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXPECTED)
def test_vmap_and_jit(name, dtype):
    problems = [problem((3, 4, 2), (False, True, False), dtype, seed) for seed in range(3)]
    factors, X = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
    actual = jax.jit(jax.vmap(KERNELS[name]))(tuple(factors), X)
    expected = np.stack([EXPECTED[name](*one) for one in problems])
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize("diagonal", [False, True])
def test_gram_under_vmap_and_jit(diagonal):
    X = random(np.random.default_rng(0), (3, 2, 4, 3), np.complex128)
    gram = functools.partial(contract.gram, axis=1, diagonal=diagonal)
    actual = jax.jit(jax.vmap(gram))(jnp.asarray(X))
    expected = np.stack([reference.gram(one, 1, diagonal) for one in X])
    assert_close(actual.astype(np.complex128), expected, np.complex128)


def test_reference_agrees_with_kron():
    """The reference contracts axis by axis; the definition is one Kronecker product."""
    factors, X = problem((2, 3, 4), (False, True, False), np.complex128, 1)
    for name, function in (
        ("apply_factors", reference.apply),
        ("apply_adjoint", reference.apply_adjoint),
        ("precondition", reference.precondition),
    ):
        assert_close(function(factors, X), EXPECTED[name](factors, X), np.complex128)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 3, 4), (2, 1, 3, 2)])
def test_folding_undoes_unfolding(shape):
    X = jnp.arange(np.prod(shape, dtype=int)).reshape(shape)
    for axis in range(len(shape)):
        unfolded = contract.unfold(X, axis)
        np.testing.assert_array_equal(contract.fold(unfolded, axis, shape), X)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
@pytest.mark.parametrize("shape", [(3,), (50, 100), (2, 3, 40_000)])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_largest_magnitude_of_what_is_not_finite(x64, dtype, shape, bad):
    # In the place of one element, of a row, of all: XLA's own maximum loses NaN of many numbers.
    clean = np.random.default_rng(0).normal(size=shape)
    for place in (np.s_[..., -1], np.s_[0], np.s_[...]):
        spoilt = clean.copy()
        spoilt[place] = bad
        x = jnp.asarray(spoilt, contract.real_dtype(dtype))
        if dtype == "complex64":
            x = jax.lax.complex(jnp.asarray(clean, x.dtype), x)
        largest = float(jax.jit(contract.largest_magnitude)(x))
        assert np.isnan(largest)
        assert not jax.jit(contract.all_finite)(x)
        axes = tuple(range(1, x.ndim))
        finite = np.isfinite(spoilt).all(axis=axes)
        np.testing.assert_array_equal(contract.all_finite(x, axes), finite)
        np.testing.assert_array_equal(jnp.isfinite(contract.largest_magnitude(x, axes)), finite)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
@pytest.mark.parametrize("shape", [(), (7,), (0, 4), (50, 100)])
def test_largest_magnitude_is_the_largest_magnitude(x64, dtype, shape):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=shape) + 1j * rng.normal(size=shape))
    x = x.astype(dtype) if dtype == "complex64" else x.real.astype(dtype)
    expected = np.maximum(np.abs(x.real), np.abs(x.imag)).max(initial=0)
    result = contract.largest_magnitude(x)
    assert result.dtype == contract.real_dtype(x.dtype)
    np.testing.assert_array_equal(result, expected)
    assert contract.all_finite(x)
