"""The steps of PSGD-Kron: when the factors move, of what gradient, and what is kept."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from optax_kron import guards
from optax_kron.blocking import Blocking, BlockPlan, plan_blocks
from optax_kron.kernels import flow
from optax_kron.transforms import (
    _program,
    _settings,
    clipping,
    kron_stacks,
    moving_average,
    outliers,
)

PyTree = Any
# A probe, as a tree like the gradients, and its product with the Hessian.
Probed = tuple[PyTree, PyTree]

CRITERIA = ("whiten_momentum", "whiten_gradient", "newton")


class ScaleByKronPsgdState(NamedTuple):
    """State of `scale_by_kron_psgd`.

    `optax.tree.get(state, name)` finds a field inside the state of a chain or wrapper.

    Attributes:
      count: gradients that were accepted, int32 [].
      due_share: share of the next move of the factors that has come due, in [0, 1), float32 [].
      refreshes: how often the factors have moved, int32 [].
      failed_refreshes: blocks whose move was not finite and was dropped, int32 [].
      skipped_steps: gradients that were not finite and were dropped, int32 [].
      outlier_steps: gradients with a block that was an outlier and was scaled down, int32 [].
      cached: whether the cached preconditioners belong to the factors, bool [].
      key: raw PRNG key, uint32 [2]. It never changes: each draw folds in `refreshes`.
      usual_norms: of the gradients of every block, by kind of block, and with "newton" of the
        Hessian-vector products; `None` without `outlier_clip`.
      momentum: moving average of the gradients, [N, ...] by kind of block; `None` without momentum.
      stacks: the factors and what belongs to them, by kind of block.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> tx = ok.kron_psgd(1e-3)
      >>> state = tx.init(jnp.ones((3, 2)))
      >>> _, state = tx.update(jnp.full((3, 2), jnp.nan), state)
      >>> print(optax.tree.get(state, "skipped_steps"))
      1
    """

    # "count" is Optax's name for the number of steps, though tuples have a method of that name.
    count: Array  # pyright: ignore
    due_share: Array
    refreshes: Array
    failed_refreshes: Array
    skipped_steps: Array
    outlier_steps: Array
    cached: Array
    key: Array
    usual_norms: Mapping[str, Any] | None
    momentum: Mapping[str, Array] | Array | None  # an array for a tree without leaves
    stacks: Mapping[str, kron_stacks.KronStack] | Array  # likewise


@_program.settings
@dataclasses.dataclass(frozen=True)
class KronPsgd:
    """A transformation of gradients; settings are those of `scale_by_kron_psgd`.

    Attributes:
      owner: its name, for messages.
      fit: how the factors follow the criterion; its `precond_lr` may be a schedule here.
    """

    owner: str
    fit: kron_stacks.Fit
    criterion: str
    update_probability: optax.ScalarOrSchedule
    momentum: ArrayLike | None
    momentum_dtype: DTypeLike | None
    init_scale: ArrayLike | None
    rms_clip: ArrayLike | None
    max_abs_clip: ArrayLike | None
    outlier_clip: ArrayLike | None
    blocking: Blocking
    factor_dtype: jnp.dtype
    seed: int | Array

    @property
    def _compute(self) -> jnp.dtype:
        """The dtype of the arithmetic."""
        return jnp.promote_types(self.factor_dtype, jnp.float32)

    def init(self, params: PyTree) -> Any:
        """The state before the first step."""
        plan = plan_blocks(params, self.blocking)
        # Each counter is a buffer of its own, so that the state can be donated.
        counters = ("count", "refreshes", "failed_refreshes", "skipped_steps", "outlier_steps")
        return ScaleByKronPsgdState(
            **{name: jnp.zeros([], jnp.int32) for name in counters},
            due_share=jnp.zeros([], jnp.float32),
            cached=jnp.zeros([], bool),
            key=_settings.key_data(self.seed),
            usual_norms=self._usual_norms(plan),
            momentum=moving_average.start(plan, self.momentum, self.momentum_dtype),
            stacks=kron_stacks.init(
                plan, self.init_scale, self.factor_dtype, cached=self.fit.cached
            ),
        )

    def _usual_norms(self, plan: BlockPlan) -> dict[str, Any] | None:
        """Before the first gradient."""
        if self.outlier_clip is None:
            return None
        seen = ("gradients", "products") if self.fit.newton else ("gradients",)
        return {name: outliers.start_stacks(plan) for name in seen}

    def update(
        self,
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        hvp_fn: Callable[[PyTree], PyTree] | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        """One step."""
        del extra_args
        self._check_hvp_fn(hvp_fn)
        if params is not None:
            _settings.check_like(self.owner, updates, params)
        updates = _program.as_arrays(updates)
        plan = plan_blocks(updates, self.blocking)
        _settings.check_stacks(self.owner, plan, getattr(state, "stacks", None), "blocking")
        if not plan.leaves:
            return updates, state._replace(count=state.count + 1)
        now = self._at(state)
        if not self.fit.newton or hvp_fn is None:
            return _program.once(KronPsgd._update, now, plan, updates, state, None)
        if not _program.is_concrete((updates, state)):
            probe = functools.partial(kron_stacks.hessian_probe, _probe_key(state), updates, hvp_fn)
            return now._update(plan, updates, state, probe)
        # The product is one of this step alone. It stays outside of what is compiled once.
        probed = updates, updates
        if _program.once(KronPsgd._moves, now, updates, state):
            probed = kron_stacks.hessian_probe(_probe_key(state), updates, hvp_fn)
        return _program.once(KronPsgd._update, now, plan, updates, state, probed)

    def _check_hvp_fn(self, hvp_fn: Any) -> None:
        if self.fit.newton and hvp_fn is None:
            raise ValueError(
                f"{self.owner}: criterion='newton' needs hvp_fn at every update: pass "
                "hvp_fn=ok.hessian_vector_product(loss_fn, params, *args) to tx.update."
            )
        if self.fit.newton:
            _settings.check_callable(self.owner, "hvp_fn", hvp_fn)

    def _at(self, state: Any) -> "KronPsgd":
        """The settings of one step: values of schedules, and nothing that `init` alone reads."""
        probability, precond_lr = (
            setting(state.count) if callable(setting) else setting
            for setting in (self.update_probability, self.fit.precond_lr)
        )
        return dataclasses.replace(
            self,
            update_probability=probability,
            fit=dataclasses.replace(self.fit, precond_lr=precond_lr),
            init_scale=None,
            seed=0,
        )

    def _moves(self, updates: PyTree, state: Any) -> Array:
        """Whether the factors move at this step."""
        return guards.all_finite(updates) & _is_due(self.update_probability, state)[0]

    def _update(
        self,
        plan: BlockPlan,
        updates: PyTree,
        state: Any,
        probed: Probed | Callable[[], Probed] | None,
    ) -> tuple[PyTree, Any]:
        """One step with all that may come from outside; `probed` is read where the factors move."""
        made = jax.eval_shape(lambda: self._usual_norms(plan))
        _settings.check_state(self.owner, made, state.usual_norms)
        limited = outliers.limit(
            plan.split(updates, self._compute),
            (state.usual_norms or {}).get("gradients"),
            self.outlier_clip,
        )
        gradients = limited.blocks
        average, direction = None, gradients
        if self.momentum is not None:
            before = limited.rescaled(state.momentum)
            average = moving_average.step(gradients, before, self.momentum)
        # A gradient that is not finite shows in the average.
        finite = guards.all_finite(gradients if average is None else average)
        count = state.count + finite.astype(jnp.int32)
        decay = self.momentum
        if decay is not None and average is not None and not _settings.is_off(decay):
            direction = moving_average.correct(average, decay, count, self._compute)
        due, due_share = _is_due(self.update_probability, state)
        due = finite & due
        stacks = state.stacks
        if not self.fit.newton:
            stacks = limited.rescaled_stacks(self.fit.rescale, stacks, finite)
        if self.fit.cached:
            stale = finite & ~due & ~state.cached
            stacks = flow.cond(stale, self.fit.cache, lambda x: x, stacks)
        stacks, failed, blocks, *seen = self._move(
            plan, stacks, gradients, direction, state, due, probed
        )
        usual, found = {"gradients": limited.usual}, limited.found
        if seen:
            usual["products"], found = seen[0], found | seen[1]
        blocks = clipping.clip_leaves(plan, blocks, finite, self.rms_clip, self.max_abs_clip)
        new_state = ScaleByKronPsgdState(
            count=count,
            due_share=guards.select(finite, due_share, state.due_share),
            refreshes=state.refreshes + due.astype(jnp.int32),
            failed_refreshes=state.failed_refreshes + failed,
            skipped_steps=state.skipped_steps + (~finite).astype(jnp.int32),
            outlier_steps=state.outlier_steps + (finite & found).astype(jnp.int32),
            cached=guards.select(finite, ~due, state.cached),
            key=state.key,
            usual_norms=None
            if state.usual_norms is None
            else guards.select(finite, usual, state.usual_norms),
            momentum=guards.select(finite, average, state.momentum),
            stacks=stacks,
        )
        return plan.join(blocks, like=updates), new_state

    def _move(
        self,
        plan: BlockPlan,
        stacks: kron_stacks.Stacks,
        gradients: Mapping[str, Array],
        direction: Mapping[str, Array],
        state: Any,
        due: Array,
        probed: Any,
    ) -> tuple[Any, ...]:
        """The factors after a step, how many blocks failed, and the preconditioned momentum.

        And with "newton", the usual norms of the products, and whether there was an outlier.
        """
        # Drawn in a branch of its own: as an operand of the next, it is drawn once, not once for
        # every operation that reads it.
        draw = functools.partial(
            kron_stacks.draw, plan, _key(state), self._compute, noise=not self.fit.newton
        )
        nothing = jnp.zeros(jax.eval_shape(draw).shape, self._compute)
        drawn = flow.cond(due, draw, lambda: nothing)
        usual = (state.usual_norms or {}).get("products")

        def refresh(stacks):
            rows, noise = kron_stacks.take_rows(plan, drawn)
            if probed is not None:
                pair: Any = probed() if callable(probed) else probed
                probe, product = pair
                products, probes = (plan.split(tree, self._compute) for tree in (product, probe))
                seen = outliers.limit(products, usual, self.outlier_clip)
                fitted = seen.blocks
                stacks = seen.rescaled_stacks(self.fit.rescale, stacks, due)
            else:
                fitted = gradients if self.criterion == "whiten_gradient" else direction
                probes, seen = kron_stacks.shape_noise(plan, noise), None
            moved = self.fit.refresh(plan, stacks, fitted, probes, direction, rows, state.refreshes)
            return moved if seen is None else (*moved, seen.usual, seen.found)

        def keep(stacks):
            kept = stacks, jnp.zeros([], jnp.int32), self.fit.precondition(stacks, direction)
            return kept if probed is None else (*kept, usual, jnp.zeros([], bool))

        return flow.cond(due, refresh, keep, stacks)


def _key(state: ScaleByKronPsgdState) -> Array:
    """The key of one move of the factors."""
    return jax.random.fold_in(_settings.key_of(state.key), state.refreshes)


def _probe_key(state: ScaleByKronPsgdState) -> Array:
    return jax.random.fold_in(_key(state), 1)


def _is_due(
    update_probability: optax.ScalarOrSchedule, state: ScaleByKronPsgdState
) -> tuple[Array, Array]:
    """Whether the factors move now, and the share of the next move that is due then."""
    probability = update_probability
    if callable(probability):
        probability = probability(state.count)
    share = state.due_share + jnp.asarray(probability, jnp.float32)
    # The slack keeps rounding from adding a step where 1/p is whole.
    due = (state.count == 0) | (share >= 1 - 1e-6)
    return due, jnp.where(due, jnp.maximum(share - 1, 0), share)
