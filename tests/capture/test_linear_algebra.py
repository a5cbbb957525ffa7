"""Layers before matrix functions of each example, and before what has no batching rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron import losses
from optax_kron.capture.find import find_layers
from optax_kron.capture.taps import value_and_grad_with_taps
from optax_kron.operators import ggn

from .helpers import assert_examples
from .patterns import N, draw, labels

D = 3


def definite(h):
    return h @ h.swapaxes(-1, -2) + jnp.eye(D)


def solved(h, x):
    return jnp.linalg.solve(h, x[:, :D, None])


def solved_one_by_one(h, x):
    return jax.vmap(jnp.linalg.solve)(h, x[:, :D])


def conjugate_gradients(h, x):
    def one(h, x):
        return jax.scipy.sparse.linalg.cg(lambda v: h @ v, x, maxiter=3)[0]

    return jax.vmap(one)(definite(h), x[:, :D])


def solved_triangular(h, x):
    return jax.scipy.linalg.solve_triangular(h, x[:, :D, None])


def tridiagonal(h, x):
    rows = h.swapaxes(0, 1)
    return jax.lax.linalg.tridiagonal_solve(
        rows[0].at[:, 0].set(0), 2 + rows[1] ** 2, rows[2].at[:, -1].set(0), x[:, :D, None]
    )


# Each is a function of matrices [N, D, D] and of the inputs [N, 4].
FUNCTIONS = {
    "svdvals": lambda h, x: jnp.linalg.svdvals(h),
    "svd": lambda h, x: jnp.linalg.svd(h)[1],
    "spectral_norm": lambda h, x: jnp.linalg.norm(h, ord=2, axis=(1, 2))[:, None],
    "nuclear_norm": lambda h, x: jnp.linalg.norm(h, ord="nuc", axis=(1, 2))[:, None],
    "inv": lambda h, x: jnp.linalg.inv(h),
    "pinv": lambda h, x: jnp.linalg.pinv(h),
    "slogdet": lambda h, x: jnp.linalg.slogdet(h)[1][:, None],
    "det": lambda h, x: jnp.linalg.det(h)[:, None],
    "solve": solved,
    "vmapped_solve": solved_one_by_one,
    "conjugate_gradients": conjugate_gradients,
    "triangular_solve": solved_triangular,
    "tridiagonal_solve": tridiagonal,
    "cholesky": lambda h, x: jnp.linalg.cholesky(definite(h)),
    "eigvalsh": lambda h, x: jnp.linalg.eigvalsh(h),
    "eigh": lambda h, x: jnp.linalg.eigh(h)[1] ** 2,
    "qr": lambda h, x: jnp.linalg.qr(h)[0],
    "lu": lambda h, x: jax.vmap(jax.scipy.linalg.lu)(h)[2],
    "expm": lambda h, x: jax.scipy.linalg.expm(h),
    "matrix_power": lambda h, x: jnp.linalg.matrix_power(h, 3),
}
# One for each kind of equation: a matrix for a matrix, a vector, a number, and a solve.
WITH_EXAMPLES = ("svdvals", "slogdet", "inv", "conjugate_gradients", "tridiagonal_solve")

PARAMS = {"w": draw(4, D * D), "b": draw(D * D, seed=2), "v": draw(D * D, 2)}


def loss_of(function):
    def loss_fn(p, x, y):
        h = (x @ p["w"] + p["b"]).reshape(-1, D, D) + 2 * jnp.eye(D)
        out = jnp.tanh(function(h, x).reshape(len(x), -1))
        out = jnp.tanh(out @ p["v"][: out.shape[1]])
        return jnp.mean(jnp.sum(losses.squared_error(out, y), axis=1))

    return loss_fn


@pytest.mark.parametrize("name", FUNCTIONS)
def test_matrices_of_each_example_keep_the_layers_before_them(name):
    """Traced alone, so that nothing is factorized."""
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (PARAMS, draw(N, 4), draw(N, 2))
    )
    layers = find_layers(loss_of(FUNCTIONS[name]), *shapes)
    assert "w" in {layer.kernel for layer in layers}, layers
    assert {u.path for u in layers.uncovered} <= {"v"}, layers  # some of its rows may be unused


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_taps_before_linear_algebra_are_those_of_each_example(name):
    loss_fn, args = loss_of(FUNCTIONS[name]), (draw(N, 4), draw(N, 2))
    layers = find_layers(loss_fn, PARAMS, *args, check=False)
    layers = [layer for layer in layers if layer.kernel == "w"]
    assert_examples(loss_fn, PARAMS, args, layers, scale=1.0, rtol=2e-4)


def test_a_solve_that_mixes_examples_is_declared():
    def loss_fn(p, x, y):
        h = x @ p["w"]  # one system with an unknown for each example
        matrix = jnp.eye(len(x)) + 0.1 * jnp.ones((len(x), len(x)))
        solution = jax.lax.custom_linear_solve(
            lambda v: matrix @ v, h, lambda _, b: jnp.linalg.inv(matrix) @ b, symmetric=True
        )
        return jnp.mean(losses.squared_error(jnp.tanh(solution), y))

    layers = find_layers(loss_fn, {"w": draw(4, 2)}, draw(N, 4), draw(N, 2), check=False)
    assert [u.path for u in layers.uncovered] == ["w"]


# ------------------------------------------------------------------------ without a batching rule

EXPERTS = {"w": draw(4, 5), "e": draw(3, 5, 5), "v": draw(5, 3)}
SIZES = jnp.array([2, 0, N - 2])


def mixture(p, x, y):
    """A bank of matrices, one for each run of examples."""
    h = jax.lax.ragged_dot(jnp.tanh(x @ p["w"]), p["e"], SIZES[: len(p["e"])])
    return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(jnp.tanh(h) @ p["v"], y))


@pytest.mark.parametrize("fisher", ["mc", "exact", "sketch", "empirical", "forward"])
@pytest.mark.parametrize("reduce", [False, True])
def test_every_estimate_takes_a_primitive_without_a_batching_rule(fisher, reduce):
    x, y = draw(N, 4), labels()
    fn = value_and_grad_with_taps(mixture, fisher=fisher, samples=np.int64(2), reduce=reduce)
    value, grads, taps = jax.jit(fn)(EXPERTS, x, y, key=jax.random.key(0))
    expected = jax.value_and_grad(mixture)(EXPERTS, x, y)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        (value, grads),
        expected,
    )
    assert set(taps) == {"w", "v"}


def test_layers_before_a_ragged_product_have_the_gradients_of_each_example():
    """Against the same network with the matrix of each example looked up."""
    x, y = draw(N, 4), labels()
    layers = find_layers(mixture, EXPERTS, x, y)
    assert [(u.path, "ragged_dot" in u.reason) for u in layers.uncovered] == [("e", True)]
    fn = value_and_grad_with_taps(mixture, layers, fisher="empirical")
    _, _, taps = jax.jit(fn)(EXPERTS, x, y)
    number = jnp.repeat(jnp.arange(3), SIZES, total_repeat_length=N)

    def one(w, x, y, number):
        h = jnp.tanh(x @ w) @ EXPERTS["e"][number]
        return losses.softmax_cross_entropy_with_integer_labels(jnp.tanh(h) @ EXPERTS["v"], y)

    expected = jax.vmap(jax.grad(one), (None, 0, 0, 0))(EXPERTS["w"], x, y, number)
    (tap,) = taps["w"]
    found = jnp.einsum("bnsi,vbnso->nio", tap.inputs, tap.output_grads)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_products_with_the_gauss_newton_matrix_need_no_batching_rule():
    x, y = draw(N, 4), labels()
    matrix = jax.jit(lambda p: ggn(mixture, p, x, y).as_matrix())(EXPERTS)
    assert jnp.all(jnp.isfinite(matrix))
    assert jnp.linalg.norm(matrix - matrix.T) < 1e-5


@pytest.mark.parametrize("samples", [np.int64(2), np.int32(2), np.uint8(2)])
def test_samples_may_be_an_integer_of_numpy(samples):
    def loss_fn(p, x, y):
        return jnp.mean(losses.squared_error(x @ p["w"], y))

    fn = value_and_grad_with_taps(loss_fn, samples=samples)
    given = {"w": draw(4, 2)}, draw(N, 4), draw(N, 2)
    _, _, taps = jax.eval_shape(fn, *given, key=jax.random.key(0))
    assert taps["w"][0].output_grads.shape[0] == 2
