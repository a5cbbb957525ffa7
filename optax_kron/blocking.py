"""How parameter leaves become equal blocks, stacked, and exactly leaves again.

A leaf of shape [s_1, ..., s_m, d_1, ..., d_k], the first m axes stacked as in scanned layers, is
merged, cut, ordered and stacked, each by a reshape, a pad or a transpose, so that joining is exact.
A signature says the shape of a block and which of its axes get a diagonal factor. Compile time
grows with the number of signatures, not of leaves, and a mesh can cut the axis N of a stack.
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Inexact, Int

from optax_kron.kernels.contract import complex_like
from optax_kron.kernels.parts import parts
from optax_kron.types import PyTree

# A worked example: convolutions of six scanned layers, [6, 3, 3, 64, 100], with stacked_axes=1,
# merge_below=1024 and block_size=64.
#
#   merge  neighbouring small axes become one, as 3·3·64 ≤ 1024:              [6, 576, 100]
#   cut    a long axis becomes equal pieces, the last padded with zeros if
#          need be: 576 is 9 pieces of 64, 100 is 2 of 50:                    [6, 9, 64, 2, 50]
#   order  the axes of a block are sorted by size, so that 64 × 50 and
#          50 × 64 are one kind of block:                                     [6, 9, 2, 64, 50]
#   stack  blocks of one signature, from any leaves, form one array:          [108, 64, 50]
#
# The biases [6, 100] are six rows of the signature "100diag". Vectors of similar length are padded
# to share one.


@dataclasses.dataclass(frozen=True)
class Blocking:
    """How parameters are merged, cut and stacked into blocks, and which axes get dense factors.

    An axis of a block gets a diagonal factor if it has one element or fewer, if it is longer than
    `max_size`, if `d² > max_skew · n` with n the elements of the block, or, with `max_skew=None`,
    if it holds all elements of the block (d = n), as the axis of a vector does. All other axes get
    a dense factor [d, d].

    Args:
      max_size: Longest axis that gets a dense factor.
      max_skew: How much larger a dense factor may be than the block that it preconditions.
      block_size: Axes longer than this are cut into equal pieces of at most this length. The last
        piece is padded with zeros, which are masked wherever they could be seen. `None`: no cuts.
      max_cut: Longest axis that is cut. Of a vocabulary every piece would get a dense factor, which
        together have many times the elements of the parameter; left uncut, an axis longer than
        `max_size` gets a diagonal factor. `None`: all are cut.
      dense_axes: How many axes of a block may get a dense factor, the shortest first, and the
        rightmost first among equals. `None`: all.
      merge_below: Neighbouring axes are merged while their product is at most this. `None`: none.
      stacked_axes: Leading axes that stack independent tensors (scanned layers, ensembles) and get
        no factor: one number for every leaf, a pytree of numbers with the structure of the
        parameters, or a function of a leaf's path (as `jax.tree_util.keystr` prints it) and shape.
        Axes beyond the leaf's own are ignored. `None`: none.

    Raises:
      ValueError: If a size is not a positive integer, or `max_skew` is negative.

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

    def __post_init__(self) -> None:
        least = {"max_size": 0, "block_size": 1, "merge_below": 1, "max_cut": 1, "dense_axes": 0}
        if _is_number(self.stacked_axes):
            least["stacked_axes"] = 0
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None or name == "max_size":
                # Numbers of NumPy become Python's, so that equal settings are the same.
                object.__setattr__(self, name, _size(name, value, least=bound))
        skew = self.max_skew
        if skew is not None and not (_is_number(skew) and skew >= 0):
            raise ValueError(f"Blocking: max_skew must be None or ≥ 0; got {skew!r}.")

    def _diagonal(self, shape: tuple[int, ...]) -> tuple[bool, ...]:
        """For each axis of a block, whether its factor is diagonal."""
        count = math.prod(shape)

        def rule(size):
            skewed = size == count if self.max_skew is None else size**2 > self.max_skew * count
            return size <= 1 or size > self.max_size or skewed

        # The shortest first, the rightmost first among equals.
        dense = sorted((size, -axis) for axis, size in enumerate(shape) if not rule(size))
        kept = {-axis for _, axis in dense[: self.dense_axes]}
        return tuple(axis not in kept for axis in range(len(shape)))

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

    def count_stacked(self, tree: PyTree) -> list[int]:
        """For each leaf of the tree, how many leading axes are stacked."""
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        setting = self.stacked_axes
        numbers: Sequence[object]
        if setting is None or _is_number(setting):
            numbers = [setting or 0] * len(leaves)
        # A tree of numbers may be callable too, as a model is.
        elif callable(setting) and jax.tree_util.all_leaves([setting]):
            numbers = [
                _called(setting, jax.tree_util.keystr(path), jnp.shape(x)) for path, x in leaves
            ]
        else:
            numbers = _numbers_by_path(setting, [path for path, _ in leaves])
        return [
            min(_size(f"stacked_axes of {jax.tree_util.keystr(path)}", n, least=0), jnp.ndim(x))
            for n, (path, x) in zip(numbers, leaves, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Signature:
    """What blocks of one stack have in common."""

    shape: tuple[int, ...]  # of a block, sizes descending
    diagonal: tuple[bool, ...]  # whether the factor of each axis is
    is_complex: bool

    @property
    def size(self) -> int:
        """Number of elements of a block, padding included."""
        return math.prod(self.shape)

    @property
    def label(self) -> str:
        """A short name, such as "1024x256" or "256diag", that keys the stack in a state."""
        axes = zip(self.shape, self.diagonal, strict=True)
        sizes = (f"{size}diag" if diagonal else str(size) for size, diagonal in axes)
        return "x".join(sizes) + ("_complex" if self.is_complex else "")


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """How one leaf is taken apart."""

    path: str  # for messages
    shape: tuple[int, ...]
    dtype: jnp.dtype
    stacked: int  # number of elements along the stacked axes
    merged: tuple[int, ...]  # shape after merging, without stacked axes; [1] for a scalar
    pieces: tuple[int, ...]  # number of pieces of each merged axis
    order: tuple[int, ...]  # the merged axis that each axis of a block is made of
    signature: Signature  # of its blocks

    @property
    def count(self) -> int:
        """Number of blocks."""
        return self.stacked * math.prod(self.pieces)

    @property
    def is_vector(self) -> bool:
        """Whether a block is a vector that is not cut."""
        return len(self.signature.shape) == 1 and self.pieces == (1,)

    @property
    def _cuts(self) -> list[tuple[int, int]]:
        """Number of pieces, and their size, of each merged axis; their product is padded."""
        sizes = dict(zip(self.order, self.signature.shape, strict=True))
        return [(pieces, sizes[axis]) for axis, pieces in enumerate(self.pieces)]

    def _axes(self) -> tuple[int, ...]:
        """The transpose from [stacked, p_1, b_1, p_2, b_2, ...] to [stacked, p..., b...]."""
        k = len(self.merged)
        return (0, *range(1, 2 * k, 2), *(2 + 2 * i for i in self.order))

    def split(self, leaf: Inexact[Array, "..."]) -> Inexact[Array, "count ..."]:
        """From the shape of the leaf to its blocks."""
        x = leaf.reshape(self.stacked, *self.merged)
        padding = [(0, n * b - d) for d, (n, b) in zip(self.merged, self._cuts, strict=True)]
        if any(after for _, after in padding):
            x = jnp.pad(x, [(0, 0), *padding])
        x = x.reshape(self.stacked, *itertools.chain(*self._cuts)).transpose(self._axes())
        return x.reshape(self.count, *self.signature.shape)

    def join(self, blocks: Inexact[Array, "count ..."]) -> Inexact[Array, "..."]:
        """From blocks to the shape of the leaf; the inverse of `split`."""
        x = blocks.reshape(self.stacked, *self.pieces, *self.signature.shape)
        x = x.transpose(np.argsort(self._axes()))
        x = x.reshape(self.stacked, *(n * b for n, b in self._cuts))
        return x[(slice(None), *map(slice, self.merged))].reshape(self.shape)

    def sizes(self) -> Int[np.ndarray, "count k"]:
        """Valid extent of every block along each of its axes."""
        # All [k, count / stacked], in the order of the merged axes until the last line.
        size = np.array([b for _, b in self._cuts])[:, None]
        start = size * np.indices(self.pieces).reshape(len(self.pieces), -1)
        extents = np.minimum(np.array(self.merged)[:, None] - start, size)
        return np.tile(extents[list(self.order)].T, (self.stacked, 1))


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """How a tree of parameters is taken apart into stacks, one per signature."""

    treedef: Any  # a PyTreeDef, which pyright takes for a variable
    leaves: tuple[LeafPlan | None, ...]  # `None` for an empty one
    # The signatures by label, in order of first appearance.
    stacks: Mapping[str, Signature] = dataclasses.field(hash=False)
    multiple: int = 1  # the number of blocks in each stack is one of this

    def members(self, label: str) -> list[tuple[int, LeafPlan]]:
        """The leaves in a stack, in order, with their position in the tree."""
        return [
            (i, leaf)
            for i, leaf in enumerate(self.leaves)
            if leaf is not None and leaf.signature.label == label
        ]

    def only(self, labels: Container[str]) -> "BlockPlan":
        """The plan of some stacks alone."""
        stacks = {label: x for label, x in self.stacks.items() if label in labels}
        return dataclasses.replace(self, stacks=stacks)

    def filled(self, label: str) -> int:
        """Number of blocks in a stack that belong to a leaf; those behind them are padding."""
        return sum(leaf.count for _, leaf in self.members(label))

    def count(self, label: str) -> int:
        """Number of blocks in a stack."""
        return -(-self.filled(label) // self.multiple) * self.multiple

    def sizes(self, label: str) -> tuple[Int[np.ndarray, " N"], ...] | None:
        """Valid extents along each axis; `None` if no block is padded."""
        sizes = np.concatenate([leaf.sizes() for _, leaf in self.members(label)])
        if (sizes == np.array(self.stacks[label].shape)).all():
            return None
        return tuple(np.pad(sizes, [(0, self._padding(label)), (0, 0)], "edge").T)

    def _padding(self, label: str) -> int:
        return self.count(label) - self.filled(label)

    def mask(self, label: str) -> Bool[np.ndarray, "N ..."] | None:
        """Where the blocks of a stack hold elements; `None` if everywhere.

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

    def split(self, tree: PyTree, dtype: DTypeLike) -> dict[str, Inexact[Array, "N ..."]]:
        """Take a tree apart into stacks of blocks, by label.

        Args:
          tree: Arrays with the structure and shapes of the plan.
          dtype: Real dtype of the stacks; complex blocks get the complex dtype of that precision.
        """
        leaves = self.treedef.flatten_up_to(tree)
        stacks = {}
        for label, signature in self.stacks.items():
            stack_dtype = complex_like(dtype, signature.is_complex)
            members = [(plan, leaves[i].astype(stack_dtype)) for i, plan in self.members(label)]
            if all(plan.is_vector for plan, _ in members):
                stacks[label] = _split_vectors(members, signature.size)
            else:
                stacks[label] = jnp.concatenate([plan.split(leaf) for plan, leaf in members])
            if padding := self._padding(label):
                rest = [(0, 0)] * len(signature.shape)
                stacks[label] = jnp.pad(stacks[label], [(0, padding), *rest])
        return stacks

    def join(self, stacks: Mapping[str, Inexact[Array, "N ..."]], like: PyTree) -> PyTree:
        """Put stacks back together.

        Args:
          stacks: Stacks of blocks, as `split` returns them.
          like: A tree of the plan's structure that gives the dtypes, and the empty leaves.
        """
        leaves = list(self.treedef.flatten_up_to(like))
        members = {label: self.members(label) for label in self.stacks}
        counts = {label: [plan.count for _, plan in of] for label, of in members.items()}
        for label, found in parts(stacks, counts).items():
            for (i, plan), blocks in zip(members[label], found, strict=True):
                leaves[i] = plan.join(blocks).astype(leaves[i].dtype)
        return self.treedef.unflatten(leaves)


def plan_blocks(tree: PyTree, blocking: Blocking, multiple: int = 1) -> BlockPlan:
    """Plan how the leaves of a tree become stacks of blocks.

    Args:
      tree: Arrays or `jax.ShapeDtypeStruct`s; `None` and masked nodes are no leaves.
      blocking: The settings.
      multiple: Of what the number of blocks in each stack is to be a multiple, so that so many
        devices can share them; blocks of zeros fill it up.

    Raises:
      ValueError: For a leaf that is not floating-point or complex, by path.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    plans = [
        _plan_leaf(jax.tree_util.keystr(path), leaf, stacked, blocking)
        for (path, leaf), stacked in zip(leaves, blocking.count_stacked(tree), strict=True)
    ]
    plans = _pad_vectors(plans)
    stacks = {plan.signature.label: plan.signature for plan in plans if plan is not None}
    return BlockPlan(jax.tree.structure(tree), tuple(plans), stacks, multiple)


def _plan_leaf(
    path: str, leaf: Array | jax.ShapeDtypeStruct, stacked: int, blocking: Blocking
) -> LeafPlan | None:
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
    count = math.prod(shape[:stacked])
    return LeafPlan(path, tuple(shape), dtype, count, merged, pieces, order, signature)


def _pad_vectors(plans: Sequence[LeafPlan | None]) -> list[LeafPlan | None]:
    """Bring vectors with diagonal factors to few lengths, that they may share stacks.

    Models hold vectors of many lengths, each cheap to update and as costly to compile as a matrix.
    All up to 1024 share a length, and beyond that all within the same power of four.
    """

    def bucket(plan):
        if plan is None or not plan.is_vector or plan.signature.diagonal != (True,):
            return None
        power = math.ceil(math.log(plan.signature.size, 4))
        return plan.signature.is_complex, max(power, 5)

    buckets = list(map(bucket, plans))
    longest: dict[tuple[bool, int] | None, int] = {}
    for plan, key in zip(plans, buckets, strict=True):
        if plan is not None:
            longest[key] = max(longest.get(key, 0), plan.signature.size)

    def padded(plan, key):
        if key is None:
            return plan
        signature = dataclasses.replace(plan.signature, shape=(longest[key],))
        return dataclasses.replace(plan, signature=signature)

    return list(map(padded, plans, buckets))


def _split_vectors(
    members: Sequence[tuple[LeafPlan, Inexact[Array, "..."]]], longest: int
) -> Inexact[Array, "N longest"]:
    """Vectors as rows, with zeros behind the shorter ones.

    All at once, as to pad them one by one takes a kernel for each, and long to compile.
    """
    lengths = np.concatenate([[plan.merged[0]] * plan.stacked for plan, _ in members])
    if (lengths == longest).all():
        return jnp.concatenate([leaf.reshape(-1, longest) for _, leaf in members])
    flat = jnp.concatenate([leaf.ravel() for _, leaf in members])
    starts = np.cumsum(lengths) - lengths
    inside = np.arange(longest) < lengths[:, None]
    # An index beyond the last element reads a zero.
    index = np.where(inside, starts[:, None] + np.arange(longest), flat.size)
    return jnp.take(flat, index, mode="fill", fill_value=0)


def _called(function: Callable[..., object], path: str, shape: tuple[int, ...]) -> object:
    try:
        return function(path, shape)
    except Exception as error:
        raise ValueError(
            f"Blocking: stacked_axes, a function, was called as stacked_axes({path!r}, {shape}), "
            f"with a leaf's path and shape, and failed: {type(error).__name__}: {error}"
        ) from error


def _numbers_by_path(
    setting: PyTree, paths: Sequence[tuple[jax.tree_util.KeyEntry, ...]]
) -> list[object]:
    """The numbers of a tree at the given paths; it may have more, which a wrapper has masked."""
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


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _size(name: str, value: object, *, least: int) -> int:
    """A whole number of Python or NumPy, as an int."""
    try:
        size = operator.index(value) if isinstance(value, SupportsIndex) else None
    except TypeError:
        size = None
    if size is None or size < least or isinstance(value, bool):
        raise ValueError(f"Blocking: {name} must be an integer ≥ {least}; got {value!r}.")
    return size
