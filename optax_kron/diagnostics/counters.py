"""What a logger wants to know of a state, at every step."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array

from optax_kron.diagnostics.states import Found, check_single, find_states
from optax_kron.kernels import contract
from optax_kron.transforms.branch_kfac import ScaleByBranchKfacState
from optax_kron.transforms.fixed_norm import FixedNormState
from optax_kron.types import PyTree

COUNTERS = ("refreshes", "failed_refreshes", "skipped_steps", "outlier_steps")


def metrics(state: PyTree) -> dict[str, Array]:
    """Counters and the like of every optimizer of this library in a state, for any logger.

    Scalars that are in the state already: inside of `jax.jit` they cost next to nothing, and
    nothing is compiled again. Names depend on the transformation alone.

    Args:
      state: What `tx.init` or `tx.update` returned, or a pytree that holds it, such as the state of
        `optax.chain`, `optax.partition` or a Flax `TrainState`; traced or not.

    Returns:
      Arrays [], int32 or float32, by name:

      - `steps`, `refreshes`, `failed_refreshes`, `skipped_steps`, `outlier_steps`: as in
        `KronState`, where `steps` is its `count`; `branch_kfac` has no `refreshes`.
      - `usual_gradient_norm`: the usual norm of gradients, by which outliers are told: the root of
        the sum of squares over blocks; not without `outlier_clip`.
      - `pending_updates`: of `kron_psgd`, the share of the next update of factors.
      - `since_refresh`, `factor_updates`, `loss_weight`, `mismatched_steps`: of `kfac` and `ekfac`,
        as in their state. Of other optimizers a refresh shows as a step of `refreshes`.
      - `learning_rate`, `momentum`, `damping`, `predicted_decrease`, `reduction_ratio`,
        `accepted_steps`, `rejected_steps`, `mismatched_updates`: of `adaptive_kfac` and
        `adaptive_ekfac`, as in `AdaptiveMetrics`.
      - `update_norm`: of `branch_kfac`.
      - `fixed_norm/steps`, `fixed_norm/skipped_steps`: of `fixed_norm`.

      Where the tree holds several states, names begin with what tells their paths apart: `a/steps`
      and `b/steps` for `optax.partition` with labels "a" and "b".

    Raises:
      ValueError: If there is no such state in the tree.

    Cost: one reduction over the number of blocks of each kind.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> tx = ok.soap(1e-3)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(params, state, params)
      ...     return state, ok.diagnostics.metrics(state)
      >>> state, metrics = step(params, tx.init(params))
      >>> print(metrics["steps"], metrics["refreshes"])
      1 1
    """
    values: dict[str, Array] = {}
    for found in find_states(state):
        check_single("diagnostics.metrics", found, "Take jax.vmap(metrics)(state).")
        prefix = f"{found.name}/" if found.name else ""
        # Copies, for a state that is donated to the next step takes its arrays along.
        own = {k: jnp.array(x, copy=True) for k, x in _of_state(found).items()}
        values |= {f"{prefix}{k}": x for k, x in own.items()}
    return values


def _of_state(found: Found) -> dict[str, Array]:
    state = found.state
    if isinstance(state, FixedNormState):
        return {"steps": state.count, "skipped_steps": state.skipped_steps}
    # "count" is also a method of tuples, for those who read the type.
    values: dict[str, Array] = {"steps": state.count}
    values |= {name: getattr(state, name) for name in COUNTERS if hasattr(state, name)}
    if isinstance(state, ScaleByBranchKfacState):
        usual = [] if state.usual_norm is None else [state.usual_norm]
        values["update_norm"] = state.update_norm
    else:
        norms = state.usual_norms if isinstance(state.usual_norms, Mapping) else {}
        usual = [x for name in ("gradients", "rest") for x in norms.get(name, {}).values()]
        for part in (state.schedule, state.layers):
            if part is not None and hasattr(part, "_asdict"):
                values |= {k: x for k, x in part._asdict().items() if k != "cached"}
    if usual:
        norms = jnp.concatenate([x.norm for x in usual])
        values["usual_gradient_norm"] = contract.norm(norms, (0,))[0]
    if found.adaptive is not None:
        values |= found.adaptive.metrics._asdict()
    return values
