"""Primitives that work along some axes, and keep what lies along the others apart."""

from collections.abc import Callable

import numpy as np

from optax_kron.capture.program.graph import Node, Value
from optax_kron.capture.rules.record import AxisRule, Primitive, along


def _leading(count: Callable[[Node], int]) -> AxisRule:
    """Of what works along the last axes: leading ones, so many, stay apart."""
    return lambda node, i, output, axis: axis if axis < count(node) else None


def _matrices(ndim: int) -> AxisRule:
    """Of a function of arrays of `ndim` axes, which leading axes of its first operand count.

    Of the other operands and the outputs, some hold a matrix, a vector or a number for each.
    """
    return _leading(lambda node: max(0, node.operands[0].ndim - ndim))


def _reduce_axis(node: Node, i: int, output: Value, axis: int) -> int | None:
    """Of all reductions: over axes, or in windows."""
    params = node.params
    if "window_dimensions" in params:
        plain = params["window_dimensions"][axis] == 1 and tuple(params["padding"][axis]) == (0, 0)
        return axis if plain and i == 0 else None
    if "axes" not in params:
        return None
    return [a for a in range(node.operands[i].ndim) if a not in params["axes"]][axis]


def _cumsum_integers(node: Node, x: np.ndarray) -> np.ndarray:
    return np.cumsum(x, node.params["axis"])


_OF_MATRICES = """
    cholesky eig eigh geqp3 geqrf hessenberg householder_product lu qr schur svd symmetric_product
    triangular_solve tridiagonal
"""

REDUCTION = Primitive(_reduce_axis)
RECORDS = {
    **dict.fromkeys(["cumprod", "cummax", "cummin", "cumlogsumexp"], Primitive(along("axis"))),
    "cumsum": Primitive(along("axis"), integers=_cumsum_integers),
    "sort": Primitive(along("dimension")),
    "top_k": Primitive(along("axis", -1)),
    "fft": Primitive(_leading(lambda node: node.outputs[0].ndim - len(node.params["fft_lengths"]))),
    **dict.fromkeys(_OF_MATRICES.split(), Primitive(_matrices(2))),
    # Of vectors: of pivots, and of diagonals.
    **dict.fromkeys(["lu_pivots_to_permutation", "tridiagonal_solve"], Primitive(_matrices(1))),
}
