"""The factors of layers: moving averages of second moments of what they saw.

Blocks with one signature (d_in, d_out, and which factors are diagonal), from all layers, form one
stack. So compile time grows with the number of signatures, not of layers, but for the contraction
of each layer's taps, whose shapes are its own. Of two dense layers, 3 to 2 with a bias and 4 to 2
without, and two blocks, 5 to 7:

    "4x2": A [2, 4, 4], G [2, 2, 2]    "5x7": A [2, 5, 5], G [2, 7, 7]
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from optax_kron.kernels import flow, kfac, packed
from optax_kron.layers.layer import Layer
from optax_kron.layers.moments import moments_of_blocks, moments_of_uses
from optax_kron.layers.plan import LayerPlan, Member, factor_shape
from optax_kron.layers.taps import Tap, Taps
from optax_kron.transforms import mesh, outliers, program, validation
from optax_kron.transforms import stacks as blocks
from optax_kron.transforms.preconditioner import (
    Advanced,
    KronState,
    Preconditioner,
    Seen,
    Stacks,
    Step,
    any_block,
    real_dtype,
    total,
)
from optax_kron.transforms.schedule import RefreshSchedule, refresh_schedule
from optax_kron.types import PyTree


class KfacStack(NamedTuple):
    """Factors of N blocks of one signature."""

    # A, factor_dtype: [N, d_in, d_in], from d_in = 256 on `packed.pack` of it [N, r, c], of which
    # `packed.unpack` is the matrix again; or its diagonal [N, d_in].
    input_factor: Array
    output_factor: Array  # G likewise, with d_out
    initialized: Bool[Array, " N"]  # whether the factors have been set
    inverse: PyTree  # what was made of the factors at the last refresh; the optimizer's
    # Of the roots of the traces of what the factors take in, A, G and what else is averaged; None
    # without outlier_clip.
    usual: tuple[outliers.Usual, ...] | None


class FactorSchedule(NamedTuple):
    """What decides on the next refresh of factors."""

    factor_updates: Int[Array, ""]  # accepted steps whose taps went into the factors
    since_refresh: Int[Array, ""]  # accepted steps since inverses or bases were made


class Observed(NamedTuple):
    """Second moments of a step's taps, by stack."""

    moments: Mapping[str, tuple[Array, Array]]  # of inputs and output-gradients, like the factors
    seen: Mapping[str, Bool[Array, " N"]]  # whether the layer has seen any example
    finite: Mapping[str, Bool[Array, " N"]]  # whether its moments are
    taps_finite: Bool[Array, ""]  # whether all taps are


class Taken(NamedTuple):
    """The stacks after a step's taps."""

    stacks: Stacks
    failures: Int[Array, ""]  # blocks whose new factors were not finite, and that kept the old
    finite: Bool[Array, ""]  # whether the taps were; if not, the stacks are the old ones
    outliers: Bool[Array, ""]  # whether there were any among them


class Learned(NamedTuple):
    """What comes of a step before gradients are preconditioned."""

    stacks: Stacks
    failures: Int[Array, ""]  # blocks that kept what they had
    refreshed: Bool[Array, ""]
    outliers: Bool[Array, ""]  # among the taps
    schedule: FactorSchedule
    step: Step  # accepted if the taps were finite, too


