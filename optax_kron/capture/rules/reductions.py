"""Primitives that work along some axes, and keep what lies along the others apart."""

from collections.abc import Callable

import numpy as np

from optax_kron.capture.program.graph import Node, Value
from optax_kron.capture.rules.record import AxisRule


def along(axis_of: Callable[[Node], int]) -> AxisRule:
    """The rule of a primitive that works along one axis, and keeps its length or not."""

    def rule(node: Node, i: int, output: Value, axis: int) -> int | None:
        return axis if axis_of(node) % max(output.ndim, 1) != axis else None

    return rule


def along_setting(name: str, default: int | None = None) -> AxisRule:
    """The same, of the axis that a setting names."""
    return along(lambda node: node.params.get(name, default))


def along_last(count: Callable[[Node], int]) -> AxisRule:
    """The rule of a primitive that works along the last axes, as many as `count` says."""
    return lambda node, i, output, axis: axis if axis < count(node) else None


def matrices(vectors: bool = False) -> AxisRule:
    """The rule of a function of matrices: leading axes count them.

    Its first operand holds matrices, or `vectors` (of pivots, of diagonals). Of the other operands
    and the outputs, some hold a vector or a number for each matrix.
    """
    return along_last(lambda node: max(0, node.operands[0].ndim - (1 if vectors else 2)))


def fft_axis(node: Node, i: int, output: Value, axis: int) -> int | None:
    """Of `fft`."""
    return axis if axis < output.ndim - len(node.params["fft_lengths"]) else None


def reduce_axis(node: Node, i: int, output: Value, axis: int) -> int | None:
    """Of all reductions: over axes, or in windows."""
    params = node.params
    if "window_dimensions" in params:
        plain = params["window_dimensions"][axis] == 1 and tuple(params["padding"][axis]) == (0, 0)
        return axis if plain and i == 0 else None
    if "axes" not in params:
        return None
    return [a for a in range(node.operands[i].ndim) if a not in params["axes"]][axis]


def cumsum_integers(node: Node, x: np.ndarray) -> np.ndarray:
    """Of `cumsum`."""
    return np.cumsum(x, node.params["axis"])
