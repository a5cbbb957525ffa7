"""Curvature of a state, brought to the parameters by a random linear map that is never held whole.

Conventions. `branches` [K, D] are K samples of a state of D dimensions. The map `P` [n, D] from the
state to n parameters is normal with variance 1/D. It is drawn in chunks of rows, each from a key of
its own, as often as it is needed.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Inexact, Int, Key

from optax_kron.kernels import contract, flow, positive
from optax_kron.kernels.contract import matmul_exact

# A worked example: leaves of 3·10⁶ float32 and 10⁶ complex64 numbers share the real dtype float32,
# and so one group of n = 5·10⁶ real ones. With D = 64 a chunk is 2²⁰ / 64 = 16384 rows: the map is
# 306 chunks [16384, 64], each multiplied with the part of the gradient that it meets, and dropped.
_CHUNK = 2**20  # numbers of the map that are there at a time

Leaf = Inexact[Array, "..."]  # of any shape, or abstract


def groups(dimensions: int, count: ArrayLike) -> Int[Array, " D"]:
    """The group of each dimension: contiguous, of sizes that differ by at most one, larger first.

    Args:
      dimensions: D.
      count: Number of groups, an int from 1 to D, which may be traced.
    """
    index = jnp.arange(dimensions)
    count = jnp.minimum(jnp.asarray(count, index.dtype), dimensions)
    small, larger = dimensions // count, dimensions % count
    edge = larger * (small + 1)
    return jnp.where(index < edge, index // (small + 1), larger + (index - edge) // small)


def solve(
    branches: Float[Array, "K D"], vector: Float[Array, " D"], damping: ArrayLike, count: ArrayLike
) -> tuple[Float[Array, " D"], Bool[Array, ""]]:
    """`C⁻¹ v` with the diagonal blocks of `C = cov(branches) + damping·I`, by Cholesky.

    Args:
      branches: Samples of the state; of a single one the covariance is zero.
      vector: The vector v.
      damping: The damping ≥ 0.
      count: Number of diagonal blocks, see `groups`.

    Returns:
      The solution; and whether that was possible. If not, C is replaced by its diagonal, and that
      by the identity where it is not positive. Cost: 2·K·D² + 2·D³ operations.
    """
    samples, dimensions = branches.shape
    group = groups(dimensions, count)
    centred = branches - jnp.mean(branches, axis=0, keepdims=True)
    covariance = matmul_exact(centred.T, centred) / max(samples - 1, 1)
    # The number of blocks may be traced, their sizes may not: so C stays one matrix, with zeros.
    covariance = jnp.where(group[:, None] == group[None], covariance, 0)
    shift = jnp.asarray(damping, branches.dtype)
    (inverse,), (finite,) = positive.inverses([covariance[None]], [shift[None]])
    solved = matmul_exact(inverse[0], vector)
    diagonal = jnp.diagonal(covariance) + shift
    usable = jnp.isfinite(diagonal) & (diagonal > 0)
    return jnp.where(finite[0], solved, vector / jnp.where(usable, diagonal, 1)), finite[0]


def project(
    key: Key[Array, ""], leaves: Sequence[Leaf], dimensions: int, dtype: DTypeLike
) -> Float[Array, " D"]:
    """`Pᵀ g` of all leaves behind each other; complex ones are their real and imaginary parts.

    Args:
      key: Key of the map.
      leaves: The leaves g.
      dimensions: D.
      dtype: Dtype of the arithmetic.

    Returns:
      The projection. Memory: that of the leaves once more, and 2²⁰ numbers or so of the map. Cost:
      n·D normal numbers and 2·n·D operations.
    """
    total = jnp.zeros(dimensions, dtype)
    for group in _groups_of_leaves(leaves, dimensions):
        chunks = _chunks([leaves[i] for i in group.indices], group.rows)

        def add(total, step, group=group):
            i, chunk = step
            rows = _rows(jax.random.fold_in(key, group.number), i, group.rows, dimensions, dtype)
            return total + matmul_exact(chunk.astype(dtype), rows), None

        total, _ = flow.scan(add, total, (jnp.arange(group.chunks), chunks))
    return total


def bring_back(key: Key[Array, ""], vector: Float[Array, " D"], like: Sequence[Leaf]) -> list[Leaf]:
    """`P v`, as leaves like those of `project`, with the same map; arguments and cost as there.

    Args:
      key: Key of the map.
      vector: The vector v.
      like: Leaves whose shapes and dtypes the result has.
    """
    results: dict[int, Array] = {}
    for group in _groups_of_leaves(like, vector.shape[0]):

        def bring(i, flat, group=group):
            group_key = jax.random.fold_in(key, group.number)
            rows = _rows(group_key, i, group.rows, vector.shape[0], vector.dtype)
            part = matmul_exact(rows, vector).astype(flat.dtype)
            return jax.lax.dynamic_update_index_in_dim(flat, part, i, axis=0)

        # It begins as copies of an entry of the vector, not as zeros: those would be made while the
        # flattened gradient is still there.
        dtype = contract.real_dtype(like[group.indices[0]].dtype)
        flat = jnp.broadcast_to(vector[0].astype(dtype), (group.chunks, group.rows))
        flat = flow.fori_loop(0, group.chunks, bring, flat).ravel()
        for i, part in group.parts(flat):
            if jnp.issubdtype(like[i].dtype, jnp.complexfloating):
                real, imaginary = jnp.split(part, 2)
                part = jax.lax.complex(real, imaginary)
            results[i] = part.reshape(like[i].shape).astype(like[i].dtype)
    return [results.get(i, jnp.zeros(x.shape, x.dtype)) for i, x in enumerate(like)]


def dense_map(
    key: Key[Array, ""], like: Sequence[Leaf], dimensions: int, dtype: DTypeLike
) -> Float[Array, "n D"]:
    """The map P as a matrix, for small models; its rows are in the order of the leaves.

    Args:
      key: Key of the map.
      like: Leaves as in `bring_back`. Complex ones have the rows of all their real parts, then
        those of the imaginary ones.
      dimensions: D.
      dtype: Dtype of the matrix.
    """
    results: dict[int, Array] = {}
    for group in _groups_of_leaves(like, dimensions):
        group_key = jax.random.fold_in(key, group.number)
        chunks = [_rows(group_key, i, group.rows, dimensions, dtype) for i in range(group.chunks)]
        results |= group.parts(jnp.concatenate(chunks))
    return jnp.concatenate([results[i] for i in sorted(results)])


def _rows(
    key: Key[Array, ""], chunk: ArrayLike, size: int, dimensions: int, dtype: DTypeLike
) -> Float[Array, "size D"]:
    """One chunk of the map."""
    normal = jax.random.normal(jax.random.fold_in(key, chunk), (size, dimensions), dtype)
    return normal / np.sqrt(dimensions).astype(dtype)


class _Group(NamedTuple):
    """Leaves that share a real dtype, and are flattened together."""

    number: int  # of the dtype, which the key of the group depends on
    indices: list[int]  # of its leaves
    counts: list[int]  # of real numbers in each
    rows: int  # of a chunk
    chunks: int

    def parts(self, flat: Float[Array, "n ..."]) -> Iterator[tuple[int, Float[Array, "m ..."]]]:
        """The index of each leaf, and its part of all rows."""
        start = 0
        for i, count in zip(self.indices, self.counts, strict=True):
            yield i, flat[start : start + count]
            start += count


def _groups_of_leaves(leaves: Sequence[Leaf], dimensions: int) -> Iterator[_Group]:
    dtypes = [str(contract.real_dtype(x.dtype)) for x in leaves]
    for number, dtype in enumerate(sorted(set(dtypes))):
        indices = [i for i, x in enumerate(leaves) if x.size and dtypes[i] == dtype]
        if indices:
            members = [leaves[i] for i in indices]
            counts = [x.size * (1 + jnp.issubdtype(x.dtype, jnp.complexfloating)) for x in members]
            rows = min(max(_CHUNK // dimensions, 1), sum(counts))
            yield _Group(number, indices, counts, rows, -(-sum(counts) // rows))


def _chunks(leaves: Sequence[Leaf], rows: int) -> Float[Array, "chunks rows"]:
    """All leaves behind each other, filled up with zeros."""
    flat = []
    for x in leaves:
        flat += [x.real.ravel(), x.imag.ravel()] if jnp.iscomplexobj(x) else [x.ravel()]
    padding = jnp.zeros(-sum(x.size for x in flat) % rows, flat[0].dtype)
    return jnp.concatenate([*flat, padding]).reshape(-1, rows)
