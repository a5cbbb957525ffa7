"""How parameter leaves become equal blocks, stacked, and exactly leaves again.

A leaf of shape [s_1, ..., s_m, d_1, ..., d_k] (the first m axes stacked, as in scanned layers) is
taken apart in four steps, each a reshape, a pad or a transpose, so that joining is exact:

1. merge: neighbouring small axes become one;
2. cut: a long axis becomes equal pieces, the last one padded with zeros if need be;
3. order: the axes of a block are sorted by size, so that [m, n] and [n, m] are one kind of block;
4. stack: blocks of one signature, from any leaves, form one array [N, *block shape]; vectors of
   similar length are padded to share one.

A signature says the shape of a block and which of its axes get a diagonal factor. Compile time
grows with the number of signatures, not of leaves, and a mesh can cut the axis N.
"""

import collections
import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from optax_kron.kernels.contract import complex_like

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Blocking:
    """How parameters are merged, cut and stacked into blocks, and which axes get dense factors.

    An axis of a block gets a diagonal factor if it has one element or fewer, if it is longer than
    `max_size`, if `d² > max_skew · n` with n the elements of the block, or, with `max_skew=None`,
    if it holds all elements of the block (d = n), as the axis of a vector does. All other axes get
    a dense factor [d, d].

    Args:
      max_size: longest axis that gets a dense factor.
      max_skew: how much larger a dense factor may be than the block that it preconditions.
      block_size: axes longer than this are cut into equal pieces of at most this length. The last
        piece is padded with zeros, which are masked wherever they could be seen. `None`: no cuts.
      max_cut: longest axis that is cut. Of a vocabulary every piece would get a dense factor, which
        together have many times the elements of the parameter; left whole, an axis longer than
        `max_size` gets a diagonal factor. `None`: all are cut.
      dense_axes: how many axes of a block may get a dense factor, the shortest first, and the
        rightmost first among equals. `None`: all.
      merge_below: neighbouring axes are merged while their product is at most this. `None`: none.
      stacked_axes: leading axes that stack independent tensors (scanned layers, ensembles) and get
        no factor: one number for every leaf, a pytree of numbers with the structure of the
        parameters, or a function of a leaf's path (as `jax.tree_util.keystr` prints it) and shape.
        Axes beyond the leaf's own are ignored. `None`: none.

    Raises:
      ValueError: if a size is not a positive integer, or `max_skew` is negative.

    Examples:
      >>> import optax_kron as ok
      >>> tx = ok.kron_psgd(1e-3, blocking=ok.Blocking(max_size=1024, block_size=512))
    """

    max_size: int = 8192
    max_skew: float | None = None
    block_size: int | None = None
    merge_below: int | None = None
    stacked_axes: int | Callable[[str, tuple[int, ...]], int] | PyTree | None = None
    dense_axes: int | None = None
    max_cut: int | None = None

    def __post_init__(self):
        least = {"max_size": 0, "block_size": 1, "merge_below": 1, "max_cut": 1, "dense_axes": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None or name == "max_size":
                # Numbers of NumPy become Python's, so that equal settings are the same.
                object.__setattr__(self, name, _size(name, value, least=bound))
        skew = self.max_skew
        if skew is not None and not (_is_number(skew) and skew >= 0):
            raise ValueError(f"Blocking: max_skew must be None or ≥ 0; got {self.max_skew!r}.")
        if _is_number(self.stacked_axes):
            stacked = _size("stacked_axes", self.stacked_axes, least=0)
            object.__setattr__(self, "stacked_axes", stacked)

    def _diagonal(self, shape: tuple[int, ...]) -> tuple[bool, ...]:
        """For each axis of a block, whether its factor is diagonal."""
        count = math.prod(shape)

        def rule(size):
            skewed = size == count if self.max_skew is None else size**2 > self.max_skew * count
            return size <= 1 or size > self.max_size or skewed

        diagonal = [rule(size) for size in shape]
        if self.dense_axes is not None:
            dense = sorted((size, -axis) for axis, size in enumerate(shape) if not diagonal[axis])
            for _, axis in dense[self.dense_axes :]:
                diagonal[-axis] = True
        return tuple(diagonal)

    def _pieces(self, size: int) -> int:
        """How many pieces an axis is cut into."""
        if self.block_size is None or (self.max_cut is not None and size > self.max_cut):
            return 1
        return -(-size // self.block_size)

    def _merged(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape with neighbouring small axes merged, from the left."""
        merged: list[int] = []
        for size in shape:
            if merged and self.merge_below and merged[-1] * size <= self.merge_below:
                merged[-1] *= size
            else:
                merged.append(size)
        return tuple(merged)

    def _stacked(self, tree: PyTree) -> list[int]:
        """For each leaf of the tree, how many leading axes are stacked."""
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        setting: Any = self.stacked_axes
        if setting is None or _is_number(setting):
            numbers = [setting or 0] * len(leaves)
        # A tree of numbers may be callable too, as a model is.
        elif callable(setting) and jax.tree_util.all_leaves([setting]):
            numbers = [
                _count_stacked(setting, jax.tree_util.keystr(path), jnp.shape(x))
                for path, x in leaves
            ]
        else:
            numbers = _numbers_by_path(setting, [path for path, _ in leaves])
        return [
            min(_size(f"stacked_axes of {jax.tree_util.keystr(path)}", n, least=0), jnp.ndim(x))
            for n, (path, x) in zip(numbers, leaves, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Signature:
    """What blocks of one stack have in common.

    Attributes:
      shape: of a block, sizes descending.
      diagonal: for each axis, whether its factor is diagonal.
      is_complex: whether the elements are complex.
    """

    shape: tuple[int, ...]
    diagonal: tuple[bool, ...]
    is_complex: bool

    @property
    def size(self) -> int:
        """Number of elements of a block, padding included."""
        return math.prod(self.shape)

    @property
    def label(self) -> str:
        """A short name, such as "1024x256" or "256diag", that keys the stack in a state."""
        sizes = (
            f"{d}diag" if x else str(d) for d, x in zip(self.shape, self.diagonal, strict=True)
        )
        return "x".join(sizes) + ("_complex" if self.is_complex else "")


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """How one leaf is taken apart.

    Attributes:
      path: of the leaf, for messages.
      shape: of the leaf.
      dtype: of the leaf.
      stacked: elements along the stacked axes.
      merged: shape after merging, without stacked axes; [1] for a scalar.
      pieces: number of pieces of each merged axis.
      order: which merged axis each axis of a block is.
      signature: of its blocks.
    """

    path: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    stacked: int
    merged: tuple[int, ...]
    pieces: tuple[int, ...]
    order: tuple[int, ...]
    signature: Signature

    @property
    def count(self) -> int:
        """Number of blocks."""
        return self.stacked * math.prod(self.pieces)

    @property
    def _piece_sizes(self) -> tuple[int, ...]:
        sizes = [0] * len(self.order)
        for size, axis in zip(self.signature.shape, self.order, strict=True):
            sizes[axis] = size
        return tuple(sizes)

    def _axes(self) -> tuple[int, ...]:
        """The transpose from [stacked, p_1, b_1, p_2, b_2, ...] to [stacked, p..., b...]."""
        k = len(self.merged)
        return (0, *range(1, 2 * k, 2), *(2 + 2 * i for i in self.order))

    def split(self, leaf: Array) -> Array:
        """[*shape] to [count, *block shape]."""
        x = leaf.reshape(self.stacked, *self.merged)
        padded = [n * b for n, b in zip(self.pieces, self._piece_sizes, strict=True)]
        padding = [(0, p - d) for p, d in zip(padded, self.merged, strict=True)]
        if any(after for _, after in padding):
            x = jnp.pad(x, [(0, 0), *padding])
        cut = [size for pair in zip(self.pieces, self._piece_sizes, strict=True) for size in pair]
        x = x.reshape(self.stacked, *cut).transpose(self._axes())
        return x.reshape(self.count, *self.signature.shape)

    def join(self, blocks: Array) -> Array:
        """[count, *block shape] to [*shape]; the inverse of `split`."""
        x = blocks.reshape(self.stacked, *self.pieces, *self.signature.shape)
        x = x.transpose(np.argsort(self._axes()))
        padded = [n * b for n, b in zip(self.pieces, self._piece_sizes, strict=True)]
        x = x.reshape(self.stacked, *padded)
        return x[(slice(None), *map(slice, self.merged))].reshape(self.shape)

    def sizes(self) -> np.ndarray:
        """Valid extent of every block along each of its axes, int [count, k]."""
        extents = [
            np.minimum(d - b * np.arange(n), b)
            for d, n, b in zip(self.merged, self.pieces, self._piece_sizes, strict=True)
        ]
        grid = np.stack(np.meshgrid(*extents, indexing="ij"), axis=-1)
        grid = grid.reshape(-1, len(self.merged))[:, list(self.order)]
        return np.tile(grid, (self.stacked, 1))


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """How a tree of parameters is taken apart into stacks, one per signature.

    Attributes:
      treedef: of the tree.
      leaves: plan of each leaf, `None` for an empty one.
      stacks: the signatures by label, in order of first appearance.
    """

    treedef: Any
    leaves: tuple[LeafPlan | None, ...]
    stacks: Mapping[str, Signature] = dataclasses.field(hash=False)

    def members(self, label: str) -> list[tuple[int, LeafPlan]]:
        """The leaves in a stack, in order, with their position in the tree."""
        return [
            (i, leaf)
            for i, leaf in enumerate(self.leaves)
            if leaf is not None and leaf.signature.label == label
        ]

    def count(self, label: str) -> int:
        """Number of blocks in a stack."""
        return sum(leaf.count for _, leaf in self.members(label))

    def sizes(self, label: str) -> tuple[np.ndarray, ...] | None:
        """Valid extents along each axis, int [N] per axis; `None` if no block is padded."""
        sizes = np.concatenate([leaf.sizes() for _, leaf in self.members(label)])
        if (sizes == np.array(self.stacks[label].shape)).all():
            return None
        return tuple(sizes.T)

    def mask(self, label: str) -> np.ndarray | None:
        """Where the blocks of a stack hold elements, bool [N, *block shape]; `None` if everywhere.

        An axis without padding has length one in the mask.
        """
        sizes = self.sizes(label)
        if sizes is None:
            return None
        mask = np.ones((1,) * (1 + len(sizes)), bool)
        for axis, (size, length) in enumerate(zip(sizes, self.stacks[label].shape, strict=True)):
            if (size < length).any():
                valid = np.arange(length) < size[:, None]
                others = tuple(j + 1 for j in range(len(sizes)) if j != axis)
                mask = mask & np.expand_dims(valid, others)
        return mask

    def split(self, tree: PyTree, dtype: DTypeLike) -> dict[str, Array]:
        """Take a tree apart into stacks [N, *block shape].

        Args:
          tree: arrays with the structure and shapes of the plan.
          dtype: real dtype of the stacks; complex blocks get the complex dtype of that precision.
        """
        leaves = self.treedef.flatten_up_to(tree)
        found = {}
        for label, signature in self.stacks.items():
            own = complex_like(dtype, signature.is_complex)
            members = [(plan, leaves[i].astype(own)) for i, plan in self.members(label)]
            if len(signature.shape) == 1 and all(plan.pieces == (1,) for plan, _ in members):
                found[label] = _split_vectors(members, signature.size)
            else:
                found[label] = jnp.concatenate([plan.split(leaf) for plan, leaf in members])
        return found

    def join(self, stacks: Mapping[str, Array], like: PyTree) -> PyTree:
        """Put stacks back together.

        Args:
          stacks: what `split` returns.
          like: a tree of the plan's structure that gives the dtypes, and the empty leaves.
        """
        leaves = list(self.treedef.flatten_up_to(like))
        for label in self.stacks:
            start = 0
            for i, plan in self.members(label):
                blocks = stacks[label][start : start + plan.count]
                leaves[i] = plan.join(blocks).astype(leaves[i].dtype)
                start += plan.count
        return self.treedef.unflatten(leaves)


def plan_blocks(tree: PyTree, blocking: Blocking) -> BlockPlan:
    """Plan how the leaves of a tree become stacks of blocks.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s; `None` and masked nodes are no leaves.
      blocking: the settings.

    Raises:
      ValueError: for a leaf that is not floating-point or complex, by path.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    plans = [
        _plan_leaf(jax.tree_util.keystr(path), leaf, stacked, blocking)
        for (path, leaf), stacked in zip(leaves, blocking._stacked(tree), strict=True)
    ]
    plans = _pad_vectors(plans)
    stacks = {plan.signature.label: plan.signature for plan in plans if plan is not None}
    return BlockPlan(jax.tree.structure(tree), tuple(plans), stacks)


def _split_vectors(members: list[tuple[LeafPlan, Array]], longest: int) -> Array:
    """Whole vectors as rows [N, longest], with zeros behind the shorter ones.

    All at once, as to pad them one by one takes a kernel for each, and long to compile.
    """
    lengths = np.concatenate([[plan.merged[0]] * plan.stacked for plan, _ in members])
    if (lengths == longest).all():
        return jnp.concatenate([leaf.reshape(-1, longest) for _, leaf in members])
    flat = jnp.concatenate([leaf.ravel() for _, leaf in members])
    starts = np.cumsum(lengths) - lengths
    inside = np.arange(longest) < lengths[:, None]
    index = np.where(inside, starts[:, None] + np.arange(longest), flat.size)
    return jnp.take(flat, index, mode="fill", fill_value=0)


def _pad_vectors(plans: list[LeafPlan | None]) -> list[LeafPlan | None]:
    """Bring whole vectors with diagonal factors to few lengths, that they may share stacks.

    Models hold vectors of many lengths, each cheap to update and as costly to compile as a matrix.
    All up to 1024 share a length, and beyond that all within the same power of four.
    """

    def bucket(plan):
        if plan is None or plan.signature.diagonal != (True,) or plan.pieces != (1,):
            return None
        length = plan.signature.shape[0]
        return plan.signature.is_complex, max(math.ceil(math.log(length, 4)), 5)

    longest: dict[Any, int] = collections.defaultdict(int)
    for plan in plans:
        if plan is not None and bucket(plan) is not None:
            longest[bucket(plan)] = max(longest[bucket(plan)], plan.signature.shape[0])

    def padded(plan):
        if bucket(plan) is None:
            return plan
        signature = dataclasses.replace(plan.signature, shape=(longest[bucket(plan)],))
        return dataclasses.replace(plan, signature=signature)

    return [padded(plan) for plan in plans]


def _count_stacked(function: Callable, path: str, shape: tuple[int, ...]) -> int:
    try:
        return function(path, shape)
    except Exception as error:
        raise ValueError(
            f"Blocking: stacked_axes, a function, was called as stacked_axes({path!r}, {shape}), "
            f"with a leaf's path and shape, and failed: {type(error).__name__}: {error}"
        ) from error


def _plan_leaf(path: str, leaf: Any, stacked: int, blocking: Blocking) -> LeafPlan | None:
    shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"Parameter {path or 'at the root'} has dtype {dtype}; expected floating-point or "
            "complex. Leave it out, with optax.masked or optax.partition."
        )
    if math.prod(shape) == 0:
        return None
    merged = blocking._merged(shape[stacked:]) or (1,)
    pieces = tuple(map(blocking._pieces, merged))
    sizes = [-(-d // n) for d, n in zip(merged, pieces, strict=True)]
    order = tuple(sorted(range(len(sizes)), key=lambda i: -sizes[i]))
    block = tuple(sizes[i] for i in order)
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    signature = Signature(block, blocking._diagonal(block), is_complex)
    return LeafPlan(
        path, tuple(shape), dtype, math.prod(shape[:stacked]), merged, pieces, order, signature
    )


def _numbers_by_path(setting: PyTree, paths: list[Any]) -> list[Any]:
    """The numbers of a tree at the given paths; it may have more, which a wrapper has hidden."""
    known = dict(jax.tree_util.tree_leaves_with_path(setting))
    if paths == [()] and () not in known:
        return [0]  # the placeholder of optax.tree.map_params
    for path in paths:
        if path not in known:
            raise ValueError(
                "Blocking: stacked_axes must have the structure of the parameters; it has no "
                f"number at {jax.tree_util.keystr(path) or 'the root'}, only at "
                f"{', '.join(map(jax.tree_util.keystr, known)) or 'no path'}."
            )
    return [known[path] for path in paths]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _size(name: str, value: Any, *, least: int) -> int:
    """A whole number of Python or NumPy, as an int."""
    try:
        size = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        size = None
    if size is None or size < least:
        raise ValueError(f"Blocking: {name} must be an integer ≥ {least}; got {value!r}.")
    return size
