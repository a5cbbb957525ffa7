"""What layers saw: inputs and output-gradients, as pytrees."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Tap(NamedTuple):
    """What one layer saw of one batch.

    By hand, `Tap(inputs, output_grads)` with [N, d_in] and [N, d_out] will do; `Taps` brings them
    to canonical form. A datum that shall not count has a weight of zero and output-gradients of
    zero.
    """

    inputs: Array  # [B, N, S, d_in], ones last where there is a bias; indices [B, N, S, 1]
    output_grads: Array  # [V, B, N, S, d_out], per datum; V = 0: the output factor is the identity
    # In the input factor, ≥ 0: of the data [N], of their positions [N, S], or of those of each
    # block [B, N, S]; None: all equal.
    weights: Array | None = None


class Moments(NamedTuple):
    """Second moments of what one layer saw of one batch: all that "expand" needs of a `Tap`.

    Those of several batches of one size may be averaged.
    """

    # Where the layer has a diagonal factor, as embeddings and wide axes have, the diagonal alone.
    input_factor: Array  # A [B, d_in, d_in] or [B, d_in]
    output_factor: Array  # G [B, d_out, d_out] or [B, d_out]
    # Of all data in the loss, Σ_n w_n, which weighs A against other groups; 0 if none was seen, N·S
    # if the tap has no weights; [B] or [].
    weight: Array


class Taps(dict):
    """Taps of all layers: from a layer's name to a tuple of `Tap`s, one for each batch it met.

    Args:
      taps: a mapping from names to a `Tap`, or to a sequence of them.

    Raises:
      ValueError: for arrays whose shapes do not fit, by name.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> taps = ok.Taps({"dense": ok.Tap(jnp.ones((5, 3)), jnp.ones((5, 2)))})
      >>> taps["dense"][0].inputs.shape
      (1, 5, 1, 3)
    """

    def __init__(self, taps: Mapping[str, Tap | Moments | Iterable[Tap | Moments]]):
        super().__init__(
            {
                name: tuple(canonical(name, tap) for tap in _sequence(given))
                for name, given in taps.items()
            }
        )


def _sequence(given):
    return [given] if isinstance(given, Tap | Moments) else given


def canonical(name: str, tap: Tap | Moments) -> Tap | Moments:
    """Bring a tap to canonical form, and check its shapes."""
    if isinstance(tap, Moments):
        return tap
    if not isinstance(tap, Tap):
        raise ValueError(
            f"Taps: layer {name!r} was given a {type(tap).__name__}; expected "
            "ok.Tap(inputs, output_grads), or a sequence of those."
        )
    inputs, grads = jnp.asarray(tap.inputs), jnp.asarray(tap.output_grads)
    if inputs.ndim == 2:
        inputs = inputs[None, :, None, :]
    if inputs.ndim == 3:
        inputs = inputs[None]
    if grads.ndim == 2:
        grads = grads[None, None, :, None, :]
    if grads.ndim == 3:
        grads = grads[None, None]
    if grads.ndim == 4:
        grads = grads[None]
    if inputs.ndim != 4 or grads.ndim != 5 or inputs.shape[:3] != grads.shape[1:4]:
        raise ValueError(
            f"Taps: layer {name!r} has inputs of shape {jnp.shape(tap.inputs)} and output_grads of "
            f"shape {jnp.shape(tap.output_grads)}; expected [N, d_in] and [N, d_out], or "
            "[B, N, S, d_in] and [V, B, N, S, d_out], with the same blocks, data and positions."
        )
    if 0 in inputs.shape[:3]:
        raise ValueError(f"Taps: layer {name!r} has no data: inputs have shape {inputs.shape}.")
    weights = tap.weights
    sizes = inputs.shape[:3]
    if weights is not None and jnp.shape(weights) not in (sizes, sizes[1:], sizes[1:2]):
        raise ValueError(
            f"Taps: layer {name!r} has weights of shape {jnp.shape(weights)}; expected one for "
            f"each of {sizes[1]} data, or for each of their {sizes[2]} positions too, and of "
            f"{sizes[0]} blocks."
        )
    return Tap(inputs, grads, None if weights is None else jnp.asarray(weights))


def _flatten(taps):
    return [(jax.tree_util.DictKey(name), taps[name]) for name in sorted(taps)], tuple(sorted(taps))


def _unflatten(names, children):
    taps = Taps({})
    taps.update(zip(names, children, strict=True))
    return taps


jax.tree_util.register_pytree_with_keys(Taps, _flatten, _unflatten)
