"""Arrays on a mesh with explicit axes, whose types tell their shardings.

There JAX asks how the result of a contraction or of a reshape is to be sharded where types leave it
open. Elsewhere these functions leave everything as it is.
"""

# x float32[16@data, 8] has its examples on the devices of the mesh axis "data".
#
#   x.T @ x                             refused: a sum over "data", and who is to have it?
#   untyped(lambda x: x.T @ x, x)       float32[8, 8], on all devices
#   table.at[i].get(out_sharding=...)   types tell nothing inside of it, and what is added to an
#                                       array there has to come in as well (`where_it_is`)

from collections.abc import Callable

import jax
from jaxtyping import Array

from optax_kron.types import PyTree

WHOLE = jax.sharding.PartitionSpec()  # the same on all devices


def where_it_is(function: Callable[..., Array], x: Array, *others: Array) -> Array:
    """`function(x, *others)`, in the part of a program on an explicit mesh that `x` is in.

    There are parts in which the compiler chooses shardings, and types do not tell them: what
    `jax.sharding.auto_axes` wraps, such as lookups with an `out_sharding`. What meets an array in
    such a part has to be in it.
    """
    if (mesh := _untyped_mesh(x)) is None:
        return function(x, *others)
    with jax.sharding.use_abstract_mesh(mesh):
        return function(x, *(jax.sharding.reshard(y, WHOLE) for y in others))


def typed(x: Array) -> Array:
    """An array from such a part, for the rest of the program: the same on all devices."""
    return x if _untyped_mesh(x) is None else jax.sharding.reshard(x, WHOLE)


def untyped(function: Callable[..., PyTree], *operands: PyTree, out: PyTree = WHOLE) -> PyTree:
    """`function(*operands)` in such a part of its own.

    There the compiler finds a way for every operation, whatever the shardings of its operands.

    Args:
      function: Of pytrees of arrays; it closes over none.
      *operands: Those.
      out: A tree, or a prefix of one, of the shardings of the result; by default on all devices.
    """
    if not has_types():
        return function(*operands)
    return jax.sharding.auto_axes(function, out_sharding=out)(*operands)


def spec_of(x: Array | jax.ShapeDtypeStruct) -> jax.sharding.PartitionSpec:
    """The sharding that the type of an array tells, of those on an explicit mesh."""
    sharding = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x).sharding
    return WHOLE if sharding is None else sharding.spec


def shardings(tree: PyTree) -> PyTree:
    """`spec_of` every leaf."""
    return jax.tree.map(spec_of, tree)


def mesh_axes(spec: jax.sharding.PartitionSpec, axis: int) -> tuple[str, ...]:
    """Names of the mesh axes over which an axis of an array is sharded."""
    names = spec[axis] if axis < len(spec) else None
    return (names,) if isinstance(names, str) else tuple(names or ())


def whole(tree: PyTree) -> PyTree:
    """The same arrays on all devices of an explicit mesh; elsewhere as they are."""
    return jax.tree.map(lambda x: _placed(x, WHOLE), tree)


def placed_like(x: Array, like: Array) -> Array:
    """An array with the sharding of another of its shape, on an explicit mesh."""
    return _placed(x, spec_of(like))


def _placed(x: Array, spec: jax.sharding.PartitionSpec) -> Array:
    return jax.sharding.reshard(x, spec) if has_types() else x


def has_types() -> bool:
    """Whether types of arrays tell shardings here."""
    return jax.sharding.AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def _untyped_mesh(x: Array) -> jax.sharding.AbstractMesh | None:
    """The mesh of an array whose sharding is the compiler's, where others' are typed."""
    mesh = jax.typeof(x).sharding.mesh
    is_typed = mesh.empty or jax.sharding.AxisType.Explicit in mesh.axis_types
    return mesh if has_types() and not is_typed else None
