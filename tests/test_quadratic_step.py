"""The step of a quadratic model: beside a dense solve, and at the edges of arithmetic."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_kron as ok

from .draws import draw

SIZE = 7
X = np.ones(3, np.float32)
TREE = {"a": X}


class Pair(NamedTuple):
    """A tree of parameters that is a tuple, and no list of directions."""

    first: np.ndarray
    second: np.ndarray


def tree(x):
    """A vector of seven numbers as leaves of several ranks."""
    return {"a": jnp.asarray(x[:4].reshape(2, 2)), "b": (jnp.asarray(x[4:6]), jnp.asarray(x[6]))}


def vector(x):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(x)])


def curvature(rank=SIZE, dtype=np.float64):
    """A Hermitian matrix without negative eigenvalues."""
    root = draw(SIZE, rank, seed=1, dtype=dtype)
    return root @ root.conj().T


def solve(gradient, directions, matrix, shift):
    """Coefficients and the decrease of the model, from a least-squares solution in float64."""
    D = np.stack(directions, axis=1)
    M = np.real(D.conj().T @ (matrix + shift * np.eye(len(D))) @ D)
    b = np.real(D.conj().T @ gradient)
    x = -np.linalg.lstsq(M, b, rcond=1e-12)[0]
    return x, -(x @ M @ x / 2 + b @ x)


def step_of(gradient, directions, matrix, **settings):
    products = [tree(matrix @ d) for d in directions]
    return ok.quadratic_step(tree(gradient), [tree(d) for d in directions], products, **settings)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_step_is_that_of_a_dense_solve(count, dtype, x64):
    directions = [draw(SIZE, seed=k, dtype=dtype) for k in range(2, count + 2)]
    gradient, matrix = draw(SIZE, dtype=dtype), curvature(dtype=dtype)
    kind = "strict" if dtype == np.float64 else "standard"  # real times complex is not
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion(kind):
        found = step_of(gradient, directions, matrix, damping=0.2, l2=0.1)
    x, decrease = solve(gradient, directions, matrix, 0.2 + 0.1)
    np.testing.assert_allclose(found.coefficients, x, rtol=1e-11)
    expected = sum(a * d for a, d in zip(x, directions, strict=True))
    np.testing.assert_allclose(vector(found.step), expected, rtol=1e-11)
    np.testing.assert_allclose(found.predicted_decrease, decrease, rtol=1e-11)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(found.step))


@pytest.mark.parametrize("dtype", [np.float64, np.complex128], ids=str)
def test_inner_products_are_those_with_products(dtype, x64):
    x, y = jnp.asarray(draw(9, 4, dtype=dtype)), jnp.asarray(draw(9, 3))

    def loss_fn(params):
        hidden = jnp.real(jnp.tanh(x @ params["in"]))
        return jnp.mean(ok.losses.squared_error(hidden @ params["out"], y))

    def tree(seed):
        inner = draw(4, 5, seed=seed, dtype=dtype)
        return {"in": jnp.asarray(inner), "out": jnp.asarray(draw(5, 3, seed=seed + 9))}

    product = ok.ggn_vector_product(loss_fn, tree(2))
    directions = [tree(3), tree(4), tree(5)]
    expected = [[vector(d).conj() @ vector(product(e)) for e in directions] for d in directions]
    found = product.inner_products(directions)
    np.testing.assert_allclose(found, np.real(expected), rtol=1e-11)


@pytest.mark.parametrize("scale", [1.0, -3.0, 1e-8, 1.0 + 1e-15])
def test_parallel_directions_count_once(scale, x64):
    gradient, d, matrix = draw(SIZE), draw(SIZE, seed=2), curvature()
    both = step_of(gradient, [d, scale * d], matrix)
    one = step_of(gradient, [d], matrix)
    assert both.coefficients[1] == 0
    np.testing.assert_allclose(vector(both.step), vector(one.step), rtol=1e-12)


@pytest.mark.parametrize("place", [0, 1])
def test_direction_of_zeros_is_left_out(place, x64):
    gradient, d, matrix = draw(SIZE), draw(SIZE, seed=2), curvature()
    directions = [d, d]
    directions[place] = 0 * d
    found, one = step_of(gradient, directions, matrix), step_of(gradient, [d], matrix)
    assert found.coefficients[place] == 0
    np.testing.assert_allclose(vector(found.step), vector(one.step), rtol=1e-14)


def test_gradient_of_zero_gives_no_step():
    d = draw(SIZE, seed=2, dtype=np.float32)
    found = step_of(0 * d, [0 * d, d], curvature(dtype=np.float32))
    assert np.all(vector(found.step) == 0)
    assert found.predicted_decrease == 0


def test_direction_of_negative_curvature_is_left_out(x64):
    gradient, directions = draw(SIZE), [draw(SIZE, seed=2), draw(SIZE, seed=3)]
    products = [tree(-1e-9 * directions[0]), tree(directions[1])]
    found = ok.quadratic_step(tree(gradient), [tree(d) for d in directions], products)
    x, decrease = solve(gradient, directions[1:], np.eye(SIZE), 0.0)
    np.testing.assert_allclose(found.coefficients, [0, *x], rtol=1e-12)
    np.testing.assert_allclose(found.predicted_decrease, decrease, rtol=1e-12)


@pytest.mark.parametrize(
    ("grads", "along", "curved"), [(1e30, 1e-10, 1e8), (1e25, 1e30, 1e-12), (1e-25, 1e-18, 1.0)]
)
def test_squares_neither_overflow_nor_vanish(grads, along, curved):
    """In float32, whose largest number is 3e38: squares of all of these are beyond it, or zero."""
    gradient, matrix = draw(SIZE), curvature()
    directions = [draw(SIZE, seed=2), draw(SIZE, seed=3)]
    x, _ = solve(gradient, directions, matrix, 0.5)
    trees = [[tree((along * d).astype(np.float32)) for d in directions]]
    trees.append([tree((curved * along * matrix @ d).astype(np.float32)) for d in directions])
    g = tree((grads * gradient).astype(np.float32))
    found = ok.quadratic_step(g, *trees, damping=0.5 * curved)
    expected = (grads / curved) * sum(a * d for a, d in zip(x, directions, strict=True))
    np.testing.assert_allclose(vector(found.step), expected, rtol=2e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=str)
def test_sums_of_narrow_numbers_are_wide(dtype):
    """Ten thousand ones have a sum that neither dtype reaches by adding them one by one."""
    ones = jnp.ones(10_000, dtype)
    found = ok.quadratic_step(-4 * ones, [ones], [2 * ones])
    assert found.step.dtype == dtype
    np.testing.assert_allclose(found.step.astype(np.float32), 2.0)
    np.testing.assert_allclose(found.predicted_decrease, 4e4, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", range(5))
def test_what_is_not_finite_gives_no_step(where, bad):
    trees = [np.array(draw(1500, seed=k, dtype=np.float32)) for k in range(5)]
    trees[where][1200] = bad
    g, d1, d2, p1, p2 = map(jnp.asarray, trees)
    found = jax.jit(ok.quadratic_step)(g, (d1, d2), (p1, p2))
    assert np.all(found.step == 0)
    assert np.all(found.coefficients == 0)
    assert np.isnan(found.predicted_decrease)


def test_errors_say_what_was_expected():
    x = jnp.ones(3)
    with pytest.raises(ValueError, match="one or more; got 0 and 0"):
        ok.quadratic_step(x, [], [])
    with pytest.raises(ValueError, match="got 2 and 1"):
        ok.quadratic_step(x, [x, x], [x])
    with pytest.raises(ValueError, match="shape"):
        ok.quadratic_step(x, [jnp.ones(2)], [x])
    with pytest.raises(ValueError, match=r"damping must be a number in \[0, inf\]"):
        ok.quadratic_step(x, [x], [x], damping=-1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((X, X, X), "directions must be a list or tuple of trees .* got ndarray"),
        ((TREE, TREE, TREE), "directions must be a list or tuple of trees .* got dict"),
        ((TREE, [TREE], TREE), "products must be a list or tuple of trees .* got dict"),
        ((X, Pair(X, X), [X, X]), "directions must be a list or tuple of trees .* got Pair"),
        ((jnp.arange(3), [X], [X]), "grads must be floating-point or complex; got .* int32"),
        ((X, [X, jnp.arange(3)], [X, X]), r"directions\[1\] must be floating-point or complex"),
        ((TREE, [TREE], [{"a": "no"}]), r"products\[0\]\['a'\] must be floating.* got str"),
        ((TREE, [TREE], [{"b": X}]), r"products\[0\] do not match the gradients: at \['b'\]"),
        ((TREE, [{"a": X[:2]}], [TREE]), r"directions\[0\] do not match the gradients: at \['a'\]"),
    ],
)
def test_trees_that_do_not_fit_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        ok.quadratic_step(*given)
