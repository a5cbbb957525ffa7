"""Kernels that are joined to one before their use: each is a part of that use.

While parameters are followed, what several of them are joined to is followed as one parameter. Its
uses are then taken apart: a part along the outputs is a slice of the output, one along the inputs a
slice of what is recorded, one along blocks, or along the steps of a scan, a slice of both.
"""

# Of `x @ concatenate([q, k], axis=1)`, with x [8, 3] and q, k [3, 4], the joined kernel [3, 8] has
# one use, whose output [8, 8] is perturbed. It is taken apart in
#
#     q    inputs x, output-gradients [:, 0:4] of those of the output
#     k    inputs x, output-gradients [:, 4:8]
#
# and of `concatenate([x, h], 1) @ concatenate([w, u], 0)` the joined inputs are cut: w has the
# first columns of what is recorded, u the others, and both the same output-gradients.

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from optax_kron.capture.analysis.beside import beside_in_steps
from optax_kron.capture.analysis.uses import Consumption, Gap, MergedBias, Use
from optax_kron.capture.program.graph import Node, Value
from optax_kron.capture.rules import views
from optax_kron.capture.rules.contraction import Cut, IndexInputs, RoleFactor, RoleFactors
from optax_kron.capture.rules.views import NEW, Part, View
from optax_kron.layers.layer import AxisFactor, AxisFactors


class _Cut(NamedTuple):
    """Which values of a factor of the joined kernel are in a part: from `first` to `last`."""

    factor: AxisFactor
    first: int
    last: int


class _Piece(NamedTuple):
    """A use of one part.

    Attributes:
      use: The use.
      factors: For each factor of the joined kernel, the part's factors in its place.
      cut: Where the part is; `None` if the use is of no other part.
    """

    use: Use
    factors: Mapping[AxisFactor, AxisFactors]
    cut: _Cut | None


def apart(found: Consumption) -> Consumption:
    """What is found of parameters, with the uses of joined ones taken apart."""
    uses: list[Use] = []
    gaps = list(found.gaps)
    biases = dict(found.biases)
    # A part may be joined itself: its uses are taken apart in their turn.
    waiting = list(found.uses)
    pieces: dict[Use, list[_Piece]] = {}
    while waiting:
        use = waiting.pop(0)
        if use.leaf not in found.joins:
            uses.append(use)
            continue
        pieces[use] = []
        for part in found.joins[use.leaf]:
            if not part.overlaps(use.view):
                continue
            piece = _piece(use, part)
            if piece is None:
                gaps.extend(_gaps(part.view, found.joins, use.node))
            else:
                pieces[use].append(piece)
        waiting = [*(piece.use for piece in pieces[use]), *waiting]
        _take_biases_apart(use, pieces, biases)
    # Of one whose other side is no such part it is a layer of its own.
    biases = {k: b for k, b in biases.items() if k not in pieces and b.use not in pieces}
    return Consumption(uses, gaps, biases, {})


def _gaps(view: View, joins: Mapping[Value, Sequence[Part]], node: Node) -> list[Gap]:
    """That an equation uses what is joined in a way that is not taken apart."""
    if view.origin not in joins:
        return [Gap(view.origin, f"joined with others before {node.name}", node)]
    parts = [part for part in joins[view.origin] if part.overlaps(view)]
    return [gap for part in parts for gap in _gaps(part.view, joins, node)]


def _piece(use: Use, part: Part) -> _Piece | None:
    """The use of one part; `None` if it is no slice of the use."""
    low, high = use.view.part[part.axis]
    first, last = max(low, part.start), min(high, part.stop)
    wanted = list(use.view.part)
    wanted[part.axis] = (first - part.start, last - part.start)
    view = views.part_of(part.view, wanted)
    if view is None:
        return None
    own = {f.of_kernel for f in use.role_factors if f.role != "free"}
    cut = None
    if (first, last) != (low, high):
        cut = _cut(own, part.axis, first - low, last - low)
        if cut is None:
            return None
    factors: dict[AxisFactor, AxisFactors] = {}
    for factor in own:
        size = cut.last - cut.first if cut and factor == cut.factor else factor.size
        found = _factors_in(view.axes[factor.axis], factor.stride, size)
        if found is None:
            return None
        factors[factor] = found
    made = _with_factors(use, view, factors, cut)
    return None if made is None else _Piece(made, factors, cut)


