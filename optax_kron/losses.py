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

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

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
    logits = _floating(function, "logits", logits)
    labels = _as_targets(labels, logits)
    axes = _class_axes(function, axis, logits.ndim)
    shape = _stretched(logits.shape, labels.shape)
    if shape is None or any(shape[a] != logits.shape[a] for a in axes):
        raise _shape_error(function, "labels", labels.shape, logits.shape)
    operands = [logits, labels, *_mask(function, where, axes, logits.shape)]
    operands = [_classes_last(jnp.broadcast_to(x, shape), axes) for x in operands]
    return _softmax(*_align(*operands))


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
    logits, labels = _floating(function, "logits", logits), jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{function}: labels has dtype {labels.dtype}, expected an integer one.")
    if axis is None:
        raise ValueError(f"{function}: axis is None, expected an integer or a tuple of them.")
    axes = _class_axes(function, axis, logits.ndim)
    operands = [logits, *_mask(function, where, axes, logits.shape)]
    logits, *mask = (_classes_last(x, axes) for x in operands)
    batch = _stretched(logits.shape[:-1], labels.shape)
    if batch is None or labels.ndim != logits.ndim - 1:
        raise _shape_error(function, "labels", labels.shape, logits.shape[:-1])
    labels = jnp.broadcast_to(labels, batch)
    operands = [jnp.broadcast_to(x, (*batch, x.shape[-1])) for x in (logits, *mask)]
    logits, *mask = _align(*operands, beside=labels[..., None])
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
    logits = _floating(function, "logits", logits)
    labels = jnp.asarray(labels)
    shape = _stretched(logits.shape, labels.shape)
    if shape is None:
        raise _shape_error(function, "labels", labels.shape, logits.shape)
    operands = _align(jnp.broadcast_to(logits, shape), jnp.broadcast_to(labels, shape))
    return _sigmoid(*operands)


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
    return _squared_error(*_pair("squared_error", "predictions", predictions, targets))


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
    return _l2(*_pair("l2_loss", "predictions", predictions, targets))


def gaussian_negative_log_likelihood(
    predictions: ArrayLike, targets: ArrayLike, variance: ArrayLike = 1.0
) -> Array:
    """Negative log likelihood of targets under normal distributions, element by element.

    The curvature is that of the predictions alone, also where the variance is a prediction.

    Args:
      predictions: Means, floating-point [...].
      targets: [...], the same shape.
      variance: Positive, of a shape that broadcasts to that of the predictions.

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
    return _gaussian(*_with_variance(function, predictions, targets, variance))


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
    return _poisson(*_pair(function, "log_rates", log_rates, targets))


def normal(
    predictions: ArrayLike, targets: ArrayLike | None = None, variance: ArrayLike = 1.0
) -> Array:
    """Squared distance to targets in units of a variance; without targets, its curvature alone.

    Without targets, value and gradient are zero, and the curvature `Re(Jᴴ J) / variance`, with the
    Jacobian J of the predictions, joins that of the loss. Of complex numbers each part is normal.

    Args:
      predictions: Floating-point or complex [...].
      targets: [...], the same shape; by default the predictions themselves.
      variance: Positive, of a shape that broadcasts to that of the predictions.

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
    return _half_square(*_with_variance("normal", predictions, targets, variance))


