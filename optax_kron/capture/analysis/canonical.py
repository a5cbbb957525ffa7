"""From what was recorded at a use to the canonical form [B, N, S, d].

Every axis of what was recorded is cut into parts, each with a role: it counts blocks, examples,
positions or features. Then one reshape, one transpose in the canonical order and one more reshape
make the form.
"""

# For `x @ w`, with 8 sequences of 5 tokens flattened to x [40, 3], in a scan of 2 steps that share
# w [3, 4]:
#
#     recorded input     [2, 40, 3]     steps; 40 = 8 examples of 5 positions; 3 inputs
#     parts              [2, 8, 5, 3]   position, example, position, input
#     in order           [8, 2, 5, 3]   example, position, position, input
#     canonical          [1, 8, 10, 3]  B = 1, N = 8, S = 2 * 5, d_in = 3
#
# If the scan were over the layers of a stacked kernel [2, 3, 4], its steps would be blocks: B = 2,
# S = 5. An output-gradient [V, 2, 40, 4] becomes [V, 1, 8, 10, 4] in the same way.

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Shaped

from optax_kron.capture.analysis.uses import Use
from optax_kron.capture.program.graph import Value
from optax_kron.capture.rules.batch_axes import Link, Separate
from optax_kron.capture.rules.contraction import (
    Cut,
    DenseInputs,
    IndexInputs,
    RoleFactor,
    RoleFactors,
    cut,
)
from optax_kron.capture.rules.indexing import reaching
from optax_kron.layers.layer import AxisFactor

# Axes of the canonical form, and the roles of the parts that they enumerate.
_INPUT_ROLES = ("block", "example", "position", "input")
_OUTPUT_ROLES = ("block", "example", "position", "output")

# Parts of one role are ordered by a tuple, whose first entry says what they are: positions that are
# steps of a scan come first, then those along axes, then what the kernel enumerates.
_STEP, _FREE, _KERNEL = 0, 1, 2
# What the order of positions ends with that are elements of one example.
_MEMBER = -1
_Order = tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part of an axis in the canonical order: by role, then by `order`."""

    role: str
    order: _Order
    size: int


@dataclasses.dataclass(frozen=True)
class Position:
    """A factor of the positions of a use.

    Attributes:
      order: The order of the part that it is a factor of.
      after: Number of positions in a row that share it, in that part.
      size: Number of its values.
      link: Which of the losses' elements each is; `None`: they are those in order.
    """

    order: _Order
    after: int
    size: int
    link: Link | None = None

    @property
    def is_step(self) -> bool:
        """Whether it counts the steps of a scan."""
        return self.order[0] == _STEP

    def taken(self, x: Array, axis: int) -> Array:
        """Its values, from those of the losses along an axis; zero where there is no loss."""
        if self.link is None:
            return x
        values = reaching(self.link, jnp.moveaxis(x, axis, 0), {}, self.size)
        return jnp.moveaxis(values, 0, axis)


def _position(part: _Part, after: int, batching: Separate) -> Position | None:
    """A factor of the positions, if each of its values is that of one of the losses' elements."""
    links = {batching.link(mark) for mark in batching.marks}
    if len(links) > 1 or batching.classes is not None:
        return None
    (link,) = links
    if link.reads or (link.pairs is not None and not link.pairs.is_injective):
        return None
    return Position(part.order, after, batching.size, link if link.pairs is not None else None)


