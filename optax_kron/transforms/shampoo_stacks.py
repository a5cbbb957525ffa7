"""Shampoo's statistics and their inverse roots, as stacks: they start, move, and precondition."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from optax_kron import guards
from optax_kron.blocking import BlockPlan, Signature
from optax_kron.kernels import contract, roots
from optax_kron.transforms import _blocks, _program, moving_average, outliers
from optax_kron.transforms._blockwise import Step
from optax_kron.transforms._rota import Rota

GRAFTS = ("sgd", "adagrad", "rmsprop", "adam")

# A root that is farther from one than this is worse than an old one.
_LARGEST_RESIDUAL = 0.5
# Eigenvalues below so many roundings of the stored statistics, relative to the largest, are noise.
_NOISE = 8.0
# Below this, also in float64, Newton's iteration need not come to an end.
_LEAST_FOR_NEWTON = 1e-12


class ShampooStack(NamedTuple):
    """Statistics of the N blocks of one signature."""

    statistics: tuple[Array, ...]  # S per axis: dense [N, d, d] or diagonal [N, d], factor_dtype
    roots: tuple[Array, ...]  # S^(-1/p), likewise
    graft: Array | None  # second moment of the gradient [N, ...], ≥ float32
    started: Array  # whether there has been a gradient other than zero, bool [N]


@_program.settings
@dataclasses.dataclass(frozen=True)
class Shampoo:
    """How statistics are gathered and applied; the settings of `scale_by_shampoo`."""

    decay: ArrayLike | None
    bias_correction: bool
    root_order: int | None
    root_method: str
    epsilon: ArrayLike
    rota: Rota
    start_step: ArrayLike
    grafting: str | None
    graft_decay: ArrayLike
    graft_epsilon: ArrayLike
    precision: jax.lax.PrecisionLike

    def start(self, count: int, signature: Signature, dtype: DTypeLike) -> ShampooStack:
        """See `Method`: statistics of zero, roots of the identity."""
        statistics, found = [], []
        for size, diagonal in zip(signature.shape, signature.diagonal, strict=True):
            if diagonal:
                statistics.append(jnp.zeros((count, size), dtype))
                found.append(jnp.ones((count, size), dtype))
            else:
                own = contract.complex_like(dtype, signature.is_complex)
                statistics.append(jnp.zeros((count, size, size), own))
                found.append(jnp.tile(jnp.eye(size, dtype=own), (count, 1, 1)))
        wide = jnp.promote_types(dtype, jnp.float32)
        kept = self.grafting not in (None, "sgd")
        return ShampooStack(
            statistics=tuple(statistics),
            roots=tuple(found),
            graft=jnp.zeros((count, *signature.shape), wide) if kept else None,
            started=jnp.zeros(count, bool),
        )

    def rescale(self, stacks: Any, past: Mapping[str, Array]) -> Any:
        """See `Method`; it is as though there had been none, so that the roots are made anew."""
        rescaled = {}
        for label, stack in stacks.items():
            by = past[label]
            statistics, graft = outliers.times((stack.statistics, stack.graft), jnp.square(by))
            rescaled[label] = stack._replace(
                statistics=statistics, graft=graft, started=stack.started & (by == 1)
            )
        return rescaled

    def step(
        self,
        plan: BlockPlan,
        stacks: Any,
        gradients: Mapping[str, Array],
        direction: Mapping[str, Array],
        count: Array,
        allowed: Array,
    ) -> Step:
        """See `Method`: first the statistics, then the roots, then the update."""
        moved, failures = {}, jnp.zeros([], jnp.int32)
        newly = jnp.zeros([], bool)
        for label, stack in stacks.items():
            moved[label], failed = self._gather(stack, gradients[label], allowed)
            failures += failed
            if _has(stack, dense=True):
                newly |= jnp.any(moved[label].started & ~stack.started)
        read = {label: self._to_read(plan, label, stack, count) for label, stack in moved.items()}
        dense = {label: stack.roots for label, stack in moved.items() if _has(stack, dense=True)}
        found, failed, refreshed = self.rota.refresh(
            plan,
            partial(self._refresh, diagonal=False),
            dense,
            {label: read[label] for label in dense},
            count,
            allowed=allowed,
            all_due=newly,
        )
        failures += failed
        for label, stack in moved.items():
            new = found.get(label, stack.roots)
            # Roots of diagonals cost no more than their use: they are never old.
            if _has(stack, dense=False):
                old = new
                new, failed = self._refresh(label, old, read[label], diagonal=True)
                new = guards.select(allowed, new, old)
                failures += jnp.sum(allowed & failed, dtype=jnp.int32)
            moved[label] = stack._replace(roots=new)
        updates = {
            label: self._precondition(stack, direction[label], count)
            for label, stack in moved.items()
        }
        return Step(updates, moved, failures, refreshed)

    def _gather(
        self, stack: ShampooStack, gradient: Array, allowed: Array
    ) -> tuple[ShampooStack, Array]:
        """A stack with a gradient taken in, and how many blocks could not take it in."""
        real = contract.real_dtype(gradient.dtype)
        informed = _blocks.largest(gradient)[:, 0] != 0
        old_weight, weight = self._weights(self.decay, real)

        def move(statistics, gradient):
            return tuple(
                old_weight * contract.widen(S)
                + weight
                * contract.gram(gradient, axis, diagonal=S.ndim == 1, precision=self.precision)
                for axis, S in enumerate(statistics)
            )

        new = _blocks.mapping(stack.statistics)(move, stack.statistics, gradient)
        new = jax.tree.map(lambda x, y: x.astype(y.dtype), new, stack.statistics)
        graft = stack.graft
        if graft is not None:
            is_sum = self.grafting == "adagrad"
            old_weight, weight = self._weights(None if is_sum else self.graft_decay, real)
            graft = old_weight * graft + weight * contract.squared_magnitude(gradient)
        finite = _blocks.finite_blocks([x for x in (*new, graft) if x is not None])
        # A statistic that was spoilt before is no failure of this step; its root's refresh fails.
        broken = ~_blocks.finite_blocks(stack.statistics)
        takes = allowed & finite
        kept = stack.statistics, stack.graft
        statistics, graft = jax.tree.map(
            lambda x, y: _blocks.select_blocks(takes, x, y), (new, graft), kept
        )
        moved = stack._replace(
            statistics=statistics, graft=graft, started=stack.started | (takes & informed)
        )
        return moved, jnp.sum(allowed & ~finite & ~broken, dtype=jnp.int32)

    def _weights(self, decay: ArrayLike | None, dtype: DTypeLike) -> tuple[Array, Array]:
        """Of what there was, and of the new."""
        if decay is None:
            return jnp.ones([], dtype), jnp.ones([], dtype)
        old = jnp.asarray(decay, dtype)
        return old, 1 - old

    def _to_read(self, plan: BlockPlan, label: str, stack: ShampooStack, count: Array) -> Any:
        """What a refresh needs: statistics, whether there are any, and per block two settings."""
        real = jnp.promote_types(contract.real_dtype(stack.statistics[0].dtype), jnp.float32)
        weight = jnp.ones([], real)
        if self.decay is not None and self.bias_correction:
            weight = moving_average.weight(self.decay, count, real)
        least = _NOISE * float(jnp.finfo(stack.statistics[0].dtype).eps)
        if self.root_method == "newton":
            least = max(least, _LEAST_FOR_NEWTON)
        epsilon = jnp.maximum(jnp.asarray(self.epsilon, real), least)
        settings = jnp.stack([weight, epsilon])
        settings = jnp.broadcast_to(settings, (plan.count(label), 2))
        return stack.statistics, stack.started, settings

    def _refresh(self, label: str, old: Any, read: Any, *, diagonal: bool) -> tuple[Any, Array]:
        """New roots of some blocks, along axes with diagonal statistics or along all others.

        And whether those of a block have failed.
        """

        def make(old, statistics, started, settings):
            weight, epsilon = settings
            # Along an axis of length one all is known from the others: its root is one.
            acting = [axis for axis, S in enumerate(statistics) if S.shape[0] > 1] or [0]
            order = self.root_order or 2 * len(acting)
            sound, found = jnp.ones([], bool), []
            informed = started
            for axis, (S, last) in enumerate(
                zip(map(contract.widen, statistics), old, strict=True)
            ):
                if diagonal != (S.ndim == 1) or axis not in acting:
                    found.append(last)
                    continue
                largest = guards.largest_magnitude(S)
                finite = jnp.isfinite(largest)
                # Where gradients have all but vanished, there is nothing to take a root of.
                informed &= ~(largest < 4 * jnp.finfo(largest.dtype).tiny)
                # LAPACK need not come to an end on what is not finite.
                S = jnp.where(finite, S / weight.astype(contract.real_dtype(S.dtype)), 0)
                root, residual = roots.inverse_root(S, order, epsilon, method=self.root_method)
                root = root.astype(last.dtype)  # where it may overflow
                sound &= finite & guards.all_finite(root) & (residual <= _LARGEST_RESIDUAL)
                found.append(root)
            new = guards.select(informed & sound, tuple(found), old)
            return new, informed & ~sound

        return _blocks.mapping(old)(make, old, *read)

    def _precondition(self, stack: ShampooStack, x: Array, count: Array) -> Array:
        """The update of every block."""

        def apply(found, x):
            wide = tuple(map(contract.widen, found))
            return contract.apply_factors(wide, x, precision=self.precision)

        preconditioned = _blocks.mapping(stack.roots)(apply, stack.roots, x)
        graft = self._grafted(stack, x, count)
        if self.grafting is not None:
            scale = _blocks.norms(graft) / _blocks.positive(_blocks.norms(preconditioned))
            preconditioned = contract.scaled_blocks(preconditioned, scale)
        return jnp.where(count >= self.start_step, preconditioned, graft)

    def _grafted(self, stack: ShampooStack, x: Array, count: Array) -> Array:
        """The update of the optimizer whose length is taken."""
        if stack.graft is None:
            return x
        second = stack.graft
        if self.grafting == "adam":
            second = second / moving_average.weight(self.graft_decay, count, second.dtype)
        return x / (jnp.sqrt(second) + jnp.asarray(self.graft_epsilon, second.dtype))


def _has(stack: ShampooStack, *, dense: bool) -> bool:
    """Whether any axis has a dense statistic, or a diagonal one."""
    return any((S.ndim > 2) == dense for S in stack.statistics)
