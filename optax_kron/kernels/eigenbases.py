"""Eigenbases of Hermitian matrices: by LAPACK, or followed by power iteration from the last one."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

from optax_kron.kernels import contract, linalg

_CLOSED_FORM = 2  # largest size that is decomposed without LAPACK

Matrix = Inexact[Array, "d d"]


def hermitian_eigen(matrix: contract.Factor) -> tuple[contract.Basis, Float[Array, " d"]]:
    """Eigenvectors and eigenvalues.

    Args:
      matrix: A Hermitian matrix, or the diagonal of a diagonal one.

    Returns:
      The eigenvectors as columns, `None` for a diagonal matrix; and the eigenvalues. Cost: about
      9·d³ operations, up to 2×2 in closed form.
    """
    if matrix.ndim == 1:
        return None, matrix
    if matrix.shape[0] <= _CLOSED_FORM:
        return _small_eigen(matrix)
    values, basis = linalg.lapack_safe(lambda x: tuple(jnp.linalg.eigh(x)))(matrix)
    return basis, values


def _small_eigen(matrix: Matrix) -> tuple[Matrix, Float[Array, " d"]]:
    """Those of a matrix up to 2×2, by one rotation."""
    if matrix.shape[0] == 1:
        return jnp.ones_like(matrix), matrix[0].real
    a, c, corner = matrix[0, 0].real, matrix[1, 1].real, matrix[1, 0]
    # [[a, b̄], [b, c]] is made real by the phase of b, which goes into the second row of the basis.
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


def descending(matrix: Matrix) -> Matrix:
    """Eigenvectors of a Hermitian matrix as columns, the largest eigenvalue's first."""
    basis, values = hermitian_eigen(matrix)
    assert basis is not None  # a matrix has one
    return jnp.take(basis, jnp.argsort(-values), axis=1)


def rayleigh_quotients(
    basis: Inexact[Array, "*N d d"],
    matrix: Inexact[Array, "*N d d"],
    *,
    precision: contract.Precision = None,
) -> Float[Array, "*N d"]:
    """`diag(QᴴSQ)` of columns Q and a Hermitian S. Cost: 2·d³ operations."""
    return _quotients(basis, jnp.matmul(matrix, basis, precision=precision))


def decompose(
    basis: Matrix, matrix: Matrix, *, precision: contract.Precision = None
) -> tuple[Matrix, Int[Array, " d"]]:
    """An eigenbasis, the largest eigenvalue's column first.

    Args:
      basis: Q, orthonormal columns that the new ones are to be compared with.
      matrix: S, Hermitian and positive semidefinite.
      precision: Precision of the matrix product.

    Returns:
      The new columns, and the indices of the old ones in the order of their Rayleigh quotients.
      Cost: about 11·d³ operations.
    """
    order = jnp.argsort(-rayleigh_quotients(basis, matrix, precision=precision), stable=True)
    return descending(matrix), order


def power_iteration(
    basis: Matrix, matrix: Matrix, *, precision: contract.Precision = None
) -> tuple[Matrix, Int[Array, " d"]]:
    """One step of simultaneous iteration towards an eigenbasis: `Q ← qr(S Q)`.

    Arguments are those of `decompose`.

    Returns:
      The new columns, and for each the index of the old column that it was made of. Where S is zero
      the basis stays. Cost: 2·d³ operations and a QR decomposition, of about 8/3·d³.

    Source: Wang et al. (2024), arXiv:2405.18144, and Vyas et al. (2024), arXiv:2409.11321.
    """
    product = jnp.matmul(matrix, basis, precision=precision)
    # QR makes each column orthogonal to those on its left, which the iteration finds first: so the
    # columns are ordered before, by diag(QᴴSQ), the largest first.
    order = jnp.argsort(-_quotients(basis, product), stable=True)
    if basis.shape[0] == 1:
        return basis, order
    new = linalg.lapack_safe(lambda x: jnp.linalg.qr(x)[0])(jnp.take(product, order, axis=1))
    return jnp.where(jnp.any(matrix != 0), new, jnp.take(basis, order, axis=1)), order


def _quotients(
    basis: Inexact[Array, "*N d d"], product: Inexact[Array, "*N d d"]
) -> Float[Array, "*N d"]:
    return jnp.sum((basis.conj() * product).real, axis=-2)
