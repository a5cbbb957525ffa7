"""Outliers: a block whose gradient is many times what it usually is, is scaled down.

Whatever an optimizer remembers is an average, of gradients or of their squares. One gradient that
is 10⁶ times the usual weighs 10¹² in an average of squares: with a decay of 0.95 it takes 540 steps
until it weighs no more than the others. So the norm x of what a block gets is compared with the
usual one, u, and bounded by `factor·u` before it is remembered. The usual norm is an average of
bounded norms itself. It rises in about ten steps and falls in about fifty, faster while it is
young:

    x' = min(x, factor·u)    u ← u + w·(x' − u)    w = max(1 / age, 0.1 if x' > u else 0.02)

The third outlier in a row is none: gradients have grown for good, and it becomes the usual norm.
A gradient of zero, or whose squares are, tells nothing and is passed over.

The first one has nothing to be compared with. If the second shows that it was an outlier, it is
bounded in hindsight: what has been made of it is scaled down, by `past`.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from optax_kron.transforms import program, validation
from optax_kron.transforms.stacks import Plan, cond_in_place, for_each_stack, norms, times
from optax_kron.types import PyTree

RISE, FALL = 0.1, 0.02
LONGEST_RUN = 2


class Usual(NamedTuple):
    """How large what blocks get usually is."""

    norm: Float[Array, " N"]  # running mean of the norms, float32; zero before the first
    age: Int[Array, " N"]  # how many norms are in it
    run: Int[Array, " N"]  # how many of them, the last ones, were outliers


class Bounded(NamedTuple):
    """What to do about the norms of some blocks."""

    scale: Float[Array, " N"]  # of what the blocks get, float32 in [0, 1]
    past: Float[Array, " N"]  # of what has been made of what they got before, likewise
    usual: Usual  # with these norms in it
    found: Bool[Array, " N"]  # whether it is an outlier, or what came first was


def start(count: int) -> Usual:
    """Before the first norm of so many blocks."""
    # Each number is a buffer of its own, so that the state can be donated.
    norm, age, run = (jnp.zeros(count, dtype) for dtype in (jnp.float32, jnp.int32, jnp.int32))
    return Usual(norm, age, run)


def bound(norms: Array, usual: Usual, factor: ArrayLike) -> Bounded:
    """Compare norms of blocks with the usual ones.

    Args:
      norms: of what the blocks get [N], ≥ 0. Those that are not finite change nothing.
      usual: the usual ones.
      factor: how many times the usual is an outlier, ≥ 1.
    """
    limits = jnp.finfo(jnp.float32)
    x = jnp.minimum(norms, float(limits.max)).astype(jnp.float32)
    u, age, run = usual
    factor = jnp.asarray(factor, x.dtype)
    counts = jnp.isfinite(norms) & (x > limits.tiny**0.5)
    known = counts & (u > 0)
    was_outlier = known & (age == 1) & (x < u / factor)
    past = jnp.where(was_outlier, factor * (x / jnp.where(known, u, 1)), 1)
    u = u * past
    is_larger = known & (x / factor > u)
    is_outlier = is_larger & (run < LONGEST_RUN)
    scale = jnp.where(is_outlier, factor * (u / jnp.where(is_outlier, x, 1)), 1)
    x = jnp.where(is_outlier, factor * u, x)
    weight = jnp.maximum(jnp.where(x > u, RISE, FALL), 1 / (age + 1).astype(x.dtype))
    weight = jnp.where(is_larger & ~is_outlier, 1, weight)
    u = jnp.where(counts, u + weight * (x - u), u)
    run = jnp.where(counts, jnp.where(is_outlier, run + 1, 0), run)
    age = age + counts.astype(age.dtype)
    return Bounded(scale, past, Usual(u, age, run), is_outlier | was_outlier)


class Rescales(Protocol):
    """A method that keeps something of gradients; see `frame.Preconditioner`."""

    def rescale(self, stack: PyTree, past: Float[Array, " N"]) -> PyTree:
        """The stack that gradients would have given that were `past` times as large."""
        ...


class Limited(NamedTuple):
    """Stacks whose outliers are scaled down."""

    blocks: Mapping[str, Array]
    # By what to scale what was made of the first ones, real [N] by label; None: nothing.
    past: Mapping[str, Array] | None
    usual: Mapping[str, Usual] | None
    found: Array  # whether there was any outlier, bool []

    def rescaled(self, stacks: Mapping[str, Array]) -> Mapping[str, Array]:
        """What is proportional to gradients before, arrays [N, ...] by label."""
        if self.past is None:
            return stacks
        return {label: times(x, self.past[label]) for label, x in stacks.items()}

    def rescaled_stacks(
        self, method: Rescales, stacks: Mapping[str, PyTree], allowed: Bool[Array, ""]
    ) -> Mapping[str, PyTree]:
        """What else was made of gradients before; the method knows how."""
        if not self.past:
            return stacks
        # There is no block if all leaves are empty.
        first = jnp.any(jnp.concatenate([jnp.zeros(1, bool), *(x < 1 for x in self.past.values())]))
        arrays, rebuild = program.parts(method)

        def rescale(stacks, past, arrays):
            known = rebuild(arrays)
            return {label: known.rescale(stack, past[label]) for label, stack in stacks.items()}

        return cond_in_place(rescale, allowed & first, dict(stacks), dict(self.past), arrays)


def start_stacks(plan: Plan) -> Mapping[str, Usual] | Array:
    """`start` of all stacks of a plan of blocks or layers."""
    return for_each_stack(plan, lambda label: start(plan.count(label)))


def limit(
    stacks: Mapping[str, Array], usual: Mapping[str, Usual] | None, factor: ArrayLike | None
) -> Limited:
    """Scale down the blocks of stacks that are outliers.

    Args:
      stacks: blocks [N, ...] by label.
      usual: of their norms, by label.
      factor: how many times the usual norm is an outlier; `None`: nothing is.
    """
    if factor is None or usual is None:
        return Limited(stacks, None, usual, jnp.zeros([], bool))
    bounded = {label: bound(norms(x), usual[label], factor) for label, x in stacks.items()}
    return Limited(
        {label: times(x, bounded[label].scale) for label, x in stacks.items()},
        {label: x.past for label, x in bounded.items()},
        {label: x.usual for label, x in bounded.items()},
        jnp.any(jnp.concatenate([jnp.zeros(1, bool), *(x.found for x in bounded.values())])),
    )


def limit_moments(
    old: Array, new: Array, trace: Array, usual: Usual | None, factor: ArrayLike | None
) -> tuple[Array, Array, Usual | None, Array]:
    """Scale down second moments of outliers: the norm is the root of the trace.

    Args:
      old: average of those of before, [N, ...].
      new: those of a step, likewise.
      trace: of the new, [N].
      usual: of their norms.
      factor: how many times the usual norm is an outlier; `None`: nothing is.

    Returns:
      The average and the moments of the step, scaled down where that is due; the usual norms with
      this one; and which blocks had an outlier, bool [N].
    """
    if usual is None or factor is None:
        return old, new, usual, jnp.zeros(len(new), bool)
    # Rounding may leave a trace below zero.
    bounded = bound(jnp.sqrt(jnp.maximum(trace, 0)), usual, factor)
    old, new = times(old, jnp.square(bounded.past)), times(new, jnp.square(bounded.scale))
    return old, new, bounded.usual, bounded.found


def check(owner: str, factor: object) -> None:
    """Raise unless the setting `outlier_clip` is a number ≥ 1, traced or `None`."""
    validation.check_range(owner, "outlier_clip", factor, least=1, optional=True)
