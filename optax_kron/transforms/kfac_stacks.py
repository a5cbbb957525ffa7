"""The factors of K-FAC as stacks: how layers share them, how they move, and precondition.

Blocks with one signature (d_in, d_out, and which factors are diagonal), from all layers, form one
array per factor. So compile time grows with the number of signatures, not of layers, but
for the contraction of each layer's taps, whose shapes are its own.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from optax_kron import guards
from optax_kron.kernels import contract, flow, kfac
from optax_kron.layers.layer import Layer
from optax_kron.layers.moments import moments_of_member
from optax_kron.layers.plan import LayerPlan, factor_shape
from optax_kron.layers.taps import Tap
from optax_kron.transforms import _blocks, _program, outliers

Stacks = Mapping[str, "KfacStack"]


class Inverses(NamedTuple):
    """Inverses of damped factors."""

    input: Array  # (A + ...)⁻¹ [N, d_in, d_in], or its diagonal [N, d_in], factor_dtype
    output: Array  # (G + ...)⁻¹ [N, d_out, d_out], or its diagonal [N, d_out], factor_dtype


class Eigenbases(NamedTuple):
    """Eigendecompositions of factors; the damping comes in when they are applied."""

    input_basis: Array | None  # columns [N, d_in, d_in], factor_dtype; None if A is diagonal
    input_values: Array  # [N, d_in], factor_dtype
    output_basis: Array | None  # columns [N, d_out, d_out], factor_dtype; None if G is diagonal
    output_values: Array  # [N, d_out], factor_dtype


class KfacStack(NamedTuple):
    """Factors of the N blocks of one signature."""

    input_factor: Array  # A [N, d_in, d_in], or its diagonal [N, d_in], factor_dtype
    output_factor: Array  # G [N, d_out, d_out], or its diagonal [N, d_out], factor_dtype
    started: Array  # whether the factors have been set, bool [N]
    inverse: Any  # of the factors at the last refresh that went well: Inverses or Eigenbases
    # Of the roots of the traces of what the factors take in, A, G and what else is averaged; None
    # without outlier_clip.
    usual: tuple[outliers.Usual, ...] | None


@_program.settings
@dataclasses.dataclass(frozen=True)
class Curvature:
    """How factors are estimated, inverted and applied; the settings of `scale_by_kfac`."""

    owner: str
    rule: str
    approx: str
    precision: jax.lax.PrecisionLike
    outlier_clip: ArrayLike | None

    averages: ClassVar[int] = 2  # second moments that are averaged over steps

    def init(self, plan: LayerPlan, dtype: DTypeLike) -> Stacks | Array:
        """Factors of zero, and inverses at the identity."""
        if not plan.leaves:
            return jnp.zeros([])  # One leaf where the stacks would be, as map_params needs.
        stacks = {}
        for label, members in plan.stacks.items():
            layer, count = members[0].layer, plan.count(label)
            shapes = (
                factor_shape(count, layer.d_in, layer.has_diagonal_input),
                factor_shape(count, layer.d_out, layer.has_diagonal_output),
            )
            stacks[label] = KfacStack(
                input_factor=jnp.zeros(shapes[0], dtype),
                output_factor=jnp.zeros(shapes[1], dtype),
                started=jnp.zeros(count, bool),
                inverse=self.start(layer, count, dtype),
                usual=None
                if self.outlier_clip is None
                else tuple(outliers.start(count) for _ in range(self.averages)),
            )
        return stacks

    def start(self, layer: Layer, count: int, dtype: DTypeLike) -> Any:
        """What stands for the inverses of `count` blocks before there are any: the identity."""
        if self.rule == "eigen":
            return identity_bases(layer, count, dtype)
        diagonal = layer.has_diagonal_input, layer.has_diagonal_output
        return Inverses(
            kfac.identities(count, layer.d_in, dtype, diagonal=diagonal[0]),
            kfac.identities(count, layer.d_out, dtype, diagonal=diagonal[1]),
        )

    def move(
        self,
        plan: LayerPlan,
        stacks: Stacks,
        taps: Mapping[str, Sequence[Tap]],
        decay: Array,
        allowed: Array,
    ) -> tuple[Stacks, Array, Array, Array]:
        """Average what the layers saw into the factors.

        Args:
          plan: of the layers.
          stacks: the factors.
          taps: groups by layer, in canonical form.
          decay: of the average, [] in the dtype of the arithmetic.
          allowed: whether to move them at all, bool [].

        Returns:
          The new stacks; how many blocks failed, so that their old factors were kept; whether
          all taps were finite: if not, the stacks are the old ones; and whether there were outliers
          among them.
        """
        if not plan.stacks:
            return stacks, jnp.zeros([], jnp.int32), jnp.ones([], bool), jnp.zeros([], bool)
        # Of the layers that are here, others may be hidden.
        used = {
            m.layer.name: taps[m.layer.name] for members in plan.stacks.values() for m in members
        }
        found = {}
        for label, members in plan.stacks.items():
            stack = stacks[label]
            seen_by = functools.partial(
                moments_of_member,
                self.owner,
                approx=self.approx,
                dtype=decay.dtype,
                precision=self.precision,
            )
            pairs = [seen_by(m, used[m.layer.name]) for m in members]
            *moments, weight = map(jnp.concatenate, zip(*pairs, strict=True))
            rate = jnp.where(stack.started, decay, 0)  # the first moments are taken as they are
            new, usual, strange = self._blend(stack, moments, rate)
            own = [tap for m in members for tap in used[m.layer.name]]
            if stack.input_factor.dtype == decay.dtype and all(isinstance(t, Tap) for t in own):
                # No entry of a second moment is larger than those on its diagonal.
                suspects = [kfac.diagonal_rows(x) for x in moments]
            else:
                suspects = [_blocks.largest(x) for x in new]
            found[label] = new, suspects, weight > 0, usual, strange
        checks = _blocks.finite_rows(
            [row for _, suspects, *_ in found.values() for row in suspects]
        )
        finite = list(map(jnp.logical_and, checks[::2], checks[1::2]))
        # A layer in a branch not taken has seen nothing.
        seen = [allowed & some for _, _, some, *_ in found.values()]

        def refuse():
            sound = guards.all_finite(used)
            taken = [sound & f & s for f, s in zip(finite, seen, strict=True)]
            failed = sum(jnp.sum(~f, dtype=jnp.int32) for f in finite)
            return sound, taken, jnp.where(allowed & sound, failed, 0)

        # Taps that are not finite show in their moments; where these are, they need not be read.
        sound, taken, failures = flow.cond(
            jnp.all(jnp.concatenate(finite)),
            lambda: (jnp.ones([], bool), seen, jnp.zeros([], jnp.int32)),
            refuse,
        )
        moved, strange = {}, [jnp.zeros(1, bool)]
        for (label, (new, _, _, usual, outlying)), moves in zip(found.items(), taken, strict=True):
            stack = stacks[label]
            choose = functools.partial(_blocks.select_blocks, moves)
            moved[label] = KfacStack(
                choose(new[0], stack.input_factor),
                choose(new[1], stack.output_factor),
                stack.started | moves,
                stack.inverse,
                jax.tree.map(choose, usual, stack.usual),
            )
            strange.append(moves & outlying)
        return moved, failures, sound, jnp.any(jnp.concatenate(strange))

    def _blend(
        self, stack: KfacStack, moments: Sequence[Array], rate: Array
    ) -> tuple[list[Array], tuple[outliers.Usual, ...] | None, Array]:
        """The factors after the moments of a step, the usual norms, and which were outliers."""
        new, usual, strange = [], list(stack.usual or ()), jnp.zeros(len(rate), bool)
        for i, (old, moment) in enumerate(zip(stack[:2], moments, strict=True)):
            trace = jnp.sum(kfac.diagonal_rows(moment), axis=1)
            before = None if stack.usual is None else stack.usual[i]
            old, moment, after, found = outliers.limit_moments(
                old, moment, trace, before, self.outlier_clip
            )
            new.append(_blocks.blend(old, moment, rate))
            if after is not None:
                usual[i] = after
            strange |= found
        return new, None if stack.usual is None else tuple(usual), strange

    def refresh(
        self,
        last: tuple[Mapping[str, Inverses | Eigenbases], Any],
        factors: Mapping[str, tuple[Array, Array, Array]],
        damping: ArrayLike,
    ) -> tuple[dict[str, Inverses | Eigenbases], Array]:
        """Invert, or eigendecompose, the factors of every block that has any.

        Args:
          last: the inverses, and what is returned beside them.
          factors: the stacks, all but their inverses.
          damping: of the factors.

        Returns:
          The new inverses; and how many blocks failed, so that their last inverse was kept.
        """
        stacks = {label: KfacStack(*rest, last[0][label], None) for label, rest in factors.items()}
        inverses, failures = {}, jnp.zeros([], jnp.int32)
        for label, (new, finite) in self.decompose(stacks, damping).items():
            started, old = stacks[label].started, stacks[label].inverse
            inverses[label] = jax.tree.map(
                functools.partial(_blocks.select_blocks, started & finite), new, old
            )
            failures = failures + jnp.sum(started & ~finite, dtype=jnp.int32)
        return inverses, failures

    def decompose(
        self, stacks: Stacks, damping: ArrayLike
    ) -> dict[str, tuple[Inverses | Eigenbases, Array]]:
        """What stands for the inverses, and whether it is finite, bool [N], of every stack."""
        if self.rule == "eigen":
            return self._eigenbases(stacks)  # the damping comes in when they are applied
        return self._inverses(stacks, damping)

    def _eigenbases(self, stacks):
        """Eigendecompositions, and whether they are finite, bool [N], of every stack."""

        def decompose(A, G):
            pairs = map(kfac.eigenbasis, (contract.widen(A), contract.widen(G)))
            (input_basis, input_values), (output_basis, output_values) = pairs
            return Eigenbases(input_basis, input_values, output_basis, output_values)

        found = {}
        for label, stack in stacks.items():
            new = _blocks.mapping(stack[:2])(decompose, *stack[:2])
            new = jax.tree.map(lambda x, y: x.astype(y.dtype), new, stack.inverse)
            found[label] = new, _blocks.finite_blocks(jax.tree.leaves(new))
        return found

    def _inverses(self, stacks, damping):
        """Inverses of the damped factors, and whether they are finite, bool [N], of every stack."""
        inputs, outputs = ([contract.widen(s[i]) for s in stacks.values()] for i in (0, 1))
        amounts = self._amounts(inputs, outputs, damping) if stacks else []
        inverses, finite = kfac.inverses([*inputs, *outputs], amounts)
        results = {}
        for i, (label, stack) in enumerate(stacks.items()):
            j = len(stacks) + i
            dtype = stack.inverse.input.dtype
            new = Inverses(inverses[i].astype(dtype), inverses[j].astype(dtype))
            sound = finite[i] & finite[j]
            if dtype != inverses[i].dtype:  # narrower: what was finite may overflow
                sound = _blocks.finite_blocks(new)
            results[label] = new, sound
        return results

    def _amounts(self, inputs, outputs, damping):
        """What is added to the diagonals of all factors, [N] for each stack."""
        means = [kfac.mean_eigenvalues(side) for side in (inputs, outputs)]
        if self.rule == "pi":
            amounts = kfac.pi_damping(means[0], means[1], damping)
        else:
            amounts = [kfac.trace_damping(mean, damping) for mean in means]
        ends = np.cumsum([len(m) for m in inputs])[:-1]
        return [part for amount in amounts for part in jnp.split(amount, ends)]

    def correct(
        self, plan: LayerPlan, stacks: Stacks, taps: Any, decay: Array, allowed: Array
    ) -> tuple[Stacks, Array, Array]:
        """What else is learned from the taps of a step, with the new inverses: nothing.

        Args:
          plan: of the layers.
          stacks: factors and inverses.
          taps: groups by layer, in canonical form.
          decay: of averages over steps, [].
          allowed: whether to learn at all, bool [].

        Returns:
          The new stacks; how many blocks failed, int32 []; whether there were outliers, bool [].
        """
        del plan, taps, decay, allowed
        return stacks, jnp.zeros([], jnp.int32), jnp.zeros([], bool)

    def precondition(
        self, stacks: Stacks, blocks: Mapping[str, Array], damping: ArrayLike
    ) -> dict[str, Array]:
        """The inverse curvature applied to blocks [N, d_in, d_out] of every signature."""

        def apply(inverse, x):
            inverse = jax.tree.map(contract.widen, inverse)
            if isinstance(inverse, Eigenbases):
                values = inverse.input_values[:, None] * inverse.output_values[None]
                bases = inverse.input_basis, inverse.output_basis
                return kfac.apply_eigen(*bases, values, x, damping, precision=self.precision)
            return kfac.apply_inverses(inverse.input, inverse.output, x, precision=self.precision)

        return {
            label: _blocks.mapping(stacks[label][:2])(apply, stacks[label].inverse, x)
            for label, x in blocks.items()
        }


def identity_bases(layer: Layer, count: int, dtype: DTypeLike) -> Eigenbases:
    """The eigendecompositions of factors that are the identity, of so many blocks."""

    def basis(size, diagonal):
        return None if diagonal else kfac.identities(count, size, dtype)

    return Eigenbases(
        input_basis=basis(layer.d_in, layer.has_diagonal_input),
        input_values=jnp.ones((count, layer.d_in), dtype),
        output_basis=basis(layer.d_out, layer.has_diagonal_output),
        output_values=jnp.ones((count, layer.d_out), dtype),
    )
