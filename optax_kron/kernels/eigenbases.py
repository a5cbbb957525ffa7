"""Eigenbases of Hermitian matrices: by LAPACK, or followed by power iteration from the last one."""

import jax.numpy as jnp
from jax import Array

from optax_kron.kernels import contract, linalg

_CLOSED_FORM = 2  # largest size that is decomposed without LAPACK


def hermitian_eigen(matrix: Array) -> tuple[Array | None, Array]:
    """Eigenvectors and eigenvalues.

    Args:
      matrix: [d, d], Hermitian; or [d], the diagonal of a diagonal matrix.

    Returns:
      The eigenvectors as columns [d, d], `None` for a diagonal matrix; and the eigenvalues, real
      [d]. Cost: about 9·d³ operations, up to 2×2 in closed form.
    """
    if matrix.ndim == 1:
        return None, matrix
    if matrix.shape[0] <= _CLOSED_FORM:
        return _small_eigen(matrix)
    values, basis = linalg.lapack_safe(lambda x: tuple(jnp.linalg.eigh(x)))(matrix)
    return basis, values


def _small_eigen(matrix: Array) -> tuple[Array, Array]:
    """Of a matrix up to 2×2, by one rotation."""
    if matrix.shape[0] == 1:
        return jnp.ones_like(matrix), matrix[0].real
    a, c, corner = matrix[0, 0].real, matrix[1, 1].real, matrix[1, 0]
    if jnp.iscomplexobj(matrix):
        b = jnp.abs(corner)
        phase = jnp.where(b > 0, corner / jnp.where(b > 0, b, 1), 1)
    else:
        b, phase = corner, jnp.ones_like(corner)
    angle = jnp.arctan2(2 * b, a - c) / 2
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    basis = jnp.stack([cosine, -sine, phase * sine, phase * cosine]).reshape(2, 2)
    cross = 2 * b * cosine * sine
    squares = jnp.square(cosine), jnp.square(sine)
    values = a * squares[0] + c * squares[1] + cross, a * squares[1] + c * squares[0] - cross
    return basis.astype(matrix.dtype), jnp.stack(values)


def descending(matrix: Array) -> Array:
    """Eigenvectors as columns [d, d] of a Hermitian [d, d], the largest eigenvalue's first."""
    basis, values = hermitian_eigen(matrix)
    assert basis is not None  # a matrix has one
    return jnp.take(basis, jnp.argsort(-values), axis=1)


def rayleigh_quotients(
    basis: Array, matrix: Array, *, precision: contract.Precision = None
) -> Array:
    """`diag(QᴴSQ)`, real [d], of columns Q and a Hermitian S [d, d]. Cost: 2·d³ operations."""
    return _quotients(basis, jnp.matmul(matrix, basis, precision=precision))


def decompose(
    basis: Array, matrix: Array, *, precision: contract.Precision = None
) -> tuple[Array, Array]:
    """An eigenbasis, the largest eigenvalue's column first.

    Args:
      basis: Q, orthonormal columns [d, d] that the new ones are to be compared with.
      matrix: S [d, d], Hermitian and positive semidefinite.
      precision: of the matrix product.

    Returns:
      The new columns, and the old ones in the order of their Rayleigh quotients, int [d]. Cost:
      about 11·d³ operations.
    """
    order = jnp.argsort(-rayleigh_quotients(basis, matrix, precision=precision), stable=True)
    return descending(matrix), order


def power_iteration(
    basis: Array, matrix: Array, *, precision: contract.Precision = None
) -> tuple[Array, Array]:
    """One step of simultaneous iteration towards an eigenbasis: `Q ← qr(S Q)`.

    The columns are ordered first, by `diag(QᴴSQ)`, the largest first, as the iteration finds the
    leading ones from the left.

    Args:
      basis: as in `decompose`, like all other arguments.
      matrix: S.
      precision: of the matrix product.

    Returns:
      The new columns, and of which old column each was made, int [d]. Where S is zero the basis
      stays. Cost: 2·d³ operations and a QR decomposition, of about 8/3·d³.

    Source: Wang et al. (2024), arXiv:2405.18144, and Vyas et al. (2024), arXiv:2409.11321.
    """
    product = jnp.matmul(matrix, basis, precision=precision)
    order = jnp.argsort(-_quotients(basis, product), stable=True)
    if basis.shape[0] == 1:
        return basis, order
    found = linalg.lapack_safe(lambda x: jnp.linalg.qr(x)[0])(jnp.take(product, order, axis=1))
    return jnp.where(jnp.any(matrix != 0), found, jnp.take(basis, order, axis=1)), order


def _quotients(basis: Array, product: Array) -> Array:
    return jnp.sum((basis.conj() * product).real, axis=0)
