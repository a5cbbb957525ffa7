"""Caps on the size of each parameter's update, computed on stacks of its blocks."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from optax_kron.blocking import BlockPlan
from optax_kron.kernels import contract


def clip_leaves(
    plan: BlockPlan,
    stacks: Mapping[str, Array],
    valid: Array,
    rms_clip: ArrayLike | None,
    max_abs_clip: ArrayLike | None,
) -> dict[str, Array]:
    """Scale the update of each parameter so that it keeps to the caps.

    Args:
      plan: how the blocks belong to parameters.
      stacks: blocks of updates [N, ...] by signature, zero in the padding.
      valid: whether there is to be an update at all, bool [].
      rms_clip: cap on the root mean square over each parameter; `None`: none.
      max_abs_clip: cap on the largest magnitude in each parameter; `None`: none.

    Returns:
      Stacks like the input. A parameter whose update is not finite gets zeros; all do unless
      `valid`.
    """
    return {
        label: _clip_stack(plan, label, stack, valid, rms_clip, max_abs_clip)
        for label, stack in stacks.items()
    }


def _clip_stack(plan, label, stack, valid, rms_clip, max_abs_clip):
    members = [leaf for _, leaf in plan.members(label)]
    owners = np.repeat(np.arange(len(members)), [leaf.count for leaf in members])
    elements = np.array([max(np.prod(leaf.shape), 1) for leaf in members])
    axes = tuple(range(1, stack.ndim))
    real = contract.real_dtype(stack.dtype)
    tiny = jnp.finfo(real).tiny

    magnitude = jnp.abs(stack)
    largest = _per_leaf(jnp.max(magnitude, axis=axes), owners, "max")
    scale = jnp.ones_like(largest)
    if rms_clip is not None:
        # Relative to the largest entry, squares neither overflow nor vanish.
        unit = jnp.maximum(largest, tiny)
        relative = magnitude / contract.along_axis(unit[owners], 0, stack.ndim)
        squares = _per_leaf(jnp.sum(jnp.square(relative), axis=axes), owners, "sum")
        rms = unit * jnp.sqrt(squares / elements.astype(real))
        scale = jnp.minimum(scale, rms_clip / rms)
    if max_abs_clip is not None:
        scale = jnp.minimum(scale, max_abs_clip / jnp.maximum(largest, tiny))
    scale = contract.along_axis(scale.astype(real)[owners], 0, stack.ndim)
    kept = contract.along_axis((valid & jnp.isfinite(largest))[owners], 0, stack.ndim)
    return jnp.where(kept, stack * scale, 0)


def _per_leaf(values: Array, owners: np.ndarray, reduction: str) -> Array:
    """Reduce values [N] of blocks to one per leaf."""
    leaves = int(owners[-1]) + 1
    if leaves == len(owners):
        return values
    reduced = jnp.zeros(leaves, values.dtype).at[owners]
    return reduced.max(values) if reduction == "max" else reduced.add(values)
