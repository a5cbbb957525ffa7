"""Evaluate a loss with perturbations added to the outputs of its layers, and record their inputs.

The function that `perturbed` returns is the loss again, with the same loops, branches and
checkpoints. Derivatives with respect to a perturbation are those with respect to the output that it
is added to. Inside a scan, perturbations are further inputs of each step and records further
outputs, so both carry the steps as a leading axis.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from optax_kron.capture.program import equations
from optax_kron.capture.program.graph import Graph, Node, Value
from optax_kron.kernels import explicit, flow

Key = tuple[str, int]


@dataclasses.dataclass(eq=False)
class Probes:
    """What to perturb and to record.

    Attributes:
      perturb: Keys of the perturbations of a value.
      record: Keys under which a value is recorded.
      taken: Keys under which it is recorded that a branch was taken, by branch.
      transform: What is recorded of a value, by key; the value itself if not given.
      apply: How a perturbation enters, by key: from a value and it to a new value; added if not
        given.
      stacked: For keys that scans sum up, rather than stack, the scans that do stack them.
      bind: How an equation is evaluated that holds none of them.
    """

    perturb: dict[Value, list[Key]] = dataclasses.field(default_factory=dict)
    record: dict[Value, list[Key]] = dataclasses.field(default_factory=dict)
    taken: dict[tuple[Node, int], list[Key]] = dataclasses.field(default_factory=dict)
    transform: dict[Key, Callable] = dataclasses.field(default_factory=dict)
    apply: dict[Key, Callable] = dataclasses.field(default_factory=dict)
    stacked: dict[Key, frozenset[Node]] = dataclasses.field(default_factory=dict)
    bind: Callable[..., list[Array]] = lambda node, *operands: node.bind(*operands)

    def is_summed(self, key: Key, scan: Node) -> bool:
        """Whether the steps of a scan share a perturbation, and add up their records."""
        return key in self.stacked and scan not in self.stacked[key]


def evaluate(
    graph: Graph, arguments: Sequence[Array], probes: Probes, perturbations: Mapping[Key, Array]
) -> tuple[list[Array], dict[Key, Array]]:
    """Evaluate a graph.

    Args:
      graph: The graph of the function.
      arguments: One array for each input.
      probes: What to perturb and to record.
      perturbations: Arrays by key; missing ones are zero.

    Returns:
      The outputs, and the records by key.
    """
    return _Run(probes).graph(graph, arguments, perturbations)


def _add(value: Array, perturbation: Array) -> Array:
    return value + perturbation.astype(value.dtype)


def _same(value: Array) -> Array:
    return value


_Results = tuple[list[Array], dict[Key, Array]]  # of a graph, and what was recorded in it


class _Run:
    def __init__(self, probes: Probes):
        self.probes = probes
        self.held: dict[Node, set[Key]] = {}  # keys of what the bodies of an equation hold

    def graph(
        self, graph: Graph, arguments: Sequence[Array], perturbations: Mapping[Key, Array]
    ) -> _Results:
        env: dict[Value, Array] = {}
        records: dict[Key, Array] = {}

        def store(value: Value, array: Array) -> None:
            for key in self.probes.perturb.get(value, ()):
                if key in perturbations:
                    apply = self.probes.apply.get(key, _add)
                    array = explicit.where_it_is(apply, array, perturbations[key])
            env[value] = array
            for key in self.probes.record.get(value, ()):
                records[key] = self.probes.transform.get(key, _same)(explicit.typed(array))

        for value, array in zip(graph.inputs, arguments, strict=True):
            store(value, array)
        for value in graph.constants:
            store(value, value.constant)  # type: ignore[arg-type]
        for node in graph.nodes:
            operands = [env[x] for x in node.values]
            if node.holds_steps and self.keys(node):
                arrays = iter(operands)
                operands = [
                    next(arrays) if isinstance(x, Value) else x.number for x in node.operands
                ]
                inside = {k: v for k, v in perturbations.items() if k in self.keys(node)}
                outputs, inner = getattr(self, node.kind)(node, operands, inside)
                records |= inner
            else:
                outputs = self.probes.bind(node, *operands)
            for value, array in zip(node.outputs, outputs, strict=True):
                store(value, array)
        return [env[value] for value in graph.outputs], records

    def keys(self, node: Node) -> set[Key]:
        """All keys that belong to the bodies of an equation."""
        if node not in self.held:
            keys: set[Key] = set()
            for i, body in enumerate(node.bodies):
                values = [*body.inputs, *body.constants]
                for inner in body.walk():
                    values += inner.outputs
                    values += [v for b in inner.bodies for v in (*b.inputs, *b.constants)]
                for value in values:
                    keys.update(self.probes.perturb.get(value, ()))
                    keys.update(self.probes.record.get(value, ()))
                keys.update(self.probes.taken.get((node, i), ()))
            self.held[node] = keys
        return self.held[node]

    def remat(self, node: Node, operands: Sequence[Array], perturbations) -> _Results:
        (body,) = node.bodies

        def run(operands, perturbations):
            return self.graph(body, operands, perturbations)

        run = jax.checkpoint(run, **equations.checkpointing(node.eqn))
        return run(operands, perturbations)

    def scan(self, node: Node, operands: Sequence[Array], perturbations) -> _Results:
        (body,) = node.bodies
        loop = node.loop
        first, split = loop.constants, loop.carries
        last = first + split
        # What the steps stack goes in and comes out with `xs`; what they sum up is one more carry,
        # and its perturbation, which all steps share, one more constant.
        shared = {k: x for k, x in perturbations.items() if self.probes.is_summed(k, node)}
        sliced = {k: x for k, x in perturbations.items() if k not in shared}

        def one(carry, xs, inside):
            outputs, records = self.graph(
                body, [*operands[:first], *carry, *xs], {**inside, **shared}
            )
            sums = {k: x for k, x in records.items() if self.probes.is_summed(k, node)}
            return outputs, sums, {k: x for k, x in records.items() if k not in sums}

        def step(carry, sliced):
            carry, sums = carry
            outputs, new, records = one(carry, *sliced)
            sums = jax.tree.map(jnp.add, sums, new)
            return (outputs[:split], sums), (outputs[split:], records)

        init, scanned = list(operands[first:last]), (list(operands[last:]), sliced)
        _, shapes, _ = jax.eval_shape(one, init, *flow.one_step(scanned))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (carry, sums), (ys, records) = flow.scan(
            step,
            (init, zeros),
            scanned,
            length=loop.length,
            reverse=loop.reverse,
            unroll=loop.unroll,
        )
        return [*carry, *ys], {**records, **sums}

    def cond(self, node: Node, operands: Sequence[Array], perturbations) -> _Results:
        index, *operands = operands

        def run(i, operands, perturbations):
            outputs, records = self.graph(node.bodies[i], operands, perturbations)
            taken = {key: jnp.ones(()) for key in self.probes.taken.get((node, i), ())}
            return outputs, records | taken

        # Branches have to return the same records: zeros of what is recorded in another branch.
        shapes = {}
        for i in range(len(node.bodies)):
            _, records = jax.eval_shape(lambda *a, i=i: run(i, *a), operands, perturbations)
            shapes |= records

        def branch(i):
            def complete(operands, perturbations):
                outputs, records = run(i, operands, perturbations)
                absent = {k: jnp.zeros(s.shape, s.dtype) for k, s in shapes.items()}
                return outputs, absent | records

            return complete

        branches = [branch(i) for i in range(len(node.bodies))]
        return flow.switch(index, branches, operands, perturbations)
