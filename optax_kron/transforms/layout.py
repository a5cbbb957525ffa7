"""A layout: how gradients become blocks, and what becomes of what is preconditioned.

There are two: `Blockwise`, of parameters, and `Layerwise`, of layers. `frame.Frame` asks a layout
for a plan of a tree, for the blocks of its gradients, and for the way back. On a mesh `before` and
`bound` see the blocks of one device; the other methods see all of a tree.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from optax_kron.transforms import outliers
from optax_kron.transforms.exchange import Route
from optax_kron.transforms.mesh import Share, Spec
from optax_kron.transforms.preconditioner import Advanced, AnyPlan, Blocks, KronState
from optax_kron.types import PyTree

if TYPE_CHECKING:
    from optax_kron.transforms.frame import Frame


class Before(NamedTuple):
    """What a layout makes of gradients before they are preconditioned."""

    given: Blocks  # gradients
    gradients: outliers.Limited  # the same, outliers scaled down
    direction: Blocks  # what is preconditioned
    finite: Bool[Array, ""]
    momentum: PyTree  # that of the next state, where the layout averages gradients


class After(NamedTuple):
    """What a layout makes of what is preconditioned."""

    updates: PyTree  # like the gradients
    momentum: PyTree  # that of the next state
    accepted: Bool[Array, ""]
    layers: PyTree = None


class Layout:
    """How gradients become blocks, and what becomes of these: `Blockwise` or `Layerwise`.

    Attributes:
      source: What decides on the blocks, beside the gradients.
      has_fallback: Whether what is in no block has a transformation of its own.
    """

    source: ClassVar[str]

    @property
    def has_fallback(self) -> bool:
        """See above."""
        return False

    def plan(self, owner: str, tree: PyTree, multiple: int) -> AnyPlan:
        """How a tree becomes stacks, the number of blocks of each a multiple of one number."""
        raise NotImplementedError

    def init(self, plan: AnyPlan, params: PyTree) -> Mapping[str, PyTree]:
        """The fields of the state that are the layout's, `momentum` and `layers`."""
        raise NotImplementedError

    def momentum_specs(self, share: Share, momentum: PyTree) -> PyTree:
        """How the momentum is spread over a mesh: as stacks are, if it is one of blocks."""
        del momentum
        return share.cut

    def sizes(self, plan: AnyPlan, label: str) -> tuple[np.ndarray, ...] | None:
        """For each axis its length without padding, int [N]; `None` where nothing is padded."""
        del plan, label

    def at(self, state: KronState) -> "Layout":
        """The settings of one step: values where there are schedules."""
        del state
        return self

    def init_fallback(self, plan: AnyPlan, params: PyTree) -> PyTree:
        """The state of the fallback."""
        del plan, params

    def fall_back(
        self,
        plan: AnyPlan,
        updates: PyTree,
        rest: Mapping[str, Array],
        state: KronState,
        params: PyTree | None,
        extra_args: Mapping[str, PyTree],
    ) -> tuple[Mapping[str, Array], PyTree]:
        """What the fallback makes of the rest, by path, and its new state."""
        raise NotImplementedError

    def rest_paths(self, plan: AnyPlan) -> Sequence[str]:
        """Paths of what is in no block."""
        del plan
        return ()

    def rest(self, plan: AnyPlan, updates: PyTree, dtype: jnp.dtype) -> Mapping[str, Array]:
        """Gradients of what is in no block, by path."""
        del plan, updates, dtype
        return {}

    def rest_specs(self, plan: AnyPlan, updates: PyTree, share: Share) -> Mapping[str, Spec]:
        """How these are spread over a mesh: as the gradients are."""
        del plan, updates, share
        return {}

    def split(self, plan: AnyPlan, updates: PyTree, dtype: jnp.dtype) -> Blocks:
        """The blocks of gradients."""
        raise NotImplementedError

    def routes(self, plan: AnyPlan, share: Share, updates: PyTree) -> Mapping[str, Route]:
        """Stacks whose blocks devices exchange among each other, and how; others are gathered."""
        del plan, share, updates
        return {}

    def cut(self, plan: AnyPlan, share: Share, updates: PyTree, dtype: jnp.dtype) -> Blocks:
        """The blocks of gradients, each on the device that owns it."""
        return share.split(functools.partial(self.split, plan), updates, dtype)

    def is_finite(self, updates: PyTree) -> Bool[Array, ""]:
        """Whether gradients are finite, where blocks do not show it."""
        del updates
        return jnp.ones([], bool)

    def of_blocks(self, state: KronState) -> KronState:
        """What of a state belongs to blocks."""
        return state

    def before(
        self,
        plan: AnyPlan,
        frame: "Frame",
        given: Blocks,
        state: KronState,
        finite: Bool[Array, ""],
    ) -> Before:
        """What is to be preconditioned; of blocks on this device, as all until `after`."""
        raise NotImplementedError

    def bound(self, plan: AnyPlan, frame: "Frame", before: Before, updates: Blocks) -> Blocks:
        """The updates, where a layout bounds them block by block."""
        del plan, frame, before
        return updates

    def after(
        self,
        plan: AnyPlan,
        frame: "Frame",
        updates: PyTree,
        state: KronState,
        extra: PyTree,
        before: Before,
        advanced: Advanced,
        rest: Mapping[str, Array],
        others: Mapping[str, Array],
    ) -> After:
        """Bounds, the velocity, and the way back to a tree.

        Args:
          plan: How the tree is laid out.
          frame: The settings.
          updates: The gradients.
          state: That of before.
          extra: What the method has read.
          before: What `before` returned.
          advanced: What the method has made of it.
          rest: Gradients of what is in no block, by path.
          others: What the fallback has made of those.
        """
        raise NotImplementedError
