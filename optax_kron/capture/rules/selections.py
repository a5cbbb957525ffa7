"""Where the data are before an equation that selects, repeats or joins them along their axis."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optax_kron.capture.program.graph import Node, Value
from optax_kron.capture.program.knowledge import Knowledge
from optax_kron.capture.rules.batch_axes import Coupled, Data, Label, Link, Read
from optax_kron.capture.rules.pairs import Pairs

SELECTIONS = frozenset(
    ["slice", "rev", "pad", "concatenate", "split", "tile", "gather", "dynamic_slice"]
)


def follow(
    node: Node, output: Value, label: Data, number: int, operand: Value, known: Knowledge
) -> Label:
    """The label of an operand of which an equation selects elements along the axis of the data.

    Args:
      node: the equation.
      output: one of its outputs.
      label: of the output, along an axis of it.
      number: of the operand.
      operand: that is selected from.
      known: of the program.
    """
    if number > 0 and node.name != "concatenate":
        return Coupled(label.marks, node)  # what pads, for all data the same
    if not known.depends_on_data(operand):
        return Coupled(label.marks, node)  # one parameter, whichever of its rows
    if node.name == "gather":
        return _gathered(node, output, label, operand, known)
    if node.name == "dynamic_slice":
        return _sliced(node, output, label, operand, known)
    made = _made(node, output, label.axis, number)
    return label.made_from(made, label.axis, operand.shape[label.axis], node)


def _not_followed(label: Data, node: Node) -> Coupled:
    reason = f"data are selected by {node.name} in a way that is not followed"
    return Coupled(label.marks, node, reason)


def _made(node: Node, output: Value, axis: int, number: int) -> Pairs:
    """Which elements of an operand make which of the output, along an axis that both have."""
    params, lengths = node.params, [x.aval.shape[axis] for x in node.operands if x.aval.shape]
    elements = np.arange(lengths[number])
    if node.name == "slice":
        strides = params["strides"] or (1,) * output.ndim
        start, limit = params["start_indices"][axis], params["limit_indices"][axis]
        elements = elements[start : limit : strides[axis]]
        made = np.arange(len(elements))
    elif node.name == "rev":
        made = elements[::-1]
    elif node.name == "pad":
        low, _, between = params["padding_config"][axis]
        made = low + elements * (between + 1)
    elif node.name == "concatenate":
        made = elements + sum(lengths[:number])
    elif node.name == "split":
        start = sum(params["sizes"][: node.outputs.index(output)])
        made = elements - start
    else:
        made = np.arange(output.shape[axis])
        elements = made % lengths[0]
    there = (made >= 0) & (made < output.shape[axis])
    return Pairs(elements[there], made[there])


def _gathered(node: Node, output: Value, label: Data, operand: Value, known: Knowledge) -> Label:
    """Rows at known indices, as the data's own numbers are, or else one row for each datum."""
    params, numbers = node.params, node.params["dimension_numbers"]
    positions = [a for a in range(output.ndim) if a not in numbers.offset_dims]
    if label.axis not in positions:
        return _not_followed(label, node)
    along, indices = positions.index(label.axis), node.operands[1]
    if not isinstance(indices, Value):
        return _not_followed(label, node)
    one_each = indices.shape[along] == np.prod(indices.shape[:-1])
    readable = one_each and label.is_plain and known.runs_once(node)
    shared: list[Label] = []
    for column, axis in sorted(enumerate(numbers.start_index_map), key=lambda entry: entry[1]):
        if params["slice_sizes"][axis] != 1:
            continue
        rows, source = known.column(indices, column)
        if rows is not None:
            pairs = _known_rows(rows, along, params["mode"], operand.shape[axis])
            found = label.made_from(pairs, axis, operand.shape[axis], node)
            if isinstance(found, Data) and pairs.mapping(operand.shape[axis]) is not None:
                return found  # rows of its own for each of the data
            shared.append(found)
        elif readable:
            index = known.origin(source), column * (source is indices), str(params["mode"])
            read = Read(
                index=index,
                size=operand.shape[axis],
                length=output.shape[label.axis],
                distinct=params["unique_indices"] or known.is_distinct(source),
                node=node,
                operand=indices,
                column=column,
            )
            shared.append(label.read_from(read, axis))
    of_data = [found for found in shared if isinstance(found, Data)]
    return of_data[0] if of_data else _not_followed(label, node)


def _known_rows(rows: np.ndarray, along: int, mode: Any, size: int) -> Pairs:
    """Rows at known indices, and the elements along an axis of these that read them."""
    number = np.arange(rows.shape[along]).reshape([-1] + [1] * (rows.ndim - along - 1))
    number = np.broadcast_to(number, rows.shape).ravel()
    rows = _rows(np, rows.ravel(), mode, size)
    return Pairs(rows[rows >= 0], number[rows >= 0])


def _sliced(node: Node, output: Value, label: Data, operand: Value, known: Knowledge) -> Label:
    """A run of rows, from a known start or not."""
    axis, start = label.axis, node.operands[1 + label.axis]
    size, length = operand.shape[axis], output.shape[axis]
    first = known.array(start)
    if first is not None:
        number = np.arange(length)
        return label.made_from(
            Pairs(np.clip(first, 0, size - length) + number, number), axis, size, node
        )
    if not (label.is_plain and known.runs_once(node)):
        return _not_followed(label, node)
    read = Read((known.origin(start), "run", length), size, length, True, node, start, None)
    return label.read_from(read, axis)


def rows_of(read: Read, index: Any) -> Any:
    """The rows that were read [length], -1 where none was.

    Args:
      read: of rows.
      index: the values of its operand.
    """
    if read.column is None:
        return jnp.clip(index, 0, read.size - read.length) + jnp.arange(read.length)
    return _rows(jnp, index[..., read.column].reshape(-1), read.node.params["mode"], read.size)


def _rows(xp: Any, rows: Any, mode: Any, size: int) -> Any:
    if mode == jax.lax.GatherScatterMode.FILL_OR_DROP:
        return xp.where((rows >= 0) & (rows < size), rows, -1)
    return xp.clip(rows, 0, size - 1)


def reaching(link: Link, values: Array, indices: Mapping[Read, Array], size: int) -> Array:
    """What reaches each element of an axis, summed over the data of a mark.

    Args:
      link: of the elements to the data.
      values: of the data, [N, ...].
      indices: the values of the operands of all reads.
      size: number of elements.

    Returns:
      [size, ...].
    """
    for pairs, read in link.reads:
        values = _summed(pairs, values, read.length)
        rows = rows_of(read, indices[read])
        rows = jnp.where(rows < 0, read.size, rows)
        zeros = jnp.zeros((read.size, *values.shape[1:]), values.dtype)
        values = zeros.at[rows].add(values, mode="drop")
    return _summed(link.pairs, values, size)


def _summed(pairs: Pairs | None, values: Array, size: int) -> Array:
    if pairs is None:
        return values[:size]  # of others, the first are joined by more
    taken = values[pairs.data]
    if len(pairs) == size and np.array_equal(pairs.elements, np.arange(size)):
        return taken
    return jnp.zeros((size, *values.shape[1:]), values.dtype).at[pairs.elements].add(taken)
