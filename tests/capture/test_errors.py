"""What goes wrong says what, where and how to mend it; and the table of layers reads well."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_kron as ok

X, Y = jnp.ones((5, 3)) + jnp.arange(5.0)[:, None], jnp.array([0, 1, 1, 0, 1])
PARAMS = {
    "dense": {"kernel": jnp.ones((3, 2)) * 0.1, "bias": jnp.zeros(2)},
    "gate": jnp.ones(2),
    "table": jnp.ones((2, 2)),
}


def logits(params, x, y):
    dense = params["dense"]
    h = x @ dense["kernel"] + dense["bias"]
    return h * jax.nn.sigmoid(params["gate"]) + params["table"][y]


def loss_fn(params, x, y):
    each = ok.losses.softmax_cross_entropy_with_integer_labels(logits(params, x, y), y)
    return jnp.mean(each)


def unmarked(params, x, y):
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits(params, x, y), y))


def with_aux(params, x, y):
    return loss_fn(params, x, y), {"logits": logits(params, x, y)}


def taps_of(function=loss_fn, args=(X, Y), fisher="exact", layers=None, key=None, **kwargs):
    fn = ok.value_and_grad_with_taps(function, layers, fisher=fisher, **kwargs)
    return fn(PARAMS, *args, key=key)[2]


def test_no_mark():
    layers = ok.find_layers(unmarked, PARAMS, X, Y)
    assert not len(layers)
    assert {u.reason for u in layers.uncovered} == {"reaches no marked loss"}
    with pytest.raises(ValueError, match=r"marks no likelihood.*ok\.losses.*ok\.Taps"):
        taps_of(unmarked)


CALLS = {
    "find": lambda f, **kw: ok.find_layers(f, PARAMS, X, Y, **kw),
    "taps": lambda f, **kw: taps_of(f, **kw),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@every_call
@pytest.mark.parametrize(
    ("function", "has_aux", "message"),
    [
        (with_aux, False, r"must return a real scalar.*pass has_aux=True"),
        (loss_fn, True, r"has_aux=True, but loss_fn does not return a pair"),
        (lambda *a: (1.0, 2.0, 3.0), True, r"has_aux=True, but loss_fn does not return a pair"),
        (lambda *a: logits(*a), False, r"must return a real scalar; got .*\(5, 2\)"),
        (lambda *a: jnp.argmax(logits(*a)), False, r"must return a real scalar; got .*int32"),
        (lambda *a: loss_fn(*a) + 0j, False, r"must return a real scalar; got .*complex64"),
        (lambda *a: (with_aux(*a)[1], 0.0), True, r"must return a real scalar, with has_aux"),
        (lambda *a: "a", False, r"must return a real scalar; got a"),
    ],
)
def test_loss_that_is_not_a_real_scalar(call, function, has_aux, message):
    with pytest.raises(ValueError, match=message):
        call(function, has_aux=has_aux)


def test_auxiliary_data_may_be_anything():
    def named(params, x, y):
        loss, aux = with_aux(params, x, y)
        return loss, {"name": "a", "function": abs, "none": None, "count": 3, **aux}

    layers = ok.find_layers(named, PARAMS, X, Y, has_aux=True)
    fn = ok.value_and_grad_with_taps(named, layers, has_aux=True, fisher="exact")
    (loss, aux), _, _ = fn(PARAMS, X, Y)
    (expected, true_aux), _ = jax.value_and_grad(named, has_aux=True)(PARAMS, X, Y)
    assert loss == expected
    assert (aux["name"], aux["function"], aux["none"], aux["count"]) == ("a", abs, None, 3)
    assert jnp.array_equal(aux["logits"], true_aux["logits"])
    ok.ggn_vector_product(named, PARAMS, X, Y, has_aux=True)(PARAMS)


@pytest.mark.parametrize("fisher", ["mc", "sketch"])
def test_missing_key(fisher):
    with pytest.raises(ValueError, match=rf"fisher='{fisher}' draws random numbers; pass key="):
        taps_of(fisher=fisher)


@pytest.mark.parametrize("fisher", ["", "MC", "true", None])
def test_wrong_fisher(fisher):
    message = rf"must be one of mc, exact, .*got {re.escape(repr(fisher))}"
    with pytest.raises(ValueError, match=message):
        ok.value_and_grad_with_taps(loss_fn, fisher=fisher)


@pytest.mark.parametrize("samples", [0, -1, 1.0, True, None])
def test_wrong_samples(samples):
    with pytest.raises(ValueError, match=rf"samples must be an integer ≥ 1; got {samples!r}"):
        ok.value_and_grad_with_taps(loss_fn, samples=samples)


@every_call
def test_no_examples(call):
    def empty(params, x, y):
        return loss_fn(params, x[:0], y[:0])

    with pytest.raises(ValueError, match=r"has no examples.*\(0,\)"):
        call(empty)


@every_call
def test_negative_weights(call):
    with pytest.raises(ValueError, match=r"loss falls with a per-example loss.*weights ≥ 0"):
        call(lambda *a: -loss_fn(*a))


def test_layers_of_other_parameters():
    layers = ok.find_layers(loss_fn, PARAMS, X, Y)
    other = {**PARAMS, "dense": {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}}
    with pytest.raises(ValueError, match=r"dense/kernel has shape \(4, 2\).*\(3, 2\)"):
        ok.kfac(0.1, layers=layers).init(other)
    with pytest.raises(ValueError, match=r"no parameter at dense/kernel; there are gate, table"):
        ok.kfac(0.1, layers=layers).init({k: PARAMS[k] for k in ("gate", "table")})


def test_layers_of_another_function():
    def other(params, x, y):
        z = x @ params["dense"]["kernel"]
        return jnp.mean(ok.losses.softmax_cross_entropy_with_integer_labels(z, y))

    layers = ok.find_layers(loss_fn, PARAMS, X, Y)
    with pytest.raises(ValueError, match=r"no taps for the layer 'table'.*not found in this loss"):
        taps_of(other, layers=layers)


@pytest.fixture
def optimizer():
    layers = ok.find_layers(loss_fn, PARAMS, X, Y)
    tx = ok.kfac(0.1, layers=layers)
    state = tx.init(PARAMS)
    return lambda taps: tx.update(PARAMS, state, PARAMS, taps=taps)


def test_taps_of_no_layer_or_of_too_few(optimizer):
    with pytest.raises(ValueError, match=r"update needs taps at every step"):
        optimizer(None)
    taps = taps_of()
    assert set(taps) == {"dense", "table"}
    with pytest.raises(ValueError, match=r"missing: \['table'\]"):
        optimizer({"dense": taps["dense"]})
    with pytest.raises(ValueError, match=r"belonging to no layer: \['other'\]"):
        optimizer({**taps, "other": taps["dense"]})


def test_some_of_the_layers_may_be_asked_for():
    layers = ok.find_layers(loss_fn, PARAMS, X, Y)
    assert set(taps_of(layers=[layers["dense"]])) == {"dense"}


@pytest.mark.parametrize(
    ("inputs", "grads", "message"),
    [
        ((5, 3), (5, 2), r"inputs of width 3; expected 4.*column of ones"),
        ((5, 4), (5, 3), r"output_grads of width 3; expected 2"),
        ((2, 5, 1, 4), (1, 2, 5, 1, 2), r"have 2 blocks.*expected 1"),
        ((5, 4), (6, 2), r"expected \[N, d_in\] and \[N, d_out\]"),
        ((5,), (5, 2), r"expected \[N, d_in\] and \[N, d_out\]"),
        ((0, 4), (0, 2), r"'dense' has no examples"),
    ],
)
def test_taps_of_a_wrong_shape(optimizer, inputs, grads, message):
    table = ok.Tap(jnp.zeros((5, 1), int), jnp.ones((5, 2)))
    with pytest.raises(ValueError, match=message):
        optimizer({"dense": ok.Tap(jnp.ones(inputs), jnp.ones(grads)), "table": table})


def test_weights_of_a_wrong_shape():
    tap = ok.Tap(jnp.ones((5, 4)), jnp.ones((5, 2)), jnp.ones(4))
    with pytest.raises(ValueError, match=r"weights of shape \(4,\); expected one for each of 5"):
        ok.Taps({"dense": tap})


TABLE = """\
layer  kind       blocks  inputs      outputs  parameters
dense  dense      1       4           2        dense/kernel dense/bias
table  embedding  1       2 diagonal  2        table

