"""Powers of damped eigenvalues, and the checks of damping."""

# Worked example: λ = [0.0, 1e-17, 2.0] in float64, from the eigendecomposition of a singular
# matrix. `spectrum` finds that the first two are zero but for rounding, which is 3·eps·2 here.
#
#   damping   exponent   damped_power          fault
#   0.5       -1.0       [2.0, 2.0, 0.4]       False
#   0.0       -1.0       [0.0, 0.0, 0.5]       True: an error, or under jit the pseudoinverse
#   0.0        0.5       [0.0, 3e-9, 1.4]      False
#
# Without `spectrum` the inverse would be [inf, 1e17, 0.5], of which the second is noise.

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from optax_kron.kernels import contract

RULES = ("exact", "pi", "trace", "plain")


def check_rule(rule: str) -> None:
    """Raise for a damping rule that there is not."""
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}; got {rule!r}.")


def only_exact(rule: str, name: str) -> None:
    """Raise for a rule that needs the factors of a Kronecker product."""
    if rule != "exact":
        raise ValueError(
            f"rule={rule!r} is for Kronecker products; {name} has no factors to add damping to. "
            'Take rule="exact".'
        )


def damped_power(
    values: Float[Array, "*n"], null: Bool[Array, "*n"], damping: ArrayLike, exponent: float
) -> tuple[Float[Array, "*n"], Bool[Array, ""]]:
    """`(values + damping)^exponent`, zero where there is none; and whether that is anywhere.

    Args:
      values: Eigenvalues.
      null: Which of them are zero but for rounding, and have no inverse without damping.
      damping: δ ≥ 0.
      exponent: A real number; if it is fractional, negative numbers have no power.
    """
    damping = jnp.asarray(damping, values.dtype)
    shifted = values + damping
    has_power = jnp.isfinite(shifted)
    if exponent < 0:
        has_power &= (shifted != 0) & ~(null & (damping == 0))
    if exponent != round(exponent):
        has_power &= shifted >= 0
    # The inner `where` keeps derivatives finite where there is no power.
    powers = jnp.where(has_power, jnp.where(has_power, shifted, 1) ** exponent, 0)
    return powers, ~jnp.all(has_power)


def spectrum(values: Float[Array, "*n"]) -> tuple[Float[Array, "*n"], Bool[Array, "*n"]]:
    """Eigenvalues of a symmetric matrix, and which of them are zero but for rounding.

    Those are at most d·eps of the largest, with d the longest axis; if negative, they become zero.
    """
    largest = contract.largest_magnitude(values)
    null = jnp.abs(values) <= max(values.shape) * jnp.finfo(values.dtype).eps * largest
    return jnp.where(null & (values < 0), 0, values), null


def check_number(name: str, value: object) -> None:
    """Raise unless a value is one finite number, at least 0; traced ones only need be single."""
    got = f"{value!r:.100}"
    if isinstance(value, int | float | np.generic | np.ndarray | jax.Array):
        is_single = jnp.ndim(value) == 0 and not jnp.iscomplexobj(value)
        if is_single and isinstance(value, jax.core.Tracer):
            return
        if is_single and 0 <= np.asarray(value) < float("inf"):
            return
        if not is_single:
            got = f"shape {jnp.shape(value)}, dtype {jnp.result_type(value)}"
    raise ValueError(f"{name} must be one finite number, at least 0; got {got}.")
