"""Second moments of what a layer saw: its Kronecker factors for one batch."""

# Worked example: a dense layer with a bias, kernel [3, 2], applied to 7 examples at 5 positions.
#
#   tap.inputs [1, 7, 5, 4]               the bias's column of ones last
#   tap.output_grads [1, 1, 7, 5, 2]      of one column, as of fisher="mc"
#   moments_of(layer, tap)                A [1, 4, 4], a mean over 7·5 cases, 1 in its last corner
#                                         G [1, 2, 2], a mean over 7, the sum over the rest
#                                         weight [1], 35 without weights of the loss
#
# A parameter that is used in two batches, of 7 and of 20 examples, has two groups of taps. The
# curvature of its layer is A ⊗ G with G_1 + G_2, as curvatures add up, and with the mean of A_1
# and A_2 by their weights.

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped

from optax_kron.kernels import contract, kfac
from optax_kron.layers.layer import Layer
from optax_kron.layers.plan import Member
from optax_kron.layers.taps import Moments, Tap
from optax_kron.layers.tied import by_use, nearest, seen_as


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
      layer: The layer that the tap belongs to. A bias alone is always reduced.
      tap: What the layer saw.
      approx: "expand" or "reduce", as in `ok.kfac`.
      dtype: Dtype of the moments; `None`: that of the output-gradients, at least float32.
      precision: Precision of the matrix products.
    """
    layer = seen_as(layer, tap)
    # A bias alone has the input one at all positions, so that reducing is exact.
    approx = "reduce" if layer.kernel is None else approx
    dtype = contract.wide_dtype(tap.output_grads.dtype) if dtype is None else dtype
    weights = None if tap.weights is None else tap.weights.astype(dtype)
    if layer.table_rows is not None:
        A = kfac.index_frequencies(tap.inputs, layer.table_rows, weights, dtype=dtype)
    else:
        A = kfac.input_moment(
            tap.inputs.astype(dtype),
            weights,
            approx=approx,
            diagonal=layer.has_diagonal_input,
            precision=precision,
        )
    gradients = tap.output_grads
    G = kfac.output_moment(
        gradients if dtype == contract.wide_dtype(gradients.dtype) else gradients.astype(dtype),
        approx=approx,
        diagonal=layer.has_diagonal_output,
        precision=precision,
    )
    blocks, examples, positions, _ = tap.inputs.shape
    if weights is None:
        weight = jnp.asarray(examples * (1 if approx == "reduce" else positions), dtype)
    else:
        weight = kfac.total_weight(weights, positions) / positions
    return Moments(A, G, jnp.broadcast_to(weight, blocks))


def moments_of_blocks(member: Member, uses: Sequence[Moments]) -> Moments:
    """The second moments of a layer's blocks from those of its uses."""
    together = nearest(member.uncut, uses) if member.uncut.is_tied else uses[0]
    return member.cut.moments(together)


def moments_of_uses(
    owner: str,
    member: Member,
    taps: Sequence[Tap | Moments],
    *,
    approx: str = "expand",
    dtype: DTypeLike,
    precision: contract.Precision = None,
) -> tuple[Moments, ...]:
    """The second moments of a layer's uses: one, but for the two of a tied embedding.

    Args:
      owner: Name of the optimizer or operator, for messages.
      member: The layer, and which columns of its taps' inputs belong to it.
      taps: Groups of taps, in canonical form.
      approx: As in `moments_of`.
      dtype: Dtype of the moments.
      precision: Precision of the matrix products.

    Raises:
      ValueError: For second moments where `approx` needs what each example gave.
    """

    def of_group(tap: Tap | Moments) -> Moments:
        seen = member.seen_as(tap)
        if isinstance(tap, Moments):
            return _visible_moments(owner, seen, tap, approx, dtype)
        tap = visible_inputs(seen, tap)
        return moments_of(seen.uncut, tap, approx=approx, dtype=dtype, precision=precision)

    def of_use(taps: Sequence[Tap | Moments]) -> Moments:
        moments = combined([of_group(tap) for tap in taps])
        if all(isinstance(tap, Tap) and tap.output_grads.shape[0] == 0 for tap in taps):
            # Without columns every group's output factor is the identity, and so is that of all.
            moments = moments._replace(output_factor=of_group(taps[0]).output_factor)
        return moments

    return tuple(map(of_use, by_use(member.uncut, taps)))


def _visible_moments(
    owner: str, member: Member, moments: Moments, approx: str, dtype: DTypeLike
) -> Moments:
    """Second moments without the inputs of parameters that are hidden, in another dtype."""
    layer, columns = member.uncut, member.columns
    if approx == "reduce" and layer.kernel is not None:
        raise ValueError(
            f"{owner}: approx='reduce' needs what each example gave, but the taps of layer "
            f"{layer.name!r} are second moments, which 'expand' has. Make the taps with "
            "reduce=False, or take approx='expand'."
        )
    A = moments.input_factor.astype(dtype)
    A = A[..., columns] if A.ndim == 2 else A[..., columns, columns]
    if A.ndim == 2 and not layer.has_diagonal_input:
        # Of a wide kernel that is hidden the bias's entry [B, 1] is left, a dense factor.
        A = A[..., None]
    weight = jnp.broadcast_to(moments.weight.astype(dtype), layer.blocks)
    return Moments(A, moments.output_factor.astype(dtype), weight)


def visible_inputs(member: Member, tap: Tap) -> Tap:
    """A tap without the inputs of parameters that are hidden."""
    return tap._replace(inputs=tap.inputs[..., member.columns])


def masked_inputs(member: Member, tap: Tap) -> Tap:
    """`visible_inputs`, with zeros for those whose weight is zero, as they may be anything."""
    tap = visible_inputs(member, tap)
    if member.uncut.is_embedding or tap.weights is None:
        return tap  # the output-gradients beside an index are zero, and the index is finite
    w = tap.weights if tap.weights.ndim == 3 else tap.weights.reshape(1, len(tap.weights), -1)
    return tap._replace(inputs=jnp.where(w[..., None] > 0, tap.inputs, 0))


def combined(moments: Sequence[Moments]) -> Moments:
    """Second moments of a sum of losses from those of the terms.

    The input factor is the mean, by the total weight of each term; the output factor is the sum, as
    curvatures add up.
    """
    if len(moments) == 1:
        return moments[0]
    total = sum(m.weight for m in moments[1:]) + moments[0].weight
    safe = jnp.where(total > 0, total, 1)
    inputs = [contract.scaled_blocks(m.input_factor, m.weight / safe) for m in moments]
    outputs = [m.output_factor for m in moments]
    return Moments(sum(inputs[1:], inputs[0]), sum(outputs[1:], outputs[0]), total)


def with_bias(x: Shaped[Array, "*batch d"], value: float) -> Shaped[Array, "*batch d+1"]:
    """Inputs with a column more, the input of the bias.

    Args:
      x: The inputs of the kernel.
      value: One; minus one where the bias is subtracted; zero for a use without it.
    """
    # Like a column of the inputs, which may be sharded.
    column = jnp.full_like(x[..., :1], value)
    return jnp.concatenate([x, column], axis=-1)
