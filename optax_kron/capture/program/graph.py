"""A function's jaxpr as a graph in which every value is a node of its own.

Jaxprs are shared between call sites (a function that is jitted once and called twice is one jaxpr),
so that their variables don't say which call is meant. Here calls are inlined, and every other
equation that holds jaxprs (loops, branches, checkpoints) gets copies of its own, so that a value
stands for one place of the program.
"""

# Of `f(f(x))`, with `f = jax.jit(lambda x: x @ w)`, the jaxpr has two equations "jit" that share
# one inner jaxpr, with one `dot_general` and one variable for its output. The graph has two nodes,
# with an output each: at each of them a use of w is found, perturbed and recorded.

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.core
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from optax_kron.capture.program import equations
from optax_kron.capture.program.equations import Equation, Literal, Params, Program
from optax_kron.capture.program.retraced import Renewed
from optax_kron.declarations import Declared
from optax_kron.types import PyTree

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
class _Typed:
    """Something of known shape and dtype."""

    aval: jax.core.ShapedArray

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
        return f"{type(self).__name__}({self.aval.str_short()}@{id(self) % 10000})"


@dataclasses.dataclass(eq=False, repr=False)
class Value(_Typed):
    """A value of the program."""

    constant: Array | np.ndarray | None = None  # its array, if the function closes over it


@dataclasses.dataclass(eq=False, repr=False)
class Number(_Typed):
    """A number that stands in the program itself, as a literal."""

    number: ArrayLike


Operand = Value | Number


@dataclasses.dataclass(eq=False)
class Node:
    """One equation.

    Attributes:
      kind: "plain"; "opaque", bound whole, though its body is known; "mark", a loss of
        `optax_kron.losses`; or "scan", "while", "cond", "remat".
      eqn: The equation.
      jaxpr: The jaxpr that the equation comes from.
      operands: Values, and numbers in their places.
      outputs: Values.
      bodies: The graphs that it holds, whose inputs and outputs are as the kind says.
      calls: The calls that it was inlined from, from the inside.
    """

    kind: str
    eqn: Equation
    jaxpr: jax.extend.core.Jaxpr
    operands: list[Operand]
    outputs: list[Value]
    bodies: tuple["Graph", ...] = ()
    calls: tuple[Equation, ...] = ()

    @property
    def name(self) -> str:
        """Of the primitive."""
        return equations.name(self.eqn)

    @property
    def params(self) -> Params:
        """Settings of an equation that holds no program."""
        return equations.settings(self.eqn)

    @property
    def declared(self) -> Declared | None:
        """Where the user has declared it to hold examples."""
        return equations.declared(self.eqn)

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
    def holds_steps(self) -> bool:
        """Whether its bodies are evaluated equation by equation, with perturbations inside."""
        return self.kind in ("scan", "remat", "cond")

    @property
    def has_marks(self) -> bool:
        """Whether one of its bodies holds a marked loss."""
        return any(node.kind == "mark" for body in self.bodies for node in body.walk())

    @property
    def values(self) -> list[Value]:
        """The operands that are not literals."""
        return [x for x in self.operands if isinstance(x, Value)]

    def bind(self, *arguments: Array) -> list[Array]:
        """Evaluate the equation on arrays for its values."""
        return equations.bind(self.eqn, self.jaxpr, *arguments)

    def renewed(self, renewal: Renewed) -> "Node":
        """The same node, with the equation that stands in its place in a later trace."""
        if id(self.eqn) not in renewal:
            return self
        node = copy.copy(self)
        node.eqn, node.jaxpr = renewal[id(self.eqn)]
        return node


# The branches around something, from the outside: equations, and the number of the branch.
Branch = tuple[tuple[Node, int], ...]


class Scope(NamedTuple):
    """What is around a place of the program, from the outside."""

    scans: tuple[Node, ...] = ()
    branch: Branch = ()

    def in_scan(self, scan: Node) -> "Scope":
        """Inside of one more scan."""
        return Scope((*self.scans, scan), self.branch)

    def in_branch(self, cond: Node, number: int) -> "Scope":
        """Inside of one more branch."""
        return Scope(self.scans, (*self.branch, (cond, number)))


