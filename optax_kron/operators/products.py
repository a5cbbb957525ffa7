"""Kronecker products, and what is diagonal in a Kronecker product of bases."""

# Worked example: A [4, 4] and G [3, 3], an operator on arrays X [4, 3] with n = 12 entries.
#
#   Kronecker((A, G)) @ X                        A X Gᵀ [4, 3], never the matrix [12, 12]
#   its inverse for rule="exact"                 Eigen((Q_a, Q_g), 1 / (λ_a λ_gᵀ + δ) [4, 3])
#   its inverse for "pi", "trace" and "plain"    Kronecker(((A + δ_a I)⁻¹, (G + δ_g I)⁻¹))
#
# The damping of "exact" couples the factors, and only in their eigenbases is it simple; the other
# rules keep a product of factors, which is cheaper to apply. With mean eigenvalues tr(A)/4 = 8 and
# tr(G)/3 = 2 and δ = 0.01 they add
#
#            δ_a                       δ_g
#   "pi"     √(8/2)·√0.01 = 0.2        √0.01/√(8/2) = 0.05      of product δ
#   "trace"  0.01·8 = 0.08             0.01·2 = 0.02            relative
#   "plain"  0.01                      0.01                     absolute
#
# Methods of subclasses without a docstring have that of `Operator`, which `help` shows.
# ruff: noqa: D102

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from optax_kron.kernels import contract, eigenbases, kfac, linalg
from optax_kron.operators.base import Faults, Operator
from optax_kron.operators.damping import damped_power, only_exact, spectrum
from optax_kron.operators.vectors import check_array

