"""Times of steps of which some refresh what is expensive: over whole cycles of refreshes."""

import time

import jax
import numpy as np
import optax
import timing

WARMUP = 3  # steps


def time_cycles(step, carry, *, cycle, seconds, check):
    """Time `step(i, carry)`, whose results are parameters and state, donated.

    Args:
        step: from the number of the step and the carry to the next carry.
        carry: parameters and state.
        cycle: steps from one refresh to the next.
        seconds: how long to go on; at least one cycle, and five steps, are timed.
        check: called before every step; ends all by raising.

    Returns:
        The carry and the figures: seconds of the first step, of one between refreshes and of one
        with a refresh (medians, `None` without any), and in the mean; whether all is finite, and
        what the optimizer had to drop.
    """
    records = []

    def advance(carry):
        check()
        before = _count(carry[1], "refreshes")
        elapsed, carry = timing.clock(step, len(records), carry)
        records.append((elapsed, _count(carry[1], "refreshes") > before))
        return carry

    for _ in range(WARMUP):
        carry = advance(carry)
    end, least = time.monotonic() + seconds, -(-5 // cycle)
    for done in range(50):
        if done >= least and time.monotonic() > end:
            break
        for _ in range(cycle):
            carry = advance(carry)
    return carry, {"first_s": records[0][0], **_summary(records[WARMUP:]), **_health(carry)}


def median_seconds(program, *args):
    """Seconds of one call, after a first one."""
    jax.block_until_ready(program(*args))
    return float(np.median([timing.clock(program, *args)[0] for _ in range(5)]))


def _count(state, name):
    """A count in a state; 0 of optimizers that have none."""
    return int(optax.tree.get(state, name, 0))


def _summary(records):
    between, refreshed = ([t for t, r in records if r is which] for which in (False, True))
    return {
        "between_s": float(np.median(between)) if between else None,
        "refresh_s": float(np.median(refreshed)) if refreshed else None,
        "mean_s": float(np.mean([t for t, _ in records])),
        "steps": len(records),
        "refreshed_steps": len(refreshed),
    }


def _health(carry):
    counts = {name: _count(carry[1], name) for name in ("skipped_steps", "failed_refreshes")}
    return {"finite": timing.all_finite(carry), **counts}
