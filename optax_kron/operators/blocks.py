"""Operators made of blocks: one beside the other, each on its own part of a vector."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from optax_kron.kernels import linalg
from optax_kron.operators.base import Operator, described

PyTree = Any


class Blocks(Operator):
    """What operators made of blocks share; each names its blocks."""

    def parts(self) -> Mapping[str, Operator]:
        """The blocks by name."""
        raise NotImplementedError

    def rebuilt(self, parts: Mapping[str, Operator]) -> Operator:
        """The same with other blocks."""
        raise NotImplementedError

    def trace(self) -> Array:
        """See `Operator`; the sum over blocks, as for `logdet`."""
        return _sum([op.trace() for op in self.parts().values()])

    def det(self) -> Array:
        """See `Operator`; the product over blocks."""
        return jnp.prod(jnp.stack([op.det() for op in self.parts().values()]))

    def logdet(self) -> Array:
        """See `Operator`."""
        return _sum([op.logdet() for op in self.parts().values()])

    def frobenius_norm(self) -> Array:
        """See `Operator`."""
        norms = [op.frobenius_norm() for op in self.parts().values()]
        return jnp.linalg.norm(jnp.stack(norms))

    def eigenvalues(self) -> Array:
        """See `Operator`."""
        return jnp.sort(jnp.concatenate([op.eigenvalues() for op in self.parts().values()]))

    def power(self, exponent: float, damping: ArrayLike, rule: str):
        """See `Operator`; of each block by itself."""
        found, faults = {}, {}
        for name, op in self.parts().items():
            found[name], inner = op.power(exponent, damping, rule)
            faults |= {"/".join(filter(None, (name, n))): fault for n, fault in inner.items()}
        return self.rebuilt(found), faults

    def times(self, scalar: Array) -> Operator:
        """See `Operator`."""
        return self.rebuilt({name: op * scalar for name, op in self.parts().items()})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacked(Operator):
    """Blocks of one shape, on arrays [B, ...]: `operator` has a leading axis B in every factor."""

    operator: Operator

    @property
    def count(self) -> int:
        """Number B of blocks."""
        return jax.tree.leaves(self.operator)[0].shape[0]

    def in_structure(self) -> PyTree:
        """See `Operator`."""
        one = jax.eval_shape(_first, self.operator)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((self.count, *x.shape), x.dtype), one.in_structure()
        )

    def mv(self, vector: PyTree) -> PyTree:
        """See `Operator`."""
        return self._each(lambda op, x: op.mv(x), vector)

    @property
    def T(self) -> "Stacked":  # noqa: N802
        """See `Operator`."""
        return Stacked(self._each(lambda op: op.T))

    def trace(self) -> Array:
        """See `Operator`."""
        return jnp.sum(self._each(lambda op: op.trace()))

    def det(self) -> Array:
        """See `Operator`."""
        return jnp.prod(self._each(lambda op: op.det()))

    def logdet(self) -> Array:
        """See `Operator`."""
        return jnp.sum(self._each(lambda op: op.logdet()))

    def frobenius_norm(self) -> Array:
        """See `Operator`."""
        return jnp.linalg.norm(self._each(lambda op: op.frobenius_norm()))

    def eigenvalues(self) -> Array:
        """See `Operator`."""
        return jnp.sort(self._each(lambda op: op.eigenvalues()).ravel())

    def power(self, exponent: float, damping: ArrayLike, rule: str):
        """See `Operator`."""
        found, faults = self._each(lambda op: op.power(exponent, damping, rule))
        return Stacked(found), {name: jnp.any(fault) for name, fault in faults.items()}

    def times(self, scalar: Array) -> "Stacked":
        """See `Operator`."""
        return Stacked(self._each(lambda op: op * scalar))

    def plus(self, other: Operator) -> Operator:
        """See `Operator`."""
        if isinstance(other, Stacked) and other.count == self.count:
            return Stacked(linalg.map_blocks(lambda a, b: a + b, self.operator, other.operator))
        return super().plus(other)

    def _each(self, fn: Callable, *args: PyTree) -> Any:
        if self.count == 1:
            found = fn(_first(self.operator), *map(_first, args))
            return jax.tree.map(lambda x: x[None], found)
        return linalg.map_blocks(fn, self.operator, *args)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockDiagonal(Blocks):
    """Operators side by side; see `block_diagonal`."""

    operators: dict[str, Operator] | tuple[Operator, ...] | list[Operator]

    def parts(self) -> Mapping[str, Operator]:
        """See `Blocks`."""
        if isinstance(self.operators, dict):
            return {str(key): self.operators[key] for key in sorted(self.operators)}
        return {str(i): op for i, op in enumerate(self.operators)}

    def rebuilt(self, parts: Mapping[str, Operator]) -> "BlockDiagonal":
        """See `Blocks`."""
        if isinstance(self.operators, dict):
            return BlockDiagonal({key: parts[str(key)] for key in self.operators})
        return BlockDiagonal(type(self.operators)(parts.values()))

    def in_structure(self) -> PyTree:
        """See `Operator`."""
        return self._map(lambda op: op.in_structure(), self.operators)

    def mv(self, vector: PyTree) -> PyTree:
        """See `Operator`."""
        if isinstance(self.operators, dict):
            kind = "dictionary with these keys"
            right = isinstance(vector, dict) and vector.keys() == self.operators.keys()
        else:
            kind = "tuple or list of as many entries"
            right = isinstance(vector, tuple | list) and len(vector) == len(self.operators)
        if not right:
            raise ValueError(
                f"the operator has blocks {list(self.parts())}, and acts on a {kind}; "
                f"{described(vector)}."
            )
        found = self._map(lambda op, x: op.mv(x), self.operators, vector)
        return found if isinstance(vector, dict) else type(vector)(found)

    @property
    def T(self) -> "BlockDiagonal":  # noqa: N802
        """See `Operator`."""
        return self.rebuilt({name: op.T for name, op in self.parts().items()})

    def plus(self, other: Operator) -> Operator:
        """See `Operator`."""
        if isinstance(other, BlockDiagonal):
            theirs = other.parts()
            return self.rebuilt({name: op + theirs[name] for name, op in self.parts().items()})
        return super().plus(other)

    def _map(self, fn, *containers):
        if isinstance(self.operators, dict):
            return {key: fn(*(c[key] for c in containers)) for key in self.operators}
        return type(self.operators)(fn(*each) for each in zip(*containers, strict=True))


def block_diagonal(operators: Mapping[str, Operator] | Sequence[Operator]) -> BlockDiagonal:
    """Operators side by side, each on its own entry of a mapping or of a sequence.

    Args:
      operators: by name, or in order.

    Returns:
      An operator on dictionaries with the same keys, or on tuples or lists of the same length. Its
      methods are those of the blocks: nothing is dense that is not dense in them.

    Raises:
      ValueError: for no operators, or what is none.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> blocks = {"a": ok.operators.kronecker(jnp.eye(2), jnp.eye(3))}
      >>> float(ok.operators.block_diagonal(blocks).trace())
      6.0
    """
    if isinstance(operators, Mapping):
        given: Any = dict(operators)
    else:
        given = operators if type(operators) in (tuple, list) else tuple(operators)
    found = list(given.values() if isinstance(given, dict) else given)
    if not found:
        raise ValueError("block_diagonal: expected operators, one at least; got none.")
    names = list(given) if isinstance(given, dict) else range(len(found))
    for name, op in zip(names, found, strict=True):
        if not isinstance(op, Operator):
            raise ValueError(
                f"block_diagonal: expected operators; {name!r} is a {type(op).__name__}."
            )
    return BlockDiagonal(given)


def _first(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[0], tree)


def _sum(numbers: Sequence[Array]) -> Array:
    return jnp.sum(jnp.stack(numbers))
