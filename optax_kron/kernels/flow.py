"""Loops and branches that take constants made on the spot, also inside `jax.shard_map`.

There every array has a type that says along which axes of the mesh it may vary. What a loop carries
must keep its type, and branches must return the same ones; but a constant such as `jnp.zeros([])`
varies along none, whatever is later added to it. These functions are those of `jax.lax`, and widen
such types where needed. Outside of `shard_map`, or with `check_vma=False`, they add nothing.
"""

from collections.abc import Callable, Sequence

import jax
import jax.core
import jax.extend.core
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from optax_kron.types import PyTree

# A worked example, on a mesh with the axis "data": x is sharded along it, so that its local part
# has the type float32[4]{data}.
#
#   total, _ = scan(lambda total, row: (total + row, None), jnp.zeros([]), x)
#
# The carry starts as float32[], the same on all devices, and leaves the step as float32[]{data}.
# `jax.lax.scan` refuses a step that changes the type of its carry. Here the start is cast to
# float32[]{data} first (`pcast`, which moves no data), and the step then maps that type to itself.


def varying_axes(tree: PyTree) -> frozenset[str]:
    """Names of the mesh axes along which any array of a tree may vary, inside `jax.shard_map`."""
    return frozenset().union(*_types(tree))


def varying_like(tree: PyTree, *references: PyTree) -> PyTree:
    """The same arrays, with a type that varies along all mesh axes along which references may.

    Constants that are made inside `jax.shard_map`, and are to be carried or returned beside what is
    computed from references, get the type of those by this. It changes no value, and outside of
    `shard_map` nothing at all.

    Args:
      tree: The arrays.
      *references: Arrays, or abstract ones, in pytrees.
    """
    if not _is_manual():
        return tree
    axes = varying_axes(references)
    return jax.tree.map(lambda x: _widened(x, axes), tree)


def zeros_like_type(
    kind: jax.core.ShapedArray | jax.ShapeDtypeStruct, leading: Sequence[int] = ()
) -> Array:
    """Zeros of an abstract array, its sharding included, with further axes in front.

    Args:
      kind: The shape, dtype, explicit sharding, and along which mesh axes it varies.
      leading: Lengths of the axes in front, which are not sharded.
    """
    shape = (*leading, *kind.shape)
    spec = getattr(getattr(kind, "sharding", None), "spec", ())
    if any(axis is not None for axis in spec):
        whole = (None,) * len(leading)
        sharded = jax.sharding.PartitionSpec(*whole, *spec)
        return jnp.zeros(shape, kind.dtype, out_sharding=sharded)
    return varying_like(jnp.zeros(shape, kind.dtype), kind)


def while_loop(
    condition: Callable[[PyTree], Bool[Array, ""]],
    step: Callable[[PyTree], PyTree],
    carry: PyTree,
) -> PyTree:
    """`jax.lax.while_loop`."""
    carry, step = _stable_carry(step, carry, condition)
    return jax.lax.while_loop(condition, lambda old: _widened_like(step(old), carry), carry)


def fori_loop(
    lower: ArrayLike,
    upper: ArrayLike,
    step: Callable[[Int[Array, ""], PyTree], PyTree],
    carry: PyTree,
) -> PyTree:
    """`jax.lax.fori_loop`."""
    # Beside the carry goes the number of the step, which all steps hand on as it is.
    first = varying_like(jnp.asarray(lower), upper)

    def numbered(carry):
        i, x = carry
        return i, step(i, x)

    # The bounds decide when the loop ends, as the condition of a while loop does.
    (_, carry), numbered = _stable_carry(
        numbered, (first, carry), lambda _: (jnp.asarray(lower), jnp.asarray(upper))
    )

    def typed_step(i, old):
        return _widened_like(numbered((varying_like(i, first), old))[1], carry)

    return jax.lax.fori_loop(lower, upper, typed_step, carry)


