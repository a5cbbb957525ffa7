"""Several batches: the result is that of all examples at once, however they are cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron import Layer, Tap, Taps, find_layers, losses, operators, value_and_grad_with_taps

RTOL = 1e-9


@pytest.fixture(autouse=True)
def always_x64(x64):
    """Sums in another order differ by rounding alone."""


def problem(reduction):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 4))), "v": jnp.asarray(rng.normal(size=(4, 2)))}
    x, y = jnp.asarray(rng.normal(size=(12, 2, 3))), jnp.asarray(rng.integers(0, 2, (12, 2)))

    def loss_fn(p, x, y):
        logits = jnp.tanh(x @ p["w"]) @ p["v"]
        return reduction(losses.softmax_cross_entropy_with_integer_labels(logits, y))

    layers = find_layers(loss_fn, params, x, y, check=False)
    fn = jax.jit(value_and_grad_with_taps(loss_fn, layers, fisher="exact"))
    return layers, lambda rows: fn(params, x[np.array(rows)], y[np.array(rows)])[2]


SPLITS = {
    "halves": [range(6), range(6, 12)],
    "uneven": [range(5), range(5, 12)],
    "single": [[i] for i in range(12)],
    "shuffled": [[7, 2, 11], [0, 1, 3, 4], [10, 9, 8, 6, 5]],
}


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "kfoc"])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_how_examples_are_cut_makes_no_difference(kind, split):
    layers, taps_of = problem(jnp.mean)
    make = getattr(operators, kind)
    settings = {"tolerance": 1e-15, "max_iterations": 2000} if kind == "kfoc" else {}
    whole = make(taps_of(range(12)), layers, **settings).as_matrix()
    for batches in ([taps_of(rows) for rows in split], lambda: map(taps_of, split)):
        found = make(batches, layers, **settings).as_matrix()
        np.testing.assert_allclose(found, whole, atol=RTOL * np.abs(whole).max())


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_weights_make_sums_of_sums(kind):
    layers, taps_of = problem(jnp.sum)
    whole = getattr(operators, kind)(taps_of(range(12)), layers).as_matrix()
    batches = [(1.0, taps_of(rows)) for rows in SPLITS["uneven"]]
    found = getattr(operators, kind)(batches, layers).as_matrix()
    np.testing.assert_allclose(found, whole, atol=RTOL * np.abs(whole).max())


def test_second_moments_will_do_for_kfac():
    layers, taps_of = problem(jnp.mean)
    whole = operators.kfac(taps_of(range(12)), layers).as_matrix()
    from optax_kron.layers.moments import moments_of

    def moments(rows):
        taps = taps_of(rows)
        return Taps({layer.name: moments_of(layer, taps[layer.name][0]) for layer in layers})

    found = operators.kfac([(5 / 12, moments(range(5))), (7 / 12, moments(range(5, 12)))], layers)
    np.testing.assert_allclose(found.as_matrix(), whole, atol=RTOL * np.abs(whole).max())
    one = operators.kfac(moments(range(12)), layers)
    np.testing.assert_allclose(one.as_matrix(), whole, atol=RTOL * np.abs(whole).max())
    with pytest.raises(ValueError, match="do not tell how many examples"):
        operators.kfac([moments(range(5)), moments(range(5, 12))], layers)
    for kind in ("ekfac", "kfoc"):
        with pytest.raises(ValueError, match=r"layer 'v'.*second moments.*reduce=False"):
            getattr(operators, kind)(moments(range(12)), layers)


def test_a_generator_is_read_once():
    layers, taps_of = problem(jnp.mean)
    whole = operators.kfac(taps_of(range(12)), layers).as_matrix()
    found = operators.kfac((taps_of(rows) for rows in SPLITS["halves"]), layers).as_matrix()
    np.testing.assert_allclose(found, whole, atol=RTOL * np.abs(whole).max())
    with pytest.raises(ValueError, match=r"read 2 times, and generator can be read but once"):
        operators.ekfac((taps_of(rows) for rows in SPLITS["halves"]), layers)


def test_what_is_no_batch_is_named():
    layers, taps_of = problem(jnp.mean)
    taps = taps_of(range(3))
    with pytest.raises(ValueError, match=r"operators.kfac: there are no taps"):
        operators.kfac([], layers)
    with pytest.raises(ValueError, match=r"operators.kfac: taps must be.*got 3"):
        operators.kfac(3, layers)
    with pytest.raises(ValueError, match=r"each batch must be ok.Taps.*got 'w'"):
        operators.kfac(["w"], layers)
    with pytest.raises(ValueError, match="all batches as pairs"):
        operators.kfac([taps, (0.5, taps)], layers)
    once = iter([taps])
    with pytest.raises(ValueError, match=r"one finite number, at least 0; got -1\.0"):
        operators.kfoc([(-1.0, taps)], layers)
    with pytest.raises(ValueError, match="called again"):
        operators.ekfac(lambda: once, layers)
    with pytest.raises(ValueError, match="approx must be one of expand, reduce; got 'mean'"):
        operators.ekfac(taps, layers, approx="mean")


def test_some_of_the_layers_found():
    layers, taps_of = problem(jnp.mean)
    taps = taps_of(range(12))
    some = [layer for layer in layers if layer.name == "w"]
    op = operators.kfac(Taps({"w": taps["w"]}), some)
    whole = operators.kfac(taps, layers)
    np.testing.assert_allclose(op.as_matrix(), whole.blocks["w"].as_matrix().reshape(12, 12))
    by_path = operators.kfac(Taps({"d": taps["w"][0]}), [Layer("d", kernel="['dense']['kernel']")])
    assert jax.tree.map(jnp.shape, by_path.sample(jax.random.key(0), 1.0)) == {
        "dense": {"kernel": (3, 4)}
    }


def test_layers_by_hand():
    taps = Taps({"dense": Tap(jnp.eye(4, 3), jnp.ones((4, 2)))})
    plain = [Layer("dense", kernel="kernel", bias="bias")]
    op = operators.kfac(taps, plain)
    vector = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    assert jax.tree.map(jnp.shape, op @ vector) == {"kernel": (2, 2), "bias": (2,)}
    params = {"bias": jnp.ones(2), "kernel": jnp.ones((1, 2, 2)), "other": jnp.ones(5)}
    laid_out = [Layer("dense", kernel="kernel", bias="bias", out_axes=(2,))]
    with pytest.raises(ValueError, match="pass params="):
        operators.kfac(taps, laid_out)
    op = operators.ekfac(taps, laid_out, params=params)
    assert op.size == 11
    np.testing.assert_array_equal((op @ params)["other"], 0)
    with pytest.raises(ValueError, match=r"parameters bias of shape \(2,\); the vector has \(3,\)"):
        op.mv(params | {"bias": jnp.ones(3)})
