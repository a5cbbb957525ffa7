"""From what was recorded and pulled back to the taps of a layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from optax_kron.capture.analysis.canonical import Canonical
from optax_kron.capture.analysis.layers import Analysis, Member
from optax_kron.capture.analysis.uses import Use
from optax_kron.capture.execution.inside_moments import InsideMoments
from optax_kron.capture.execution.pullback import Linearized
from optax_kron.capture.execution.weights import Weighing
from optax_kron.kernels import kfac
from optax_kron.layers.moments import moments_of, with_bias
from optax_kron.layers.taps import Moments, Tap


def member_taps(
    analysis: Analysis,
    member: Member,
    numbers: dict[Use, int],
    linearized: Linearized,
    gradients: Sequence[Array],
    weighing: Weighing,
) -> tuple[Tap, ...]:
    """The taps of one layer, one for each group of uses.

    Args:
      analysis: of the loss.
      member: the layer.
      numbers: of the uses.
      linearized: the loss at a point.
      gradients: cotangents of the uses' outputs [V, ...].
      weighing: of the data in the loss.
    """
    taps = []
    for group in member.groups:
        inputs, grads, weighed = [], [], []
        marks = analysis.marks_of(group)
        for use in group:
            i = numbers[use]
            form = Canonical(use, analysis.label(use))
            g = jax.vmap(form.output_grads)(gradients[i])
            if member.layer.kernel is None:
                # A bias alone has the same input, one, everywhere: its gradient is a plain sum.
                g = jnp.sum(g, axis=-2, keepdims=True)
                x = jnp.ones((*g.shape[1:4], 1), g.dtype)
            else:
                x = form.inputs(linearized.inputs[i], g.dtype)
                if member.layer.bias is not None:
                    x = with_bias(x, use in member.biased)
            w = weighing.of(use, form, marks)
            if linearized.taken[i] is not None:
                x, w = form.only_taken(x, w, linearized.taken[i])
            inputs.append(x)
            grads.append(g)
            weighed.append(w)
        dtype = jnp.result_type(*inputs)
        if member.layer.kernel is None:
            # Every use sees the same input: their gradients add up before they are squared.
            inputs, grads = inputs[:1], [sum(grads[1:], grads[0])]
            weighed = [
                w if w.ndim == 1 else jnp.mean(w, axis=-1, keepdims=True) for w in weighed[:1]
            ]
        tap = Tap(
            jnp.concatenate([x.astype(dtype) for x in inputs], axis=2),
            jnp.concatenate(grads, axis=3),
            _side_by_side(weighed, inputs),
        )
        taps.append(tap)
    return tuple(taps)


def _side_by_side(weights: Sequence[Array], inputs: Sequence[Array]) -> Array:
    """Weights of several uses as those of their positions one after the other."""
    if all(w.ndim == 1 for w in weights):
        return weights[0]
    by_block = any(w.ndim == 3 for w in weights)
    wide = [
        jnp.broadcast_to(w[:, None] if w.ndim == 1 else w, x.shape[0 if by_block else 1 : 3])
        for w, x in zip(weights, inputs, strict=True)
    ]
    return jnp.concatenate(wide, axis=-1)


def member_moments(
    analysis: Analysis,
    member: Member,
    numbers: dict[Use, int],
    linearized: Linearized,
    gradients: Sequence[Array],
    weighing: Weighing,
    inside: Mapping[Use, InsideMoments],
) -> tuple[Moments, ...]:
    """The second moments of one layer, one for each group of uses.

    The arguments are those of `member_taps`, and `inside`: the uses whose moments were formed
    inside, for which `gradients` are the cotangents of their dummies.
    """
    if member.groups[0][0] not in inside:
        taps = member_taps(analysis, member, numbers, linearized, gradients, weighing)
        return tuple(moments_of(member.layer, tap) for tap in taps)
    found = []
    for group in member.groups:
        inputs: Any = 0
        outputs: Any = 0
        total: Any = 0
        positions, marks = 0, analysis.marks_of(group)
        for use in group:
            form = Canonical(use, analysis.label(use))
            i = numbers[use]
            record = linearized.inputs[i]
            # Diagonals have an axis of length one beside them.
            inputs = inputs + form.merged_blocks(record)
            outputs = outputs + form.merged_blocks(jnp.sum(gradients[i], axis=0))
            positions += form.positions
            w = weighing.of(use, form, marks)
            if linearized.taken[i] is not None:
                w = form.taken_weights(w, linearized.taken[i])
            total = total + kfac.total_weight(w, form.positions)
        data, layer = analysis.label(group[0]).examples, member.layer
        inputs = inputs[..., 0] if layer.has_diagonal_input else inputs
        outputs = outputs[..., 0] if layer.has_diagonal_output else outputs
        if gradients[numbers[group[0]]].shape[0] == 0:
            like: Any = {"dtype": outputs.dtype, "diagonal": layer.has_diagonal_output}
            outputs = data * kfac.identities(layer.blocks, layer.d_out, **like)
        inputs = inputs / jnp.where(total > 0, total, 1)[(..., *[None] * (inputs.ndim - 1))]
        weight = jnp.broadcast_to(total / positions, member.layer.blocks)
        found.append(Moments(inputs, outputs / data, weight))
    return tuple(found)
