"""Are the taps what they claim? A check on numbers, against the gradient itself.

First of all, the loss and its gradients are compared with those of `jax.value_and_grad`. Then two
facts are tested with random cotangents of the marked logits. Contracted over examples and
positions, inputs and output-gradients give the gradient of every parameter of the layer. And with
the cotangent of one example alone, the output-gradients of every other example vanish: then
examples and positions have not been taken for each other.
"""

# Inputs [8, 5, 3] of 8 examples, taken for N = 5 and S = 8, would pass the first test, as a sum
# over both is the same. With the cotangent of example 0 alone all 5 "examples" have
# output-gradients, and the second test fails.

import functools
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Shaped

from optax_kron.capture.analysis.layers import Analysis, CapturedLayer
from optax_kron.capture.analysis.marks import Mark
from optax_kron.capture.analysis.trace import Traced
from optax_kron.capture.execution import agreement
from optax_kron.capture.execution.agreement import ValueAndGrads
from optax_kron.capture.execution.assemble import Recorded, assembled, layer_taps
from optax_kron.capture.execution.pullback import Linearized, linearize
from optax_kron.capture.execution.weights import LossWeights, added
from optax_kron.capture.program.graph import Graph
from optax_kron.capture.program.widening import has_narrow, wide
from optax_kron.kernels import contract, explicit
from optax_kron.layers.layer import Layer
from optax_kron.layers.taps import Tap
from optax_kron.layers.tied import seen_as

_T = TypeVar("_T")


class _Deviations(NamedTuple):
    """How far the taps of one layer are off.

    Attributes:
      kernel: Off the gradient of the kernel, relative to the largest entry of the layer's.
      bias: Off that of the bias, relative to the same.
      leak: By how much examples mix.
      finite: Whether that gradient is finite; if not, nothing can be told.
    """

    kernel: Float[Array, ""]
    bias: Float[Array, ""]
    leak: Float[Array, ""]
    finite: Bool[Array, ""]


class _Comparison(NamedTuple):
    """What a program finds that evaluates a loss and its layers.

    Attributes:
      losses: That of the program that was read, and that of `jax.value_and_grad`.
      apart: How far those, and the gradients one by one, are apart.
      layers: How far the taps of each layer are off, by name.
      least_weights: The least weight of a per-example loss, of each mark.
    """

    losses: tuple[Array, Array]
    apart: list[Array]
    layers: dict[str, _Deviations]
    least_weights: list[Array]


class Verdict(NamedTuple):
    """What came of a check.

    Attributes:
      analysis: Without the biases that fail alone.
      refused: Names of layers whose taps are not what they should be, with the reason.
      complete: Whether all layers could be checked.
    """

    analysis: Analysis
    refused: Mapping[str, str]
    complete: bool


def judge(traced: Traced) -> Verdict:
    """Check the layers of a loss function.

    First of all, the loss and its gradients are compared. A bias that fails alone is taken from its
    layer, and the analysis says why: the kernel keeps its block. Layers that can't be checked, as
    their gradients are not finite, are kept, with a warning.

    Raises:
      RuntimeError: If the program that was read is not the loss function.
      ValueError: If a marked loss has a negative weight.
    """
    analysis = traced.analysis
    found = _compiled(traced, _compare)
    values = [*analysis.graph.inputs, *(v for n in analysis.graph.walk() for v in n.outputs)]
    dtypes = {v.dtype for v in values if jnp.issubdtype(v.dtype, jnp.inexact)}
    agreement.refuse(traced, found.apart, found.losses, _tolerance(dtypes))
    for mark, weight in zip(analysis.marks, found.least_weights, strict=True):
        if float(weight) < 0:
            raise ValueError(
                f"the loss falls with a per-example loss ({mark.node.place}): its derivative there "
                f"is {float(weight):.3g}. Curvature needs weights ≥ 0; take the term out of "
                "ok.losses if it is not a likelihood, and use Optax's function instead."
            )
    deviations = found.layers
    kernels, biases = _judged(deviations, dtypes)
    if (kernels or biases) and has_narrow(analysis.graph):
        # A sum of many numbers of 16 bits may be far off by rounding, be it the gradient itself.
        try:
            again = _compiled(traced, in_32_bits)
        except TypeError:  # a loop or a branch holds what cannot be had in 32 bits
            again = {}
        again = {name: off for name, off in again.items() if name in kernels | biases}
        if again:
            kernels, biases = _judged(again, {wide(dtype) for dtype in dtypes})
            deviations |= again
    unknown = [name for name, off in deviations.items() if not off.finite]
    if unknown:
        warnings.warn(
            "find_layers and value_and_grad_with_taps could not check the layers "
            f"{', '.join(map(repr, unknown))}: their gradients are not finite at these numbers. "
            "They are kept; check them with other numbers.",
            stacklevel=4,
        )
    return Verdict(analysis.without_biases(biases), kernels, not unknown)


