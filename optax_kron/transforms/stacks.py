"""Stacks: the blocks of one shape as arrays [N, ...], and the rule by which a block may change.

A block takes what is new only if all of it is finite; otherwise it keeps what it has, and that is
counted as a failure. `guarded` is that rule, and the only place where it stands. For example, of
two blocks of which the second would get a NaN,

    stack.roots [2, d, d]    change.fields["roots"] [2, d, d]    takes = [True, False]

the first gets its new roots, the second keeps the old ones, and there is one failure.
"""

import collections
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from optax_kron.kernels import contract, explicit, flow, linalg
from optax_kron.types import PyTree

Stack = TypeVar("Stack", bound=NamedTuple)
Made = TypeVar("Made")


class Plan(Protocol):
    """How a tree of parameters becomes stacks: `BlockPlan` or `LayerPlan`."""

    @property
    def leaves(self) -> Sized:
        """Those of the tree."""
        ...

    @property
    def stacks(self) -> Mapping[str, object]:
        """What is known of the blocks of a stack, by its label."""
        ...

    def count(self, label: str) -> int:
        """The number of blocks in a stack."""
        ...


def for_tree(plan: Plan, make: Callable[[], Made]) -> Made | Array:
    """`make()`, the initial value of a part of a state, or one array for a tree without leaves.

    `optax.tree.map_params` initializes with a tree of a placeholder, and asks for such an array.
    """
    return make() if plan.leaves else jnp.zeros([])


def for_each_stack(plan: Plan, make: Callable[[str], Made]) -> dict[str, Made] | Array:
    """`for_tree` of `make(label)` for every stack of a plan, by label."""
    return for_tree(plan, lambda: {label: make(label) for label in plan.stacks})


class Change(NamedTuple):
    """New values of some fields of a stack, or of one block of it.

    Attributes:
      fields: the new values by the name of the field.
      wanted: whether the blocks are to change at all, bool [N], or [] for one block.
      finite: whether the new values may be taken, likewise. `None`: if all of them are finite.
    """

    fields: Mapping[str, PyTree]
    wanted: Bool[Array, "..."]
    finite: Bool[Array, "..."] | None = None


def guarded(stack: Stack, change: Change) -> tuple[Stack, Bool[Array, "..."]]:
    """The stack with the fields of a change, where they are wanted and finite.

    Args:
      stack: N blocks, or one block without the leading axis.
      change: what is new. It is cast to the dtypes of the stack first, in which it may overflow.

    Returns:
      The stack, and which blocks have failed: a change was wanted, and is not finite.
    """
    old = {name: getattr(stack, name) for name in change.fields}
    new = jax.tree.map(lambda x, y: x.astype(y.dtype), dict(change.fields), old)
    finite = change.finite
    if finite is None:
        leaves = [x for x in jax.tree.leaves(new) if jnp.issubdtype(x.dtype, jnp.inexact)]
        finite = finite_blocks(leaves) if change.wanted.ndim else all_finite(leaves)
    choose = functools.partial(select_blocks, change.wanted & finite)
    return stack._replace(**jax.tree.map(choose, new, old)), change.wanted & ~finite


def select_blocks(condition: Bool[Array, "..."], new: Array, old: Array) -> Array:
    """The blocks of `new` where the condition [N] holds, else those of `old`; or one, for []."""
    trailing = (1,) * (old.ndim - condition.ndim)
    return jnp.where(condition.reshape(*condition.shape, *trailing), new, old)


def select(condition: ArrayLike, new: PyTree, old: PyTree) -> PyTree:
    """`new` where a scalar condition holds, else `old`, leaf by leaf, in the dtypes of `old`."""

    def choose(x, y):
        return jnp.where(condition, x if x.dtype == y.dtype else x.astype(y.dtype), y)

    return jax.tree.map(choose, new, old)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def cond_in_place(
    function: Callable[..., PyTree], condition: Bool[Array, ""], old: PyTree, *operands: PyTree
) -> PyTree:
    """`function(old, *operands)` where a scalar condition holds, else `old`, which is not copied.

    As a loop of one step or none, whose state stays where it is; the results of a conditional are
    other arrays than its operands. A loop has no derivative backwards: that of the conditional is
    taken. `function` closes over no array that may be traced: those are operands.
    """

    def step(carry):
        return jnp.zeros_like(condition), function(carry[1], *operands)

    return flow.while_loop(lambda carry: carry[0], step, (condition, old))[1]


@cond_in_place.defjvp
def _cond_in_place_jvp(function, primals, tangents):
    def choose(condition, old, *operands):
        return flow.cond(condition, function, lambda old, *_: old, old, *operands)

    return jax.jvp(choose, primals, tangents)


