"""Updates of matrices in parameters of all kinds, beside the SVD of each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_kron as ok

SHAPES = {"tall": (6, 4), "wide": (4, 6), "square": (4, 4), "vector": (5,), "scalar": ()}
EXACT = {"polynomial": "polar_express", "iterations": 9, "scale": None}


def draw(shapes, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=shape), dtype) for k, shape in shapes.items()}


def updates_of(tx, *gradients):
    state = tx.init(gradients[0])
    for grads in gradients:
        updates, state = tx.update(grads, state, grads)
    return jax.tree.map(np.asarray, updates)


def polar(matrix):
    U, _, V = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return U @ V


def test_matrices_become_their_polar_factors_and_all_else_stays():
    grads = draw(SHAPES) | {"half": jnp.full((3,), 1.5, jnp.float16), "empty": jnp.zeros((0, 3))}
    updates = updates_of(ok.orthogonalize(**EXACT), grads)
    for name, update in updates.items():
        assert update.dtype == grads[name].dtype
        want = polar(grads[name]) if name in ("tall", "wide", "square") else grads[name]
        np.testing.assert_allclose(update, want, atol=1e-5 if want.ndim == 2 else 0)


def test_scales():
    grads = draw({"tall": (12, 3), "wide": (3, 12), "conv": (3, 2, 2, 8), "cut": (13, 4)})
    blocking = ok.Blocking(merge_below=12, block_size=12)

    def scaled(rule):
        return updates_of(ok.orthogonalize(scale=rule, blocking=blocking), grads)

    plain, spectral, consistent = map(scaled, (None, "spectral", "consistent_rms"))
    # Outputs are last: 8 of the convolution, with 3·2·2 inputs. Of pieces, here of 7 and 6 rows,
    # their own lengths count, without the padding.
    lengths = {"tall": 12.0, "wide": 12.0, "conv": 12.0, "cut": np.repeat([7.0, 6.0], [7, 6])}
    for name, length in lengths.items():
        length = np.expand_dims(length, -1)
        expected = 0.2 * np.sqrt(length) * plain[name]
        np.testing.assert_allclose(consistent[name], expected, rtol=1e-5)
        expected = plain[name] * (2 if name == "wide" else 1)
        np.testing.assert_allclose(spectral[name], expected, rtol=1e-5)


def stacked_axes(path, shape):
    return {"['taps']": 2}.get(path, 1)


# By setting, for each leaf its shape and what is made of it.
CASES = {
    "nothing": (
        {},
        {
            "convolution": ((2, 2, 3, 9), lambda x: polar(x.reshape(12, 9))),
            "axes of one": ((1, 4, 1, 3), lambda x: polar(x.reshape(4, 3))),
        },
    ),
    "merged": (
        {"merge_below": 12},
        {
            "patches": ((2, 2, 3, 9), lambda x: polar(x.reshape(12, 9))),
            "heads": ((8, 2, 3), lambda x: polar(x.reshape(8, 6))),
        },
    ),
    "stacked": (
        {"stacked_axes": stacked_axes},
        {
            "taps": ((2, 2, 3, 4), lambda x: [[polar(y) for y in z] for z in x]),
            "experts": ((3, 5, 2), lambda x: [polar(y) for y in x]),
            "rows": ((4, 3), lambda x: x),
        },
    ),
    "cut": (
        {"block_size": 4},
        {"pieces": ((7, 3), lambda x: np.vstack([polar(x[:4]), polar(x[4:])]))},
    ),
    "long": (
        {"max_size": 8},
        {
            "a matrix for each index": ((9, 3, 2), lambda x: [polar(y) for y in x]),
            "vocabulary": ((9, 3), lambda x: x),
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_blocks_say_what_a_matrix_is(name):
    settings, leaves = CASES[name]
    grads = draw({leaf: shape for leaf, (shape, _) in leaves.items()})
    tx = ok.orthogonalize(blocking=ok.Blocking(**settings), **EXACT)
    updates = updates_of(tx, grads)
    for leaf, (shape, want) in leaves.items():
        expected = np.reshape(want(np.asarray(grads[leaf])), shape)
        np.testing.assert_allclose(updates[leaf], expected, atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_as_precise_as_the_gradients():
    grads = {k: x + 1e-12 for k, x in draw({"a": (4, 3), "b": (3,)}, dtype=np.float64).items()}
    updates = updates_of(ok.orthogonalize(**EXACT), grads)
    np.testing.assert_allclose(updates["a"], polar(grads["a"]), atol=1e-13)
    np.testing.assert_array_equal(updates["b"], grads["b"])


@pytest.mark.parametrize("nesterov", [False, True])
def test_its_average_is_that_of_a_trace_before_it(nesterov):
    stream = [draw(SHAPES, seed) for seed in range(3)]
    inside = ok.orthogonalize(momentum=0.9, nesterov=nesterov)
    chained = optax.chain(optax.trace(0.9, nesterov=nesterov), ok.orthogonalize())
    got, want = updates_of(inside, *stream), updates_of(chained, *stream)
    for name in ("tall", "wide", "square"):
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)
    np.testing.assert_array_equal(got["vector"], stream[-1]["vector"])


def test_a_fallback_gets_what_has_no_matrix():
    stream = [draw(SHAPES, seed) for seed in range(2)]
    tx = ok.orthogonalize(fallback=optax.chain(optax.scale_by_adam(), optax.clip(0.3)))
    labels = {k: "matrix" if len(s) == 2 else "rest" for k, s in SHAPES.items()}
    parts = {
        "matrix": ok.orthogonalize(),
        "rest": optax.chain(optax.scale_by_adam(), optax.clip(0.3)),
    }
    got, want = updates_of(tx, *stream), updates_of(optax.partition(parts, labels), *stream)
    for name in SHAPES:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5)
    # What the fallback cannot hold changes nothing, in matrices neither.
    state = tx.init(stream[0])
    huge = {**stream[0], "vector": jnp.full(5, 1e30)}
    updates, after = tx.update(huge, state)
    assert not any(np.any(x) for x in jax.tree.leaves(updates))
    assert int(after.skipped_steps) == 1
    for x, y in zip(*map(jax.tree.leaves, (after.fallback, state.fallback)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"polynomial": "cubic"}, "polynomial must be one of muon, polar_express, newton_schulz"),
        ({"iterations": 0}, "iterations must be an integer ≥ 1 or None; got 0"),
        ({"iterations": 2.5}, "iterations must be an integer"),
        ({"scale": "rms"}, "scale must be one of spectral, consistent_rms, None; got 'rms'"),
        ({"momentum": 1.0}, r"momentum must be a number in \[0, 1\)"),
        ({"nesterov": 1}, "nesterov must be"),
        ({"fallback": "adam"}, "fallback must be an optax.GradientTransformation"),
        ({"dtype": "int8"}, "dtype must be a floating-point"),
        ({"blocking": 8}, "blocking must be an ok.Blocking"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=f"orthogonalize: {message}"):
        ok.orthogonalize(**settings)
