"""Are the taps what they claim? A check on numbers, against the gradient itself.

First of all, the loss and its gradients are compared with those of `jax.value_and_grad`. Then two
facts are tested with random cotangents of the marked logits. Contracted over data and
positions, inputs and output-gradients give the gradient of every parameter of the layer. And with
the cotangent of one datum alone, the output-gradients of every other datum vanish: then data and
positions have not been taken for each other.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from optax_kron.capture import agreement
from optax_kron.capture.assemble import member_taps
from optax_kron.capture.pullback import linearize
from optax_kron.capture.trace import Traced
from optax_kron.capture.weighing import Weighing
from optax_kron.kernels import contract


def failures(traced: Traced) -> dict[str, str]:
    """The layers whose taps are not what they should be, with the reason.

    Raises:
      RuntimeError: if the program that was read is not the loss function.
      ValueError: if a marked loss has a negative weight.
    """
    analysis = traced.analysis

    def compare(arrays):
        theirs = agreement.reference(traced, arrays)
        ours, found, least = _deviations(traced, arrays)
        return (ours[0], theirs[0]), agreement.disagreement(ours, theirs), found, least

    # Compiled apart, as the numbers may be known inside a trace. To evaluate all that is
    # known while tracing would also run branches that are not taken, with their effects.
    with jax.disable_jit(False):
        check = jax.jit(compare, compiler_options=_quickly()).lower(traced.arrays).compile()
        losses, deviations, found, least = check(traced.arrays)
    values = [*analysis.graph.inputs, *(v for n in analysis.graph.walk() for v in n.outputs)]
    dtypes = {v.dtype for v in values if jnp.issubdtype(v.dtype, jnp.inexact)}
    eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
    # Sums of products in two orders: rounding grows with the root of their number at most.
    tolerance = min(100 * eps**0.75, 0.25)
    agreement.refuse(traced, deviations, losses, tolerance)
    for mark, weight in zip(analysis.marks, least, strict=True):
        if float(weight) < 0:
            raise ValueError(
                f"the loss falls with a per-example loss ({mark.node.place}): its derivative there "
                f"is {float(weight):.3g}. Curvature needs weights ≥ 0; take the term out of "
                "ok.losses if it is not a likelihood, and use Optax's function instead."
            )
    # What a datum does not reach is zero, and stays so however numbers are rounded.
    least = min(tolerance, 100 * float(jnp.finfo(jnp.float32).eps) ** 0.75)
    failed = {}
    for name, (gradient, leak) in found.items():
        if not float(gradient) <= tolerance:
            failed[name] = f"check failed: taps miss the gradient by {float(gradient):.1e}"
        elif not float(leak) <= least:
            failed[name] = f"check failed: data mix, by {float(leak):.1e} of the whole"
    return failed


def _quickly() -> dict[str, Any] | None:
    """Options for a program that runs once: on CPU most of the time goes into optimizing it."""
    if jax.default_backend() != "cpu":
        return None
    return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _deviations(
    traced: Traced, arrays: list[Any]
) -> tuple[tuple[Array, list[Array]], dict[str, tuple[Array, Array]], list[Array]]:
    """How far each layer is off: from the gradient, and by mixing data.

    Returns:
      The loss and its gradients; the deviations by layer; and the least weight of each mark.
    """
    analysis = traced.analysis
    uses = analysis.uses
    numbers = {use: i for i, use in enumerate(uses)}
    linearized = linearize(analysis, uses, arrays)
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
        gradient = _relative(contracted - expected, expected)
        leaks = [
            _relative(_others(mine, own), whole.output_grads)
            for mine, whole, own in zip(
                taps_of(member, alone), taps, taps_of(member, alone, first), strict=True
            )
        ]
        found[layer.name] = gradient, jnp.max(jnp.stack(leaks))
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
