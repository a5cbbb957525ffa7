"""What all operators have in common: their methods, by way of the dense matrix where need be.

An operator is a real symmetric matrix that acts on pytrees. It is a pytree itself, of its factors:
it goes through jit, vmap and checkpoints like any other.
"""

# How operators nest. K-FAC's curvature of a layer "w" with a kernel [2, 4, 3], of B = 2 blocks with
# d_in = 4 and d_out = 3, beside a parameter [5] that is in no layer:
#
#   Layerwise                                     acts on {"scale": [5], "w": [2, 4, 3]}
#     blocks["w"] = Stacked                       acts on [2, 4, 3]
#       operator = Kronecker, vmapped             acts on [4, 3]
#         factors = (A [2, 4, 4], G [2, 3, 3])    one more axis, B, in front of each factor
#     rest = 0                                    the number that acts on "scale"
#
# op.inverse(δ) asks each of them for `power(-1, δ, rule)`, from the outside in, and gets back an
# operator and a mapping from names of blocks to whether they are singular: {"w": False, ...}. Only
# at the outside, where the user called, is that an error.
#
# Methods of subclasses without a docstring have that of `Operator`, which `help` shows.
# ruff: noqa: D102

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.core
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from optax_kron.autodiff import map_stacked
from optax_kron.kernels import contract, eigenbases
from optax_kron.operators.damping import (
    check_number,
    check_rule,
    damped_power,
    only_exact,
    spectrum,
)
from optax_kron.operators.vectors import Structure, scaled
from optax_kron.types import PyTree

Faults = Mapping[str, Bool[Array, ""]]  # by name of the block: whether it has no such power


