"""From what was recorded at a use to the canonical form [B, N, S, d]."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optax_kron.capture.analysis.uses import Use
from optax_kron.capture.rules.batch_axes import Data, Link
from optax_kron.capture.rules.layer_rules import Slots, clips
from optax_kron.capture.rules.selections import reaching

# Axes of the canonical form, and the roles of slots that they enumerate.
_INPUT_ROLES = ("block", "data", "position", "input")
_OUTPUT_ROLES = ("block", "data", "position", "output")


_MEMBER = -1  # what the order of positions ends with that are elements of one example
_STEP = 0  # what the order of positions that are steps of a scan begins with


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part of an axis in the canonical order: by role, then by `order`."""

    role: str
    order: Any
    size: int


@dataclasses.dataclass(frozen=True)
class Position:
    """A digit of the positions of a use.

    Attributes:
      order: of the part that it is a digit of.
      after: number of positions in a row that share it, in that part.
      size: number of its values.
      link: which of the losses' elements each is; `None`: they are those in order.
    """

    order: Any
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
        found = reaching(self.link, jnp.moveaxis(x, axis, 0), {}, self.size)
        return jnp.moveaxis(found, 0, axis)


def _position(part: "_Part", after: int, label: Data) -> Position | None:
    """A digit of the positions, if each of its values is that of one of the losses' elements."""
    links = {label.link(mark) for mark in label.marks}
    if len(links) > 1 or label.classes is not None:
        return None
    (link,) = links
    if link.reads or (link.pairs is not None and not link.pairs.is_injective):
        return None
    return Position(part.order, after, label.size, link if link.pairs is not None else None)


