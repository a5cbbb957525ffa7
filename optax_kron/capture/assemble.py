"""From what was recorded and pulled back to the taps of a layer."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from optax_kron.capture.analysis import Analysis, Mark, Member
from optax_kron.capture.canonical import Canonical
from optax_kron.capture.columns import data_axis
from optax_kron.capture.pullback import Linearized
from optax_kron.capture.tap import Tap
from optax_kron.capture.uses import Use


def member_taps(
    analysis: Analysis,
    member: Member,
    numbers: dict[Use, int],
    linearized: Linearized,
    gradients: Sequence[Array],
    weights: Sequence[Array],
) -> tuple[Tap, ...]:
    """The taps of one layer, one for each group of uses.

    Args:
      analysis: of the loss.
      member: the layer.
      numbers: of the uses.
      linearized: the loss at a point.
      gradients: cotangents of the uses' outputs [V, ...].
      weights: derivative of the loss with respect to each mark's per-example losses.
    """
    taps = []
    for group in member.groups:
        inputs, grads, shared = [], [], None
        for use in group:
            i = numbers[use]
            label = analysis.labels.data(use.output)
            form = Canonical(use, label)
            g = jax.vmap(form.output_grads)(gradients[i])
            if member.layer.kernel is None:
                # A bias alone has the same input, one, everywhere: its gradient is a plain sum.
                g = jnp.sum(g, axis=-2, keepdims=True)
                x = jnp.ones((*g.shape[1:4], 1), g.dtype)
            else:
                x = form.inputs(linearized.inputs[i], g.dtype)
                if member.layer.bias is not None:
                    x = _with_bias(x, use in member.biased)
            if linearized.taken[i] is not None:
                x = x * _like(linearized.taken[i], x) if not member.layer.is_embedding else x
            inputs.append(x)
            grads.append(g)
            shared = label.marks if shared is None else shared | label.marks
        dtype = jnp.result_type(*inputs)
        if member.layer.kernel is None:
            # Every use sees the same input: their gradients add up before they are squared.
            inputs, grads = inputs[:1], [sum(grads[1:], grads[0])]
        tap = Tap(
            jnp.concatenate([x.astype(dtype) for x in inputs], axis=2),
            jnp.concatenate(grads, axis=3),
            _data_weights(analysis.marks, shared, weights, linearized.taken[numbers[group[0]]]),
        )
        taps.append(tap)
    return tuple(taps)


def _with_bias(x: Array, biased: bool) -> Array:
    column = jnp.full((*x.shape[:-1], 1), 1 if biased else 0, x.dtype)
    return jnp.concatenate([x, column], axis=-1)


def _like(taken: Array, x: Array) -> Array:
    return jnp.max(taken).astype(x.dtype)


def _data_weights(marks: Sequence[Mark], numbers: Any, weights, taken) -> Array:
    """How much each datum weighs in the loss, summed over its per-example losses, [N]."""
    total: Any = 0
    for m in sorted(numbers):
        axis = data_axis(marks[m])
        w = weights[m]
        w = w[None] if axis is None else jnp.moveaxis(w, axis, 0)
        total = total + jnp.sum(w, axis=tuple(range(1, w.ndim)))
    total = jnp.asarray(total)
    total = total.astype(jnp.promote_types(total.dtype, jnp.float32))
    return total if taken is None else total * jnp.max(taken).astype(total.dtype)
