"""Shampoo: gradients preconditioned by inverse roots of their second moments along each axis."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Inexact

from optax_kron.blocking import Blocking, Signature
from optax_kron.kernels import contract, packed, roots
from optax_kron.transforms import program, validation
from optax_kron.transforms.blockwise import blockwise
from optax_kron.transforms.frame import transformation
from optax_kron.transforms.preconditioner import Preconditioner, Seen, Stacks, Step, separated
from optax_kron.transforms.schedule import RefreshSchedule, refresh_schedule
from optax_kron.transforms.stacks import (
    Change,
    ema_weight,
    finite_blocks,
    guarded,
    largest_of_blocks,
    map_blocks,
    norms,
    times,
)
from optax_kron.types import PyTree

GRAFTS = ("sgd", "adagrad", "rmsprop", "adam")

# An inverse root whose p-th power times the statistic is farther from one than this is worse than
# an old one.
_LARGEST_RESIDUAL = 0.5
# Eigenvalues below so many roundings of the stored statistics, relative to the largest, are noise.
_NOISE = 8.0
# Below this, also in float64, Newton's iteration need not come to an end.
_LEAST_FOR_NEWTON = 1e-12


class ShampooStack(NamedTuple):
    """Statistics of N blocks of shape [d_1, ..., d_k]."""

    # S per axis, factor_dtype: dense [N, d, d], from d = 256 on `packed.pack` of it [N, r, c], of
    # which `packed.unpack` is the matrix again; or diagonal [N, d].
    statistics: tuple[Array, ...]
    roots: tuple[Array, ...]  # S^(-1/p), likewise
    graft: Float[Array, "N ..."] | None  # second moment of the gradient, ≥ float32
    initialized: Bool[Array, " N"]  # whether there has been a gradient other than zero


@program.settings
@dataclasses.dataclass(frozen=True)
class Shampoo(Preconditioner):
    """How statistics are gathered and applied; the settings of `scale_by_shampoo`.

    An axis of a block has a dense statistic, whose inverse root is refreshed now and then, or a
    diagonal one, whose root costs no more than its use and is made anew at every step. For example
    a block [4, 30000], whose long axis is beyond `Blocking.max_size`, has

        statistics [N, 4, 4] and [N, 30000]    roots of the same shapes, with p = 4

    """

    schedule: RefreshSchedule
    decay: ArrayLike | None
    bias_correction: bool
    root_order: int | None
    root_method: str
    relative_damping: ArrayLike
    start_step: ArrayLike
    grafting: str | None
    b2: ArrayLike
    eps: ArrayLike
    precision: jax.lax.PrecisionLike

    refreshed: ClassVar[tuple[str, ...]] = ("roots",)
    accumulated: ClassVar[tuple[str, ...]] = ("statistics",)

    def init(self, count: int, signature: Signature, dtype: jnp.dtype) -> ShampooStack:
        """See `Preconditioner`: statistics of zero, roots of the identity."""
        identities, zeros = [], []
        for size, diagonal in zip(signature.shape, signature.diagonal, strict=True):
            own = contract.complex_like(dtype, signature.is_complex and not diagonal)
            factor = contract.identities(count, size, own, diagonal=diagonal)
            identities.append(factor if diagonal else packed.keep(factor))
            zeros.append(jnp.zeros_like(identities[-1]))
        graft = None
        if self.grafting not in (None, "sgd"):
            wide = contract.wide_dtype(dtype)
            graft = jnp.zeros((count, *signature.shape), wide)
        initialized = jnp.zeros(count, bool)
        return ShampooStack(tuple(zeros), tuple(identities), graft, initialized)

    def rescale(self, stack: ShampooStack, past: Float[Array, " N"]) -> ShampooStack:
        """See `Preconditioner`; it is as though there had been no roots: they are remade."""
        statistics, graft = times((stack.statistics, stack.graft), jnp.square(past))
        initialized = stack.initialized & (past == 1)
        return stack._replace(statistics=statistics, graft=graft, initialized=initialized)

    def can_refresh(self, stack: ShampooStack) -> bool:
        """See `Preconditioner`: whether any axis has a dense statistic."""
        return any(S.ndim > 2 for S in stack.statistics)

    def accumulate(
        self, stack: ShampooStack, seen: Seen, step: Step
    ) -> tuple[ShampooStack, Bool[Array, " N"]]:
        """See `Preconditioner`: `S_i ← β S_i + (1 − β) C_i(G)` along every axis, or their sum."""
        gradient = seen.gradient
        real = contract.real_dtype(gradient.dtype)
        old, new = _ema_weights(self.decay, real)

        def move(statistics, gradient):
            return tuple(
                old * contract.widen(S)
                + new * packed.gram_like(S, gradient, axis, precision=self.precision)
                for axis, S in enumerate(statistics)
            )

        statistics = map_blocks(stack.statistics)(move, stack.statistics, gradient)
        fields = {"statistics": statistics}
        if stack.graft is not None:
            old, new = _ema_weights(None if self.grafting == "adagrad" else self.b2, real)
            fields["graft"] = old * stack.graft + new * contract.squared_magnitude(gradient)
        nonzero = largest_of_blocks(gradient) != 0
        # A statistic that was spoilt before is no failure of this step; its root's refresh fails.
        unspoilt = finite_blocks(stack.statistics)
        accepted = jnp.broadcast_to(step.accepted, nonzero.shape)
        moved, failed = guarded(stack, Change(fields, accepted))
        initialized = stack.initialized | (accepted & ~failed & nonzero)
        return moved._replace(initialized=initialized), failed & unspoilt

    def refresh(self, stack: ShampooStack, step: Step) -> tuple[ShampooStack, Bool[Array, " N"]]:
        """See `Preconditioner`: new roots of the dense statistics."""
        return self._new_roots(stack, step, stack.initialized, diagonal=False)

    def correct(
        self, stack: ShampooStack, seen: Seen, step: Step
    ) -> tuple[ShampooStack, Bool[Array, " N"]]:
        """See `Preconditioner`: new roots of the diagonal statistics."""
        del seen
        if all(S.ndim > 2 for S in stack.statistics):
            return stack, jnp.zeros_like(stack.initialized)
        return self._new_roots(stack, step, stack.initialized & step.accepted, diagonal=True)

    def refresh_all(self, stacks, step) -> tuple[Stacks, Mapping[str, Bool[Array, " N"]]]:
        """See `Preconditioner`: by products, roots of similar sizes share a program."""
        if self.root_method == "eigh":  # LAPACK takes a core for each axis, all at once
            return super().refresh_all(stacks, step)
        statistics, orders = {}, {}
        for label, stack in stacks.items():
            axes, order = self._acting([S.shape[1:] for S in stack.statistics])
            for axis in axes:
                if stack.statistics[axis].ndim > 2:
                    statistics[label, axis] = stack.statistics[axis]
                    orders[label, axis] = order

        def find(S, order):
            return self._root(S, order, step)

        found = roots.together(statistics, orders, find)
        done = {}
        for label, stack in stacks.items():
            new, wanted = list(stack.roots), stack.initialized
            accurate = jnp.ones(len(wanted), bool)
            for axis in range(len(new)):
                if (label, axis) in found:
                    new[axis], is_accurate, is_any = found[label, axis]
                    accurate, wanted = accurate & is_accurate, wanted & is_any
            done[label] = guarded(stack, Change({"roots": tuple(new)}, wanted, accurate))
        return separated(done)

    def _new_roots(self, stack, step, wanted, *, diagonal):
        """New roots along axes with diagonal statistics, or along all others."""
        axes, order = self._acting([S.shape[1:] for S in stack.statistics])

        def make(block, wanted):
            accurate, new = jnp.ones([], bool), list(block.roots)
            for i in axes:
                if diagonal == (block.statistics[i].ndim == 1):
                    new[i], is_accurate, is_any = self._root(block.statistics[i], order, step)
                    accurate, wanted = accurate & is_accurate, wanted & is_any
            block, failed = guarded(block, Change({"roots": tuple(new)}, wanted, accurate))
            return block.roots, failed

        new, failed = map_blocks(stack.roots)(make, stack, wanted)
        return stack._replace(roots=new), failed

    def _acting(self, shapes):
        """The axes that have a root, and its order p; shapes are those of statistics."""
        # Along an axis of length one all is known from the others: its root is one.
        axes = [i for i, shape in enumerate(shapes) if shape[0] > 1] or [0]
        return axes, self.root_order or 2 * len(axes)

    def _root(self, kept, order, step):
        """The root of a statistic, kept likewise; whether it is accurate; whether there is one."""
        dtype = contract.real_dtype(kept.dtype)
        real = contract.wide_dtype(dtype)
        weight = jnp.ones([], real)
        if self.decay is not None and self.bias_correction:
            weight = ema_weight(self.decay, step.count, real)
        least = _NOISE * float(jnp.finfo(dtype).eps)
        if self.root_method == "newton":
            least = max(least, _LEAST_FOR_NEWTON)
        damping = jnp.maximum(jnp.asarray(self.relative_damping, real), least)
        S = contract.widen(packed.whole(kept))
        largest = contract.largest_magnitude(S)
        finite = jnp.isfinite(largest)
        # LAPACK need not come to an end on what is not finite.
        S = jnp.where(finite, S / weight.astype(contract.real_dtype(S.dtype)), 0)
        root, residual = roots.inverse_root(S, order, damping, method=self.root_method)
        root = root.astype(kept.dtype)  # where it may overflow
        accurate = finite & contract.all_finite(root) & (residual <= _LARGEST_RESIDUAL)
        # Where gradients have all but vanished, there is nothing to take a root of.
        is_any = ~(largest < 4 * jnp.finfo(largest.dtype).tiny)
        return root if kept.ndim == 1 else packed.keep(root), accurate, is_any

    def precondition(self, stack: ShampooStack, seen: Seen, step: Step) -> Inexact[Array, "N ..."]:
        """See `Preconditioner`: roots along every axis, with the length of the grafted update."""

        def apply(found, x):
            wide = tuple(contract.widen(packed.whole(x)) for x in found)
            return contract.apply_factors(wide, x, precision=self.precision)

        preconditioned = map_blocks(stack.roots)(apply, stack.roots, seen.direction)
        grafted = self._grafted(stack, seen.direction, step)
        if self.grafting is not None:
            scale = norms(grafted) / contract.safe_divisor(norms(preconditioned))
            preconditioned = contract.scaled_blocks(preconditioned, scale)
        return jnp.where(step.count >= self.start_step, preconditioned, grafted)

    def _grafted(self, stack: ShampooStack, x: Array, step: Step) -> Array:
        """The update of the optimizer whose length is taken."""
        if stack.graft is None:
            return x
        second = stack.graft
        if self.grafting == "adam":
            second = second / ema_weight(self.b2, step.count, second.dtype)
        return x / (jnp.sqrt(second) + jnp.asarray(self.eps, second.dtype))


def _ema_weights(decay: ArrayLike | None, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Returns the EMA weights (old, new); those of a sum for `None`."""
    if decay is None:
        return jnp.ones([], dtype), jnp.ones([], dtype)
    old = jnp.asarray(decay, dtype)
    return old, 1 - old


