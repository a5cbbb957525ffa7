"""Functions that cannot be looked into: declared ones, and cuDNN's attention."""

import functools
import math

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.interpreters import mlir

import optax_kron as ok

from .helpers import assert_examples

RNG = np.random.default_rng(0)
X, Y = (jnp.asarray(RNG.normal(size=(4, 5, 6)), jnp.float32) for _ in range(2))
# An example has 30 losses under one mean: its column is larger than its gradient by this.
SCALE = math.sqrt(30)
PARAMS = {name: jnp.asarray(RNG.normal(size=(6, 6)), jnp.float32) for name in "qkvo"}


def plain_attention(q, k, v):
    return jax.nn.softmax(q @ k.mT) @ v


def in_pallas(q, k, v):
    def kernel(q, k, v, out):
        out[...] = plain_attention(q[...], k[...], v[...])

    block = pl.BlockSpec((1, *q.shape[1:]), lambda i: (i, 0, 0))
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=len(q),
        in_specs=[block] * 3,
        out_specs=block,
        interpret=True,
    )(q, k, v)


def with_gradient_of(plain, kernel):
    """The kernel, with the derivatives of a function that computes the same."""
    fused = jax.custom_vjp(kernel)
    fused.defvjp(lambda *a: (kernel(*a), a), lambda saved, g: jax.vjp(plain, *saved)[1](g))
    return fused


attention = with_gradient_of(plain_attention, in_pallas)


def loss_of(attend):
    def loss_fn(params, x, y):
        q, k, v = (x @ params[name] for name in "qkv")
        return ok.losses.squared_error(attend(q, k, v) @ params["o"], y).mean()

    return loss_fn


def names(layers):
    return {layer.name for layer in layers}


def test_layers_before_a_declared_kernel_are_found():
    loss_fn = loss_of(ok.per_example(attention))
    layers = ok.find_layers(loss_fn, PARAMS, X, Y)
    assert names(layers) == set("qkvo")
    plain = loss_of(plain_attention)
    # Single examples are taken from the plain loss, as gradients under a loop have no Pallas.
    assert_examples(loss_fn, PARAMS, (X, Y), layers, column=plain, scale=SCALE)


def test_without_a_declaration_the_report_says_what_to_do():
    layers = ok.find_layers(loss_of(attention), PARAMS, X, Y)
    assert names(layers) == {"o"}
    assert "ok.per_example" in str(layers)


def test_a_declaration_that_is_not_true_is_found_out():
    def mixing(q, k, v):
        return attention(q, k, v) + v.mean(axis=0)

    layers = ok.find_layers(loss_of(ok.per_example(mixing)), PARAMS, X, Y)
    assert names(layers) == set("qko")
    assert "examples mix" in str(layers)


def test_axes_keyword_arguments_and_what_is_no_array():
    def kernel(pair, scale, mode, *, shift):
        assert mode == "both"
        x, table = pair
        return {"out": jnp.einsum("tnd,de->tne", x, table) * scale + shift, "table": 2 * table}

    axes = {"in_axes": ((-2, None), None, None), "out_axes": {"out": 1, "table": None}}

    def loss_fn(params, x, y):
        h = jnp.moveaxis(x @ params["q"], 0, 1)
        found = ok.per_example(kernel, **axes)(
            (h, params["v"]), params["k"][0], "both", shift=params["o"][0]
        )
        out = jnp.moveaxis(found["out"], 1, 0)
        return ok.losses.squared_error(out, y).mean() + found["table"].sum()

    layers = ok.find_layers(loss_fn, PARAMS, X, Y)
    assert names(layers) == {"q"}
    assert_examples(loss_fn, PARAMS, (X, Y), layers, scale=SCALE)


def test_under_jit_scan_checkpoint_and_a_gradient():
    attend = ok.per_example(attention)

    def loss_fn(params, x, y):
        def block(h, layer):
            q, k, v = (h @ layer[name] for name in "qkv")
            return h + attend(q, k, v) @ layer["o"], None

        h, _ = jax.lax.scan(jax.checkpoint(jax.jit(block)), x, params)
        return ok.losses.squared_error(h, y).mean()

    params = {name: jnp.stack([kernel, 0.1 * kernel]) for name, kernel in PARAMS.items()}
    layers = ok.find_layers(loss_fn, params, X, Y)
    assert names(layers) == set("qkvo")
    fn = jax.jit(
        functools.partial(ok.value_and_grad_with_taps(loss_fn, layers), key=jax.random.key(0))
    )
    value, grads, taps = fn(params, X, Y)
    assert taps["q"][0].inputs.shape == (2, 4, 5, 6)
    for found, wanted in zip(
        jax.tree.leaves((value, grads)),
        jax.tree.leaves(jax.value_and_grad(loss_fn)(params, X, Y)),
        strict=True,
    ):
        np.testing.assert_allclose(
            found, wanted, rtol=1e-4, atol=1e-5 * float(jnp.abs(wanted).max())
        )


def test_what_vmap_makes_of_a_declaration_is_not_believed():
    """It has an axis more, wherever `vmap` has put it."""

    def one_head_each(q, k, v):
        heads = (x.reshape(4, 5, 2, 3) for x in (q, k, v))
        out = jax.vmap(ok.per_example(attention), in_axes=2, out_axes=2)(*heads)
        return out.reshape(4, 5, 6)

    layers = ok.find_layers(loss_of(one_head_each), PARAMS, X, Y)
    assert names(layers) == {"o"}


