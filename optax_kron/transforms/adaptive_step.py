"""Steps whose rate, momentum and damping come from a quadratic model of the loss.

Around a preconditioner that keeps no momentum, a step is

    gradient → direction d1, and the last update d2 → C d1, C d2 → the best α d1 + μ d2
    → better by some conjugate gradients → the loss after it → taken or rejected; the next damping

The damping λ is that of the model and of the preconditioner. What costs something, products and the
loss after the step, is left out where the step is lost already.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from optax_kron.kernels import contract, flow, quadratic
from optax_kron.transforms import program, validation
from optax_kron.transforms.conjugate import refined
from optax_kron.transforms.preconditioner import KronState
from optax_kron.transforms.quadratic import QuadraticStep, quadratic_step, step_of_form
from optax_kron.transforms.stacks import select
from optax_kron.types import PyTree

# Changes of the loss below so many of its rounding errors tell nothing.
_ROUNDING = 8.0
# Ratios of the actual to the predicted decrease, between which the damping stays.
_POOR, _GOOD = 0.25, 0.75
# How many poor steps a rejected one counts for: it is lost, and others are until λ is large enough.
# Of the first 50 steps on a Poisson equation 13 were rejected with 1, and 5 with 3.
_REJECTED = 3
# The least damping of factors in float32, and in float64. Each factor gets its root. With less,
# a fifth of the steps of an autoencoder in float32 were rejected, and none with this.
_LEAST, _LEAST_WIDE = 1e-6, 1e-12
# Of an update, how much of it may be missing, or too much, where it was added to parameters.
_APART = 0.1


class AdaptiveMetrics(NamedTuple):
    """What the last step was, and what the next will be damped with; all scalars.

    Attributes:
      learning_rate: α, of the preconditioned negative gradient, float32.
      momentum: μ, of the last update, float32.
      damping: λ of the next step, float32.
      predicted_decrease: Of the loss, by the quadratic model, float32.
      reduction_ratio: The actual decrease over the predicted one, float32; zero if the loss after
        the step was not finite, one if nothing was predicted.
      accepted_steps: Steps that were taken, int32.
      rejected_steps: Steps that would have raised the loss, int32. Those that were skipped, as
        something was not finite before them, are `skipped_steps` of the preconditioner.
      mismatched_updates: Updates after which the parameters were not those with the update added,
        as far as its direction tells, int32: what scales or clips it comes after it in a chain. Of
        updates that are lost in rounding beside the parameters nothing is known.
    """

    learning_rate: Float[Array, ""]
    momentum: Float[Array, ""]
    damping: Float[Array, ""]
    predicted_decrease: Float[Array, ""]
    reduction_ratio: Float[Array, ""]
    accepted_steps: Int[Array, ""]
    rejected_steps: Int[Array, ""]
    mismatched_updates: Int[Array, ""]


class AdaptiveState(NamedTuple):
    """State of `adaptive_kfac` and `adaptive_ekfac`.

    `optax.tree.get(state, name)` finds a field inside the state of a chain or wrapper.

    Attributes:
      preconditioner: That of the preconditioner, with counters of its own.
      last_update: The last update, like the parameters; zero after a rejected step.
      expected_product: The inner product of that with the parameters once it is added, [].
      refreshed_damping: λ with which the inverses were made last, float32 [].
      metrics: What the last step was.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> tx = ok.adaptive_kfac(layers=[ok.Layer("dense", kernel="")], initial_damping=0.1)
      >>> print(optax.tree.get(tx.init(jnp.ones((3, 2))), "damping"))
      0.1
    """

    preconditioner: KronState
    last_update: PyTree
    expected_product: Float[Array, ""]
    refreshed_damping: Float[Array, ""]
    metrics: AdaptiveMetrics


class Trial(NamedTuple):
    """What is known of a step once the loss after it is."""

    skipped: Bool[Array, ""]  # something before it was not finite
    accepted: Bool[Array, ""]
    ratio: Float[Array, ""]  # of the actual to the predicted decrease
    trusted: Bool[Array, ""]  # whether the ratio is more than rounding


@program.settings
@dataclasses.dataclass(frozen=True)
class Adaptive:
    """The settings of `adaptive_kfac`, but for those of the preconditioner.

    Attributes:
      owner: Name of the optimizer, for messages.
      preconditioner: Makes it, of a damping, an interval between refreshes, a dtype, and whether
        what it keeps stays as it is.
      initial_damping: λ of the first step.
      min_damping: The least λ; `None` for what the dtype of the factors bears.
      max_damping: The largest λ.
      damping_decrease: Factor of λ after a step as good as predicted.
      damping_increase: Factor of λ after a step that was not.
      l2: Of the term `l2/2·‖params‖²` that is added to the loss.
      cg_steps: Steps of conjugate gradients on the quadratic model, beyond its first directions.
      refresh_every: Steps from one refresh to the next.
      refresh_factor: By how much λ may change between refreshes.
      factor_dtype: Real dtype of the factors; `None` for that of the parameters, or float32.
    """

    owner: str
    preconditioner: Callable[..., optax.GradientTransformationExtraArgs]
    initial_damping: ArrayLike
    min_damping: ArrayLike | None
    max_damping: ArrayLike
    damping_decrease: ArrayLike
    damping_increase: ArrayLike
    l2: ArrayLike
    cg_steps: ArrayLike
    refresh_every: ArrayLike
    refresh_factor: ArrayLike
    factor_dtype: DTypeLike | None

    def init(self, params: PyTree) -> AdaptiveState:
        """The state before the first step."""
        _refuse_masked(self.owner, params)
        params = program.as_arrays(params)
        initial = jnp.asarray(self.initial_damping, jnp.float32)
        inner = self._preconditioner_of(params, initial, self.refresh_every)
        # Each scalar is a buffer of its own, so that the state can be donated.
        zeros = {name: jnp.zeros([], jnp.float32) for name in AdaptiveMetrics._fields[:5]}
        counters = {name: jnp.zeros([], jnp.int32) for name in AdaptiveMetrics._fields[5:]}
        return AdaptiveState(
            preconditioner=inner.init(params),
            last_update=jax.tree.map(jnp.zeros_like, params),
            expected_product=jnp.zeros_like(_product(params, params)),
            refreshed_damping=jnp.array(initial, copy=True),
            metrics=AdaptiveMetrics(**{**zeros, "damping": initial, **counters}),
        )

    def update(
        self,
        updates: PyTree,
        state: AdaptiveState,
        params: PyTree | None = None,
        *,
        value: ArrayLike | None = None,
        value_fn: Callable[[PyTree], ArrayLike] | None = None,
        ggn_fn: Callable[[PyTree], PyTree] | None = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, AdaptiveState]:
        """One step."""
        known = self._checked(updates, params, value, value_fn, ggn_fn)
        params, grads = program.as_arrays(params), program.as_arrays(updates)
        if not validation.is_off(self.l2):
            grads = jax.tree.map(
                lambda g, p: g + self._l2(g.dtype) * p.astype(g.dtype), grads, params
            )
        damping = state.metrics.damping
        natural, inner = self._precondition(grads, state, params, known, extra_args)
        moved = inner.count > state.preconditioner.count
        directions = jax.tree.map(jnp.negative, natural), state.last_update

        def natural_direction(vector):
            made = self._preconditioner_of(
                params, damping + self._l2(jnp.float32), 1, is_frozen=True
            )
            return made.update(vector, inner, params, **extra_args)[0]

        model = self._model(ggn_fn, grads, directions, params, damping, moved, natural_direction)
        trial = self._try(model, moved, params, known, value_fn)
        step = jax.tree.map(lambda x: jnp.where(trial.accepted, x, 0), model.step)
        refreshed = inner.refreshes > state.preconditioner.refreshes
        lost = (moved & trial.skipped).astype(jnp.int32)  # by the products alone
        last = select(trial.skipped, state.last_update, step)
        metrics = self._measured(state.metrics, model, trial, self._least_damping(params))
        differs = _is_elsewhere(params, state.last_update, state.expected_product) & ~trial.skipped
        expected = _product(last, params) + _product(last, step)
        mismatched = metrics.mismatched_updates + differs.astype(jnp.int32)
        new_state = AdaptiveState(
            preconditioner=inner._replace(skipped_steps=inner.skipped_steps + lost),
            last_update=last,
            expected_product=select(trial.skipped, state.expected_product, expected),
            refreshed_damping=jnp.where(refreshed, damping, state.refreshed_damping),
            metrics=metrics._replace(mismatched_updates=mismatched),
        )
        return step, new_state

    def _checked(self, updates, params, value, value_fn, ggn_fn) -> Array:
        """The loss at the parameters, once everything is there."""
        owner = self.owner
        if params is None:
            raise ValueError(f"{owner} needs the parameters: tx.update(grads, state, params, ...).")
        validation.check_like(owner, updates, params)
        needed = {
            "value": (value, "value=loss, the loss at the parameters"),
            "value_fn": (value_fn, "value_fn=lambda p: loss_fn(p, *batch)"),
            "ggn_fn": (ggn_fn, "ggn_fn=ok.ggn_vector_product(loss_fn, params, *batch)"),
        }
        for name, (given, how) in needed.items():
            if given is None:
                raise ValueError(f"{owner} needs {name} at every update: pass {how}, to tx.update.")
        validation.check_callable(owner, "value_fn", value_fn)
        validation.check_callable(owner, "ggn_fn", ggn_fn)
        return _scalar(owner, "value", value)

    def _l2(self, dtype: DTypeLike) -> Array:
        return jnp.asarray(self.l2, contract.real_dtype(dtype))

    def _precondition(
        self,
        grads: PyTree,
        state: AdaptiveState,
        params: PyTree,
        value: Array,
        extra_args: Mapping[str, PyTree],
    ) -> tuple[PyTree, Any]:
        """The natural gradient with the present damping, and the state of the preconditioner."""
        damping, last = state.metrics.damping, state.refreshed_damping
        factor = jnp.asarray(self.refresh_factor, jnp.float32)
        stale = (damping > last * factor) | (damping * factor < last)
        every = jnp.where(stale, 1, validation.interval(self.refresh_every))
        inner = self._preconditioner_of(params, damping + self._l2(jnp.float32), every)
        # Without the loss there is no step: the preconditioner skips what is not finite.
        good = jnp.isfinite(value)
        grads = jax.tree.map(lambda g: jnp.where(good, g, jnp.nan), grads)
        return inner.update(grads, state.preconditioner, params, **extra_args)

    def _preconditioner_of(
        self,
        params: PyTree,
        damping: ArrayLike,
        refresh_every: ArrayLike,
        is_frozen: bool = False,
    ) -> Any:
        """That of a step."""
        return self.preconditioner(
            damping=damping,
            refresh_every=refresh_every,
            factor_dtype=self._dtype_of_factors(params),
            is_frozen=is_frozen,
        )

    def _dtype_of_factors(self, params: PyTree) -> jnp.dtype:
        """That which was asked for, or one as precise as the parameters."""
        if self.factor_dtype is not None:
            return jnp.dtype(self.factor_dtype)
        return contract.widest_dtype(jax.tree.leaves(params))

    def _least_damping(self, params: PyTree) -> Array:
        """The lower bound of λ."""
        least = self.min_damping
        if least is None:
            least = _LEAST_WIDE if self._dtype_of_factors(params).itemsize > 4 else _LEAST
        return jnp.asarray(least, jnp.float32)

    def _model(
        self, ggn_fn, grads, directions, params, damping, needed, natural_direction
    ) -> QuadraticStep:
        """The step that is best by the quadratic model; without curvature where it is lost."""
        settings = {"damping": damping, "l2": self.l2}
        without = validation.is_off(self.cg_steps)
        if without and hasattr(ggn_fn, "inner_products"):

            def form(directions):  # which costs half of the products
                return flow.cond_or_zeros(needed, lambda: ggn_fn.inner_products(directions))

            return step_of_form(grads, directions, form, **settings)
        products = self._products(ggn_fn, directions, params, needed)
        first = quadratic_step(grads, directions, products, **settings)
        if without:
            return first

        def product_of(direction):
            return self._products(ggn_fn, (direction,), params, True)[0]

        steps = jnp.where(needed, jnp.asarray(self.cg_steps, jnp.int32), 0)
        given = grads, directions, products
        return refined(first, *given, natural_direction, product_of, steps, **settings)

    def _products(self, ggn_fn, directions, params, needed):
        """The products of all directions, or zeros."""

        def zeros():
            return tuple(jax.tree.map(jnp.zeros_like, d) for d in directions)

        def products():
            made = tuple(map(ggn_fn, directions))
            for product, direction in zip(made, directions, strict=True):
                self._check_product(product, direction, params)
            return jax.tree.map(lambda x, like: x.astype(like.dtype), made, directions)

        return products() if needed is True else flow.cond(needed, products, zeros)

    def _check_product(self, product, direction, params) -> None:
        """Raise unless a product is like its direction, as precise as that or the parameters."""
        names = "products by ggn_fn", "the parameters"
        validation.check_like(self.owner, product, direction, names)
        triples = zip(*map(jax.tree.leaves, (product, direction, params)), strict=True)
        for x, *likes in triples:
            expected = {jnp.result_type(like).name for like in likes}
            if (got := jnp.result_type(x).name) not in expected:
                raise ValueError(
                    f"{self.owner}: ggn_fn must return a tree like its argument; got an array of "
                    f"{got} where it has {' or '.join(sorted(expected))}."
                )

    def _try(self, model: QuadraticStep, moved, params, value, value_fn) -> Trial:
        """The loss after the step, beside what was predicted."""
        predicted = model.predicted_decrease.astype(value.dtype)
        skipped = ~(moved & jnp.isfinite(predicted))
        step = jax.tree.map(lambda x: jnp.where(skipped, 0, x), model.step)
        there = optax.apply_updates(params, step)
        after = flow.cond(
            ~skipped & (predicted > 0),
            lambda: _scalar(self.owner, "value_fn(params)", value_fn(there)).astype(value.dtype),
            lambda: value,
        )
        change = after - value
        if not validation.is_off(self.l2):
            change = change + self._l2_change(params, there, value.dtype)
        noise = _ROUNDING * jnp.finfo(value.dtype).eps * jnp.maximum(jnp.abs(value), jnp.abs(after))
        trusted = predicted > noise
        # Of a loss that is infinite, so is the noise.
        accepted = ~skipped & jnp.isfinite(after) & (change <= jnp.where(trusted, 0, noise))
        ratio = jnp.where(predicted > 0, -change / jnp.where(predicted > 0, predicted, 1), 1)
        ratio = jnp.where(jnp.isfinite(ratio), ratio, 0)
        return Trial(skipped, accepted, ratio, trusted)

    def _l2_change(self, params, there, dtype):
        """How the term of the loss changes, without the difference of two large numbers."""
        total = jnp.zeros([], dtype)
        for old, new in zip(*map(jax.tree.leaves, (params, there)), strict=True):
            old, new = contract.widen(old), contract.widen(new)
            product = (new - old).conj() * (new + old)
            total += jnp.sum(product.real).astype(dtype)
        return self._l2(dtype) / 2 * total

    def _measured(
        self, old: AdaptiveMetrics, model: QuadraticStep, trial: Trial, least: Array
    ) -> AdaptiveMetrics:
        """The metrics after a step, with the next damping."""
        # Where each step is lost in rounding, a smaller damping makes one that is not.
        hidden = ~trial.trusted & (model.predicted_decrease > 0)
        good = trial.accepted & (hidden | (trial.trusted & (trial.ratio > _GOOD)))
        poor = ~trial.accepted | (trial.trusted & (trial.ratio < _POOR))
        increase = jnp.asarray(self.damping_increase, jnp.float32)
        increase = jnp.where(trial.accepted, increase, increase**_REJECTED)
        decrease = jnp.asarray(self.damping_decrease, jnp.float32)
        factor = jnp.where(good, decrease, jnp.where(poor, increase, 1))
        most = jnp.asarray(self.max_damping, jnp.float32)
        rate, momentum = model.coefficients.astype(jnp.float32)
        new = AdaptiveMetrics(
            learning_rate=rate,
            momentum=momentum,
            damping=jnp.clip(old.damping * factor, least, most),
            predicted_decrease=model.predicted_decrease.astype(jnp.float32),
            reduction_ratio=trial.ratio.astype(jnp.float32),
            accepted_steps=old.accepted_steps + trial.accepted.astype(jnp.int32),
            rejected_steps=old.rejected_steps + (~trial.accepted).astype(jnp.int32),
            mismatched_updates=old.mismatched_updates,
        )
        return select(trial.skipped, old, new)


def _product(xs: PyTree, ys: PyTree) -> Array:
    """The real part of the inner product of two trees, in float32 or wider."""
    one, other = ([contract.widen(x) for x in jax.tree.leaves(tree)] for tree in (xs, ys))
    return quadratic.inner(one, other, contract.widest_dtype([*one, *other]))


def _is_elsewhere(params: PyTree, last: PyTree, expected: Array) -> Bool[Array, ""]:
    """Whether parameters are not where the last update took them, along that update.

    Without a copy of the parameters that is all that one can see. In the units of the update the
    rounding of parameters p is up to `ε·‖p‖ / ‖update‖`; it is to be well below what is a mismatch.
    """
    squared = _product(last, last)
    leaves = [x for x in jax.tree.leaves(params) if x.size]
    least = min((x.dtype for x in leaves), key=lambda dtype: dtype.itemsize, default=expected.dtype)
    rounding = float(jnp.finfo(least).eps) * jnp.sqrt(squared) * jnp.sqrt(_product(params, params))
    off = jnp.abs(_product(last, params) - expected)
    return (off > _APART * squared) & (rounding < _APART / 8 * squared)


def _refuse_masked(owner: str, params: PyTree) -> None:
    """Raise where `optax.masked` or `optax.partition` hides a part of the parameters."""

    def is_hidden(x):
        return isinstance(x, optax.MaskedNode)

    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_hidden):
        if is_hidden(leaf):
            raise ValueError(
                f"{owner} sees all parameters, as value_fn and ggn_fn do, and goes inside neither "
                f"optax.masked nor optax.partition; {jax.tree_util.keystr(path)} is hidden from it."
            )


def _scalar(owner: str, name: str, value: Any) -> Array:
    """A loss, as a real scalar of at least 32 bits."""
    array = jnp.asarray(value) if jax.tree_util.all_leaves([value]) else None
    if array is None or array.ndim or not jnp.issubdtype(array.dtype, jnp.floating):
        got = type(value).__name__ if array is None else f"shape {array.shape} of {array.dtype}"
        raise ValueError(f"{owner}: {name} must be the loss, a real scalar; got {got}.")
    return contract.widen(array)
