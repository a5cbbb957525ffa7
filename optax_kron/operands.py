"""What marked losses are functions of: arrays of shapes that fit, from what a user passes."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike


@jax.jit
def align(*operands: Array, beside: Array | None = None) -> list[Array]:
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


def floating(function: str, argument: str, value: ArrayLike) -> Array:
    """An array; raises unless it is floating-point."""
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"{function}: {argument} has dtype {value.dtype}, expected a floating-point one."
        )
    return value


def as_targets(value: ArrayLike, logits: Array) -> Array:
    """An array of the dtype to which JAX promotes it beside the logits."""
    return jnp.asarray(value, jnp.result_type(value, logits))


def pair(function: str, name: str, predictions: ArrayLike, targets: ArrayLike) -> list[Array]:
    """Aligned predictions and targets of one shape."""
    predictions = floating(function, name, predictions)
    targets = as_targets(targets, predictions)
    if targets.shape != predictions.shape:
        raise shape_error(function, "targets", targets.shape, predictions.shape)
    return align(predictions, targets)


def with_variance(
    function: str, predictions: ArrayLike, targets: ArrayLike, variance: ArrayLike
) -> list[Array]:
    """Aligned predictions, targets and variances of one shape."""
    _check_positive(function, variance)
    predictions = floating(function, "predictions", predictions)
    targets, variance = as_targets(targets, predictions), as_targets(variance, predictions)
    if targets.shape != predictions.shape:
        raise shape_error(function, "targets", targets.shape, predictions.shape)
    if stretched(predictions.shape, variance.shape) != predictions.shape:
        raise shape_error(function, "variance", variance.shape, predictions.shape)
    return align(predictions, targets, jnp.broadcast_to(variance, predictions.shape))


def _check_positive(function: str, variance: ArrayLike) -> None:
    """Raise for variances that are complex, or known not to be positive."""
    if jnp.iscomplexobj(variance):
        raise TypeError(
            f"{function}: variance has dtype {jnp.result_type(variance)}, expected a real one. "
            "Both parts of a complex number have the same."
        )
    is_known = not isinstance(variance, jax.core.Tracer)
    if is_known and getattr(variance, "is_fully_addressable", True):
        values = np.asarray(variance)
        if not np.all(values > 0):
            found = values[~(values > 0)].flat[0]
            raise ValueError(f"{function}: variance is {found}, expected positive numbers.")


def where_mask(
    function: str, where: ArrayLike | None, axes: Sequence[int], shape: tuple[int, ...]
) -> list[Array]:
    """The mask in the shape of the logits, if there is one."""
    if where is None:
        return []
    where = given = jnp.asarray(where, bool)
    if where.ndim == len(shape) - len(axes):
        where = jnp.expand_dims(where, axes)
    if where.ndim != len(shape) or stretched(shape, where.shape) != shape:
        expected = f"{shape}, with or without the axis of the classes"
        raise shape_error(function, "where", given.shape, expected)
    return [jnp.broadcast_to(where, shape)]


def class_axes(function: str, axis: int | tuple[int, ...] | None, ndim: int) -> tuple[int, ...]:
    """The axes of the classes, counted from the end, where `vmap` adds none."""
    axes = tuple(range(ndim)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    counted = tuple(a if a < 0 else a - ndim for a in axes)
    if len(set(counted)) < len(axes) or not all(-ndim <= a < 0 for a in counted):
        raise ValueError(
            f"{function}: axis is {axis}, expected different axes of logits with {ndim} dimensions."
        )
    return counted


def classes_last(x: Array, axes: Sequence[int]) -> Array:
    """Flatten the axes of the classes into one, the last."""
    batch = x.ndim - len(axes)
    x = jnp.moveaxis(x, axes, range(batch, x.ndim))
    return x.reshape((*x.shape[:batch], math.prod(x.shape[batch:])))


def stretched(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape to which two broadcast, or `None`."""
    try:
        return jnp.broadcast_shapes(first, second)
    except ValueError:
        return None


def shape_error(
    function: str, argument: str, shape: tuple[int, ...], expected: object
) -> ValueError:
    """What to raise for an argument of a shape that does not fit."""
    return ValueError(f"{function}: {argument} has shape {shape}, expected {expected}.")
