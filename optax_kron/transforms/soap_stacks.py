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
from optax_kron.blocking import BlockPlan, Signature
from optax_kron.kernels import contract, eigenbases
from optax_kron.transforms import _blocks, _program, moving_average, outliers
from optax_kron.transforms._blockwise import Step
from optax_kron.transforms._rota import Rota

VARIANTS = ("soap", "kl_shampoo", "kl_soap")
BASES = ("qr", "eigh")

# A second moment below the rounding of the rotation is none: to divide by it would blow up noise.
_NOISE = 8.0  # in units of rounding, relative to the root mean square of the block
# In its own bases a first gradient is diagonal; beside that it is what errors of the bases make.
_FIRST_NOISE = 1e-3  # relative to the same


class SoapStack(NamedTuple):
    """What is kept of the N blocks of one signature; an axis with a diagonal factor has no basis.

    Per axis of the block, with the axis' length d:
    """

    statistics: tuple[Array | None, ...]  # S, Hermitian [N, d, d], factor_dtype
    bases: tuple[Array | None, ...]  # Q, orthonormal columns [N, d, d], factor_dtype
    values: tuple[Array, ...] | None  # diag(QᴴSQ) [N, d], also of diagonal axes; KL variants only
    second_moment: Array | None  # of the gradient in the bases [N, ...], ≥ float32; Adam only
    started: Array  # whether the bases have been set from a gradient, bool [N]


