"""The check on numbers, in programs of 16 bits, and what it leaves of a layer."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron import losses
from optax_kron.capture.analysis.trace import trace_loss
from optax_kron.capture.execution import agreement, check
from optax_kron.capture.find import find_layers
from optax_kron.capture.taps import value_and_grad_with_taps


def images(dtype):
    """A convolution whose bias has a gradient that 16 bits cannot sum: 16,384 terms of one sign."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(0.3 * rng.normal(size=shape), dtype)

    x = jnp.asarray(rng.integers(0, 2, size=(64, 16, 16, 3)), dtype)
    params = {"k": normal(3, 3, 3, 4), "b": normal(4), "v": normal(4, 3), "c": normal(3)}

    def loss_fn(p, x, y):
        dims = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=dims)
        h = jnp.mean(jax.nn.relu(h + p["b"]), axis=(1, 2))
        out = (h @ p["v"] + p["c"]).astype(jnp.float32)
        return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(out, y))

    return loss_fn, params, x, jnp.asarray(rng.integers(0, 3, size=64))


def recurrent(dtype):
    """A loop, a checkpoint, a branch and a derivative of the user's, on a small batch."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(0.5 * rng.normal(size=shape), dtype)

    params = {"w": normal(3, 4), "u": normal(4, 4), "b": normal(4), "v": normal(4, 2)}

    def loss_fn(p, x, y):
        @jax.checkpoint
        def step(h, x):
            return jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"]), None

        h, _ = jax.lax.scan(step, jnp.zeros((len(x), 4), dtype), x.swapaxes(0, 1))
        h = jax.nn.gelu(2 * h)
        out = jax.lax.cond(h.sum() > -99, lambda h: h @ p["v"], lambda h: 2 * (h @ p["v"]), h)
        return jnp.mean(losses.squared_error(out.astype(jnp.float32), y))

    return loss_fn, params, normal(5, 6, 3), normal(5, 2).astype(jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_sums_that_16_bits_cannot_hold_cost_no_block(dtype):
    layers = find_layers(*images(dtype))
    assert not layers.uncovered, layers
    assert [layer.bias for layer in layers] == ["b", "c"]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("program", [images, recurrent])
def test_in_32_bits_taps_and_gradient_agree_to_rounding(program, dtype):
    loss_fn, params, *args = program(dtype)
    traced = trace_loss(loss_fn, params, tuple(args), False)
    found = check._compiled(traced, check.in_32_bits)
    assert len(found) == (2 if program is images else 4)
    for name, off in found.items():
        # Sums of at most 16,384 products: √16384 · 2⁻²⁴ = 8e-6.
        assert max(off.kernel, off.bias, off.leak) < 1e-5, (name, off)


def test_a_bias_that_fails_alone_costs_no_kernel_its_block(monkeypatch):
    loss_fn, params, *args = images(jnp.bfloat16)
    monkeypatch.setattr(check, "has_narrow", lambda graph: False)  # and so keep to 16 bits
    layers = find_layers(loss_fn, params, *args)
    (k, v) = layers
    assert (k.kernel, k.bias, k.d_in) == ("k", None, 27)
    assert (v.kernel, v.bias) == ("v", "c")
    ((path, reason),) = [(u.path, u.reason) for u in layers.uncovered]
    assert path == "b"
    assert "check failed" in reason
    fn = value_and_grad_with_taps(loss_fn, layers)
    _, _, taps = jax.eval_shape(fn, params, *args, key=jax.random.key(0))
    assert taps["k"][0].inputs.shape[-1] == 27
    # Layers that were found without numbers have the bias.
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, *args))
    with pytest.raises(ValueError, match="its bias has no place"):
        value_and_grad_with_taps(loss_fn, find_layers(loss_fn, *shapes))(
            params, *args, key=jax.random.key(0)
        )


def regression(p, x, scale):
    out = jnp.tanh(x @ p["a"]) @ p["c"]
    return jnp.sum(losses.squared_error(out, jnp.ones_like(out))) * scale


# At one input, or for a loss that is scaled: the layers that can't be checked there.
NOT_FINITE = {
    "nan": (jnp.float32, jnp.nan, 1, ["a", "c"]),
    "inf": (jnp.float32, jnp.inf, 1, ["a"]),
    # Only the gradients overflow: the derivatives of the outputs are finite, and are checked.
    "overflow": (jnp.float16, 1, 6e4, []),
}


@pytest.mark.parametrize("name", NOT_FINITE)
def test_what_is_not_finite_for_jax_either_is_not_misread(name):
    dtype, at, scale, unknown = NOT_FINITE[name]
    params = {"a": jnp.ones((3, 4), dtype) / 2, "c": jnp.ones((4, 2), dtype) / 2}
    x = jnp.linspace(0.1, 1, 18, dtype=dtype).reshape(6, 3).at[2, 1].set(at)
    args = params, x, jnp.asarray(scale, dtype)

    def warned(function):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = function()
        messages = [str(w.message) for w in caught]
        assert len(messages) == bool(unknown), messages
        assert all(f"{', '.join(map(repr, unknown))}: their" in m for m in messages), messages
        assert all(w.filename == __file__ for w in caught)
        return made

    layers = warned(lambda: find_layers(regression, *args))
    assert [layer.name for layer in layers] == ["a", "c"]
    assert layers.checked == (not unknown)
    expected = jax.value_and_grad(regression)(*args)
    assert not all(np.all(np.isfinite(g)) for g in jax.tree.leaves(expected))
    for fn in (  # as a step of training without jit
        value_and_grad_with_taps(regression, fisher="forward"),
        value_and_grad_with_taps(regression, layers, fisher="forward"),
    ):
        value, grads, _ = warned(lambda fn=fn: fn(*args))
        jax.tree.map(np.testing.assert_array_equal, (value, grads), expected)
    # Finite numbers verify what was found, once: the second call may have any.
    fn = value_and_grad_with_taps(regression, layers, fisher="forward")
    fn(params, jnp.ones_like(x), jnp.ones_like(args[2]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fn(*args)
    assert layers.checked == (not unknown)


def test_finite_numbers_beside_others_are_compared():
    def of(value, *grads):
        return agreement.ValueAndGrads(jnp.asarray(value), [jnp.asarray(g) for g in grads])

    ours = of(jnp.nan, [jnp.inf, 1.0], [jnp.nan, 1.0])
    same = of(jnp.nan, [jnp.inf, 1.0], [jnp.inf, 1.0])
    other = of(1.0, [jnp.inf, 2.0], [0.0, 1.0])
    assert [float(x) for x in agreement.disagreement(ours, same)] == [0, 0, 0]
    assert not any(x <= 0.25 for x in agreement.disagreement(ours, other))
