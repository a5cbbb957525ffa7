"""Loops and branches that take constants made on the spot, also inside `jax.shard_map`.

There every array has a type that says along which axes of the mesh it may vary. What a loop carries
must keep its type, and branches must return the same ones; but a constant such as `jnp.zeros([])`
varies along none, whatever is later added to it. These functions are those of `jax.lax`, and widen
such types where needed. Outside of `shard_map`, or with `check_vma=False`, they add nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
from jax import Array
from jax.typing import ArrayLike

PyTree = Any


def varying_axes(tree: PyTree) -> frozenset[str]:
    """Names of the mesh axes along which any array of a tree may vary, inside `jax.shard_map`."""
    return frozenset().union(*(_axes(x) for x in jax.tree.leaves(tree)))


def varying_like(tree: PyTree, *data: PyTree) -> PyTree:
    """The same arrays, with a type that varies along all mesh axes along which `data` may.

    Constants that are made inside `jax.shard_map`, and are to be carried or returned beside what is
    computed from data, get the type of those by this. It changes no value, and outside of
    `shard_map` nothing at all.

    Args:
      tree: arrays.
      *data: arrays, or abstract ones, in pytrees.
    """
    if not _is_manual():
        return tree
    axes = varying_axes(data)
    return jax.tree.map(lambda x: _widened(x, axes), tree)


def while_loop(
    condition: Callable[[PyTree], Array], step: Callable[[PyTree], PyTree], carry: PyTree
) -> PyTree:
    """`jax.lax.while_loop`."""
    if _is_manual():
        carry = _settled(step, carry, condition)

    def typed(old):
        new = step(old)
        return _like(new, carry) if _is_manual() else new

    return jax.lax.while_loop(condition, typed, carry)


def fori_loop(
    lower: ArrayLike, upper: ArrayLike, step: Callable[[Array, PyTree], PyTree], carry: PyTree
) -> PyTree:
    """`jax.lax.fori_loop`."""
    if _is_manual():
        bounds = jax.numpy.asarray(lower), jax.numpy.asarray(upper)
        index = varying_like(*bounds)
        carry = _settled(lambda carry: step(index, carry), carry, lambda _: bounds)

    def typed(i, old):
        new = step(i, old)
        return _like(new, carry) if _is_manual() else new

    return jax.lax.fori_loop(lower, upper, typed, carry)


def scan(
    step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    carry: PyTree,
    xs: PyTree,
    **settings: Any,
) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan`."""
    if _is_manual():
        first = one_step(xs)
        carry = _settled(lambda carry: jax.eval_shape(step, carry, first)[0], carry)

    def typed(old, x):
        new, y = step(old, x)
        return (_like(new, carry) if _is_manual() else new), y

    return jax.lax.scan(typed, carry, xs, **settings)


def one_step(xs: PyTree) -> PyTree:
    """What a step of a scan over arrays sees of them, as abstract arrays."""
    if _is_manual():
        return jax.eval_shape(lambda xs: jax.tree.map(lambda x: x[0], xs), xs)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)


def cond(
    condition: Array,
    if_true: Callable[..., PyTree],
    if_false: Callable[..., PyTree],
    *operands: Any,
) -> PyTree:
    """`jax.lax.cond`."""
    if _is_manual():
        if_true, if_false = _agreeing([if_true, if_false], operands, condition)
    return jax.lax.cond(condition, if_true, if_false, *operands)


def switch(index: Array, branches: Sequence[Callable[..., PyTree]], *operands: Any) -> PyTree:
    """`jax.lax.switch`."""
    if _is_manual():
        branches = _agreeing(list(branches), operands, index)
    return jax.lax.switch(index, branches, *operands)


def platform_dependent(*operands: Any, **branches: Callable[..., PyTree]) -> PyTree:
    """`jax.lax.platform_dependent`."""
    if _is_manual():
        agreeing = _agreeing(list(branches.values()), operands, None)
        branches = dict(zip(branches, agreeing, strict=True))
    return jax.lax.platform_dependent(*operands, **branches)


def _is_manual() -> bool:
    """Whether the program is that of one device of a mesh."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _axes(x: Any) -> frozenset[str]:
    """Of one array or abstract array."""
    abstract = isinstance(x, jax.ShapeDtypeStruct | jax.core.ShapedArray)
    kind = x if abstract else jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)  # since JAX 0.9 or so
    return frozenset(getattr(kind, "vma", None) or () if manual is None else manual.varying)


def _widened(x: Any, axes: frozenset[str]) -> Any:
    missing = tuple(sorted(axes - _axes(x)))
    if not missing:
        return x
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, missing, to="varying")
    return getattr(jax.lax, "pvary")(x, missing)  # noqa: B009 (of JAX 0.8 alone)


def _like(tree: PyTree, types: PyTree) -> PyTree:
    """Every array of a tree widened to vary at least as another's."""
    return jax.tree.map(lambda x, y: _widened(x, _axes(y)), tree, types)


def _settled(
    step: Callable[[PyTree], PyTree],
    carry: PyTree,
    condition: Callable[[PyTree], PyTree] | None = None,
) -> PyTree:
    """The carry, widened until a step no longer changes its type."""
    while True:
        new = jax.eval_shape(step, carry)
        ending = () if condition is None else varying_axes(jax.eval_shape(condition, carry))
        wider = jax.tree.map(
            lambda x, y, e=ending: _widened(x, _axes(y) | frozenset(e)), carry, new
        )
        if all(map(_same_axes, jax.tree.leaves(wider), jax.tree.leaves(carry))):
            return wider
        carry = wider


def _same_axes(x: Any, y: Any) -> bool:
    return _axes(x) == _axes(y)


def _agreeing(
    branches: list[Callable[..., PyTree]], operands: tuple[Any, ...], condition: Any
) -> list[Callable[..., PyTree]]:
    """The branches, with results of the same types."""
    common = varying_axes(condition)
    results = [jax.tree.leaves(jax.eval_shape(branch, *operands)) for branch in branches]
    axes = [common.union(*map(_axes, found)) for found in zip(*results, strict=True)]

    def widening(branch):
        def run(*operands):
            leaves, treedef = jax.tree.flatten(branch(*operands))
            return treedef.unflatten(map(_widened, leaves, axes))

        return run

    return [widening(branch) for branch in branches]
