"""Contractions of a tensor with one factor per axis.

Conventions, used by every kernel. A block is a tensor `X` of shape [d_1, ..., d_k] with n elements.
It has one factor per axis: dense `Q_i` of shape [d_i, d_i], or diagonal `q_i` of shape [d_i], which
is always real. `Q·X` applies factor i along axis i, for every i. The preconditioner is `P = QᴴQ`,
per axis.
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Inexact, Shaped

# A block of 64 × 32 × 3 with a diagonal factor on its first axis:
#   X [64, 32, 3], factors (q [64], Q [32, 32], Q [3, 3]);
#   gram(X, 1) [32, 32] sums over the axes 0 and 2; unfold(X, 1) is [32, 192].
Tensor = Inexact[Array, "*d"]
Factor = Inexact[Array, "d d"] | Float[Array, " d"]
# Orthonormal columns, or `None` for the identity, where an axis stays in its own coordinates.
Basis = Inexact[Array, "d d"] | None
Precision = jax.lax.PrecisionLike


def along_axis(vector: Shaped[Array, " d"], axis: int, ndim: int) -> Shaped[Array, "..."]:
    """Reshape a vector so that it broadcasts along `axis` of a tensor with `ndim` axes."""
    return vector.reshape((1,) * axis + (-1,) + (1,) * (ndim - axis - 1))


def apply_factor(
    factor: Factor, tensor: Tensor, axis: int, *, adjoint: bool = False, precision: Precision = None
) -> Tensor:
    """Apply one factor, or its conjugate transpose, along one axis of a tensor.

    Args:
      factor: The factor, of the length of that axis.
      tensor: The tensor to apply it to.
      axis: The axis to contract, 0 ≤ axis < k.
      adjoint: Whether to apply the conjugate transpose instead.
      precision: Precision of the matrix product.

    Returns:
      A tensor of the same shape. Cost: 2·n·d operations if dense, n if diagonal.
    """
    if factor.ndim == 1:
        return tensor * along_axis(factor.conj() if adjoint else factor, axis, tensor.ndim)
    matrix, contracted = (factor.conj(), 0) if adjoint else (factor, 1)
    # dot_general puts the free axes of its left operand first. With the tensor on the left the new
    # axis comes out last, with the matrix on the left first: for those two axes no transpose is
    # needed.
    if axis == tensor.ndim - 1:
        dims = (((axis,), (contracted,)), ((), ()))
        return jax.lax.dot_general(tensor, matrix, dims, precision=precision)
    dims = (((contracted,), (axis,)), ((), ()))
    result = jax.lax.dot_general(matrix, tensor, dims, precision=precision)
    return jnp.moveaxis(result, 0, axis)


def apply_factors(
    factors: Sequence[Factor], tensor: Tensor, *, precision: Precision = None
) -> Tensor:
    """`Q·X`: apply every factor along its axis.

    Args:
      factors: One factor per axis.
      tensor: The tensor `X`.
      precision: Precision of the matrix products.

    Returns:
      A tensor of the same shape. Cost: 2·n·Σd_i operations over the dense axes.
    """
    for axis, factor in enumerate(factors):
        tensor = apply_factor(factor, tensor, axis, precision=precision)
    return tensor


def in_bases(
    bases: Sequence[Basis],
    fn: Callable[[Tensor], Tensor],
    tensor: Tensor,
    *,
    precision: Precision = None,
) -> Tensor:
    """`Q f(Qᴴ·X)`: a function applied in a product of bases.

    Args:
      bases: One basis per axis; `None` is the identity.
      fn: The function, from a tensor to one of the same shape.
      tensor: The tensor `X`.
      precision: Precision of the matrix products.

    Returns:
      A tensor of the same shape. Cost: 4·n·Σd_i operations over the axes that have a basis.
    """
    return out_of_bases(
        bases, fn(into_bases(bases, tensor, precision=precision)), precision=precision
    )


def into_bases(bases: Sequence[Basis], tensor: Tensor, *, precision: Precision = None) -> Tensor:
    """`Qᴴ·X`, the coordinates of a tensor in a product of bases; arguments as `in_bases`."""
    if all(basis is None for basis in bases):
        return tensor
    for basis in bases:
        # The first axis becomes the last: [d_1, d_2, d_3] → [d_2, d_3, d_1] → ... After all axes
        # they are in order again, and none of the products needs a transpose.
        if basis is None:
            tensor = jnp.moveaxis(tensor, 0, -1)
        else:
            dims = (((0,), (0,)), ((), ()))
            tensor = jax.lax.dot_general(tensor, basis.conj(), dims, precision=precision)
    return tensor


def out_of_bases(bases: Sequence[Basis], tensor: Tensor, *, precision: Precision = None) -> Tensor:
    """`Q·X`, the inverse of `into_bases`."""
    for axis, basis in enumerate(bases):
        if basis is not None:
            tensor = apply_factor(basis, tensor, axis, precision=precision)
    return tensor


def precondition(
    factors: Sequence[Factor], tensor: Tensor, *, precision: Precision = None
) -> Tensor:
    """`P·X = Qᴴ·(Q·X)`; arguments as `apply_factors`.

    Per axis the cheaper of two paths is taken: form `P_i` (2·d_i³) and apply it once, or apply
    `Q_i` and then its adjoint. Cost: Σ min(2·d_i³ + 2·n·d_i, 4·n·d_i) over the dense axes.
    """
    for axis, factor in enumerate(factors):
        if factor.ndim == 1 or factor.shape[0] ** 2 < tensor.size:
            squared = square(factor, precision=precision)
            tensor = apply_factor(squared, tensor, axis, precision=precision)
        else:
            tensor = apply_factor(factor, tensor, axis, precision=precision)
            tensor = apply_factor(factor, tensor, axis, adjoint=True, precision=precision)
    return tensor


def square(factor: Factor, *, precision: Precision = None) -> Factor:
    """`P_i = Q_iᴴQ_i` of one factor. Cost: 2·d³ operations if dense."""
    if factor.ndim == 1:
        return jnp.square(factor)
    return gram(factor.conj(), 1, precision=precision)


def gram(
    tensor: Tensor, axis: int, *, diagonal: bool = False, precision: Precision = None
) -> Factor:
    """`C_i(X) = unfold_i(X) unfold_i(X)ᴴ`, or its diagonal.

    Args:
      tensor: The tensor `X`.
      axis: The axis i that stays.
      diagonal: Whether to return only the diagonal, which is real.
      precision: Precision of the matrix product.

    Returns:
      The Hermitian matrix, or its diagonal. Cost: 2·n·d_i operations, or 2·n.
    """
    others = tuple(j for j in range(tensor.ndim) if j != axis)
    if diagonal:
        return jnp.sum(squared_magnitude(tensor), axis=others)
    dims = ((others, others), ((), ()))
    return jax.lax.dot_general(tensor, tensor.conj(), dims, precision=precision)


def unfold(tensor: Tensor, axis: int) -> Inexact[Array, "d m"]:
    """`unfold_i(X)`: the tensor as a matrix, m = n / d."""
    return jnp.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)


def fold(matrix: Inexact[Array, "d m"], axis: int, shape: Sequence[int]) -> Tensor:
    """The tensor of a given shape whose `unfold_i` is the matrix; the inverse of `unfold`."""
    others = [size for i, size in enumerate(shape) if i != axis]
    return jnp.moveaxis(matrix.reshape(shape[axis], *others), 0, axis)


def matmul_exact(
    x: Inexact[Array, "*batch m k"], y: Inexact[Array, "*batch k n"]
) -> Inexact[Array, "*batch m n"]:
    """`x y`, where the rounding of an accelerator's default precision would ruin the result."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def all_finite(x: Array, axis: int | tuple[int, ...] | None = None) -> Bool[Array, "..."]:
    """Whether all elements are finite, or all along some axes; one reduction, without an array."""
    return jnp.isfinite(_zero_if_finite(x, axis))


