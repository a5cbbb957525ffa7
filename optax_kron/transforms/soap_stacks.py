"""SOAP's statistics, their eigenbases, and what is kept in those, as stacks.

Variants differ in the statistics, `S_i` along each axis i of a block of n elements, and in what is
made of the gradient in their eigenbases. "soap" has the second moments `C_i(G)`. "kl_shampoo" and
"kl_soap" have those of a gradient that is whitened along all other axes,
`(d_i/n) C_i(G with S_j^-½ along every j ≠ i)`, of which the product fits the covariance of the
gradient best in the sense of Kullback and Leibler. "kl_shampoo" whitens the momentum with them; the
other two run Adam in the bases.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from optax_kron import guards
from optax_kron.blocking import BlockPlan, Signature, complex_like
from optax_kron.kernels import contract, eigenbases
from optax_kron.transforms import _blocks, moving_average
from optax_kron.transforms._blockwise import Step
from optax_kron.transforms._rota import Rota

Stacks = Mapping[str, "SoapStack"]
VARIANTS = ("soap", "kl_shampoo", "kl_soap")
BASES = ("qr", "eigh")

# A second moment below the rounding of the rotation is none: to divide by it would blow up noise.
_NOISE = 8.0  # in units of rounding, relative to the root mean square of the block


class SoapStack(NamedTuple):
    """What is kept of the N blocks of one signature; an axis with a diagonal factor has no basis.

    Per axis of the block, with the axis' length d:
    """

    statistics: tuple[Array | None, ...]  # S, Hermitian [N, d, d], factor_dtype
    bases: tuple[Array | None, ...]  # Q, orthonormal columns [N, d, d], factor_dtype
    values: tuple[Array, ...] | None  # diag(QᴴSQ) [N, d], also of diagonal axes; KL variants only
    second_moment: Array | None  # of the gradient in the bases [N, ...], ≥ float32; Adam only
    started: Array  # whether the bases have been set from a gradient, bool [N]


class _Block(NamedTuple):
    """One block of a stack."""

    statistics: tuple[Array | None, ...]
    bases: tuple[Array | None, ...]
    values: tuple[Array, ...] | None
    second_moment: Array | None


@dataclasses.dataclass(frozen=True)
class Soap:
    """How bases are found and used; the settings of `scale_by_soap`."""

    variant: str
    decay: ArrayLike
    factor_decay: ArrayLike
    epsilon: ArrayLike
    floor: ArrayLike
    basis: str
    rota: Rota
    precision: jax.lax.PrecisionLike

    @property
    def is_kl(self) -> bool:
        """Whether the statistics are of whitened gradients."""
        return self.variant != "soap"

    @property
    def has_adam(self) -> bool:
        """Whether there is a second moment in the bases."""
        return self.variant != "kl_shampoo"

    def init(self, plan: BlockPlan, dtype: DTypeLike) -> Stacks | Array:
        """See `Method`: statistics of zero, bases of the identity."""
        if not plan.leaves:
            return jnp.zeros([])  # One leaf where the stacks would be.
        return {
            label: self._start(plan.count(label), signature, dtype)
            for label, signature in plan.stacks.items()
        }

    def _start(self, count: int, signature: Signature, dtype: DTypeLike) -> SoapStack:
        own = complex_like(dtype, signature.is_complex)
        axes = list(zip(signature.shape, signature.diagonal, strict=True))
        wide = jnp.promote_types(dtype, jnp.float32)
        return SoapStack(
            statistics=tuple(None if diag else jnp.zeros((count, d, d), own) for d, diag in axes),
            bases=tuple(
                None if diag else jnp.tile(jnp.eye(d, dtype=own), (count, 1, 1)) for d, diag in axes
            ),
            values=tuple(jnp.zeros((count, d), dtype) for d, _ in axes) if self.is_kl else None,
            second_moment=jnp.zeros((count, *signature.shape), wide) if self.has_adam else None,
            started=jnp.zeros(count, bool),
        )

    def step(
        self,
        plan: BlockPlan,
        stacks: Any,
        gradients: Mapping[str, Array],
        direction: Mapping[str, Array],
        count: Array,
        allowed: Array,
    ) -> Step:
        """See `Method`: in the bases that there are, then those are brought up to date."""
        stacks, newly, failures = self._begin(plan, stacks, gradients, allowed)
        moved, updates = {}, {}
        for label, stack in stacks.items():
            moved[label], updates[label], failed = self._move(
                plan, label, stack, gradients[label], direction[label], count, allowed, newly
            )
            failures += failed
        began = jnp.any(jnp.stack([jnp.any(x) for x in newly.values()]))
        found, failed, refreshed = self.rota.refresh(
            plan,
            self._refresh,
            {label: (x.bases, x.values, x.second_moment) for label, x in moved.items()},
            {label: (x.statistics, x.started) for label, x in moved.items()},
            count,
            allowed=allowed & (count > 1),
            all_due=jnp.zeros([], bool),
        )
        moved = {
            label: stack._replace(
                bases=found[label][0], values=found[label][1], second_moment=found[label][2]
            )
            for label, stack in moved.items()
        }
        return Step(updates, moved, failures + failed, refreshed | began)

    # ------------------------------------------------------------------------------ the first bases

    def _begin(
        self, plan: BlockPlan, stacks: Stacks, gradients: Mapping[str, Array], allowed: Array
    ) -> tuple[Stacks, dict[str, Array], Array]:
        """Set the bases of blocks that get their first gradient; which did, and failures."""
        newly = {
            label: allowed & ~stack.started & (_blocks.largest(gradients[label])[:, 0] != 0)
            for label, stack in stacks.items()
        }

        def begin(carry, gradients, newly, settings):
            stacks, failures = carry
            begun = {}
            for label, stack in stacks.items():
                block, sound = _blocks.mapping(stack.bases)(
                    self._first_bases,
                    _block_of(stack),
                    gradients[label],
                    _extents(plan, label, settings[label].dtype),
                    newly[label],
                    settings[label],
                )
                failures += jnp.sum(newly[label] & ~sound, dtype=jnp.int32)
                started = stack.started | (newly[label] & sound)
                begun[label] = SoapStack(**block._asdict(), started=started)
            return begun, failures

        settings = {
            label: self._settings(jnp.zeros_like(x), contract.real_dtype(gradients[label].dtype))
            for label, x in newly.items()
        }
        any_new = jnp.any(jnp.stack([jnp.any(x) for x in newly.values()]))
        stacks, failures = guards.replaced_if(
            begin,
            any_new,
            (dict(stacks), jnp.zeros([], jnp.int32)),
            dict(gradients),
            newly,
            settings,
        )
        newly = {label: x & stacks[label].started for label, x in newly.items()}
        return stacks, newly, failures

    def _settings(self, known: Array, dtype: DTypeLike) -> Array:
        """For every block [N, 2] the weight of the old statistics, and the floor of eigenvalues.

        As an array, so that settings may be traced where the first bases are a branch of their own.
        Blocks that know the gradient already keep what they have.
        """
        decay = jnp.where(known, 1, jnp.asarray(self.factor_decay, dtype))
        return jnp.stack([decay, jnp.full(len(known), self.floor, dtype)], axis=1)

    def _first_bases(
        self, old: _Block, gradient: Array, extents: Array, new: Array, settings: Array
    ) -> tuple[_Block, Array]:
        """A block whose statistics have taken in one gradient, in their eigenbases."""
        real = contract.real_dtype(gradient.dtype)
        scale = jnp.zeros([], real)
        start = _widened(old)
        if self.is_kl:
            # At a multiple of the identity that fits the gradient, the first factors are no larger
            # or smaller than those to come.
            largest = guards.largest_magnitude(gradient)
            unit = gradient / jnp.where(largest > 0, largest, 1)
            mean = jnp.sum(contract.squared_magnitude(unit)) / jnp.prod(extents)
            scale = (jnp.square(largest) * mean) ** (1 / gradient.ndim)
            start = start._replace(values=tuple(jnp.full(x.shape, scale) for x in old.values or ()))
        start = start._replace(
            statistics=tuple(
                None if S is None else scale * jnp.eye(S.shape[0], dtype=S.dtype)
                for S in start.statistics
            )
        )
        block = self._gather(start, gradient, gradient, extents, settings)
        found: list[Array | None] = list(block.bases)
        values = list(block.values or ())
        for axis, S in enumerate(block.statistics):
            if S is not None:
                S = jnp.where(guards.all_finite(S), S, 0)
                Q = found[axis] = eigenbases.descending(S)
                if self.is_kl:
                    values[axis] = eigenbases.rayleigh_quotients(Q, S, precision=self.precision)
        block = block._replace(bases=tuple(found), values=tuple(values) if self.is_kl else None)
        block = jax.tree.map(lambda x, y: x.astype(y.dtype), block, old)
        sound = guards.all_finite(block)
        return guards.select(new & sound, block, old), sound

    # ------------------------------------------------------------------------------------- one step

    def _move(
        self,
        plan: BlockPlan,
        label: str,
        stack: SoapStack,
        gradient: Array,
        direction: Array,
        count: Array,
        allowed: Array,
        newly: Mapping[str, Array],
    ) -> tuple[SoapStack, Array, Array]:
        """Take in a gradient, and make the update."""
        real = contract.real_dtype(gradient.dtype)
        # What began at this step has taken in the gradient already.
        settings = self._settings(newly[label], real)

        def move(old, gradient, direction, extents, settings):
            wide = _widened(old)
            rotated = self._rotated(wide.bases, gradient)
            new = self._gather(wide, gradient, rotated, extents, settings)
            if new.second_moment is not None:
                beta = jnp.asarray(self.decay, real)
                new = new._replace(
                    second_moment=beta * new.second_moment
                    + (1 - beta) * contract.squared_magnitude(rotated)
                )
            direction = self._rotated(wide.bases, direction)
            update = self._update(new, direction, count, extents, settings)
            new = jax.tree.map(lambda x, y: x.astype(y.dtype), new, old)
            sound = guards.all_finite(new)
            return guards.select(allowed & sound, new, old), update, ~sound

        extents = _extents(plan, label, real)
        block, update, failed = _blocks.mapping(stack.bases)(
            move, _block_of(stack), gradient, direction, extents, settings
        )
        failures = jnp.sum(failed & allowed, dtype=jnp.int32)
        return SoapStack(**block._asdict(), started=stack.started), update, failures

    def _rotated(self, bases: Sequence[Array | None], x: Array) -> Array:
        """`Qᴴ·X`."""
        for axis, Q in enumerate(bases):
            if Q is not None:
                x = contract.apply_factor(Q, x, axis, adjoint=True, precision=self.precision)
        return x

    def _gather(
        self, old: _Block, gradient: Array, rotated: Array, extents: Array, settings: Array
    ) -> _Block:
        """The statistics with a gradient taken in, of which the second form is in the bases."""
        rate, floor = settings
        statistics = list(old.statistics)
        if not self.is_kl:
            for axis, S in enumerate(statistics):
                if S is not None:
                    own = contract.gram(gradient, axis, precision=self.precision)
                    statistics[axis] = rate * S + (1 - rate) * own
            return old._replace(statistics=tuple(statistics))
        assert old.values is not None  # as they are, of KL variants
        values = list(old.values)
        roots = [_inverse_root(x, floor) for x in old.values]
        shares = extents / jnp.prod(extents)
        for axis, S in enumerate(statistics):
            whitened = rotated
            for other, root in enumerate(roots):
                if other != axis:
                    whitened = contract.apply_factor(root, whitened, other)
            own = shares[axis] * contract.gram(whitened, axis, diagonal=True)
            values[axis] = rate * values[axis] + (1 - rate) * own
            Q = old.bases[axis]
            if S is not None and Q is not None:
                back = contract.apply_factor(Q, whitened, axis, precision=self.precision)
                moment = shares[axis] * contract.gram(back, axis, precision=self.precision)
                statistics[axis] = rate * S + (1 - rate) * moment
        return old._replace(statistics=tuple(statistics), values=tuple(values))

    def _update(
        self, block: _Block, rotated: Array, count: Array, extents: Array, settings: Array
    ) -> Array:
        """What becomes of a momentum that is in the bases."""
        if block.second_moment is not None:
            real = block.second_moment.dtype
            second = block.second_moment / moving_average.weight(self.decay, count, real)
            divisor = jnp.sqrt(second) + jnp.asarray(self.epsilon, real)
            scaled = rotated / jnp.where(divisor > 0, divisor, 1)
            if any(Q is not None for Q in block.bases):
                mean = jnp.sum(second) / jnp.prod(extents).astype(real)
                noise = jnp.square(_NOISE * float(jnp.finfo(real).eps)) * mean
                scaled = jnp.where(second > noise, scaled, 0)
        else:
            assert block.values is not None  # of KL variants
            scaled = rotated
            for axis, values in enumerate(block.values):
                scaled = contract.apply_factor(_inverse_root(values, settings[1]), scaled, axis)
        for axis, Q in enumerate(block.bases):
            if Q is not None:
                scaled = contract.apply_factor(Q, scaled, axis, precision=self.precision)
        return scaled

    # --------------------------------------------------------------------------------- other bases

    def _refresh(self, label: str, old: Any, read: Any) -> tuple[Any, Array]:
        """New bases of some blocks, with what is kept in them, and whether those have failed."""

        def make(old, statistics, started):
            bases, values, second = old
            bases, statistics = _widened(bases), _widened(statistics)
            new_bases: list[Array | None] = list(bases)
            new_values = None if values is None else list(values)
            finite = guards.all_finite(statistics)
            for axis, (Q, S) in enumerate(zip(bases, statistics, strict=True)):
                if Q is None or S is None:
                    continue
                # LAPACK need not come to an end on what is not finite.
                S = jnp.where(finite, S, 0)
                find = eigenbases.power_iteration if self.basis == "qr" else eigenbases.decompose
                new_Q, order = find(Q, S, precision=self.precision)
                new_bases[axis] = new_Q
                if second is not None:
                    second = jnp.take(second, order, axis=axis)
                if new_values is not None:
                    new_values[axis] = eigenbases.rayleigh_quotients(
                        new_Q, S, precision=self.precision
                    )
            new = tuple(new_bases), None if new_values is None else tuple(new_values), second
            new = jax.tree.map(lambda x, y: x.astype(y.dtype), new, old)
            sound = finite & guards.all_finite(new)
            return guards.select(started & sound, new, old), started & ~sound

        return _blocks.mapping(old[0])(make, old, *read)


def _block_of(stack: SoapStack) -> _Block:
    """What is kept of the blocks, without whether they have started."""
    return _Block(stack.statistics, stack.bases, stack.values, stack.second_moment)


def _widened(tree: Any) -> Any:
    """Arrays in the dtype of the arithmetic."""
    return jax.tree.map(contract.widen, tree)


def _extents(plan: BlockPlan, label: str, dtype: DTypeLike) -> Array:
    """How long every block is along its axes without the padding, of a real dtype, [N, k]."""
    sizes = plan.sizes(label)
    if sizes is None:
        return jnp.tile(jnp.asarray(plan.stacks[label].shape, dtype), (plan.count(label), 1))
    return jnp.asarray(np.stack(sizes, axis=1), dtype)


def _inverse_root(values: Array, floor: ArrayLike) -> Array:
    """`λ^-½` [d], of eigenvalues that are no less than a share of the largest; 0 if all are 0."""
    raised = jnp.maximum(values, jnp.asarray(floor, values.dtype) * jnp.max(values))
    positive = raised > 0
    return jnp.where(positive, jax.lax.rsqrt(jnp.where(positive, raised, 1)), 0)
