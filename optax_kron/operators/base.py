"""What all operators have in common: their methods, by way of the dense matrix where need be.

An operator is a real symmetric matrix that acts on pytrees. It is a pytree itself, of its factors:
it goes through jit, vmap and checkpoints like any other.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from optax_kron.autodiff import map_stacked
from optax_kron.kernels import contract, eigenbases
from optax_kron.layers.paths import abstract, is_inexact

PyTree = Any

RULES = ("exact", "pi", "plain")


@dataclasses.dataclass(frozen=True)
class Structure:
    """Shapes and dtypes of a pytree, hashable."""

    treedef: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, tree: PyTree) -> "Structure":
        """That of a pytree of arrays, or of abstract ones; without leaves that are not inexact."""
        leaves, treedef = jax.tree.flatten(abstract(tree))
        return cls(treedef, tuple(leaves))

    def check(self, vector: PyTree) -> PyTree:
        """The vector, if it has this structure; its leaves as floating-point arrays."""
        if isinstance(vector, Operator) or not self.is_that_of(vector):
            raise ValueError(
                f"the operator acts on {self.treedef} of shapes {[x.shape for x in self.leaves]}; "
                f"{described(vector)}."
            )
        leaves = [
            as_real(x, like.dtype)
            for x, like in zip(jax.tree.leaves(vector), self.leaves, strict=True)
        ]
        return jax.tree.unflatten(self.treedef, leaves)

    def is_that_of(self, tree: PyTree) -> bool:
        """Whether a pytree of arrays, or of abstract ones, has this structure and these shapes."""
        leaves, treedef = jax.tree.flatten(tree)
        return treedef == self.treedef and [jnp.shape(x) for x in leaves] == [
            x.shape for x in self.leaves
        ]

    @property
    def tree(self) -> PyTree:
        """The pytree of abstract arrays."""
        return jax.tree.unflatten(self.treedef, self.leaves)


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
        """Of the arithmetic: that of the factors, at least float32."""
        leaves = [x for x in jax.tree.leaves(self) if jnp.issubdtype(x.dtype, jnp.floating)]
        return contract.wide_dtype(jnp.result_type(*leaves, jnp.float32))

    @property
    def T(self) -> "Operator":  # noqa: N802
        """The transpose: of a symmetric operator itself."""
        return self

    def as_matrix(self) -> Array:
        """The dense matrix [n, n], in the order of `jax.flatten_util.ravel_pytree`."""
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, self.dtype)),
            self.in_structure(),
        )
        flat, unravel = jax.flatten_util.ravel_pytree(zeros)

        def row(v):
            return jax.flatten_util.ravel_pytree(self.mv(unravel(v)))[0]

        return map_stacked(row, jnp.eye(flat.size, dtype=flat.dtype)).T

    def trace(self) -> Array:
        """The sum of the eigenvalues."""
        return jnp.trace(self.as_matrix())

    def det(self) -> Array:
        """The product of the eigenvalues; of many it soon overflows, unlike `logdet`."""
        return jnp.prod(self.eigenvalues())

    def logdet(self) -> Array:
        """The logarithm of the determinant's magnitude, -inf where that is zero."""
        return jnp.sum(jnp.log(jnp.abs(self.eigenvalues())))

    def frobenius_norm(self) -> Array:
        """The root of the sum of the eigenvalues' squares."""
        return jnp.linalg.norm(self.as_matrix())

    def eigenvalues(self) -> Array:
        """All n eigenvalues, ascending."""
        return jnp.sort(eigenbases.hermitian_eigen(self._symmetric_matrix())[1])

    def _symmetric_matrix(self) -> Array:
        """`as_matrix`, without what rounding has made different on both sides of the diagonal."""
        matrix = self.as_matrix()
        return (matrix + matrix.T) / 2

    def inverse(self, damping: ArrayLike = 0.0, rule: str = "exact") -> "Operator":
        """The inverse of the damped operator.

        Args:
          damping: δ ≥ 0.
          rule: how it is added. "exact": `(M + δI)⁻¹`. For Kronecker products also "plain": δ to
            each factor; and "pi": `δ^(1/k)` to each of k factors, times how much larger its mean
            eigenvalue is than their geometric mean, and 1e-8 at least.

        Returns:
          An operator. Without damping, eigenvalues that are zero but for rounding have no inverse:
          with arrays that is an error; where the operator is traced, as under jit, no error can be
          raised, and the result is the pseudoinverse, which is zero there.

        Raises:
          numpy.linalg.LinAlgError: for an operator that is singular without damping, or not finite.
          ValueError: for a damping or a rule that there is not.
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
          key: of jax.random. For many samples at the cost of one decomposition:
            `jax.vmap(lambda key: op.sample(key, damping))(jax.random.split(key, count))`.
          damping: as in `inverse`, with the same errors.
          rule: as there.

        Returns:
          A pytree with the shapes and dtypes of `in_structure()`.
        """
        drawn = self.inverse_sqrt(damping, rule).mv(self._noise(key))
        return jax.tree.map(lambda x, like: x.astype(like.dtype), drawn, self.in_structure())

    def _noise(self, key: Array) -> PyTree:
        leaves, treedef = jax.tree.flatten(self.in_structure())
        keys = jax.random.split(key, len(leaves))
        noise = [
            jax.random.normal(k, x.shape, jnp.promote_types(x.dtype, self.dtype))
            for k, x in zip(keys, leaves, strict=True)
        ]
        return treedef.unflatten(noise)

    def _checked_power(self, exponent: float, damping: ArrayLike, rule: str) -> "Operator":
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}; got {rule!r}.")
        check_number("damping", damping)
        found, faults = self.power(exponent, damping, rule)
        for name, fault in faults.items():
            if not isinstance(fault, jax.core.Tracer) and bool(fault):
                where = f"block {name!r} of the operator" if name else "the operator"
                raise np.linalg.LinAlgError(
                    f"{where} has no power {exponent:g} at damping={damping}: it is "
                    "singular, not positive semidefinite, or not finite. Give a larger damping."
                )
        return found

    def power(
        self, exponent: float, damping: ArrayLike, rule: str
    ) -> tuple["Operator", Mapping[str, Array]]:
        """A power of the damped operator, and whether it has none, bool [], by name of the block.

        Where it has none, it is zero on those eigenvectors.
        """
        only_exact(rule, type(self).__name__)
        basis, values = eigenbases.hermitian_eigen(self._symmetric_matrix())
        assert basis is not None, "the matrix is dense"
        powers, fault = damped_power(*spectrum(values), damping, exponent)
        return Dense((basis * powers) @ basis.T, Structure.of(self.in_structure())), {"": fault}

    def __matmul__(self, vector: PyTree) -> PyTree:
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
        terms = [t for x in (self, other) for t in (x.terms if isinstance(x, Sum) else (x,))]
        return Sum(tuple(terms))

    def __radd__(self, other: Any) -> "Operator":
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

    def times(self, scalar: Array) -> "Operator":
        """The multiple by a number."""
        return Scaled(self, scalar)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled(Operator):
    """A multiple of an operator."""

    operator: Operator
    scale: Array

    def in_structure(self) -> PyTree:
        """See `Operator`."""
        return self.operator.in_structure()

    @property
    def dtype(self) -> jnp.dtype:
        """See `Operator`."""
        return self.operator.dtype

    @property
    def T(self) -> Operator:  # noqa: N802
        """See `Operator`."""
        return Scaled(self.operator.T, self.scale)

    def mv(self, vector: PyTree) -> PyTree:
        """See `Operator`."""
        return jax.tree.map(lambda x: scaled(self.scale, x), self.operator.mv(vector))

    def times(self, scalar: Array) -> Operator:
        """See `Operator`."""
        return Scaled(self.operator, self.scale * scalar)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sum(Operator):
    """A sum of operators on the same pytrees; the inverse and the like are dense."""

    terms: tuple[Operator, ...]

    def in_structure(self) -> PyTree:
        """See `Operator`."""
        return self.terms[0].in_structure()

    @property
    def dtype(self) -> jnp.dtype:
        """See `Operator`."""
        return jnp.result_type(*(term.dtype for term in self.terms))

    @property
    def T(self) -> Operator:  # noqa: N802
        """See `Operator`."""
        return Sum(tuple(term.T for term in self.terms))

    def mv(self, vector: PyTree) -> PyTree:
        """See `Operator`."""
        first, *others = (term.mv(vector) for term in self.terms)
        return jax.tree.map(lambda *x: sum(x[1:], x[0]), first, *others)

    def trace(self) -> Array:
        """See `Operator`."""
        first, *others = (term.trace() for term in self.terms)
        return sum(others, first)

    def times(self, scalar: Array) -> Operator:
        """See `Operator`."""
        return Sum(tuple(term * scalar for term in self.terms))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense(Operator):
    """A dense symmetric matrix [n, n] that acts on pytrees, in the order of `ravel_pytree`."""

    matrix: Array
    structure: Structure = dataclasses.field(metadata={"static": True})

    def in_structure(self) -> PyTree:
        """See `Operator`."""
        return self.structure.tree

    def mv(self, vector: PyTree) -> PyTree:
        """See `Operator`."""
        vector = self.structure.check(vector)
        leaves = jax.tree.leaves(vector)
        flat = jnp.concatenate([x.astype(self.dtype).ravel() for x in leaves])
        result = jnp.split(self.matrix @ flat, np.cumsum([x.size for x in leaves])[:-1])
        pairs = zip(result, leaves, strict=True)
        shaped = [y.reshape(x.shape).astype(x.dtype) for y, x in pairs]
        return jax.tree.unflatten(jax.tree.structure(vector), shaped)

    def times(self, scalar: Array) -> Operator:
        """See `Operator`."""
        return Dense(self.matrix * scalar, self.structure)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Identity(Operator):
    """A multiple of the identity."""

    scale: Array
    structure: Structure = dataclasses.field(metadata={"static": True})

    def in_structure(self) -> PyTree:
        """See `Operator`."""
        return self.structure.tree

    def mv(self, vector: PyTree) -> PyTree:
        """See `Operator`."""
        return jax.tree.map(lambda x: scaled(self.scale, x), self.structure.check(vector))

    def trace(self) -> Array:
        """See `Operator`."""
        return self.size * self.scale

    def eigenvalues(self) -> Array:
        """See `Operator`."""
        return jnp.full(self.size, self.scale)

    def frobenius_norm(self) -> Array:
        """See `Operator`."""
        return jnp.sqrt(self.size) * jnp.abs(self.scale)

    def power(self, exponent: float, damping: ArrayLike, rule: str):
        """See `Operator`."""
        only_exact(rule, "identity")
        found, fault = damped_power(self.scale, self.scale == 0, damping, exponent)
        return Identity(found, self.structure), {"": fault}

    def times(self, scalar: Array) -> Operator:
        """See `Operator`."""
        return Identity(self.scale * scalar, self.structure)


