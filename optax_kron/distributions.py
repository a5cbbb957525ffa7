"""Distributions of targets given logits, and square roots of their curvature.

The curvature of a negative log likelihood with respect to its logits is a Hessian H. Estimates of
the Fisher information need it as columns s_v with `Σ_v s_v s_vᵀ = H`, exactly or in expectation.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from optax_kron.kernels import categorical, contract, explicit

# What the names of marked losses begin with; the rest is the name of a distribution.
MARK_PREFIX = "optax_kron_loss_"

Operands = Sequence[Array]
Columns = Float[Array, "V ..."]  # [V, *logits.shape]
Root = Callable[[Columns, Operands, int], Columns]
Score = Callable[[Array, Operands, int, tuple[int, ...]], Columns]


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Square roots of the Hessian of a marked loss with respect to its logits.

    The Hessian of ONE loss, with respect to the logits that it reads, is `H = Σ_v s_v s_vᵀ`. Each
    method returns columns s_v of all losses side by side, [V, *logits.shape], in the dtype of the
    logits or float32, whichever is wider. `operands` are those of the mark; `axis` is the axis of
    the classes in the logits, and is ignored where there is none.

    Attributes:
      name: The name of the mark.
      has_class_axis: Whether a loss reads all logits along an axis, or else a single one.
      root: `root(noise, operands, axis)` maps noise [V, *logits.shape] linearly, by R: `R Rᵀ = H`.
      score: `score(key, operands, axis, shape)` draws [samples, *logits.shape] gradients of the
        loss with respect to the logits, of targets from the distribution.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_kron import distributions
      >>> distribution = distributions.DISTRIBUTIONS["optax_kron_loss_categorical"]
      >>> operands = (jnp.zeros((1, 2)), jnp.array([0]))
      >>> print(distribution.exact(operands, -1)[:, 0].round(4))
      [[ 0.3536 -0.3536]
       [-0.3536  0.3536]]

    Source: Martens (2020), New insights and perspectives on the natural gradient method,
    arXiv:1412.1193.
    """

    name: str
    has_class_axis: bool
    root: Root
    score: Score

    def exact(self, operands: Operands, axis: int | None) -> Columns:
        """All columns: V = C, the number of classes, or V = 1.

        Of logits [8, 5, 3] with classes along the last axis: 3 columns [8, 5, 3], R e_1 to R e_3.
        """
        logits = contract.widen(operands[0])
        if self.has_class_axis:
            along = _from_end(axis, logits)
            basis = jnp.eye(logits.shape[along], dtype=logits.dtype)
            basis = jnp.expand_dims(basis, [a for a in range(-logits.ndim, 0) if a != along])
            return self.root(basis, operands, along)
        return self.root(jnp.ones((1, *logits.shape), logits.dtype), operands, -1)

    def sampled(self, key: Array, operands: Operands, axis: int | None, samples: int) -> Columns:
        """Random columns, V = samples, whose `Σ s sᵀ` has the mean H: scores / √samples."""
        shape = (samples, *operands[0].shape)
        return self.score(key, operands, _from_end(axis, operands[0]), shape) / math.sqrt(samples)

    def sketched(self, key: Array, operands: Operands, axis: int | None, samples: int) -> Columns:
        """Random columns, V = samples, as `sampled`: random signs of the exact ones, summed."""
        shape = (samples, *operands[0].shape)
        signs = jax.random.rademacher(key, shape, contract.widen(operands[0]).dtype)
        return self.root(signs, operands, _from_end(axis, operands[0])) / math.sqrt(samples)


def _from_end(axis: int | None, x: Array) -> int:
    # So counted it is an axis of columns too, whose first axis is their own. Distributions of
    # single logits ignore it.
    return -1 if axis is None else axis if axis < 0 else axis - x.ndim


def _per_column(x: Array) -> Array:
    """An array that all columns share, [1, ...]; a scalar as it is."""
    return x[None] if x.ndim else x


