"""A loss function at given arguments, as a graph of flat arrays with its analysis."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from optax_kron.capture.analysis.layers import Analysis, analyse
from optax_kron.capture.program import graph as graphs
from optax_kron.layers.paths import abstract, are_parameters, as_array, by_path

PyTree = Any


@dataclasses.dataclass(eq=False)
class Traced:
    """A loss function at given arguments, as a graph of flat arrays.

    Attributes:
      function: from the graph's inputs to its outputs, the loss first.
      analysis: its layers.
      leaves: all leaves of the arguments, those that are not arrays among them.
      inputs: positions in `leaves` of the graph's inputs, the parameters first.
      paths: of the parameters, in the order of the graph's inputs.
      result: what the function returns beside arrays.
      structure: the parameters as abstract arrays, `None` for leaves that are not floating-point.
    """

    function: Callable[..., Any]
    analysis: Analysis
    leaves: list[Any]
    inputs: list[int]
    paths: list[str]
    result: "Result"
    structure: PyTree

    @property
    def arrays(self) -> list[Any]:
        """The graph's inputs."""
        return [self.leaves[i] for i in self.inputs]

    @property
    def is_concrete(self) -> bool:
        """Whether all inputs are numbers, neither abstract nor traced."""
        constants = [value.constant for value in self.analysis.graph.constants]
        return all(
            hasattr(x, "__array__") and not isinstance(x, jax.core.Tracer)
            for x in (*self.arrays, *constants)
        )


class Result:
    """What a loss function returns: its arrays, and beside them what is none, such as names."""

    def __init__(self):
        self._treedef: Any = None
        self._others: dict[int, Any] = {}

    def arrays(self, result: PyTree) -> list[Any]:
        """The arrays of a result; the rest is kept."""
        leaves, self._treedef = jax.tree.flatten(result)
        self._others = {i: x for i, x in enumerate(leaves) if not _is_array(x)}
        return [x for i, x in enumerate(leaves) if i not in self._others]

    def joined(self, arrays: Iterable[Any]) -> PyTree:
        """The result, with other arrays in place of its own."""
        given = iter(arrays)
        count = self._treedef.num_leaves
        leaves = [self._others[i] if i in self._others else next(given) for i in range(count)]
        return self._treedef.unflatten(leaves)


def _is_array(x: Any) -> bool:
    """Whether JAX can take a value for an array."""
    return hasattr(x, "__jax_array__") or isinstance(
        x, jax.Array | np.ndarray | np.generic | bool | int | float | complex
    )


def trace_loss(loss_fn: Callable, params: PyTree, args: tuple, has_aux: bool) -> Traced:
    """Trace and analyse a loss function.

    Raises:
      ValueError: if the loss is not a real scalar, or two parameters have one path.
    """
    leaves, treedef = jax.tree.flatten((params, args))
    paths = list(by_path(params))
    wanted = [i for i, is_parameter in enumerate(are_parameters(params)) if is_parameter]
    for i in wanted:
        leaves[i] = as_array(leaves[i])
    others = [i for i, x in enumerate(leaves) if i not in set(wanted) and hasattr(x, "dtype")]
    inputs = [*wanted, *others]

    def flat(*arrays):
        filled = list(leaves)
        for i, array in zip(inputs, arrays, strict=True):
            filled[i] = array
        given, arguments = jax.tree.unflatten(treedef, filled)
        return result.arrays(loss_fn(given, *arguments))

    result = Result()
    with jax.disable_jit(False):  # marks, and loops, are only there where functions are traced
        graph, outputs = graphs.trace(flat, *(leaves[i] for i in inputs))
    shapes = result.joined(outputs)
    if has_aux and not (isinstance(shapes, tuple) and len(shapes) == 2):
        raise ValueError("has_aux=True, but loss_fn does not return a pair (loss, aux).")
    loss: Any = shapes[0] if has_aux else shapes
    if not hasattr(loss, "shape") or loss.shape or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(
            f"loss_fn must return a real scalar{', with has_aux' if has_aux else ''}; got {loss}."
            + ("" if has_aux else " If it returns (loss, aux), pass has_aux=True.")
        )
    for node in graph.walk():
        if node.kind == "mark" and 0 in node.outputs[0].shape:
            raise ValueError(
                f"the loss at {node.place} has no data: its per-example losses have shape "
                f"{node.outputs[0].shape}."
            )
    values = dict(zip([paths[i] for i in wanted], graph.inputs, strict=False))
    return Traced(
        function=flat,
        analysis=analyse(graph, values),
        leaves=leaves,
        inputs=inputs,
        paths=list(values),
        result=result,
        structure=abstract(params),
    )