def scale_by_shampoo(
    *,
    momentum: ArrayLike | None = 0.9,
    decay: ArrayLike | None = 0.95,
    bias_correction: bool = True,
    root_order: int | None = None,
    root_method: str = "newton",
    relative_damping: ArrayLike = 1e-6,
    refresh_every: ArrayLike = 10,
    stagger: bool = False,
    start_step: ArrayLike = 1,
    grafting: str | None = "adam",
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    outlier_clip: ArrayLike | None = 10.0,
    blocking: Blocking = Blocking(block_size=1024, max_cut=8192),
    factor_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
    rounding: str = "nearest",
    seed: int | Array = 0,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale gradients by Shampoo: no learning rate, no weight decay, no sign flip.

    Each block of a parameter has one statistic per axis, the second moment of its gradients along
    it, `S_i ← β S_i + (1 − β) C_i(G)` with `C_i(G) = unfold_i(G) unfold_i(G)ᴴ`. The update is the
    momentum with `(S_i + ε λ_max I)^(-1/p)` applied along every axis.

    Args:
      momentum: decay of the bias-corrected moving average of gradients that is preconditioned, in
        [0, 1). `None` or 0: the gradient itself.
      decay: β of the statistics, in [0, 1). `None`: they are sums, as in the original.
      bias_correction: whether averaged statistics are divided by `1 − βᵗ`.
      root_order: p, an int ≥ 1. `None`: twice the number of axes longer than one. Axes of length
        one have no root beside longer ones.
      root_method: "newton", a coupled iteration of matrix products alone; or "eigh", an
        eigendecomposition, by LAPACK on a CPU: where nothing else runs on it, and LAPACK has a
        single thread, the faster from condition numbers of about 1e3 on.
      relative_damping: ε, what is added to the eigenvalues relative to the largest; ≥ 0. It counts
        as no less than eight roundings of the factors, 1e-6 in float32: what lies below is noise.
        With "newton" the least is 1e-12.
      refresh_every: steps from one computation of the roots to the next: it comes before the
        updates of its multiples, and before the first with a gradient other than zero. Roots of
        diagonal statistics are made anew at every step.
      stagger: deal the blocks out to the steps between two refreshes, so that each step computes
        the roots of some blocks, and none but the first those of all. `refresh_every` must then be
        a number.
      start_step: before this step the update is that of the grafted optimizer, or the momentum.
      grafting: whose update gives each block its length: "sgd" (the momentum itself), "adagrad",
        "rmsprop", "adam"; `None`: Shampoo's own.
      b2: decay of the grafted optimizer's second moment, in [0, 1), unless "adagrad" or "sgd".
      eps: what it adds to the square root of the second moment.
      outlier_clip: a block whose gradient is more than so many times as long as it usually is, is
        scaled down to that before anything is made of it; ≥ 1. The usual norm is a running mean.
        `None`: no bound.
      blocking: how parameters become blocks, and which axes get a diagonal statistic. By default
        axes longer than 1024 are cut, and those longer than 8192, as of vocabularies, get a
        diagonal one instead: `ok.Blocking(block_size=1024, max_cut=8192)`.
      factor_dtype: real dtype of statistics and roots. `None`: as precise as the parameters, but at
        least float32, as is the arithmetic.
      momentum_dtype: dtype of the stored momentum. `None`: that of the parameters.
      rounding: of averages stored in 16 bits: to the "nearest" number, or "stochastic", up or down
        at random, so that small changes add up.
      seed: an integer or a PRNG key, for stochastic rounding.
      precision: of the matrix products, but for those of the roots, which take the highest.

    Returns:
      A transformation. Its updates have the structure, shapes and dtypes of the gradients. A
      gradient that is not finite gives a zero update and leaves the state as it was, but for the
      count of skipped steps. A root that is not finite, or whose p-th power times the statistic is
      not near the identity, is dropped: its block keeps the roots that it had, of dense statistics
      or of diagonal ones, and `failed_refreshes` counts it.

    Raises:
      ValueError: for a setting out of range, at construction, unless it is traced; for a parameter
        that is neither floating-point nor complex, in `init`; in `update`, if gradients do not
        match the state.

    Cost, for an m×n parameter with dense statistics, which are kept packed if m, n ≥ 256, as are
    roots. State: m² + m + n² + n + mn numbers, and mn more with grafting other than "sgd" or
    `None`. A step: 3.5·mn·(m + n) operations. A refresh: about 20·(m³ + n³) in float32, and
    50·(m³ + n³) more in float64 where that is not enough; with "eigh" 20·(m³ + n³) in float64, by
    LAPACK on a CPU one matrix after the other.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> tx = optax.chain(ok.scale_by_shampoo(), optax.scale_by_learning_rate(1e-2))
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)

    Sources: Gupta et al. (2018), arXiv:1802.09568; Anil et al. (2020), arXiv:2002.09018; Shi et al.
    (2023), arXiv:2309.06497.
    """
    owner = "shampoo"
    check = validation.check_range
    check(owner, "decay", decay, most=1, open_right=True, optional=True)
    order = validation.whole_number(root_order)
    if root_order is not None and (order is None or order < 1):
        raise ValueError(
            f"{owner}: root_order must be an int ≥ 1 or None; got {root_order!r}. It cannot be "
            'traced: with optax.inject_hyperparams, pass static_args=("root_order",).'
        )
    validation.check_switch(owner, "bias_correction", bias_correction)
    validation.check_choice(owner, "root_method", root_method, roots.METHODS)
    check(owner, "relative_damping", relative_damping)
    check(owner, "start_step", start_step)
    validation.check_choice(owner, "grafting", grafting, GRAFTS, optional=True)
    check(owner, "b2", b2, most=1, open_right=True)
    check(owner, "eps", eps)
    method = Shampoo(
        schedule=refresh_schedule(owner, refresh_every, stagger),
        decay=decay,
        bias_correction=bias_correction,
        root_order=order,
        root_method=root_method,
        relative_damping=relative_damping,
        start_step=start_step,
        grafting=grafting,
        b2=b2,
        eps=eps,
        precision=precision,
    )
    layout = blockwise(owner, blocking, momentum, momentum_dtype)
    return transformation(owner, method, layout, outlier_clip, factor_dtype, rounding, seed)


def shampoo(
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    momentum: ArrayLike | None = 0.9,
    decay: ArrayLike | None = 0.95,
    bias_correction: bool = True,
    root_order: int | None = None,
    root_method: str = "newton",
    relative_damping: ArrayLike = 1e-6,
    refresh_every: ArrayLike = 10,
    stagger: bool = False,
    start_step: ArrayLike = 1,
    grafting: str | None = "adam",
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike | None = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    outlier_clip: ArrayLike | None = 10.0,
    blocking: Blocking = Blocking(block_size=1024, max_cut=8192),
    factor_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
    rounding: str = "nearest",
    seed: int | Array = 0,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Shampoo: gradients preconditioned by inverse roots of their second moments along each axis.

    With a learning rate this is a complete optimizer; without, the bare preconditioner, to chain:
    `optax.chain(ok.shampoo(), optax.scale_by_learning_rate(1e-3))` equals `ok.shampoo(1e-3)`.
    All arguments that are not listed here are those of `scale_by_shampoo`, as are cost and errors.

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
      >>> tx = ok.shampoo(0.1, refresh_every=5)
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

    Sources: Gupta et al. (2018), arXiv:1802.09568; Anil et al. (2020), arXiv:2002.09018.
    """
    arguments = dict(locals())
    return validation.complete("shampoo", scale_by_shampoo, arguments)
