"""`value_and_grad_with_taps`: the gradient, and what each layer saw, from one forward pass."""

import functools
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from optax_kron.autodiff import map_stacked
from optax_kron.capture.analysis.layers import Analysis, CapturedLayer
from optax_kron.capture.analysis.trace import Traced, trace_loss
from optax_kron.capture.analysis.uses import Use
from optax_kron.capture.execution.assemble import (
    Recorded,
    assembled,
    layer_moments,
    layer_taps,
    tap_shardings,
)
from optax_kron.capture.execution.check import Verdict, judge
from optax_kron.capture.execution.columns import (
    ESTIMATES,
    chosen,
    columns,
    one_by_one,
    shared_columns,
    spread_out,
)
from optax_kron.capture.execution.inside_moments import InsideMoments, can_be_inside
from optax_kron.capture.execution.pullback import Linearized, linearize
from optax_kron.capture.execution.weights import LossWeights, ranks
from optax_kron.capture.find import NO_MARK, Layers
from optax_kron.kernels import explicit
from optax_kron.layers.layer import Layer
from optax_kron.layers.paths import map_by_path
from optax_kron.layers.taps import Taps, magnitude
from optax_kron.types import PyTree


def value_and_grad_with_taps(
    loss_fn: Callable[..., PyTree],
    layers: Iterable[Layer] | None = None,
    *,
    has_aux: bool = False,
    reduce: bool = False,
    samples: int = 1,
    fisher: str = "mc",
) -> Callable[..., tuple[PyTree, PyTree, Taps]]:
    """Like `jax.value_and_grad`, and the taps of every layer from the same forward pass.

    Args:
      loss_fn: A function as `find_layers` takes it.
      layers: What `find_layers` returned, or some of it; only their taps are made. `None`: those of
        all layers. If they have not been verified, the first call with numbers does that.
      has_aux: Whether `loss_fn` returns `(loss, aux)`.
      reduce: Return second moments, ready for `ok.kfac`, instead of what each example gave. They
        are formed inside the traced function, also inside scans and checkpoints, so that a layer
        takes `d_in² + d_out²` numbers however large the batch, of a diagonal factor `d`. "expand"
        only.
      samples: Columns of a random estimate.
      fisher: How the curvature of the likelihood is estimated: "mc" draws labels from the model's
        own distribution; "exact" takes every column of its Hessian; "sketch" random combinations of
        those; "empirical" the gradient itself; "forward" none: the output factor is the identity.

    Returns:
      A function of `(params, *args, key=None)`, all but the key by position, that returns `(value,
      grads, taps)`, with `(loss, aux)` for the value if `has_aux`. The key is needed by "mc" and
      "sketch". Leaves of `params` that are not floating-point arrays have the gradient `None`.
      Cost: that of the gradient, one more backward pass for every column, and the memory of every
      layer's inputs and output-gradients. With "exact" and "empirical" a layer has the columns of
      the likelihoods that it reaches; those of two likelihoods are pulled back together where no
      layer sees an example of both, as of the interior and of the boundary of a domain.

    Raises:
      ValueError: If the loss is not marked, or the key is missing or none.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> def loss_fn(params, x, y):
      ...     return jnp.mean(ok.losses.squared_error(x @ params["kernel"], y))
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> fn = ok.value_and_grad_with_taps(loss_fn)
      >>> value, grads, taps = fn(params, jnp.ones((5, 3)), jnp.ones((5, 2)), key=jax.random.key(0))
      >>> taps["kernel"][0].inputs.shape, taps["kernel"][0].output_grads.shape
      ((1, 5, 1, 3), (1, 1, 5, 1, 2))

    Sources: Martens and Grosse (2015), arXiv:1503.05671; Eschenhagen et al. (2023),
    arXiv:2311.00636; Benzing (2022), arXiv:2201.12250, for "forward".
    """
    owner = "value_and_grad_with_taps"
    if fisher not in ESTIMATES:
        raise ValueError(f"{owner}: fisher must be one of {', '.join(ESTIMATES)}; got {fisher!r}.")
    if isinstance(samples, bool) or not isinstance(samples, numbers.Integral) or samples < 1:
        raise ValueError(f"{owner}: samples must be an integer ≥ 1; got {samples!r}.")
    samples = int(samples)
    if layers is not None and not isinstance(layers, Layers):
        layers = Layers(tuple(layers), (), checked=False)
    # What this function has verified is kept here: the user's object stays as it is.
    verified = layers is not None and layers.checked

    def value_and_grad(params: PyTree, *args: PyTree, key: Array | None = None):
        nonlocal verified
        earlier = None if layers is None else layers.analysis
        traced = trace_loss(loss_fn, params, args, has_aux, earlier)
        if not traced.analysis.marks:
            raise ValueError(f"{owner}: {NO_MARK}")
        if key is None and fisher in ("mc", "sketch"):
            raise ValueError(f"{owner}: fisher={fisher!r} draws random numbers; pass key=.")
        if key is not None and not hasattr(key, "dtype"):
            raise ValueError(
                f"{owner}: key must be a key of jax.random, such as jax.random.key(0); got {key!r}."
            )
        analysis, verified = _selected(traced, layers, verified)
        uses = analysis.uses
        inside = _inside(analysis, traced.arrays) if reduce else {}
        linearized = linearize(analysis, uses, traced.arrays, inside)
        grads, _, weights = linearized.pull_loss()
        gradients = _pull_columns(analysis, linearized, weights, fisher, key, samples)
        output_grads = _scaled_to_examples(analysis, gradients, inside)
        loss_weights = LossWeights(analysis, weights, linearized.indices)
        recorded = Recorded(analysis, linearized, output_grads, loss_weights)

        def taps_of(recorded):
            return {
                captured.layer.name: layer_moments(captured, recorded, inside)
                if reduce
                else layer_taps(captured, recorded)
                for captured in analysis.layers
            }

        out = explicit.WHOLE if reduce else tap_shardings(analysis)
        taps = assembled(recorded, taps_of, out)
        by_path = dict(zip(analysis.leaves, grads, strict=True))
        norms = explicit.untyped(functools.partial(_norms, analysis), by_path)
        value = traced.result.joined(linearized.outputs)
        tree = map_by_path(lambda path, _: by_path.get(path), params)
        return value, tree, Taps(taps, gradient_norms=norms, fisher=fisher)

    return value_and_grad


