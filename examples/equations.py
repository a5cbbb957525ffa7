"""Two equations for examples/pinn.py: solutions, points, and the loss of a network.

A solution is a function u of points [n, 2]; of Burgers' equation these are (x, t).
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import optax_kron as ok

VISCOSITY = 0.1 / np.pi
WIDTHS = (2, 32, 32, 32, 1)
SIDES_WEIGHT = 30.0  # of the squared errors on the sides, beside those of the residuals


class Equation(NamedTuple):
    """An equation on a rectangle, and its solution."""

    lower: tuple[float, float]
    upper: tuple[float, float]
    sides: tuple[tuple[int, int], ...]  # (axis, 0 or 1 for its end) where u is given
    residual: Callable  # of u and points inside [n, 2]: zero [n] for a solution
    exact: Callable  # NumPy, of points [n, 2]


def derivatives(u, points, axis):
    """Returns the first and the second derivative of u along an axis, each [n]."""
    direction = jnp.zeros_like(points).at[:, axis].set(1.0)

    def slope(x):
        return jax.jvp(u, (x,), (direction,))[1]

    return jax.jvp(slope, (points,), (direction,))


def poisson(u, points):
    """Returns `Δu + 2π² sin(πx) sin(πy)`."""
    source = 2 * jnp.pi**2 * jnp.prod(jnp.sin(jnp.pi * points), axis=1)
    return derivatives(u, points, 0)[1] + derivatives(u, points, 1)[1] + source


def poisson_solution(points):
    """Returns `sin(πx) sin(πy)`, which is zero on the boundary."""
    return np.prod(np.sin(np.pi * points), axis=1)


def burgers(u, points):
    """Returns `u_t + u u_x - ν u_xx`."""
    first, second = derivatives(u, points, 0)
    time = jnp.zeros_like(points).at[:, 1].set(1.0)
    value, change = jax.jvp(u, (points,), (time,))
    return change + value * first - VISCOSITY * second


def burgers_solution(points, nodes=200):
    """Returns the solution from `u(x, 0) = -sin(πx)`, by the transform of Cole and Hopf.

    It is a ratio of two integrals against a Gaussian, by Gauss-Hermite quadrature.
    """
    z, weights = np.polynomial.hermite.hermgauss(nodes)
    y = points[:, :1] - np.sqrt(4 * VISCOSITY * points[:, 1:]) * z
    exponents = -np.cos(np.pi * y) / (2 * np.pi * VISCOSITY)
    weights = weights * np.exp(exponents - exponents.max(axis=1, keepdims=True))
    return -(weights * np.sin(np.pi * y)).sum(axis=1) / weights.sum(axis=1)


SIDES = ((0, 0), (0, 1), (1, 0), (1, 1))  # but for the last, the end of the time
EQUATIONS = {
    "poisson": Equation((0, 0), (1, 1), SIDES, poisson, poisson_solution),
    "burgers": Equation((-1, 0), (1, 1), SIDES[:3], burgers, burgers_solution),
}


def draw_points(equation, rng, inside=1024, on_sides=192):
    """Draws points that fill the rectangle evenly, and points on its sides.

    Returns:
      Points inside [inside, 2], points on the sides [on_sides, 2], and u there [on_sides].
    """
    # Multiples of two irrational numbers, which Roberts (2018) chose, from a random start.
    plastic = 1.32471795724474602596
    multiples = np.arange(inside)[:, None] / plastic ** np.arange(1, 3)
    unit = (rng.uniform(size=2) + multiples) % 1
    count = len(equation.sides)
    along = (np.arange(on_sides) // count + rng.uniform()) / -(-on_sides // count)
    border = np.stack([along, along], axis=1)
    for i, (axis, end) in enumerate(equation.sides):
        border[i::count, axis] = end
    lower, upper = map(np.array, (equation.lower, equation.upper))
    border = lower + (upper - lower) * border
    return lower + (upper - lower) * unit, border, equation.exact(border)


def make_model(seed, dtype=jnp.float64):
    """Returns a network, as the graph of its modules and its parameters."""
    rngs, layers = nnx.Rngs(seed), []
    for a, b in itertools.pairwise(WIDTHS):
        layers += [nnx.Linear(a, b, param_dtype=dtype, rngs=rngs), nnx.tanh]
    return nnx.split(nnx.Sequential(*layers[:-1]))


def make_loss(equation, graph):
    """Returns a function of the parameters and of points, as `draw_points` makes them."""

    def loss_fn(params, inside, border, values):
        def u(points):
            return nnx.merge(graph, params)(points)[:, 0]

        residuals = equation.residual(u, inside)
        interior = ok.losses.squared_error(residuals, jnp.zeros_like(residuals)).mean()
        return interior + SIDES_WEIGHT * ok.losses.squared_error(u(border), values).mean()

    return loss_fn
