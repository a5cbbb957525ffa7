"""Figures show what they say, and need Matplotlib alone."""

import subprocess
import sys

import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import pytest

import optax_kron as ok

WEIGHTS = {"bias": jnp.ones(4), "kernel": jnp.arange(24.0).reshape(6, 4) ** 1.5}


def state_of(tx):
    return tx.update(WEIGHTS, tx.init(WEIGHTS), WEIGHTS)[1]


@pytest.mark.parametrize("what", ["spectra", "matrices", "overview"])
@pytest.mark.parametrize("make", [ok.kron_psgd, ok.soap, ok.shampoo])
def test_figures_of_every_kind(make, what, tmp_path):
    tx = make(1e-3)
    figure = ok.diagnostics.plot(state_of(tx), WEIGHTS, tx, what=what)
    assert isinstance(figure, matplotlib.figure.Figure)
    assert figure.axes
    figure.savefig(tmp_path / "figure.png", dpi=40)
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_spectra_are_those_of_the_factors():
    tx = ok.shampoo(1e-3)
    state = state_of(tx)
    figure = ok.diagnostics.plot(state, WEIGHTS, paths=["kernel"])
    (axes,) = figure.axes
    own = [f for f in ok.diagnostics.factors(state, WEIGHTS)["kernel"] if f.name == "S"]
    assert axes.get_title() == "kernel"
    for line, factor in zip(axes.lines, own, strict=True):
        values = factor.spectrum()
        np.testing.assert_allclose(line.get_ydata(), np.maximum(values / values[0], 1e-12))


def test_heat_maps_show_magnitudes_relative_to_the_largest():
    figure = ok.diagnostics.plot(
        state_of(ok.kron_psgd(1e-3)), WEIGHTS, what="matrices", paths=["['kernel']"]
    )
    maps = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert [x.shape for x in maps[:4]] == [(6, 6), (6, 6), (4, 4), (4, 4)]
    assert all(x.max() == 0 for x in maps[:4])
    assert maps[0][5, 0] == pytest.approx(-6)  # below the diagonal Q of "EQ" is zero


def test_an_overview_has_all_parameters():
    tx = ok.soap(1e-3)
    figure = ok.diagnostics.plot(state_of(tx), WEIGHTS, tx, what="overview")
    names = [label.get_text() for label in figure.axes[2].get_xticklabels()]
    assert names == ["bias", "kernel"]


def test_more_parameters_than_fit_are_told():
    weights = {f"x{i:02}": jnp.ones((3, 2)) for i in range(15)}
    figure = ok.diagnostics.plot(ok.kron_psgd(1e-3).init(weights), weights)
    assert figure.get_suptitle() == "the first 12 of 15 parameters; paths= chooses"


def test_what_cannot_be_drawn_is_refused_in_words():
    state = ok.kron_psgd(1e-3).init(WEIGHTS)
    with pytest.raises(ValueError, match="what must be one of spectra, matrices, overview"):
        ok.diagnostics.plot(state, WEIGHTS, what="all")
    with pytest.raises(ValueError, match="no factors are kept of other; there are some of bias"):
        ok.diagnostics.plot(state, WEIGHTS, paths=["other"])
    with pytest.raises(ValueError, match="there is no parameter at other"):
        ok.diagnostics.plot(state, WEIGHTS, what="overview", paths=["other"])
    with pytest.raises(ValueError, match="no factors are kept of any parameter"):
        ok.diagnostics.plot(ok.branch_kfac(1e-3).init(WEIGHTS), WEIGHTS)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'optax_kron\[diagnostics\]'"):
        ok.diagnostics.plot(ok.kron_psgd(1e-3).init(WEIGHTS), WEIGHTS)


@pytest.mark.subprocess
def test_matplotlib_is_imported_when_a_figure_is_made_and_pyplot_never():
    script = """
import sys, jax.numpy as jnp, optax_kron as ok
assert "matplotlib" not in sys.modules and "rich" not in sys.modules
weights = {"x": jnp.ones((3, 2))}
ok.diagnostics.plot(ok.kron_psgd(1e-3).init(weights), weights)
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
