"""Layers: which parameters form one Kronecker block, and how their arrays become canonical.

Canonical form. A layer is `B` blocks of a linear map from `d_in` to `d_out` numbers, applied at `S`
positions of each of `N` examples. Its kernel is [B, d_in, d_out]; a bias is one more row of it,
whose input is one. Inputs are [B, N, S, d_in], gradients with respect to outputs
[V, B, N, S, d_out], with V columns whose outer products sum to the curvature of the loss.
"""

# Worked example: a convolution, kernel [3, 3, 8, 32] in HWIO layout, with a bias [32].
#
#   from arrange(shape, (), (0, 1, 2), (3,))      roles
#     blocks                                      ()                  of size 1
#     inputs: height, width and channels          (axis 0, 1, 2)      of size 3·3·8 = 72
#     outputs                                     (axis 3,)           of size 32
#   `take` of the kernel is [1, 72, 32]; with the bias as last row the layer is [1, 73, 32],
#   so that d_in = 73 and d_out = 32. Of a 16×16 image there are S = 256 positions.
#
# In a grouped convolution with 4 groups the last axis [32] counts groups and their 8 outputs, and a
# role takes a factor of it, `(index // stride) % size`:
#
#   kernel [3, 3, 2, 32]    blocks: AxisFactor(axis=3, stride=8, size=4), slow
#                           outputs: AxisFactor(axis=3, stride=1, size=8), fast
#   `take` reshapes to [3, 3, 2, 4, 8], transposes to (3, 0, 1, 2, 4), and merges into [4, 18, 8].

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from optax_kron.layers.paths import Leaf, spellings

MAX_SIZE = 8192  # longest axis of a kernel with a dense factor, as in `ok.Blocking`


@dataclasses.dataclass(frozen=True, order=True)
class AxisFactor:
    """A factor of an axis of an array, as a reshape splits it: `(index // stride) % size`."""

    axis: int
    stride: int
    size: int


AxisFactors = tuple[AxisFactor, ...]  # from slow to fast