class Canonical:
    """How a use's recorded operand and output-gradient become canonical.

    Args:
      use: of a parameter.
      label: where its output holds the data.
      inside: leave out the steps of the scans around it, as seen from inside of them.
    """

    def __init__(self, use: Use, label: Data, *, inside: bool = False):
        self.use = use
        self._steps = [self._scan_parts(depth, label) for depth in range(len(use.scans))]
        scans = [] if inside else self._steps
        data, offset = self._data_slot(label)
        self._data, self._offset, self._label = data, offset, label
        self._members = _members(label)
        output = [*scans, *(self._parts(slots) for slots in use.reading.output_slots)]
        operand = [*scans, *(self._parts(slots) for slots in use.reading.operand_slots)]
        self._output, self._operand = output, operand
        found = {(p.role, p.order): p for axis in (*output, *operand) for p in axis}
        self._all = sorted(found.values(), key=lambda p: p.order)

    @property
    def positions(self) -> int:
        """Number S of positions."""
        return math.prod(p.size for p in self._all if p.role == "position")

    def _scan_parts(self, depth: int, label: Data) -> list[_Part]:
        scan = self.use.scans[depth]
        steps = dict(self.use.view.steps)
        length = scan.loop.length
        if scan in steps:
            return [_digit("block", d) for d in steps[scan]]
        if label.axis is scan:
            return self._data_parts(label, (_STEP, depth))
        return [_Part("position", (_STEP, depth), length)]

    def _data_parts(self, label, order) -> list[_Part]:
        """The data, and the elements of each where several belong to one."""
        members = _members(label)
        if members is None:
            return [_Part("data", (), label.size)]
        return [
            _Part("data", (), members.shape[0]),
            _Part("position", (*order, _MEMBER), members.shape[1]),
        ]

    def _data_slot(self, label):
        """The free slot that holds the data, if they lie along an axis of the output."""
        if not label.on_axis or label.size == 1:
            return None, 1
        inner = 1
        slots = self.use.reading.output_slots
        for slot in reversed(slots[label.axis] if label.axis < len(slots) else ()):
            inside = inner <= label.after and label.after * label.size <= inner * slot.size
            if slot.role == "free" and inside:
                return slot, label.after // inner
            inner *= slot.size
        raise ValueError("the data are spread over the parts of an axis")

    def _parts(self, slots: Slots) -> list[_Part]:
        parts = []
        for slot in slots:
            if slot.role != "free":
                size = 1 if slot.role == "input" and slot.size == 1 else slot.size
                parts.append(dataclasses.replace(_digit(slot.role, slot.key), size=size))
            elif self._data is not None and slot.key == self._data.key:
                size, after = self._label.size, self._offset
                before = slot.size // (size * after)
                parts.append(_Part("position", (1, str(slot.key), 0), before))
                parts.extend(self._data_parts(self._label, (1, str(slot.key), 0)))
                parts.append(_Part("position", (1, str(slot.key), 1), after))
            else:
                parts.append(_Part("position", (1, str(slot.key), 0), slot.size))
        return parts

    def inputs(self, record: Array | None, dtype) -> Array:
        """[B, N, S, d_in] of what was recorded; ones for a bias."""
        if self.use.reading.operand is None:
            record, axes = jnp.ones((), dtype), []
        elif self.use.reading.kind == "conv":
            record, axes = self._patches(record), self._operand
        elif self.use.reading.kind == "embedding":
            record, axes = self._rows(record), self._operand
        else:
            axes = self._operand
        # A place that no element takes reads no row of a table.
        none = self._length if self.use.reading.kind == "embedding" else 0
        return self._arranged(record, axes, _INPUT_ROLES, none)

    def position(self, label: Data) -> Position | None:
        """Which positions the elements along a label's axis are, if they are any."""
        if label.axis in self.use.scans:
            parts = self._steps[self.use.scans.index(label.axis)]
            stepwise = [p.role for p in parts] == ["position"]
            return _position(parts[0], 1, label) if stepwise else None
        slots = self.use.reading.output_slots
        if not label.on_axis or label.axis >= len(slots):
            return None
        inner = 1
        for part in reversed(self._parts(slots[label.axis])):
            after, left = divmod(label.after, inner)
            fits = left == 0 and after > 0 and part.size % (after * label.size) == 0
            if fits and part.role == "position":
                return _position(part, after, label)
            inner *= part.size
        return None

    def spread(self, x: Array, positions: Sequence[Position]) -> Array:
        """[N, S] of [N, ...] with an axis for each of some positions, equal along the others."""
        order, shape, whole = [0], [len(x)], [len(x)]
        for axis, position in enumerate(positions, 1):
            x = position.taken(x, axis)
        for part in [p for p in self._all if p.role == "position"]:
            mine = [(p.after, i) for i, p in enumerate(positions) if p.order == part.order]
            left = part.size
            for after, i in sorted(mine, reverse=True):
                size = positions[i].size
                between = left // (size * after)
                order.append(1 + i)
                shape += [1, size]
                whole += [between, size]
                left = after
            shape.append(1)
            whole.append(left)
        return jnp.broadcast_to(x.transpose(order).reshape(shape), whole).reshape(len(x), -1)

    @property
    def _length(self) -> int:
        """Number of rows of a table."""
        return math.prod(slot.key.size for slot in self.use.reading.operand_slots[-1])

    def _rows(self, indices):
        """The rows that were read; one beyond the table where none was."""
        indices = indices.astype(jnp.promote_types(indices.dtype, jnp.int32))
        node = self.use.node
        if node.name == "gather":
            column = self.use.reading.column
            indices = indices[..., column : column + 1]
        if node.name == "dynamic_slice" or clips(node):
            return jnp.clip(indices, 0, self._length - 1)
        return jnp.where(indices < 0, self._length, indices)

    def only_taken(self, inputs: Array, weights: Array, taken: Array) -> tuple[Array, Array]:
        """Inputs, and what their data or positions weigh, without branches that were not taken.

        Args:
          inputs: [B, N, S, d_in] or indices.
          weights: [N] or [N, S].
          taken: what was recorded once for each step: whether the branch was taken.

        Returns:
          The inputs, and weights [N], [N, S] or [B, N, S].
        """
        there = self._taken(taken)[..., None]
        if self.use.reading.kind == "embedding":
            inputs = jnp.where(there > 0, inputs, self._length)
        else:
            inputs = inputs * there.astype(inputs.dtype)
        return inputs, self.taken_weights(weights, taken)

    def taken_weights(self, weights: Array, taken: Array) -> Array:
        """Weights without branches that were not taken; arguments and result as `only_taken`."""
        there = self._taken(taken).astype(weights.dtype)
        if not self._steps:
            return weights * there[0, 0, 0]
        weights = weights.reshape(len(weights), -1) * there
        blocks = any(p.role == "block" for axis in self._steps for p in axis)
        return weights if blocks else weights[0]

    def _taken(self, taken):
        """[B, N, S]."""
        return self._arranged(taken, self._steps, ("block", "data", "position"))

    def merged_blocks(self, stacked: Array) -> Array:
        """[B, ...] of what is [*steps of scans over blocks, blocks inside, ...]."""
        parts = [p for axis in self._steps for p in axis if p.role == "block"]
        inner = [p for p in self._all if p.role == "block" and p not in parts]
        parts = [*parts, *inner]
        order = sorted(range(len(parts)), key=lambda i: parts[i].order)
        kept = stacked.shape[stacked.ndim - 2 :]
        x = stacked.reshape(*(p.size for p in parts), *kept)
        x = x.transpose(*order, len(parts), len(parts) + 1)
        return x.reshape(-1, *kept)

    def output_grads(self, gradient: Array) -> Array:
        """[B, N, S, d_out] of the cotangent of a perturbation."""
        return self._arranged(gradient, self._output, _OUTPUT_ROLES)

    def by_member(self, x: Array) -> Array:
        """[N, K] of the elements along the data's axis, zero where an example has fewer than K."""
        assert self._members is not None
        return _padded(x, 0, 0)[self._members]

    @property
    def member(self) -> Position | None:
        """The positions of the elements of an example, where several along an axis belong to it."""
        parts = [p for p in self._all if p.role == "position" and p.order[-1] == _MEMBER]
        return Position(parts[0].order, 1, parts[0].size) if parts else None

    def _arranged(self, x, axes, roles, none=0):
        parts = [p for axis in axes for p in axis]
        if self._members is not None and any(p.role == "data" for p in parts):
            # Put the elements of an example side by side.
            i = [p.role for p in parts].index("data")
            sizes = [p.size for p in parts]
            x = x.reshape([*sizes[:i], self._label.size, *sizes[i + 2 :]])
            x = jnp.take(_padded(x, i, none), self._members.ravel(), axis=i)
        x = x.reshape([p.size for p in parts])
        wanted = [p for role in roles for p in self._all if p.role == role]
        if roles[-1] == "input" and self.use.reading.kind == "embedding":
            wanted = [p if p.role != "input" else dataclasses.replace(p, size=1) for p in wanted]
        keys = [(p.role, p.order) for p in parts]
        present = [p for p in wanted if (p.role, p.order) in keys]
        x = x.transpose([keys.index((p.role, p.order)) for p in present])
        x = x.reshape([p.size if (p.role, p.order) in keys else 1 for p in wanted])
        x = jnp.broadcast_to(x, [p.size for p in wanted])
        return x.reshape([math.prod(p.size for p in wanted if p.role == r) for r in roles])

    def _patches(self, record):
        """Patches [*steps, batch, features, *positions] of a convolution's input."""
        params = self.use.node.params
        numbers = params["dimension_numbers"]
        kernel = self.use.node.operands[1].shape
        steps = record.shape[: record.ndim - len(numbers.lhs_spec)]
        x = record.reshape(-1, *record.shape[len(steps) :])
        x = x.transpose(0, *(a + 1 for a in numbers.lhs_spec))
        x = x.reshape(-1, *x.shape[2:])
        patches = jax.lax.conv_general_dilated_patches(
            x,
            [kernel[a] for a in numbers.rhs_spec[2:]],
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            precision=jax.lax.Precision.HIGHEST,
        )
        return patches.reshape(*steps, -1, *patches.shape[1:])


def _members(label: Data) -> np.ndarray | None:
    """For each example the elements that belong to it [N, K], -1 where it has fewer.

    `None` if each element is an example of its own.
    """
    found = label.classes
    if found is None:
        return None
    order = np.argsort(found, kind="stable")
    counts = np.bincount(found)
    members = np.full((len(counts), counts.max()), -1)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    members[found[order], np.arange(len(order)) - first] = order
    return members


def _padded(x: Array, axis: int, value: int) -> Array:
    """With one more element along an axis, which the index -1 takes."""
    return jnp.pad(x, [(0, int(a == axis)) for a in range(x.ndim)], constant_values=value)


def fits(use: Use, label: Data) -> bool:
    """Whether the data of a use's output are apart from the digits of its kernel."""
    try:
        Canonical(use, label)
    except ValueError:
        return False
    return True


def _digit(role, digit) -> _Part:
    return _Part(role, (2, digit.axis, -digit.stride), digit.size)
