"""What layers saw: inputs and output-gradients, as pytrees."""

# Worked example. A network of two dense layers, w [3, 4] and v [4, 2] with a bias [2], and the mean
# loss of 7 examples, gives with fisher="exact", whose columns V are as many as there are outputs:
#
#   taps["w"] = (Tap(inputs [1, 7, 1, 3], output_grads [2, 1, 7, 1, 4], weights [7]),)
#   taps["v"] = (Tap(inputs [1, 7, 1, 5], output_grads [2, 1, 7, 1, 2], weights [7]),)
#
# with one group each, as both are applied to one batch. The curvature that a tap stands for is
# Σ_v Σ_n vec(M) vec(M)ᵀ / N of M = Σ_s a gᵀ, the gradient of one example and one column.

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Inexact, Int

from optax_kron.kernels import contract
from optax_kron.types import PyTree


class Tap(NamedTuple):
    """What one layer saw of one batch of N examples.

    By hand, `Tap(inputs, output_grads)` with [N, d_in] and [N, d_out] will do; `Taps` brings them
    to canonical form. An example that shall not count has a weight of zero and output-gradients of
    zero.

    Attributes:
      inputs: [B, N, S, d_in], of B blocks at S positions; a bias's ones are the last column. Of an
        embedding, integer indices [B, N, S, 1].
      output_grads: [V, B, N, S, d_out], gradients of each example's own loss with respect to the
        outputs, in V columns whose outer products add up to the curvature. V = 0: the output factor
        is the identity.
      weights: ≥ 0, how much each example counts in the input factor [N]; or each of its positions
        [N, S]; or each of those in each block [B, N, S]. `None`: all count the same.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> taps = ok.Taps({"dense": ok.Tap(jnp.ones((5, 3)), jnp.ones((5, 2)))})
      >>> taps["dense"][0].output_grads.shape
      (1, 1, 5, 1, 2)
    """

    inputs: Float[Array, "B N S d_in"] | Int[Array, "B N S 1"]
    output_grads: Float[Array, "V B N S d_out"]
    weights: Float[Array, "..."] | None = None


class Moments(NamedTuple):
    """Second moments of what one layer saw of one batch: all that "expand" needs of a `Tap`.

    `ok.value_and_grad_with_taps(..., reduce=True)` returns them in place of taps: of a size that
    does not grow with the batch. Those of several batches of one size may be averaged, like
    gradients. Where a layer has a diagonal factor, as embeddings and wide axes have, a moment is
    its diagonal alone.

    Attributes:
      input_factor: A, the mean of `a aᵀ` over examples and positions by their weights,
        [B, d_in, d_in] or [B, d_in].
      output_factor: G, the sum of `g gᵀ` over columns and positions and its mean over examples,
        [B, d_out, d_out] or [B, d_out].
      weight: The total weight `Σ_n w_n` of the examples in the loss, [B] or []; 0 if none counted,
        N·S if the tap has no weights. A is averaged by it with other groups and devices.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> def loss_fn(w, x, y):
      ...     return jnp.mean(ok.losses.l2_loss(x @ w, y))
      >>> w, x, y = jnp.ones((3, 2)), jnp.ones((7, 3)), jnp.zeros((7, 2))
      >>> layers = ok.find_layers(loss_fn, w, x, y)
      >>> fn = ok.value_and_grad_with_taps(loss_fn, layers, reduce=True)
      >>> loss, grads, taps = fn(w, x, y, key=jax.random.key(0))
      >>> (moments,) = taps[layers[0].name]
      >>> moments.input_factor.shape, moments.output_factor.shape
      ((1, 3, 3), (1, 2, 2))
    """

    input_factor: Float[Array, "B d_in ..."]
    output_factor: Float[Array, "B d_out ..."]
    weight: Float[Array, "*B"]