@_program.settings
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

    def start(self, count: int, signature: Signature, dtype: DTypeLike) -> SoapStack:
        """See `Method`: statistics of zero, bases of the identity."""
        own = contract.complex_like(dtype, signature.is_complex)
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

    def rescale(self, stacks: Any, past: Mapping[str, Array]) -> Any:
        """See `Method`; bases have no scale."""
        rescaled = {}
        for label, stack in stacks.items():
            square = jnp.square(past[label])
            # Those of a KL variant are such that their product, over the axes, fits the squares.
            share = square ** (1 / len(stack.bases)) if self.is_kl else square
            statistics, values = outliers.times((stack.statistics, stack.values), share)
            rescaled[label] = stack._replace(
                statistics=statistics,
                values=values,
                second_moment=outliers.times(stack.second_moment, square),
            )
        return rescaled

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
        moved, updates, failures = {}, {}, jnp.zeros([], jnp.int32)
        newly, takes = {}, {}
        for label, stack in stacks.items():
            takes[label], failed = self._takes(stack, gradients[label], allowed)
            newly[label] = takes[label] & ~stack.started
            moved[label] = self._gather(
                stack, gradients[label], _extents(plan, label), takes[label], newly[label]
            )
            failures += failed
        moved, failed = self._begin(moved, newly)
        failures += failed
        for label, stack in moved.items():
            second, updates[label] = self._update(
                stack,
                gradients[label],
                direction[label],
                _extents(plan, label),
                count,
                takes[label] & stack.started,
                newly[label],
            )
            moved[label] = stack._replace(second_moment=second)
        began = _any(newly)
        turned = {label: stack for label, stack in moved.items() if _has_basis(stack)}
        found, failed, refreshed = self.rota.refresh(
            plan,
            self._refresh,
            {label: (x.bases, x.values, x.second_moment) for label, x in turned.items()},
            {label: (x.statistics, x.started) for label, x in turned.items()},
            count,
            allowed=allowed & (count > 1),
            all_due=jnp.zeros([], bool),
        )
        for label, (bases, values, second) in found.items():
            moved[label] = moved[label]._replace(bases=bases, values=values, second_moment=second)
        return Step(updates, moved, failures + failed, refreshed | began)

    # ------------------------------------------------------------------------------- the statistics

    def _takes(self, stack: SoapStack, gradient: Array, allowed: Array) -> tuple[Array, Array]:
        """Which blocks take in a gradient, bool [N], and how many cannot hold its square."""
        # No entry of any second moment is larger than the sum of all squares.
        kept = [x.dtype for x in jax.tree.leaves((stack.statistics, stack.values))]
        holds = _blocks.squares_fit(gradient, kept)
        informed = _blocks.largest(gradient)[:, 0] != 0
        # Zeros would shrink the statistics of a KL variant to nothing, which divides by them.
        if not self.is_kl:
            informed |= stack.started
        return allowed & holds & informed, jnp.sum(allowed & ~holds, dtype=jnp.int32)

    def _gather(
        self, stack: SoapStack, gradient: Array, extents: Array, takes: Array, newly: Array
    ) -> SoapStack:
        """The stack whose statistics have taken in a gradient."""
        rate = jnp.asarray(self.factor_decay, contract.real_dtype(gradient.dtype))

        def gather(statistics, bases, values, gradient, extents, takes, newly):
            if not self.is_kl:
                moments = [
                    None if S is None else contract.gram(gradient, i, precision=self.precision)
                    for i, S in enumerate(statistics)
                ]
                return _averaged(statistics, moments, rate, takes), None
            assert values is not None  # as they are, of KL variants
            # At a multiple of the identity that fits the gradient, the first factors are no larger
            # or smaller than those to come.
            scale = _scale(gradient, extents)
            values = [jnp.where(newly, scale, contract.widen(x)) for x in values]
            statistics = [
                S if S is None else jnp.where(newly, scale * jnp.eye(len(S), dtype=S.dtype), S)
                for S in _widened(statistics)
            ]
            moments, own = self._whitened_moments(_widened(bases), values, gradient, extents)
            takes &= guards.all_finite(own)
            return _averaged(statistics, moments, rate, takes), _averaged(values, own, rate, takes)

        old = stack.statistics, stack.values
        new = _blocks.mapping(stack.bases)(
            gather, stack.statistics, stack.bases, stack.values, gradient, extents, takes, newly
        )
        statistics, values = jax.tree.map(lambda x, y: x.astype(y.dtype), new, old)
        return stack._replace(statistics=statistics, values=values)

    def _whitened_moments(
        self,
        bases: Sequence[Array | None],
        values: Sequence[Array],
        gradient: Array,
        extents: Array,
    ) -> tuple[list[Array | None], list[Array]]:
        """For each axis the second moment of a gradient whitened along the others; its diagonal.

        The diagonal is that in the basis of the axis.
        """
        rotated = contract.into_bases(bases, gradient, precision=self.precision)
        roots = [_inverse_root(x, self.floor) for x in values]
        shares = extents / jnp.prod(extents)
        moments, own = [], []
        for axis, Q in enumerate(bases):
            whitened = rotated
            for other, root in enumerate(roots):
                if other != axis:
                    whitened = contract.apply_factor(root, whitened, other)
            share = shares[axis].astype(values[axis].dtype)
            own.append(share * contract.gram(whitened, axis, diagonal=True))
            if Q is None:
                moments.append(None)
                continue
            back = contract.apply_factor(Q, whitened, axis, precision=self.precision)
            moments.append(share * contract.gram(back, axis, precision=self.precision))
        return moments, own

    def _begin(
        self, stacks: Mapping[str, SoapStack], newly: Mapping[str, Array]
    ) -> tuple[dict[str, SoapStack], Array]:
        """Set the bases of blocks that have got their first gradient; how many have failed."""

        def begin(carry, statistics, newly):
            old, failures = carry
            new = {}
            for label, (bases, values, started) in old.items():
                bases, values, sound = _blocks.mapping(bases)(
                    self._first_bases, bases, values, statistics[label], newly[label]
                )
                failures += jnp.sum(newly[label] & ~sound, dtype=jnp.int32)
                new[label] = bases, values, started | (newly[label] & sound)
            return new, failures

        turned = {label: stack for label, stack in stacks.items() if _has_basis(stack)}
        own = {label: newly[label] for label in turned}
        found, failures = guards.replaced_if(
            begin,
            _any(own),
            (
                {label: (x.bases, x.values, x.started) for label, x in turned.items()},
                jnp.zeros([], jnp.int32),
            ),
            {label: x.statistics for label, x in turned.items()},
            own,
        )
        begun = {label: x._replace(started=x.started | newly[label]) for label, x in stacks.items()}
        for label, (bases, values, started) in found.items():
            begun[label] = begun[label]._replace(bases=bases, values=values, started=started)
        return begun, failures

    def _first_bases(self, old_bases: Any, old_values: Any, statistics: Any, new: Array) -> Any:
        """The eigenbases of one block, its eigenvalues, and whether they are sound."""
        bases, sound = list(old_bases), jnp.ones([], bool)
        values = None if old_values is None else list(old_values)
        for axis, S in enumerate(_widened(statistics)):
            if S is None:
                continue
            Q = eigenbases.descending(S)
            sound &= guards.all_finite(Q)
            bases[axis] = Q
            if values is not None:
                values[axis] = eigenbases.rayleigh_quotients(Q, S, precision=self.precision)
        old = old_bases, old_values
        found = tuple(bases), None if values is None else tuple(values)
        return *guards.select(new & sound, found, old), sound

    # --------------------------------------------------------------------------------- the update

    def _update(
        self,
        stack: SoapStack,
        gradient: Array,
        direction: Array,
        extents: Array,
        count: Array,
        takes: Array,
        newly: Array,
    ) -> tuple[Array | None, Array]:
        """The second moment after a gradient, and the update."""
        kept = [Q.dtype for Q in stack.bases if Q is not None]
        rounding = _NOISE * max([float(jnp.finfo(dtype).eps) for dtype in kept], default=0.0)

        def update(bases, values, second, gradient, direction, extents, takes, newly):
            bases = _widened(bases)
            direction = contract.into_bases(bases, direction, precision=self.precision)
            if second is None:
                assert values is not None  # of KL variants
                for axis, x in enumerate(_widened(values)):
                    direction = contract.apply_factor(_inverse_root(x, self.floor), direction, axis)
            else:
                beta = jnp.asarray(self.decay, second.dtype)
                rotated = contract.into_bases(bases, gradient, precision=self.precision)
                squares = contract.squared_magnitude(rotated)
                (second,) = _averaged([second], [squares], beta, takes)
                noise = jnp.where(newly, jnp.maximum(_FIRST_NOISE, rounding), rounding)
                direction = self._adam(bases, second, direction, extents, count, noise)
            return second, contract.out_of_bases(bases, direction, precision=self.precision)

        return _blocks.mapping(stack.bases)(
            update,
            stack.bases,
            stack.values,
            stack.second_moment,
            gradient,
            direction,
            extents,
            takes,
            newly,
        )

    def _adam(
        self,
        bases: Any,
        second: Array,
        direction: Array,
        extents: Array,
        count: Array,
        noise: Array,
    ) -> Array:
        """Adam's update of a momentum that is in the bases."""
        real = second.dtype
        second = second / moving_average.weight(self.decay, count, real)
        divisor = jnp.sqrt(second) + jnp.asarray(self.epsilon, real)
        scaled = direction / jnp.where(divisor > 0, divisor, 1)
        if all(Q is None for Q in bases):
            return scaled
        mean = jnp.sum(second) / jnp.prod(extents).astype(real)
        return jnp.where(second > jnp.square(noise.astype(real)) * mean, scaled, 0)

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
            sound = finite & guards.all_finite(new[0])
            return guards.select(started & sound, new, old), started & ~sound

        return _blocks.mapping(old[0])(make, old, *read)


