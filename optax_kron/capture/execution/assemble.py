"""From what was recorded and pulled back to the taps of a layer.

A layer has a group of uses for each batch that it meets, and a tap for each group.
"""

# Uses of a group stand side by side as positions: a layer that reads the hidden state [8, 4] twice
# in one loss has a tap with inputs [1, 8, 2, 4]. Used on 8 examples inside of a domain and on 6 at
# its boundary, it has two taps, with inputs [1, 8, 1, 4] and [1, 6, 1, 4].

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Shaped

from optax_kron.capture.analysis.canonical import Canonical
from optax_kron.capture.analysis.layers import Analysis, CapturedLayer
from optax_kron.capture.analysis.uses import Use
from optax_kron.capture.execution.inside_moments import InsideMoments
from optax_kron.capture.execution.pullback import Linearized
from optax_kron.capture.execution.weights import LossWeights, added
from optax_kron.kernels import contract, explicit, kfac
from optax_kron.layers.moments import moments_of, with_bias
from optax_kron.layers.taps import Moments, Tap
from optax_kron.types import PyTree


class Recorded(NamedTuple):
    """What was recorded in the forward pass, and pulled back.

    Attributes:
      analysis: The analysis of the loss.
      linearized: The loss at a point.
      output_grads: Cotangents [V, ...] of the outputs of the uses; of those whose moments were
        formed inside, of their dummies.
      weights: The weights of the examples in the loss.
    """

    analysis: Analysis
    linearized: Linearized
    output_grads: Mapping[Use, Array]
    weights: LossWeights


Made = TypeVar("Made")


def assembled(
    recorded: Recorded, make: Callable[[Recorded], Made], out: PyTree = explicit.WHOLE
) -> Made:
    """`make(recorded)`; on an explicit mesh where the compiler chooses shardings.

    Args:
      recorded: What was recorded.
      make: A function of it.
      out: The shardings of the result there, as of `explicit.untyped`.
    """
    analysis, linearized, output_grads, weights = recorded
    uses, reads, scales = analysis.uses, list(linearized.indices), list(linearized.scales)

    def make_from(inputs, taken, indices, scaling, grads, losses):
        by_use = (dict(zip(uses, x, strict=True)) for x in (inputs, taken, grads))
        inputs, taken, grads = by_use
        indices = dict(zip(reads, indices, strict=True))
        scaling = dict(zip(scales, scaling, strict=True))
        point = dataclasses.replace(
            linearized, inputs=inputs, taken=taken, indices=indices, scales=scaling
        )
        return make(Recorded(analysis, point, grads, LossWeights(analysis, losses, indices)))

    return explicit.untyped(
        make_from,
        [linearized.inputs[use] for use in uses],
        [linearized.taken[use] for use in uses],
        [linearized.indices[read] for read in reads],
        [linearized.scales[value] for value in scales],
        [output_grads[use] for use in uses],
        weights.arrays,
        out=out,
    )


def tap_shardings(analysis: Analysis) -> dict[str, tuple[Tap, ...]]:
    """How taps lie on an explicit mesh, in the places of their arrays.

    Inputs and output-gradients are sharded over examples, as the outputs of the layer are.
    """
    return {
        captured.layer.name: tuple(_tap_sharding(analysis, group[0]) for group in captured.groups)
        for captured in analysis.layers
    }


def _tap_sharding(analysis: Analysis, use: Use) -> Tap:
    batching, sharding = analysis.batching(use), getattr(use.output.aval, "sharding", None)
    axes: tuple[str, ...] = ()
    if sharding is not None and batching.on_axis:
        axes = explicit.mesh_axes(sharding.spec, batching.number)
        if batching.examples % math.prod(sharding.mesh.shape[name] for name in axes):
            axes = ()
    spec: Any = jax.sharding.PartitionSpec
    return Tap(spec(None, axes), spec(None, None, axes), spec())


class _UseTap(NamedTuple):
    """What one use saw."""

    inputs: Shaped[Array, "B N S d_in"]
    output_grads: Shaped[Array, "V B N S d_out"]
    weights: Float[Array, "..."]


def layer_taps(captured: CapturedLayer, recorded: Recorded) -> tuple[Tap, ...]:
    """The taps of one layer, one for each group of uses."""
    return tuple(_group_tap(captured, group, recorded) for group in captured.groups)


