"""Stacks whose eigenbases follow their statistics, all of them in one program.

The matrices of all stacks and axes take a step of subspace iteration together, for what they share
is compiled once. For example, of stacks "256x256" and "256x1024" those are four arrays, [N, d, d].
"""

from collections.abc import Hashable, Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool

from optax_kron.kernels import contract, eigenbases, packed, soap, subspace
from optax_kron.transforms.preconditioner import AnyStack, Stacks, separated
from optax_kron.transforms.stacks import Change, all_finite, finite_blocks, guarded, map_blocks
from optax_kron.types import PyTree

Key = TypeVar("Key", bound=Hashable)

BASES = ("eigh", "power")  # how eigenbases of layers' factors are found
# Of subspace iteration at a refresh of layers' factors. One would follow them, but the first bases,
# which start at the identity, stay behind eigendecompositions for a hundred steps of training.
_STEPS = 3


def follow_statistics(
    stacks: Stacks, *, precision: contract.Precision, shift: ArrayLike | None = None
) -> tuple[Stacks, Mapping[str, Bool[Array, " N"]]]:
    """Stacks after a step of `subspace.follow`, and which of their blocks have failed.

    Args:
      stacks: Of `bases` and `statistics` per axis, `None` for diagonal ones, and in terms of these
        the eigenvalues `values` per axis and the `second_moment`, or `None`.
      precision: Precision of the products with statistics.
      shift: Which multiple of the identity is left out of statistics where bases are to follow
        them, relative to the mean of their diagonals. `None`: nothing.
    """
    pairs = {
        (label, axis): (Q, _shifted(_statistics(stack, axis), shift))
        for label, stack in stacks.items()
        for axis, Q in enumerate(stack.bases)
        if Q is not None
    }
    followed: dict[str, dict[int, subspace.Followed]] = {label: {} for label in stacks}
    for (label, axis), new in follow_pairs(pairs, precision=precision).items():
        followed[label][axis] = new
    done = {label: _turned(stack, followed[label], precision) for label, stack in stacks.items()}
    return separated(done)


class _Beginning(NamedTuple):
    """What `follow_statistics` asks of a stack, before there is a second moment."""

    statistics: tuple[Array | None, ...]
    bases: tuple[Array | None, ...]
    values: tuple[Array, ...] | None
    second_moment: None
    initialized: Bool[Array, " N"]


def first_iterates(
    fields: Mapping[str, Mapping[str, PyTree]],
    statistics: Mapping[str, tuple[Array | None, ...]],
    newly: Mapping[str, Bool[Array, " N"]],
    precision: contract.Precision,
    shift: ArrayLike | None,
) -> dict[str, dict[str, PyTree]]:
    """The first bases of stacks: what one step makes of those that they have, of the identity.

    More steps would come closer to eigenvectors; training gets no further by them.

    Args:
      fields: By label, `bases`, `values` and `initialized` of a stack.
      statistics: By label, those per axis.
      newly: By label, which blocks get bases. Those that fail are not `initialized` then.
      precision: As in `follow_statistics`, and so is `shift`.
    """
    stacks = {
        k: _Beginning(statistics[k], x["bases"], x["values"], None, newly[k])
        for k, x in fields.items()
    }
    new, failed = follow_statistics(stacks, precision=precision, shift=shift)
    return {
        k: {
            "bases": new[k].bases,
            "values": new[k].values,
            "initialized": x["initialized"] & ~failed[k],
        }
        for k, x in fields.items()
    }


def first_eigenbases(
    fields: Mapping[str, Mapping[str, PyTree]],
    statistics: Mapping[str, tuple[Array | None, ...]],
    newly: Mapping[str, Bool[Array, " N"]],
    precision: contract.Precision,
) -> dict[str, dict[str, PyTree]]:
    """The first bases of stacks, of eigenvectors; arguments and result as in `first_iterates`."""

    def begin(fields, statistics, newly):
        block = _Beginning(statistics, second_moment=None, **fields)
        bases, values = soap.first_bases(
            packed.of_each(packed.whole, jax.tree.map(contract.widen, statistics)),
            block.bases,
            block.values,
            precision=precision,
        )
        new = {"bases": bases, "values": values}
        finite = all_finite([Q for Q in bases if Q is not None])
        block, failed = guarded(block, Change(new, newly, finite))
        block = block._replace(initialized=block.initialized & ~failed)
        return {name: getattr(block, name) for name in fields}

    return {k: map_blocks(x["bases"])(begin, x, statistics[k], newly[k]) for k, x in fields.items()}


