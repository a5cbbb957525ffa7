"""Products with upper triangular factors, by panels that skip the half that is zero.

Conventions for axes and factors are those of `kernels.contract`. A worked example, for Q [1024,
1024] and X [1024, 256]: of 4 panels of 256 rows, rows 256 to 512 of Q X are Q[256:512, 256:] [256,
768] times X[256:] [768, 256], and so on; in all 10/16 of the operations of a whole product. `Qᴴ` is
taken by panels of columns of Q likewise.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from optax_kron.kernels import contract

_PANELS = 4
# Narrower ones cost more to start than they skip. On a CPU 4 panels take 1.3 to 1.6 times as long
# as one product with P, and 2 or 8 take no less; Q and then Qᴴ as a whole take 2.2 times as long.
_LEAST_PANEL = 64


def apply_upper(
    upper: contract.Factor,
    tensor: contract.Tensor,
    axis: int,
    *,
    adjoint: bool = False,
    precision: contract.Precision = None,
) -> contract.Tensor:
    """Apply an upper triangular factor, or its conjugate transpose, along one axis of a tensor.

    Args:
      upper: The factor, zero below its diagonal, or a diagonal factor.
      tensor: The tensor to apply it to.
      axis: The axis to contract, 0 ≤ axis < k.
      adjoint: Whether to apply the conjugate transpose instead.
      precision: Precision of the matrix products.

    Returns:
      A tensor of the same shape. Cost: 1.25·n·d operations if dense and d ≥ 256, 2·n·d below, n if
      diagonal.
    """
    size = upper.shape[0]
    if upper.ndim == 1 or size < _PANELS * _LEAST_PANEL:
        return contract.apply_factor(upper, tensor, axis, adjoint=adjoint, precision=precision)
    panel = -(-size // _PANELS)
    made = []
    for start in range(0, size, panel):
        stop = min(start + panel, size)
        if adjoint:
            part, first, last = upper[:stop, start:stop], 0, stop
        else:
            part, first, last = upper[start:stop, start:], start, size
        seen = jax.lax.slice_in_dim(tensor, first, last, axis=axis)
        made.append(contract.apply_factor(part, seen, axis, adjoint=adjoint, precision=precision))
    return jnp.concatenate(made, axis=axis)


def apply_uppers(
    uppers: Sequence[contract.Factor],
    tensor: contract.Tensor,
    *,
    precision: contract.Precision = None,
) -> contract.Tensor:
    """`Q·X`, as `contract.apply_factors`. Cost: as `apply_upper`, summed over the axes."""
    for axis, upper in enumerate(uppers):
        tensor = apply_upper(upper, tensor, axis, precision=precision)
    return tensor


def precondition(
    uppers: Sequence[contract.Factor],
    tensor: contract.Tensor,
    *,
    precision: contract.Precision = None,
) -> contract.Tensor:
    """`P·X = Qᴴ·(Q·X)`, as `contract.precondition`.

    Per axis the cheaper of two paths is taken: form `P_i` (2·d_i³) and apply it once, or apply
    `Q_i` and then its adjoint. Cost: Σ min(2·d_i³ + 2·n·d_i, 2.5·n·d_i) over the dense axes with
    d_i ≥ 256, and as `contract.precondition` over shorter ones.
    """
    for axis, upper in enumerate(uppers):
        size = upper.shape[0]
        skips = upper.ndim == 2 and size >= _PANELS * _LEAST_PANEL
        if upper.ndim == 1 or size**2 * (4 if skips else 1) < tensor.size:
            squared = contract.square(upper, precision=precision)
            tensor = contract.apply_factor(squared, tensor, axis, precision=precision)
        else:
            tensor = apply_upper(upper, tensor, axis, precision=precision)
            tensor = apply_upper(upper, tensor, axis, adjoint=True, precision=precision)
    return tensor
