"""Shampoo: gradients preconditioned by inverse roots of their second moments along each axis."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_kron.blocking import Blocking
from optax_kron.kernels import roots
from optax_kron.transforms import _settings, shampoo_stacks
from optax_kron.transforms._blockwise import blockwise
from optax_kron.transforms._rota import check_rota

PyTree = Any

_DEFAULT_BLOCKING = Blocking(block_size=1024, max_cut=8192)


def scale_by_shampoo(
    *,
    momentum: ArrayLike | None = 0.9,
    decay: ArrayLike | None = 0.95,
    bias_correction: bool = True,
    root_order: int | None = None,
    root_method: str = "eigh",
    epsilon: ArrayLike = 1e-6,
    refresh_every: ArrayLike = 10,
    stagger: bool = False,
    start_step: ArrayLike = 1,
    grafting: str | None = "adam",
    graft_decay: ArrayLike = 0.95,
    graft_epsilon: ArrayLike = 1e-8,
    outlier_clip: ArrayLike | None = 10.0,
    blocking: Blocking = _DEFAULT_BLOCKING,
    factor_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale gradients by Shampoo: no learning rate, no weight decay, no sign flip.

    Each block of a parameter has one statistic per axis, the second moment of its gradients along
    it, `S_i ← β S_i + (1 − β) C_i(G)` with `C_i(G) = unfold_i(G) unfold_i(G)ᴴ`. The update is the
    momentum with `(S_i + ε λ_max I)^(-1/p)` applied along every axis.

    Args:
      momentum: decay of the bias-corrected moving average of gradients that is preconditioned, in
        [0, 1). `None` or 0: the gradient itself.
      decay: β of the statistics, in [0, 1). `None`: they are sums, as in the original.
      bias_correction: whether averaged statistics are divided by `1 − βᵗ`.
      root_order: p, an int ≥ 1. `None`: twice the number of axes longer than one. Axes of length
        one have no root beside longer ones.
      root_method: "eigh", an eigendecomposition, the faster on a CPU; or "newton", a coupled Newton
        iteration made of matrix products.
      epsilon: ε, what is added to the eigenvalues relative to the largest; ≥ 0. It counts as no
        less than eight roundings of the factors, 1e-6 in float32: what lies below is noise. With
        "newton" the least is 1e-12.
      refresh_every: steps from one computation of the roots to the next: it comes before the
        updates of its multiples, and before the first with a gradient other than zero. Roots of
        diagonal statistics are made anew at every step.
      stagger: deal the blocks out to the steps between two refreshes, so that each step computes
        the roots of some blocks, and none but the first those of all. `refresh_every` must then be
        a number.
      start_step: before this step the update is that of the grafted optimizer, or the momentum.
      grafting: whose update gives each block its length: "sgd" (the momentum itself), "adagrad",
        "rmsprop", "adam"; `None`: Shampoo's own.
      graft_decay: of the grafted optimizer's second moment, in [0, 1), unless "adagrad" or "sgd".
      graft_epsilon: what it adds to the root of the second moment.
      outlier_clip: a block whose gradient is more than so many times as long as it usually is, is
        scaled down to that before anything is made of it; ≥ 1. The usual norm is a running mean.
        `None`: no bound.
      blocking: how parameters become blocks, and which axes get a diagonal statistic. By default
        axes longer than 1024 are cut, and those longer than 8192, as of vocabularies, get a
        diagonal one instead: `ok.Blocking(block_size=1024, max_cut=8192)`.
      factor_dtype: real dtype of statistics and roots, float32 by default also for bfloat16 and
        float64 parameters. The arithmetic is at least float32.
      momentum_dtype: dtype of the stored momentum. `None`: that of the parameters.
      precision: of the matrix products, but for those of the roots, which take the highest.

    Returns:
      A transformation. Its updates have the structure, shapes and dtypes of the gradients. A
      gradient that is not finite gives a zero update and leaves the state as it was, but for the
      count of skipped steps. A root that is not finite, or whose p-th power times the statistic is
      not near the identity, is dropped: its block keeps the roots that it had, of dense statistics
      or of diagonal ones, and `failed_refreshes` counts it.

    Raises:
      ValueError: for a setting out of range, at construction, unless it is traced; for a parameter
        that is neither floating-point nor complex, in `init`; in `update`, if gradients do not
        match the state.

    Cost, for an m×n parameter with dense statistics. State: 2·(m² + n²) + mn numbers, and mn more
    with grafting other than "sgd" or `None`. A step: 4·mn·(m + n) operations. A refresh: about
    20·(m³ + n³), on CPUs and CUDA in float64, by LAPACK on a CPU one matrix after the other.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> tx = optax.chain(ok.scale_by_shampoo(), optax.scale_by_learning_rate(1e-2))
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)

    Sources: Gupta et al. (2018), arXiv:1802.09568; Anil et al. (2020), arXiv:2002.09018; Shi et al.
    (2023), arXiv:2309.06497.
    """
    owner = "shampoo"
    _settings.check_range(owner, "decay", decay, most=1, open_right=True, optional=True)
    order = _settings.whole_number(root_order)
    if root_order is not None and (order is None or order < 1):
        raise ValueError(
            f"{owner}: root_order must be an int ≥ 1 or None; got {root_order!r}. It cannot be "
            'traced: with optax.inject_hyperparams, pass static_args=("root_order",).'
        )
    _settings.check_choice(owner, "root_method", root_method, roots.METHODS)
    _settings.check_range(owner, "epsilon", epsilon)
    _settings.check_range(owner, "start_step", start_step)
    _settings.check_choice(owner, "grafting", grafting, shampoo_stacks.GRAFTS, optional=True)
    _settings.check_range(owner, "graft_decay", graft_decay, most=1, open_right=True)
    _settings.check_range(owner, "graft_epsilon", graft_epsilon)
    method = shampoo_stacks.Shampoo(
        decay=decay,
        bias_correction=bias_correction,
        root_order=order,
        root_method=root_method,
        epsilon=epsilon,
        rota=check_rota(owner, refresh_every, stagger),
        start_step=start_step,
        grafting=grafting,
        graft_decay=graft_decay,
        graft_epsilon=graft_epsilon,
        precision=precision,
    )
    return blockwise(
        owner,
        method,
        momentum=momentum,
        momentum_dtype=momentum_dtype,
        outlier_clip=outlier_clip,
        blocking=blocking,
        factor_dtype=factor_dtype,
    )