class Broadcast(Node):
    """What an elementwise equation does silently to a scalar, or to axes of length one."""

    def __init__(self, operand: Operand, like: Node):
        output = Value(jax.core.ShapedArray(like.outputs[0].shape, operand.dtype))
        super().__init__("plain", like.eqn, like.jaxpr, [operand], [output])

    @property
    def name(self) -> str:
        """What makes the same of the operand."""
        return "broadcast_in_dim"

    @property
    def images(self) -> None:
        """It makes another array."""
        return None

    @property
    def params(self) -> Params:
        """As of that primitive."""
        dimensions = tuple(range(self.operands[0].ndim))
        return {"shape": self.outputs[0].shape, "broadcast_dimensions": dimensions}

    def bind(self, *arguments: Array) -> list[Array]:
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


def trace(fn: Callable, *arguments: ArrayLike | jax.ShapeDtypeStruct) -> tuple[Program, PyTree]:
    """Trace a function of flat arrays or abstract arrays.

    Returns:
      The program, and the shapes of the outputs as a pytree.
    """
    return jax.make_jaxpr(fn, return_shape=True)(*arguments)


def build(closed: Program) -> Graph:
    """The graph of a program."""
    inputs = [_value(v) for v in closed.jaxpr.invars]
    constants: list[Value] = []
    nodes, outputs = _expand(closed, inputs, constants)
    return Graph(inputs, outputs, nodes, constants)


def _value(variable: equations.Atom) -> Value:
    return Value(_shaped(variable))


def _operand(atom: equations.Atom, known: Mapping[equations.Atom, Value]) -> Operand:
    return Number(_shaped(atom), atom.val) if isinstance(atom, Literal) else known[atom]


def _shaped(atom: equations.Atom) -> jax.core.ShapedArray:
    # References have the shape of what they hold, but are of another class.
    return atom.aval  # type: ignore[return-value]


def _expand(
    closed: Program,
    inputs: Sequence[Value],
    constants: list[Value],
    calls: tuple[Equation, ...] = (),
) -> tuple[list[Node], list[Value]]:
    """Nodes and outputs of a program on given input values; what it closes over joins `constants`.

    `calls` are those that it is inlined from, from the inside.
    """
    jaxpr = closed.jaxpr
    known: dict[equations.Atom, Value] = dict(zip(jaxpr.invars, inputs, strict=True))

    def constant(atom: equations.Atom, array: ArrayLike) -> Value:
        aval = _shaped(atom)
        # Of NumPy, as JAX would make it a part of a trace around this one.
        array = array if isinstance(array, jax.Array) else np.asarray(array, aval.dtype)
        constants.append(Value(aval, array))
        return constants[-1]

    def read(atom: equations.Atom) -> Value:
        return constant(atom, atom.val) if isinstance(atom, Literal) else known[atom]

    for variable, array in zip(jaxpr.constvars, closed.consts, strict=True):
        known[variable] = constant(variable, array)
    nodes: list[Node] = []
    for eqn in jaxpr.eqns:
        kind, bodies = equations.recognise(eqn)
        if kind == "call":
            (body,) = bodies
            operands = [read(x) for x in eqn.invars]
            inner, outputs = _expand(body, operands, constants, (eqn, *calls))
            nodes.extend(inner)
        else:
            operands = [_operand(x, known) for x in eqn.invars]
            outputs = [_value(v) for v in eqn.outvars]
            node = Node(kind, eqn, jaxpr, operands, outputs, tuple(map(build, bodies)), calls)
            if node.name in ELEMENTWISE:
                node.operands = [_stretched(x, node, nodes) for x in operands]
            nodes.append(node)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return nodes, [read(x) for x in jaxpr.outvars]


def _stretched(operand: Operand, node: Node, nodes: list[Node]) -> Operand:
    """An operand in the shape to which its elementwise equation would broadcast it silently.

    `scale * x` of shapes [1, 4] and [8, 4] uses each element of the scale for eight rows: after a
    node that says so, the product is of single elements, as all rules expect.
    """
    fits = operand.shape == node.outputs[0].shape or operand.ndim not in (0, node.outputs[0].ndim)
    if fits or isinstance(operand, Number):
        return operand
    nodes.append(Broadcast(operand, node))
    return nodes[-1].outputs[0]


def solved_map(node: Node) -> Graph:
    """The linear map that a `custom_linear_solve` inverts: of its constants and a solution."""
    return build(equations.solved_map(node.eqn))
