"""branch_kfac on a state-space model: the samples of the state are the model's own hidden states.

An image of a digit is read row by row, as eight steps of a sequence. A state of 16 dimensions takes
in each row, `h ← tanh(A h + B u + c)`, and the last one is read out. At every step of training
branch_kfac gets the states of the batch at all times, which the capture of layers finds as what
goes into `A`. Beside it are gradient descent, which it becomes without a state, and AdamW. The map
from the state to the parameters is drawn anew at each step, so that in the mean branch_kfac is
gradient descent with a rate of its own; the example shows what the noise of that costs.

    python examples/state_space.py --help
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from common import add_batch_size, add_optimizer, make_parser, save_curves
from data import Digits, batch_order, load_data

import optax_kron as ok

STATE = 16
OPTIMIZERS = {
    "adamw": lambda rate: optax.with_extra_args_support(optax.adamw(rate(3e-2))),
    "sgd": lambda rate: optax.with_extra_args_support(optax.sgd(rate(1.0))),
    "branch_kfac": lambda rate: ok.branch_kfac(rate(3e-2), damping=0.1, blocks=4, clip=10.0),
}


class StateSpace(nn.Module):
    """A recurrent net whose state follows the rows of an image."""

    @nn.compact
    def __call__(self, images):
        """Maps images [batch, 8, 8, 1] to logits [batch, 10]."""
        recurrent, drive = nn.Dense(STATE, name="recurrent"), nn.Dense(STATE, name="drive")
        state = jnp.zeros((len(images), STATE))
        for row in range(images.shape[1]):
            state = nn.tanh(recurrent(state) + drive(images[:, row, :, 0]))
        return nn.Dense(10, name="readout")(state)


def loss_fn(params, images, labels):
    """Returns the mean cross-entropy of the model's predictions."""
    logits = StateSpace().apply(params, images)
    return ok.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def evaluate(params, data: Digits):
    """Returns the loss of all training images, and the accuracy on the test images."""
    predictions = StateSpace().apply(params, data.test_images).argmax(axis=-1)
    loss = loss_fn(params, data.train_images, data.train_labels)
    return loss, (predictions == data.test_labels).mean()


def train(name: str, params, data: Digits, order, key):
    """Trains, printing its progress, and returns the curve of the training loss."""
    optimizer = OPTIMIZERS[name](lambda peak: optax.cosine_decay_schedule(peak, len(order)))
    first = order[0]
    layers = ok.find_layers(loss_fn, params, data.train_images[first], data.train_labels[first])
    (recurrent,) = [layer for layer in layers if "recurrent" in layer.name]
    with_taps = ok.value_and_grad_with_taps(loss_fn, [recurrent])
    state = jax.jit(optimizer.init)(params)

    @jax.jit
    def step(params, state, images, labels, key):
        _, grads, taps = with_taps(params, images, labels, key=key)
        (tap,) = taps[recurrent.name]
        states = tap.inputs[0, ..., :STATE].reshape(-1, STATE)  # of every image at every row
        updates, state = optimizer.update(grads, state, params, branches=states)
        return optax.apply_updates(params, updates), state

    curve = []
    for i, batch in enumerate(order):
        images, labels = data.train_images[batch], data.train_labels[batch]
        params, state = step(params, state, images, labels, jax.random.fold_in(key, i))
        if (i + 1) % 50 == 0 or i + 1 == len(order):
            loss, right = map(float, evaluate(params, data))
            print(f"{name:11} step {i + 1:4}  training loss {loss:.1e}  test accuracy {right:.1%}")
            curve.append((i + 1, loss))
    return curve


def main() -> None:
    """Trains with each optimizer and draws the losses."""
    parser = make_parser(__doc__, steps=1000, out="state_space.png")
    add_optimizer(parser, OPTIMIZERS)
    add_batch_size(parser)
    arguments = parser.parse_args()
    steps, key = arguments.steps, jax.random.key(arguments.seed)
    data = jax.device_put(load_data())
    order = batch_order(len(data.train_labels), arguments.batch_size, steps, arguments.seed)
    params = jax.jit(StateSpace().init)(key, data.train_images[:1])
    curves = {
        name: train(name, params, data, order, key)
        for name in OPTIMIZERS
        if arguments.optimizer in (name, "all")
    }
    save_curves(arguments.out, "Digits, row by row: a state-space model", curves)


if __name__ == "__main__":
    main()
