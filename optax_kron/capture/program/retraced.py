"""Two traces of one function: what stands in the place of each equation in the other."""

import operator
from collections.abc import Sequence
from typing import TypeAlias

import jax.extend as jex
import numpy as np

from optax_kron.capture.program.equations import (
    Atom,
    Equation,
    Literal,
    Program,
    checkpointing,
    closed,
    declared,
    is_program,
    loop,
    loss_name,
    recognise,
    same_primitive,
    settings,
    while_constants,
)

# By the `id` of an equation, what stands in its place in a later trace: an equation, of a program.
Renewed: TypeAlias = dict[int, tuple[Equation, jex.core.Jaxpr]]


def renewed(first: Program, second: Program) -> Renewed | None:
    """What stands in the place of each equation of a program in another trace of it.

    `None` if the programs are not the same, in what an analysis looks at: equations, their settings
    and literals, and the arrays that they close over. Of a program inside of an equation the rest
    is not compared, as rules for derivatives are new objects in each trace: so those of the second
    trace are to be run.
    """
    renewal: Renewed = {}
    return renewal if _is_same(first, second, renewal) else None


def _is_same(first: Program, second: Program, renewal: Renewed) -> bool:
    same = len(first.consts) == len(second.consts)
    same = same and all(map(operator.is_, first.consts, second.consts))
    # Functions that JAX has traced before are the same object: then so is all in it.
    return same and (first.jaxpr is second.jaxpr or _are_paired(first.jaxpr, second.jaxpr, renewal))


def _are_paired(first: jex.core.Jaxpr, second: jex.core.Jaxpr, renewal: Renewed) -> bool:
    twins: dict[Atom, Atom] = {}  # variables of the first, and those of the second in their places

    def bind(ours: Sequence[Atom], theirs: Sequence[Atom]) -> bool:
        twins.update(zip(ours, theirs, strict=False))
        return [x.aval for x in ours] == [x.aval for x in theirs]

    def agree(ours: Sequence[Atom], theirs: Sequence[Atom]) -> bool:
        return len(ours) == len(theirs) and all(map(is_twin, ours, theirs))

    def is_twin(ours: Atom, theirs: Atom) -> bool:
        if not isinstance(ours, Literal):
            return twins[ours] is theirs
        equal = isinstance(theirs, Literal) and np.array_equal(ours.val, theirs.val)
        return bool(equal and ours.aval == theirs.aval)

    if not bind([*first.constvars, *first.invars], [*second.constvars, *second.invars]):
        return False
    for ours, theirs in zip(first.eqns, second.eqns, strict=False):
        same = same_primitive(ours, theirs) and agree(ours.invars, theirs.invars)
        if not (same and _do_same(ours, theirs, renewal) and bind(ours.outvars, theirs.outvars)):
            return False
        renewal[id(ours)] = theirs, second
    return len(first.eqns) == len(second.eqns) and agree(first.outvars, second.outvars)


def _do_same(first: Equation, second: Equation, renewal: Renewed) -> bool:
    kind, bodies = recognise(first)
    if not bodies:
        return _is_same_setting(settings(first), settings(second))
    outline = {
        "scan": loop,
        "while": while_constants,
        "remat": checkpointing,
        "mark": loss_name,
        "opaque": declared,
    }.get(kind, lambda eqn: None)
    other_kind, others = recognise(second)
    return (
        (kind, len(bodies)) == (other_kind, len(others))
        and all(
            _is_same(ours, theirs, renewal) for ours, theirs in zip(bodies, others, strict=True)
        )
        and _is_same_setting(outline(first), outline(second))
    )


def _is_same_setting(first: object, second: object) -> bool:
    if first is second:
        return True
    if is_program(first) and is_program(second):
        return renewed(closed(first), closed(second)) is not None
    if type(first) is not type(second):
        return False
    if isinstance(first, dict) and isinstance(second, dict):
        same = first.keys() == second.keys()
        return same and all(_is_same_setting(first[name], second[name]) for name in first)
    if isinstance(first, tuple | list) and isinstance(second, tuple | list):
        return len(first) == len(second) and all(map(_is_same_setting, first, second))
    # Arrays have no one answer: those that are not the same object count as different.
    return (first == second) is True
