"""Stochastic rounding: numbers go up or down at random, so that in the mean nothing is lost.

Rounded to nearest, a moving average in bfloat16 stops where a step would change it by less than
half of its last bit, 2⁻⁹ of it. Rounded stochastically it goes up with the probability of what is
cut off: 1 + 2⁻¹⁰, between the neighbours 1 and 1 + 2⁻⁷, becomes the latter once in eight times.

    bits of 1 + 2⁻¹⁰      0 01111111 0000000 | 0010000000000000
    plus random bits                           xxxxxxxxxxxxxxxx   carries with probability 2¹³/2¹⁶
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Inexact, UInt16

_MANTISSA = 23  # bits of float32
_RANDOM = 16  # bits for each number


def is_narrower(dtype: DTypeLike, than: DTypeLike) -> bool:
    """Whether a real dtype has fewer bits than float32, and fewer than another; none is complex."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return False
    return jnp.finfo(dtype).bits < min(32, jnp.finfo(than).bits)


def stochastic(
    x: Inexact[Array, "*shape"], dtype: DTypeLike, random: UInt16[Array, "*shape"]
) -> Inexact[Array, "*shape"]:
    """Numbers in a narrower dtype, each rounded up or down with the mean that it is.

    What the dtype holds stays as it is, as do infinities, NaN and signs. The probabilities are
    multiples of 2⁻¹⁶: for bfloat16 and normal numbers of float16 the mean is exact, else to 2⁻¹⁶ of
    the distance of the neighbours. What lies beyond the largest number may become infinite. The
    derivative is that of the identity.

    Args:
      x: Numbers. Those of more than 32 bits are rounded to float32 first, to nearest.
      dtype: That of the result. Where it does not have fewer bits than float32 and than `x`,
        rounding is to nearest: such errors are too small to add up.
      random: Uniform bits.

    Source: for training in few bits, Gupta et al. (2015), arXiv:1502.02551; of optimizer states in
    bfloat16, Zamirai et al. (2020), arXiv:2010.06192.
    """
    if not is_narrower(dtype, x.dtype):
        return x.astype(dtype)
    return _stochastic(x.astype(jnp.float32), jnp.dtype(dtype), random)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _stochastic(x, dtype, random):
    kind = jnp.finfo(dtype)
    dropped = _MANTISSA - int(kind.nmant)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    added = random.astype(jnp.uint32)
    added = added << (dropped - _RANDOM) if dropped > _RANDOM else added >> (_RANDOM - dropped)
    # A carry out of the mantissa makes the exponent one more, as it should.
    cut = ((bits + added) >> dropped) << dropped
    rounded = jax.lax.bitcast_convert_type(cut, jnp.float32)
    if float(kind.tiny) > float(jnp.finfo(jnp.float32).tiny):
        rounded = jnp.where(jnp.abs(x) < kind.tiny, _evenly(x, kind, random), rounded)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(dtype)


@_stochastic.defjvp
def _stochastic_jvp(dtype, primals, tangents):
    return _stochastic(primals[0], dtype, primals[1]), tangents[0].astype(dtype)


def _evenly(x, kind, random):
    """Numbers below the smallest normal one, where all neighbours are equally far apart."""
    step = float(kind.smallest_subnormal)
    steps = jnp.abs(x) / step  # a power of two: exact
    whole = jnp.floor(steps)
    up = random.astype(jnp.float32) / 2**_RANDOM < steps - whole
    return jnp.copysign((whole + up) * step, x)
