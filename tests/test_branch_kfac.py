"""Branch-factored K-FAC against its reference, its memory, its fallback and its guards."""

import contextlib
import re

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_kron import branch_kfac, scale_by_branch_kfac
from optax_kron.kernels import branches as kernels
from optax_kron.transforms import validation
from tests.reference import branch_kfac as reference

SHAPES = {"a": (3, 4), "b": (5,), "c": (), "d": (2, 0)}


def draw(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape)


def tree(seed, dtype=np.float64):
    return {
        k: jnp.asarray(draw(*s, seed=seed + i), dtype) for i, (k, s) in enumerate(SHAPES.items())
    }


def map_of(like, dimensions, count, seed=2027, *, redraw=True):
    key = validation.key_of(validation.key_data(seed))
    key = jax.random.fold_in(key, count) if redraw else key
    return np.asarray(kernels.dense_map(key, jax.tree.leaves(like), dimensions, jnp.float64))


def ravel(x):
    return np.asarray(jax.flatten_util.ravel_pytree(x)[0], np.float64)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("dimensions", "blocks"), [(d, b) for d in (1, 2, 3, 5, 8) for b in range(1, d + 1)]
)
def test_steps_are_those_of_the_reference(dimensions, blocks):
    params, branches = tree(0), draw(7, dimensions)
    settings = {"damping": 0.01, "blocks": blocks}
    tx = branch_kfac(0.1, **settings, clip=1.0)
    state = tx.init(params)
    update = jax.jit(lambda g, s, p, b: tx.update(g, s, p, branches=b))
    for count in range(2):
        grads = tree(10 + count)
        P = map_of(params, dimensions, count)
        direction = reference.precondition(ravel(grads), branches, P, **settings)
        expected = reference.step(
            ravel(params), ravel(grads), branches, P, lr=0.1, clip=1.0, **settings
        )
        updates, state = update(grads, state, params, jnp.asarray(branches))
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(ravel(params), expected, rtol=0, atol=1e-10)
        norm = optax.tree.get(state, "update_norm")
        np.testing.assert_allclose(norm, np.linalg.norm(direction), rtol=1e-6)  # it is float32
    assert int(optax.tree.get(state, "failed_refreshes")) == 0


@pytest.mark.parametrize("dimensions", range(1, 9))
def test_groups_are_contiguous_and_differ_by_one_at_most(dimensions):
    for blocks in range(1, dimensions + 1):
        expected = np.repeat(
            np.arange(blocks), [len(g) for g in reference.groups(dimensions, blocks)]
        )
        np.testing.assert_array_equal(kernels.groups(dimensions, blocks), expected)


@pytest.mark.parametrize("branches", [None, np.ones(3), np.ones((2, 2, 2)), 1.0], ids=np.shape)
def test_without_a_matrix_the_gradient_is_used(branches):
    params = tree(0, np.float32)
    tx = scale_by_branch_kfac()
    told = pytest.warns(UserWarning, match=r"are not a matrix.*branches\.reshape\(-1, D\)")
    with contextlib.nullcontext() if branches is None else told:
        updates, state = tx.update(tree(1, np.float32), tx.init(params), params, branches=branches)
    for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(tree(1, np.float32)), strict=True):
        np.testing.assert_array_equal(x, y)
    assert int(state.count) == 1


