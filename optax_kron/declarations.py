"""What a user declares of a function that capture cannot look into: that it keeps examples apart.

A kernel in Pallas, or of another language, is one equation of the program, and says nothing of
which part of its outputs is made of which part of its inputs. A declaration is a `jit` whose name
says so: it holds what the function holds, and is otherwise nothing.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array

from optax_kron.types import PyTree

# What names of declared functions begin with. Then, of each operand and each output, follow its
# axis of examples and its number of axes: "0of4", or "none".
PREFIX = "optax_kron_per_example"


class Declared(NamedTuple):
    """The axes of examples of a function.

    Attributes:
      inputs: Of each array that it takes; `None` if all examples share it.
      outputs: Of each array that it returns.
    """

    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]


def per_example(
    fn: Callable[..., PyTree], in_axes: PyTree = 0, out_axes: PyTree = 0
) -> Callable[..., PyTree]:
    """Declare that a function treats each example by itself, whatever it is made of.

    `find_layers` follows examples through the operations of JAX, but cannot look into kernels that
    are written in Pallas, or called as foreign functions: it takes them to mix the examples, and
    layers before them have no Kronecker factors. This function says that element `n` of the outputs
    is made of element `n` of the inputs alone, as `jax.vmap(fn)` would make it, for a function that
    works on whole batches. Layers before it are found then; parameters that are used inside of it
    have no Kronecker factors. Values and derivatives are those of `fn`.

    The declaration is checked as all layers are, on numbers: one that is not true loses the layers
    before the function again, or raises, as `find_layers` says.

    Args:
      fn: A function of arrays, or pytrees of them. Values that are not arrays are passed on.
      in_axes: The axis that counts the examples, in each positional argument; `None` for what all
        examples share; as in `jax.vmap`, an integer, or a tuple with an integer, `None` or a pytree
        of them for each argument. Keyword arguments are shared by all examples.
      out_axes: The same of the outputs.

    Returns:
      The same function, declared. Cost: none at run time.

    Raises:
      ValueError: When it is called, if an axis is not there, or if arguments and outputs do not
        have one number of examples.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> def attention(query, key, value):  # in its place: one in Pallas
      ...     return jax.nn.dot_product_attention(query, key, value)
      >>> attention = ok.per_example(attention)
      >>> attention(*3 * [jnp.ones((8, 5, 2, 4))]).shape
      (8, 5, 2, 4)
    """

    @functools.wraps(fn)
    def declared(*args, **kwargs):
        leaves, structure = jax.tree.flatten((args, kwargs))
        if not any(isinstance(x, jax.core.Tracer) for x in leaves):
            return fn(*args, **kwargs)
        axes = (*_spread(in_axes, args, "in_axes"), *[None] * len(jax.tree.leaves(kwargs)))
        is_array = [isinstance(x, Array | np.ndarray) for x in leaves]
        arrays = [x for x, is_one in zip(leaves, is_array, strict=True) if is_one]
        in_ = [a for a, is_one in zip(axes, is_array, strict=True) if is_one]
        trees = []

        def flat(*arrays):
            given = iter(arrays)
            filled = [
                next(given) if is_one else x for x, is_one in zip(leaves, is_array, strict=True)
            ]
            args, kwargs = structure.unflatten(filled)
            results, tree = jax.tree.flatten(fn(*args, **kwargs))
            trees.append(tree)
            return tuple(map(jnp.asarray, results))

        shapes = jax.eval_shape(flat, *arrays)
        out = _spread(out_axes, trees[0].unflatten(shapes), "out_axes")
        inputs = _counted("argument", arrays, in_)
        outputs = _counted("output", shapes, out)
        lengths = {x.shape[a] for x, a in (*inputs, *outputs) if a is not None}
        if len(lengths) > 1:
            raise ValueError(
                f"per_example: the axes of examples have to be of one length; got {sorted(lengths)}"
            )
        flat.__name__ = "_".join([PREFIX, *map(_code, inputs), "to", *map(_code, outputs)])
        return trees[0].unflatten(jax.jit(flat)(*arrays))

    return declared


def _spread(axes: PyTree, tree: PyTree, name: str) -> list[int | None]:
    """The axis of every leaf of a tree, from a prefix of it."""
    try:
        return jax.tree.leaves(
            jax.tree.broadcast(axes, tree, is_leaf=lambda x: x is None),
            is_leaf=lambda x: x is None,
        )
    except ValueError as error:
        raise ValueError(
            f"per_example: {name} must be an integer, None, or a pytree of them that the "
            f"{'arguments' if name == 'in_axes' else 'outputs'} have as a prefix; got {axes!r}"
        ) from error


def _counted(what: str, arrays: Sequence, axes: Sequence[int | None]) -> list[tuple]:
    """Arrays with their axes, counted from the first."""
    for i, (x, axis) in enumerate(zip(arrays, axes, strict=True)):
        if axis is not None and not -x.ndim <= axis < x.ndim:
            raise ValueError(
                f"per_example: {what} {i} has shape {x.shape}, and no axis {axis} that could count "
                "examples; None says that all examples share it"
            )
    return [(x, a and a % x.ndim) for x, a in zip(arrays, axes, strict=True)]


def _code(pair: tuple) -> str:
    x, axis = pair
    return "none" if axis is None else f"{axis}of{x.ndim}"


def declared_axes(
    name: str, inputs: Sequence[tuple[int, ...]], outputs: Sequence[tuple[int, ...]]
) -> Declared | None:
    """What the name of a `jit` declares, of operands and outputs of these shapes.

    `None` if it declares nothing, or if a transformation of JAX has changed what it works on: a
    `vmap` adds axes, a derivative adds operands.
    """
    match = re.fullmatch(f"{PREFIX}_(.*)_to_(.*)", name)
    if match is None:
        return None
    sides = []
    for codes, shapes in zip(match.groups(), (inputs, outputs), strict=True):
        axes = [None if code == "none" else code.split("of") for code in codes.split("_")]
        if len(axes) != len(shapes):
            return None
        if any(a and int(a[1]) != len(s) for a, s in zip(axes, shapes, strict=True)):
            return None
        sides.append(tuple(a and int(a[0]) for a in axes))
    return Declared(*sides)
