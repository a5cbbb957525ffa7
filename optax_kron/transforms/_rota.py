"""When which blocks are refreshed: all at once now and then, or some of them at every step."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from optax_kron import guards
from optax_kron.blocking import BlockPlan
from optax_kron.kernels import flow
from optax_kron.transforms import _program, _settings

PyTree = Any
# From a stack's label, what a refresh replaces, and what it reads: both [n, ...] of some blocks.
# Returns the former, and whether the refresh of a block has failed, bool [n].
Refresh = Callable[[str, PyTree, PyTree], tuple[PyTree, Array]]


@_program.settings
@dataclasses.dataclass(frozen=True)
class Rota:
    """Every block once in so many steps.

    Attributes:
      every: how many, an int ≥ 1; it may be traced unless staggered.
      staggered: deal the blocks out to the steps between, so that no step refreshes them all.
    """

    every: ArrayLike
    staggered: bool

    def refresh(
        self,
        plan: BlockPlan,
        refresh: Refresh,
        old: Mapping[str, PyTree],
        read: Mapping[str, PyTree],
        count: Array,
        *,
        allowed: Array,
        all_due: Array,
    ) -> tuple[dict[str, PyTree], Array, Array]:
        """Refresh the blocks whose turn it is.

        Args:
          plan: of the blocks.
          refresh: of some blocks of a stack.
          old: what is replaced, by label: a pytree of arrays [N, ...].
          read: what is only read, likewise.
          count: steps so far, int [].
          allowed: whether anything may be refreshed, bool [].
          all_due: whether all blocks are, whosever turn it is, bool [].

        Returns:
          The new ones by label, how many blocks failed, int32 [], and whether there was a refresh
          at all, bool [].
        """
        none = jnp.zeros([], jnp.int32)
        if not old:
            return {}, none, jnp.zeros([], bool)
        if not self.staggered:
            due = allowed & (all_due | (count % _settings.interval(self.every) == 0))

            def refresh_all(carry, read):
                old, failures = carry
                new = {}
                for label in old:
                    new[label], failed = refresh(label, old[label], read[label])
                    failures += jnp.sum(failed, dtype=jnp.int32)
                return new, failures

            new, failures = guards.replaced_if(refresh_all, due, (dict(old), none), dict(read))
            return new, failures, due

        every = int(np.asarray(self.every))
        turns = _deal(plan, old, every)
        turn = count % every
        first = jnp.where(all_due, 0, turn)
        last = jnp.where(allowed, jnp.where(all_due, every, turn + 1), first)

        def take_turn(turn, carry):
            old, failures = carry
            new = {}
            for label in old:
                new[label], failed = _refresh_rows(
                    refresh, label, old[label], read[label], jnp.asarray(turns[label])[turn]
                )
                failures += failed
            return new, failures

        new, failures = flow.fori_loop(first, last, take_turn, (dict(old), none))
        busy = np.array(
            [any(t[i, 0] < plan.count(x) for x, t in turns.items()) for i in range(every)]
        )
        return new, failures, allowed & (all_due | jnp.asarray(busy)[turn])


def _refresh_rows(
    refresh: Refresh, label: str, old: PyTree, read: PyTree, rows: Array
) -> tuple[PyTree, Array]:
    """Refresh some rows of a stack: those within it."""
    count = len(jax.tree.leaves(old)[0])

    def some(operands):
        old, read = operands
        taken = jax.tree.map(lambda x: jnp.take(x, rows, axis=0, mode="clip"), (old, read))
        new, failed = refresh(label, *taken)
        put = jax.tree.map(lambda x, y: x.at[rows].set(y, mode="drop"), old, new)
        return put, jnp.sum(failed & (rows < count), dtype=jnp.int32)

    return flow.cond(rows[0] < count, some, lambda x: (x[0], jnp.zeros([], jnp.int32)), (old, read))


def _deal(plan: BlockPlan, stacks: Iterable[str], turns: int) -> dict[str, np.ndarray]:
    """Whose turn is when: for each stack the rows [turns, n], filled up with a row beyond it.

    The blocks are dealt one by one, the largest first, so that all turns cost about as much.
    """
    labels = sorted(stacks, key=lambda label: -prod(plan.stacks[label].shape))
    table, dealt = {}, 0
    for label in labels:
        count = plan.count(label)
        rows = np.full((turns, -(-count // turns)), count, np.int32)
        for row in range(count):
            rows[(dealt + row) % turns, row // turns] = row
        table[label], dealt = rows, dealt + count
    return table


def check_rota(owner: str, refresh_every: ArrayLike, stagger: bool) -> Rota:
    """The rota of two settings.

    Raises:
      ValueError: if they are out of range; or staggered refreshes are to come at an interval that
        is only known at run time, as under `optax.inject_hyperparams`.
    """
    _settings.check_interval(owner, "refresh_every", refresh_every)
    if stagger and isinstance(refresh_every, jax.core.Tracer):
        raise ValueError(
            f"{owner}: stagger=True needs refresh_every as a number, not traced, as it decides how "
            f"blocks are dealt out; got {refresh_every!r}. With optax.inject_hyperparams, pass "
            'static_args=("refresh_every",).'
        )
    # Whoever deals out the turns needs a number, which an array is not inside of a program.
    return Rota(int(np.asarray(refresh_every)) if stagger else refresh_every, bool(stagger))
