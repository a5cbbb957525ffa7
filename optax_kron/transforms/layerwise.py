"""Layers: their gradients as blocks, the norm constraint, the velocity, a fallback for the rest.

A parameter belongs to a layer, in whole or in part, or to none. What layers own is preconditioned;
the rest, zeros where a layer owns it, goes through the fallback or stays as it is. For a dense
layer with a bias, and a scale that is in no layer:

    kernel [3, 2], bias [2] → block [1, 4, 2], the bias as the last row    scale → the rest
"""

import dataclasses
import functools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from optax_kron.kernels import contract, kfac
from optax_kron.layers.layer import Layer
from optax_kron.layers.paths import by_path, map_by_path
from optax_kron.layers.plan import LayerPlan, check_layers, plan_layers
from optax_kron.layers.taps import Moments, Tap, Taps
from optax_kron.transforms import program, storage, validation
from optax_kron.transforms.frame import Frame
from optax_kron.transforms.layout import After, Before, Layout
from optax_kron.transforms.mesh import Share, Spec
from optax_kron.transforms.preconditioner import Advanced, Blocks, KronState
from optax_kron.transforms.stacks import all_finite, for_tree, norms
from optax_kron.types import PyTree

# Of norm_constraint="auto", for a learning rate of one and a loss that is a mean over examples.
# With a rate of 0.1 it allows for what norm_constraint=9e-4 does.
AUTO_NORM = 0.09


class LayerState(NamedTuple):
    """What is kept of the loss of layers.

    Attributes:
      loss_weight: Sum of the examples' weights in the loss of the last step, float32 [].
      mismatched_steps: Accepted steps whose gradients were 128 times larger or smaller than those
        that the taps were made beside, as of a scaled loss, int32 [].
    """

    loss_weight: Float[Array, ""]
    mismatched_steps: Int[Array, ""]


class Velocity(NamedTuple):
    """The momentum of preconditioned gradients.

    Attributes:
      blocks: Of layers, [N, d_in, d_out] by kind of block.
      rest: Of parameters in no layer, or only in part, by path; none if there is a fallback.
    """

    blocks: Mapping[str, Float[Array, "N d_in d_out"]]
    rest: Mapping[str, Array]


