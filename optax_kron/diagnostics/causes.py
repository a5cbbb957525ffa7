"""What looks wrong in a run, by its cause, and what to do about it."""

import html
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Float

from optax_kron.diagnostics.checks import CHECKS
from optax_kron.diagnostics.evidence import Evidence, Finding
from optax_kron.diagnostics.layout import lay_out
from optax_kron.diagnostics.matrices import double, on_host
from optax_kron.diagnostics.states import check_concrete, find_states
from optax_kron.types import PyTree

# What makes a loss rise too, and is to be mended before a learning rate is judged.
_OTHERS = {"nan_data", "float16_overflow", "wrong_loss_scale", "damping_too_low", "refresh_failing"}
_OTHERS |= {"mask_hides_all", "no_layers"}


class Explanation(tuple[Finding, ...]):
    """What `explain` returns: a tuple of `Finding`s, which prints itself in words.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> print(ok.diagnostics.explain(ok.soap(1e-3).init(jnp.ones((3, 2)))))
      Nothing looks wrong.
    """

    __slots__ = ()

    @property
    def causes(self) -> tuple[str, ...]:
        """The names of the causes, the likeliest first."""
        return tuple(finding.cause for finding in self)

    def __str__(self) -> str:
        return "\n\n".join(map(str, self)) or "Nothing looks wrong."

    __repr__ = __str__

    def _repr_html_(self) -> str:
        lines = [f"<li>{html.escape(str(finding))}</li>" for finding in self]
        return f"<ul>{''.join(lines)}</ul>" if lines else "<p>Nothing looks wrong.</p>"


def explain(
    state: PyTree,
    params: PyTree | None = None,
    tx: optax.GradientTransformation | None = None,
    *,
    gradients: PyTree | None = None,
    updates: PyTree | None = None,
    losses: ArrayLike | None = None,
    batch: PyTree | None = None,
) -> Explanation:
    """What looks wrong in a run, by its cause, in words, with the remedy.

    A state knows what was not finite, what failed and what never came; the rest it is told. What
    tells of the causes is

    - `mask_hides_all`, `no_layers`: the state.
    - `nan_data`: skipped steps in the state, and `params` or `losses` that do not show that the run
      has diverged; `batch` makes it certain, `gradients` say where. With the state alone it is
      `not_finite_steps`.
    - `float16_overflow`: skipped steps or failed refreshes in the state, and float16 in it, in
      `params` or in `gradients`.
    - `refresh_failing`: failed refreshes in the state.
    - `wrong_loss_scale`: `mismatched_steps` in the state of `kfac` and `ekfac`; of others `tx`, for
      an `eps` or a `damping` beside which gradients vanish, and `losses` that have not converged.
    - `damping_too_low`: the inverses of `kfac`, failed refreshes of `branch_kfac`; of `ekfac`, and
      of `kfac` with `damping_rule="exact"`, `tx` for the damping.
    - `dead_parameters`: the state, from the tenth step on; `params` and `tx` for the names.
    - `updates_changed`, `steps_rejected`: the state of `adaptive_kfac` and `adaptive_ekfac`.
    - `learning_rate_too_high`: `losses`, unless one of the others explains them; `updates` say how
      long steps are.

    Without what a cause needs, it is not named: silence then tells nothing of it.

    Args:
      state: What `tx.update` returned, or a pytree that holds it.
      params: The parameters.
      tx: The transformation that made the state; see `summary`.
      gradients: Those of the last step, a tree like the parameters.
      updates: The updates of the last step, likewise, as they were added to the parameters.
      losses: Those of the run so far, oldest first, [n]. They count as risen where a quarter of
        them, or half of the last quarter, are above three times the first; of a run that ended in
        what is not finite, those before it. Fewer than eight tell nothing.
      batch: The data of the last step, a pytree of arrays.

    Returns:
      A tuple of findings, the likeliest first, each with `cause`, `evidence`, `remedy` and `where`;
      empty if nothing looks wrong.

    Raises:
      ValueError: As `summary`.

    Cost: that of eigenvalues of the inverses of `kfac`, about two seconds at most.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> tx, params = ok.kron_psgd(1e-3), {"kernel": jnp.ones((3, 2))}
      >>> state, batch = tx.init(params), jnp.array([1.0, jnp.nan])
      >>> gradients = {"kernel": jnp.full((3, 2), jnp.nan)}
      >>> _, state = tx.update(gradients, state, params)
      >>> ok.diagnostics.explain(state, params, batch=batch).causes
      ('nan_data',)
    """
    owner = "diagnostics.explain"
    states = find_states(state)
    for found in states:
        check_concrete(owner, found)
    laid: list[Any] = [None] * len(states)
    if params is not None or tx is not None:
        laid = lay_out(owner, states, params, tx)
    told = Evidence(params, gradients, updates, _history(owner, losses), batch)
    findings = []
    for check in CHECKS:
        for found, layout in zip(states, laid, strict=True):
            findings += check(found, layout, told)
    if not _OTHERS & {finding.cause for finding in findings}:
        findings += _learning_rate(told)
    return Explanation(dict.fromkeys(findings))


def _history(owner: str, losses: ArrayLike | None) -> Float[np.ndarray, " n"] | None:
    if losses is None:
        return None
    known = np.asarray(losses, float)
    if known.ndim != 1:
        raise ValueError(f"{owner}: losses must be [n], oldest first; got shape {known.shape}.")
    return known


def _learning_rate(told: Evidence) -> Iterator[Finding]:
    """Whether losses have risen, where nothing else explains it."""
    lost = told.bad_paths(told.params)
    if not told.has_risen and not lost:
        return
    words = "the parameters are not finite"
    if told.losses is not None and told.has_risen:
        finite = told.losses[np.isfinite(told.losses)]
        words = f"the loss rose from {finite[0]:.3g} to {finite.max():.3g}"
        if len(finite) < len(told.losses):
            words += ", and then was not finite"
    if told.updates is not None and told.params is not None:
        lengths = [_norm(tree) for tree in (told.updates, told.params)]
        if all(np.isfinite(lengths)) and lengths[1] > 0:
            words += f"; the last update is {lengths[0] / lengths[1]:.2g} times the parameters"
    yield Finding(
        "learning_rate_too_high",
        words,
        "Divide the learning rate by ten, from parameters of before the rise; warm it up; or bound "
        "steps, or bound them more, by norm_constraint (kfac, ekfac) or rms_clip (kron_psgd).",
        tuple(lost),
    )


def _norm(tree: PyTree) -> float:
    arrays = map(on_host, jax.tree.leaves(tree))
    norms = [np.linalg.norm(np.ravel(x).astype(double(x))) for x in arrays]
    return float(np.linalg.norm(norms)) if norms else 0.0
