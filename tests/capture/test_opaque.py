"""Equations that hold programs: interpreted if they are recognised, else bound whole."""

import contextlib
import functools

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import ad, batching, mlir

import optax_kron as ok
from optax_kron.capture.execution import agreement
from optax_kron.capture.program import equations

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(0)
# Of NumPy, as 64-bit types are on in the tests alone.
X, Y = RNG.normal(size=(5, 3)), RNG.normal(size=(5, 2))
PARAMS = {"out": RNG.normal(size=(3, 2)), "shared": RNG.normal(size=(3, 3)) * 0.7}


def primitive(name, run, **unknown):
    """A primitive of another library, whose rules are those of a function of its operands."""
    made = jex.core.Primitive(name)
    made.multiple_results = True

    def evaluate(*operands, **params):
        return run(*operands, **params)

    def jvp(primals, tangents, **params):
        tangents = [ad.instantiate_zeros(t) for t in tangents]
        return jax.jvp(functools.partial(evaluate, **params), list(primals), tangents)

    def batch(operands, axes, **params):
        found = jax.vmap(functools.partial(evaluate, **params), in_axes=tuple(axes))(*operands)
        return found, [0] * len(found)

    made.def_impl(evaluate)
    made.def_abstract_eval(
        lambda *avals, **params: [
            jax.core.ShapedArray(s.shape, s.dtype)
            for s in jax.eval_shape(functools.partial(evaluate, **params), *avals)
        ]
    )
    ad.primitive_jvps[made] = jvp
    batching.primitive_batchers[made] = batch
    mlir.register_lowering(made, mlir.lower_fun(evaluate, multiple_results=True))
    return lambda *operands, **params: made.bind(*operands, **params, **unknown)


def thrice(h, w, *, body, **_):
    for _ in range(3):
        (h,) = jax.core.eval_jaxpr(body.jaxpr, body.consts, h, w)
    return [h]


def one_step(h, w):
    return [jnp.tanh(h @ w)]


repeat = primitive("repeat", thrice)
disguised = {name: primitive(name, thrice) for name in ("jit", "scan", "custom_jvp_call", "remat2")}
strange = primitive("tanh", lambda h, w, **_: [jnp.tanh(h[::-1] @ w)], unknown=("a", (1, "b")))


def body_of(h, w):
    return {"body": jax.make_jaxpr(one_step)(h, w)}


# Each applies the shared kernel to all examples in a way of its own; and whether it is recognised.
WAYS = {
    "fori_loop": (lambda h, w: jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ w), h), True),
    "scan": (lambda h, w: jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), h, length=3)[0], True),
    "reversed_scan": (
        lambda h, w: jax.lax.scan(
            lambda h, s: (jnp.tanh(h @ w) * s, h), h, jnp.arange(1.0, 4.0), reverse=True, unroll=2
        )[0],
        True,
    ),
    "while_loop": (
        lambda h, w: (
            jax.lax.stop_gradient(
                jax.lax.while_loop(
                    lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, h)
                )
            )[1]
            + h @ w
        ),
        True,
    ),
    "repeated": (lambda h, w: repeat(h, w, **body_of(h, w))[0], False),
    "unknown": (lambda h, w: strange(h, w)[0], False),
    **{
        f"called {name}": (lambda h, w, bind=bind: bind(h, w, **body_of(h, w))[0], False)
        for name, bind in disguised.items()
    },
}
every_way = pytest.mark.parametrize(("apply", "recognised"), WAYS.values(), ids=WAYS)


def loss_of(apply):
    def loss_fn(params, x, y):
        hidden = apply(x, params["shared"])
        return ok.losses.squared_error(hidden @ params["out"], y).mean()

    return loss_fn


