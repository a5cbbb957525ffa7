"""Second moments of what a layer saw: its Kronecker factors for one batch."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from optax_kron.kernels import contract, kfac
from optax_kron.layers.layer import Layer
from optax_kron.layers.plan import Member
from optax_kron.layers.taps import Moments, Tap


def moments_of(
    layer: Layer,
    tap: Tap,
    *,
    approx: str = "expand",
    dtype: DTypeLike | None = None,
    precision: contract.Precision = None,
) -> Moments:
    """The second moments of a tap in canonical form.

    Args:
      layer: that the tap belongs to. A bias alone is always reduced.
      tap: what it saw.
      approx: "expand" or "reduce", as in `ok.kfac`.
      dtype: of the moments; `None`: that of the output-gradients, at least float32.
      precision: of the matrix products.
    """
    approx = "reduce" if layer.kernel is None else approx
    dtype = contract.wide_dtype(tap.output_grads.dtype) if dtype is None else dtype
    weights = None if tap.weights is None else tap.weights.astype(dtype)
    settings: Any = {"approx": approx, "precision": precision}
    if layer.is_embedding:
        inputs = kfac.index_frequencies(tap.inputs, layer.d_in, weights, dtype=dtype)
    else:
        x = tap.inputs.astype(dtype)
        inputs = kfac.input_moment(x, weights, diagonal=layer.has_diagonal_input, **settings)
    grads = tap.output_grads.astype(dtype)
    outputs = kfac.output_moment(grads, diagonal=layer.has_diagonal_output, **settings)
    blocks, data, positions, _ = tap.inputs.shape
    if weights is None:
        weight = jnp.asarray(data * (1 if approx == "reduce" else positions), dtype)
    else:
        weight = kfac.total_weight(weights, positions) / positions
    return Moments(inputs, outputs, jnp.broadcast_to(weight, blocks))


def moments_of_member(
    owner: str,
    member: Member,
    taps: Sequence[Tap | Moments],
    *,
    approx: str = "expand",
    dtype: DTypeLike,
    precision: contract.Precision = None,
) -> Moments:
    """The second moments of a layer from all groups of its taps.

    Args:
      owner: for messages.
      member: the layer, and which columns of its taps' inputs belong to it.
      taps: groups, in canonical form.
      approx: as in `moments_of`.
      dtype: of the moments.
      precision: of the matrix products.

    Raises:
      ValueError: for second moments where `approx` needs what each datum gave.
    """

    def of_group(tap):
        layer, columns = member.layer, member.columns
        if isinstance(tap, Tap):
            return moments_of(
                layer, own_columns(member, tap), approx=approx, dtype=dtype, precision=precision
            )
        if approx == "reduce" and layer.kernel is not None:
            raise ValueError(
                f"{owner}: approx='reduce' needs what each datum gave, but the taps of layer "
                f"{layer.name!r} are second moments, which 'expand' has. Make the taps with "
                "reduce=False, or take approx='expand'."
            )
        inputs = tap.input_factor.astype(dtype)
        if not layer.is_embedding:
            inputs = inputs[..., columns] if inputs.ndim == 2 else inputs[..., columns, columns]
        if inputs.ndim == 2 and not layer.has_diagonal_input:
            inputs = inputs[..., None]  # of a wide kernel that is hidden, the bias's one is left
        weight = jnp.broadcast_to(tap.weight.astype(dtype), layer.blocks)
        return Moments(inputs, tap.output_factor.astype(dtype), weight)

    found = combined([of_group(tap) for tap in taps])
    if all(isinstance(tap, Tap) and tap.output_grads.shape[0] == 0 for tap in taps):
        return found._replace(output_factor=of_group(taps[0]).output_factor)  # no sum of identities
    return found


def own_columns(member: Member, tap: Tap) -> Tap:
    """A tap without the inputs of parameters that are hidden."""
    if member.layer.is_embedding:
        return tap
    return tap._replace(inputs=tap.inputs[..., member.columns])


def weighed_inputs(member: Member, tap: Tap) -> Tap:
    """`own_columns`, with zeros for inputs whose weight is zero, as they may be anything."""
    tap = own_columns(member, tap)
    if member.layer.is_embedding or tap.weights is None:
        return tap
    w = tap.weights if tap.weights.ndim == 3 else tap.weights.reshape(1, len(tap.weights), -1)
    return tap._replace(inputs=jnp.where(w[..., None] > 0, tap.inputs, 0))


def combined(moments: Sequence[Moments]) -> Moments:
    """Second moments of a sum of losses from those of the terms.

    The input factor is the mean, by what the data of each weigh in the loss; the output factor is
    the sum, as curvatures add up.
    """
    if len(moments) == 1:
        return moments[0]
    total = sum(m.weight for m in moments[1:]) + moments[0].weight
    safe = jnp.where(total > 0, total, 1)
    inputs = [contract.scaled_blocks(m.input_factor, m.weight / safe) for m in moments]
    outputs = [m.output_factor for m in moments]
    return Moments(sum(inputs[1:], inputs[0]), sum(outputs[1:], outputs[0]), total)


def with_bias(x: Array, biased: bool) -> Array:
    """Inputs with a column more, the input of the bias: one, or zero for a use without it."""
    column = jnp.full((*x.shape[:-1], 1), 1 if biased else 0, x.dtype)
    return jnp.concatenate([x, column], axis=-1)
