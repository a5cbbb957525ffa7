"""The factors of PSGD-Kron as stacks: how they start, move, and precondition."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from optax_kron import guards
from optax_kron.blocking import BlockPlan, Signature
from optax_kron.kernels import contract, linalg, psgd
from optax_kron.transforms import _blocks, _program, outliers

PyTree = Any
Stacks = Mapping[str, "KronStack"]

_BALANCE_EVERY = 100
_DAMPING_FLOOR = 0.01  # in units of rounding, relative to the largest entry


class KronStack(NamedTuple):
    """Factors of the N blocks of one signature."""

    factors: tuple[Array, ...]  # per axis: dense [N, d, d] or diagonal [N, d], factor_dtype
    bounds: Array  # running bound of the fit's curvature along each axis [N, k], ≥ float32
    started: Array  # whether the scale has been set from a gradient, bool [N]
    preconditioner: tuple[Array, ...] | None  # P per axis, as the factors (float32 for float16)


def init(
    plan: BlockPlan, init_scale: ArrayLike | None, dtype: DTypeLike, *, cached: bool
) -> Stacks | Array:
    """Factors at the identity, or at the given scale times it."""
    if not plan.leaves:
        return jnp.zeros([])  # One leaf where the stacks would be, as optax.tree.map_params needs.
    stacks = {}
    for label, signature in plan.stacks.items():
        count = plan.count(label)
        scale = 1.0 if init_scale is None else init_scale ** (1 / len(signature.shape))
        factors = []
        for size, diagonal in zip(signature.shape, signature.diagonal, strict=True):
            if diagonal:
                factor = jnp.ones((count, size), dtype)
            else:
                identity = jnp.eye(size, dtype=contract.complex_like(dtype, signature.is_complex))
                factor = jnp.tile(identity, (count, 1, 1))
            factors.append((factor * scale).astype(factor.dtype))
        stacks[label] = KronStack(
            factors=tuple(factors),
            bounds=jnp.zeros((count, len(factors)), jnp.promote_types(dtype, jnp.float32)),
            started=jnp.full(count, init_scale is not None),
            preconditioner=tuple(map(_no_preconditioner, factors)) if cached else None,
        )
    return stacks


def draw(plan: BlockPlan, key: Array, dtype: DTypeLike, *, noise: bool) -> Array:
    """All that one move of the factors needs of randomness, in a single draw.

    Returns:
      Standard normal numbers: PROBE_ROWS rows for the norm bounds and, if asked, the noise of every
      signature, one behind the other.
    """
    width = sum(_noise_width(s) for s in plan.stacks.values()) if noise else 0
    return jax.random.normal(key, (linalg.PROBE_ROWS * _longest_axis(plan) + width,), dtype)


def take_rows(plan: BlockPlan, drawn: Array) -> tuple[Array, Array]:
    """The rows [PROBE_ROWS, max d] of a draw, and the rest."""
    longest = _longest_axis(plan)
    end = linalg.PROBE_ROWS * longest
    return drawn[:end].reshape(linalg.PROBE_ROWS, longest), drawn[end:]


def _longest_axis(plan: BlockPlan) -> int:
    return max((max(s.shape) for s in plan.stacks.values()), default=1)


def shape_noise(plan: BlockPlan, noise: Array) -> dict[str, Array]:
    """White noise for the blocks of every stack, [1, *block shape], or [N, ...] where padded.

    The blocks of a stack share it: their fits do not interact, so that each sees white noise that
    is independent of its gradient, and N times fewer numbers are drawn.
    """
    stacks, start = {}, 0
    for label, signature in plan.stacks.items():
        width = _noise_width(signature)
        x = noise[start : start + width]
        start += width
        if signature.is_complex:
            x = jax.lax.complex(*jnp.split(x * 0.5**0.5, 2))
        x = x.reshape(1, *signature.shape)
        mask = plan.mask(label)
        stacks[label] = x if mask is None else x * mask.astype(noise.dtype)
    return stacks


def _noise_width(signature: Signature) -> int:
    return signature.size * (2 if signature.is_complex else 1)


def hessian_probe(
    key: Array, like: PyTree, hvp_fn: Callable[[PyTree], PyTree]
) -> tuple[PyTree, PyTree]:
    """A white probe, and its product with the Hessian.

    Raises:
      ValueError: if `hvp_fn` returns a tree unlike its argument.
    """
    probe = optax.tree.random_like(key, like, sampler=jax.random.normal)
    product = hvp_fn(probe)

    def describe(tree):
        return jax.tree.structure(tree), [jnp.shape(x) for x in jax.tree.leaves(tree)]

    if describe(product) != describe(probe):
        raise ValueError(
            f"kron_psgd: hvp_fn must return a tree like its argument; got {describe(product)}, "
            f"expected {describe(probe)}."
        )
    return probe, product


@_program.settings
@dataclasses.dataclass(frozen=True)
class Fit:
    """How the factors follow the criterion; the settings of `scale_by_kron_psgd`."""

    geometry: str
    precond_lr: Any  # a number, or of the settings a schedule
    damping: ArrayLike
    newton: bool
    precision: jax.lax.PrecisionLike
    cached: bool
    given_scale: bool

    def refresh(
        self,
        plan: BlockPlan,
        stacks: Stacks,
        fitted: Mapping[str, Array],
        probes: Mapping[str, Array],
        direction: Mapping[str, Array],
        rows: Array,
        refreshes: Array,
    ) -> tuple[Stacks, Array, dict[str, Array]]:
        """Move the factors of every stack once, and apply the new preconditioner.

        Args:
          plan: of the blocks.
          stacks: the factors.
          fitted: stacks of gradients or Hessian-vector products.
          probes: stacks of white noise or probes; length one where the blocks share it.
          direction: stacks of what to precondition.
          rows: standard normal [PROBE_ROWS, ≥ max d], for the norm bounds.
          refreshes: how often the factors have moved, int [].

        Returns:
          The new stacks; how many blocks failed, so that their old factors were kept; and `P·m`.
        """
        balance_due = refreshes % _BALANCE_EVERY == _BALANCE_EVERY - 1
        moved, failures, results = {}, jnp.zeros([], jnp.int32), {}
        for label in plan.stacks:
            stack, probe = stacks[label], probes[label]
            shared = probe[0] if probe.shape[0] == 1 else None

            def refresh(factors, bounds, started, gradient, m, probe, sizes, shared=shared):
                old = factors, bounds, started
                probe = shared if probe is None else probe
                new, failed = self._move(old, gradient, probe, sizes, rows, balance_due)
                return new, failed, self._apply(new[0], m, contract.precondition)

            new, failed, results[label] = _blocks.mapping(stack.factors)(
                refresh,
                stack.factors,
                stack.bounds,
                stack.started,
                fitted[label],
                direction[label],
                probe if shared is None else None,
                plan.sizes(label),
            )
            factors, bounds, started = new
            moved[label] = KronStack(factors, bounds, started, stack.preconditioner)
            failures = failures + jnp.sum(failed, dtype=jnp.int32)
        return moved, failures, results

    def _move(self, old, gradient, probe, sizes, rows, balance_due):
        """Move the factors of one block; keep them if that fails, or if the gradient is zero."""
        old_factors, bounds, started = old
        factors = tuple(map(contract.widen, old_factors))
        largest = guards.largest_magnitude(gradient)
        real = contract.real_dtype(gradient.dtype)
        # Without a floor, a slice of exact zeros would let its factor grow until P overflows.
        damping = jnp.maximum(
            jnp.asarray(self.damping, real), float(_DAMPING_FLOOR * jnp.finfo(real).eps) * largest
        )
        scale = psgd.initial_scale(gradient, damping, probe if self.newton else None, sizes)
        scale = jnp.where(started, 1, scale ** (1 / len(factors)))
        factors, bounds = psgd.update_factors(
            tuple(q * scale.astype(contract.real_dtype(q.dtype)) for q in factors),
            bounds,
            psgd.noised(gradient, probe, damping),
            probe,
            rows,
            geometry=self.geometry,
            precond_lr=self.precond_lr,
            newton=self.newton,
            sizes=sizes,
            precision=self.precision,
        )
        factors = guards.select(balance_due, psgd.balance(factors, sizes), factors)
        factors = tuple(
            q.astype(before.dtype) for q, before in zip(factors, old_factors, strict=True)
        )
        finite = guards.all_finite((factors, bounds))
        informed = largest != 0  # also if it is not finite
        new = factors, bounds, jnp.ones([], bool)
        return guards.select(informed & finite, new, old), informed & ~finite

    def _apply(self, factors, x, kernel):
        return kernel(tuple(map(contract.widen, factors)), x, precision=self.precision)

    def rescale(self, stacks: Stacks, past: Mapping[str, Array]) -> Stacks:
        """The stacks, if what set their scale, at first, had been `past` [N] times as large."""
        if self.given_scale:
            return stacks
        rescaled = {}
        for label, stack in stacks.items():
            # P is inverse to what it fits, the terms of the fit's curvature are proportional to it.
            by = past[label] ** (-1 / len(stack.factors))
            rescaled[label] = stack._replace(
                factors=outliers.times(stack.factors, jnp.sqrt(by)),
                bounds=outliers.times(stack.bounds, past[label]),
                preconditioner=outliers.times(stack.preconditioner, by),
            )
        return rescaled

    def cache(self, stacks: Stacks) -> Stacks:
        """Form `P` of every factor, where there is room for it."""

        def square(q):
            squared = contract.square(contract.widen(q), precision=self.precision)
            return squared.astype(_preconditioner_dtype(q.dtype))

        def form(stack):
            if stack.preconditioner is None:
                return stack
            return stack._replace(preconditioner=tuple(map(jax.vmap(square), stack.factors)))

        return {label: form(stack) for label, stack in stacks.items()}

    def precondition(self, stacks: Stacks, direction: Mapping[str, Array]) -> dict[str, Array]:
        """`P·m` for every block, from the cache if there is one."""

        def apply(stack, x):
            if self.cached and stack.preconditioner is not None:
                factors, kernel = stack.preconditioner, contract.apply_factors
            else:
                factors, kernel = stack.factors, contract.precondition
            return _blocks.mapping(factors)(lambda q, m: self._apply(q, m, kernel), factors, x)

        return {label: apply(stacks[label], x) for label, x in direction.items()}


def _preconditioner_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of a cached P: that of the factors, but float32 where float16 would overflow."""
    return jnp.dtype(jnp.float32 if dtype == jnp.float16 else dtype)


def _no_preconditioner(factor: Array) -> Array:
    return jnp.zeros(factor.shape, _preconditioner_dtype(factor.dtype))
