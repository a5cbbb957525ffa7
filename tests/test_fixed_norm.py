"""Weights that stay on spheres: lengths, angles, what is left alone, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_kron as ok
from optax_kron.transforms.fixed_norm import FixedNormState

PLAIN = optax.identity()


def draw(*shape, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    return x + 1j * rng.normal(size=shape) if np.issubdtype(dtype, np.complexfloating) else x


def step(tx, params, grads):
    updates, state = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates), state


def reference(w, u, rate, row_floor=0.0):
    """One step of the hard form, in NumPy; rows are along the last axis."""
    norm = np.linalg.norm(w)
    u = u / np.linalg.norm(u)
    own, least = (np.linalg.norm(x, axis=0) for x in (u, w / norm))
    u = u * np.maximum(1, row_floor * least / own)
    u = u - np.sum(u * w.conj()).real / norm**2 * w
    moved = w - rate * norm * u / np.linalg.norm(u)
    return moved * norm / np.linalg.norm(moved)


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("row_floor", [None, 2.0])
def test_step_is_that_of_the_reference(dtype, row_floor, x64):
    w, u = (draw(6, 4, seed=seed, dtype=dtype) for seed in (0, 1))
    tx = ok.fixed_norm(PLAIN, 0.3, row_floor=row_floor)
    expected = reference(w, u, 0.3, row_floor or 0.0)
    new, _ = step(tx, jnp.asarray(w), jnp.asarray(u))
    np.testing.assert_allclose(new, expected, rtol=1e-12)
    tx = ok.fixed_norm(PLAIN, 0.3, row_floor=row_floor, output_axis="first")
    new, _ = step(tx, jnp.asarray(w.T), jnp.asarray(u.T))
    np.testing.assert_allclose(new.T, expected, rtol=1e-12)


def test_weights_turn_by_an_angle_that_is_the_rate():
    w, u = jnp.asarray(draw(5, 3), jnp.float32), jnp.asarray(draw(5, 3, seed=1), jnp.float32)
    new, _ = step(ok.fixed_norm(PLAIN, 0.1), w, 1e4 * u + 7 * w)
    cosine = jnp.sum(new * w) / jnp.sum(w * w)
    assert float(jnp.arccos(cosine)) == pytest.approx(np.arctan(0.1), rel=1e-4)  # of float32


def test_norms_are_kept_for_ten_thousand_steps():
    """To 1e-6 in float32; in bfloat16 to what rounding 256 numbers to eight bits leaves of them.

    Each has an error of up to 2^-9 of itself, and they are independent: 2^-9 / √256 = 1.2e-4, of
    which three times as much is never seen.
    """
    params = {
        "float32": jnp.asarray(draw(6, 4), jnp.float32),
        "complex": jnp.asarray(draw(4, 4, dtype=np.complex64), jnp.complex64),
        "bfloat16": jnp.asarray(draw(16, 16), jnp.bfloat16),
        "stacked": jnp.asarray(draw(2, 3, 3), jnp.float32),
        "free": jnp.asarray(draw(4, 4), jnp.float32),
        "vector": jnp.ones(3),
    }
    tx = ok.fixed_norm(
        optax.scale_by_adam(),
        optax.cosine_decay_schedule(0.1, 10_000),
        blocking=ok.Blocking(stacked_axes=lambda path, shape: int("stacked" in path)),
        mask=lambda params: {name: name != "free" for name in params},
    )

    def advance(carry, i):
        moved, state = carry
        angle = i.astype(jnp.float32)  # of gradients that turn, and so never repeat

        def turned(x):
            return (jnp.cos(angle) * x + jnp.sin(angle) * jnp.roll(x, 1)).astype(x.dtype)

        updates, state = tx.update(jax.tree.map(turned, params), state, moved)
        return (optax.apply_updates(moved, updates), state), None

    run = jax.jit(lambda p: jax.lax.scan(advance, (p, tx.init(p)), jnp.arange(10_000))[0])
    new, state = run(params)
    for name, old in params.items():
        axes = (1, 2) if name == "stacked" else None
        norms = [np.linalg.norm(np.asarray(x, np.complex128), axis=axes) for x in (old, new[name])]
        if name in ("free", "vector"):
            assert abs(norms[1] / norms[0] - 1) > 1e-3
        else:
            rtol = 4e-4 if name == "bfloat16" else 1e-6
            np.testing.assert_allclose(norms[1], norms[0], rtol=rtol)
    assert (state.count, state.skipped_steps) == (10_000, 0)


def test_soft_form_lengthens_short_updates_and_leaves_long_ones():
    w = jnp.asarray(draw(5, 3), jnp.float32)
    across = jnp.asarray(draw(5, 3, seed=1), jnp.float32)
    across = across - jnp.sum(across * w) / jnp.sum(w * w) * w
    tx = ok.fixed_norm(PLAIN, 1.0, form="soft", floor=0.2)
    norm = jnp.linalg.norm
    for length, expected in ((1e-3, 0.2), (0.5, 0.5)):
        u = length * norm(w) * across / norm(across)
        updates, _ = tx.update(u, tx.init(w), w)
        np.testing.assert_allclose(updates, -expected / length * u, rtol=1e-5, atol=1e-6)


def test_soft_form_lengthens_rows():
    w = jnp.ones((4, 3))
    u = jnp.array([[1.0, 1e-3, 0.0], [-1.0, -1e-3, 0.0], [0.5, 0, 0], [-0.5, 0, 0]])
    tx = ok.fixed_norm(PLAIN, 1.0, form="soft", floor=0.0, row_floor=0.1)
    updates, _ = tx.update(u, tx.init(w), w)
    # The second row is made as long as a tenth of that of the weights; of zeros there is no row.
    lengths = jnp.linalg.norm(updates, axis=0)
    np.testing.assert_allclose(lengths, [2.5**0.5, 0.2, 0.0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_no_square_overflows_or_vanishes(scale):
    w, u = jnp.asarray(draw(5, 3), jnp.float32), jnp.asarray(draw(5, 3, seed=1), jnp.float32)
    tx = ok.fixed_norm(PLAIN, 0.1, row_floor=0.1)
    expected, _ = step(tx, w, u)
    np.testing.assert_allclose(step(tx, w, scale * u)[0], expected, rtol=1e-5, atol=1e-6)
    moved, _ = step(tx, scale * w, u)
    np.testing.assert_allclose(moved / scale, expected, rtol=1e-5, atol=1e-6)


def test_zeros_vectors_and_empty_arrays_are_left_alone():
    params = {"zeros": jnp.zeros((3, 2)), "row": jnp.ones((1, 4)), "empty": jnp.ones((0, 2))}
    params |= {"scalar": jnp.ones(())}
    tx = ok.fixed_norm(PLAIN, 0.1, other_learning_rate=0.5)
    new, state = step(tx, params, jax.tree.map(jnp.ones_like, params))
    expected = jax.tree.map(lambda x: x - 0.5, params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y), new, expected)
    assert state.norms["zeros"] == 0


def test_direction_along_the_weights_does_nothing():
    w = jnp.asarray(draw(5, 3), jnp.float32)
    tx = ok.fixed_norm(PLAIN, 0.1)
    for u in (w, -3 * w, jnp.zeros_like(w)):
        np.testing.assert_allclose(step(tx, w, u)[0], w, rtol=1e-6)


def test_direction_that_is_not_finite_changes_nothing():
    params = {"a": jnp.ones((2, 3)), "b": jnp.eye(3)}
    tx = ok.fixed_norm(optax.trace(0.9), 0.1)
    before = tx.init(params)
    grads = {"a": jnp.ones((2, 3)).at[0, 0].set(jnp.nan), "b": jnp.ones((3, 3))}
    updates, state = jax.jit(tx.update)(grads, before, params)
    assert all(not x.any() for x in jax.tree.leaves(updates))
    assert (state.count, state.skipped_steps) == (0, 1)
    assert not any(x.any() for x in jax.tree.leaves(state.inner))


def test_arguments_of_the_inner_transformation_are_passed_on():
    layers = [ok.Layer("dense", kernel="")]
    tap = ok.Tap(jnp.ones((1, 7, 1, 3)), jnp.ones((1, 1, 7, 1, 2)))
    tx = ok.fixed_norm(ok.scale_by_kfac(layers=layers), 0.1)
    params = jnp.asarray(draw(3, 2), jnp.float32)
    updates, _ = tx.update(params, tx.init(params), params, taps=ok.Taps({"dense": tap}))
    assert jnp.isfinite(updates).all()


def test_rate_may_be_traced_and_the_state_donated():
    params = jnp.asarray(draw(4, 3), jnp.float32)
    make = optax.inject_hyperparams(ok.fixed_norm, static_args=("inner", "blocking"))
    tx = make(optax.scale_by_adam(), 0.1)
    state = tx.init(params)
    update = jax.jit(tx.update, donate_argnums=1)
    first, state = update(params + 1, state, params)
    state.hyperparams["learning_rate"] = jnp.asarray(0.0)
    second, state = update(params + 1, state, params)
    assert jnp.linalg.norm(first) > 0.1
    np.testing.assert_allclose(second, 0, atol=1e-6)
    assert isinstance(state.inner_state, FixedNormState)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "firm"}, "form must be"),
        ({"learning_rate": -1.0}, "learning_rate must be"),
        ({"floor": -1.0}, "floor must be"),
        ({"row_floor": float("nan")}, "row_floor must be"),
        ({"output_axis": "inner"}, "output_axis must be"),
        ({"inner": 1e-3}, "inner must be"),
        ({"mask": True}, "mask"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ok.fixed_norm(**{"inner": PLAIN, "learning_rate": 0.1, **settings})


def test_parameters_are_needed():
    tx = ok.fixed_norm(PLAIN, 0.1)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(jnp.ones((2, 2)), tx.init(jnp.ones((2, 2))))


def test_a_mask_may_have_more_than_the_parameters():
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    mask = {"w": True, "b": True}
    tx = optax.partition(
        {"a": ok.fixed_norm(optax.scale_by_adam(), 0.1, mask=mask), "z": optax.sgd(0.1)},
        {"w": "a", "b": "z"},
    )
    updates, _ = tx.update(params, tx.init(params), params)
    assert float(jnp.linalg.norm(params["w"] + updates["w"])) == pytest.approx(6**0.5)
    inner = ok.fixed_norm(ok.scale_by_soap(), 0.1, mask=mask)
    optax.tree.map_params(inner, jnp.shape, inner.init(params))


@pytest.mark.parametrize("mask", [{"w": True}, {"w": True, "b": None}, [True, True]])
def test_a_mask_that_lacks_a_parameter(mask):
    tx = ok.fixed_norm(optax.scale_by_adam(), 0.1, mask=mask)
    with pytest.raises(ValueError, match=r"fixed_norm: mask must have a bool .* at \['[wb]'\]"):
        tx.init({"w": jnp.ones((3, 2)), "b": jnp.ones(2)})


def test_integers_are_refused_by_path():
    tx = ok.fixed_norm(optax.scale_by_adam(), 0.1)
    with pytest.raises(ValueError, match=r"fixed_norm: .* got int32 at \['i'\]"):
        tx.init({"w": jnp.ones((3, 2)), "i": jnp.arange(3)})
