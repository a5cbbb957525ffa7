"""Which rows of a stack belong to which parameter or layer.

A state holds stacks by kind of block, and nothing that says what they are of: neither the settings
of `Blocking` nor layers are arrays, and a state of anything else would be no pytree of arrays that
every checkpoint and `optax.tree.map_params` take. The settings are known to the transformation that
made the state. With it, `tx.init` is traced once more, on shapes, and every optimizer in it tells
its plan (`transforms.record`). Without it, the `Blocking` that is the default of one of the
optimizers is taken, if it leads to these very stacks; layers cannot be guessed.
"""

import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Int

from optax_kron.blocking import Blocking, BlockPlan, LeafPlan, plan_blocks
from optax_kron.diagnostics.states import Found, find_states
from optax_kron.layers.layer import Layer
from optax_kron.layers.paths import paths_of
from optax_kron.layers.plan import LayerPlan
from optax_kron.transforms import record
from optax_kron.transforms.kron_psgd import scale_by_kron_psgd
from optax_kron.transforms.orthogonalize import orthogonalize
from optax_kron.transforms.preconditioner import KronState
from optax_kron.transforms.shampoo import scale_by_shampoo
from optax_kron.transforms.soap import scale_by_soap
from optax_kron.types import PyTree

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the blocks of a parameter, or of a layer, are.

    Attributes:
      paths: Of the parameters, with slashes; a layer may have a kernel and a bias.
      layer: Name of the layer; empty for a parameter.
      label: Of the stack.
      rows: Of the stack, one for each block.
      axes: For each axis of a block, the axes of the (first) parameter that it enumerates.
      sizes: How long each block is along its axes without padding.
      starts: Where each block begins along these, in a parameter that is cut.
    """

    paths: tuple[str, ...]
    layer: str
    label: str
    rows: slice
    axes: tuple[tuple[int, ...], ...]
    sizes: Int[np.ndarray, "count k"]
    starts: Int[np.ndarray, "count k"]

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self.sizes)

    @property
    def name(self) -> str:
        """That of the parameters."""
        return " ".join(self.paths) or "(root)"


@dataclasses.dataclass(frozen=True)
class Laid:
    """How a state is laid out.

    Attributes:
      places: Where blocks are.
      rest: Paths of parameters that the optimizer sees, but has in no block, or not as a whole.
      empty: Paths of those without elements.
      seen: Paths of all that it sees.
      frame: The settings; `None` without a transformation.
      sizes: The number of blocks in each stack that are not padding, and that of elements of each.
    """

    places: Sequence[Place]
    rest: Sequence[str]
    empty: Sequence[str]
    seen: Sequence[str]
    frame: Any
    sizes: dict[str, tuple[int, int]]

    @property
    def method(self) -> Any:
        """The settings of the method itself; `None` without a transformation."""
        return None if self.frame is None else self.frame.method


def lay_out(
    owner: str,
    states: Sequence[Found],
    params: PyTree,
    tx: optax.GradientTransformation | None,
) -> list[Laid | None]:
    """The layout of each state; `None` where it is not known, or there are no blocks.

    Raises:
      ValueError: If the transformation did not make these states, of these parameters.
    """
    if tx is None:
        return [_guessed(found, params) if found.is_kron else None for found in states]
    made = _made_by(owner, tx, params)
    if len(made) != len(states):
        raise ValueError(
            f"{owner}: the state holds {len(states)} states of this library, but tx.init makes "
            f"{len(made)} for these parameters. Pass the transformation that made the state, and "
            "the state of that alone."
        )
    laid = []
    for found, note in zip(states, made, strict=True):
        fits = note is not None and _fits(note.plan, found) and _alike(note.state, found)
        if found.is_kron != (note is not None) or (found.is_kron and not fits):
            raise ValueError(
                f"{owner}: the state at {'/'.join(found.keys) or 'the root'} is not one that "
                "tx.init makes for these parameters: it is of another optimizer, or has other "
                "kinds of blocks, or fewer of them. Pass the transformation that made the state, "
                "and parameters of its shapes."
            )
        laid.append(None if note is None else _laid(note.plan, note.paths, note.frame))
    return laid


def _made_by(owner: str, tx: object, params: PyTree) -> list[record.Note | None]:
    """What is noted of each state that `tx.init` makes, in the order of `find_states`."""
    make = getattr(tx, "init", None)  # that of optax.MultiSteps is a method
    if not callable(make):
        raise ValueError(
            f"{owner}: tx must be the optax.GradientTransformation that made the state; got "
            f"{tx!r:.100}."
        )
    if params is None:
        raise ValueError(f"{owner}: to lay out a state by tx, params are needed; got None.")
    made: list[record.Note | None] = []

    def init(params):
        with record.notes() as notes:
            states = find_states(make(params))
        # No wrapper replaces the counters of the states that it holds, but for `jax.jit`.
        known = {id(note.state.count): note for note in notes}
        made.extend(known.get(id(found.state.count)) for found in states)
        if any(found.is_kron and x is None for found, x in zip(states, made, strict=True)):
            raise ValueError(
                f"{owner}: the layout that tx.init chooses is not known, as jax.jit compiles it. "
                "Pass the same transformation with an init that is not compiled."
            )
        return jnp.zeros([])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which `init` gave when it made the state
        jax.eval_shape(init, params)
    return made


def _guessed(found: Found, params: PyTree) -> Laid | None:
    """The layout by defaults, if they lead to the stacks that there are."""
    if not found.stacks or found.kind.endswith("kfac") or params is None:
        return None
    for blocking in _defaults():
        try:
            plan = plan_blocks(params, blocking)
        except ValueError:  # parameters of integers, which a wrapper has hidden
            return None
        if found.kind == "orthogonalize":
            plan = plan.only(found.stacks)
        if _fits(plan, found):
            return _laid(plan, paths_of(params), None)
    return None


def _defaults() -> list[Blocking]:
    makers: list[Callable] = [scale_by_kron_psgd, scale_by_soap, scale_by_shampoo, orthogonalize]
    settings = [inspect.signature(make).parameters["blocking"].default for make in makers]
    return list(dict.fromkeys(settings))


def _fits(plan: BlockPlan | LayerPlan, found: Found) -> bool:
    """Whether stacks are those of a plan; they may have more padding, of another mesh."""
    if set(plan.stacks) != set(found.stacks):
        return not plan.leaves and found.hides_all
    counts = {k: jax.tree.leaves(x)[0].shape[0] for k, x in found.stacks.items()}
    return all(plan.filled(label) <= count for label, count in counts.items())


def _alike(made: KronState, found: Found) -> bool:
    """Whether a state has the stacks of the optimizer that made another."""

    def kind(stack):
        return type(stack), type(getattr(stack, "inverse", None))

    return found.hides_all or all(kind(made.stacks[k]) == kind(x) for k, x in found.stacks.items())


def _laid(plan: BlockPlan | LayerPlan, paths: Sequence[str], frame: Any) -> Laid:
    if isinstance(plan, LayerPlan):
        places, rest = list(_places_of_layers(plan)), plan.uncovered
        sizes = {k: m[0].layer.d_in * m[0].layer.d_out for k, m in plan.stacks.items()}
        empty = [path for path, shape in plan.leaves.items() if 0 in shape]
    else:
        places = list(_places_of_leaves(plan, paths))
        sizes = {label: signature.size for label, signature in plan.stacks.items()}
        empty = [path for path, leaf in zip(paths, plan.leaves, strict=True) if leaf is None]
        placed = {path for place in places for path in place.paths}
        rest = [path for path in paths if path not in placed]
    rest = [path for path in rest if path not in empty]
    counted = {label: (plan.filled(label), size) for label, size in sizes.items()}
    order = {path: i for i, path in enumerate(paths)}
    places.sort(key=lambda place: min(order[path] for path in place.paths))
    return Laid(places, rest, empty, paths, frame, counted)


def _places_of_layers(plan: LayerPlan) -> Iterator[Place]:
    for label in plan.stacks:
        for member, rows in plan.slices(label):
            layer = member.layer
            sizes = np.tile([layer.d_in, layer.d_out], (layer.blocks, 1))
            starts = np.zeros_like(sizes)
            yield Place(layer.paths, layer.name, label, rows, _axes_of_layer(layer), sizes, starts)


def _axes_of_layer(layer: Layer) -> tuple[tuple[int, ...], ...]:
    """The axes of the kernel, or of a bias alone, that are inputs and outputs."""
    _, view = layer.views[0]
    roles = view.roles[1:] if layer.kernel is not None else ((), view.roles[1])
    inputs, outputs = (tuple(sorted({f.axis for f in role})) for role in roles)
    return inputs, outputs


def _places_of_leaves(plan: BlockPlan, paths: Sequence[str]) -> Iterator[Place]:
    for label in plan.stacks:
        start = 0
        for i, leaf in plan.members(label):
            rows = slice(start, start + leaf.count)
            start += leaf.count
            axes = _axes_of_leaf(leaf)
            yield Place((paths[i],), "", label, rows, axes, leaf.sizes(), _starts(leaf))


def _axes_of_leaf(leaf: LeafPlan) -> tuple[tuple[int, ...], ...]:
    """For each axis of a block, the axes of the parameter that were merged into it."""
    if not leaf.shape:
        return ((),) * len(leaf.order)
    first = next(
        n
        for n in range(len(leaf.shape) + 1)
        if math.prod(leaf.shape[:n]) == leaf.stacked and _groups(leaf.shape[n:], leaf.merged)
    )
    groups = _groups(leaf.shape[first:], leaf.merged)
    merged = [tuple(first + axis for axis in group) for group in groups]
    return tuple(merged[axis] for axis in leaf.order)


def _groups(shape: Sequence[int], merged: Sequence[int]) -> list[list[int]]:
    """Runs of axes whose lengths multiply to those of merged ones; none if they do not."""
    groups: list[list[int]] = [[]]
    for axis, size in enumerate(shape):
        done = math.prod(shape[i] for i in groups[-1])
        # An axis of length one goes to where it was merged, as far as lengths tell.
        if groups[-1] and done == merged[len(groups) - 1] and len(groups) < len(merged):
            groups.append([])
            done = 1
        if done * size > merged[len(groups) - 1]:
            return []
        groups[-1].append(axis)
    made = [math.prod(shape[i] for i in group) for group in groups]
    return groups if made == list(merged) else []


def _starts(leaf: LeafPlan) -> Int[np.ndarray, "count k"]:
    """Where every block begins along each of its axes."""
    lengths = dict(zip(leaf.order, leaf.signature.shape, strict=True))
    index = np.indices(leaf.pieces).reshape(len(leaf.pieces), -1)
    starts = np.array([lengths[axis] for axis in range(len(leaf.merged))])[:, None] * index
    return np.tile(starts[list(leaf.order)].T, (leaf.stacked, 1))
