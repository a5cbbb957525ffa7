"""A Llama-like transformer of 7 B parameters on 64 devices, abstract, and optimizers of it.

Layers are stacked along the first axis, as under `jax.lax.scan`. Kernels are sharded along both of
their axes, over "data" as in FSDP and over "model" as in tensor parallelism; norms are on all
devices. No array is ever made.
"""

import collections
import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_kron as ok
from optax_kron.kernels import packed


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a model and its mesh, and how its parameters become blocks."""

    layers: int = 32
    width: int = 4096
    hidden: int = 11008
    vocabulary: int = 32000
    mesh: tuple[int, int] = (8, 8)  # data, model
    # 4096 becomes 2 pieces of 2048, 11008 becomes 4 of 2752: whole numbers of shards.
    block_size: int = 2752

    @property
    def devices(self):
        """Of the mesh."""
        return math.prod(self.mesh)


FULL = Sizes()
TINY = Sizes(layers=2, width=256, hidden=688, vocabulary=2000, mesh=(2, 4), block_size=172)


def parameters(sizes):
    """By name, the shape of a parameter, the mesh axes along which it is cut, and stacked axes."""
    depth, width, hidden, words = sizes.layers, sizes.width, sizes.hidden, sizes.vocabulary
    inward, outward = (None, "data", "model"), (None, "model", "data")
    made = dict.fromkeys(("query", "key", "value"), ((depth, width, width), inward, 1))
    made |= dict.fromkeys(("gate", "up"), ((depth, width, hidden), inward, 1))
    return made | {
        "out": ((depth, width, width), outward, 1),
        "down": ((depth, hidden, width), outward, 1),
        "norm_attention": ((depth, width), (), 1),
        "norm_mlp": ((depth, width), (), 1),
        "norm": ((width,), (), 0),
        "embedding": ((words, width), ("model", "data"), 0),
        "head": ((width, words), ("data", "model"), 0),
    }


def number(sizes):
    """Of parameters."""
    return sum(math.prod(shape) for shape, _, _ in parameters(sizes).values())


def abstract(sizes, mesh):
    """The parameters as `jax.ShapeDtypeStruct`s with shardings."""
    return {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes))
        )
        for name, (shape, axes, _) in parameters(sizes).items()
    }


def blocks(sizes):
    """The stacks of blocks: from shape, and which axes are diagonal, to their number, padded.

    A vocabulary, longer than all else, is not cut and has a diagonal factor, as vectors have.
    """
    found = collections.Counter()
    for shape, _, stacked in parameters(sizes).values():
        axes = shape[stacked:]
        cuts = [1 if d > sizes.hidden else -(-d // sizes.block_size) for d in axes]
        block = [-(-d // n) for d, n in zip(axes, cuts, strict=True)]
        order = sorted(block, reverse=True)
        diagonal = tuple(d > sizes.hidden or len(axes) == 1 for d in order)
        found[tuple(order), diagonal] += math.prod(shape[:stacked]) * math.prod(cuts)
    devices = sizes.devices
    return {key: -(-count // devices) * devices for key, count in found.items()}


def symmetric(d):
    """Numbers that are kept of a symmetric matrix."""
    return d * (d + 1) / 2 if d >= packed.LEAST_SIZE else d * d


# What is kept of a block, in numbers: for each dense and each diagonal axis, and each element.
KEPT = {
    "kron_psgd": (lambda d: d * d, lambda d: d, 1),  # Q; momentum
    "shampoo": (lambda d: 2 * symmetric(d), lambda d: 2 * d, 2),  # statistic, root; momentum, graft
    "soap": (lambda d: symmetric(d) + d * d, lambda d: 0, 2),  # statistic, basis; both moments
    "kl_soap": (lambda d: symmetric(d) + d * d + d, lambda d: d, 2),  # the same, and eigenvalues
    "kl_shampoo": (lambda d: symmetric(d) + d * d + d, lambda d: d, 1),
}
# Of Optax's, for each element of a matrix and of a norm; sharded as the parameters.
KEPT_LIKE_PARAMETERS = {"adamw": (2, 2), "muon": (1, 2)}


def state_formula(name, sizes):
    """Bytes of state on a device, all of it in float32."""
    if name in KEPT:
        dense, diagonal, each = KEPT[name]
        total = 0
        for (shape, kinds), count in blocks(sizes).items():
            factors = sum(
                diagonal(d) if is_diagonal else dense(d)
                for d, is_diagonal in zip(shape, kinds, strict=True)
            )
            total += 4 * count // sizes.devices * (factors + each * math.prod(shape))
        return total
    of_matrix, of_norm = KEPT_LIKE_PARAMETERS[name]
    total = 0
    for shape, axes, stacked in parameters(sizes).values():
        is_norm = len(shape) - stacked == 1 or (name == "muon" and not stacked)
        cut = math.prod(
            dict(zip(("data", "model"), sizes.mesh, strict=True)).get(a, 1) for a in axes
        )
        total += 4 * (of_norm if is_norm else of_matrix) * math.prod(shape) // cut
    return total


def block_bytes(name, sizes):
    """Of all blocks of a device in float32, padding included, or of its part of the parameters."""
    if name not in KEPT:
        return 4 * number(sizes) // sizes.devices
    counts = blocks(sizes).items()
    return sum(4 * count // sizes.devices * math.prod(shape) for (shape, _), count in counts)


def transformation(name, sizes):
    """An optimizer by name, and the kind of mesh axes that it takes."""
    stacked = {key: axes for key, (_, _, axes) in parameters(sizes).items()}
    if name == "adamw":
        return optax.adamw(1e-3), AxisType.Explicit
    if name == "muon":
        numbers = optax.contrib.MuonDimensionNumbers((1,), (2,))
        of_layers = {
            k: numbers if len(s) == 3 else None for k, (s, _, _) in parameters(sizes).items()
        }
        # Its products of sharded matrices are for the compiler to partition.
        made = optax.contrib.muon(1e-3, muon_weight_dimension_numbers=of_layers)
        return made, AxisType.Auto
    longest = sizes.hidden
    settings = {
        "blocking": ok.Blocking(
            max_size=longest, max_cut=longest, block_size=sizes.block_size, stacked_axes=stacked
        )
    }
    if name.startswith("kl_"):
        return ok.soap(1e-3, variant=name, **settings), AxisType.Explicit
    if name == "shampoo":  # how often an iteration goes on cannot be read off a program
        settings["root_method"] = "eigh"
    return getattr(ok, name)(1e-3, **settings), AxisType.Explicit


def compiled(name, sizes):
    """The program of one device, the state's shardings and shapes, and the gradients'."""
    tx, kind = transformation(name, sizes)
    mesh = jax.make_mesh(sizes.mesh, ("data", "model"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        params = abstract(sizes, mesh)
        shardings = ok.sharding.state_shardings(tx, params, mesh)
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(tx.init, params),
            shardings,
        )
        own = jax.tree.map(lambda x: x.sharding, params)
        outs = (own, shardings) if kind == AxisType.Auto else None
        update = jax.jit(tx.update, donate_argnums=1, out_shardings=outs)
        return update.lower(params, state, params).compile(), state, params


def bytes_on_a_device(tree):
    """Of abstract arrays with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