def map_blocks(factors: Iterable[Array | None]) -> Callable[..., PyTree]:
    """How to map a function over blocks whose factors, [N, d, d] or [N, d], are given.

    Blocks without a dense factor larger than 2×2 are done all at once: they are scalars and short
    vectors, of which a loop would spend its time on looping.
    """
    dense = [x.shape[-1] for x in factors if x is not None and x.ndim == 3]
    if max(dense, default=0) <= 2:
        return lambda fn, *stacks: jax.vmap(fn)(*stacks)
    return linalg.map_blocks


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every element of every leaf is finite; true for a tree without leaves."""
    checks, vectors = [], collections.defaultdict(list)
    for leaf in {id(leaf): jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)}.values():
        # Types of explicit meshes let no vectors of different shardings be laid end to end.
        if leaf.ndim < 2 and all(axis is None for axis in explicit.spec_of(leaf)):
            vectors[leaf.dtype].append(leaf.ravel())
        else:
            checks.append(contract.all_finite(leaf))
    # Vectors together, as one kernel is quicker to compile than many, and to run.
    checks += [contract.all_finite(jnp.concatenate(group)) for group in vectors.values()]
    return jnp.all(jnp.stack(checks)) if checks else jnp.asarray(True)


def finite_blocks(arrays: Iterable[Array]) -> Bool[Array, " N"]:
    """Whether all that arrays [N, ...] hold of a block is finite."""
    checks = [contract.all_finite(x, axis=tuple(range(1, x.ndim))) for x in arrays]
    return jnp.all(jnp.stack(checks), axis=0)


def finite_rows(rows: Sequence[Array]) -> list[Bool[Array, " N"]]:
    """Whether every row of arrays [N, d] is finite, [N] for each array."""
    finite = contract.all_finite(contract.ragged_rows(rows), axis=1)
    return jnp.split(finite, np.cumsum([len(x) for x in rows])[:-1])


def largest_of_blocks(x: Array) -> Float[Array, " N"]:
    """The largest magnitude of every block [N, ...]."""
    return contract.largest_magnitude(x, axis=tuple(range(1, x.ndim)))


def norms(x: Array) -> Float[Array, " N"]:
    """The Frobenius norm of every block [N, ...]; squares neither overflow nor vanish."""
    return contract.norm(x, tuple(range(1, x.ndim))).reshape(len(x))


def squares_fit(
    magnitude: Float[Array, "..."], size: int, dtypes: Iterable[DTypeLike] = ()
) -> Bool[Array, "..."]:
    """Whether the sum of a block's squares is finite.

    Args:
      magnitude: The largest magnitude of each block. Of NaN the squares do not fit.
      size: The number of elements of a block.
      dtypes: Real dtypes, beside that of the magnitude, that must hold the sum.
    """
    room = min(float(jnp.finfo(dtype).max) for dtype in (magnitude.dtype, *dtypes))
    return magnitude < np.sqrt(room / size).astype(magnitude.dtype)


def times(tree: PyTree, by: Float[Array, " N"]) -> PyTree:
    """Arrays [N, ...], every block times its own real number, in the dtypes that they have."""
    return jax.tree.map(
        lambda x: contract.scaled_blocks(x, by.astype(contract.real_dtype(x.dtype))), tree
    )


def blend(old: Array, new: Array, rate: Float[Array, " N"]) -> Array:
    """`rate·old + (1 − rate)·new` for every block, in the dtype of `old`."""
    return (
        contract.scaled_blocks(old.astype(rate.dtype), rate) + contract.scaled_blocks(new, 1 - rate)
    ).astype(old.dtype)


def ema_weight(decay: ArrayLike, count: Int[Array, ""], dtype: DTypeLike) -> Float[Array, ""]:
    """`1 − decay^count`: the sum of the weights in an average that started from zero.

    Args:
      decay: Of the average, in [0, 1).
      count: How many values have been averaged.
      dtype: Of the result.
    """
    # Before the first accepted gradient the average is zero, and no correction is due.
    return 1 - jnp.asarray(decay, dtype) ** jnp.maximum(count, 1).astype(dtype)


def largest_update(
    momentum: ArrayLike, b2: ArrayLike, count: Int[Array, ""], dtype: DTypeLike
) -> Float[Array, ""]:
    """The largest element of Adam's update, whatever the gradients, in bases that stay as they are.

    With weights w of the gradients in the momentum, and v of their squares in the second moment,
    that is the root of the largest `w_k / v_k`: by Cauchy and Schwarz, as the w add up to one,
    `|Σ w_k g_k|² ≤ Σ w_k |g_k|² ≤ max(w_k / v_k) Σ v_k |g_k|²`. Of equal decays it is one.

    Args:
      momentum: Decay of the momentum.
      b2: Decay of the second moment.
      count: How many gradients both have taken in.
      dtype: Of the result, and of the arithmetic.
    """
    last = ema_weight(b2, count, dtype) / ema_weight(momentum, count, dtype)
    b1, b2 = jnp.asarray(momentum, dtype), jnp.asarray(b2, dtype)
    last = last * (1 - b1) / (1 - b2)
    # w_k / v_k is a power of b1 / b2: it is largest for the last gradient, or for the first.
    age = jnp.maximum(count, 1).astype(dtype) - 1
    first = (b1 / jnp.maximum(b2, jnp.finfo(dtype).tiny)) ** age
    return jnp.sqrt(last * jnp.where(b1 > b2, first, 1))
