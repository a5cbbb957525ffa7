"""SOAP: Adam in the eigenbasis of Shampoo's statistics; and its variants, KL-Shampoo among them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Inexact, Int

from optax_kron.blocking import Blocking, Signature
from optax_kron.kernels import contract, eigenbases, packed
from optax_kron.kernels import soap as kernels
from optax_kron.transforms import preconditioner as base
from optax_kron.transforms import program, validation
from optax_kron.transforms import stacks as blocks
from optax_kron.transforms.blockwise import blockwise
from optax_kron.transforms.frame import transformation
from optax_kron.transforms.orthogonalize import Orthogonalizer, orthogonalizer
from optax_kron.transforms.schedule import RefreshSchedule, refresh_schedule
from optax_kron.transforms.turned import first_eigenbases, first_iterates, follow_statistics
from optax_kron.types import PyTree

VARIANTS = ("soap", "kl_shampoo", "kl_soap", "soap_muon")
BASES = ("power", "qr", "eigh")


class SoapStack(NamedTuple):
    """What is kept of N blocks [d_1, ..., d_k]; an axis with a diagonal factor has no basis.

    The first three have one entry for each axis, of length d.
    """

    statistics: tuple[Inexact[Array, "N ..."] | None, ...]  # S; from d = 256 on `packed.pack(S)`
    bases: tuple[Inexact[Array, "N d d"] | None, ...]  # Q, orthonormal columns, factor_dtype
    values: tuple[Float[Array, "N d"], ...] | None  # diag(QᴴSQ), also of diagonal axes; KL only
    second_moment: Float[Array, "N ..."] | None  # of the gradient in the bases, ≥ float32; Adam
    initialized: Bool[Array, " N"]  # whether the bases have been set from a gradient


@program.settings
@dataclasses.dataclass(frozen=True)
class Soap(base.Preconditioner):
    """How bases are found and used; the settings of `scale_by_soap`.

    Variants differ in the statistics along each axis i of a block, and in what is made of the
    gradient in their eigenbases. "soap" has the second moments `C_i(G)`; "kl_shampoo" and "kl_soap"
    those of a gradient that is whitened along all other axes. "kl_shampoo" whitens the momentum
    with them; the others run Adam in the bases. "soap_muon" is "soap", of which `orthogonal` takes
    the updates.
    """

    schedule: RefreshSchedule
    variant: str
    momentum: ArrayLike | None
    decay: ArrayLike
    b2: ArrayLike
    eps: ArrayLike
    relative_damping: ArrayLike
    pseudo_inverse: bool
    basis: str
    precision: jax.lax.PrecisionLike
    orthogonal: Orthogonalizer | None

    refreshed: ClassVar[tuple[str, ...]] = ("bases", "values", "second_moment")
    accumulated: ClassVar[tuple[str, ...]] = ("statistics", "values")
    # The statistics of a step serve the next one, so that its update need not wait for the bases.
    refreshes_first: ClassVar[bool] = False

    @property
    def is_kl(self) -> bool:
        """Whether the statistics are of whitened gradients."""
        return self.variant.startswith("kl_")

    @property
    def has_adam(self) -> bool:
        """Whether there is a second moment in the bases."""
        return self.variant != "kl_shampoo"

    def init(self, count: int, signature: Signature, dtype: jnp.dtype) -> SoapStack:
        """See `Preconditioner`: statistics of zero, bases of the identity."""
        own = contract.complex_like(dtype, signature.is_complex)
        axes = list(zip(signature.shape, signature.diagonal, strict=True))
        wide = contract.wide_dtype(dtype)
        return SoapStack(
            statistics=tuple(
                None if diag else packed.keep(jnp.zeros((count, d, d), own)) for d, diag in axes
            ),
            bases=tuple(
                None if diag else jnp.tile(jnp.eye(d, dtype=own), (count, 1, 1)) for d, diag in axes
            ),
            values=tuple(jnp.zeros((count, d), dtype) for d, _ in axes) if self.is_kl else None,
            second_moment=jnp.zeros((count, *signature.shape), wide) if self.has_adam else None,
            initialized=jnp.zeros(count, bool),
        )

    def rescale(self, stack: SoapStack, past: Float[Array, " N"]) -> SoapStack:
        """See `Preconditioner`; bases have no scale."""
        square = jnp.square(past)
        # Those of a KL variant are such that their product, over the axes, fits the squares.
        share = square ** (1 / len(stack.bases)) if self.is_kl else square
        statistics, values = blocks.times((stack.statistics, stack.values), share)
        second = blocks.times(stack.second_moment, square)
        return stack._replace(statistics=statistics, values=values, second_moment=second)

    def can_refresh(self, stack: SoapStack) -> bool:
        """See `Preconditioner`: whether any axis has a dense factor."""
        return any(Q is not None for Q in stack.bases)

    def accumulate(
        self, stack: SoapStack, seen: base.Seen, step: base.Step
    ) -> tuple[SoapStack, Bool[Array, " N"]]:
        """See `Preconditioner`: the average of second moments along every axis with a basis."""
        rate = jnp.asarray(self.decay, contract.real_dtype(seen.gradient.dtype))

        def gather(block, gradient, extents):
            wanted, finite = self._takes(block, gradient, step)
            fields: dict[str, PyTree] = {}
            if not self.is_kl:
                moments = packed.grams(block.statistics, gradient, precision=self.precision)
                fields["statistics"] = kernels.averages(_widened(block.statistics), moments, rate)
            else:
                old = _widened((block.statistics, block.values))
                is_first = wanted & ~block.initialized
                statistics, values = kernels.first_statistics(
                    old[0], old[1], gradient, extents, is_first
                )
                moments, diagonals = kernels.whitened_moments(
                    _widened(block.bases),
                    values,
                    gradient,
                    extents,
                    self.relative_damping,
                    pseudo_inverse=self.pseudo_inverse,
                    precision=self.precision,
                )
                finite &= blocks.all_finite(diagonals)
                kept = packed.of_each(packed.keep, moments)
                statistics = kernels.averages(statistics, kept, rate)
                values = kernels.averages(values, diagonals, rate)
                fields["statistics"], fields["values"] = kernels.balanced(statistics, values)
            new, failed = blocks.guarded(block, blocks.Change(fields, wanted, finite))
            initialized = block.initialized | (wanted & finite)
            return new.statistics, new.values, initialized, failed

        gathered = blocks.map_blocks(stack.bases)(gather, stack, seen.gradient, seen.extents())
        statistics, values, initialized, failed = gathered
        new = stack._replace(statistics=statistics, values=values, initialized=initialized)
        return new, failed

    def _takes(self, block, gradient, step):
        """Whether a block is to take in a gradient, and whether it can hold its square."""
        # No entry of any second moment is larger than the sum of all squares.
        kept = [x.dtype for x in jax.tree.leaves((block.statistics, block.values))]
        largest = contract.unit_of(gradient)  # of what is not finite no step is accepted
        informs = largest != 0
        # Zeros would shrink the statistics of a KL variant to nothing, which divides by them.
        if not self.is_kl:
            informs |= block.initialized
        return step.accepted & informs, blocks.squares_fit(largest, gradient.size, kept)

    def advance(self, plan, state, stacks, seen, extra, step) -> base.Advanced:
        """See `Preconditioner`."""
        done = super().advance(plan, state, stacks, seen, extra, step)
        if self.orthogonal is None:
            return done
        return done._replace(updates=self.orthogonal(plan, step.share, done.updates))

    def begin_all(self, stacks, newly) -> tuple[base.Stacks, Int[Array, ""]]:
        """See `Preconditioner`: blocks with their first gradient get bases of it."""
        turned = {label: stack for label, stack in stacks.items() if self.can_refresh(stack)}

        def begin(old, statistics, newly):
            if self.basis == "power":
                # That of a KL variant is a multiple of the identity, but for the first moment.
                shift = self.decay if self.is_kl else None
                return first_iterates(old, statistics, newly, self.precision, shift)
            return first_eigenbases(old, statistics, newly, self.precision)

        names = "bases", "values", "initialized"
        begun = blocks.cond_in_place(
            begin,
            base.any_block(newly[label] for label in turned),
            {label: {name: getattr(x, name) for name in names} for label, x in turned.items()},
            {label: x.statistics for label, x in turned.items()},
            {label: newly[label] for label in turned},
        )
        stacks = {**stacks, **{label: stacks[label]._replace(**x) for label, x in begun.items()}}
        return stacks, base.total(newly[label] & ~stacks[label].initialized for label in turned)

    def apply(
        self, stack: SoapStack, seen: base.Seen, step: base.Step
    ) -> tuple[SoapStack, Inexact[Array, "N ..."], Bool[Array, " N"]]:
        """See `Preconditioner`: both verbs in one pass over the blocks."""

        def apply(block, gradient, direction, newly, extents):
            one = base.Seen(gradient, direction, None, newly)
            failed = jnp.zeros([], bool)
            if self.has_adam:
                block, failed = self._correct(block, gradient, step)
            update = self._precondition(block, one, extents, step)
            return block.second_moment, update, failed

        second, updates, failed = blocks.map_blocks(stack.bases)(
            apply, stack, seen.gradient, seen.direction, seen.newly, seen.extents()
        )
        return stack._replace(second_moment=second), updates, failed

    def _correct(self, block, gradient, step):
        """One block whose second moment in the bases has taken in a gradient."""
        wanted, fits = self._takes(block, gradient, step)
        rotated = contract.into_bases(_widened(block.bases), gradient, precision=self.precision)
        rate = jnp.asarray(self.b2, block.second_moment.dtype)
        (second,) = kernels.averages(
            [block.second_moment], [contract.squared_magnitude(rotated)], rate
        )
        return blocks.guarded(
            block, blocks.Change({"second_moment": second}, wanted & fits & block.initialized)
        )

    def _precondition(self, block, seen, extents, step):
        """The update of one block."""
        bases = _widened(block.bases)
        rotated = contract.into_bases(bases, seen.direction, precision=self.precision)
        if block.second_moment is None:
            values, least = _widened(block.values), self.relative_damping
            rotated = kernels.whiten(values, rotated, least, self.pseudo_inverse)
        else:
            second = block.second_moment
            second = second / blocks.ema_weight(self.b2, step.count, second.dtype)
            least = kernels.noise_floor(block.bases, second, seen.newly, extents)
            b1 = 0.0 if self.momentum is None else self.momentum
            largest = blocks.largest_update(b1, self.b2, step.count, second.dtype)
            rotated = kernels.adam(second, rotated, self.eps, least, largest)
        return contract.out_of_bases(bases, rotated, precision=self.precision)

    def refresh_all(self, stacks, step) -> tuple[base.Stacks, Mapping[str, Bool[Array, " N"]]]:
        """See `Preconditioner`: bases of similar sizes, of all stacks, share a program."""
        if self.basis == "power":
            return follow_statistics(stacks, precision=self.precision)
        return super().refresh_all(stacks, step)

    def refresh(self, stack: SoapStack, step: base.Step) -> tuple[SoapStack, Bool[Array, " N"]]:
        """See `Preconditioner`: new bases, and what is kept in terms of them."""
        del step
        find = eigenbases.power_iteration if self.basis == "qr" else eigenbases.decompose

        def make(block):
            bases, statistics = _widened((block.bases, block.statistics))
            statistics = packed.of_each(packed.whole, statistics)
            finite = blocks.all_finite(statistics)
            # LAPACK need not come to an end on what is not finite.
            statistics = jax.tree.map(lambda S: jnp.where(finite, S, 0), statistics)
            bases, values, second = kernels.next_bases(
                find, statistics, bases, block.values, block.second_moment, precision=self.precision
            )
            new = {"bases": bases, "values": values, "second_moment": second}
            finite &= blocks.all_finite(bases)
            block, failed = blocks.guarded(block, blocks.Change(new, block.initialized, finite))
            return {name: getattr(block, name) for name in new}, failed

        fields, failed = blocks.map_blocks(stack.bases)(make, stack)
        return stack._replace(**fields), failed


def _widened(tree: PyTree) -> PyTree:
    """Arrays in the dtype of the arithmetic."""
    return jax.tree.map(contract.widen, tree)


def scale_by_soap(
    *,
    variant: str = "soap",
    momentum: ArrayLike | None = 0.95,
    decay: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    relative_damping: ArrayLike = 1e-6,
    pseudo_inverse: bool = False,
    basis: str = "power",
    refresh_every: ArrayLike = 10,
    stagger: bool = False,
    outlier_clip: ArrayLike | None = 10.0,
    blocking: Blocking = Blocking(),
    factor_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
    rounding: str = "nearest",
    seed: int | Array = 0,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale gradients by SOAP or a variant: no learning rate, no weight decay, no sign flip.

    Each block of a parameter has one statistic `S_i` per axis with a dense factor, a moving
    average, and a basis `Q_i` that follows its eigenvectors. Gradient and momentum are rotated into
    the bases, Adam is run there, and its update is rotated back. Along axes with a diagonal factor
    nothing is rotated; a parameter without dense factors, such as a vector, gets Adam (but with
    "kl_shampoo", which has none).

    Args:
      variant: "soap": `S_i` averages `unfold_i(G) unfold_i(G)ᴴ`. "kl_soap": that of the gradient
        whitened along the other axes, in the mean over those. "kl_shampoo": with the same
        statistics, the momentum whitened by `S_i^-½` along every axis, without Adam. "soap_muon":
        the update of "soap", of each matrix made orthogonal by `ok.orthogonalize`, with its
        "consistent_rms"; that of vectors stays.
      momentum: decay of the bias-corrected moving average of gradients, in [0, 1). It is kept in
        the parameters' own coordinates. `None` or 0: the gradient itself.
      decay: of the moving average of the statistics, in [0, 1).
      b2: decay of Adam's second moment, in [0, 1); not for "kl_shampoo".
      eps: what Adam adds to the square root of its second moment.
      relative_damping: least of the eigenvalues that are inverted, relative to the largest; KL
        variants only, as is the next one.
      pseudo_inverse: leave smaller ones out in place of raising them.
      basis: "power", a power iteration of matrix products alone, the first from the identity; "qr",
        one by LAPACK; or "eigh", an eigendecomposition, with which "qr" begins too.
      refresh_every: steps from one refresh of the bases to the next: they come after the updates of
        its multiples. The first bases come before the first update.
      stagger: deal the blocks out to the steps between two refreshes, so that each step refreshes
        some blocks, and none but the first all. `refresh_every` must then be a number.
      outlier_clip: a block whose gradient is more than so many times as long as it usually is, is
        scaled down to that before anything is made of it; ≥ 1. The usual norm is a running mean.
        `None`: no bound.
      blocking: how parameters become blocks, and which axes get a diagonal factor. The one-sided
        variant is `ok.Blocking(dense_axes=1)`; merged axes are `ok.Blocking(merge_below=...)`.
      factor_dtype: real dtype of statistics and bases. `None`: as precise as the parameters, but at
        least float32, as is the arithmetic.
      momentum_dtype: dtype of the stored momentum. `None`: that of the parameters.
      rounding: of averages stored in 16 bits: to the "nearest" number, or "stochastic", up or down
        at random, so that small changes add up.
      seed: an integer or a PRNG key, for stochastic rounding.
      precision: of the matrix products.

    Returns:
      A transformation. Its updates have the structure, shapes and dtypes of the gradients. Unlike
      the original it takes a step at the first gradient too, in the basis that it gives. A gradient
      that is not finite gives a zero update and leaves the state as it was, but for the count of
      skipped steps. A block whose bases would not be finite keeps the last ones. When columns of a
      basis change places, so does the second moment that is kept along them. Where the second
      moment is no more than rounding of the rotation, or at a block's first gradient than 1e-3 of
      its root mean square, the update is zero. Where it was gathered in other bases, it may be too
      small for the momentum: in the bases no element of the update is larger than Adam's can be,
      which is 1 if `momentum` and `b2` are equal.

    Raises:
      ValueError: for a setting out of range, at construction, unless it is traced; for a parameter
        that is neither floating-point nor complex, in `init`; in `update`, if gradients do not
        match the state.

    Cost, for an m×n parameter with dense factors. State: 1.5·(m² + n²) + 2·mn numbers, without the
    second moment of mn for "kl_shampoo". A step: 8·mn·(m + n) operations for "soap", 12·mn·(m + n)
    for "kl_soap", 10·mn·(m + n) for "kl_shampoo". A refresh, for an axis of length d: 2·d³ and,
    once or twice, 2.3·d³ at d = 1024 to 6·d³ where d ≤ 128; with "qr" 2·d³ and a QR decomposition
    of about 8/3·d³; 2·d³ more for the KL variants.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> tx = optax.chain(ok.scale_by_soap(), optax.scale_by_learning_rate(3e-3))
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)

    Sources: Vyas et al. (2024), arXiv:2409.11321; for the KL variants, Lin et al. (2025),
    arXiv:2509.03378.
    """
    arguments, owner = dict(locals()), "soap"
    check = validation.check_range
    validation.check_choice(owner, "variant", variant, VARIANTS)
    check(owner, "decay", decay, most=1, open_right=True)
    check(owner, "b2", b2, most=1, open_right=True)
    check(owner, "eps", eps)
    check(owner, "relative_damping", relative_damping, most=1)
    validation.check_choice(owner, "basis", basis, BASES)
    validation.check_switch(owner, "pseudo_inverse", pseudo_inverse)
    own = {field.name for field in dataclasses.fields(Soap)} & set(arguments)
    schedule, orthogonal = refresh_schedule(owner, refresh_every, stagger), None
    if variant == "soap_muon":
        orthogonal = orthogonalizer(owner, "muon", None, "consistent_rms", precision=precision)
    method = Soap(schedule, orthogonal=orthogonal, **{name: arguments[name] for name in own})
    layout = blockwise(owner, blocking, momentum, momentum_dtype)
    return transformation(owner, method, layout, outlier_clip, factor_dtype, rounding, seed)