def _cut(own: set[AxisFactor], axis: int, first: int, last: int) -> _Cut | None:
    """Where a range along an axis cuts its slowest factor, if it cuts no other."""
    slowest = max((f for f in own if f.axis == axis), key=lambda f: f.stride, default=None)
    if slowest is None or first % slowest.stride or last % slowest.stride:
        return None
    return _Cut(slowest, first // slowest.stride, last // slowest.stride)


def _factors_in(factors: AxisFactors, stride: int, size: int) -> AxisFactors | None:
    """The factors that enumerate `(index // stride) % size` of an axis."""
    length = math.prod(f.size for f in factors)
    if length % (stride * size):
        return None
    groups = views.regroup(factors, (length // (stride * size), size, stride))
    return None if groups is None else groups[1]


def _with_factors(
    use: Use, view: View, factors: Mapping[AxisFactor, AxisFactors], cut: _Cut | None
) -> Use | None:
    """The use of a part that a view shows, with its factors in place of those of the joined one."""
    contraction = use.contraction
    if isinstance(contraction.inputs, IndexInputs) and cut is not None:
        return None  # an index of another part would read no row of this one, and still count
    operand = _cut_axes(contraction.operand_axes, cut)
    output = _cut_axes(contraction.output_axes, cut)
    steps = _cut_axes(
        tuple(tuple(RoleFactor("block", f, f.size) for f in s) for _, s in use.view.steps), cut
    )
    if operand is None or output is None or steps is None:
        return None
    new = [_replaced(axes, factors) for axes in (contraction.operand_axes, contraction.output_axes)]
    if None in new:
        return None
    own_steps = ((scan, tuple(g for f in own for g in factors[f])) for scan, own in use.view.steps)
    scans = [scan for scan, _ in use.view.steps]
    # Steps are the leading axes of what is recorded, those of the contraction the last.
    step_cuts = tuple(
        c._replace(axis=use.scans.index(scans[c.axis + len(scans)]) - len(use.scans)) for c in steps
    )
    shown = dataclasses.replace(view, steps=(*view.steps, *own_steps))
    shown = shown.times(use.view.scale, use.view.scales)
    contraction = dataclasses.replace(
        contraction,
        operand_axes=new[0],
        output_axes=new[1],
        operand_cuts=(*contraction.operand_cuts, *operand),
        output_cuts=(*contraction.output_cuts, *output),
    )
    return dataclasses.replace(
        use, view=shown, contraction=contraction, step_cuts=(*use.step_cuts, *step_cuts)
    )


def _cut_axes(axes: Sequence[RoleFactors], cut: _Cut | None) -> tuple[Cut, ...] | None:
    """Where axes are cut; `None` if that is no slice of one, as another factor is slower."""
    cuts = []
    for number, roles in enumerate(axes):
        if cut is None or cut.factor not in [role.key for role in roles]:
            continue
        if roles[0].key != cut.factor:
            return None
        inner = math.prod(role.size for role in roles[1:])
        cuts.append(Cut(number - len(axes), cut.first * inner, cut.last * inner))
    return tuple(cuts)


def _replaced(
    axes: tuple[RoleFactors, ...], factors: Mapping[AxisFactor, AxisFactors]
) -> tuple[RoleFactors, ...] | None:
    """Axes with a part's factors; `None` if a broadcast made inputs."""
    replaced = []
    for roles in axes:
        made: list[RoleFactor] = []
        for role in roles:
            if role.role == "free":
                made.append(role)
                continue
            for n, factor in enumerate(factors[role.of_kernel]):
                if factor.axis != NEW:
                    # An index has one number in the place of all.
                    size = factor.size if role.size == role.of_kernel.size else role.size
                    made.append(RoleFactor(role.role, factor, size))
                elif role.role == "input":
                    return None
                else:
                    made.append(RoleFactor("free", (role.key, n), factor.size))
        replaced.append(tuple(made))
    return tuple(replaced)


def _take_biases_apart(
    use: Use, pieces: Mapping[Use, Sequence[_Piece]], biases: dict[Use, MergedBias]
) -> None:
    """Give each part of a kernel, or of a bias, what is beside it of the other.

    Args:
      use: What was taken apart, a kernel's or a bias's.
      pieces: Those of all uses until now.
      biases: By kernel, changed in place.
    """
    for kernel, merged in list(biases.items()):
        bias = merged.use
        if use not in (kernel, bias) or not (kernel in pieces and bias in pieces):
            continue
        del biases[kernel]
        for mine in pieces[kernel]:
            for other in pieces[bias]:
                pairs = _pairs(mine, other, dict(merged.beside))
                # A part may be scaled by itself, as in `concatenate([b, -c])`.
                added, whole = other.use.view, bias.view
                if pairs is not None and added.scales == whole.scales:
                    value = merged.value * added.scale / whole.scale
                    biases[mine.use] = MergedBias(other.use, value, pairs)


def _pairs(
    kernel: _Piece, bias: _Piece, beside: Mapping[AxisFactor, AxisFactors]
) -> tuple[tuple[AxisFactor, AxisFactors], ...] | None:
    """The factors of a part of a bias beside those of a part of a kernel; `None` if no match."""
    if (kernel.cut is None) != (bias.cut is None):
        return None
    if kernel.cut is not None and bias.cut is not None:
        slow, *rest = beside.get(kernel.cut.factor, ()) or (None,)
        inner = math.prod(f.size for f in rest)
        mine = kernel.cut.first, kernel.cut.last
        if slow != bias.cut.factor or mine != (bias.cut.first * inner, bias.cut.last * inner):
            return None
    pairs: dict[AxisFactor, AxisFactors] = {}
    for factor, others in beside.items():
        own = kernel.factors[factor]
        groups = views.regroup([g for f in others for g in bias.factors[f]], [f.size for f in own])
        if groups is None:
            return None
        pairs.update(zip(own, groups, strict=True))
    in_steps = beside_in_steps(kernel.use.view, bias.use.view)
    return None if in_steps is None else tuple((pairs | in_steps).items())
