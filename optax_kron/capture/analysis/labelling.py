"""The pass backwards that labels all values of a graph."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from optax_kron.capture.program import equations
from optax_kron.capture.program.equations import is_literal
from optax_kron.capture.program.graph import Graph, Node, Value, solved_map
from optax_kron.capture.program.knowledge import Knowledge
from optax_kron.capture.rules.axes import back
from optax_kron.capture.rules.batch_axes import Coupled, Data, Label, Place, meet


class Labels:
    """The labels of all values of a graph."""

    def __init__(self, graph: Graph, places: Mapping[Node, Place], known: Knowledge):
        """Label a graph.

        Args:
          graph: of the whole loss.
          places: for each mark that counts, where its per-example losses hold the data.
          known: of the graph.
        """
        self._known = known
        self._of: dict[Value, Label] = {}
        self._marks = places
        self._numbers = {node: i for i, node in enumerate(places)}
        self._visit(graph)

    def __getitem__(self, value: Value) -> Label:
        return self._of.get(value)

    def data(self, value: Value) -> Data:
        """Where a value holds its data, if it does."""
        label = self[value]
        if not isinstance(label, Data):
            raise TypeError(f"{value} is not known to hold data along an axis; it is {label}")
        return label

    def _join(self, value: Any, label: Label, node: Any = None) -> bool:
        """Add a use to a value; return whether that changed its label."""
        if label is None or is_literal(value) or not jnp.issubdtype(value.dtype, jnp.inexact):
            return False  # no derivative passes through integers and booleans
        old = self._of.get(value)
        new = meet(old, label, node)
        self._of[value] = new  # type: ignore[assignment]
        return new != old

    def _visit(self, graph: Graph) -> None:
        for node in reversed(graph.nodes):
            labels = [self[v] for v in node.outputs]
            if node in self._marks:
                labels = self._mark_labels(node)
            self._join_written(node)
            inside = node.kind in ("scan", "remat", "cond") and node.has_marks
            if all(label is None for label in labels) and not inside:
                continue
            for value, label in zip(node.operands, self._back(node, labels), strict=True):
                self._join(value, label, node)

    def _join_written(self, node: Node) -> None:
        """What is read later from a reference may be made of all operands of what writes to it."""
        read = [self[v] for v in node.values if equations.is_reference(v.aval)]
        marks = [label.marks for label in read if label is not None]
        if marks:
            coupled = Coupled(frozenset().union(*marks), node)
            for value in node.values:
                self._join(value, coupled, node)

    def _mark_labels(self, node: Node) -> list[Label]:
        mark, place = frozenset([self._numbers[node]]), self._marks[node]
        if isinstance(place.axis, Node):
            size = place.axis.loop.length
        elif place.axis is None:
            size = 1
        else:
            size = node.outputs[0].shape[place.axis] // (place.before * place.after)
        label = Data(mark, size, **vars(place))
        return [meet(self[v], label, node) for v in node.outputs]

    def _back(self, node: Node, labels: list[Label]) -> list[Label]:
        """The labels of a node's operands from those of its outputs."""
        if node.kind == "scan":
            return self._back_scan(node, labels)
        if node.kind == "while":
            return self._back_while(node, labels)
        if node.kind == "mark":
            # The curvature is that of the logits; targets and variances are given numbers.
            logits, *others = node.operands
            return [_of_mark(node, logits, labels[0]), *(None for _ in others)]
        if node.name == "custom_linear_solve":
            return self._back_solve(node, labels)
        if node.bodies:
            # A program, or one of several, runs once: on all operands but the index of a branch.
            merged: list[Label] = [None] * len(node.bodies[0].inputs)
            for body in node.bodies:
                inner = self._through(body, labels)
                merged = [meet(a, b, node) for a, b in zip(merged, inner, strict=True)]
            return [*[None] * (len(node.operands) - len(merged)), *merged]
        return back(node, labels, self._known)

    def _through(self, body: Graph, labels: Sequence[Label]) -> list[Label]:
        for value, label in zip(body.outputs, labels, strict=True):
            self._join(value, label)
        self._visit(body)
        return [self[v] for v in body.inputs]

    def _back_scan(self, node: Node, labels: list[Label]) -> list[Label]:
        (body,) = node.bodies
        constants, carries, *_ = node.loop

        def enter(label):  # from stacked outputs to those of one step
            if not (isinstance(label, Data) and label.on_axis):
                return label
            if label.axis > 0:
                return label.moved(label.axis - 1)
            if label.before == label.after == 1:
                return dataclasses.replace(label, axis=node)
            return Coupled(label.marks, node)

        def leave(label):  # from the inputs of one step to stacked ones
            if not isinstance(label, Data) or label.axis is None:
                return label
            if label.axis is node:
                return dataclasses.replace(label, axis=0)
            return label.moved(label.axis + 1) if label.on_axis else label

        outputs = [*labels[:carries], *map(enter, labels[carries:])]
        while True:
            inputs = self._through(body, outputs)
            carried = [
                meet(a, self._apart(b, node), node)
                for a, b in zip(
                    outputs[:carries], inputs[constants : constants + carries], strict=True
                )
            ]
            if carried == outputs[:carries]:
                break
            outputs[:carries] = carried
        shared = [self._apart(label, node) for label in inputs[:constants]]
        return [*shared, *carried, *map(leave, inputs[constants + carries :])]

    def _apart(self, label: Label, node: Node) -> Label:
        """What all steps of a scan share is coupled if the steps are the data."""
        if isinstance(label, Data) and label.axis is node:
            return Coupled(label.marks, node)
        return label

    def _back_solve(self, node: Node, labels: list[Label]) -> list[Label]:
        """A solve keeps data apart along axes along which its linear map does.

        Derivatives pass through the map's constants and the right-hand sides alone.
        """
        body = solved_map(node)
        constants = len(body.inputs) - len(labels)
        while True:
            inputs = self._through(body, labels)
            met = [meet(a, b, node) for a, b in zip(labels, inputs[constants:], strict=True)]
            if met == labels:
                others = len(node.operands) - constants - len(labels)
                return [*inputs[:constants], *[None] * others, *met]
            labels = met

    def _back_while(self, node: Node, labels: list[Label]) -> list[Label]:
        body = node.bodies[1]
        tests, constants = equations.while_constants(node.eqn)
        outputs = list(labels)
        while True:
            inputs = self._through(body, outputs)
            carried = [meet(a, b, node) for a, b in zip(outputs, inputs[constants:], strict=True)]
            if carried == outputs:
                return [*[None] * tests, *inputs[:constants], *carried]
            outputs = carried


def _of_mark(node: Node, operand: Any, label: Label) -> Label:
    """Logits, targets and losses agree in the axes that they share: the leading ones."""
    if is_literal(operand) or not isinstance(label, Data) or not label.on_axis:
        return label
    axis, losses = label.axis, node.outputs[0]
    if axis < operand.ndim and operand.shape[axis] == losses.shape[axis]:
        return label
    return Coupled(label.marks, node)
