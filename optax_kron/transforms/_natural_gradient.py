"""Natural gradient descent with a curvature of layers: what K-FAC and EKFAC share.

The curvature says how factors are averaged, refreshed and applied. What is here says when: it reads
the taps, keeps out what is not finite, and adds the fallback, the norm constraint and the momentum.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from optax_kron import guards
from optax_kron.kernels import contract, flow
from optax_kron.layers import plan as plans
from optax_kron.layers.layer import Layer
from optax_kron.layers.paths import by_path, map_by_path
from optax_kron.layers.plan import LayerPlan
from optax_kron.layers.taps import Tap, Taps
from optax_kron.transforms import _norm_constraint, _program, _settings, outliers

PyTree = Any
Stacks = Mapping[str, Any]


class ScaleByKfacState(NamedTuple):
    """State of `scale_by_kfac` and `scale_by_ekfac`.

    `optax.tree.get(state, name)` finds a field inside the state of a chain or wrapper; `count` is
    there twice where the learning rate is a schedule.

    Attributes:
      count: accepted steps, int32 [].
      factor_updates: accepted steps whose taps went into the factors, int32 [].
      since_refresh: accepted steps since inverses or bases were made, int32 [].
      refreshes: times that they were made, int32 [].
      failed_refreshes: blocks whose new factors, inverses or eigenvalues were not finite, and that
        kept the old, int32 [].
      skipped_steps: steps that were not finite and were dropped, int32 [].
      mismatched_steps: accepted steps whose gradients were 128 times larger or smaller than those
        that the taps were made beside, as of a scaled loss, int32 [].
      outlier_steps: steps at which a gradient, or what a layer saw, was an outlier and was scaled
        down, int32 [].
      usual_norms: of the gradients of blocks in layers, and of other parameters by path; `None`
        without `outlier_clip`.
      loss_weight: sum of the examples' weights in the loss of the last step, float32 [].
      stacks: by kind of block, the factors [N, ...], and as `inverse` what was made of them: of
        `ekfac` bases and eigenvalues. An array for a tree without leaves.
      momentum: velocity like the parameters, masked where a fallback has the leaf.
      fallback: state of the fallback.
    """

    # "count" is Optax's name for the number of steps, though tuples have a method of that name.
    count: Array  # pyright: ignore
    factor_updates: Array
    since_refresh: Array
    refreshes: Array
    failed_refreshes: Array
    skipped_steps: Array
    mismatched_steps: Array
    outlier_steps: Array
    usual_norms: Mapping[str, Mapping[str, outliers.Usual]] | None
    loss_weight: Array
    stacks: Stacks | Array
    momentum: PyTree | None
    fallback: PyTree | None


_CONTENTS = ("usual_norms", "loss_weight", "stacks", "momentum", "fallback")  # what is no counter


class Curvature(Protocol):
    """How factors are made and applied; see `kfac_stacks.Curvature`."""

    def init(self, plan: LayerPlan, dtype: DTypeLike) -> Stacks | Array: ...

    def move(
        self, plan: LayerPlan, stacks: Any, taps: Taps, decay: Array, allowed: Array
    ) -> tuple[Stacks, Array, Array, Array]: ...

    def refresh(self, last: Any, factors: Any, damping: ArrayLike) -> tuple[Any, Array]: ...

    def correct(
        self, plan: LayerPlan, stacks: Any, taps: Taps, decay: Array, allowed: Array
    ) -> tuple[Stacks, Array, Array]: ...

    def precondition(
        self, stacks: Any, blocks: Mapping[str, Array], damping: ArrayLike
    ) -> dict[str, Array]: ...


@_program.settings
@dataclasses.dataclass(frozen=True)
class NaturalGradient:
    """A transformation of gradients; settings are those of `scale_by_kfac`.

    Attributes:
      owner: its name, for messages.
      curvature: of the layers.
    """

    owner: str
    curvature: Curvature
    layers: Sequence[Layer]
    decay: ArrayLike
    bias_correction: bool
    damping: Any  # a number, or until a step has its value, a schedule
    momentum: ArrayLike | None
    factor_every: ArrayLike
    refresh_every: ArrayLike
    norm_constraint: ArrayLike | str | None
    outlier_clip: ArrayLike | None
    learning_rate: optax.ScalarOrSchedule | None
    fallback: optax.GradientTransformation | None
    factor_dtype: jnp.dtype
    momentum_dtype: DTypeLike | None

    @property
    def compute(self) -> jnp.dtype:
        """The dtype of the arithmetic."""
        return jnp.promote_types(self.factor_dtype, jnp.float32)

    def init(self, params: PyTree) -> Any:
        """The state before the first step."""
        params = _program.as_arrays(params)
        plan = plans.plan_layers(self.owner, self.layers, params)
        if not plan.stacks and any(0 not in shape for shape in plan.leaves.values()):
            _settings.warn_without_layers(self.owner, self.layers, self.fallback)
        leaves = by_path(params)
        # Each counter is a buffer of its own, so that the state can be donated.
        counters = [name for name in ScaleByKfacState._fields if name not in _CONTENTS]
        velocity = {
            path: jnp.zeros(leaf.shape, self.momentum_dtype or leaf.dtype)
            for path, leaf in leaves.items()
            if self.fallback is None or path in plan.owned
        }
        rest = {path: leaves[path] for path in plan.uncovered}
        return ScaleByKfacState(
            **{name: jnp.zeros([], jnp.int32) for name in counters},
            usual_norms=self._usual_norms(plan),
            loss_weight=jnp.zeros([], jnp.float32),
            stacks=self.curvature.init(plan, self.factor_dtype),
            momentum=None if self.momentum is None else _masked(params, velocity),
            fallback=None if self.fallback is None else self.fallback.init(_masked(params, rest)),
        )

    def update(
        self,
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        taps: Mapping[str, Tap | Iterable[Tap]] | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        """One step."""
        if params is not None:
            _settings.check_like(self.owner, updates, params)
        updates = _program.as_arrays(updates)
        plan = plans.plan_layers(self.owner, self.layers, updates)
        _settings.check_stacks(self.owner, plan, getattr(state, "stacks", None), "layers")
        if not plan.leaves:
            return updates, state._replace(count=state.count + 1)
        seen = plan.read_taps(taps)
        now = self._at(state)
        rest = _program.once(NaturalGradient._rest, now, updates, state)
        # Transformations of others, which may take arguments of any kind, stay outside.
        made = self._fallback(plan, updates, rest.blocks, state, params, extra_args)
        return _program.once(NaturalGradient._update, now, updates, state, seen, rest, *made)

    def _at(self, state: Any) -> "NaturalGradient":
        """The settings of one step: values where there are schedules."""
        # The steps as the schedule of a learning rate further down the chain counts them.
        steps = state.count + state.skipped_steps
        lr = self.learning_rate(steps) if callable(self.learning_rate) else self.learning_rate
        damping = self.damping(state.count) if callable(self.damping) else self.damping
        return dataclasses.replace(self, learning_rate=lr, damping=damping)

    def _update(
        self,
        updates: PyTree,
        state: Any,
        taps: Taps,
        rest: outliers.Limited,
        others: Mapping[str, Array],
        fallback: PyTree,
    ) -> tuple[PyTree, Any]:
        """One step, with what the fallback makes of parameters in no layer, and its state."""
        plan = plans.plan_layers(self.owner, self.layers, updates)
        made = jax.eval_shape(lambda: self.curvature.init(plan, self.factor_dtype))
        _settings.check_state(self.owner, made, state.stacks)
        learned = self._learn(plan, state, taps, guards.all_finite(updates))
        gradients = {path: _widened(g, self.compute) for path, g in by_path(updates).items()}
        blocks = plan.take(gradients, self.compute)
        differ = plan.scales_differ(blocks, taps)
        usual = (state.usual_norms or {}).get("layers")
        layers = outliers.limit(blocks, usual, self.outlier_clip)
        found = layers.found | rest.found | learned.strange
        usual = {"layers": layers.usual, "others": rest.usual}
        weight, most = _norm_constraint.loss_weight(taps, self.compute)
        # A loss that weighs more than it did, once, must not lift the bound of that step.
        last = jnp.where(state.loss_weight > 0, state.loss_weight, most).astype(weight.dtype)
        directions = self._directions(
            plan,
            learned.stacks,
            gradients,
            layers.blocks,
            rest.blocks,
            jnp.minimum(weight, last),
        )
        directions, velocity = self._with_momentum(directions, state)
        for path, u in others.items():
            u = u.astype(gradients[path].dtype)
            directions[path] = directions[path] + u if path in directions else u

        result = _masked(updates, directions, cast=True)
        accepted = learned.sound & guards.all_finite((result, velocity))
        one = accepted.astype(jnp.int32)
        new_state = ScaleByKfacState(
            count=state.count + one,
            factor_updates=state.factor_updates + learned.moved.astype(jnp.int32),
            since_refresh=jnp.where(learned.due, 0, state.since_refresh + one),
            refreshes=state.refreshes + learned.due.astype(jnp.int32),
            failed_refreshes=state.failed_refreshes + learned.failures,
            skipped_steps=state.skipped_steps + 1 - one,
            mismatched_steps=state.mismatched_steps + (accepted & differ).astype(jnp.int32),
            outlier_steps=state.outlier_steps + (accepted & found).astype(jnp.int32),
            usual_norms=None
            if state.usual_norms is None
            else guards.select(accepted, usual, state.usual_norms),
            loss_weight=guards.select(accepted, weight, state.loss_weight),
            stacks=learned.stacks,
            momentum=guards.select(accepted, velocity, state.momentum),
            fallback=guards.select(accepted, fallback, state.fallback),
        )
        return jax.tree.map(lambda u: jnp.where(accepted, u, 0), result), new_state

    def _usual_norms(self, plan: LayerPlan) -> Any:
        """Before the first gradient."""
        if self.outlier_clip is None:
            return None
        if not plan.leaves:
            return jnp.zeros([])  # One leaf where they would be, as optax.tree.map_params needs.
        return {
            "layers": outliers.start_stacks(plan),
            "others": {path: outliers.start(1) for path in plan.uncovered},
        }

    def _rest(self, updates: PyTree, state: Any) -> outliers.Limited:
        """Gradients of what is in no layer, by path; outliers are scaled down."""
        plan = plans.plan_layers(self.owner, self.layers, updates)
        made = jax.eval_shape(lambda: self._usual_norms(plan))
        _settings.check_state(self.owner, made, state.usual_norms)
        gradients = by_path(updates)
        rest = {
            path: plan.without_owned(path, _widened(gradients[path], self.compute))[None]
            for path in plan.uncovered
        }
        usual = (state.usual_norms or {}).get("others")
        limited = outliers.limit(rest, usual, self.outlier_clip)
        return limited._replace(blocks={path: x[0] for path, x in limited.blocks.items()})

    def _learn(self, plan: LayerPlan, state: Any, taps: Taps, finite: Array) -> "_Learned":
        """The factors after a step, and what becomes of them."""
        rate = jnp.clip(jnp.asarray(self.decay, self.compute), 0, 1)
        moving = finite & (state.count % _settings.interval(self.factor_every) == 0)
        weight = _corrected(rate, state.factor_updates) if self.bias_correction else rate
        move = functools.partial(self.curvature.move, plan, taps=taps, decay=weight, allowed=moving)
        if isinstance(self.factor_every, int | np.integer) and self.factor_every == 1:
            stacks, failed_moves, sound, strange = move(state.stacks)  # a branch copies the state
        else:
            stacks, failed_moves, sound, strange = flow.cond(
                moving,
                move,
                lambda stacks: (
                    stacks,
                    jnp.zeros([], jnp.int32),
                    jnp.ones([], bool),
                    jnp.zeros([], bool),
                ),
                state.stacks,
            )
        sound, moved = finite & sound, moving & sound
        due = sound & _refresh_is_due(state, moved, rate, self.refresh_every)
        inverses, failed_inverses = guards.replaced_if(
            self.curvature.refresh,
            due,
            ({label: stack.inverse for label, stack in stacks.items()}, jnp.zeros([], jnp.int32)),
            {label: stack[:3] for label, stack in stacks.items()},
            self.damping,
        )
        stacks = {label: stack._replace(inverse=inverses[label]) for label, stack in stacks.items()}
        weight = _corrected(rate, state.count) if self.bias_correction else rate
        stacks, failed, found = self.curvature.correct(plan, stacks, taps, weight, sound)
        failures = failed_moves + failed_inverses + failed
        return _Learned(stacks, sound, moved, due, failures, strange | found)

    def _directions(
        self,
        plan: LayerPlan,
        stacks: Stacks,
        gradients: Mapping[str, Array],
        blocks: Mapping[str, Array],
        rest: Mapping[str, Array],
        loss_weight: Array,
    ) -> dict[str, Array]:
        """The natural gradient by path; the gradient where there is neither layer nor fallback."""
        directions = {path: jnp.zeros_like(gradients[path]) for path in plan.owned}
        if self.fallback is None:
            directions |= rest
        natural = self.curvature.precondition(stacks, blocks, self.damping)
        plan.put(directions, natural)
        if self.norm_constraint is None:
            return directions
        pairs = [(blocks[label], natural[label]) for label in blocks]
        if self.fallback is None:
            pairs += [(g[None], g[None]) for g in rest.values()]
        constraint, lr = self.norm_constraint, self.learning_rate
        if isinstance(constraint, str):
            constraint, lr = _norm_constraint.AUTO_NORM * loss_weight, 1.0
        scale = _norm_constraint.scale(pairs, lr, constraint, self.compute)
        return {path: _times(scale, u) for path, u in directions.items()}

    def _with_momentum(self, directions: dict[str, Array], state: Any) -> tuple[Any, Any]:
        """The directions with the velocity added, and the new velocity."""
        if self.momentum is None:
            return directions, state.momentum
        old = by_path(state.momentum)
        directions = {
            path: _times(self.momentum, old[path].astype(u.dtype)) + u
            for path, u in directions.items()
        }
        return directions, _masked(state.momentum, directions, cast=True)

    def _fallback(
        self,
        plan: LayerPlan,
        updates: PyTree,
        rest: Mapping[str, Array],
        state: Any,
        params: PyTree | None,
        extra_args: Mapping[str, Any],
    ) -> tuple[dict[str, Array], Any]:
        """What the fallback makes of parameters in no layer, by path, and its state."""
        if self.fallback is None:
            return {}, state.fallback
        given = {} if params is None else by_path(params)
        given = {path: given[path] for path in rest if path in given}
        others, new = optax.with_extra_args_support(self.fallback).update(
            _masked(updates, rest, cast=True),
            state.fallback,
            None if params is None else _masked(params, given),
            **extra_args,
        )
        # Of a parameter that is covered in part, to what is not.
        return {path: plan.without_owned(path, u) for path, u in by_path(others).items()}, new


class _Learned(NamedTuple):
    """The factors after a step."""

    stacks: Stacks
    sound: Array  # whether gradients and taps were finite, bool []
    moved: Array  # whether the factors took in the taps, bool []
    due: Array  # whether they were refreshed, bool []
    failures: Array  # blocks that kept what they had, int32 []
    strange: Array  # whether there were outliers among what the layers saw, bool []


def natural_gradient(
    owner: str,
    curvature: Curvature,
    *,
    layers: Iterable[Layer],
    decay: ArrayLike,
    bias_correction: bool,
    damping: optax.ScalarOrSchedule,
    momentum: ArrayLike | None,
    factor_every: ArrayLike,
    refresh_every: ArrayLike,
    norm_constraint: ArrayLike | str | None,
    outlier_clip: ArrayLike | None,
    learning_rate: optax.ScalarOrSchedule | None,
    fallback: optax.GradientTransformation | None,
    factor_dtype: DTypeLike | None,
    momentum_dtype: DTypeLike | None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation, with its settings checked; arguments as `NaturalGradient`."""
    layers = plans.check_layers(owner, layers)
    _settings.check_range(owner, "decay", decay, most=1)
    _settings.check_range(owner, "damping", damping, schedule=True)
    _settings.check_range(owner, "momentum", momentum, most=1, open_right=True, optional=True)
    _settings.check_interval(owner, "factor_every", factor_every)
    _settings.check_interval(owner, "refresh_every", refresh_every)
    if isinstance(norm_constraint, str):
        _settings.check_choice(owner, "norm_constraint", norm_constraint, ("auto",))
    else:
        _settings.check_range(
            owner, "norm_constraint", norm_constraint, open_left=True, optional=True
        )
    outliers.check(owner, outlier_clip)
    _settings.check_range(owner, "learning_rate", learning_rate, optional=True, schedule=True)
    if not (norm_constraint is None or isinstance(norm_constraint, str)) and learning_rate is None:
        raise ValueError(
            f"{owner}: norm_constraint={norm_constraint!r} needs learning_rate, the number or "
            "schedule that the updates are multiplied with; got None."
        )
    if fallback is not None and not isinstance(fallback, optax.GradientTransformation):
        raise ValueError(
            f"{owner}: fallback must be an optax.GradientTransformation, such as "
            f"optax.scale_by_adam(), or None; got {fallback!r}."
        )
    dtype = _settings.real_factor_dtype(owner, factor_dtype)
    _settings.check_dtype(owner, "momentum_dtype", momentum_dtype)
    made = NaturalGradient(
        owner=owner,
        curvature=curvature,
        layers=layers,
        decay=decay,
        bias_correction=bias_correction,
        damping=damping,
        momentum=momentum,
        factor_every=factor_every,
        refresh_every=refresh_every,
        norm_constraint=norm_constraint,
        outlier_clip=outlier_clip,
        learning_rate=learning_rate,
        fallback=fallback,
        factor_dtype=dtype,
        momentum_dtype=momentum_dtype,
    )
    return _program.transformation(made.init, made.update)


