"""How many steps ago blocks were refreshed."""

import jax.core
import numpy as np
from jaxtyping import Int

from optax_kron.diagnostics.layout import Laid
from optax_kron.diagnostics.states import Found, number
from optax_kron.transforms.schedule import KronSchedule, RefreshSchedule, steps_since_update


def ages(found: Found, laid: Laid | None) -> dict[str, Int[np.ndarray, " N"]]:
    """The steps since the last refresh of every block, by label of the stack.

    `kfac` and `ekfac` count them. Those of other optimizers follow from the schedule, which is a
    setting. Where it is not known, or there is nothing to refresh, a stack has no entry.

    Args:
      found: A state, of numbers.
      laid: Its layout, with the settings where a transformation told them.
    """
    count, schedule = int(number(found.state.count) or 0), found.state.schedule
    if not count:
        return {}
    method = None if laid is None else laid.method
    sizes = {} if laid is None else laid.sizes
    refreshes = _schedule_of(method, found)
    if hasattr(schedule, "since_refresh"):
        if refreshes is not None and refreshes.staggered:
            most = _since_all(found, method, count)
            turns = refreshes.ages(count, sizes)
            return {} if most is None else {k: np.minimum(x, most) for k, x in turns.items()}
        age = int(number(schedule.since_refresh) or 0)
        return {k: np.full(len(x.initialized), age) for k, x in found.stacks.items()}
    if method is None:
        return {}
    if isinstance(schedule, KronSchedule):
        probability = found.hyperparams.get("update_probability", method.update_probability)
        if isinstance(probability, jax.core.Tracer):
            return {}
        age = steps_since_update(schedule, probability, count)
        return {} if age is None else {k: np.full(sizes[k][0], age) for k in sizes}
    if refreshes is None:
        return {}
    kept = {k: x for k, x in sizes.items() if method.can_refresh(found.stacks[k])}
    return refreshes.ages(count, kept)


def _since_all(found, method, count: int) -> int | None:
    """Steps since factors of layers were young, when all blocks are refreshed at every update."""
    given = found.hyperparams
    decay = number(given.get("decay", method.decay))
    every = number(given.get("factor_every", method.factor_every))
    if decay is None or every is None:
        return None
    # As the optimizer reckons, in float32.
    fading = np.float32(1) - np.float32(np.clip(decay, 0, 1))
    updates = int(number(found.state.schedule.factor_updates) or 0)
    ages = np.arange(updates, dtype=np.float32) * fading
    young = int((ages < 1).sum()) if decay < 1 else 1
    return count - (max(young, 1) - 1) * max(round(every), 1) - 1


def _schedule_of(method, found) -> RefreshSchedule | None:
    """When blocks are refreshed, if the settings tell."""
    schedule = getattr(method, "schedule", None)
    if not isinstance(schedule, RefreshSchedule):
        return None
    every = number(found.hyperparams.get("refresh_every", schedule.every))
    return None if every is None else RefreshSchedule(every, schedule.staggered)
