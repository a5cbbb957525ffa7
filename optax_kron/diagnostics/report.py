"""A table of every parameter: its blocks, what is kept of them, and how that fares."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_kron.diagnostics.ages import ages
from optax_kron.diagnostics.counters import COUNTERS
from optax_kron.diagnostics.layout import Laid, Place, lay_out
from optax_kron.diagnostics.matrices import has_values, tells_q_from_p, why_unknown
from optax_kron.diagnostics.spectra import conditions
from optax_kron.diagnostics.states import Found, check_concrete, find_states, number
from optax_kron.layers.paths import paths_of
from optax_kron.tables import Table
from optax_kron.types import PyTree

# Seconds that condition numbers may take unless all are asked for.
_BUDGET = 0.5


@dataclasses.dataclass(frozen=True)
class ParameterRow:
    """A line of the summary.

    Attributes:
      parameter: Its path, with slashes; of a layer those of its parameters.
      layer: Name of the layer; empty for optimizers of parameters.
      optimizer: Which one, by its name in `StateRow`; empty if none has it.
      blocks: Number of blocks.
      shape: The kind of block, such as "64x50" or "1000diagx64", the label of its stack.
      factors: For each axis of a block its length, and "dense" or "diagonal"; none if none is kept.
      bytes: Of what is kept of its blocks, momentum included.
      conditions: For each axis of a block the condition number, the largest of all blocks; `None`
        where it is not known.
      age: Steps since the last refresh, of the block that has waited longest; `None` if not known.
      note: What else there is to say.
    """

    parameter: str
    layer: str = ""
    optimizer: str = ""
    blocks: int = 0
    shape: str = ""
    factors: tuple[str, ...] = ()
    bytes: int = 0
    conditions: tuple[float | None, ...] = ()
    age: int | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class StateRow:
    """What holds of one optimizer.

    Attributes:
      name: That in `ParameterRow`: the kind, or what tells its path in the state apart.
      kind: Which optimizer it is, as far as its state tells.
      counters: Steps, refreshes, failed refreshes and the like; `None` for a state without values.
      bytes: Of its state, that of a fallback not included.
    """

    name: str
    kind: str
    counters: dict[str, int | None]
    bytes: int

    def __str__(self) -> str:
        known = {k: x for k, x in self.counters.items() if x is not None}
        words = [f"{x} {k.replace('_', ' ')}" for k, x in known.items()]
        kind = self.kind if self.kind == self.name else f"{self.name} ({self.kind})"
        return f"{kind}: {', '.join([*words, _size(self.bytes)])}"


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `summary` returns: print it, show it in a notebook or with Rich, or take `to_dict()`.

    Attributes:
      states: The optimizers.
      parameters: The lines.
      bytes: Of the whole state, whatever else is in it.
      notes: What is not known, and what would tell.
    """

    states: Sequence[StateRow]
    parameters: Sequence[ParameterRow]
    bytes: int
    notes: Sequence[str]

    def __str__(self) -> str:
        return str(self._table())

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()

    def __rich__(self) -> Any:
        return self._table().__rich__()

    def to_dict(self) -> dict[str, Any]:
        """The same as dicts, lists, strings and numbers, as JSON takes them."""
        return {
            "states": [dataclasses.asdict(row) for row in self.states],
            "parameters": [
                {k: list(x) if isinstance(x, tuple) else x for k, x in vars(row).items()}
                for row in self.parameters
            ],
            "bytes": self.bytes,
            "notes": list(self.notes),
        }

    def _table(self) -> Table:
        several = len({row.optimizer for row in self.parameters}) > 1
        layers = any(row.layer for row in self.parameters)
        columns = ["parameter", *["layer"] * layers, *["optimizer"] * several]
        columns += ["blocks", "factors", "state", "condition", "age", ""]
        rows = []
        for row in self.parameters:
            cells = [row.parameter, *[row.layer] * layers, *[row.optimizer] * several]
            blocks = f"{row.blocks} × {row.shape}" if row.blocks else "-"
            numbers = ["-" if x is None else f"{x:.3g}" for x in row.conditions]
            cells += [blocks, ", ".join(row.factors) or "-"]
            cells += [_size(row.bytes) if row.blocks else "-"]
            known = any(x is not None for x in row.conditions)
            cells += [", ".join(numbers) if known else "-"]
            cells += ["-" if row.age is None else str(row.age), row.note]
            rows.append(cells)
        title = [*map(str, self.states), f"all of the state: {_size(self.bytes)}", ""]
        return Table(columns, rows, title, ["", *self.notes] if self.notes else [])


