"""AdamW, kron_psgd and K-FAC on a deep autoencoder of digits, a narrow and ill-conditioned problem.

A tanh network squeezes 1797 images of digits through eight numbers. Every step sees all of them.
Each optimizer has the best of three peak rates (`benchmarks/tournament.py autoencoder` runs all).

    python examples/autoencoder.py --help
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import add_optimizer, draw_curves, make_parser, save
from data import load_data
from matplotlib.figure import Figure

import optax_kron as ok

WIDTHS = (256, 128, 32, 8, 32, 128, 256, 64)


class Autoencoder(nn.Module):
    """A dense tanh network whose outputs are the logits of its inputs."""

    @nn.compact
    def __call__(self, images):
        """Maps images [batch, 64] to logits [batch, 64]."""
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        x = images
        for width in WIDTHS[:-1]:
            x = nn.tanh(nn.Dense(width, kernel_init=init)(x))
        return nn.Dense(WIDTHS[-1], kernel_init=init)(x)


def loss_fn(params, images):
    """Returns the cross-entropy of the pixels: summed over an image, averaged over images."""
    logits = Autoencoder().apply(params, images)
    return ok.losses.sigmoid_binary_cross_entropy(logits, images).sum(axis=-1).mean()


def load_images() -> jax.Array:
    """Returns all images of digits as rows, [1797, 64]."""
    data = load_data()
    images = np.concatenate([data.train_images, data.test_images])
    return jax.device_put(images.reshape(-1, 64))


def entropy(images) -> float:
    """Returns the mean entropy of the images."""
    pixels = jnp.clip(images, 1e-6, 1 - 1e-6)
    surprise = pixels * jnp.log(pixels) + (1 - pixels) * jnp.log(1 - pixels)
    return float(-surprise.sum(axis=-1).mean())


def make_optimizers(layers: ok.Layers, steps: int, seed: int):
    """Returns all of them by name, each with its cosine schedule."""
    adamw, psgd, kfac = (optax.cosine_decay_schedule(rate, steps) for rate in (3e-3, 1e-2, 1e-1))
    return {
        "adamw": optax.with_extra_args_support(optax.adamw(adamw)),
        "kron_psgd": ok.kron_psgd(psgd, geometry="QEQ", seed=seed),
        "kfac": ok.kfac(kfac, layers=layers, momentum=0.9, damping=1e-2, refresh_every=5),
    }


def train(optimizer, layers: ok.Layers, params, images, steps: int, key):
    """Returns the parameters after training, and the loss after 0, 1, ... steps."""
    with_taps = ok.value_and_grad_with_taps(loss_fn, layers)
    state = jax.jit(optimizer.init)(params)

    @jax.jit
    def step(params, state, images, key):
        # AdamW and kron_psgd ignore the taps, and XLA leaves out what is not used.
        loss, grads, taps = with_taps(params, images, key=key)
        updates, state = optimizer.update(grads, state, params, taps=taps)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for i in range(steps):
        params, state, loss = step(params, state, images, jax.random.fold_in(key, i))
        losses.append(float(loss))
    return params, [*losses, float(jax.jit(loss_fn)(params, images))]


def draw_images(axes, images, trained) -> None:
    """Draws eight images above what is left of them with the parameters of each optimizer."""
    shown = images[:: len(images) // 8][:8]
    rows = [shown, *(jax.nn.sigmoid(Autoencoder().apply(p, shown)) for p in trained.values())]
    tiles = [np.pad(row.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1))) for row in rows]
    axes.imshow(np.concatenate([np.concatenate([*row], axis=1) for row in tiles]), cmap="gray_r")
    axes.set(xticks=[], title="what is left of eight images")
    axes.set_yticks([10 * i + 4.5 for i in range(len(rows))], ["images", *trained])


def main() -> None:
    """Trains with each optimizer, draws the losses and what is left of some images."""
    parser = make_parser(__doc__, steps=200, out="autoencoder.png")
    add_optimizer(parser, ("adamw", "kron_psgd", "kfac"))
    arguments = parser.parse_args()
    steps, key, images = arguments.steps, jax.random.key(arguments.seed), load_images()
    print(f"entropy of the grey pixels, below which no loss falls: {entropy(images):.2f}")
    initial = jax.jit(Autoencoder().init)(key, images[:1])
    layers = ok.find_layers(loss_fn, initial, images)
    print(layers)
    curves, trained = {}, {}
    for name, optimizer in make_optimizers(layers, steps, arguments.seed).items():
        if arguments.optimizer in (name, "all"):
            trained[name], losses = train(optimizer, layers, initial, images, steps, key)
            print(f"{name:10} loss after {steps} steps: {losses[-1]:.2f}")
            curves[name] = list(enumerate(losses))
    figure = Figure(figsize=(11, 4.5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_curves(left, curves)
    left.set(title="Digits through eight numbers in the middle", ylim=(14, 30))
    draw_images(right, images, trained)
    save(figure, arguments.out)


if __name__ == "__main__":
    main()
