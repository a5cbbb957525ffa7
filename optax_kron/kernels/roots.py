"""Inverse p-th roots `S^(-1/p)` of Hermitian positive semidefinite matrices.

By LAPACK's eigendecomposition, or by the coupled iteration, of matrix products only. All are damped
relative to the largest eigenvalue: `(S + ε λ_max I)^(-1/p)`.

Of an inverse root, float32 leaves little where the condition number is 1e6: its p-th power is right
to that number times the rounding. So CPUs and CUDA compute in float64, also while JAX has it
switched off; on a CPU the coupled iteration does so only where the condition number asks for it.
"""

import collections
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Inexact

from optax_kron.kernels import contract, coupled, eigenbases, flow, linalg, packed
from optax_kron.kernels.contract import matmul_exact
from optax_kron.types import PyTree

METHODS = ("eigh", "newton")

# Eigenvalues that rounding of the entries has made negative are no farther from zero than this.
_INDEFINITE = 0.1  # relative to the largest
_CLOSED_FORM = 2  # largest size whose eigenvalues need no LAPACK
_CHECKED_ROWS = 16
_EASY_RESIDUAL = 2e-3  # of roots in float32; others are made in float64

# Operations more than needed, for a smaller number of programs; and of how many matrices of what
# size they are counted for nothing, as a program takes longer to compile.
_SLACK, _FREE = 0.25, 128**3

Key = TypeVar("Key", bound=Hashable)
Matrix = Inexact[Array, "d d"]
Scalar = Float[Array, ""]


def inverse_root(
    matrix: contract.Factor, order: int, epsilon: ArrayLike, *, method: str = "eigh"
) -> tuple[contract.Factor, Scalar]:
    """`(S + ε λ_max I)^(-1/p)`.

    Args:
      matrix: S, Hermitian, or the diagonal of a diagonal matrix.
      order: The order p ≥ 1 of the root.
      epsilon: The damping ε ≥ 0, relative to the largest eigenvalue.
      method: "eigh" or "newton"; of a diagonal neither.

    Returns:
      The inverse root, in the shape of the matrix. With "eigh" eigenvalues down to -λ_max/10 count
      as zero, while "newton" needs a positive definite matrix, whose λ_max is estimated to
      3 %; with ε = 0 both do. And how far it is from one, `max |Xᵖ(S + ελI) − I|`, or
      with "newton" that of random rows of it, which is large or not finite if the computation
      failed. Cost: for "eigh" about 11·d³ operations and 2·d³·(1 + log₂ p) for the check. For
      "newton" 2·d³ for each of 6 to 15 products in float32, and of about 25 more in float64 where
      those leave more than 2e-3, from condition numbers of about 1e3 on.

    Sources: Gupta et al. (2018), arXiv:1802.09568; Guo and Higham (2006), doi:10.1137/050643374.
    """
    largest = contract.largest_magnitude(matrix)
    # Relative to the largest entry nothing overflows, or vanishes beside it.
    unit = matrix / jnp.where(largest == 0, jnp.nan, largest)
    epsilon = jnp.asarray(epsilon, largest.dtype)

    if matrix.ndim == 1:
        damped = jnp.maximum(unit, 0) + epsilon
        root = damped ** (-1 / order)
        residual = contract.largest_magnitude(root**order * damped - 1)
    elif method == "eigh" or matrix.shape[0] <= _CLOSED_FORM:
        narrow = functools.partial(_by_eigenvalues, order=order)
        wide = _in_float64(lambda *operands: narrow(*_doubled(operands)))
        root, residual = flow.platform_dependent(unit, epsilon, cpu=wide, cuda=wide, default=narrow)
    else:
        root, residual = _by_products(unit, epsilon, order)
    return root * largest ** (-1 / order), residual


def together(
    stacks: Mapping[Key, Inexact[Array, "N r c"]],
    orders: Mapping[Key, int],
    find: Callable[..., tuple[Array, ...]],
) -> dict[Key, tuple[Array, ...]]:
    """What a function makes of every matrix of several stacks, each with its own order of roots.

    Stacks of one order and of similar sizes share a program, in which the smaller ones are padded
    with zeros; large ones, which are packed, only do so with those of their size.

    Args:
      stacks: Matrices by any key, or packed forms of matrices (`packed.keep_factors`).
      orders: Of the roots, by the same keys.
      find: From a matrix and `order` to a root in its shape, and what else is known of that.

    Returns:
      What the function returns of each stack, with a leading axis N.
    """
    kinds = collections.defaultdict(list)
    for key, stack in stacks.items():
        size = packed.size_of(stack) if stack.shape[1] != stack.shape[2] else stack.shape[1]
        alone = size if size >= packed.LEAST_SIZE or size <= _CLOSED_FORM else 0
        kinds[(str(stack.dtype), orders[key], alone), size].append(key)

    def cost(size, members):
        return size**3 * sum(len(stacks[key]) for key in members)

    found: dict[Key, tuple[Array, ...]] = {}
    for _, members in linalg.joined(kinds, cost, slack=_SLACK, free=_FREE):
        rows, columns = np.max([stacks[key].shape[1:] for key in members], axis=0)
        pool = [
            jnp.pad(S, ((0, 0), (0, rows - S.shape[1]), (0, columns - S.shape[2])))
            for S in map(stacks.__getitem__, members)
        ]
        one = functools.partial(find, order=orders[members[0]])
        if max(rows, columns) <= _CLOSED_FORM:  # a loop would spend its time on looping
            made, *rest = jax.vmap(one)(jnp.concatenate(pool))
        else:
            made, *rest = linalg.map_blocks(one, jnp.concatenate(pool))
        start = 0
        for key in members:
            count, *shape = stacks[key].shape
            own = slice(start, start + count)
            found[key] = (made[own, : shape[0], : shape[1]], *(x[own] for x in rest))
            start += count
    return found


