"""Operators on parameters against dense matrices, made of literal Kronecker products."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron import find_layers, ggn_vector_product, losses, operators, value_and_grad_with_taps
from optax_kron.kernels import kfac as kernels

from .problems import PROBLEMS, classify, dense, exact, indices, problem, seen

RTOL = 1e-9  # of float64, with condition numbers up to 1e4


@pytest.fixture(autouse=True)
def always_x64(x64):
    """All of these are exact identities."""


problems = pytest.mark.parametrize("name", PROBLEMS)


def arrays(layer, tap):
    """The inputs [B, N, S, d_in] of a layer, those of a table one-hot, and the output gradients."""
    a, g = np.asarray(tap.inputs), np.asarray(tap.output_grads)
    return np.eye(layer.d_in)[a[..., 0]] if layer.is_embedding else a, g


def factors(layers, taps):
    """A and G of every layer by einsum, a group at a time."""
    found = {}
    for layer in layers:
        (tap,) = taps[layer.name]
        a, g = arrays(layer, tap)
        A = np.einsum("bnsi,bnsj->bij", a, a) / (a.shape[1] * a.shape[2])
        A = A * np.eye(layer.d_in) if layer.is_embedding else A
        found[layer.name] = A, np.einsum("vbnso,vbnsp->bop", g, g) / g.shape[2]
    return found


def gradients(layer, tap):
    """Per example and column, [B, V·N, d_in·d_out]."""
    g = np.einsum("bnsi,vbnso->bvnio", *arrays(layer, tap))
    return g.reshape(layer.blocks, -1, layer.d_in * layer.d_out)


def curvature(layer, tap):
    """The exact block, [B, d_in·d_out, d_in·d_out]."""
    g = gradients(layer, tap)
    return np.einsum("bki,bkj->bij", g, g) / tap.inputs.shape[1]


def wanted(kind, layers, taps):
    """The dense blocks of an estimate."""
    blocks = {}
    for layer in layers:
        A, G = factors(layers, taps)[layer.name]
        if kind == "kfac":
            blocks[layer.name] = np.stack([np.kron(a, g) for a, g in zip(A, G, strict=True)])
            continue
        F = curvature(layer, taps[layer.name][0])
        bases = [np.linalg.eigh(x)[1] for x in (A, G)]
        if layer.is_embedding:
            bases[0] = np.eye(layer.d_in)[None]
        Q = np.stack([np.kron(a, g) for a, g in zip(*bases, strict=True)])
        values = np.einsum("bij,bik,bkj->bj", Q, F, Q)
        blocks[layer.name] = np.einsum("bij,bj,bkj->bik", Q, values, Q)
    return blocks


def assert_like(op, matrix, params):
    """Every method of an operator that needs no rule, against the dense matrix."""
    scale = np.abs(matrix).max()
    np.testing.assert_allclose(op.as_matrix(), matrix, atol=RTOL * scale)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    v = jnp.asarray(np.random.default_rng(1).normal(size=flat.size))
    for product in (op.mv(unravel(v)), op @ unravel(v), op.T.mv(unravel(v))):
        np.testing.assert_allclose(
            jax.flatten_util.ravel_pytree(product)[0], matrix @ v, atol=RTOL * scale * flat.size
        )
    values = np.linalg.eigvalsh(matrix)
    np.testing.assert_allclose(op.eigenvalues(), values, atol=RTOL * scale * 10)
    np.testing.assert_allclose(op.trace(), np.trace(matrix), rtol=RTOL)
    np.testing.assert_allclose(op.frobenius_norm(), np.linalg.norm(matrix), rtol=RTOL)
    if values[0] > 1e-6 * scale:
        sign, log = np.linalg.slogdet(matrix)
        assert sign == 1
        np.testing.assert_allclose(op.logdet(), log, rtol=1e-7)
        np.testing.assert_allclose(op.det(), np.exp(log), rtol=1e-7)
    assert op.size == len(matrix)


@problems
@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_every_method_equals_its_dense_counterpart(name, kind):
    params = problem(name)[1]
    layers, _, taps = seen(name)
    op = getattr(operators, kind)(taps, layers)
    matrix = dense(layers, wanted(kind, layers, taps), params)
    assert_like(op, matrix, params)
    eye, size = np.eye(len(matrix)), len(matrix)
    damped = matrix + 0.1 * eye
    assert_like(op.inverse(0.1), np.linalg.inv(damped), params)
    values, vectors = np.linalg.eigh(damped)
    assert_like(op.sqrt(0.1), (vectors * np.sqrt(values)) @ vectors.T, params)
    assert_like(op.inverse_sqrt(0.1), (vectors / np.sqrt(values)) @ vectors.T, params)
    np.testing.assert_allclose((2.5 * op).as_matrix(), 2.5 * matrix, atol=1e-12)
    other = operators.ekfac(taps, layers)
    theirs = dense(layers, wanted("ekfac", layers, taps), params)
    both = op + 0.5 * other
    np.testing.assert_allclose(both.as_matrix(), matrix + 0.5 * theirs, atol=1e-12)
    np.testing.assert_allclose(both.trace(), np.trace(matrix + 0.5 * theirs), rtol=RTOL)
    # The inverse of a sum is dense, block by block.
    summed = both.inverse(0.1).as_matrix()
    np.testing.assert_allclose(summed @ (matrix + 0.5 * theirs + 0.1 * eye), eye, atol=1e-8)
    mixed = op + 0.1 * operators.identity(params)
    np.testing.assert_allclose(mixed.as_matrix(), damped, atol=1e-12)
    assert mixed.size == size


@problems
@pytest.mark.parametrize("rule", ["plain", "pi", "trace"])
def test_rules_that_damp_the_factors(name, rule):
    params = problem(name)[1]
    layers, _, taps = seen(name)
    op = operators.kfac(taps, layers).inverse(0.1, rule)
    blocks = {}
    for layer in layers:
        found = []
        for A, G in zip(*factors(layers, taps)[layer.name], strict=True):
            amounts = 0.1, 0.1
            if rule == "trace":
                amounts = [0.1 * np.trace(x) / len(x) for x in (A, G)]
            if rule == "pi":
                pi = np.sqrt(np.trace(A) / len(A) / (np.trace(G) / len(G)))
                amounts = pi * np.sqrt(0.1), np.sqrt(0.1) / pi
            pair = (x + c * np.eye(len(x)) for x, c in zip((A, G), amounts, strict=True))
            found.append(np.kron(*map(np.linalg.inv, pair)))
        blocks[layer.name] = np.stack(found)
    matrix = dense(layers, blocks, params)
    left = np.ones(len(matrix), bool)
    for layer in layers:
        left[indices(layer, params).ravel()] = False
    matrix[left, left] = 1 / 0.1
    assert_like(op, matrix, params)


@problems
def test_ekfac_is_the_diagonal_of_the_curvature_and_so_nearer_than_kfac(name):
    params = problem(name)[1]
    layers, _, taps = seen(name)
    F = exact(name)
    near = {kind: getattr(operators, kind)(taps, layers) for kind in ("kfac", "ekfac", "kfoc")}
    for layer in layers:
        distances = {}
        for kind, op in near.items():
            blocks = op.blocks[layer.name]
            full = blocks.as_matrix().reshape(*(2 * (layer.blocks, layer.d_in * layer.d_out)))
            rows = indices(layer, params)
            parts = [full[b, :, b] - F[np.ix_(r, r)] for b, r in enumerate(rows)]
            distances[kind] = np.array([np.linalg.norm(part) for part in parts])
            if kind == "ekfac":
                traces = [np.trace(F[np.ix_(r, r)]) for r in rows]
                np.testing.assert_allclose(blocks.trace(), sum(traces), rtol=RTOL)
        scale = 1e-9 * np.linalg.norm(F)
        assert np.all(distances["ekfac"] <= distances["kfac"] + scale)
        # The input factor of a table is diagonal, in K-FAC's and in the nearest one alike.
        assert np.all(distances["kfoc"] <= distances["kfac"] + 1e-6 * np.linalg.norm(F))
        if not layer.is_embedding:
            # Pythagoras: what EKFAC has off its diagonal, and what K-FAC has wrong on it.
            (Q_a, Q_g), values = vars(near["ekfac"].blocks[layer.name].operator).values()
            pairs = zip(factors(layers, taps)[layer.name], (Q_a, Q_g), strict=True)
            own = [np.einsum("bji,bjk,bki->bi", Q, M, Q) for M, Q in pairs]
            wrong = np.linalg.norm(own[0][:, :, None] * own[1][:, None] - values, axis=(1, 2))
            np.testing.assert_allclose(
                distances["kfac"], np.hypot(distances["ekfac"], wrong), rtol=1e-7, atol=scale
            )


@pytest.mark.parametrize("approx", kernels.APPROXIMATIONS)
def test_approximations_are_those_of_the_kernels(approx):
    layers, _, taps = seen("tokens")
    op = operators.kfac(taps, layers, approx=approx)
    for layer in layers:
        (tap,) = taps[layer.name]
        A, G = kernels.second_moments(tap.inputs, tap.output_grads, tap.weights, approx=approx)
        found = op.blocks[layer.name].operator.factors
        np.testing.assert_allclose(found[0], A, rtol=1e-12)
        np.testing.assert_allclose(found[1], G, rtol=1e-12)
    ekfac = operators.ekfac(taps, layers, approx=approx)
    F = sum(np.trace(curvature(layer, taps[layer.name][0])[0]) for layer in layers)
    np.testing.assert_allclose(ekfac.trace(), F, rtol=RTOL)


@pytest.mark.parametrize("fisher", ["mc", "exact", "sketch", "empirical", "forward"])
@pytest.mark.parametrize("name", ["tokens", "embedding", "stacked", "bias_alone"])
def test_every_estimate_of_the_fisher_gives_operators(name, fisher):
    layers, grads, taps = seen(name, fisher=fisher)
    for make in (operators.kfac, operators.ekfac):
        op = make(taps, layers)
        result = op.inverse(1e-2) @ grads
        assert jax.tree.structure(result) == jax.tree.structure(grads)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(result))
        np.testing.assert_allclose(op.eigenvalues().sum(), op.trace(), rtol=1e-9)


def test_samples_have_the_inverse_for_covariance():
    params = problem("stacked")[1]
    layers, _, taps = seen("stacked")
    for op in (operators.kfac(taps, layers), operators.ekfac(taps, layers)):
        draw = jax.vmap(lambda key, op=op: op.sample(key, 0.5))
        flat = jax.vmap(lambda tree: jax.flatten_util.ravel_pytree(tree)[0])(
            draw(jax.random.split(jax.random.key(0), 40_000))
        )
        expected = op.inverse(0.5).as_matrix()
        # The standard error of an entry is at most √2/200 of the largest.
        np.testing.assert_allclose(flat.T @ flat / len(flat), expected, atol=0.05)
        assert jax.tree.structure(op.sample(jax.random.key(1), 0.5)) == jax.tree.structure(params)


def test_ggn_is_exact_and_dense_where_it_must_be():
    loss_fn, params, *args = problem("joint_bias")
    op, matrix = operators.ggn(loss_fn, params, *args), exact("joint_bias")
    np.testing.assert_allclose(op.as_matrix(), matrix, atol=1e-12)
    eye = np.eye(len(matrix))
    np.testing.assert_allclose(
        op.inverse(0.1).as_matrix(), np.linalg.inv(matrix + 0.1 * eye), atol=1e-9
    )
    np.testing.assert_allclose((op * 2.0 + op).as_matrix(), 3 * matrix, atol=1e-12)
    np.testing.assert_allclose(op.eigenvalues(), np.linalg.eigvalsh(matrix), atol=1e-12)


def block_distances(op, layers, params, F):
    """Relative distance of every layer's blocks to those of the exact matrix."""
    for layer in layers:
        size = layer.d_in * layer.d_out
        full = op.blocks[layer.name].as_matrix().reshape(layer.blocks, size, layer.blocks, size)
        for b, rows in enumerate(indices(layer, params)):
            part = F[np.ix_(rows, rows)]
            yield np.linalg.norm(full[b, :, b] - part) / np.linalg.norm(part)


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "kfoc"])
@pytest.mark.parametrize("case", ["linear", "one_example", "neither"])
def test_where_all_three_are_exact(kind, case):
    """Deep linear nets under squared error, and single examples of any net; not else."""
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.normal(size=(3, 3))) for k in ("w", "v")}
    params["b"] = jnp.asarray(rng.normal(size=3))
    count = 1 if case == "one_example" else 6
    x, y = jnp.asarray(rng.normal(size=(count, 3))), jnp.arange(count) % 3

    def loss_fn(p, x, y):
        if case == "linear":
            hidden = x @ p["w"] + p["b"]
            return jnp.mean(losses.squared_error(hidden @ p["v"], jax.nn.one_hot(y, 3)))
        return classify(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"], y)

    layers = find_layers(loss_fn, params, x, y, check=False)
    fn = jax.jit(value_and_grad_with_taps(loss_fn, layers, fisher="exact"))
    settings = {"tolerance": 1e-14, "max_iterations": 1000} if kind == "kfoc" else {}
    op = getattr(operators, kind)(fn(params, x, y)[2], layers, **settings)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    product = ggn_vector_product(loss_fn, params, x, y)
    row = lambda v: jax.flatten_util.ravel_pytree(product(unravel(v)))[0]  # noqa: E731
    F = np.asarray(jax.vmap(row)(jnp.eye(flat.size)))
    distances = list(block_distances(op, layers, params, F))
    if case == "neither":
        assert min(distances) > 1e-3
    else:
        assert max(distances) < 1e-9
