"""What keeps a state whole: a value that is not finite never replaces one that is."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

PyTree = Any


def all_finite(tree: PyTree) -> Array:
    """Whether every element of every leaf is finite; true for a tree without leaves."""
    checks, vectors = [], collections.defaultdict(list)
    for leaf in {id(leaf): jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)}.values():
        if leaf.ndim < 2:
            vectors[leaf.dtype].append(leaf.ravel())
        else:
            checks.append(largest_magnitude(leaf))
    # Vectors together, as one kernel is quicker to compile than many, and to run.
    checks += [largest_magnitude(jnp.concatenate(group)) for group in vectors.values()]
    return jnp.all(jnp.stack([jnp.isfinite(x) for x in checks])) if checks else jnp.asarray(True)


def largest_magnitude(x: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """The largest magnitude of a real or imaginary part: zero, finite or not just as the array.

    One reduction, where `isfinite` and `all` would be several; NaN carries through a maximum.
    """
    magnitude = jnp.abs(x)
    if jnp.iscomplexobj(x):
        magnitude = jnp.maximum(jnp.abs(x.real), jnp.abs(x.imag))
    return jnp.max(magnitude, axis=axis, initial=0)


def select(condition: ArrayLike, new: PyTree, old: PyTree) -> PyTree:
    """`new` where a scalar condition holds, else `old`, leaf by leaf, in the dtypes of `old`."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y).astype(y.dtype), new, old)
