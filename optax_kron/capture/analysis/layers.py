"""From the uses of parameters to layers: what shares a block, and what has none and why."""

# Of `einsum("nti,io->nto", x, w) + b`, then `tanh(..) @ w.T`, and `qkv[:, :4]` beside `qkv[:, 4:]`:
#
#     w     two uses with other roles, as inputs of one are outputs of the other: in no layer, with
#           that reason; if it were used twice in one direction: one layer, two uses in its group;
#           if one of the two were a lookup: a tied embedding, with a group for each
#     b     its kernel is in no layer, so that it is a layer of its own
#     qkv   two parts, each with its uses: two layers, "qkv[0:3,0:4]" and "qkv[0:3,4:8]"

import dataclasses
import itertools
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax.core
import jax.numpy as jnp

from optax_kron.capture.analysis import marks as marked
from optax_kron.capture.analysis.batching import Batchings
from optax_kron.capture.analysis.canonical import fits
from optax_kron.capture.analysis.joined import apart
from optax_kron.capture.analysis.marks import Mark
from optax_kron.capture.analysis.positions import Positions
from optax_kron.capture.analysis.roles import is_lookup, shared_roles, tiles, within
from optax_kron.capture.analysis.uses import Consumption, Use, find_uses, why_mixed
from optax_kron.capture.program.equations import Program
from optax_kron.capture.program.graph import Graph, Value, build
from optax_kron.capture.program.knowledge import Knowledge
from optax_kron.capture.program.retraced import Renewed
from optax_kron.capture.rules.batch_axes import Read, Separate, same_examples, share_examples
from optax_kron.capture.rules.table import integer_rule
from optax_kron.layers.layer import Arrangement, AxisFactors, Layer, spans
from optax_kron.layers.tied import head_of

_FEW_MARKS = 8  # more are not tried out one by one


@dataclasses.dataclass(frozen=True, eq=False)
class CapturedLayer:
    """A layer and the uses of its parameters.

    Attributes:
      layer: The layer as the user sees it.
      groups: Uses that share their examples; each group makes one tap.
      biased: The uses to which the layer's bias is added, and its input there: mostly one.
    """

    layer: Layer
    groups: Sequence[Sequence[Use]]
    biased: Mapping[Use, float]

    @property
    def uses(self) -> list[Use]:
        """Those of all groups, in order."""
        return [use for group in self.groups for use in group]

    def seen_by(self, group: Sequence[Use]) -> Layer:
        """The layer as a group of its uses sees it: a tied embedding as a table, or as a head."""
        is_head = self.layer.is_tied and not is_lookup(group[0])
        return head_of(self.layer) if is_head else self.layer

    def without_bias(self) -> "CapturedLayer":
        """The layer of the kernel alone."""
        layer = dataclasses.replace(self.layer, bias=None, bias_view=None)
        return CapturedLayer(layer, self.groups, {})

    def with_max_size(self, max_size: int) -> "CapturedLayer":
        """The layer with another longest axis that has a dense factor.

        Numbers that are added at each position, as those of a positional embedding [T, D], have a
        block for each. All of them count as one axis: T factors [D, D] would take D times as much
        memory as they do.
        """
        layer = self.layer
        if layer.kernel is None and layer.blocks * layer.d_out > max_size and layer.blocks > 1:
            max_size = min(max_size, max(layer.d_out - 1, 1))
        layer = dataclasses.replace(layer, max_size=max_size)
        return dataclasses.replace(self, layer=layer)


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """What is known of a loss function.

    Attributes:
      program: The program of the function.
      graph: The graph of the program.
      leaves: The parameters' values by path.
      marks: The marked losses.
      batchings: The batchings of all values.
      layers: Those that were captured.
      uncovered: Why parameters are in no layer, by path.
      positions: Which of them are elements of the losses.
      renewed: Of a later trace of the program, the equations in the place of those of the graph.
    """

    program: Program
    graph: Graph
    leaves: Mapping[str, Value]
    marks: Sequence[Mark]
    batchings: Batchings
    layers: Sequence[CapturedLayer]
    uncovered: Mapping[str, str]
    positions: Positions
    renewed: Renewed = dataclasses.field(default_factory=dict)

    @property
    def uses(self) -> list[Use]:
        """All uses of the layers, in order."""
        return [use for layer in self.layers for use in layer.uses]

    def batching(self, use: Use) -> Separate:
        """Where the output of a use holds its examples."""
        return self.batchings.separate(use.output)

    @property
    def reads(self) -> list[Read]:
        """The reads of rows between the layers and their losses."""
        links = (link for use in self.uses for _, link in self.batching(use).links)
        return list(dict.fromkeys(read for link in links for _, read in link.reads))

    @property
    def scales(self) -> list[Value]:
        """The values by which parameters are multiplied before their use."""
        return list(dict.fromkeys(s.value for use in self.uses for s in use.view.scales))

    @property
    def closes_over_tracers(self) -> bool:
        """Whether it is of a trace around the loss function, and ends with it."""
        return any(isinstance(value.constant, jax.core.Tracer) for value in self.graph.constants)

    def examples_of(self, marks: Iterable[int]) -> int:
        """The number of examples for which columns of some marks are scaled, one for all of them.

        Marks differ in it where one of them has the losses of selected examples alone.
        """
        counts = [mark.examples for mark in self.marks]
        for use in self.uses:
            if len({counts[m] for m in self.batching(use).marks}) > 1:
                return max(counts)
        return max(counts[m] for m in marks)

    def marks_of(self, uses: Iterable[Use]) -> frozenset[int]:
        """The marks that some uses reach."""
        return frozenset().union(*(self.batching(use).marks for use in uses))

    def of_layers(self, layers: Iterable[CapturedLayer]) -> "Analysis":
        """The same with other layers."""
        return dataclasses.replace(self, layers=tuple(layers))

    def without_biases(self, reasons: Mapping[str, str]) -> "Analysis":
        """The same without the biases of some layers, by name, with the reasons."""
        dropped = {
            captured.layer.bias: reasons[captured.layer.name]
            for captured in self.layers
            if captured.layer.name in reasons and captured.layer.bias is not None
        }
        layers = [f.without_bias() if f.layer.name in reasons else f for f in self.layers]
        uncovered = {**self.uncovered, **dropped}
        return dataclasses.replace(self, layers=tuple(layers), uncovered=uncovered)


