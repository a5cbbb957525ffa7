"""Blocks on a mesh: each device owns some rows of every stack, and works on those alone.

Inside of `jax.set_mesh(mesh)` the first axis of every stack is cut, after it was padded to a
multiple of the devices with blocks that never see a gradient. Gradients, however they are sharded,
become stacks by one exchange, each device does what one device does with its own rows, and a second
exchange brings updates back to where the gradients were. Of 17 blocks, on a mesh of 2×4 devices:

    gradients → stack [24, 64, 64], 3 rows on each of the 8 devices → updates

Between the exchanges devices agree on single numbers alone, such as whether all is finite.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Bool, Shaped

from optax_kron.kernels import explicit
from optax_kron.transforms import program
from optax_kron.types import PyTree

Spec = Any  # a PartitionSpec, in trees that have arrays in its place
WHOLE: Spec = explicit.WHOLE  # the same on all devices
ANY: Spec = PartitionSpec(PartitionSpec.UNCONSTRAINED)  # as the compiler likes

# Of NumPy, as it is known without a mesh; on one the rows of a device are an array of JAX.
Table = TypeVar("Table", bound=np.ndarray | Array | None)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Share:
    """Which rows of a stack a device owns; without a mesh it owns all of them.

    Attributes:
      axes: Names of the mesh axes that cut stacks.
      devices: How many devices these count.
      automatic: Whether the compiler chooses shardings, rather than types of arrays.
    """

    axes: tuple[str, ...] = ()
    devices: int = 1
    automatic: bool = True

    @property
    def is_alone(self) -> bool:
        """Whether there is no mesh to think of."""
        return not self.axes

    @property
    def cut(self) -> Spec:
        """The sharding of a stack."""
        return WHOLE if self.is_alone else PartitionSpec(self.axes)

    # ------------------------------------------------------------------------ from the whole mesh

    def globally(self, make: Callable[..., PyTree], *operands: PyTree, out: PyTree) -> PyTree:
        """`make(*operands)`, on all of every array, with the result spread as `out` says.

        The compiler finds how to make it, whatever the types of arrays say of their shardings.

        Args:
          make: Of pytrees of arrays.
          *operands: Those, and what else it takes.
          out: A tree, or a prefix of one, of shardings: `cut`, `WHOLE`, those of `shardings`, or
            `ANY`. What is cut has a number of rows that is a multiple of the devices.
        """
        if self.is_alone:
            return make(*operands)
        arrays, rebuild = program.parts(operands)

        def spread(arrays):
            made = make(*rebuild(arrays))
            specs = jax.tree.broadcast(out, made, is_leaf=_is_spec)
            return jax.tree.map(_constrained, made, specs)

        if self.automatic:
            return spread(arrays)
        return jax.sharding.auto_axes(spread, out_sharding=out)(arrays)

    def split(self, make: Callable[..., PyTree], tree: PyTree, *settings: PyTree) -> PyTree:
        """Stacks `make(tree, *settings)`, cut, of arrays that are sharded in any way.

        One exchange for each stack. Where nothing is known to be sharded, all rows are put together
        on every device first, which gathers those that are: left alone, the compiler would send the
        rows one by one, also those that every device has.
        """
        specs = [] if self.automatic else map(explicit.spec_of, jax.tree.leaves(tree))
        sharded = any(any(spec) for spec in specs)

        def together(tree, *settings):
            made = make(tree, *settings)
            return made if sharded else self.gathered(made)

        return self.globally(together, tree, *settings, out=self.cut)

    def shardings(self, tree: PyTree) -> PyTree:
        """Those of the leaves of a tree, where their types tell; else `ANY`."""
        if self.automatic:
            return jax.tree.map(lambda _: ANY, tree)
        return explicit.shardings(tree)

    def gathered(self, stacks: PyTree) -> PyTree:
        """Stacks with all rows on every device, inside of what is made `globally`.

        One collective for each. Left alone, the compiler takes one for every use of their rows.
        """
        if self.is_alone:
            return stacks
        return jax.tree.map(lambda x: _constrained(x, WHOLE), stacks)

    def run(
        self,
        function: Callable[..., PyTree],
        operands: tuple[PyTree, ...],
        cut: tuple[PyTree, ...],
        out: PyTree,
    ) -> PyTree:
        """`function(*operands)`, on every device with its own rows.

        Args:
          function: Of pytrees of arrays.
          operands: Those.
          cut: For each of them, or parts of them, `self.cut` or `WHOLE`.
          out: The same for the result.
        """
        if self.is_alone:
            return function(*operands)
        return jax.shard_map(function, in_specs=cut, out_specs=out)(*operands)

    # ------------------------------------------------------------------------ from a single device

    def own(self, table: Table) -> Table:
        """Of a table of all rows of a stack, [N, ...] or `None`, the device's own."""
        if self.is_alone or table is None:
            return table
        count = len(table) // self.devices
        first = jax.lax.axis_index(self.axes) * count
        rows: PyTree = jax.lax.dynamic_slice_in_dim(jnp.asarray(table), first, count)
        return rows

    def any(self, condition: Bool[Array, "*shape"]) -> Bool[Array, "*shape"]:
        """Whether something holds on any device."""
        if self.is_alone:
            return condition
        return jax.lax.psum(condition.astype(jnp.int32), self.axes) > 0

    def all(self, condition: Bool[Array, "*shape"]) -> Bool[Array, "*shape"]:
        """Whether something holds on all devices."""
        return condition if self.is_alone else ~self.any(~condition)

    def sum(self, x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
        """The sum over devices."""
        return x if self.is_alone else jax.lax.psum(x, self.axes)

    def max(self, x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
        """The largest of numbers that are not NaN."""
        return x if self.is_alone else jax.lax.pmax(x, self.axes)


ALONE = Share()  # without a mesh


# Names of the mesh axes that may cut stacks; `None`: all.
_allowed: contextvars.ContextVar[tuple[str, ...] | None] = contextvars.ContextVar(
    "allowed mesh axes", default=None
)


@contextlib.contextmanager
def allowing(axes: Sequence[str]) -> Iterator[None]:
    """Stacks are cut along these mesh axes alone, and the same along all others."""
    token = _allowed.set(tuple(axes))
    try:
        yield
    finally:
        _allowed.reset(token)


def ambient() -> Share:
    """The share of a device of the mesh of `jax.set_mesh`.

    Inside of `jax.shard_map` a program is that of one device, which owns all that it sees.

    Raises:
      ValueError: If axes are named by `allowing` that there are not, or cannot take part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    typed = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    # Of a single device too, explicit axes are in the types of arrays.
    if mesh.empty or mesh.manual_axes or (mesh.size == 1 and not typed):
        return ALONE
    # Types tell of explicit axes alone: where there are any, others take no part.
    axes = typed or tuple(mesh.axis_names)
    allowed = _allowed.get()
    if allowed is not None:
        if not allowed or not set(allowed) <= set(axes):
            raise ValueError(
                f"over_axes: blocks can be spread over the mesh axes {axes}; got {allowed}. Name "
                "one or more of these."
            )
        axes = tuple(name for name in axes if name in allowed)
    return Share(axes, math.prod(mesh.shape[name] for name in axes), automatic=not typed)


def _is_spec(x: object) -> bool:
    return isinstance(x, PartitionSpec)


def _constrained(x: Array, spec: PartitionSpec) -> Array:
    return x if spec is ANY else jax.lax.with_sharding_constraint(x, spec)
