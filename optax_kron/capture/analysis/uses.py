"""Where parameters are used: a pass forwards that follows each one to what consumes it.

Every use is linear in its parameter. What is not understood is a `Gap`, with the equation that
stopped it. An output that no datum has met yet (a constant direction times a kernel, as in
forward-mode derivatives) is followed on until one does.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from optax_kron.capture.analysis.labelling import Labels
from optax_kron.capture.program.equations import is_reference
from optax_kron.capture.program.graph import Branch, Graph, Node, Value
from optax_kron.capture.rules import layer_rules as readers
from optax_kron.capture.rules import views
from optax_kron.capture.rules.batch_axes import Coupled, Data
from optax_kron.capture.rules.layer_rules import Reading, Slot, Slots
from optax_kron.capture.rules.views import NEW, AxisFactor, AxisFactors, View


@dataclasses.dataclass(eq=False)
class Use:
    """One use of a parameter.

    Attributes:
      view: of the parameter.
      reading: how it is read.
      node: the equation that reads it.
      output: the value to perturb.
      scans: the scans around it, from the outside.
      branch: the branches around it, as (equation, number).
      bias: the bias that is added to the output, and to nothing else.
    """

    view: View
    reading: Reading
    node: Node
    output: Value
    scans: tuple[Node, ...]
    branch: Branch
    bias: "MergedBias | None" = None

    @property
    def leaf(self) -> Value:
        """The parameter."""
        return self.view.origin

    @property
    def slots(self) -> list[Slot]:
        """All slots, those of the scans among them."""
        axes = (*self.reading.operand_slots, *self.reading.output_slots)
        steps = [Slot("block", d, d.size) for _, digits in self.view.steps for d in digits]
        return [*steps, *(slot for axis in axes for slot in axis)]

    def digits(self, role: str) -> AxisFactors:
        """The kernel's digits of a role, in the order of the parameter."""
        return views.merge({slot.key for slot in self.slots if slot.role == role})


@dataclasses.dataclass(frozen=True)
class MergedBias:
    """A bias that is added to a kernel's output.

    Attributes:
      use: the bias as a use by itself.
      digits: for each digit of the kernel's blocks and outputs, the bias's digits beside it.
    """

    use: Use
    digits: tuple[tuple[AxisFactor, AxisFactors], ...]


@dataclasses.dataclass(frozen=True)
class Gap:
    """A consumption of a parameter that no block describes."""

    leaf: Value
    reason: str
    node: Node | None = None


