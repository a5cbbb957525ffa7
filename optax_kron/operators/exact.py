"""The exact generalized Gauss-Newton matrix of a loss, matrix-free."""

# Methods without a docstring have that of `Operator`, which `help` shows.
# ruff: noqa: D102

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from optax_kron.capture.ggn import ggn_vector_product
from optax_kron.operators.base import Operator
from optax_kron.operators.vectors import Structure
from optax_kron.types import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GGN(Operator):
    """The generalized Gauss-Newton matrix of a loss; see `ggn`."""

    params: PyTree
    args: tuple[PyTree, ...]
    loss_fn: Callable[..., PyTree] = dataclasses.field(metadata={"static": True})
    has_aux: bool = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> jnp.dtype:
        leaves = jax.tree.leaves(self.in_structure())
        return jnp.result_type(jnp.float32, *(x.dtype for x in leaves))

    def in_structure(self) -> PyTree:
        """The abstract parameters, with `None` for leaves that are not floating-point."""
        return Structure.of(self.params).tree

    def mv(self, vector: PyTree) -> PyTree:
        """The product, by derivatives of the loss. Cost: about four evaluations of the loss."""
        vector = Structure.of(self.params).check(vector)
        product = ggn_vector_product(self.loss_fn, self.params, *self.args, has_aux=self.has_aux)
        return jax.tree.map(lambda y, x: y.astype(x.dtype), product(vector), vector)


def ggn(
    loss_fn: Callable[..., PyTree], params: PyTree, *args: PyTree, has_aux: bool = False
) -> GGN:
    """The generalized Gauss-Newton matrix of a marked loss, exact and matrix-free.

    Args:
      loss_fn: The loss function, as in `ok.find_layers`.
      params: The parameters at which the matrix is taken.
      *args: Arguments of the loss, by position. Under `jax.jit`, arrays or pytrees of them.
      has_aux: Whether `loss_fn` returns auxiliary data.

    Returns:
      An operator on pytrees like the parameters. `mv` costs about four evaluations of the loss; all
      other methods make the dense matrix by `mv` of every unit vector, for small models.

    Raises:
      ValueError: For complex parameters; in `mv`, if the loss marks no likelihood.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> def loss_fn(w, x, y):
      ...     return jnp.sum(ok.losses.l2_loss(x @ w, y))
      >>> x, y = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.zeros(2)
      >>> print(ok.operators.ggn(loss_fn, jnp.zeros(2), x, y).as_matrix())
      [[1. 0.]
       [0. 4.]]

    Source: Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient
    descent.
    """
    if not callable(loss_fn):
        raise ValueError(f"ggn: loss_fn must be a function; got {type(loss_fn).__name__}.")
    if any(jnp.iscomplexobj(x) for x in jax.tree.leaves(Structure.of(params).tree)):
        raise ValueError(
            "ggn: complex parameters have no real matrix; take the loss as a function of their "
            "real and imaginary parts, or ok.ggn_vector_product."
        )
    return GGN(params, args, loss_fn, has_aux)