def analyse(program: Program, paths: Iterable[str]) -> Analysis:
    """Find the layers of a loss.

    Where a mark holds the examples is tried out: what covers most parameters is taken. Marks of one
    shape are most likely alike, so they go together first.

    Args:
      program: The program of the loss.
      paths: The paths of the parameters, which are its first inputs.

    Raises:
      ValueError: If a marked loss has no examples.
    """
    graph = build(program)
    for node in graph.walk():
        if node.kind == "mark" and 0 in node.outputs[0].shape:
            raise ValueError(
                f"the loss at {node.place} has no examples: its per-example losses have shape "
                f"{node.outputs[0].shape}."
            )
    leaves = dict(zip(paths, graph.inputs, strict=False))
    known = Knowledge(graph, leaves.values(), integer_rule)
    flattened = marked.flattened(graph)
    unplaced = marked.find(graph)
    candidates = [marked.candidates(mark, flattened) for mark in unplaced]
    alike: dict[Hashable, list[int]] = {}
    for i, mark in enumerate(unplaced):
        alike.setdefault((mark.shape, mark.scans), []).append(i)
    groups = list(alike.values())
    if len(groups) < len(unplaced) <= _FEW_MARKS:
        groups += [[i] for i in range(len(unplaced))]

    def at(marks: Sequence[Mark]) -> Analysis:
        batchings = Batchings(graph, marks, known)
        # Of what has no elements nothing is followed.
        used = [leaf for leaf in leaves.values() if 0 not in leaf.shape]
        consumed = apart(find_uses(graph, used, batchings))
        assembly = _Assembly(leaves, batchings, consumed)
        layers, uncovered = assembly.layers(), assembly.uncovered
        positions = Positions(graph, marks, known)
        return Analysis(program, graph, leaves, marks, batchings, layers, uncovered, positions)

    # The likeliest first; then each group of marks in turn is moved to where more is covered.
    best = at([mark.at(axes[0]) for mark, axes in zip(unplaced, candidates, strict=True)])
    for group in groups:
        for axis in candidates[group[0]]:
            if _is_complete(best):
                return best
            if all(best.marks[i].batch_axis == axis for i in group):
                continue
            tried = at([m.at(axis) if i in group else m for i, m in enumerate(best.marks)])
            best = max(best, tried, key=_coverage)
    return best


def _is_complete(analysis: Analysis) -> bool:
    """Whether every parameter that reaches a mark is in a layer."""
    return all(analysis.batchings[analysis.leaves[path]] is None for path in analysis.uncovered)