@program.settings
@dataclasses.dataclass(frozen=True)
class Layerwise(Layout):
    """Gradients as stacks of layers' blocks; the settings of `scale_by_kfac` that are not K-FAC's.

    Attributes:
      owner: Name of the optimizer, for messages.
      layers: Those of the loss.
      momentum: Of the velocity, or `None`.
      momentum_dtype: Dtype of that; `None` for that of the parameters.
      norm_constraint: Bound of the step, of a step a number; "auto" or `None`.
      learning_rate: What the updates will be multiplied with; of a step a number.
      fallback: The transformation of parameters in no layer, or `None`.
      block_size: Longest run of an axis with a diagonal factor that is one block, or `None`.
    """

    owner: str
    layers: Sequence[Layer]
    momentum: ArrayLike | None
    momentum_dtype: DTypeLike | None
    norm_constraint: PyTree  # a number, a schedule, "auto" or None
    learning_rate: PyTree  # a number, a schedule or None
    fallback: optax.GradientTransformation | None
    block_size: int | None

    source: ClassVar[str] = "layers"

    @property
    def has_fallback(self) -> bool:
        """See `Layout`."""
        return self.fallback is not None

    def plan(self, owner: str, tree: PyTree, multiple: int) -> LayerPlan:
        """See `Layout`."""
        return plan_layers(owner, self.layers, tree, multiple, self.block_size)

    def at(self, state: KronState) -> "Layerwise":
        """See `Layout`."""
        # The steps as the schedule of a learning rate further down the chain counts them.
        steps = state.count + state.skipped_steps
        rate, constraint = (
            x(steps) if callable(x) else x for x in (self.learning_rate, self.norm_constraint)
        )
        return dataclasses.replace(self, learning_rate=rate, norm_constraint=constraint)

    def init(self, plan: LayerPlan, params: PyTree) -> Mapping[str, PyTree]:
        """See `Layout`: a velocity of zero."""
        layers = LayerState(jnp.zeros([], jnp.float32), jnp.zeros([], jnp.int32))
        velocity = None
        if self.momentum is not None:
            velocity = for_tree(plan, lambda: self._init_velocity(plan, by_path(params)))
        return {"momentum": velocity, "layers": layers}

    def _init_velocity(self, plan, leaves):
        dtype = self.momentum_dtype

        def of_blocks(label):
            layer = plan.stacks[label][0].layer
            own = (leaves[path].dtype for m in plan.stacks[label] for path in m.layer.paths)
            shape = plan.count(label), layer.d_in, layer.d_out
            return jnp.zeros(shape, dtype or max(own, key=lambda x: x.itemsize))

        rest = {
            path: jnp.zeros_like(leaves[path], dtype or leaves[path].dtype)
            for path in plan.uncovered
            if self.fallback is None
        }
        return Velocity({label: of_blocks(label) for label in plan.stacks}, rest)

    def momentum_specs(self, share: Share, momentum: PyTree) -> PyTree:
        """See `Layout`."""
        if momentum is None:
            return None
        return Velocity(share.cut, share.shardings(momentum.rest))

    def init_fallback(self, plan: LayerPlan, params: PyTree) -> PyTree:
        """See `Layout`; warns if there are no layers."""
        if not plan.stacks and any(0 not in shape for shape in plan.leaves.values()):
            validation.warn_without_layers(self.owner, self.layers, self.fallback)
        if self.fallback is None:
            return None
        leaves = by_path(params)
        return self.fallback.init(_masked(params, {path: leaves[path] for path in plan.uncovered}))

    def rest_paths(self, plan: LayerPlan) -> Sequence[str]:
        """See `Layout`."""
        return plan.uncovered

    def rest(self, plan: LayerPlan, updates: PyTree, dtype: jnp.dtype) -> Mapping[str, Array]:
        """See `Layout`: zeros where a layer owns a part of a parameter."""
        leaves = by_path(updates)
        return {
            path: plan.without_owned(path, _widened(leaves[path], dtype)) for path in plan.uncovered
        }

    def rest_specs(self, plan: LayerPlan, updates: PyTree, share: Share) -> Mapping[str, Spec]:
        """See `Layout`."""
        leaves = by_path(updates)
        return share.shardings({path: leaves[path] for path in plan.uncovered})

    def fall_back(
        self,
        plan: LayerPlan,
        updates: PyTree,
        rest: Mapping[str, Array],
        state: KronState,
        params: PyTree | None,
        extra_args: Mapping[str, PyTree],
    ) -> tuple[Mapping[str, Array], PyTree]:
        """See `Layout`."""
        assert self.fallback is not None
        given = {} if params is None else by_path(params)
        given = {path: given[path] for path in rest if path in given}
        extra = {name: x for name, x in extra_args.items() if name != "taps"}
        others, new = optax.with_extra_args_support(self.fallback).update(
            _masked(updates, rest, cast=True),
            state.fallback,
            None if params is None else _masked(params, given),
            **extra,
        )
        # Of a parameter that is covered in part, to what is not.
        return {path: plan.without_owned(path, u) for path, u in by_path(others).items()}, new

    def split(self, plan: LayerPlan, updates: PyTree, dtype: jnp.dtype) -> Blocks:
        """See `Layout`."""
        leaves = by_path(updates)
        return plan.take({path: _widened(leaves[path], dtype) for path in plan.owned}, dtype)

    def is_finite(self, updates: PyTree) -> Bool[Array, ""]:
        """See `Layout`: parameters in no layer count too."""
        return all_finite(updates)

    def of_blocks(self, state: KronState) -> KronState:
        """See `Layout`: the velocity comes last."""
        return state._replace(momentum=None)

    def before(
        self,
        plan: LayerPlan,
        frame: Frame,
        given: Blocks,
        state: KronState,
        finite: Bool[Array, ""],
    ) -> Before:
        """See `Layout`: the gradients themselves are preconditioned."""
        limited = frame.limit(given, state, "gradients")
        return Before(given, limited, limited.blocks, finite, momentum=None)

    def after(
        self,
        plan: LayerPlan,
        frame: Frame,
        updates: PyTree,
        state: KronState,
        extra: PyTree,
        before: Before,
        advanced: Advanced,
        rest: Mapping[str, Array],
        others: Mapping[str, Array],
    ) -> After:
        """See `Layout`: the norm constraint, then the velocity, then what the fallback has made."""
        dtype, taps = frame.compute_dtype, extra
        differ = plan.scales_differ(self.split(plan, updates, dtype), taps)
        gradients = {path: _widened(g, dtype) for path, g in by_path(updates).items()}
        weight, most = loss_weight(taps, dtype)
        # A loss that weighs more than it did, once, must not lift the bound of that step.
        last = jnp.where(state.layers.loss_weight > 0, state.layers.loss_weight, most)
        scale = self._scale(before, advanced, rest, jnp.minimum(weight, last.astype(dtype)), dtype)
        made = dict(advanced.updates), {} if self.has_fallback else dict(rest)
        if scale is not None:
            made = jax.tree.map(functools.partial(_times, scale), made)
        velocity, decay = state.momentum, self.momentum
        if decay is not None:
            old = tuple(velocity)
            made = jax.tree.map(lambda u, v: _times(decay, v.astype(u.dtype)) + u, made, old)
            velocity = _stored(made, velocity, frame.random_bits(state))
        directions = {path: jnp.zeros_like(gradients[path]) for path in plan.owned} | made[1]
        plan.put(directions, frame.share.gathered(made[0]))
        for path, u in others.items():
            u = u.astype(gradients[path].dtype)
            directions[path] = directions[path] + u if path in directions else u
        result = _masked(updates, directions, cast=True)
        accepted = advanced.accepted & all_finite((result, velocity))
        layers = LayerState(weight, state.layers.mismatched_steps + differ.astype(jnp.int32))
        result = jax.tree.map(lambda u: jnp.where(accepted, u, 0), result)
        return After(result, velocity, accepted, layers)

    def _scale(self, before, advanced, rest, weight, dtype):
        """By what the norm constraint shortens a step; `None` without one."""
        if self.norm_constraint is None:
            return None
        pairs = [(g, advanced.updates[label]) for label, g in before.gradients.blocks.items()]
        if self.fallback is None:
            pairs += [(g[None], g[None]) for g in rest.values()]
        constraint, rate = self.norm_constraint, self.learning_rate
        if isinstance(constraint, str):
            constraint, rate = AUTO_NORM * weight, 1.0
        return norm_constraint_scale(pairs, rate, constraint, dtype)


