"""The record of a primitive: all that capture knows of it.

Each fact is a function of an equation. A fact that is missing is unknown, and taken for the worst:
examples are mixed, a parameter is in no layer, integers are not known. So a record can be added
fact by fact. Records stand at the end of `elementwise.py`, `layout.py`, `linear.py`, `indexing.py`
and `reductions.py`, below the functions that they name; `table.py` looks them up.
"""

import dataclasses
from collections.abc import Callable

from optax_kron.capture.program.graph import Node, Operand, Value
from optax_kron.capture.program.knowledge import IntegerRule, Knowledge
from optax_kron.capture.rules.batch_axes import Batching, Separate
from optax_kron.capture.rules.contraction import Contraction
from optax_kron.capture.rules.views import Part, View

# The axis of operand `i` whose elements make those along an axis of an output, one by one: of
# (node, i, output, axis). `None` if there is no such axis.
AxisRule = Callable[[Node, int, Value, int], int | None]
# The batching of operand `i` from that of an output, where the axis is not followed one by one: of
# (node, i, output, batching, knowledge).
SelectRule = Callable[[Node, int, Value, Separate, Knowledge], Batching]
# The same where parts of an axis can be followed: of (node, operand, output, batching).
PartRule = Callable[[Node, Operand, Value, Separate], Batching]
# The views of the outputs from that of the operand; `None` if they are not mere images of it.
ViewRule = Callable[[Node, View], list[View] | None]
# How an equation uses the parameter that its operand `i` shows, of the given view.
LayerRule = Callable[[Node, int, View], Contraction | None]
# Which part of the output operand `i` is, that shows a parameter in the given view: of
# (node, i, view).
JoinRule = Callable[[Node, int, View], Part]


@dataclasses.dataclass(frozen=True)
class Primitive:
    """What is known of one primitive.

    Attributes:
      axis: Which axis of an operand makes which axis of an output, one element for one.
      parts: The same of factors of an axis, in place of `axis`.
      select: Where examples are before their axis is selected from, repeated or joined.
      view: Which images of its operand the outputs are.
      layer: How it uses a parameter linearly.
      join: Where each operand is in the output, if that is all of them side by side.
      integers: What it computes, of arrays that are known when the program is traced.
      signs: Of what adds its two operands, of which one may be a bias: the signs of both.
      powers: Of what multiplies its two operands: the powers of both.
      stops: Whether no derivative passes through it.
      shares: Whether all of an operand goes to each element of an axis that it does not have.
    """

    axis: AxisRule | None = None
    parts: PartRule | None = None
    select: SelectRule | None = None
    view: ViewRule | None = None
    layer: LayerRule | None = None
    join: JoinRule | None = None
    integers: IntegerRule | None = None
    signs: tuple[int, int] | None = None
    powers: tuple[int, int] | None = None
    stops: bool = False
    shares: bool = False


def same_axis(node: Node, i: int, output: Value, axis: int) -> int | None:
    """Where operands have the axes of the output; whether lengths agree, the caller looks."""
    return axis if node.operands[i].ndim == output.ndim else None


def along(setting: str, default: int | None = None) -> AxisRule:
    """Of what works along one axis, which a setting names, and keeps the others apart."""

    def rule(node: Node, i: int, output: Value, axis: int) -> int | None:
        mine = node.params.get(setting, default)
        return axis if mine % max(output.ndim, 1) != axis else None

    return rule
