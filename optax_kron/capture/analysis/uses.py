"""Where parameters are used: a pass forwards that follows each one to what consumes it.

Every use is linear in its parameter. What is not understood is a `Gap`, with the equation that
stopped it. An output that no example has met yet (a constant direction times a kernel, as in
forward-mode derivatives) is pending: it is followed on, as a parameter is, until it is combined
with batch data, and is perturbed there.
"""

# For `tanh(x @ w.T + b) * scale`, with x [8, 3] and w [4, 3]:
#
#     w       through a transpose, which is a view, to dot_general: a use, whose output [8, 4] is
#             perturbed, and whose operand x is recorded
#     b       to add, beside the output of that use: its bias, if both are read here alone
#     scale   to mul: a use of 4 blocks, with one input and one output each
#
# `e @ w.T` with a constant e [3] is pending. In `tanh(x @ w.T) * (e @ w.T)` it meets the examples
# where it is broadcast to [8, 4]: there the second use of w is perturbed.

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from optax_kron.capture.analysis.batching import Batchings
from optax_kron.capture.analysis.beside import beside
from optax_kron.capture.program.equations import is_reference
from optax_kron.capture.program.graph import Branch, Graph, Node, Operand, Scope, Value
from optax_kron.capture.rules import views
from optax_kron.capture.rules.batch_axes import Batching, Mixed, Separate
from optax_kron.capture.rules.contraction import (
    Contraction,
    Cut,
    IndexInputs,
    RoleFactor,
    roles_of,
)
from optax_kron.capture.rules.elementwise import as_bias, placed
from optax_kron.capture.rules.record import JoinRule
from optax_kron.capture.rules.table import record
from optax_kron.capture.rules.views import NEW, Part, View
from optax_kron.layers.layer import AxisFactor, AxisFactors, spans


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """One use of a parameter.

    Attributes:
      view: The view of the parameter.
      contraction: How it is used.
      node: The equation that uses it.
      output: The value to perturb.
      scans: The scans around it, from the outside.
      branch: The branches around it, as (equation, number).
      step_cuts: Which steps of scans are meant, if not all, as `Contraction.output_cuts`.
    """

    view: View
    contraction: Contraction
    node: Node
    output: Value
    scans: tuple[Node, ...]
    branch: Branch
    step_cuts: tuple[Cut, ...] = ()

    @property
    def leaf(self) -> Value:
        """The parameter."""
        return self.view.origin

    @property
    def role_factors(self) -> list[RoleFactor]:
        """Those of all axes, and of the scans over blocks."""
        axes = (*self.contraction.operand_axes, *self.contraction.output_axes)
        steps = [RoleFactor("block", f, f.size) for _, factors in self.view.steps for f in factors]
        return [*steps, *(factor for axis in axes for factor in axis)]

    def of_kernel(self, role: str) -> AxisFactors:
        """The kernel's factors in a role, in the order of the parameter."""
        return views.merge({f.of_kernel for f in self.role_factors if f.role == role})


@dataclasses.dataclass(frozen=True)
class MergedBias:
    """A bias that is added to a kernel's output.

    Attributes:
      use: The bias as a use by itself.
      value: The input that it has beside those of the kernel: -1 where it is subtracted.
      beside: For each factor of the kernel's blocks and outputs, the bias's factors beside it.
    """

    use: Use
    value: float
    beside: tuple[tuple[AxisFactor, AxisFactors], ...]


@dataclasses.dataclass(frozen=True)
class Gap:
    """A consumption of a parameter that no block describes."""

    leaf: Value
    reason: str
    node: Node


class Consumption(NamedTuple):
    """What consumes the parameters that reach a marked loss.

    Attributes:
      uses: Those that are understood.
      gaps: Those that are not.
      biases: What is added to the output of a use, and to nothing else, by use.
      joins: What values are joined of: those are followed as parameters are.
    """

    uses: list[Use]
    gaps: list[Gap]
    biases: Mapping[Use, MergedBias]
    joins: Mapping[Value, Sequence[Part]]


def find_uses(graph: Graph, leaves: Iterable[Value], batchings: Batchings) -> Consumption:
    """Follow parameters to what consumes them.

    Args:
      graph: The graph of the whole loss.
      leaves: The parameters.
      batchings: The batchings of the graph's values.
    """
    return _Pass(graph, list(leaves), batchings).found