def summary(
    state: PyTree,
    params: PyTree,
    tx: optax.GradientTransformation | None = None,
    *,
    all_conditions: bool = False,
) -> Summary:
    """What the optimizers in a state keep of every parameter, and how that fares.

    A line for each parameter, or each layer: its blocks, which of their factors are dense or
    diagonal, bytes of state, condition numbers, and steps since the last refresh. Above it, for
    every optimizer, its counters; failures are counted by optimizer, not by parameter.

    Args:
      state: What `tx.init` or `tx.update` returned, or a pytree that holds it: that of
        `optax.chain`, `masked`, `partition`, `MultiSteps`, `inject_hyperparams` or
        `apply_if_finite`, a Flax `TrainState`, an `nnx.Optimizer`. One of `jax.ShapeDtypeStruct`s
        has no numbers, but a table.
      params: The parameters, or `jax.ShapeDtypeStruct`s.
      tx: The transformation that made the state. It tells what is not in a state: the layers of
        `kfac` and `ekfac`, a `blocking` other than the default, parameters that `optax.masked` and
        the like hide, and, but for `kfac` and `ekfac`, when the last refresh was.
      all_conditions: Whether to find all condition numbers. By default they may take half a second,
        and the largest matrices are left out.

    Returns:
      A table that prints itself, also in notebooks and with Rich, and has `to_dict()`. Condition
      numbers are those of P along each axis for `kron_psgd`, of the statistics for `shampoo` and
      `soap`, of A and G for `kfac` and `ekfac`, without damping; an eigenvalue below the rounding
      of what is stored counts as that, so that in float32 none is above 8e6.

    Raises:
      ValueError: If there is no state of this library; if `tx` did not make it; or if it is traced,
        or that of an ensemble.

    Cost: about half a second at most, and a copy of those factors on the host whose conditions are
    found; with `all_conditions` of all of them, and d³ operations for each.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> params = {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)}
      >>> tx = ok.kron_psgd(1e-3)
      >>> table = ok.diagnostics.summary(tx.init(params), params, tx)
      >>> table.to_dict()["parameters"][1]["shape"]
      '64x32'
    """
    owner = "diagnostics.summary"
    states = find_states(state)
    for found in states:
        check_concrete(owner, found)
    laid = lay_out(owner, states, params, tx)
    budget = np.inf if all_conditions else _BUDGET / len(states)
    rows, notes = [], []
    for found, layout in zip(states, laid, strict=True):
        if not found.stacks:
            continue
        if layout is None:
            rows += list(_rows_by_stack(found))
            notes.append(
                f"{_name(found)}: which blocks belong to which parameters is not known, as "
                f"{why_unknown(found)} Pass tx: summary(state, params, tx)."
            )
            continue
        left_out, own = _rows_of(found, layout, budget)
        rows += own
        if left_out:
            notes.append(
                f"{_name(found)}: conditions of the largest factors were left out; "
                "all_conditions=True finds them."
            )
        if has_values(found) and not tells_q_from_p(found, layout.method):
            notes.append(
                f"{_name(found)}: with tx there are conditions; without it, factors may be those "
                "of Q or of P."
            )
        unaged = all(x.age is None for x in own) and any(x.factors for x in own)
        if layout.frame is None and number(found.state.count) and unaged:
            notes.append(f"{_name(found)}: with tx there are ages of the last refresh.")
    rows += list(_rows_without_blocks(states, laid, params))
    total = sum(_bytes(x) for x in jax.tree.leaves(state))
    return Summary([_state_row(found) for found in states], rows, total, notes)


def _name(found: Found) -> str:
    return found.name or found.kind


def _state_row(found: Found) -> StateRow:
    state = found.state
    values = {"steps": state.count, **{name: getattr(state, name, None) for name in COUNTERS}}
    counters = {k: number(x) for k, x in values.items() if x is not None}
    if found.adaptive is not None:
        metrics = found.adaptive.metrics
        counters["rejected_steps"] = number(metrics.rejected_steps)
    own = state._replace(fallback=None) if found.is_kron else state
    own = own._replace(inner=None) if hasattr(own, "inner") else own
    integers = {k: None if x is None else int(x) for k, x in counters.items()}
    size = sum(map(_bytes, jax.tree.leaves(own)))
    return StateRow(_name(found), found.kind, integers, size)


def _rows_of(found: Found, layout: Laid, budget: float) -> tuple[bool, list[ParameterRow]]:
    """The lines of what a state has in blocks, and whether some conditions are missing."""
    known, left_out, waited = {}, False, {}
    if has_values(found):
        known, left_out = conditions(found, layout, budget)
        waited = ages(found, layout)
    sizes = {label: _bytes_of_blocks(found, label) for label in found.stacks}
    rows = []
    for place in layout.places:
        age = waited[place.label][place.rows] if place.label in waited else []
        row = ParameterRow(
            parameter=place.name,
            layer=place.layer,
            optimizer=_name(found),
            blocks=place.count,
            shape=place.label,
            factors=_factors(place) if _keeps_factors(found, place.label) else (),
            bytes=sizes[place.label] * place.count + _bytes_of_rest(found, place),
            conditions=tuple(known[id(place)]) if known else (),
            age=int(max(age)) if len(age) else None,
            note=_note(found, place),
        )
        rows.append(row)
    return left_out, rows


