"""To lineax, whose solvers take operators and preconditioners."""

from typing import TYPE_CHECKING

from optax_kron.operators.base import Operator

if TYPE_CHECKING:
    import lineax


def as_lineax(operator: Operator) -> "lineax.FunctionLinearOperator":
    """An operator as a `lineax.FunctionLinearOperator`, tagged positive semidefinite.

    So that `lineax.CG` and `lineax.GMRES` can solve with it, or take its inverse as preconditioner:
    `options={"preconditioner": ok.operators.as_lineax(op.inverse(damping))}`.

    Args:
      operator: An operator of `ok.operators`, positive semidefinite.

    Raises:
      ImportError: Without lineax, which optax_kron does not install by itself.
      TypeError: For what is no operator.

    Examples:
      >>> import jax.numpy as jnp
      >>> import lineax
      >>> import optax_kron as ok
      >>> op = ok.operators.kronecker(jnp.diag(jnp.array([1.0, 2.0])), jnp.eye(3))
      >>> solver = lineax.CG(rtol=1e-6, atol=1e-6)
      >>> right = jnp.ones((2, 3))
      >>> solution = lineax.linear_solve(ok.operators.as_lineax(op), right, solver)
      >>> bool(jnp.allclose(op @ solution.value, right, atol=1e-5))
      True
    """
    import lineax  # when called, for optax_kron does not need it otherwise

    if not isinstance(operator, Operator):
        raise TypeError(f"as_lineax: expected an operator; got {type(operator).__name__}.")
    tags = (lineax.symmetric_tag, lineax.positive_semidefinite_tag)
    return lineax.FunctionLinearOperator(operator.mv, operator.in_structure(), tags)
