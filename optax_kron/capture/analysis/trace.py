"""A loss function at given arguments, traced and analysed."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array

from optax_kron.capture.analysis.layers import Analysis, analyse
from optax_kron.capture.program import retraced
from optax_kron.capture.program.graph import trace
from optax_kron.layers.paths import abstract, are_parameters, as_array, by_path
from optax_kron.types import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """A loss function at given arguments.

    Attributes:
      function: From the graph's inputs to its outputs, the loss first.
      analysis: Its layers.
      arrays: The graph's inputs, the parameters first.
      result: What the function returns beside arrays.
      structure: The parameters as abstract arrays, `None` for leaves that are not floating-point.
    """

    function: Callable[..., list[Array]]
    analysis: Analysis
    arrays: Sequence[Array]
    result: "Result"
    structure: PyTree

    @property
    def is_concrete(self) -> bool:
        """Whether all inputs are numbers, neither abstract nor traced."""
        return not self.analysis.closes_over_tracers and all(
            hasattr(x, "__array__") and not isinstance(x, jax.core.Tracer) for x in self.arrays
        )


class Result:
    """What a loss function returns: its arrays, and beside them what is none, such as names."""

    def __init__(self):
        self._treedef = jax.tree.structure(None)
        self._others: dict[int, object] = {}

    def arrays(self, result: PyTree) -> list[Array]:
        """The arrays of a result; the rest is kept."""
        leaves, self._treedef = jax.tree.flatten(result)
        self._others = {i: x for i, x in enumerate(leaves) if not _is_array(x)}
        return [x for i, x in enumerate(leaves) if i not in self._others]

    def joined(self, arrays: Iterable[Array]) -> PyTree:
        """The result, with other arrays in place of its own."""
        rest = iter(arrays)
        count = self._treedef.num_leaves
        leaves = [self._others[i] if i in self._others else next(rest) for i in range(count)]
        return self._treedef.unflatten(leaves)


def _is_array(x: object) -> bool:
    """Whether JAX can take a value for an array."""
    return hasattr(x, "__jax_array__") or isinstance(
        x, jax.Array | np.ndarray | np.generic | bool | int | float | complex
    )


def trace_loss(
    loss_fn: Callable[..., PyTree],
    params: PyTree,
    args: tuple[PyTree, ...],
    has_aux: bool,
    earlier: Analysis | None = None,
) -> Traced:
    """Trace a loss function, and analyse it.

    Args:
      loss_fn: A function as `find_layers` takes it.
      params: Its first argument.
      args: Its other arguments.
      has_aux: Whether it returns auxiliary data.
      earlier: An analysis of perhaps the same program, which then holds for this one.

    Raises:
      ValueError: If the loss is not a real scalar, or two parameters have one path.
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
        program, outputs = trace(flat, *(leaves[i] for i in inputs))
    _check_loss(result.joined(outputs), has_aux)
    paths = [paths[i] for i in wanted]
    # The function is traced whenever it is called, as what it closes over may have changed: an
    # analysis travels to where its program is the same.
    renewed = None
    if earlier is not None and list(earlier.leaves) == paths:
        renewed = retraced.renewed(earlier.program, program)
    if earlier is None or renewed is None:
        analysis = analyse(program, paths)
    else:
        analysis = dataclasses.replace(earlier, renewed=renewed)
    arrays = [leaves[i] for i in inputs]
    return Traced(flat, analysis, arrays, result, abstract(params))


def _check_loss(outputs: PyTree, has_aux: bool) -> None:
    """Raise unless the function returns a real scalar, or a pair with one if `has_aux`."""
    if has_aux and not (isinstance(outputs, tuple) and len(outputs) == 2):
        raise ValueError("has_aux=True, but loss_fn does not return a pair (loss, aux).")
    loss: PyTree = outputs[0] if has_aux else outputs
    if not hasattr(loss, "shape") or loss.shape or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(
            f"loss_fn must return a real scalar{', with has_aux' if has_aux else ''}; got {loss}."
            + ("" if has_aux else " If it returns (loss, aux), pass has_aux=True.")
        )