def _by_products(matrix: Matrix, epsilon: Scalar, order: int) -> tuple[Matrix, Scalar]:
    """The inverse root by the coupled iteration, and its residual.

    On a CPU it is in float32 where the condition number is small, else partly in float64. Where all
    matrices are worked on together, as on a GPU, both would be done for all of them.
    """

    def compute(plan, matrix, epsilon, largest=None):
        start = coupled.scaled(matrix, epsilon, largest)
        root = coupled.unscaled(coupled.inverse_root(start, order, plan), start, order)
        return root, _residual(root, matrix, start.shift, order), start.largest

    def in_float64(matrix, epsilon, *largest):
        return compute(coupled.HARD, *_doubled((matrix, epsilon, *largest)))[:2]

    # One by one also where it is batched: a conditional of a batch is no conditional.
    @jax.custom_batching.sequential_vmap
    def on_cpu(matrix, epsilon):
        *found, largest = compute(coupled.EASY, matrix, epsilon)

        def keep(found, *operands):
            return tuple(found)

        def redo(found, *operands):
            return _in_float64(in_float64)(*operands)

        is_enough = found[1] <= _EASY_RESIDUAL
        return flow.cond(is_enough, keep, redo, tuple(found), matrix, epsilon, largest)

    if contract.real_dtype(matrix.dtype) == jnp.float64:
        return compute(coupled.EXACT, matrix, epsilon)[:2]
    return flow.platform_dependent(
        matrix,
        epsilon,
        cpu=on_cpu,
        cuda=_in_float64(in_float64),
        default=lambda *operands: compute(coupled.HARD, *operands)[:2],
    )


def _residual(root: Matrix, matrix: Matrix, shift: Scalar, order: int) -> Scalar:
    """`max |R (XᵖA − I)|` for normal random rows R, and A = S + shift·I.

    The rows take p + 1 thin products in place of whole ones. An error that is large along one
    direction only is in nearly all of them.
    """
    size, real = matrix.shape[0], contract.real_dtype(matrix.dtype)
    rows = np.random.default_rng(1).standard_normal((_CHECKED_ROWS, size)).astype(real)
    rows = jnp.asarray(rows).astype(matrix.dtype)
    found = rows
    for _ in range(order):
        found = matmul_exact(found, root)
    applied = matmul_exact(found, matrix) + shift.astype(matrix.dtype) * found
    return contract.largest_magnitude(applied - rows)


def _in_float64(fn: Callable[..., tuple[Array, Array]]) -> Callable[..., tuple[Array, Array]]:
    """The function with types of 64 bits, and its results in the precision of the first operand.

    It is lowered where types of 64 bits are off: no indices may come about in it (argmax, sort).
    Batched it is traced anew, as rules of batching would not keep to those types either.
    """

    @jax.custom_batching.custom_vmap
    def wide(*operands):
        dtype = jax.tree.leaves(operands)[0].dtype
        with jax.enable_x64(True):
            root, residual = fn(*operands)
            return root.astype(dtype), residual.astype(contract.real_dtype(dtype))

    @wide.def_vmap
    def batched(size, is_batched, *operands):
        operands = jax.tree.map(
            lambda x, has_axis: x if has_axis else jnp.broadcast_to(x, (size, *x.shape)),
            operands,
            tuple(is_batched),
        )
        return _in_float64(jax.vmap(fn))(*operands), (True, True)

    return wide


def _doubled(operands: PyTree) -> PyTree:
    """Arrays at double the precision."""
    return jax.tree.map(
        lambda x: x.astype(jnp.complex128 if jnp.iscomplexobj(x) else jnp.float64), operands
    )


def _by_eigenvalues(matrix: Matrix, epsilon: Scalar, *, order: int) -> tuple[Matrix, Scalar]:
    """The inverse root of a matrix, in its own precision, and its residual."""
    basis, values = eigenbases.hermitian_eigen(matrix)
    assert basis is not None  # a matrix has one
    shift = epsilon * jnp.max(values)
    damped = matrix + shift.astype(matrix.dtype) * jnp.eye(matrix.shape[0], dtype=matrix.dtype)
    shifted = jnp.maximum(values, 0) + shift
    root = matmul_exact(basis * (shifted ** (-1 / order))[None], basis.conj().T)
    # What the root would make of the matrix, were both exact.
    near = values > -_INDEFINITE * jnp.max(values)
    expected = jnp.where(near, (values + shift) / shifted, 1)
    identity = matmul_exact(basis * expected[None], basis.conj().T)
    # A power of a root loses the digits that the condition number takes; so does the check of it.
    error = matmul_exact(coupled.power(root, order), damped) - identity
    return root, contract.largest_magnitude(error)
