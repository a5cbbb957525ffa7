"""Parameters of a tree by path: "params/Dense_0/kernel"."""

# Worked example. One parameter may be written in several ways:
#
#   params["params"]["Dense_0"]["kernel"]      "params/Dense_0/kernel", the key of `by_path`
#   jax.tree_util.keystr of it                 "['params']['Dense_0']['kernel']"
#   an nnx.Variable `model.dense.kernel`       "dense/kernel", or keystr's ".dense.kernel.value"
#
# `spellings` lists, for what a user wrote, the keys that it may mean.

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_kron.types import PyTree

# A leaf: an array, an abstract array, a Python number, or a setting that is no parameter. Which
# of them depends on the tree, and no type says so.
Leaf = Any


def is_inexact(x: object) -> bool:
    """Whether a leaf is an array of real or complex numbers, as parameters are."""
    dtype = getattr(x, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def are_parameters(tree: PyTree) -> list[bool]:
    """Which leaves of a tree are parameters, in order: arrays of real or complex numbers.

    In trees that `jax.grad` takes, Python's own numbers are, too. Beside functions, integers and
    the like they are settings, and in modules of Equinox, whose gradients leave them out.
    """
    leaves = jax.tree.leaves(tree)
    arrays = [is_inexact(x) for x in leaves]
    if all(is_array or _is_number(x) for is_array, x in zip(arrays, leaves, strict=True)):
        # Equinox's gradients leave out numbers, whatever else the module holds.
        nodes = jax.tree.leaves(tree, is_leaf=_is_module)
        return arrays if any(map(_is_module, nodes)) else [True] * len(leaves)
    return arrays


def abstract(tree: PyTree) -> PyTree:
    """The parameters of a tree as `jax.ShapeDtypeStruct`s, `None` for all other leaves."""
    leaves, treedef = jax.tree.flatten(tree)
    shapes = [
        jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) if is_parameter else None
        for x, is_parameter in zip(leaves, are_parameters(tree), strict=True)
    ]
    return jax.tree.unflatten(treedef, shapes)


def as_array(x: Leaf) -> Leaf:
    """Python's numbers as arrays, as `jax.grad` takes them; all else as it is."""
    return jnp.asarray(x) if _is_number(x) else x


def _is_number(x: object) -> bool:
    return isinstance(x, float | complex)


def _is_module(x: object) -> bool:
    """Whether a node is a module of Equinox."""
    return _descends_from(x, "equinox", ("Module",))


def _is_variable(x: object) -> bool:
    """Whether a node is a variable of Flax NNX."""
    return _descends_from(x, "flax.nnx", ("Variable", "VariableState"))


def without_variables(tree: PyTree) -> PyTree:
    """The tree with what variables of Flax NNX hold in their place."""

    def held(x):
        leaves = jax.tree.leaves(x) if _is_variable(x) else []
        return leaves[0] if len(leaves) == 1 else x

    return jax.tree.map(held, tree, is_leaf=_is_variable)


def _descends_from(x: object, package: str, names: Sequence[str]) -> bool:
    """Whether a class of one of the names, in the package, is a base of the node's class."""
    # By name, for the package may not be installed, and is slow to import where it is.
    return any(
        kind.__name__ in names and f"{kind.__module__}.".startswith(f"{package}.")
        for kind in type(x).__mro__
    )


def paths_of(tree: PyTree, is_leaf: Callable[[object], bool] | None = None) -> list[str]:
    """The paths of a tree's leaves, in order, with slashes: "params/Dense_0/kernel".

    What a variable of Flax NNX holds has the path of the variable; a field named `value` of
    anything else is a name like others.

    Args:
      tree: A pytree of leaves of every kind.
      is_leaf: As in `jax.tree.leaves`.
    """

    def stops(x):
        return _is_variable(x) or (is_leaf is not None and is_leaf(x))

    paths = []
    for outer, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=stops):
        inner = [()]
        if _is_variable(x):
            inner = [keys for keys, _ in jax.tree_util.tree_leaves_with_path(x, is_leaf=is_leaf)]
        for keys in inner:
            # A variable that holds one array has it in a field `value`: the path is its own.
            named = () if keys == (jax.tree_util.GetAttrKey("value"),) else keys
            paths.append(jax.tree_util.keystr((*outer, *named), simple=True, separator="/"))
    return paths


def by_path(tree: PyTree) -> dict[str, Leaf]:
    """The leaves of a tree by path, in order; Python's numbers as arrays.

    Raises:
      ValueError: If two leaves have one path.
    """
    paths = paths_of(tree)
    leaves = dict(zip(paths, map(as_array, jax.tree.leaves(tree)), strict=True))
    if len(leaves) < len(paths):
        twice = sorted({path for path in paths if paths.count(path) > 1})
        raise ValueError(
            f"two parameters have one path: written with slashes, {', '.join(twice)} may mean "
            "either. Rename one of them."
        )
    return leaves


def map_by_path(function: Callable[[str, Leaf], object], tree: PyTree) -> PyTree:
    """The tree of `function(path, leaf)`."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, list(map(function, paths_of(tree), leaves)))


def slashed(path: str) -> str:
    """A path as `jax.tree_util.keystr` prints it, with slashes: `"['a'][0].b"` becomes "a/0/b"."""
    return "/".join(re.findall(r"[^\[\]'\".]+", path))


def spellings(path: str) -> tuple[str, ...]:
    """What a given path may be in `by_path`: itself, with slashes, or what a variable is at."""
    return path, slashed(path), slashed(path.removesuffix(".value"))
