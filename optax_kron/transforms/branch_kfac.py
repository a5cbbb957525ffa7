"""Branch-factored K-FAC: the curvature of a state, brought to the parameters by a random map."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array

from optax_kron.kernels import branches as kernels
from optax_kron.kernels import contract
from optax_kron.transforms import mesh, outliers, program, validation
from optax_kron.transforms.stacks import all_finite, select
from optax_kron.types import PyTree


class ScaleByBranchKfacState(NamedTuple):
    """State of `scale_by_branch_kfac`.

    `optax.tree.get(state, name)` finds a field inside the state of a chain or wrapper.

    Attributes:
      count: steps that were accepted, int32 [].
      failed_refreshes: covariances that had no inverse, int32 [].
      skipped_steps: steps whose gradient or branches were not finite, int32 [].
      update_norm: Euclidean norm of the last preconditioned gradient, float32 [].
      key: raw PRNG key, uint32 [2]. It never changes: each draw folds in `count`.
      outlier_steps: steps whose gradient was an outlier and was scaled down, int32 [].
      usual_norm: of the gradients, of which there is one block; `None` without `outlier_clip`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> tx = ok.branch_kfac(1e-3)
      >>> state = tx.init(jnp.ones(3))
      >>> _, state = tx.update(jnp.array([3.0, 0.0, 4.0]), state)
      >>> print(optax.tree.get(state, "update_norm"))
      5.0
    """

    # "count" is Optax's name for the number of steps, though tuples have a method of that name.
    count: Array  # pyright: ignore
    failed_refreshes: Array
    skipped_steps: Array
    update_norm: Array
    key: Array
    outlier_steps: Array
    usual_norm: outliers.Usual | None


def scale_by_branch_kfac(
    *,
    damping: optax.ScalarOrSchedule = 1e-3,
    blocks: ArrayLike = 4,
    outlier_clip: ArrayLike | None = 10.0,
    redraw: bool = True,
    seed: int | Array = 2027,
) -> optax.GradientTransformationExtraArgs:
    """Precondition gradients with the curvature of a state of the model, such as hidden units.

    `branches` B [K, D] are samples of the state. With `C = cov(B) + δI`, cut into diagonal blocks,
    and a random map P [n, D] from the state to all n parameters, normal with variance 1/D, the
    update is `P C⁻¹ Pᵀ g`. The map is drawn in chunks whenever it is needed, and never held whole.

    Args:
      damping: δ ≥ 0, or a schedule of it.
      blocks: number of contiguous diagonal blocks, from 1 to D, whose sizes differ by at most one,
        the larger first.
      outlier_clip: a gradient that is more than so many times as long as it usually is, is scaled
        down to that; ≥ 1. The usual norm is a running mean. `None`: no bound.
      redraw: draw another map at every step; otherwise it is the same throughout.
      seed: an integer or a PRNG key; the map is drawn from it.

    Returns:
      A transformation. Its `update(grads, state, params=None, *, branches=None)` returns updates
      with the structure, shapes and dtypes of the gradients. Without branches those are the
      gradients; so they are, with a warning, if branches are no matrix. A gradient or branches that
      are not finite give a zero update and leave the state as it was, but for the count of skipped
      steps. A covariance without an inverse is replaced by its diagonal, and `failed_refreshes`
      counts it.

    Raises:
      ValueError: for a setting out of range, at construction, unless it is traced; in `update`, for
        more blocks than dimensions, branches that are no array or without elements, or gradients
        unlike the parameters.

    Cost, for n parameters. State: four numbers and a key. A step: 2·n·D normal numbers, 4·n·D
    operations, and 2·K·D² + 2·D³ for the covariance. Memory: that of the gradients once more, and
    some MiB.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> tx = ok.scale_by_branch_kfac(blocks=2)
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> state = tx.init(params)
      >>> hidden = jax.random.normal(jax.random.key(0), (10, 5))
      >>> updates, state = tx.update(params, state, params, branches=hidden)
    """
    owner = "branch_kfac"
    validation.check_range(owner, "damping", damping, schedule=True)
    validation.check_interval(owner, "blocks", blocks)
    outliers.check(owner, outlier_clip)
    validation.check_switch(owner, "redraw", redraw)
    validation.check_seed(owner, seed)

    def init(params: PyTree) -> ScaleByBranchKfacState:
        del params
        # Each counter is a buffer of its own, so that the state can be donated.
        return ScaleByBranchKfacState(
            count=jnp.zeros([], jnp.int32),
            failed_refreshes=jnp.zeros([], jnp.int32),
            skipped_steps=jnp.zeros([], jnp.int32),
            outlier_steps=jnp.zeros([], jnp.int32),
            usual_norm=None if outlier_clip is None else outliers.start(1),
            update_norm=jnp.zeros([], jnp.float32),
            key=validation.key_data(seed),
        )

    def update(
        updates: PyTree,
        state: ScaleByBranchKfacState,
        params: PyTree | None = None,
        *,
        branches: Array | None = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, ScaleByBranchKfacState]:
        del extra_args
        if params is not None:
            validation.check_like(owner, updates, params)
        updates = program.as_arrays(updates)
        validation.check_inexact(owner, updates)
        known = None if branches is None else _checked_branches(owner, branches, blocks)
        strength = damping(state.count) if callable(damping) else damping
        return program.once(
            _update_globally, updates, state, known, strength, blocks, outlier_clip, bool(redraw)
        )

    return program.transformation(init, update)


def branch_kfac(
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    damping: optax.ScalarOrSchedule = 1e-3,
    blocks: ArrayLike = 4,
    clip: ArrayLike | None = None,
    weight_decay: ArrayLike | None = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    outlier_clip: ArrayLike | None = 10.0,
    redraw: bool = True,
    seed: int | Array = 2027,
) -> optax.GradientTransformationExtraArgs:
    """Branch-factored K-FAC: gradients preconditioned with the curvature of a state.

    With a learning rate (5e-3 is a start) this is a complete optimizer; without, the bare
    preconditioner, to chain.

    All arguments that are not listed here are those of `scale_by_branch_kfac`, as is the cost.

    Args:
      learning_rate: A number or a schedule; `None` leaves the updates unscaled and unflipped.
      clip: Bound of the parameters themselves: a step ends within [-clip, clip]. Needs a learning
        rate, and `params` in `update`. `None`: no bound.
      weight_decay: Decoupled weight decay, times the learning rate; needs `params` in `update`.
      mask: Which parameters decay, as in `optax.add_decayed_weights`.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: as `scale_by_branch_kfac`, for a negative learning rate, for a clip without one or
        that is not positive; in `update`, for a clip without `params`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> def loss_fn(w, x, y):
      ...     hidden = jnp.tanh(x @ w)
      ...     return jnp.mean((hidden.sum(axis=1) - y) ** 2), hidden
      >>> x, w = jax.random.normal(jax.random.key(0), (20, 3)), jnp.zeros((3, 4))
      >>> y = x[:, 0]
      >>> tx = ok.branch_kfac(0.02, damping=0.1)
      >>> state = tx.init(w)
      >>> @jax.jit
      ... def step(w, state):
      ...     (loss, hidden), grads = jax.value_and_grad(loss_fn, has_aux=True)(w, x, y)
      ...     updates, state = tx.update(grads, state, w, branches=hidden)
      ...     return optax.apply_updates(w, updates), state, loss
      >>> for _ in range(200):
      ...     w, state, loss = step(w, state)
      >>> bool(loss < 0.1)
      True
    """
    arguments = dict(locals())
    del arguments["clip"]
    owner = "branch_kfac"
    validation.check_range(owner, "clip", clip, open_left=True, optional=True)
    if clip is not None and learning_rate is None:
        raise ValueError(
            f"{owner}: clip bounds the parameters after a whole step, so it needs learning_rate; "
            "got None."
        )
    complete = validation.complete(owner, scale_by_branch_kfac, arguments)
    return complete if clip is None else optax.chain(complete, _within(owner, clip))


def _update_globally(updates: PyTree, *operands: PyTree) -> tuple[PyTree, ScaleByBranchKfacState]:
    """One step, on a mesh too: no part of it belongs to a device."""
    share = mesh.ambient()
    return share.globally(_update, updates, *operands, out=(share.shardings(updates), mesh.WHOLE))


def _update(
    updates: PyTree,
    state: ScaleByBranchKfacState,
    branches: Array | None,
    damping: ArrayLike,
    blocks: ArrayLike,
    outlier_clip: ArrayLike | None,
    redraw: bool,
) -> tuple[PyTree, ScaleByBranchKfacState]:
    """One step."""
    leaves, treedef = jax.tree.flatten(updates)
    made = jax.eval_shape(lambda: None if outlier_clip is None else outliers.start(1))
    validation.check_state("branch_kfac", made, state.usual_norm)
    scale, usual, found = jnp.ones([], jnp.float32), state.usual_norm, jnp.zeros([], bool)
    if outlier_clip is not None and usual is not None and leaves:
        bounded = outliers.bound(_norm(leaves)[None], usual, outlier_clip)
        scale, usual, found = bounded.scale[0], bounded.usual, bounded.found[0]
    finite, failed, directions = all_finite(leaves), jnp.zeros([], jnp.int32), leaves
    if branches is not None and any(x.size for x in leaves):
        finite &= all_finite(branches)
        compute = contract.widest_dtype(leaves)
        key = validation.key_of(state.key)
        key = jax.random.fold_in(key, state.count) if redraw else key
        projected = kernels.project(key, leaves, branches.shape[1], compute)
        known = jnp.where(finite, branches.astype(compute), 0)
        solved, sound = kernels.solve(known, projected, damping, validation.interval(blocks))
        failed = (~sound).astype(jnp.int32)
        directions = kernels.bring_back(key, solved, leaves)
    directions = [x * scale.astype(contract.real_dtype(x.dtype)) for x in directions]
    norm = _norm(directions)
    accepted = finite & jnp.isfinite(norm)
    one = accepted.astype(jnp.int32)
    new_state = ScaleByBranchKfacState(
        count=state.count + one,
        failed_refreshes=state.failed_refreshes + jnp.where(accepted, failed, 0),
        skipped_steps=state.skipped_steps + 1 - one,
        outlier_steps=state.outlier_steps + jnp.where(found, one, 0),
        usual_norm=select(accepted, usual, state.usual_norm),
        update_norm=jnp.where(accepted, norm, state.update_norm),
        key=state.key,
    )
    result = [jnp.where(accepted, x, 0).astype(x.dtype) for x in directions]
    return treedef.unflatten(result), new_state


def _within(owner: str, clip: ArrayLike) -> optax.GradientTransformationExtraArgs:
    """Cut updates so that the parameters end within [-clip, clip]; complex ones by part."""

    def bound(p, u):
        new = p + u
        limit = jnp.asarray(clip, contract.real_dtype(new.dtype))
        if jnp.iscomplexobj(new):
            parts = (jnp.clip(x, -limit, limit) for x in (new.real, new.imag))
            return (jax.lax.complex(*parts) - p).astype(u.dtype)
        return (jnp.clip(new, -limit, limit) - p).astype(u.dtype)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(f"{owner}: clip needs params: tx.update(grads, state, params).")
        return jax.tree.map(bound, params, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _checked_branches(owner: str, branches: object, blocks: ArrayLike) -> Array | None:
    """The matrix of branches, or `None` if they are not one."""
    if not jax.tree_util.all_leaves([branches]):
        raise ValueError(
            f"{owner}: branches must be one array [K, D]; got a {type(branches).__name__}. Put "
            "several states side by side by jnp.concatenate along their last axis."
        )
    try:
        known = jnp.asarray(branches)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{owner}: branches must be one array [K, D]; got {branches!r}."
        ) from error
    if known.ndim != 2:
        warnings.warn(
            f"{owner}: branches of shape {known.shape} are not a matrix [K, D], so the update is "
            "the plain gradient. Samples [..., D] become one by branches.reshape(-1, D).",
            stacklevel=3,
        )
        return None
    if not jnp.issubdtype(known.dtype, jnp.floating):
        raise ValueError(f"{owner}: branches must be floating-point; got {known.dtype}.")
    if not known.size:
        raise ValueError(f"{owner}: branches must have elements; got shape {known.shape}.")
    if not isinstance(blocks, jax.core.Tracer) and int(np.asarray(blocks)) > known.shape[1]:
        raise ValueError(
            f"{owner}: blocks={blocks} is more than branches have dimensions, {known.shape[1]}; "
            f"got branches of shape {known.shape}. Set blocks to a number up to {known.shape[1]}."
        )
    return known


def _norm(leaves: list[Array]) -> Array:
    """Euclidean norm of all leaves, float32; squares neither overflow nor vanish."""
    largest = [contract.largest_magnitude(x).astype(jnp.float32) for x in leaves]
    unit = jnp.max(jnp.stack([*largest, jnp.zeros([], jnp.float32)]))
    safe = jnp.where((unit > 0) & jnp.isfinite(unit), unit, 1)
    total = jnp.zeros([], jnp.float32)
    for x in map(contract.widen, leaves):
        relative = x / safe.astype(contract.real_dtype(x.dtype))
        total += jnp.sum(contract.squared_magnitude(relative)).astype(jnp.float32)
    return jnp.where(jnp.isfinite(unit), safe * jnp.sqrt(total), unit)