def _coverage(analysis: Analysis) -> int:
    """The number of parameters that are in layers."""
    paths = {path for captured in analysis.layers for path in captured.layer.paths}
    return sum(math.prod(analysis.leaves[path].shape) for path in paths)


class _Part(NamedTuple):
    """A part of a parameter that is used apart from the others.

    Attributes:
      path: The path of the parameter.
      uses: The uses of the part.
      arrangement: The arrangement of the part, into blocks, inputs and outputs.
      groups: The uses that share examples.
      is_tied: Whether it is a table, and the head as well: groups are of lookups, or of the head.
    """

    path: str
    uses: list[Use]
    arrangement: Arrangement
    groups: list[list[Use]]
    is_tied: bool


class _Assembly:
    """Puts uses together to layers.

    Args:
      leaves: The parameters' values by path.
      batchings: The batchings of all values.
      consumed: What consumes the parameters.
    """

    def __init__(self, leaves: Mapping[str, Value], batchings: Batchings, consumed: Consumption):
        self._leaves, self._batchings, self._biases = leaves, batchings, consumed.biases
        self._paths = {value: path for path, value in leaves.items()}
        self._uses: dict[Value, list[Use]] = {value: [] for value in leaves.values()}
        for use in consumed.uses:
            self._uses[use.leaf].append(use)
        self.uncovered: dict[str, str] = {}
        for gap in consumed.gaps:
            place = f" ({gap.node.place})" if gap.node.place else ""
            self.uncovered.setdefault(self._paths[gap.leaf], gap.reason + place)
        for use in consumed.uses:
            reason = self._misfit(use)
            if reason is not None:
                self.uncovered.setdefault(self._paths[use.leaf], f"{reason} ({use.node.place})")
        for path, value in leaves.items():
            if 0 in value.shape:
                self.uncovered[path] = "has no elements"
            elif batchings[value] is None:
                self.uncovered[path] = "reaches no marked loss"
            elif jnp.issubdtype(value.dtype, jnp.complexfloating):
                self.uncovered[path] = "is complex; a real parameter may hold both of its parts"
            elif not self._uses[value]:
                self.uncovered.setdefault(path, "never combined with batch data")

    def _misfit(self, use: Use) -> str | None:
        """Why a use is no use of a layer."""
        values = (use.output, use.contraction.operand)
        if any(v is not None and jnp.issubdtype(v.dtype, jnp.complexfloating) for v in values):
            return "is combined with complex values"
        if any(scan.loop.length == 0 for scan in use.scans):
            return "is used in a loop without steps"
        if fits(use, self._batchings.separate(use.output)):
            return None
        return why_mixed(self._batchings[use.node.outputs[0]]) or "is not shared by examples"

    def layers(self) -> list[CapturedLayer]:
        """The layers; what is in none joins `uncovered`."""
        parts = []
        for path, value in self._leaves.items():
            if path not in self.uncovered:
                parts.extend(self._parts(path, value))
        return _named(self._merge_biases(parts))

    def _parts(self, path: str, value: Value) -> list[_Part]:
        """The parts of a parameter that are used apart, each with its uses and its roles."""
        by_part: dict[tuple[tuple[int, int], ...], list[Use]] = {}
        for use in self._uses[value]:
            by_part.setdefault(use.view.part, []).append(use)
        # qkv[:, :4] beside qkv[:, 4:] are two layers; beside qkv[:, 3:] they would share a column.
        for one, other in itertools.combinations(by_part, 2):
            if all(a < d and c < b for (a, b), (c, d) in zip(one, other, strict=True)):
                self.uncovered[path] = "overlapping parts of it are used"
                return []
        parts = []
        for part, uses in by_part.items():
            # Lookups first: a tied embedding has its roles from them.
            sides = [[u for u in uses if is_lookup(u) is lookup] for lookup in (True, False)]
            sides = [side for side in sides if side]
            factors = shared_roles(sides)
            if factors is None:
                reason = "used in two orientations, as w and w.T, or by reverse mode in the loss"
                self.uncovered[path] = reason
                return []
            if not tiles(part, factors):
                self.uncovered[path] = "only some of its elements are used"
                return []
            groups: list[list[Use]] = []
            for side in sides:
                found = self._groups(side)
                if found is None:
                    reason = "is used on different selections of the examples in one loss"
                    self.uncovered[path] = reason
                    return []
                groups += found
            uses = [use for side in sides for use in side]
            arrangement = Arrangement(value.shape, part, factors)
            parts.append(_Part(path, uses, arrangement, groups, is_tied=len(sides) > 1))
        return parts

    def _groups(self, uses: Iterable[Use]) -> list[list[Use]] | None:
        """Uses that share examples: those that reach a mark in common, of the same branch."""
        groups: list[list[Use]] = []
        for use in uses:
            # It may share examples with several groups: then all of them become one.
            joined = [use]
            for group in [g for g in groups if g[0].branch == use.branch]:
                if any(self._compare(share_examples, use, other) for other in group):
                    groups.remove(group)
                    joined = [*group, *joined]
            groups.append(joined)
        same = (
            self._compare(same_examples, group[0], use) for group in groups for use in group[1:]
        )
        return groups if all(same) else None

    def _compare(self, question, one: Use, other: Use) -> bool:
        return question(*(self._batchings.separate(use.output) for use in (one, other)))

    def _merge_biases(self, parts: Iterable[_Part]) -> list[CapturedLayer]:
        """Make a bias one more input of its kernel where it is added to nothing else."""
        merged, gone = [], set()
        for part in parts:
            layer = self._with_bias(part)
            biased = {use: self._biases[use].value for use in part.uses if use in self._biases}
            if layer is None:
                layer, biased = _without_bias(part), {}
            else:
                gone.add(layer.bias)
            merged.append((part.path, CapturedLayer(layer, part.groups, biased)))
        return [layer for path, layer in merged if path not in gone]

    def _with_bias(self, part: _Part) -> Layer | None:
        """The layer of a kernel and of its bias, if it has one that is of no other."""
        if part.is_tied:  # that of the head has no place among the rows
            return None
        merged = [self._biases[use] for use in part.uses if use in self._biases]
        paths = {self._paths[bias.use.leaf] for bias in merged}
        if len(paths) != 1 or len({bias.beside for bias in merged}) != 1:
            return None
        (path,) = paths
        shape, uses = self._leaves[path].shape, {bias.use for bias in merged}
        # A bias that is also used elsewhere, or in part, has a curvature that this kernel's is not.
        full = all(use.view.part == spans(shape) for use in uses)
        if not full or set(self._uses[self._leaves[path]]) != uses or path in self.uncovered:
            return None
        pairs = dict(merged[0].beside)

        def beside(role: AxisFactors) -> AxisFactors:
            """The bias's factors in the order of the kernel's."""
            ordered = sorted(pairs, key=lambda f: (f.axis, -f.stride))
            mine = [f for f in ordered if any(within(f, kernel) for kernel in role)]
            return tuple(factor for f in mine for factor in pairs[f])

        blocks, _, outputs = part.arrangement.roles
        return Layer(
            name=part.path,
            kernel=part.path,
            bias=path,
            kind=part.uses[0].contraction.kind,
            kernel_view=part.arrangement,
            bias_view=Arrangement(shape, spans(shape), (beside(blocks), beside(outputs))),
        )