def _tolerance(dtypes: Collection[DTypeLike]) -> float:
    """Sums of products in two orders: rounding grows with the root of their number at most."""
    eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
    return min(100 * eps**0.75, 0.25)


def _judged(
    found: Mapping[str, _Deviations], dtypes: Collection[DTypeLike]
) -> tuple[dict[str, str], dict[str, str]]:
    """The layers that fail, and those of which the bias alone does, with reasons."""
    tolerance = _tolerance(dtypes)
    # What an example does not reach is zero, and stays so however numbers are rounded.
    least = min(tolerance, 100 * float(jnp.finfo(jnp.float32).eps) ** 0.75)
    kernels, biases = {}, {}
    for name, off in found.items():
        if not off.finite:
            continue
        if not float(off.kernel) <= tolerance:
            kernels[name] = f"check failed: taps miss the gradient by {float(off.kernel):.1e}"
        elif not float(off.leak) <= least:
            kernels[name] = f"check failed: examples mix, by {float(off.leak):.1e} of their size"
        elif not float(off.bias) <= tolerance:
            biases[name] = f"check failed: taps miss the gradient by {float(off.bias):.1e}"
    return kernels, biases


def _compiled(traced: Traced, compare: Callable[[Traced, Sequence[Array]], _T]) -> _T:
    """What a comparison finds at the numbers of a loss function."""
    # Compiled apart, as the numbers may be known inside a trace. To evaluate what is known while
    # tracing would also run branches that are not taken, with their effects.
    with jax.disable_jit(False):
        compare_arrays = jax.jit(
            lambda arrays: compare(traced, arrays), compiler_options=_quickly()
        )
        return compare_arrays.lower(traced.arrays).compile()(traced.arrays)


def _quickly() -> dict[str, bool | int] | None:
    """Options for a program that runs once: on CPU most of the time goes into optimizing it."""
    if jax.default_backend() != "cpu":
        return None
    return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _compare(traced: Traced, arrays: Sequence[Array]) -> _Comparison:
    linearized = linearize(traced.analysis, traced.analysis.uses, arrays)
    grads, _, weights = linearized.pull_loss()
    layers = _deviations(traced.analysis, linearized, weights)
    ours = ValueAndGrads(linearized.outputs[0], grads)
    theirs = agreement.reference(traced, arrays)
    return _Comparison(
        losses=(ours.value, theirs.value),
        apart=agreement.disagreement(ours, theirs),
        layers=layers,
        least_weights=[jnp.min(w, initial=0) for w in weights],
    )


def in_32_bits(traced: Traced, arrays: Sequence[Array]) -> dict[str, _Deviations]:
    """How far the taps of each layer are off, by name, of a program of 16 bits in 32.

    JAX knows the loss in its own precision only: there is nothing to compare that with.
    """
    linearized = linearize(traced.analysis, traced.analysis.uses, arrays, widely=True)
    return _deviations(traced.analysis, linearized, linearized.pull_loss().losses)


def _deviations(
    analysis: Analysis, linearized: Linearized, weights: Sequence[Array]
) -> dict[str, _Deviations]:
    """How far the taps of each layer are off, by name."""
    # On an explicit mesh numbers are compared, and the first example is found, on all devices.
    marks = analysis.marks
    logits = [operands[0] for operands in linearized.operands]
    keys = jax.random.split(jax.random.key(0), max(len(marks), 1))
    everything = [
        explicit.placed_like(jax.random.normal(key, x.shape, jnp.float32).astype(x.dtype), x)
        for key, x in zip(keys, logits, strict=False)
    ]
    none = jnp.zeros_like(linearized.outputs[0])
    params, of_all, _ = linearized.pull(none, everything)
    leaves = dict(zip(analysis.leaves, explicit.whole(params), strict=True))

    def all_taps(gradients: Sequence[Array], weights: Sequence[Array]) -> list[tuple[Tap, ...]]:
        columns = {use: g[None] for use, g in zip(analysis.uses, gradients, strict=True)}
        loss_weights = LossWeights(analysis, weights, linearized.indices)
        recorded = Recorded(analysis, linearized, columns, loss_weights)
        return assembled(recorded, lambda r: [layer_taps(x, r) for x in analysis.layers])

    def leaks(chosen: Sequence[Array | np.ndarray]) -> list[Float[Array, ""]]:
        """By how much the loss of some examples has output-gradients of others, of each layer."""
        _, of_some, _ = linearized.pull(none, _of_chosen(marks, everything, chosen))
        # Who belongs to them is who would weigh something if they alone did.
        own = _of_chosen(marks, [jnp.ones_like(w) for w in weights], chosen)
        made = zip(all_taps(of_some, weights), all_taps(of_some, own), taps, strict=True)
        return [jnp.max(jnp.stack(list(map(_leak, *of_layer)))) for of_layer in made]

    taps = all_taps(of_all, weights)
    choices = _choices(marks, analysis.graph)
    if all(len(chosen) == 1 for chosen in choices):
        mixed = leaks([chosen[0] for chosen in choices])
    else:
        mixed = [jnp.max(x) for x in jax.lax.map(leaks, choices)]
    found = {}
    for captured, of_layer, leak in zip(analysis.layers, taps, mixed, strict=True):
        expected = contract.widen(captured.layer.take(leaves))
        found[captured.layer.name] = _off(captured, expected, of_layer, leak)
    return found


