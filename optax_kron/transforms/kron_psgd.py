"""PSGD-Kron: preconditioned SGD whose preconditioner is a Kronecker product, fitted online."""

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
from optax_kron.blocking import Blocking, plan_blocks
from optax_kron.kernels import flow, psgd
from optax_kron.transforms import _program, _settings, clipping, kron_stacks, moving_average

PyTree = Any
CRITERIA = ("whiten_momentum", "whiten_gradient", "newton")

_DEFAULT_BLOCKING = Blocking()


class ScaleByKronPsgdState(NamedTuple):
    """State of `scale_by_kron_psgd`.

    `optax.tree.get(state, name)` finds a field inside the state of a chain or wrapper.

    Attributes:
      count: gradients that were accepted, int32 [].
      due_share: share of the next move of the factors that has come due, in [0, 1), float32 [].
      refreshes: how often the factors have moved, int32 [].
      failed_refreshes: blocks whose move was not finite and was dropped, int32 [].
      skipped_steps: gradients that were not finite and were dropped, int32 [].
      cached: whether the cached preconditioners belong to the factors, bool [].
      key: raw PRNG key, uint32 [2]. It never changes: each draw folds in `refreshes`.
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
    cached: Array
    key: Array
    momentum: Mapping[str, Array] | Array | None  # an array for a tree without leaves
    stacks: Mapping[str, kron_stacks.KronStack] | Array  # likewise


def update_probability_schedule(
    *, highest: float = 1.0, lowest: float = 0.03, decay: float = 0.001, flat_steps: int = 500
) -> optax.Schedule:
    """How often the factors move: `clip(highest·exp(−decay·(t − flat_steps)), lowest, highest)`.

    At every step while the preconditioner is young, then less and less often.

    Args:
      highest: probability during the first `flat_steps` steps, in [0, 1].
      lowest: probability in the long run, in [0, highest].
      decay: rate of the exponential, per step.
      flat_steps: steps before the decay begins.

    Returns:
      A schedule: from the step, an int array, to the probability, a float array.

    Examples:
      >>> import optax_kron as ok
      >>> schedule = ok.update_probability_schedule(lowest=0.1)
      >>> print(schedule(0), schedule(10_000))
      1.0 0.1
    """
    owner = "update_probability_schedule"
    _settings.check_range(owner, "highest", highest, most=1)
    _settings.check_range(owner, "lowest", lowest, most=highest)
    _settings.check_range(owner, "decay", decay)
    _settings.check_range(owner, "flat_steps", flat_steps)

    def schedule(count):
        steps = jnp.asarray(count).astype(jnp.float32)
        fall = jnp.exp(-decay * jnp.maximum(steps - flat_steps, 0))
        return jnp.clip(highest * fall, lowest, highest)

    return schedule


def scale_by_kron_psgd(
    *,
    momentum: ArrayLike | None = 0.9,
    precond_lr: optax.ScalarOrSchedule = 0.1,
    geometry: str = "EQ",
    criterion: str = "whiten_momentum",
    update_probability: optax.ScalarOrSchedule | None = None,
    damping: ArrayLike = 1e-9,
    init_scale: ArrayLike | None = None,
    rms_clip: ArrayLike | None = 1.1,
    max_abs_clip: ArrayLike | None = None,
    blocking: Blocking = _DEFAULT_BLOCKING,
    cache_preconditioner: bool = True,
    factor_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Scale gradients by PSGD-Kron: no learning rate, no weight decay, no sign flip.

    Each block of a parameter has one factor `Q_i` per axis, and the update is `P·m`: `P = QᴴQ`
    along every axis, `m` the bias-corrected momentum. The factors follow a Lie group descent on the
    criterion. It is made of matrix products, and so are the triangular solves of "EQ".

    Args:
      momentum: decay of the moving average of gradients, in [0, 1). `None` or 0: no momentum.
      precond_lr: relative step of the factors, in (0, 1), or a schedule of it.
      geometry: in which geometry Q moves: "EQ" (Q upper triangular), "QEP", "QEQ", "Q0.5EQ1.5", or
        "QUAD" (Q Hermitian).
      criterion: "whiten_momentum" and "whiten_gradient" fit `P = E[ggᴴ]^-½` of the momentum or the
        gradient; "newton" fits `P = |H|⁻¹` and needs `hvp_fn` at every update.
      update_probability: share of the steps at which the factors move, in [0, 1], or a schedule of
        it. Deterministic: they move at the first step, then whenever the shares since have added
        up to one. `None`: `update_probability_schedule()`.
      damping: curvature, in units of the gradient, below which none is believed; ≥ 0.
      init_scale: `Q` starts at this scale times the identity. `None`: at the scale that whitens
        the first nonzero gradient of the block.
      rms_clip: cap of the root mean square of each parameter's update. `None`: no cap.
      max_abs_clip: a parameter's update with a larger entry than this is rescaled as a whole.
        `None`: no cap.
      blocking: how parameters become blocks, and which axes get a diagonal factor.
      cache_preconditioner: keep `P = QᴴQ` in the state between moves of the factors. Steps without
        a move take half the operations, the factors twice the memory.
      factor_dtype: real dtype of the stored factors, float32 by default also for bfloat16 and
        float64 parameters. The arithmetic is at least float32.
      momentum_dtype: dtype of the stored momentum. `None`: that of the parameters.
      precision: of the matrix products, as in `jax.lax.dot_general`.
      seed: an integer or a PRNG key; the noise of the fit is drawn from it.

    Returns:
      A transformation. Its `update(grads, state, params=None, *, hvp_fn=None)` returns updates with
      the structure, shapes and dtypes of the gradients. A gradient that is not finite gives a zero
      update and leaves the state as it was, but for the count of skipped steps. A block whose
      factors would not be finite keeps the last good ones. A block whose gradient is exactly zero
      does not move its factors.

    Raises:
      ValueError: for a setting out of range, at construction, unless it is traced; for a parameter
        that is neither floating-point nor complex, in `init`; in `update`, if `hvp_fn` is missing
        in Newton mode or is no function, or gradients do not match the state.

    Cost, for an m×n parameter with dense factors. State: 2·(m² + n²) + mn numbers; m² + n² + mn
    without the cache. A step: 2·mn·(m + n) operations with the cache, up to twice that without. A
    step at which the factors move: in "EQ" about 11·mn·(m + n) + 2·(m³ + n³), plus one
    Hessian-vector product in Newton mode.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> tx = optax.chain(ok.scale_by_kron_psgd(), optax.scale_by_learning_rate(1e-2))
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)

    Sources: Li (2015), arXiv:1512.04202; Pooladzandi and Li (2024), arXiv:2402.04553; Li (2024),
    arXiv:2402.11858.
    """
    owner = "kron_psgd"
    _settings.check_range(owner, "momentum", momentum, most=1, open_right=True, optional=True)
    _settings.check_range(
        owner, "precond_lr", precond_lr, most=1, open_left=True, open_right=True, schedule=True
    )
    _settings.check_choice(owner, "geometry", geometry, psgd.GEOMETRIES)
    _settings.check_choice(owner, "criterion", criterion, CRITERIA)
    _settings.check_range(
        owner, "update_probability", update_probability, most=1, optional=True, schedule=True
    )
    _settings.check_range(owner, "damping", damping)
    _settings.check_range(owner, "init_scale", init_scale, open_left=True, optional=True)
    _settings.check_range(owner, "rms_clip", rms_clip, open_left=True, optional=True)
    _settings.check_range(owner, "max_abs_clip", max_abs_clip, open_left=True, optional=True)
    _settings.check_blocking(owner, blocking)
    dtype = _settings.real_factor_dtype(owner, factor_dtype)
    _settings.check_dtype(owner, "momentum_dtype", momentum_dtype)
    _settings.check_seed(owner, seed)
    has_momentum = not _settings.is_off(momentum)
    decay = momentum if has_momentum and momentum is not None else 0.0
    newton = criterion == "newton"
    if update_probability is None:
        update_probability = update_probability_schedule()
    fit = kron_stacks.Fit(
        geometry=geometry,
        precond_lr=0.0 if callable(precond_lr) else precond_lr,
        damping=damping,
        newton=newton,
        precision=precision,
        cached=cache_preconditioner,
    )

    def init(params: PyTree) -> Any:
        plan = plan_blocks(params, blocking)
        # Each counter is a buffer of its own, so that the state can be donated.
        counters = ("count", "refreshes", "failed_refreshes", "skipped_steps")
        return ScaleByKronPsgdState(
            **{name: jnp.zeros([], jnp.int32) for name in counters},
            due_share=jnp.zeros([], jnp.float32),
            cached=jnp.zeros([], bool),
            key=_settings.key_data(seed),
            momentum=moving_average.init(plan, momentum_dtype) if has_momentum else None,
            stacks=kron_stacks.init(plan, init_scale, dtype, cached=cache_preconditioner),
        )

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        hvp_fn: Callable[[PyTree], PyTree] | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        del extra_args
        if newton and hvp_fn is None:
            raise ValueError(
                f"{owner}: criterion='newton' needs hvp_fn at every update: pass "
                "hvp_fn=ok.hessian_vector_product(loss_fn, params, *args) to tx.update."
            )
        if newton:
            _settings.check_callable(owner, "hvp_fn", hvp_fn)
        if params is not None:
            _settings.check_like(owner, updates, params)
        plan = plan_blocks(updates, blocking)
        _settings.check_stacks(owner, plan, state.stacks, "blocking")
        if not plan.leaves:
            return updates, state._replace(count=state.count + 1)

        compute = jnp.promote_types(dtype, jnp.float32)
        gradients = plan.split(updates, compute)
        if has_momentum:
            average = moving_average.step(gradients, state.momentum, decay)
            # A gradient that is not finite shows in the average.
            finite = guards.all_finite(average)
            count = state.count + finite.astype(jnp.int32)
            direction = moving_average.correct(average, decay, count, compute)
        else:
            average, direction = None, gradients
            finite = guards.all_finite(gradients)
            count = state.count + finite.astype(jnp.int32)
        moving = fit
        if callable(precond_lr):
            moving = dataclasses.replace(fit, precond_lr=precond_lr(state.count))

        due, due_share = _is_due(update_probability, state)
        due = finite & due
        # Drawn in a branch of its own: as an operand of the next, it is drawn once, not once for
        # every operation that reads it.
        key = jax.random.fold_in(_settings.key_of(state.key), state.refreshes)
        draw = functools.partial(kron_stacks.draw, plan, key, compute, noise=not newton)
        nothing = jnp.zeros(jax.eval_shape(draw).shape, compute)
        drawn = flow.cond(due, draw, lambda: nothing)
        stacks = state.stacks
        if cache_preconditioner:
            stale = finite & ~due & ~state.cached
            stacks = flow.cond(stale, fit.cache, lambda x: x, stacks)

        def refresh(stacks):
            rows, noise = kron_stacks.take_rows(plan, drawn)
            if hvp_fn is not None and newton:
                probe_key = jax.random.fold_in(key, 1)
                fitted, probes = kron_stacks.hessian_probe(
                    plan, probe_key, updates, hvp_fn, compute
                )
            else:
                fitted = gradients if criterion == "whiten_gradient" else direction
                probes = kron_stacks.shape_noise(plan, noise)
            return moving.refresh(plan, stacks, fitted, probes, direction, rows, state.refreshes)

        def keep(stacks):
            return stacks, jnp.zeros([], jnp.int32), fit.precondition(stacks, direction)

        stacks, failed, blocks = flow.cond(due, refresh, keep, stacks)
        blocks = clipping.clip_leaves(plan, blocks, finite, rms_clip, max_abs_clip)
        new_state = ScaleByKronPsgdState(
            count=count,
            due_share=guards.select(finite, due_share, state.due_share),
            refreshes=state.refreshes + due.astype(jnp.int32),
            failed_refreshes=state.failed_refreshes + failed,
            skipped_steps=state.skipped_steps + (~finite).astype(jnp.int32),
            cached=guards.select(finite, ~due, state.cached),
            key=state.key,
            momentum=guards.select(finite, average, state.momentum),
            stacks=stacks,
        )
        return plan.join(blocks, like=updates), new_state

    return _program.transformation(init, update)


