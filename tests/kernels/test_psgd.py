"""One update of the factors against the NumPy reference, and what every update must keep."""

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
    REPEATED,
    ROWS,
    TENSOR,
    VECTOR,
    assert_close,
    problem,
    random,
    zeros,
)
from tests.reference import psgd as reference

every_geometry = pytest.mark.parametrize("geometry", psgd.GEOMETRIES)


def update(geometry, **settings):
    function = functools.partial(psgd.update_factors, geometry=geometry, **settings)
    # Eager calls compile next to nothing, except for the loop of the triangular solve.
    return jax.jit(function) if geometry == "EQ" else function


def expected_update(geometry, factors, G, V, newton, bounds, precond_lr):
    """New factors and bounds of the reference."""
    if geometry == "QEP":
        factors = reference.balance(factors)
    terms = reference.terms(geometry, factors, G, V, newton)
    bounds = [
        reference.running_bound(float(L), reference.curvature(*pair))
        for L, pair in zip(bounds, terms, strict=True)
    ]
    return reference.step(geometry, factors, terms, [precond_lr / L for L in bounds]), bounds


# An update is some tens of products deep: 1e-10 and 1e-4 leave a few digits for their rounding.
@pytest.mark.usefixtures("exact_norm")
@pytest.mark.parametrize("newton", [False, True], ids=["whitening", "newton"])
@pytest.mark.parametrize(
    ("layout", "dtype", "rtol"),
    [
        pytest.param(MATRIX, np.float64, 1e-10, id="matrix"),
        pytest.param(MATRIX, np.complex128, 1e-10, id="complex matrix"),
        pytest.param(MATRIX, np.float32, 1e-4, id="float32 matrix"),
        pytest.param(TENSOR, np.float64, 1e-10, id="tensor"),
        pytest.param(TENSOR, np.float32, 1e-4, id="float32 tensor"),
        pytest.param(MIXED, np.complex128, 1e-10, id="complex mixed"),
        pytest.param(REPEATED, np.float64, 1e-10, id="repeated"),
    ],
)
@every_geometry
def test_update_is_the_reference(geometry, layout, newton, dtype, rtol):
    *factors, G, V = problem(layout, geometry, dtype)
    bounds = jnp.asarray((0.0, 1e4, 0.0, 0.0, 1e5)[: len(factors)], np.finfo(dtype).dtype)
    new, new_bounds = update(geometry, newton=newton, precond_lr=0.3)(
        tuple(factors), bounds, G, V, ROWS
    )
    expected, expected_bounds = expected_update(geometry, factors, G, V, newton, bounds, 0.3)
    assert_close(new, expected, rtol)
    assert_close(new_bounds, expected_bounds, rtol)
    chex.assert_trees_all_equal_shapes_and_dtypes((new, new_bounds), (tuple(factors), bounds))


@pytest.mark.usefixtures("exact_norm")
@pytest.mark.parametrize("newton", [False, True])
@every_geometry
def test_update_of_a_vector_is_the_reference(geometry, newton):
    q, G, V = problem(VECTOR, geometry)
    new, bounds = update(geometry, newton=newton, precond_lr=0.3)((q,), zeros([q]), G, V, ROWS)
    expected, expected_bounds = expected_update(geometry, [q], G, V, newton, [0.0], 0.3)
    assert_close((*new, *bounds), (*expected, *expected_bounds), 1e-10)


@pytest.mark.parametrize("geometry", ["EQ", "QEP", "QEQ", "QUAD", "QUAD4P"])
def test_running_bound_and_its_step(geometry):
    """With the random bound as it is: ℓ within [norm / √2, norm], and the step divides by L."""
    *factors, G, V = problem(MATRIX, geometry)
    balanced = reference.balance(factors) if geometry == "QEP" else factors
    terms = reference.terms(geometry, balanced, G, V, newton=False)
    norms = np.array([reference.curvature(*pair) for pair in terms])
    step = update(geometry, precond_lr=0.3)
    for before in (0.0, 0.5, 0.99, 1.5, 100.0):
        bounds = jnp.asarray([before * norm for norm in norms])
        new, after = step(tuple(factors), bounds, G, V, ROWS)
        lowest = [reference.running_bound(before * x, x / np.sqrt(2)) for x in norms]
        highest = [reference.running_bound(before * x, x * (1 + 1e-14)) for x in norms]
        assert np.all(np.less_equal(lowest, after))
        assert np.all(np.less_equal(after, highest))
        sizes = [0.3 / float(L) for L in after]
        assert_close(new, reference.step(geometry, balanced, terms, sizes), 1e-10)


