"""K-FAC: natural gradient whose curvature is one Kronecker product for each layer."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from optax_kron import guards
from optax_kron.blocking import complex_like
from optax_kron.capture import plan as plans
from optax_kron.capture.layers import Layer, by_path, leaf_path
from optax_kron.capture.tap import Tap
from optax_kron.kernels import contract
from optax_kron.kernels import kfac as kernels
from optax_kron.transforms import _settings, kfac_stacks

PyTree = Any


class ScaleByKfacState(NamedTuple):
    """State of `scale_by_kfac`."""

    # "count" is Optax's name for the number of steps, though tuples have a method of that name.
    count: Array  # pyright: ignore  # accepted steps, int32 []
    factor_updates: Array  # accepted steps whose taps went into the factors, int32 []
    since_refresh: Array  # accepted steps since the inverses were made, int32 []
    refreshes: Array  # times that the inverses were made, int32 []
    failed_refreshes: Array  # blocks whose new factors or inverses were not finite, int32 []
    skipped_steps: Array  # steps that were not finite and were dropped, int32 []
    stacks: (
        Mapping[str, kfac_stacks.KfacStack] | Array
    )  # by signature; an array for a tree without leaves
    momentum: PyTree | None  # velocity like the parameters, masked where a fallback has the leaf
    fallback: PyTree | None  # state of the fallback


def scale_by_kfac(
    *,
    layers: Iterable[Layer],
    decay: ArrayLike = 0.95,
    bias_correction: bool | None = None,
    damping: optax.ScalarOrSchedule = 1e-3,
    damping_rule: str = "pi",
    approx: str = "expand",
    momentum: ArrayLike | None = 0.9,
    factor_every: ArrayLike = 1,
    refresh_every: ArrayLike = 5,
    norm_constraint: ArrayLike | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    fallback: optax.GradientTransformation | None = None,
    factor_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale gradients by K-FAC: no weight decay, no learning rate, no sign flip.

    Each layer has an input factor `A` [d_in, d_in], the second moment of its inputs, and an output
    factor `G` [d_out, d_out], that of the gradients with respect to its outputs, both averaged over
    steps. The update of its parameters, as a matrix X [d_in, d_out] with the bias as the last row,
    is `A⁻¹ X G⁻¹`, damped; then comes momentum. Parameters that belong to no layer go through
    `fallback`.

    Args:
      layers: the layers of the loss, as `ok.find_layers` returns, or `ok.Layer`s made by hand.
        Parts of a parameter may belong to different layers. Parameters that a wrapper such as
        `optax.masked` hides are left out of their layers.
      decay: of the moving average of the factors, clamped to [0, 1].
      bias_correction: whether the average is that of all taps so far with weights `decay^age`, so
        that the first taps, of a network that soon is another, count for no more than later ones.
        Otherwise factors start as what the first taps give, and later are
        `decay·old + (1 − decay)·new`. `None`: corrected, but with damping_rule="trace".
      damping: λ ≥ 0, or a schedule of it.
      damping_rule: "pi": `A + π√λ I` and `G + √λ/π I`, `π² = (tr A / d_in) / (tr G / d_out)`;
        "trace": `M + max(λ·tr(M)/d, 1e-12)·I` for each factor M; "eigen": `(A ⊗ G + λI)⁻¹` exactly,
        by eigendecompositions.
      approx: how the positions at which a weight is used count: "expand", each for itself, or
        "reduce", inputs averaged and gradients summed first. A bias alone is always reduced; the
        diagonal input factor of an embedding is always that of "expand".
      momentum: μ of the velocity `v ← μ·v + u`, in [0, 1); the update is v. So a steady direction
        becomes 1/(1 − μ) times as long, and the learning rate should be as much smaller. `None` or
        0: none.
      factor_every: the factors take in taps at the first of every so many accepted steps.
      refresh_every: the inverses are made anew after so many accepted steps. And, while the factors
        are young and change fast, whenever they have: at the first 1/(1 − decay) of their updates.
      norm_constraint: c > 0. Before the momentum, updates are scaled by
        `min(1, √(c / (lr²·⟨g, P⁻¹g⟩)))`, which keeps the change of the model's outputs in bounds;
        P is the damped curvature, and the identity on parameters in no layer, but for those with a
        `fallback`, which are neither counted nor scaled. `None`: no constraint.
      learning_rate: what the updates will be multiplied with further down the chain, a number or
        a schedule. For the norm constraint alone, which needs it; nothing is scaled by it here.
      fallback: the transformation of parameters that belong to no layer, complete with a momentum
        of its own if it is to have one: `optax.scale_by_adam()`, for example. It sees these
        parameters alone. `None`: their gradients, with the same momentum.
      factor_dtype: real dtype of the stored factors and inverses, float32 by default also for
        bfloat16 and float64 parameters. The arithmetic is at least float32.
      momentum_dtype: dtype of the stored momentum. `None`: that of the parameters.
      precision: of the matrix products, as in `jax.lax.dot_general`.

    Returns:
      A transformation. Its `update(grads, state, params=None, *, taps)` returns updates with the
      structure, shapes and dtypes of the gradients. `taps` maps the name of each layer to what it
      saw, as `ok.value_and_grad_with_taps` returns, or `ok.Taps` by hand. Gradients that are not
      finite, or taps that are not at a step that reads them, give a zero update and leave the state
      as it was, but for the count of skipped steps; so does an update that overflows, except that
      factors which have moved stay. A block whose factors or inverse would not be finite keeps the
      last good ones; before there are any, its update is the gradient.

    Raises:
      ValueError: for a setting out of range, at construction; in `init` and `update`, for layers
        that do not match the parameters, or that share one; in `update`, for taps that are missing
        or do not fit the layers.

    Cost, for a layer with d_in inputs (the bias's one included), d_out outputs, N data at S
    positions and V columns. State: 2·(d_in² + d_out²) + d_in·d_out numbers; of an embedding 2·d_in
    instead of 2·d_in².
    A step: 2·d_in·d_out·(d_in + d_out) operations, twice that with "eigen". Taking in taps:
    2·N·S·(d_in² + V·d_out²). A refresh: 2·(d_in³ + d_out³), up to twice that for sizes ≤ 256, with
    "eigen" about 9·(d_in³ + d_out³).

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> inputs, targets = jnp.ones((5, 3)), jnp.zeros((5, 2))
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
      >>> tx = ok.scale_by_kfac(layers=[ok.Layer("dense", kernel="kernel", bias="bias")])
      >>> state = tx.init(params)
      >>> residuals = inputs @ params["kernel"] + params["bias"] - targets
      >>> grads = {"kernel": inputs.T @ residuals / 5, "bias": residuals.mean(0)}
      >>> seen = jnp.append(inputs, jnp.ones((5, 1)), axis=1)  # the bias's ones are the last column
      >>> taps = ok.Taps({"dense": ok.Tap(seen, residuals)})
      >>> updates, state = tx.update(grads, state, params, taps=taps)

    Sources: Martens and Grosse (2015), arXiv:1503.05671; Grosse and Martens (2016),
    arXiv:1602.01407; Eschenhagen et al. (2023), arXiv:2311.00636.
    """
    owner = "kfac"
    layers = plans.check_layers(owner, layers)
    _settings.check_range(owner, "decay", decay, least=-float("inf"))
    _settings.check_range(owner, "damping", damping, schedule=True)
    _settings.check_choice(owner, "damping_rule", damping_rule, kernels.DAMPING_RULES)
    _settings.check_choice(owner, "approx", approx, kernels.APPROXIMATIONS)
    _settings.check_range(owner, "momentum", momentum, most=1, open_right=True, optional=True)
    _check_interval(owner, "factor_every", factor_every)
    _check_interval(owner, "refresh_every", refresh_every)
    _settings.check_range(owner, "norm_constraint", norm_constraint, open_left=True, optional=True)
    _settings.check_range(owner, "learning_rate", learning_rate, optional=True, schedule=True)
    if norm_constraint is not None and learning_rate is None:
        raise ValueError(
            f"{owner}: norm_constraint={norm_constraint!r} needs learning_rate, the number or "
            "schedule that the updates are multiplied with; got None."
        )
    if fallback is not None:
        if not isinstance(fallback, optax.GradientTransformation):
            raise ValueError(
                f"{owner}: fallback must be an optax.GradientTransformation, such as "
                f"optax.scale_by_adam(), or None; got {fallback!r}."
            )
        fallback = optax.with_extra_args_support(fallback)
    dtype = _settings.real_factor_dtype(owner, factor_dtype)
    _settings.check_dtype(owner, "momentum_dtype", momentum_dtype)
    has_momentum = not _settings.is_off(momentum)
    if bias_correction is None:
        bias_correction = damping_rule != "trace"
    compute = jnp.promote_types(dtype, jnp.float32)
    curvature = kfac_stacks.Curvature(damping_rule, approx, precision)

    def init(params: PyTree) -> Any:
        plan = plans.plan_layers(owner, layers, params)
        leaves = by_path(params)
        # Each counter is a buffer of its own, so that the state can be donated.
        counters = ("count", "factor_updates", "since_refresh", "refreshes", "failed_refreshes")
        velocity = {
            path: jnp.zeros(leaf.shape, momentum_dtype or leaf.dtype)
            for path, leaf in leaves.items()
            if fallback is None or path in plan.owned
        }
        rest = {path: leaves[path] for path in plan.uncovered}
        return ScaleByKfacState(
            **{name: jnp.zeros([], jnp.int32) for name in (*counters, "skipped_steps")},
            stacks=curvature.init(plan, dtype),
            momentum=_masked(params, velocity) if has_momentum else None,
            fallback=None if fallback is None else fallback.init(_masked(params, rest)),
        )

    def update(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        taps: Mapping[str, Tap | Iterable[Tap]] | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        if params is not None:
            _settings.check_like(owner, updates, params)
        plan = plans.plan_layers(owner, layers, updates)
        _settings.check_stacks(owner, plan, state.stacks, "layers")
        if not plan.leaves:
            return updates, state._replace(count=state.count + 1)
        seen = plan.read_taps(taps)
        strength = damping(state.count) if callable(damping) else damping
        rate = jnp.clip(jnp.asarray(decay, compute), 0, 1)
        weight = _corrected(rate, state.factor_updates) if bias_correction else rate

        finite = guards.all_finite(updates)
        moving = finite & (state.count % _interval(factor_every) == 0)
        move = functools.partial(curvature.move, plan, taps=seen, decay=weight, allowed=moving)
        if isinstance(factor_every, int) and factor_every == 1:
            stacks, failed_moves, sound = move(state.stacks)  # a branch would copy the state
        else:
            stacks, failed_moves, sound = jax.lax.cond(
                moving,
                move,
                lambda stacks: (stacks, jnp.zeros([], jnp.int32), jnp.ones([], bool)),
                state.stacks,
            )
        sound, moved = finite & sound, moving & sound
        due = sound & _refresh_is_due(state, moved, rate, refresh_every)
        inverses, failed_inverses = guards.replaced_if(
            curvature.refresh,
            due,
            ({label: stack.inverse for label, stack in stacks.items()}, jnp.zeros([], jnp.int32)),
            {label: stack[:3] for label, stack in stacks.items()},
            strength,
        )
        stacks = {label: stack._replace(inverse=inverses[label]) for label, stack in stacks.items()}

        gradients = {path: _widened(g, compute) for path, g in by_path(updates).items()}
        rest = {path: plan.without_owned(path, gradients[path]) for path in plan.uncovered}
        if fallback is None:
            directions = dict(gradients)
        else:
            directions = {path: jnp.zeros_like(gradients[path]) for path in plan.owned}
        blocks = plan.take(gradients, compute)
        natural = curvature.precondition(stacks, blocks, strength)
        plan.put(directions, natural)
        if norm_constraint is not None:
            products = [jnp.sum(blocks[label] * natural[label]) for label in blocks]
            if fallback is None:
                products += [_squared_norm(g, compute) for g in rest.values()]
            # The steps as the schedule of a learning rate further down the chain counts them.
            steps = state.count + state.skipped_steps
            lr = learning_rate(steps) if callable(learning_rate) else learning_rate
            scale = _constrain(sum(products, jnp.zeros([], compute)), lr, norm_constraint)
            directions = {path: _times(scale, u) for path, u in directions.items()}
        velocity = state.momentum
        if has_momentum and momentum is not None:
            old = by_path(state.momentum)
            directions = {
                path: _times(momentum, old[path].astype(u.dtype)) + u
                for path, u in directions.items()
            }
            velocity = _masked(state.momentum, directions, cast=True)
        fallback_state = state.fallback
        if fallback is not None:
            given = {} if params is None else by_path(params)
            given = {path: given[path] for path in rest if path in given}
            others, fallback_state = fallback.update(
                _masked(updates, rest, cast=True),
                state.fallback,
                None if params is None else _masked(params, given),
                **extra_args,
            )
            for path, u in by_path(others).items():
                # Of a parameter that is covered in part, to what is not.
                u = plan.without_owned(path, u.astype(gradients[path].dtype))
                directions[path] = directions[path] + u if path in directions else u

        result = _masked(updates, directions, cast=True)
        accepted = sound & guards.all_finite((result, velocity))
        new_state = ScaleByKfacState(
            count=state.count + accepted.astype(jnp.int32),
            factor_updates=state.factor_updates + moved.astype(jnp.int32),
            since_refresh=jnp.where(due, 0, state.since_refresh + accepted.astype(jnp.int32)),
            refreshes=state.refreshes + due.astype(jnp.int32),
            failed_refreshes=state.failed_refreshes + failed_moves + failed_inverses,
            skipped_steps=state.skipped_steps + (~accepted).astype(jnp.int32),
            stacks=stacks,
            momentum=guards.select(accepted, velocity, state.momentum),
            fallback=guards.select(accepted, fallback_state, state.fallback),
        )
        return jax.tree.map(lambda u: jnp.where(accepted, u, 0), result), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def kfac(
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    layers: Iterable[Layer],
    decay: ArrayLike = 0.95,
    bias_correction: bool | None = None,
    damping: optax.ScalarOrSchedule = 1e-3,
    damping_rule: str = "pi",
    approx: str = "expand",
    momentum: ArrayLike | None = 0.9,
    factor_every: ArrayLike = 1,
    refresh_every: ArrayLike = 5,
    norm_constraint: ArrayLike | None = None,
    weight_decay: ArrayLike = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    fallback: optax.GradientTransformation | None = None,
    factor_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC: natural gradient descent with a Kronecker-factored curvature of each layer.

    With a learning rate this is a complete optimizer; without, the bare preconditioner, to chain:
    `optax.chain(ok.kfac(layers=layers), optax.scale_by_learning_rate(1e-3))` equals
    `ok.kfac(1e-3, layers=layers)`. Every update needs `taps`.

    Args:
      learning_rate: a number or a schedule; `None` leaves the updates unscaled and unflipped.
      layers: see `scale_by_kfac`, as for all arguments up to `norm_constraint`.
      decay: of the moving average of the factors.
      bias_correction: whether the first taps count for no more in it than later ones.
      damping: λ, a number or a schedule.
      damping_rule: "pi", "trace" or "eigen".
      approx: "expand" or "reduce", for weights that are used at several positions.
      momentum: of the velocity.
      factor_every: steps from one update of the factors to the next.
      refresh_every: steps from one update of the inverses to the next, once the factors have
        settled.
      norm_constraint: bound of the squared length of a step in the metric of the curvature; needs a
        learning rate.
      weight_decay: decoupled weight decay, times the learning rate; needs `params` in `update`.
      mask: which parameters decay, as in `optax.add_decayed_weights`.
      fallback: the transformation of parameters that belong to no layer; `None`: their gradients,
        with the same momentum. The learning rate comes after it.
      factor_dtype: real dtype of the stored factors.
      momentum_dtype: dtype of the stored momentum.
      precision: of the matrix products.

    Returns:
      A gradient transformation; its cost is that of `scale_by_kfac`.

    Raises:
      ValueError: as `scale_by_kfac`, and for a negative learning rate or weight decay.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> inputs, kernel = jax.random.normal(jax.random.key(0), (2, 6, 4))
      >>> targets = inputs @ kernel[:4]
      >>> params = jnp.zeros((4, 4))
      >>> tx = ok.kfac(0.5, layers=[ok.Layer("linear", kernel="")], momentum=None)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     residuals = inputs @ params - targets
      ...     # The curvature of half the squared error is the identity: one column for each output.
      ...     columns = jnp.broadcast_to(jnp.eye(4)[:, None, None, None], (4, 1, 6, 1, 4))
      ...     taps = ok.Taps({"linear": ok.Tap(inputs, columns)})
      ...     updates, state = tx.update(inputs.T @ residuals / 6, state, params, taps=taps)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(30):
      ...     params, state = step(params, state)
      >>> bool(jnp.max(jnp.abs(inputs @ params - targets)) < 0.01)
      True

    Sources: Martens and Grosse (2015), arXiv:1503.05671; Grosse and Martens (2016),
    arXiv:1602.01407; Eschenhagen et al. (2023), arXiv:2311.00636.
    """
    _settings.check_range("kfac", "learning_rate", learning_rate, optional=True, schedule=True)
    _settings.check_range("kfac", "weight_decay", weight_decay)
    preconditioner = scale_by_kfac(
        layers=layers,
        decay=decay,
        bias_correction=bias_correction,
        damping=damping,
        damping_rule=damping_rule,
        approx=approx,
        momentum=momentum,
        factor_every=factor_every,
        refresh_every=refresh_every,
        norm_constraint=norm_constraint,
        learning_rate=learning_rate,
        fallback=fallback,
        factor_dtype=factor_dtype,
        momentum_dtype=momentum_dtype,
        precision=precision,
    )
    return _settings.complete(preconditioner, learning_rate, weight_decay, mask)


def _corrected(decay: Array, updates: Array) -> Array:
    """The weight of the old factors that makes a moving average one without bias to its start."""
    count = updates.astype(decay.dtype)
    weight = decay * (1 - decay**count) / jnp.where(decay < 1, 1 - decay ** (count + 1), 1)
    return jnp.where(decay < 1, weight, count / (count + 1))


def _refresh_is_due(
    state: ScaleByKfacState, moved: Array, decay: Array, refresh_every: ArrayLike
) -> Array:
    """Whether the inverses are made anew: at first, in time, and while the factors are young."""
    waited = state.since_refresh + 1 >= _interval(refresh_every)
    # Of factors that do not change at all, with a decay of one, none is ever young.
    age = (1 - decay) * state.factor_updates.astype(decay.dtype)
    return (state.refreshes == 0) | waited | (moved & (age < 1) & (decay < 1))


def _check_interval(owner: str, name: str, value: Any) -> None:
    """Raise unless a number of steps is a whole one, from 1; traced values pass."""
    _settings.check_range(owner, name, value, least=1)
    if not isinstance(value, jax.core.Tracer) and float(value) != round(float(value)):
        raise ValueError(f"{owner}: {name} must be an integer ≥ 1; got {value!r}.")


def _interval(value: ArrayLike) -> Array:
    """A number of steps, which may come as a traced float, as an int32 ≥ 1."""
    return jnp.maximum(jnp.round(jnp.asarray(value, jnp.float32)), 1).astype(jnp.int32)


def _masked(tree: PyTree, leaves: Mapping[str, Any], *, cast: bool = False) -> PyTree:
    """The tree with leaves given by path, and masked nodes for all others.

    Args:
      tree: whose structure it has.
      leaves: the new leaves.
      cast: whether they get the dtypes of the old.
    """

    def choose(path, old):
        new = leaves.get(leaf_path(path))
        if new is None:
            return optax.MaskedNode()
        return new.astype(old.dtype) if cast else new

    return jax.tree_util.tree_map_with_path(choose, tree)


def _widened(x: Array, dtype: jnp.dtype) -> Array:
    """The array at the precision of a real dtype, or at its own if that is higher."""
    real = max(contract.real_dtype(x.dtype), dtype, key=lambda d: d.itemsize)
    return x.astype(complex_like(real, jnp.iscomplexobj(x)))


def _times(scale: ArrayLike, x: Array) -> Array:
    """A real scalar of any dtype times an array, in the dtype of the array."""
    return jnp.asarray(scale).astype(contract.real_dtype(x.dtype)) * x


def _squared_norm(x: Array, dtype: DTypeLike) -> Array:
    return jnp.sum(contract.squared_magnitude(x)).astype(dtype)


def _constrain(product: Array, learning_rate: Any, norm_constraint: ArrayLike) -> Array:
    """`min(1, √(c / (lr²·⟨g, P⁻¹g⟩)))`."""
    length = jnp.square(jnp.asarray(learning_rate, product.dtype)) * product
    bound = jnp.asarray(norm_constraint, product.dtype)
    return jnp.where(length > bound, jnp.sqrt(bound / jnp.where(length > bound, length, 1)), 1)