class Operator:
    """A real linear operator on pytrees.

    It is symmetric, but for Kronecker products of factors that are not, and what is made of those:
    of them `mv`, `T`, `trace`, `det`, `logdet`, `frobenius_norm` and `as_matrix` are right, and
    all other methods without meaning.

    Where a class knows no better, methods other than `mv` go by way of the dense matrix: n² numbers
    and, but for the trace, about 9·n³ operations, with n the number of entries of a vector.
    """

    def mv(self, vector: PyTree) -> PyTree:
        """The product with a pytree of the structure `in_structure()`; also `operator @ vector`."""
        raise NotImplementedError

    def in_structure(self) -> PyTree:
        """The pytree of `jax.ShapeDtypeStruct`s that the operator acts on."""
        raise NotImplementedError

    def out_structure(self) -> PyTree:
        """That of its results: the same."""
        return self.in_structure()

    @property
    def size(self) -> int:
        """Number n of entries of a vector."""
        return sum(x.size for x in jax.tree.leaves(self.in_structure()))

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the arithmetic: that of the factors, at least float32."""
        leaves = [x for x in jax.tree.leaves(self) if jnp.issubdtype(x.dtype, jnp.floating)]
        return contract.wide_dtype(jnp.result_type(*leaves, jnp.float32))

    @property
    def T(self) -> "Operator":  # noqa: N802
        """The transpose: of a symmetric operator itself."""
        return self

    def as_matrix(self) -> Float[Array, "n n"]:
        """The dense matrix, in the order of `jax.flatten_util.ravel_pytree`."""
        zeros = self._like_vector(lambda x, dtype: jnp.zeros(x.shape, dtype))
        flat, unravel = jax.flatten_util.ravel_pytree(zeros)

        def column(unit: Array) -> Array:
            return jax.flatten_util.ravel_pytree(self.mv(unravel(unit)))[0]

        return map_stacked(column, jnp.eye(flat.size, dtype=flat.dtype)).T

    def _like_vector(self, fn: Callable[[jax.ShapeDtypeStruct, jnp.dtype], Array]) -> PyTree:
        """A vector of arrays `fn(abstract, dtype)`, in the dtype of the arithmetic or wider."""
        return jax.tree.map(
            lambda x: fn(x, jnp.promote_types(x.dtype, self.dtype)), self.in_structure()
        )

    def trace(self) -> Float[Array, ""]:
        """The sum of the eigenvalues."""
        return jnp.trace(self.as_matrix())

    def det(self) -> Float[Array, ""]:
        """The product of the eigenvalues; of many it soon overflows, unlike `logdet`."""
        return jnp.prod(self.eigenvalues())

    def logdet(self) -> Float[Array, ""]:
        """The logarithm of the determinant's magnitude, -inf where that is zero."""
        return jnp.sum(jnp.log(jnp.abs(self.eigenvalues())))

    def frobenius_norm(self) -> Float[Array, ""]:
        """The square root of the sum of the eigenvalues' squares."""
        return jnp.linalg.norm(self.as_matrix())

    def eigenvalues(self) -> Float[Array, " n"]:
        """All n eigenvalues, ascending."""
        return jnp.sort(eigenbases.hermitian_eigen(self._symmetric_matrix())[1])

    def _symmetric_matrix(self) -> Float[Array, "n n"]:
        """`as_matrix`, without what rounding has made different on both sides of the diagonal."""
        matrix = self.as_matrix()
        return (matrix + matrix.T) / 2

    def inverse(self, damping: ArrayLike = 0.0, rule: str = "exact") -> "Operator":
        """The inverse of the damped operator.

        Args:
          damping: δ ≥ 0.
          rule: How it is added. "exact": `(M + δI)⁻¹`. Kronecker products of k factors also have
            "pi": `δ^(1/k)` to each factor, times how much larger its mean eigenvalue is than their
            geometric mean, and 1e-8 at least; "trace": δ times its own mean eigenvalue to each
            factor, and 1e-12 at least; "plain": δ to each factor. "exact", "pi" and "trace" are
            those of `ok.kfac`.

        Returns:
          An operator. Without damping, eigenvalues that are zero but for rounding have no inverse:
          with arrays that is an error; where the operator is traced, as under jit, no error can be
          raised, and the result is the pseudoinverse, which is zero there.

        Raises:
          numpy.linalg.LinAlgError: For an operator that is singular without damping, or not finite.
          ValueError: For a damping or a rule that there is not.

        Examples:
          >>> import jax.numpy as jnp
          >>> import optax_kron as ok
          >>> op = ok.operators.kronecker(jnp.diag(jnp.array([1.0, 3.0])), jnp.eye(2))
          >>> print(op.inverse(damping=1.0) @ jnp.ones((2, 2)))
          [[0.5  0.5 ]
           [0.25 0.25]]
        """
        return self._checked_power(-1.0, damping, rule)

    def sqrt(self, damping: ArrayLike = 0.0, rule: str = "exact") -> "Operator":
        """The symmetric square root of the damped operator; arguments as `inverse`."""
        return self._checked_power(0.5, damping, rule)

    def inverse_sqrt(self, damping: ArrayLike = 0.0, rule: str = "exact") -> "Operator":
        """The inverse of `sqrt`; arguments, rules and errors as `inverse`."""
        return self._checked_power(-0.5, damping, rule)

    def sample(self, key: Array, damping: ArrayLike = 0.0, rule: str = "exact") -> PyTree:
        """Draw from the normal distribution of mean zero and covariance `inverse(damping, rule)`.

        Args:
          key: Key of jax.random. For many samples at the cost of one decomposition:
            `jax.vmap(lambda key: op.sample(key, damping))(jax.random.split(key, count))`.
          damping: As in `inverse`, with the same errors.
          rule: As in `inverse`.

        Returns:
          A pytree with the shapes and dtypes of `in_structure()`.
        """
        like = self.in_structure()
        keys = iter(jax.random.split(key, len(jax.tree.leaves(like))))
        noise = self._like_vector(lambda x, dtype: jax.random.normal(next(keys), x.shape, dtype))
        drawn = self.inverse_sqrt(damping, rule).mv(noise)
        return jax.tree.map(lambda x, y: x.astype(y.dtype), drawn, like)

    def _checked_power(self, exponent: float, damping: ArrayLike, rule: str) -> "Operator":
        check_rule(rule)
        check_number("damping", damping)
        result, faults = self.power(exponent, damping, rule)
        for name, fault in faults.items():
            if not isinstance(fault, jax.core.Tracer) and bool(fault):
                where = f"block {name!r} of the operator" if name else "the operator"
                raise np.linalg.LinAlgError(
                    f"{where} has no power {exponent:g} at damping={damping}: it is "
                    "singular, not positive semidefinite, or not finite. Give a larger damping."
                )
        return result

    def power(self, exponent: float, damping: ArrayLike, rule: str) -> tuple["Operator", Faults]:
        """A power of the damped operator, and whether it has none, by name of the block.

        Where it has none, it is zero on those eigenvectors.
        """
        only_exact(rule, type(self).__name__)
        basis, values = eigenbases.hermitian_eigen(self._symmetric_matrix())
        assert basis is not None, "the matrix is dense"
        powers, fault = damped_power(*spectrum(values), damping, exponent)
        return Dense((basis * powers) @ basis.T, Structure.of(self.in_structure())), {"": fault}

    def __matmul__(self, vector: PyTree) -> PyTree:
        if isinstance(vector, Operator):
            raise ValueError(
                "the operator acts on pytrees of arrays; got an operator: there is no product of "
                "two operators."
            )
        return self.mv(vector)

    def __neg__(self) -> "Operator":
        return self * -1

    def __sub__(self, other: "Operator") -> "Operator":
        return self + -other if isinstance(other, Operator) else NotImplemented

    def __add__(self, other: "Operator") -> "Operator":
        if not isinstance(other, Operator):
            return NotImplemented
        mine, its = self.in_structure(), other.in_structure()
        if not Structure.of(mine).is_that_of(its):
            raise ValueError(
                f"operators that are added must act on the same pytrees; got {mine} and {its}."
            )
        return self.plus(other)

    def plus(self, other: "Operator") -> "Operator":
        """The sum with an operator on the same pytrees."""
        mine, its = (x if isinstance(x, Sum) else Sum((x,), (None,)) for x in (self, other))
        return Sum(mine.terms + its.terms, mine.scales + its.scales)

    def __radd__(self, other: object) -> "Operator":
        if isinstance(other, int) and other == 0:  # so that sum() works
            return self
        return NotImplemented

    def __mul__(self, scalar: ArrayLike) -> "Operator":
        if not isinstance(scalar, int | float | np.generic | np.ndarray | Array):
            return NotImplemented
        if jnp.ndim(scalar) != 0 or jnp.iscomplexobj(scalar):
            return NotImplemented
        return self.times(jnp.asarray(scalar))

    __rmul__ = __mul__

    def __truediv__(self, scalar: ArrayLike) -> "Operator":
        return self * (1 / scalar)

    def times(self, scalar: Float[Array, ""]) -> "Operator":
        """The multiple by a number."""
        return Sum((self,), (scalar,))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sum(Operator):
    """A weighted sum of operators on the same pytrees; the inverse and the like are dense."""

    terms: tuple[Operator, ...]
    scales: tuple[Float[Array, ""] | None, ...]  # None: one

    def in_structure(self) -> PyTree:
        return self.terms[0].in_structure()

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.result_type(*(term.dtype for term in self.terms))

    @property
    def T(self) -> Operator:  # noqa: N802
        return Sum(tuple(term.T for term in self.terms), self.scales)

    def mv(self, vector: PyTree) -> PyTree:
        first, *others = self._each(lambda term: term.mv(vector))
        return jax.tree.map(lambda *x: sum(x[1:], x[0]), first, *others)

    def trace(self) -> Float[Array, ""]:
        traces: list[Array] = self._each(lambda term: term.trace())
        return sum(traces[1:], traces[0])

    def times(self, scalar: Float[Array, ""]) -> Operator:
        scales = (scalar if s is None else s * scalar for s in self.scales)
        return Sum(self.terms, tuple(scales))

    def _each(self, fn: Callable[[Operator], PyTree]) -> list[PyTree]:
        """A linear function of every term, times its scale."""
        return [
            fn(term) if s is None else jax.tree.map(functools.partial(scaled, s), fn(term))
            for term, s in zip(self.terms, self.scales, strict=True)
        ]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense(Operator):
    """A dense symmetric matrix that acts on pytrees, in the order of `ravel_pytree`."""

    matrix: Float[Array, "n n"]
    structure: Structure = dataclasses.field(metadata={"static": True})

    def in_structure(self) -> PyTree:
        return self.structure.tree

    def mv(self, vector: PyTree) -> PyTree:
        leaves = jax.tree.leaves(self.structure.check(vector))
        flat = jnp.concatenate([x.astype(self.dtype).ravel() for x in leaves])
        parts = jnp.split(self.matrix @ flat, np.cumsum([x.size for x in leaves])[:-1])
        pairs = zip(parts, leaves, strict=True)
        shaped = [y.reshape(x.shape).astype(x.dtype) for y, x in pairs]
        return jax.tree.unflatten(self.structure.treedef, shaped)

    def times(self, scalar: Float[Array, ""]) -> Operator:
        return Dense(self.matrix * scalar, self.structure)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Identity(Operator):
    """A multiple of the identity. Damping is added to its number, whatever the rule."""

    scale: Float[Array, ""]
    structure: Structure = dataclasses.field(metadata={"static": True})

    def in_structure(self) -> PyTree:
        return self.structure.tree

    def mv(self, vector: PyTree) -> PyTree:
        return jax.tree.map(lambda x: scaled(self.scale, x), self.structure.check(vector))

    def trace(self) -> Float[Array, ""]:
        return self.size * self.scale

    def det(self) -> Float[Array, ""]:
        return self.scale**self.size

    def logdet(self) -> Float[Array, ""]:
        # Of no entries it is 0, also where the number is 0 and its logarithm -inf.
        log = jnp.log(jnp.abs(self.scale))
        return self.size * log if self.size else jnp.zeros_like(log)

    def frobenius_norm(self) -> Float[Array, ""]:
        return jnp.sqrt(self.size) * jnp.abs(self.scale)

    def eigenvalues(self) -> Float[Array, " n"]:
        return jnp.full(self.size, self.scale)

    def power(self, exponent: float, damping: ArrayLike, rule: str) -> tuple[Operator, Faults]:
        number, fault = damped_power(self.scale, self.scale == 0, damping, exponent)
        return Identity(number, self.structure), {"": fault} if self.size else {}

    def times(self, scalar: Float[Array, ""]) -> Operator:
        return Identity(self.scale * scalar, self.structure)

    def plus(self, other: Operator) -> Operator:
        if isinstance(other, Identity):
            return Identity(self.scale + other.scale, self.structure)
        return super().plus(other)


def identity(like: PyTree) -> Identity:
    """The identity on pytrees like a given one.

    Args:
      like: A pytree of arrays, or of `jax.ShapeDtypeStruct`s.

    Returns:
      An operator on such pytrees, of one number. Its methods cost as many operations as there are
      entries, or none; all damping rules add δ to the number.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> op = 3.0 * ok.operators.identity({"w": jnp.zeros((2, 2))})
      >>> float(op.trace())
      12.0
    """
    structure = Structure.of(like)
    dtypes = [x.dtype for x in structure.leaves]
    return Identity(jnp.ones((), jnp.result_type(jnp.float32, *dtypes)), structure)