Env = dict[Value, View]  # what values show of a parameter, or of a pending output


class _Pass:
    def __init__(self, graph: Graph, leaves: Sequence[Value], batchings: Batchings):
        self._biases: dict[Use, MergedBias] = {}
        self._joins: dict[Value, list[Part]] = {}
        self.found = Consumption([], [], self._biases, self._joins)
        self._leaves = set(leaves)
        self._batchings = batchings
        self._made: dict[Value, Use] = {}  # by output
        self._pending: dict[Value, Use] = {}  # those whose output has not met the examples
        self._before: dict[Value, Operand] = {}  # what a layout-only image was made from
        self._readers: dict[Value, int] = {}
        self._count_readers(graph, top=True)
        self._visit(graph, {v: views.whole(v) for v in leaves}, Scope())

    def _count_readers(self, graph: Graph, top: bool = False) -> None:
        read = [v for node in graph.nodes for v in node.values]
        for value in read if top else [*read, *graph.outputs]:
            self._readers[value] = self._readers.get(value, 0) + 1
        for node in graph.nodes:
            if node.kind not in ("opaque", "mark"):
                for body in node.bodies:
                    self._count_readers(body)

    # ------------------------------------------------------------------------------- traversal

    def _visit(self, graph: Graph, env: Env, scope: Scope) -> None:
        for node in graph.nodes:
            written = [v for v in node.values if is_reference(v.aval)]
            reached = any(self._batchings[v] is not None for v in (*node.outputs, *written))
            reached |= node.holds_steps and node.has_marks
            if not reached or not any(v in env for v in node.values):
                continue
            if node.kind == "remat":
                self._remat(node, env, scope)
            elif node.kind == "cond":
                self._cond(node, env, scope)
            elif node.kind == "scan":
                self._scan(node, env, scope)
            elif node.kind == "plain":
                self._plain(node, env, scope)
            else:
                self._stop(node, node.values, env, scope)

    def _into(self, body: Graph, operands: Sequence[Operand], env: Env) -> Env:
        """The views of a body's inputs."""
        inner = {}
        for value, outer in zip(body.inputs, operands, strict=True):
            if isinstance(outer, Value) and outer in env:
                inner[value] = env[outer]
                self._before[value] = outer
        return inner

    def _remat(self, node: Node, env: Env, scope: Scope) -> None:
        (body,) = node.bodies
        inner = self._into(body, node.operands, env)
        self._visit(body, inner, scope)
        for outer, value in zip(node.outputs, body.outputs, strict=True):
            if value in inner:
                env[outer] = inner[value]
                self._before[outer] = value

    def _cond(self, node: Node, env: Env, scope: Scope) -> None:
        index, *operands = node.operands
        self._stop(node, [index], env, scope)
        for i, body in enumerate(node.bodies):
            inner = self._without_pending(node, self._into(body, operands, env))
            self._visit(body, inner, scope.in_branch(node, i))
            self._stop(node, body.outputs, inner, scope.in_branch(node, i))

    def _scan(self, node: Node, env: Env, scope: Scope) -> None:
        (body,) = node.bodies
        first = node.loop.constants
        last = first + node.loop.carries
        self._stop(node, node.operands[first:last], env, scope)
        inner = self._without_pending(node, self._into(body, node.operands, env))
        for value in body.inputs[first:last]:
            inner.pop(value, None)
        for value in body.inputs[last:]:
            if value in inner:
                inner[value] = inner[value].stepped(node)
        self._visit(body, inner, scope.in_scan(node))
        self._stop(node, body.outputs, inner, scope.in_scan(node))

    def _without_pending(self, node: Node, inner: Env) -> Env:
        """What enters a loop or a branch, but for outputs that the examples should have met."""
        for view in inner.values():
            if view.origin in self._pending:
                self._gap(view, node)
        return {v: view for v, view in inner.items() if view.origin not in self._pending}

    def _stop(self, node: Node, operands: Iterable[Operand], env: Env, scope: Scope) -> None:
        """What is consumed in a way that is not followed.

        Where a parameter was broadcast to the examples before, and is read by nothing else, it is
        a bias of that: the first carry of a scan, or a token in the place of masked ones.
        """
        read = [x for x in operands if isinstance(x, Value) and x in env]
        for value in dict.fromkeys(read):
            view, batching = env[value], self._batchings[value]
            once = self._readers[value] == read.count(value)
            if once and isinstance(batching, Separate) and view.origin in self._leaves:
                self._note(Use(view, as_bias(view), node, value, *scope), env)
            elif batching is not None:
                self._gap(view, node)

    def _gap(self, view: View, node: Node, reason: str | None = None) -> None:
        """Note a consumption that is not understood, if it is one of a parameter."""
        origin = view.origin
        if origin in self._pending:
            batching = self._batchings[origin]
            if isinstance(batching, Mixed) and batching.node is not None and reason is None:
                reason, node = batching.why, batching.node
            view = self._pending[origin].view
            origin = view.origin
        if origin in self._joins:
            for part in self._joins[origin]:
                if part.overlaps(view):
                    self._gap(part.view, node, reason)
        elif origin in self._leaves:
            self.found.gaps.append(Gap(origin, reason or f"used by {node.name}", node))

    # --------------------------------------------------------------------------------- equations

    def _plain(self, node: Node, env: Env, scope: Scope) -> None:
        rules = record(node)
        if rules.stops:
            return
        shown = [env.get(x) if isinstance(x, Value) else None for x in node.operands]
        if node.images is not None:
            for i, value in zip(node.images, node.outputs, strict=True):
                view = shown[i]
                if view is not None:
                    self._show(value, view, node.operands[i], env)
            return
        if rules.join is not None:
            shown = self._join(node, rules.join, shown, env, scope)
        elif len(shown) == 1 and shown[0] is not None:
            self._follow(node, shown[0], env, scope)
            return
        if rules.powers is not None and isinstance(self._batchings[node.outputs[0]], Mixed):
            shown = self._scale(node, rules.powers, shown, env, scope)
        parameters = [(i, v) for i, v in enumerate(shown) if v and v.origin in self._leaves]
        if len(parameters) == 1 and rules.signs is not None:
            shown = self._add(node, parameters[0][0], shown, env, scope)
        elif len(parameters) == 1 and rules.layer is not None:
            ((i, view),) = parameters
            contraction = rules.layer(node, i, view)
            if contraction is not None:
                self._note(Use(view, contraction, node, node.outputs[0], *scope), env)
                shown[i] = None
        left = [x for x, view in zip(node.operands, shown, strict=True) if view is not None]
        self._stop(node, left, env, scope)

    def _add(
        self, node: Node, i: int, shown: list[View | None], env: Env, scope: Scope
    ) -> list[View | None]:
        """A parameter, operand `i`, plus something else; returns the views not dealt with."""
        output, view, other = node.outputs[0], shown[i], shown[1 - i]
        signs = record(node).signs or (1, 1)
        assert view is not None
        view = view.times(signs[i])
        if other is not None and other.origin in self._pending:
            # Neither is combined with batch data: as what stopped one, tell of both.
            self._gap(other, node)
            gap = self.found.gaps[-1]
            self._gap(view, gap.node, gap.reason)
            return [None, None]
        left = [None if k == i else v for k, v in enumerate(shown)]
        if isinstance(self._batchings[output], Mixed):
            env[output] = view  # a parameter plus something else is still an image of it
            self._before[output] = node.operands[i]
            return left
        rule = record(node).layer
        contraction = rule and rule(node, i, view)
        if contraction is None:
            return shown
        use = Use(view, contraction, node, output, *scope)
        self._merge(use, node.operands[1 - i], other and other.times(signs[1 - i]))
        self._note(use, env)
        return left

    def _scale(
        self,
        node: Node,
        powers: tuple[int, int],
        shown: list[View | None],
        env: Env,
        scope: Scope,
    ) -> list[View | None]:
        """A parameter times what has one element; returns the views not dealt with."""
        for i, view in enumerate(shown):
            one = self._batchings.known.single(node.operands[1 - i])
            if view is None or one is None or powers[i] != 1:
                continue
            scaled = views.scaled(view, one, powers[1 - i], scope.scans)
            if scaled is not None:
                self._show(node.outputs[0], scaled, node.operands[i], env)
                if shown[1 - i] is not None:  # a parameter, too, that has one element
                    self._stop(node, [node.operands[1 - i]], env, scope)
                return [None, None]
        return shown

    def _join(
        self, node: Node, rule: JoinRule, shown: list[View | None], env: Env, scope: Scope
    ) -> list[View | None]:
        """Parameters beside each other, or beside others; returns the views not dealt with."""
        output = node.outputs[0]
        views_of = [(i, v) for i, v in enumerate(shown) if v and v.origin in self._leaves]
        parts = [rule(node, i, view) for i, view in views_of]
        if isinstance(self._batchings[output], Mixed):
            if parts:
                self._joins[output] = parts
                self._leaves.add(output)
                env[output] = views.whole(output)
        else:
            for part in parts:
                self._note(Use(part.view, placed(part, output), node, output, *scope), env)
        left = {i for i, _ in views_of}
        return [None if i in left else view for i, view in enumerate(shown)]

    def _follow(self, node: Node, view: View, env: Env, scope: Scope) -> None:
        rule = record(node).view
        images = rule and rule(node, view)
        if images is None:
            self._stop(node, node.operands, env, scope)
            return
        for output, image in zip(node.outputs, images, strict=True):
            self._show(output, image, node.operands[0], env)

    def _show(self, output: Value, image: View, operand: Operand, env: Env) -> None:
        """Note that an output is an image of what its operand shows."""
        env[output] = image
        self._before[output] = operand
        if image.origin in self._pending and isinstance(self._batchings[output], Separate):
            self._resolve(image, output)
            del env[output]

    def _note(self, use: Use, env: Env) -> None:
        of_kernel = {f.of_kernel for f in use.role_factors if f.role != "free"}
        if any(scan not in use.scans for scan, _ in use.view.steps) or any(
            f.axis == NEW for f in of_kernel
        ):
            self._gap(use.view, use.node, f"broadcast before {use.node.name}")
            return
        if isinstance(self._batchings[use.output], Separate):
            self.found.uses.append(use)
        else:
            self._pending[use.output] = use
        if use.contraction.inputs is not None:
            self._made[use.output] = use
            env[use.output] = views.whole(use.output)

    def _resolve(self, view: View, point: Value) -> None:
        """A pending output meets the examples at `point`, an image of it: perturb it there."""
        use = self._pending[view.origin]
        axes = [
            roles_of(factors, use.contraction.output_axes, ("new", a))
            for a, factors in enumerate(view.axes)
        ]
        # All of the output is perturbed or none: the rest would get no gradient.
        sliced = view.part != spans(view.origin.shape)
        if sliced or None in axes:
            reason = f"{'sliced' if sliced else 'reshaped'} before it is combined with batch data"
            mixed = why_mixed(self._batchings[view.origin])
            self._gap(view, use.node, None if mixed else reason)
            return
        output_axes = tuple(roles for roles in axes if roles is not None)
        contraction = dataclasses.replace(use.contraction, output_axes=output_axes)
        shown = use.view.times(view.scale, view.scales)
        self.found.uses.append(
            dataclasses.replace(use, view=shown, contraction=contraction, output=point)
        )

    def _merge(self, bias: Use, other: Operand, view: View | None) -> None:
        """Give a bias to the kernel whose output it is added to, if each is read once, here."""
        if view is None or view.origin not in self._made:
            return
        kernel = self._made[view.origin]
        if kernel.output in self._pending or kernel in self._biases:
            return
        if bias.view.scales or view.scales:
            return  # its input would be known only when the program runs
        apart = kernel.scans != bias.scans or kernel.branch != bias.branch or view.steps
        if isinstance(kernel.contraction.inputs, IndexInputs) or apart:
            return
        # From here back to the kernel's output nobody else may read what is between.
        while isinstance(other, Value) and self._readers.get(other, 0) == 1:
            if other is view.origin:
                pairs = beside(kernel, view, bias)
                if pairs is not None:
                    # f·z + c·b is f·(z + c/f·b).
                    value = bias.view.scale / view.scale
                    self._biases[kernel] = MergedBias(bias, value, pairs)
                return
            other = self._before[other]


def why_mixed(batching: Batching) -> str | None:
    """Why examples are mixed, if they are and more is known of it than the equation."""
    return batching.reason if isinstance(batching, Mixed) else None
