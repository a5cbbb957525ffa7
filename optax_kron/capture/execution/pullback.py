"""One forward pass of a loss with everything to pull back from it: the gradient and the taps."""

# For `loss = f(x @ w)`, with x [8, 3] and w [3, 4], the function that is differentiated is
#
#     (w, zeros [8, 4]) -> f(x @ w + zeros), and x, recorded
#
# of which one `jax.vjp` gives the loss, the inputs x of the layer, and a function from cotangents
# of the loss or of its logits to the gradient, that of w, and the output-gradients, those of
# `zeros`.

import dataclasses
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from optax_kron.capture.analysis.layers import Analysis
from optax_kron.capture.analysis.marks import Mark
from optax_kron.capture.analysis.uses import Use
from optax_kron.capture.execution.inside_moments import InsideMoments
from optax_kron.capture.program.evaluate import Key, Probes, evaluate
from optax_kron.capture.program.graph import Node, Value
from optax_kron.capture.program.widening import bind_widely, wide, widened
from optax_kron.capture.rules.batch_axes import Read
from optax_kron.kernels import flow


class Cotangents(NamedTuple):
    """What is pulled back from a loss or its logits.

    Attributes:
      params: The cotangents of the parameters.
      outputs: Those of the outputs of the uses.
      losses: Those of each mark's per-example losses: of the loss itself, their weights in it.
    """

    params: list[Array]
    outputs: list[Array]
    losses: list[Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Linearized:
    """A loss at a point, and its derivatives.

    Attributes:
      outputs: What the loss function returns, flat; the loss first.
      operands: The operands of each mark.
      inputs: What was recorded at each use, `None` for a bias.
      taken: One if the branch around a use was taken, else zero; `None` outside of branches.
      indices: At which rows were read between the layers and the losses.
      scales: The values by which parameters are multiplied before their use.
      pull: The cotangents, from those of the loss and of each mark's logits.
    """

    outputs: list[Array]
    operands: list[list[Array]]
    inputs: Mapping[Use, Array | None]
    taken: Mapping[Use, Array | None]
    indices: Mapping[Read, Array]
    scales: Mapping[Value, Array]
    pull: Callable[[Array, Sequence[Array]], Cotangents]

    def no_logits(self) -> list[Array]:
        """A zero cotangent for the logits of every mark."""
        return [jnp.zeros_like(operands[0]) for operands in self.operands]

    def pull_loss(self) -> Cotangents:
        """`pull` of the loss itself: the gradient, and the weight of each example."""
        return self.pull(jnp.ones_like(self.outputs[0]), self.no_logits())


def linearize(
    analysis: Analysis,
    uses: Sequence[Use],
    arrays: Sequence[Array],
    inside: Mapping[Use, InsideMoments] | None = None,
    *,
    widely: bool = False,
) -> Linearized:
    """Evaluate a loss, and prepare to pull cotangents back from it.

    Args:
      analysis: The analysis of the loss.
      uses: Those to perturb and record.
      arrays: The graph's inputs, the parameters first.
      inside: The uses whose second moments are formed inside: then these are their inputs, and what
        is pulled back to them.
      widely: Evaluate in 32 bits what the program does in fewer.
    """
    inside = inside or {}
    probes, zeros = _probes(analysis, uses, inside)
    outputs_of, inputs_of = _outputs(uses, inside), _operands_of(uses, inside)
    if analysis.renewed or widely:
        bind = bind_widely if widely else lambda node, *operands: node.bind(*operands)
        probes.bind = lambda node, *operands: bind(node.renewed(analysis.renewed), *operands)
    if widely:
        arrays = [widened(x) for x in arrays]
        zeros = {key: x.astype(wide(x.dtype)) for key, x in zeros.items()}
    count, marks = len(analysis.leaves), analysis.marks

    def run(params, perturbations):
        outputs, records = evaluate(
            analysis.graph, [*params, *arrays[count:]], probes, perturbations
        )
        logits = [records[f"mark{m}", 0] for m in range(len(marks))]
        return (outputs[0], logits), (outputs, records)

    # Of one forward pass: the loss pulls back the gradient, the logits the columns of the Fisher.
    _, pullback, (outputs, records) = jax.vjp(run, list(arrays[:count]), zeros, has_aux=True)

    def pull(loss: Array, logits: Sequence[Array]) -> Cotangents:
        params, perturbations = pullback((loss, list(logits)))
        return Cotangents(
            params,
            [perturbations[key] for key in outputs_of],
            [perturbations["loss", m] for m in range(len(marks))],
        )

    return Linearized(
        outputs=outputs,
        operands=[_operands(m, mark, records) for m, mark in enumerate(marks)],
        inputs={use: records.get(key) for use, key in zip(uses, inputs_of, strict=True)},
        taken={use: records.get(("taken", i)) for i, use in enumerate(uses)},
        indices={read: records["read", j] for j, read in enumerate(analysis.reads)},
        scales={value: records["scale", j] for j, value in enumerate(analysis.scales)},
        pull=pull,
    )


def _probes(
    analysis: Analysis, uses: Sequence[Use], inside: Mapping[Use, InsideMoments]
) -> tuple[Probes, dict[Key, Array]]:
    """What to perturb and to record, and zeros for all perturbations."""
    probes = Probes()
    zeros: dict[Key, Array] = {}

    def perturb(value: Value, key: Key, scans: Sequence[Node]) -> None:
        known = probes.perturb.setdefault(value, [])
        known.extend([key] if key not in known else [])
        if key not in zeros:
            zeros[key] = _zeros(value, scans)

    def record(value: object, key: Key) -> None:
        if isinstance(value, Value):
            known = probes.record.setdefault(value, [])
            known.extend([key] if key not in known else [])

    keys = zip(_outputs(uses, inside), _operands_of(uses, inside), strict=True)
    for i, (use, (output, operand)) in enumerate(zip(uses, keys, strict=True)):
        if use in inside:
            moments = inside[use]
            zeros[output] = moments.dummy()
            probes.apply[output] = moments.watch
            probes.transform[operand] = moments.of_inputs
            probes.stacked[output] = probes.stacked[operand] = moments.stacked
        perturb(use.output, output, use.scans)
        record(use.contraction.operand, operand)
        if use.branch:
            probes.taken.setdefault(use.branch[-1], []).append(("taken", i))
    for j, read in enumerate(analysis.reads):
        record(read.operand, ("read", j))
    for j, value in enumerate(analysis.scales):
        record(value, ("scale", j))
    for m, mark in enumerate(analysis.marks):
        perturb(mark.node.outputs[0], ("loss", m), mark.scans)
        for j, operand in enumerate(mark.node.operands):
            record(operand, (f"mark{m}", j))
    return probes, zeros


# Parts of kernels that are joined have one output, or one operand: both are there once.


def _outputs(uses: Sequence[Use], inside: Collection[Use]) -> list[Key]:
    """The key of the perturbation of each use."""
    return _keys("use", [use if use in inside else use.output for use in uses])


def _operands_of(uses: Sequence[Use], inside: Collection[Use]) -> list[Key]:
    """The key of what is recorded of each use."""
    return _keys(
        "input", [use if use in inside else use.contraction.operand or use for use in uses]
    )


def _keys(kind: str, things: Sequence[Hashable]) -> list[Key]:
    first: dict[Hashable, int] = {}
    return [(kind, first.setdefault(thing, i)) for i, thing in enumerate(things)]


def _zeros(value: Value, scans: Sequence[Node]) -> Array:
    """A perturbation of a value, for all steps of the scans around it.

    On a mesh it is one of each device, as the value is: what all devices share would get the sum of
    their cotangents.
    """
    steps = tuple(scan.loop.length for scan in scans)
    return flow.zeros_like_type(value.aval, steps)


def _operands(m: int, mark: Mark, records: Mapping[Key, Array]) -> list[Array]:
    """The operands of a mark, with the steps of scans as leading axes."""
    steps = tuple(scan.loop.length for scan in mark.scans)
    return [
        records[f"mark{m}", j]
        if isinstance(operand, Value)
        else jnp.full((*steps, *operand.shape), operand.number, operand.dtype)
        for j, operand in enumerate(mark.node.operands)
    ]
