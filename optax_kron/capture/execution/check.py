"""Are the taps what they claim? A check on numbers, against the gradient itself.

First of all, the loss and its gradients are compared with those of `jax.value_and_grad`. Then two
facts are tested with random cotangents of the marked logits. Contracted over data and
positions, inputs and output-gradients give the gradient of every parameter of the layer. And with
the cotangent of one datum alone, the output-gradients of every other datum vanish: then data and
positions have not been taken for each other.
"""

import warnings
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from optax_kron.capture.analysis.trace import Traced
from optax_kron.capture.execution import agreement
from optax_kron.capture.execution.assemble import member_taps
from optax_kron.capture.execution.pullback import linearize
from optax_kron.capture.execution.weights import Weighing
from optax_kron.capture.program.widening import has_narrow, wide
from optax_kron.kernels import contract


class _Deviations(NamedTuple):
    """How far the taps of one layer are off.

    Attributes:
      kernel: from the gradient of the kernel, relative to the largest entry of the layer's.
      bias: from that of the bias, relative to the same.
      leak: by which examples mix.
      finite: whether that gradient is finite; if not, nothing can be told.
    """

    kernel: Any
    bias: Any
    leak: Any
    finite: Any


class Verdict(NamedTuple):
    """What came of a check.

    Attributes:
      refused: names of layers whose taps are not what they should be, with the reason.
      complete: whether all layers could be checked.
    """

    refused: dict[str, str]
    complete: bool


def judge(traced: Traced) -> Verdict:
    """Check the layers of a loss function.

    First of all, the loss and its gradients are compared. A bias that fails alone is taken from its
    layer, and the analysis says why: the kernel keeps its block. Layers that can't be checked, as
    their gradients are not finite, are kept, with a warning.

    Raises:
      RuntimeError: if the program that was read is not the loss function.
      ValueError: if a marked loss has a negative weight.
    """
    analysis = traced.analysis
    losses, apart, found, least = _run(traced, widely=False)
    values = [*analysis.graph.inputs, *(v for n in analysis.graph.walk() for v in n.outputs)]
    dtypes = {v.dtype for v in values if jnp.issubdtype(v.dtype, jnp.inexact)}
    agreement.refuse(traced, apart, losses, _tolerance(dtypes))
    for mark, weight in zip(analysis.marks, least, strict=True):
        if float(weight) < 0:
            raise ValueError(
                f"the loss falls with a per-example loss ({mark.node.place}): its derivative there "
                f"is {float(weight):.3g}. Curvature needs weights ≥ 0; take the term out of "
                "ok.losses if it is not a likelihood, and use Optax's function instead."
            )
    kernels, biases = _judged(found, dtypes)
    if (kernels or biases) and has_narrow(analysis.graph):
        # A sum of many numbers of 16 bits may be far off by rounding, be it the gradient itself.
        try:
            *_, again, _ = _run(traced, widely=True)
        except TypeError:  # a loop or a branch holds what cannot be had in 32 bits
            again = {}
        again = {name: off for name, off in again.items() if name in kernels | biases}
        if again:
            kernels, biases = _judged(again, {wide(dtype) for dtype in dtypes})
            found |= again
    for name, reason in biases.items():
        analysis.drop_bias(name, reason)
    unknown = [name for name, off in found.items() if not off.finite]
    if unknown:
        warnings.warn(
            "find_layers and value_and_grad_with_taps could not check the layers "
            f"{', '.join(map(repr, unknown))}: their gradients are not finite at these numbers. "
            "They are kept; check them with other numbers.",
            stacklevel=4,
        )
    return Verdict(kernels, not unknown)


def _tolerance(dtypes: Collection[Any]) -> float:
    """Sums of products in two orders: rounding grows with the root of their number at most."""
    eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
    return min(100 * eps**0.75, 0.25)


def _judged(
    found: Mapping[str, _Deviations], dtypes: Collection[Any]
) -> tuple[dict[str, str], dict[str, str]]:
    """The layers that fail, and those of which the bias alone does, with reasons."""
    tolerance = _tolerance(dtypes)
    # What a datum does not reach is zero, and stays so however numbers are rounded.
    least = min(tolerance, 100 * float(jnp.finfo(jnp.float32).eps) ** 0.75)
    kernels, biases = {}, {}
    for name, off in found.items():
        if not off.finite:
            continue
        if not float(off.kernel) <= tolerance:
            kernels[name] = f"check failed: taps miss the gradient by {float(off.kernel):.1e}"
        elif not float(off.leak) <= least:
            kernels[name] = f"check failed: data mix, by {float(off.leak):.1e} of the whole"
        elif not float(off.bias) <= tolerance:
            biases[name] = f"check failed: taps miss the gradient by {float(off.bias):.1e}"
    return kernels, biases


