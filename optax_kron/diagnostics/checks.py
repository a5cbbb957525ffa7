"""What looks wrong: one check for each cause.

Each takes a state with its layout, and yields a `Finding` where something looks wrong. Bounds are
such that healthy runs stay well below them.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_kron.diagnostics.evidence import (
    Evidence,
    Finding,
    arrays,
    count,
    idle_now,
    name_of,
    names_of,
)
from optax_kron.diagnostics.layout import Laid
from optax_kron.diagnostics.matrices import has_values, on_host, unpacked
from optax_kron.diagnostics.report import idle_blocks
from optax_kron.diagnostics.spectra import condition, cost_of_spectrum, eigenvalues
from optax_kron.diagnostics.states import Found, number

# A step or two of a network may give some layers no gradient, as a last layer of zeros does.
_SETTLED = 10
# An inverse of a condition number of a tenth of the inverse rounding is noise to a tenth.
_NOISE = 0.1
# Of a run that has diverged curvatures are no evidence, and its damping alone tells.
_USUAL_DAMPING = 1e-6
# Gradients of which an epsilon that is added to their size makes up a tenth or more.
_VANISHING = 10.0
# The square of 1e17 is in float32 no more than 1e4 from the largest number, which a sum may reach.
_HUGE = 1e17
# Loss scales that look for the largest one lose a step now and then.
_LOST_BY_SCALING = 0.05
_SECONDS = 2.0  # that eigenvalues may take

Check = Callable[[Found, Laid | None, Evidence], Iterator[Finding]]


# --------------------------------------------------------------------------------- what is not seen


def hidden(found: Found, laid: Laid | None, told: Evidence) -> Iterator[Finding]:
    """Whether an optimizer has anything to do."""
    del laid
    any_params = told.params is None or any(np.size(x) for x in jax.tree.leaves(told.params))
    if found.hides_all and any_params:
        yield Finding(
            "mask_hides_all",
            "an optimizer of this library sees no parameter at all",
            "Of a mask True says what is optimized; of optax.partition see that labels occur among "
            "the parameters.",
        )
    if found.is_kron and not found.hides_all and not found.stacks and found.state.layers:
        yield Finding(
            "no_layers",
            "kfac or ekfac has no layer, so that gradients pass as they are, or to the fallback",
            "print(layers) says why: a loss of ok.losses is needed, or layers by hand.",
        )


def dead(found: Found, laid: Laid | None, told: Evidence) -> Iterator[Finding]:
    """Whether there are parameters whose gradients are zero."""
    zero = [k for k, x in arrays(told.gradients).items() if x.size and not bool((x != 0).any())]
    # At a minimum all are, and units that a run which has diverged has lost are no cause of it.
    if len(zero) == len(arrays(told.gradients)) or told.has_diverged:
        zero = []
    steps = count(found.state.count)
    names: list[str] = []
    if steps >= _SETTLED and found.stacks and has_values(found):
        idle = {label: idle_blocks(found, label) for label in found.stacks}
        names = names_of(found, laid, idle if told.has_diverged else idle_now(found))
    seen = None if laid is None else set(laid.seen)
    names += [k for k in zero if k not in names and (seen is None or k in seen)]
    if names:
        yield Finding(
            "dead_parameters",
            f"after {steps} steps of {name_of(found)} some gradients are zero, or always were",
            "The loss may not depend on these parameters: look for units that are never active, "
            "stop_gradient, an initialization of zeros on both sides, or inputs that are zero. "
            "Leave out by optax.masked what is not to be trained.",
            tuple(names),
        )


# ------------------------------------------------------------------------------ what is not finite


def not_finite(found: Found, laid: Laid | None, told: Evidence) -> Iterator[Finding]:
    """Whether steps were lost, and to what."""
    del laid
    state = found.state
    skipped = count(state.skipped_steps) + count(found.dropped)
    steps = count(state.count) + skipped
    data, where = told.bad_paths(told.batch), told.bad_paths(told.gradients)
    if not (skipped or where or data):
        return
    if not data and told.has_diverged:
        return  # such a run is judged by its losses
    # Which these two average.
    squares = ", or their squares," if found.kind in ("shampoo", "soap") else ""
    lost = f"{name_of(found)} skipped {skipped} of {steps} steps, whose gradients{squares} were "
    lost += "not finite"
    if data:
        yield Finding(
            "nan_data",
            f"{lost}, and the batch holds NaN or infinity",
            "Clean the data; until then such batches are skipped.",
            tuple(data),
        )
    elif told.has_half(getattr(state, "momentum", None)):
        if where or skipped > _LOST_BY_SCALING * steps:
            yield Finding(
                "float16_overflow",
                f"{lost}, and there is float16, whose largest number is 65504",
                "Scale the loss down, or dynamically, and gradients back in float32; or take "
                "bfloat16, which overflows where float32 does.",
                tuple(where),
            )
    elif _squares_overflow(found, told):
        yield Finding(
            "wrong_loss_scale",
            f"{lost}; the last ones are, and their squares are not",
            "Scale the loss down; shampoo and soap average squares of gradients.",
        )
    else:
        # A run that has diverged loses steps too, which parameters or losses would show.
        known = told.params is not None or told.losses is not None
        yield Finding(
            "nan_data" if known else "not_finite_steps",
            lost,
            "Look for NaN or infinity in the data (batch= tells), or for log(0), 0/0 and the like "
            "in the loss: jax_debug_nans stops there."
            + ("" if known else " Of a run that diverged, params and losses tell."),
            tuple(where),
        )


def _squares_overflow(found: Found, told: Evidence) -> bool:
    """Whether gradients are finite, but so large that an average of their squares would not be."""
    largest = [float(jnp.abs(x).max()) for x in arrays(told.gradients).values() if x.size]
    return found.kind in ("shampoo", "soap") and bool(largest) and _HUGE < max(largest) < np.inf


def failing(found: Found, laid: Laid | None, told: Evidence) -> Iterator[Finding]:
    """Whether what is refreshed keeps failing: more than once, and at a twentieth of refreshes."""
    failed = count(getattr(found.state, "failed_refreshes", None))
    refreshes = count(getattr(found.state, "refreshes", found.state.count))
    if failed <= max(1, 0.05 * refreshes):
        return
    words = f"{failed} blocks of {name_of(found)} kept old factors at {refreshes} refreshes"
    if found.kind == "branch_kfac":
        yield Finding(
            "damping_too_low",
            f"{failed} of {refreshes} covariances of branch_kfac had no inverse",
            "Raise damping, or take more samples than a block has dimensions.",
        )
        return
    if any(x.dtype == jnp.float16 for x in jax.tree.leaves(found.stacks)):
        yield Finding(
            "float16_overflow",
            f"{words}, and these are of float16, whose largest number is 65504",
            "Take factor_dtype=jnp.bfloat16 or jnp.float32.",
        )
        return
    if told.has_diverged:
        return  # what such a run gives has no inverse
    never = {}
    if has_values(found):
        never = {label: ~np.asarray(x.initialized) for label, x in found.stacks.items()}
    yield Finding(
        "refresh_failing",
        f"{words}, as the new ones were not finite",
        "Raise damping (relative_damping of shampoo and soap), or take a wider factor_dtype; of "
        "kfac and ekfac see that inputs of layers are of usual size, about one.",
        tuple(names_of(found, laid, never)) if laid is not None and never else (),
    )


# -------------------------------------------------------------------------------------- what scale


def scale(found: Found, laid: Laid | None, told: Evidence) -> Iterator[Finding]:
    """Whether gradients are of another scale than what they are set against."""
    state = found.state
    layers = getattr(state, "layers", None)
    mismatched = 0 if layers is None else count(layers.mismatched_steps)
    if mismatched:
        yield Finding(
            "wrong_loss_scale",
            f"at {mismatched} of {count(state.count)} steps gradients of {name_of(found)} were 128 "
            "times larger or smaller than those that its taps were made beside",
            "Where the loss is scaled, scale gradients and taps back alike: "
            "taps.unscale(loss_scale).",
        )
        return
    norms = state.usual_norms if found.is_kron else None
    if not isinstance(norms, Mapping) or not found.stacks or not has_values(found):
        return
    usual = {k: np.asarray(x.norm) for k, x in norms.get("gradients", {}).items()}
    largest = max((float(x.max(initial=0)) for x in usual.values()), default=0.0)
    if largest > _HUGE and found.kind in ("shampoo", "soap"):
        yield Finding(
            "wrong_loss_scale",
            f"gradients of {name_of(found)} are as long as {largest:.1g}, and their squares are "
            "close to the largest number",
            "Scale the loss down.",
        )
    least = _least_gradient(found, laid)
    # Gradients of a run that has converged are small too.
    if laid is None or least is None or told.losses is None or told.has_converged:
        return
    roots = [x.max(initial=0) / np.sqrt(laid.sizes[k][1]) for k, x in usual.items()]
    if 0 < max(roots) < _VANISHING * least:
        yield Finding(
            "wrong_loss_scale",
            f"gradients of {name_of(found)} are no larger than {max(roots):.1g} in the mean, and "
            f"what is added to their size is {least:.1g}",
            "Scale the loss up, or lower eps (shampoo, soap) or damping (kron_psgd).",
        )


def _least_gradient(found: Found, laid: Laid | None) -> float | None:
    """What an optimizer adds to the size of gradients, if it is known and in their units."""
    method = None if laid is None else laid.method
    name = {"soap": "eps", "shampoo": "eps", "kron_psgd": "damping"}.get(found.kind)
    if method is None or name is None or getattr(method, "grafting", "adam") in (None, "sgd"):
        return None
    if getattr(method, "is_newton", False):
        return None  # added to Hessian-vector products
    return number(found.hyperparams.get(name, getattr(method, name)))


# --------------------------------------------------------------------------------------- damping


def damping(found: Found, laid: Laid | None, told: Evidence) -> Iterator[Finding]:
    """Whether damped curvature is still so ill-conditioned that its inverse is rounding."""
    # Those that adapt it raise it where steps fail.
    if found.kind not in ("kfac", "ekfac") or not has_values(found):
        return
    given, budget, worst = _given_damping(found, laid), _SECONDS, {}
    if told.has_diverged and given is not None and given >= _USUAL_DAMPING:
        return
    for label, stack in found.stacks.items():
        inverse = stack.inverse
        if hasattr(inverse, "input"):
            numbers, budget = _of_inverses(inverse, budget)
        elif given is not None:
            numbers = _of_spectrum(inverse, given)
        else:
            continue
        dtype = jnp.promote_types(jax.tree.leaves(inverse)[0].dtype, jnp.float32)
        bound = _NOISE / float(jnp.finfo(dtype).eps)
        worst[label] = np.where(np.asarray(stack.initialized), numbers, 0) > bound
    if any(x.any() for x in worst.values()):
        rows = {label: worst.get(label, np.zeros(1, bool)) for label in found.stacks}
        yield Finding(
            "damping_too_low",
            f"damped factors of {name_of(found)} have condition numbers beyond what their dtype "
            "tells from rounding, so that steps along some directions are noise",
            "Raise damping, to 1e-3 or more; or take larger batches, for factors of full rank.",
            tuple(names_of(found, laid, rows)),
        )


def _given_damping(found: Found, laid: Laid | None) -> float | None:
    if "damping" in found.hyperparams:
        return number(found.hyperparams["damping"])
    if laid is None or laid.method is None:
        return None
    known = laid.method.damping
    return number(known(found.state.count) if callable(known) else known)


def _of_inverses(inverse: Any, budget: float) -> tuple[np.ndarray, float]:
    """Condition numbers of the inverses [N], the worse of both; and what is left of the budget."""
    numbers = np.zeros(len(inverse.input))
    for x in (inverse.input, inverse.output):
        rows = unpacked(on_host(x))
        rounding = float(np.finfo(rows.dtype).eps)
        if rows.ndim == 3:
            budget -= len(rows) * cost_of_spectrum(rows.shape[1])
            if budget < 0:
                continue
            rows = eigenvalues(rows)
        own = [condition(values, rounding) or 0.0 for values in rows]
        numbers = np.maximum(numbers, own)
    return numbers, budget


def _of_spectrum(inverse: Any, added: float) -> np.ndarray:
    """Condition numbers [N] of damped eigenvalues."""
    if hasattr(inverse, "values"):
        values = on_host(inverse.values)
    else:
        inputs, outputs = on_host(inverse.input_values), on_host(inverse.output_values)
        values = inputs[:, :, None] * outputs[:, None]
    rows = np.abs(values).reshape(len(values), -1)
    return (rows.max(axis=1) + added) / np.maximum(rows.min(axis=1) + added, 1e-300)


# --------------------------------------------------------------------- those that tune themselves


def adaptive(found: Found, laid: Laid | None, told: Evidence) -> Iterator[Finding]:
    """Whether the quadratic model is of any use."""
    del laid, told
    if found.adaptive is None:
        return
    metrics = found.adaptive.metrics
    if changed := count(metrics.mismatched_updates):
        yield Finding(
            "updates_changed",
            f"{changed} updates of {name_of(found)} were not added to the parameters as they are",
            "Add them unscaled and unclipped: it chooses its own rate.",
        )
    rejected, taken = count(metrics.rejected_steps), count(metrics.accepted_steps)
    if rejected >= _SETTLED and rejected > taken:
        yield Finding(
            "steps_rejected",
            f"{rejected} of {rejected + taken} steps of {name_of(found)} would have raised the "
            "loss",
            "See that value, value_fn and ggn_fn are of the same batch, without noise of their own "
            "such as dropout; or raise min_damping.",
        )


CHECKS: tuple[Check, ...] = (hidden, not_finite, scale, failing, damping, dead, adaptive)
