"""The digits task in Flax NNX: kron_psgd inside nnx.Optimizer, like any other transformation.

python examples/digits_nnx.py --help
"""

import optax
from common import add_batch_size, make_parser, save_curves
from data import batch_order, load_data
from flax import nnx

import optax_kron as ok


class ConvNet(nnx.Module):
    """Three 3x3 convolutions, the last two halving the image, then a linear readout."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 32, (3, 3), strides=2, rngs=rngs)
        self.conv3 = nnx.Conv(32, 32, (3, 3), strides=2, rngs=rngs)
        self.readout = nnx.Linear(2 * 2 * 32, 10, rngs=rngs)

    def __call__(self, images):
        """Maps images [batch, 8, 8, 1] to logits [batch, 10]."""
        x = nnx.tanh(self.conv1(images))
        x = nnx.tanh(self.conv2(x))
        x = nnx.tanh(self.conv3(x))
        return self.readout(x.reshape(x.shape[0], -1))


def loss_fn(model, images, labels):
    """Returns the mean cross-entropy of the net's predictions."""
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


@nnx.jit
def train_step(model, optimizer, images, labels):
    """Changes model and optimizer in place by one step and returns the loss before it."""
    loss, grads = nnx.value_and_grad(loss_fn)(model, images, labels)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def accuracy_of(model, images, labels):
    """Returns the share of images that the model labels rightly."""
    return (model(images).argmax(axis=-1) == labels).mean()


def main() -> None:
    """Trains, prints the accuracy on images never trained on and draws the loss."""
    parser = make_parser(__doc__, steps=200, out="digits_nnx.png")
    add_batch_size(parser)
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="at the first step")
    arguments = parser.parse_args()
    steps, seed = arguments.steps, arguments.seed
    data = load_data()

    model = ConvNet(nnx.Rngs(seed))
    schedule = optax.cosine_decay_schedule(arguments.learning_rate, steps)
    transform = optax.chain(ok.kron_psgd(seed=seed), optax.scale_by_learning_rate(schedule))
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)

    curve = []
    batches = batch_order(len(data.train_labels), arguments.batch_size, steps, seed)
    for i, batch in enumerate(batches, start=1):
        loss = train_step(model, optimizer, data.train_images[batch], data.train_labels[batch])
        if i % 10 == 0 or i == steps:
            accuracy = accuracy_of(model, data.test_images, data.test_labels)
            print(f"step {i:4}  loss of the batch {loss:.1e}  test accuracy {accuracy:.1%}")
            curve.append((i, float(loss)))

    save_curves(arguments.out, "Digits in Flax NNX", {"kron_psgd": curve})


if __name__ == "__main__":
    main()
