"""A program of a user's own, which the installed wheel runs and a strict type checker reads.

It trains one net with three optimizers, and takes its loss from `optax_kron.losses`. No value that
it gets from the library may be of an unknown type.
"""

from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import optax

import optax_kron as ok

STEPS = 5
Args = ParamSpec("Args")
Result = TypeVar("Result")


class Dense(NamedTuple):
    """Parameters of one layer."""

    kernel: jax.Array  # [d_in, d_out]
    bias: jax.Array  # [d_out]


Params = dict[str, Dense]


# JAX's own functions that take a device are of a partly unknown type; these two say what it is.
def zeros(size: int) -> jax.Array:
    """Returns zeros [size]."""
    return jnp.zeros(size)  # pyright: ignore[reportUnknownMemberType]


def compiled(function: Callable[Args, Result]) -> Callable[Args, Result]:
    """Returns a function that runs as one program, of the same type."""
    program: Callable[Args, Result] = jax.jit(function)  # pyright: ignore[reportUnknownMemberType]
    return program


def make_params() -> Params:
    """Returns a net of 8 inputs, 16 hidden units and 4 classes."""
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "hidden": Dense(jax.random.normal(keys[0], (8, 16)) / 8**0.5, zeros(16)),
        "readout": Dense(jax.random.normal(keys[1], (16, 4)) / 4, zeros(4)),
    }


def loss_fn(params: Params, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy."""
    hidden = jnp.tanh(inputs @ params["hidden"].kernel + params["hidden"].bias)
    logits = hidden @ params["readout"].kernel + params["readout"].bias
    return ok.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_data(seed: int) -> tuple[jax.Array, jax.Array]:
    """Returns inputs [64, 8], and as the label the largest of the first four."""
    inputs = jax.random.normal(jax.random.key(seed), (64, 8))
    return inputs, jnp.argmax(inputs[:, :4], axis=-1)


def train(optimizer: optax.GradientTransformationExtraArgs, layers: ok.Layers) -> list[float]:
    """Returns the loss before each step; optimizers that need no taps ignore them."""
    inputs, labels = make_data(1)
    with_taps = ok.value_and_grad_with_taps(loss_fn, layers)

    @compiled
    def step(
        params: Params, state: optax.OptState, key: jax.Array
    ) -> tuple[Params, optax.OptState, jax.Array]:
        loss, grads, taps = with_taps(params, inputs, labels, key=key)
        updates, state = optimizer.update(grads, state, params, taps=taps)
        new_params: Params = optax.tree.add(params, updates)
        return new_params, state, loss

    params = make_params()
    state = optimizer.init(params)
    losses: list[float] = []
    for i in range(STEPS):
        params, state, loss = step(params, state, jax.random.fold_in(jax.random.key(2), i))
        losses.append(float(loss))
    return losses


def draw_weights(layers: ok.Layers) -> Params:
    """Returns a draw from the Laplace approximation."""
    with_taps = ok.value_and_grad_with_taps(loss_fn, layers, fisher="exact")

    @compiled
    def curvature_of(params: Params, inputs: jax.Array, labels: jax.Array) -> ok.operators.Operator:
        _, _, taps = with_taps(params, inputs, labels)
        return ok.operators.kfac(taps, layers)

    return curvature_of(make_params(), *make_data(3)).sample(jax.random.key(4), damping=1e-2)


def main() -> None:
    """Trains with each optimizer, and prints its losses."""
    layers = ok.find_layers(loss_fn, make_params(), *make_data(1))
    print(layers)
    optimizers: dict[str, optax.GradientTransformationExtraArgs] = {
        "kron_psgd": ok.kron_psgd(1e-2, blocking=ok.Blocking(max_size=1024)),
        "kfac": ok.kfac(0.1, layers=layers, damping=1e-2),
        "soap": ok.soap(optax.cosine_decay_schedule(1e-2, STEPS)),
    }
    for name, optimizer in optimizers.items():
        losses = train(optimizer, layers)
        print(f"{name:9} loss {losses[0]:.3f} to {losses[-1]:.3f}")
        if not losses[-1] < losses[0]:
            raise SystemExit(f"{name} did not lower the loss in {STEPS} steps: {losses}")
    weights = draw_weights(layers)
    print({name: (layer.kernel.shape, layer.bias.shape) for name, layer in weights.items()})


if __name__ == "__main__":
    main()