class Taps(dict[str, tuple[Tap | Moments, ...]]):
    """Taps of all layers: from a layer's name to a tuple of groups, one for each batch it saw.

    A group is a `Tap`, or its `Moments`. Most layers have one; a parameter that one loss applies to
    two batches of different sizes has two.

    What is done to gradients between the loss and the optimizer has to be done to taps too: see
    `unscale` and `pmean`.

    Args:
      taps: A mapping from names to a group, or to a sequence of groups.
      gradient_norms: By name, the sum of the magnitudes of the gradient that the taps were made
        beside. So an optimizer notices gradients of another scale. By hand it may be left out.
      fisher: The estimate of the Fisher information that they were made with, if known.

    Raises:
      ValueError: For arrays whose shapes do not fit, by name.

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
        gradient_norms: Mapping[str, Float[Array, ""]] | None = None,
        fisher: str | None = None,
    ):
        super().__init__(
            {
                name: tuple(canonical(name, tap) for tap in _sequence(given))
                for name, given in taps.items()
            }
        )
        self.gradient_norms: dict[str, Float[Array, ""]] = dict(gradient_norms or {})
        self.fisher = fisher

    def unscale(self, loss_scale: ArrayLike) -> "Taps":
        """The taps of a loss from those of the loss times a number.

        For gradients of low precision the loss is scaled up, and the gradients are divided by the
        scale; then so must be the curvature. Output-gradients are divided by the square root of the
        scale, as their products are curvatures; weights and second moments of output-gradients by
        the scale. Taps by hand have whatever scale they were given: this is right for those whose
        outer products grow with the loss.

        Args:
          loss_scale: The number, > 0; it may be traced.

        Returns:
          Taps, at least float32.

        Raises:
          ValueError: For a scale that is not one positive number.

        Examples:
          >>> import jax.numpy as jnp
          >>> import optax_kron as ok
          >>> taps = ok.Taps({"dense": ok.Tap(jnp.ones((5, 3)), 8 * jnp.ones((5, 2)))})
          >>> float(taps.unscale(64.0)["dense"][0].output_grads[0, 0, 0, 0, 0])
          1.0
        """
        _check_scale(loss_scale)

        def over(x: Array, divisor: Array) -> Array:
            x = contract.widen(x)
            return x / divisor.astype(x.dtype)

        scale = jnp.asarray(loss_scale).astype(float)

        def unscaled(tap: Tap | Moments) -> Tap | Moments:
            if isinstance(tap, Tap):
                weights = None if tap.weights is None else over(tap.weights, scale)
                return Tap(tap.inputs, over(tap.output_grads, jnp.sqrt(scale)), weights)
            # Without columns the output factor is the identity, whatever the loss.
            of_output = jnp.ones_like(scale) if self.fisher == "forward" else scale
            output_factor = over(tap.output_factor, of_output)
            return Moments(tap.input_factor, output_factor, over(tap.weight, scale))

        return self._changed(unscaled, lambda norm: over(norm, scale))

    def pmean(self, axis_name: Hashable) -> "Taps":
        """The taps of the mean of the losses of all devices; inside `shard_map`, `pmap` or `vmap`.

        It goes with `jax.lax.pmean` of the gradients. Second moments are averaged: input factors by
        the total weight of the examples on each device, output factors plainly. Taps that hold each
        example are gathered, so that every device has those of all: for `ok.kfac` make second
        moments, with reduce=True.

        Args:
          axis_name: Name of the axis of devices, or a tuple of names.

        Returns:
          Taps, equal on all devices.

        Examples:
          >>> import jax
          >>> import jax.numpy as jnp
          >>> import optax_kron as ok
          >>> taps = ok.Taps({"dense": ok.Tap(jnp.ones((6, 3)), jnp.ones((6, 2)))})
          >>> halves = jax.tree.map(lambda x: jnp.stack(jnp.split(x, 2, axis=-3)), taps)
          >>> both = jax.vmap(lambda t: t.pmean("devices"), axis_name="devices")(halves)
          >>> both["dense"][0].inputs.shape  # the first axis is that of the devices
          (2, 1, 6, 1, 3)
        """

        def mean(x: Array) -> Array:
            return jax.lax.pmean(x, axis_name)

        def gathered(x: Array, axis: int) -> Array:
            # As a sum, which is known to be equal on all devices; gathering is not.
            devices = jax.lax.psum(1, axis_name)
            placed = jnp.zeros((devices, *x.shape), x.dtype)
            placed = placed.at[jax.lax.axis_index(axis_name)].set(x)
            together = jnp.moveaxis(jax.lax.psum(placed, axis_name), 0, axis)
            return together.reshape(*x.shape[:axis], devices * x.shape[axis], *x.shape[axis + 1 :])

        def averaged(tap: Tap | Moments) -> Tap | Moments:
            if isinstance(tap, Tap):
                weights = tap.weights
                if weights is not None:
                    # In the mean of the losses an example counts 1/devices of what it did.
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


def _check_scale(scale: object) -> None:
    if isinstance(scale, jax.core.Tracer):
        is_valid = scale.ndim == 0
    elif isinstance(scale, int | float | np.generic | np.ndarray | jax.Array):
        is_valid = np.ndim(scale) == 0 and not np.iscomplexobj(scale)
        is_valid = is_valid and bool(0 < np.asarray(scale) < float("inf"))
    else:
        is_valid = False
    if not is_valid:
        raise ValueError(f"Taps.unscale: loss_scale must be one number > 0; got {scale!r:.100}.")


def magnitude(gradient: Inexact[Array, "..."]) -> Float[Array, ""]:
    """The sum of the magnitudes of a gradient's entries, at least float32.

    It tells the scale of a gradient, and overflows no sooner than that.
    """
    return jnp.sum(jnp.abs(contract.widen(gradient)))


def _sequence(given: Tap | Moments | Iterable[Tap | Moments]) -> Iterable[Tap | Moments]:
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
    # By hand [N, d] or [N, S, d] will do: one block, one position, one column.
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
            "[B, N, S, d_in] and [V, B, N, S, d_out], with the same blocks, examples and positions."
        )
    if 0 in inputs.shape[:3]:
        raise ValueError(f"Taps: layer {name!r} has no examples: inputs have shape {inputs.shape}.")
    weights = tap.weights
    sizes = inputs.shape[:3]
    if weights is not None and jnp.shape(weights) not in (sizes, sizes[1:], sizes[1:2]):
        raise ValueError(
            f"Taps: layer {name!r} has weights of shape {jnp.shape(weights)}; expected one for "
            f"each of {sizes[1]} examples, or for each of their {sizes[2]} positions too, and of "
            f"{sizes[0]} blocks."
        )
    return Tap(inputs, grads, None if weights is None else jnp.asarray(weights))


def _flatten(taps: Taps):
    # Sorted by name, as dictionaries are: equal taps are equal pytrees, whatever their order.
    children = [(jax.tree_util.DictKey(name), taps[name]) for name in sorted(taps)]
    norms = jax.tree_util.GetAttrKey("gradient_norms"), taps.gradient_norms
    return [*children, norms], (tuple(sorted(taps)), taps.fisher)


def _unflatten(static: tuple[tuple[str, ...], str | None], children: Iterable[PyTree]) -> Taps:
    # Without checks: children may be anything that a transformation puts in place of arrays.
    names, fisher = static
    *groups, norms = children
    taps = Taps({}, fisher=fisher)
    taps.update(zip(names, groups, strict=True))
    taps.gradient_norms = norms
    return taps


jax.tree_util.register_pytree_with_keys(Taps, _flatten, _unflatten)
