"""The frame of every optimizer: what happens at a step, in which order, and what never gets in.

A `Preconditioner` says what is kept of blocks and what is made of it, a `Layout` how gradients
become blocks, and how momentum and bounds go with that. The frame does the rest, the same for all:

    gradients → blocks → outliers are scaled down → momentum → are they finite? →
    the verbs of the preconditioner → bounds → updates, counters and the new state

A gradient that is not finite leaves all of the state as it was, but for a counter. A block whose
new values are not finite keeps its old ones (`stacks.guarded`).
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array

from optax_kron.kernels import contract
from optax_kron.transforms import exchange, mesh, outliers, program, record, storage, validation
from optax_kron.transforms.layout import After, Before, Layout
from optax_kron.transforms.mesh import ALONE, WHOLE, Share, Spec
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
from optax_kron.types import PyTree

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
      factor_dtype: Real dtype of the factors; `None`: as precise as the parameters, but at least
        float32.
      rounding: How averages of fewer than 32 bits are stored, "nearest" or "stochastic".
      seed: Of stochastic roundings, where the method has no key of its own.
      share: Which blocks are on a device.
    """

    owner: str
    method: Preconditioner
    layout: Layout
    outlier_clip: ArrayLike | None
    factor_dtype: jnp.dtype | None
    rounding: str = "nearest"
    seed: int | Array = 0
    share: Share = ALONE

    @property
    def stored_dtype(self) -> jnp.dtype:
        """The real dtype of the factors; see `_as_precise_as`."""
        return jnp.dtype(jnp.float32) if self.factor_dtype is None else self.factor_dtype

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The real dtype of the arithmetic, at least float32."""
        return contract.wide_dtype(self.stored_dtype)

    def _as_precise_as(self, tree: PyTree) -> "Frame":
        """The frame with a dtype of factors, that of some arrays if none was asked for."""
        if self.factor_dtype is not None:
            return self
        return dataclasses.replace(self, factor_dtype=contract.widest_dtype(_floats(tree)))

    def init(self, params: PyTree) -> KronState:
        """The state before the first step."""
        params = program.as_arrays(params)
        now = dataclasses.replace(self._as_precise_as(params), share=mesh.ambient())
        plan = now.plan(params)
        make = functools.partial(now._init, plan)
        state = now.share.globally(make, params, out=now._specs(jax.eval_shape(make, params)))
        state = state._replace(fallback=self.layout.init_fallback(plan, params))
        record.note(now, plan, params, state)
        return state

    def plan(self, tree: PyTree) -> AnyPlan:
        """How a tree becomes stacks."""
        return self.layout.plan(self.owner, tree, self.share.devices)

    def _init(self, plan: AnyPlan, params: PyTree) -> KronState:
        def stack(label):
            return self.method.init(plan.count(label), plan.stacks[label], self.stored_dtype)

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
            key=self._init_key(),
            fallback=None,
            **self.layout.init(plan, params),
        )

    def _init_key(self) -> Array | None:
        key = self.method.init_key()
        if key is None and self.rounding == "stochastic":
            return validation.key_data(self.seed)
        return key

    def random_bits(self, state: KronState) -> Array | None:
        """Those of the stochastic roundings of a step; `None`: all are to nearest."""
        if self.rounding == "nearest":
            return None
        assert state.key is not None  # `_init_key` makes one
        stored = state.momentum, state.stacks
        return storage.random_bits(state.key, state.count, stored, self.share)

    def update(
        self, updates: PyTree, state: KronState, params: PyTree | None = None, **extra_args: PyTree
    ) -> tuple[PyTree, KronState]:
        """One step."""
        if params is not None:
            validation.check_like(self.owner, updates, params)
        updates = program.as_arrays(updates)
        share = mesh.ambient()
        plan = self.layout.plan(self.owner, updates, share.devices)
        stacks = getattr(state, "stacks", None)
        validation.check_stacks(self.owner, plan, stacks, self.layout.source)
        if not plan.leaves:
            return updates, state._replace(count=state.count + 1)
        method, layout = self.method.at(state), self.layout.at(state)
        # Gradients may be of another dtype than the parameters, of which a state may hold nothing.
        kept = _floats(stacks) or _floats(state.momentum)
        like = updates if params is None else program.as_arrays(params)
        precise = self._as_precise_as(kept or like)
        # Without what `init` alone reads, so that seeds share a program.
        now = dataclasses.replace(precise, method=method, layout=layout, share=share, seed=0)
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
        plan = self.plan(updates)
        made = jax.eval_shape(lambda: self._init(plan, updates))
        kept = state._replace(fallback=None)
        made, kept = (x._replace(stacks=self.method.needed(x.stacks)) for x in (made, kept))
        validation.check_state(self.owner, made, kept)
        out = outliers.Limited(self.layout.rest_specs(plan, updates, self.share), *[WHOLE] * 3)
        return self.share.globally(Frame._limited_rest, self, plan, updates, state, out=out)

    def _limited_rest(self, plan, updates, state):
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
        plan = self.plan(updates)
        rest = self._rest(updates, state) if rest is None else rest
        share = self.share
        given = self.layout.cut(plan, share, updates, self.compute_dtype)
        before, done = self._move(plan, given, updates, state, extra)
        routes = self.layout.routes(plan, share, updates)
        rest_of_stacks = {k: x for k, x in done.updates.items() if k not in routes}
        like = share.shardings(updates)
        momentum = self.layout.momentum_specs(share, state.momentum)
        after = share.globally(
            Frame._after,
            self,
            plan,
            updates,
            state,
            extra,
            before,
            done._replace(updates=rest_of_stacks),
            rest.blocks,
            others,
            out=After(like, momentum, WHOLE, WHOLE),
        )
        joined = exchange.join(plan, share, routes, done.updates, like=after.updates)
        accepted = after.accepted
        one = accepted.astype(jnp.int32)
        found = rest.found | done.outliers
        usual = {"gradients": before.gradients.usual, "rest": rest.usual, **done.usual_norms}
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
        return joined, new_state

    def _after(self, plan, *arguments):
        return self.layout.after(plan, self, *arguments)

    def _move(
        self, plan: AnyPlan, given: Blocks, updates: PyTree, state: KronState, extra: PyTree
    ) -> tuple[Before, Advanced]:
        """What comes of the blocks, on every device of its own."""
        share, cut, dtype = self.share, self.share.cut, self.compute_dtype
        method: PyTree = self.method  # with what `looks_twice` asks for, if it does
        finite = share.globally(self.layout.is_finite, updates, out=WHOLE)
        state = self.layout.of_blocks(state._replace(fallback=None, layers=None))
        taken, spread = extra, method.spread_as(share)
        if method.is_frozen:  # takes nothing
            taken, spread = (), WHOLE
        elif not share.is_alone:
            taken = method.spread(plan, share, extra, updates, state, dtype)
        specs, before_specs, done_specs = self._specs(state), *_specs_of_blocks(cut)
        operands = given, state, taken, finite
        kinds = cut, specs, spread, WHOLE
        if share.is_alone or method.is_frozen or not method.looks_twice:
            out = before_specs, done_specs
            return self._on_devices(Frame._move_own, plan, operands, kinds, out)
        learned_specs = method.learned_as(share)
        out = before_specs, learned_specs
        before, learned = self._on_devices(Frame._learn_own, plan, operands, kinds, out)
        looked = method.look_from(plan, share, learned.stacks, extra, dtype)
        operands = before, state, learned, looked
        kinds = before_specs, specs, learned_specs, cut
        return before, self._on_devices(Frame._finish_own, plan, operands, kinds, done_specs)

    def _on_devices(self, function, plan, operands, kinds, out):
        """A method of the frame on every device; its arguments spread as `kinds` says."""
        arrays, rebuild = program.parts(self)

        def run(arrays, *operands):
            return function(rebuild(arrays), plan, *operands)

        return self.share.run(run, (arrays, *operands), (WHOLE, *kinds), out)

    def _move_own(self, plan, given, state, taken, finite):
        before, step, seen = self._begin(plan, given, state, finite)
        stacks = state.stacks
        if self.method.keeps_gradients:
            stacks = before.gradients.rescaled_stacks(self.method, stacks, step.accepted)
        done = self.method.advance(plan, state, stacks, seen, taken, step)
        return before, self._bound(plan, before, done)

    def _learn_own(self, plan, given, state, taken, finite):
        before, step, seen = self._begin(plan, given, state, finite)
        method: PyTree = self.method
        return before, method.learn(plan, state, state.stacks, seen, taken, step)

    def _finish_own(self, plan, before, state, learned, looked):
        _, seen = self._see(plan, before, state)
        method: PyTree = self.method
        return self._bound(plan, before, method.finish(state, learned, seen, looked))

    def _begin(self, plan, given, state, finite):
        before = self.layout.before(plan, self, given, state, finite)
        found = self.share.any(before.gradients.found)
        before = before._replace(gradients=before.gradients._replace(found=found))
        return before, *self._see(plan, before, state)

    def _see(self, plan, before, state):
        """What holds of a step, and what the blocks see of it."""
        share = self.share
        count = state.count + before.finite.astype(jnp.int32)
        step = Step(count, before.finite, share, self.random_bits(state))

        def see(label, x):
            sizes = self.layout.sizes(plan, label)
            own = None if sizes is None else tuple(map(share.own, sizes))
            newly = jnp.zeros(len(x), bool)
            return Seen(x, before.direction[label], own, newly, plan.filled(label))

        return step, {label: see(label, x) for label, x in before.gradients.blocks.items()}

    def _bound(self, plan, before, done):
        """The updates bounded, and whether there was an outlier on any device."""
        updates = self.layout.bound(plan, self, before, done.updates)
        found = before.gradients.found | self.share.any(jnp.asarray(done.outliers))
        return done._replace(updates=updates, outliers=found)

    def _specs(self, state: KronState) -> KronState:
        """How the parts of a state are spread over a mesh."""
        cut, whole = self.share.cut, jax.tree.map(lambda _: WHOLE, state)
        if not isinstance(state.stacks, Mapping):  # there are no leaves
            return whole
        usual = state.usual_norms
        if isinstance(usual, Mapping):
            usual = {name: WHOLE if name == "rest" else cut for name in usual}
        momentum = self.layout.momentum_specs(self.share, state.momentum)
        return whole._replace(stacks=cut, usual_norms=usual, momentum=momentum)


def _floats(tree: PyTree) -> list[Array]:
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]


def _specs_of_blocks(cut: Spec) -> tuple[Before, Advanced]:
    """How what comes of the blocks is spread over a mesh."""
    limited = outliers.Limited(blocks=cut, past=cut, usual=cut, found=WHOLE)
    before = Before(cut, limited, cut, finite=WHOLE, momentum=cut)
    return before, Advanced(cut, cut, *[WHOLE] * 5, usual_norms=cut)


# The arguments of `transformation` that are settings of optimizers.
STORAGE_SETTINGS = ("outlier_clip", "factor_dtype", "rounding", "seed")


def transformation(
    owner: str,
    method: Preconditioner,
    layout: Layout,
    outlier_clip: ArrayLike | None,
    factor_dtype: DTypeLike | None,
    rounding: str = "nearest",
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """The transformation of an optimizer; arguments as `Frame`.

    Raises:
      ValueError: for an `outlier_clip` below one, a dtype that is not real floating-point, another
        rounding, or a seed that is neither an integer nor a key.
    """
    outliers.check(owner, outlier_clip)
    validation.check_choice(owner, "rounding", rounding, storage.ROUNDINGS)
    validation.check_seed(owner, seed)
    dtype = validation.real_factor_dtype(owner, factor_dtype)
    made = Frame(owner, method, layout, outlier_clip, dtype, rounding, seed)
    return program.transformation(made.init, made.update)
