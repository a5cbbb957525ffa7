"""Loss functions of Optax, marked with the distribution that each of them implies.

A loss is a negative log likelihood, and its curvature belongs to the distribution of the targets.
To let capture find both, each function evaluates its loss in a jitted function whose name is
`optax_kron_loss_` and the distribution: a *mark*, visible in every jaxpr. Its operands are arrays

    logits [..., C] or [...], targets, and what else the loss needs;

its only output is the loss of each example, [...]. Logits and losses agree in all axes but that of
the classes, which is last; operands but integer labels have the shape of the logits. `vmap` keeps
all of this: its axes come first, and every operand but integer labels gets those of all the others.

Values and gradients are those of Optax. Shapes that do not fit raise a `ValueError`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from optax_kron import operands
from optax_kron.distributions import MARK_PREFIX

# ------------------------------------------------------------------------------------------ losses


def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | tuple[int, ...] | None = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Cross entropy between the softmax of logits and given distributions.

    Args:
      logits: Floating-point [..., C].
      labels: Probabilities [..., C]; they need not sum to one.
      axis: The axis of the classes; several, or `None` for all, count as one.
      where: The entries that count, [...] or [..., C]. Others have probability zero.

    Returns:
      `-Σ_c labels_c log p_c`, [...].

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> print(ok.losses.softmax_cross_entropy(jnp.zeros((2, 4)), jnp.eye(4)[:2]).round(4))
      [1.3863 1.3863]

    Source: `optax.losses.softmax_cross_entropy`.
    """
    function = "softmax_cross_entropy"
    logits = operands.floating(function, "logits", logits)
    labels = operands.as_targets(labels, logits)
    axes = operands.class_axes(function, axis, logits.ndim)
    shape = operands.stretched(logits.shape, labels.shape)
    if shape is None or any(shape[a] != logits.shape[a] for a in axes):
        raise operands.shape_error(function, "labels", labels.shape, logits.shape)
    arrays = [logits, labels, *operands.where_mask(function, where, axes, logits.shape)]
    arrays = [operands.classes_last(jnp.broadcast_to(x, shape), axes) for x in arrays]
    return _softmax(*operands.align(*arrays))