class Uses:
    """All uses of parameters that reach a marked loss."""

    def __init__(self, graph: Graph, leaves: Sequence[Value], labels: Labels):
        self.found: list[Use] = []
        self.gaps: list[Gap] = []
        self._leaves = set(leaves)
        self._labels = labels
        self._made: dict[Value, Use] = {}  # by output
        self._pending: dict[Value, Use] = {}  # those whose output has not met the data
        self._before: dict[Value, Value] = {}  # what a layout-only image was made from
        self._readers: dict[Value, int] = {}
        self._count_readers(graph, top=True)
        self._visit(graph, {v: views.whole(v) for v in leaves}, (), ())

    def _count_readers(self, graph: Graph, top: bool = False) -> None:
        read = [v for node in graph.nodes for v in node.values]
        for value in read if top else [*read, *graph.outputs]:
            self._readers[value] = self._readers.get(value, 0) + 1
        for node in graph.nodes:
            if node.kind not in ("opaque", "mark"):
                for body in node.bodies:
                    self._count_readers(body)

    # ------------------------------------------------------------------------------- traversal

    def _visit(self, graph: Graph, env: dict[Value, View], scans, branch) -> None:
        for node in graph.nodes:
            written = [v for v in node.values if is_reference(v.aval)]
            reached = any(self._labels[v] is not None for v in (*node.outputs, *written))
            reached |= node.kind in ("scan", "remat", "cond") and node.has_marks
            if not reached or not any(v in env for v in node.values):
                continue
            if node.kind == "remat":
                self._remat(node, env, scans, branch)
            elif node.kind == "cond":
                self._cond(node, env, scans, branch)
            elif node.kind == "scan":
                self._scan(node, env, scans, branch)
            elif node.kind == "plain":
                self._plain(node, env, scans, branch)
            else:
                self._stop(node, node.values, env)

    def _into(self, body: Graph, operands, env):
        """The views of a body's inputs."""
        inner = {}
        for value, outer in zip(body.inputs, operands, strict=True):
            if isinstance(outer, Value) and outer in env:
                inner[value] = env[outer]
                self._before[value] = outer
        return inner

    def _remat(self, node, env, scans, branch):
        (body,) = node.bodies
        inner = self._into(body, node.operands, env)
        self._visit(body, inner, scans, branch)
        for outer, value in zip(node.outputs, body.outputs, strict=True):
            if value in inner:
                env[outer] = inner[value]
                self._before[outer] = value

    def _cond(self, node, env, scans, branch):
        index, *operands = node.operands
        self._stop(node, [index], env)
        for i, body in enumerate(node.bodies):
            inner = self._without_pending(node, self._into(body, operands, env))
            self._visit(body, inner, scans, (*branch, (node, i)))
            self._stop(node, body.outputs, inner)

    def _scan(self, node, env, scans, branch):
        (body,) = node.bodies
        first = node.loop.constants
        last = first + node.loop.carries
        self._stop(node, node.operands[first:last], env)
        inner = self._without_pending(node, self._into(body, node.operands, env))
        for value in body.inputs[first:last]:
            inner.pop(value, None)
        for value in body.inputs[last:]:
            if value in inner:
                inner[value] = inner[value].stepped(node)
        self._visit(body, inner, (*scans, node), branch)
        self._stop(node, body.outputs, inner)

    def _without_pending(self, node, inner):
        """What enters a loop or a branch, but for outputs that should have met the data before."""
        for view in inner.values():
            if view.origin in self._pending:
                self._gap(view, node)
        return {v: view for v, view in inner.items() if view.origin not in self._pending}

    def _stop(self, node, operands, env):
        for value in operands:
            if isinstance(value, Value) and value in env and self._labels[value] is not None:
                self._gap(env[value], node)

    def _gap(self, view: View, node: Node, reason: str | None = None) -> None:
        """Note a consumption that is not understood, if it is one of a parameter."""
        origin = view.origin
        if origin in self._pending:
            label = self._labels[origin]
            if isinstance(label, Coupled) and label.node is not None and reason is None:
                reason, node = label.why, label.node
            origin = self._pending[origin].leaf
        if origin in self._leaves:
            self.gaps.append(Gap(origin, reason or f"used by {node.name}", node))

    # --------------------------------------------------------------------------------- equations

    def _plain(self, node, env, scans, branch):
        if node.name == "stop_gradient":
            return
        seen = [env.get(x) if isinstance(x, Value) else None for x in node.operands]
        if node.images is not None:
            for i, value in zip(node.images, node.outputs, strict=True):
                if seen[i] is not None:
                    self._show(value, seen[i], node.operands[i], env)
            return
        output = node.outputs[0]
        label = self._labels[output]
        if len(seen) == 1 and seen[0] is not None:
            self._follow(node, seen[0], env)
            return
        weights = [i for i, v in enumerate(seen) if v is not None and v.origin in self._leaves]
        if len(weights) == 1:
            (i,) = weights
            view: Any = seen[i]
            adds = node.name in ("add", "add_any")
            other = seen[1 - i] if adds else None
            if other is not None and other.origin in self._pending:
                self._gap(other, node)
                self.gaps.append(dataclasses.replace(self.gaps[-1], leaf=view.origin))
                seen = []
            elif adds and isinstance(label, Coupled):
                env[output] = view  # a parameter plus something else is still an image of it
                self._before[output] = node.operands[i]
                seen[i] = None
            else:
                reading = readers.bias(view) if adds else readers.read(node, i, view)
                if reading is not None:
                    use = Use(view, reading, node, output, scans, branch)
                    if adds:
                        self._merge(use, node.operands[1 - i], seen[1 - i])
                    self._note(use, label, env)
                    seen[i] = None
        for view in seen:
            if view is not None:
                self._gap(view, node)

    def _follow(self, node, view, env):
        images = views.follow(node, view)
        if images is None:
            self._gap(view, node)
            return
        for output, image in zip(node.outputs, images, strict=True):
            self._show(output, image, node.operands[0], env)

    def _show(self, output, image, operand, env):
        """Note that an output is an image of what its operand shows."""
        env[output] = image
        self._before[output] = operand
        if image.origin in self._pending and isinstance(self._labels[output], Data):
            self._resolve(image, output)
            del env[output]

    def _note(self, use, label, env):
        digits = {slot.key for slot in use.slots if slot.role != "free"}
        if any(scan not in use.scans for scan, _ in use.view.steps) or any(
            d.axis == NEW for d in digits
        ):
            self._gap(use.view, use.node, f"broadcast before {use.node.name}")
            return
        if isinstance(label, Data):
            self.found.append(use)
        else:
            self._pending[use.output] = use
        if use.reading.kind != "bias":
            self._made[use.output] = use
            env[use.output] = views.whole(use.output)

    def _resolve(self, view, point):
        """A pending output meets the data at `point`, an image of it: perturb it there."""
        use = self._pending[view.origin]
        axes = []
        for a, digits in enumerate(view.axes):
            slots = _slots_of(digits, use.reading.output_slots, ("new", a))
            if slots is None:
                label = self._labels[view.origin]
                told = isinstance(label, Coupled) and label.reason is not None
                self._gap(view, use.node, None if told else "reshaped before it meets the data")
                return
            axes.append(slots)
        reading = dataclasses.replace(use.reading, output_slots=tuple(axes))
        self.found.append(dataclasses.replace(use, reading=reading, output=point))

    def _merge(self, bias: Use, other: Value, view: View | None) -> None:
        """Give a bias to the kernel whose output it is added to, if each is read once, here."""
        if view is None or view.origin not in self._made:
            return
        kernel = self._made[view.origin]
        if kernel.output in self._pending or kernel.bias is not None:
            return
        apart = kernel.scans != bias.scans or kernel.branch != bias.branch or view.steps
        if kernel.reading.kind == "embedding" or apart:
            return
        while other is not view.origin:
            if self._readers.get(other, 0) != 1:
                return
            other = self._before[other]
        if self._readers.get(other, 0) != 1:
            return
        pairs = _pair(kernel, view, bias)
        if pairs is not None:
            kernel.bias = MergedBias(bias, pairs)


