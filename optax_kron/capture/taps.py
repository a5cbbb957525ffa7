"""`value_and_grad_with_taps`: the gradient, and what each layer saw, from one forward pass."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from optax_kron.autodiff import map_stacked
from optax_kron.capture.analysis.layers import Analysis
from optax_kron.capture.analysis.trace import Traced, trace_loss
from optax_kron.capture.analysis.uses import Use
from optax_kron.capture.execution.assemble import member_moments, member_taps
from optax_kron.capture.execution.check import Verdict, judge
from optax_kron.capture.execution.columns import ESTIMATES, columns, one_by_one
from optax_kron.capture.execution.inside_moments import InsideMoments, can_be_inside
from optax_kron.capture.execution.pullback import Linearized, linearize
from optax_kron.capture.execution.weights import Weighing, ranks
from optax_kron.capture.find import NO_MARK, Layers
from optax_kron.layers.layer import Layer
from optax_kron.layers.paths import map_by_path
from optax_kron.layers.taps import Taps, magnitude

PyTree = Any


def value_and_grad_with_taps(
    loss_fn: Callable[..., Any],
    layers: Iterable[Layer] | None = None,
    *,
    has_aux: bool = False,
    reduce: bool = False,
    samples: int = 1,
    fisher: str = "mc",
) -> Callable[..., tuple[Any, PyTree, Taps]]:
    """Like `jax.value_and_grad`, and the taps of every layer from the same forward pass.

    Args:
      loss_fn: as in `find_layers`.
      layers: what `find_layers` returned, or some of it; only their taps are made. `None`: those of
        all layers.
      has_aux: whether `loss_fn` returns `(loss, aux)`.
      reduce: return second moments, ready for `ok.kfac`, instead of what each datum gave. They are
        formed inside the traced function, also inside scans and checkpoints, so that a layer takes
        `d_in² + d_out²` numbers however large the batch, of a diagonal factor `d`. "expand" only.
      samples: columns of a random estimate.
      fisher: how the curvature of the likelihood is estimated: "mc" draws labels from the model's
        own distribution; "exact" takes every column of its Hessian; "sketch" random combinations of
        those; "empirical" the gradient itself; "forward" none: the output factor is the identity.

    Returns:
      A function of `(params, *args, key=None)`, all but the key by position, that returns `(value,
      grads, taps)`, with `(loss, aux)` for the value if `has_aux`. The key is needed by "mc" and
      "sketch". Leaves of `params` that are not floating-point arrays have the gradient `None`.
      Cost: that of the gradient, one more backward pass for every column, and the memory of every
      layer's inputs and output-gradients.

    Raises:
      ValueError: if the loss is not marked, or the key is missing or none.

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

    def value_and_grad(params: PyTree, *args: Any, key: Any = None):
        traced = trace_loss(loss_fn, params, args, has_aux)
        analysis = traced.analysis
        if not analysis.marks:
            raise ValueError(f"{owner}: {NO_MARK}")
        if key is None and fisher in ("mc", "sketch"):
            raise ValueError(f"{owner}: fisher={fisher!r} draws random numbers; pass key=.")
        if key is not None and not hasattr(key, "dtype"):
            raise ValueError(
                f"{owner}: key must be a key of jax.random, such as jax.random.key(0); got {key!r}."
            )
        _select(traced, layers)
        uses = analysis.uses
        inside = _inside(traced) if reduce else {}
        linearized = linearize(analysis, uses, traced.arrays, inside)
        grads, _, weights = linearized.pull_loss()
        gradients = _pull_columns(analysis, linearized, weights, fisher, key, samples)
        gradients = _per_layer(analysis, gradients, inside)
        order = {use: i for i, use in enumerate(uses)}
        weighing = Weighing(analysis, weights, linearized.indices)
        seen = (analysis, order, linearized, gradients, weighing)
        taps = {m.layer.name: _taps_of(m, *seen, inside, reduce) for m in analysis.members}
        value = traced.result.joined(linearized.outputs)
        leaves = dict(zip(traced.paths, grads, strict=True))
        norms = {m.layer.name: magnitude(m.layer.take(leaves)) for m in analysis.members}
        made = Taps(taps, gradient_norms=norms, fisher=fisher)
        return value, _unflatten_grads(traced, params, grads), made

    return value_and_grad


def _taps_of(member, analysis, order, linearized, gradients, weighing, inside, reduce):
    arguments = analysis, member, order, linearized, gradients, weighing
    return member_moments(*arguments, inside) if reduce else member_taps(*arguments)


