"""Stacks of blocks [N, ...]: moved, checked and chosen block by block."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from optax_kron import guards
from optax_kron.kernels import contract, linalg


def blend(old: Array, new: Array, rate: Array) -> Array:
    """`rate·old + (1 − rate)·new` for every block, in the dtype of `old`."""
    return (
        contract.scaled_blocks(old.astype(rate.dtype), rate) + contract.scaled_blocks(new, 1 - rate)
    ).astype(old.dtype)


def finite_blocks(factors: Iterable[Array]) -> Array:
    """Whether all factors of a block are finite, bool [N]."""
    return jnp.all(jnp.stack(finite_rows([largest(x) for x in factors])), axis=0)


def finite_rows(rows: Sequence[Array]) -> list[Array]:
    """Whether every row [d] of arrays [N, d] is finite, bool [N] for each array."""
    finite = jnp.isfinite(guards.largest_magnitude(contract.ragged_rows(rows), axis=1))
    return jnp.split(finite, np.cumsum([len(x) for x in rows])[:-1])


def largest(x: Array) -> Array:
    """The largest magnitude of every block [N, ...], [N, 1]."""
    return guards.largest_magnitude(x, axis=tuple(range(1, x.ndim)))[:, None]


def norms(x: Array) -> Array:
    """The Frobenius norm of every block [N, ...], real [N]; squares neither overflow nor vanish."""
    unit = positive(largest(x)[:, 0])
    squares = contract.squared_magnitude(x / unit.reshape(-1, *(1,) * (x.ndim - 1)))
    return unit * jnp.sqrt(jnp.sum(squares.reshape(len(x), -1), axis=1))


def positive(x: Array) -> Array:
    """Real numbers, none of them below the smallest normal one."""
    return jnp.maximum(x, jnp.finfo(x.dtype).tiny)


def squares_fit(x: Array, dtypes: Iterable[DTypeLike] = ()) -> Array:
    """Whether the sum of a block's squares is finite, also in other real dtypes, bool [N]."""
    magnitude = largest(x)[:, 0]
    room = min(float(jnp.finfo(dtype).max) for dtype in (magnitude.dtype, *dtypes))
    return magnitude < np.sqrt(room / x[0].size).astype(magnitude.dtype)  # not if it is NaN


def select_blocks(condition: Array, new: Array, old: Array) -> Array:
    return jnp.where(condition.reshape(-1, *(1,) * (old.ndim - 1)), new, old)


def mapping(factors: Iterable[Array | None]) -> Any:
    """How to map over blocks with such factors: those without a larger dense one all at once."""
    dense = [x.shape[-1] for x in factors if x is not None and x.ndim == 3]
    if max(dense, default=0) <= 2:
        return lambda fn, *stacks: jax.vmap(fn)(*stacks)
    return linalg.map_blocks
