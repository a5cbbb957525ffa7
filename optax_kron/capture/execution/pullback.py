"""One forward pass of a loss with everything to pull back from it: the gradient and the taps."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from optax_kron.capture.analysis.layers import Analysis
from optax_kron.capture.analysis.marks import Mark
from optax_kron.capture.analysis.uses import Use
from optax_kron.capture.execution.inside_moments import InsideMoments
from optax_kron.capture.program.evaluate import Probes, evaluate
from optax_kron.capture.program.graph import Value
from optax_kron.capture.program.widening import bind_widely, wide, widened
from optax_kron.capture.rules.batch_axes import Read
from optax_kron.kernels import flow


@dataclasses.dataclass(eq=False)
class Linearized:
    """A loss at a point, and its derivatives.

    Attributes:
      outputs: what the loss function returns, flat; the loss first.
      operands: of each mark.
      inputs: what was recorded at each use, `None` for a bias.
      taken: for each use inside a branch, one if the branch was taken, else zero.
      indices: at which rows were read between the layers and the losses.
      pull: from cotangents of the loss and of each mark's logits to those of the parameters, of the
        outputs of the uses, and of the marks' per-example losses.
    """

    outputs: list[Any]
    operands: list[list[Any]]
    inputs: list[Any]
    taken: list[Any]
    indices: dict[Read, Array]
    pull: Callable[[Array, Sequence[Array]], tuple[list[Array], list[Array], list[Array]]]

    def no_logits(self) -> list[Array]:
        """A zero cotangent for the logits of every mark."""
        return [jnp.zeros_like(operands[0]) for operands in self.operands]

    def pull_loss(self) -> tuple[list[Array], list[Array], list[Array]]:
        """`pull` of the loss itself: the gradient first, the weight of each datum last."""
        return self.pull(jnp.ones_like(self.outputs[0]), self.no_logits())


def linearize(
    analysis: Analysis,
    uses: Sequence[Use],
    arrays: Sequence[Any],
    inside: Mapping[Use, InsideMoments] | None = None,
    *,
    widely: bool = False,
) -> Linearized:
    """Evaluate a loss, and prepare to pull cotangents back from it.

    Args:
      analysis: of the loss.
      uses: those to perturb and record.
      arrays: the graph's inputs, the parameters first.
      inside: the uses whose second moments are formed inside: then these are their inputs, and
        what is pulled back to them.
      widely: evaluate in 32 bits what the program does in fewer.
    """
    inside = inside or {}
    probes = Probes(bind=bind_widely) if widely else Probes()
    arrays = [widened(x) for x in arrays] if widely else arrays
    zeros: dict[Any, Array] = {}
    for i, use in enumerate(uses):
        _add(probes.perturb, use.output, ("use", i))
        if use in inside:
            moments = inside[use]
            zeros["use", i] = moments.dummy()
            probes.apply["use", i] = moments.watch
            probes.transform["input", i] = moments.of_inputs
            probes.stacked["use", i] = probes.stacked["input", i] = moments.stacked
        else:
            zeros["use", i] = _zeros(use.output, use.scans)
        if use.reading.operand is not None:
            _add(probes.record, use.reading.operand, ("input", i))
        if use.branch:
            probes.taken.setdefault(use.branch[-1], []).append(("taken", i))
    for j, read in enumerate(analysis.reads):
        _add(probes.record, read.operand, ("read", j))
    for m, mark in enumerate(analysis.marks):
        _add(probes.perturb, mark.node.outputs[0], ("loss", m))
        zeros["loss", m] = _zeros(mark.node.outputs[0], mark.scans)
        for j, operand in enumerate(mark.node.operands):
            if isinstance(operand, Value):
                _add(probes.record, operand, (f"mark{m}", j))
    count = len(analysis.leaves)

    def run(params, perturbations):
        outputs, records = evaluate(
            analysis.graph, [*params, *arrays[count:]], probes, perturbations
        )
        logits = [records[f"mark{m}", 0] for m in range(len(analysis.marks))]
        return (outputs[0], logits), (outputs, records)

    if widely:
        zeros = {key: x.astype(wide(x.dtype)) for key, x in zeros.items()}
    _, pullback, (outputs, records) = jax.vjp(run, list(arrays[:count]), zeros, has_aux=True)

    def pull(loss, logits):
        params, perturbations = pullback((loss, list(logits)))
        return (
            params,
            [perturbations["use", i] for i in range(len(uses))],
            [perturbations["loss", m] for m in range(len(analysis.marks))],
        )

    return Linearized(
        outputs=outputs,
        operands=[_operands(m, mark, records) for m, mark in enumerate(analysis.marks)],
        inputs=[records.get(("input", i)) for i in range(len(uses))],
        taken=[records.get(("taken", i)) for i in range(len(uses))],
        indices={read: records["read", j] for j, read in enumerate(analysis.reads)},
        pull=pull,
    )


def _add(table: dict[Value, list], value: Value, key: Any) -> None:
    table.setdefault(value, []).append(key)


def _zeros(value: Value, scans: Sequence[Any]) -> Array:
    """A perturbation of a value, for all steps of the scans around it.

    On a mesh it is one of each device, as the value is: what all devices share would get the sum of
    their cotangents.
    """
    steps = tuple(scan.loop.length for scan in scans)
    return flow.varying_like(jnp.zeros((*steps, *value.shape), value.dtype), value.aval)


def _operands(m: int, mark: Mark, records: Mapping[Any, Any]) -> list[Any]:
    steps = tuple(scan.loop.length for scan in mark.scans)
    return [
        records[f"mark{m}", j]
        if isinstance(operand, Value)
        else jnp.full((*steps, *operand.aval.shape), operand.val, operand.aval.dtype)
        for j, operand in enumerate(mark.node.operands)
    ]
