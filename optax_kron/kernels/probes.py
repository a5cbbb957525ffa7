"""The random numbers of one update of PSGD's factors: rows for norm bounds, and white noise.

All that blocks of several shapes need is drawn at once and cut up, as every draw is a kernel of its
own. For blocks [3, 2], and complex ones [4], with a longest axis of 4:

    drawn [32·4 + 6 + 2·4]    rows [32, 4]    noise [1, 3, 2], complex [1, 4]
"""

import functools
import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Inexact

from optax_kron.kernels import flow, linalg

Shape = tuple[tuple[int, ...], bool]  # of a block, and whether it is complex


def draw(
    key: Array, shapes: Sequence[Shape], dtype: DTypeLike, *, noise: bool
) -> Float[Array, " n"]:
    """Standard normal numbers: PROBE_ROWS rows for the norm bounds and, if asked, the noise."""
    width = sum(map(_width, shapes)) if noise else 0
    return jax.random.normal(key, (linalg.PROBE_ROWS * _longest(shapes) + width,), dtype)


def draw_if(
    condition: Bool[Array, ""],
    key: Array,
    shapes: Sequence[Shape],
    dtype: DTypeLike,
    *,
    noise: bool,
) -> Float[Array, " n"]:
    """`draw` where a condition holds, else zeros.

    In a branch of its own: as an operand of the next branch it is drawn once, not once for every
    operation that reads it.
    """
    make = functools.partial(draw, key, shapes, dtype, noise=noise)
    nothing = jnp.zeros(jax.eval_shape(make).shape, dtype)
    return flow.cond(condition, make, lambda: nothing)


def rows(drawn: Float[Array, " n"], shapes: Sequence[Shape]) -> Float[Array, "rows d"]:
    """The rows of a draw, as long as the longest axis of any block."""
    longest = _longest(shapes)
    return drawn[: linalg.PROBE_ROWS * longest].reshape(linalg.PROBE_ROWS, longest)


def noise(
    drawn: Float[Array, " n"], shapes: Sequence[Shape], masks: Iterable[np.ndarray | None]
) -> list[Inexact[Array, "N ..."]]:
    """White noise of every shape, with zeros in the padding.

    The blocks of one shape share it: their fits do not interact, so that each sees white noise that
    is independent of its gradient, and N times fewer numbers are drawn.
    """
    arrays, start = [], linalg.PROBE_ROWS * _longest(shapes)
    for (shape, is_complex), mask in zip(shapes, masks, strict=True):
        stop = start + _width((shape, is_complex))
        x = drawn[start:stop]
        if is_complex:
            x = jax.lax.complex(*jnp.split(x * 0.5**0.5, 2))
        x = x.reshape(1, *shape)
        arrays.append(x if mask is None else x * mask.astype(x.real.dtype))
        start = stop
    return arrays


def _longest(shapes: Sequence[Shape]) -> int:
    return max((max(shape) for shape, _ in shapes), default=1)


def _width(shape: Shape) -> int:
    return math.prod(shape[0]) * (2 if shape[1] else 1)
