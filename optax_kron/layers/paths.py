"""Parameters of a tree by path: "params/Dense_0/kernel"."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def is_inexact(x: Any) -> bool:
    """Whether a leaf is an array of real or complex numbers, as parameters are."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)


def are_parameters(tree: PyTree) -> list[bool]:
    """Which leaves of a tree are parameters, in order: arrays of real or complex numbers.

    In trees that `jax.grad` takes, Python's own numbers are, too. Beside functions, integers and
    the like they are settings, and in modules of Equinox, whose gradients leave them out.
    """
    leaves = jax.tree.leaves(tree)
    arrays = [is_inexact(x) for x in leaves]
    if all(x or _is_number(leaf) for x, leaf in zip(arrays, leaves, strict=True)):
        nodes = jax.tree.leaves(tree, is_leaf=_is_module)
        return arrays if any(map(_is_module, nodes)) else [True] * len(leaves)
    return arrays


def abstract(tree: PyTree) -> PyTree:
    """The parameters of a tree as `jax.ShapeDtypeStruct`s, `None` for all other leaves."""
    leaves, treedef = jax.tree.flatten(tree)
    found = [
        jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) if wanted else None
        for x, wanted in zip(leaves, are_parameters(tree), strict=True)
    ]
    return jax.tree.unflatten(treedef, found)


def as_array(x: Any) -> Any:
    """Python's numbers as arrays, as `jax.grad` takes them; all else as it is."""
    return jnp.asarray(x) if _is_number(x) else x


def _is_number(x: Any) -> bool:
    return isinstance(x, float | complex)


def _is_module(x: Any) -> bool:
    """Whether a node is a module of Equinox, which need not be installed."""
    return _descends_from(x, "equinox", ("Module",))


def _is_variable(x: Any) -> bool:
    """Whether a node is a variable of Flax NNX, which need not be installed."""
    return _descends_from(x, "flax.nnx", ("Variable", "VariableState"))


def _descends_from(x: Any, package: str, names: Sequence[str]) -> bool:
    return any(
        kind.__name__ in names and f"{kind.__module__}.".startswith(f"{package}.")
        for kind in type(x).__mro__
    )


def paths_of(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> list[str]:
    """The paths of a tree's leaves, in order, with slashes: "params/Dense_0/kernel".

    What a variable of Flax NNX holds has the path of the variable; a field named `value` of
    anything else is a name like others.

    Args:
      tree: any pytree.
      is_leaf: as in `jax.tree.leaves`.
    """

    def stops(x):
        return _is_variable(x) or (is_leaf is not None and is_leaf(x))

    found = []
    for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=stops):
        inner: list[Any] = [()]
        if _is_variable(x):
            inner = [keys for keys, _ in jax.tree_util.tree_leaves_with_path(x, is_leaf=is_leaf)]
        for keys in inner:
            own = () if keys == (jax.tree_util.GetAttrKey("value"),) else keys
            found.append(jax.tree_util.keystr((*path, *own), simple=True, separator="/"))
    return found


def by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by path, in order; Python's numbers as arrays.

    Raises:
      ValueError: if two leaves have one path.
    """
    paths = paths_of(tree)
    found = dict(zip(paths, map(as_array, jax.tree.leaves(tree)), strict=True))
    if len(found) < len(paths):
        twice = sorted({path for path in paths if paths.count(path) > 1})
        raise ValueError(
            f"two parameters have one path: written with slashes, {', '.join(twice)} may mean "
            "either. Rename one of them."
        )
    return found


def map_by_path(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """The tree of `function(path, leaf)`."""
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, list(map(function, paths_of(tree), leaves)))


def slashed(path: str) -> str:
    """A path as `jax.tree_util.keystr` prints it, with slashes: `"['a'][0].b"` becomes "a/0/b"."""
    return "/".join(re.findall(r"[^\[\]'\".]+", path))


def spellings(path: str) -> tuple[str, ...]:
    """What a given path may be in `by_path`: itself, with slashes, or what a variable is at."""
    return path, slashed(path), slashed(path.removesuffix(".value"))