def largest_magnitude(x: Array, axis: int | tuple[int, ...] | None = None) -> Float[Array, "..."]:
    """The largest magnitude of a real or imaginary part; NaN if any is not finite, zero if none."""
    return unit_of(x, axis) + _zero_if_finite(x, axis)


def unit_of(x: Array, axis: int | tuple[int, ...] | None = None) -> Float[Array, "..."]:
    """The largest magnitude, as a unit of numbers that show by themselves if one is not finite.

    XLA's maximum loses NaN: on CPU from about a thousand elements on, as it takes them by a tree.
    """
    parts = (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)
    return functools.reduce(jnp.maximum, (jnp.max(jnp.abs(y), axis, initial=0) for y in parts))


def _zero_if_finite(x: Array, axis: int | tuple[int, ...] | None) -> Float[Array, "..."]:
    # No sum loses NaN, and infinity times zero is NaN. A third of the time of isfinite and all.
    if jnp.iscomplexobj(x):
        return _zero_if_finite(x.real, axis) + _zero_if_finite(x.imag, axis)
    return jnp.sum(x * 0, axis=axis)


def safe_divisor(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Numbers to divide by, one where they are below the smallest normal one.

    XLA makes `(a / b) / x` to `a / (b x)`, where a tiny number in place of zero would underflow.
    """
    return jnp.where(x < jnp.finfo(x.dtype).tiny, 1, x)


def squared_magnitude(x: Inexact[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`|x|²`, elementwise and real."""
    # jnp.abs would take a square root that squaring undoes.
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)