class Canonical:
    """How a use's recorded operand and output-gradient become canonical.

    Args:
      use: A use of a parameter.
      batching: Where its output holds the examples.
      inside: Leave out the steps of the scans around it, as seen from inside of them.

    Raises:
      ValueError: If the examples are spread over parts of an axis that the kernel enumerates.
    """

    def __init__(self, use: Use, batching: Separate, *, inside: bool = False):
        self.use = use
        self._batching = batching
        self._members = _members(batching)
        self._shared, self._offset = self._batch_factor()
        self._steps = [self._scan_parts(depth) for depth in range(len(use.scans))]
        scans = [] if inside else self._steps
        self._output = [*scans, *map(self._parts, use.contraction.output_axes)]
        self._operand = [*scans, *map(self._parts, use.contraction.operand_axes)]
        by_key = {(p.role, p.order): p for axis in (*self._output, *self._operand) for p in axis}
        self._all = sorted(by_key.values(), key=lambda p: p.order)

    # ------------------------------------------------------------------------------------ parts

    def _batch_factor(self) -> tuple[RoleFactor | None, int]:
        """The free factor that holds the examples, if they lie along an axis, and its `after`."""
        batching = self._batching
        if not batching.on_axis or batching.size == 1:
            return None, 1
        inner = 1
        axes = self.use.contraction.output_axes
        if any(batching.number == c.axis + len(axes) for c in self.use.contraction.output_cuts):
            raise ValueError("the examples are cut")
        for factor in reversed(axes[batching.number] if batching.number < len(axes) else ()):
            fits = inner <= batching.after
            fits &= batching.after * batching.size <= inner * factor.size
            if factor.role == "free" and fits:
                return factor, batching.after // inner
            inner *= factor.size
        raise ValueError("the examples are spread over parts of an axis")

    def _scan_parts(self, depth: int) -> list[_Part]:
        """What the steps of a scan count: blocks, examples or positions."""
        scan = self.use.scans[depth]
        steps = dict(self.use.view.steps)
        if scan in steps:
            return [_kernel_part("block", f) for f in steps[scan]]
        if self._batching.axis is scan:
            return self._example_parts((_STEP, depth))
        return [_Part("position", (_STEP, depth), scan.loop.length)]

    def _example_parts(self, order: _Order) -> list[_Part]:
        """The examples, and the elements of each where several belong to one."""
        if self._members is None:
            return [_Part("example", (), self._batching.size)]
        return [
            _Part("example", (), self._members.shape[0]),
            _Part("position", (*order, _MEMBER), self._members.shape[1]),
        ]

    def _parts(self, factors: RoleFactors) -> list[_Part]:
        parts = []
        for factor in factors:
            order = (_FREE, str(factor.key))
            if factor.role != "free":
                part = _kernel_part(factor.role, factor.of_kernel)
                # An index has one number in the place of a row of many.
                parts.append(dataclasses.replace(part, size=factor.size))
            elif self._shared is not None and factor.key == self._shared.key:
                size, after = self._batching.size, self._offset
                parts.append(_Part("position", (*order, 0), factor.size // (size * after)))
                parts.extend(self._example_parts((*order, 0)))
                parts.append(_Part("position", (*order, 1), after))
            else:
                parts.append(_Part("position", (*order, 0), factor.size))
        return parts

    @functools.cached_property
    def _position_parts(self) -> list[_Part]:
        return [p for p in self._all if p.role == "position"]

    @property
    def positions(self) -> int:
        """Number S of positions."""
        return math.prod(p.size for p in self._position_parts)

    def position(self, batching: Separate) -> Position | None:
        """Which positions the elements along an axis are, if they are any.

        Args:
          batching: of the use's output, if the losses held examples along another axis than they
            do: where this holds them, that axis is.
        """
        for scan, parts in zip(self.use.scans, self._steps, strict=True):
            if batching.axis is scan:
                stepwise = [p.role for p in parts] == ["position"]
                return _position(parts[0], 1, batching) if stepwise else None
        axes = self.use.contraction.output_axes
        if not batching.on_axis or batching.number >= len(axes):
            return None
        inner = 1
        for part in reversed(self._parts(axes[batching.number])):
            after, left = divmod(batching.after, inner)
            fits = left == 0 and after > 0 and part.size % (after * batching.size) == 0
            if fits and part.role == "position":
                return _position(part, after, batching)
            inner *= part.size
        return None

    @property
    def member(self) -> Position | None:
        """The positions of the elements of an example, where several along an axis belong to it."""
        parts = [p for p in self._position_parts if p.order[-1] == _MEMBER]
        return Position(parts[0].order, 1, parts[0].size) if parts else None

    # ----------------------------------------------------------------------------------- arrays

    def inputs(
        self,
        record: Shaped[Array, "..."] | None,
        dtype: DTypeLike,
        scales: Mapping[Value, Array] | None = None,
    ) -> Shaped[Array, "B N S d_in"]:
        """Of what was recorded; ones for a bias.

        Args:
          record: what was recorded.
          dtype: that of the ones.
          scales: the values that scale the parameter before its use, if there are some.
        """
        inputs = self.use.contraction.inputs
        if inputs is None or record is None:
            return self._arranged(jnp.ones((), dtype), [], _INPUT_ROLES)
        x = self._own(inputs.read(record), self.use.contraction.operand_cuts, len(self._operand))
        x = self._arranged(x, self._operand, _INPUT_ROLES, inputs.fill)
        return x if isinstance(inputs, IndexInputs) else self._scaled(x, scales)

    def output_grads(
        self, gradient: Shaped[Array, "..."], scales: Mapping[Value, Array] | None = None
    ) -> Shaped[Array, "B N S d_out"]:
        """Of the cotangent of a perturbation; `scales` as for `inputs`."""
        g = self._own(gradient, self.use.contraction.output_cuts, len(self._output))
        g = self._arranged(g, self._output, _OUTPUT_ROLES)
        # Beside an index, or the one of a bias, it is the gradient that a scaled parameter scales.
        scales_inputs = isinstance(self.use.contraction.inputs, DenseInputs)
        return g if scales_inputs else self._scaled(g, scales)

    def _own(self, x: Array, cuts: Sequence[Cut], ndim: int) -> Array:
        """The part of an array that belongs to the use, which has `ndim` axes with the steps."""
        return cut(cut(x, cuts), self.use.step_cuts, behind=ndim - len(self._steps))

    def _scaled(self, x: Array, scales: Mapping[Value, Array] | None) -> Array:
        """An array, multiplied by what the parameter is multiplied by before its use."""
        view = self.use.view
        if view.scale != 1:
            x = x * jnp.asarray(view.scale, x.dtype)
        for value, power, scans in view.scales:
            assert scales is not None
            depth = len(scans)
            own = scales[value].reshape([scan.loop.length for scan in scans]).astype(x.dtype)
            # Cuts of steps count from the innermost scan, which may be one around the use alone.
            inner = len(self.use.scans) - depth
            cuts = [c._replace(axis=c.axis + inner) for c in self.use.step_cuts]
            own = cut(own, [c for c in cuts if c.axis < 0])
            own = self._arranged(own, self._steps[:depth], ("block", "example", "position"))
            own = own[..., None]
            # Nothing was recorded where a branch was not taken.
            x = x * own if power == 1 else x / jnp.where(own == 0, 1, own)
        return x

    def _arranged(
        self, x: Array, axes: Sequence[Sequence[_Part]], roles: Sequence[str], fill: int = 0
    ) -> Array:
        """An array with an axis for each role, of one whose axes have some parts."""
        parts = [p for axis in axes for p in axis]
        if self._members is not None and any(p.role == "example" for p in parts):
            # Put the elements of an example side by side.
            i = [p.role for p in parts].index("example")
            sizes = [p.size for p in parts]
            x = x.reshape([*sizes[:i], self._batching.size, *sizes[i + 2 :]])
            x = jnp.take(_padded(x, i, fill), self._members.ravel(), axis=i)
        x = x.reshape([p.size for p in parts])
        wanted = [p for role in roles for p in self._all if p.role == role]
        if roles[-1] == "input" and isinstance(self.use.contraction.inputs, IndexInputs):
            wanted = [p if p.role != "input" else dataclasses.replace(p, size=1) for p in wanted]
        keys = [(p.role, p.order) for p in parts]
        present = [p for p in wanted if (p.role, p.order) in keys]
        x = x.transpose([keys.index((p.role, p.order)) for p in present])
        # What is recorded only of the output, as positions of a broadcast input, is repeated.
        x = x.reshape([p.size if (p.role, p.order) in keys else 1 for p in wanted])
        x = jnp.broadcast_to(x, [p.size for p in wanted])
        return x.reshape([math.prod(p.size for p in wanted if p.role == r) for r in roles])

    def spread(
        self, x: Shaped[Array, "N ..."], positions: Sequence[Position]
    ) -> Shaped[Array, "N S"]:
        """[N, S] of [N, ...] with an axis for each of some positions, equal along the others.

        For 2 * 5 positions, steps of a scan and tokens, and x [8, 5] of the tokens alone: through
        [8, 1, 5] to [8, 2, 5] to [8, 10].
        """
        order, narrow, full = [0], [len(x)], [len(x)]
        for axis, position in enumerate(positions, 1):
            x = position.taken(x, axis)
        for part in self._position_parts:
            mine = [(p.after, i) for i, p in enumerate(positions) if p.order == part.order]
            left = part.size
            for after, i in sorted(mine, reverse=True):
                size = positions[i].size
                between = left // (size * after)
                order.append(1 + i)
                narrow += [1, size]
                full += [between, size]
                left = after
            narrow.append(1)
            full.append(left)
        return jnp.broadcast_to(x.transpose(order).reshape(narrow), full).reshape(len(x), -1)

    def by_member(self, x: Shaped[Array, " elements"]) -> Shaped[Array, "N K"]:
        """Elements along the batch axis by example, zero where one has fewer than K."""
        assert self._members is not None
        return _padded(x, 0, 0)[self._members]

    # --------------------------------------------------------------------------------- branches

    def only_taken(
        self,
        inputs: Shaped[Array, "B N S d_in"],
        weights: Float[Array, " N"] | Float[Array, "N S"],
        taken: Float[Array, "..."],
    ) -> tuple[Shaped[Array, "B N S d_in"], Float[Array, "..."]]:
        """Inputs, and weights of examples or positions, without branches that were not taken.

        Args:
          inputs: numbers or indices.
          weights: of examples, or of their positions.
          taken: what was recorded once for each step: whether the branch was taken.

        Returns:
          The inputs, and weights [N], [N, S] or [B, N, S].
        """
        there = self._taken(taken)[..., None]
        read = self.use.contraction.inputs
        if isinstance(read, IndexInputs):
            inputs = jnp.where(there > 0, inputs, read.fill)
        else:
            inputs = inputs * there.astype(inputs.dtype)
        return inputs, self.taken_weights(weights, taken)

    def taken_weights(
        self, weights: Float[Array, " N"] | Float[Array, "N S"], taken: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Weights without branches that were not taken; arguments and result as `only_taken`."""
        there = self._taken(taken).astype(weights.dtype)
        if not self._steps:
            return weights * there[0, 0, 0]
        weights = weights.reshape(len(weights), -1) * there
        blocks = any(p.role == "block" for axis in self._steps for p in axis)
        return weights if blocks else weights[0]

    def _taken(self, taken: Float[Array, "..."]) -> Float[Array, "B N S"]:
        taken = self._own(taken, (), len(self._steps))
        return self._arranged(taken, self._steps, ("block", "example", "position"))

    def merged_blocks(self, stacked: Shaped[Array, "..."]) -> Shaped[Array, "B d width"]:
        """[B, ...] of what is [*steps of scans over blocks, blocks inside, ...]."""
        parts = [p for axis in self._steps for p in axis if p.role == "block"]
        parts = [*parts, *(p for p in self._all if p.role == "block" and p not in parts)]
        order = sorted(range(len(parts)), key=lambda i: parts[i].order)
        kept = stacked.shape[stacked.ndim - 2 :]
        x = stacked.reshape(*(p.size for p in parts), *kept)
        x = x.transpose(*order, len(parts), len(parts) + 1)
        return x.reshape(-1, *kept)


def _members(batching: Separate) -> Int[np.ndarray, "N K"] | None:
    """For each example the elements that belong to it, -1 where it has fewer.

    `None` if each element is an example of its own. Classes [0, 1, 0, 1, 1] have the members
    [[0, 2, -1], [1, 3, 4]].
    """
    classes = batching.classes
    if classes is None:
        return None
    order = np.argsort(classes, kind="stable")
    counts = np.bincount(classes)
    members = np.full((len(counts), counts.max()), -1)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    members[classes[order], np.arange(len(order)) - first] = order
    return members


def _padded(x: Array, axis: int, value: int) -> Array:
    """With one more element along an axis, which the index -1 takes."""
    return jnp.pad(x, [(0, int(a == axis)) for a in range(x.ndim)], constant_values=value)


def fits(use: Use, batching: Separate) -> bool:
    """Whether the examples of a use's output are apart from the factors of its kernel."""
    try:
        Canonical(use, batching)
    except ValueError:
        return False
    return True


def _kernel_part(role: str, factor: AxisFactor) -> _Part:
    return _Part(role, (_KERNEL, factor.axis, -factor.stride), factor.size)
