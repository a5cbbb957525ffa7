"""A step from the exact quadratic model of a loss, over a few directions."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from optax_kron.kernels import contract, quadratic
from optax_kron.transforms import program, validation
from optax_kron.types import PyTree


class QuadraticStep(NamedTuple):
    """What `quadratic_step` returns.

    Attributes:
      coefficients: How far to go along each of the k directions, float32 or float64 [k].
      step: The sum of the directions times these, like the gradients: to add to the parameters.
      predicted_decrease: By how much the step lowers the model, ≥ 0 up to rounding, []; NaN if
        anything that was given is not finite.
    """

    coefficients: Float[Array, " k"]
    step: PyTree
    predicted_decrease: Float[Array, ""]


def quadratic_step(
    grads: PyTree,
    directions: Sequence[PyTree],
    products: Sequence[PyTree],
    *,
    damping: ArrayLike = 0.0,
    l2: ArrayLike = 0.0,
) -> QuadraticStep:
    """The step over a few directions that is best by a quadratic model of the loss.

    It minimizes `½ δᵀ(C + (λ + l2) I)δ + gᵀδ` over `δ = Σ_i x_i d_i`, with the gradient g and a
    curvature C that is known by its products with the directions. K-FAC takes for these the
    preconditioned negative gradient and the last update, so that x is a learning rate and a
    momentum; for C the generalized Gauss-Newton matrix, by `ok.ggn_vector_product`.

    Args:
      grads: The gradient g, with `l2·params` in it if there is an `l2`. Arrays of any real or
        complex floating-point dtypes; sums are at least float32.
      directions: The d_i, one or more trees like the gradients.
      products: The products C d_i, likewise.
      damping: λ ≥ 0.
      l2: Of a term `l2/2·‖params‖²` of the loss, ≥ 0.

    Returns:
      The coefficients, the step and the predicted decrease. Directions of zeros, without curvature,
      or parallel to those before them, get a coefficient of zero, and where anything is not finite
      all do. Cost: 2k² + 3k operations per parameter.

    Raises:
      ValueError: If there are no directions, or not one product for each, if they are not like the
        gradients, or if anything is not floating-point or complex.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> curvature = jnp.array([1.0, 4.0])
      >>> directions = [jnp.array([-1.0, 0.0]), jnp.array([-1.0, -1.0])]
      >>> products = [curvature * d for d in directions]
      >>> found = ok.quadratic_step(jnp.array([2.0, 4.0]), directions, products)
      >>> print(found.step.round(3), found.predicted_decrease.round(3))
      [-2. -1.] 4.0

    Source: Martens and Grosse (2015), arXiv:1503.05671, sections 6.4 and 7.
    """
    owner = "quadratic_step"
    validation.check_range(owner, "damping", damping)
    validation.check_range(owner, "l2", l2)
    for name, given in (("directions", directions), ("products", products)):
        _check_sequence(owner, name, given)
    if not directions or len(directions) != len(products):
        raise ValueError(
            f"{owner}: directions and products must be sequences of as many trees, one or more; "
            f"got {len(directions)} and {len(products)}."
        )
    k = len(directions)
    names = ["grads", *_numbered("directions", k), *_numbered("products", k)]
    trees = [
        _as_inexact(owner, name, tree)
        for name, tree in zip(names, (grads, *directions, *products), strict=True)
    ]
    for name, tree in zip(names[1:], trees[1:], strict=True):
        validation.check_like(owner, tree, trees[0], (name, "the gradients"))
    lists = [jax.tree.leaves(tree) for tree in trees]
    least = quadratic.minimum(lists[0], lists[1 : k + 1], lists[k + 1 :], _shift(damping, l2))
    return _step_of(trees[0], trees[1 : k + 1], least)


def step_of_form(
    grads: PyTree,
    directions: Sequence[PyTree],
    form: Callable[[Sequence[PyTree]], Float[Array, "k k"]],
    *,
    damping: ArrayLike,
    l2: ArrayLike,
) -> QuadraticStep:
    """`quadratic_step`, where C is known by `⟨d_i, C d_j⟩`, of trees like the directions."""
    structure = jax.tree.structure(grads)

    def of_leaves(lists):
        return form([structure.unflatten(leaves) for leaves in lists])

    lists = [jax.tree.leaves(tree) for tree in (grads, *directions)]
    least = quadratic.minimum_of_form(lists[0], lists[1:], of_leaves, _shift(damping, l2))
    return _step_of(grads, directions, least)


def _shift(damping, l2):
    """What is added to the diagonal of the curvature."""
    return jnp.asarray(damping, jnp.result_type(float)) + jnp.asarray(l2, jnp.result_type(float))


def _step_of(grads, directions, least: quadratic.Minimum) -> QuadraticStep:
    """The sum of the directions, like the gradients."""

    def combine(g: Array, *ds: Array) -> Array:
        total = jnp.zeros((), contract.widen(g).dtype)
        for i, d in enumerate(map(contract.widen, ds)):
            real = contract.real_dtype(d.dtype)
            scaled = d / least.units[i].astype(real) * least.weights[i].astype(real)
            total = total + jnp.where(least.finite, scaled, 0)
        return total.astype(g.dtype)

    step = jax.tree.map(combine, grads, *directions)
    return QuadraticStep(least.coefficients, step, least.decrease)


def _check_sequence(owner: str, name: str, given: Any) -> None:
    """Raise unless trees come as a list or tuple, rather than as one bare tree."""
    if not isinstance(given, list | tuple) or hasattr(given, "_fields"):
        raise ValueError(
            f"{owner}: {name} must be a list or tuple of trees like the gradients, one for each "
            f"direction; got {type(given).__name__}."
        )


def _numbered(name: str, count: int) -> list[str]:
    return [f"{name}[{i}]" for i in range(count)]


def _as_inexact(owner: str, name: str, tree: PyTree) -> PyTree:
    """The tree with arrays for leaves; raises unless these are floating-point or complex."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = getattr(leaf, "dtype", None)
        # Numbers of Python are parameters too.
        if not isinstance(leaf, float | complex) and (
            dtype is None or not jnp.issubdtype(dtype, jnp.inexact)
        ):
            where = f"{name}{jax.tree_util.keystr(path)}"
            got = type(leaf).__name__ if dtype is None else f"an array of {dtype}"
            raise ValueError(f"{owner}: {where} must be floating-point or complex; got {got}.")
    return program.as_arrays(tree)
