"""What is known of a program's values before it runs: integers, and what depends on data."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax.core
import numpy as np

from optax_kron.capture.program.equations import is_literal
from optax_kron.capture.program.graph import Graph, Node, Value

_MOST = 1 << 22  # larger arrays of integers are not computed


class Knowledge:
    """What is known of the values of a graph.

    Args:
      graph: Of the whole loss.
      parameters: Its inputs that are parameters.
    """

    def __init__(self, graph: Graph, parameters: Collection[Value]):
        self._maker: dict[Value, Node] = {}
        self._arrays: dict[Value, np.ndarray | None] = {}
        self._fixed: set[Value] = set(parameters)  # what depends on parameters and literals alone
        self._shown: set[Value] = set(parameters)  # and, of that, on a parameter at all
        self._once: set[Node] = set()  # nodes outside of loops and branches
        self._visit(graph, once=True)

    def _visit(self, graph: Graph, once: bool) -> None:
        for node in graph.nodes:
            self._maker.update(dict.fromkeys(node.outputs, node))
            if once:
                self._once.add(node)
            fixed = all(value in self._fixed for value in node.values)
            if fixed:
                self._fixed.update(node.outputs)
            if fixed and not self._shown.isdisjoint(node.values):
                self._shown.update(node.outputs)
            for body in node.bodies:
                offset = len(node.operands) - len(body.inputs)
                if offset >= 0:
                    self._enter(node.kind, node.operands[offset:], body.inputs, fixed)
                self._visit(body, once and node.kind == "remat")

    def _enter(self, kind: str, operands: Sequence[Any], inputs: Sequence[Value], fixed: bool):
        """What a body's inputs are, which are the last operands but for those of a loop's test."""
        # What starts as a constant may take in data in the next step of a loop.
        known = self._shown if kind in ("scan", "while") else self._fixed
        for outer, inner in zip(operands, inputs, strict=True):
            if not is_literal(outer) and (fixed or outer in known):
                self._fixed.add(inner)
                self._shown.update([inner] if outer in self._shown else [])

    def depends_on_data(self, value: Value) -> bool:
        """Whether a value depends on more than parameters."""
        return value not in self._fixed

    def runs_once(self, node: Node) -> bool:
        """Whether an equation is outside of all loops and branches."""
        return node in self._once

    def maker(self, value: Value) -> Node | None:
        """The equation that makes a value; `None` for inputs and constants."""
        return self._maker.get(value)

    # --------------------------------------------------------------------------------- integers

    def array(self, value: Any) -> np.ndarray | None:
        """A value of integers or booleans, if it is known when the program is traced."""
        if is_literal(value):
            return np.asarray(value.val)
        if value not in self._arrays:
            self._arrays[value] = None  # while it is being found
            self._arrays[value] = self._evaluated(value)
        return self._arrays[value]

    def _evaluated(self, value):
        if value.dtype.kind not in "iub" or math.prod(value.shape) > _MOST:
            return None
        if value.constant is not None:
            constant = value.constant
            return None if isinstance(constant, jax.core.Tracer) else np.asarray(constant)
        node = self.maker(value)
        rule = None if node is None else _EVALUATE.get(node.name)
        if node is None or rule is None:
            return None
        operands = [self.array(operand) for operand in node.operands]
        if any(operand is None for operand in operands):
            return None
        return np.asarray(rule(node, *operands)).astype(value.dtype)

    def column(self, value: Value, number: int) -> tuple[np.ndarray | None, Value]:
        """One column of indices [..., columns], if it is known, and what it comes from."""
        node = self.maker(value)
        axis = value.ndim - 1
        if node is not None and node.name == "concatenate" and node.params["dimension"] == axis:
            for operand in node.operands:
                width = operand.aval.shape[axis]
                if number < width and isinstance(operand, Value):
                    return self.column(operand, number)
                number -= width
            return None, value
        whole = self.array(value)
        return (None if whole is None else whole[..., number]), value

    def origin(self, value: Value) -> Value:
        """What indices come from, through what makes negative ones positive and adds axes."""
        while (node := self.maker(value)) is not None:
            if node.name in ("broadcast_in_dim", "reshape", "squeeze"):
                same = math.prod(node.operands[0].aval.shape) == math.prod(value.shape)
                source = node.operands[0] if same else None
            elif node.name == "select_n":
                source = self._unwrapped(node)
            else:
                source = node.operands[0] if node.name == "convert_element_type" else None
            if not isinstance(source, Value) or source.dtype.kind not in "iu":
                break
            value = source
        return value

    def _unwrapped(self, node: Node) -> Any:
        """The index of `select_n(index < 0, index, index + length)`."""
        if len(node.operands) != 3:
            return None
        test, index, other = node.operands
        for value, name in ((test, "lt"), (other, "add")):
            maker = self.maker(value) if isinstance(value, Value) else None
            if maker is None or maker.name != name or maker.operands[0] is not index:
                return None
        return index

    def is_distinct(self, value: Value) -> bool:
        """Whether no two elements of some indices are known to be equal, in any run."""
        value = self.origin(value)
        known = self.array(value)
        if known is not None:
            return len(np.unique(known)) == known.size
        node = self.maker(value)
        if node is None:
            return False
        if node.name == "sort" and value.ndim == 1:
            return self.is_distinct(node.operands[node.outputs.index(value)])
        if node.name in ("slice", "rev") and value.ndim == 1:
            return self.is_distinct(node.operands[0])
        return node.name == "top_k" and value.ndim == 1 and node.outputs.index(value) == 1


def _iota(node):
    dimension, shape = node.params["dimension"], node.params["shape"]
    count = np.arange(shape[dimension])
    return np.broadcast_to(
        count.reshape([-1 if a == dimension else 1 for a in range(len(shape))]), shape
    )


def _broadcast(node, x):
    shape, dimensions = node.params["shape"], node.params["broadcast_dimensions"]
    made = [1] * len(shape)
    for axis, size in zip(dimensions, x.shape, strict=True):
        made[axis] = size
    return np.broadcast_to(x.reshape(made), shape)


def _stretched(node, x):
    return np.broadcast_to(x, node.outputs[0].shape)


def _slice(node, x):
    params = node.params
    strides = params["strides"] or (1,) * x.ndim
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return x[tuple(slice(*bound) for bound in bounds)]


def _select(node, which, *cases):
    return np.where(which, cases[1], cases[0]) if which.dtype == bool else np.choose(which, cases)


def _elementwise(fn: Callable) -> Callable:
    return lambda node, *operands: np.broadcast_to(fn(*operands), node.outputs[0].shape)


_EVALUATE: dict[str, Callable] = {
    "iota": _iota,
    "broadcast_in_dim": _broadcast,
    "reshape": lambda node, x: x.reshape(node.outputs[0].shape),
    "squeeze": lambda node, x: x.reshape(node.outputs[0].shape),
    "transpose": lambda node, x: x.transpose(node.params["permutation"]),
    "slice": _slice,
    "rev": lambda node, x: np.flip(x, node.params["dimensions"]),
    "concatenate": lambda node, *xs: np.concatenate(xs, node.params["dimension"]),
    "select_n": _select,
    "copy": _stretched,
    "copy_p": _stretched,
    "stop_gradient": _stretched,
    "convert_element_type": _stretched,
    "add": _elementwise(np.add),
    "sub": _elementwise(np.subtract),
    "mul": _elementwise(np.multiply),
    "max": _elementwise(np.maximum),
    "min": _elementwise(np.minimum),
    "lt": _elementwise(np.less),
    "le": _elementwise(np.less_equal),
    "gt": _elementwise(np.greater),
    "ge": _elementwise(np.greater_equal),
    "eq": _elementwise(np.equal),
    "ne": _elementwise(np.not_equal),
    "and": _elementwise(np.bitwise_and),
    "cumsum": lambda node, x: np.cumsum(x, node.params["axis"]),
}
