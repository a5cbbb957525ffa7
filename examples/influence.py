"""Influence functions: which training images help a prediction most, and which hurt it.

To first order, leaving out training image i of N changes the loss of a test image by 1/N times
`∇test · (H + λI)⁻¹ ∇i`. Here H is the curvature of the training loss as `ok.operators.ekfac` sees
it, and its damping λ is the weight decay. To see that it is so, the net is trained anew without the
ten images that help a prediction most, and without those that hurt it most;
`benchmarks/influence_retraining.py` leaves out random groups too.

    python examples/influence.py --help
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import make_parser, save
from data import TRAIN_IMAGES, load_data
from flax import linen as nn
from matplotlib.figure import Figure

import optax_kron as ok

DECAY = 1e-2  # strong, since a flat minimum moves far for small reasons


class Net(nn.Module):
    """A hidden layer of tanh units, then a linear readout."""

    @nn.compact
    def __call__(self, images):
        """Maps images [batch, 8, 8, 1] to logits [batch, 10]."""
        x = nn.tanh(nn.Dense(32)(images.reshape(images.shape[0], -1)))
        return nn.Dense(10)(x)


def losses_of(params, images, labels):
    """Returns the cross-entropy of every image, [batch]."""
    logits = Net().apply(params, images)
    return ok.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


def loss_fn(params, weights, images, labels):
    """Returns the mean cross-entropy; an image of weight 0 is left out."""
    return jnp.mean(weights * losses_of(params, images, labels))


def choose(params, images, labels) -> list[int]:
    """Returns the wrong and the right predictions of most loss, two of each, of four digits."""
    right = Net().apply(params, images).argmax(axis=-1) == labels
    losses, chosen = losses_of(params, images, labels), []
    for wanted in (False, False, True, True):
        new = ~np.isin(labels, labels[chosen])
        chosen.append(int(np.where(new & (right == wanted), losses, -1).argmax()))
    return chosen


def draw(axes, image, text: str, colour: str) -> None:
    """Draws a digit in a frame."""
    axes.imshow(image[..., 0], cmap="gray_r")
    axes.set(xticks=[], yticks=[])
    axes.set_title(text, fontsize=10, color=colour)
    axes.spines[:].set(color=colour, linewidth=2)


def main() -> None:
    """Trains, scores, trains again without some images, and draws them."""
    arguments = make_parser(__doc__, steps=300, out="influence.png").parse_args()
    data, everything = load_data(), jnp.ones(TRAIN_IMAGES)
    images, labels = jax.device_put((data.train_images, data.train_labels))
    initial = jax.jit(Net().init)(jax.random.key(arguments.seed), images[:1])
    layers = ok.find_layers(loss_fn, initial, everything, images, labels)
    with_taps = ok.value_and_grad_with_taps(loss_fn, layers, fisher="exact")
    kfac = ok.kfac(0.1, layers=layers, damping=DECAY)
    optimizer = optax.chain(optax.add_decayed_weights(DECAY), kfac)

    @jax.jit
    def step(params, state, weights, images, labels):
        _, grads, taps = with_taps(params, weights, images, labels)
        updates, state = optimizer.update(grads, state, params, taps=taps)
        slope = optax.tree.norm(optax.tree.add_scale(grads, DECAY, params))
        return optax.apply_updates(params, updates), state, slope

    def train(weights):
        params, state = initial, jax.jit(optimizer.init)(initial)
        for _ in range(arguments.steps):
            params, state, slope = step(params, state, weights, images, labels)
        print(f"trained with {weights.sum():.0f} images; norm of the gradient {slope:.0e}")
        return params

    @jax.jit
    def effects_on(test, params, images, labels):
        _, _, taps = with_taps(params, everything, images, labels)
        inverse = ok.operators.ekfac(taps, layers).inverse(DECAY)
        direction = inverse @ jax.grad(loss_fn)(params, 1.0, *test)
        # The derivative of every training loss along the direction: a product with each gradient.
        _, slopes = jax.jvp(lambda p: losses_of(p, images, labels), (params,), (direction,))
        return -slopes / len(labels)

    params, evaluate = train(everything), jax.jit(loss_fn)
    figure = Figure(figsize=(15, 7.4), dpi=110, layout="constrained")
    tests = choose(params, data.test_images, data.test_labels)
    for row, chosen in zip(figure.subplots(4, 11), tests, strict=True):
        test = data.test_images[chosen, None], data.test_labels[chosen, None]
        effects = effects_on(test, params, images, labels)
        order = np.argsort(effects)
        others = [train(everything.at[some].set(0)) for some in (order[:10], order[-10:])]
        loss, worse, better = (evaluate(p, 1.0, *test) for p in (params, *others))
        name = f"a {test[1][0]}, predicted {Net().apply(params, test[0]).argmax()}"
        print(f"{name}: loss {loss:.2f}, without those that help {worse:.2f}, hurt {better:.2f}")

        draw(row[0], test[0][0], f"{name}\nloss {loss:.2f}", "#222222")
        for axes, i in zip(row[1:], [*order[:5], *order[:-6:-1]], strict=True):
            colour = "#2e8b57" if effects[i] < 0 else "#b5332e"
            draw(axes, images[i], f"a {labels[i]}:  {effects[i]:+.3f}", colour)
    figure.suptitle("Images that help (green) or hurt (red) a prediction most: effects on its loss")
    save(figure, arguments.out)


if __name__ == "__main__":
    main()
