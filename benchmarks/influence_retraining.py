"""Influence scores beside what training without some images does: three kinds of scores.

The net, the images and EKFAC's scores are those of `examples/influence.py`. Beside them are
products of gradients without any curvature, and the exact Gauss-Newton matrix by conjugate
gradients, which EKFAC's inverse preconditions. For random tenths of the training images the net is
trained anew without them, from the optimum of all images, and the changes of four test losses are
compared with what the scores say by rank: 1 is a perfect order. The second table leaves out the ten
images that help, or hurt, a test image most as each kind of scores has it: the further the losses
move, the better the scores. The picture has a point for each group and test image.

All training ends where the gradient is all but zero, whose norms are printed: first K-FAC, then
L-BFGS in coordinates that `inverse_sqrt` makes round. With less weight decay all scores get worse.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from influence_training import Problem, retrain, train
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

import optax_kron as ok
from examples import common, data, influence

RETRAIN_SHARE = 3  # from the optimum of all images to that without some take a third of the steps
SHARE, LEFT_OUT = 0.1, 10  # of the training images in a random group; that matter most
GRADIENTS, EKFAC, EXACT = "gradients alone", "EKFAC", "Gauss-Newton"
COLOURS = ("#1f5fa8", "#d1701c", "#7b3f9e", "#2e8b57")  # of the test images


def influences(problem: Problem, params, inverse, test):
    """Returns every training image's score for every test image, [tests, images], by kind."""
    trained = problem.images, problem.labels
    exact = ok.operators.ggn(influence.loss_fn, params, problem.weights, *trained)
    damped = exact + problem.decay * ok.operators.identity(params)

    def solve(vector):
        return jax.scipy.sparse.linalg.cg(damped.mv, vector, M=inverse.mv, tol=1e-5, maxiter=300)[0]

    def scores(solver, image, label):
        grad = jax.grad(influence.loss_fn)(params, 1.0, image[None], label[None])
        losses = partial(influence.losses_of, images=problem.images, labels=problem.labels)
        return -jax.jvp(losses, (params,), (solver(grad),))[1]

    solvers = {GRADIENTS: lambda vector: vector, EKFAC: inverse.mv, EXACT: solve}
    return {
        name: np.asarray(jax.jit(jax.vmap(partial(scores, solver)))(*test))
        for name, solver in solvers.items()
    }


def correlations(scores, groups, changes):
    """Returns the predicted changes [tests, groups], and their rank correlation with the actual."""
    predicted = -scores @ groups.T / groups.shape[1]
    pairs = zip(predicted, changes, strict=True)
    return predicted, np.array([spearmanr(*pair).statistic for pair in pairs])


