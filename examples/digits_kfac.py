"""K-FAC beside AdamW on the convolutional net of digits.py, whose layers are found in its loss.

K-FAC needs to see what each layer saw. Nothing in the model says so: `find_layers` reads the loss
function, and `value_and_grad_with_taps` returns the gradient together with the taps: the inputs of
every layer, and the gradients with respect to its outputs for labels drawn from the model.

    python examples/digits_kfac.py --help
"""

import jax
import optax
from common import add_batch_size, add_optimizer, make_parser, save_curves
from data import Digits, batch_order, load_data
from digits import ConvNet, accuracy, loss_fn

import optax_kron as ok


def train(optimizer, layers: ok.Layers, params, data: Digits, order, key):
    """Trains, printing its progress, and returns the curve of the training loss."""
    with_taps = ok.value_and_grad_with_taps(loss_fn, layers)
    state = jax.jit(optimizer.init)(params)

    @jax.jit
    def step(params, state, images, labels, key):
        _, grads, taps = with_taps(params, images, labels, key=key)
        # AdamW ignores the taps, and XLA leaves out what is not used.
        updates, state = optimizer.update(grads, state, params, taps=taps)
        return optax.apply_updates(params, updates), state

    evaluate, curve = jax.jit(loss_fn), []
    for i, batch in enumerate(order):
        images, labels = data.train_images[batch], data.train_labels[batch]
        params, state = step(params, state, images, labels, jax.random.fold_in(key, i))
        if (i + 1) % 10 == 0 or i + 1 == len(order):
            loss = float(evaluate(params, data.train_images, data.train_labels))
            right = accuracy(params, data.test_images, data.test_labels)
            print(f"step {i + 1:4}  training loss {loss:.1e}  test accuracy {right:.1%}")
            curve.append((i + 1, loss))
    return curve


def main() -> None:
    """Prints the layers, trains with K-FAC and with AdamW, and draws the losses."""
    parser = make_parser(__doc__, steps=200, out="digits_kfac.png")
    add_optimizer(parser, ("adamw", "kfac"))
    add_batch_size(parser)
    arguments = parser.parse_args()
    steps, key = arguments.steps, jax.random.key(arguments.seed)
    data = jax.device_put(load_data())
    order = batch_order(len(data.train_labels), arguments.batch_size, steps, arguments.seed)
    params = jax.jit(ConvNet().init)(key, data.train_images[:1])

    # One batch shows the shapes; its values serve to check numerically what was found.
    first = order[0]
    layers = ok.find_layers(loss_fn, params, data.train_images[first], data.train_labels[first])
    print(layers)  # the Kronecker block of each parameter, or why it has none

    adamw = optax.adamw(optax.cosine_decay_schedule(3e-2, steps))
    optimizers = {
        "adamw": optax.with_extra_args_support(adamw),
        "kfac": ok.kfac(optax.cosine_decay_schedule(1e-1, steps), layers=layers, damping=1e-3),
    }
    curves = {}
    for name, optimizer in optimizers.items():
        if arguments.optimizer in (name, "all"):
            print(name)
            curves[name] = train(optimizer, layers, params, data, order, key)
    save_curves(arguments.out, "Digits: K-FAC on a small convolutional net", curves)


if __name__ == "__main__":
    main()
