"""SOAP and its variants: their numbers against a reference, their bases and guards."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_kron import Blocking, orthogonalize, scale_by_soap, soap
from optax_kron.kernels import packed
from optax_kron.transforms.stacks import largest_update
from tests.reference import shampoo as reference
from tests.test_shampoo import (
    assert_close,
    assert_is_not_taken_in,
    assert_keeps_what_it_had,
    gradients,
    many_blocks,
    run,
)

EXACT = {"factor_dtype": "float64", "momentum": 0.9, "b2": 0.8, "decay": 0.7}
VARIANTS = ("soap", "kl_shampoo", "kl_soap")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("shape", [(2, 2), (4, 4), (3, 2, 4)], ids=str)
@pytest.mark.parametrize(
    ("basis", "is_complex"), [("power", False), ("power", True), ("qr", False), ("qr", True)]
)
def test_ten_steps_are_those_of_the_reference(shape, every, variant, basis, is_complex):
    check_ten_steps(shape, every, variant, basis, is_complex)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("basis", ["power", "qr"])
@pytest.mark.parametrize("shape", [(4, 4), (3, 2, 4)], ids=str)
def test_ten_steps_with_packed_statistics(shape, variant, basis, monkeypatch):
    monkeypatch.setattr(packed, "LEAST_SIZE", 3)
    stack = check_ten_steps(shape, 3, variant, basis, is_complex=True)
    sizes = [S[0].size for S in stack.statistics]
    assert sizes == [d * (d + 1) // 2 if d > 2 else d * d for d in sorted(shape, reverse=True)]


def check_ten_steps(shape, every, variant, basis, is_complex):
    """Compares updates with those of the reference; returns the last stack."""
    stream = gradients(shape, steps=10, is_complex=is_complex)
    begins = "iterates" if basis == "power" else "eigenvectors"
    stage = reference.Soap(shape, variant=variant, every=every, begins=begins)
    settings = EXACT | {"variant": variant, "refresh_every": every, "relative_damping": 0.0}
    updates, states = run(scale_by_soap(basis=basis, **settings), stream)
    assert int(states[-1].failed_refreshes) == 0
    for actual, G in zip(updates, stream, strict=True):
        # In its own basis a first gradient is diagonal but for rounding, 1e-16 or so, and Adam
        # divides what is beside the diagonal by √V + 1e-8.
        assert_close(actual, stage.step(G), rtol=1e-5)
    (stack,) = states[-1].stacks.values()
    return stack


def test_soap_muon_makes_the_updates_of_matrices_orthogonal():
    shapes = {"matrix": (4, 3), "vector": (5,), "taps": (2, 3, 4)}
    stream = [{k: gradients(x, seed=i)[0] for k, x in shapes.items()} for i in range(3)]
    blocking = Blocking(block_size=3)  # with padding
    plain = scale_by_soap(blocking=blocking, refresh_every=2)
    after = orthogonalize(scale="consistent_rms", blocking=blocking)
    together = scale_by_soap(variant="soap_muon", blocking=blocking, refresh_every=2)
    states = [tx.init(stream[0]) for tx in (plain, after, together)]
    update = jax.jit(lambda tx, *args: tx.update(*args), static_argnums=0)
    for grads in stream:
        first, states[0] = update(plain, grads, states[0])
        expected, states[1] = update(after, first, states[1])
        updates, states[2] = update(together, grads, states[2])
        for name in shapes:
            np.testing.assert_allclose(updates[name], expected[name], rtol=1e-4, atol=1e-5)
        assert np.max(np.abs(first["matrix"] - updates["matrix"])) > 0.1
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[2])


def adam(**settings):
    return optax.scale_by_adam(b1=0.95, b2=0.95, eps=1e-8, **settings)


@pytest.mark.parametrize("shape", [(4, 3), (7,), (2, 3, 4), ()], ids=str)
def test_without_bases_it_is_adam(shape):
    stream = gradients(shape).astype(np.float32)
    expected, _ = run(adam(), stream)
    updates, _ = run(scale_by_soap(blocking=Blocking(max_size=0)), stream)
    np.testing.assert_allclose(updates, expected, rtol=1e-6, atol=1e-6)


def test_with_bases_held_at_the_identity_it_is_adam():
    stream = gradients((4, 3), steps=8).astype(np.float32)
    tx = scale_by_soap(refresh_every=1000)
    state = tx.init(stream[0])
    (label,) = state.stacks
    held = state.stacks[label]._replace(initialized=jnp.ones(1, bool))
    state = state._replace(stacks={label: held})
    reference_state, update = adam().init(stream[0]), jax.jit(tx.update)
    for G in stream:
        updates, state = update(G, state)
        expected, reference_state = adam().update(G, reference_state)
        np.testing.assert_allclose(updates, expected, rtol=1e-6, atol=1e-6)


def test_of_the_first_gradient_only_what_is_no_rounding_is_scaled_up():
    G = gradients((12, 5), steps=1).astype(np.float32)
    (update,), _ = run(scale_by_soap(basis="qr"), G)
    # In its own bases it is diagonal, and Adam takes the diagonal to one.
    left, _, right = np.linalg.svd(G[0].astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(update, left @ right, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("basis", ["power", "qr", "eigh"])
def test_a_change_of_basis_keeps_the_norm_of_the_momentum(basis, variant):
    stream = gradients((6, 4), steps=12).astype(np.float32)
    _, states = run(scale_by_soap(variant=variant, basis=basis, refresh_every=2), stream)
    for state in states:
        (stack,), (M,) = state.stacks.values(), state.momentum.values()
        rotated = M[0]
        for axis, Q in enumerate(stack.bases):
            np.testing.assert_allclose(Q[0].T @ Q[0], np.eye(len(Q[0])), atol=1e-5)
            rotated = reference.psgd.along(np.asarray(Q[0]).T, axis, rotated)
        np.testing.assert_allclose(np.linalg.norm(rotated), np.linalg.norm(M), rtol=1e-5)


def test_the_second_moment_changes_places_with_the_columns_of_the_basis():
    tx = scale_by_soap(refresh_every=2, b2=1 - 1e-6, momentum=None, outlier_clip=None)
    state = tx.init(jnp.zeros((3, 3)))
    update = jax.jit(tx.update)
    _, state = update(jnp.diag(jnp.array([3.0, 2.0, 1.0])), state)
    before = state.stacks["3x3"].second_moment[0]
    # The last axis becomes the largest: its column comes first, and its second moment with it.
    _, state = update(jnp.diag(jnp.array([0.0, 0.0, 100.0])), state)
    after = state.stacks["3x3"].second_moment[0]
    grown = np.asarray(before).copy()
    grown[2, 2] += float(1 - jnp.float32(1 - 1e-6)) * 1e4
    order = [2, 0, 1]
    np.testing.assert_allclose(after, grown[order][:, order], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("variant", ["soap", "kl_soap"])
@pytest.mark.parametrize("basis", ["power", "qr"])
@pytest.mark.parametrize("period", [1, 7, 20])
def test_in_no_bases_an_update_is_larger_than_that_of_adam_can_be(basis, variant, period):
    # With zeros between, a basis turns by much at once, away from what the second moment is of.
    rare = (np.arange(42) % period == 0)[:, None, None]
    stream = gradients((24, 16), steps=42).astype(np.float32) * rare
    updates, states = run(scale_by_soap(variant=variant, basis=basis), stream)
    bases = [next(iter(state.stacks.values())).bases for state in states]
    for update, (first, last) in zip(updates[1:], bases, strict=False):
        rotated = np.asarray(first[0]).T @ update @ np.asarray(last[0])
        assert np.max(np.abs(rotated)) < 1 + 1e-5


@pytest.mark.parametrize("variant", ["soap", "kl_soap"])
@pytest.mark.parametrize("basis", ["power", "qr"])
@pytest.mark.parametrize(("shape", "rank"), [((128, 96), 5), ((64, 256), 1), ((24, 4, 16), 2)])
def test_updates_of_gradients_of_low_rank_are_of_their_space(shape, rank, basis, variant):
    rng = np.random.default_rng(0)
    spaces = [np.linalg.qr(rng.standard_normal((d, rank)))[0] for d in shape]
    cores = rng.standard_normal((52, *[rank] * len(shape)))
    stream = np.stack([reference.psgd.apply(spaces, core) for core in cores])
    updates, _ = run(scale_by_soap(variant=variant, basis=basis), stream.astype(np.float32))
    # The first bases are not yet as near to the space as its rounding: one power iteration of the
    # identity, or eigenvectors of what is nearly a multiple of it, as kl_soap begins with.
    for update in updates[1 if (basis, variant) == ("qr", "soap") else 50 :]:
        inside = reference.psgd.apply([U @ U.T for U in spaces], update.astype(np.float64))
        assert np.linalg.norm(update - inside) < 0.01 * np.linalg.norm(update)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("b1", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("b2", [0.0, 0.5, 0.9, 0.99])
def test_the_largest_update_of_adam(b1, b2):
    for count in (1, 2, 10):
        w, v = (b ** np.arange(count) / np.sum(b ** np.arange(count)) for b in (b1, b2))
        found = largest_update(b1, b2, jnp.asarray(count), np.float64)
        if np.any(w[v == 0] > 0):
            assert found > 1e100
        else:
            ratios = w[v > 0] / v[v > 0]
            np.testing.assert_allclose(found, np.sqrt(np.max(ratios)), rtol=1e-9)


def test_one_sided():
    tx = scale_by_soap(blocking=Blocking(dense_axes=1))
    state = jax.eval_shape(tx.init, {"a": jnp.zeros((4, 3)), "b": jnp.zeros((3, 3))})
    assert state.stacks["4diagx3"].bases[0] is None
    assert state.stacks["4diagx3"].bases[1].shape == (1, 3, 3)
    assert state.stacks["3diagx3"].bases[0] is None


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_spoilt_statistic_keeps_the_last_basis_and_counts(variant, stagger):
    stream = many_blocks()
    tx = scale_by_soap(variant=variant, refresh_every=1, stagger=stagger)
    assert_keeps_what_it_had(tx, stream, lambda stack: stack.bases)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "sop"}, "soap: variant must be one of soap, kl_shampoo, kl_soap, soap_muon"),
        ({"basis": "svd"}, "soap: basis must be one of power, qr, eigh; got 'svd'"),
        ({"decay": 1.0}, "soap: decay must be a number in [0, 1)"),
        ({"decay": -0.1}, "soap: decay must be a number in [0, 1)"),
        ({"relative_damping": 2.0}, "soap: relative_damping must be a number in [0, 1]"),
        ({"pseudo_inverse": 1}, "soap: pseudo_inverse must be True or False; got 1"),
        ({"stagger": "yes"}, "soap: stagger must be True or False; got 'yes'"),
        ({"refresh_every": 0}, "soap: refresh_every must be a number in [1, inf]"),
        ({"mask": True}, "soap: mask must be a tree of bools or a function"),
        ({"weight_decay": -1.0}, "soap: weight_decay must be a number in [0, inf]"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        soap(**settings)


def test_inverted_eigenvalues_have_a_floor():
    G = np.diag([1.0, 1e-3]).astype(np.float32)
    for floor in (0.0, 0.25):
        tx = scale_by_soap(variant="kl_shampoo", relative_damping=floor, decay=0.0, momentum=None)
        (update,), (state,) = run(tx, [G])
        # Both statistics are G² / (2 c), of the start c I.
        values = np.asarray(state.stacks["2x2"].values[0][0])
        raised = np.maximum(values, floor * values.max())
        np.testing.assert_allclose(values / values.max(), [1.0, 1e-6], rtol=1e-5)
        np.testing.assert_allclose(np.diag(update), np.diag(G) / raised, rtol=1e-4)


@pytest.mark.parametrize("variant", ["kl_shampoo", "kl_soap"])
def test_factors_of_gradients_of_low_rank_do_not_drift_apart(variant):
    """Such as those of an embedding of which some rows are never seen."""
    stream = np.random.default_rng(0).normal(size=(4000, 6, 5)).astype(np.float32)
    stream[:, 1:] = 0
    tx = scale_by_soap(variant=variant)
    state = tx.init(jnp.asarray(stream[0]))
    run = jax.jit(lambda state: jax.lax.scan(lambda s, G: tx.update(G, s)[::-1], state, stream))
    state, updates = run(state)
    (stack,) = state.stacks.values()
    sizes = np.array([jnp.max(x) for x in stack.values])
    assert np.all((sizes > 0.1) & (sizes < 10))
    assert state.failed_refreshes == 0
    norms = np.linalg.norm(updates, axis=(1, 2))
    assert 0.5 < np.mean(norms[-500:]) / np.mean(norms[500:1000]) < 2


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variant", ["kl_shampoo", "kl_soap"])
def test_with_a_pseudo_inverse_gradients_of_low_rank_move_as_their_cores_do(variant):
    """Once the start, at multiples of the identity, is forgotten; for long, as scales could drift.

    The ranks are other shares of the two axes.
    """
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=shape))[0] for shape in [(6, 2), (5, 4)])
    cores = jnp.asarray(rng.normal(size=(3000, 2, 4)) * np.array([3.0, 1.0, 0.5, 0.1]))
    settings = {"variant": variant, "factor_dtype": "float64", "refresh_every": 1}

    def last(stream, **more):
        tx = scale_by_soap(**settings, **more)
        state = tx.init(stream[0])
        run = jax.jit(lambda state: jax.lax.scan(lambda s, G: tx.update(G, s)[::-1], state, stream))
        state, updates = run(state)
        (stack,) = state.stacks.values()
        return updates[-1], [jnp.max(x) for x in stack.values]

    core, core_sizes = last(cores)
    stream = left @ cores @ right.T
    update, sizes = last(stream, relative_damping=1e-9, pseudo_inverse=True)
    # Bases along which values are equal are not unique, and V may differ by them at the start.
    np.testing.assert_allclose(left.T @ update @ right, core, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(optax.tree.norm(update), optax.tree.norm(core), rtol=1e-6)
    ratio = np.asarray(sizes) / np.asarray(core_sizes)
    assert np.all((ratio > 0.1) & (ratio < 10))


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_gradients_for_long_kill_nothing(variant):
    G = jnp.asarray(gradients((4, 3), steps=1)[0], jnp.float32)
    tx = scale_by_soap(variant=variant)

    def body(state, scale):
        update, state = tx.update(G * scale, state)
        return state, jnp.max(jnp.abs(update))

    scales = jnp.concatenate([jnp.ones(20), jnp.zeros(2500), jnp.ones(60)])
    _, largest = jax.jit(lambda s: jax.lax.scan(body, tx.init(G), s))(scales)
    assert largest[-1] > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tiny_first_gradient_does_not_end_it(variant):
    G = jnp.asarray(gradients((4, 3), steps=1)[0], jnp.float32)
    tx = scale_by_soap(variant=variant)
    state = tx.init(G)
    for scale in (1e-25, 1.0, 1.0):
        update, state = jax.jit(tx.update)(G * scale, state)
    assert np.any(update != 0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("basis", ["power", "qr"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_of_the_bases_is_not_blown_up(dtype, basis):
    G = jnp.asarray(gradients((4, 3), steps=1)[0], jnp.float32)
    tx = scale_by_soap(factor_dtype=dtype, basis=basis)
    state, update = tx.init(G), jax.jit(tx.update)
    for _ in range(22):
        updates, state = update(G, state)
        # In any bases Adam's update of a constant gradient has no entry above one.
        assert np.linalg.norm(updates) < 1.1 * G.size**0.5
        if basis == "qr":  # as its polar factor: of columns of length one
            assert np.max(np.abs(updates)) < 1.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gradient_whose_square_the_statistics_cannot_hold_is_not_taken_in(variant):
    assert_is_not_taken_in(
        scale_by_soap(factor_dtype="float16", variant=variant, outlier_clip=None), 1e3
    )


@pytest.mark.parametrize("shape", [(4, 3), (5,)])
@pytest.mark.parametrize("variant", ["soap", "kl_soap"])
def test_no_update_is_made_of_what_the_second_moment_does_not_hold(variant, shape):
    G = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    tx = scale_by_soap(factor_dtype="float16", variant=variant, outlier_clip=None)
    for updates in run(tx, [1e3 * G, G, 1e3 * G])[0]:
        assert np.linalg.norm(updates) < 1.1 * G.size**0.5


def test_what_is_rounding_is_measured_without_the_padding():
    tx = scale_by_soap(blocking=Blocking(block_size=3))
    # Rows 3 and 4 are a block of 6 elements, stored as 9; the small one is 9e-4 of the root mean
    # square of the former, which is taken for rounding, and 1.1e-3 of that of the latter.
    G = jnp.zeros((5, 3)).at[3, 0].set(1.0).at[4, 1].set(3.7e-4)
    updates, _ = tx.update(G, tx.init(G))
    np.testing.assert_allclose(updates, jnp.zeros((5, 3)).at[3, 0].set(1.0), atol=1e-5)
