"""Products, bases, blocks and sums by themselves; damping from nothing to much; transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from optax_kron import Layer, Tap, Taps, losses, operators

from .problems import seen


def positive(size, seed=0, rank=None):
    x = np.random.default_rng((seed, size)).normal(size=(size, rank or size + 2))
    return jnp.asarray(x @ x.T / size)


def orthonormal(size, seed=0):
    return jnp.linalg.qr(jnp.asarray(np.random.default_rng(seed).normal(size=(size, size))))[0]


def made(name):
    """An operator, and the dense matrix that it is."""
    A, B, C = positive(3), positive(2, 1), positive(4, 2)
    d = jnp.array([0.5, 2.0])
    if name == "one":
        return operators.kronecker(A), A
    if name == "two":
        return operators.kronecker(A, B), jnp.kron(A, B)
    if name == "three":
        return operators.kronecker(A, d, C), jnp.kron(jnp.kron(A, jnp.diag(d)), C)
    Q_a, Q_g = orthonormal(3), orthonormal(2, 1)
    values = jnp.asarray(np.random.default_rng(3).uniform(0.1, 2, size=(3, 2)))
    Q = jnp.kron(Q_a, Q_g)
    eigen = operators.eigen(Q_a, Q_g, values), (Q * values.ravel()) @ Q.T
    if name == "eigen":
        return eigen
    if name == "half":
        Q = jnp.kron(jnp.eye(3), Q_g)
        return operators.eigen(None, Q_g, values), (Q * values.ravel()) @ Q.T
    block = jax.scipy.linalg.block_diag(jnp.kron(A, B), eigen[1])
    parts = operators.kronecker(A, B), eigen[0]
    if name == "blocks":
        return operators.block_diagonal(dict(zip("ab", parts, strict=True))), block
    if name == "tuple":
        return operators.block_diagonal(parts), block
    return parts[0] + 2 * parts[1], jnp.kron(A, B) + 2 * eigen[1]


names = pytest.mark.parametrize(
    "name", ["one", "two", "three", "eigen", "half", "blocks", "tuple", "sum"]
)


@names
def test_methods_equal_those_of_the_dense_matrix(name, x64):
    op, M = made(name)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    close(op.as_matrix(), M)
    close(op.T.as_matrix(), M.T)
    close(op.trace(), jnp.trace(M))
    close(op.det(), jnp.linalg.det(M))
    close(op.logdet(), jnp.linalg.slogdet(M)[1])
    close(op.frobenius_norm(), jnp.linalg.norm(M))
    close(op.eigenvalues(), jnp.linalg.eigvalsh(M))
    close((op / 2 + op).as_matrix(), 1.5 * M)
    close(sum([op, op]).as_matrix(), 2 * M)
    root = op.sqrt().as_matrix()
    close(root @ root, M)
    inverse_root = op.inverse_sqrt(0.3).as_matrix()
    close(inverse_root @ inverse_root, jnp.linalg.inv(M + 0.3 * jnp.eye(len(M))))


@names
@pytest.mark.parametrize("damping", [0.0, 1e-8, 1e-4, 1.0, 1e2])
def test_inverse_equals_the_dense_inverse(name, damping, x64):
    op, M = made(name)
    expected = jnp.linalg.inv(M + damping * jnp.eye(len(M)))
    found = op.inverse(damping).as_matrix()
    np.testing.assert_allclose(found, expected, atol=1e-9 * jnp.abs(expected).max())
    traced = jax.jit(lambda op, damping: op.inverse(damping).as_matrix())(op, damping)
    np.testing.assert_allclose(traced, expected, atol=1e-9 * jnp.abs(expected).max())


def singular(name):
    A, B = positive(3, rank=2), positive(2, 1)
    if name == "kronecker":
        return operators.kronecker(A, B), jnp.kron(A, B)
    if name == "blocks":
        op = operators.block_diagonal({"good": operators.kronecker(B), "bad": singular("sum")[0]})
        return op, jax.scipy.linalg.block_diag(singular("sum")[1], B)
    if name == "eigen":
        Q, values = orthonormal(3), jnp.array([[1.0], [0.0], [2.0]])
        return operators.eigen(Q, None, values), (Q * values.ravel()) @ Q.T
    return operators.kronecker(A) + operators.kronecker(A), 2 * A


@pytest.mark.parametrize("name", ["kronecker", "eigen", "blocks", "sum"])
def test_what_is_singular_is_refused_or_pseudo_inverted(name, x64):
    op, M = singular(name)
    for method in (op.inverse, op.inverse_sqrt, lambda: op.sample(jax.random.key(0))):
        with pytest.raises(np.linalg.LinAlgError, match=r"singular.*Give a larger damping"):
            method()
    pseudo = jax.jit(lambda op: op.inverse().as_matrix())(op)
    expected = np.linalg.pinv(M, rtol=1e-10, hermitian=True)
    np.testing.assert_allclose(pseudo, expected, atol=1e-8 * np.abs(expected).max())
    for damping in (1e-8, 1e-3, 1e2):
        expected = jnp.linalg.inv(M + damping * jnp.eye(len(M)))
        # Eigenvalues of zero are known to 1e-16, which is 1e-8 of the least damping.
        np.testing.assert_allclose(
            op.inverse(damping).as_matrix(), expected, atol=1e-7 * jnp.abs(expected).max()
        )
    root = op.sqrt().as_matrix()
    np.testing.assert_allclose(root @ root, M, atol=1e-9)


def test_the_block_that_is_singular_is_named(x64):
    layers, _, taps = seen("joint_bias")
    with pytest.raises(np.linalg.LinAlgError, match="block 'v' of the operator"):
        operators.kfac(taps, layers).inverse()
    taps = Taps({"dense": Tap(jnp.eye(3), jnp.eye(3, 2) + 1)})
    params = {"kernel": jnp.ones((3, 2)), "other": jnp.ones(5)}
    op = operators.kfac(taps, [Layer("dense", kernel="kernel")], params=params)
    with pytest.raises(np.linalg.LinAlgError, match="block 'parameters in no layer'"):
        op.inverse()


@pytest.mark.parametrize("rule", ["plain", "pi", "trace"])
@pytest.mark.parametrize("damping", [0.0, 1e-8, 1e-2, 1e2])
def test_rules_of_products_of_three(rule, damping, x64):
    factors = positive(3), positive(2, 1), positive(4, 2)
    found = operators.kronecker(*factors).inverse(damping, rule).as_matrix()
    means = np.array([float(jnp.trace(f)) / len(f) for f in factors])
    amounts = np.full(3, damping)
    if rule == "pi":
        amounts = damping ** (1 / 3) * means / np.prod(means) ** (1 / 3)
    if rule == "trace":
        amounts = damping * means
    damped = [np.asarray(f) + c * np.eye(len(f)) for f, c in zip(factors, amounts, strict=True)]
    expected = functools.reduce(np.kron, map(np.linalg.inv, damped))
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-9 * np.abs(expected).max())


def test_pi_adds_at_least_its_floor(x64):
    op = operators.kronecker(jnp.diag(jnp.array([1.0, 0.0])), 1e-30 * jnp.eye(2))
    found = op.inverse(1e-10, "pi").as_matrix()
    assert np.all(np.isfinite(found))
    np.testing.assert_allclose(jnp.diagonal(found)[-1], 1 / (0.5**0.5 * 1e10 * 1e-8), rtol=1e-6)


def test_trace_adds_at_least_its_floor_and_nothing_without_damping(x64):
    op = operators.kronecker(jnp.zeros((2, 2)), jnp.eye(2))
    found = op.inverse(1e-3, "trace").as_matrix()
    np.testing.assert_allclose(found, np.eye(4) / (1e-12 * (1 + 1e-3)), rtol=1e-9)
    with pytest.raises(np.linalg.LinAlgError, match=r"damping=0\.0: it is singular"):
        op.inverse(0.0, "trace")


@pytest.mark.parametrize("rule", ["exact", "pi", "trace", "plain"])
def test_every_rule_damps_an_identity_alike(rule):
    op = 3.0 * operators.identity(jnp.zeros(2))
    np.testing.assert_allclose(op.inverse(1.0, rule).as_matrix(), np.eye(2) / 4, rtol=1e-6)
    blocks = operators.block_diagonal({"a": op, "b": operators.kronecker(jnp.full((1, 1), 3.0))})
    expected = {"trace": 6.0}.get(rule, 4.0)  # three and its damping, relative to it or not
    np.testing.assert_allclose(
        blocks.inverse(1.0, rule).as_matrix(), np.diag([0.25, 0.25, 1 / expected]), rtol=1e-6
    )


def test_sums_of_identities_are_one(x64):
    op = operators.identity(jnp.zeros(3)) + 2.0 * operators.identity(jnp.zeros(3))
    np.testing.assert_allclose(op.det(), 27.0, rtol=1e-12)
    np.testing.assert_allclose(op.logdet(), 3 * np.log(3), rtol=1e-12)
    np.testing.assert_allclose(op.inverse(1.0) @ jnp.ones(3), 0.25, rtol=1e-12)
    empty = 0.0 * operators.identity(jnp.zeros(0))
    assert (empty.det(), empty.logdet(), empty.inverse().size) == (1, 0, 0)


def test_what_is_not_finite_is_refused():
    for op in (
        operators.kronecker(jnp.array([[jnp.nan, 0], [0, 1.0]]), jnp.eye(3)),
        operators.eigen(None, None, jnp.full((2, 2), jnp.inf)),
    ):
        with pytest.raises(np.linalg.LinAlgError, match="not finite"):
            op.inverse(0.1)


def test_factors_that_are_not_symmetric_have_a_transpose(x64):
    A, B = (jnp.asarray(np.random.default_rng(i).normal(size=(3, 3))) for i in (0, 1))
    op, M = operators.kronecker(A, B), jnp.kron(A, B)
    np.testing.assert_allclose(op.T.as_matrix(), M.T, atol=1e-12)
    np.testing.assert_allclose(op.det(), jnp.linalg.det(M), rtol=1e-9)
    np.testing.assert_allclose(op.T @ jnp.ones((3, 3)), (M.T @ jnp.ones(9)).reshape(3, 3))


@names
def test_operators_go_through_transformations(name, x64):
    op, M = made(name)
    leaves, treedef = jax.tree.flatten(op)
    assert all(isinstance(x, jax.Array) for x in leaves)
    again = jax.jit(lambda op: op)(jax.tree.unflatten(treedef, leaves))
    np.testing.assert_allclose(again.as_matrix(), M, atol=1e-12)
    several = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), op)
    found = jax.jit(jax.vmap(lambda op: op.inverse(0.1).trace()))(several)
    assert found.shape == (3,)
    np.testing.assert_allclose(found[0], op.inverse(0.1).trace(), rtol=1e-9)
    if name == "sum":
        return  # whose inverse is dense, and has no derivative
    slope = jax.grad(lambda damping: op.inverse(damping).logdet())(0.1)
    np.testing.assert_allclose(slope, -op.inverse(0.1).trace(), rtol=1e-9)


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_operators_are_saved_and_restored(kind, tmp_path):
    layers, grads, taps = seen("stacked")
    op = getattr(operators, kind)(taps, layers)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "op", jax.tree.leaves(op))
        checkpointer.wait_until_finished()
        leaves = checkpointer.restore(tmp_path / "op", jax.tree.leaves(op))
    again = jax.tree.unflatten(jax.tree.structure(op), leaves)
    for a, b in zip(*(jax.tree.leaves(x @ grads) for x in (op, again)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_vectors_and_factors_of_few_bits(dtype):
    op = operators.kronecker(jnp.eye(3, dtype=dtype), 2 * jnp.eye(2, dtype=dtype))
    assert (op @ jnp.ones((3, 2), dtype)).dtype == dtype
    assert op.as_matrix().dtype == jnp.float32
    np.testing.assert_allclose(op.inverse(1.0) @ jnp.ones((3, 2)), 1 / 3, rtol=1e-6)


def test_narrow_factors_do_not_overflow():
    op = operators.kronecker(*[300 * jnp.eye(3, dtype=jnp.float16)] * 2)
    np.testing.assert_allclose(op.frobenius_norm(), 270_000, rtol=1e-6)
    np.testing.assert_allclose((300 * op).eigenvalues(), 2.7e7, rtol=1e-6)
    op = operators.eigen(None, None, jnp.full((3, 3), 1e-6, jnp.float16))
    np.testing.assert_allclose(op.inverse(1e-9).eigenvalues(), 1e6, rtol=0.1)


def test_determinant_of_factors_that_cancel():
    op = operators.kronecker(100 * jnp.eye(8), 0.01 * jnp.eye(8))
    np.testing.assert_allclose(op.det(), 1, rtol=1e-4)


def test_blocks_by_number():
    op = operators.block_diagonal({10: operators.kronecker(jnp.eye(2)), 9: made("one")[0]})
    found = op.inverse(1.0) @ {10: jnp.ones(2), 9: jnp.ones(3)}
    np.testing.assert_allclose(found[10], 0.5)


def test_exact_matrix_of_narrow_parameters():
    def loss_fn(w):
        return jnp.sum(losses.l2_loss(w, jnp.zeros(3, w.dtype)))

    op = operators.ggn(loss_fn, jnp.ones(3, jnp.bfloat16))
    np.testing.assert_allclose(op.inverse(1.0).as_matrix(), 0.5 * np.eye(3), rtol=1e-2)


def test_lineax_solves_and_preconditions(x64):
    import lineax

    layers, grads, taps = seen("stacked")
    op = operators.kfac(taps, layers) + 0.1 * operators.identity(grads)
    options = {"preconditioner": operators.as_lineax(operators.ekfac(taps, layers).inverse(0.1))}
    for solver in (lineax.CG(rtol=1e-10, atol=1e-10), lineax.GMRES(rtol=1e-10, atol=1e-10)):
        found = lineax.linear_solve(operators.as_lineax(op), grads, solver, options=options)
        for a, b in zip(*map(jax.tree.leaves, (op @ found.value, grads)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-8)


def test_errors_name_what_differs():
    op = operators.kronecker(jnp.eye(3), jnp.eye(2))
    with pytest.raises(ValueError, match=r"arrays of shape \(3, 2\); got one of shape \(6,\)"):
        op @ jnp.ones(6)
    with pytest.raises(
        ValueError, match=r"rule must be one of exact, pi, trace, plain; got 'full'"
    ):
        op.inverse(0.1, "full")
    with pytest.raises(ValueError, match=r"damping must be one finite number, at least 0; got -1"):
        op.inverse(-1)
    with pytest.raises(ValueError, match=r"rule='pi' is for Kronecker products"):
        operators.eigen(None, None, jnp.ones((2, 2))).inverse(0.1, "pi")
    with pytest.raises(ValueError, match=r"factor 1 has shape \(2, 3\)"):
        operators.kronecker(jnp.eye(2), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="at least one factor"):
        operators.kronecker()
    with pytest.raises(ValueError, match="factor 0 has dtype complex64"):
        operators.kronecker(jnp.eye(2, dtype=jnp.complex64))
    with pytest.raises(ValueError, match=r"values have shape \(3, 2\), and the bases \[\(2, 2\)"):
        operators.eigen(jnp.eye(2), None, jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="one at least; got"):
        operators.block_diagonal({})
    with pytest.raises(ValueError, match=r"blocks \['a'\].*'b'"):
        operators.block_diagonal({"a": op}) @ {"b": jnp.ones((3, 2))}
    with pytest.raises(ValueError, match="must act on the same pytrees"):
        op + operators.kronecker(jnp.eye(3))
    with pytest.raises(ValueError, match="got an operator"):
        op @ op
    with pytest.raises(ValueError, match=r"shapes \[\(3, 2\)\]; got one of shape \(2, 3\)"):
        (op + op).inverse(0.1) @ jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"shapes \[\(2,\)\]; got one of shape \(3,\)"):
        operators.identity(jnp.ones(2)) @ jnp.ones(3)
    with pytest.raises(
        ValueError, match=r"damping must be one finite number, at least 0; got shape \(2,\)"
    ):
        op.inverse(jnp.ones(2))
    with pytest.raises(TypeError):
        op * 1j
    with pytest.raises(TypeError):
        op + 1.0
    with pytest.raises(TypeError):
        op * jnp.ones(3)
