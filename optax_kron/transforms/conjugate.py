"""Conjugate gradients on a quadratic model, from the best step over a few directions.

With the curvature C + shift and the preconditioner P, a step δ becomes the best one over

    δ    the preconditioned residual d = −P⁻¹(g + Cδ + shift·δ)    the last change of δ

as in the locally optimal form of the method: where it begins at zero or at a multiple of P⁻¹g, the
steps are those of preconditioned conjugate gradients, and they lower the model wherever it begins.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from optax_kron.kernels import contract, flow
from optax_kron.transforms.quadratic import QuadraticStep, quadratic_step
from optax_kron.types import PyTree


class Iterate(NamedTuple):
    """Where the iteration is; trees like the gradients, of at least float32."""

    step: PyTree
    product: PyTree  # C times the step
    change: PyTree  # by which the step became what it is
    change_product: PyTree
    predicted_decrease: Float[Array, ""]


def refined(
    first: QuadraticStep,
    grads: PyTree,
    directions: Sequence[PyTree],
    products: Sequence[PyTree],
    natural_direction: Callable[[PyTree], PyTree],
    product_of: Callable[[PyTree], PyTree],
    steps: Int[Array, ""],
    *,
    damping: ArrayLike,
    l2: ArrayLike,
) -> QuadraticStep:
    """A step that is lower on the model, by so many products.

    Args:
      first: The best step over the first directions, of which the first is −P⁻¹g.
      grads: The gradient g.
      directions: The first directions.
      products: C times these.
      natural_direction: From a tree like the gradient to P⁻¹ times it.
      product_of: From a tree like the gradient to C times it.
      steps: How many.
      damping: See `quadratic_step`, as for `l2`.
      l2: Added to the damping.

    Returns:
      The step and by how much it lowers the model, with the coefficients of the first one.
    """

    def improve(_, at: Iterate) -> Iterate:
        residual = jax.tree.map(residual_of, grads, at.product, at.step)
        direction = jax.tree.map(jnp.negative, natural_direction(residual))
        given = at.step, direction, at.change
        made = at.product, product_of(direction), at.change_product
        found = quadratic_step(grads, given, made, damping=damping, l2=l2)
        x = found.coefficients
        changed = _combined(x, given), _combined(x, made)
        change = _combined(x[1:], given[1:]), _combined(x[1:], made[1:])
        return Iterate(*changed, *change, found.predicted_decrease)

    def residual_of(g, product, step):
        shift = (jnp.asarray(damping) + jnp.asarray(l2)).astype(contract.real_dtype(step.dtype))
        return (g + product + shift * step).astype(g.dtype)

    x = first.coefficients
    start = Iterate(
        step=jax.tree.map(contract.widen, first.step),
        product=_combined(x, products),
        change=_combined(x[:1], directions[:1]),
        change_product=_combined(x[:1], products[:1]),
        predicted_decrease=first.predicted_decrease,
    )
    last = flow.fori_loop(0, steps, improve, start)
    step = jax.tree.map(lambda x, g: x.astype(g.dtype), last.step, grads)
    return QuadraticStep(first.coefficients, step, last.predicted_decrease)


def _combined(coefficients: Float[Array, " k"], trees: Sequence[PyTree]) -> PyTree:
    """The sum of trees times numbers, in at least float32."""

    def combine(*xs: Array) -> Array:
        total = jnp.zeros_like(contract.widen(xs[0]))
        for c, x in zip(coefficients, map(contract.widen, xs), strict=True):
            # Of a direction that is left out, nothing may come in: not even 0·inf.
            total = total + jnp.where(c == 0, 0, c.astype(contract.real_dtype(x.dtype)) * x)
        return total

    return jax.tree.map(combine, *trees)
