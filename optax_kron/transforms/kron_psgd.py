"""PSGD-Kron: preconditioned SGD whose preconditioner is a Kronecker product, fitted online."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Inexact

from optax_kron.autodiff import probed_product
from optax_kron.blocking import Blocking, Signature
from optax_kron.kernels import contract, flow, probes, psgd
from optax_kron.transforms import exchange, outliers, program, validation
from optax_kron.transforms import preconditioner as base
from optax_kron.transforms import stacks as blocks
from optax_kron.transforms.blockwise import blockwise
from optax_kron.transforms.frame import transformation
from optax_kron.transforms.schedule import KronSchedule, is_update_due, update_probability_schedule
from optax_kron.types import PyTree

CRITERIA = ("whiten_momentum", "whiten_gradient", "newton")
_BALANCE_EVERY = 100


class KronStack(NamedTuple):
    """Factors of N blocks of shape [d_1, ..., d_k], of Q or in two geometries of P."""

    factors: tuple[Array, ...]  # per axis: dense [N, d, d] or diagonal [N, d], factor_dtype
    bounds: Float[Array, "N k"]  # running bound of the fit's curvature along each axis, ≥ float32
    initialized: Bool[Array, " N"]  # whether the scale has been set from a gradient
    preconditioner: tuple[Array, ...] | None  # cached P, as factors (float32 for float16), or none


@program.settings
@dataclasses.dataclass(frozen=True)
class KronPsgd(base.Preconditioner):
    """How the factors follow the criterion; the settings of `scale_by_kron_psgd`.

    Factors are updated, and applied, block by block in one pass. At steps between, they are applied
    again, or a cached `P = QᴴQ`, which is formed at the first of them. A block [768, 3072], say,
    has factors Q_1 [768, 768] and Q_2 [3072, 3072], bounds [2], and P_1, P_2 as the factors.
    """

    owner: str
    geometry: str
    criterion: str
    precond_lr: PyTree  # a number, or until a step has its value, a schedule
    update_probability: PyTree  # likewise
    damping: ArrayLike
    relative_damping: ArrayLike
    init_scale: ArrayLike | None
    has_init_scale: bool
    cache: bool
    outlier_clip: ArrayLike | None  # of Hessian-vector products
    precision: jax.lax.PrecisionLike
    seed: int | Array

    keeps_squares: ClassVar[bool] = False

    @property
    def is_newton(self) -> bool:
        """Whether the factors fit Hessian-vector products."""
        return self.criterion == "newton"

    @property
    def bounded(self) -> Sequence[str]:
        """See `Preconditioner`."""
        return ("gradients", "products") if self.is_newton else ("gradients",)

    @property
    def keeps_gradients(self) -> bool:
        """See `Preconditioner`."""
        return not self.is_newton

    def init(self, count: int, signature: Signature, dtype: jnp.dtype) -> KronStack:
        """See `Preconditioner`: factors at the identity, or at the given scale times it."""
        power, _ = psgd.powers_of_scale(self.geometry, len(signature.shape))
        scale = 1.0 if self.init_scale is None else self.init_scale ** (-2 * power)
        factors = []
        for size, diagonal in zip(signature.shape, signature.diagonal, strict=True):
            own = contract.complex_like(dtype, signature.is_complex and not diagonal)
            factor = contract.identities(count, size, own, diagonal=diagonal)
            factors.append((factor * scale).astype(factor.dtype))
        cache = tuple(jnp.zeros(q.shape, psgd.cache_dtype(q.dtype)) for q in factors)
        return KronStack(
            factors=tuple(factors),
            bounds=jnp.zeros((count, len(factors)), contract.wide_dtype(dtype)),
            initialized=jnp.full(count, self.init_scale is not None),
            preconditioner=cache if self.cache else None,
        )

    def needed(self, stacks: base.Stacks) -> PyTree:
        """See `Preconditioner`: without a cache, that of another setting stays unused."""
        if self.cache:
            return stacks
        return {label: stack._replace(preconditioner=None) for label, stack in stacks.items()}

    def init_schedule(self) -> KronSchedule:
        """See `Preconditioner`."""
        return KronSchedule(jnp.zeros([], jnp.float32), jnp.zeros([], bool))

    def init_key(self) -> Array:
        """See `Preconditioner`."""
        return validation.key_data(self.seed)

    def at(self, state: base.KronState) -> "KronPsgd":
        """See `Preconditioner`; without what `init` alone reads, so that seeds share a program."""
        scheduled = {"precond_lr": self.precond_lr, "update_probability": self.update_probability}
        now = {k: x(state.count) if callable(x) else x for k, x in scheduled.items()}
        return dataclasses.replace(self, **now, init_scale=None, seed=0)

    def rescale(self, stack: KronStack, past: Float[Array, " N"]) -> KronStack:
        """See `Preconditioner`: what set the scale, at first, was `past` times as large."""
        if self.has_init_scale:
            return stack
        power, bound_power = psgd.powers_of_scale(self.geometry, len(stack.factors))
        return stack._replace(
            factors=blocks.times(stack.factors, past**power),
            bounds=blocks.times(stack.bounds, past**bound_power),
            preconditioner=blocks.times(stack.preconditioner, past ** (2 * power)),
        )

    def read(self, plan, updates, state, extra_args) -> PyTree:
        """See `Preconditioner`: a probe and its product with the Hessian, if they are needed."""
        del plan
        if not self.is_newton:
            return None
        hvp_fn = validation.checked_hvp_fn(self.owner, extra_args.get("hvp_fn"))
        validation.check_state(self.owner, jax.eval_shape(self.init_schedule), state.schedule)
        key = jax.random.fold_in(_update_key(state), 1)
        probe = functools.partial(probed_product, self.owner, key, updates, hvp_fn)
        if program.is_concrete((updates, state)):
            due = program.once(KronPsgd._is_due_now, self, updates, state)
            if program.is_concrete(due):  # it is not in a branch that closes over arrays
                # The product is one of this step alone, outside of what is compiled once.
                return probe() if due else (updates, updates)
        return probe

    def _is_due_now(self, updates: PyTree, state: base.KronState) -> Bool[Array, ""]:
        due, _ = is_update_due(state.schedule, self.update_probability, state.count)
        return blocks.all_finite(updates) & due

    def spread(self, plan, share, extra, updates, state, dtype) -> PyTree:
        """See `Preconditioner`: blocks of a probe and of its product with the Hessian."""
        if not self.is_newton:
            return None
        if callable(extra):
            due, _ = is_update_due(state.schedule, self.update_probability, state.count)
            extra = flow.cond(due, extra, lambda: (updates, updates))
        return tuple(exchange.split(plan, share, x, dtype) for x in extra)

    def advance(self, plan, state, stacks, seen, extra, step) -> base.Advanced:
        """See `Preconditioner`: factors are updated and applied, or what is cached is."""
        due, pending = is_update_due(state.schedule, self.update_probability, state.count)
        due = step.accepted & due
        if self.cache:
            stale = step.accepted & ~due & ~state.schedule.cached
            stacks = flow.cond(stale, self._form_cache, lambda x: x, stacks)
        shapes = [(s.shape, s.is_complex) for s in plan.stacks.values()]
        dtype = base.real_dtype(seen)
        drawn = probes.draw_if(due, _update_key(state), shapes, dtype, noise=not self.is_newton)
        usual = None if state.usual_norms is None else state.usual_norms.get("products")
        balance_due = state.refreshes % _BALANCE_EVERY == _BALANCE_EVERY - 1

        def update(stacks):
            rows = probes.rows(drawn, shapes)
            if not self.is_newton:
                masks = [step.share.own(plan.mask(label)) for label in plan.stacks]
                noise = dict(zip(plan.stacks, probes.noise(drawn, shapes, masks), strict=True))
                updated = self._update(plan, stacks, seen, noise, rows, balance_due, step)
                return *updated, (None, False)
            given: PyTree = extra() if callable(extra) else extra
            alone = step.share.is_alone  # else they are blocks already
            probe, product = (plan.split(x, dtype) if alone else x for x in given)
            limited = outliers.limit(product, usual, self.outlier_clip)
            stacks = limited.rescaled_stacks(self, stacks, due)
            fits = {k: x._replace(gradient=limited.blocks[k]) for k, x in seen.items()}
            done = self._update(plan, stacks, fits, probe, rows, balance_due, step)
            return *done, (limited.usual, limited.found)

        def keep(stacks):
            updates = {k: self.precondition(x, seen[k], step) for k, x in stacks.items()}
            return stacks, jnp.zeros([], jnp.int32), updates, (usual, jnp.zeros([], bool))

        stacks, failures, updates, (usual, found) = flow.cond(due, update, keep, stacks)
        schedule = KronSchedule(
            pending_updates=blocks.select(step.accepted, pending, state.schedule.pending_updates),
            cached=blocks.select(step.accepted, ~due, state.schedule.cached),
        )
        norms = {"products": usual} if self.is_newton else {}
        failed = step.share.sum(failures)
        return base.Advanced(stacks, updates, failed, due, step.accepted, schedule, found, norms)

    def _update(self, plan, stacks, seen, all_probes, rows, balance_due, step):
        """The stacks after one update, how many blocks have failed, and `P·m`."""
        new, failed, updates = {}, [], {}
        for label, stack in stacks.items():
            probe = all_probes[label]
            shared = probe[0] if probe.shape[0] == 1 else None
            own = seen[label]
            fitted = own.direction if self.criterion == "whiten_momentum" else own.gradient

            def update(block, fitted, direction, probe, sizes, shared=shared):
                probe = shared if probe is None else probe
                block, missed = self._update_block(block, fitted, probe, sizes, rows, balance_due)
                return block, missed, self._from_factors(block.factors, direction)

            # The cache is no part of it: it is formed at the next step without an update.
            operands = fitted, own.direction, probe if shared is None else None, own.sizes

            def move(stack, update=update, operands=operands):
                return blocks.map_blocks(stack.factors)(update, stack, *operands)

            given = stack._replace(preconditioner=None)
            done, missed, updates[label] = step.averaged(move, given, ("factors",), label)
            new[label] = done._replace(preconditioner=stack.preconditioner)
            failed.append(missed)
        return new, base.total(failed), updates

    def _update_block(self, block, gradient, probe, sizes, rows, balance_due):
        """One block after an update of its factors, and whether that has failed."""
        factors, bounds = psgd.refit(
            tuple(map(contract.widen, block.factors)),
            block.bounds,
            block.initialized,
            gradient,
            probe,
            rows,
            balance_due,
            geometry=self.geometry,
            precond_lr=self.precond_lr,
            damping=self.damping,
            relative_damping=self.relative_damping,
            newton=self.is_newton,
            sizes=sizes,
            precision=self.precision,
        )
        nonzero = contract.largest_magnitude(gradient) != 0  # also if it is not finite
        new, failed = blocks.guarded(
            block, blocks.Change({"factors": factors, "bounds": bounds}, nonzero)
        )
        return new._replace(initialized=block.initialized | (nonzero & ~failed)), failed

    def precondition(
        self, stack: KronStack, seen: base.Seen, step: base.Step
    ) -> Inexact[Array, "N ..."]:
        """See `Preconditioner`: `P·m` for every block, from the cache if there is one."""
        del step
        factors, apply = stack.factors, self._from_factors
        if self.cache and stack.preconditioner is not None:
            factors = stack.preconditioner
            apply = functools.partial(psgd.apply_cached, precision=self.precision)
        return blocks.map_blocks(factors)(apply, factors, seen.direction)

    def _from_factors(self, factors, x):
        return psgd.precondition(factors, x, geometry=self.geometry, precision=self.precision)

    def _form_cache(self, stacks):
        square = functools.partial(psgd.square_factors, precision=self.precision)
        caches = {label: jax.vmap(square)(stack.factors) for label, stack in stacks.items()}
        return {k: stack._replace(preconditioner=caches[k]) for k, stack in stacks.items()}


def _update_key(state: base.KronState) -> Array:
    """The key of one update of the factors."""
    assert state.key is not None  # `init_key` makes one
    return jax.random.fold_in(validation.key_of(state.key), state.refreshes)


def scale_by_kron_psgd(
    *,
    momentum: ArrayLike | None = 0.9,
    precond_lr: optax.ScalarOrSchedule = 0.7,
    geometry: str = "EQ",
    criterion: str = "whiten_momentum",
    update_probability: optax.ScalarOrSchedule | None = None,
    damping: ArrayLike = 1e-9,
    relative_damping: ArrayLike | None = None,
    init_scale: ArrayLike | None = None,
    rms_clip: ArrayLike | None = 1.1,
    max_abs_clip: ArrayLike | None = None,
    outlier_clip: ArrayLike | None = 10.0,
    blocking: Blocking = Blocking(),
    cache_preconditioner: bool | None = None,
    factor_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
    rounding: str = "nearest",
    precision: jax.lax.PrecisionLike = None,
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Scale gradients by PSGD-Kron: no learning rate, no weight decay, no sign flip.

    Each block of a parameter has one factor `Q_i` per axis, and the update is `P·m`: `P = QᴴQ`
    along every axis, `m` the bias-corrected momentum. The factors follow a Lie group descent on the
    criterion. It is made of matrix products, and so are the triangular solves of "EQ".

    Args:
      momentum: decay of the moving average of gradients, in [0, 1). `None` or 0: no momentum;
        of 0 the state keeps its place.
      precond_lr: relative step of the factors, in (0, 1), or a schedule of it.
      geometry: in which geometry Q moves: "EQ" (Q upper triangular), "QEP", "QEQ", "Q0.5EQ1.5" or
        "QUAD" (Q Hermitian); or P, whose factors are kept in place of Q's: "PRO4P" or "QUAD4P".
      criterion: "whiten_momentum" and "whiten_gradient" fit `P = E[ggᴴ]^-½` of the momentum or the
        gradient; "newton" fits `P = |H|⁻¹` and needs `hvp_fn` at every update.
      update_probability: share of the steps at which the factors move, in [0, 1], or a schedule of
        it. Deterministic: they move at the first step, then whenever the shares since have added
        up to one. `None`: `update_probability_schedule()`.
      damping: curvature, in units of the gradient, below which none is believed; ≥ 0.
      relative_damping: the same in units of the root mean square of what each block's factors fit,
        its momentum by default; the larger of the two holds. `None`: 0.01, in Newton mode 0.
      init_scale: `Q` starts at this scale times the identity, P at its square. `None`: at the scale
        that whitens the first nonzero gradient of the block.
      rms_clip: cap of the root mean square of each parameter's update. `None`: no cap.
      max_abs_clip: a parameter's update with a larger entry than this is rescaled as a whole.
        `None`: no cap.
      outlier_clip: a block whose gradient, or Hessian-vector product, is more than so many times as
        long as it usually is, is scaled down to that before anything is made of it; ≥ 1. The usual
        norm is a running mean. `None`: no bound.
      blocking: how parameters become blocks, and which axes get a diagonal factor.
      cache_preconditioner: keep `P = QᴴQ` in the state between moves of the factors. Steps without
        a move take half the operations (in "EQ" 0.8 of them, as Q is half zeros), the factors twice
        the memory. `None`: in all geometries but "EQ". Factors of P itself need none and get none.
      factor_dtype: real dtype of the stored factors. `None`: as precise as the parameters, but at
        least float32, as is the arithmetic.
      momentum_dtype: dtype of the stored momentum. `None`: that of the parameters.
      rounding: of factors and momentum stored in 16 bits, "nearest" or "stochastic".
      precision: of the matrix products, as in `jax.lax.dot_general`.
      seed: an integer or a PRNG key; the noise of the fit and roundings are drawn from it.

    Returns:
      A transformation. Its `update(grads, state, params=None, *, hvp_fn=None)` returns updates with
      the structure, shapes and dtypes of the gradients. A gradient that is not finite gives a zero
      update and leaves the state as it was, but for the count of skipped steps. A block whose new
      factors would not be finite, or whose gradient is exactly zero, keeps those that it has.

    Raises:
      ValueError: for a setting out of range, at construction, unless it is traced; for a parameter
        that is neither floating-point nor complex, in `init`; in `update`, if `hvp_fn` is missing
        in Newton mode or is no function, or gradients do not match the state.

    Cost, for an m×n parameter with dense factors. State: m² + n² + mn numbers, and m² + n² for the
    cache. A step: 2·mn·(m + n) operations with the cache, up to twice that without, in "EQ" 1.25
    times that. A step at which the factors move: in "EQ" about 9·mn·(m + n) + 2·(m³ + n³), plus one
    Hessian-vector product in Newton mode; in "PRO4P" 6·mn·(m + n) and 8 to 62 times m³ + n³.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> tx = optax.chain(ok.scale_by_kron_psgd(), optax.scale_by_learning_rate(1e-2))
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)

    Sources: Li (2015), arXiv:1512.04202; Pooladzandi and Li (2024), arXiv:2402.04553; Li (2024),
    arXiv:2402.11858; "PRO4P" and "QUAD4P": Li (2025), the reference implementation of the latter.
    """
    arguments = dict(locals(), owner=(owner := "kron_psgd"))
    check = functools.partial(validation.check_range, owner)
    check("precond_lr", precond_lr, most=1, open_left=True, open_right=True, schedule=True)
    validation.check_choice(owner, "geometry", geometry, psgd.GEOMETRIES)
    validation.check_choice(owner, "criterion", criterion, CRITERIA)
    check("update_probability", update_probability, most=1, optional=True, schedule=True)
    check("damping", damping)
    check("relative_damping", relative_damping, optional=True)
    check("init_scale", init_scale, open_left=True, optional=True)
    validation.check_switch(owner, "cache_preconditioner", cache_preconditioner, optional=True)
    validation.check_seed(owner, seed)
    if update_probability is None:
        arguments["update_probability"] = update_probability_schedule()
    if relative_damping is None:
        arguments["relative_damping"] = psgd.default_damping(criterion == "newton")
    arguments["has_init_scale"] = init_scale is not None
    arguments["cache"] = psgd.keeps_cache(geometry, cache_preconditioner)
    method = KronPsgd(**{x.name: arguments[x.name] for x in dataclasses.fields(KronPsgd)})
    layout = blockwise(owner, blocking, momentum, momentum_dtype, rms_clip, max_abs_clip)
    return transformation(owner, method, layout, outlier_clip, factor_dtype, rounding, seed)