def spans(shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The ranges of indices of a full array."""
    return tuple((0, d) for d in shape)


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """How a part of a parameter becomes an array with one axis for every role.

    Attributes:
      shape: Shape of the parameter.
      part: The range of indices that is meant, for each axis of the parameter.
      roles: The axis factors that each axis of the arranged array enumerates, slow to fast.
    """

    shape: tuple[int, ...]
    part: tuple[tuple[int, int], ...]
    roles: tuple[AxisFactors, ...]

    @property
    def arranged_shape(self) -> tuple[int, ...]:
        """Shape of what `take` returns."""
        return tuple(math.prod(factor.size for factor in role) for role in self.roles)

    @property
    def is_whole(self) -> bool:
        """Whether all of the parameter is meant."""
        return self.part == spans(self.shape)

    def _stored(self) -> tuple[list[int], list[int]]:
        """Sizes of all factors in order of memory, and the transpose to the order of the roles."""
        factors = [factor for role in self.roles for factor in role]
        # Axes come in order, and within an axis the slow factor, of large stride, first.
        stored = sorted(range(len(factors)), key=lambda i: (factors[i].axis, -factors[i].stride))
        return [factors[i].size for i in stored], [stored.index(i) for i in range(len(factors))]

    def take(self, leaf: Shaped[Array, "*shape"]) -> Shaped[Array, "*arranged"]:
        """The part of a parameter, arranged."""
        sizes, order = self._stored()
        part = leaf[tuple(slice(*span) for span in self.part)]
        return part.reshape(sizes).transpose(order).reshape(self.arranged_shape)

    def put(
        self, leaf: Shaped[Array, "*shape"], arranged: Shaped[Array, "*arranged"]
    ) -> Shaped[Array, "*shape"]:
        """Replace the part of a parameter; the inverse of `take`."""
        sizes, order = self._stored()
        inverse = sorted(range(len(order)), key=order.__getitem__)
        part = arranged.reshape([sizes[i] for i in order]).transpose(inverse)
        part = part.reshape([stop - start for start, stop in self.part]).astype(leaf.dtype)
        if self.is_whole:
            return part
        return leaf.at[tuple(slice(*span) for span in self.part)].set(part)


def arrange(shape: Sequence[int], *roles: Sequence[int]) -> Arrangement:
    """All of a parameter, its axes distributed over roles."""
    factors = [tuple(AxisFactor(a, 1, shape[a]) for a in axes if shape[a] != 1) for axes in roles]
    return Arrangement(tuple(shape), spans(shape), tuple(factors))


@dataclasses.dataclass(frozen=True)
class Layer:
    """Parameters that share one Kronecker-factored block of curvature, `A ⊗ G`.

    `find_layers` makes these; by hand, give paths, and axes where the kernel is not [d_in, d_out].

    Args:
      name: Name of the layer, the key of its taps.
      kernel: Path of the kernel, with slashes ("dense/kernel") or as `jax.tree_util.keystr` prints
        it (`"['dense']['kernel']"`). `None`: the layer is a bias alone.
      bias: Path of the bias, or `None`.
      block_axes: Axes of the kernel, and leading axes of the bias, that count independent blocks.
      out_axes: Axes of the kernel that are outputs; all others are inputs.
      is_embedding: Whether inputs are integer indices into the rows of the kernel.
      kind: The kind of layer that `print(layers)` shows.
      max_size: Longest axis that has a dense factor: of a kernel with more inputs the input factor
        is diagonal, with more outputs the output factor, and neither is ever formed otherwise. The
        bias's input does not count.
      kernel_view: How the kernel becomes [B, d_in, d_out]; found from the axes if not given.
      bias_view: How the bias becomes [B, d_out].
      is_tied: Whether an embedding is also the head of the model, `h @ table.T`: then its taps are
        those of lookups, and those of the head, whose inputs are h and whose outputs are rows.

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
    is_tied: bool = False

    def __post_init__(self) -> None:
        check_max_size(f"Layer {self.name!r}", self.max_size)
        if self.kernel is None and self.bias is None:
            raise ValueError(f"Layer {self.name!r}: give the path of a kernel, of a bias, or both.")
        if self.is_embedding and self.bias is not None:
            raise ValueError(
                f"Layer {self.name!r}: an embedding has a diagonal input factor, which a bias does "
                "not fit; make the bias a layer of its own."
            )
        if self.is_tied and not self.is_embedding:
            raise ValueError(f"Layer {self.name!r}: is_tied=True needs is_embedding=True.")

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the parameters, the kernel's first."""
        return tuple(path for path in (self.kernel, self.bias) if path is not None)

    @property
    def blocks(self) -> int:
        """Number B of blocks, once the layer is `resolved`."""
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
    def table_rows(self) -> int | None:
        """Number of rows that the inputs are indices of; `None` unless it is an embedding."""
        return self.d_in if self.is_embedding else None

    @property
    def views(self) -> tuple[tuple[str, Arrangement], ...]:
        """Path and view of each parameter, the kernel's first; of those that have a view."""
        pairs = (self.kernel, self.kernel_view), (self.bias, self.bias_view)
        return tuple((path, view) for path, view in pairs if path is not None and view is not None)

    @property
    def has_diagonal_input(self) -> bool:
        """Whether the input factor is diagonal: of embeddings, and of kernels with many inputs."""
        return self.is_embedding or bool(self.d_in - (self.bias is not None) > self.max_size)

    @property
    def has_diagonal_output(self) -> bool:
        """Whether the output factor is diagonal: of layers with many outputs."""
        return bool(self.d_out > self.max_size)

    @property
    def has_alike_uses(self) -> bool:
        """Whether second moments of a tied embedding would not tell which use they are of."""
        return self.is_tied and self.d_in == self.d_out > self.max_size

    @property
    def _view(self) -> Arrangement:
        view = self.bias_view if self.kernel_view is None else self.kernel_view
        assert view is not None, "views are set by `resolved`"
        return view

    def resolved(self, leaves: Mapping[str, Leaf]) -> "Layer":
        """The layer with paths as in `leaves`, and views from the shapes.

        Args:
          leaves: Arrays or abstract arrays, as `by_path` gives them.

        Raises:
          ValueError: For a path that is not there, or shapes that do not fit each other.
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
                blocks, _, outputs = kernel_view.arranged_shape
                if bias_view.arranged_shape != (blocks, outputs):
                    raise ValueError(
                        f"Layer {self.name!r}: the bias {bias} of shape {shape} does not fit the "
                        f"kernel {kernel}, which has {blocks} blocks of {outputs} outputs."
                    )
        layer = dataclasses.replace(
            self, kernel=kernel, bias=bias, kernel_view=kernel_view, bias_view=bias_view
        )
        if layer.has_alike_uses:
            raise ValueError(
                f"Layer {self.name!r}: a tied embedding with as many rows as outputs, "
                f"{layer.d_out}, needs max_size ≥ {layer.d_out}; got {self.max_size}."
            )
        return layer

    def _find(self, path: str | None, leaves: Mapping[str, Leaf]) -> str | None:
        """The key of `leaves` that a path means."""
        if path is None:
            return None
        for spelling in spellings(path):
            if spelling in leaves:
                return spelling
        raise ValueError(
            f"Layer {self.name!r}: no parameter at {path}; there are {', '.join(leaves)}."
        )

    def _kernel_view(self, path: str, shape: tuple[int, ...]) -> Arrangement:
        """The view of a kernel by `block_axes` and `out_axes`, which may count from the end."""
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

    def _check_shape(self, path: str, shape: tuple[int, ...], view: Arrangement) -> None:
        if shape != view.shape:
            raise ValueError(
                f"Layer {self.name!r}: {path} has shape {shape}; the layer was found for shape "
                f"{view.shape}. Pass layers that were found for these parameters."
            )

    def take(self, leaves: Mapping[str, Array]) -> Shaped[Array, "B d_in d_out"]:
        """The layer's part of a tree like the parameters, the bias's row last."""
        parts = [view.take(leaves[path]) for path, view in self.views]
        if self.bias is not None:
            parts[-1] = parts[-1][:, None]
        dtype = jnp.result_type(*parts)
        return jnp.concatenate([x.astype(dtype) for x in parts], axis=1)

    def put(self, leaves: dict[str, Array], canonical: Shaped[Array, "B d_in d_out"]) -> None:
        """Replace the layer's part of a tree; the inverse of `take`, in place of the mapping."""
        rows = [canonical]
        if self.bias is not None:
            last = canonical.shape[1] - 1
            rows = [canonical[:, :last]] if self.kernel is not None else []
            rows.append(canonical[:, last])
        for (path, view), part in zip(self.views, rows, strict=True):
            leaves[path] = view.put(leaves[path], part)


@dataclasses.dataclass(frozen=True)
class DeclaredLayer(Layer):
    """A layer of which is known which factors are diagonal, whatever the lengths of its axes.

    Attributes:
      diagonal: Whether its input factor, and its output factor, are.
    """

    diagonal: tuple[bool, bool] = (False, False)

    @property
    def has_diagonal_input(self) -> bool:
        """See `Layer`."""
        return self.diagonal[0]

    @property
    def has_diagonal_output(self) -> bool:
        """See `Layer`."""
        return self.diagonal[1]


def declared(layer: Layer, diagonal: tuple[bool, bool], **changes: Any) -> DeclaredLayer:
    """The layer with other attributes, and as many diagonal factors as are declared."""
    given: dict[str, Any] = {f.name: getattr(layer, f.name) for f in dataclasses.fields(Layer)}
    return DeclaredLayer(**(given | changes), diagonal=diagonal)


def check_max_size(owner: str, size: object) -> None:
    """Raise unless a longest axis is an integer that is not negative."""
    if not isinstance(size, int | np.integer) or isinstance(size, bool) or size < 0:
        raise ValueError(f"{owner}: max_size must be an integer ≥ 0; got {size!r}.")