def _without_bias(part: _Part) -> Layer:
    contraction = part.uses[0].contraction
    if contraction.inputs is None:
        blocks, _, outputs = part.arrangement.roles
        view = dataclasses.replace(part.arrangement, roles=(blocks, outputs))
        return Layer(name=part.path, bias=part.path, kind=contraction.kind, bias_view=view)
    return Layer(
        name=part.path,
        kernel=part.path,
        is_embedding=is_lookup(part.uses[0]),
        kind="tied embedding" if part.is_tied else contraction.kind,
        kernel_view=part.arrangement,
        is_tied=part.is_tied,
    )


def _named(layers: Sequence[CapturedLayer]) -> list[CapturedLayer]:
    """Name layers by what holds their parameters, or by the parameter where that is not unique."""
    paths = [captured.layer.paths[0] for captured in layers]
    parents = [path.rpartition("/")[0] or path for path in paths]
    named = []
    for captured, path, parent in zip(layers, paths, parents, strict=True):
        name = parent if parents.count(parent) == 1 else path
        view = captured.layer.kernel_view or captured.layer.bias_view
        if view is not None and not view.is_whole:
            name = f"{path}[{','.join(f'{a}:{b}' for a, b in view.part)}]"
        layer = dataclasses.replace(captured.layer, name=name)
        named.append(dataclasses.replace(captured, layer=layer))
    return named