def log_psi(log_psi: ArrayLike) -> Array:
    """Zero, marked with the curvature of a wave function ψ: the metric of its parameters θ.

    The mean over samples of `|ψ|²` has the curvature `E[Re(O* Oᵀ)]`, with `O = ∂ log ψ / ∂θ`: the
    real part of the quantum geometric tensor, the matrix of stochastic reconfiguration, before
    `Re(E[O]* E[O]ᵀ)` is taken off. Add it to a loss that has the gradient of the energy.

    Args:
      log_psi: `log |ψ|` of real, or `log ψ` of complex wave functions, [...], one for each sample.

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
    return normal(log_psi)


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


# ---------------------------------------------------------------------------------- their operands


@jax.jit
def _align(*operands: Array, beside: Array | None = None) -> list[Array]:
    """Arrays of one shape, unchanged, but with the same axes of `vmap`, which come first.

    Else a mark under `vmap` could have logits [C, B] and targets [B, C] or [C], as the axes of a
    batch are wherever, and only where, the program made them. Without `vmap` it costs nothing.
    Axes of an array `beside` them, which broadcasts to their shape, are joined in.
    """
    # `vmap(loss, (1, 0))` of logits [3, 8] and targets [8, 3] must not leave both as they are.
    # `vmap` puts its axis first when an array gains an axis, and where it joins different arrays.
    joined = operands if beside is None else (*operands, beside)
    # Each gains an axis and loses it; all are joined in one array, of zeros, that each then joins.
    joined = [jax.lax.squeeze(jnp.expand_dims(x, 0), (0,)) for x in joined]
    false = jnp.logical_and(functools.reduce(jnp.logical_or, (x != x for x in joined)), False)
    # Adding leaves nothing to remember for the gradient, as selecting would.
    aligned = joined[: len(operands)]
    return [x | false if x.dtype == bool else x + false.astype(x.dtype) for x in aligned]


def _floating(function: str, argument: str, value: ArrayLike) -> Array:
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"{function}: {argument} has dtype {value.dtype}, expected a floating-point one."
        )
    return value


def _as_targets(value: ArrayLike, logits: Array) -> Array:
    """An array of the dtype to which JAX promotes it beside the logits."""
    return jnp.asarray(value, jnp.result_type(value, logits))


def _pair(function: str, name: str, predictions: ArrayLike, targets: ArrayLike) -> list[Array]:
    """Aligned predictions and targets of one shape."""
    predictions = _floating(function, name, predictions)
    targets = _as_targets(targets, predictions)
    if targets.shape != predictions.shape:
        raise _shape_error(function, "targets", targets.shape, predictions.shape)
    return _align(predictions, targets)


def _with_variance(
    function: str, predictions: ArrayLike, targets: ArrayLike, variance: ArrayLike
) -> list[Array]:
    """Aligned predictions, targets and variances of one shape."""
    predictions = _floating(function, "predictions", predictions)
    targets, variance = _as_targets(targets, predictions), _as_targets(variance, predictions)
    if targets.shape != predictions.shape:
        raise _shape_error(function, "targets", targets.shape, predictions.shape)
    if _stretched(predictions.shape, variance.shape) != predictions.shape:
        raise _shape_error(function, "variance", variance.shape, predictions.shape)
    return _align(predictions, targets, jnp.broadcast_to(variance, predictions.shape))


def _mask(
    function: str, where: ArrayLike | None, axes: Sequence[int], shape: tuple[int, ...]
) -> list[Array]:
    """The mask in the shape of the logits, if there is one."""
    if where is None:
        return []
    where = given = jnp.asarray(where, bool)
    if where.ndim == len(shape) - len(axes):
        where = jnp.expand_dims(where, axes)
    if where.ndim != len(shape) or _stretched(shape, where.shape) != shape:
        expected = f"{shape}, with or without the axis of the classes"
        raise _shape_error(function, "where", given.shape, expected)
    return [jnp.broadcast_to(where, shape)]


def _class_axes(function: str, axis: int | tuple[int, ...] | None, ndim: int) -> tuple[int, ...]:
    """The axes of the classes, counted from the end, where `vmap` adds none."""
    axes = tuple(range(ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    counted = tuple(a if a < 0 else a - ndim for a in axes)
    if len(set(counted)) < len(axes) or not all(-ndim <= a < 0 for a in counted):
        raise ValueError(
            f"{function}: axis is {axis}, expected different axes of logits with {ndim} dimensions."
        )
    return counted


def _classes_last(x: Array, axes: Sequence[int]) -> Array:
    """Flatten the axes of the classes into one, the last."""
    batch = x.ndim - len(axes)
    x = jnp.moveaxis(x, axes, range(batch, x.ndim))
    return x.reshape((*x.shape[:batch], math.prod(x.shape[batch:])))


def _stretched(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape to which two broadcast, or `None`."""
    try:
        return jnp.broadcast_shapes(first, second)
    except ValueError:
        return None


def _shape_error(
    function: str, argument: str, shape: tuple[int, ...], expected: object
) -> ValueError:
    return ValueError(f"{function}: {argument} has shape {shape}, expected {expected}.")
