"""EKFAC: natural gradient whose curvature is diagonal in the eigenbasis of K-FAC's factors."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_kron.kernels import kfac as kernels
from optax_kron.layers.layer import Layer
from optax_kron.transforms import _settings, ekfac_stacks
from optax_kron.transforms._natural_gradient import natural_gradient

PyTree = Any


def scale_by_ekfac(
    *,
    layers: Iterable[Layer],
    decay: ArrayLike = 0.95,
    bias_correction: bool = True,
    damping: optax.ScalarOrSchedule = 1e-3,
    damping_rule: str = "eigen",
    approx: str = "expand",
    momentum: ArrayLike | None = 0.9,
    factor_every: ArrayLike = 1,
    refresh_every: ArrayLike = 5,
    norm_constraint: ArrayLike | str | None = "auto",
    outlier_clip: ArrayLike | None = 10.0,
    learning_rate: optax.ScalarOrSchedule | None = None,
    fallback: optax.GradientTransformation | None = None,
    factor_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale gradients by EKFAC: no weight decay, no learning rate, no sign flip.

    As `scale_by_kfac`, each layer has factors `A` and `G`. Of these it takes the eigenvectors `Q_a`
    and `Q_g`; the eigenvalues λ [d_in, d_out] are estimated for themselves, at every step, in
    the bases that there are, from the gradient of each datum, summed over its positions and then
    squared. The update of a layer's parameters X [d_in, d_out] is

        Q_a ((Q_aᵀ X Q_g) / (λ + δ)) Q_gᵀ.

    When the bases are made anew, λ is carried over: it becomes the diagonal of the same matrix in
    the new bases.

    Args:
      layers: as for all arguments that are not listed here, see `scale_by_kfac`.
      decay: of the moving averages of the factors and of the eigenvalues, in [0, 1].
      bias_correction: as in `scale_by_kfac`, for both averages.
      damping: δ ≥ 0, or a schedule of it.
      damping_rule: what is added to the eigenvalues. "eigen": δ. "pi": what this rule adds to
        those of `A ⊗ G` in `kfac`, `π√δ·g + √δ/π·a + δ` with a and g those of A and G: much more
        than δ where only one of them is small.
      approx: of the factors whose eigenvectors are taken. The eigenvalues are exact in either case.
      momentum: of the velocity.
      factor_every: as in `scale_by_kfac`; the eigenvalues take in the taps of every step.
      refresh_every: accepted steps from one eigendecomposition to the next, more often while the
        factors are young.
      norm_constraint: a number needs `learning_rate`.
      outlier_clip: also of what is averaged into the eigenvalues.
      learning_rate: for a norm constraint that is a number.
      fallback: the transformation of parameters that belong to no layer.
      factor_dtype: real dtype of the stored factors, bases and eigenvalues.
      momentum_dtype: dtype of the stored momentum.
      precision: of the matrix products.

    Returns:
      A transformation, whose `update` takes `taps` as that of `scale_by_kfac` does, and guards
      against what is not finite in the same way; a block whose eigenvalues would not be finite
      keeps the last ones. Taps may not be second moments (`reduce=True`).

    Raises:
      ValueError: as `scale_by_kfac`, and in `update` for second moments.

    Cost, for a layer as in `scale_by_kfac`. State: 2·(d_in² + d_out²) + 2·d_in·d_out numbers; a
    diagonal factor has unit vectors for its basis, and 2·d numbers. A step:
    4·d_in·d_out·(d_in + d_out) operations, and for the eigenvalues 2·N·S·(d_in² + V·d_out²) and
    2·N·d_in·d_out where S = 1, else 2·V·N·S·d_in·d_out. Taking in taps: as there. A refresh: about
    9·(d_in³ + d_out³), by LAPACK on a CPU, and 2·d_in·d_out·(d_in + d_out).

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> tx = ok.scale_by_ekfac(layers=[ok.Layer("dense", kernel="kernel")])
      >>> state = tx.init(params)
      >>> inputs, residuals = jnp.eye(5, 3), jnp.ones((5, 2))
      >>> grads = {"kernel": inputs.T @ residuals / 5}
      >>> taps = ok.Taps({"dense": ok.Tap(inputs, residuals)})
      >>> updates, state = tx.update(grads, state, params, taps=taps)

    Source: George et al. (2018), arXiv:1806.03884.
    """
    owner = "ekfac"
    _settings.check_choice(owner, "damping_rule", damping_rule, ("eigen", "pi"))
    _settings.check_choice(owner, "approx", approx, kernels.APPROXIMATIONS)
    return natural_gradient(
        owner,
        ekfac_stacks.Curvature(owner, damping_rule, approx, precision, outlier_clip),
        layers=layers,
        decay=decay,
        bias_correction=bias_correction,
        damping=damping,
        momentum=momentum,
        factor_every=factor_every,
        refresh_every=refresh_every,
        norm_constraint=norm_constraint,
        outlier_clip=outlier_clip,
        learning_rate=learning_rate,
        fallback=fallback,
        factor_dtype=factor_dtype,
        momentum_dtype=momentum_dtype,
    )


