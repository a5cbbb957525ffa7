"""From the uses of parameters to layers: what shares a block, and what has none and why."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from optax_kron.capture.analysis import marks
from optax_kron.capture.analysis.canonical import fits
from optax_kron.capture.analysis.labelling import Labels
from optax_kron.capture.analysis.marks import Mark
from optax_kron.capture.analysis.uses import Use, Uses
from optax_kron.capture.program.graph import Graph, Value
from optax_kron.capture.program.knowledge import Knowledge
from optax_kron.capture.rules import views
from optax_kron.capture.rules.batch_axes import Coupled, Data, Read, same_examples, shares_data
from optax_kron.layers.layer import Arrangement, Layer

_FEW_MARKS = 8  # more are not tried out one by one


@dataclasses.dataclass(eq=False)
class Member:
    """A layer and the uses of its parameters, in groups that share their data."""

    layer: Layer
    groups: list[list[Use]]
    biased: frozenset[Use]  # the uses to which the layer's bias is added

    def without_bias(self) -> "Member":
        """The layer of the kernel alone."""
        layer = dataclasses.replace(self.layer, bias=None, bias_view=None)
        return Member(layer, self.groups, frozenset())


@dataclasses.dataclass(eq=False)
class Analysis:
    """What is known of a loss function.

    Attributes:
      graph: of the function.
      leaves: the parameters' values by path.
      marks: the marked losses.
      labels: of all values.
      members: the layers.
      uncovered: why parameters are in no layer, by path.
      known: of the graph's values.
    """

    graph: Graph
    leaves: Mapping[str, Value]
    marks: list[Mark]
    labels: Labels
    members: list[Member]
    uncovered: dict[str, str]
    known: Knowledge

    @property
    def uses(self) -> list[Use]:
        """All uses of the layers, in order."""
        return [use for member in self.members for group in member.groups for use in group]

    def label(self, use: Use) -> Data:
        """Where the output of a use holds its data."""
        return self.labels.data(use.output)

    @property
    def reads(self) -> list[Read]:
        """The reads of rows between the layers and their losses."""
        links = (link for use in self.uses for _, link in self.label(use).links)
        return list(dict.fromkeys(read for link in links for _, read in link.reads))

    def data_of(self, marks: Iterable[int]) -> int:
        """The number of data for which columns of some marks are scaled: the same for all of them.

        Marks differ in it where one of them has the losses of selected examples alone.
        """
        counts = [mark.count for mark in self.marks]
        for use in self.uses:
            if len({counts[m] for m in self.label(use).marks}) > 1:
                return max(counts)
        return max(counts[m] for m in marks)

    def drop_bias(self, name: str, reason: str) -> None:
        """Take the bias from a layer: it is in none then."""
        (i,) = (i for i, member in enumerate(self.members) if member.layer.name == name)
        bias = self.members[i].layer.bias
        assert bias is not None
        self.uncovered[bias] = reason
        self.members[i] = self.members[i].without_bias()

    def marks_of(self, uses: Iterable[Use]) -> frozenset[int]:
        """The marks that some uses reach."""
        return frozenset().union(*(self.labels.data(use.output).marks for use in uses))


def analyse(graph: Graph, leaves: Mapping[str, Value]) -> Analysis:
    """Find the layers of a loss.

    Where a mark holds the data is tried out: what covers most parameters is taken. Marks of one
    shape are most likely alike, so they go together first.

    Args:
      graph: of the loss.
      leaves: the parameters' values by path.
    """
    found = marks.find(graph)
    known = Knowledge(graph, leaves.values())
    flattened = marks.flattened(graph)
    candidates = {mark: marks.candidates(mark, flattened) for mark in found}
    alike: dict[Any, list[Mark]] = {}
    for mark in found:
        mark.place = candidates[mark][0]
        alike.setdefault((mark.node.outputs[0].shape, mark.scans), []).append(mark)
    groups = list(alike.values())
    if len(groups) < len(found) <= _FEW_MARKS:
        groups += [[mark] for mark in found]
    best = _analyse(graph, leaves, found, known)
    for group in groups:
        kept = [mark.place for mark in group]
        for candidate in candidates[group[0]]:
            if _is_complete(best):
                break
            for mark in group:
                mark.place = candidate
            tried = _analyse(graph, leaves, found, known)
            if _coverage(tried) > _coverage(best):
                best, kept = tried, [candidate] * len(group)
        for mark, place in zip(group, kept, strict=True):
            mark.place = place
    return best


def _is_complete(analysis: Analysis) -> bool:
    """Whether every parameter that reaches a mark is in a layer."""
    return all(analysis.labels[analysis.leaves[path]] is None for path in analysis.uncovered)


def _coverage(analysis: Analysis) -> int:
    paths = {path for member in analysis.members for path in member.layer.paths}
    return sum(math.prod(analysis.leaves[path].shape) for path in paths)


def _analyse(graph, leaves, marks, known) -> Analysis:
    labels = Labels(graph, {mark.node: mark.place for mark in marks}, known)
    uses = Uses(graph, [leaf for leaf in leaves.values() if 0 not in leaf.shape], labels)
    members, uncovered = _Assembly(leaves, labels, uses).assembled()
    return Analysis(graph, leaves, marks, labels, members, uncovered, known)


class _Assembly:
    """Puts uses together to layers."""

    def __init__(self, leaves, labels, uses):
        self.leaves, self.labels = leaves, labels
        self.paths = {value: path for path, value in leaves.items()}
        self.uses: dict[Value, list[Use]] = {value: [] for value in leaves.values()}
        for use in uses.found:
            self.uses[use.leaf].append(use)
        self.uncovered: dict[str, str] = {}
        for gap in uses.gaps:
            place = f" ({gap.node.place})" if gap.node is not None and gap.node.place else ""
            self.uncovered.setdefault(self.paths[gap.leaf], gap.reason + place)
        for use in uses.found:
            reason = self._misfit(use)
            if reason is not None:
                self.uncovered.setdefault(self.paths[use.leaf], f"{reason} ({use.node.place})")
        for path, value in leaves.items():
            if 0 in value.shape:
                self.uncovered[path] = "has no elements"
            elif labels[value] is None:
                self.uncovered[path] = "reaches no marked loss"
            elif jnp.issubdtype(value.dtype, jnp.complexfloating):
                self.uncovered[path] = "is complex"
            elif not self.uses[value]:
                self.uncovered.setdefault(path, "its output meets no data")

    def _misfit(self, use):
        """Why a use is no use of a layer."""
        values = (use.output, use.reading.operand)
        if any(v is not None and jnp.issubdtype(v.dtype, jnp.complexfloating) for v in values):
            return "meets complex values"
        if any(scan.loop.length == 0 for scan in use.scans):
            return "is used in a loop without steps"
        if fits(use, self.labels.data(use.output)):
            return None
        before = self.labels[use.node.outputs[0]]
        told = isinstance(before, Coupled) and before.reason is not None
        return before.why if told else "is not shared by data"

    def assembled(self) -> tuple[list[Member], dict[str, str]]:
        made = []
        for path, value in self.leaves.items():
            if path in self.uncovered:
                continue
            parts = self._parts(path, value)
            if parts is not None:
                made.extend(parts)
        made = self._merge_biases(made)
        members = [Member(*entry) for entry in made]
        _name(members)
        return members, self.uncovered

    def _parts(self, path, value):
        """The parts of a parameter that are used apart, each with its uses and its roles."""
        parts: dict[Any, list[Use]] = {}
        for use in self.uses[value]:
            parts.setdefault(use.view.part, []).append(use)
        for one, other in itertools.combinations(parts, 2):
            if all(a < d and c < b for (a, b), (c, d) in zip(one, other, strict=True)):
                self.uncovered[path] = "overlapping parts of it are used"
                return None
        found = []
        for part, uses in parts.items():
            roles = {tuple(use.digits(r) for r in ("block", "input", "output")) for use in uses}
            kinds = {use.reading.kind for use in uses}
            if len(roles) > 1 or ("embedding" in kinds and len(kinds) > 1):
                self.uncovered[path] = "used in two orientations, as tied weights are"
                return None
            (digits,) = roles
            if not _tiles(part, digits):
                self.uncovered[path] = "only some of its digits are used"
                return None
            groups = self._groups(uses)
            if groups is None:
                self.uncovered[path] = "meets different selections of the data in one loss"
                return None
            arrangement = Arrangement(value.shape, part, digits)
            found.append((path, uses, arrangement, groups))
        return found

    def _groups(self, uses):
        """Uses that share their data: those that reach a mark in common."""
        groups: list[tuple[Any, list[Use]]] = []
        for use in uses:
            joined = [use]
            for group in [g for g in groups if g[0] == use.branch]:
                if any(self._share(use, other) for other in group[1]):
                    groups.remove(group)
                    joined = [*group[1], *joined]
            groups.append((use.branch, joined))
        for _, members in groups:
            first = self.labels.data(members[0].output)
            for use in members[1:]:
                if not same_examples(first, self.labels.data(use.output)):
                    return None
        return [members for _, members in groups]

    def _share(self, one, other):
        return shares_data(*(self.labels.data(use.output) for use in (one, other)))

    def _merge_biases(self, made):
        """Make a bias one more input of its kernel where it is added to nothing else."""
        merged, gone = [], set()
        for path, uses, arrangement, groups in made:
            pairs = {use.bias.digits for use in uses if use.bias is not None}
            biases = [use.bias.use for use in uses if use.bias is not None]
            paths = {self.paths[bias.leaf] for bias in biases}
            layer = None
            if len(paths) == 1 and len(pairs) == 1:
                (bias_path,), (digits,) = paths, pairs
                leaf = self.leaves[bias_path]
                whole = all(b.view.part == views.spans(leaf.shape) for b in biases)
                alone = whole and set(self.uses[leaf]) == set(biases)
                if alone and bias_path not in self.uncovered:
                    layer = self._with_bias(path, arrangement, bias_path, dict(digits), uses)
                    gone.add(bias_path)
            if layer is None:
                layer = self._without_bias(path, arrangement, uses)
            biased = frozenset(u for u in uses if layer.bias is not None and u.bias is not None)
            merged.append((path, layer, groups, biased))
        return [entry[1:] for entry in merged if entry[0] not in gone]

    def _with_bias(self, path, arrangement, bias_path, pairs, uses):
        blocks, _, outputs = arrangement.roles

        def beside(role):
            """The bias's digits in the order of the kernel's."""
            parts = sorted(pairs, key=lambda d: (d.axis, -d.stride))
            mine = [d for d in parts if any(_within(d, whole) for whole in role)]
            return tuple(digit for d in mine for digit in pairs[d])

        shape = self.leaves[bias_path].shape
        view = Arrangement(shape, views.spans(shape), (beside(blocks), beside(outputs)))
        return Layer(
            name=path,
            kernel=path,
            bias=bias_path,
            kind=uses[0].reading.kind,
            kernel_view=arrangement,
            bias_view=view,
        )

    def _without_bias(self, path, arrangement, uses):
        kind = uses[0].reading.kind
        if kind == "bias":
            blocks, _, outputs = arrangement.roles
            view = dataclasses.replace(arrangement, roles=(blocks, outputs))
            return Layer(name=path, bias=path, kind=kind, bias_view=view)
        embedding = kind == "embedding"
        return Layer(
            name=path, kernel=path, is_embedding=embedding, kind=kind, kernel_view=arrangement
        )


def _within(digit, whole) -> bool:
    """Whether a digit is a part of another."""
    inside = digit.axis == whole.axis and digit.stride >= whole.stride
    return inside and digit.stride * digit.size <= whole.stride * whole.size


def _tiles(part, roles) -> bool:
    """Whether digits enumerate every element of a part once."""
    sizes = [stop - start for start, stop in part]
    digits = sorted((d for role in roles for d in role), key=lambda d: (d.axis, d.stride))
    strides: dict[int, int] = {}
    for digit in digits:
        if digit.stride != strides.get(digit.axis, 1):
            return False
        strides[digit.axis] = digit.stride * digit.size
    return all(strides.get(axis, 1) == size for axis, size in enumerate(sizes))


def _name(members: list[Member]) -> None:
    """Name layers by what holds their parameters, or by the parameter where that is not unique."""
    full = [member.layer.paths[0] for member in members]
    parents = [path.rpartition("/")[0] or path for path in full]
    for member, path, parent in zip(members, full, parents, strict=True):
        name = parent if parents.count(parent) == 1 else path
        view = member.layer.kernel_view or member.layer.bias_view
        if view is not None and not view.is_whole:
            spans = (f"{a}:{b}" for a, b in view.part)
            name = f"{path}[{','.join(spans)}]"
        member.layer = dataclasses.replace(member.layer, name=name)
