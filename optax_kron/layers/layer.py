"""Layers: which parameters form one Kronecker block, and how their arrays become canonical.

Canonical form. A layer is `B` blocks of a linear map from `d_in` to `d_out` numbers, read at `S`
positions of each of `N` data. Its kernel is [B, d_in, d_out]; a bias is one more row of it, whose
input is one. Inputs are [B, N, S, d_in], gradients with respect to outputs [V, B, N, S, d_out],
with V columns whose outer products sum to the curvature of the loss.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from optax_kron.layers.paths import spellings

MAX_SIZE = 8192  # longest axis of a kernel with a dense factor, as in `ok.Blocking`


@dataclasses.dataclass(frozen=True, order=True)
class AxisFactor:
    """A factor of an axis of an array, as a reshape splits it: `(index // stride) % size`."""

    axis: int
    stride: int
    size: int


AxisFactors = tuple[AxisFactor, ...]  # from slow to fast


def spans(shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The ranges of indices of a whole array."""
    return tuple((0, d) for d in shape)


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """How a part of a parameter becomes an array with one axis for every role.

    Attributes:
      shape: of the parameter.
      part: for each axis of the parameter, the range of indices that is meant.
      roles: for each axis of the arranged array, the digits that it enumerates, slow to fast.
    """

    shape: tuple[int, ...]
    part: tuple[tuple[int, int], ...]
    roles: tuple[AxisFactors, ...]

    @property
    def arranged_shape(self) -> tuple[int, ...]:
        """Shape of what `take` returns."""
        return tuple(math.prod(d.size for d in digits) for digits in self.roles)

    @property
    def is_whole(self) -> bool:
        """Whether all of the parameter is meant."""
        return self.part == spans(self.shape)

    def _plan(self) -> tuple[list[int], list[int]]:
        """Sizes of all digits as they are stored, and the transpose into the order of the roles."""
        digits = [d for role in self.roles for d in role]
        stored = sorted(range(len(digits)), key=lambda i: (digits[i].axis, -digits[i].stride))
        return [digits[i].size for i in stored], [stored.index(i) for i in range(len(digits))]

    def take(self, leaf: Array) -> Array:
        """The part of a parameter, arranged."""
        sizes, order = self._plan()
        part = leaf[tuple(slice(*span) for span in self.part)]
        return part.reshape(sizes).transpose(order).reshape(self.arranged_shape)

    def put(self, leaf: Array, arranged: Array) -> Array:
        """Replace the part of a parameter; the inverse of `take`."""
        sizes, order = self._plan()
        inverse = sorted(range(len(order)), key=order.__getitem__)
        part = arranged.reshape([sizes[i] for i in order]).transpose(inverse)
        part = part.reshape([stop - start for start, stop in self.part]).astype(leaf.dtype)
        if self.is_whole:
            return part
        return leaf.at[tuple(slice(*span) for span in self.part)].set(part)


def arrange(shape: Sequence[int], *roles: Sequence[int]) -> Arrangement:
    """All of a parameter, its axes distributed over roles."""
    digits = [tuple(AxisFactor(a, 1, shape[a]) for a in axes if shape[a] != 1) for axes in roles]
    return Arrangement(tuple(shape), spans(shape), tuple(digits))