def test_bounds_keep_their_dtype():
    *factors, G, V = problem(MIXED, "EQ")
    bounds = jnp.zeros(len(factors), jnp.float32)
    new = update("EQ", precond_lr=jnp.float32(0.1))(tuple(factors), bounds, G, V, ROWS)
    chex.assert_trees_all_equal_dtypes(new, (tuple(factors), bounds))


@every_geometry
def test_structure_is_kept(geometry):
    """Large steps keep triangles, symmetry and signs exactly, and P itself positive definite."""
    *factors, _, _ = problem(MIXED, geometry, np.complex128)
    step = update(geometry, precond_lr=0.9)

    def body(carry, inputs):
        return step(*carry, *inputs, ROWS), None

    inputs = tuple(random(np.random.default_rng(1), (2, 30, *MIXED[0]), np.complex128))
    (new, bounds), _ = jax.lax.scan(body, (tuple(factors), zeros(factors)), inputs)
    chex.assert_tree_all_finite((new, bounds))
    assert np.all(new[1] > 0)
    for Q in (new[0], new[2]):
        if geometry == "EQ":
            np.testing.assert_array_equal(np.tril(Q, -1), 0)
            assert np.all(np.diag(Q).real > 0)
        if geometry in ("QUAD", "QUAD4P"):
            np.testing.assert_array_equal(Q, np.conj(Q).T)
        if geometry in reference.OF_P:
            assert np.max(np.abs(Q - np.conj(Q).T)) <= 1e-3 * np.max(np.abs(Q))
            assert np.min(np.linalg.eigvalsh((Q + np.conj(Q).T) / 2)) > 0


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@every_geometry
def test_scale_of_the_gradient_is_immaterial(geometry, dtype):
    """G → cG with P → P / √c on both axes is the same update, scaled; also for extreme c."""
    *factors, G, V = problem(MATRIX, geometry, dtype)
    step = update(geometry, precond_lr=0.3)
    expected, _ = step(tuple(factors), zeros(factors), G, V, ROWS)
    power = 0.5 / psgd.degree(geometry)
    for exponent in (4, 100, -100):
        c = 2.0**exponent
        scaled = tuple(factor * dtype(c**-power) for factor in factors)
        new, _ = step(scaled, zeros(factors), G * dtype(c), V, ROWS)
        # Powers of two scale without rounding; only balancing, through logarithms, adds some.
        rtol = 2000 * np.finfo(dtype).eps
        assert_close([dtype(c**power) * Q for Q in new], expected, rtol)


@every_geometry
def test_degenerate_input_stays_finite(geometry):
    *factors, G, V = problem(MIXED, geometry, np.float32)
    step = update(geometry, precond_lr=0.5)
    for gradient, probe in ((0 * G, V), (0 * G, 0 * V), (G, 0 * V)):
        new = step(tuple(factors), zeros(factors), gradient, probe, ROWS)
        chex.assert_tree_all_finite(new)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_rule_without_a_probe_never_leaves_the_identity(dtype):
    """Made of the gradient alone, both terms are equal at the identity, to the last bit."""
    rng = np.random.default_rng(0)
    identity = np.eye(4, dtype=dtype), np.eye(3, dtype=dtype)
    left, right = identity
    for _ in range(10):
        left, right = reference.seed_rule(left, right, random(rng, (4, 3), dtype), 0.1, 1e-8)
    np.testing.assert_array_equal(left, identity[0])
    np.testing.assert_array_equal(right, identity[1])

    G, V = (random(rng, (4, 3), dtype) for _ in range(2))
    for geometry in psgd.GEOMETRIES:
        factors = tuple(map(jnp.asarray, identity))
        new, _ = update(geometry, precond_lr=0.1)(factors, zeros(factors), G, V, ROWS)
        for Q, start in zip(new, identity, strict=True):
            assert np.linalg.norm(Q - start) > 0.01
