"""The pass backwards that finds the batching of all values of a graph.

It starts at the losses of the marks, and asks for each equation where the examples are in its
operands, given where they are in its outputs. A value that is used twice has to agree with both
uses.
"""

# A scan is passed until nothing changes: what a step reads from its carry, the step before has to
# write to it. Inside, what is scanned over has lost its first axis:
#
#     xs [5, 8, 3], ys [5, 8, 4]     of steps, examples      inside [8, 3], [8, 4]: Separate(axis=0)
#     xs [8, 3], ys [8, 4]           steps are examples      inside [3], [4]: Separate(axis=scan)
#     constants, in the second case                          Mixed: all steps share them

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax.numpy as jnp

from optax_kron.capture.analysis.marks import Mark
from optax_kron.capture.program import equations
from optax_kron.capture.program.graph import Graph, Node, Operand, Value, build, solved_map
from optax_kron.capture.program.knowledge import Knowledge
from optax_kron.capture.rules.batch_axes import Batching, Mixed, Separate, merge
from optax_kron.capture.rules.table import batchings_before
from optax_kron.kernels import explicit


class Batchings:
    """The batching of all values of a graph, by value.

    Args:
      graph: The graph of the whole loss.
      marks: Those that count, and where each holds its examples.
      known: What is known of the graph.

    Attributes:
      known: The same.
    """

    def __init__(self, graph: Graph, marks: Iterable[Mark], known: Knowledge):
        self.known = known
        self._of: dict[Value, Batching] = {}
        self._marks = {mark.node: (number, mark) for number, mark in enumerate(marks)}
        self._visit(graph)

    def __getitem__(self, value: Value) -> Batching:
        return self._of.get(value)

    def separate(self, value: Value) -> Separate:
        """Where a value holds its examples, if it keeps them apart."""
        batching = self[value]
        if not isinstance(batching, Separate):
            raise TypeError(f"{value} is not known to keep examples apart; it is {batching}")
        return batching

    def _join(self, value: Operand, batching: Batching, node: Node | None = None) -> None:
        """Add a use to a value."""
        inexact = jnp.issubdtype(value.dtype, jnp.inexact)
        # No derivative passes through integers and booleans.
        if batching is not None and isinstance(value, Value) and inexact:
            self._of[value] = merge(self[value], batching, node)

    def _visit(self, graph: Graph) -> None:
        for node in reversed(graph.nodes):
            batchings = [self[v] for v in node.outputs]
            if node in self._marks:
                batchings = self._mark_batchings(node)
            self._join_written(node)
            inside = node.holds_steps and node.has_marks
            if all(batching is None for batching in batchings) and not inside:
                continue
            for value, batching in zip(node.operands, self._before(node, batchings), strict=True):
                self._join(value, batching, node)

    def _join_written(self, node: Node) -> None:
        """What is read later from a reference may be made of all operands of what writes to it."""
        read = [self[v] for v in node.values if equations.is_reference(v.aval)]
        marks = [batching.marks for batching in read if batching is not None]
        if marks:
            mixed = Mixed(frozenset().union(*marks), node)
            for value in node.values:
                self._join(value, mixed, node)

    def _mark_batchings(self, node: Node) -> list[Batching]:
        number, mark = self._marks[node]
        own = Separate(frozenset([number]), mark.examples, **vars(mark.batch_axis))
        return [merge(self[v], own, node) for v in node.outputs]

    def _before(self, node: Node, batchings: list[Batching]) -> list[Batching]:
        """The batchings of a node's operands from those of its outputs."""
        if node.kind == "scan":
            return self._before_scan(node, batchings)
        if node.kind == "while":
            return self._before_while(node, batchings)
        if node.kind == "mark":
            # The curvature is that of the logits; targets and variances are given numbers.
            logits, *others = node.operands
            return [_of_logits(node, logits, batchings[0]), *(None for _ in others)]
        if node.name == "custom_linear_solve":
            return self._before_solve(node, batchings)
        if node.name == "shard_map":
            return self._before_shard_map(node, batchings)
        if node.bodies and node.name != equations.DECLARED:
            # A program, or one of several, runs once: on all operands but the index of a branch.
            merged: list[Batching] = [None] * len(node.bodies[0].inputs)
            for body in node.bodies:
                inner = self._through(body, batchings)
                merged = [merge(a, b, node) for a, b in zip(merged, inner, strict=True)]
            return [*[None] * (len(node.operands) - len(merged)), *merged]
        return batchings_before(node, batchings, self.known)

    def _through(self, body: Graph, batchings: Sequence[Batching]) -> list[Batching]:
        """The batchings of a body's inputs from those of its outputs."""
        for value, batching in zip(body.outputs, batchings, strict=True):
            self._join(value, batching)
        self._visit(body)
        return [self[v] for v in body.inputs]

    def _until_fixed(
        self,
        body: Graph,
        node: Node,
        outputs: Sequence[Batching],
        carried: slice,
        outer: Callable[[Batching], Batching] = lambda batching: batching,
    ) -> tuple[list[Batching], list[Batching]]:
        """Pass through a loop's body until what it reads from its carry is what it writes to it.

        Args:
          body: whose outputs start with the carries.
          node: the loop.
          outputs: batchings of the body's outputs.
          carried: which of its inputs are the carries.
          outer: from the batching of a carry inside to that before the step.

        Returns:
          The batchings of the body's inputs, and of the carries before the loop.
        """
        outputs = list(outputs)
        while True:
            inputs = self._through(body, outputs)
            before = inputs[carried]
            count = len(before)
            merged = [
                merge(a, outer(b), node) for a, b in zip(outputs[:count], before, strict=True)
            ]
            if merged == outputs[:count]:
                return inputs, merged
            outputs[:count] = merged

    def _before_scan(self, node: Node, batchings: list[Batching]) -> list[Batching]:
        (body,) = node.bodies
        first = node.loop.constants
        last = first + node.loop.carries

        def enter(batching: Batching) -> Batching:  # from stacked outputs to those of one step
            if not (isinstance(batching, Separate) and batching.on_axis):
                return batching
            if batching.number > 0:
                return batching.moved(batching.number - 1)
            if batching.before == batching.after == 1:
                return dataclasses.replace(batching, axis=node)
            return Mixed(batching.marks, node)

        def leave(batching: Batching) -> Batching:  # from the inputs of one step to stacked ones
            if not isinstance(batching, Separate) or batching.axis is None:
                return batching
            if batching.axis is node:
                return dataclasses.replace(batching, axis=0)
            return batching.moved(batching.number + 1) if batching.on_axis else batching

        def shared(batching: Batching) -> Batching:  # by all steps: mixed if those are the examples
            if isinstance(batching, Separate) and batching.axis is node:
                return Mixed(batching.marks, node)
            return batching

        outputs = [*batchings[: node.loop.carries], *map(enter, batchings[node.loop.carries :])]
        inputs, carried = self._until_fixed(body, node, outputs, slice(first, last), shared)
        return [*map(shared, inputs[:first]), *carried, *map(leave, inputs[last:])]

    def _before_solve(self, node: Node, batchings: list[Batching]) -> list[Batching]:
        """A solve keeps examples apart along axes along which its linear map does.

        Derivatives pass through the map's constants and the right-hand sides alone.
        """
        body = solved_map(node)
        constants = len(body.inputs) - len(batchings)
        inputs, solved = self._until_fixed(body, node, batchings, slice(constants, None))
        others = len(node.operands) - constants - len(batchings)
        return [*inputs[:constants], *[None] * others, *solved]

    def _before_shard_map(self, node: Node, batchings: list[Batching]) -> list[Batching]:
        """Examples are apart if each device keeps those apart that it is given, and gives back."""
        program, in_specs, out_specs = equations.local_program(node.eqn)
        body = build(program)
        cuts = {
            explicit.mesh_axes(spec, b.number)
            for spec, b in zip(out_specs, batchings, strict=True)
            if isinstance(b, Separate) and b.on_axis
        }

        def resized(batching, spec, new):  # where the axis has another length
            if not (isinstance(batching, Separate) and batching.on_axis):
                return batching
            old, length = batching.length, new.shape[batching.number]
            if cuts != {explicit.mesh_axes(spec, batching.number)}:
                return Mixed(batching.marks, node)
            if old == length:
                return batching
            if not batching.is_plain or batching.links:
                return Mixed(batching.marks, node)
            return dataclasses.replace(batching, size=length)

        inner = map(resized, batchings, out_specs, body.outputs)
        inputs = self._through(body, list(inner))
        return list(map(resized, inputs, in_specs, node.operands))

    def _before_while(self, node: Node, batchings: list[Batching]) -> list[Batching]:
        tests, constants = equations.while_constants(node.eqn)
        body = node.bodies[1]
        inputs, carried = self._until_fixed(body, node, batchings, slice(constants, None))
        return [*[None] * tests, *inputs[:constants], *carried]


def _of_logits(node: Node, logits: Operand, batching: Batching) -> Batching:
    """Logits and losses agree in the axes that they share: the leading ones."""
    if not (isinstance(logits, Value) and isinstance(batching, Separate) and batching.on_axis):
        return batching
    axis, losses = batching.number, node.outputs[0]
    if axis < logits.ndim and logits.shape[axis] == losses.shape[axis]:
        return batching
    return Mixed(batching.marks, node)
