"""Blocks of parameters: their momentum, and caps on the size of each parameter's update."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool

from optax_kron.blocking import Blocking, BlockPlan, plan_blocks
from optax_kron.kernels import contract
from optax_kron.transforms import exchange, program, storage, validation
from optax_kron.transforms.exchange import Route
from optax_kron.transforms.frame import Frame
from optax_kron.transforms.layout import After, Before, Layout
from optax_kron.transforms.mesh import Share
from optax_kron.transforms.preconditioner import Advanced, Blocks, KronState
from optax_kron.transforms.stacks import (
    all_finite,
    ema_weight,
    for_each_stack,
    largest_of_blocks,
    squares_fit,
)
from optax_kron.types import PyTree


@program.settings
@dataclasses.dataclass(frozen=True)
class Blockwise(Layout):
    """Gradients as stacks of blocks, averaged before they are preconditioned.

    Attributes:
      blocking: How parameters become blocks.
      momentum: Decay of the moving average of gradients, or `None`.
      momentum_dtype: Dtype of that; `None` for that of the parameters.
      rms_clip: Cap of the root mean square of each parameter's update, or `None`.
      max_abs_clip: Cap of the largest entry of each parameter's update, or `None`.
    """

    blocking: Blocking
    momentum: ArrayLike | None
    momentum_dtype: DTypeLike | None
    rms_clip: ArrayLike | None = None
    max_abs_clip: ArrayLike | None = None

    source: ClassVar[str] = "blocking"

    def plan(self, owner: str, tree: PyTree, multiple: int) -> BlockPlan:
        """See `Layout`."""
        del owner
        return plan_blocks(tree, self.blocking, multiple)

    def sizes(self, plan: BlockPlan, label: str) -> tuple[np.ndarray, ...] | None:
        """See `Layout`."""
        return plan.sizes(label)

    def init(self, plan: BlockPlan, params: PyTree) -> Mapping[str, PyTree]:
        """See `Layout`: the momentum is zero.

        There is one for a decay of zero too, as the structure of a state does not depend on values.
        """
        del params

        def zeros(label):
            signature, dtype = plan.stacks[label], self.momentum_dtype
            own = jnp.result_type(*(leaf.dtype for _, leaf in plan.members(label)))
            if dtype is not None:
                own = contract.complex_like(dtype, signature.is_complex)
            return jnp.zeros((plan.count(label), *signature.shape), own)

        momentum = None if self.momentum is None else for_each_stack(plan, zeros)
        return {"momentum": momentum, "layers": None}

    def split(self, plan: BlockPlan, updates: PyTree, dtype: jnp.dtype) -> Blocks:
        """See `Layout`."""
        return plan.split(updates, dtype)

    def routes(self, plan: BlockPlan, share: Share, updates: PyTree) -> Mapping[str, Route]:
        """See `Layout`."""
        return exchange.routes(plan, share, updates)

    def cut(self, plan: BlockPlan, share: Share, updates: PyTree, dtype: jnp.dtype) -> Blocks:
        """See `Layout`."""
        return exchange.split(plan, share, updates, dtype)

    def before(
        self,
        plan: BlockPlan,
        frame: Frame,
        given: Blocks,
        state: KronState,
        finite: Bool[Array, ""],
    ) -> Before:
        """See `Layout`: the momentum `m ← βm + (1 − β)g`, and `m / (1 − βᵗ)` as the direction."""
        compute, share = frame.compute_dtype, frame.share
        limited = frame.limit(given, state, "gradients")
        gradients, decay = limited.blocks, self.momentum
        average = stored = None
        if decay is not None:

            def move(m, g):
                return decay * m.astype(g.dtype) + (1 - decay) * g

            average = jax.tree.map(move, limited.rescaled(state.momentum), gradients)
            drawn = frame.random_bits(state)
            stored = {
                label: storage.store(m, state.momentum[label], drawn, f"momentum {label}", share)
                for label, m in average.items()
            }
        # A gradient that is not finite shows in the average, and in its squares if those are kept.
        shown = gradients if stored is None and not frame.method.keeps_squares else stored
        finite = all_finite(shown)
        if frame.method.keeps_squares:
            finite &= _squares_fit(given)
        finite = share.all(finite)
        direction = gradients
        if decay is not None and average is not None and not validation.is_off(decay):
            count = state.count + finite.astype(jnp.int32)
            divisor = ema_weight(decay, count, compute)
            direction = {
                label: m.astype(contract.complex_like(compute, jnp.iscomplexobj(m))) / divisor
                for label, m in average.items()
            }
        return Before(given, limited, direction, finite, stored)

    def bound(self, plan: BlockPlan, frame: Frame, before: Before, updates: Blocks) -> Blocks:
        """See `Layout`: the updates of each parameter keep to the caps."""
        caps = self.rms_clip, self.max_abs_clip
        return clip_leaves(plan, frame.share, updates, before.finite, *caps)

    def after(
        self,
        plan: BlockPlan,
        frame: Frame,
        updates: PyTree,
        state: KronState,
        extra: PyTree,
        before: Before,
        advanced: Advanced,
        rest: Mapping[str, Array],
        others: Mapping[str, Array],
    ) -> After:
        """See `Layout`."""
        del state, extra, rest, others
        stacks = frame.share.gathered(advanced.updates)
        joined = plan.only(stacks).join(stacks, like=updates)
        return After(joined, before.momentum, before.finite)


def blockwise(
    owner: str,
    blocking: Blocking,
    momentum: ArrayLike | None,
    momentum_dtype: DTypeLike | None,
    rms_clip: ArrayLike | None = None,
    max_abs_clip: ArrayLike | None = None,
) -> Blockwise:
    """The layout, with its settings checked."""
    if not isinstance(blocking, Blocking):
        raise ValueError(f"{owner}: blocking must be an ok.Blocking; got {blocking!r}.")
    check = functools.partial(validation.check_range, owner)
    check("momentum", momentum, most=1, open_right=True, optional=True)
    validation.check_dtype(owner, "momentum_dtype", momentum_dtype)
    check("rms_clip", rms_clip, open_left=True, optional=True)
    check("max_abs_clip", max_abs_clip, open_left=True, optional=True)
    return Blockwise(blocking, momentum, momentum_dtype, rms_clip, max_abs_clip)


def _squares_fit(gradients: Mapping[str, Array]) -> Bool[Array, ""]:
    """Whether the squares of all blocks are finite, before outliers are scaled down."""
    fits = [jnp.all(squares_fit(largest_of_blocks(x), x[0].size)) for x in gradients.values()]
    return jnp.all(jnp.array(fits, bool))  # there is no block if all leaves are empty


def clip_leaves(
    plan: BlockPlan,
    share: Share,
    stacks: Mapping[str, Array],
    valid: Bool[Array, ""],
    rms_clip: ArrayLike | None,
    max_abs_clip: ArrayLike | None,
) -> dict[str, Array]:
    """Scale the update of each parameter so that it keeps to the caps.

    Args:
      plan: How the blocks belong to parameters.
      share: Which of the blocks are on this device.
      stacks: Blocks of updates [N, ...] by signature, zero in the padding.
      valid: Whether there is to be an update at all.
      rms_clip: Cap on the root mean square over each parameter, or `None`.
      max_abs_clip: Cap on the largest magnitude in each parameter, or `None`.

    Returns:
      Stacks like the input. A parameter whose update is not finite gets zeros; all do unless
      `valid`.
    """
    return {
        label: _clip_stack(plan, share, label, stack, valid, rms_clip, max_abs_clip)
        for label, stack in stacks.items()
    }


def _clip_stack(plan, share, label, stack, valid, rms_clip, max_abs_clip):
    members = [leaf for _, leaf in plan.members(label)]
    owners = np.repeat(np.arange(len(members)), [leaf.count for leaf in members])
    # What fills a stack up is made zero, whichever parameter it is counted for.
    owners = np.pad(owners, (0, plan.count(label) - len(owners)), "edge")
    elements = np.array([max(np.prod(leaf.shape), 1) for leaf in members])[owners]
    elements = share.own(elements)
    of_leaf = functools.partial(_of_leaf, share, share.own(owners), len(members))
    if len(members) == plan.filled(label):  # each has one block
        of_leaf = lambda values, reduction: values  # noqa: E731
    axes = tuple(range(1, stack.ndim))
    real = contract.real_dtype(stack.dtype)
    if plan.filled(label) < plan.count(label):  # what fills a stack up is no part of a parameter
        inside = share.own(np.arange(plan.count(label)) < plan.filled(label))
        stack = jnp.where(contract.along_axis(inside, 0, stack.ndim), stack, 0)

    magnitude = jnp.abs(stack)
    largest = of_leaf(contract.largest_magnitude(magnitude, axis=axes), "max")
    scale = jnp.ones_like(largest)
    if rms_clip is not None:
        # Relative to the largest entry, squares neither overflow nor vanish.
        unit = contract.safe_divisor(largest)
        relative = magnitude / contract.along_axis(unit, 0, stack.ndim)
        squares = of_leaf(jnp.sum(jnp.square(relative), axis=axes), "sum")
        rms = unit * jnp.sqrt(squares / elements.astype(real))
        scale = jnp.minimum(scale, rms_clip / rms)
    if max_abs_clip is not None:
        scale = jnp.minimum(scale, max_abs_clip / contract.safe_divisor(largest))
    scale = contract.along_axis(scale.astype(real), 0, stack.ndim)
    kept = contract.along_axis(valid & jnp.isfinite(largest), 0, stack.ndim)
    return jnp.where(kept, stack * scale, 0)


def _of_leaf(
    share: Share, owners: np.ndarray | Array, leaves: int, values: Array, reduction: str
) -> Array:
    """Reduce values [N] of blocks over those of each leaf, [N] again."""
    reduced = jnp.zeros(leaves, values.dtype).at[owners]
    if reduction == "sum":
        return share.sum(reduced.add(values))[owners]
    # What is not finite stays so: a maximum over devices may lose NaN, but not infinity.
    values = jnp.where(jnp.isfinite(values), values, jnp.inf)
    return share.max(reduced.max(values))[owners]
