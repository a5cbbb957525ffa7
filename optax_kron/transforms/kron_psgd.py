"""PSGD-Kron: preconditioned SGD whose preconditioner is a Kronecker product, fitted online."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from optax_kron.blocking import Blocking
from optax_kron.kernels import psgd
from optax_kron.transforms import _program, _settings, kron_stacks, outliers
from optax_kron.transforms.kron_steps import CRITERIA, KronPsgd, ScaleByKronPsgdState

__all__ = [
    "ScaleByKronPsgdState",
    "kron_psgd",
    "scale_by_kron_psgd",
    "update_probability_schedule",
]

PyTree = Any

_DEFAULT_BLOCKING = Blocking()


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
    precond_lr: optax.ScalarOrSchedule = 0.3,
    geometry: str = "EQ",
    criterion: str = "whiten_momentum",
    update_probability: optax.ScalarOrSchedule | None = None,
    damping: ArrayLike = 1e-9,
    init_scale: ArrayLike | None = None,
    rms_clip: ArrayLike | None = 1.1,
    max_abs_clip: ArrayLike | None = None,
    outlier_clip: ArrayLike | None = 10.0,
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
      momentum: decay of the moving average of gradients, in [0, 1). `None` or 0: no momentum;
        of 0 the state keeps its place.
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
      outlier_clip: a block whose gradient, or Hessian-vector product, is more than so many times as
        long as it usually is, is scaled down to that before anything is made of it; ≥ 1. The usual
        norm is a running mean. `None`: no bound.
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
    outliers.check(owner, outlier_clip)
    _settings.check_blocking(owner, blocking)
    dtype = _settings.real_factor_dtype(owner, factor_dtype)
    _settings.check_dtype(owner, "momentum_dtype", momentum_dtype)
    _settings.check_seed(owner, seed)
    if update_probability is None:
        update_probability = update_probability_schedule()
    made = KronPsgd(
        owner=owner,
        fit=kron_stacks.Fit(
            geometry=geometry,
            precond_lr=precond_lr,
            damping=damping,
            newton=criterion == "newton",
            precision=precision,
            cached=bool(cache_preconditioner),
            given_scale=init_scale is not None,
        ),
        criterion=criterion,
        update_probability=update_probability,
        momentum=momentum,
        momentum_dtype=momentum_dtype,
        init_scale=init_scale,
        rms_clip=rms_clip,
        max_abs_clip=max_abs_clip,
        outlier_clip=outlier_clip,
        blocking=blocking,
        factor_dtype=dtype,
        seed=seed,
    )
    return _program.transformation(made.init, made.update)


def kron_psgd(
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    momentum: ArrayLike | None = 0.9,
    precond_lr: optax.ScalarOrSchedule = 0.3,
    geometry: str = "EQ",
    criterion: str = "whiten_momentum",
    update_probability: optax.ScalarOrSchedule | None = None,
    damping: ArrayLike = 1e-9,
    init_scale: ArrayLike | None = None,
    rms_clip: ArrayLike | None = 1.1,
    max_abs_clip: ArrayLike | None = None,
    outlier_clip: ArrayLike | None = 10.0,
    weight_decay: ArrayLike | None = 0.0,
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
      outlier_clip: how many times its usual norm a block's gradient may be long.
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
    _settings.check_range("kron_psgd", "weight_decay", weight_decay, optional=True)
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
        outlier_clip=outlier_clip,
        blocking=blocking,
        cache_preconditioner=cache_preconditioner,
        factor_dtype=factor_dtype,
        momentum_dtype=momentum_dtype,
        precision=precision,
        seed=seed,
    )
    return _settings.complete(preconditioner, learning_rate, weight_decay, mask)
