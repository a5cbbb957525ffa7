"""Hessian-vector products against the dense Hessian."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_kron as ok


def loss(params, scale):
    return scale * (jnp.sum(jnp.sin(params["a"]) * params["b"] ** 2) + jnp.sum(params["b"] ** 4))


@pytest.fixture
def params():
    return {"a": jnp.array([0.3, -0.2]), "b": jnp.array([[0.5], [1.0]])[:, 0]}


def test_product_is_that_of_the_dense_hessian(params):
    v = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([-1.0, 0.5])}
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    hessian = jax.hessian(lambda x: loss(unravel(x), 2.0))(flat)
    product = ok.hessian_vector_product(loss, params, 2.0)(v)
    expected = hessian @ jax.flatten_util.ravel_pytree(v)[0]
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(product)[0], expected, rtol=1e-5)


def test_auxiliary_output_is_dropped(params):
    with_aux = ok.hessian_vector_product(
        lambda p, s: (loss(p, s), "aux"), params, 2.0, has_aux=True
    )
    without = ok.hessian_vector_product(loss, params, 2.0)
    jax.tree.map(np.testing.assert_array_equal, with_aux(params), without(params))


def test_missing_leaves_count_as_zero(params):
    hvp = ok.hessian_vector_product(loss, params, 1.0)
    full = hvp({"a": jnp.ones(2), "b": jnp.zeros(2)})
    for nothing in (None, optax.MaskedNode()):
        part = hvp({"a": jnp.ones(2), "b": nothing})
        np.testing.assert_array_equal(part["a"], full["a"])
        assert jax.tree.leaves(part["b"]) == []


def test_unknown_leaves_are_refused_by_path(params):
    with pytest.raises(ValueError, match=r"leaves that params has not: \['c'\]"):
        ok.hessian_vector_product(loss, params, 1.0)({**params, "c": jnp.ones(2)})


def test_flax_variables_are_pointed_to_their_arrays():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    variables = nnx.state(model, nnx.Param)
    for point in (model, variables):
        hvp = ok.hessian_vector_product(lambda m: jnp.sum(m.kernel**2), point)
        with pytest.raises(ValueError, match=r"params has .*kernel\W*\.value.*nnx\.as_pure"):
            hvp(nnx.as_pure(variables))


def test_complex_products_follow_the_direction_of_steepest_ascent():
    matrix = jnp.array([[2.0, 1.0 - 1.0j], [1.0 + 1.0j, 3.0]])

    def quadratic(x):
        return 0.5 * jnp.vdot(x, matrix @ x).real

    v = jnp.array([1.0 + 2.0j, -1.0j])
    product = ok.hessian_vector_product(quadratic, jnp.zeros(2, jnp.complex64))(v)
    np.testing.assert_allclose(product, matrix @ v, rtol=1e-6)