def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Cross entropy between the softmax of logits and classes.

    Args:
      logits: Floating-point [..., C].
      labels: Integers [...]. Negative ones count from the end; the loss of others outside of the
        range is NaN.
      axis: The axis of the classes; several count as one, with row-major labels.
      where: The entries that count, [...] or [..., C]. Others have probability zero.

    Returns:
      `-log p_label`, [...].

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> labels = jnp.array([0, 3])
      >>> loss = ok.losses.softmax_cross_entropy_with_integer_labels(jnp.zeros((2, 4)), labels)
      >>> print(loss.round(4))
      [1.3863 1.3863]

    Source: `optax.losses.softmax_cross_entropy_with_integer_labels`.
    """
    function = "softmax_cross_entropy_with_integer_labels"
    logits, labels = operands.floating(function, "logits", logits), jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{function}: labels has dtype {labels.dtype}, expected an integer one.")
    if axis is None:
        raise ValueError(f"{function}: axis is None, expected an integer or a tuple of them.")
    axes = operands.class_axes(function, axis, logits.ndim)
    arrays = [logits, *operands.where_mask(function, where, axes, logits.shape)]
    logits, *mask = (operands.classes_last(x, axes) for x in arrays)
    batch = operands.stretched(logits.shape[:-1], labels.shape)
    if batch is None or labels.ndim != logits.ndim - 1:
        raise operands.shape_error(function, "labels", labels.shape, logits.shape[:-1])
    labels = jnp.broadcast_to(labels, batch)
    arrays = [jnp.broadcast_to(x, (*batch, x.shape[-1])) for x in (logits, *mask)]
    logits, *mask = operands.align(*arrays, beside=labels[..., None])
    return _softmax_integer(logits, labels, *mask)


def sigmoid_binary_cross_entropy(logits: ArrayLike, labels: ArrayLike) -> Array:
    """Cross entropy between the sigmoid of logits and labels, element by element.

    Args:
      logits: Floating-point [...].
      labels: Zeros and ones or probabilities, of a shape that broadcasts with that of the logits.

    Returns:
      `-labels log p - (1 - labels) log(1 - p)`, [...].

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> print(ok.losses.sigmoid_binary_cross_entropy(jnp.zeros(2), jnp.array([0, 1])).round(4))
      [0.6931 0.6931]

    Source: `optax.losses.sigmoid_binary_cross_entropy`.
    """
    function = "sigmoid_binary_cross_entropy"
    logits = operands.floating(function, "logits", logits)
    labels = jnp.asarray(labels)
    shape = operands.stretched(logits.shape, labels.shape)
    if shape is None:
        raise operands.shape_error(function, "labels", labels.shape, logits.shape)
    arrays = operands.align(jnp.broadcast_to(logits, shape), jnp.broadcast_to(labels, shape))
    return _sigmoid(*arrays)


def squared_error(predictions: ArrayLike, targets: ArrayLike | None = None) -> Array:
    """Squared error, element by element.

    Args:
      predictions: Floating-point [...].
      targets: [...], the same shape; zeros by default.

    Returns:
      `(predictions - targets)²`, [...].

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> print(ok.losses.squared_error(jnp.array([1.0, 2.0]), jnp.array([0.0, 5.0])))
      [1. 9.]

    Source: `optax.losses.squared_error`.
    """
    targets = jnp.zeros_like(predictions) if targets is None else targets
    return _squared_error(*operands.pair("squared_error", "predictions", predictions, targets))


def l2_loss(predictions: ArrayLike, targets: ArrayLike | None = None) -> Array:
    """Half of the squared error, element by element.

    Args:
      predictions: Floating-point [...].
      targets: [...], the same shape; zeros by default.

    Returns:
      `(predictions - targets)² / 2`, [...].

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> print(ok.losses.l2_loss(jnp.array([1.0, 2.0]), jnp.array([0.0, 5.0])))
      [0.5 4.5]

    Source: `optax.losses.l2_loss`.
    """
    targets = jnp.zeros_like(predictions) if targets is None else targets
    return _l2(*operands.pair("l2_loss", "predictions", predictions, targets))


def gaussian_negative_log_likelihood(
    predictions: ArrayLike, targets: ArrayLike, variance: ArrayLike = 1.0
) -> Array:
    """Negative log likelihood of targets under normal distributions, element by element.

    The curvature is that of the predictions alone, also where the variance is a prediction.

    Args:
      predictions: Means, floating-point [...].
      targets: [...], the same shape.
      variance: Real and positive, of a shape that broadcasts to that of the predictions. One that
        is traced is not checked; if it is not positive, losses or curvatures are not finite.

    Returns:
      `(predictions - targets)² / (2 variance) + log(2π variance) / 2`, [...].

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> mean, x = jnp.array([0.0, 1.0]), jnp.array([0.0, 3.0])
      >>> print(ok.losses.gaussian_negative_log_likelihood(mean, x, variance=4.0).round(4))
      [1.6121 2.1121]

    Source: Bishop (2006), Pattern Recognition and Machine Learning, section 1.2.4.
    """
    function = "gaussian_negative_log_likelihood"
    return _gaussian(*operands.with_variance(function, predictions, targets, variance))


def poisson_negative_log_likelihood(log_rates: ArrayLike, targets: ArrayLike) -> Array:
    """Negative log likelihood of counts under Poisson distributions, element by element.

    Args:
      log_rates: Logarithms of the expected counts, floating-point [...].
      targets: Counts [...], the same shape.

    Returns:
      `exp(log_rates) - targets log_rates + log(targets!)`, [...].

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> print(ok.losses.poisson_negative_log_likelihood(jnp.zeros(2), jnp.array([0, 2])).round(4))
      [1.     1.6931]

    Source: Bishop (2006), Pattern Recognition and Machine Learning, appendix B.
    """
    function = "poisson_negative_log_likelihood"
    return _poisson(*operands.pair(function, "log_rates", log_rates, targets))


def normal(
    predictions: ArrayLike, targets: ArrayLike | None = None, variance: ArrayLike = 1.0
) -> Array:
    """Squared distance to targets in units of a variance; without targets, its curvature alone.

    Without targets, value and gradient are zero, and the curvature `Re(Jᴴ J) / variance`, with the
    Jacobian J of the predictions, joins that of the loss. Of complex numbers each part is normal.

    Args:
      predictions: Floating-point or complex [...].
      targets: [...], the same shape; by default the predictions themselves.
      variance: Real and positive, as in `gaussian_negative_log_likelihood`.

    Returns:
      `|predictions - targets|² / (2 variance)`, real [...].

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> print(ok.losses.normal(jnp.array([3.0 + 4.0j, 2.0j]), jnp.zeros(2), variance=0.5))
      [25.  4.]

    Source: Martens (2020), arXiv:1412.1193.
    """
    predictions = jnp.asarray(predictions)
    targets = jax.lax.stop_gradient(predictions) if targets is None else jnp.asarray(targets)
    if jnp.iscomplexobj(predictions) or jnp.iscomplexobj(targets):
        # Re(Jᴴ J) is the curvature of two real numbers.
        real = normal(predictions.real, targets.real, variance)
        return real + normal(predictions.imag, targets.imag, variance)
    return _half_square(*operands.with_variance("normal", predictions, targets, variance))


def log_psi(log_psi: ArrayLike) -> Array:
    """Zero, marked with the curvature of a wave function ψ: the metric of its parameters θ.

    The mean over samples of `|ψ|²` has the curvature `E[Re(O* Oᵀ)]`, with `O = ∂ log ψ / ∂θ`: the
    real part of the quantum geometric tensor, the matrix of stochastic reconfiguration, before
    `Re(E[O]* E[O]ᵀ)` is taken off. Add it to a loss that has the gradient of the energy.

    Args:
      log_psi: `log |ψ|` of real, or `log ψ` of complex wave functions, [...], one for each sample.
        One where ψ is zero, `-inf`, is no sample of `|ψ|²`: it adds nothing to the curvature.

    Returns:
      Zeros, real [...], with gradient zero: `normal(log_psi)`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> x = jnp.array([1.0, 2.0])
      >>> product = ok.ggn_vector_product(lambda w: ok.losses.log_psi(1j * w * x).mean(), 3.0)
      >>> print(product(1.0))
      2.5

    Sources: Sorella (1998), cond-mat/9803107; Stokes et al. (2020), Quantum natural gradient,
    arXiv:1909.02108; Pfau et al. (2020), arXiv:1909.02487, for K-FAC.
    """
    log_psi = jnp.asarray(log_psi)
    return normal(jnp.where(log_psi.real == -jnp.inf, 0, log_psi))


# ------------------------------------------------------------------------------------------- marks


def _mark(distribution: str, loss: Callable[..., ArrayLike], *extras: str) -> Callable[..., Array]:
    """A loss of logits, targets and perhaps `extras`, jitted under the name of its mark.

    What differentiates it sees the same mark of the same operands beside a derivative that bears no
    mark: transformed calls keep their names, but are no losses.
    """

    def plain(*operands: Array) -> ArrayLike:
        return loss(*operands[:2], **dict(zip(extras, operands[2:], strict=False)))

    # The mark is seen in the jaxpr by its name alone: a function for each distribution.
    def named(*operands: Array) -> ArrayLike:
        return plain(*operands)

    named.__name__ = MARK_PREFIX + distribution
    mark = jax.custom_jvp(jax.jit(named))

    @mark.defjvp
    def differentiate(primals, tangents):
        return mark(*primals), jax.jvp(jax.jit(plain), primals, tangents)[1]

    return mark


def _gaussian_loss(predictions: Array, targets: Array, variance: Array) -> Array:
    errors = jnp.square(predictions - targets) / variance
    return 0.5 * (errors + jnp.log(variance) + math.log(2 * math.pi))


def _half_squared_loss(predictions: Array, targets: Array, variance: Array) -> Array:
    return 0.5 * jnp.square(predictions - targets) / variance


def _poisson_loss(log_rates: Array, targets: Array) -> Array:
    return jnp.exp(log_rates) - targets * log_rates + jax.lax.lgamma(targets + 1)


_softmax = _mark("categorical", optax.losses.softmax_cross_entropy, "where")
_softmax_integer = _mark(
    "categorical", optax.losses.softmax_cross_entropy_with_integer_labels, "where"
)
_sigmoid = _mark("bernoulli", optax.losses.sigmoid_binary_cross_entropy)
_squared_error = _mark("squared_error", optax.losses.squared_error)
_l2 = _mark("l2", optax.losses.l2_loss)
_gaussian = _mark("gaussian", _gaussian_loss, "variance")
_half_square = _mark("gaussian", _half_squared_loss, "variance")
_poisson = _mark("poisson", _poisson_loss)
