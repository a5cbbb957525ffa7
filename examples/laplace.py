"""Laplace approximation: how sure a net may be, from the curvature of its loss.

At the MAP estimate the loss is taken for a parabola: N times `ok.operators.ekfac` of the mean loss,
plus the precision of the prior (of greatest evidence) as damping, is the precision of a normal
posterior. Predictions are means over samples of the weights, of the linearised net: nearly as often
right as they are sure. `benchmarks/laplace_calibration.py` measures more.

    python examples/laplace.py --help
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import calibration, draw_reliability, image_count, make_parser, positive_integer, save
from data import disturbed, load_data
from matplotlib.figure import Figure

import optax_kron as ok

DEGREES = 30.0  # of disturbance
PRECISIONS = np.logspace(-2, 3, 41)  # of the prior, of which evidence chooses; in training it is 1


class Net(nn.Module):
    """Two hidden layers of 128 units, then a linear readout."""

    @nn.compact
    def __call__(self, images):
        """Maps images [batch, 8, 8, 1] to logits [batch, 10]."""
        x = nn.tanh(nn.Dense(128)(images.reshape(images.shape[0], -1)))
        return nn.Dense(10, name="readout")(nn.tanh(nn.Dense(128)(x)))


def loss_fn(params, images, labels):
    """Returns the mean cross-entropy."""
    logits = Net().apply(params, images)
    return ok.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(images, labels, steps: int, key):
    """Returns the MAP estimate: K-FAC on all images at once, the prior as weight decay."""
    params, decay = jax.jit(Net().init)(key, images[:1]), 1 / len(labels)
    layers = ok.find_layers(loss_fn, params, images, labels)
    kfac = ok.kfac(optax.cosine_decay_schedule(0.1, steps), layers=layers, damping=decay)
    optimizer = optax.chain(optax.add_decayed_weights(decay), kfac)
    with_taps, state = ok.value_and_grad_with_taps(loss_fn, layers), jax.jit(optimizer.init)(params)

    @jax.jit
    def step(params, state, images, labels, key):
        _, grads, taps = with_taps(params, images, labels, key=key)
        updates, state = optimizer.update(grads, state, params, taps=taps)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        params, state = step(params, state, images, labels, jax.random.fold_in(key, i))
    return params


def fit(loss_fn, params, images, labels):
    """Returns the curvature of the summed loss, the precision of the prior, and its evidence."""
    layers = ok.find_layers(loss_fn, params, images, labels)
    with_taps = ok.value_and_grad_with_taps(loss_fn, layers, fisher="exact")

    @jax.jit
    def approximate(params, images, labels):
        loss, _, taps = with_taps(params, images, labels)
        curvature = len(labels) * ok.operators.ekfac(taps, layers)

        def evidence(precision):
            prior = curvature.size * jnp.log(precision) - precision * optax.tree.norm(params) ** 2
            return -len(labels) * loss + (prior + curvature.inverse(precision).logdet()) / 2

        return curvature, jax.vmap(evidence)(PRECISIONS)

    curvature, evidence = approximate(params, images, labels)
    return curvature, PRECISIONS[evidence.argmax()], evidence.max()


@partial(jax.jit, static_argnums=0)
def predict(logits_fn, params, curvature, precision, images, keys):
    """Returns the mean of probabilities over samples of the weights, a key for each."""
    logits, change = jax.linearize(lambda p: logits_fn(p, images), params)
    changes = jax.lax.map(lambda key: change(curvature.sample(key, precision)), keys)
    return jax.nn.softmax(logits + changes).mean(axis=0)


def main() -> None:
    """Trains, fits the posterior and compares predictions with and without it."""
    parser = make_parser(__doc__, steps=300, out="laplace.png")
    parser.add_argument("--images", type=image_count, default=300, help="that are trained on")
    parser.add_argument("--samples", type=positive_integer, default=200, help="of the weights")
    arguments = parser.parse_args()
    data, key = load_data(), jax.random.key(arguments.seed)
    images = disturbed(data.train_images[: arguments.images], DEGREES, arguments.seed)
    labels = data.train_labels[: arguments.images]
    params = train(images, labels, arguments.steps, key)
    curvature, precision, _ = fit(loss_fn, params, images, labels)
    keys = jax.random.split(key, arguments.samples)
    tests = disturbed(np.tile(data.test_images, (4, 1, 1, 1)), DEGREES, arguments.seed + 1)
    predictions = {
        "MAP": jax.nn.softmax(jax.jit(Net().apply)(params, tests)),
        "Laplace": predict(Net().apply, params, curvature, precision, tests, keys),
    }
    figure = Figure(figsize=(10, 4.8), dpi=130, layout="constrained")
    print("          accuracy  confidence       nll  calibration error")
    for axes, (name, found) in zip(figure.subplots(1, 2), predictions.items(), strict=True):
        measured = calibration(np.asarray(found), np.tile(data.test_labels, 4))
        accuracy, confidence, nll, error, _ = measured
        print(f"{name:8}  {accuracy:8.1%}  {confidence:10.1%}  {nll:8.3f}  {error:17.3f}")
        draw_reliability(axes, name, measured)
    save(figure, arguments.out)


if __name__ == "__main__":
    main()
