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

    The declaration is checked as all layers are, on numbers: with the loss of some examples alone,
    and for every two of them with that of one and not of the other. One that is not true loses the
    layers before the function again, or raises, as `find_layers` says.

    Args:
      fn: A function of arrays, or pytrees of them. Values that are not arrays are passed on.
      in_axes: The axis that counts the examples, in each positional argument; `None` for what all
        examples share; as in `jax.vmap`, an integer, or a tuple with an integer, `None` or a pytree
        of them for each argument. All examples share keyword arguments, and what `fn` closes over.
      out_axes: The same of the outputs.

    Returns:
      The same function, declared. A `jax.vmap` of it is not; declare the `vmap`. As inside of any
      `jax.jit`, Flax's NNX cannot change variables there. Cost: none inside of `jax.jit`; outside
      of it a call that is differentiated or mapped is compiled anew each time.

    Raises:
      ValueError: When it is traced, if an axis is not there, or if arguments and outputs do not
        have one number of examples.
      TypeError: If an output is no array.

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
        axes = _spread(in_axes, args, "in_axes") + [None] * len(jax.tree.leaves(kwargs))
        is_array = [isinstance(x, Array | np.ndarray) for x in leaves]
        arrays = [x for x, is_one in zip(leaves, is_array, strict=True) if is_one]
        others = [x for x, is_one in zip(leaves, is_array, strict=True) if not is_one]
        held = [a for a, is_one in zip(axes, is_array, strict=True) if is_one]

        def flat(*arrays):
            sides = {True: iter(arrays), False: iter(others)}
            args, kwargs = structure.unflatten([next(sides[is_one]) for is_one in is_array])
            return _arrays(fn(*args, **kwargs))

        program, shapes = jax.make_jaxpr(flat, return_shape=True)(*arrays)
        inputs = _counted("argument", arrays, held)
        outputs = _counted("output", jax.tree.leaves(shapes), _spread(out_axes, shapes, "out_axes"))
        lengths = {x.shape[a] for x, a in (*inputs, *outputs) if a is not None}
        if len(lengths) > 1:
            raise ValueError(
                f"per_example: the axes of examples have to be of one length; got {sorted(lengths)}"
            )

        def named(closed_over, *arrays):
            return jax.core.eval_jaxpr(program.jaxpr, closed_over, *arrays)

        shared = ["none"] * len(program.consts)
        names = [PREFIX, *shared, *map(_code, inputs), "to", *map(_code, outputs)]
        named.__name__ = "_".join(names)
        made = jax.jit(named)(program.consts, *arrays)
        return jax.tree.unflatten(jax.tree.structure(shapes), made)

    return declared


def _arrays(results: PyTree) -> PyTree:
    """What a function returns, as arrays."""
    for path, x in jax.tree_util.tree_leaves_with_path(results):
        if not isinstance(x, Array | np.ndarray | np.generic | bool | int | float | complex):
            where = jax.tree_util.keystr(path)
            raise TypeError(
                f"per_example: outputs must be arrays; got {x!r} at {where or 'the top'}"
            )
    return jax.tree.map(jnp.asarray, results)


def _spread(axes: PyTree, tree: PyTree, name: str) -> list[int | None]:
    """The axis of every leaf of a tree, from a prefix of it."""
    axes = tuple(axes) if isinstance(axes, list) and isinstance(tree, tuple) else axes
    found: list[int | None] = []
    wrong = [x for x in jax.tree.leaves(axes) if isinstance(x, bool) or not hasattr(x, "__index__")]
    if not wrong:
        try:
            jax.tree.map(
                lambda axis, x: found.extend([axis] * len(jax.tree.leaves(x))),
                axes,
                tree,
                is_leaf=lambda x: x is None,
            )
            return found
        except ValueError:
            pass
    whose = "arguments" if name == "in_axes" else "outputs"
    raise ValueError(
        f"per_example: {name} must be an integer, None, or a pytree of them that the {whose} have "
        f"as a prefix; got {axes!r}"
    )


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