def _note(found: Found, place: Place) -> str:
    """Whether a place has blocks without any gradient yet."""
    idle = idle_blocks(found, place.label)
    if idle is None or not idle[place.rows].any():
        return ""
    number_of = int(idle[place.rows].sum())
    return "no gradient yet" if number_of == place.count else f"{number_of} without gradient yet"


def idle_blocks(found: Found, label: str) -> np.ndarray | None:
    """Which blocks of a stack have seen no gradient but zeros; `None` before the first step."""
    stack = found.stacks[label]
    if not has_values(found) or not number(found.state.count):
        return None
    usual = found.state.usual_norms
    if isinstance(usual, Mapping) and label in usual.get("gradients", {}):
        return np.asarray(usual["gradients"][label].norm) == 0
    # Where nothing is kept of blocks, nothing tells.
    return ~np.asarray(stack.initialized) if _keeps_factors(found, label) else None


def _keeps_factors(found: Found, label: str) -> bool:
    return len(found.stacks[label]._fields) > 1


def _rows_by_stack(found: Found) -> Iterator[ParameterRow]:
    """What is known of stacks whose layout is not."""
    for label in found.stacks:
        count = len(found.stacks[label].initialized)
        size = _bytes_of_blocks(found, label) * count
        yield ParameterRow("?", "", _name(found), count, label, bytes=size)


def _rows_without_blocks(
    states: Sequence[Found], laid: Sequence[Laid | None], params: PyTree
) -> Iterator[ParameterRow]:
    """Parameters of which no optimizer has all in blocks, and what becomes of them."""
    layouts = [x for x in laid if x is not None]
    placed = {path for x in layouts for place in x.places for path in place.paths}
    seen, told = {path for x in layouts for path in x.seen}, set()
    for found, layout in zip(states, laid, strict=True):
        if layout is None:
            continue
        own = {path for place in layout.places for path in place.paths}
        # Another optimizer, as of a fallback, may have blocks of it.
        for path in [x for x in layout.rest if x not in told and (x in own or x not in placed)]:
            told.add(path)
            part = "in no block" if found.state.layers is None else "in no layer"
            part = f"a part is {part}" if path in own else part
            how = "its gradient passes as it is"
            if found.state.fallback is not None:
                how = "goes through the fallback"
            elif hasattr(found.state.momentum, "rest"):
                how = "its gradient passes, with momentum"
            yield ParameterRow(path or "(root)", optimizer=_name(found), note=f"{part}: {how}")
        for path in [x for x in layout.empty if x not in told]:
            told.add(path)
            yield ParameterRow(path or "(root)", note="has no elements")
    unknown = any(x is None and found.stacks for found, x in zip(states, laid, strict=True)) or any(
        found.kind == "branch_kfac" for found in states
    )
    normed = [path for x in states if x.kind == "fixed_norm" for path in paths_of(x.state.norms)]
    for path in [] if unknown else paths_of(params):
        if path in {*normed} - placed - seen - told:
            yield ParameterRow(path or "(root)", note="seen by fixed_norm alone")
        elif path not in placed | seen | told:
            yield ParameterRow(path or "(root)", note="hidden from these optimizers")


# ------------------------------------------------------------------------------------------- sizes


def _bytes(x: Any) -> int:
    return int(np.prod(np.shape(x))) * jnp.result_type(x).itemsize


def _bytes_of_blocks(found: Found, label: str) -> int:
    """Of what is kept of one block of a stack."""
    state, parts = found.state, [found.stacks[label]]
    momentum = getattr(state.momentum, "blocks", state.momentum)
    if isinstance(momentum, Mapping) and label in momentum:
        parts.append(momentum[label])
    norms = state.usual_norms if isinstance(state.usual_norms, Mapping) else {}
    parts += [x[label] for name, x in norms.items() if name != "rest" and label in x]
    return sum(_bytes(x) // max(np.shape(x)[0], 1) for x in jax.tree.leaves(parts))


def _bytes_of_rest(found: Found, place: Place) -> int:
    """Of what is kept of a parameter beside its blocks, where these are only a part of it."""
    rest = getattr(found.state.momentum, "rest", {})
    return sum(_bytes(rest[path]) for path in place.paths if path in rest)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _factors(place: Place) -> tuple[str, ...]:
    """The length of each axis of a block, the largest of all, and the kind of its factor."""
    axes = place.label.removesuffix("_complex").split("x")
    sizes = place.sizes.max(axis=0)
    return tuple(
        f"{size} {'diagonal' if axis.endswith('diag') else 'dense'}"
        for size, axis in zip(sizes, axes, strict=True)
    )