@program.settings
@dataclasses.dataclass(frozen=True)
class LayerFactors(Preconditioner):
    """How factors are averaged, and when what is made of them is made anew.

    Attributes:
      owner: Name of the optimizer, for messages.
      approx: "expand" or "reduce".
      decay: Of the moving averages.
      bias_correction: Whether the first taps count for no more than later ones.
      damping: Of the factors.
      damping_rule: How it is added to them, or to their eigenvalues.
      factor_every: Steps from one update of the factors to the next.
      schedule: Of the refreshes, once the factors have settled.
      outlier_clip: How many times its usual root of the trace a second moment may have.
      precision: Precision of the matrix products.
      is_frozen: See `Preconditioner`.
    """

    owner: str
    approx: str
    decay: ArrayLike
    bias_correction: bool
    damping: PyTree  # a number, or until a step has its value, a schedule
    damping_rule: str
    factor_every: ArrayLike
    schedule: RefreshSchedule
    outlier_clip: ArrayLike | None
    precision: jax.lax.PrecisionLike
    is_frozen: bool = dataclasses.field(default=False, kw_only=True)

    refreshed: ClassVar[tuple[str, ...]] = ("inverse",)
    averages: ClassVar[int] = 2  # second moments that are averaged over steps

    @property
    def keeps_gradients(self) -> bool:
        """See `Preconditioner`."""
        return False

    def init(self, count: int, signature: Sequence[Member], dtype: jnp.dtype) -> KfacStack:
        """See `Preconditioner`: factors of zero, and inverses at the identity."""
        layer = signature[0].layer
        norms = (outliers.start(count) for _ in range(self.averages))
        usual = None if self.outlier_clip is None else tuple(norms)
        shapes = (
            factor_shape(count, layer.d_in, layer.has_diagonal_input),
            factor_shape(count, layer.d_out, layer.has_diagonal_output),
        )
        return KfacStack(
            *(packed.keep_factors(jnp.zeros(shape, dtype)) for shape in shapes),
            initialized=jnp.zeros(count, bool),
            inverse=self.init_inverse(layer, count, dtype),
            usual=usual,
        )

    def init_inverse(self, layer: Layer, count: int, dtype: jnp.dtype) -> PyTree:
        """What stands for the inverses of so many blocks before there are any: the identity."""
        raise NotImplementedError

    def init_schedule(self) -> FactorSchedule:
        """See `Preconditioner`."""
        return FactorSchedule(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32))

    def at(self, state: KronState) -> "LayerFactors":
        """See `Preconditioner`."""
        damping = self.damping(state.count) if callable(self.damping) else self.damping
        return dataclasses.replace(self, damping=damping)

    def read(
        self,
        plan: LayerPlan,
        updates: PyTree,
        state: KronState,
        extra_args: Mapping[str, PyTree],
    ) -> Taps:
        """See `Preconditioner`: the taps of all layers, in canonical form."""
        del updates, state
        return plan.read_taps(extra_args.get("taps"))

    def spread(
        self,
        plan: LayerPlan,
        share: mesh.Share,
        extra: Taps,
        updates: PyTree,
        state: KronState,
        dtype: jnp.dtype,
    ) -> Observed:
        """See `Preconditioner`: moments, each device its share."""
        del updates

        def make(taps, due):
            def observe():
                # One sum over examples for all. Left alone, the compiler has each matrix of a stack
                # go from rows on every device to its owner by an exchange of its own.
                return share.gathered(self.observe(plan, taps, dtype))

            if self._takes_every_step:
                return observe()
            observed = flow.cond_or_zeros(due, observe)
            return observed._replace(taps_finite=observed.taps_finite | ~due)

        due = state.count % validation.interval(self.factor_every) == 0
        return share.globally(make, extra, due, out=self.spread_as(share))

    def spread_as(self, share: mesh.Share) -> Observed:
        """See `Preconditioner`."""
        return Observed(share.cut, share.cut, share.cut, mesh.WHOLE)

    @property
    def _takes_every_step(self) -> bool:
        return isinstance(self.factor_every, int | np.integer) and self.factor_every == 1

    def advance(
        self,
        plan: LayerPlan,
        state: KronState,
        stacks: Stacks,
        seen: Mapping[str, Seen],
        extra: Taps | Observed,
        step: Step,
    ) -> Advanced:
        """See `Preconditioner`: factors take in taps, which may turn out not to be finite."""
        if self.is_frozen:
            return self.preconditioned(state, stacks, seen, step)
        learned = self.learn(plan, state, stacks, seen, extra, step)
        looked = None
        if self.looks_twice:
            assert isinstance(extra, Taps), "those of a mesh were looked at by `look_from`"
            looked = self.look(plan, _inverses(learned.stacks), extra, real_dtype(seen))
        return self.finish(state, learned, seen, looked)

    def learn(
        self,
        plan: LayerPlan,
        state: KronState,
        stacks: Stacks,
        seen: Mapping[str, Seen],
        extra: Taps | Observed,
        step: Step,
    ) -> Learned:
        """Factors take in taps, and what is made of them is made anew where it is due."""
        schedule, dtype = state.schedule, real_dtype(seen)
        rate = jnp.clip(jnp.asarray(self.decay, dtype), 0, 1)
        moving = step.accepted & (state.count % validation.interval(self.factor_every) == 0)
        weight = _ema_weight(rate, schedule.factor_updates) if self.bias_correction else rate

        def observe():
            return extra if isinstance(extra, Observed) else self.observe(plan, extra, dtype)

        take = functools.partial(self._take, observe, weight, moving, step)
        if self._takes_every_step:
            taken = take(stacks)  # a branch copies the state
        else:
            none, no, yes = jnp.asarray(0, jnp.int32), jnp.asarray(False), jnp.asarray(True)
            taken = flow.cond(moving, take, lambda x: Taken(x, none, yes, no), stacks)
        step = step._replace(accepted=step.accepted & taken.finite)
        moved = moving & taken.finite
        waited = schedule.since_refresh + 1 >= validation.interval(self.schedule.every)
        # Of factors that do not change at all, with a decay of one, none is ever young.
        age = (1 - rate) * schedule.factor_updates.astype(dtype)
        all_due = (state.refreshes == 0) | (moved & (age < 1) & (rate < 1))
        refreshed = self.refresh_due(taken.stacks, seen, step, all_due=all_due, due=waited)
        due = step.accepted & (all_due | waited)
        if self.schedule.staggered:
            due = refreshed.happened  # of some of the blocks
        since = schedule.since_refresh + step.accepted.astype(jnp.int32)
        schedule = FactorSchedule(
            factor_updates=schedule.factor_updates + moved.astype(jnp.int32),
            since_refresh=jnp.where(due, 0, since),
        )
        failures = step.share.sum(taken.failures + refreshed.failures)
        strange = step.share.any(taken.outliers)
        return Learned(refreshed.stacks, failures, due, strange, schedule, step)

    def finish(
        self,
        state: KronState,
        learned: Learned,
        seen: Mapping[str, Seen],
        looked: PyTree,
    ) -> Advanced:
        """What else is learned from the taps, with what was made anew, and the updates."""
        step, dtype = learned.step, real_dtype(seen)
        rate = jnp.clip(jnp.asarray(self.decay, dtype), 0, 1)
        corrected = self.corrections(state.count)
        weight = _ema_weight(rate, corrected) if self.bias_correction else rate
        stacks, missed, found = self.correct_all(learned.stacks, looked, weight, step)
        updates = {label: self.precondition(stacks[label], x, step) for label, x in seen.items()}
        failures = learned.failures + step.share.sum(missed)
        strange = learned.outliers | found
        return Advanced(
            stacks, updates, failures, learned.refreshed, step.accepted, learned.schedule, strange
        )

    @staticmethod
    def learned_as(share: mesh.Share) -> Learned:
        """How what is learned is spread over a mesh."""
        return Learned(share.cut, *[mesh.WHOLE] * 5)

    def look_from(
        self, plan: LayerPlan, share: mesh.Share, stacks: Stacks, taps: Taps, dtype: jnp.dtype
    ) -> PyTree:
        """`look` on a mesh, where every device sees its part of the batch, and all blocks."""

        def make(method, taps, inverses):
            return share.gathered(method.look(plan, share.gathered(inverses), taps, dtype))

        return share.globally(make, self, taps, _inverses(stacks), out=share.cut)

    def corrections(self, steps: Int[Array, ""]) -> Int[Array, ""]:
        """How many times `correct_all` has learned something in so many accepted steps."""
        return steps

    def look(
        self, plan: LayerPlan, inverses: Mapping[str, PyTree], taps: Taps, dtype: jnp.dtype
    ) -> PyTree:
        """What `correct_all` takes of the taps, with what was made anew, by stack."""
        raise NotImplementedError

    def correct_all(
        self, stacks: Stacks, looked: PyTree, decay: Float[Array, ""], step: Step
    ) -> tuple[Stacks, Int[Array, ""], Bool[Array, ""]]:
        """What else is learned from the taps of a step: nothing.

        Args:
          stacks: Factors, and what was made of them.
          looked: What `look` returned.
          decay: Of averages over steps.
          step: Whether it is accepted.

        Returns:
          The new stacks; how many blocks have failed; whether there were outliers.
        """
        del looked, decay, step
        return stacks, jnp.zeros([], jnp.int32), jnp.zeros([], bool)

    def observe(self, plan: LayerPlan, taps: Taps, dtype: jnp.dtype) -> Observed:
        """Second moments of taps in canonical form, in one dtype."""
        if not plan.stacks:
            return Observed({}, {}, {}, jnp.ones([], bool))
        # Of the layers that are here, others may be masked.
        used = {m.layer.name: taps[m.layer.name] for m in plan.members}
        settings = {"approx": self.approx, "dtype": dtype, "precision": self.precision}
        moments, seen, rows = {}, {}, []
        for label, members in plan.stacks.items():
            uses = [moments_of_uses(self.owner, m, used[m.layer.name], **settings) for m in members]
            pairs = map(moments_of_blocks, members, uses)
            *both, weight = (plan.stacked(label, x) for x in zip(*pairs, strict=True))
            moments[label], seen[label] = tuple(both), weight > 0
            given = [tap for m in members for tap in used[m.layer.name]]
            if all(isinstance(tap, Tap) for tap in given):
                # No entry of a second moment is larger than those on its diagonal.
                rows += [kfac.diagonal_rows(x) for x in both]
            else:
                rows += [blocks.largest_of_blocks(x)[:, None] for x in both]
        checks = blocks.finite_rows(rows)
        finite = dict(zip(moments, map(jnp.logical_and, checks[::2], checks[1::2]), strict=True))
        # Taps that are not finite show in their moments; where these are, they need not be read.
        taps_finite = flow.cond(
            jnp.all(jnp.concatenate(list(finite.values()))),
            lambda: jnp.ones([], bool),
            lambda: blocks.all_finite(used),
        )
        return Observed(moments, seen, finite, taps_finite)

    def _take(
        self,
        observe: Callable[[], Observed],
        decay: Float[Array, ""],
        allowed: Bool[Array, ""],
        step: Step,
        stacks: Stacks,
    ) -> Taken:
        """Average what the layers saw into the factors."""
        observed = observe()
        new, failed, strange = {}, [], []
        for label, stack in stacks.items():
            wanted = allowed & observed.taps_finite & observed.seen[label]

            def move(stack, label=label, wanted=wanted):
                fields, finite, outlying = self._blend(stack, label, observed, decay)
                new, missed = blocks.guarded(stack, blocks.Change(fields, wanted, finite))
                initialized = stack.initialized | (wanted & ~missed)
                return new._replace(initialized=initialized), missed, outlying

            names = "input_factor", "output_factor"
            new[label], missed, outlying = step.averaged(move, stack, names, label)
            failed.append(missed)
            strange.append(wanted & ~missed & outlying)
        return Taken(new, total(failed), observed.taps_finite, any_block(strange))

    def _blend(
        self, stack: KfacStack, label: str, observed: Observed, decay: Float[Array, ""]
    ) -> tuple[dict[str, PyTree], Bool[Array, " N"], Bool[Array, " N"]]:
        """The factors of one stack after a step; which are finite, and which saw an outlier."""
        moments, finite = observed.moments[label], observed.finite[label]
        rate = jnp.where(stack.initialized, decay, 0)  # the first moments are taken as they are
        factors, usual = [], list(stack.usual or ())
        strange = jnp.zeros(len(rate), bool)
        for i, (old, moment) in enumerate(zip(stack[:2], moments, strict=True)):
            trace = jnp.sum(kfac.diagonal_rows(moment), axis=1)
            before = None if stack.usual is None else stack.usual[i]
            old, moment, after, found = outliers.limit_moments(
                old, packed.keep_factors(moment), trace, before, self.outlier_clip
            )
            factors.append(blocks.blend(old, moment, rate))
            if after is not None:
                usual[i] = after
            strange |= found
        if stack.input_factor.dtype != decay.dtype:  # in which they may overflow
            finite &= blocks.finite_blocks(factors)
        fields = {"input_factor": factors[0], "output_factor": factors[1]}
        if stack.usual is not None:
            fields["usual"] = tuple(usual)
        return fields, finite, strange


