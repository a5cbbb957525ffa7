"""The random numbers of one update of PSGD's factors: rows for norm bounds, and white noise.

All that blocks of several shapes need is drawn at once and cut up, as every draw is a kernel of its
own. For blocks [3, 2], and complex ones [4], with a longest axis of 4:

    drawn [32·4 + 6 + 2·4]    rows [32, 4]    noise [1, 3, 2], complex [1, 4]
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Inexact

from optax_kron.kernels import linalg

Shape = tuple[tuple[int, ...], bool]  # of a block, and whether it is complex


def draw(
    key: Array, shapes: Sequence[Shape], dtype: DTypeLike, *, noise: bool
) -> Float[Array, " n"]:
    """Standard normal numbers: PROBE_ROWS rows for the norm bounds and, if asked, the noise."""
    width = sum(map(_width, shapes)) if noise else 0
    return jax.random.normal(key, (linalg.PROBE_ROWS * _longest(shapes) + width,), dtype)


def rows(drawn: Float[Array, " n"], shapes: Sequence[Shape]) -> Float[Array, "rows d"]:
    """The rows of a draw, as long as the longest axis of any block."""
    longest = _longest(shapes)
    return drawn[: linalg.PROBE_ROWS * longest].reshape(linalg.PROBE_ROWS, longest)


def noise(drawn: Float[Array, " n"], shapes: Sequence[Shape]) -> list[Inexact[Array, "1 ..."]]:
    """White noise of every shape.

    The blocks of one shape share it: their fits do not interact, so that each sees white noise that
    is independent of its gradient, and N times fewer numbers are drawn.
    """
    arrays, start = [], linalg.PROBE_ROWS * _longest(shapes)
    for shape, is_complex in shapes:
        stop = start + _width((shape, is_complex))
        x = drawn[start:stop]
        if is_complex:
            x = jax.lax.complex(*jnp.split(x * 0.5**0.5, 2))
        arrays.append(x.reshape(1, *shape))
        start = stop
    return arrays


def _longest(shapes: Sequence[Shape]) -> int:
    return max((max(shape) for shape, _ in shapes), default=1)


def _width(shape: Shape) -> int:
    return math.prod(shape[0]) * (2 if shape[1] else 1)
