"""Is the program that was read the loss function? A comparison with `jax.value_and_grad`."""

import importlib.metadata
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from optax_kron.capture.analysis.trace import Traced
from optax_kron.kernels import contract

# A gradient that is zero but for rounding is compared with the largest of all of them.
_SMALL = 1e-2


class ValueAndGrads(NamedTuple):
    """A loss, and its gradients with respect to all parameters."""

    value: Array
    grads: Sequence[Array]


def reference(traced: Traced, arrays: Sequence[Array]) -> ValueAndGrads:
    """The loss and its gradients by JAX alone."""
    count = len(traced.analysis.leaves)

    def loss(params):
        return traced.function(*params, *arrays[count:])[0]

    return ValueAndGrads(*jax.value_and_grad(loss)(list(arrays[:count])))


def disagreement(ours: ValueAndGrads, theirs: ValueAndGrads) -> list[Array]:
    """How far losses, and gradients one by one, are apart, relative to their size."""
    (loss, grads), (true_loss, true_grads) = ours, theirs
    # Relative to the gradient of the same parameter, if that is not tiny beside the others.
    largest = [_largest(g) for g in true_grads]
    floor = _SMALL * jnp.max(jnp.stack([jnp.zeros(()), *largest]))
    scales = [jnp.maximum(x, floor) for x in largest]
    return [_apart(loss, true_loss, _largest(true_loss))] + [
        _apart(g, true, scale) for g, true, scale in zip(grads, true_grads, scales, strict=True)
    ]


def _largest(x: Array) -> Array:
    """The largest magnitude of what is finite."""
    sizes = jnp.abs(x)
    return jnp.max(jnp.where(jnp.isfinite(sizes), sizes, 0), initial=0).astype(jnp.float32)


def _apart(x: Array, true: Array, scale: Array) -> Array:
    """The largest difference, relative; none where both are infinite or NaN."""
    # Which of these it is, the order of sums may decide.
    same = (x == true) | ~(jnp.isfinite(x) | jnp.isfinite(true))
    difference = jnp.where(same, 0, jnp.abs(x - true)).astype(jnp.float32)
    return contract.largest_magnitude(difference) / (scale + jnp.finfo(jnp.float32).tiny)


def refuse(
    traced: Traced,
    deviations: Sequence[Array],
    losses: tuple[Array, Array],
    tolerance: float,
) -> None:
    """Raise if the program that was read is another function.

    Args:
      traced: The loss function.
      deviations: What `disagreement` returned, as numbers.
      losses: That of the program, and that of `jax.value_and_grad`.
      tolerance: The largest deviation that rounding explains.

    Raises:
      RuntimeError: With both values, and the versions of JAX and optax_kron.
    """
    remedy = (
        f"The loss function was not read as this release of JAX means it ({_versions()}); no layer "
        "or tap of it can be trusted. Please report it with the loss function."
    )
    loss, *gradients = (float(x) for x in deviations)
    if not loss <= tolerance:
        raise RuntimeError(
            f"the loss as read is {float(losses[0]):.7g}, but jax.value_and_grad gives "
            f"{float(losses[1]):.7g}. {remedy}"
        )
    for path, deviation in zip(traced.analysis.leaves, gradients, strict=True):
        if not deviation <= tolerance:
            raise RuntimeError(
                f"the gradient of {path or 'the parameter at the root'} as read differs from that "
                f"of jax.value_and_grad by {deviation:.1e} of its largest entry, with a loss of "
                f"{float(losses[0]):.7g} beside {float(losses[1]):.7g}. {remedy}"
            )


def _versions() -> str:
    try:
        version = importlib.metadata.version("optax_kron")
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        version = "of unknown version"
    return f"JAX {jax.__version__}, optax_kron {version}"