def _stored(
    made: tuple[Mapping[str, Array], Mapping[str, Array]], old: Velocity, drawn: Array | None
) -> Velocity:
    """The velocity, of blocks and of the rest, in the dtypes of the old one."""

    def stored(u, v, name):
        rows = storage.store(u.reshape(u.shape or 1), v, drawn, f"momentum {name}")
        return rows.reshape(u.shape)

    pairs = zip(made, old, strict=True)
    return Velocity(*({k: stored(u, x[k], k) for k, u in tree.items()} for tree, x in pairs))


# The arguments of `layerwise`.
LAYER_SETTINGS = (
    *("layers", "momentum", "momentum_dtype", "norm_constraint", "learning_rate"),
    *("fallback", "block_size"),
)


def layerwise(
    owner: str,
    layers: Iterable[Layer],
    momentum: ArrayLike | None,
    momentum_dtype: DTypeLike | None,
    norm_constraint: optax.ScalarOrSchedule | str | None,
    learning_rate: optax.ScalarOrSchedule | None,
    fallback: optax.GradientTransformation | None,
    block_size: int | None,
) -> Layerwise:
    """The layout, with its settings checked."""
    layers = check_layers(owner, layers)
    check = validation.check_range
    check(owner, "momentum", momentum, most=1, open_right=True, optional=True)
    validation.check_dtype(owner, "momentum_dtype", momentum_dtype)
    if isinstance(norm_constraint, str):
        validation.check_choice(owner, "norm_constraint", norm_constraint, ("auto",))
    else:
        check(
            owner, "norm_constraint", norm_constraint, open_left=True, optional=True, schedule=True
        )
    check(owner, "learning_rate", learning_rate, optional=True, schedule=True)
    if not (norm_constraint is None or isinstance(norm_constraint, str)) and learning_rate is None:
        raise ValueError(
            f"{owner}: norm_constraint={norm_constraint!r} needs learning_rate, the number or "
            "schedule that the updates are multiplied with; got None. In a chain, take the bare "
            f"scale_by_{owner}, which is told the rate and does not apply it."
        )
    validation.check_fallback(owner, fallback)
    if block_size is not None and (validation.whole_number(block_size) or 0) < 1:
        raise ValueError(f"{owner}: block_size must be an integer ≥ 1 or None; got {block_size!r}.")
    return Layerwise(
        owner,
        layers,
        momentum,
        momentum_dtype,
        norm_constraint,
        learning_rate,
        fallback,
        block_size,
    )


