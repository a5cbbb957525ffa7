"""Stacks of EKFAC: K-FAC's factors, their eigenbases, and eigenvalues that are estimated in those.

The bases are refreshed now and then; the eigenvalues are averaged over all steps. When a basis
changes they are carried over, as the diagonal of the same matrix in the new basis.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from optax_kron.kernels import contract, ekfac, kfac
from optax_kron.layers.layer import Layer
from optax_kron.layers.plan import LayerPlan, Member
from optax_kron.layers.spectra import eigenvalues_of_member, seen_blocks
from optax_kron.layers.taps import Tap
from optax_kron.transforms import _blocks, _program, kfac_stacks, outliers
from optax_kron.transforms.kfac_stacks import Stacks


class Spectrum(NamedTuple):
    """Eigendecompositions of factors, and the diagonal of the curvature in their bases."""

    input_basis: Array | None  # columns [N, d_in, d_in], factor_dtype; None if A is diagonal
    input_values: Array  # of A [N, d_in], factor_dtype
    output_basis: Array | None  # columns [N, d_out, d_out], factor_dtype; None if G is diagonal
    output_values: Array  # of G [N, d_out], factor_dtype
    values: Array  # λ [N, d_in, d_out], factor_dtype
    known: Array  # whether the eigenvalues have been set, bool [N]


@_program.settings
class Curvature(kfac_stacks.Curvature):
    """How factors and eigenvalues are estimated and applied."""

    averages: ClassVar[int] = 3

    def start(self, layer: Layer, count: int, dtype: DTypeLike) -> Spectrum:
        """See `kfac_stacks.Curvature`."""
        return Spectrum(
            *kfac_stacks.identity_bases(layer, count, dtype),
            values=jnp.ones((count, layer.d_in, layer.d_out), dtype),
            known=jnp.zeros(count, bool),
        )

    def decompose(self, stacks: Stacks, damping: ArrayLike) -> dict[str, tuple[Any, Array]]:
        """See `kfac_stacks.Curvature`: new bases, and what is known in them."""
        del damping  # comes in when they are applied

        def change(A, G, old):
            (Q_a, a), (Q_g, g) = (kfac.eigenbasis(contract.widen(x)) for x in (A, G))
            overlaps = self._overlap(Q_a, old.input_basis), self._overlap(Q_g, old.output_basis)
            values = contract.widen(old.values)
            carried = ekfac.carried_over(values, *overlaps, precision=self.precision)
            # Of factors that are as they were, nothing may change, not even by rounding.
            moved = jnp.any(a.astype(old.values.dtype) != old.input_values)
            moved |= jnp.any(g.astype(old.values.dtype) != old.output_values)
            values = jnp.where(moved, carried, values)
            return Q_a, a, Q_g, g, values

        found = {}
        for label, stack in stacks.items():
            old = stack.inverse
            Q_a, a, Q_g, g, values = _blocks.mapping(stack[:2])(change, *stack[:2], old)
            new = Spectrum(Q_a, a, Q_g, g, values, old.known)
            new = jax.tree.map(lambda x, y: x.astype(y.dtype), new, old)
            parts = [x for x in new[:5] if x is not None]
            found[label] = new, _blocks.finite_blocks(parts)
        return found

    def _overlap(self, new: Array | None, old: Array | None) -> Array | None:
        if new is None or old is None:
            return None
        return jnp.matmul(new.T, contract.widen(old), precision=self.precision)

    def correct(
        self,
        plan: LayerPlan,
        stacks: Stacks,
        taps: Mapping[str, Sequence[Tap]],
        decay: Array,
        allowed: Array,
    ) -> tuple[Stacks, Array, Array]:
        """See `kfac_stacks.Curvature`: the eigenvalues take in what the layers saw."""
        corrected, failures, strange = {}, jnp.zeros([], jnp.int32), jnp.zeros([], bool)
        for label, members in plan.stacks.items():
            stack = stacks[label]
            lambdas, seen, start = [], [], 0
            for member in members:
                stop = start + member.layer.blocks
                own = taps[member.layer.name]
                lambdas.append(
                    self._eigenvalues(member, own, stack.inverse, slice(start, stop), decay)
                )
                seen.append(seen_blocks(member, own))
                start = stop
            old = stack.inverse
            values, seen = jnp.concatenate(lambdas), jnp.concatenate(seen)
            rate = jnp.where(old.known, decay, 0)  # the first ones are taken as they are
            before, values, last, found = outliers.limit_moments(
                old.values,
                values,
                jnp.sum(values, axis=(1, 2)),
                None if stack.usual is None else stack.usual[2],
                self.outlier_clip,
            )
            new = _blocks.blend(before, values, rate)
            finite = _blocks.finite_blocks([new])
            moves = allowed & seen & stack.started & finite
            failures += jnp.sum(allowed & ~finite, dtype=jnp.int32)
            spectrum = old._replace(
                values=_blocks.select_blocks(moves, new, old.values), known=old.known | moves
            )
            usual = stack.usual
            if usual is not None:
                choose = functools.partial(_blocks.select_blocks, moves)
                usual = *usual[:2], jax.tree.map(choose, last, usual[2])
            corrected[label] = stack._replace(inverse=spectrum, usual=usual)
            strange |= jnp.any(moves & found)
        return corrected, failures, strange

    def _eigenvalues(
        self, member: Member, taps: Sequence[Tap], spectrum: Spectrum, rows: slice, decay: Array
    ) -> Array:
        """λ [B, d_in, d_out] of one layer, in the bases at some rows of a stack."""
        bases = [
            None if basis is None else basis[rows].astype(decay.dtype)
            for basis in (spectrum.input_basis, spectrum.output_basis)
        ]
        return eigenvalues_of_member(
            self.owner,
            member,
            taps,
            *bases,
            dtype=decay.dtype,
            precision=self.precision,
        )

    def precondition(
        self, stacks: Stacks, blocks: Mapping[str, Array], damping: ArrayLike
    ) -> dict[str, Array]:
        """See `kfac_stacks.Curvature`; a block without eigenvalues hands its gradient through."""

        def apply(spectrum, x):
            Q_a, a, Q_g, g, values, known = jax.tree.map(
                lambda y: y if y.dtype == bool else contract.widen(y), spectrum
            )
            added: ArrayLike = damping
            if self.rule == "pi":
                whole = jnp.asarray(damping, values.dtype)
                amounts = kfac.pi_damping(jnp.mean(a), jnp.mean(g), whole)
                added = amounts[0] * g[None] + amounts[1] * a[:, None] + whole
            found = kfac.apply_eigen(Q_a, Q_g, values, x, added, precision=self.precision)
            return jnp.where(known, found, x)

        return {
            label: _blocks.mapping(stacks[label][:2])(apply, stacks[label].inverse, x)
            for label, x in blocks.items()
        }