@dataclasses.dataclass(frozen=True)
class Layer:
    """Parameters that share one Kronecker-factored block of curvature, `A ⊗ G`.

    `find_layers` makes these; by hand, give paths, and axes where the kernel is not [d_in, d_out].

    Args:
      name: of the layer, the key of its taps.
      kernel: path of the kernel, with slashes ("dense/kernel") or as `jax.tree_util.keystr` prints
        it (`"['dense']['kernel']"`). `None`: the layer is a bias alone.
      bias: path of the bias, or `None`.
      block_axes: axes of the kernel, and leading axes of the bias, that count independent blocks.
      out_axes: axes of the kernel that are outputs; all others are inputs.
      is_embedding: whether inputs are integer indices into the rows of the kernel.
      kind: a word for tables.
      max_size: longest axis that has a dense factor: of a kernel with more inputs the input factor
        is diagonal, with more outputs the output factor, and neither is ever formed otherwise. The
        bias's input does not count.
      kernel_view: how the kernel becomes [B, d_in, d_out]; found from the axes if not given.
      bias_view: how the bias becomes [B, d_out].

    Examples:
      >>> import optax_kron as ok
      >>> layer = ok.Layer("dense", kernel="dense/kernel", bias="dense/bias")
    """

    name: str
    kernel: str | None = None
    bias: str | None = None
    block_axes: tuple[int, ...] = ()
    out_axes: tuple[int, ...] = (-1,)
    is_embedding: bool = False
    kind: str = "dense"
    kernel_view: Arrangement | None = None
    bias_view: Arrangement | None = None
    max_size: int = MAX_SIZE

    def __post_init__(self):
        check_max_size(f"Layer {self.name!r}", self.max_size)
        if self.kernel is None and self.bias is None:
            raise ValueError(f"Layer {self.name!r}: give the path of a kernel, of a bias, or both.")
        if self.is_embedding and self.bias is not None:
            raise ValueError(
                f"Layer {self.name!r}: an embedding has a diagonal input factor, which a bias does "
                "not fit; make the bias a layer of its own."
            )

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the parameters, the kernel's first."""
        return tuple(path for path in (self.kernel, self.bias) if path is not None)

    @property
    def blocks(self) -> int:
        """Number B of blocks; known once the views are."""
        return self._view.arranged_shape[0]

    @property
    def d_in(self) -> int:
        """Length of an input, the bias's one included."""
        kernel = 0 if self.kernel_view is None else self.kernel_view.arranged_shape[1]
        return kernel + (self.bias is not None)

    @property
    def d_out(self) -> int:
        """Length of an output."""
        return self._view.arranged_shape[-1]

    @property
    def has_diagonal_input(self) -> bool:
        """Whether the input factor is diagonal: of embeddings, and of kernels with many inputs."""
        return self.is_embedding or bool(self.d_in - (self.bias is not None) > self.max_size)

    @property
    def has_diagonal_output(self) -> bool:
        """Whether the output factor is diagonal: of layers with many outputs."""
        return bool(self.d_out > self.max_size)

    @property
    def _view(self) -> Arrangement:
        view = self.bias_view if self.kernel_view is None else self.kernel_view
        assert view is not None, "views are set by `resolved`"
        return view

    def resolved(self, leaves: Mapping[str, Any]) -> "Layer":
        """The layer with paths as in `leaves`, and views from the shapes.

        Args:
          leaves: arrays or abstract arrays, as `by_path` gives them.

        Raises:
          ValueError: for a path that is not there, or shapes that do not fit each other.
        """
        kernel, bias = (self._find(path, leaves) for path in (self.kernel, self.bias))
        kernel_view, bias_view = self.kernel_view, self.bias_view
        if kernel is not None:
            shape = tuple(leaves[kernel].shape)
            if kernel_view is None:
                kernel_view = self._kernel_view(kernel, shape)
            self._check_shape(kernel, shape, kernel_view)
        if bias is not None:
            shape = tuple(leaves[bias].shape)
            if bias_view is None:
                blocks = range(min(len(self.block_axes), len(shape)))
                bias_view = arrange(shape, blocks, range(len(blocks), len(shape)))
            self._check_shape(bias, shape, bias_view)
            if kernel_view is not None:
                expected = kernel_view.arranged_shape[0], kernel_view.arranged_shape[2]
                if bias_view.arranged_shape != expected:
                    raise ValueError(
                        f"Layer {self.name!r}: the bias {bias} of shape {shape} does not fit the "
                        f"kernel {kernel}, which has {expected[0]} blocks of {expected[1]} outputs."
                    )
        return dataclasses.replace(
            self, kernel=kernel, bias=bias, kernel_view=kernel_view, bias_view=bias_view
        )

    def _find(self, path, leaves):
        if path is None:
            return None
        for spelling in spellings(path):
            if spelling in leaves:
                return spelling
        raise ValueError(
            f"Layer {self.name!r}: no parameter at {path}; there are {', '.join(leaves)}."
        )

    def _kernel_view(self, path, shape):
        ndim = len(shape)
        axes = (*self.block_axes, *self.out_axes)
        if any(not -ndim <= a < ndim for a in axes) or len({a % ndim for a in axes}) != len(axes):
            raise ValueError(
                f"Layer {self.name!r}: block_axes {self.block_axes} and out_axes {self.out_axes} "
                f"must be different axes of the kernel {path} of shape {shape}."
            )
        blocks, outputs = ([a % ndim for a in axes] for axes in (self.block_axes, self.out_axes))
        inputs = [a for a in range(ndim) if a not in (*blocks, *outputs)]
        return arrange(shape, blocks, inputs, outputs)

    def _check_shape(self, path, shape, view):
        if shape != view.shape:
            raise ValueError(
                f"Layer {self.name!r}: {path} has shape {shape}; the layer was found for shape "
                f"{view.shape}. Pass layers that were found for these parameters."
            )

    def take(self, leaves: Mapping[str, Array]) -> Array:
        """The layer's part of a tree like the parameters, [B, d_in, d_out], the bias's row last."""
        rows = []
        if self.kernel is not None and self.kernel_view is not None:
            rows.append(self.kernel_view.take(leaves[self.kernel]))
        if self.bias is not None and self.bias_view is not None:
            rows.append(self.bias_view.take(leaves[self.bias])[:, None])
        dtype = jnp.result_type(*rows)
        return jnp.concatenate([x.astype(dtype) for x in rows], axis=1)

    def put(self, leaves: dict[str, Array], canonical: Array) -> None:
        """Replace the layer's part of a tree; the inverse of `take`, in place of the mapping."""
        last = canonical.shape[1]
        if self.bias is not None and self.bias_view is not None:
            last -= 1
            leaves[self.bias] = self.bias_view.put(leaves[self.bias], canonical[:, last])
        if self.kernel is not None and self.kernel_view is not None:
            kernel = self.kernel_view.put(leaves[self.kernel], canonical[:, :last])
            leaves[self.kernel] = kernel


def check_max_size(owner: str, size: Any) -> None:
    """Raise unless a longest axis is an integer that is not negative."""
    whole = isinstance(size, int | np.integer) and not isinstance(size, bool)
    if not whole or size < 0:
        raise ValueError(f"{owner}: max_size must be an integer ≥ 0; got {size!r}.")