def loss_weight(taps: Taps, dtype: DTypeLike) -> tuple[Array, int]:
    """How often the loss holds that of an example: 1 if it is their mean, N if it is their sum.

    It is the sum of the examples' weights, of the layer in which it is largest: over all batches
    that the layer meets, but once of the two uses of a tied embedding. By hand, taps without
    weights are those of a mean.

    Returns:
      It, and how often it holds that at most if it is no multiple of a sum.
    """

    def of_group(tap):
        if isinstance(tap, Moments):
            return jnp.max(tap.weight).astype(dtype)
        if tap.weights is None:
            return jnp.ones([], dtype)
        # Those of S positions are S times as large, so that an example weighs their mean.
        positions = tap.inputs.shape[2]
        return jnp.max(kfac.total_weight(tap.weights.astype(dtype), positions)) / positions

    totals = []
    for groups in taps.values():
        of_uses: dict[Hashable, list[Array]] = {}
        for tap in groups:
            of_uses.setdefault(_kind(tap), []).append(of_group(tap))
        totals += [jnp.sum(jnp.stack(weights)) for weights in of_uses.values()]
    total = jnp.max(jnp.stack([*totals, jnp.zeros([], dtype)]))
    examples = [tap.inputs.shape[1] for g in taps.values() for tap in g if isinstance(tap, Tap)]
    return jnp.where(total > 0, total, 1), max(examples, default=1)


def _kind(tap: Tap | Moments) -> Hashable:
    """What the inputs are, by type and shape: the same for all taps of a layer but a tied one."""
    if isinstance(tap, Tap):
        return jnp.issubdtype(tap.inputs.dtype, jnp.integer)
    return jnp.shape(tap.input_factor)[1:]


def norm_constraint_scale(
    pairs: Sequence[tuple[Array, Array]],
    learning_rate: ArrayLike,
    norm_constraint: ArrayLike,
    dtype: DTypeLike,
) -> Float[Array, ""]:
    """`min(1, √(c / (lr²·Σ⟨g, P⁻¹g⟩)))`, also where the products overflow.

    Args:
      pairs: Blocks [N, ...] of gradients g, and of natural gradients P⁻¹g.
      learning_rate: lr.
      norm_constraint: c. Below zero, as schedules may end, it is zero. NaN gives NaN: no step.
      dtype: Of the result.
    """
    largest = [
        jnp.max(
            jnp.stack([jnp.zeros([], dtype), *(contract.unit_of(x).astype(dtype) for x in arrays)])
        )
        for arrays in zip(*pairs, strict=True)
    ]
    units = [jnp.where(x > 0, x, 1) for x in largest]
    products = [_product(*map(_over, pair, units)).astype(dtype) for pair in pairs]
    total = sum(products, jnp.zeros([], dtype))
    # Both roots are in units of those of the largest entries.
    length = jnp.abs(jnp.asarray(learning_rate, dtype)) * jnp.sqrt(total)
    bound = jnp.sqrt(jnp.maximum(jnp.asarray(norm_constraint, dtype), 0))
    for unit in units:
        bound = bound / jnp.sqrt(unit)
    is_short = length <= bound  # nothing is, beside NaN
    return jnp.where(is_short, 1, bound / jnp.where(is_short, 1, length))


def _product(gradients: Array, natural: Array) -> Array:
    """`Σ ⟨g, P⁻¹g⟩` over blocks [N, ...], none of them below its rounding error.

    Where P is more than 1 / ε times larger along g than across it, P⁻¹g is made of what rounding
    left across g, and the product may be anything, even negative; it would not bound the step.
    """
    products = jnp.real(gradients * jnp.conj(natural))
    products = jnp.sum(products, axis=tuple(range(1, natural.ndim)))
    least = jnp.finfo(products.dtype).eps * norms(gradients) * norms(natural)
    return jnp.sum(jnp.maximum(products, least.astype(products.dtype)))


def _over(x: Array, unit: Array) -> Array:
    return x / unit.astype(contract.real_dtype(x.dtype))


def _masked(tree: PyTree, leaves: Mapping[str, Array], *, cast: bool = False) -> PyTree:
    """The tree with leaves given by path, and masked nodes for all others.

    Args:
      tree: Whose structure it has.
      leaves: The new leaves.
      cast: Whether they get the dtypes of the old.
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
