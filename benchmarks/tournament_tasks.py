"""The tasks of tournaments: models, losses and data are those of the examples."""

import dataclasses
from functools import partial

import jax
from tournament_runs import Metric, Runs, Task, best_of

from examples import autoencoder, characters, data, digits, state_space

LOSS = Metric("training loss", "final\nloss", "{:.1e}")
ACCURACY = Metric("test accuracy", "final\naccuracy", "{:.1%}", limits=(0.9, 1.0), percent=True)


def convolutional_task(arguments) -> Task:
    """Minibatches of the training digits, for a small convolutional net."""
    return digits_task(
        arguments, digits.ConvNet(), digits.loss_fn, "Digits: a small convolutional net"
    )


def digits_task(arguments, net, loss_fn, title, accuracy=ACCURACY, goal=0.97) -> Task:
    """Minibatches of the training digits; `goal` is the accuracy whose time is told."""
    images = data.load_data()
    order = data.batch_order(
        len(images.train_labels), arguments.batch_size, arguments.steps, arguments.seed
    )
    images, order = jax.device_put((images, order))

    def evaluate(params):
        predictions = net.apply(params, images.test_images).argmax(axis=-1)
        loss = loss_fn(params, images.train_images, images.train_labels)
        return loss, (predictions == images.test_labels).mean()

    return Task(
        title=title,
        init=lambda: net.init(jax.random.key(arguments.seed), images.train_images[:1]),
        loss_fn=loss_fn,
        batch=lambda i: (images.train_images[order[i]], images.train_labels[order[i]]),
        evaluate=evaluate,
        metrics=(LOSS, accuracy),
        target=(f"{goal:.0%}", lambda values: values[1] >= goal),
        steps=arguments.steps,
        seed=arguments.seed,
    )


def state_space_task(arguments) -> Task:
    """The digits, read row by row."""
    title = "Digits, row by row: a state-space model"
    accuracy = dataclasses.replace(ACCURACY, limits=(0, 1))
    return digits_task(
        arguments, state_space.StateSpace(), state_space.loss_fn, title, accuracy, goal=0.9
    )


def autoencoder_task(arguments) -> Task:
    """All images of digits at every step."""
    images = autoencoder.load_images()
    entropy = autoencoder.entropy(images)
    print(f"entropy of the images, below which no loss falls: {entropy:.2f}")
    key = jax.random.key(arguments.seed)
    return Task(
        title="Digits autoencoder with eight numbers in the middle",
        init=lambda: autoencoder.Autoencoder().init(key, images[:1]),
        loss_fn=autoencoder.loss_fn,
        batch=lambda i: (images,),
        evaluate=lambda params: (autoencoder.loss_fn(params, images),),
        metrics=(Metric("training loss", "final\nloss", "{:.2f}", limits=(14, 30)),),
        target=("17.5", lambda values: values[0] <= 17.5),
        steps=arguments.steps,
        seed=arguments.seed,
        scale="linear",
        panel=partial(draw_reconstructions, images),
    )


def draw_reconstructions(images, axes, runs: Runs) -> None:
    """Draws some images above what the best run of each optimizer leaves of them."""
    trained = {name: best_of(group).params for name, group in runs.items()}
    autoencoder.draw_images(axes, images, trained)


def characters_task(arguments) -> Task:
    """Random windows of the standard library."""
    windows, seen, unseen = characters.load_windows(arguments.steps, arguments.seed)
    key, loss_fn = jax.random.key(arguments.seed), characters.loss_fn
    return Task(
        title="Characters of the Python standard library: a small transformer",
        init=lambda: characters.Transformer().init(key, windows[0, :, :-1]),
        loss_fn=loss_fn,
        batch=lambda i: (windows[i],),
        evaluate=lambda params: (loss_fn(params, seen), loss_fn(params, unseen)),
        metrics=(
            Metric("training loss", "final\nloss", "{:.3f}", limits=(1.9, 3.3)),
            Metric("held-out loss", "held-out\nloss", "{:.3f}", limits=(1.9, 3.3)),
        ),
        target=("2.5", lambda values: values[0] <= 2.5),
        steps=arguments.steps,
        seed=arguments.seed,
        scale="linear",
    )
