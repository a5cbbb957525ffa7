"""Condition numbers of what optimizers keep along the axes of blocks."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Inexact

from optax_kron.diagnostics.layout import Laid
from optax_kron.diagnostics.matrices import (
    Stack,
    double,
    kept,
    on_host,
    squared,
    tells_q_from_p,
    trimmed,
    unpacked,
)
from optax_kron.diagnostics.states import Found
from optax_kron.kernels.packed import size_of as packed_size

# Seconds of a decomposition of d³ numbers, and of each besides, on one core of a laptop.
_PER_CUBE, _EACH = 1 / 8e9, 1.2e-4


def cost_of_spectrum(size: int) -> float:
    """About how many seconds it takes to find the eigenvalues of a matrix."""
    return size**3 * _PER_CUBE + _EACH


def curvatures(stack: Stack, method: Any) -> dict[int, tuple[str, Any]]:
    """By axis, what tells the condition along it, as it is stored, and its name.

    Of `kron_psgd` P, or Q, of which P is made, of `shampoo` and `soap` the statistic, of `kfac` and
    `ekfac` A and G; or the eigenvalues of these, where they are there.
    """
    found: dict[int, tuple[str, Any]] = {}
    for name, axis, x in kept(stack, method):
        if name == "eigenvalues" or (name in ("P", "Q", "S", "A", "G") and axis not in found):
            found[axis] = name, x
    return found


def condition(values: np.ndarray, rounding: float) -> float | None:
    """The condition number of eigenvalues; `None` if all are zero, or some not finite.

    Those below the rounding of what they were found from are noise, and count as that.
    """
    values = np.abs(values)
    largest = values.max(initial=0.0)
    if not np.isfinite(values).all() or largest <= 0:
        return None
    return float(largest / max(values.min(), rounding * largest))


def eigenvalues(matrices: Inexact[np.ndarray, "n d d"]) -> Float[np.ndarray, "n d"]:
    """Those of Hermitian matrices [n, d, d]; NaN where a matrix is not finite."""
    finite = np.all(np.isfinite(matrices), axis=(1, 2), keepdims=True)
    known = np.where(finite, matrices, 0).astype(double(matrices))
    return np.where(finite[:, 0], np.linalg.eigvalsh(known), np.nan)


def conditions(
    found: Found, laid: Laid, budget: float = np.inf
) -> tuple[dict[int, list[float | None]], bool]:
    """Condition numbers along the axes of blocks, the largest of a place.

    Args:
      found: The state.
      laid: Its layout.
      budget: About how many seconds it may take; the smallest matrices come first.

    Returns:
      By the `id` of a place, a number for each axis or `None`; and whether any was left out for its
      cost.
    """
    made: dict[int, list[float | None]] = {id(x): [None] * len(x.axes) for x in laid.places}
    if not tells_q_from_p(found, laid.method):
        return made, False
    jobs = []
    for label in dict.fromkeys(place.label for place in laid.places):
        own = [place for place in laid.places if place.label == label]
        for axis, (name, x) in curvatures(found.stacks[label], laid.method).items():
            cost = 0.0
            if x.ndim == 3 and name != "eigenvalues":
                cost = cost_of_spectrum(packed_size(x)) * sum(place.count for place in own)
            jobs.append((cost, label, axis, name, x, own))
    left_out = False
    for cost, _, axis, name, x, own in sorted(jobs, key=lambda job: job[:3]):
        budget -= cost
        if budget < 0:
            left_out = True
            continue
        rows, rounding = unpacked(on_host(x)), float(jnp.finfo(x.dtype).eps)
        for place in own:
            spectra = _spectra(name, rows[place.rows], place.sizes[:, axis])
            numbers = [condition(values, rounding) for values in spectra]
            made[id(place)][axis] = max((x for x in numbers if x is not None), default=None)
    return made, left_out


def _spectra(name, rows, sizes):
    """Eigenvalues of each block, without those of padding; of P where Q is kept."""
    spectra = []
    for size in np.unique(sizes):
        own = trimmed(rows[sizes == size], size)
        own = squared(own) if name == "Q" else own
        spectra += list(own if own.ndim == 2 else eigenvalues(own))
    return spectra