def kron_psgd(
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    momentum: ArrayLike | None = 0.9,
    precond_lr: optax.ScalarOrSchedule = 0.7,
    geometry: str = "EQ",
    criterion: str = "whiten_momentum",
    update_probability: optax.ScalarOrSchedule | None = None,
    damping: ArrayLike = 1e-9,
    relative_damping: ArrayLike | None = None,
    init_scale: ArrayLike | None = None,
    rms_clip: ArrayLike | None = 1.1,
    max_abs_clip: ArrayLike | None = None,
    outlier_clip: ArrayLike | None = 10.0,
    weight_decay: ArrayLike | None = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    blocking: Blocking = Blocking(),
    cache_preconditioner: bool | None = None,
    factor_dtype: DTypeLike | None = None,
    momentum_dtype: DTypeLike | None = None,
    rounding: str = "nearest",
    precision: jax.lax.PrecisionLike = None,
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """PSGD-Kron: SGD with momentum and an online-fitted Kronecker-factored preconditioner.

    With a learning rate this is a complete optimizer; without, the bare preconditioner, to chain:
    `optax.chain(ok.kron_psgd(), optax.scale_by_learning_rate(1e-3))` equals `ok.kron_psgd(1e-3)`.
    With the default `rms_clip`, a whitened update has about the size of one of Adam's or less.
    Start from a third of Adam's learning rate, and tune.

    All arguments that are not listed here are those of `scale_by_kron_psgd`, as are cost and
    errors.

    Args:
      learning_rate: a number or a schedule; `None` leaves the updates unscaled and unflipped.
      weight_decay: decoupled weight decay, times the learning rate; needs `params` in `update`.
      mask: which parameters decay, as in `optax.add_decayed_weights`. A function needs
        `static_args=("mask",)` under `optax.inject_hyperparams`.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: for a negative learning rate or weight decay, or a mask that is a single bool or
        array.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> loss = lambda params: jnp.sum(jnp.square(params @ jnp.ones((2, 4)) - 1.0))
      >>> params = jnp.zeros((3, 2))
      >>> tx = ok.kron_psgd(optax.cosine_decay_schedule(0.1, 100))
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(100):
      ...     params, state = step(params, state)
      >>> bool(loss(params) < 0.01)
      True
    """
    arguments = dict(locals())
    return validation.complete("kron_psgd", scale_by_kron_psgd, arguments)
