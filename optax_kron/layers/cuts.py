"""Long axes with a diagonal factor, cut into blocks, each with its share of that factor.

Across such an axis the curvature `A ⊗ G` has no terms, so that nothing is lost. What is kept for
every element can then be on several devices; the other factor is the same in all blocks.
"""

# Worked example: a table [1000, 256], whose input factor is diagonal, with block_size=128.
#
#   as its taps see it    kernel [1, 1000, 256]    A [1, 1000]    G [1, 256, 256]
#   cut in 8              kernel [8, 125, 256]     A [8, 125]     G [8, 256, 256], all equal

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from optax_kron.layers.layer import AxisFactor, AxisFactors, Layer, declared
from optax_kron.layers.taps import Moments

_TOO_SHORT = 8  # blocks may not be shorter than block_size by more


@dataclasses.dataclass(frozen=True)
class Cut:
    """Into how many blocks the inputs, or the outputs, of each of B blocks are cut: C in all."""

    inputs: int = 1
    outputs: int = 1

    @property
    def pieces(self) -> int:
        """Number of blocks that each block becomes."""
        return self.inputs * self.outputs

    def repeated(self, x: Shaped[Array, "B ..."]) -> Shaped[Array, "C ..."]:
        """What is the same for all blocks that one becomes."""
        return x if self.pieces == 1 else jnp.repeat(x, self.pieces, axis=0)

    def moments(self, moments: Moments) -> Moments:
        """The second moments of the blocks, from those of the layer as its taps see it."""
        if self.pieces == 1:
            return moments
        A, G, weight = moments
        blocks = len(weight) * self.pieces
        if self.inputs > 1:  # A is diagonal
            return Moments(A.reshape(blocks, -1), self.repeated(G), self.repeated(weight))
        return Moments(self.repeated(A), G.reshape(blocks, -1), self.repeated(weight))

    def values(self, x: Float[Array, "B d_in d_out"]) -> Float[Array, "C in_of_c out_of_c"]:
        """The blocks of an array like the kernel."""
        if self.pieces == 1:
            return x
        blocks, d_in, d_out = x.shape
        x = x.reshape(blocks, self.inputs, d_in // self.inputs, self.outputs, d_out // self.outputs)
        return jnp.moveaxis(x, 3, 2).reshape(blocks * self.pieces, *x.shape[2::2])

    def first(self, x: Shaped[Array, "C ..."] | None) -> Shaped[Array, "B ..."] | None:
        """What the first of the blocks that one becomes has."""
        return None if x is None else x[:: self.pieces]

    def agrees(self, x: Shaped[Array, "C ..."] | None) -> Bool[Array, " C"] | bool:
        """Whether blocks have what the first of those that one becomes has."""
        if x is None or self.pieces == 1:
            return True
        same = x == self.repeated(x[:: self.pieces])
        return jnp.all(same, axis=tuple(range(1, x.ndim)))


def cut_layer(owner: str, layer: Layer, block_size: int | None) -> tuple[Layer, Cut]:
    """A layer whose longest axis with a diagonal factor is in blocks of at most that length.

    Args:
      owner: Name of the optimizer, for messages.
      layer: The layer, `resolved`.
      block_size: That length, or `None`: it stays whole. So do inputs that share their axis with
        that of a bias.

    Raises:
      ValueError: If the axis has no divisor which leaves blocks that are not much shorter.
    """
    if block_size is None or layer.kernel_view is None:
        return layer, Cut()
    lengths = [
        layer.d_in if layer.has_diagonal_input and layer.bias is None else 0,
        layer.d_out if layer.has_diagonal_output else 0,
    ]
    side = int(np.argmax(lengths))
    if lengths[side] <= block_size:
        return layer, Cut()
    blocks, *sides = layer.kernel_view.roles
    pieces = _pieces(owner, layer, sides[side], block_size)
    slow, sides[side] = _split(sides[side], pieces)
    kernel = dataclasses.replace(layer.kernel_view, roles=((*blocks, slow), *sides))
    bias = layer.bias_view
    if bias is not None:
        blocks, outputs = bias.roles
        slow, outputs = _split(outputs, pieces)
        bias = dataclasses.replace(bias, roles=((*blocks, slow), outputs))
    # In blocks the axis may be short enough for a dense factor: it still has a diagonal one.
    diagonal = layer.has_diagonal_input, layer.has_diagonal_output
    made = declared(layer, diagonal, kernel_view=kernel, bias_view=bias)
    return made, Cut(**{("inputs", "outputs")[side]: pieces})


def _pieces(owner: str, layer: Layer, role: AxisFactors, block_size: int) -> int:
    """Into how many blocks an axis is cut."""
    length, slowest = math.prod(factor.size for factor in role), role[0].size
    least, most = -(-length // block_size), _TOO_SHORT * length // block_size
    found = next((n for n in range(least, most + 1) if slowest % n == 0), None)
    if found is None:
        raise ValueError(
            f"{owner}: layer {layer.name!r}: an axis of {length} cannot be cut into equal blocks "
            f"of at most block_size={block_size} and at least an eighth of that. Fill it up to a "
            "multiple of a power of two, or take another block_size, or None."
        )
    return found


def _split(role: AxisFactors, pieces: int) -> tuple[AxisFactor, AxisFactors]:
    """The factor that counts the blocks, and those that count within one."""
    first, *rest = role
    size = first.size // pieces
    slow = AxisFactor(first.axis, first.stride * size, pieces)
    return slow, (AxisFactor(first.axis, first.stride, size), *rest)
