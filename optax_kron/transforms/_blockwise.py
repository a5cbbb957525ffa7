"""Transformations that keep, for each block of a parameter, something made of its gradients alone.

The method says what that is and what it makes of the momentum. What is here says when: it takes the
gradients apart into blocks, averages them, and keeps out what is not finite.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from optax_kron import guards
from optax_kron.blocking import Blocking, BlockPlan, Signature, plan_blocks
from optax_kron.transforms import _blocks, _program, _settings, clipping, moving_average, outliers

PyTree = Any
Stacks = Mapping[str, Any]


class ScaleByBlocksState(NamedTuple):
    """State of `scale_by_shampoo` and `scale_by_soap`.

    `optax.tree.get(state, name)` finds a field inside the state of a chain or wrapper.

    Attributes:
      count: gradients that were accepted, int32 [].
      refreshes: steps at which roots or bases were made anew, int32 [].
      failed_refreshes: blocks that kept what they had, as the new was not sound, int32 [].
      skipped_steps: gradients that were not finite and were dropped, int32 [].
      outlier_steps: gradients with a block that was an outlier and was scaled down, int32 [].
      usual_norms: of the gradients of every block, by kind of block; `None` without `outlier_clip`.
      momentum: moving average of the gradients, [N, ...] by kind of block; `None` without momentum.
      stacks: statistics and what is made of them, by kind of block; an array for a tree without
        leaves.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> tx = ok.soap(1e-3)
      >>> state = tx.init(jnp.ones((3, 2)))
      >>> _, state = tx.update(jnp.full((3, 2), jnp.nan), state)
      >>> print(optax.tree.get(state, "skipped_steps"))
      1
    """

    # "count" is Optax's name for the number of steps, though tuples have a method of that name.
    count: Array  # pyright: ignore
    refreshes: Array
    failed_refreshes: Array
    skipped_steps: Array
    outlier_steps: Array
    usual_norms: Mapping[str, outliers.Usual] | Array | None
    momentum: Mapping[str, Array] | Array | None
    stacks: Stacks | Array


class Step(NamedTuple):
    """What a method makes of one gradient."""

    updates: Mapping[str, Array]  # blocks [N, ...]
    stacks: Stacks
    failures: Array  # int32 []
    refreshed: Array  # bool []


class Method(Protocol):
    """What is kept of the gradients, and what is made of it."""

    def start(self, count: int, signature: Signature, dtype: DTypeLike) -> Any:
        """A stack of so many blocks before the first step, with an array `started`, bool [N]."""
        ...

    def rescale(self, stacks: Any, past: Mapping[str, Array]) -> Any:
        """The stacks that gradients which were `past` [N] times as large would have given."""
        ...

    def step(
        self,
        plan: BlockPlan,
        stacks: Any,
        gradients: Mapping[str, Array],
        direction: Mapping[str, Array],
        count: Array,
        allowed: Array,
    ) -> Step:
        """One step.

        Args:
          plan: of the blocks.
          stacks: what `start` or the last step returned, by label.
          gradients: blocks [N, ...].
          direction: their bias-corrected average, or themselves.
          count: accepted gradients, this one included, int [].
          allowed: whether this one is; else the stacks stay as they are, bool [].
        """
        ...


@_program.settings
@dataclasses.dataclass(frozen=True)
class Blockwise:
    """A transformation of gradients, block by block.

    Attributes:
      owner: its name, for messages.
      method: what is kept and made of the blocks.
      momentum: decay of the moving average of gradients, or `None`.
      momentum_dtype: dtype of that.
      outlier_clip: how many times a block's usual norm is too much, or `None`.
      blocking: how parameters become blocks.
      factor_dtype: real dtype of the factors.
    """

    owner: str
    method: Method
    momentum: ArrayLike | None
    momentum_dtype: DTypeLike | None
    outlier_clip: ArrayLike | None
    blocking: Blocking
    factor_dtype: jnp.dtype

    def init(self, params: PyTree) -> Any:
        """The state before the first step."""
        return self._initial(plan_blocks(params, self.blocking))

    def _initial(self, plan: BlockPlan) -> Any:
        # Each counter is a buffer of its own, so that the state can be donated.
        counters = ("count", "refreshes", "failed_refreshes", "skipped_steps", "outlier_steps")
        return ScaleByBlocksState(
            **{name: jnp.zeros([], jnp.int32) for name in counters},
            usual_norms=None if self.outlier_clip is None else outliers.start_stacks(plan),
            momentum=moving_average.start(plan, self.momentum, self.momentum_dtype),
            stacks=self._start(plan),
        )

    def _start(self, plan: BlockPlan) -> Stacks | Array:
        if not plan.leaves:
            return jnp.zeros([])  # One leaf where the stacks would be, as tree.map_params needs.
        return {
            label: self.method.start(plan.count(label), signature, self.factor_dtype)
            for label, signature in plan.stacks.items()
        }

    def update(
        self, updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        """One step."""
        del extra_args
        if params is not None:
            _settings.check_like(self.owner, updates, params)
        updates = _program.as_arrays(updates)
        plan = plan_blocks(updates, self.blocking)
        _settings.check_stacks(self.owner, plan, getattr(state, "stacks", None), "blocking")
        return _program.once(Blockwise._update, self, plan, updates, state)

    def _update(self, plan: BlockPlan, updates: PyTree, state: Any) -> tuple[PyTree, Any]:
        _settings.check_state(self.owner, jax.eval_shape(lambda: self._initial(plan)), state)
        if not plan.leaves:
            return updates, state._replace(count=state.count + 1)
        compute = jnp.promote_types(self.factor_dtype, jnp.float32)
        gradients = plan.split(updates, compute)
        finite = _squares_fit(gradients)
        limited = outliers.limit(gradients, state.usual_norms, self.outlier_clip)
        gradients = limited.blocks
        average, direction = None, gradients
        if self.momentum is not None:
            before = limited.rescaled(state.momentum)
            average = moving_average.step(gradients, before, self.momentum)
            finite &= guards.all_finite(average)
        count = state.count + finite.astype(jnp.int32)
        decay = self.momentum
        if decay is not None and average is not None and not _settings.is_off(decay):
            direction = moving_average.correct(average, decay, count, compute)
        stacks = limited.rescaled_stacks(self.method.rescale, state.stacks, finite)
        done = self.method.step(plan, stacks, gradients, direction, count, finite)
        new_state = ScaleByBlocksState(
            count=count,
            refreshes=state.refreshes + done.refreshed.astype(jnp.int32),
            failed_refreshes=state.failed_refreshes + done.failures,
            skipped_steps=state.skipped_steps + (~finite).astype(jnp.int32),
            outlier_steps=state.outlier_steps + (finite & limited.found).astype(jnp.int32),
            usual_norms=guards.select(finite, limited.usual, state.usual_norms),
            momentum=guards.select(finite, average, state.momentum),
            stacks=done.stacks,
        )
        blocks = clipping.clip_leaves(plan, done.updates, finite, None, None)
        return plan.join(blocks, like=updates), new_state


def _squares_fit(gradients: Mapping[str, Array]) -> Array:
    """Whether the squares of all blocks are finite, as whatever is kept is made of squares."""
    fits = [jnp.all(_blocks.squares_fit(x)) for x in gradients.values()]
    return jnp.all(jnp.array(fits, bool))  # there is no block if all leaves are empty


def blockwise(
    owner: str,
    method: Method,
    *,
    momentum: ArrayLike | None,
    momentum_dtype: DTypeLike | None,
    outlier_clip: ArrayLike | None,
    blocking: Blocking,
    factor_dtype: DTypeLike | None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation, with its settings checked; arguments as `Blockwise`."""
    _settings.check_range(owner, "momentum", momentum, most=1, open_right=True, optional=True)
    _settings.check_dtype(owner, "momentum_dtype", momentum_dtype)
    outliers.check(owner, outlier_clip)
    _settings.check_blocking(owner, blocking)
    dtype = _settings.real_factor_dtype(owner, factor_dtype)
    made = Blockwise(owner, method, momentum, momentum_dtype, outlier_clip, blocking, dtype)
    return _program.transformation(made.init, made.update)