def _inside(traced: Traced) -> dict[Use, InsideMoments]:
    """The uses whose second moments can be formed where they are."""
    analysis = traced.analysis
    # What each datum weighs has to be known in the forward pass; most losses are linear in their
    # per-example losses, and then none of this is evaluated.
    linearized = linearize(analysis, (), traced.arrays)
    _, _, weights = linearized.pull_loss()
    weighing = Weighing(analysis, weights, linearized.indices)
    found = {}
    for member in analysis.members:
        uses = [use for group in member.groups for use in group]
        labels = {use: analysis.labels.data(use.output) for use in uses}
        if not all(can_be_inside(member.layer, use, labels[use]) for use in uses):
            continue
        own: dict[Use, InsideMoments] = {}
        for group in member.groups:
            marks = analysis.marks_of(group)
            for use in group:
                weight = weighing.inside(use, labels[use], marks)
                if weight is not None:
                    biased = use in member.biased
                    own[use] = InsideMoments(member.layer, use, labels[use], weight, biased)
        if len(own) == len(uses):
            found |= own
    return found


def _select(traced: Traced, layers: Layers | None) -> None:
    """Keep the layers asked for, checked on numbers where that has not been done."""
    analysis = traced.analysis
    verdict = Verdict({}, False)
    if (layers is None or not layers.checked) and traced.is_concrete:
        verdict = judge(traced)
    refused = verdict.refused
    found = {member.layer.name: member for member in analysis.members}
    if layers is None:
        wanted = [name for name in found if name not in refused]
    else:
        wanted = [layer.name for layer in layers]
        for name in wanted:
            if name not in found or name in refused:
                raise _not_found(name, refused.get(name, "it is not found in this loss function"))
        for layer in layers:
            member = found[layer.name]
            if layer.bias is not None and member.layer.bias is None:
                why = analysis.uncovered.get(layer.bias, "it is not added to this product alone")
                raise _not_found(layer.name, f"its bias has no place in it: {why}")
            if layer.bias is None and member.layer.kernel is not None:
                found[layer.name] = member.without_bias()
        if verdict.complete and not refused:
            layers.checked = True
        sizes = {layer.name: layer.max_size for layer in layers}
        for name in wanted:
            found[name].layer = dataclasses.replace(found[name].layer, max_size=sizes[name])
    analysis.members = [found[name] for name in wanted]


def _not_found(name: str, reason: str) -> ValueError:
    return ValueError(
        f"value_and_grad_with_taps: no taps for the layer {name!r}: {reason}. Call find_layers "
        "again, with this function and numbers."
    )


def _pull_columns(analysis: Analysis, linearized: Linearized, weights, fisher, key, samples):
    """Cotangents [V, ...] of the outputs of all uses."""
    loss = jnp.zeros_like(linearized.outputs[0])
    zero = linearized.no_logits()
    if fisher == "forward":
        _, shapes, _ = jax.eval_shape(linearized.pull, loss, zero)
        return [jnp.zeros((0, *s.shape), s.dtype) for s in shapes]
    made = []
    for m, (mark, operands) in enumerate(zip(analysis.marks, linearized.operands, strict=True)):
        own = None if key is None else jax.random.fold_in(key, m)
        count = analysis.data_of([m])
        column = columns(fisher, mark, operands, weights[m], own, samples, count=count)
        if fisher == "exact":
            column = one_by_one(column, mark, ranks(analysis, m))
        made.append(column.astype(operands[0].dtype))
    if fisher in ("mc", "sketch"):
        stacked = made  # independent and of mean zero: heads may share a column
    else:
        counts = [c.shape[0] for c in made]
        stacked = []
        for m, c in enumerate(made):
            before, after = sum(counts[:m]), sum(counts[m + 1 :])
            stacked.append(jnp.pad(c, [(before, after)] + [(0, 0)] * (c.ndim - 1)))

    def pull(logits):
        return linearized.pull(loss, logits)[1]

    return map_stacked(pull, stacked)


def _per_layer(analysis: Analysis, gradients: list[Any], inside: Collection[Use]) -> list[Any]:
    """Columns for the number N of examples of each layer.

    Where examples are selected, layers before and after that differ in N.
    """
    found = []
    for use, gradient in zip(analysis.uses, gradients, strict=True):
        label = analysis.label(use)
        ratio = label.examples / analysis.data_of(label.marks)
        factor = ratio if use in inside else math.sqrt(ratio)
        found.append(gradient if factor == 1 else gradient * jnp.asarray(factor, gradient.dtype))
    return found


def _unflatten_grads(traced: Traced, params: PyTree, grads: list[Array]) -> PyTree:
    by_path = dict(zip(traced.paths, grads, strict=True))
    return map_by_path(lambda path, _: by_path.get(path), params)