def make_table(title: str, first, headings) -> Table:
    """Returns a table without rows."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in first:
        table.add_column(heading, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def draw(path, scores, groups, changes, names) -> None:
    """Draws predicted against actual changes of the test losses, a point for each group."""
    figure = Figure(figsize=(15, 4.8), dpi=110, layout="constrained")
    for axes, (kind, values) in zip(figure.subplots(1, 3), scores.items(), strict=True):
        predicted, found = correlations(values, groups, changes)
        for x, y, name, colour in zip(predicted, changes, names, COLOURS, strict=True):
            axes.scatter(x, y, s=26, color=colour, alpha=0.75, lw=0, label=name)
        if kind != GRADIENTS:
            axes.axline((0, 0), slope=1, color="#222222", lw=1, ls="--", label="as predicted")
        axes.set_title(f"{kind}: rank correlation {found.mean():.2f}")
        units = ", in other units" if kind == GRADIENTS else ""
        axes.set(xlabel=f"predicted change of the loss{units}", ylabel="actual change")
        axes.legend(frameon=False, fontsize=9)
        axes.grid(alpha=0.25)
    common.save(figure, path)


def extreme_groups(scores):
    """Returns which images help each test image most, and which hurt it: [2, tests, images]."""
    ranks = scores.argsort(axis=1).argsort(axis=1)
    return np.stack([ranks < LEFT_OUT, ranks >= scores.shape[1] - LEFT_OUT])


def random_groups(images: int, count: int, seed: int):
    """Returns which images are in each group, [count, images]."""
    rng = np.random.default_rng(seed)
    groups = np.zeros((count, images), bool)
    for group in groups:
        group[rng.choice(images, round(SHARE * images), replace=False)] = True
    return groups


def print_tables(console: Console, scores, groups, changes, before, extremes, names) -> None:
    """Prints rank correlations, and losses without the images that matter most."""
    title = f"Rank correlation of predicted\nand actual changes, {len(groups)} groups"
    table = make_table(title, ["scores"], ["mean", "lowest", "highest"])
    for kind, values in scores.items():
        _, found = correlations(values, groups, changes)
        table.add_row(kind, *(f"{x:.2f}" for x in (found.mean(), found.min(), found.max())))
    console.print(table)
    headings = ["with\nall", "without those\nthat help", "without those\nthat hurt"]
    title = f"Loss after training without {LEFT_OUT} images"
    table = make_table(title, ["test image", "scores"], headings)
    for i, name in enumerate(names):
        for kind, losses in zip(scores, extremes, strict=True):
            numbers = (f"{x:.2f}" for x in (before[i], *losses[:, i]))
            label = name if kind == GRADIENTS else ""
            table.add_row(label, kind, *numbers, end_section=kind == EXACT)
    console.print(table)


def group_count(text: str) -> int:
    """Reads how many groups, enough to rank, from the command line."""
    if (value := common.positive_integer(text)) < 3:
        raise argparse.ArgumentTypeError(f"expected at least 3 groups, got {text!r}")
    return value


def positive_number(text: str) -> float:
    """Reads a number above zero from the command line."""
    if not 0 < (value := float(text)) < np.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = common.make_parser(__doc__, steps=300, out="influence_retraining.png")
    parser.add_argument("--weight-decay", type=positive_number, default=1e-2, help="and damping")
    parser.add_argument("--groups", type=group_count, default=24, help="left out, each for itself")
    return parser.parse_args()


def main() -> None:
    """Trains, scores, trains without some images, prints the tables and draws the changes."""
    arguments = parse_arguments()
    decay, count, digits = arguments.weight_decay, arguments.groups, data.load_data()
    images, labels = jax.device_put((digits.train_images, digits.train_labels))
    weights, key = jnp.ones(len(labels)), jax.random.key(arguments.seed)
    initial = influence.Net().init(key, images[:1])
    layers = ok.find_layers(influence.loss_fn, initial, weights, images, labels)
    problem = Problem(images, labels, weights, layers, decay)
    params = train(problem, initial, arguments.steps, key)

    chosen = influence.choose(params, digits.test_images, digits.test_labels)
    test = digits.test_images[chosen], digits.test_labels[chosen]
    curvature = jax.jit(problem.curvature)(params)
    scores = influences(problem, params, curvature.inverse(decay), test)
    extreme = [extreme_groups(values).reshape(-1, len(labels)) for values in scores.values()]
    groups = random_groups(len(labels), count, arguments.seed)
    half, steps = curvature.inverse_sqrt(decay), -(-arguments.steps // RETRAIN_SHARE)
    losses, slopes = retrain(problem, params, half, np.concatenate([groups, *extreme]), test, steps)
    before = np.asarray(influence.losses_of(params, *test))
    changes = (losses[:count] - before).T
    rest = losses[count:].reshape(len(scores), 2, len(chosen), len(chosen))
    # Of each training without what matters to one test image, the loss of that image.
    extremes = np.diagonal(rest, axis1=2, axis2=3)

    said = influence.Net().apply(params, test[0]).argmax(axis=-1)
    names = [f"a {label}, predicted {x}" for label, x in zip(test[1], said, strict=True)]
    slope = optax.tree.norm(jax.grad(problem.objective)(params, weights))
    print(f"norm of the gradient: {slope:.0e} at the end of training, without some images")
    print(f"{np.median(slopes):.0e} in the median and {slopes.max():.0e} at most")
    print_tables(Console(), scores, groups, changes, before, extremes, names)
    draw(arguments.out, scores, groups, changes, names)


if __name__ == "__main__":
    main()
