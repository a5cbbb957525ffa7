"""Lookups, dynamic slices and scatters: rows of a table, or examples that are selected.

A lookup `x[i]` of rows may be two things. If x is a parameter, it is a layer, an embedding, whose
inputs are the indices. If x holds examples, each of the rows is an example that was selected: if i
is known when the program is traced, pairs say which examples of x reach which of `x[i]`; if it is
known only when the program runs, a `Read` stands for these pairs until it does.
"""

# With x [8, 3] and 5 rows:
#
#     table[i], i [5]           IndexInputs(i, length=8)
#     x[jnp.arange(0, 8, 2)]    Pairs: 0-0 2-1 4-2 6-3
#     x[order[:5]]              Read(size=8, length=5, distinct=order is a permutation)

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int, Shaped

from optax_kron.capture.program.graph import Node, Operand, Value
from optax_kron.capture.program.knowledge import Knowledge
from optax_kron.capture.rules.batch_axes import Batching, Link, Mixed, Read, Separate
from optax_kron.capture.rules.contraction import (
    Contraction,
    IndexInputs,
    RoleFactor,
    RoleFactors,
    free,
    role_factors,
)
from optax_kron.capture.rules.pairs import Pairs
from optax_kron.capture.rules.record import Primitive, same_axis
from optax_kron.capture.rules.views import NEW, View
from optax_kron.layers.layer import AxisFactor

_Rows = TypeVar("_Rows", np.ndarray, Array)

# ------------------------------------------------------------------------------------------- gather


def _gather_axis(node: Node, i: int, output: Value, axis: int) -> int | None:
    """Of `gather`: whole axes of the table, axes of the indices, and batch axes of both."""
    numbers, ndim = node.params["dimension_numbers"], node.operands[0].ndim
    offsets, batching = numbers.offset_dims, tuple(numbers.operand_batching_dims)
    if axis in offsets:
        gone = (*numbers.collapsed_slice_dims, *batching)
        kept = [a for a in range(ndim) if a not in gone]
        return kept[offsets.index(axis)] if i == 0 else None
    position = _positions(node, output).index(axis)
    if i == 1:
        return position
    indices_batching = tuple(numbers.start_indices_batching_dims)
    return batching[indices_batching.index(position)] if position in indices_batching else None


def _positions(node: Node, output: Value) -> list[int]:
    """The axes of a lookup's output that count lookups."""
    offsets = node.params["dimension_numbers"].offset_dims
    return [a for a in range(output.ndim) if a not in offsets]


def _gather_layer(node: Node, i: int, view: View) -> Contraction | None:
    """Rows of a table: the input is an index, in place of a one-hot vector."""
    numbers, sizes = node.params["dimension_numbers"], node.params["slice_sizes"]
    indices, out = node.operands[1], node.outputs[0]
    batching = tuple(numbers.operand_batching_dims)
    indexed = _indexed(view, sizes, numbers.start_index_map)
    if i != 0 or indexed is None or not isinstance(indices, Value):
        return None
    if not (_clips(node) or len(numbers.start_index_map) == 1):
        return None
    collapsed = tuple(numbers.collapsed_slice_dims)
    rows = _row_factor(view, indexed, sizes, batching)
    if rows is None or any(a != indexed for a in collapsed):
        return None
    kept = [a for a in range(len(view.axes)) if a not in (*collapsed, *batching)]
    output: list[RoleFactors] = [free(a, size) for a, size in enumerate(out.shape)]
    for axis, kernel_axis in zip(numbers.offset_dims, kept, strict=True):
        if kernel_axis != indexed:
            output[axis] = role_factors("output", view.axes[kernel_axis], axis)
    positions = _positions(node, out)
    for kernel_axis, number in zip(batching, numbers.start_indices_batching_dims, strict=True):
        axis = positions[number]
        output[axis] = role_factors("block", view.axes[kernel_axis], axis)
    operand_axes = (*(output[a] for a in positions), (RoleFactor("input", rows, 1),))
    column = numbers.start_index_map.index(indexed)
    inputs = IndexInputs(indices, rows.size, column, _clips(node))
    return Contraction("embedding", inputs, operand_axes, tuple(output))


def _clips(node: Node) -> bool:
    """Whether a lookup brings indices beyond the table back to its ends."""
    modes = jax.lax.GatherScatterMode
    # What is promised to be inside is not checked: XLA clips it.
    return node.params["mode"] in (modes.CLIP, modes.PROMISE_IN_BOUNDS)


def _indexed(view: View, sizes: Sequence[int], axes: Sequence[int]) -> int | None:
    """Which of some axes an index moves along: where a slice is whole, it is clipped to zero."""
    moving = [a for a in axes if sizes[a] != view.shape[a]] or list(axes)
    return moving[0] if len(moving) == 1 else None


def _row_factor(
    view: View, indexed: int, sizes: Sequence[int], batching: Sequence[int]
) -> AxisFactor | None:
    """The kernel's factor that a lookup of whole rows along an axis enumerates, if there is one."""
    rows = [a for a in range(len(view.shape)) if a != indexed and a not in batching]
    if sizes[indexed] != 1 or any(sizes[a] != view.shape[a] for a in rows):
        return None
    if sum(view.shape[a] > 1 for a in rows) > 1:
        return None  # a matrix for each index: as one row it would have an enormous factor
    factors = view.axes[indexed]
    if any(f.axis == NEW for f in factors) or len(factors) != 1 or factors[0].stride != 1:
        return None
    return factors[0]