def test_damping_may_follow_a_schedule():
    params, branches = {"w": jnp.ones((2, 3))}, jnp.asarray(draw(6, 4), jnp.float32)
    tx = scale_by_branch_kfac(damping=lambda count: 0.1 * (count + 1))
    state = tx.init(params)
    for damping in (0.1, 0.2):
        fixed = scale_by_branch_kfac(damping=damping)
        expected, _ = fixed.update(params, state, branches=branches)
        updates, state = tx.update(params, state, branches=branches)
        np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_the_map_is_the_same_in_chunks(monkeypatch):
    params = tree(0) | {"half": jnp.ones((3, 3), jnp.bfloat16), "z": jnp.ones(2) * (1 + 2j)}
    branches = jnp.asarray(draw(6, 4))
    monkeypatch.setattr(kernels, "_CHUNK", 12)  # three rows at a time
    leaves = jax.tree.leaves(params)
    key = jax.random.key(3)
    P = np.asarray(kernels.dense_map(key, leaves, 4, jnp.float64))
    flat = np.concatenate(
        [
            np.concatenate([x.real.ravel(), x.imag.ravel()]) if np.iscomplexobj(x) else x.ravel()
            for x in map(np.asarray, leaves)
        ]
    ).astype(np.float64)
    assert P.shape == (len(flat), 4)
    np.testing.assert_allclose(np.var(P), 1 / 4, rtol=0.5)
    projected = kernels.project(key, leaves, 4, jnp.float64)
    np.testing.assert_allclose(projected, P.T @ flat, rtol=1e-12)
    back = kernels.bring_back(key, branches[0], leaves)
    expected = P @ np.asarray(branches[0])
    start = 0
    for x, y in zip(back, leaves, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        part = expected[start : start + y.size * (2 if np.iscomplexobj(y) else 1)]
        start += len(part)
        if np.iscomplexobj(y):
            part = part[:2] + 1j * part[2:]
        tolerance = 1e-2 if y.dtype == jnp.bfloat16 else 1e-12
        np.testing.assert_allclose(np.asarray(x, part.dtype).ravel(), part, rtol=tolerance)


def test_a_map_may_be_fixed():
    params = jnp.ones(6)
    tx, fresh = scale_by_branch_kfac(redraw=False), scale_by_branch_kfac()
    branches = jnp.asarray(draw(6, 4))
    state = tx.init(params)
    first, state = tx.update(params, state, branches=branches)
    second, _ = tx.update(params, state, branches=branches)
    np.testing.assert_array_equal(first, second)
    state = fresh.init(params)
    first, state = fresh.update(params, state, branches=branches)
    second, _ = fresh.update(params, state, branches=branches)
    assert not np.allclose(first, second)


def test_memory_does_not_grow_with_the_map():
    shapes = [jax.ShapeDtypeStruct((10_000, 1000), jnp.float32) for _ in range(10)]
    tx = scale_by_branch_kfac()
    state = jax.eval_shape(tx.init, shapes)
    branches = jax.ShapeDtypeStruct((100, 64), jnp.float32)
    update = jax.jit(lambda g, s, b: tx.update(g, s, branches=b))
    memory = update.lower(shapes, state, branches).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.5 * 4e8 + 64 * 2**20


def test_a_covariance_without_an_inverse_is_counted_and_replaced_by_its_diagonal():
    branches = jnp.asarray(draw(5, 4), jnp.float32).at[:, :2].set(0)
    tx = scale_by_branch_kfac(damping=0.0, blocks=2)
    grads = jnp.ones(6)
    updates, state = jax.jit(lambda g, s: tx.update(g, s, branches=branches))(grads, tx.init(grads))
    assert int(state.failed_refreshes) == 1
    assert np.isfinite(updates).all()
    assert np.any(updates != 0)


@pytest.mark.parametrize("spoilt", ["gradient", "branches"])
def test_what_is_not_finite_is_skipped(spoilt):
    tx = scale_by_branch_kfac()
    grads, branches = jnp.ones(6), jnp.asarray(draw(5, 4), jnp.float32)
    _, state = tx.update(grads, tx.init(grads), branches=branches)
    if spoilt == "gradient":
        grads = grads.at[2].set(jnp.nan)
    else:
        branches = branches.at[0, 0].set(jnp.inf)
    updates, new = tx.update(grads, state, branches=branches)
    np.testing.assert_array_equal(updates, 0)
    assert int(new.skipped_steps) == 1
    assert new._replace(skipped_steps=0)[:4] == state._replace(skipped_steps=0)[:4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": -1.0}, "branch_kfac: damping must be a number in [0, inf]"),
        ({"blocks": 0}, "branch_kfac: blocks must be a number in [1, inf]; got 0"),
        ({"blocks": 2.5}, "branch_kfac: blocks must be an integer ≥ 1; got 2.5"),
        ({"clip": 0.0}, "branch_kfac: clip must be a number in (0, inf]"),
        ({"clip": 1.0}, "it needs learning_rate; got None"),
        ({"redraw": "no"}, "branch_kfac: redraw must be True or False; got 'no'"),
        ({"seed": None}, "branch_kfac: seed must be an integer or a PRNG key"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        branch_kfac(**settings)


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        (np.ones((5, 3), np.float32), "blocks=4 is more than branches have dimensions, 3"),
        (np.ones((5, 4), int), "branches must be floating-point; got int"),
        (np.ones((0, 4), np.float32), "branches must have elements; got shape (0, 4)"),
        ({"h": np.ones((5, 4), np.float32)}, "branches must be one array [K, D]; got a dict"),
        ("hidden", "branches must be one array [K, D]; got 'hidden'"),
    ],
    ids=str,
)
def test_branches_that_do_not_fit_are_refused(branches, message):
    tx = scale_by_branch_kfac()
    with pytest.raises(ValueError, match=re.escape(message)):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)), branches=branches)


def test_gradients_unlike_the_parameters_are_refused():
    tx = branch_kfac(0.1, clip=1.0)
    state = tx.init(jnp.ones(3))
    with pytest.raises(ValueError, match="do not match the parameters"):
        tx.update(jnp.ones(4), state, jnp.ones(3))
    with pytest.raises(ValueError, match="clip needs params"):
        tx.update(jnp.ones(3), state)
    with pytest.raises(ValueError, match="floating-point or complex; got int32 at the root"):
        tx.update(jnp.ones(3, int), state, jnp.ones(3))