def _widened(tree: Any) -> Any:
    """Arrays in the dtype of the arithmetic."""
    return jax.tree.map(contract.widen, tree)


def _has_basis(stack: SoapStack) -> bool:
    """Whether any axis has a dense factor."""
    return any(Q is not None for Q in stack.bases)


def _any(blocks: Mapping[str, Array]) -> Array:
    """Whether something holds for any block of any stack."""
    return jnp.any(jnp.concatenate([*blocks.values(), jnp.zeros(0, bool)]))


def _averaged(old: Any, new: Any, rate: Array, takes: Array) -> tuple[Any, ...]:
    """`rate·old + (1 − rate)·new` of each pair, where the new is taken in; `None` stays so."""

    def average(x, y):
        x = contract.widen(x)
        return jnp.where(takes, rate * x + (1 - rate) * y, x)

    return tuple(None if x is None else average(x, y) for x, y in zip(old, new, strict=True))


def _scale(gradient: Array, extents: Array) -> Array:
    """Of factors whose product is the mean square of a gradient's elements."""
    largest = guards.largest_magnitude(gradient)
    unit = gradient / jnp.where(largest > 0, largest, 1)
    mean = jnp.sum(contract.squared_magnitude(unit)) / jnp.prod(extents).astype(largest.dtype)
    return largest ** (2 / gradient.ndim) * mean ** (1 / gradient.ndim)


def _extents(plan: BlockPlan, label: str) -> Array:
    """How long every block is along its axes without the padding, [N, k]."""
    sizes = plan.sizes(label)
    if sizes is None:
        return jnp.tile(jnp.asarray(plan.stacks[label].shape, float), (plan.count(label), 1))
    return jnp.asarray(np.stack(sizes, axis=1), float)


def _inverse_root(values: Array, floor: ArrayLike) -> Array:
    """`λ^-½` [d], of eigenvalues that are no less than a share of the largest; 0 if all are 0."""
    raised = jnp.maximum(values, jnp.asarray(floor, values.dtype) * jnp.max(values))
    positive = raised > 0
    return jnp.where(positive, jax.lax.rsqrt(jnp.where(positive, raised, 1)), 0)
