"""EKFAC's eigenvalues of a layer, from its taps."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from optax_kron.kernels import contract, ekfac, kfac
from optax_kron.layers.moments import moments_of_member, weighed_inputs
from optax_kron.layers.plan import Member
from optax_kron.layers.taps import Moments, Tap


def eigenvalues_of_member(
    owner: str,
    member: Member,
    taps: Sequence[Tap | Moments],
    input_basis: Array | None,
    output_basis: Array | None,
    *,
    dtype: DTypeLike,
    precision: contract.Precision = None,
) -> Array:
    """The diagonal of a layer's curvature in a basis, from all groups of its taps.

    Args:
      owner: for messages.
      member: the layer, and which columns of its taps' inputs belong to it.
      taps: groups, in canonical form.
      input_basis: Q_a [B, d_in, d_in]; `None`: the identity.
      output_basis: Q_g [B, d_out, d_out]; `None`: the identity.
      dtype: of the eigenvalues.
      precision: of the matrix products.

    Returns:
      λ [B, d_in, d_out]: the sum over groups, as curvatures of terms of a loss add up.

    Raises:
      ValueError: for second moments in place of what each datum gave.
    """
    layer = member.layer

    def of_group(tap):
        if isinstance(tap, Moments):
            raise ValueError(
                f"{owner}: eigenvalues need what each datum gave, but the taps of layer "
                f"{layer.name!r} are second moments. Make the taps with reduce=False."
            )
        tap = weighed_inputs(member, tap)
        grads = tap.output_grads.astype(dtype)
        if layer.is_embedding:
            return ekfac.table_eigenvalues(
                tap.inputs, grads, layer.d_in, output_basis, precision=precision
            )
        inputs = tap.inputs.astype(dtype)
        return ekfac.eigenvalues(inputs, grads, input_basis, output_basis, precision=precision)

    if all(isinstance(tap, Tap) and tap.output_grads.shape[0] == 0 for tap in taps):
        # The output factor is the identity, and nothing is left to estimate.
        A = moments_of_member(owner, member, taps, dtype=dtype, precision=precision).input_factor
        if input_basis is not None:
            A = jnp.einsum("bij,bik,bkj->bj", input_basis, A, input_basis, precision=precision)
        return jnp.broadcast_to(A[..., None], (*A.shape, layer.d_out))
    first, *others = (of_group(tap) for tap in taps)
    return sum(others, first)


def seen_blocks(member: Member, taps: Sequence[Tap | Moments]) -> Array:
    """Whether any datum of any group weighs in a block, bool [B]."""
    found = jnp.zeros(member.layer.blocks, bool)
    for tap in taps:
        if isinstance(tap, Tap) and tap.weights is not None:
            found |= kfac.total_weight(tap.weights, tap.inputs.shape[2]) > 0
        else:
            return jnp.ones(member.layer.blocks, bool)
    return found
