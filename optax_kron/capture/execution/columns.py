"""Which cotangents of the marked logits make up the curvature: the estimates of the Fisher."""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from optax_kron.capture.analysis.marks import Mark
from optax_kron.distributions import DISTRIBUTIONS
from optax_kron.kernels import contract

ESTIMATES = ("mc", "exact", "sketch", "empirical", "forward")

# `exact` needs a column for every output of an example: more than this is refused.
MOST_COLUMNS = 4096


def has_classes(mark: Mark) -> bool:
    """Whether the last axis of a mark's logits counts classes, which the losses lack."""
    return DISTRIBUTIONS[mark.name].has_class_axis


def columns(
    fisher: str,
    mark: Mark,
    operands: Sequence[Array],
    weights: Float[Array, "..."],
    key: Array | None,
    samples: int,
    *,
    count: int,
) -> Float[Array, "V ..."]:
    """Cotangents of a mark's logits whose outer products sum to N times its weighted curvature.

    Args:
      fisher: The estimate.
      mark: The marked loss.
      operands: The operands of the mark, with the steps of scans as leading axes.
      weights: Derivative of the loss with respect to each per-example loss.
      key: For random estimates.
      samples: For random estimates.
      count: The number N.

    Returns:
      [V, *logits.shape], at least float32. Those of "exact" belong to one per-example loss at a
      time: `one_by_one` puts them apart.
    """
    distribution = DISTRIBUTIONS[mark.name]
    axis = operands[0].ndim - 1 if has_classes(mark) else None
    if fisher == "exact":
        made = distribution.exact(operands, axis)
    elif fisher == "empirical":
        made = _gradients(mark, operands)[None]
    else:
        assert key is not None
        draw = distribution.sampled if fisher == "mc" else distribution.sketched
        made = draw(key, operands, axis, samples)
    # Columns s with sum s sᵀ = H become those of N w H: the taps of N examples are averaged later.
    scale = jnp.sqrt(count * weights.astype(made.dtype))
    return made * (scale if axis is None else jnp.expand_dims(scale, axis))[None]


def _gradients(mark: Mark, operands: Sequence[Array]) -> Float[Array, "..."]:
    """Derivative of each per-example loss with respect to its logits."""
    gradient = jax.grad(lambda *operands: jnp.sum(mark.evaluate(*operands)))
    return contract.widen(gradient(*operands))


def one_by_one(
    made: Float[Array, "V ..."], mark: Mark, ranks: Int[np.ndarray, " N"]
) -> Float[Array, "V_apart ..."]:
    """A column of its own for every element of an example: their curvatures add, not their columns.

    Of 8 examples with 5 losses each, and 3 classes, the 3 columns of [8, 5, 3] logits become 15: of
    the first three only the losses [:, 0] are not zero.

    Args:
      made: Columns [V, *logits.shape].
      mark: The marked loss.
      ranks: For each of its examples, its number among those that are one example of a layer.

    Returns:
      [V·E·R, *logits.shape], for E losses of an example and ranks below R.
    """
    elements, classes = mark.elements.shape[1], made.shape[0]
    count = elements * (int(ranks.max()) + 1)
    if count == 1:
        return made
    if count * classes > MOST_COLUMNS:
        raise ValueError(
            f"fisher='exact' needs {count * classes} columns, one for each of {count} losses and "
            f"{classes} classes of an example; at most {MOST_COLUMNS} are allowed. Use "
            "fisher='mc' or 'sketch'."
        )
    where = made.ndim - 2 if has_classes(mark) else None
    shape = [n for a, n in enumerate(made.shape[1:]) if a != where]
    # The column of each per-example loss, in the order in which they are recorded.
    numbers = np.empty(mark.elements.size, int)
    numbers[mark.elements] = ranks[:, None] * elements + np.arange(elements)
    apart = numbers.reshape(1, *shape) == jnp.arange(count).reshape(-1, *(1 for _ in shape))
    if where is not None:
        apart = jnp.expand_dims(apart, where + 1)
    made = apart[:, None].astype(made.dtype) * made[None]
    return made.reshape(-1, *made.shape[2:])


def shared_columns(
    counts: Sequence[int], reached: Iterable[frozenset[int]]
) -> list[Int[np.ndarray, " V_of_mark"]]:
    """Which columns of all are those of each mark.

    The curvatures of two marks add, not their columns, so that where both are reached from the same
    inputs each has columns of its own. Others share theirs.

    Args:
      counts: The number of columns of each mark.
      reached: Sets of marks that something reaches together.

    Returns:
      The numbers of the columns of each mark.
    """
    together = list(reached)
    starts, first = [0] * len(counts), 0
    left = sorted(range(len(counts)), key=lambda m: -counts[m])
    while left:
        # The widest that is left, and after it all that are not reached together with one of these.
        chosen: list[int] = []
        for m in left:
            if not any({m, other} <= marks for other in chosen for marks in together):
                chosen.append(m)
                starts[m] = first
        first += counts[chosen[0]]
        left = [m for m in left if m not in chosen]
    return [start + np.arange(count) for start, count in zip(starts, counts, strict=True)]


def spread_out(
    of_marks: Sequence[Float[Array, "V_of_mark ..."]],
    numbers: Sequence[Int[np.ndarray, " V_of_mark"]],
) -> list[Float[Array, "V ..."]]:
    """The columns of each mark among those of all, zero elsewhere.

    Those of [2, ...] and [3, ...] become two of [5, ...], or of [3, ...] if they share columns.
    """
    total = max((int(n[-1]) + 1 for n in numbers if len(n)), default=0)
    return [
        jnp.pad(c, [(int(n[0]), total - 1 - int(n[-1]))] + [(0, 0)] * (c.ndim - 1))
        for c, n in zip(of_marks, numbers, strict=True)
    ]


def chosen(
    x: Float[Array, "V ..."], numbers: Sequence[Int[np.ndarray, " V_of_mark"]]
) -> Float[Array, "V_chosen ..."]:
    """The columns of some marks, in order."""
    kept = np.unique(np.concatenate(numbers))
    if len(kept) == len(x):
        return x
    ends = np.flatnonzero(np.diff(kept) > 1)
    starts, stops = kept[[0, *(ends + 1)]], kept[[*ends, -1]] + 1
    return jnp.concatenate([x[a:b] for a, b in zip(starts, stops, strict=True)])