without a Kronecker block:
gate  (2,)  used by logistic (test_errors.py:LINE (logits))"""


def _readable(layers):
    return re.sub(r"\(\S*test_errors\.py:[0-9:]+", "(test_errors.py:LINE", str(layers))


def test_table_of_layers_is_readable():
    assert _readable(ok.find_layers(loss_fn, PARAMS, X, Y)) == TABLE


def test_table_says_what_is_not_verified():
    abstract = jax.eval_shape(lambda: (PARAMS, X, Y))
    layers = ok.find_layers(loss_fn, *abstract)
    table, _, note = _readable(layers).rpartition("\n\n")
    assert table == TABLE
    assert note.startswith("not verified numerically yet")
    before = str(layers)
    taps_of(layers=layers)
    assert str(layers) == before  # what is verified then, the function of the taps keeps


def mixing(h):
    @jax.custom_vjp
    def mixed(h):
        return h

    def backward(_, cotangent):
        return (jnp.broadcast_to(cotangent.mean(0), cotangent.shape),)

    mixed.defvjp(lambda h: (h, None), backward)
    return mixed(h)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "couple", [mixing, lambda h: jax.lax.top_k(h.T, len(h))[0].T], ids=["rule", "top_k"]
)
def test_mixed_examples_are_refused_at_every_precision(couple, dtype):
    def loss_fn(params, x, y):
        hidden = couple(jnp.tanh(x @ params["w"]))
        return ok.losses.softmax_cross_entropy_with_integer_labels(hidden @ params["v"], y).mean()

    draw = lambda *shape: jax.random.normal(jax.random.key(len(shape)), shape, dtype)  # noqa: E731
    params = {"w": draw(4, 6), "v": draw(6, 3)}
    layers = ok.find_layers(loss_fn, params, draw(5, 4), jnp.arange(5) % 3)
    assert [layer.name for layer in layers] == ["v"], layers


def test_one_example_has_the_layers_of_many():
    def loss_fn(params, x, y):
        n, t, _ = x.shape
        apart = lambda a: a.reshape(n, t, 2, 3).transpose(0, 2, 1, 3)  # noqa: E731
        q, k, v = (apart(x @ params[name]) for name in "qkv")
        mixed = jax.nn.softmax(q @ k.mT) @ v
        out = mixed.transpose(0, 2, 1, 3).reshape(n, t, 6) @ params["o"]
        return ok.losses.squared_error(out, y).mean()

    params = {name: jax.random.normal(jax.random.key(i), (6, 6)) for i, name in enumerate("qkvo")}
    x, y = jax.random.normal(jax.random.key(9), (2, 5, 3, 6))
    layers = ok.find_layers(loss_fn, params, x, y)
    assert len(layers) == 4, layers
    fn = ok.value_and_grad_with_taps(loss_fn, layers, fisher="exact")
    _, _, taps = fn(params, x[:1], y[:1])
    assert taps["v"][0].inputs.shape[1:3] == (1, 3)


def test_two_parameters_of_one_path():
    def loss_fn(params, x):
        return ok.losses.squared_error(x @ params["a"]["b"] @ params["a/b"], x).mean()

    params = {"a": {"b": jnp.eye(3)}, "a/b": jnp.eye(3)}
    with pytest.raises(ValueError, match="two parameters have one path"):
        ok.find_layers(loss_fn, params, jnp.ones((2, 3)))


def test_an_unmarked_loss_is_explained_in_the_table():
    layers = ok.find_layers(lambda p, x: jnp.mean(optax.l2_loss(x @ p)), jnp.ones((3, 2)), X)
    assert len(layers) == 0
    assert "Take the loss from ok.losses" in str(layers)


def test_what_is_no_key_is_named():
    fn = ok.value_and_grad_with_taps(lambda p, x: jnp.mean(ok.losses.l2_loss(x @ p)))
    with pytest.raises(ValueError, match=r"jax.random.key\(0\); got 7"):
        fn(jnp.ones((3, 2)), X, key=7)


def test_what_is_no_tap_is_named():
    with pytest.raises(ValueError, match=r"layer 'a' was given a .*; expected ok.Tap"):
        ok.Taps({"a": (X, X)})
