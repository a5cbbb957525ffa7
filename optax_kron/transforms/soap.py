"""SOAP: Adam in the eigenbasis of Shampoo's statistics; and its variants KL-Shampoo and KL-SOAP."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_kron.blocking import Blocking
from optax_kron.transforms import _settings, soap_stacks
from optax_kron.transforms._blockwise import blockwise
from optax_kron.transforms._rota import check_rota

PyTree = Any

_DEFAULT_BLOCKING = Blocking()


def scale_by_soap(
    *,
    variant: str = "soap",
    momentum: ArrayLike | None = 0.95,
    decay: ArrayLike = 0.95,
    factor_decay: ArrayLike = 0.95,
    epsilon: ArrayLike = 1e-8,
    floor: ArrayLike = 1e-6,
    basis: str = "qr",
    refresh_every: ArrayLike = 10,
    stagger: bool = False,
    outlier_clip: ArrayLike | None = 10.0,
    blocking: Blocking = _DEFAULT_BLOCKING,
    factor_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale gradients by SOAP or a variant: no learning rate, no weight decay, no sign flip.

    Each block of a parameter has one statistic `S_i` per axis with a dense factor, a moving
    average, and a basis `Q_i` that follows its eigenvectors. Gradient and momentum are rotated into
    the bases, Adam is run there, and its update is rotated back. Along axes with a diagonal factor
    nothing is rotated; a parameter without dense factors, such as a vector, gets Adam (but with
    "kl_shampoo", which has none).

    Args:
      variant: "soap": `S_i` averages `unfold_i(G) unfold_i(G)ᴴ`. "kl_soap": that of the gradient
        whitened along the other axes, in the mean over those. "kl_shampoo": with the same
        statistics, the momentum whitened by `S_i^-½` along every axis, without Adam.
      momentum: decay of the bias-corrected moving average of gradients, in [0, 1). It is kept in
        the parameters' own coordinates. `None` or 0: the gradient itself.
      decay: of Adam's second moment, in [0, 1); not for "kl_shampoo".
      factor_decay: of the statistics, in [0, 1).
      epsilon: what Adam adds to the root of its second moment.
      floor: of the eigenvalues that are inverted, relative to the largest; KL variants only.
      basis: "qr", one power iteration at every refresh; or "eigh", an eigendecomposition. The first
        basis is always one of the latter.
      refresh_every: steps from one refresh of the bases to the next: they come after the updates of
        its multiples. The first bases come before the first update.
      stagger: deal the blocks out to the steps between two refreshes, so that each step refreshes
        some blocks, and none but the first all. `refresh_every` must then be a number.
      outlier_clip: a block whose gradient is more than so many times as long as it usually is, is
        scaled down to that before anything is made of it; ≥ 1. The usual norm is a running mean.
        `None`: no bound.
      blocking: how parameters become blocks, and which axes get a diagonal factor. The one-sided
        variant is `ok.Blocking(dense_axes=1)`; merged axes are `ok.Blocking(merge_below=...)`.
      factor_dtype: real dtype of statistics and bases, float32 by default also for bfloat16 and
        float64 parameters. The arithmetic is at least float32.
      momentum_dtype: dtype of the stored momentum. `None`: that of the parameters.
      precision: of the matrix products.

    Returns:
      A transformation. Its updates have the structure, shapes and dtypes of the gradients. Unlike
      the original it takes a step at the first gradient too, in the basis that it gives. A gradient
      that is not finite gives a zero update and leaves the state as it was, but for the count of
      skipped steps. A block whose bases would not be finite keeps the last ones. When columns of a
      basis change places, so does the second moment that is kept along them. Where the second
      moment is no more than rounding of the rotation, or at a block's first gradient than 1e-3 of
      its root mean square, the update is zero.

    Raises:
      ValueError: for a setting out of range, at construction, unless it is traced; for a parameter
        that is neither floating-point nor complex, in `init`; in `update`, if gradients do not
        match the state.

    Cost, for an m×n parameter with dense factors. State: 2·(m² + n²) + 2·mn numbers, without the
    second moment of mn for "kl_shampoo". A step: 8·mn·(m + n) operations for "soap", 12·mn·(m + n)
    for "kl_soap", 10·mn·(m + n) for "kl_shampoo". A refresh: 2·(m³ + n³) and two QR decompositions,
    of about 8/3·d³, by LAPACK on a CPU; 2·(m³ + n³) more for the KL variants.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> tx = optax.chain(ok.scale_by_soap(), optax.scale_by_learning_rate(3e-3))
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)

    Sources: Vyas et al. (2024), arXiv:2409.11321; for the KL variants, Lin et al. (2025),
    arXiv:2509.03378.
    """
    owner = "soap"
    _settings.check_choice(owner, "variant", variant, soap_stacks.VARIANTS)
    _settings.check_range(owner, "decay", decay, most=1, open_right=True)
    _settings.check_range(owner, "factor_decay", factor_decay, most=1, open_right=True)
    _settings.check_range(owner, "epsilon", epsilon)
    _settings.check_range(owner, "floor", floor, most=1)
    _settings.check_choice(owner, "basis", basis, soap_stacks.BASES)
    method = soap_stacks.Soap(
        variant=variant,
        decay=decay,
        factor_decay=factor_decay,
        epsilon=epsilon,
        floor=floor,
        basis=basis,
        rota=check_rota(owner, refresh_every, stagger),
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


def soap(
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    variant: str = "soap",
    momentum: ArrayLike | None = 0.95,
    decay: ArrayLike = 0.95,
    factor_decay: ArrayLike = 0.95,
    epsilon: ArrayLike = 1e-8,
    floor: ArrayLike = 1e-6,
    basis: str = "qr",
    refresh_every: ArrayLike = 10,
    stagger: bool = False,
    weight_decay: ArrayLike | None = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    outlier_clip: ArrayLike | None = 10.0,
    blocking: Blocking = _DEFAULT_BLOCKING,
    factor_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """SOAP: Adam in the eigenbasis of Shampoo's statistics.

    With a learning rate (3e-3 in the paper) this is a complete optimizer; without, the bare
    preconditioner, to chain: `optax.chain(ok.soap(), optax.scale_by_learning_rate(3e-3))` equals
    `ok.soap(3e-3)`.

    Args:
      learning_rate: a number or a schedule; `None` leaves the updates unscaled and unflipped.
      variant: "soap", "kl_shampoo" or "kl_soap"; see `scale_by_soap`, as for all arguments that
        are not listed here.
      momentum: decay of the moving average of gradients.
      decay: of Adam's second moment.
      factor_decay: of the statistics.
      epsilon: of Adam.
      floor: of inverted eigenvalues, relative to the largest; KL variants only.
      basis: "qr" or "eigh".
      refresh_every: steps from one refresh of the bases to the next.
      stagger: deal the blocks out to the steps between.
      weight_decay: decoupled weight decay, times the learning rate; needs `params` in `update`.
      mask: which parameters decay, as in `optax.add_decayed_weights`.
      outlier_clip: how many times its usual norm a block's gradient may be long.
      blocking: how parameters become blocks.
      factor_dtype: real dtype of statistics and bases.
      momentum_dtype: dtype of the stored momentum.
      precision: of the matrix products.

    Returns:
      A gradient transformation; its cost is that of `scale_by_soap`.

    Raises:
      ValueError: as `scale_by_soap`, and for a negative learning rate or weight decay.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> tx = ok.soap(0.03)
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

    Sources: Vyas et al. (2024), arXiv:2409.11321; Lin et al. (2025), arXiv:2509.03378.
    """
    _settings.check_range("soap", "learning_rate", learning_rate, optional=True, schedule=True)
    _settings.check_range("soap", "weight_decay", weight_decay, optional=True)
    _settings.check_mask("soap", mask)
    preconditioner = scale_by_soap(
        variant=variant,
        momentum=momentum,
        decay=decay,
        factor_decay=factor_decay,
        epsilon=epsilon,
        floor=floor,
        basis=basis,
        refresh_every=refresh_every,
        stagger=stagger,
        outlier_clip=outlier_clip,
        blocking=blocking,
        factor_dtype=factor_dtype,
        momentum_dtype=momentum_dtype,
        precision=precision,
    )
    return _settings.complete(preconditioner, learning_rate, weight_decay, mask)
