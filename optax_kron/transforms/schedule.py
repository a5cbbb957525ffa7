"""When blocks are refreshed: all of them now and then, or some of them at every step."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from optax_kron.kernels import flow
from optax_kron.transforms import program, validation
from optax_kron.transforms.mesh import ALONE, Share
from optax_kron.transforms.stacks import cond_in_place
from optax_kron.types import PyTree

# From stacks by label, or some rows of one, and operands that they share: the stacks refreshed, and
# which of their blocks have failed, bool [n] by label.
Refresh = Callable[[Mapping[str, NamedTuple], PyTree], tuple[Mapping[str, NamedTuple], PyTree]]


class Refreshed(NamedTuple):
    """What becomes of stacks at a step of a schedule."""

    stacks: Mapping[str, NamedTuple]
    failures: Int[Array, ""]  # blocks that kept what they had, of those on this device
    happened: Bool[Array, ""]  # whether any block was refreshed


@program.settings
@dataclasses.dataclass(frozen=True)
class RefreshSchedule:
    """Refreshes each block once every `every` steps, optionally staggered.

    Attributes:
      every: The number of steps, an int ≥ 1; it may be traced unless staggered.
      staggered: Whether the blocks are dealt out to the steps between, so that each step refreshes
        some of them and none refreshes them all.
    """

    every: ArrayLike
    staggered: bool

    def is_due(self, count: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether a number of steps is a multiple of the interval."""
        return count % validation.interval(self.every) == 0

    def ages(self, count: int, sizes: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
        """How many steps ago each block was refreshed, as far as the interval tells.

        Args:
          count: The number of steps so far, ≥ 1.
          sizes: As in `run`, of the stacks that are refreshed.

        Returns:
          For each stack an int [N], by label.
        """
        every = int(validation.interval(self.every))
        if not self.staggered:
            age = min(count % every, count - 1)
            return {label: np.full(number, age) for label, (number, _) in sizes.items()}
        ages = {}
        # A state that was an operand of a program has its stacks in the order of their labels.
        for label, table in _deal({k: sizes[k] for k in sorted(sizes)}, every).items():
            number, _ = sizes[label]
            turns = np.zeros(number + 1, int)
            turns[table] = np.arange(every)[:, None]
            ages[label] = np.minimum((count - turns[:number]) % every, count - 1)
        return ages

    def run(
        self,
        refresh: Refresh,
        stacks: Mapping[str, NamedTuple],
        fields: tuple[str, ...],
        operands: PyTree,
        sizes: Mapping[str, tuple[int, int]],
        count: Int[Array, ""],
        *,
        share: Share = ALONE,
        due: Bool[Array, ""],
        all_due: Bool[Array, ""],
        allowed: Bool[Array, ""],
    ) -> Refreshed:
        """Refresh the blocks that are due.

        Args:
          refresh: The function of some stacks, or some rows of one. It closes over nothing that may
            be traced.
          stacks: What is refreshed, by label.
          fields: The fields of a stack that a refresh replaces. The others are only read.
          operands: The last argument of `refresh`.
          sizes: The number of blocks on all devices, and that of elements of a block, by label. If
            staggered, large ones go first.
          count: The number of steps so far, which tells whose turn it is if staggered.
          share: Which of the blocks are on this device.
          due: Whether the interval has ended; not looked at if staggered.
          all_due: Whether all blocks are due, also those whose turn it is not.
          allowed: Whether anything may be refreshed.
        """
        none = jnp.zeros([], jnp.int32)
        old = {
            label: {name: getattr(stack, name) for name in fields}
            for label, stack in stacks.items()
        }
        # The loop carries what is replaced alone, as a carry may be copied.
        read = {label: stack._replace(**dict.fromkeys(fields)) for label, stack in stacks.items()}
        carry, reads = (old, none), (read, operands)
        if self.staggered:
            sizes = {label: sizes[label] for label in stacks}
            new, failures, happened = self._run_in_turns(
                refresh, carry, reads, sizes, share, count, all_due, allowed
            )
        else:
            happened = allowed & (all_due | due)
            new, failures = self._run_all(refresh, carry, reads, happened)
        refreshed = {label: stack._replace(**new[label]) for label, stack in stacks.items()}
        return Refreshed(refreshed, failures, happened)

    def _run_all(self, refresh, carry, reads, due):
        def refresh_all(carry, read):
            old, failures = carry
            stacks, operands = read
            given = {label: stack._replace(**old[label]) for label, stack in stacks.items()}
            new, failed = refresh(given, operands)
            for x in failed.values():
                failures += jnp.sum(x, dtype=jnp.int32)
            return _fields(new, old), failures

        return cond_in_place(refresh_all, due, carry, reads)

    def _run_in_turns(self, refresh, carry, reads, sizes, share, count, all_due, allowed):
        every = int(np.asarray(self.every))
        turns = _deal(sizes, every)
        busy = np.any([rows[:, 0] < sizes[label][0] for label, rows in turns.items()], axis=0)
        turns = {k: _of_device(rows, _count(reads[0][k]), share) for k, rows in turns.items()}
        turn = count % every
        # All turns in one step where all blocks are due, none where nothing is allowed.
        first = jnp.where(all_due, 0, turn)
        last = jnp.where(allowed, jnp.where(all_due, every, turn + 1), first)

        def take_turn(turn, carry, reads):
            old, failures = carry
            stacks, operands, turns = reads
            new = {}
            for label in old:
                rows = jnp.asarray(turns[label])[turn]
                stack = stacks[label]
                new[label], failed = _refresh_rows(
                    refresh, label, old[label], stack, operands, rows
                )
                failures += failed
            return new, failures

        new, failures = _take_turns(take_turn, every, first, last, carry, (*reads, turns))
        return new, failures, allowed & (all_due | jnp.asarray(busy)[turn])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _take_turns(take_turn, every, first, last, carry, reads):
    """`take_turn(turn, carry, reads)` for the turns from the first to before the last.

    A loop whose bounds are not known has no derivative backwards: that of a scan over all turns is
    taken, which leaves out those that are not due.
    """
    return flow.fori_loop(first, last, lambda i, carry: take_turn(i, carry, reads), carry)


@_take_turns.defjvp
def _take_turns_jvp(take_turn, every, primals, tangents):
    def scan(first, last, carry, reads):
        def step(carry, i):
            due = (i >= first) & (i < last)
            return flow.cond(due, take_turn, lambda i, carry, _: carry, i, carry, reads), None

        return flow.scan(step, carry, jnp.arange(every))[0]

    return jax.jvp(scan, primals, tangents)


def _fields(stacks, like):
    return {label: {x: getattr(stacks[label], x) for x in like[label]} for label in like}


def _count(stack: NamedTuple) -> int:
    return len(jax.tree.leaves(stack)[0])


def _refresh_rows(refresh, label, old, stack, operands, rows):
    """Refresh some rows of a stack: those within it, as the last turns are filled up beyond it."""
    count = _count(stack)

    def some(carry):
        old, stack, operands = carry
        taken, read = jax.tree.map(lambda x: jnp.take(x, rows, axis=0, mode="clip"), (old, stack))
        new, failed = refresh({label: read._replace(**taken)}, operands)
        put = jax.tree.map(
            lambda x, y: x.at[rows].set(y, mode="drop"), old, _fields(new, {label: old})[label]
        )
        return put, jnp.sum(failed[label] & (rows < count), dtype=jnp.int32)

    def none(carry):
        return carry[0], jnp.zeros([], jnp.int32)

    return flow.cond(rows[0] < count, some, none, (old, stack, operands))


def _deal(sizes: Mapping[str, tuple[int, int]], turns: int) -> dict[str, np.ndarray]:
    """Whose turn is when: for each stack the rows [turns, n], filled up with a row beyond it.

    The blocks are dealt one by one, the largest first, so that all turns cost about as much. Of two
    stacks, A of three large blocks and B of two small ones, three turns get

        A [[0], [1], [2]]    B [[0], [1], [2]]    (row 2 of B is beyond it)
    """
    table, dealt = {}, 0
    for label in sorted(sizes, key=lambda label: -sizes[label][1]):
        count, _ = sizes[label]
        rows = np.full((turns, -(-count // turns)), count, np.int32)
        for row in range(count):
            rows[(dealt + row) % turns, row // turns] = row
        table[label], dealt = rows, dealt + count
    return table


def _of_device(rows: np.ndarray, count: int, share: Share) -> np.ndarray | Array:
    """The table of a stack, for the `count` rows of this device, filled up with a row beyond it."""
    owned = [[row[row // count == i] % count for row in rows] for i in range(share.devices)]
    longest = max(len(row) for device in owned for row in device)
    table = [[np.pad(x, (0, longest - len(x)), constant_values=count) for x in y] for y in owned]
    return share.own(np.array(table, np.int32))[0]


def refresh_schedule(owner: str, refresh_every: ArrayLike, stagger: bool) -> RefreshSchedule:
    """The schedule of two settings.

    Raises:
      ValueError: if they are out of range; or staggered refreshes are to come at an interval that
        is only known at run time, as under `optax.inject_hyperparams`.
    """
    validation.check_interval(owner, "refresh_every", refresh_every)
    validation.check_switch(owner, "stagger", stagger)
    if stagger and isinstance(refresh_every, jax.core.Tracer):
        raise ValueError(
            f"{owner}: stagger=True needs refresh_every as a number, not traced, as it decides how "
            f"blocks are dealt out; got {refresh_every!r}. With optax.inject_hyperparams, pass "
            'static_args=("refresh_every",).'
        )
    # Dealing out takes a number, which an array is not inside of a program.
    return RefreshSchedule(
        int(np.asarray(refresh_every)) if stagger else refresh_every, bool(stagger)
    )


def update_probability_schedule(
    *, highest: float = 1.0, lowest: float = 0.03, decay: float = 0.001, flat_steps: int = 500
) -> optax.Schedule:
    """How often the factors move: `clip(highest·exp(−decay·(t − flat_steps)), lowest, highest)`.

    At every step while the preconditioner is young, then less and less often.

    Args:
      highest: probability during the first `flat_steps` steps, in [0, 1].
      lowest: probability in the long run, in [0, highest].
      decay: rate of the exponential, per step.
      flat_steps: steps before the decay begins.

    Returns:
      A schedule: from the step, an int array, to the probability, a float array.

    Examples:
      >>> import optax_kron as ok
      >>> schedule = ok.update_probability_schedule(lowest=0.1)
      >>> print(schedule(0), schedule(10_000))
      1.0 0.1
    """
    owner = "update_probability_schedule"
    validation.check_range(owner, "highest", highest, most=1)
    validation.check_range(owner, "lowest", lowest, most=highest)
    validation.check_range(owner, "decay", decay)
    validation.check_range(owner, "flat_steps", flat_steps)

    def schedule(count):
        steps = jnp.asarray(count).astype(jnp.float32)
        fall = jnp.exp(-decay * jnp.maximum(steps - flat_steps, 0))
        return jnp.clip(highest * fall, lowest, highest)

    return schedule


class KronSchedule(NamedTuple):
    """What decides on the next update of the factors."""

    pending_updates: Float[Array, ""]  # share of the next update that has added up, in [0, 1)
    cached: Bool[Array, ""]  # whether the cached preconditioners belong to the factors


def is_update_due(
    schedule: KronSchedule, probability: ArrayLike, count: Int[Array, ""]
) -> tuple[Bool[Array, ""], Float[Array, ""]]:
    """Whether the factors are updated at a step, and what is pending then.

    Args:
      schedule: What is pending.
      probability: Share of the steps with an update, [].
      count: How many steps there have been.
    """
    pending = schedule.pending_updates + jnp.asarray(probability, jnp.float32)
    # The slack keeps rounding from adding a step where 1/p is an integer.
    due = (count == 0) | (pending >= 1 - 1e-6)
    return due, jnp.where(due, jnp.maximum(pending - 1, 0), pending)


def steps_since_update(
    schedule: KronSchedule, probability: optax.ScalarOrSchedule, count: int
) -> int | None:
    """How many steps ago the factors were updated; `None` if that is more than a thousand.

    Args:
      schedule: What is pending after the last step.
      probability: Share of the steps with an update, or a schedule of it.
      count: How many steps there have been, ≥ 1.
    """
    pending = float(schedule.pending_updates)
    for age in range(min(count, 1000)):
        step = count - 1 - age
        share = float(np.real(probability(step) if callable(probability) else probability))
        # What was pending before a step without an update was not negative.
        if step == 0 or pending < share - 1e-6:
            return age
        pending -= share
    return None
