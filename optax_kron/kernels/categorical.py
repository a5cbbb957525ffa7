"""Labels from categorical distributions, one random number for each.

The usual way adds Gumbel noise to all logits: with 50,000 classes as many random numbers a label,
which take ten times as long as the softmax. Here a label is where the cumulative sum of the
probabilities passes a uniform number. The sum is of two levels, so that it costs little more than
to read the probabilities.
"""

# Of 300 classes: 3 blocks of 128, the last one padded. A uniform number first finds its block by
# the cumulative sum of 3 masses, and then its class by that of 128.

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

_BLOCK = 128


def draw(key: Array, probabilities: Float[Array, "*batch C"], samples: int) -> Int[Array, "V ..."]:
    """Labels from each distribution. One of probability zero is never drawn, if there is another.

    Args:
      key: A key of `jax.random`.
      probabilities: At least zero; they need not sum to one.
      samples: How many labels of each.

    Returns:
      The labels. A probability is met to the rounding of the dtype: 1e-7 in float32. Cost:
      3·samples·C operations for each distribution.
    """
    *batch, classes = probabilities.shape
    uniform = jax.random.uniform(key, (samples, *batch), probabilities.dtype)
    if classes <= _BLOCK:
        return _passed(probabilities[None], uniform * jnp.sum(probabilities[None], axis=-1))[0]
    padding = [(0, 0)] * len(batch) + [(0, -classes % _BLOCK)]
    blocks = jnp.pad(probabilities, padding).reshape(1, *batch, -1, _BLOCK)
    masses = jnp.sum(blocks, axis=-1)
    block, left = _passed(masses, uniform * jnp.sum(masses, axis=-1))
    # As a sum, not a lookup, for the classes may be sharded.
    numbers = jnp.arange(masses.shape[-1]).reshape(*[1] * len(batch), 1, -1)
    row = jnp.sum(jnp.where((numbers == block[..., None])[..., None], blocks, 0), axis=-2)
    return jnp.minimum(block * _BLOCK + _passed(row, left)[0], classes - 1)


def _passed(
    masses: Float[Array, "V_or_1 ... K"], target: Float[Array, "V ..."]
) -> tuple[Int[Array, "V ..."], Float[Array, "V ..."]]:
    """The first place where the cumulative sum is above a target, and the target within it."""
    sums = jnp.cumsum(masses, axis=-1)
    # Sums of many numbers are those of a tree: by rounding, one may be larger than that before it
    # where there is no mass; and a target that is rounded up to the largest passes all of them.
    has_mass = masses > 0
    top = jnp.max(jnp.where(has_mass, sums, 0), axis=-1)
    target = jnp.minimum(target, jnp.nextafter(top, jnp.zeros_like(top)))
    below = sums <= target[..., None]
    last = masses.shape[-1] - 1  # where there is no mass at all, and for NaN
    numbers = jnp.arange(last + 1).reshape(*[1] * (masses.ndim - 1), -1)
    place = jnp.min(jnp.where(has_mass & ~below, numbers, last), axis=-1)
    return place, target - jnp.max(jnp.where(below, sums, 0), axis=-1)