def kron_psgd(
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    momentum: ArrayLike | None = 0.9,
    precond_lr: optax.ScalarOrSchedule = 0.1,
    geometry: str = "EQ",
    criterion: str = "whiten_momentum",
    update_probability: optax.ScalarOrSchedule | None = None,
    damping: ArrayLike = 1e-9,
    init_scale: ArrayLike | None = None,
    rms_clip: ArrayLike | None = 1.1,
    max_abs_clip: ArrayLike | None = None,
    weight_decay: ArrayLike = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    blocking: Blocking = _DEFAULT_BLOCKING,
    cache_preconditioner: bool = True,
    factor_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """PSGD-Kron: SGD with momentum and an online-fitted Kronecker-factored preconditioner.

    With a learning rate this is a complete optimizer; without, the bare preconditioner, to chain:
    `optax.chain(ok.kron_psgd(), optax.scale_by_learning_rate(1e-3))` equals `ok.kron_psgd(1e-3)`.
    With the default `rms_clip`, a whitened update has about the size of one of Adam's or less.
    Start from a third of Adam's learning rate, and tune.

    Args:
      learning_rate: a number or a schedule; `None` leaves the updates unscaled and unflipped.
      momentum: see `scale_by_kron_psgd`, as for all arguments up to `max_abs_clip`.
      precond_lr: relative step of the factors.
      geometry: in which geometry the factors move.
      criterion: "whiten_momentum", "whiten_gradient" or "newton".
      update_probability: share of the steps at which the factors move.
      damping: curvature below which none is believed.
      init_scale: initial scale of the preconditioner.
      rms_clip: cap of the root mean square of each parameter's update.
      max_abs_clip: cap of the largest entry of each parameter's update.
      weight_decay: decoupled weight decay, times the learning rate; needs `params` in `update`.
      mask: which parameters decay, as in `optax.add_decayed_weights`. A function needs
        `static_args=("mask",)` under `optax.inject_hyperparams`.
      blocking: how parameters become blocks.
      cache_preconditioner: keep `P` in the state between moves of the factors.
      factor_dtype: real dtype of the stored factors.
      momentum_dtype: dtype of the stored momentum.
      precision: of the matrix products.
      seed: an integer or a PRNG key.

    Returns:
      A gradient transformation; its cost is that of `scale_by_kron_psgd`.

    Raises:
      ValueError: as `scale_by_kron_psgd`, and for a negative learning rate or weight decay, or a
        mask that is a single bool or array.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> loss = lambda params: jnp.sum(jnp.square(params @ jnp.ones((2, 4)) - 1.0))
      >>> params = jnp.zeros((3, 2))
      >>> tx = ok.kron_psgd(optax.cosine_decay_schedule(0.1, 100))
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(100):
      ...     params, state = step(params, state)
      >>> bool(loss(params) < 0.01)
      True

    Sources: Li (2015), arXiv:1512.04202; Pooladzandi and Li (2024), arXiv:2402.04553; Li (2024),
    arXiv:2402.11858.
    """
    _settings.check_range("kron_psgd", "learning_rate", learning_rate, optional=True, schedule=True)
    _settings.check_range("kron_psgd", "weight_decay", weight_decay)
    _settings.check_mask("kron_psgd", mask)
    preconditioner = scale_by_kron_psgd(
        momentum=momentum,
        precond_lr=precond_lr,
        geometry=geometry,
        criterion=criterion,
        update_probability=update_probability,
        damping=damping,
        init_scale=init_scale,
        rms_clip=rms_clip,
        max_abs_clip=max_abs_clip,
        blocking=blocking,
        cache_preconditioner=cache_preconditioner,
        factor_dtype=factor_dtype,
        momentum_dtype=momentum_dtype,
        precision=precision,
        seed=seed,
    )
    return _settings.complete(preconditioner, learning_rate, weight_decay, mask)


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
