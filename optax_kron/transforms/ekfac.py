"""EKFAC: K-FAC with eigenvalues that are estimated in its eigenbasis.

The bases are refreshed now and then; the eigenvalues are averaged over all steps. When a basis
changes they are carried over, as the diagonal of the same matrix in the new basis.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from optax_kron.kernels import contract, flow, packed
from optax_kron.kernels import ekfac as kernels
from optax_kron.kernels import kfac as kfac_kernels
from optax_kron.layers.layer import Layer
from optax_kron.layers.plan import LayerPlan
from optax_kron.layers.spectra import eigenvalues_of_member, seen_blocks
from optax_kron.layers.taps import Tap, Taps
from optax_kron.transforms import outliers, program, validation
from optax_kron.transforms.factors import FACTOR_SETTINGS, KfacStack, LayerFactors, check_factors
from optax_kron.transforms.frame import STORAGE_SETTINGS, transformation
from optax_kron.transforms.kfac import identity_bases
from optax_kron.transforms.layerwise import LAYER_SETTINGS, layerwise
from optax_kron.transforms.preconditioner import (
    KronState,
    Seen,
    Stacks,
    Step,
    any_block,
    separated,
    total,
)
from optax_kron.transforms.stacks import Change, blend, finite_blocks, guarded, map_blocks
from optax_kron.transforms.turned import BASES, follow_factors
from optax_kron.types import PyTree


class Spectrum(NamedTuple):
    """Eigendecompositions of factors, and the diagonal of the curvature in their bases."""

    input_basis: Float[Array, "N d_in d_in"] | None  # columns, factor_dtype; None if A is diagonal
    input_values: Float[Array, "N d_in"]  # of A, factor_dtype
    output_basis: Float[Array, "N d_out d_out"] | None  # columns; None if G is diagonal
    output_values: Float[Array, "N d_out"]  # of G, factor_dtype
    values: Float[Array, "N d_in d_out"]  # λ, factor_dtype
    known: Bool[Array, " N"]  # whether the eigenvalues have been set


@program.settings
@dataclasses.dataclass(frozen=True)
class Ekfac(LayerFactors):
    """How factors and eigenvalues are estimated and applied; the settings of `scale_by_ekfac`."""

    basis: str  # how bases follow factors
    correct_every: ArrayLike  # steps from one correction of the eigenvalues to the next
    correcting: Bool[Array, ""] | bool = True  # whether this step is one

    averages: ClassVar[int] = 3

    looks_twice: ClassVar[bool] = True  # at taps, in the bases that they have led to

    def init_inverse(self, layer: Layer, count: int, dtype: jnp.dtype) -> Spectrum:
        """See `LayerFactors`."""
        return Spectrum(
            *identity_bases(layer, count, dtype),
            values=jnp.ones((count, layer.d_in, layer.d_out), dtype),
            known=jnp.zeros(count, bool),
        )

    def refresh_all(self, stacks, step) -> tuple[Stacks, Mapping[str, Bool[Array, " N"]]]:
        """See `Preconditioner`: bases of similar sizes, of all stacks, share a program."""
        if self.basis == "eigh":
            return super().refresh_all(stacks, step)
        turned = follow_factors(stacks, precision=self.precision)
        return separated({k: self._turned(x, turned[k]) for k, x in stacks.items()})

    def _turned(self, stack, turned):
        """A stack with other bases, and what is known in them."""
        old = stack.inverse
        before = old.input_basis, old.output_basis
        overlaps = [self._overlap(Q, basis) for Q, basis in zip(turned.bases, before, strict=True)]
        carry = functools.partial(kernels.carried_over, precision=self.precision)
        values = jax.vmap(carry)(contract.widen(old.values), *overlaps).astype(old.values.dtype)
        (Q_a, Q_g), (a, g) = turned.bases, turned.values
        new = Spectrum(Q_a, a, Q_g, g, values, old.known)
        usable = turned.usable & finite_blocks([values])
        return guarded(stack, Change({"inverse": new}, stack.initialized, usable))

    def refresh(self, stack: KfacStack, step: Step) -> tuple[KfacStack, Bool[Array, " N"]]:
        """See `Preconditioner`: new bases, and what is known in them."""
        del step

        def change(A, G, old):
            (Q_a, a), (Q_g, g) = (
                kfac_kernels.eigenbasis(contract.widen(packed.whole(x))) for x in (A, G)
            )
            overlaps = self._overlap(Q_a, old.input_basis), self._overlap(Q_g, old.output_basis)
            values = contract.widen(old.values)
            carried = kernels.carried_over(values, *overlaps, precision=self.precision)
            # Of factors that are as they were, nothing may change, not even by rounding.
            moved = jnp.any(a.astype(old.values.dtype) != old.input_values)
            moved |= jnp.any(g.astype(old.values.dtype) != old.output_values)
            return Spectrum(Q_a, a, Q_g, g, jnp.where(moved, carried, values), old.known)

        new = map_blocks(stack[:2])(change, *stack[:2], stack.inverse)
        # LAPACK returns NaN for vectors and values alike, and λ is made with all of the vectors.
        finite = finite_blocks([new.input_values, new.output_values, new.values])
        return guarded(stack, Change({"inverse": new}, stack.initialized, finite))

    def _overlap(self, new: Array | None, old: Array | None) -> Array | None:
        if new is None or old is None:
            return None
        return jnp.matmul(new.mT, contract.widen(old), precision=self.precision)

    def at(self, state: KronState) -> "Ekfac":
        """See `Preconditioner`."""
        method = dataclasses.replace(self, damping=super().at(state).damping)
        if validation.whole_number(self.correct_every) == 1:
            return method
        due = state.count % validation.interval(self.correct_every) == 0
        return dataclasses.replace(method, correcting=due)

    def corrections(self, steps: Int[Array, ""]) -> Int[Array, ""]:
        """See `LayerFactors`."""
        return -(-steps // validation.interval(self.correct_every))

    def look(
        self, plan: LayerPlan, inverses: Mapping[str, Spectrum], taps: Taps, dtype: jnp.dtype
    ) -> Mapping[str, tuple[Float[Array, "N d_in d_out"], Bool[Array, " N"]]]:
        """See `LayerFactors`: λ of what layers saw, in their bases; and which have seen any."""

        def look(inverses, taps):
            return {
                label: self._moments(plan, label, taps, inverses[label], dtype)
                for label in plan.stacks
            }

        if isinstance(self.correcting, bool):
            return look(inverses, taps)
        # At other steps no layer has seen any.
        return flow.cond_or_zeros(self.correcting, look, inverses, taps)

    def _moments(self, plan, label, taps, spectrum, dtype):
        lambdas, seen = [], []
        for member, rows in plan.slices(label):
            bases = [
                None if basis is None else basis[rows].astype(dtype)
                for basis in (spectrum.input_basis, spectrum.output_basis)
            ]
            given: Sequence[Tap] = taps[member.layer.name]
            lambdas.append(
                eigenvalues_of_member(
                    self.owner, member, given, *bases, dtype=dtype, precision=self.precision
                )
            )
            # λ is that in the basis of the first of the blocks that one was cut into.
            agree = [member.cut.agrees(basis) for basis in bases]
            seen.append(seen_blocks(member, given) & agree[0] & agree[1])
        return plan.stacked(label, lambdas), plan.stacked(label, seen)

    def correct_all(
        self, stacks: Stacks, looked: PyTree, decay: Float[Array, ""], step: Step
    ) -> tuple[Stacks, Int[Array, ""], Bool[Array, ""]]:
        """See `LayerFactors`: the eigenvalues take in what the layers saw."""
        corrected, failed, strange = dict(stacks), [], []
        for label, (values, seen) in looked.items():
            stack = stacks[label]
            wanted = step.accepted & seen & stack.initialized
            usual = None if stack.usual is None else stack.usual[2]
            move = functools.partial(self._average, values, decay, usual, wanted)
            spectrum, missed, last, found = step.averaged(
                move, stack.inverse, ("values",), f"values {label}"
            )
            fields = {"inverse": spectrum}
            moved = wanted & ~missed
            if stack.usual is not None:
                fields["usual"] = *stack.usual[:2], last
            # What is finite is known: bases need not be read for it at every step.
            corrected[label], _ = guarded(stack, Change(fields, moved, jnp.ones_like(moved)))
            failed.append(missed)
            strange.append(moved & found)
        return corrected, total(failed), any_block(strange)

    def _average(self, values, decay, usual, wanted, old):
        """A spectrum whose eigenvalues have taken in others; and what is usual, and outliers."""
        rate = jnp.where(old.known, decay, 0)  # the first ones are taken as they are
        trace = jnp.sum(values, axis=(1, 2))
        before, values, usual, found = outliers.limit_moments(
            old.values, values, trace, usual, self.outlier_clip
        )
        new = {"values": blend(before, values, rate), "known": jnp.ones_like(old.known)}
        finite = jnp.isfinite(trace)  # of squares, which need not be read again
        if old.values.dtype != decay.dtype:  # in which they may overflow
            finite &= finite_blocks([new["values"]])
        return *guarded(old, Change(new, wanted, finite)), usual, found

    def precondition(
        self, stack: KfacStack, seen: Seen, step: Step
    ) -> Float[Array, "N d_in d_out"]:
        """See `Preconditioner`; a block without eigenvalues hands its gradient through."""
        del step

        def apply(spectrum, x):
            Q_a, a, Q_g, g, values, known = jax.tree.map(
                lambda y: y if y.dtype == bool else contract.widen(y), spectrum
            )
            added: ArrayLike = self.damping
            if self.damping_rule == "pi":
                damping = jnp.asarray(self.damping, values.dtype)
                amounts = kfac_kernels.pi_damping(jnp.mean(a), jnp.mean(g), damping)
                added = amounts[0] * g[None] + amounts[1] * a[:, None] + damping
            natural = kfac_kernels.apply_eigen(Q_a, Q_g, values, x, added, precision=self.precision)
            return jnp.where(known, natural, x)

        return map_blocks(stack[:2])(apply, stack.inverse, seen.direction)


def scale_by_ekfac(
    *,
    layers: Iterable[Layer],
    decay: ArrayLike = 0.95,
    bias_correction: bool = True,
    damping: optax.ScalarOrSchedule = 1e-3,
    damping_rule: str = "exact",
    basis: str = "power",
    approx: str = "expand",
    momentum: ArrayLike | None = 0.9,
    factor_every: ArrayLike = 1,
    correct_every: ArrayLike = 1,
    refresh_every: ArrayLike = 5,
    stagger: bool = False,
    norm_constraint: optax.ScalarOrSchedule | str | None = "auto",
    outlier_clip: ArrayLike | None = 10.0,
    learning_rate: optax.ScalarOrSchedule | None = None,
    fallback: optax.GradientTransformation | None = None,
    block_size: int | None = None,
    factor_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
    rounding: str = "nearest",
    seed: int | Array = 0,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale gradients by EKFAC: no weight decay, no learning rate, no sign flip.

    As `scale_by_kfac`, each layer has factors `A` and `G`. Of these it takes the eigenvectors `Q_a`
    and `Q_g`; the eigenvalues λ [d_in, d_out] are estimated for themselves, at every step, in
    the bases that there are, from the gradient of each example, summed over its positions and then
    squared. The update of a layer's parameters X [d_in, d_out] is

        Q_a ((Q_aᵀ X Q_g) / (λ + δ)) Q_gᵀ.

    When the bases are made anew, λ is carried over: it becomes the diagonal of the same matrix in
    the new bases.

    Args:
      layers: as for all arguments that are not listed here, see `scale_by_kfac`.
      decay: of the moving averages of the factors and of the eigenvalues, in [0, 1].
      bias_correction: as in `scale_by_kfac`, for both averages.
      damping: δ ≥ 0, or a schedule of it.
      damping_rule: what is added to the eigenvalues. "exact": δ. "pi": what this rule adds to
        those of `A ⊗ G` in `kfac`, `π√δ·g + √δ/π·a + δ` with a and g those of A and G: much more
        than δ where only one of them is small.
      basis: "power", bases that start at the identity, and at every refresh follow the factors by
        three steps of power iteration, of matrix products alone; or "eigh", eigendecompositions, by
        LAPACK on a CPU.
      approx: of the factors whose eigenvectors are taken. The eigenvalues are exact in either case.
      momentum: of the velocity.
      factor_every: as in `scale_by_kfac`, of the factors alone.
      correct_every: the eigenvalues take in taps at the first of every so many accepted steps. In
        between they are those of before, carried over to new bases.
      refresh_every: accepted steps from one refresh of the bases to the next, more often while the
        factors are young.
      stagger: deal the blocks out to the steps between two refreshes, as in `scale_by_kfac`.
      norm_constraint: a number, or a schedule, needs `learning_rate`.
      outlier_clip: also of what is averaged into the eigenvalues.
      learning_rate: for a norm constraint that is a number or a schedule.
      fallback: the transformation of parameters that belong to no layer.
      block_size: longest run of an axis with a diagonal factor that is one block, as in
        `scale_by_kfac`; the eigenvalues are cut with it.
      factor_dtype: real dtype of the stored factors, bases and eigenvalues.
      momentum_dtype: dtype of the stored momentum.
      rounding: of averages stored in 16 bits, also the eigenvalues.
      seed: for stochastic rounding.
      precision: of the matrix products.

    Returns:
      A transformation, whose `update` takes `taps` as that of `scale_by_kfac` does, and guards
      against what is not finite in the same way; a block whose eigenvalues would not be finite
      keeps the last ones. Taps may not be second moments (`reduce=True`).

    Raises:
      ValueError: as `scale_by_kfac`, and in `update` for second moments.

    Cost, for a layer as in `scale_by_kfac`. State: 1.5·(d_in² + d_out²) + 2·d_in·d_out numbers; a
    diagonal factor has unit vectors for its basis, and 2·d numbers. A step:
    4·d_in·d_out·(d_in + d_out) operations, and for the eigenvalues 2·N·S·(d_in² + V·d_out²) and
    2·N·d_in·d_out where S = 1, else 2·V·N·S·d_in·d_out. Taking in taps: as there. A refresh, for
    each factor of size d: 6·d³ and, three times, 4·d³ at d = 1024 to 8·d³ where d ≤ 128, at first
    up to twice that; with "eigh" about 9·d³, by LAPACK on a CPU. And 2·d_in·d_out·(d_in + d_out).

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> tx = ok.scale_by_ekfac(layers=[ok.Layer("dense", kernel="kernel")])
      >>> state = tx.init(params)
      >>> inputs, residuals = jnp.eye(5, 3), jnp.ones((5, 2))
      >>> grads = {"kernel": inputs.T @ residuals / 5}
      >>> taps = ok.Taps({"dense": ok.Tap(inputs, residuals)})
      >>> updates, state = tx.update(grads, state, params, taps=taps)

    Source: George et al. (2018), arXiv:1806.03884.
    """
    return named_ekfac("ekfac", locals())