def _run(
    traced: Traced, widely: bool
) -> tuple[Any, list[Array], dict[str, _Deviations], list[Array]]:
    """Two losses and how far they and their gradients are apart, and what `_deviations` finds."""

    def compare(arrays):
        ours, found, least = _deviations(traced, arrays, widely)
        if widely:  # JAX knows the loss in its own precision only
            return None, [], found, least
        theirs = agreement.reference(traced, arrays)
        return (ours[0], theirs[0]), agreement.disagreement(ours, theirs), found, least

    # Compiled apart, as the numbers may be known inside a trace. To evaluate what is known while
    # tracing would also run branches that are not taken, with their effects.
    with jax.disable_jit(False):
        check = jax.jit(compare, compiler_options=_quickly()).lower(traced.arrays).compile()
        return check(traced.arrays)


def _quickly() -> dict[str, Any] | None:
    """Options for a program that runs once: on CPU most of the time goes into optimizing it."""
    if jax.default_backend() != "cpu":
        return None
    return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _deviations(
    traced: Traced, arrays: list[Any], widely: bool
) -> tuple[tuple[Array, list[Array]], dict[str, _Deviations], list[Array]]:
    """The loss and its gradients, how far each layer is off, and the least weight of each mark."""
    analysis = traced.analysis
    uses = analysis.uses
    numbers = {use: i for i, use in enumerate(uses)}
    linearized = linearize(analysis, uses, arrays, widely=widely)
    keys = jax.random.split(jax.random.key(0), max(len(analysis.marks), 1))
    everything = [
        jax.random.normal(key, logits.shape, jnp.float32).astype(logits.dtype)
        for key, logits in zip(keys, linearized.no_logits(), strict=False)
    ]
    one = [_of_one(mark, c) for mark, c in zip(analysis.marks, everything, strict=True)]
    grads, _, weights = linearized.pull_loss()
    weighing = Weighing(analysis, weights, linearized.indices)
    none = jnp.zeros_like(linearized.outputs[0])
    params, gradients, _ = linearized.pull(none, everything)
    _, alone, _ = linearized.pull(none, one)
    leaves = dict(zip(analysis.leaves, params, strict=True))

    # Who belongs to the first datum is who would weigh something if it alone did.
    only = [
        _of_one(mark, jnp.ones_like(w)) for mark, w in zip(analysis.marks, weights, strict=True)
    ]
    first = Weighing(analysis, only, linearized.indices)

    def taps_of(member, gradients, weighing=weighing):
        gradients = [g[None] for g in gradients]
        return member_taps(analysis, member, numbers, linearized, gradients, weighing)

    found = {}
    for member in analysis.members:
        layer = member.layer
        expected = contract.widen(layer.take(leaves))
        taps = taps_of(member, gradients)
        contracted = sum(_contract(layer, tap) for tap in taps)
        off, biased = contracted - expected, layer.kernel is not None and layer.bias is not None
        kernel = _relative(off[:, :-1] if biased else off, expected)
        bias = _relative(off[:, -1], expected) if biased else jnp.zeros(())
        leaks = [
            _relative(_others(mine, own), whole.output_grads)
            for mine, whole, own in zip(
                taps_of(member, alone), taps, taps_of(member, alone, first), strict=True
            )
        ]
        finite = jnp.all(jnp.isfinite(expected))
        found[layer.name] = _Deviations(kernel, bias, jnp.max(jnp.stack(leaks)), finite)
    ours = linearized.outputs[0], grads
    return ours, found, [jnp.min(w, initial=0) for w in weights]


def _of_one(mark, cotangent):
    """The cotangent of the first datum alone."""
    data = mark.data
    flat = cotangent.reshape(data.size, -1)
    return jnp.zeros_like(flat).at[data[0]].set(flat[data[0]]).reshape(cotangent.shape)


def _others(tap, own):
    """Output-gradients [V, B, N, S, d] of all examples but those that have weights."""
    weights = jnp.moveaxis(own.weights, -1 if own.weights.ndim == 1 else -2, 0)
    mine = jnp.any(weights.reshape(len(weights), -1) > 0, axis=1)
    return jnp.where(mine[:, None, None], 0, tap.output_grads)


def _contract(layer, tap):
    grads = contract.widen(tap.output_grads)
    if layer.is_embedding:
        zeros = jnp.zeros((layer.blocks, layer.d_in, layer.d_out), grads.dtype)
        flat = tap.inputs[..., 0].reshape(layer.blocks, -1)
        rows = grads[0].reshape(layer.blocks, -1, layer.d_out)
        return jax.vmap(lambda z, i, g: z.at[i].add(g))(zeros, flat, rows)
    inputs = contract.widen(tap.inputs)
    return jnp.einsum("bnsi,vbnso->bio", inputs, grads)


def _relative(difference, whole):
    scale = jnp.max(jnp.abs(whole), initial=0) + jnp.finfo(jnp.float32).tiny
    return jnp.max(jnp.abs(difference), initial=0) / scale
