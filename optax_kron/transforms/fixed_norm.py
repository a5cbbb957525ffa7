"""Norms of weights and updates that are kept, around any transformation.

A weight matrix moves on the sphere of its initial norm, by a step of a given length. For weights W
of norm R and a direction u, with learning rate η:

    u → rows of at least a given length → u without its part along W → length R
    W → (W - η u) R / ‖W - η u‖

The soft form leaves the weights free, and only keeps updates from being short beside them.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Inexact, Int

from optax_kron.blocking import Blocking
from optax_kron.kernels import contract
from optax_kron.transforms import program, validation
from optax_kron.transforms.stacks import all_finite, select
from optax_kron.types import PyTree

# What is left of a direction along the weights, of its length, is rounding below so many units.
_ROUNDING = 32.0


class FixedNormState(NamedTuple):
    """State of `fixed_norm`.

    Attributes:
      count: Steps that were taken, int32 [].
      skipped_steps: Steps whose direction was not finite, and that changed nothing, int32 [].
      norms: The norms to keep, of every parameter [its stacked axes], float32 or float64; zero
        where none is kept.
      inner: State of the transformation inside.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> tx = ok.fixed_norm(optax.scale_by_adam(), 0.01)
      >>> print(tx.init(jnp.array([[3.0, 0.0], [0.0, 4.0]])).norms)
      5.0
    """

    count: Int[Array, ""]  # pyright: ignore
    skipped_steps: Int[Array, ""]
    norms: PyTree
    inner: PyTree


def fixed_norm(
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    form: str = "hard",
    floor: ArrayLike = 0.35,
    row_floor: ArrayLike | None = None,
    output_axis: str = "last",
    other_learning_rate: optax.ScalarOrSchedule | None = None,
    blocking: Blocking = Blocking(),
    mask: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Hyperball: weights of a fixed norm, and updates that are a fixed share of it.

    With `form="hard"` each weight matrix stays at the Frobenius norm R that it has at `init`. The
    direction u of the inner transformation loses its part along the weights, gets the length R,
    and the weights become `(W - η u)·R/‖W - η u‖`: the learning rate η is the tangent of the angle
    by which they turn, and needs no weight decay beside it. With `form="soft"` weights are free,
    and u, without its part along the weights but at its old length, is made longer where that is
    less than `floor·‖W‖`.

    Of parameters with fewer than two axes longer than one, of those that `mask` leaves out, and
    of those that are zero at `init` no norm is kept: their update is -η u.

    Args:
      inner: What makes directions of gradients, before any learning rate, as `ok.scale_by_soap()`,
        `ok.kron_psgd()` without a learning rate, or `optax.scale_by_adam()`. Its extra arguments
        are passed on.
      learning_rate: η, a number or a schedule, ≥ 0. Rates around 0.01 are usual with the hard form.
      form: "hard" or "soft".
      floor: Of the soft form, ‖u‖ beside ‖W‖, ≥ 0.
      row_floor: The least length of each row of u beside that of the same row of W, in units of
        ‖u‖/‖W‖ in the hard form; shorter ones are made as long. `None`: rows are left alone.
      output_axis: The axis along which rows are counted, one for each output: "last", of kernels
        that come behind their inputs, as in Flax, or "first", as in Equinox.
      other_learning_rate: η of parameters whose norm is not kept. `None`: `learning_rate`.
      blocking: Of which `stacked_axes` counts here: tensors that are stacked along leading axes
        have norms of their own.
      mask: Tree of bools like the parameters, or a function that makes one of them: whether norms
        are kept. `None`: wherever there are two axes.

    Returns:
      A complete transformation, whose updates are added to the parameters, which `update` needs.
      Its state is a `FixedNormState`. A direction that is not finite changes nothing but
      `skipped_steps`. Norms are kept to the rounding of the parameters' dtype, whatever the number
      of steps. Cost: some passes over parameters and updates; a number per tensor as state.

    Raises:
      ValueError: If a setting is out of its range, a parameter is neither floating-point nor
        complex, a mask lacks it, or `update` is called without parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> tx = ok.fixed_norm(ok.scale_by_soap(), 0.01)
      >>> params = jnp.array([[3.0, 0.0], [0.0, 4.0]])
      >>> updates, state = tx.update(jnp.ones((2, 2)), tx.init(params), params)
      >>> print(jnp.linalg.norm(optax.apply_updates(params, updates)).round(4))
      5.0

    Source: Wen, Dang, Lyu, Ma and Liang (2026), arXiv:2606.16899.
    """
    arguments = {name: x for name, x in locals().items() if name != "inner"}
    owner = "fixed_norm"
    if not isinstance(inner, optax.GradientTransformation):
        raise ValueError(
            f"{owner}: inner must be an optax.GradientTransformation without a learning rate, such "
            f"as ok.scale_by_soap(); got {inner!r}."
        )
    check = validation.check_range
    check(owner, "learning_rate", learning_rate, schedule=True)
    check(owner, "other_learning_rate", other_learning_rate, schedule=True, optional=True)
    validation.check_choice(owner, "form", form, ("hard", "soft"))
    check(owner, "floor", floor)
    check(owner, "row_floor", row_floor, optional=True)
    validation.check_mask(owner, mask)
    validation.check_choice(owner, "output_axis", output_axis, ("first", "last"))
    made = FixedNorm(optax.with_extra_args_support(inner), **arguments)
    return program.transformation(made.init, made.update)