def norm(x: Inexact[Array, "..."], axis: tuple[int, ...]) -> Float[Array, "..."]:
    """The norm along some axes, which stay as axes of one; squares neither overflow nor vanish."""
    unit = safe_divisor(jnp.expand_dims(unit_of(x, axis), axis))
    return unit * jnp.sqrt(jnp.sum(squared_magnitude(x / unit), axis=axis, keepdims=True))


def wide_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The real dtype of the arithmetic on a floating-point dtype: float32, or float64 for that."""
    return jnp.dtype(jnp.float64 if jnp.finfo(dtype).bits > 32 else jnp.float32)


def widest_dtype(arrays: Iterable[Inexact[Array, "..."]]) -> jnp.dtype:
    """The real dtype of the arithmetic on several arrays: float64 if any asks for it."""
    wide = [wide_dtype(real_dtype(x.dtype)) for x in arrays]
    return max([jnp.dtype(jnp.float32), *wide], key=lambda dtype: dtype.itemsize)


def widen(x: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
    """The array in the dtype of the arithmetic, at least float32; complex stays complex."""
    return x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)


def identities(count: int, size: int, dtype: DTypeLike, *, diagonal: bool = False) -> Array:
    """So many identity matrices [N, d, d], or their diagonals [N, d]."""
    if diagonal:
        return jnp.ones((count, size), dtype)
    return jnp.tile(jnp.eye(size, dtype=dtype), (count, 1, 1))


def complex_like(dtype: DTypeLike, is_complex: bool) -> jnp.dtype:
    """The real dtype, or the complex one of its precision (at least complex64)."""
    if not is_complex:
        return jnp.dtype(dtype)
    return jnp.dtype(jnp.complex128 if wide_dtype(dtype) == jnp.float64 else jnp.complex64)


def real_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The real dtype with the precision of `dtype`: float32 for complex64, and so on."""
    return jnp.finfo(dtype).dtype


def ragged_rows(rows: Sequence[Shaped[Array, "N d"]]) -> Shaped[Array, "total longest"]:
    """The rows of several arrays, each with its own N and d, with zeros behind the shorter ones.

    So there is one kernel to compile for all, not one for each.
    """
    longest = max(x.shape[1] for x in rows)
    return jnp.concatenate([jnp.pad(x, ((0, 0), (0, longest - x.shape[1]))) for x in rows])


def scaled_blocks(
    x: Inexact[Array, "N ..."], scale: Inexact[Array, " N"]
) -> Inexact[Array, "N ..."]:
    """Every block of a stack times a scale of its own."""
    return x * scale.reshape(-1, *(1,) * (x.ndim - 1))
