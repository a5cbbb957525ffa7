"""What an optimizer is: what it keeps of the blocks of one shape, and four verbs over that.

    accumulate → refresh, when it is due → correct → precondition

| | accumulate (each step) | refresh (when due) | correct (each step) |
|---|---|---|---|
| kron_psgd | - | Q moves | - |
| shampoo | S ← EMA of C(G) | S^(-1/p) | roots of diagonal S |
| soap | S ← EMA of C(G) | eigenbases Q of S | second moment in Q |
| kfac | A, G ← EMA of those of the taps | damped inverses of A and G | - |
| ekfac | A, G ← EMA of those of the taps | eigenbases of A and G | λ, a second moment in them |

The update is made by `precondition`. `frame.Frame` calls the verbs, with gradients that are finite.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Inexact, Int

from optax_kron.kernels import contract
from optax_kron.transforms import program, storage
from optax_kron.transforms.mesh import ALONE, Share
from optax_kron.transforms.schedule import Refreshed, RefreshSchedule
from optax_kron.types import PyTree

# A `BlockPlan` or a `LayerPlan`, and a NamedTuple of an optimizer's own: each has methods that take
# those of its kind, which no common type tells.
AnyPlan = Any
AnyStack = Any
Stacks = Mapping[str, AnyStack]  # by label
Blocks = Mapping[str, Inexact[Array, "N ..."]]


class KronState(NamedTuple):
    """State of every optimizer of this library but `branch_kfac`.

    `optax.tree.get(state, name)` finds a field inside the state of a chain or wrapper; `count` is
    there twice where the learning rate is a schedule.

    Attributes:
      count: Accepted steps, int32 [].
      refreshes: Steps at which something was refreshed, int32 [].
      failed_refreshes: Blocks that kept what they had, as the new was not finite, int32 [].
      skipped_steps: Steps whose gradients, or taps, were not finite and were dropped, int32 [].
      outlier_steps: Steps at which a gradient, or what a layer saw, was an outlier and was scaled
        down, int32 [].
      usual_norms: The usual norms of gradients by kind of block, of what is in no layer by path,
        and of Hessian-vector products; `None` without `outlier_clip`.
      momentum: The moving average of gradients, [N, ...] by kind of block; of layers the velocity,
        of their blocks likewise and of the rest by path. `None` without momentum.
      stacks: What the optimizer keeps, by kind of block; an array for a tree without leaves.
      schedule: What decides on the next refresh, beside `count`; `None` if nothing does.
      key: Raw PRNG key, uint32 [2], which never changes; `None` where nothing is random. With
        `rounding="stochastic"` there always is one.
      layers: What is kept of the loss of layers; `None` for optimizers of gradients alone.
      fallback: State of the fallback for parameters in no layer, or `None`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> tx = ok.soap(1e-3)
      >>> state = tx.init(jnp.ones((3, 2)))
      >>> _, state = tx.update(jnp.full((3, 2), jnp.nan), state)
      >>> print(optax.tree.get(state, "skipped_steps"))
      1
    """

    # "count" is Optax's name for the number of steps, though tuples have a method of that name.
    count: Int[Array, ""]  # pyright: ignore
    refreshes: Int[Array, ""]
    failed_refreshes: Int[Array, ""]
    skipped_steps: Int[Array, ""]
    outlier_steps: Int[Array, ""]
    usual_norms: PyTree
    momentum: PyTree
    stacks: PyTree
    schedule: PyTree
    key: Array | None
    layers: PyTree
    fallback: PyTree


class Step(NamedTuple):
    """What holds of a step for all blocks."""

    # Accepted steps, this one included.
    count: Int[Array, ""]  # pyright: ignore
    accepted: Bool[Array, ""]  # whether the gradients are finite: else nothing may change
    share: Share = ALONE  # which of the blocks are on this device
    random_bits: Array | None = None  # of stochastic roundings; None: all are to nearest

    def averaged(
        self,
        move: Callable[[AnyStack], tuple[Any, ...]],
        stack: AnyStack,
        names: Sequence[str],
        label: str,
    ) -> tuple[Any, ...]:
        """`storage.averaged`, with the random bits of the step."""
        return storage.averaged(move, stack, names, self.random_bits, label, self.share)


class Seen(NamedTuple):
    """What the blocks of one stack see at a step."""

    gradient: Inexact[Array, "N ..."]
    direction: Inexact[Array, "N ..."]  # the momentum without bias, or the gradient
    sizes: tuple[np.ndarray | Array, ...] | None  # each axis's length without padding, int [N]
    newly: Bool[Array, " N"]  # whether it is the first gradient other than zero
    filled: int = 1  # how many blocks there are on all devices, without those that fill up

    def extents(self) -> Float[Array, "N k"]:
        """How long every block is along its axes without the padding."""
        if self.sizes is None:
            count, *shape = self.gradient.shape
            return jnp.tile(jnp.asarray(shape, float), (count, 1))
        return jnp.stack(list(map(jnp.asarray, self.sizes)), axis=1).astype(float)


class Advanced(NamedTuple):
    """What a step makes of stacks and gradients; numbers are those of all devices."""

    stacks: Stacks
    updates: Blocks
    failures: Int[Array, ""]  # blocks that kept what they had
    refreshed: Bool[Array, ""]
    accepted: Bool[Array, ""]  # also false if what layers saw was not finite
    schedule: PyTree = None
    outliers: Bool[Array, ""] | bool = False  # beside those of gradients
    usual_norms: Mapping[str, PyTree] = {}  # beside those of gradients


def unchanged(state: KronState, stacks: Stacks, updates: Blocks, step: Step) -> Advanced:
    """What a step makes that makes updates alone."""
    none, no = jnp.zeros([], jnp.int32), jnp.zeros([], bool)
    return Advanced(stacks, updates, none, no, step.accepted, state.schedule, no)


class Preconditioner:
    """An optimizer: what it keeps of N blocks of one shape, a stack, and its verbs over that.

    A stack is a NamedTuple of arrays [N, ...]. Its field `initialized`, bool [N], tells which
    blocks have seen a gradient other than zero. Verbs return a stack and which of its blocks have
    failed, bool [N], as `stacks.guarded` does. `init` and `precondition` have to be defined, and
    `rescale` for `outlier_clip`. `advance` and the verbs over all stacks are there to be overridden
    by what does better than one stack after the other.

    Attributes:
      schedule: When blocks are refreshed.
      refreshed: The fields of a stack that a refresh replaces.
      accumulated: The fields that `accumulate` averages: stored in few bits, they may be rounded
        stochastically.
      refreshes_first: Whether refreshes come before the update of their step, or after it.
      keeps_squares: Whether what is kept is made of squares of gradients, which must be finite.
      looks_twice: Whether what is refreshed decides what `advance` takes of the extra arguments; it
        then comes in two parts, `learn` and `finish`, with `look` between, as in `LayerFactors`.
      is_frozen: Whether updates are all that `advance` makes, and what is kept stays as it is.
      bounded: What `outlier_clip` bounds, beside gradients in no block.
      keeps_gradients: Whether what is kept is made of gradients, and not of anything else.
    """

    schedule: RefreshSchedule  # of those that refresh anything
    refreshed: ClassVar[tuple[str, ...]] = ()
    accumulated: ClassVar[tuple[str, ...]] = ()
    refreshes_first: ClassVar[bool] = True
    keeps_squares: ClassVar[bool] = True
    looks_twice: ClassVar[bool] = False
    is_frozen: bool = False

    def __init_subclass__(cls, **options: PyTree) -> None:
        """Refuse a class whose refreshes would never be seen."""
        super().__init_subclass__(**options)
        defines = cls.refresh is not Preconditioner.refresh
        if defines and not cls.refreshed:
            raise TypeError(f"{cls.__name__} defines `refresh`: name its fields in `refreshed`.")

    @property
    def bounded(self) -> Sequence[str]:
        """See above."""
        return ("gradients",)

    @property
    def keeps_gradients(self) -> bool:
        """See above."""
        return True

    # ----------------------------------------------------------------------------------- the state

    def init(self, count: int, signature: PyTree, dtype: jnp.dtype) -> AnyStack:
        """The stack of so many blocks before the first step.

        Args:
          count: N.
          signature: The shape of a block, and which of its axes have a diagonal factor.
          dtype: Real dtype of the factors.
        """
        raise NotImplementedError

    def needed(self, stacks: Stacks) -> PyTree:
        """What of the stacks must be there; a state with more is taken too."""
        return stacks

    def init_schedule(self) -> PyTree:
        """What decides on the next refresh, beside the count."""

    def init_key(self) -> Array | None:
        """A raw PRNG key, if anything is random."""

    def rescale(self, stack: AnyStack, past: Float[Array, " N"]) -> AnyStack:
        """The stack that gradients would have given that were `past` times as large."""
        raise NotImplementedError(
            f"{type(self).__name__} has no `rescale`, which outlier_clip needs: define it, or pass "
            "outlier_clip=None."
        )

    def at(self, state: KronState) -> "Preconditioner":
        """The settings of one step: values where there are schedules."""
        del state
        return self

    def read(
        self, plan: AnyPlan, updates: PyTree, state: KronState, extra_args: Mapping[str, PyTree]
    ) -> PyTree:
        """What `advance` takes of the extra arguments of `update`, checked.

        A function, of no arguments, is called when it is known that it is needed.
        """
        del plan, updates, state, extra_args

    def spread(
        self,
        plan: AnyPlan,
        share: Share,
        extra: PyTree,
        updates: PyTree,
        state: KronState,
        dtype: jnp.dtype,
    ) -> PyTree:
        """On a mesh, what `advance` takes of what `read` has returned, as arrays."""
        del plan, share, updates, state, dtype
        return extra

    def spread_as(self, share: Share) -> PyTree:
        """How that is spread: a tree or a prefix of one, of `share.cut` and `mesh.WHOLE`."""
        return share.cut

    # ----------------------------------------------------------------------------------- the verbs

    def accumulate(
        self, stack: AnyStack, seen: Seen, step: Step
    ) -> tuple[AnyStack, Bool[Array, " N"]]:
        """Take a gradient in."""
        return stack, jnp.zeros(len(seen.gradient), bool)

    def refresh(self, stack: AnyStack, step: Step) -> tuple[AnyStack, Bool[Array, " N"]]:
        """Make anew what is expensive to make, of a stack or some rows of it."""
        raise NotImplementedError(f"{type(self).__name__} names `refreshed`, but has no `refresh`.")

    def correct(
        self, stack: AnyStack, seen: Seen, step: Step
    ) -> tuple[AnyStack, Bool[Array, " N"]]:
        """Take a gradient into what is kept in terms of the refreshed."""
        return stack, jnp.zeros(len(seen.gradient), bool)

    def precondition(self, stack: AnyStack, seen: Seen, step: Step) -> Array:
        """The updates [N, ...]."""
        raise NotImplementedError

    def apply(
        self, stack: AnyStack, seen: Seen, step: Step
    ) -> tuple[AnyStack, Array, Bool[Array, " N"]]:
        """`correct` and `precondition`; returns the stack, the updates, and what has failed."""
        stack, failed = self.correct(stack, seen, step)
        return stack, self.precondition(stack, seen, step), failed

    def preconditioned(
        self, state: KronState, stacks: Stacks, seen: Mapping[str, Seen], step: Step
    ) -> Advanced:
        """What `advance` returns where `is_frozen`: updates, and everything as it is."""
        updates = {label: self.precondition(stacks[label], x, step) for label, x in seen.items()}
        return unchanged(state, stacks, updates, step)

    def can_refresh(self, stack: AnyStack) -> bool:
        """Whether a stack has anything to refresh."""
        return bool(self.refreshed)

    # ------------------------------------------------------------------ the verbs over all stacks

    def advance(
        self,
        plan: AnyPlan,
        state: KronState,
        stacks: Stacks,
        seen: Mapping[str, Seen],
        extra: PyTree,
        step: Step,
    ) -> Advanced:
        """All verbs, in their order.

        Args:
          plan: How the tree is laid out.
          state: That of before.
          stacks: Those of the state, or what they would be without a first outlier.
          seen: What the blocks of each stack see.
          extra: What `read` has returned.
          step: What holds for all blocks.
        """
        del plan, state, extra
        before, failed, taken = stacks, [], {}
        for label, stack in stacks.items():
            move = functools.partial(self.accumulate, seen=seen[label], step=step)
            taken[label], missed = step.averaged(move, stack, self.accumulated, label)
            failed.append(missed)
        newly = {k: taken[k].initialized & ~x.initialized for k, x in before.items()}
        seen = {label: x._replace(newly=newly[label]) for label, x in seen.items()}
        if self.refreshes_first:
            due = any_block(newly[k] for k, stack in stacks.items() if self.can_refresh(stack))
            due = step.share.any(due)
            refreshed = self.refresh_due(taken, seen, step, all_due=due)
            stacks, updates, missed = self._apply_all(refreshed.stacks, seen, step)
            happened = refreshed.happened
        else:
            taken, late = self.begin_all(taken, newly)
            stacks, updates, missed = self._apply_all(taken, seen, step)
            later = step._replace(accepted=step.accepted & (step.count > 1))
            refreshed = self.refresh_due(stacks, seen, later, all_due=jnp.zeros([], bool))
            stacks, missed = refreshed.stacks, missed + late
            happened = refreshed.happened | step.share.any(any_block(newly.values()))
        failures = step.share.sum(total(failed) + missed + refreshed.failures)
        return Advanced(stacks, updates, failures, happened, step.accepted)

    def begin_all(
        self, stacks: Stacks, newly: Mapping[str, Bool[Array, " N"]]
    ) -> tuple[Stacks, Int[Array, ""]]:
        """What blocks with their first gradient need before their update, if refreshes come later.

        Returns:
          The stacks, and how many blocks have failed.
        """
        del newly
        return stacks, jnp.zeros([], jnp.int32)

    def _apply_all(self, stacks, seen, step):
        new, updates, failed = {}, {}, []
        for label, stack in stacks.items():
            new[label], updates[label], missed = self.apply(stack, seen[label], step)
            failed.append(missed)
        return new, updates, total(failed)

    def refresh_due(
        self,
        stacks: Stacks,
        seen: Mapping[str, Seen],
        step: Step,
        *,
        all_due: Bool[Array, ""],
        due: Bool[Array, ""] | None = None,
    ) -> Refreshed:
        """`refresh` of the blocks that are due; `due` is by default when the interval ends."""
        chosen = {label: stack for label, stack in stacks.items() if self.can_refresh(stack)}
        if not chosen:
            return Refreshed(stacks, jnp.zeros([], jnp.int32), jnp.zeros([], bool))
        arrays, rebuild = program.parts(self)
        done = self.schedule.run(
            lambda stacks, operands: rebuild(operands[0]).refresh_all(stacks, operands[1]),
            chosen,
            self.refreshed,
            (arrays, step._replace(random_bits=None)),
            {label: (x.filled, x.direction[0].size) for label, x in seen.items()},
            step.count,
            share=step.share,
            due=self.schedule.is_due(step.count) if due is None else due,
            all_due=all_due,
            allowed=step.accepted,
        )
        return done._replace(stacks={**stacks, **done.stacks})

    def refresh_all(self, stacks: Stacks, step: Step) -> tuple[Stacks, Mapping[str, Array]]:
        """`refresh` of some stacks, or some rows of one, and which blocks have failed."""
        done = {label: self.refresh(stack, step) for label, stack in stacks.items()}
        return separated(done)


def separated(
    done: Mapping[str, tuple[AnyStack, Bool[Array, " N"]]],
) -> tuple[dict[str, AnyStack], dict[str, Bool[Array, " N"]]]:
    """Stacks, and which of their blocks have failed, of pairs by label."""
    return {k: new for k, (new, _) in done.items()}, {k: bad for k, (_, bad) in done.items()}


def real_dtype(seen: Mapping[str, Seen]) -> jnp.dtype:
    """The real dtype of the arithmetic: that of the gradients' blocks."""
    dtypes = [contract.real_dtype(x.gradient.dtype) for x in seen.values()]
    return dtypes[0] if dtypes else jnp.dtype(jnp.float32)


def total(failed: Iterable[Bool[Array, " N"]]) -> Int[Array, ""]:
    """The number of blocks that have failed."""
    return sum((jnp.sum(x, dtype=jnp.int32) for x in failed), jnp.zeros([], jnp.int32))


def any_block(conditions: Iterable[Bool[Array, " N"]]) -> Bool[Array, ""]:
    """Whether something holds for any block of any stack."""
    return jnp.any(jnp.concatenate([*conditions, jnp.zeros(0, bool)]))
