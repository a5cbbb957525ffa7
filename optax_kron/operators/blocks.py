"""Operators made of blocks: one beside the other, each on its own part of a vector."""

# Worked example. block_diagonal({"a": F [2, 2], "b": Stacked of two [3, 3]}) acts on
# {"a": [2], "b": [2, 3]}, with n = 2 + 2·3 = 8. As a matrix it is diag(F, S_1, S_2), so that
#
#   trace, logdet       are sums of those of the blocks
#   det                 is their product
#   frobenius_norm      is the norm of the blocks' norms
#   eigenvalues         are those of all blocks, sorted
#
# and nothing dense is larger than [3, 3].
#
# Methods of subclasses without a docstring have that of `Operator`, which `help` shows.
# ruff: noqa: D102

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from optax_kron.kernels import linalg
from optax_kron.operators.base import Faults, Operator
from optax_kron.operators.vectors import described
from optax_kron.types import PyTree

Result = TypeVar("Result")


class Blocks(Operator):
    """An operator made of blocks: its numbers are made of the blocks' numbers."""

    def of_blocks(self, fn: Callable[[Operator], Array]) -> Float[Array, " m"]:
        """What a function gives for every block, a number or several, in one array."""
        raise NotImplementedError

    def trace(self) -> Float[Array, ""]:
        return jnp.sum(self.of_blocks(lambda op: op.trace()))

    def det(self) -> Float[Array, ""]:
        return jnp.prod(self.of_blocks(lambda op: op.det()))

    def logdet(self) -> Float[Array, ""]:
        return jnp.sum(self.of_blocks(lambda op: op.logdet()))

    def frobenius_norm(self) -> Float[Array, ""]:
        return jnp.linalg.norm(self.of_blocks(lambda op: op.frobenius_norm()))

    def eigenvalues(self) -> Float[Array, " n"]:
        return jnp.sort(self.of_blocks(lambda op: op.eigenvalues()))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacked(Blocks):
    """Blocks of one shape, on arrays [B, ...]: `operator` has a leading axis B in every factor."""

    operator: Operator

    @property
    def count(self) -> int:
        """Number B of blocks."""
        return jax.tree.leaves(self.operator)[0].shape[0]

    def in_structure(self) -> PyTree:
        one = jax.eval_shape(_first, self.operator)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((self.count, *x.shape), x.dtype), one.in_structure()
        )

    def mv(self, vector: PyTree) -> PyTree:
        return self._each(lambda op, x: op.mv(x), vector)

    @property
    def T(self) -> "Stacked":  # noqa: N802
        return Stacked(self._each(lambda op: op.T))

    def of_blocks(self, fn: Callable[[Operator], Array]) -> Float[Array, " m"]:
        return self._each(fn).ravel()

    def power(self, exponent: float, damping: ArrayLike, rule: str) -> tuple[Operator, Faults]:
        powers, faults = self._each(lambda op: op.power(exponent, damping, rule))
        return Stacked(powers), {name: jnp.any(fault) for name, fault in faults.items()}

    def times(self, scalar: Float[Array, ""]) -> "Stacked":
        return Stacked(self._each(lambda op: op * scalar))

    def plus(self, other: Operator) -> Operator:
        if isinstance(other, Stacked) and other.count == self.count:
            return Stacked(linalg.map_blocks(lambda a, b: a + b, self.operator, other.operator))
        return super().plus(other)

    def _each(self, fn: Callable[..., Result], *args: PyTree) -> Result:
        """What a function of one block, and of its part of vectors, returns, stacked."""
        if self.count == 1:
            # Without a loop: it compiles faster, and runs as one block does.
            one = fn(_first(self.operator), *map(_first, args))
            return jax.tree.map(lambda x: x[None], one)
        return linalg.map_blocks(fn, self.operator, *args)


