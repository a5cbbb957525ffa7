"""A function's jaxpr as a graph in which every value is a node of its own.

Jaxprs are shared between call sites (a function that is jitted once and called twice is one jaxpr),
so that their variables don't say which call is meant. Here calls are inlined, and every other
equation that holds jaxprs (loops, branches, checkpoints) gets copies of its own, so that a value
stands for one place of the program.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from optax_kron.capture.program import equations
from optax_kron.capture.program.equations import is_literal

ELEMENTWISE = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp
    clz complex conj convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp
    exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite le lgamma log
    log1p log2 logistic lt max min mul mulhi name ne neg nextafter not one_minus_square or polygamma
    polynomial population_count pow real reduce_precision regularized_incomplete_beta rem round
    rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square
    sub tan tanh xor zeta
    """.split()  # noqa: SIM905  (a list would take a line for each)
)


@dataclasses.dataclass(eq=False)
class Value:
    """A value of the program, of known shape and dtype."""

    aval: Any
    constant: Any = None  # its array, if the function closes over it

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array."""
        return tuple(self.aval.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """As of an array."""
        return self.aval.dtype

    @property
    def ndim(self) -> int:
        """As of an array."""
        return len(self.aval.shape)

    def __repr__(self):
        return f"Value({self.aval.str_short()}@{id(self) % 10000})"


@dataclasses.dataclass(eq=False)
class Node:
    """One equation.

    Attributes:
      kind: "plain"; "opaque", bound whole, though its body is known; "mark", a loss of
        `optax_kron.losses`; or "scan", "while", "cond", "remat".
      eqn: the equation.
      jaxpr: that the equation comes from.
      operands: values, and the equation's literals in their places.
      outputs: values.
      bodies: the graphs that it holds, whose inputs and outputs are as the kind says.
      calls: the calls that it was inlined from, from the inside.
    """

    kind: str
    eqn: Any
    jaxpr: Any
    operands: list[Any]  # values and literals
    outputs: list[Value]
    bodies: tuple["Graph", ...] = ()
    calls: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        """Of the primitive."""
        return equations.name(self.eqn)

    @property
    def params(self) -> Mapping[str, Any]:
        """Settings of an equation that holds no program."""
        return equations.settings(self.eqn)

    @property
    def images(self) -> list[int] | None:
        """Which operand each output is, unchanged; `None` if it computes something."""
        return equations.images(self.eqn)

    @functools.cached_property
    def loop(self) -> equations.Loop:
        """Of a scan: how many constants and carries it has, and how many steps."""
        return equations.loop(self.eqn)

    @property
    def place(self) -> str:
        """Where the user's code made this equation: "file.py:12 (function)", or empty."""
        return equations.place(self.eqn, *self.calls)

    @property
    def has_marks(self) -> bool:
        """Whether one of its bodies holds a marked loss."""
        return any(node.kind == "mark" for body in self.bodies for node in body.walk())

    @property
    def values(self) -> list[Value]:
        """The operands that are not literals."""
        return [x for x in self.operands if isinstance(x, Value)]

    def bind(self, *arguments: Any) -> list[Any]:
        """Evaluate the equation on arrays for its values."""
        return equations.bind(self.eqn, self.jaxpr, *arguments)


# The branches around something, from the outside: equations, and the number of the branch.
Branch = tuple[tuple[Node, int], ...]


class Broadcast(Node):
    """What an elementwise equation does silently to a scalar, or to axes of length one."""

    def __init__(self, operand: Value, eqn: Any, shape: tuple[int, ...]):
        output = Value(jax.core.ShapedArray(shape, operand.dtype))
        super().__init__("plain", eqn, None, [operand], [output])

    @property
    def name(self) -> str:
        """What makes the same of the operand."""
        return "broadcast_in_dim"

    @property
    def images(self) -> None:
        """It makes another array."""
        return None

    @property
    def params(self) -> dict[str, Any]:
        """As of that primitive."""
        dimensions = tuple(range(self.operands[0].ndim))
        return {"shape": self.outputs[0].shape, "broadcast_dimensions": dimensions}

    def bind(self, *arguments: Any) -> list[Any]:
        """Broadcast an array."""
        return [jnp.broadcast_to(arguments[0], self.outputs[0].shape)]


@dataclasses.dataclass(eq=False)
class Graph:
    """Equations in order, from inputs to outputs."""

    inputs: list[Value]
    outputs: list[Value]
    nodes: list[Node]
    constants: list[Value]

    def walk(self) -> Iterator[Node]:
        """All nodes, bodies included (an opaque node's body is not)."""
        for node in self.nodes:
            yield node
            if node.kind not in ("opaque", "mark"):
                for body in node.bodies:
                    yield from body.walk()


def trace(fn: Callable, *arguments: Any) -> tuple[Graph, Any]:
    """Trace a function of flat arrays or abstract arrays.

    Returns:
      The graph, and the shapes of the outputs as a pytree.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*arguments)
    return build(closed), shapes


def build(closed: Any) -> Graph:
    """The graph of a closed jaxpr."""
    inputs = [Value(v.aval) for v in closed.jaxpr.invars]
    constants: list[Value] = []
    nodes, outputs = _expand(closed.jaxpr, closed.consts, inputs, constants)
    return Graph(inputs, outputs, nodes, constants)


def _expand(jaxpr, consts, inputs, constants, calls=()):
    """Nodes and outputs of a jaxpr on given input values; closed-over arrays join `constants`."""
    known: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))

    def constant(aval, array):
        # Of NumPy, as JAX would make it a part of a trace around this one.
        known = array if isinstance(array, jax.Array) else np.asarray(array, aval.dtype)
        constants.append(Value(aval, known))
        return constants[-1]

    def read(atom):
        return constant(atom.aval, atom.val) if is_literal(atom) else known[atom]

    for variable, array in zip(jaxpr.constvars, consts, strict=True):
        known[variable] = constant(variable.aval, array)
    nodes: list[Node] = []
    for eqn in jaxpr.eqns:
        kind, bodies = equations.recognise(eqn)
        if kind == "call":
            (body,) = bodies
            operands = [read(x) for x in eqn.invars]
            inner, outputs = _expand(body.jaxpr, body.consts, operands, constants, (eqn, *calls))
            nodes.extend(inner)
        else:
            operands = [x if is_literal(x) else known[x] for x in eqn.invars]
            outputs = [Value(v.aval) for v in eqn.outvars]
            if equations.name(eqn) in ELEMENTWISE:
                operands = [_stretch(x, eqn, outputs[0], nodes) for x in operands]
            graphs = tuple(map(build, bodies))
            nodes.append(Node(kind, eqn, jaxpr, operands, outputs, graphs, calls))
        known.update(zip(eqn.outvars, outputs, strict=True))
    return nodes, [read(x) for x in jaxpr.outvars]


def _stretch(operand, eqn, output, nodes):
    """Broadcast an operand as its elementwise equation would, by a node of its own."""
    if is_literal(operand) or operand.ndim not in (0, output.ndim):
        return operand
    if operand.shape == output.shape:
        return operand
    nodes.append(Broadcast(operand, eqn, output.shape))
    return nodes[-1].outputs[0]


def solved_map(node: Node) -> Graph:
    """The linear map that a `custom_linear_solve` inverts: of its constants and a solution."""
    return build(equations.solved_map(node.eqn))