def named_ekfac(owner: str, settings: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
    """`scale_by_ekfac` of all its arguments, as `named_kfac`."""
    of = {"is_frozen": False, **settings}
    validation.check_choice(owner, "damping_rule", of["damping_rule"], ("exact", "pi"))
    validation.check_interval(owner, "correct_every", of["correct_every"])
    validation.check_switch(owner, "bias_correction", of["bias_correction"])
    validation.check_choice(owner, "basis", of["basis"], BASES)
    own = ("bias_correction", "damping_rule", "basis", "outlier_clip", "precision", "correct_every")
    own += ("is_frozen",)
    factors = check_factors(owner, **{name: of[name] for name in FACTOR_SETTINGS})
    method = Ekfac(**factors, **{name: of[name] for name in own})
    layout = layerwise(owner, **{name: of[name] for name in LAYER_SETTINGS})
    return transformation(owner, method, layout, **{name: of[name] for name in STORAGE_SETTINGS})


def ekfac(
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    layers: Iterable[Layer],
    decay: ArrayLike = 0.95,
    bias_correction: bool = True,
    damping: optax.ScalarOrSchedule = 1e-3,
    damping_rule: str = "exact",
    basis: str = "power",
    approx: str = "expand",
    momentum: ArrayLike | None = 0.9,
    factor_every: ArrayLike = 1,
    correct_every: ArrayLike = 1,
    refresh_every: ArrayLike = 5,
    stagger: bool = False,
    norm_constraint: optax.ScalarOrSchedule | str | None = "auto",
    outlier_clip: ArrayLike | None = 10.0,
    weight_decay: ArrayLike | None = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    fallback: optax.GradientTransformation | None = None,
    block_size: int | None = None,
    factor_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
    rounding: str = "nearest",
    seed: int | Array = 0,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """EKFAC: natural gradient descent with eigenvalues of their own in K-FAC's eigenbasis.

    With a learning rate this is a complete optimizer; without, the bare preconditioner, to chain:
    `optax.chain(ok.ekfac(layers=layers), optax.scale_by_learning_rate(1e-3))` equals
    `ok.ekfac(1e-3, layers=layers)`. Every update needs `taps`. All arguments that are not listed
    here are those of `scale_by_ekfac`, as are cost and errors.

    Args:
      learning_rate: A number or a schedule; `None` leaves the updates unscaled and unflipped. It
        comes after the fallback.
      weight_decay: Decoupled weight decay, times the learning rate; needs `params` in `update`.
      mask: Which parameters decay, as in `optax.add_decayed_weights`.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: for a negative learning rate or weight decay, or a mask that is a single bool.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> def loss_fn(w, x, y):
      ...     return jnp.mean(ok.losses.softmax_cross_entropy_with_integer_labels(x @ w, y))
      >>> x, y = jax.random.normal(jax.random.key(0), (20, 4)), jnp.arange(20) % 3
      >>> params = jnp.zeros((4, 3))
      >>> layers = ok.find_layers(loss_fn, params, x, y)
      >>> with_taps = ok.value_and_grad_with_taps(loss_fn, layers, fisher="exact")
      >>> tx = ok.ekfac(0.5, layers=layers, momentum=None, norm_constraint=None)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     loss, grads, taps = with_taps(params, x, y)
      ...     updates, state = tx.update(grads, state, params, taps=taps)
      ...     return optax.apply_updates(params, updates), state, grads
      >>> for _ in range(30):
      ...     params, state, grads = step(params, state)
      >>> bool(jnp.max(jnp.abs(grads)) < 0.01)
      True

    Source: George et al. (2018), arXiv:1806.03884.
    """
    arguments = dict(locals())
    return validation.complete("ekfac", scale_by_ekfac, arguments)