def _group_tap(captured: CapturedLayer, group: Sequence[Use], recorded: Recorded) -> Tap:
    marks = recorded.analysis.marks_of(group)
    uses = [_use_tap(captured, use, marks, recorded) for use in group]
    dtype = jnp.result_type(*(use.inputs for use in uses))
    weights = [use.weights for use in uses]
    grads = [use.output_grads for use in uses]
    if captured.layer.kernel is None:
        # Every use sees the same input: their gradients add up before they are squared.
        uses, grads = uses[:1], [added(grads)]
        weights = [w if w.ndim == 1 else jnp.mean(w, axis=-1, keepdims=True) for w in weights[:1]]
    inputs = [use.inputs for use in uses]
    return Tap(
        jnp.concatenate([x.astype(dtype) for x in inputs], axis=2),
        jnp.concatenate(grads, axis=3),
        _side_by_side(weights, inputs),
    )


def _use_tap(
    captured: CapturedLayer, use: Use, marks: frozenset[int], recorded: Recorded
) -> _UseTap:
    analysis, linearized, output_grads, loss_weights = recorded
    form = Canonical(use, analysis.batching(use))
    scales = linearized.scales
    g = jax.vmap(lambda g: form.output_grads(g, scales))(output_grads[use])
    if captured.layer.kernel is None:
        # A bias alone has the same input, one, everywhere: its gradient is a plain sum.
        g = jnp.sum(g, axis=-2, keepdims=True)
        x = jnp.ones((*g.shape[1:4], 1), g.dtype)
    else:
        x = form.inputs(linearized.inputs[use], g.dtype, scales)
        if captured.layer.bias is not None:
            x = with_bias(x, captured.biased.get(use, 0))
    w = loss_weights.of(use, form, marks)
    taken = linearized.taken[use]
    if taken is not None:
        x, w = form.only_taken(x, w, taken)
    return _UseTap(x, g, w)


def _side_by_side(
    weights: Sequence[Float[Array, "..."]], inputs: Sequence[Shaped[Array, "B N S d_in"]]
) -> Float[Array, "..."]:
    """Weights of several uses as those of their positions one after the other."""
    if all(w.ndim == 1 for w in weights):
        return weights[0]
    by_block = any(w.ndim == 3 for w in weights)
    full = [
        jnp.broadcast_to(w[:, None] if w.ndim == 1 else w, x.shape[0 if by_block else 1 : 3])
        for w, x in zip(weights, inputs, strict=True)
    ]
    return jnp.concatenate(full, axis=-1)


def layer_moments(
    captured: CapturedLayer, recorded: Recorded, inside: Mapping[Use, InsideMoments]
) -> tuple[Moments, ...]:
    """The second moments of one layer, one for each group of uses.

    Args:
      captured: The layer.
      recorded: What was recorded of the loss.
      inside: The uses whose moments were formed inside.
    """
    if captured.groups[0][0] not in inside:
        return tuple(moments_of(captured.layer, tap) for tap in layer_taps(captured, recorded))
    return tuple(_group_moments(captured, group, recorded) for group in captured.groups)


def _group_moments(captured: CapturedLayer, group: Sequence[Use], recorded: Recorded) -> Moments:
    analysis, linearized, output_grads, loss_weights = recorded
    layer, marks = captured.seen_by(group), analysis.marks_of(group)
    inputs, outputs, totals, positions = [], [], [], 0
    for use in group:
        form = Canonical(use, analysis.batching(use))
        record, taken = linearized.inputs[use], linearized.taken[use]
        assert record is not None  # only of kernels moments are formed inside
        inputs.append(form.merged_blocks(record))
        outputs.append(form.merged_blocks(jnp.sum(output_grads[use], axis=0)))
        w = loss_weights.of(use, form, marks)
        if taken is not None:
            w = form.taken_weights(w, taken)
        totals.append(kfac.total_weight(w, form.positions))
        positions += form.positions
    input_sum, output_sum, total = map(added, (inputs, outputs, totals))
    # Diagonals have an axis of length one beside them.
    input_sum = input_sum[..., 0] if layer.has_diagonal_input else input_sum
    output_sum = output_sum[..., 0] if layer.has_diagonal_output else output_sum
    examples = analysis.batching(group[0]).examples
    if output_grads[group[0]].shape[0] == 0:  # no columns: the output factor is the identity
        output_sum = examples * contract.identities(
            layer.blocks, layer.d_out, dtype=output_sum.dtype, diagonal=layer.has_diagonal_output
        )
    safe = jnp.where(total > 0, total, 1)[(..., *[None] * (input_sum.ndim - 1))]
    weight = jnp.broadcast_to(total / positions, layer.blocks)
    return Moments(input_sum / safe, output_sum / examples, weight)