def _inverses(stacks: Stacks) -> dict[str, PyTree]:
    return {label: stack.inverse for label, stack in stacks.items()}


def _ema_weight(decay: Float[Array, ""], updates: Int[Array, ""]) -> Float[Array, ""]:
    """The weight of the old factors that makes a moving average one without bias to its start."""
    count = updates.astype(decay.dtype)
    weight = decay * (1 - decay**count) / jnp.where(decay < 1, 1 - decay ** (count + 1), 1)
    return jnp.where(decay < 1, weight, count / (count + 1))


# The arguments of `check_factors`.
FACTOR_SETTINGS = ("approx", "decay", "damping", "factor_every", "refresh_every", "stagger")


def check_factors(
    owner: str,
    approx: str,
    decay: ArrayLike,
    damping: optax.ScalarOrSchedule,
    factor_every: ArrayLike,
    refresh_every: ArrayLike,
    stagger: bool,
) -> dict[str, PyTree]:
    """The settings of `LayerFactors` that are in range, by name."""
    validation.check_choice(owner, "approx", approx, kfac.APPROXIMATIONS)
    validation.check_range(owner, "decay", decay, most=1)
    validation.check_range(owner, "damping", damping, schedule=True)
    validation.check_interval(owner, "factor_every", factor_every)
    return {
        "owner": owner,
        "approx": approx,
        "decay": decay,
        "damping": damping,
        "factor_every": factor_every,
        "schedule": refresh_schedule(owner, refresh_every, stagger),
    }
