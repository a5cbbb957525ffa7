"""Conjugate gradients with and without curvature of layers as preconditioner: iterations counted.

The system is `(GGN + damping·I) x = gradient`, with the exact generalized Gauss-Newton matrix of
all 1797 digits, as Hessian-free optimization, influence functions and Laplace approximations solve.
The net is a classifier 64-64-64-10 with ReLU after 50 steps of Adam. K-FAC and EKFAC are estimated
from the same images, and their exact inverses at the same damping are the preconditioners.
Iterations end where the norm of the residual is 1e-4 of the right-hand side's.

Two kinds of systems: of one layer, the others held fixed, and of the whole net. Both estimates know
nothing of the curvature between layers, and in a deep net that is much of it: to scale one layer up
and the next one down changes nothing, which costs in each layer's own curvature. So what wins
within layers may lose across them, and does here; it is printed too.
"""

import argparse
import functools
import sys
from itertools import pairwise

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import optax_kron as ok

SIZES = (64, 64, 64, 10)
TOLERANCE = 1e-4
METHODS = ("none", "kfac", "ekfac")


def loss_fn(params, images, labels):
    """Mean cross-entropy of the classifier."""
    x = images
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    logits = x @ params[-1]["kernel"] + params[-1]["bias"]
    return ok.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def layer_loss(layer, i, params, images, labels):
    """The loss as a function of one layer."""
    return loss_fn([*params[:i], layer, *params[i + 1 :]], images, labels)


def trained(data, steps, seed):
    """Parameters after some steps of Adam."""
    rng = np.random.default_rng(seed)
    params = [
        {
            "kernel": jnp.asarray(rng.normal(size=pair) / pair[0] ** 0.5, jnp.float32),
            "bias": jnp.zeros(pair[1]),
        }
        for pair in pairwise(SIZES)
    ]
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params, *data), state)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def conjugate_gradients(system, right, preconditioner, most):
    """The number of iterations until the residual's norm is small, and that norm, relatively.

    Libraries end by other criteria, such as every entry's own, or do not tell the number.
    """
    apply = (lambda r: r) if preconditioner is None else preconditioner.mv
    end = TOLERANCE * optax.tree.norm(right)

    def goes_on(carry):
        count, _, residual, *_ = carry
        return (count < most) & (optax.tree.norm(residual) > end)

    def step(carry):
        count, x, residual, direction, product = carry
        image = system @ direction
        length = product / optax.tree.vdot(direction, image)
        x = optax.tree.add_scale(x, length, direction)
        residual = optax.tree.add_scale(residual, -length, image)
        better = apply(residual)
        new = optax.tree.vdot(residual, better)
        direction = optax.tree.add_scale(better, new / product, direction)
        return count + 1, x, residual, direction, new

    first = apply(right)
    zeros = optax.tree.zeros_like(right)
    carry = (0, zeros, right, first, optax.tree.vdot(right, first))
    count, x, *_ = jax.lax.while_loop(goes_on, step, carry)
    residual = optax.tree.sub(right, system @ x)
    return count, optax.tree.norm(residual) / optax.tree.norm(right)


def solve(loss, params, data, damping, most):
    """For every method the number of iterations, and the true relative residual."""
    layers = ok.find_layers(loss, params, *data)
    with_taps = jax.jit(ok.value_and_grad_with_taps(loss, layers, fisher="exact"))
    _, right, taps = with_taps(params, *data)

    @functools.partial(jax.jit, static_argnames="method")
    def run(params, data, right, taps, method):
        preconditioner = None
        if method != "none":
            preconditioner = getattr(ok.operators, method)(taps, layers).inverse(damping)
        curvature = ok.operators.ggn(loss, params, *data)
        system = curvature + damping * ok.operators.identity(right)
        return conjugate_gradients(system, right, preconditioner, most)

    found = {method: run(params, data, right, taps, method) for method in METHODS}
    return {method: (int(steps), float(residual)) for method, (steps, residual) in found.items()}


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dampings", type=float, nargs="+", default=[1e-3, 1e-4])
    parser.add_argument("--most", type=int, default=5000, help="iterations")
    parser.add_argument("--steps", type=int, default=50, help="of training before")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    return parser.parse_args()


def main():
    """Measure and print; exit code 1 if the sums within layers are not in the order expected."""
    args = parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 110)
    data = models.digits()
    params = trained(data, args.steps, args.seed)
    table = Table(title="Iterations of conjugate gradients (relative residual)")
    for column in ("system", "damping", *METHODS):
        table.add_column(column, justify="left" if column == "system" else "right")
    systems = {
        f"layer {i}": (lambda layer, *rest, i=i: layer_loss(layer, i, params, *rest), layer)
        for i, layer in enumerate(params)
    }
    systems["whole net"] = loss_fn, params
    totals = {damping: np.zeros(len(METHODS), int) for damping in args.dampings}
    for name, (loss, variables) in track(systems.items(), "solving", console=Console(stderr=True)):
        for damping in args.dampings:
            found = solve(loss, variables, data, damping, args.most)
            cells = (f"{steps} ({residual:.0e})" for steps, residual in found.values())
            table.add_row(name, f"{damping:g}", *cells)
            if name != "whole net":
                totals[damping] += [steps for steps, _ in found.values()]
        table.add_section()
    for damping, counts in totals.items():
        table.add_row("sum of layers", f"{damping:g}", *map(str, counts))
    console.print(table)
    none, kfac, ekfac = sum(totals.values())
    good = none > kfac > ekfac
    verdict = "pass" if good else "MISS"
    console.print(f"{verdict} within layers: {none} iterations, K-FAC {kfac}, EKFAC {ekfac}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