def shampoo(
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    momentum: ArrayLike | None = 0.9,
    decay: ArrayLike | None = 0.95,
    bias_correction: bool = True,
    root_order: int | None = None,
    root_method: str = "eigh",
    epsilon: ArrayLike = 1e-6,
    refresh_every: ArrayLike = 10,
    stagger: bool = False,
    start_step: ArrayLike = 1,
    grafting: str | None = "adam",
    graft_decay: ArrayLike = 0.95,
    graft_epsilon: ArrayLike = 1e-8,
    weight_decay: ArrayLike | None = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    outlier_clip: ArrayLike | None = 10.0,
    blocking: Blocking = _DEFAULT_BLOCKING,
    factor_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Shampoo: gradients preconditioned by inverse roots of their second moments along each axis.

    With a learning rate this is a complete optimizer; without, the bare preconditioner, to chain:
    `optax.chain(ok.shampoo(), optax.scale_by_learning_rate(1e-3))` equals `ok.shampoo(1e-3)`.

    Args:
      learning_rate: a number or a schedule; `None` leaves the updates unscaled and unflipped.
      momentum: see `scale_by_shampoo`, as for all arguments that are not listed here.
      decay: of the statistics; `None`: sums.
      bias_correction: of averaged statistics.
      root_order: p of the inverse p-th root.
      root_method: "eigh" or "newton".
      epsilon: damping, relative to the largest eigenvalue.
      refresh_every: steps from one computation of the roots to the next.
      stagger: deal the blocks out to the steps between.
      start_step: when preconditioning begins.
      grafting: "sgd", "adagrad", "rmsprop", "adam" or `None`.
      graft_decay: of the grafted second moment.
      graft_epsilon: of the grafted optimizer.
      weight_decay: decoupled weight decay, times the learning rate; needs `params` in `update`.
      mask: which parameters decay, as in `optax.add_decayed_weights`.
      outlier_clip: how many times its usual norm a block's gradient may be long.
      blocking: how parameters become blocks.
      factor_dtype: real dtype of statistics and roots.
      momentum_dtype: dtype of the stored momentum.
      precision: of the matrix products.

    Returns:
      A gradient transformation; its cost is that of `scale_by_shampoo`.

    Raises:
      ValueError: as `scale_by_shampoo`, and for a negative learning rate or weight decay.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> tx = ok.shampoo(0.1, refresh_every=5)
      >>> A = jnp.array([[3.0, 1.0], [1.0, 2.0]])
      >>> def loss_fn(x):
      ...     return jnp.sum((A @ x - 1) ** 2)
      >>> params = jnp.zeros((2, 3))
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(100):
      ...     params, state = step(params, state)
      >>> bool(loss_fn(params) < 0.05)
      True

    Sources: Gupta et al. (2018), arXiv:1802.09568; Anil et al. (2020), arXiv:2002.09018.
    """
    _settings.check_range("shampoo", "learning_rate", learning_rate, optional=True, schedule=True)
    _settings.check_range("shampoo", "weight_decay", weight_decay, optional=True)
    _settings.check_mask("shampoo", mask)
    preconditioner = scale_by_shampoo(
        momentum=momentum,
        decay=decay,
        bias_correction=bias_correction,
        root_order=root_order,
        root_method=root_method,
        epsilon=epsilon,
        refresh_every=refresh_every,
        stagger=stagger,
        start_step=start_step,
        grafting=grafting,
        graft_decay=graft_decay,
        graft_epsilon=graft_epsilon,
        outlier_clip=outlier_clip,
        blocking=blocking,
        factor_dtype=factor_dtype,
        momentum_dtype=momentum_dtype,
        precision=precision,
    )
    return _settings.complete(preconditioner, learning_rate, weight_decay, mask)
