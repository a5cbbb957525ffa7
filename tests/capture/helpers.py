"""The taps of a loss against gradients of single examples."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from optax_kron.capture.taps import value_and_grad_with_taps
from optax_kron.layers.paths import by_path


def per_example(layer, tap):
    """Gradients of every example [N, B, d_in, d_out], from one tap."""
    inputs, is_head = tap.inputs, False
    if layer.is_tied:
        is_head = not jnp.issubdtype(inputs.dtype, jnp.integer)
    if layer.is_embedding and not is_head:
        inputs = jax.nn.one_hot(inputs[..., 0], layer.d_in)
    # The head of a tied embedding has the kernel's outputs for its inputs.
    return jnp.einsum(
        "bnsi,vbnso->nboi" if is_head else "bnsi,vbnso->nbio",
        inputs.astype(jnp.float32),
        tap.output_grads.astype(jnp.float32),
    )


def assert_close(actual, expected, rtol):
    """Trees that are close relative to the largest entry of each leaf, if that is no rounding."""
    found, wanted = (jax.tree_util.tree_leaves_with_path(x) for x in (actual, expected))
    assert [path for path, _ in found] == [path for path, _ in wanted]
    sizes = [np.max(np.abs(y), initial=0) for _, y in wanted]
    for (path, x), (_, y), size in zip(found, wanted, sizes, strict=True):
        scale = max(size, 1e-3 * max(sizes), 1e-30)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(x / scale, y / scale, rtol=0, atol=rtol, err_msg=name)


def assert_examples(loss_fn, params, args, layers, *, column=None, scale=1.0, axis=0, rtol=2e-5):
    """The gradient is that of the loss, and the taps give those of single examples.

    Args:
      loss_fn: of the parameters and the data.
      params: any pytree.
      args: the data, along one axis of each.
      layers: those that are checked.
      column: the loss whose gradient a tap has, of the parameters and one example; by default
        `loss_fn`.
      scale: that the columns are larger by.
      axis: of all arguments, which counts the data.
      rtol: relative to the largest entry.
    """
    fn = value_and_grad_with_taps(loss_fn, layers, fisher="empirical")
    given, structure = jax.tree.flatten(params)
    numbers = [i for i, x in enumerate(given) if eqx.is_array(x)]

    @jax.jit  # one program, as most of the time goes into compiling
    def everything(arrays, *args):
        filled = list(given)
        for i, x in zip(numbers, arrays, strict=True):
            filled[i] = x
        params = structure.unflatten(filled)

        def gradient(loss, *args):
            moving, others = eqx.partition(params, eqx.is_inexact_array)
            return jax.value_and_grad(lambda p: loss(eqx.combine(p, others), *args))(moving)

        def example(n):
            single = (jax.lax.dynamic_slice_in_dim(a, n, 1, axis=axis) for a in args)
            leaves = by_path(gradient(column or loss_fn, *single)[1])
            return {layer.name: scale * layer.take(leaves) for layer in layers}

        value, grads, taps = fn(params, *args)
        examples = jax.lax.map(example, jnp.arange(args[0].shape[axis]))
        found = {
            layer.name: sum(per_example(layer, tap) for tap in taps[layer.name]) for layer in layers
        }
        return (value, by_path(grads), found), (*_by_path(gradient(loss_fn, *args)), examples)

    actual, expected = everything([given[i] for i in numbers], *args)
    for a, b in zip(jax.device_get(actual), jax.device_get(expected), strict=True):
        assert_close(a, b, rtol)


def _by_path(value_and_gradient):
    value, gradient = value_and_gradient
    return value, by_path(gradient)
