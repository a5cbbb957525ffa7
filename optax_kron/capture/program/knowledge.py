"""What is known of a program's values before it runs: integers, and what depends on examples."""

import math
from collections.abc import Callable, Collection, Sequence

import jax.core
import numpy as np

from optax_kron.capture.program.graph import Graph, Node, Operand, Value

_MOST = 1 << 22  # larger arrays of integers are not computed

# What a primitive makes of integers or booleans, in NumPy: of an equation and its operands.
IntegerRule = Callable[..., np.ndarray]


class Knowledge:
    """What is known of the values of a graph.

    Args:
      graph: Of the whole loss.
      parameters: Its inputs that are parameters.
      integer_rule: Gives the rule of an equation, if it has one.
    """

    def __init__(
        self,
        graph: Graph,
        parameters: Collection[Value],
        integer_rule: Callable[[Node], IntegerRule | None],
    ):
        self._integer_rule = integer_rule
        self._maker: dict[Value, Node] = {}
        self._arrays: dict[Value, np.ndarray | None] = {}
        self._fixed: set[Value] = set(parameters)  # depend on parameters and numbers alone
        self._shown: set[Value] = set(parameters)  # and, of those, on a parameter at all
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

    def _enter(
        self, kind: str, operands: Sequence[Operand], inputs: Sequence[Value], fixed: bool
    ) -> None:
        """What a body's inputs are, which are the last operands but for those of a loop's test."""
        # What starts as a constant may take in examples in the next step of a loop.
        known = self._shown if kind in ("scan", "while") else self._fixed
        for outer, inner in zip(operands, inputs, strict=True):
            if isinstance(outer, Value) and (fixed or outer in known):
                self._fixed.add(inner)
                self._shown.update([inner] if outer in self._shown else [])

    def depends_on_examples(self, value: Value) -> bool:
        """Whether a value depends on more than parameters."""
        return value not in self._fixed

    def runs_once(self, node: Node) -> bool:
        """Whether an equation is outside of all loops and branches."""
        return node in self._once

    def maker(self, value: Operand) -> Node | None:
        """The equation that makes a value; `None` for inputs, constants and numbers."""
        return self._maker.get(value) if isinstance(value, Value) else None

    def single(self, value: Operand) -> Operand | None:
        """What has one element, of which all elements of a value are copies, if that is known."""
        while math.prod(value.shape) != 1:
            node = self.maker(value)
            if node is None or node.name not in ("broadcast_in_dim", "reshape"):
                return None
            value = node.operands[0]
        return value

    def array(self, value: Operand) -> np.ndarray | None:
        """A value of integers or booleans, if it is known when the program is traced."""
        if not isinstance(value, Value):
            return np.asarray(value.number)
        if value not in self._arrays:
            self._arrays[value] = None  # while it is being found
            self._arrays[value] = self._evaluated(value)
        return self._arrays[value]

    def _evaluated(self, value: Value) -> np.ndarray | None:
        if value.dtype.kind not in "iub" or math.prod(value.shape) > _MOST:
            return None
        if value.constant is not None:
            constant = value.constant
            return None if isinstance(constant, jax.core.Tracer) else np.asarray(constant)
        node = self.maker(value)
        rule = None if node is None else self._integer_rule(node)
        if node is None or rule is None:
            return None
        operands = [self.array(operand) for operand in node.operands]
        if any(operand is None for operand in operands):
            return None
        return np.asarray(rule(node, *operands)).astype(value.dtype)
