"""The analysis is made once and travels with the layers, but never to another program."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_kron as ok
from optax_kron.capture.analysis import trace

RNG = np.random.default_rng(0)
X, Y = (jnp.asarray(RNG.normal(size=(6, d)), jnp.float32) for d in (3, 2))
PARAMS = {"a": jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32), "b": jnp.ones((4, 2))}


def assert_close(found, expected):
    # Sums of a dozen float32 numbers, in two programs.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )


@pytest.fixture
def analysed(monkeypatch):
    """How often a program was analysed."""
    calls = []
    analyse = trace.analyse
    monkeypatch.setattr(trace, "analyse", lambda *args: calls.append(args) or analyse(*args))
    return calls


def net(params, x):
    return jax.nn.relu(jnp.tanh(x @ params["a"]) @ params["b"])


def loss_fn(params, x, y):
    return ok.losses.squared_error(net(params, x), y).mean()


def test_it_is_made_once_for_one_program(analysed):
    layers = ok.find_layers(loss_fn, PARAMS, X, Y)
    fn = ok.value_and_grad_with_taps(loss_fn, layers, fisher="empirical")
    value, grads, taps = fn(PARAMS, X, Y)
    jitted = jax.jit(fn)(PARAMS, X + 1, Y)
    jax.vmap(fn, (None, 0, 0))(PARAMS, X[None], Y[None])
    assert len(analysed) == 1
    assert_close((value, grads), jax.value_and_grad(loss_fn)(PARAMS, X, Y))
    found = ok.value_and_grad_with_taps(loss_fn, fisher="empirical")
    assert_close(taps, found(PARAMS, X, Y)[2])
    np.testing.assert_allclose(jitted[0], loss_fn(PARAMS, X + 1, Y), rtol=1e-6)


@pytest.mark.parametrize("other", ["shape", "dtype", "tree", "function"])
def test_it_is_made_again_for_another(analysed, other):
    layers = ok.find_layers(loss_fn, PARAMS, X, Y)
    function, params, x, y = loss_fn, PARAMS, X, Y
    if other == "shape":
        x, y = x[:4], y[:4]
    elif other == "dtype":
        params = jax.tree.map(lambda p: p.astype(jnp.float16), params)
    elif other == "tree":
        params = {**params, "unused": jnp.ones(2)}
    else:
        function = lambda params, x, y: 2 * loss_fn(params, x, y)  # noqa: E731
    fn = ok.value_and_grad_with_taps(function, layers, fisher="empirical")
    value, _, taps = fn(params, x, y)
    assert len(analysed) == 2
    np.testing.assert_allclose(value, function(params, x, y), rtol=1e-3)
    assert taps["a"][0].inputs.shape == (1, len(x), 1, 3)


def test_what_a_function_closes_over_may_change(analysed):
    held = {"x": X, "scale": 1.0}

    def closing(params, y):
        return held["scale"] * ok.losses.squared_error(net(params, held["x"]), y).mean()

    layers = ok.find_layers(closing, PARAMS, Y)
    fn = ok.value_and_grad_with_taps(closing, layers, fisher="empirical")
    fn(PARAMS, Y)
    assert len(analysed) == 1
    for name, value in (("x", 2 * X), ("scale", 3.0)):
        held[name] = value
        loss, grads, taps = fn(PARAMS, Y)
        assert_close((loss, grads), jax.value_and_grad(closing)(PARAMS, Y))
        np.testing.assert_array_equal(taps["a"][0].inputs[0, :, 0], held["x"])
    assert len(analysed) == 3


def test_rules_for_derivatives_are_those_of_the_last_trace(analysed):
    held = {"slope": 1.0}

    def ruled(params, x, y):
        slope = held["slope"]  # of which only the rule knows

        @jax.custom_vjp
        def tilted(h):
            return h

        tilted.defvjp(lambda h: (h, None), lambda _, g: (slope * g,))
        return ok.losses.squared_error(tilted(net(params, x)), y).mean()

    layers = ok.find_layers(ruled, PARAMS, X, Y)
    fn = ok.value_and_grad_with_taps(ruled, layers, fisher="empirical")
    for held["slope"] in (1.0, 2.0):
        assert_close(fn(PARAMS, X, Y)[:2], jax.value_and_grad(ruled)(PARAMS, X, Y))
    assert len(analysed) == 1


def test_found_inside_a_trace_it_ends_with_it():
    kept = []

    @jax.jit
    def step(x):
        def closing(params):
            return ok.losses.squared_error(net(params, x), Y).mean()

        kept.append(ok.find_layers(closing, PARAMS))
        return closing(PARAMS)

    with jax.checking_leaks():
        step(X)
    assert kept[0].analysis is None


def test_layers_are_stored_without_it(analysed):
    layers = ok.find_layers(loss_fn, PARAMS, X, Y)
    stored = pickle.loads(pickle.dumps(layers))
    assert str(stored) == str(layers)
    assert stored.layers == layers.layers
    ok.value_and_grad_with_taps(loss_fn, stored, fisher="empirical")(PARAMS, X, Y)
    assert len(analysed) == 2


def test_half_of_an_output_that_no_example_has_met_is_declared():
    def constant_direction(w, x, y):
        direction = jnp.arange(6.0).reshape(2, 3) @ w
        return ok.losses.squared_error(jnp.tanh(x @ w) * direction[0], y).mean()

    layers = ok.find_layers(constant_direction, jnp.ones((3, 2)), X, Y)
    assert not len(layers)
    assert "sliced before it is combined with batch data" in layers.uncovered[0].reason


def test_why_a_layer_whose_input_has_no_batch_axis_is_declared():
    def loss_of(shared):
        def loss_fn(params, x, atoms, y):
            h = jnp.tanh(x @ params["a"])
            return ok.losses.squared_error(shared(h, atoms @ params["g"]), y).mean()

        return loss_fn

    params, atoms = {"a": PARAMS["a"], "g": jnp.ones((2, 4))}, RNG.normal(size=(2, 2))
    for shared, name in (
        (lambda h, z: (h + jnp.tanh(z).sum(0))[:, :2], "broadcast_in_dim"),
        (lambda h, z: h @ jnp.tanh(z).T, "dot_general"),
    ):
        layers = ok.find_layers(loss_of(shared), params, X, atoms, Y)
        assert [layer.name for layer in layers] == ["a"]
        (uncovered,) = layers.uncovered
        assert f"all examples share what it makes, in {name} (" in uncovered.reason
