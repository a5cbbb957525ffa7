"""EKFAC's eigenvalues of a layer, from its taps."""

# Worked example: inputs [1, 7, 5, 4] and output_grads [1, 1, 7, 5, 2], bases Q_a [1, 4, 4] and
# Q_g [1, 2, 2]. The gradient of an example is [4, 2], a sum over 5 positions; λ [1, 4, 2] is the
# mean over 7 examples of the squares of its coordinates Q_aᵀ (·) Q_g.

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from optax_kron.kernels import contract, ekfac, kfac
from optax_kron.kernels.eigenbases import rayleigh_quotients
from optax_kron.layers.moments import masked_inputs, moments_of_blocks, moments_of_uses
from optax_kron.layers.plan import Member
from optax_kron.layers.taps import Moments, Tap


def eigenvalues_of_member(
    owner: str,
    member: Member,
    taps: Sequence[Tap | Moments],
    input_basis: Float[Array, "B d_in d_in"] | None,
    output_basis: Float[Array, "B d_out d_out"] | None,
    *,
    dtype: DTypeLike,
    precision: contract.Precision = None,
) -> Float[Array, "B d_in d_out"]:
    """The diagonal of a layer's curvature in a basis, from all groups of its taps.

    Args:
      owner: Name of the optimizer or operator, for messages.
      member: The layer, and which columns of its taps' inputs belong to it.
      taps: Groups of taps, in canonical form.
      input_basis: Q_a; `None`: the identity. Of blocks that one block of the layer was cut into,
        the first one's is taken.
      output_basis: Q_g; likewise.
      dtype: Dtype of the eigenvalues.
      precision: Precision of the matrix products.

    Returns:
      λ, the sum over groups, as curvatures of terms of a loss add up. So it is over the uses of a
      tied embedding: products of what one and what the other gives to one example are left out.

    Raises:
      ValueError: For second moments in place of what each example gave.
    """
    shared = tuple(map(member.cut.first, (input_basis, output_basis)))

    def of_group(tap: Tap | Moments) -> Array:
        seen = member.seen_as(tap)
        layer = seen.uncut
        if isinstance(tap, Moments):
            raise ValueError(
                f"{owner}: eigenvalues need what each example gave, but the taps of layer "
                f"{layer.name!r} are second moments. Make the taps with reduce=False."
            )
        inputs, grads, _ = masked_inputs(seen, tap)
        grads = grads.astype(dtype)
        if layer.table_rows is not None:
            return ekfac.table_eigenvalues(
                inputs, grads, layer.table_rows, shared[1], precision=precision
            )
        inputs = inputs.astype(dtype)
        if seen is not member:  # the head of a tied embedding, whose inputs are over the width
            return ekfac.eigenvalues(inputs, grads, *shared[::-1], precision=precision).mT
        return ekfac.eigenvalues(inputs, grads, *shared, precision=precision)

    if all(isinstance(tap, Tap) and tap.output_grads.shape[0] == 0 for tap in taps):
        # The output factor is the identity, and nothing is left to estimate.
        uses = moments_of_uses(owner, member, taps, dtype=dtype, precision=precision)
        bases = input_basis, output_basis
        first, *others = (_without_columns(member, use, bases, precision) for use in uses)
        return sum(others, first)
    first, *others = (of_group(tap) for tap in taps)
    return member.cut.values(sum(others, first))


def _without_columns(member, use, bases, precision):
    """The diagonal of `A ⊗ G` of one use, where G or, of a tied embedding's head, A is one."""
    factors = moments_of_blocks(member, [use])[:2]
    diagonals = [
        factor if factor.ndim == 2 else _diagonal(factor, basis, precision)
        for factor, basis in zip(factors, bases, strict=True)
    ]
    return diagonals[0][:, :, None] * diagonals[1][:, None]


def _diagonal(factor, basis, precision):
    if basis is None:
        return jnp.diagonal(factor, axis1=1, axis2=2)
    return rayleigh_quotients(basis, factor, precision=precision)


def seen_blocks(member: Member, taps: Sequence[Tap | Moments]) -> Bool[Array, " B"]:
    """Whether any example of any group has a weight above zero in a block."""
    seen = jnp.zeros(member.uncut.blocks, bool)
    for tap in taps:
        if not isinstance(tap, Tap) or tap.weights is None:
            return jnp.ones(member.layer.blocks, bool)
        seen |= kfac.total_weight(tap.weights, tap.inputs.shape[2]) > 0
    return member.cut.repeated(seen)
