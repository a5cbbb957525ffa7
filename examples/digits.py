"""kron_psgd in the place of AdamW: a small convolutional net on real images of digits.

The two runs differ in the optimizer alone: weights, batches and the cosine schedule are the same,
and each has the best of three peak learning rates. The training loss is taken over all training
images, the accuracy over 500 images that are never trained on. `make demo` trains with all rates,
and tells times and memory too.

    python examples/digits.py --help
"""

import argparse

import flax.linen as nn
import jax
import optax
from common import add_batch_size, add_optimizer, make_parser, save_curves
from data import batch_order, load_data

import optax_kron as ok


class ConvNet(nn.Module):
    """Three 3x3 convolutions, the last two halving the image, then a linear readout."""

    @nn.compact
    def __call__(self, images):
        """Maps images [batch, 8, 8, 1] to logits [batch, 10]."""
        x = nn.tanh(nn.Conv(32, (3, 3))(images))
        x = nn.tanh(nn.Conv(32, (3, 3), strides=2)(x))
        x = nn.tanh(nn.Conv(32, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def loss_fn(params, images, labels):
    """Returns the mean cross-entropy, from `ok.losses` so that digits_kfac.py can use it too."""
    logits = ConvNet().apply(params, images)
    return ok.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def accuracy(params, images, labels):
    """Returns the share of images that are labelled rightly."""
    return (ConvNet().apply(params, images).argmax(axis=-1) == labels).mean()


def make_optimizers(steps: int, seed: int) -> dict[str, optax.GradientTransformation]:
    """Returns both optimizers; without a learning rate kron_psgd is chained like Optax's own."""
    schedule = optax.cosine_decay_schedule(1e-2, steps)
    return {
        "adamw": optax.adamw(optax.cosine_decay_schedule(3e-2, steps)),
        "kron_psgd": optax.chain(ok.kron_psgd(seed=seed), optax.scale_by_learning_rate(schedule)),
    }


def train(name: str, optimizer: optax.GradientTransformation, arguments: argparse.Namespace):
    """Trains from scratch and returns the curve of the training loss."""
    data = jax.device_put(load_data())
    order = batch_order(
        len(data.train_labels), arguments.batch_size, arguments.steps, arguments.seed
    )
    params = jax.jit(ConvNet().init)(jax.random.key(arguments.seed), data.train_images[:1])
    state = jax.jit(optimizer.init)(params)

    @jax.jit
    def step(params, state, images, labels):
        grads = jax.grad(loss_fn)(params, images, labels)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    evaluate, curve = jax.jit(loss_fn), []
    for i, batch in enumerate(order, start=1):
        images, labels = data.train_images[batch], data.train_labels[batch]
        params, state = step(params, state, images, labels)
        if i % 10 == 0 or i == arguments.steps:
            loss = float(evaluate(params, data.train_images, data.train_labels))
            right = accuracy(params, data.test_images, data.test_labels)
            print(f"{name:10} step {i:4}  training loss {loss:.1e}  test accuracy {right:.1%}")
            curve.append((i, loss))
    return curve


def main() -> None:
    """Trains with both and draws the curves."""
    parser = make_parser(__doc__, steps=200, out="digits.png")
    add_optimizer(parser, ("adamw", "kron_psgd"))
    add_batch_size(parser)
    arguments = parser.parse_args()
    optimizers = make_optimizers(arguments.steps, arguments.seed)
    curves = {
        name: train(name, optimizer, arguments)
        for name, optimizer in optimizers.items()
        if arguments.optimizer in (name, "all")
    }
    save_curves(arguments.out, "Digits: a small convolutional net", curves)


if __name__ == "__main__":
    main()