@every_way
def test_loss_and_gradients_are_those_of_jax(apply, recognised):
    loss_fn = loss_of(apply)
    layers = ok.find_layers(loss_fn, PARAMS, X, Y)
    loss, grads = jax.value_and_grad(loss_fn)(PARAMS, X, Y)
    fn = ok.value_and_grad_with_taps(loss_fn, layers, fisher="exact")
    for found, found_grads, _ in (fn(PARAMS, X, Y), jax.jit(fn)(PARAMS, X, Y)):
        np.testing.assert_allclose(found, loss, rtol=1e-12)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found_grads, grads)
    assert "out" in layers
    assert ("shared" in layers) == recognised
    if not recognised:
        (uncovered,) = layers.uncovered
        assert uncovered.path == "shared"
        assert "used by" in uncovered.reason


def test_a_loop_of_unknown_length_keeps_its_value():
    """It has no gradient: a while loop."""

    def loss_fn(out, x, y):
        count = jnp.asarray(len(x) - 2)
        hidden = jax.lax.fori_loop(0, count, lambda _, h: jnp.tanh(h @ PARAMS["shared"]), x)
        hidden = jax.lax.stop_gradient(hidden)
        return ok.losses.squared_error(hidden @ out, y).mean()

    loss, grads, _ = ok.value_and_grad_with_taps(loss_fn, fisher="exact")(PARAMS["out"], X, Y)
    true, true_grads = jax.value_and_grad(loss_fn)(PARAMS["out"], X, Y)
    np.testing.assert_allclose(loss, true, rtol=1e-12)
    np.testing.assert_allclose(grads, true_grads, rtol=1e-12)


def test_an_opaque_equation_is_named_with_the_line_that_made_it():
    layers = ok.find_layers(loss_of(WAYS["called scan"][0]), PARAMS, X, Y)
    (uncovered,) = layers.uncovered
    assert "used by scan (not of JAX)" in uncovered.reason
    assert "test_opaque.py" in uncovered.reason


@pytest.mark.parametrize("flag", ["jax_scan3"] if hasattr(jax.config, "jax_scan3") else [])
def test_a_loop_that_writes_to_references_is_opaque(flag):
    """It has no gradient yet, and so no check on numbers."""
    jax.config.update(flag, True)
    try:
        layers = ok.find_layers(loss_of(WAYS["scan"][0]), PARAMS, X, Y, check=False)
    finally:
        jax.config.update(flag, False)
    assert [layer.name for layer in layers] == ["out"]
    (uncovered,) = layers.uncovered
    assert uncovered.reason.startswith("used by Scan3 (")


@contextlib.contextmanager
def misread(monkeypatch, **changes):
    """Loops that are read wrong."""
    true = equations.loop
    with monkeypatch.context() as patch:
        patch.setattr(equations, "loop", lambda eqn: true(eqn)._replace(**changes))
        yield


def test_another_function_is_an_error(monkeypatch):
    """The self-check sees what is read wrong, whatever it is."""

    def loss_fn(params, x, y):
        def step(h, s):
            return jnp.tanh(h @ params["shared"]) * s, None

        h, _ = jax.lax.scan(step, jnp.asarray(x), jnp.arange(1.0, 3.0))
        return ok.losses.squared_error(h @ params["out"], y).mean()

    true = float(jax.value_and_grad(loss_fn)(PARAMS, X, Y)[0])
    fn = ok.value_and_grad_with_taps(loss_fn, fisher="exact")
    with misread(monkeypatch, reverse=True):
        for call in (functools.partial(ok.find_layers, loss_fn), fn):
            with pytest.raises(RuntimeError, match=r"jax\.value_and_grad gives") as error:
                call(PARAMS, X, Y)
            assert f"{true:.7g}" in str(error.value)
            assert f"JAX {jax.__version__}, optax_kron " in str(error.value)


def test_gradients_are_compared_one_by_one():
    ours = jnp.ones(()), [jnp.ones(3), jnp.asarray([1e-3, 2e-3])]
    theirs = jnp.ones(()), [jnp.ones(3), jnp.asarray([1e-3, -2e-3])]
    _, first, second = agreement.disagreement(ours, theirs)
    assert first == 0
    # The second gradient is small beside the first, and compared with a hundredth of that.
    np.testing.assert_allclose(second, 4e-3 / 1e-2)
