"""Exact products with the generalized Gauss-Newton matrix, matrix-free."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from optax_kron.capture.analysis.marks import Mark
from optax_kron.capture.analysis.trace import trace_loss
from optax_kron.capture.execution.pullback import linearize
from optax_kron.layers.paths import by_path, map_by_path
from optax_kron.types import PyTree


class GaussNewton:
    """Products with a generalized Gauss-Newton matrix C: what `ok.ggn_vector_product` returns.

    It is a function of a pytree like the parameters, that returns one like it, and has inner
    products of directions as well, at half the cost. `ok.adaptive_kfac` takes these where it is
    given one of these objects as `ggn_fn`. Make it by `ok.ggn_vector_product`.

    Args:
      paths: Of the parameters.
      primals: The parameters.
      logits: From the parameters to the logits of all marks.
      hessian: From logits, and tangents of them, to the products with the Hessian of the losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> loss_fn = lambda w: jnp.sum(ok.losses.l2_loss(w, jnp.zeros(2)))
      >>> product = ok.ggn_vector_product(loss_fn, jnp.ones(2))
      >>> isinstance(product, ok.GaussNewton)
      True
      >>> print(product.inner_products([jnp.ones(2), jnp.array([1.0, 0.0])]))
      [[2. 1.]
       [1. 1.]]

    Source: Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient
    descent.
    """

    def __init__(
        self,
        paths: Sequence[str],
        primals: Sequence[Array],
        logits: Callable[[Sequence[Array]], Sequence[Array]],
        hessian: Callable[[Sequence[Array], Sequence[Array]], Sequence[Array]],
    ):
        self._paths, self._primals = paths, primals
        self._logits, self._hessian = logits, hessian

    def __call__(self, v: PyTree) -> PyTree:
        """`Jᵀ H J v`.

        Args:
          v: A tree like the parameters.

        Returns:
          One like it. Cost: about four evaluations of the loss.

        Raises:
          ValueError: If v is not like the parameters.
        """
        logits, pushed = self._push(v)
        _, pull = jax.vjp(self._logits, self._primals)
        (result,) = pull(self._hessian(logits, pushed))
        # For complex numbers the cotangent is the conjugate of the adjoint's result.
        results = dict(zip(self._paths, map(jnp.conj, result), strict=True))
        return map_by_path(lambda path, _: results[path], v)

    def inner_products(self, directions: Sequence[PyTree]) -> Float[Array, "k k"]:
        """The real parts of `d_iᴴ Jᵀ H J d_j`, from `J d_i` alone: half of what products cost.

        Args:
          directions: A list or tuple of k ≥ 1 trees like the parameters.

        Raises:
          ValueError: If they are none, or not like the parameters.
        """
        if not isinstance(directions, list | tuple) or not directions:
            raise ValueError(
                "ggn_vector_product: inner_products takes a list of trees like the parameters, one "
                f"or more; got {directions!r:.100}."
            )
        pairs = [self._push(v) for v in directions]
        curved = [self._hessian(logits, pushed) for logits, pushed in pairs]

        def inner(xs, ys):
            return sum(jnp.sum(jnp.real(x * y)) for x, y in zip(xs, ys, strict=True))

        rows = [[inner(pushed, c) for c in curved] for _, pushed in pairs]
        return jnp.stack([jnp.stack(row) for row in rows])

    def _push(self, v):
        """The logits, and J v."""
        directions = by_path(v)
        shapes = {path: x.shape for path, x in directions.items()}
        expected = {p: x.shape for p, x in zip(self._paths, self._primals, strict=True)}
        for path in [*expected, *shapes]:
            if shapes.get(path) != expected.get(path):
                raise ValueError(
                    f"ggn_vector_product: v does not match the parameters: at {path or 'the root'} "
                    f"it has shape {shapes.get(path, '(no such leaf)')}, and the parameters "
                    f"{expected.get(path, '(no such leaf)')}."
                )
        tangents = [
            directions[path].astype(x.dtype)
            for path, x in zip(self._paths, self._primals, strict=True)
        ]
        return jax.jvp(self._logits, (self._primals,), (tangents,))


def ggn_vector_product(
    loss_fn: Callable[..., PyTree], params: PyTree, *args: PyTree, has_aux: bool = False
) -> GaussNewton:
    """The map from v to the product with the generalized Gauss-Newton matrix of a marked loss.

    The matrix is `Σ_e w_e J_eᵀ H_e J_e`: over all marked per-example losses e, with H_e the Hessian
    with respect to their logits, J_e the Jacobian of these, and w_e the derivative of the loss.
    Terms of the loss that are not marked, such as regularizers, are not part of it. For exponential
    families this is the Fisher information.

    Args:
      loss_fn: A function as `find_layers` takes it.
      params: The matrix is taken here.
      *args: Passed on to `loss_fn`.
      has_aux: Whether `loss_fn` returns auxiliary data.

    Returns:
      An `ok.GaussNewton`: a function of a pytree like `params`, that returns one like it. Cost of a
      call: about four evaluations of the loss. Its method `inner_products(directions)` is the
      matrix [k, k] of `d_iᵀ C d_j`, at half of that for each of k directions.

    Raises:
      ValueError: If the loss marks no likelihood.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> def loss_fn(w, x, y):
      ...     return jnp.sum(ok.losses.l2_loss(x @ w, y))
      >>> x, y = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.zeros(2)
      >>> product = ok.ggn_vector_product(loss_fn, jnp.zeros(2), x, y)
      >>> print(product(jnp.ones(2)))
      [1. 4.]

    Source: Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient
    descent.
    """
    traced = trace_loss(loss_fn, params, args, has_aux)
    analysis = traced.analysis
    if not analysis.marks:
        raise ValueError(
            "ggn_vector_product: the loss marks no likelihood; take it from ok.losses."
        )
    paths = list(analysis.leaves)
    primals, others = traced.arrays[: len(paths)], traced.arrays[len(paths) :]

    def logits(leaves):
        return [operands[0] for operands in linearize(analysis, (), [*leaves, *others]).operands]

    linearized = linearize(analysis, (), traced.arrays)
    weights = linearized.pull_loss().losses

    def objective(m: int, mark: Mark) -> Callable[[Array], Array]:
        """The weighted sum of a mark's losses, of its logits alone."""
        _, *rest = linearized.operands[m]
        return lambda f: jnp.sum(weights[m] * mark.evaluate(f, *rest))

    def hessian(f, pushed):
        # Of each mark's losses alone.
        return [
            jax.jvp(jax.grad(objective(m, mark)), (f[m],), (pushed[m],))[1]
            for m, mark in enumerate(analysis.marks)
        ]

    return GaussNewton(paths, primals, logits, hessian)