@dataclasses.dataclass(frozen=True)
class FixedNorm:
    """The settings of `fixed_norm`, with its two functions."""

    inner: optax.GradientTransformationExtraArgs
    learning_rate: optax.ScalarOrSchedule
    form: str
    floor: ArrayLike
    row_floor: ArrayLike | None
    output_axis: str
    other_learning_rate: optax.ScalarOrSchedule | None
    blocking: Blocking
    mask: PyTree | None

    def init(self, params: PyTree) -> FixedNormState:
        """The norms to keep, and the inner state."""
        params = program.as_arrays(params)
        validation.check_inexact("fixed_norm", params)
        leaves, treedef = jax.tree.flatten(params)

        def norm_to_keep(x: Array, stacked: int, wanted: bool) -> Array:
            def norm(x):
                axes = tuple(range(stacked, x.ndim))
                own = jnp.squeeze(contract.norm(contract.widen(x), axes), axes)
                return own if wanted else jnp.zeros_like(own)

            # Of abstract parameters norms are so too, as nothing else is known of them.
            return jax.eval_shape(norm, x) if isinstance(x, jax.ShapeDtypeStruct) else norm(x)

        told = self.blocking.count_stacked(params), self._wanted(params)
        triples = zip(leaves, *told, strict=True)
        return FixedNormState(
            count=jnp.zeros([], jnp.int32),
            skipped_steps=jnp.zeros([], jnp.int32),
            norms=treedef.unflatten([norm_to_keep(*triple) for triple in triples]),
            inner=self.inner.init(params),
        )

    def update(
        self,
        updates: PyTree,
        state: FixedNormState,
        params: PyTree | None = None,
        **extra_args: PyTree,
    ) -> tuple[PyTree, FixedNormState]:
        """One step."""
        if params is None:
            raise ValueError("fixed_norm needs the parameters: tx.update(grads, state, params).")
        validation.check_like("fixed_norm", updates, params)
        params, updates = program.as_arrays(params), program.as_arrays(updates)
        directions, inner = self.inner.update(updates, state.inner, params, **extra_args)
        rate = _at(self.learning_rate, state.count)
        other = self.other_learning_rate
        other = rate if other is None else _at(other, state.count)
        lists = map(jax.tree.leaves, (directions, params, state.norms))
        told = self.blocking.count_stacked(params), self._wanted(params)
        steps = [
            self._step(u, w, norm, stacked, wanted, rate, other)
            for u, w, norm, stacked, wanted in zip(*lists, *told, strict=True)
        ]
        accepted = all_finite((directions, steps))
        steps = [jnp.where(accepted, x, 0) for x in steps]
        one = accepted.astype(jnp.int32)
        new_state = FixedNormState(
            count=state.count + one,
            skipped_steps=state.skipped_steps + 1 - one,
            norms=state.norms,
            inner=select(accepted, inner, state.inner),
        )
        return jax.tree.structure(directions).unflatten(steps), new_state

    def _wanted(self, params: PyTree) -> list[bool]:
        """For each parameter, whether its norm is kept, if it is not zero."""
        pairs = zip(jax.tree.leaves(params), self.blocking.count_stacked(params), strict=True)
        are_matrices = [sum(size > 1 for size in x.shape[n:]) > 1 for x, n in pairs]
        if self.mask is None:
            return are_matrices
        chosen = validation.mask_by_path("fixed_norm", self.mask, params)
        return [a and b for a, b in zip(are_matrices, chosen, strict=True)]

    def _step(self, direction, weights, norm, stacked, wanted, rate, other):
        """What is added to a parameter."""
        u, w = contract.widen(direction), contract.widen(weights)
        dtype = jnp.result_type(u, w)
        real = contract.real_dtype(dtype)
        u, w = u.astype(dtype), w.astype(dtype)
        rate, other = (jnp.asarray(x).astype(real) for x in (rate, other))
        plain = -other * u
        if not wanted:
            return plain.astype(direction.dtype)
        kept = norm.astype(real).reshape(*norm.shape, *(1,) * (w.ndim - stacked))
        own = _norm(w, stacked)
        if self.form == "soft":
            made = self._soft(u, w, own, stacked, rate)
        else:
            made = self._hard(u, w, own, kept, stacked, rate)
        # A weight that has come to be zero is left alone as one that was.
        return jnp.where((kept > 0) & (own > 0), made, plain).astype(direction.dtype)

    def _hard(self, u, w, own, kept, stacked, rate):
        u = self._with_rows(_divided(u, _norm(u, stacked)), _divided(w, own), stacked)
        turned = rate * kept * _unit(_tangent(u, w, own, stacked), stacked)
        # It is at right angles to the weights.
        shrink = kept / jnp.hypot(own, _norm(turned, stacked))
        return (shrink - 1) * w - shrink * turned

    def _soft(self, u, w, own, stacked, rate):
        length = jnp.maximum(_norm(u, stacked), jnp.asarray(self.floor).astype(own.dtype) * own)
        u = self._with_rows(length * _unit(u, stacked), w, stacked)
        return -rate * _norm(u, stacked) * _unit(_tangent(u, w, own, stacked), stacked)

    def _with_rows(self, u, w, stacked):
        """The direction with rows that are no shorter than a share of those of the weights."""
        if self.row_floor is None:
            return u
        axis = stacked if self.output_axis == "first" else w.ndim - 1
        axes = tuple(i for i in range(stacked, w.ndim) if i != axis)
        own, least = (contract.norm(x, axes) for x in (u, w))
        least = jnp.asarray(self.row_floor).astype(own.dtype) * least
        return jnp.where(own < least, u * (least / contract.safe_divisor(own)), u)


def _at(rate: optax.ScalarOrSchedule, count: Array) -> ArrayLike:
    return rate(count) if callable(rate) else rate


def _norm(x: Inexact[Array, "..."], stacked: int) -> Float[Array, "..."]:
    """The norm of every tensor, with axes of one in place of the tensor's own."""
    return contract.norm(x, tuple(range(stacked, x.ndim)))


def _divided(x, norm):
    """The array divided by norms, which are of itself: zeros stay zeros."""
    return x / contract.safe_divisor(norm)


def _unit(x, stacked):
    """Each tensor at a norm of one; zeros stay zeros."""
    return _divided(x, _norm(x, stacked))


def _tangent(u, w, own, stacked):
    """Each direction without its part along the weights; zero if nothing else is in it."""
    axes = tuple(range(stacked, w.ndim))
    length = _norm(u, stacked)
    u, w = _divided(u, length), _divided(w, own)
    for _ in range(2):  # once more for what rounding has left of it
        along = jnp.sum((u * jnp.conj(w)).real, axis=axes, keepdims=True)
        u = u - along * w
    rounding = _ROUNDING * jnp.finfo(own.dtype).eps
    return jnp.where(_norm(u, stacked) > rounding, u * length, 0)