PI_FLOOR = 1e-8  # least damping of the rule "pi"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kronecker(Operator):
    """`F_1 ⊗ … ⊗ F_k` on arrays [d_1, ..., d_k]; see `kronecker`."""

    factors: tuple[Float[Array, "d_i ..."], ...]  # [d_i], the diagonal, of a diagonal one

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the arrays that it acts on."""
        return tuple(factor.shape[-1] for factor in self.factors)

    def in_structure(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def mv(self, vector: Float[Array, "*d"]) -> Float[Array, "*d"]:
        """The product. Cost: 2·n·Σd_i operations."""
        vector = check_array(vector, self.shape)
        wide = [factor.astype(self.dtype) for factor in self.factors]
        return contract.apply_factors(wide, vector.astype(self.dtype)).astype(vector.dtype)

    @property
    def T(self) -> "Kronecker":  # noqa: N802
        """The transpose, also of factors that are not symmetric."""
        return Kronecker(tuple(factor.T for factor in self.factors))

    def as_matrix(self) -> Float[Array, "n n"]:
        matrix = jnp.ones((1, 1), self.dtype)
        for factor in self.factors:
            dense = jnp.diag(factor) if factor.ndim == 1 else factor
            matrix = jnp.kron(matrix, dense.astype(self.dtype))
        return matrix

    def trace(self) -> Float[Array, ""]:
        """The sum of the eigenvalues. Cost: Σd_i operations."""
        return _product([jnp.sum(_diagonal(factor)) for factor in self.factors])

    def det(self) -> Float[Array, ""]:
        """The determinant, also of factors that are not symmetric. Cost: Σd_i³ operations."""
        signs, logs = self._slogdets()
        # Not the product of powers, of which one may overflow and one vanish.
        return _product(signs) * jnp.exp(sum(logs))

    def logdet(self) -> Float[Array, ""]:
        """The logarithm of the determinant's magnitude. Cost: as `det`."""
        return sum(self._slogdets()[1], jnp.zeros(()))

    def _slogdets(self) -> tuple[list[Array], list[Array]]:
        """What each factor gives to the determinant's sign, and to its logarithm."""
        n = math.prod(self.shape)
        signs, logs = [], []
        for factor, d in zip(self.factors, self.shape, strict=True):
            # det(A ⊗ G) = det(A)^d_out · det(G)^d_in: each to the power of the others' sizes.
            sign, log = _slogdet(factor)
            signs.append(sign ** (n // d))
            logs.append(log * (n // d))
        return signs, logs

    def frobenius_norm(self) -> Float[Array, ""]:
        return _product([jnp.linalg.norm(factor) for factor in self.factors])

    def eigenvalues(self) -> Float[Array, " n"]:
        """All n eigenvalues, ascending. Cost: about 9·Σd_i³ operations, and n numbers."""
        values = [eigenbases.hermitian_eigen(contract.widen(factor))[1] for factor in self.factors]
        return jnp.sort(_outer(values).ravel())

    def times(self, scalar: Float[Array, ""]) -> "Kronecker":
        first, *others = self.factors
        return Kronecker(((first * scalar).astype(first.dtype), *others))

    def power(self, exponent: float, damping: ArrayLike, rule: str) -> tuple[Operator, Faults]:
        """A power of the damped operator. Cost: about 9·Σd_i³ operations."""
        pairs = [eigenbases.hermitian_eigen(factor.astype(self.dtype)) for factor in self.factors]
        bases = tuple(basis for basis, _ in pairs)
        spectra = [spectrum(values) for _, values in pairs]
        if rule == "exact":
            values = _outer([values for values, _ in spectra])
            # A product is zero where any of its factors is zero but for rounding.
            null = _outer([~null for _, null in spectra]) == 0
            powers, fault = damped_power(values, null, damping, exponent)
            return Eigen(bases, powers), {"": fault}
        factors, faults = [], []
        for basis, (values, null), amount in zip(
            bases, spectra, self._amounts(damping, rule), strict=True
        ):
            powers, fault = damped_power(values, null, amount, exponent)
            factors.append(powers if basis is None else (basis * powers) @ basis.T)
            faults.append(fault)
        return Kronecker(tuple(factors)), {"": jnp.any(jnp.stack(faults))}

    def _amounts(self, damping: ArrayLike, rule: str) -> Float[Array, " k"]:
        """What a rule other than "exact" adds to the diagonal of each of the k factors."""
        means = jnp.stack([jnp.mean(_diagonal(f.astype(self.dtype))) for f in self.factors])
        damping = jnp.asarray(damping, self.dtype)
        if rule == "plain":
            amounts = jnp.full_like(means, damping)
        elif rule == "trace":
            amounts = kfac.trace_damping(means, damping)
        else:
            logs = jnp.log(jnp.where(jnp.all(means > 0), means, 1))
            share = jnp.exp(logs - jnp.mean(logs))  # the mean over the means' geometric mean
            amounts = jnp.maximum(share * damping ** (1 / len(means)), PI_FLOOR)
        # Without damping a singular factor is to be found out, so that there is no floor either.
        return jnp.where(damping > 0, amounts, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Eigen(Operator):
    """`Q diag(λ) Qᵀ` with `Q = Q_1 ⊗ … ⊗ Q_k` on arrays [d_1, ..., d_k]; see `eigen`."""

    bases: tuple[Float[Array, "d_i d_i"] | None, ...]  # orthonormal columns; None: the identity
    values: Float[Array, "*d"]  # λ

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the arrays that it acts on."""
        return self.values.shape

    def in_structure(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def mv(self, vector: Float[Array, "*d"]) -> Float[Array, "*d"]:
        """The product. Cost: 4·n·Σd_i operations."""
        vector = check_array(vector, self.shape)
        bases = [None if q is None else q.astype(self.dtype) for q in self.bases]
        x = vector.astype(self.dtype)
        return contract.in_bases(bases, lambda x: x * self.values, x).astype(vector.dtype)

    def trace(self) -> Float[Array, ""]:
        return jnp.sum(self.values)

    def det(self) -> Float[Array, ""]:
        return jnp.prod(self.values)

    def logdet(self) -> Float[Array, ""]:
        return jnp.sum(jnp.log(jnp.abs(self.values)))

    def frobenius_norm(self) -> Float[Array, ""]:
        return jnp.linalg.norm(self.values.ravel())

    def eigenvalues(self) -> Float[Array, " n"]:
        return jnp.sort(self.values.ravel())

    def times(self, scalar: Float[Array, ""]) -> "Eigen":
        return Eigen(self.bases, (self.values * scalar).astype(self.values.dtype))

    def power(self, exponent: float, damping: ArrayLike, rule: str) -> tuple[Operator, Faults]:
        """A power of the damped operator, in the same bases. Cost: n operations."""
        only_exact(rule, "a diagonal in a basis")
        powers, fault = damped_power(*spectrum(self.values), damping, exponent)
        return Eigen(self.bases, powers), {"": fault}


def kronecker(*factors: ArrayLike) -> Kronecker:
    """The Kronecker product of any number of factors, as an operator on tensors.

    `(F_1 ⊗ … ⊗ F_k) vec(X)`, with `vec` row by row, is X with `F_i` applied along every axis i.

    Args:
      *factors: Symmetric [d_i, d_i], or the diagonal [d_i] of a diagonal one. Of factors that are
        not symmetric, `eigenvalues`, `inverse`, `sqrt` and `sample` mean nothing.

    Returns:
      An operator on arrays [d_1, ..., d_k]. Memory: Σd_i².

    Raises:
      ValueError: For no factors, or one that is not square or not real.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> op = ok.operators.kronecker(jnp.diag(jnp.array([1.0, 2.0])), jnp.array([3.0, 4.0, 5.0]))
      >>> print(op @ jnp.ones((2, 3)))
      [[ 3.  4.  5.]
       [ 6.  8. 10.]]
      >>> float(op.trace())
      36.0
    """
    arrays = tuple(_real("kronecker", f"factor {i}", factor) for i, factor in enumerate(factors))
    if not arrays:
        raise ValueError("kronecker: give at least one factor.")
    for i, factor in enumerate(arrays):
        if factor.ndim not in (1, 2) or factor.shape[0] != factor.shape[-1] or factor.size == 0:
            raise ValueError(
                f"kronecker: factor {i} has shape {factor.shape}; expected a square matrix [d, d], "
                "or the diagonal [d] of one."
            )
    return Kronecker(arrays)


def eigen(
    input_basis: ArrayLike | None, output_basis: ArrayLike | None, values: ArrayLike
) -> Eigen:
    """What is diagonal in a Kronecker product of two bases, `(Q_a ⊗ Q_g) diag(λ) (Q_a ⊗ Q_g)ᵀ`.

    Args:
      input_basis: Q_a, with orthonormal columns [d_in, d_in]; `None`: the identity.
      output_basis: Q_g, with orthonormal columns [d_out, d_out]; `None`: the identity.
      values: The eigenvalues λ [d_in, d_out].

    Returns:
      An operator on arrays [d_in, d_out]. Memory: d_in² + d_out² + d_in·d_out.

    Raises:
      ValueError: For shapes that do not fit each other, or numbers that are not real.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> op = ok.operators.eigen(None, jnp.eye(3), 1.0 + jnp.arange(6.0).reshape(2, 3))
      >>> print(op.inverse() @ jnp.ones((2, 3)))
      [[1.         0.5        0.33333334]
       [0.25       0.2        0.16666667]]

    Source: George et al. (2018), arXiv:1806.03884.
    """
    diagonal = _real("eigen", "values", values)
    bases = tuple(
        None if q is None else _real("eigen", "a basis", q) for q in (input_basis, output_basis)
    )
    shapes = [None if q is None else q.shape for q in bases]
    # As many squares as `values` has axes, which must be two.
    squares = [(d, d) for d in diagonal.shape]
    if len(squares) != 2 or any(
        shape not in (None, square) for shape, square in zip(shapes, squares, strict=True)
    ):
        raise ValueError(
            f"eigen: values have shape {diagonal.shape}, and the bases {shapes}; expected "
            "[d_in, d_out], [d_in, d_in] and [d_out, d_out]."
        )
    return Eigen(bases, diagonal)


def _real(owner: str, name: str, x: ArrayLike) -> Array:
    """An array of floating-point numbers, of 32 bits at least."""
    array = jnp.asarray(x)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(f"{owner}: {name} has dtype {array.dtype}; expected real.")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(jnp.float32)
    return contract.widen(array)


def _diagonal(factor: Float[Array, "d ..."]) -> Float[Array, " d"]:
    return factor if factor.ndim == 1 else jnp.diagonal(factor)


def _slogdet(factor: Float[Array, "d ..."]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    factor = contract.widen(factor)
    if factor.ndim == 1:
        return jnp.prod(jnp.sign(factor)), jnp.sum(jnp.log(jnp.abs(factor)))
    return linalg.lapack_safe(lambda x: tuple(jnp.linalg.slogdet(x)))(factor)


def _outer(vectors: Sequence[Shaped[Array, " d_i"]]) -> Shaped[Array, "*d"]:
    """The products [d_1, ..., d_k] of the entries of vectors."""
    product = jnp.ones((), vectors[0].dtype)
    for vector in vectors:
        product = product[..., None] * vector
    return product


def _product(numbers: Sequence[Float[Array, ""]]) -> Float[Array, ""]:
    return jnp.prod(jnp.stack(numbers))
