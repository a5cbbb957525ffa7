"""Which cotangents of the marked logits make up the curvature: the estimates of the Fisher."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optax_kron.capture.marks import Mark
from optax_kron.distributions import DISTRIBUTIONS
from optax_kron.kernels import contract

ESTIMATES = ("mc", "exact", "sketch", "empirical", "forward")

# `exact` needs a column for every output of a datum: more than this is refused.
MOST_COLUMNS = 4096


def has_classes(mark: Mark) -> bool:
    """Whether the last axis of a mark's logits counts classes, which the losses lack."""
    return DISTRIBUTIONS[mark.name].has_class_axis


def columns(
    fisher: str, mark: Mark, operands: Sequence[Array], weights: Array, key: Any, samples: int
) -> Array:
    """Cotangents of a mark's logits whose outer products sum to N times its weighted curvature.

    Args:
      fisher: the estimate.
      mark: the marked loss.
      operands: of the mark, with the steps of scans as leading axes.
      weights: derivative of the loss with respect to each per-example loss.
      key: for random estimates.
      samples: for random estimates.

    Returns:
      [V, *logits.shape], at least float32.
    """
    distribution = DISTRIBUTIONS[mark.name]
    where = operands[0].ndim - 1 if has_classes(mark) else None
    if fisher == "mc":
        made = distribution.sampled(key, operands, where, samples)
    elif fisher == "sketch":
        made = distribution.sketched(key, operands, where, samples)
    elif fisher == "exact":
        made = distribution.exact(operands, where)
    else:
        made = _gradients(mark, operands)[None]
    scale = jnp.sqrt(len(mark.data) * weights.astype(made.dtype))
    made = made * (scale if where is None else jnp.expand_dims(scale, where))[None]
    if fisher == "exact":
        return _apart(made, mark, weights.shape, where)
    return made


def _gradients(mark, operands):
    """Derivative of each per-example loss with respect to its logits."""
    gradient = jax.grad(lambda *operands: jnp.sum(mark.evaluate(*operands)))
    return contract.widen(gradient(*operands))


def _apart(made, mark, shape, where):
    """A column of its own for every element of a datum: their curvatures add, not their columns."""
    elements = mark.data.shape[1]
    if elements == 1:
        return made
    total = elements * made.shape[0]
    if total > MOST_COLUMNS:
        raise ValueError(
            f"fisher='exact' needs {total} columns, one for each of {elements} losses and "
            f"{made.shape[0]} classes of a datum; at most {MOST_COLUMNS} are allowed. Use "
            "fisher='mc' or 'sketch'."
        )
    numbers = np.empty(mark.data.size, int)
    numbers[mark.data] = np.arange(elements)
    apart = numbers.reshape(1, *shape) == jnp.arange(elements).reshape(-1, *(1 for _ in shape))
    if where is not None:
        apart = jnp.expand_dims(apart, where + 1)
    return (apart[:, None].astype(made.dtype) * made[None]).reshape(total, *made.shape[1:])