def identity(like: PyTree) -> Identity:
    """The identity on pytrees like a given one.

    Args:
      like: a pytree of arrays, or of `jax.ShapeDtypeStruct`s.

    Returns:
      An operator on such pytrees, of one number. Its methods cost as many operations as there are
      entries, or none; rule="exact" alone.

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


def only_exact(rule: str, name: str) -> None:
    """Raise for a rule that needs the factors of a Kronecker product."""
    if rule != "exact":
        raise ValueError(
            f"rule={rule!r} is for Kronecker products; {name} has no factors to add damping to. "
            'Take rule="exact".'
        )


def damped_power(
    values: Array, null: Array, damping: ArrayLike, exponent: float
) -> tuple[Array, Array]:
    """`(values + damping)^exponent`, zero where there is none; and whether that is anywhere.

    Args:
      values: eigenvalues.
      null: which of them are zero but for rounding, and have no inverse without damping.
      damping: δ ≥ 0.
      exponent: any; if it is not whole, negative numbers have no power.
    """
    damping = jnp.asarray(damping, values.dtype)
    shifted = values + damping
    sound = jnp.isfinite(shifted)
    if exponent < 0:
        sound &= (shifted != 0) & ~(null & (damping == 0))
    if exponent != round(exponent):
        sound &= shifted >= 0
    powers = jnp.where(sound, jnp.where(sound, shifted, 1) ** exponent, 0)
    return powers, ~jnp.all(sound)


def spectrum(values: Array) -> tuple[Array, Array]:
    """Eigenvalues of a symmetric matrix, and which of them are zero but for rounding.

    Those are at most d·eps of the largest, with d the longest axis; if negative, they become zero.
    """
    largest = jnp.max(jnp.abs(values), initial=0)
    null = jnp.abs(values) <= max(values.shape) * jnp.finfo(values.dtype).eps * largest
    return jnp.where(null & (values < 0), 0, values), null


def check_number(name: str, value: Any) -> None:
    """Raise unless a value is one finite number, at least 0; traced ones only need be single."""
    got = f"{value!r:.100}"
    if isinstance(value, int | float | np.generic | np.ndarray | Array):
        single = jnp.ndim(value) == 0 and not jnp.iscomplexobj(value)
        if isinstance(value, jax.core.Tracer):
            sound = single
        else:
            sound = single and np.asarray(value) >= 0 and np.isfinite(np.asarray(value))
        if sound:
            return
        if not single:
            got = f"shape {jnp.shape(value)}, dtype {jnp.result_type(value)}"
    raise ValueError(f"{name} must be one finite number, at least 0; got {got}.")


def described(vector: Any) -> str:
    """What came in place of the vector that was expected."""
    if isinstance(vector, Operator):
        return "got an operator: there is no product of two operators"
    leaves, treedef = jax.tree.flatten(vector)
    if jax.tree_util.all_leaves([vector]):
        kind = "one" if hasattr(vector, "shape") else f"a {type(vector).__name__}"
        return f"got {kind} of shape {jnp.shape(vector)}"
    return f"got {treedef} of shapes {[jnp.shape(x) for x in leaves]}"


def as_real(x: Any, like: Any = jnp.float32) -> Array:
    """A floating-point array; real, unless an operator acts on complex numbers."""
    array = jnp.asarray(x)
    if jnp.iscomplexobj(array) and not jnp.issubdtype(like, jnp.complexfloating):
        raise ValueError(
            f"the operator acts on real numbers; got complex ones, of shape {array.shape}. Apply "
            "it to the real and the imaginary part by themselves."
        )
    return array if is_inexact(array) else array.astype(jnp.result_type(array, jnp.float32))


def scaled(scale: Array, x: Array) -> Array:
    """A number times an array, in the dtype of the array."""
    return (scale * x).astype(x.dtype)