def _slots_of(digits: AxisFactors, axes: tuple[Slots, ...], name) -> Slots | None:
    """The slots of an output that some digits of its axes enumerate."""
    found: list[Slot] = []
    for n, digit in enumerate(digits):
        if digit.axis == NEW:
            found.append(Slot("free", (name, n), digit.size))
            continue
        inner, part = 1, []
        for slot in reversed(axes[digit.axis]):
            if inner >= digit.stride and inner * slot.size <= digit.stride * digit.size:
                part.insert(0, slot)
            inner *= slot.size
        if math.prod(slot.size for slot in part) != digit.size:
            return None
        found.extend(part)
    return tuple(found)


def _pair(kernel: Use, view: View, bias: Use) -> tuple[tuple[AxisFactor, AxisFactors], ...] | None:
    """Which digits of a bias stand beside which of the kernel's blocks and outputs.

    `None` unless they match one to one: then the bias is one more input, of ones, of the kernel.
    """
    pairs: dict[AxisFactor, AxisFactors] = {}
    steps = dict(bias.view.steps)
    if set(steps) != {scan for scan, _ in kernel.view.steps}:
        return None
    for scan, digits in kernel.view.steps:
        groups = views.regroup(steps[scan], [d.size for d in digits])
        if groups is None:
            return None
        pairs.update(zip(digits, groups, strict=True))
    for digits, beside in zip(view.axes, bias.view.axes, strict=True):
        slots = _slots_of(digits, kernel.reading.output_slots, None)
        groups = None if slots is None else views.regroup(beside, [s.size for s in slots])
        if slots is None or groups is None:
            return None
        for slot, group in zip(slots, groups, strict=True):
            if any((d.axis == NEW) != (slot.role == "free") for d in group):
                return None
            if slot.role != "free":
                pairs[slot.key] = group
    expected = {s.key for s in kernel.slots if s.role in ("block", "output")}
    return tuple(pairs.items()) if set(pairs) == expected else None
