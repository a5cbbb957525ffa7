"""What keeps a state whole: a value that is not finite never replaces one that is."""

import collections
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from optax_kron.kernels import flow

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


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def replaced_if(function: Callable[..., PyTree], condition: Array, old: PyTree, *operands: Any):
    """`function(old, *operands)` where a scalar condition holds, else `old`, which is not copied.

    As a loop of one step or none, whose state stays where it is; the results of a conditional are
    other arrays than its operands. A loop has no derivative backwards: that of the conditional is
    taken.
    """

    def step(carry):
        return jnp.zeros_like(condition), function(carry[1], *operands)

    return flow.while_loop(lambda carry: carry[0], step, (condition, old))[1]


@replaced_if.defjvp
def _replaced_if_jvp(function, primals, tangents):
    def choose(condition, old, *operands):
        return flow.cond(condition, function, lambda old, *_: old, old, *operands)

    return jax.jvp(choose, primals, tangents)


def select(condition: ArrayLike, new: PyTree, old: PyTree) -> PyTree:
    """`new` where a scalar condition holds, else `old`, leaf by leaf, in the dtypes of `old`."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y).astype(y.dtype), new, old)
