"""The norm bound, the Procrustes step, triangular solves and the map over blocks."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron.kernels import linalg
from tests.kernels.problems import ROWS, random
from tests.reference import psgd as reference

DTYPES = (np.float32, np.float64, np.complex64, np.complex128)
norm_bound = jax.jit(linalg.norm_bound)
procrustes_step = jax.jit(linalg.procrustes_step)
rotate_to_hermitian = jax.jit(linalg.rotate_to_hermitian)
WHOLE = np.full(3, True)
solve_upper_adjoint = jax.jit(linalg.solve_upper_adjoint)


def rows(seed, d):
    return random(np.random.default_rng(seed), (linalg.PROBE_ROWS, d), np.float32)


def unitary(rng, d, dtype):
    return np.linalg.qr(random(rng, (d, d), dtype))[0]


def weak_spike(d, height):
    return np.append(np.ones(d - 1), height)


# Spectra by name. A spike a little above a flat rest is the hardest for a power iteration.
SPECTRA = {
    "flat": lambda rng, d: np.ones(d),
    "signs": lambda rng, d: rng.choice([-1.0, 1.0], d),
    "uniform": lambda rng, d: rng.uniform(-1, 1, d),
    "spike": lambda rng, d: weak_spike(d, 1000.0),
    "spike of 3": lambda rng, d: weak_spike(d, 3.0),
    "spike of 2": lambda rng, d: weak_spike(d, 2.0),
    "spike of 1.6": lambda rng, d: weak_spike(d, 1.6),
    "geometric": lambda rng, d: 0.9 ** np.arange(d),
    "steep": lambda rng, d: 0.1 ** np.arange(d),
    "rank one": lambda rng, d: np.append(np.zeros(d - 1), 1.0),
    "two opposite": lambda rng, d: np.append(np.zeros(max(d - 2, 0)), [1.0, -1.0])[-d:],
}


def hermitian(rng, spectrum, d, dtype, basis="random"):
    U = np.eye(d) if basis == "axes" else unitary(rng, d, dtype)
    return (U * SPECTRA[spectrum](rng, d)) @ U.conj().T


def assert_bounds_norm(matrix, dtype, norm=None, repeats=4):
    """Within [norm / √2, norm], for several draws of the rows."""
    matrix = np.asarray(matrix, dtype)
    if norm is None:
        norm = np.linalg.norm(reference.wide(matrix), 2)
    # The bound is the norm of a vector of d rounded sums of d products.
    rounding = 1 + 4 * len(matrix) ** 0.5 * np.finfo(dtype).eps
    for seed in range(repeats):
        bound = norm_bound(jnp.asarray(matrix), rows(seed, len(matrix)))
        chex.assert_shape(bound, ())
        assert bound.dtype == np.finfo(dtype).dtype
        assert bound <= norm * rounding
        assert bound >= norm / np.sqrt(2)


@pytest.mark.parametrize("basis", ["random", "axes"])
@pytest.mark.parametrize("dtype", [np.float32, np.complex128])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_norm_bound_of_hermitian(spectrum, dtype, basis):
    rng = np.random.default_rng(1)
    for d in (1, 2, 70):
        assert_bounds_norm(hermitian(rng, spectrum, d, dtype, basis), dtype)


@pytest.mark.parametrize("height", [1.5, 1.6, 1.7, 2.0, 3.0])
def test_norm_bound_of_a_weak_spike_in_a_large_matrix(height):
    rng = np.random.default_rng(2)
    for d in (256, 1024):
        u = rng.standard_normal(d)
        u /= np.linalg.norm(u)
        assert_bounds_norm(np.eye(d) + (height - 1) * np.outer(u, u), np.float32, height, 8)


def test_norm_bound_of_a_large_matrix_of_equal_magnitudes():
    """The norm is d times the largest entry, the most that it can be: its powers are large."""
    d = 4096
    u = np.random.default_rng(0).choice(np.asarray([-1, 1], np.float32), d)
    bound = norm_bound(jnp.asarray(np.outer(u, u)), rows(0, d))
    assert d / np.sqrt(2) <= bound <= d * (1 + 1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.complex128])
def test_norm_bound_of_skew_hermitian(dtype):
    rng = np.random.default_rng(3)
    for d in (2, 70):
        X = random(rng, (d, d), dtype)
        assert_bounds_norm(X - X.conj().T, dtype)
        u, v = X[0], X[1]
        assert_bounds_norm(np.outer(u, v.conj()) - np.outer(v, u.conj()), dtype)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_norm_bound_scales(scale):
    rng = np.random.default_rng(4)
    for spectrum in ("uniform", "rank one", "spike"):
        assert_bounds_norm(scale * hermitian(rng, spectrum, 20, np.float32), np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 5])
def test_norm_bound_of_zero(d, dtype):
    assert norm_bound(jnp.zeros((d, d), dtype), ROWS) == 0


def test_norm_bound_vmaps():
    rng = np.random.default_rng(5)
    stack = jnp.asarray([hermitian(rng, "uniform", 6, np.float64) for _ in range(3)])
    expected = jnp.stack([norm_bound(one, ROWS) for one in stack])
    actual = jax.jit(jax.vmap(norm_bound, in_axes=(0, None)))(stack, ROWS)
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_norm_bound_ignores_padding():
    rng = np.random.default_rng(12)
    for dtype in (np.float64, np.complex128):
        matrix = hermitian(rng, "uniform", 6, dtype)
        actual = norm_bound(jnp.pad(matrix, (0, 3)), ROWS)
        np.testing.assert_allclose(actual, norm_bound(matrix, ROWS), rtol=1e-13)


@pytest.mark.usefixtures("exact_norm")
@pytest.mark.parametrize("distance", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_procrustes_step_is_the_formula(dtype, distance):
    step = jax.jit(lambda q: linalg.procrustes_step(q, ROWS))
    rng = np.random.default_rng(6)
    for d in (1, 2, 5):
        W = random(rng, (d, d), dtype)
        Q = W @ W.conj().T / d + 0.2 * np.eye(d) + distance * random(rng, (d, d), dtype)
        actual = step(jnp.asarray(Q))
        # Rounding of a few products; the smallest steps are lost in neither.
        np.testing.assert_allclose(actual, reference.procrustes(Q), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_procrustes_steps_approach_hermitian(dtype, scale):
    """Every step comes closer, and QᴴQ stays."""
    rng = np.random.default_rng(7)
    d = 8
    H = hermitian(rng, "flat", d, dtype) + 0.3 * hermitian(rng, "uniform", d, dtype)
    X = random(rng, (d, d), dtype)
    X = 0.2 * (X - X.conj().T) / np.linalg.norm(X - X.conj().T, 2)
    Q = (scale * (np.linalg.solve(np.eye(d) - X, np.eye(d) + X) @ H)).astype(dtype)
    start, distance = Q, np.linalg.norm(Q - Q.conj().T)
    for seed in range(6):
        Q = np.asarray(procrustes_step(jnp.asarray(Q), rows(seed, d)))
        closer = np.linalg.norm(Q - Q.conj().T)
        assert closer < distance
        distance = closer
    assert Q.dtype == dtype
    P, P0 = Q.conj().T @ Q, start.conj().T @ start
    # A step is a rotation but for a⁴/4 ≤ 6e-5 (a ≤ 1/8), and there are six.
    np.testing.assert_allclose(P, P0, rtol=0, atol=4e-4 * np.linalg.norm(P0, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_procrustes_keeps_hermitian(dtype):
    rng = np.random.default_rng(8)
    for Q in (np.zeros((3, 3)), np.eye(3), hermitian(rng, "uniform", 3, dtype)):
        Q = np.asarray((Q + Q.conj().T) / 2, dtype)
        np.testing.assert_array_equal(procrustes_step(jnp.asarray(Q), ROWS), Q)
        np.testing.assert_array_equal(rotate_to_hermitian(jnp.asarray(Q), ROWS, WHOLE), Q)


@pytest.mark.usefixtures("exact_norm")
@pytest.mark.parametrize("distance", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_rotations_are_the_formula(dtype, distance):
    rotate = jax.jit(lambda p: linalg.rotate_to_hermitian(p, ROWS, np.full(len(p), True)))
    rng = np.random.default_rng(6)
    for d in (1, 2, 5):
        W = random(rng, (d, d), dtype)
        P = W @ W.conj().T / d + 0.2 * np.eye(d) + distance * random(rng, (d, d), dtype)
        # Near Hermitian the root is a ratio of traces that are small themselves.
        np.testing.assert_allclose(rotate(jnp.asarray(P)), reference.rotations(P), atol=1e-10)


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_rotations_leave_alone_what_is_hermitian_to_rounding(dtype):
    """There the direction of a rotation is noise."""
    rng = np.random.default_rng(9)
    for _ in range(20):
        H = hermitian(rng, "flat", 8, dtype) + 0.3 * hermitian(rng, "uniform", 8, dtype)
        P = ((H + H.conj().T) / 2 * (1 + 1e-7 * random(rng, (8, 8)))).astype(dtype)
        rotated = rotate_to_hermitian(jnp.asarray(P), ROWS, np.full(8, True))
        np.testing.assert_allclose(rotated, P, rtol=0, atol=3e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotations_reach_the_hermitian_root_of_the_gram(dtype, scale):
    """`P = U H` turns to H, whatever its scale; beside padding by the identity too."""
    rng = np.random.default_rng(7)
    U, V = unitary(rng, 8, dtype), random(rng, (8, 8), dtype)
    H = (U * np.geomspace(1, 3, 8)) @ U.conj().T
    X = 0.1 * (V - V.conj().T) / np.linalg.norm(V - V.conj().T, 2)
    P = scale * (np.linalg.solve(np.eye(8) - X, np.eye(8) + X) @ H)
    P = np.pad(P, (0, 2)) + np.diag(np.repeat([0, 1], [8, 2]))
    inside = np.repeat([True, False], [8, 2])
    rotated = np.asarray(rotate_to_hermitian(jnp.asarray(P, dtype), ROWS, inside))
    np.testing.assert_array_equal(rotated[8:], np.eye(10)[8:])
    # Of a matrix of skew part 1e-3 the Hermitian root is as far at condition 3.
    np.testing.assert_allclose(rotated[:8, :8] / scale, H, atol=3e-3)


def triangular(rng, d, dtype, condition):
    """Upper triangular with a geometric spectrum."""
    singular = np.geomspace(1.0, 1 / condition, d)
    matrix = (unitary(rng, d, dtype) * singular) @ unitary(rng, d, dtype)
    return np.asarray(np.triu(np.linalg.qr(matrix)[1]), dtype)


@pytest.mark.parametrize("condition", [3.0, 1e4])
@pytest.mark.parametrize("dtype", [np.float32, np.complex128])
@pytest.mark.parametrize("d", [1, 2, 31, 64, 65, 129, 300, 513])
def test_solve_upper_adjoint(d, dtype, condition):
    rng = np.random.default_rng(d)
    Q = triangular(rng, d, dtype, condition)
    B = random(rng, (2, d, 3), dtype)
    ones = [np.ones(k, np.finfo(dtype).dtype) for k in (2, 3)]
    actual = solve_upper_adjoint((ones[0], Q, ones[1]), B)
    assert actual.dtype == dtype
    chex.assert_shape(actual, B.shape)
    columns = np.moveaxis(reference.wide(B), 1, 0).reshape(d, -1)
    expected = np.linalg.solve(reference.wide(Q).conj().T, columns)
    error = np.moveaxis(np.asarray(actual), 1, 0).reshape(d, -1) - expected
    # Forward error of a stable solve: condition number times rounding, with a factor to spare.
    allowed = 10 * condition * np.finfo(dtype).eps * np.linalg.norm(expected)
    assert np.linalg.norm(error) <= allowed


@pytest.mark.parametrize("shape", [(40, 3, 65), (65, 33, 1), (64, 2, 40)])
def test_solve_undoes_the_adjoint_on_all_axes(shape):
    rng = np.random.default_rng(9)
    X = random(rng, shape, np.complex128)
    first, _, last = (triangular(rng, d, np.complex128, 10.0) for d in shape)
    factors = (first, rng.uniform(0.5, 2, shape[1]), last)
    actual = solve_upper_adjoint(factors, reference.apply_adjoint(factors, X))
    np.testing.assert_allclose(actual, X, rtol=0, atol=1e-11)


def test_solve_spans_scales():
    """Rows of very different size, as gradients of very different size make them."""
    d = 100
    rng = np.random.default_rng(10)
    Q = np.triu(np.eye(d) + 0.1 * rng.standard_normal((d, d)) / np.sqrt(d))
    Q = np.asarray(np.geomspace(1e-12, 1e12, d)[:, None] * Q, np.float32)
    B = np.asarray(rng.standard_normal((d, 2)), np.float32)
    actual = np.asarray(solve_upper_adjoint((Q, np.ones(2, np.float32)), B))
    expected = np.linalg.solve(reference.wide(Q).T, reference.wide(B))
    # Row i of the solution is the solution without the scales, divided by scale i: the same for
    # the error.
    error = np.abs(actual - expected) * np.geomspace(1e-12, 1e12, d)[:, None]
    assert np.max(error) <= 1e-4


def test_map_blocks_is_a_map():
    rng = np.random.default_rng(11)
    stack = jnp.asarray([hermitian(rng, "uniform", 5, np.float64) for _ in range(4)])
    right = jnp.asarray(rng.standard_normal((4, 5)))

    def solve(matrix, b):
        values, vectors = jnp.linalg.eigh(matrix)
        return {"values": values, "x": vectors @ ((vectors.T @ b) / values)}

    actual = jax.jit(lambda *xs: linalg.map_blocks(solve, *xs))(stack, right)
    expected = jax.vmap(solve)(stack, right)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_close(actual, expected, rtol=1e-10)


def test_map_blocks_does_not_batch_on_cpu():
    """On CPU the function sees one matrix at a time, inside a loop."""
    stack = jnp.broadcast_to(jnp.eye(3), (4, 3, 3))
    traced = jax.jit(lambda x: linalg.map_blocks(jnp.linalg.cholesky, x)).trace(stack)
    text = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "while" in text
    calls = [line for line in text.splitlines() if "custom_call" in line and "potrf" in line]
    assert calls
    assert not [line for line in calls if "4x3x3" in line]


def test_lapack_safe_does_not_batch_on_cpu():
    """Nor do two vmaps, one in the other."""
    stack = jnp.broadcast_to(jnp.eye(3), (2, 5, 3, 3))
    safe = linalg.lapack_safe(jnp.linalg.cholesky)
    traced = jax.jit(jax.vmap(jax.vmap(safe))).trace(stack)
    text = traced.lower(lowering_platforms=("cpu",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call" in line and "potrf" in line]
    assert calls
    assert not [line for line in calls if "5x3x3" in line]


def test_what_shares_a_program_costs_little_more_than_it_needs():
    kinds = {("a", 4): [0, 1], ("a", 3): [2], ("a", 1): [3], ("b", 2): [4]}

    def cost(size, members):
        return size * len(members)

    join = functools.partial(linalg.joined, kinds, cost)
    alone = [(2, [4]), (4, [0, 1]), (3, [2]), (1, [3])]
    assert join(slack=0.0) == alone
    # Of 14 operations 1 more is 7 %: the matrix of size 3 may join, that of size 1 needs 3 more.
    assert join(slack=0.08) == [(2, [4]), (4, [0, 1, 2]), (1, [3])]
    assert join(slack=0.0, free=4) == [(2, [4]), (4, [0, 1, 2, 3])]
    assert kinds["a", 4] == [0, 1]