def scan(
    step: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    carry: PyTree,
    xs: PyTree,
    *,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan`."""
    carry, step = _stable_carry(step, carry, None, one_step(xs))

    def typed_step(old, x):
        new, y = step(old, x)
        return _widened_like(new, carry), y

    return jax.lax.scan(typed_step, carry, xs, length, reverse, unroll)


def one_step(xs: PyTree) -> PyTree:
    """What a step of a scan over arrays sees of them, as abstract arrays."""
    if _is_manual():
        # Tracing tells along which axes the slices vary.
        return jax.eval_shape(lambda xs: jax.tree.map(lambda x: x[0], xs), xs)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)


def cond(
    condition: Bool[Array, ""],
    if_true: Callable[..., PyTree],
    if_false: Callable[..., PyTree],
    *operands: PyTree,
) -> PyTree:
    """`jax.lax.cond`."""
    if_true, if_false = _agreeing([if_true, if_false], operands, condition)
    return jax.lax.cond(condition, if_true, if_false, *operands)


def cond_or_zeros(
    condition: Bool[Array, ""], function: Callable[..., PyTree], *operands: PyTree
) -> PyTree:
    """`function(*operands)` where a condition holds, else zeros (and `False`) of the same shape."""

    def zeros(*operands):
        return jax.tree.map(zeros_like_type, jax.eval_shape(function, *operands))

    return cond(condition, function, zeros, *operands)


def switch(
    index: Int[Array, ""], branches: Sequence[Callable[..., PyTree]], *operands: PyTree
) -> PyTree:
    """`jax.lax.switch`."""
    return jax.lax.switch(index, _agreeing(branches, operands, index), *operands)


def platform_dependent(*operands: PyTree, **branches: Callable[..., PyTree]) -> PyTree:
    """`jax.lax.platform_dependent`."""
    agreeing = _agreeing(list(branches.values()), operands)
    return jax.lax.platform_dependent(*operands, **dict(zip(branches, agreeing, strict=True)))


def _is_manual() -> bool:
    """Whether the program is that of one device of a mesh."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def _axes(x: ArrayLike | jax.ShapeDtypeStruct | jax.core.ShapedArray) -> frozenset[str]:
    """The mesh axes along which one array, or abstract array, may vary."""
    abstract = isinstance(x, jax.ShapeDtypeStruct | jax.core.ShapedArray)
    kind = x if abstract else jax.typeof(x)
    # JAX 0.8 has the attribute `vma`, 0.9 and later `manual_axis_type`.
    manual = getattr(kind, "manual_axis_type", None)
    return frozenset(getattr(kind, "vma", None) or () if manual is None else manual.varying)


def _widened(x: Array, axes: frozenset[str]) -> Array:
    """One array, of any shape, cast to vary along more axes."""
    missing = tuple(sorted(axes - _axes(x)))
    if not missing:
        return x
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, missing, to="varying")
    return getattr(jax.lax, "pvary")(x, missing)  # noqa: B009 (of JAX 0.8 alone)


def _widened_like(tree: PyTree, references: PyTree) -> PyTree:
    """Every array of a tree widened to vary at least as its reference, inside `shard_map`."""
    if not _is_manual():
        return tree
    return jax.tree.map(lambda x, y: _widened(x, _axes(y)), tree, references)


def _stable_carry(
    step: Callable[..., PyTree],
    carry: PyTree,
    condition: Callable[[PyTree], PyTree] | None = None,
    *row: PyTree,
) -> tuple[PyTree, Callable[..., PyTree]]:
    """The carry of a loop, widened until a step no longer changes its type, and the step.

    One entry of a carry may widen another only in the next step, so this is a fixed point. It ends:
    types only widen, and a mesh has few axes.

    Args:
      step: Of the carry alone, or with `row` of both, returning the next carry and an output.
      carry: What the loop starts with.
      condition: What decides on its end.
      *row: What a step of a scan sees of its arrays, abstract.
    """
    if not _is_manual():
        return carry, step
    while True:
        traced, new = _traced(step, carry, *row)
        new = new[0] if row else new
        # Devices that leave the loop at different steps end with different values.
        ending = varying_axes(() if condition is None else jax.eval_shape(condition, carry))
        wider = jax.tree.map(lambda x, y, e=ending: _widened(x, _axes(y) | e), carry, new)
        if _types(wider) == _types(carry):
            return wider, traced
        carry = wider


def _traced(function: Callable[..., PyTree], *args: PyTree) -> tuple[Callable[..., PyTree], PyTree]:
    """A function that repeats what one did when it was traced, and its abstract results.

    To know types, a loop is traced before it is built. In loops within loops the innermost would be
    traced as often as two to the power of their number, if what was traced were not used again.
    """
    made, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    treedef = jax.tree.structure(shapes)
    repeat = jax.extend.core.jaxpr_as_fun(made)

    def call(*args):
        return treedef.unflatten(repeat(*jax.tree.leaves(args)))

    return call, treedef.unflatten(made.out_avals)


def _types(tree: PyTree) -> list[frozenset[str]]:
    return list(map(_axes, jax.tree.leaves(tree)))


def _agreeing(
    branches: Sequence[Callable[..., PyTree]],
    operands: tuple[PyTree, ...],
    condition: PyTree = None,
) -> Sequence[Callable[..., PyTree]]:
    """The branches, with results of the same types: those of all of them, and of the condition."""
    if not _is_manual():
        return branches
    made = [_traced(branch, *operands) for branch in branches]
    results = [jax.tree.leaves(shapes) for _, shapes in made]
    axes = [varying_axes((condition, *leaves)) for leaves in zip(*results, strict=True)]

    def widening(branch):
        def run(*operands):
            leaves, treedef = jax.tree.flatten(branch(*operands))
            return treedef.unflatten(map(_widened, leaves, axes))

        return run

    return [widening(branch) for branch, _ in made]