def soap(
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    variant: str = "soap",
    momentum: ArrayLike | None = 0.95,
    decay: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    relative_damping: ArrayLike = 1e-6,
    pseudo_inverse: bool = False,
    basis: str = "power",
    refresh_every: ArrayLike = 10,
    stagger: bool = False,
    weight_decay: ArrayLike | None = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    outlier_clip: ArrayLike | None = 10.0,
    blocking: Blocking = Blocking(),
    factor_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
    rounding: str = "nearest",
    seed: int | Array = 0,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """SOAP: Adam in the eigenbasis of Shampoo's statistics.

    With a learning rate (3e-3 in the paper) this is a complete optimizer; without, the bare
    preconditioner, to chain: `optax.chain(ok.soap(), optax.scale_by_learning_rate(3e-3))` equals
    `ok.soap(3e-3)`. All arguments that are not listed here are those of `scale_by_soap`, as are
    cost and errors.

    Args:
      learning_rate: a number or a schedule; `None` leaves the updates unscaled and unflipped.
      weight_decay: decoupled weight decay, times the learning rate; needs `params` in `update`.
      mask: which parameters decay, as in `optax.add_decayed_weights`.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: for a negative learning rate or weight decay, or a mask that is a single bool.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> tx = ok.soap(0.03)
      >>> A = jnp.array([[3.0, 1.0], [1.0, 2.0]])
      >>> def loss_fn(x):
      ...     return jnp.sum((A @ x - 1) ** 2)
      >>> params = jnp.zeros((2, 3))
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(100):
      ...     params, state = step(params, state)
      >>> bool(loss_fn(params) < 0.05)
      True
    """
    arguments = dict(locals())
    return validation.complete("soap", scale_by_soap, arguments)
