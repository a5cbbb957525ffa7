"""Curvature of a state, brought to the parameters by a random linear map that is never held whole.

Conventions. `branches` [K, D] are K samples of a state of D dimensions. The map `P` [n, D] from the
state to n parameters is normal with variance 1/D. It is drawn in chunks of rows, each from a key of
its own, as often as it is needed.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from optax_kron.kernels import contract, flow, positive

_CHUNK = 2**20  # numbers of the map that are there at a time


def groups(dimensions: int, count: ArrayLike) -> Array:
    """The group of each dimension: contiguous, of sizes that differ by at most one, larger first.

    Args:
      dimensions: D.
      count: number of groups, an int from 1 to D, which may be traced.

    Returns:
      int [D].
    """
    index = jnp.arange(dimensions)
    count = jnp.minimum(jnp.asarray(count, index.dtype), dimensions)
    small, larger = dimensions // count, dimensions % count
    edge = larger * (small + 1)
    return jnp.where(index < edge, index // (small + 1), larger + (index - edge) // small)


def solve(
    branches: Array, vector: Array, damping: ArrayLike, count: ArrayLike
) -> tuple[Array, Array]:
    """`C⁻¹ v` with the diagonal blocks of `C = cov(branches) + damping·I`, by Cholesky.

    Args:
      branches: [K, D]; of a single one the covariance is zero.
      vector: v [D].
      damping: ≥ 0.
      count: number of diagonal blocks, see `groups`.

    Returns:
      [D]; and whether that was possible, bool []. If not, C is replaced by its diagonal, and that
      by the identity where it is not positive. Cost: 2·K·D² + 2·D³ operations.
    """
    samples, dimensions = branches.shape
    group = groups(dimensions, count)
    centred = branches - jnp.mean(branches, axis=0, keepdims=True)
    covariance = jnp.matmul(centred.T, centred, precision="highest") / max(samples - 1, 1)
    covariance = jnp.where(group[:, None] == group[None], covariance, 0)
    shift = jnp.asarray(damping, branches.dtype)
    (inverse,), (sound,) = positive.inverses([covariance[None]], [shift[None]])
    solved = jnp.matmul(inverse[0], vector, precision="highest")
    diagonal = jnp.diagonal(covariance) + shift
    usable = jnp.isfinite(diagonal) & (diagonal > 0)
    return jnp.where(sound[0], solved, vector / jnp.where(usable, diagonal, 1)), sound[0]


def project(key: Array, leaves: Sequence[Array], dimensions: int, dtype: DTypeLike) -> Array:
    """`Pᵀ g` [D] of all leaves behind each other; complex ones are their real and imaginary parts.

    Args:
      key: of the map.
      leaves: arrays of any shapes.
      dimensions: D.
      dtype: of the arithmetic.

    Returns:
      [D]. Memory: that of the leaves once more, and 2²⁰ numbers or so of the map. Cost: n·D normal
      numbers and 2·n·D operations.
    """
    total = jnp.zeros(dimensions, dtype)
    for kind, indices in _kinds(leaves).items():
        chunks = _chunks([leaves[i] for i in indices], dimensions)

        def add(carry, given, kind=kind):
            i, chunk = given
            rows = _rows(jax.random.fold_in(key, kind), i, chunk.shape[0], dimensions, dtype)
            return carry + jnp.matmul(chunk.astype(dtype), rows, precision="highest"), None

        total, _ = flow.scan(add, total, (jnp.arange(len(chunks)), chunks))
    return total


def bring_back(key: Array, vector: Array, like: Sequence[Array]) -> list[Array]:
    """`P v`, as leaves like those of `project`, with the same map; arguments and cost as there.

    Args:
      key: of the map.
      vector: v [D].
      like: arrays, or abstract ones, whose shapes and dtypes the result has.
    """
    found: dict[int, Array] = {}
    for kind, indices in _kinds(like).items():
        members = [like[i] for i in indices]
        counts = [_count(x) for x in members]
        size = _chunk_size(sum(counts), vector.shape[0])
        dtype = contract.real_dtype(members[0].dtype)

        def bring(i, flat, kind=kind, size=size):
            own = jax.random.fold_in(key, kind)
            rows = _rows(own, i, size, vector.shape[0], vector.dtype)
            part = jnp.matmul(rows, vector, precision="highest").astype(flat.dtype)
            return jax.lax.dynamic_update_index_in_dim(flat, part, i, axis=0)

        chunks = -(-sum(counts) // size)
        # It begins as copies of an entry of the vector, not as zeros: those would be made while the
        # flattened gradient is still there.
        flat = jnp.broadcast_to(vector[0].astype(dtype), (chunks, size))
        flat = flow.fori_loop(0, chunks, bring, flat).ravel()
        start = 0
        for i, x, number in zip(indices, members, counts, strict=True):
            part = flat[start : start + number]
            if jnp.issubdtype(x.dtype, jnp.complexfloating):
                real, imaginary = jnp.split(part, 2)
                part = jax.lax.complex(real, imaginary)
            found[i] = part.reshape(x.shape).astype(x.dtype)
            start += number
    return [found.get(i, jnp.zeros(x.shape, x.dtype)) for i, x in enumerate(like)]


def dense_map(key: Array, like: Sequence[Array], dimensions: int, dtype: DTypeLike) -> Array:
    """The map P [n, D] as a matrix, for small models; its rows are in the order of the leaves.

    Args:
      key: of the map.
      like: arrays, or abstract ones, as in `bring_back`. Complex ones have the rows of all their
        real parts, then those of the imaginary ones.
      dimensions: D.
      dtype: of the matrix.
    """
    found: dict[int, Array] = {}
    for kind, indices in _kinds(like).items():
        counts = [_count(like[i]) for i in indices]
        size = _chunk_size(sum(counts), dimensions)
        own = jax.random.fold_in(key, kind)
        chunks = [_rows(own, i, size, dimensions, dtype) for i in range(-(-sum(counts) // size))]
        rows = jnp.concatenate(chunks)
        start = 0
        for i, number in zip(indices, counts, strict=True):
            found[i] = rows[start : start + number]
            start += number
    return jnp.concatenate([found[i] for i in sorted(found)])


def _rows(key: Array, chunk: ArrayLike, size: int, dimensions: int, dtype: DTypeLike) -> Array:
    """One chunk of the map, [size, D]."""
    drawn = jax.random.normal(jax.random.fold_in(key, chunk), (size, dimensions), dtype)
    return drawn / np.sqrt(dimensions).astype(dtype)


def _kinds(leaves: Sequence[Array]) -> dict[int, list[int]]:
    """Indices of leaves with elements that share a real dtype, which are flattened together."""
    dtypes = sorted({str(contract.real_dtype(x.dtype)) for x in leaves})
    kinds = {
        kind: [
            i for i, x in enumerate(leaves) if x.size and str(contract.real_dtype(x.dtype)) == dtype
        ]
        for kind, dtype in enumerate(dtypes)
    }
    return {kind: indices for kind, indices in kinds.items() if indices}


def _count(x: Array) -> int:
    """Number of real numbers in an array."""
    return x.size * (2 if jnp.issubdtype(x.dtype, jnp.complexfloating) else 1)


def _chunk_size(total: int, dimensions: int) -> int:
    """Rows of a chunk."""
    return min(max(_CHUNK // dimensions, 1), total)


def _chunks(leaves: Sequence[Array], dimensions: int) -> Array:
    """All leaves behind each other, in rows of the size of a chunk, filled up with zeros."""
    flat = []
    for x in leaves:
        flat += [x.real.ravel(), x.imag.ravel()] if jnp.iscomplexobj(x) else [x.ravel()]
    total = sum(x.size for x in flat)
    size = _chunk_size(total, dimensions)
    padding = jnp.zeros(-total % size, flat[0].dtype)
    return jnp.concatenate([*flat, padding]).reshape(-1, size)
