"""Updates and state keep their structure, shapes and dtypes, in every dtype."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_kron as ok

from .table import avals, core_rows, get, norms, quick_jit, random_like, updater

SHAPES = {"matrix": (3, 2), "vector": (2,)}
NAMES = {"float16": jnp.float16, "bfloat16": jnp.bfloat16, "float32": jnp.float32}
every_real_dtype = pytest.mark.parametrize("dtype", NAMES)


def _filled(dtypes):
    if not isinstance(dtypes, dict):
        dtypes = dict.fromkeys(SHAPES, dtypes)
    return random_like({k: jnp.zeros(SHAPES[k], d) for k, d in dtypes.items()})


def _check_abstract(row, params, grads=None):
    """Shapes and dtypes only: nothing is compiled."""
    grads = params if grads is None else grads
    problem = norms(params)
    tx = row.make(problem)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(updater(row, tx, problem), grads, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    assert avals(after) == avals(state)
    return state


def _check(row, params):
    """Three updates, whose values are finite and not zero."""
    problem = norms(params)
    tx = row.make(problem)
    update = quick_jit(updater(row, tx, problem))
    before = state = tx.init(params)
    for i in range(3):
        grads = random_like(params, i)
        updates, state = update(grads, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
        chex.assert_tree_all_finite(updates)
        assert all(np.all(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(updates))
    assert avals(state) == avals(before)
    chex.assert_tree_all_finite(state)


@pytest.mark.parametrize("make", [ok.kron_psgd, ok.soap], ids=["kron_psgd", "soap"])
def test_a_state_of_64_bits_is_refused_where_these_are_off(make, x64):
    params, tx = _filled(jnp.float64), make(0.1)
    state = tx.init(params)
    with jax.enable_x64(False), pytest.raises(ValueError, match="float64, but 64-bit types are of"):
        tx.update(_filled(jnp.float32), state)


@core_rows
@every_real_dtype
def test_real_dtypes(row, dtype):
    state = _check_abstract(row, _filled(NAMES[dtype]))
    kinds = {leaf.dtype for name in row.curvature for leaf in jax.tree.leaves(get(state, name))}
    assert not row.curvature or jnp.dtype(jnp.float32) in kinds
    assert not kinds & {jnp.dtype(jnp.float16), jnp.dtype(jnp.bfloat16)}


@core_rows
@pytest.mark.parametrize("of_gradients", NAMES | {"float64": jnp.float64})
def test_float64(row, of_gradients, x64):
    params = _filled(jnp.float64)
    grads = jax.tree.map(lambda x: x.astype(of_gradients), params)
    state = _check_abstract(row, params, grads)
    for name in row.curvature:
        for path, leaf in jax.tree_util.tree_leaves_with_path(get(state, name)):
            # Usual norms, of which outliers are many times as large, are float32.
            if jnp.issubdtype(leaf.dtype, jnp.inexact) and ".usual" not in jax.tree_util.keystr(
                path
            ):
                assert leaf.dtype == jnp.float64


@core_rows
@pytest.mark.filterwarnings("ignore:.*no parameter belongs to a layer")  # complex ones have none
def test_complex64(row):
    if not row.supports_complex:
        pytest.skip("real only")
    _check_abstract(row, _filled(jnp.complex64))


@core_rows
@pytest.mark.filterwarnings("ignore:.*no parameter belongs to a layer")  # complex ones have none
def test_complex128(row, x64):
    if not row.supports_complex:
        pytest.skip("real only")
    _check_abstract(row, _filled(jnp.complex128))


@core_rows
def test_float32_with_64_bit_types_on(row, x64):
    state = _check_abstract(row, _filled(jnp.float32))
    wide = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype.itemsize > 4]
    assert not wide, "a 64-bit array crept into the state"


@core_rows
def test_mixed_dtypes_in_one_tree(row):
    _check_abstract(row, _filled({"matrix": jnp.bfloat16, "vector": jnp.float32}))
    if row.supports_complex:
        _check_abstract(row, _filled({"matrix": jnp.complex64, "vector": jnp.float16}))


@core_rows
@pytest.mark.parametrize(
    ("params_dtype", "grads_dtype"), [("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_gradients_of_another_dtype_than_the_parameters(row, params_dtype, grads_dtype):
    params, grads = _filled(NAMES[params_dtype]), _filled(NAMES[grads_dtype])
    _check_abstract(row, params, grads)


@core_rows
@every_real_dtype
def test_no_implicit_promotion(row, dtype, strict_promotion):
    _check_abstract(row, _filled(NAMES[dtype]))


@core_rows
def test_no_implicit_promotion_with_64_bit_types_on(row, x64, strict_promotion):
    _check_abstract(row, _filled({"matrix": jnp.float64, "vector": jnp.float32}))


@core_rows
def test_64_bit_values(row, x64):
    complex_too = jnp.complex128 if row.supports_complex else jnp.float64
    _check(row, _filled({"matrix": complex_too, "vector": jnp.float64}))


@core_rows
def test_mixed_values(row):
    complex_too = jnp.complex64 if row.supports_complex else jnp.float32
    _check(row, _filled({"matrix": complex_too, "vector": jnp.bfloat16}))