def ekfac(
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    layers: Iterable[Layer],
    decay: ArrayLike = 0.95,
    bias_correction: bool = True,
    damping: optax.ScalarOrSchedule = 1e-3,
    damping_rule: str = "eigen",
    approx: str = "expand",
    momentum: ArrayLike | None = 0.9,
    factor_every: ArrayLike = 1,
    refresh_every: ArrayLike = 5,
    norm_constraint: ArrayLike | str | None = "auto",
    outlier_clip: ArrayLike | None = 10.0,
    weight_decay: ArrayLike | None = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    fallback: optax.GradientTransformation | None = None,
    factor_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """EKFAC: natural gradient descent with eigenvalues of their own in K-FAC's eigenbasis.

    With a learning rate this is a complete optimizer; without, the bare preconditioner, to chain:
    `optax.chain(ok.ekfac(layers=layers), optax.scale_by_learning_rate(1e-3))` equals
    `ok.ekfac(1e-3, layers=layers)`. Every update needs `taps`.

    Args:
      learning_rate: a number or a schedule; `None` leaves the updates unscaled and unflipped.
      layers: see `scale_by_ekfac`, as for all arguments up to `norm_constraint`.
      decay: of the moving averages.
      bias_correction: whether the first taps count for no more in them than later ones.
      damping: δ, a number or a schedule.
      damping_rule: "eigen" or "pi", how it is added to the eigenvalues.
      approx: "expand" or "reduce", of the factors whose eigenvectors are taken.
      momentum: of the velocity.
      factor_every: steps from one update of the factors to the next.
      refresh_every: steps from one eigendecomposition to the next, once the factors have settled.
      norm_constraint: bound of the squared length of a step in the metric of the curvature; needs a
        learning rate.
      outlier_clip: how many times its usual norm what a block gets may be long.
      weight_decay: decoupled weight decay, times the learning rate; needs `params` in `update`.
      mask: which parameters decay, as in `optax.add_decayed_weights`.
      fallback: the transformation of parameters that belong to no layer; `None`: their gradients,
        with the same momentum. The learning rate comes after it.
      factor_dtype: real dtype of the stored factors, bases and eigenvalues.
      momentum_dtype: dtype of the stored momentum.
      precision: of the matrix products.

    Returns:
      A gradient transformation; its cost is that of `scale_by_ekfac`.

    Raises:
      ValueError: as `scale_by_ekfac`, and for a negative learning rate or weight decay.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> def loss_fn(w, x, y):
      ...     return jnp.mean(ok.losses.softmax_cross_entropy_with_integer_labels(x @ w, y))
      >>> x, y = jax.random.normal(jax.random.key(0), (20, 4)), jnp.arange(20) % 3
      >>> params = jnp.zeros((4, 3))
      >>> layers = ok.find_layers(loss_fn, params, x, y)
      >>> with_taps = ok.value_and_grad_with_taps(loss_fn, layers, fisher="exact")
      >>> tx = ok.ekfac(0.5, layers=layers, momentum=None, norm_constraint=None)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     loss, grads, taps = with_taps(params, x, y)
      ...     updates, state = tx.update(grads, state, params, taps=taps)
      ...     return optax.apply_updates(params, updates), state, grads
      >>> for _ in range(30):
      ...     params, state, grads = step(params, state)
      >>> bool(jnp.max(jnp.abs(grads)) < 0.01)
      True

    Source: George et al. (2018), arXiv:1806.03884.
    """
    _settings.check_range("ekfac", "learning_rate", learning_rate, optional=True, schedule=True)
    _settings.check_range("ekfac", "weight_decay", weight_decay, optional=True)
    _settings.check_mask("ekfac", mask)
    preconditioner = scale_by_ekfac(
        layers=layers,
        decay=decay,
        bias_correction=bias_correction,
        damping=damping,
        damping_rule=damping_rule,
        approx=approx,
        momentum=momentum,
        factor_every=factor_every,
        refresh_every=refresh_every,
        norm_constraint=norm_constraint,
        outlier_clip=outlier_clip,
        learning_rate=learning_rate,
        fallback=fallback,
        factor_dtype=factor_dtype,
        momentum_dtype=momentum_dtype,
        precision=precision,
    )
    return _settings.complete(preconditioner, learning_rate, weight_decay, mask)