def _gather_select(
    node: Node, i: int, output: Value, batching: Separate, known: Knowledge
) -> Batching:
    """Rows at known indices, as the examples' own numbers are, or else one row for each example."""
    operand, indices = node.operands[0], node.operands[1]
    if i != 0:
        return Mixed(batching.marks, node)
    positions = _positions(node, output)
    if batching.axis not in positions or not isinstance(indices, Value):
        return _not_followed(batching, node)
    params, numbers = node.params, node.params["dimension_numbers"]
    along = positions.index(batching.number)
    one_each = indices.shape[along] == np.prod(indices.shape[:-1])
    readable = one_each and batching.is_plain and known.runs_once(node)
    shared: list[Batching] = []
    for column, axis in sorted(enumerate(numbers.start_index_map), key=lambda entry: entry[1]):
        if params["slice_sizes"][axis] != 1:
            continue
        size = operand.shape[axis]
        rows, source = _column(known, indices, column)
        if rows is not None:
            pairs = _known_rows(rows, along, params["mode"], size)
            before = batching.made_from(pairs, axis, size, node)
            if isinstance(before, Separate) and pairs.mapping(size) is not None:
                return before  # rows of its own for each of the examples
            shared.append(before)
        elif readable:
            read = Read(
                index=(_origin(known, source), column * (source is indices), str(params["mode"])),
                size=size,
                length=output.shape[batching.number],
                distinct=params["unique_indices"] or _is_distinct(known, source),
                node=node,
                operand=indices,
                column=column,
            )
            shared.append(batching.read_from(read, axis))
    separate = [before for before in shared if isinstance(before, Separate)]
    return separate[0] if separate else _not_followed(batching, node)


def _not_followed(batching: Separate, node: Node) -> Mixed:
    reason = f"{node.name} selects examples in a way that is not followed"
    return Mixed(batching.marks, node, reason)


def _known_rows(rows: np.ndarray, along: int, mode: jax.lax.GatherScatterMode, size: int) -> Pairs:
    """Rows at known indices, and the elements along an axis of these that read them."""
    number = np.arange(rows.shape[along]).reshape([-1] + [1] * (rows.ndim - along - 1))
    number = np.broadcast_to(number, rows.shape).ravel()
    rows = _inside(np, rows.ravel(), mode, size)
    return Pairs(rows[rows >= 0], number[rows >= 0])


def _inside(xp: ModuleType, rows: _Rows, mode: jax.lax.GatherScatterMode, size: int) -> _Rows:
    """The rows that indices mean, -1 for those that read none."""
    if mode == jax.lax.GatherScatterMode.FILL_OR_DROP:
        return xp.where((rows >= 0) & (rows < size), rows, -1)
    return xp.clip(rows, 0, size - 1)


# --------------------------------------------------------------------------- what indices come from


def _column(known: Knowledge, value: Value, number: int) -> tuple[np.ndarray | None, Value]:
    """One column of indices [..., columns], if it is known, and what it comes from."""
    node = known.maker(value)
    axis = value.ndim - 1
    if node is not None and node.name == "concatenate" and node.params["dimension"] == axis:
        for operand in node.operands:
            width = operand.shape[axis]
            if number < width and isinstance(operand, Value):
                return _column(known, operand, number)
            number -= width
        return None, value
    array = known.array(value)
    return (None if array is None else array[..., number]), value


def _origin(known: Knowledge, value: Operand) -> Operand:
    """What indices come from, through what makes negative ones positive and adds axes.

    `x[i]` of `jax.numpy` looks up `select_n(i < 0, i, i + len(x))[:, None]`: two lookups at one `i`
    read the same rows, whatever is between.
    """
    while (node := known.maker(value)) is not None:
        source = None
        if node.name in ("broadcast_in_dim", "reshape", "squeeze"):
            same = np.prod(node.operands[0].shape) == np.prod(value.shape)
            source = node.operands[0] if same else None
        elif node.name == "select_n":
            source = _unwrapped(known, node)
        elif node.name == "convert_element_type":
            source = node.operands[0]
        if not isinstance(source, Value) or source.dtype.kind not in "iu":
            break
        value = source
    return value


def _unwrapped(known: Knowledge, node: Node) -> Operand | None:
    """The index of `select_n(index < 0, index, index + length)`."""
    if len(node.operands) != 3:
        return None
    test, index, other = node.operands
    for value, name in ((test, "lt"), (other, "add")):
        maker = known.maker(value)
        if maker is None or maker.name != name or maker.operands[0] is not index:
            return None
    return index