def _norms(analysis: Analysis, grads: Mapping[str, Array]) -> dict[str, Array]:
    """The size of the gradient of each layer."""
    return {f.layer.name: magnitude(f.layer.take(grads)) for f in analysis.layers}


def _selected(traced: Traced, layers: Layers | None, verified: bool) -> tuple[Analysis, bool]:
    """The layers asked for, and whether they are verified now, as they are wherever they can be.

    Raises:
      ValueError: If one of them is not there, or is not what it should be.
    """
    verdict = Verdict(traced.analysis, {}, verified)
    if not verified and traced.is_concrete:
        verdict = judge(traced)
    analysis, refused, complete = verdict
    by_name = {f.layer.name: f for f in analysis.layers}
    if layers is None:
        return analysis.of_layers(f for f in by_name.values() if f.layer.name not in refused), False
    for layer in layers:
        if layer.name not in by_name or layer.name in refused:
            reason = refused.get(layer.name, "it is not found in this loss function")
            raise _not_found(layer.name, reason)
    selected = [_as_asked(by_name[layer.name], layer, analysis.uncovered) for layer in layers]
    return analysis.of_layers(selected), complete and not refused


def _as_asked(captured: CapturedLayer, layer: Layer, uncovered: Mapping[str, str]) -> CapturedLayer:
    """A layer with the bias, and the longest dense axis, that were asked for."""
    if layer.bias is not None and captured.layer.bias is None:
        why = uncovered.get(layer.bias, "it is not added to this product alone")
        raise _not_found(layer.name, f"its bias has no place in it: {why}")
    if layer.bias is None and captured.layer.kernel is not None:
        captured = captured.without_bias()
    return captured.with_max_size(layer.max_size)


