"""Operators on parameters: the blocks of layers, brought to and from their canonical form."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from optax_kron.kernels import contract
from optax_kron.layers.layer import Layer
from optax_kron.layers.paths import by_path, is_inexact, map_by_path, slashed
from optax_kron.layers.plan import LayerPlan
from optax_kron.operators.base import (
    Operator,
    Structure,
    as_real,
    damped_power,
    scaled,
)
from optax_kron.operators.blocks import Blocks

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layerwise(Blocks):
    """A block for each layer, on pytrees of parameters; and a number on those in no layer.

    Attributes:
      blocks: by name of the layer, each on arrays [B, d_in, d_out].
      rest: what parameters in no layer are multiplied with, [].
      layers: with views.
      structure: of the parameters.
    """

    blocks: dict[str, Operator]
    rest: Array
    layers: tuple[Layer, ...] = dataclasses.field(metadata={"static": True})
    structure: Structure = dataclasses.field(metadata={"static": True})

    def in_structure(self) -> PyTree:
        """See `Operator`."""
        return self.structure.tree

    def mv(self, vector: PyTree) -> PyTree:
        """See `Operator`; leaves that are not floating-point are left alone."""
        leaves = self._leaves(vector)
        result = {path: scaled(self.rest, leaf) for path, leaf in leaves.items()}
        wide = {path: leaf.astype(self._wide(leaf)) for path, leaf in leaves.items()}
        for layer in self.layers:
            layer.put(result, self.blocks[layer.name].mv(layer.take(wide)))
        return map_by_path(result.get, vector)

    def _wide(self, leaf):
        return jnp.promote_types(leaf.dtype, self.dtype)

    def _leaves(self, vector):
        expected = {path: x.shape for path, x in by_path(self.in_structure()).items()}
        leaves = {
            path: x for path, x in by_path(vector).items() if path in expected or is_inexact(x)
        }
        got = {path: jnp.shape(x) for path, x in leaves.items()}
        for path in {**expected, **got}:
            if path not in expected:
                raise ValueError(
                    f"the operator acts on parameters {sorted(expected)}; the vector has {path!r} "
                    "too. To make an operator of some layers act on all parameters, pass params= "
                    "where it is made."
                )
            if expected[path] != got.get(path):
                has = got.get(path, "none there")
                raise ValueError(
                    f"the operator acts on parameters {path or 'at the root'} of shape "
                    f"{expected[path]}; the vector has {has}."
                )
        structure = by_path(self.in_structure())
        return {path: as_real(x, structure[path].dtype) for path, x in leaves.items()}

    def parts(self) -> Mapping[str, Operator]:
        """See `Blocks`."""
        return {layer.name: self.blocks[layer.name] for layer in self.layers}

    def rebuilt(self, parts: Mapping[str, Operator]) -> "Layerwise":
        """See `Blocks`."""
        return dataclasses.replace(self, blocks=dict(parts))

    @property
    def _left(self) -> int:
        """Number of parameters that are in no layer."""
        return self.size - sum(layer.blocks * layer.d_in * layer.d_out for layer in self.layers)

    def trace(self) -> Array:
        """See `Operator`."""
        left = self._left * self.rest
        return left if not self.layers else super().trace() + left

    def det(self) -> Array:
        """See `Operator`."""
        left = self.rest**self._left
        return left if not self.layers else super().det() * left

    def logdet(self) -> Array:
        """See `Operator`."""
        left = self._left * jnp.log(jnp.abs(self.rest)) if self._left else jnp.zeros_like(self.rest)
        return left if not self.layers else super().logdet() + left

    def frobenius_norm(self) -> Array:
        """See `Operator`."""
        left = math.sqrt(self._left) * jnp.abs(self.rest)
        return left if not self.layers else jnp.hypot(super().frobenius_norm(), left)

    def eigenvalues(self) -> Array:
        """See `Operator`."""
        left = jnp.full(self._left, self.rest)
        if not self.layers:
            return left
        return jnp.sort(jnp.concatenate([super().eigenvalues(), left]))

    def power(self, exponent: float, damping: ArrayLike, rule: str):
        """See `Operator`. Parameters in no layer are damped alike, whatever the rule."""
        found, faults = super().power(exponent, damping, rule)
        rest, fault = damped_power(self.rest, self.rest == 0, damping, exponent)
        if self._left:
            faults |= {"parameters in no layer": fault}
        return self._with(found, rest), faults

    def times(self, scalar: Array) -> "Layerwise":
        """See `Operator`."""
        return self._with(super().times(scalar), self.rest * scalar.astype(self.rest.dtype))

    def _with(self, found: Any, rest: Array) -> "Layerwise":
        return dataclasses.replace(found, rest=rest)

    def plus(self, other: Operator) -> Operator:
        """See `Operator`."""
        if isinstance(other, Layerwise) and other.layers == self.layers:
            blocks = {name: op + other.blocks[name] for name, op in self.blocks.items()}
            return dataclasses.replace(self, blocks=blocks, rest=self.rest + other.rest)
        return super().plus(other)


def layerwise(plan: LayerPlan, structure: Structure, blocks: Mapping[str, Operator]) -> Layerwise:
    """The operator that is zero on parameters in no layer.

    Args:
      plan: of the layers.
      structure: of the parameters.
      blocks: by name of the layer.
    """
    layers = tuple(m.layer for members in plan.stacks.values() for m in members)
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
      owner: for messages.
      layers: as `find_layers` returns, which know it, or made by hand.
      params: the parameters, or abstract ones; `None` if not given.
      sizes: d_in and d_out of the layers in their taps.
    """
    if params is None:
        params = getattr(layers, "structure", None)
    if params is not None:
        return Structure.of(params)
    shapes: dict[str, Any] = {}
    for layer in layers:
        views = (layer.kernel, layer.kernel_view), (layer.bias, layer.bias_view)
        if all(path is None or view is not None for path, view in views):
            for path, view in views:
                if path is not None and view is not None:
                    shapes[path] = jax.ShapeDtypeStruct(view.shape, jnp.float32)
            continue
        plain = not layer.block_axes and layer.out_axes == (-1,) and layer.name in sizes
        plain = plain and not layer.is_embedding
        if layer.kernel_view is not None or layer.bias_view is not None or not plain:
            raise ValueError(
                f"{owner}: layer {layer.name!r} was made by hand: pass params=, so that it is "
                "known which shapes its parameters have."
            )
        d_in, d_out = sizes[layer.name]
        if layer.kernel is not None:
            rows = d_in - (layer.bias is not None)
            shapes[layer.kernel] = jax.ShapeDtypeStruct((rows, d_out), jnp.float32)
        if layer.bias is not None:
            shapes[layer.bias] = jax.ShapeDtypeStruct((d_out,), jnp.float32)
    return Structure.of(_nested(shapes))


def _nested(leaves: Mapping[str, Any]) -> Any:
    """Nested dictionaries of leaves given by path."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *above, last = slashed(path).split("/") if slashed(path) else [""]
        level = tree
        for key in above:
            level = level.setdefault(key, {})
        level[last] = leaf
    return tree.get("", tree)
