"""Second moments, damping and inverses of K-FAC against dense NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron.kernels import kfac

from ..reference import kfac as reference

RTOL = 1e-10  # of float64 on small, well conditioned problems
TINY_RTOL = 1e-13  # where nothing but a few products is computed


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def inverse(factor, amount=0.0):
    (inverses,), _ = kfac.inverses([factor[None]], [jnp.full(1, amount, factor.dtype)])
    return inverses[0]


def pi_damping(a, g, damping):
    return kfac.pi_damping(*(kfac.mean_eigenvalues([x[None]])[0] for x in (a, g)), damping)


def trace_damping(factor, damping):
    return kfac.trace_damping(kfac.mean_eigenvalues([factor[None]])[0], damping)


def positive(size, seed=0):
    x = draw(size, size + 2, seed=seed)
    return x @ x.T / size + 0.1 * np.eye(size)


@pytest.mark.parametrize("approx", kfac.APPROXIMATIONS)
@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 2.0, 0.5]])
def test_second_moments_of_every_block(approx, weights):
    a, g = draw(2, 4, 3, 5), draw(2, 2, 4, 3, 6, seed=1)
    w = None if weights is None else jnp.asarray(weights)
    A, G = kfac.second_moments(jnp.asarray(a), jnp.asarray(g), w, approx=approx)
    assert (A.shape, G.shape) == ((2, 5, 5), (2, 6, 6))
    for b in range(2):
        expected = reference.factors(a[b], g[:, b], weights, approx)
        np.testing.assert_allclose(A[b], expected[0], rtol=RTOL, atol=1e-14)
        np.testing.assert_allclose(G[b], expected[1], rtol=RTOL, atol=1e-14)


def test_expand_and_reduce_agree_at_one_position_and_differ_at_more():
    a, g = jnp.asarray(draw(1, 4, 3, 5)), jnp.asarray(draw(1, 1, 4, 3, 2, seed=1))
    for positions, same in ((1, True), (3, False)):
        pairs = [
            kfac.second_moments(a[:, :, :positions], g[..., :positions, :], approx=approx)
            for approx in kfac.APPROXIMATIONS
        ]
        for x, y in zip(*pairs, strict=True):
            assert np.allclose(x, y, rtol=1e-12) == same


@pytest.mark.parametrize("approx", kfac.APPROXIMATIONS)
def test_weights_of_blocks_are_those_of_each_alone(approx):
    a, w = jnp.asarray(draw(2, 4, 3, 5)), jnp.asarray(draw(2, 4, 3, seed=1)) ** 2
    moment = kfac.input_moment(a, w.at[1, 2:].set(0), approx=approx)
    for b, wanted in enumerate((w[0], w[1].at[2:].set(0))):
        alone = kfac.input_moment(a[b : b + 1], wanted, approx=approx)[0]
        np.testing.assert_allclose(moment[b], alone, rtol=TINY_RTOL)
    one_hot = jnp.asarray(np.random.default_rng(0).integers(0, 5, size=(2, 4, 3, 1)))
    frequencies = kfac.index_frequencies(one_hot, 5, w, dtype=jnp.float64)
    for b in range(2):
        alone = kfac.index_frequencies(one_hot[b : b + 1], 5, w[b], dtype=jnp.float64)[0]
        np.testing.assert_allclose(frequencies[b], alone, rtol=TINY_RTOL)


def test_weights_of_zero_leave_a_zero_moment():
    A = kfac.input_moment(jnp.ones((1, 3, 2, 2)), jnp.zeros(3))
    np.testing.assert_array_equal(A, 0)


def test_without_columns_the_output_factor_is_the_identity():
    _, G = kfac.second_moments(jnp.ones((2, 3, 1, 2)), jnp.ones((0, 2, 3, 1, 4)))
    np.testing.assert_array_equal(G, np.broadcast_to(np.eye(4), (2, 4, 4)))


@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 3.0]])
def test_index_frequencies_are_the_diagonal_of_the_one_hot_moment(weights):
    indices = np.random.default_rng(0).integers(0, 5, size=(2, 3, 4, 1))
    w = None if weights is None else jnp.asarray(weights)
    diagonal = kfac.index_frequencies(jnp.asarray(indices), 5, w, dtype=jnp.float64)
    one_hot = jnp.asarray(np.eye(5)[indices[..., 0]])
    A = kfac.input_moment(one_hot, w)
    np.testing.assert_allclose(diagonal, np.diagonal(A, axis1=1, axis2=2), rtol=RTOL)
    off_diagonal = A - jnp.asarray(np.eye(5)) * A
    np.testing.assert_array_equal(off_diagonal, 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"diagonal": True}, {"approx": "reduce"}])
def test_gradients_of_16_bits_are_multiplied_exactly_and_added_in_float32(dtype, blocks, settings):
    numbers = np.random.default_rng(0).normal(size=(2, blocks, 300, 4, 3))
    g = jnp.asarray(numbers, dtype)
    moment = kfac.output_moment(g, **settings)
    assert moment.dtype == jnp.float32
    # 2400 products, each exact in float32: their sum errs by some 2400^(1/2) roundings of 6e-8.
    exact = kfac.output_moment(g.astype(jnp.float32), **settings)
    np.testing.assert_allclose(moment, exact, rtol=3e-6, atol=3e-6 * float(jnp.max(exact)))


def test_index_beyond_the_table_counts_for_nothing():
    counts = kfac.index_frequencies(jnp.array([[[[0], [7]]]]), 2, dtype=jnp.float64)
    np.testing.assert_allclose(counts, [[0.5, 0.0]])


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_inverse(size):
    M = positive(size)
    np.testing.assert_allclose(inverse(jnp.asarray(M)), np.linalg.inv(M), rtol=RTOL)


def test_inverse_of_a_diagonal():
    d = np.array([0.5, 2.0, 4.0])
    np.testing.assert_allclose(inverse(jnp.asarray(d)), 1 / d)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", ["indefinite", "singular", "nan"])
def test_inverse_of_what_is_not_positive_definite_is_not_finite(size, kind):
    M = positive(size)
    M[-1, -1] = {"indefinite": -1.0, "singular": 0.0, "nan": np.nan}[kind]
    if kind == "singular":
        M[-1] = M[:, -1] = 0
    assert not np.isfinite(inverse(jnp.asarray(M))).all()
    assert not np.isfinite(inverse(jnp.asarray(np.diag(M)))).all()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_eigenbasis(size):
    M = positive(size)
    basis, values = kfac.eigenbasis(jnp.asarray(M))
    np.testing.assert_allclose(basis * values @ basis.T, M, rtol=RTOL, atol=1e-13)
    np.testing.assert_allclose(basis.T @ basis, np.eye(size), atol=1e-13)


def test_eigenvalues_below_zero_are_rounding():
    for size in (2, 3):
        _, values = kfac.eigenbasis(jnp.asarray(np.diag([*range(1, size), -1e-17])))
        assert values.min() == 0


@pytest.mark.parametrize("rule", kfac.DAMPING_RULES)
@pytest.mark.parametrize("sizes", [(3, 4), (2, 1), (1, 2), (2, 2), (5, 1)])
@pytest.mark.parametrize("diagonal", [False, True])
def test_damped_inverse_is_that_of_the_dense_kronecker_product(rule, sizes, diagonal):
    A, G, X = positive(sizes[0]), 3 * positive(sizes[1], seed=1), draw(*sizes, seed=2)
    if diagonal:
        A = np.diag(np.diag(A))
    a, g, x = jnp.asarray(np.diag(A) if diagonal else A), jnp.asarray(G), jnp.asarray(X)
    if rule == "exact":
        (Q_a, a_values), (Q_g, g_values) = kfac.eigenbasis(a), kfac.eigenbasis(g)
        got = kfac.apply_eigen(Q_a, Q_g, jnp.outer(a_values, g_values), x, 0.3)
    else:
        if rule == "pi":
            amounts = pi_damping(a, g, 0.3)
        else:
            amounts = trace_damping(a, 0.3), trace_damping(g, 0.3)
        inverses = [inverse(m, d) for m, d in zip((a, g), amounts, strict=True)]
        got = kfac.apply_inverses(*inverses, x)
    np.testing.assert_allclose(got, reference.solve(A, G, X, 0.3, rule), rtol=RTOL)


@pytest.mark.parametrize(("left", "right"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_pi_of_zero_traces_is_one(left, right):
    amounts = pi_damping(left * jnp.eye(3), right * jnp.eye(2), 0.25)
    np.testing.assert_allclose(amounts, 0.5)


def test_pi_of_extreme_traces_does_not_overflow():
    large, small = jnp.full((1, 1), 1e36, jnp.float32), jnp.full((1, 1), 1e-30, jnp.float32)
    amounts = pi_damping(large, small, 1e-3)
    assert np.isfinite(amounts).all()
    np.testing.assert_allclose(amounts[0] * amounts[1], 1e-3, rtol=1e-5)


def test_trace_damping_has_a_floor():
    np.testing.assert_allclose(trace_damping(jnp.zeros((3, 3)), 0.1), kfac.TRACE_FLOOR)
    np.testing.assert_allclose(trace_damping(2.0 * jnp.eye(3), 0.1), 0.2, rtol=TINY_RTOL)


def test_kernels_batch_and_compile():
    factors = jnp.stack([jnp.asarray(positive(3, seed)) for seed in range(4)])
    inverses = jax.jit(jax.vmap(inverse))(factors)
    np.testing.assert_allclose(inverses, np.linalg.inv(factors), rtol=RTOL)
    bases, values = jax.jit(jax.vmap(kfac.eigenbasis))(factors)
    np.testing.assert_allclose(
        jnp.einsum("nij,nj,nkj->nik", bases, values, bases), factors, rtol=RTOL, atol=1e-13
    )


def test_no_implicit_promotion(strict_promotion):
    a, g = jnp.ones((1, 4, 2, 3), jnp.float32), jnp.ones((1, 1, 4, 2, 2), jnp.float32)
    A, G = kfac.second_moments(a, g, jnp.ones(4, jnp.float32))
    amounts = pi_damping(A[0], G[0], 1e-3)
    assert all(x.dtype == jnp.float32 for x in (A, G, *amounts))
    (Q_a, a), (Q_g, g) = kfac.eigenbasis(A[0]), kfac.eigenbasis(G[0])
    values = kfac.apply_eigen(Q_a, Q_g, jnp.outer(a, g), jnp.ones((3, 2), jnp.float32), 1e-3)
    assert values.dtype == inverse(A[0], amounts[0]).dtype == jnp.float32
