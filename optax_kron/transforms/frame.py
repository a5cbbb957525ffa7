"""The frame of every optimizer: what happens at a step, in which order, and what never gets in.

A `Preconditioner` says what is kept of blocks and what is made of it, a `Layout` how gradients
become blocks, and how momentum and bounds go with that. The frame does the rest, the same for all:

    gradients → blocks → outliers are scaled down → momentum → are they finite? →
    the verbs of the preconditioner → bounds → updates, counters and the new state

A gradient that is not finite leaves all of the state as it was, but for a counter. A block whose
new values are not finite keeps its old ones (`stacks.guarded`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, PyTree

from optax_kron.transforms import outliers, program, validation
from optax_kron.transforms.preconditioner import (
    Advanced,
    AnyPlan,
    Blocks,
    KronState,
    Preconditioner,
    Seen,
    Step,
)
from optax_kron.transforms.stacks import for_each_stack, for_tree, select


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

    def plan(self, owner: str, tree: PyTree) -> AnyPlan:
        """How a tree becomes stacks."""
        raise NotImplementedError

    def init(self, plan: AnyPlan, params: PyTree) -> Mapping[str, PyTree]:
        """The fields of the state that are the layout's, `momentum` and `layers`."""
        raise NotImplementedError

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

    def before(self, plan: AnyPlan, frame: "Frame", updates: PyTree, state: KronState) -> Before:
        """The blocks of gradients, and what is to be preconditioned."""
        raise NotImplementedError

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


_COUNTERS = ("count", "refreshes", "failed_refreshes", "skipped_steps", "outlier_steps")