def _corrected(decay: Array, updates: Array) -> Array:
    """The weight of the old factors that makes a moving average one without bias to its start."""
    count = updates.astype(decay.dtype)
    weight = decay * (1 - decay**count) / jnp.where(decay < 1, 1 - decay ** (count + 1), 1)
    return jnp.where(decay < 1, weight, count / (count + 1))


def _refresh_is_due(
    state: ScaleByKfacState, moved: Array, decay: Array, refresh_every: ArrayLike
) -> Array:
    """Whether the inverses are made anew: at first, in time, and while the factors are young."""
    waited = state.since_refresh + 1 >= _settings.interval(refresh_every)
    # Of factors that do not change at all, with a decay of one, none is ever young.
    age = (1 - decay) * state.factor_updates.astype(decay.dtype)
    return (state.refreshes == 0) | waited | (moved & (age < 1) & (decay < 1))


def _masked(tree: PyTree, leaves: Mapping[str, Any], *, cast: bool = False) -> PyTree:
    """The tree with leaves given by path, and masked nodes for all others.

    Args:
      tree: whose structure it has.
      leaves: the new leaves.
      cast: whether they get the dtypes of the old.
    """

    def choose(path, old):
        new = leaves.get(path)
        if new is None:
            return optax.MaskedNode()
        return new.astype(jnp.result_type(old)) if cast else new

    return map_by_path(choose, tree)


def _widened(x: Array, dtype: jnp.dtype) -> Array:
    """The array at the precision of a real dtype, or at its own if that is higher."""
    real = max(contract.real_dtype(x.dtype), dtype, key=lambda d: d.itemsize)
    return x.astype(contract.complex_like(real, jnp.iscomplexobj(x)))


def _times(scale: ArrayLike, x: Array) -> Array:
    """A real scalar of any dtype times an array, in the dtype of the array."""
    return jnp.asarray(scale).astype(contract.real_dtype(x.dtype)) * x