def test_values_outside_of_a_trace_are_those_of_the_function():
    def fn(x, *, name):
        assert name == "tanh"
        return np.tanh(x)

    np.testing.assert_array_equal(ok.per_example(fn)(np.ones(3), name="tanh"), np.tanh(np.ones(3)))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"in_axes": 3}, r"argument 0 has shape \(4, 5, 6\), and no axis 3"),
        ({"out_axes": 7}, r"output 0 has shape \(4, 5, 6\), and no axis 7"),
        ({"in_axes": (0, 1, 0)}, r"of one length; got \[4, 5\]"),
        ({"in_axes": (0, 0)}, "in_axes must be an integer, None, or a pytree"),
        ({"in_axes": 0.0}, "in_axes must be an integer, None, or a pytree"),
        ({"in_axes": True}, "in_axes must be an integer, None, or a pytree"),
        ({"out_axes": (0, 0)}, "out_axes must be an integer, None, or a pytree"),
    ],
)
def test_errors(axes, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(ok.per_example(plain_attention, **axes), X, X, X)


def test_outputs_must_be_arrays():
    with pytest.raises(TypeError, match=r"outputs must be arrays; got 'a' at \[1\]"):
        jax.eval_shape(ok.per_example(lambda x: (x, "a")), X)


# ------------------------------------------------------------------------------ cuDNN's attention


def cudnn():
    """A stand-in for the primitive of `jax.nn.dot_product_attention(implementation="cudnn")`."""

    def attend(q, k, v, *others):
        return [jax.nn.dot_product_attention(q, k, v)]

    made = jex.core.Primitive("dot_product_attention_fwd_wrapper")
    made.multiple_results = True
    made.def_impl(attend)
    made.def_abstract_eval(lambda q, *others: [jax.core.ShapedArray(q.shape, q.dtype)])
    mlir.register_lowering(made, mlir.lower_fun(attend, multiple_results=True))
    return made


FUSED = cudnn()


def heads(params, x):
    return (jnp.einsum("bti,ihd->bthd", x, params[name].reshape(6, 2, 3)) for name in "qkv")


def attention_loss(attend):
    def loss_fn(params, x, y):
        return ok.losses.squared_error(
            attend(*heads(params, x)).reshape(x.shape) @ params["o"], y
        ).mean()

    return loss_fn


def test_layers_around_the_attention_of_cudnn_are_those_around_any():
    empty = [jnp.zeros(0)] * 7  # bias, lengths, offsets, pages
    plain = attention_loss(jax.nn.dot_product_attention)
    fused = with_gradient_of(
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v),
        lambda q, k, v: FUSED.bind(q, k, v, *empty)[0],
    )
    loss_fn = attention_loss(fused)
    layers = ok.find_layers(loss_fn, PARAMS, X, Y)
    assert names(layers) == set("qkvo")
    (found, wanted) = (
        ok.value_and_grad_with_taps(f, fisher="empirical")(PARAMS, X, Y) for f in (loss_fn, plain)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_keys_in_pages_may_be_shared():
    empty, pages = [jnp.zeros(0)] * 5, [jnp.zeros((4, 1, 1, 1))] * 2
    fused = with_gradient_of(
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v),
        lambda q, k, v: FUSED.bind(q, k, v, *empty, *pages)[0],
    )
    assert names(ok.find_layers(attention_loss(fused), PARAMS, X, Y)) == {"q", "o"}


MIXING = {
    "sums of those before": lambda h: jnp.cumsum(h, axis=0),
    "the one before": lambda h: h + jnp.concatenate([0 * h[:1], h[:-1]]),
    "the last but one": lambda h: h.at[-1].add(h[-2]),
    "all but the first": lambda h: jnp.concatenate([h[:1], h[1:] - h[1:].mean(0)]),
    "two that change places": lambda h: h[np.array([0, 1, 3, 2])],
}


@pytest.mark.parametrize("fn", MIXING.values(), ids=MIXING)
def test_whichever_examples_mix_is_found_out(fn):
    def loss_fn(params, x, y):
        return ok.losses.squared_error(ok.per_example(fn)(x @ params["q"]) @ params["o"], y).mean()

    layers = ok.find_layers(loss_fn, PARAMS, X, Y)
    assert names(layers) == {"o"}
    assert "examples mix" in str(layers)


def test_none_and_what_a_function_closes_over():
    def loss_fn(params, x, y):
        def kernel(h, bias, mask):
            assert bias is None
            return attention(h, h, h @ params["v"]), mask

        h, none = ok.per_example(kernel, in_axes=[0, 0, 0])(x @ params["q"], None, None)
        assert none is None
        return ok.losses.squared_error(h @ params["o"], y).mean()

    layers = ok.find_layers(loss_fn, PARAMS, X, Y)
    assert names(layers) == set("qo")


def test_a_function_is_traced_once():
    calls = []

    def fn(x):
        calls.append(x)
        return 2 * x

    jax.make_jaxpr(ok.per_example(ok.per_example(ok.per_example(fn))))(X)
    assert len(calls) == 1


def test_what_is_shared_is_said_to_be():
    def by_keyword(q, k, v):
        return ok.per_example(lambda *, q, k, v: attention(q, k, v))(q=q, k=k, v=v)

    layers = ok.find_layers(loss_of(by_keyword), PARAMS, X, Y)
    assert names(layers) == {"o"}
    assert "was told that all examples share it" in str(layers)
