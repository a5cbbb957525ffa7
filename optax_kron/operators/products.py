"""Kronecker products, and what is diagonal in a Kronecker product of bases."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from optax_kron.kernels import contract, eigenbases, linalg
from optax_kron.operators.base import (
    Operator,
    as_real,
    damped_power,
    described,
    only_exact,
    spectrum,
)

PI_FLOOR = 1e-8  # least that the rule "pi" adds to a factor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Kronecker(Operator):
    """`F_1 ⊗ … ⊗ F_k` on arrays [d_1, ..., d_k]; see `kronecker`."""

    factors: tuple[Array, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the arrays that it acts on."""
        return tuple(factor.shape[-1] for factor in self.factors)

    def in_structure(self) -> jax.ShapeDtypeStruct:
        """See `Operator`."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def mv(self, vector: Array) -> Array:
        """See `Operator`. Cost: 2·n·Σd_i operations."""
        vector = checked(vector, self.shape)
        wide = [factor.astype(self.dtype) for factor in self.factors]
        return contract.apply_factors(wide, vector.astype(self.dtype)).astype(vector.dtype)

    @property
    def T(self) -> "Kronecker":  # noqa: N802
        """The transpose, also of factors that are not symmetric."""
        return Kronecker(tuple(factor.T for factor in self.factors))

    def as_matrix(self) -> Array:
        """See `Operator`; by literal Kronecker products."""
        found = jnp.ones((1, 1), self.dtype)
        for factor in self.factors:
            found = jnp.kron(found, _dense(factor.astype(self.dtype)))
        return found

    def trace(self) -> Array:
        """See `Operator`. Cost: Σd_i operations; so for all of these, but for decompositions."""
        return _product([jnp.sum(_diagonal(factor)) for factor in self.factors])

    def det(self) -> Array:
        """See `Operator`; also of factors that are not symmetric. Cost: Σd_i³."""
        n = math.prod(self.shape)
        found = map(_slogdet, self.factors)
        pairs = [
            (sign ** (n // d), log * (n // d))
            for (sign, log), d in zip(found, self.shape, strict=True)
        ]
        # Not the product of powers, of which one may overflow and one vanish.
        return _product([sign for sign, _ in pairs]) * jnp.exp(sum(log for _, log in pairs))

    def logdet(self) -> Array:
        """See `Operator`; as `det`."""
        n = math.prod(self.shape)
        pairs = zip(self.factors, self.shape, strict=True)
        return sum((_slogdet(factor)[1] * (n // d) for factor, d in pairs), jnp.zeros(()))

    def frobenius_norm(self) -> Array:
        """See `Operator`."""
        return _product([jnp.linalg.norm(factor) for factor in self.factors])

    def eigenvalues(self) -> Array:
        """See `Operator`. Cost: about 9·Σd_i³ operations, and n numbers."""
        values = [eigenbases.hermitian_eigen(contract.widen(factor))[1] for factor in self.factors]
        return jnp.sort(_outer(values).ravel())

    def times(self, scalar: Array) -> "Kronecker":
        """See `Operator`."""
        first, *others = self.factors
        return Kronecker(((first * scalar).astype(first.dtype), *others))

    def power(self, exponent: float, damping: ArrayLike, rule: str):
        """See `Operator`. Cost: about 9·Σd_i³ operations."""
        pairs = [eigenbases.hermitian_eigen(factor.astype(self.dtype)) for factor in self.factors]
        bases = tuple(basis for basis, _ in pairs)
        spectra = [spectrum(values) for _, values in pairs]
        if rule == "exact":
            values = _outer([v for v, _ in spectra])
            null = _outer([~null for _, null in spectra]) == 0
            powers, fault = damped_power(values, null, damping, exponent)
            return Eigen(bases, powers), {"": fault}
        amounts = [damping] * len(bases) if rule == "plain" else self._pi_amounts(damping)
        powers, faults = zip(
            *(
                damped_power(values, null, amount, exponent)
                for (values, null), amount in zip(spectra, amounts, strict=True)
            ),
            strict=True,
        )
        made = [_assembled(b, p) for b, p in zip(bases, powers, strict=True)]
        return Kronecker(tuple(made)), {"": jnp.any(jnp.stack(faults))}

    def _pi_amounts(self, damping: ArrayLike) -> list[Array]:
        """What the rule "pi" adds to each factor."""
        means = jnp.stack([jnp.mean(_diagonal(f.astype(self.dtype))) for f in self.factors])
        sound = jnp.all(means > 0)
        logs = jnp.log(jnp.where(sound, means, 1))
        root = jnp.asarray(damping, self.dtype) ** (1 / len(means))
        amounts = jnp.where(
            root > 0, jnp.maximum(jnp.exp(logs - jnp.mean(logs)) * root, PI_FLOOR), 0
        )
        return list(amounts)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Eigen(Operator):
    """`Q diag(λ) Qᵀ` with `Q = Q_1 ⊗ … ⊗ Q_k` on arrays [d_1, ..., d_k]; see `eigen`."""

    bases: tuple[Array | None, ...]  # orthonormal columns [d_i, d_i]; None: the identity
    values: Array  # λ [d_1, ..., d_k]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the arrays that it acts on."""
        return self.values.shape

    def in_structure(self) -> jax.ShapeDtypeStruct:
        """See `Operator`."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def mv(self, vector: Array) -> Array:
        """See `Operator`. Cost: 4·n·Σd_i operations."""
        vector = checked(vector, self.shape)
        bases = [None if q is None else q.astype(self.dtype) for q in self.bases]
        x = vector.astype(self.dtype)
        return contract.in_bases(bases, lambda x: x * self.values, x).astype(vector.dtype)

    def trace(self) -> Array:
        """See `Operator`. Cost: n operations; so for all of these."""
        return jnp.sum(self.values)

    def det(self) -> Array:
        """See `Operator`."""
        return jnp.prod(self.values)

    def logdet(self) -> Array:
        """See `Operator`."""
        return jnp.sum(jnp.log(jnp.abs(self.values)))

    def frobenius_norm(self) -> Array:
        """See `Operator`."""
        return jnp.linalg.norm(self.values.ravel())

    def eigenvalues(self) -> Array:
        """See `Operator`."""
        return jnp.sort(self.values.ravel())

    def times(self, scalar: Array) -> "Eigen":
        """See `Operator`."""
        return Eigen(self.bases, (self.values * scalar).astype(self.values.dtype))

    def power(self, exponent: float, damping: ArrayLike, rule: str):
        """See `Operator`; the bases are shared."""
        only_exact(rule, "a diagonal in a basis")
        powers, fault = damped_power(*spectrum(self.values), damping, exponent)
        return Eigen(self.bases, powers), {"": fault}


def kronecker(*factors: ArrayLike) -> Kronecker:
    """The Kronecker product of any number of factors, as an operator on tensors.

    `(F_1 ⊗ … ⊗ F_k) vec(X)`, with `vec` row by row, is X with `F_i` applied along every axis i.

    Args:
      *factors: symmetric [d_i, d_i], or the diagonal [d_i] of a diagonal one. Of factors that are
        not symmetric, `eigenvalues`, `inverse`, `sqrt` and `sample` mean nothing.

    Returns:
      An operator on arrays [d_1, ..., d_k]. Memory: Σd_i².

    Raises:
      ValueError: for no factors, or one that is not square or not real.

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
      input_basis: Q_a, orthonormal columns [d_in, d_in]; `None`: the identity.
      output_basis: Q_g, orthonormal columns [d_out, d_out]; `None`: the identity.
      values: λ [d_in, d_out].

    Returns:
      An operator on arrays [d_in, d_out]. Memory: d_in² + d_out² + d_in·d_out.

    Raises:
      ValueError: for shapes that do not fit each other, or numbers that are not real.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> op = ok.operators.eigen(None, jnp.eye(3), 1.0 + jnp.arange(6.0).reshape(2, 3))
      >>> print(op.inverse() @ jnp.ones((2, 3)))
      [[1.         0.5        0.33333334]
       [0.25       0.2        0.16666667]]

    Source: George et al. (2018), arXiv:1806.03884.
    """
    found = _real("eigen", "values", values)
    bases = tuple(
        None if q is None else _real("eigen", "a basis", q) for q in (input_basis, output_basis)
    )
    expected = [(d, d) for d in found.shape]
    if found.ndim != 2 or any(
        q is not None and q.shape != s for q, s in zip(bases, expected, strict=False)
    ):
        got = [None if q is None else q.shape for q in bases]
        raise ValueError(
            f"eigen: values have shape {found.shape}, and the bases {got}; expected [d_in, d_out], "
            "[d_in, d_in] and [d_out, d_out]."
        )
    return Eigen(bases, found)


def checked(vector: Any, shape: tuple[int, ...]) -> Array:
    """The array, if it has the shape that an operator acts on."""
    if not jax.tree_util.all_leaves([vector]) or jnp.shape(vector) != shape:
        raise ValueError(f"the operator acts on arrays of shape {shape}; {described(vector)}.")
    return as_real(vector)


def _real(owner: str, name: str, x: ArrayLike) -> Array:
    """An array of floating-point numbers, of 32 bits at least."""
    array = jnp.asarray(x)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(f"{owner}: {name} has dtype {array.dtype}; expected real.")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(jnp.float32)
    return contract.widen(array)


def _dense(factor: Array) -> Array:
    return jnp.diag(factor) if factor.ndim == 1 else factor


def _diagonal(factor: Array) -> Array:
    return factor if factor.ndim == 1 else jnp.diagonal(factor)


def _assembled(basis: Array | None, values: Array) -> Array:
    """`Q diag(λ) Qᵀ`; λ alone without a basis."""
    return values if basis is None else (basis * values) @ basis.T


def _slogdet(factor: Array) -> tuple[Array, Array]:
    factor = contract.widen(factor)
    if factor.ndim == 1:
        return jnp.prod(jnp.sign(factor)), jnp.sum(jnp.log(jnp.abs(factor)))
    return linalg.lapack_safe(lambda x: tuple(jnp.linalg.slogdet(x)))(factor)


def _outer(vectors: Sequence[Array]) -> Array:
    """[d_1, ..., d_k] of products of the entries of vectors."""
    found = jnp.ones((), vectors[0].dtype)
    for vector in vectors:
        found = found[..., None] * vector
    return found


def _product(numbers: Sequence[Array]) -> Array:
    return jnp.prod(jnp.stack(numbers))
