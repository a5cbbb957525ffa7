"""Blocks on a mesh with known shardings: each device sends others the tiles that these need.

The compiler reshapes an array that is sharded along several axes by putting all of it on every
device. Here nothing but parts of blocks moves. Shards and blocks are boxes in a parameter; tiles
are so small that each lies in one shard and in one block. Of a kernel [64, 96] on a mesh of 2×4
devices, sharded along both axes, in blocks of [48, 32], transposed:

    shards [32, 24], one on each of 8 devices    blocks [48, 32], 4 of them, on the first 4 devices
    tiles [24, 32]: devices 0 and 1 send theirs to device 0, devices 2 and 3 to device 1, ...

From which device to which a tile goes, and to which place, stands in tables, made of shapes and
shardings with NumPy. A device sends every other the same number of tiles, the most that any pair
needs; what is less is filled up with zeros.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact, Int

from optax_kron.blocking import BlockPlan, LeafPlan
from optax_kron.kernels import explicit
from optax_kron.kernels.contract import complex_like
from optax_kron.transforms.mesh import Share, Spec
from optax_kron.types import PyTree

# Beyond so many tiles in a stack tables become large: shards and blocks have too small a common
# divisor, and rows are gathered instead.
_MOST_TILES = 2**18

Tiles = Inexact[Array, "tiles size"]


@dataclasses.dataclass(frozen=True)
class Moves:
    """Which tiles go from which device to which.

    Attributes:
      sent: For each device, of its tiles those that it sends: to device 0, to device 1, ...
      taken: For each device and each of its places, which of the tiles that came belongs there.
    """

    sent: Int[np.ndarray, "devices devices count"]
    taken: Int[np.ndarray, "devices places"]

    def __call__(self, share: Share, tiles: Tiles) -> Tiles:
        """The tiles of the places of this device, zero where none belongs."""
        sent, taken = (share.own(table)[0] for table in (self.sent, self.taken))
        out = jnp.take(tiles, sent.ravel(), axis=0, mode="fill", fill_value=0)
        came = jax.lax.all_to_all(out, share.axes, split_axis=0, concat_axis=0, tiled=True)
        return jnp.take(came, taken, axis=0, mode="fill", fill_value=0)


@dataclasses.dataclass(frozen=True)
class Shard:
    """What a device has of a leaf: a box of it, and that box as tiles of a block.

    Attributes:
      plan: How the leaf becomes blocks. None of its sharded axes is merged with another.
      names: For each axis of the leaf, the mesh axes along which it is sharded.
      mesh: The lengths of all mesh axes that count, by name.
    """

    plan: LeafPlan
    names: tuple[tuple[str, ...], ...]
    mesh: Mapping[str, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the box."""
        cuts = (math.prod(self.mesh[name] for name in names) for names in self.names)
        return tuple(size // cut for size, cut in zip(self.plan.shape, cuts, strict=True))

    @property
    def leading(self) -> int:
        """How many axes are stacked."""
        return len(self.plan.shape) - len(self.plan.merged)

    def largest_tile(self) -> tuple[int, ...]:
        """The largest that is a whole part of shards and of blocks, axes as in a block."""
        own = [self.shape[self.leading + axis] for axis in self.plan.order]
        return tuple(map(math.gcd, own, self.plan.signature.shape))

    def grid(self, tile: Sequence[int]) -> tuple[int, ...]:
        """How many tiles the box has along each axis; one for each element of stacked axes."""
        sizes = dict(zip(self.plan.order, tile, strict=True))
        return tuple(
            size if axis < 0 else size // sizes[axis]
            for axis, size in enumerate(self.shape, -self.leading)
        )

    def split(self, box: Array, tile: Sequence[int]) -> Tiles:
        """The tiles of a box, in the order of `grid`."""
        shape, axes = self._paired(tile)
        return box.reshape(shape).transpose(axes).reshape(-1, math.prod(tile))

    def join(self, tiles: Tiles, tile: Sequence[int]) -> Array:
        """The inverse of `split`."""
        shape, axes = self._paired(tile)
        tiles = tiles.reshape([shape[axis] for axis in axes])
        return tiles.transpose(np.argsort(axes)).reshape(self.shape)

    def _paired(self, tile):
        """[stacked..., n_1, t_1, n_2, t_2, ...], and the order [stacked..., n..., t...] of that."""
        lead, grid, order = self.leading, self.grid(tile), self.plan.order
        sizes = dict(zip(order, tile, strict=True))
        pairs = ((n, sizes[axis]) for axis, n in enumerate(grid[lead:]))
        numbers = range(lead, lead + 2 * len(order), 2)
        axes = (*range(lead), *numbers, *(lead + 2 * axis + 1 for axis in order))
        return (*grid[:lead], *itertools.chain(*pairs)), axes

    def places(self, tile: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """For each device and each tile of its box, the block it lies in and where in that.

        Returns:
          Two arrays of integers [devices, tiles]: the block, counted from the first of the leaf,
          and the number of the tile in the block.
        """
        grid, lead, blocks = self.grid(tile), self.leading, self.plan.signature.shape
        devices = np.indices(tuple(self.mesh.values())).reshape(len(self.mesh), -1, 1)
        place = dict(zip(self.mesh, devices, strict=True))
        indices = []
        for index, names, n in zip(
            np.indices(grid).reshape(len(grid), 1, -1), self.names, grid, strict=True
        ):
            shard = np.zeros_like(devices[0])
            for name in names:
                shard = shard * self.mesh[name] + place[name]
            indices.append(index + n * shard)  # in the grid of all of the leaf
        block = np.zeros_like(indices[0])
        for index, size in zip(indices[:lead], self.plan.shape[:lead], strict=True):
            block = block * size + index
        per_block = dict(zip(self.plan.order, map(int.__floordiv__, blocks, tile), strict=True))
        for axis, pieces in enumerate(self.plan.pieces):
            block = block * pieces + indices[lead + axis] // per_block[axis]
        inside = np.zeros_like(block)
        for axis in self.plan.order:
            inside = inside * per_block[axis] + indices[lead + axis] % per_block[axis]
        return block, inside

    def nearest(self, owners: np.ndarray) -> np.ndarray:
        """For each device and tile, whether of those that have it this is the one to send it.

        Args:
          owners: The device to which each tile goes, [devices, tiles].
        """
        used = set(itertools.chain(*self.names))
        sizes = tuple(self.mesh.values())
        here = np.unravel_index(np.arange(len(owners))[:, None], sizes)
        there = np.unravel_index(owners, sizes)
        chosen = np.ones(owners.shape, bool)
        for name, x, y in zip(self.mesh, here, there, strict=True):
            if name not in used:
                chosen &= x == y
        return chosen


@dataclasses.dataclass(frozen=True)
class Route:
    """How the leaves of one stack become its rows, and rows become leaves.

    Attributes:
      shards: Of each leaf in the stack.
      specs: Their shardings.
      shape: Of the rows of a device, [n, ...].
      tile: The shape of a tile.
      out: From leaves to rows.
      back: From rows to leaves.
    """

    shards: Sequence[Shard]
    specs: tuple[Spec, ...]
    shape: tuple[int, ...]
    tile: tuple[int, ...]
    out: Moves
    back: Moves

    def split(self, share: Share, leaves: Sequence[Array]) -> Inexact[Array, "N ..."]:
        """The stack, cut."""

        def make(*boxes):
            tiles = [s.split(box, self.tile) for s, box in zip(self.shards, boxes, strict=True)]
            return self._rows(self.out(share, jnp.concatenate(tiles)))

        return jax.shard_map(make, in_specs=self.specs, out_specs=share.cut)(*leaves)

    def join(self, share: Share, stack: Inexact[Array, "N ..."]) -> tuple[Array, ...]:
        """The leaves, with their shardings; the inverse of `split`."""
        counts = [math.prod(s.grid(self.tile)) for s in self.shards]

        def make(rows):
            tiles = self.back(share, self._tiles(rows))
            parts = jnp.split(tiles, np.cumsum(counts)[:-1])
            return tuple(s.join(x, self.tile) for s, x in zip(self.shards, parts, strict=True))

        # Devices that have the same shard get the same tiles, which types do not tell.
        return jax.shard_map(make, in_specs=(share.cut,), out_specs=self.specs, check_vma=False)(
            stack
        )

    def _grid(self):
        return tuple(map(int.__floordiv__, self.shape[1:], self.tile))

    def _tiles(self, rows):
        k = len(self.tile)
        pairs = itertools.chain(*zip(self._grid(), self.tile, strict=True))
        axes = (0, *range(1, 2 * k, 2), *range(2, 2 * k + 1, 2))
        return rows.reshape(len(rows), *pairs).transpose(axes).reshape(-1, math.prod(self.tile))

    def _rows(self, tiles):
        k = len(self.tile)
        axes = (0, *itertools.chain(*((1 + i, 1 + k + i) for i in range(k))))
        tiles = tiles.reshape(self.shape[0], *self._grid(), *self.tile)
        return tiles.transpose(axes).reshape(self.shape)


def routes(plan: BlockPlan, share: Share, tree: PyTree) -> dict[str, Route]:
    """For each stack, by label, how it is exchanged.

    Stacks are left out of leaves that are on all devices, which need no exchange before their
    update; of those where shards and blocks have no large common divisor along every axis, or where
    a sharded axis is merged with others; and of leaves that are sharded over more mesh axes than
    stacks are.

    Args:
      plan: How the tree becomes stacks.
      share: Which rows of them a device owns.
      tree: Arrays with the shapes of the plan.
    """
    if share.automatic:
        return {}
    mesh = jax.sharding.get_abstract_mesh()
    sizes = tuple((name, mesh.shape[name]) for name in share.axes)
    specs = list(map(explicit.spec_of, plan.treedef.flatten_up_to(tree)))
    made = {}
    for label in plan.stacks:
        members = [(leaf, specs[i]) for i, leaf in plan.members(label)]
        used = {name for leaf, spec in members for names in _names(spec, leaf) for name in names}
        if used <= set(share.axes):
            made[label] = _route(tuple(members), sizes, plan.count(label))
    return {label: route for label, route in made.items() if route is not None}


@functools.lru_cache(maxsize=64)
def _route(members, sizes, count) -> Route | None:
    mesh = dict(sizes)
    if not all(_is_simple(leaf) for leaf, _ in members):
        return None
    shards = [Shard(leaf, _names(spec, leaf), mesh) for leaf, spec in members]
    if not any(itertools.chain(*(s.names for s in shards))) or not all(map(_is_even, shards)):
        return None
    tile = functools.reduce(
        lambda x, y: tuple(map(math.gcd, x, y)), (s.largest_tile() for s in shards)
    )
    block = members[0][0].signature.shape
    per_block, devices = math.prod(map(int.__floordiv__, block, tile)), math.prod(mesh.values())
    if count * per_block > _MOST_TILES:
        return None
    rows = count // devices
    owners, places, chosen, first = [], [], [], 0
    for shard in shards:
        blocks, inside = shard.places(tile)
        owner, row = np.divmod(first + blocks, rows)
        owners.append(owner)
        places.append(row * per_block + inside)
        chosen.append(shard.nearest(owner))
        first += shard.plan.count
    owner, place, send = np.stack([np.concatenate(x, axis=1) for x in (owners, places, chosen)])
    holder, own = np.indices((devices, owner.shape[1]))
    # From a device, and where there, to a device, and where there.
    moves = np.stack([holder, own, owner, place])
    held, needed = owner.shape[1], rows * per_block
    out = _moves(moves[:, send.astype(bool)], devices, held, needed)
    back = _moves(moves[[2, 3, 0, 1]].reshape(4, -1), devices, needed, held)
    specs = tuple(spec for _, spec in members)
    return Route(shards, specs, (rows, *block), tile, out, back)


def _moves(moves: Int[np.ndarray, "4 tiles"], devices: int, held: int, needed: int) -> Moves:
    """The tables of some tiles.

    Args:
      moves: For each tile the device that sends it, its number there, the device that gets it, and
        its place there.
      devices: How many there are.
      held: How many tiles a device has.
      needed: How many places a device has.
    """
    source, number_held, target, place = moves[:, np.lexsort(moves[[3, 2, 0]])]
    pair = source * devices + target
    number = np.arange(len(pair)) - np.searchsorted(pair, pair)  # among those of the same pair
    most = int(number.max()) + 1
    sent = np.full((devices, devices, most), held, np.int32)  # where there is nothing
    sent[source, target, number] = number_held
    taken = np.full((devices, needed), devices * most, np.int32)
    taken[target, place] = source * most + number
    return Moves(sent, taken)


def _is_simple(leaf: LeafPlan) -> bool:
    """Whether the axes of a leaf are those that are stacked and those of its blocks."""
    lead = len(leaf.shape) - len(leaf.merged)
    return lead >= 0 and leaf.shape[lead:] == leaf.merged


def _is_even(shard: Shard) -> bool:
    """Whether all shards of a leaf have one shape."""
    cuts = (math.prod(shard.mesh[name] for name in names) for names in shard.names)
    return all(size % cut == 0 for size, cut in zip(shard.plan.shape, cuts, strict=True))


def _names(spec: Spec, leaf: LeafPlan) -> tuple[tuple[str, ...], ...]:
    return tuple(explicit.mesh_axes(spec, axis) for axis in range(len(leaf.shape)))


def split(
    plan: BlockPlan, share: Share, tree: PyTree, dtype: jnp.dtype
) -> dict[str, Inexact[Array, "N ..."]]:
    """The stacks of a tree, cut, in a real dtype: those that have no route by way of the compiler.

    See `BlockPlan.split`, and `Share.split`.
    """
    found = routes(plan, share, tree)
    leaves = plan.treedef.flatten_up_to(tree)
    rest = plan.only([label for label in plan.stacks if label not in found])
    others = {i for label in rest.stacks for i, _ in plan.members(label)}
    some = plan.treedef.unflatten([x if i in others else None for i, x in enumerate(leaves)])
    stacks = share.split(rest.split, some, dtype)
    for label, route in found.items():
        own = [leaves[i] for i, _ in plan.members(label)]
        wide = complex_like(dtype, plan.stacks[label].is_complex)
        # What goes over the wires is as narrow as it came.
        common = jnp.result_type(*own)
        narrow = common if common.itemsize < wide.itemsize else wide
        stacks[label] = route.split(share, [x.astype(narrow) for x in own]).astype(wide)
    return {label: stacks[label] for label in plan.stacks}


def join(
    plan: BlockPlan,
    share: Share,
    routes: Mapping[str, Route],
    stacks: Mapping[str, Inexact[Array, "N ..."]],
    like: PyTree,
) -> PyTree:
    """`like` with the leaves of these routes from stacks, in its dtypes; see `BlockPlan.join`."""
    if not routes:
        return like
    leaves = list(plan.treedef.flatten_up_to(like))
    for label, route in routes.items():
        where = [i for i, _ in plan.members(label)]
        common = jnp.result_type(*(leaves[i] for i in where))
        made = route.join(share, stacks[label].astype(common))
        for i, leaf in zip(where, made, strict=True):
            leaves[i] = leaf.astype(leaves[i].dtype)
    return plan.treedef.unflatten(leaves)