class NamedBlocks(Blocks):
    """Blocks of different shapes, by name."""

    def parts(self) -> Mapping[str, Operator]:
        """The blocks by name, in order."""
        raise NotImplementedError

    def rebuilt(self, parts: Mapping[str, Operator]) -> Operator:
        """The same with other blocks."""
        raise NotImplementedError

    def has_parts_of(self, other: Operator) -> bool:
        """Whether another operator on the same pytrees has its blocks in the same places."""
        raise NotImplementedError

    def of_blocks(self, fn: Callable[[Operator], Array]) -> Float[Array, " m"]:
        return jnp.concatenate([jnp.ravel(fn(op)) for op in self.parts().values()])

    def power(self, exponent: float, damping: ArrayLike, rule: str) -> tuple[Operator, Faults]:
        powers, faults = {}, {}
        for name, op in self.parts().items():
            powers[name], inner = op.power(exponent, damping, rule)
            faults |= {"/".join(filter(None, (name, n))): fault for n, fault in inner.items()}
        return self.rebuilt(powers), faults

    def times(self, scalar: Float[Array, ""]) -> Operator:
        return self.rebuilt({name: op * scalar for name, op in self.parts().items()})

    def plus(self, other: Operator) -> Operator:
        if isinstance(other, NamedBlocks) and self.has_parts_of(other):
            theirs = other.parts()
            return self.rebuilt({name: op + theirs[name] for name, op in self.parts().items()})
        return super().plus(other)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockDiagonal(NamedBlocks):
    """Operators side by side; see `block_diagonal`."""

    operators: dict[str, Operator] | tuple[Operator, ...] | list[Operator]

    def parts(self) -> Mapping[str, Operator]:
        keys = range(len(self.operators))
        if isinstance(self.operators, dict):
            keys = sorted(self.operators)  # the order of leaves, as JAX has it
        blocks = jax.tree.leaves(self.operators, is_leaf=_is_operator)
        return dict(zip(map(str, keys), blocks, strict=True))

    def rebuilt(self, parts: Mapping[str, Operator]) -> "BlockDiagonal":
        treedef = jax.tree.structure(self.operators, is_leaf=_is_operator)
        return BlockDiagonal(treedef.unflatten(parts.values()))

    def has_parts_of(self, other: Operator) -> bool:
        return isinstance(other, BlockDiagonal)

    def in_structure(self) -> PyTree:
        return jax.tree.map(lambda op: op.in_structure(), self.operators, is_leaf=_is_operator)

    def mv(self, vector: PyTree) -> PyTree:
        if isinstance(self.operators, dict):
            kind = "dictionary with these keys"
            fits = isinstance(vector, dict) and vector.keys() == self.operators.keys()
        else:
            kind = "tuple or list of as many entries"
            fits = isinstance(vector, tuple | list) and len(vector) == len(self.operators)
        if not fits:
            raise ValueError(
                f"the operator has blocks {list(self.parts())}, and acts on a {kind}; "
                f"{described(vector)}."
            )
        # A list may come for a tuple, or the other way round, and gets back what it is.
        entries = type(self.operators)(vector)
        products = jax.tree.map(
            lambda op, x: op.mv(x), self.operators, entries, is_leaf=_is_operator
        )
        return products if isinstance(vector, dict) else type(vector)(products)

    @property
    def T(self) -> "BlockDiagonal":  # noqa: N802
        return self.rebuilt({name: op.T for name, op in self.parts().items()})


def block_diagonal(operators: Mapping[str, Operator] | Sequence[Operator]) -> BlockDiagonal:
    """Operators side by side, each on its own entry of a mapping or of a sequence.

    Args:
      operators: Operators by name, or in order.

    Returns:
      An operator on dictionaries with the same keys, or on tuples or lists of the same length. Its
      methods are those of the blocks: nothing is dense that is not dense in them.

    Raises:
      ValueError: For no operators, or what is none.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> blocks = {"a": ok.operators.kronecker(jnp.eye(2), jnp.eye(3))}
      >>> float(ok.operators.block_diagonal(blocks).trace())
      6.0
    """
    if isinstance(operators, Mapping):
        blocks = dict(operators)
        named = list(blocks.items())
    else:
        blocks = list(operators) if isinstance(operators, list) else tuple(operators)
        named = list(enumerate(blocks))
    if not named:
        raise ValueError("block_diagonal: expected operators, one at least; got none.")
    for name, op in named:
        if not isinstance(op, Operator):
            raise ValueError(
                f"block_diagonal: expected operators; {name!r} is a {type(op).__name__}."
            )
    return BlockDiagonal(blocks)


def _is_operator(x: object) -> bool:
    return isinstance(x, Operator)


def _first(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[0], tree)