def _statistics(stack: AnyStack, axis: int) -> Array:
    """Those of one axis [N, d, d], in the arithmetic."""
    return contract.widen(packed.whole_factors(stack.statistics[axis]))


def _shifted(statistics: Array, shift: ArrayLike | None) -> Array:
    """Statistics [N, d, d] less a share of the mean of their diagonals."""
    if shift is None:
        return statistics
    mean = jnp.mean(jnp.diagonal(statistics, axis1=1, axis2=2).real, axis=1)
    identity = np.eye(statistics.shape[-1], dtype=mean.dtype)[None]
    return statistics - jnp.asarray(shift, mean.dtype) * mean[:, None, None] * identity


def follow_pairs(
    pairs: Mapping[Key, tuple[Array, Array]], *, precision: contract.Precision, steps: int = 1
) -> dict[Key, subspace.Followed]:
    """`subspace.follow` of pairs of bases and matrices [N, d, d], by any key, in the arithmetic."""
    bases, matrices = ([contract.widen(pair[i]) for pair in pairs.values()] for i in (0, 1))
    found = subspace.follow(bases, matrices, precision=precision, steps=steps)
    return dict(zip(pairs, found, strict=True))


class Turned(NamedTuple):
    """The eigenbases of the factors of a stack, and what is known in them, in their dtype."""

    bases: tuple[Array | None, Array | None]  # of A and G, [N, d, d]; None for diagonal factors
    values: tuple[Array, Array]  # diagonals of the factors in them, [N, d]
    usable: Bool[Array, " N"]  # whether bases are orthonormal, and all is finite


def follow_factors(stacks: Stacks, *, precision: contract.Precision) -> dict[str, Turned]:
    """Where the eigenbases of layers' factors go at a refresh.

    Args:
      stacks: Of `KfacStack`s, whose `inverse` has `input_basis` and `output_basis`, and by the same
        names with `values` the eigenvalues.
      precision: Precision of the products with factors.
    """
    factors = {
        k: [contract.widen(packed.whole_factors(F)) for F in x[:2]] for k, x in stacks.items()
    }
    bases = {k: (x.inverse.input_basis, x.inverse.output_basis) for k, x in stacks.items()}
    pairs = {
        (label, side): (Q, factors[label][side])
        for label in stacks
        for side, Q in enumerate(bases[label])
        if Q is not None
    }
    followed = follow_pairs(pairs, precision=precision, steps=_STEPS)
    done = {}
    for label, stack in stacks.items():
        usable = jnp.ones(len(stack.initialized), bool)
        new, values = list(bases[label]), list(factors[label])
        for side, Q in enumerate(new):
            if Q is not None:
                found = followed[label, side]
                new[side] = found.bases
                values[side] = jnp.maximum(  # below zero is rounding
                    eigenbases.rayleigh_quotients(found.bases, values[side], precision=precision), 0
                )
                usable &= found.usable
            values[side] = values[side].astype(stack.inverse.input_values.dtype)
        usable &= finite_blocks(values)
        done[label] = Turned((new[0], new[1]), (values[0], values[1]), usable)
    return done


def _turned(
    stack: AnyStack, followed: Mapping[int, subspace.Followed], precision: contract.Precision
) -> tuple[AnyStack, Bool[Array, " N"]]:
    """A stack with other bases, and what it keeps in terms of them."""
    bases, second = list(stack.bases), stack.second_moment
    values = None if stack.values is None else list(stack.values)
    usable = jnp.ones(len(stack.initialized), bool)
    for axis, (Q, order, is_usable) in followed.items():
        bases[axis] = Q
        usable &= is_usable
        if second is not None:
            second = _reordered(second, order, 1 + axis)
        if values is not None:
            S = _statistics(stack, axis)
            values[axis] = eigenbases.rayleigh_quotients(Q, S, precision=precision)
            usable &= contract.all_finite(values[axis], axis=1)
    fields: dict[str, PyTree] = {"bases": tuple(bases), "second_moment": second}
    fields["values"] = None if values is None else tuple(values)
    return guarded(stack, Change(fields, stack.initialized, usable))


def _reordered(x: Array, order: Array, axis: int) -> Array:
    """Along one axis of every block, other places [N, d]."""
    shape = [1] * x.ndim
    shape[0], shape[axis] = order.shape
    return jnp.take_along_axis(x, jax.lax.reshape(order, shape), axis=axis)