def _not_found(name: str, reason: str) -> ValueError:
    return ValueError(
        f"value_and_grad_with_taps: no taps for the layer {name!r}: {reason}. Call find_layers "
        "again, with this function and numbers."
    )


def _inside(analysis: Analysis, arrays: Sequence[Array]) -> dict[Use, InsideMoments]:
    """The uses whose second moments can be formed where they are."""
    # What each example weighs has to be known in the forward pass; most losses are linear in their
    # per-example losses, and then none of this is evaluated.
    linearized = linearize(analysis, (), arrays)
    weights = LossWeights(analysis, linearized.pull_loss().losses, linearized.indices)
    inside: dict[Use, InsideMoments] = {}
    for captured in analysis.layers:
        batchings = {use: analysis.batching(use) for use in captured.uses}
        if not all(can_be_inside(captured.layer, *pair) for pair in batchings.items()):
            continue
        moments: dict[Use, InsideMoments] = {}
        for group in captured.groups:
            marks, layer = analysis.marks_of(group), captured.seen_by(group)
            for use in group:
                weight = weights.inside(use, batchings[use], marks)
                if weight is not None:
                    bias = captured.biased.get(use, 0)
                    moments[use] = InsideMoments(layer, use, batchings[use], weight, bias)
        # All uses of a layer or none: their moments add up.
        if len(moments) == len(batchings):
            inside |= moments
    return inside


def _pull_columns(
    analysis: Analysis,
    linearized: Linearized,
    weights: Sequence[Array],
    fisher: str,
    key: Array | None,
    samples: int,
) -> list[Array]:
    """Cotangents [V, ...] of the outputs of all uses."""
    loss = jnp.zeros_like(linearized.outputs[0])
    if fisher == "forward":
        shapes = jax.eval_shape(linearized.pull, loss, linearized.no_logits()).outputs
        return [jnp.zeros((0, *s.shape), s.dtype) for s in shapes]
    of_marks = []
    for m, (mark, operands) in enumerate(zip(analysis.marks, linearized.operands, strict=True)):
        mark_key = None if key is None else jax.random.fold_in(key, m)
        count = analysis.examples_of([m])
        column = columns(fisher, mark, operands, weights[m], mark_key, samples, count=count)
        if fisher == "exact":
            column = one_by_one(column, mark, ranks(analysis, m))
        of_marks.append(column.astype(operands[0].dtype))
    # Random columns are independent and of mean zero: all marks may share them.
    numbers = None
    if fisher not in ("mc", "sketch"):
        counts = [column.shape[0] for column in of_marks]
        numbers = shared_columns(counts, _marks_of_uses(analysis))
        of_marks = spread_out(of_marks, numbers)
    pulled = map_stacked(lambda logits: linearized.pull(loss, logits).outputs, of_marks)
    if numbers is None:
        return pulled
    return [
        chosen(x, [numbers[m] for m in sorted(marks)])
        for x, marks in zip(pulled, _marks_of_uses(analysis), strict=True)
    ]


def _marks_of_uses(analysis: Analysis) -> list[frozenset[int]]:
    """The marks that each use reaches, or another that makes a tap with it."""
    return [analysis.marks_of(group) for f in analysis.layers for group in f.groups for _ in group]


def _scaled_to_examples(
    analysis: Analysis, gradients: Sequence[Array], inside: Mapping[Use, InsideMoments]
) -> dict[Use, Array]:
    """Columns for the number N of examples of each layer.

    Where examples are selected, layers before and after that differ in N.
    """
    scaled = {}
    for use, gradient in zip(analysis.uses, gradients, strict=True):
        batching = analysis.batching(use)
        ratio = batching.examples / analysis.examples_of(batching.marks)
        factor = ratio if use in inside else math.sqrt(ratio)
        scaled[use] = gradient if factor == 1 else gradient * jnp.asarray(factor, gradient.dtype)
    return scaled