def _is_distinct(known: Knowledge, value: Operand) -> bool:
    """Whether no two elements of some indices are known to be equal, in any run."""
    value = _origin(known, value)
    array = known.array(value)
    if array is not None:
        return len(np.unique(array)) == array.size
    node = known.maker(value)
    if node is None or value.ndim != 1 or not isinstance(value, Value):
        return False
    number = node.outputs.index(value)
    if node.name in ("sort", "slice", "rev"):
        return _is_distinct(known, node.operands[number])
    return node.name == "top_k" and number == 1


# ----------------------------------------------------------------------------------- dynamic slices


def _dynamic_slice_layer(node: Node, i: int, view: View) -> Contraction | None:
    """One row of a table, at an index that is a scalar."""
    starts, sizes = node.operands[1:], node.params["slice_sizes"]
    indexed = _indexed(view, sizes, range(len(view.axes)))
    if i != 0 or indexed is None:
        return None
    start, rows = starts[indexed], _row_factor(view, indexed, sizes, ())
    if rows is None or not isinstance(start, Value):
        return None
    output = [role_factors("output", factors, a) for a, factors in enumerate(view.axes)]
    output[indexed] = free(indexed, 1)
    inputs = IndexInputs(start, rows.size, None, clips=True)
    return Contraction("embedding", inputs, ((RoleFactor("input", rows, 1),),), tuple(output))


def _dynamic_slice_select(
    node: Node, i: int, output: Value, batching: Separate, known: Knowledge
) -> Batching:
    """A run of rows, from a known start or not."""
    if i != 0:
        return Mixed(batching.marks, node)
    axis = batching.number
    start, size, length = node.operands[1 + axis], node.operands[0].shape[axis], output.shape[axis]
    first = known.array(start)
    if first is not None:
        number = np.arange(length)
        rows = np.clip(first, 0, size - length) + number
        return batching.made_from(Pairs(rows, number), axis, size, node)
    if not (batching.is_plain and known.runs_once(node)):
        return _not_followed(batching, node)
    read = Read((_origin(known, start), "run", length), size, length, True, node, start, None)
    return batching.read_from(read, axis)


# ----------------------------------------------------------------------------------------- scatters


def _scatter_axis(node: Node, i: int, output: Value, axis: int) -> int | None:
    """Of scatters: whole axes, batch axes, and, of the operand, all that is not overwritten."""
    if i == 0:
        return axis
    numbers = node.params["dimension_numbers"]
    batching = tuple(numbers.operand_batching_dims)
    if axis in batching:
        indices_axis = numbers.scatter_indices_batching_dims[batching.index(axis)]
        if i == 1:
            return indices_axis
        ndim = node.operands[i].ndim
        scattered = [a for a in range(ndim) if a not in numbers.update_window_dims]
        return scattered[indices_axis]
    if axis in numbers.scatter_dims_to_operand_dims or axis in numbers.inserted_window_dims:
        return None
    gone = (*numbers.inserted_window_dims, *batching)
    window = [a for a in range(output.ndim) if a not in gone]
    return numbers.update_window_dims[window.index(axis)] if i == 2 else None


# ---------------------------------------------------------------------------- when the program runs


def rows_of(read: Read, index: Int[Array, "..."]) -> Int[Array, " length"]:
    """The rows that were read, -1 where none was.

    Args:
      read: A read of rows.
      index: The values of its operand.
    """
    if read.column is None:
        return jnp.clip(index, 0, read.size - read.length) + jnp.arange(read.length)
    rows = index[..., read.column].reshape(-1)
    return _inside(jnp, rows, read.node.params["mode"], read.size)


def reaching(
    link: Link, values: Shaped[Array, "N ..."], indices: Mapping[Read, Array], size: int
) -> Shaped[Array, "size ..."]:
    """What reaches each element of an axis, summed over the examples of a mark.

    Args:
      link: The link of the elements to the examples.
      values: The values of the examples.
      indices: The values of the operands of all reads.
      size: Number of elements.
    """
    for pairs, read in link.reads:
        values = _summed(pairs, values, read.length)
        rows = rows_of(read, indices[read])
        rows = jnp.where(rows < 0, read.size, rows)
        zeros = jnp.zeros((read.size, *values.shape[1:]), values.dtype)
        values = zeros.at[rows].add(values, mode="drop")
    return _summed(link.pairs, values, size)


def _summed(
    pairs: Pairs | None, values: Shaped[Array, "N ..."], size: int
) -> Shaped[Array, "size ..."]:
    if pairs is None:
        return values[:size]  # of others, the first are joined by more
    taken = values[pairs.examples]
    if len(pairs) == size and np.array_equal(pairs.elements, np.arange(size)):
        return taken
    return jnp.zeros((size, *values.shape[1:]), values.dtype).at[pairs.elements].add(taken)


# ------------------------------------------------------------------------------------------ records

_scatter = Primitive(_scatter_axis)
_KINDS = ("add", "sub", "mul", "min", "max")

RECORDS = {
    "gather": Primitive(_gather_axis, select=_gather_select, layer=_gather_layer),
    "dynamic_slice": Primitive(same_axis, select=_dynamic_slice_select, layer=_dynamic_slice_layer),
    "dynamic_update_slice": Primitive(same_axis),
    "scatter": _scatter,
    **{f"scatter{sign}{kind}": _scatter for sign in "-_" for kind in _KINDS},
}
