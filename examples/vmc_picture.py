"""The table and the picture of the example of variational Monte Carlo."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import COLOURS, save
from matplotlib.figure import Figure

CHEMICAL_ACCURACY = 1.6  # mHa, or 1 kcal/mol
WINDOW = 20  # steps of a running mean
LINES = {"kfac": COLOURS["kfac"], "adam": COLOURS["adamw"], "sr": COLOURS["kron_psgd"]}


class Run(NamedTuple):
    """What one optimizer did: errors of the energy in mHa, and seconds without compilation."""

    errors: np.ndarray  # [steps], of the walkers of each step
    seconds: np.ndarray  # [steps], since the first
    energy: float  # Hartree, of the last wave function
    standard_error: float
    variance: float  # of its local energy, zero of an eigenstate

    @property
    def running(self) -> np.ndarray:
        """The mean of each WINDOW of steps."""
        window = min(WINDOW, len(self.errors))
        return np.convolve(self.errors, np.ones(window) / window, "valid")

    def first_within(self, bound: float) -> int | None:
        """Returns the step after which running means stay within a bound."""
        (outside,) = np.nonzero(~(np.abs(self.running) <= bound))
        first = outside[-1] + 1 if len(outside) else 0
        return len(self.errors) - len(self.running) + first if first < len(self.running) else None


def print_table(runs: dict[str, Run], exact: float) -> None:
    """Prints the energies, and how soon they were accurate."""
    print(f"\nLiterature {exact:.6f} Ha; bounds hold for all later means of {WINDOW} steps.")
    print("      energy  ± error mHa  off mHa  variance  ms/step   within 1.6 mHa   within 0.5 mHa")
    for name, run in runs.items():
        off, milli = 1e3 * (run.energy - exact), 1e3 * run.seconds[-1] / len(run.seconds)
        bounds = [run.first_within(bound) for bound in (CHEMICAL_ACCURACY, 0.5)]
        soon = ["-" if n is None else f"{n + 1} ({run.seconds[n]:.1f} s)" for n in bounds]
        print(
            f"{name:4} {run.energy:9.5f} {1e3 * run.standard_error:10.2f} {off:8.2f}"
            f" {run.variance:9.4f} {milli:8.1f} {soon[0]:>16} {soon[1]:>16}"
        )


def draw(runs: dict[str, Run], title: str, path: Path) -> None:
    """Draws the error of running means over steps and over seconds."""
    figure = Figure(figsize=(10, 4.5), dpi=130, layout="constrained")
    for axes, label in zip(figure.subplots(1, 2, sharey=True), ("step", "seconds"), strict=True):
        for name, run in runs.items():
            running = run.running
            steps = np.arange(len(run.errors) - len(running), len(run.errors))
            x = steps + 1 if label == "step" else run.seconds[steps]
            axes.plot(x, np.abs(running), color=LINES[name], lw=1.5, label=name)
        axes.axhline(CHEMICAL_ACCURACY, color="#222222", ls="--", lw=1, label="chemical accuracy")
        axes.set(xlabel=label, yscale="log", ylim=(0.03, None))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[1].set(xscale="log")
    figure.axes[0].set(ylabel=f"|error| of a mean of {WINDOW} steps, mHa")
    figure.axes[1].legend(frameon=False)
    figure.suptitle(title)
    save(figure, path)
