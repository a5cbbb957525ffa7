"""Hermitian matrices in half the numbers: the rectangular full packed form.

One of the two halves of a Hermitian matrix tells the other. The packed form of S [d, d] is a
rectangle of d (d + 1) / 2 numbers, which is cut, blended and moved like any other array. For an
even d = 2k it is [2k + 1, k], for an odd d = 2k + 1 it is [2k + 1, k + 1]. For d = 4 and d = 5,

    S = a              packed = i j'             S = a                packed = a m n'
        b c                     a k                  b c                       b c o
        d e i                   b c                  d e f                     d e f
        g h j k                 d e                  g h i m                   g h i
                                g h                  j k l n o                 j k l

(lower halves of S; a prime marks what is mirrored, and so conjugated): S is cut into `A11`, `A21`
and `A22`, of which `A21` is kept whole, below the lower triangle of `A11` and the upper triangle of
`A22`, which fill one another up. Nothing is gathered: it takes slices, transposes and a choice
between two arrays.

Source: Gustavson, Waśniewski, Dongarra and Langou (2010), doi:10.1145/1731022.1731028.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact

from optax_kron.kernels import contract

# From this size on matrices are worth packing; smaller ones are few numbers, and are kept whole.
LEAST_SIZE = 256

Packed = Inexact[Array, "*batch r c"]


def pack(matrix: Inexact[Array, "*batch d d"]) -> Packed:
    """The packed form of Hermitian matrices.

    Args:
      matrix: S, of which the lower triangle is read, but of the second half of its rows and columns
        the upper one.

    Returns:
      d (d + 1) / 2 numbers, as said above. No operations.
    """
    size = matrix.shape[-1]
    half = (size + 1) // 2
    left = _part(matrix, (half, size), (0, half))
    first, second = _part(matrix, (0, half), (0, half)), _part(matrix, (half, size), (half, size))
    return _assembled(first, left, second)


def unpack(packed: Packed) -> Inexact[Array, "*batch d d"]:
    """The matrices of a packed form: `unpack(pack(S)) == S`, to the bit. No operations."""
    first, cross, second = halves(packed)
    above = jnp.concatenate([first, cross.conj().mT], axis=-1)
    return jnp.concatenate([above, jnp.concatenate([cross, second], axis=-1)], axis=-2)


def halves(
    packed: Packed,
) -> tuple[
    Inexact[Array, "*batch h h"], Inexact[Array, "*batch l h"], Inexact[Array, "*batch l l"]
]:
    """The blocks `A11`, `A21` and `A22` of the matrices of a packed form, d = h + l."""
    size = size_of(packed)
    half, even = (size + 1) // 2, int(size % 2 == 0)
    cross = _part(packed, (half + even, packed.shape[-2]), (0, half))
    lower = _part(packed, (even, half + even), (0, half))
    upper = _part(packed, (0, size - half), (1 - even, half))
    first = jnp.where(_lower(lower), lower, lower.conj().mT)
    second = jnp.where(_lower(upper, -1), upper.conj().mT, upper)
    return first, cross, second


def size_of(packed: Packed) -> int:
    """The d of a packed form."""
    rows, columns = packed.shape[-2:]
    return rows if rows < 2 * columns else 2 * columns


def gram(
    tensor: contract.Tensor, axis: int, *, precision: contract.Precision = None
) -> Inexact[Array, "r c"]:
    """The packed form of `contract.gram`, a Hermitian matrix [d_i, d_i].

    Cost: 1.5·n·d_i operations, as what is mirrored is not computed.
    """
    size = tensor.shape[axis]
    half = (size + 1) // 2
    first = jax.lax.slice_in_dim(tensor, 0, half, axis=axis)
    second = jax.lax.slice_in_dim(tensor, half, size, axis=axis)
    others = tuple(j for j in range(tensor.ndim) if j != axis)

    def product(left, right):
        dims = ((others, others), ((), ()))
        return jax.lax.dot_general(left, right.conj(), dims, precision=precision)

    return _assembled(product(first, first), product(second, first), product(second, second))


def _assembled(first: Array, cross: Array, second: Array) -> Packed:
    even = first.shape[-1] == second.shape[-1]
    # The triangles in one rectangle: below its diagonal, and above it.
    lower = _padded(first, above=even)
    upper = _padded(second, below=1, left=1 - even)
    triangles = jnp.where(_lower(lower, -even), lower, upper)
    return jnp.concatenate([triangles, cross], axis=-2)


def _part(x: Array, rows: tuple[int, int], columns: tuple[int, int]) -> Array:
    """Some rows and columns of matrices, from the first to before the last."""
    # Indices beside an ellipsis are a gather in some versions of JAX.
    return jax.lax.slice_in_dim(jax.lax.slice_in_dim(x, *rows, axis=-2), *columns, axis=-1)


def _padded(x: Array, above: int = 0, below: int = 0, left: int = 0) -> Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(int(above), below), (int(left), 0)])


def _lower(x: Array, diagonal: int = 0) -> Bool[Array, "*batch r c"]:
    """Where the entries of matrices are on or below a diagonal."""
    rows, columns = x.shape[-2:]
    return jnp.broadcast_to(jnp.tri(rows, columns, int(diagonal), dtype=bool), x.shape)


def keep(matrix: Inexact[Array, "*batch d d"]) -> Array:
    """What is kept of Hermitian matrices: the packed form, or small ones as they are."""
    return matrix if matrix.shape[-1] < LEAST_SIZE else pack(matrix)


def whole(kept: Array) -> contract.Factor:
    """The factor of an axis [d, d] of what is kept of it; or [d], a diagonal one, as it is."""
    return unpack(kept) if _is_packed(kept) else kept


def keep_factors(stack: Array) -> Array:
    """`keep` of a stack of factors [N, d, d]; or of diagonal ones [N, d], as they are."""
    return keep(stack) if stack.ndim == 3 else stack


def whole_factors(stack: Array) -> Array:
    """The inverse of `keep_factors`."""
    is_packed = stack.ndim == 3 and stack.shape[1] != stack.shape[2]
    return unpack(stack) if is_packed else stack


def of_each(
    function: Callable[[Array], Array], arrays: Sequence[Array | None]
) -> tuple[Array | None, ...]:
    """`keep` or `whole` of every axis; `None` stays so."""
    return tuple(None if x is None else function(x) for x in arrays)


def identity_like(kept: Array) -> Array:
    """What is kept of the identity, as of another matrix."""
    identity = jnp.eye(size_of(kept) if _is_packed(kept) else len(kept), dtype=kept.dtype)
    return pack(identity) if _is_packed(kept) else identity


def gram_like(
    kept: Array, tensor: contract.Tensor, axis: int, *, precision: contract.Precision = None
) -> Array:
    """`contract.gram`, whole, packed or its diagonal, whichever is kept of an axis."""
    if _is_packed(kept):
        return gram(tensor, axis, precision=precision)
    return contract.gram(tensor, axis, diagonal=kept.ndim == 1, precision=precision)


def grams(
    kept: Sequence[Array | None], tensor: contract.Tensor, *, precision: contract.Precision = None
) -> list[Array | None]:
    """`gram_like` along every axis of which something is kept."""
    return [
        None if x is None else gram_like(x, tensor, axis, precision=precision)
        for axis, x in enumerate(kept)
    ]


def _is_packed(kept: Array) -> bool:
    return kept.ndim == 2 and kept.shape[0] != kept.shape[1]