@program.settings
@dataclasses.dataclass(frozen=True)
class Frame:
    """A transformation of gradients.

    Attributes:
      owner: Name of the optimizer, for messages.
      method: What is kept of the blocks, and what is made of it.
      layout: How gradients become blocks.
      outlier_clip: How many times a block's usual norm is an outlier, or `None`.
      factor_dtype: Real dtype of the factors.
    """

    owner: str
    method: Preconditioner
    layout: Layout
    outlier_clip: ArrayLike | None
    factor_dtype: jnp.dtype

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The real dtype of the arithmetic, at least float32."""
        return jnp.promote_types(self.factor_dtype, jnp.float32)

    def init(self, params: PyTree) -> KronState:
        """The state before the first step."""
        params = program.as_arrays(params)
        plan = self.layout.plan(self.owner, params)
        return self._init(plan, params)._replace(fallback=self.layout.init_fallback(plan, params))

    def _init(self, plan: AnyPlan, params: PyTree) -> KronState:
        def stack(label):
            return self.method.init(plan.count(label), plan.stacks[label], self.factor_dtype)

        def usual_norms():
            rest = {path: outliers.start(1) for path in self.layout.rest_paths(plan)}
            return {name: outliers.start_stacks(plan) for name in self.method.bounded} | {
                "rest": rest
            }

        # Each counter is a buffer of its own, so that the state can be donated.
        return KronState(
            **{name: jnp.zeros([], jnp.int32) for name in _COUNTERS},
            usual_norms=None if self.outlier_clip is None else for_tree(plan, usual_norms),
            stacks=for_each_stack(plan, stack),
            schedule=self.method.init_schedule(),
            key=self.method.init_key(),
            fallback=None,
            **self.layout.init(plan, params),
        )

    def update(
        self, updates: PyTree, state: KronState, params: PyTree | None = None, **extra_args: PyTree
    ) -> tuple[PyTree, KronState]:
        """One step."""
        if params is not None:
            validation.check_like(self.owner, updates, params)
        updates = program.as_arrays(updates)
        plan = self.layout.plan(self.owner, updates)
        stacks = getattr(state, "stacks", None)
        validation.check_stacks(self.owner, plan, stacks, self.layout.source)
        if not plan.leaves:
            return updates, state._replace(count=state.count + 1)
        method, layout = self.method.at(state), self.layout.at(state)
        now = dataclasses.replace(self, method=method, layout=layout)
        extra = method.read(plan, updates, state, extra_args)
        rest, others, fallback = None, {}, state.fallback
        if layout.has_fallback:
            rest = program.once(Frame._rest, now, updates, state)
            # Transformations of others, which may take arguments of any kind, stay outside.
            others, fallback = layout.fall_back(
                plan, updates, rest.blocks, state, params, extra_args
            )
        operands = now, updates, state, extra, rest, others, fallback
        if callable(extra):
            return Frame._update(*operands)
        return program.once(Frame._update, *operands)

    def _rest(self, updates: PyTree, state: KronState) -> outliers.Limited:
        """Gradients of what is in no block, by path, scaled down where they are outliers."""
        plan = self.layout.plan(self.owner, updates)
        made = jax.eval_shape(lambda: self._init(plan, updates))
        kept = state._replace(fallback=None)
        made, kept = (x._replace(stacks=self.method.needed(x.stacks)) for x in (made, kept))
        validation.check_state(self.owner, made, kept)
        rest = self.layout.rest(plan, updates, self.compute_dtype)
        limited = self.limit({path: x[None] for path, x in rest.items()}, state, "rest")
        return limited._replace(blocks={path: x[0] for path, x in limited.blocks.items()})

    def limit(self, blocks: Blocks, state: KronState, name: str) -> outliers.Limited:
        """Blocks whose outliers, beside the usual norms of that name, are scaled down."""
        usual = None if state.usual_norms is None else state.usual_norms[name]
        return outliers.limit(blocks, usual, self.outlier_clip)

    def _update(
        self,
        updates: PyTree,
        state: KronState,
        extra: PyTree,
        rest: outliers.Limited | None,
        others: Mapping[str, Array],
        fallback: PyTree,
    ) -> tuple[PyTree, KronState]:
        """One step, with what the fallback has made of the rest, and its new state."""
        plan = self.layout.plan(self.owner, updates)
        rest = self._rest(updates, state) if rest is None else rest
        before = self.layout.before(plan, self, updates, state)
        gradients = before.gradients
        step = Step(state.count + before.finite.astype(jnp.int32), before.finite)
        seen = {
            label: Seen(
                x, before.direction[label], self.layout.sizes(plan, label), jnp.zeros(len(x), bool)
            )
            for label, x in gradients.blocks.items()
        }
        stacks = state.stacks
        if self.method.keeps_gradients:
            stacks = gradients.rescaled_stacks(self.method, stacks, step.accepted)
        done = self.method.advance(plan, state, stacks, seen, extra, step)
        after = self.layout.after(
            plan, self, updates, state, extra, before, done, rest.blocks, others
        )
        accepted = after.accepted
        one = accepted.astype(jnp.int32)
        found = gradients.found | rest.found | done.outliers
        usual = {"gradients": gradients.usual, "rest": rest.usual, **done.usual_norms}
        new_state = KronState(
            count=state.count + one,
            refreshes=state.refreshes + done.refreshed.astype(jnp.int32),
            failed_refreshes=state.failed_refreshes + done.failures,
            skipped_steps=state.skipped_steps + 1 - one,
            outlier_steps=state.outlier_steps + (accepted & found).astype(jnp.int32),
            usual_norms=None
            if state.usual_norms is None
            else select(accepted, usual, state.usual_norms),
            momentum=select(accepted, after.momentum, state.momentum),
            stacks=done.stacks,
            schedule=done.schedule,
            key=state.key,
            layers=select(accepted, after.layers, state.layers),
            fallback=select(accepted, fallback, state.fallback),
        )
        return after.updates, new_state


def transformation(
    owner: str,
    method: Preconditioner,
    layout: Layout,
    outlier_clip: ArrayLike | None,
    factor_dtype: DTypeLike | None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation of an optimizer; arguments as `Frame`.

    Raises:
      ValueError: for an `outlier_clip` below one, or a dtype that is not real floating-point.
    """
    outliers.check(owner, outlier_clip)
    dtype = validation.real_factor_dtype(owner, factor_dtype)
    made = Frame(owner, method, layout, outlier_clip, dtype)
    return program.transformation(made.init, made.update)
