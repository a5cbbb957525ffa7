"""Figures of what optimizers keep; Matplotlib is imported when one is made."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import optax

from optax_kron.diagnostics.matrices import Factor, factors
from optax_kron.diagnostics.report import ParameterRow, summary
from optax_kron.layers.paths import spellings
from optax_kron.types import PyTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("spectra", "matrices", "overview")
# Panels beyond so many are too small to read.
_MOST = 12
# What is drawn of factors that have been made of others by a power, or are no curvature.
_SPECTRA = ("P", "S", "A", "G", "eigenvalues")


def plot(
    state: PyTree,
    params: PyTree,
    tx: optax.GradientTransformation | None = None,
    *,
    what: str = "spectra",
    paths: Sequence[str] | None = None,
) -> "Figure":
    """A figure of what the optimizers in a state keep.

    Args:
      state: What `tx.init` or `tx.update` returned, or a pytree that holds it.
      params: The parameters, or `jax.ShapeDtypeStruct`s.
      tx: The transformation that made the state; see `factors`.
      what: "spectra", eigenvalues along every axis of each parameter, relative to the largest: of P
        for `kron_psgd`, of the statistics for `shampoo` and `soap`, of A and G for `kfac` and
        `ekfac`; "matrices", heat maps of the factors of each parameter's first block, Q and P for
        `kron_psgd`, as magnitudes on a logarithmic scale; or "overview", condition numbers, steps
        since the last refresh, and bytes of state, over all parameters.
      paths: Of the parameters that are drawn, as "dense/kernel". `None`: the first twelve that have
        factors; of an overview all.

    Returns:
      A `matplotlib.figure.Figure`, which notebooks show, and `savefig` saves. There is no window,
      and nothing of `matplotlib.pyplot` changes.

    Raises:
      ImportError: Without Matplotlib, which the extra `diagnostics` brings.
      ValueError: As `factors`; for another `what`; for a path that has no factors.

    Cost: that of `factors`, and for "spectra" d³ operations for each matrix; of an overview that of
    `summary` with all conditions.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> params = {"kernel": jnp.ones((8, 4))}
      >>> state = ok.kron_psgd(1e-3).init(params)
      >>> figure = ok.diagnostics.plot(state, params, what="matrices")
      >>> [axes.get_title() for axes in figure.axes[:4]]
      ['kernel: Q, axis 0', 'P, axis 0', 'Q, axis 1', 'P, axis 1']
    """
    if what not in KINDS:
        raise ValueError(f"plot: what must be one of {', '.join(KINDS)}; got {what!r}.")
    figure = _new_figure()
    if what == "overview":
        rows = summary(state, params, tx, all_conditions=True).parameters
        wanted = None if paths is None else {form for path in paths for form in spellings(path)}
        shown = [x for x in rows if wanted is None or wanted & set(x.parameter.split())]
        known = {path for row in rows for path in row.parameter.split()}
        missing = [path for path in paths or () if not known & set(spellings(path))]
        if missing or not shown:
            where = f"at {', '.join(missing)}" if missing else "to show"
            raise ValueError(f"plot: there is no parameter {where}.")
        _draw_overview(figure, shown)
        return figure
    known = factors(state, params, tx)
    chosen = _chosen(known, paths)
    if what == "matrices":
        _draw_matrices(figure, {path: known[path] for path in chosen})
    else:
        _draw_spectra(figure, {path: known[path] for path in chosen})
    left = len(known) - len(chosen)
    if paths is None and left > 0:
        figure.suptitle(f"the first {len(chosen)} of {len(known)} parameters; paths= chooses")
    return figure


def _new_figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot needs Matplotlib, which is not installed: pip install 'optax_kron[diagnostics]'."
        ) from error
    return Figure(layout="constrained")


def _chosen(known: dict[str, list[Factor]], paths: Sequence[str] | None) -> list[str]:
    if paths is None:
        chosen = list(known)[:_MOST]
    else:
        chosen = [next((x for x in spellings(p) if x in known), p) for p in paths]
    missing = [path for path in chosen if path not in known]
    if missing or not chosen:
        what = f"of {', '.join(missing)}" if missing else "of any parameter"
        there = f"; there are some of {', '.join(known)}" if known else ""
        raise ValueError(f"plot: no factors are kept {what}{there}.")
    return chosen


def _draw_spectra(figure: Any, chosen: dict[str, list[Factor]]) -> None:
    columns = min(len(chosen), 3)
    rows = -(-len(chosen) // columns)
    figure.set_size_inches(4.2 * columns, 3 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (path, own) in zip(grid, chosen.items(), strict=False):
        drawn = [f for f in own if f.name in _SPECTRA]
        # In the KL variants, and after a decomposition, eigenvalues are there beside the matrix.
        twice = {(f.axis, f.block) for f in drawn if f.name == "eigenvalues"}
        for factor in drawn:
            if factor.name != "eigenvalues" and (factor.axis, factor.block) in twice:
                continue
            values = factor.spectrum()
            if values.size and np.isfinite(values).all() and values[0] > 0:
                label = f"{factor.name}, axis {factor.axis}" if factor.block == 0 else None
                color = f"C{factor.axis}"
                axes.semilogy(
                    np.arange(1, len(values) + 1),
                    np.maximum(values / values[0], 1e-12),
                    label=label,
                    color=color,
                    alpha=1.0 if factor.block == 0 else 0.4,
                    marker="." if len(values) < 30 else None,
                )
        axes.set_title(path or "(root)", fontsize="small")
        axes.set_xlabel("eigenvalue")
        if axes.lines:
            axes.legend(fontsize="x-small")
        else:
            axes.text(0.5, 0.5, "nothing yet", ha="center", transform=axes.transAxes)
    for axes in grid[len(chosen) :]:
        axes.set_axis_off()


def _draw_matrices(figure: Any, chosen: dict[str, list[Factor]]) -> None:
    first = {path: [f for f in own if f.block == 0] for path, own in chosen.items()}
    columns = max(map(len, first.values()))
    figure.set_size_inches(2.6 * columns, 2.5 * len(first))
    grid = figure.subplots(len(first), columns, squeeze=False)
    for line, (path, own) in zip(grid, first.items(), strict=True):
        for axes, factor in zip(line, own, strict=False):
            values = np.abs(factor.matrix)
            largest = values.max(initial=0.0)
            # What is smaller than a millionth of the largest is shown as that, zeros among it.
            scaled = np.log10(np.maximum(values / (largest or 1.0), 1e-6))
            image = axes.imshow(scaled, vmin=-6, vmax=0, cmap="viridis", interpolation="nearest")
            title = f"{factor.name}, axis {factor.axis}"
            if factor is own[0]:
                title = f"{path or '(root)'}: {title}"
            axes.set_title(title, fontsize="small")
            axes.tick_params(labelsize="x-small")
            if factor is own[-1]:
                figure.colorbar(image, ax=axes, label="log10 of |entry| / largest")
        for axes in line[len(own) :]:
            axes.set_axis_off()


def _draw_overview(figure: Any, rows: Sequence[ParameterRow]) -> None:
    figure.set_size_inches(max(6.0, 0.35 * len(rows) + 2), 8)
    conditions, age, size = figure.subplots(3, 1, sharex=True)
    places = np.arange(len(rows))
    for axis in range(max((len(row.conditions) for row in rows), default=0)):
        known = [row.conditions[axis] if axis < len(row.conditions) else None for row in rows]
        values = [np.nan if x is None else x for x in known]
        conditions.plot(places, values, "o", label=f"axis {axis}")
    conditions.set_yscale("log")
    conditions.set_ylabel("condition number")
    if conditions.lines:
        conditions.legend(fontsize="x-small")
    age.bar(places, [row.age or 0 for row in rows])
    age.set_ylabel("steps since refresh")
    size.bar(places, [row.bytes / 2**20 for row in rows])
    size.set_ylabel("state, MiB")
    names = [row.layer or row.parameter for row in rows]
    size.set_xticks(places, names, rotation=90, fontsize="x-small")
