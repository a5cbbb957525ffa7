"""Contractions of a tensor with one factor per axis.

Conventions, used by every kernel. A block is a tensor `X` of shape [d_1, ..., d_k] with n elements.
It has one factor per axis: dense `Q_i` of shape [d_i, d_i], or diagonal `q_i` of shape [d_i], which
is always real. `Q·X` applies factor i along axis i, for every i. The preconditioner is `P = QᴴQ`,
per axis.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

Precision = jax.lax.PrecisionLike


def along_axis(vector: Array, axis: int, ndim: int) -> Array:
    """Reshape a vector [d] so that it broadcasts along `axis` of a tensor with `ndim` axes."""
    return vector.reshape((1,) * axis + (-1,) + (1,) * (ndim - axis - 1))


def apply_factor(
    factor: Array, tensor: Array, axis: int, *, adjoint: bool = False, precision: Precision = None
) -> Array:
    """Apply one factor, or its conjugate transpose, along one axis of a tensor.

    Args:
      factor: dense [d, d] or diagonal [d].
      tensor: [d_1, ..., d_k] with `d_axis = d`.
      axis: the axis to contract, 0 ≤ axis < k.
      adjoint: apply the conjugate transpose instead.
      precision: of the matrix product.

    Returns:
      A tensor of the shape of `tensor`. Cost: 2·n·d operations if dense, n if diagonal.
    """
    if factor.ndim == 1:
        return tensor * along_axis(factor.conj() if adjoint else factor, axis, tensor.ndim)
    matrix, contracted = (factor.conj(), 0) if adjoint else (factor, 1)
    # The order of operands puts the new axis where it belongs without a transpose, where possible.
    if axis == tensor.ndim - 1:
        dims = (((axis,), (contracted,)), ((), ()))
        return jax.lax.dot_general(tensor, matrix, dims, precision=precision)
    dims = (((contracted,), (axis,)), ((), ()))
    result = jax.lax.dot_general(matrix, tensor, dims, precision=precision)
    return jnp.moveaxis(result, 0, axis)


def apply_factors(factors: Sequence[Array], tensor: Array, *, precision: Precision = None) -> Array:
    """`Q·X`: apply every factor along its axis.

    Args:
      factors: one per axis, [d_i, d_i] or [d_i].
      tensor: [d_1, ..., d_k].
      precision: of the matrix products.

    Returns:
      [d_1, ..., d_k]. Cost: 2·n·Σd_i operations over the dense axes.
    """
    for axis, factor in enumerate(factors):
        tensor = apply_factor(factor, tensor, axis, precision=precision)
    return tensor


def apply_adjoint(factors: Sequence[Array], tensor: Array, *, precision: Precision = None) -> Array:
    """`Qᴴ·X`: apply the conjugate transpose of every factor; arguments as `apply_factors`."""
    for axis, factor in enumerate(factors):
        tensor = apply_factor(factor, tensor, axis, adjoint=True, precision=precision)
    return tensor


def in_bases(
    bases: Sequence[Array | None],
    fn: Callable[[Array], Array],
    tensor: Array,
    *,
    precision: Precision = None,
) -> Array:
    """`Q f(Qᴴ·X)`: a function applied in a product of bases.

    Args:
      bases: one per axis, with orthonormal columns [d_i, d_i]; `None`: the identity.
      fn: maps tensors [d_1, ..., d_k] to such.
      tensor: [d_1, ..., d_k].
      precision: of the matrix products.

    Returns:
      [d_1, ..., d_k]. Cost: 4·n·Σd_i operations over the axes that have a basis.
    """
    turned = fn(into_bases(bases, tensor, precision=precision))
    return out_of_bases(bases, turned, precision=precision)


def into_bases(
    bases: Sequence[Array | None], tensor: Array, *, precision: Precision = None
) -> Array:
    """`Qᴴ·X`, the coordinates of a tensor in a product of bases; arguments as `in_bases`."""
    if all(basis is None for basis in bases):
        return tensor
    for basis in bases:
        # The first axis becomes the last: after all of them they are in order again, and none of
        # the products needs a transpose.
        if basis is None:
            tensor = jnp.moveaxis(tensor, 0, -1)
        else:
            dims = (((0,), (0,)), ((), ()))
            tensor = jax.lax.dot_general(tensor, basis.conj(), dims, precision=precision)
    return tensor


def out_of_bases(
    bases: Sequence[Array | None], tensor: Array, *, precision: Precision = None
) -> Array:
    """`Q·X`, the inverse of `into_bases`."""
    for axis, basis in enumerate(bases):
        if basis is not None:
            tensor = apply_factor(basis, tensor, axis, precision=precision)
    return tensor


def precondition(factors: Sequence[Array], tensor: Array, *, precision: Precision = None) -> Array:
    """`P·X = Qᴴ·(Q·X)`; arguments as `apply_factors`.

    Per axis the cheaper of two paths is taken: form `P_i` (2·d_i³) and apply it once, or apply
    `Q_i` and then its adjoint. Cost: Σ min(2·d_i³ + 2·n·d_i, 4·n·d_i) over the dense axes.
    """
    for axis, factor in enumerate(factors):
        if factor.ndim == 1 or factor.shape[0] ** 2 < tensor.size:
            tensor = apply_factor(
                square(factor, precision=precision), tensor, axis, precision=precision
            )
        else:
            tensor = apply_factor(factor, tensor, axis, precision=precision)
            tensor = apply_factor(factor, tensor, axis, adjoint=True, precision=precision)
    return tensor


def square(factor: Array, *, precision: Precision = None) -> Array:
    """`P_i = Q_iᴴQ_i` of one factor: [d, d] at 2·d³ operations, or [d]."""
    if factor.ndim == 1:
        return jnp.square(factor)
    return gram(factor.conj(), 1, precision=precision)


def gram(tensor: Array, axis: int, *, diagonal: bool = False, precision: Precision = None) -> Array:
    """`C_i(X) = unfold_i(X) unfold_i(X)ᴴ`, or its diagonal.

    Args:
      tensor: [d_1, ..., d_k].
      axis: the axis i that stays.
      diagonal: return only the diagonal.
      precision: of the matrix product.

    Returns:
      Hermitian [d_i, d_i], or real [d_i]. Cost: 2·n·d_i operations, or 2·n.
    """
    others = tuple(j for j in range(tensor.ndim) if j != axis)
    if diagonal:
        return jnp.sum(squared_magnitude(tensor), axis=others)
    dims = ((others, others), ((), ()))
    return jax.lax.dot_general(tensor, tensor.conj(), dims, precision=precision)


def unfold(tensor: Array, axis: int) -> Array:
    """`unfold_i(X)`: the tensor as a matrix [d_i, n / d_i]."""
    return jnp.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)


def fold(matrix: Array, axis: int, shape: Sequence[int]) -> Array:
    """The tensor of a given shape whose `unfold_i` is the matrix; the inverse of `unfold`."""
    others = [size for i, size in enumerate(shape) if i != axis]
    return jnp.moveaxis(matrix.reshape(shape[axis], *others), 0, axis)


def squared_magnitude(x: Array) -> Array:
    """`|x|²`, elementwise and real."""
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)


def wide_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The real dtype of the arithmetic on a floating-point dtype: float32, or float64 for that."""
    return jnp.dtype(jnp.float64 if jnp.finfo(dtype).bits > 32 else jnp.float32)


def widen(x: Array) -> Array:
    """The array in the dtype of the arithmetic, at least float32; complex stays complex."""
    return x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)


def complex_like(dtype: DTypeLike, is_complex: bool) -> jnp.dtype:
    """The real dtype, or the complex one of its precision (at least complex64)."""
    return jnp.promote_types(dtype, jnp.complex64) if is_complex else jnp.dtype(dtype)


def real_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The real dtype with the precision of `dtype`: float32 for complex64, and so on."""
    return jnp.finfo(dtype).dtype


def ragged_rows(rows: Sequence[Array]) -> Array:
    """Rows of arrays [N, d] in one array [ΣN, longest], zeros behind the shorter ones.

    So there is one kernel to compile for all, not one for each.
    """
    longest = max(x.shape[1] for x in rows)
    return jnp.concatenate([jnp.pad(x, ((0, 0), (0, longest - x.shape[1]))) for x in rows])


def scaled_blocks(x: Array, by: Array) -> Array:
    """Every block of [N, ...] times its own number, [N]."""
    return x * by.reshape(-1, *(1,) * (x.ndim - 1))