def _softmax_parts(operands: Operands, axis: int) -> tuple[Array, Array]:
    """The probabilities, and the root of the sum of the labels."""
    logits, labels, *where = operands
    (where,) = where or (jnp.array(True),)
    logits = jnp.where(where, contract.widen(logits), jnp.finfo(contract.widen(logits).dtype).min)
    probabilities = jnp.where(where, jax.nn.softmax(logits, axis), 0)
    if labels.ndim < logits.ndim:
        return probabilities, jnp.ones((), logits.dtype)
    total = jnp.sum(labels.astype(logits.dtype), axis, keepdims=True, where=where)
    return probabilities, jnp.sqrt(jnp.maximum(total, 0))


def _categorical_root(noise: Columns, operands: Operands, axis: int) -> Columns:
    # With s = sqrt(p), diag(p) - p pᵀ = R Rᵀ for R = diag(s) - p sᵀ, as sᵀs = 1.
    probabilities, scale = map(_per_column, _softmax_parts(operands, axis))
    weighted = jnp.sqrt(probabilities) * noise
    return scale * (weighted - probabilities * jnp.sum(weighted, axis, keepdims=True))


def _categorical_score(
    key: Array, operands: Operands, axis: int, shape: tuple[int, ...]
) -> Columns:
    probabilities, scale = _softmax_parts(operands, axis)
    last = jnp.moveaxis(probabilities, axis, -1)
    placed = jax.sharding.PartitionSpec(None, *explicit.spec_of(last)[: last.ndim - 1])
    draw = functools.partial(categorical.draw, samples=shape[0])
    labels = explicit.untyped(draw, key, last, out=placed)
    drawn = jax.nn.one_hot(labels, shape[axis], axis=axis, dtype=probabilities.dtype)
    probabilities = _per_column(probabilities)
    # Where no class counts, what was drawn does not either.
    return _per_column(scale) * (probabilities - jnp.where(probabilities > 0, drawn, 0))


def _elementwise(
    name: str, slope: Callable[[Operands], ArrayLike], score: Score | None = None
) -> Distribution:
    """A distribution with `H = slope²`; its score is normal by default."""

    def root(noise: Columns, operands: Operands, axis: int) -> Columns:
        del axis
        return noise * _per_column(jnp.asarray(slope(operands), noise.dtype))

    def normal(key: Array, operands: Operands, axis: int, shape: tuple[int, ...]) -> Columns:
        noise = jax.random.normal(key, shape, contract.widen(operands[0]).dtype)
        return root(noise, operands, axis)

    return Distribution(MARK_PREFIX + name, False, root, score or normal)


def _bernoulli_slope(operands: Operands) -> Array:
    logits = contract.widen(operands[0])
    return jnp.sqrt(jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits))


def _bernoulli_score(key: Array, operands: Operands, axis: int, shape: tuple[int, ...]) -> Columns:
    del axis
    probability = jax.nn.sigmoid(contract.widen(operands[0]))[None]
    drawn = jax.random.bernoulli(key, jnp.broadcast_to(probability, shape), shape)
    return probability - drawn.astype(probability.dtype)


def _poisson_slope(operands: Operands) -> Array:
    return jnp.exp(contract.widen(operands[0]) / 2)


def _poisson_score(key: Array, operands: Operands, axis: int, shape: tuple[int, ...]) -> Columns:
    del axis
    slope = jnp.broadcast_to(_poisson_slope(operands)[None], shape)
    rate, large = jnp.square(slope), 2.0**20  # above, counts may overflow, and are normal
    counts = jax.random.poisson(key, jnp.minimum(rate, large), shape)
    normal = jax.random.normal(key, shape, rate.dtype)
    return jnp.where(rate < large, rate - counts.astype(rate.dtype), slope * normal)


DISTRIBUTIONS: Mapping[str, Distribution] = {
    distribution.name: distribution
    for distribution in (
        Distribution(MARK_PREFIX + "categorical", True, _categorical_root, _categorical_score),
        _elementwise("bernoulli", _bernoulli_slope, _bernoulli_score),
        _elementwise("squared_error", lambda operands: math.sqrt(2)),
        _elementwise("l2", lambda operands: 1.0),
        _elementwise("gaussian", lambda operands: jax.lax.rsqrt(contract.widen(operands[2]))),
        _elementwise("poisson", _poisson_slope, _poisson_score),
    )
}
