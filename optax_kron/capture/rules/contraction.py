"""How an equation uses a parameter: which factors of its axes meet which axes of the equation."""

# A kernel [d_in, d_out] in `x @ kernel`, with x [N, T, d_in], has the contraction
#
#     operand_axes = ((free 0,), (free 1,), (input,))      of x
#     output_axes  = ((free 0,), (free 1,), (output,))     of x @ kernel
#
# with one `RoleFactor` in each axis here; after a reshape of the kernel an axis has several. Free
# factors have a name that operand and output share. They are the examples and the positions: which
# of them is which, the batch axis of the output tells.

import dataclasses
import math
from collections.abc import Iterable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int, Shaped

from optax_kron.capture.program.graph import Node, Value
from optax_kron.capture.rules.views import NEW
from optax_kron.layers.layer import AxisFactor, AxisFactors


@dataclasses.dataclass(frozen=True)
class RoleFactor:
    """A factor of an axis, and what it enumerates.

    Attributes:
      role: "block", "input" or "output" factors of the kernel; or "free": examples and positions.
      key: The kernel's factor; of free ones, a name that operand and output share.
      size: Number of elements.
    """

    role: str
    key: AxisFactor | tuple[object, int]
    size: int

    @property
    def of_kernel(self) -> AxisFactor:
        """The kernel's factor."""
        assert isinstance(self.key, AxisFactor), f"{self} is of no parameter"
        return self.key


RoleFactors = tuple[RoleFactor, ...]


def role_factors(role: str, factors: AxisFactors, axis: int) -> RoleFactors:
    """A kernel's factors in a role; free where a broadcast made them, along an axis."""
    return tuple(
        RoleFactor("free", (axis, n), f.size) if f.axis == NEW else RoleFactor(role, f, f.size)
        for n, f in enumerate(factors)
    )


def free(axis: int, size: int) -> RoleFactors:
    """All of an axis that the kernel does not have."""
    return (RoleFactor("free", (axis, 0), size),)


def roles_of(
    factors: AxisFactors, axes: tuple[RoleFactors, ...], name: object
) -> RoleFactors | None:
    """The role factors of an output that some factors of its axes enumerate.

    Args:
      factors: Of the axes of the output; those that a broadcast made are free.
      axes: The role factors of each axis.
      name: A name for the free ones.
    """
    roles: list[RoleFactor] = []
    for n, factor in enumerate(factors):
        if factor.axis == NEW:
            roles.append(RoleFactor("free", (name, n), factor.size))
            continue
        inner, part = 1, []
        for role in reversed(axes[factor.axis]):
            if inner >= factor.stride and inner * role.size <= factor.stride * factor.size:
                part.insert(0, role)
            inner *= role.size
        if math.prod(role.size for role in part) != factor.size:
            return None
        roles.extend(part)
    return tuple(roles)


class Cut(NamedTuple):
    """The part of an array that belongs to a use: `start` to `stop` along an axis.

    Axes are counted from the last, as -1 is: before them are those of steps, and of columns.
    """

    axis: int
    start: int
    stop: int


def cut(x: Shaped[Array, "..."], cuts: Iterable[Cut], behind: int = 0) -> Shaped[Array, "..."]:
    """A part of an array: one cut after the other, of axes with others behind them."""
    for axis, start, stop in cuts:
        x = jax.lax.slice_in_dim(x, start, stop, axis=axis - behind)
    return x


@dataclasses.dataclass(frozen=True)
class DenseInputs:
    """Inputs that are recorded as they are.

    Attributes:
      operand: The value to record.
    """

    operand: Value
    fill: ClassVar[int] = 0  # in the place of an element that an example lacks

    def read(self, record: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """The inputs, with the axes of `Contraction.operand_axes`, of what was recorded."""
        return record


@dataclasses.dataclass(frozen=True)
class PatchInputs(DenseInputs):
    """Images that a convolution meets in patches.

    Attributes:
      operand: The images.
      node: The convolution.
    """

    node: Node

    def read(self, record: Shaped[Array, "*steps_images"]) -> Shaped[Array, "*steps_patches"]:
        """Patches [*steps, batch, features, *positions] of images; steps are those of scans.

        Features are those of the kernel's inputs, then its window: 3 channels under a window of
        5 x 5 make 75.
        """
        numbers = self.node.params["dimension_numbers"]
        kernel = self.node.operands[1].shape
        steps = record.shape[: record.ndim - len(numbers.lhs_spec)]
        x = record.reshape(-1, *record.shape[len(steps) :])
        x = x.transpose(0, *(a + 1 for a in numbers.lhs_spec))
        x = x.reshape(-1, *x.shape[2:])
        patches = jax.lax.conv_general_dilated_patches(
            x,
            [kernel[a] for a in numbers.rhs_spec[2:]],
            *(self.node.params[k] for k in ("window_strides", "padding")),
            *(self.node.params[k] for k in ("lhs_dilation", "rhs_dilation")),
            precision=jax.lax.Precision.HIGHEST,
        )
        return patches.reshape(*steps, -1, *patches.shape[1:])


@dataclasses.dataclass(frozen=True)
class IndexInputs:
    """Rows of a table: the input is an index, in place of a one-hot vector.

    Attributes:
      operand: The indices.
      length: Number of rows of the table.
      column: Of indices [..., columns], the one that says the row; `None` if all do.
      clips: Whether indices beyond the table are brought back to its ends; else they read no row.
    """

    operand: Value
    length: int
    column: int | None
    clips: bool

    @property
    def fill(self) -> int:
        """In the place of an element that an example lacks: it reads no row."""
        return self.length

    def read(self, record: Int[Array, "..."]) -> Int[Array, "..."]:
        """The rows that were read; one beyond the table where none was."""
        indices = record.astype(jnp.promote_types(record.dtype, jnp.int32))
        if self.column is not None:
            indices = indices[..., self.column : self.column + 1]
        if self.clips:
            return jnp.clip(indices, 0, self.length - 1)
        return jnp.where(indices < 0, self.length, indices)


@dataclasses.dataclass(frozen=True)
class Contraction:
    """One linear use of a parameter.

    Attributes:
      kind: "dense", "conv", "embedding" or "bias": a word for tables.
      inputs: What to record; `None` for a bias, whose input is one.
      operand_axes: Factors of each axis of the inputs (for a convolution: of its patches).
      output_axes: Factors of each axis of the output.
      operand_cuts: Which part of the inputs is meant, if not all.
      output_cuts: Which part of the output.
    """

    kind: str
    inputs: DenseInputs | IndexInputs | None
    operand_axes: tuple[RoleFactors, ...]
    output_axes: tuple[RoleFactors, ...]
    operand_cuts: tuple[Cut, ...] = ()
    output_cuts: tuple[Cut, ...] = ()

    @property
    def operand(self) -> Value | None:
        """The value to record."""
        return None if self.inputs is None else self.inputs.operand