def _choices(marks: Sequence[Mark], graph: Graph) -> list[Bool[np.ndarray, "K N"]]:
    """Which examples of each mark have a loss, K times.

    The first one, as rules leave no doubt but which axis counts them. Where the user has declared a
    function, those with a bit of their number set, or not: of any two, once only one of them has a
    loss, and once only the other.
    """
    if not marks or not _declares(graph):
        return [np.arange(mark.examples)[None] == 0 for mark in marks]
    bits = max((mark.examples - 1).bit_length() for mark in marks) or 1
    halves = [np.arange(mark.examples) >> np.arange(bits)[:, None] & 1 for mark in marks]
    return [np.concatenate([half == 1, half == 0]) for half in halves]


def _declares(graph: Graph) -> bool:
    """Whether the user has declared a function of a program to keep examples apart."""
    return any(
        node.declared is not None or any(map(_declares, node.bodies)) for node in graph.nodes
    )


def _off(
    captured: CapturedLayer,
    expected: Float[Array, "B d_in d_out"],
    taps: Sequence[Tap],
    leak: Float[Array, ""],
) -> _Deviations:
    """How far the contracted taps are from the expected gradient."""
    layer = captured.layer
    off = added(map(functools.partial(_contract, layer), taps)) - expected
    biased = layer.kernel is not None and layer.bias is not None
    kernel = _relative(off[:, :-1] if biased else off, expected)
    bias = _relative(off[:, -1], expected) if biased else jnp.zeros(())
    return _Deviations(kernel, bias, leak, jnp.all(jnp.isfinite(expected)))


def _of_chosen(
    marks: Sequence[Mark], cotangents: Sequence[Array], chosen: Sequence[Array | np.ndarray]
) -> list[Array]:
    """The cotangents of some examples of each mark alone."""
    kept = []
    for mark, cotangent, examples in zip(marks, cotangents, chosen, strict=True):
        elements = mark.elements
        owners = np.empty(elements.size, int)
        owners[elements] = np.arange(len(elements))[:, None]
        # Logits may have more axes than the losses. Chosen by element, they stay where they are.
        of_losses = cotangent.shape[: len(mark.scans) + len(mark.shape)]
        owners = owners.reshape(*of_losses, *[1] * (cotangent.ndim - len(of_losses)))
        kept.append(jnp.where(examples[owners], cotangent, 0))
    return kept


def _leak(tap: Tap, owner: Tap, every: Tap) -> Float[Array, ""]:
    """By how much a tap has output-gradients of examples that another does not belong to."""
    return _relative(_of_others(tap, owner), every.output_grads)


def _of_others(tap: Tap, owner: Tap) -> Shaped[Array, "V B N S d_out"]:
    """Output-gradients of all examples but those that have weights in another tap."""
    assert owner.weights is not None
    weights = jnp.moveaxis(owner.weights, -1 if owner.weights.ndim == 1 else -2, 0)
    mine = jnp.any(weights.reshape(len(weights), -1) > 0, axis=1)
    return jnp.where(mine[:, None, None], 0, tap.output_grads)


def _contract(layer: Layer, tap: Tap) -> Float[Array, "B d_in d_out"]:
    """The gradient that a tap stands for: `Σ_n Σ_s a gᵀ`."""
    grads = contract.widen(tap.output_grads)
    seen = seen_as(layer, tap)
    if seen.is_embedding:
        zeros = jnp.zeros((layer.blocks, layer.d_in, layer.d_out), grads.dtype)
        flat = tap.inputs[..., 0].reshape(layer.blocks, -1)
        rows = grads[0].reshape(layer.blocks, -1, layer.d_out)
        return jax.vmap(lambda z, i, g: z.at[i].add(g))(zeros, flat, rows)
    inputs = contract.widen(tap.inputs)
    # The head of a tied embedding has the kernel's outputs for its inputs.
    axes = "bio" if seen is layer else "boi"
    return jnp.einsum(f"bnsi,vbnso->{axes}", inputs, grads)


def _relative(difference: Float[Array, "..."], scale_of: Float[Array, "..."]) -> Float[Array, ""]:
    scale = contract.largest_magnitude(scale_of) + jnp.finfo(jnp.float32).tiny
    return contract.largest_magnitude(difference) / scale
