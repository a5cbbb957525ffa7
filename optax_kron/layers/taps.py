"""What layers saw: inputs and output-gradients, as pytrees."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from optax_kron.kernels import contract


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

    What is done to gradients between the loss and the optimizer has to be done to taps too: see
    `unscale` and `pmean`.

    Args:
      taps: a mapping from names to a `Tap`, or to a sequence of them.
      gradient_norms: by name, the sum of the magnitudes of the gradient that the taps were made
        beside. So an optimizer notices gradients of another scale. By hand it may be left out.
      fisher: the estimate that they were made with, if known.

    Raises:
      ValueError: for arrays whose shapes do not fit, by name.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> taps = ok.Taps({"dense": ok.Tap(jnp.ones((5, 3)), jnp.ones((5, 2)))})
      >>> taps["dense"][0].inputs.shape
      (1, 5, 1, 3)
    """

    def __init__(
        self,
        taps: Mapping[str, Tap | Moments | Iterable[Tap | Moments]],
        *,
        gradient_norms: Mapping[str, Array] | None = None,
        fisher: str | None = None,
    ):
        super().__init__(
            {
                name: tuple(canonical(name, tap) for tap in _sequence(given))
                for name, given in taps.items()
            }
        )
        self.gradient_norms = dict(gradient_norms or {})
        self.fisher = fisher

    def unscale(self, loss_scale: ArrayLike) -> "Taps":
        """The taps of a loss that was multiplied with a number, as those of the loss itself.

        For gradients of low precision the loss is scaled up, and the gradients are divided by the
        scale; then so must be the curvature. Output-gradients are divided by the root of the scale,
        as their products are curvatures; weights and second moments of output-gradients by the
        scale. Taps by hand have whatever scale they were given: this is right for those whose
        outer products grow with the loss.

        Args:
          loss_scale: the number, > 0; it may be traced.

        Returns:
          Taps, at least float32.

        Raises:
          ValueError: for a scale that is not one positive number.

        Examples:
          >>> import jax.numpy as jnp
          >>> import optax_kron as ok
          >>> taps = ok.Taps({"dense": ok.Tap(jnp.ones((5, 3)), 8 * jnp.ones((5, 2)))})
          >>> float(taps.unscale(64.0)["dense"][0].output_grads[0, 0, 0, 0, 0])
          1.0
        """
        _check_scale(loss_scale)

        def over(x: Array, scale: Array) -> Array:
            x = contract.widen(x)
            return x / scale.astype(x.dtype)

        scale = jnp.asarray(loss_scale).astype(float)

        def unscaled(tap: Tap | Moments) -> Tap | Moments:
            if isinstance(tap, Tap):
                weights = None if tap.weights is None else over(tap.weights, scale)
                return Tap(tap.inputs, over(tap.output_grads, jnp.sqrt(scale)), weights)
            # Without columns the output factor is the identity, whatever the loss.
            own = jnp.ones_like(scale) if self.fisher == "forward" else scale
            return Moments(tap.input_factor, over(tap.output_factor, own), over(tap.weight, scale))

        return self._changed(unscaled, lambda norm: over(norm, scale))

    def pmean(self, axis_name: Any) -> "Taps":
        """The taps of the mean of the losses of all devices; inside `shard_map`, `pmap` or `vmap`.

        It goes with `jax.lax.pmean` of the gradients. Second moments are averaged: input factors by
        what the data on each device weigh, output factors plainly. Taps that hold each datum are
        gathered, so that every device has those of all: for `ok.kfac` make second moments, with
        reduce=True.

        Args:
          axis_name: of the axis, or axes, of devices.

        Returns:
          Taps, equal on all devices.
        """

        def mean(x: Array) -> Array:
            return jax.lax.pmean(x, axis_name)

        def gathered(x: Array, axis: int) -> Array:
            # As a sum, which is known to be equal on all devices; gathering is not.
            devices = jax.lax.psum(1, axis_name)
            placed = jnp.zeros((devices, *x.shape), x.dtype)
            placed = placed.at[jax.lax.axis_index(axis_name)].set(x)
            found = jnp.moveaxis(jax.lax.psum(placed, axis_name), 0, axis)
            return found.reshape(*x.shape[:axis], devices * x.shape[axis], *x.shape[axis + 1 :])

        def averaged(tap: Tap | Moments) -> Tap | Moments:
            if isinstance(tap, Tap):
                weights = tap.weights
                if weights is not None:
                    devices = jax.lax.psum(1, axis_name)
                    weights = gathered(weights, 1 if weights.ndim == 3 else 0) / devices
                return Tap(gathered(tap.inputs, 1), gathered(tap.output_grads, 2), weights)
            weight = mean(tap.weight)
            total = jnp.where(weight > 0, weight, 1)
            inputs = mean(contract.scaled_blocks(tap.input_factor, tap.weight / total))
            return Moments(inputs, mean(tap.output_factor), weight)

        return self._changed(averaged, mean)

    def _changed(
        self, of_tap: Callable[[Tap | Moments], Tap | Moments], of_norm: Callable[[Array], Array]
    ) -> "Taps":
        taps = Taps({}, fisher=self.fisher)
        taps.update({name: tuple(map(of_tap, group)) for name, group in self.items()})
        taps.gradient_norms = {name: of_norm(norm) for name, norm in self.gradient_norms.items()}
        return taps


def _check_scale(scale: Any) -> None:
    if isinstance(scale, jax.core.Tracer):
        sound = scale.ndim == 0
    else:
        sound = isinstance(scale, int | float | np.generic | np.ndarray | Array)
        sound = sound and np.ndim(scale) == 0 and not np.iscomplexobj(scale)
        sound = sound and bool(0 < scale < float("inf"))
    if not sound:
        raise ValueError(f"Taps.unscale: loss_scale must be one number > 0; got {scale!r:.100}.")


def magnitude(gradient: Array) -> Array:
    """The sum of the magnitudes of a gradient's entries, [] at least float32.

    It tells the scale of a gradient, and overflows no sooner than that.
    """
    return jnp.sum(jnp.abs(contract.widen(gradient)))


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
    children = [(jax.tree_util.DictKey(name), taps[name]) for name in sorted(taps)]
    norms = jax.tree_util.GetAttrKey("gradient_norms"), taps.gradient_norms
    return [*children, norms], (tuple(sorted(taps)), taps.fisher)


def _unflatten(static, children):
    names, fisher = static
    *groups, norms = children
    taps = Taps({}, fisher=fisher)
    taps.update(zip(names, groups, strict=True))
    taps.gradient_norms = norms
    return taps


jax.tree_util.register_pytree_with_keys(Taps, _flatten, _unflatten)
