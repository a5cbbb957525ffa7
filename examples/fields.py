"""Pictures of functions on a square grid, beside curves of errors, for examples/pinn.py."""

import numpy as np
from common import draw_curves


def make_grid(equation, size=101):
    """Returns the points of a regular grid, [size², 2]."""
    axes = [np.linspace(a, b, size) for a, b in zip(equation.lower, equation.upper, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)


def draw(axes, title, curves, u, exact):
    """Draws errors over steps and over seconds, a solution, and how far it is from the exact."""
    for i, panel in enumerate(axes[:2]):
        draw_curves(panel, {k: [(c[i], c[2]) for c in curve] for k, curve in curves.items()})
        panel.set(
            title=title, yscale="log", ylabel="relative L2 error", xlabel=("step", "seconds")[i]
        )
    for panel, values, name in zip(
        axes[2:], (u, u - exact), ("solution", "its error"), strict=True
    ):
        size = int(np.sqrt(values.size))
        panel.figure.colorbar(panel.imshow(values.reshape(size, size).T, origin="lower"), ax=panel)
        panel.set(title=name, xticks=[], yticks=[])
