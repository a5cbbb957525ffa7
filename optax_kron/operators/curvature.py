"""Operators on parameters: the blocks of layers, brought to and from their canonical form."""

# Worked example. Parameters {"dense": {"bias": [2], "kernel": [3, 2]}, "scale": [5]}, one layer:
#
#   blocks["dense"]     Stacked(Kronecker((A [1, 4, 4], G [1, 2, 2]))), on arrays [1, 4, 2]
#   rest                0, the number that the 5 entries of "scale" are multiplied with
#   n                   1·4·2 + 5 = 13
#
# `mv` takes kernel and bias as [1, 4, 2], the bias in the last row, multiplies, and puts them back.
# `inverse(δ)` has the inverse of the block, and 1/δ for rest.
#
# Methods without a docstring have that of `Operator`, which `help` shows.
# ruff: noqa: D102

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from optax_kron.kernels import contract, explicit
from optax_kron.layers.layer import Layer
from optax_kron.layers.paths import by_path, is_inexact, map_by_path, slashed
from optax_kron.layers.plan import LayerPlan
from optax_kron.operators.base import Identity, Operator
from optax_kron.operators.blocks import NamedBlocks
from optax_kron.operators.vectors import Structure, as_real, scaled
from optax_kron.types import PyTree

REST = "parameters in no layer"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layerwise(NamedBlocks):
    """A block for each layer, on pytrees of parameters; and a number on those in no layer.

    Attributes:
      blocks: Operators by name of the layer, each on arrays [B, d_in, d_out].
      rest: The number that parameters in no layer are multiplied with.
      layers: The layers, with views.
      structure: Structure of the parameters.
    """

    blocks: dict[str, Operator]
    rest: Float[Array, ""]
    layers: tuple[Layer, ...] = dataclasses.field(metadata={"static": True})
    structure: Structure = dataclasses.field(metadata={"static": True})

    def in_structure(self) -> PyTree:
        return self.structure.tree

    def mv(self, vector: PyTree) -> PyTree:
        """The product; leaves that are not floating-point are left out."""
        leaves = self._checked_leaves(vector)
        # On an explicit mesh the product is sharded as the vector is.
        result = explicit.untyped(Layerwise._product, self, leaves, out=explicit.shardings(leaves))
        return map_by_path(lambda path, _: result.get(path), vector)

    def _product(self, leaves: Mapping[str, Array]) -> dict[str, Array]:
        result = {path: scaled(self.rest, leaf) for path, leaf in leaves.items()}
        wide = {
            path: leaf.astype(jnp.promote_types(leaf.dtype, self.dtype))
            for path, leaf in leaves.items()
        }
        for layer in self.layers:
            layer.put(result, self.blocks[layer.name].mv(layer.take(wide)))
        return result

    def _checked_leaves(self, vector: PyTree) -> dict[str, Array]:
        """The leaves of a vector by path, if they are those of the parameters."""
        expected = by_path(self.in_structure())
        leaves = {
            path: x for path, x in by_path(vector).items() if path in expected or is_inexact(x)
        }
        for path in {**expected, **leaves}:
            if path not in expected:
                raise ValueError(
                    f"the operator acts on parameters {sorted(expected)}; the vector has {path!r} "
                    "too. To make an operator of some layers act on all parameters, pass params= "
                    "where it is made."
                )
            shape = jnp.shape(leaves[path]) if path in leaves else "none there"
            if shape != expected[path].shape:
                raise ValueError(
                    f"the operator acts on parameters {path or 'at the root'} of shape "
                    f"{expected[path].shape}; the vector has {shape}."
                )
        return {path: as_real(x, expected[path].dtype) for path, x in leaves.items()}

    def parts(self) -> Mapping[str, Operator]:
        # What acts on the parameters in no layer is a block as well, maybe of no entries.
        covered = sum(layer.blocks * layer.d_in * layer.d_out for layer in self.layers)
        entries = jax.ShapeDtypeStruct((self.size - covered,), self.rest.dtype)
        rest = Identity(self.rest, Structure.of(entries))
        return {layer.name: self.blocks[layer.name] for layer in self.layers} | {REST: rest}

    def rebuilt(self, parts: Mapping[str, Operator]) -> "Layerwise":
        *blocks, rest = parts.items()
        assert isinstance(rest[1], Identity)
        number = rest[1].scale.astype(self.rest.dtype)
        return dataclasses.replace(self, blocks=dict(blocks), rest=number)

    def has_parts_of(self, other: Operator) -> bool:
        return isinstance(other, Layerwise) and other.layers == self.layers


def layerwise(plan: LayerPlan, structure: Structure, blocks: Mapping[str, Operator]) -> Layerwise:
    """The operator that is zero on parameters in no layer.

    Args:
      plan: The plan of the layers.
      structure: Structure of the parameters.
      blocks: Operators by name of the layer.
    """
    layers = tuple(member.layer for member in plan.members)
    dtypes = [x.dtype for x in jax.tree.leaves(blocks)]
    if not dtypes:
        dtypes = [x.dtype for x in structure.leaves if not jnp.iscomplexobj(x)]
    dtype = contract.wide_dtype(jnp.result_type(*dtypes, jnp.float32))
    return Layerwise(dict(blocks), jnp.zeros((), dtype), layers, structure)


def structure_of(
    owner: str, layers: Iterable[Layer], params: PyTree | None, sizes: Mapping[str, Sequence[int]]
) -> Structure:
    """The structure of the parameters that layers belong to.

    Args:
      owner: Name of the function that makes the operator, for messages.
      layers: The layers.
      params: The parameters, or abstract ones; `None` if they are not known, of layers by hand.
      sizes: d_in and d_out of the layers in their taps.
    """
    if params is not None:
        return Structure.of(params)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        if len(layer.views) == len(layer.paths):
            shapes |= {path: view.shape for path, view in layer.views}
            continue
        # By hand, without views: the shapes of a plain dense layer can be told from its taps.
        is_plain = not layer.block_axes and layer.out_axes == (-1,) and not layer.is_embedding
        if layer.views or not is_plain or layer.name not in sizes:
            raise ValueError(
                f"{owner}: layer {layer.name!r} was made by hand: pass params=, so that it is "
                "known which shapes its parameters have."
            )
        d_in, d_out = sizes[layer.name]
        if layer.kernel is not None:
            shapes[layer.kernel] = d_in - (layer.bias is not None), d_out
        if layer.bias is not None:
            shapes[layer.bias] = (d_out,)
    return Structure.of(_nested(shapes))


def _nested(shapes: Mapping[str, tuple[int, ...]]) -> PyTree:
    """Nested dictionaries of abstract arrays, from their shapes by path."""
    tree = {}
    for path, shape in shapes.items():
        *above, last = slashed(path).split("/") if slashed(path) else [""]
        level = tree
        for key in above:
            level = level.setdefault(key, {})
        level[last] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tree.get("", tree)  # a parameter at the root is the tree
