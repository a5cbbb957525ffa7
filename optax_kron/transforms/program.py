"""How every transformation is made: its state fits into `jax.shard_map`, and it compiles once.

Settings are dataclasses whose fields may be traced numbers, strings or functions. `settings` makes
them pytrees, and `parts` takes one apart into its arrays, which are operands of a program, and the
rest, which is a part of the program itself.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from optax_kron.kernels import flow
from optax_kron.types import PyTree

Class = TypeVar("Class", bound=type)


def transformation(
    init: Callable[[PyTree], PyTree], update: Callable[..., tuple[PyTree, PyTree]]
) -> optax.GradientTransformationExtraArgs:
    """The transformation of two functions, whose state varies over a mesh as the parameters do.

    Its update refuses a state of 64 bits while these are off.
    """

    def init_like(params: PyTree) -> PyTree:
        return flow.varying_like(init(params), params)

    @functools.wraps(update)
    def update_checked(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: PyTree
    ) -> tuple[PyTree, PyTree]:
        _check_bits(state)
        return update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_like, update_checked)


def _check_bits(state: PyTree) -> None:
    """Raise where a state has been made with types that are off now, which JAX takes for others."""
    for leaf in jax.tree.leaves(state):
        dtype = getattr(leaf, "dtype", jnp.float32)
        if jnp.issubdtype(dtype, jnp.inexact) and jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError(
                f"the state of the optimizer holds numbers of {dtype}, but 64-bit types are off: "
                "jax_enable_x64 was on when init made the state. Switch it on again, or start from "
                "tx.init(params) with it off."
            )


def settings(cls: Class) -> Class:
    """Make a dataclass of settings a pytree, so that those that are arrays may be operands."""
    names = [field.name for field in dataclasses.fields(cls)]
    return jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=[])


def as_arrays(tree: PyTree) -> PyTree:
    """Numbers as arrays, as `jax.grad` takes them for such; abstract arrays stay what they are."""
    return jax.tree.map(lambda x: x if _is_abstract(x) else jnp.asarray(x), tree)


def _is_abstract(x: object) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)


def is_concrete(tree: PyTree) -> bool:
    """Whether the values of all leaves are there already."""
    return not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def once(function: Callable[..., PyTree], *operands: PyTree) -> PyTree:
    """`function(*operands)` as one program, which without `jax.jit` too is compiled a single time.

    Loops and branches of functions that are made at every call would be compiled at every call.
    Inside of another program nothing changes.

    Args:
      function: of a module, not made on the spot.
      *operands: pytrees. Arrays are operands of the program; numbers, strings and everything else
        are a part of it, so that equal ones share it.
    """
    arrays, rebuild = parts(operands)
    try:
        hash(rebuild)
    except TypeError:  # a node of the tree keeps data that have no hash
        return function(*operands)
    return _run(function, rebuild, arrays)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _run(function, rebuild, arrays):
    return function(*rebuild(arrays))


def parts(tree: PyTree) -> tuple[list[Array], "Rebuild"]:
    """The arrays of a tree, and the function that makes the tree of them again."""
    leaves, treedef = jax.tree.flatten(tree)
    arrays = [x for x in leaves if _is_array(x)]
    return arrays, Rebuild(treedef, tuple(None if _is_array(x) else _Part(x) for x in leaves))


class Rebuild(NamedTuple):
    """A tree without its arrays; equal to another if neither can be told from the other."""

    treedef: PyTree
    static: tuple["_Part | None", ...]

    def __call__(self, arrays: Iterable[Array]) -> PyTree:
        """The tree with these arrays."""
        given = iter(arrays)
        leaves = [next(given) if x is None else x.value for x in self.static]
        return self.treedef.unflatten(leaves)


def _is_array(x: object) -> bool:
    return isinstance(x, jax.Array | np.ndarray)


class _Part:
    """A part of a program: equal to another if neither can be told from the other."""

    def __init__(self, value: object):
        self.value = value
        try:
            self._hash = hash(value)
        except TypeError:
            self._hash = None

    def __hash__(self) -> int:
        return id(self.value) if self._hash is None else self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Part):
            return False
        mine, yours = self.value, other.value
        if mine is yours:
            return True
        return self._hash is not None and type(mine) is type(yours) and bool(mine == yours)
