"""A network that solves Poisson's or Burgers' equation, by six optimizers in equal time.

A tanh network of float64 is to fulfil the equation at points inside, and to have the known values
on the boundary. adaptive_kfac takes its steps without any setting, and all others have as many
seconds, those with a rate the best of two or three and a cosine schedule over this time.

    python examples/pinn.py --help
"""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import add_optimizer, make_parser, save
from equations import EQUATIONS, draw_points, make_loss, make_model
from fields import draw, make_grid
from flax import nnx
from matplotlib.figure import Figure

import optax_kron as ok

NAMES = ("adaptive_kfac", "lbfgs", "adam", "soap", "kron_psgd", "kfac")


def make_optimizers(layers):
    """Returns each with its peak rate; `None` for those that make complete steps."""
    return {
        "adaptive_kfac": (None, ok.adaptive_kfac(layers=layers)),
        "lbfgs": (None, optax.lbfgs(memory_size=20)),
        "adam": (1e-2, optax.with_extra_args_support(optax.scale_by_adam())),
        "soap": (3e-3, ok.soap()),
        "kron_psgd": (3e-3, ok.kron_psgd()),
        "kfac": (1e-1, ok.kfac(layers=layers, damping=1e-2)),
    }


def train(name, loss_fn, layers, params, batch, error_of, limit):
    """Takes steps up to a limit, which is a number of them or, as a float, of seconds.

    Returns:
      The parameters, and (step, seconds, relative error) after every tenth step.
    """
    peak, optimizer = make_optimizers(layers)[name]
    with_taps = ok.value_and_grad_with_taps(loss_fn, layers, fisher="exact")

    @jax.jit
    def step(params, state, scale):
        def value_fn(params):
            return loss_fn(params, *batch)

        loss, grads, taps = with_taps(params, *batch)
        # XLA leaves out what an optimizer does not use of these.
        ggn_fn = ok.ggn_vector_product(loss_fn, params, *batch)
        known = {"value": loss, "value_fn": value_fn, "taps": taps, "ggn_fn": ggn_fn}
        if name == "lbfgs":  # whose line search knows loss and gradient already
            loss, grads = optax.value_and_grad_from_state(value_fn)(params, state=state)
            known = {"value": loss, "value_fn": value_fn, "grad": grads}
        updates, state = optimizer.update(grads, state, params, **known)
        return optax.apply_updates(params, jax.tree.map(lambda u: scale * u, updates)), state

    state = jax.jit(optimizer.init)(params)
    jax.block_until_ready(step(*step(params, state, 1.0), 1.0))  # compiles
    taken, seconds, curve = 0, 0.0, []
    while (progress := (seconds if isinstance(limit, float) else taken) / limit) < 1:
        scale = 1.0 if peak is None else -peak * (1 + math.cos(math.pi * progress)) / 2
        start = time.perf_counter()
        params, state = jax.block_until_ready(step(params, state, scale))
        seconds, taken = seconds + time.perf_counter() - start, taken + 1
        if taken % 10 == 0 or taken == limit:
            curve.append((taken, seconds, float(error_of(params))))
    return params, curve


def solve(equation, names, steps, seed):
    """Trains with each optimizer, and prints how it ended.

    Returns:
      Errors by name, and on the grid the solution of the first optimizer and the exact one.
    """
    points = draw_points(equation, np.random.default_rng(seed))
    graph, initial = make_model(seed)
    loss_fn, batch = make_loss(equation, graph), tuple(map(jnp.asarray, points))
    layers = ok.find_layers(loss_fn, initial, *batch)
    exact = equation.exact(grid := make_grid(equation))
    solution = jax.jit(lambda params: nnx.merge(graph, params)(grid)[:, 0])

    def error_of(params):
        return np.linalg.norm(solution(params) - exact) / np.linalg.norm(exact)

    curves, solutions, limit = {}, [], steps
    for name in names:
        params, curve = train(name, loss_fn, layers, initial, batch, error_of, limit)
        taken, seconds, error = curve[-1]
        print(f"{name:13}  {error:14.1e}  {taken:5}  {seconds:7.1f}", flush=True)
        curves[name], limit = curve, seconds if name == NAMES[0] else limit
        solutions.append(np.asarray(solution(params)))
    return curves, solutions[0], exact


def main() -> None:
    """Solves the equations with each optimizer, and draws errors and the first solution."""
    parser = make_parser(__doc__, steps=700, out="pinn.png")
    add_optimizer(parser, NAMES)
    parser.add_argument("--equation", choices=(*EQUATIONS, "both"), default="both", help="to solve")
    given = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    chosen = [given.equation] if given.equation in EQUATIONS else [*EQUATIONS]
    names = [given.optimizer] if given.optimizer in NAMES else NAMES
    figure = Figure(figsize=(16, 4.2 * len(chosen)), dpi=100, layout="constrained")
    for row, key in zip(figure.subplots(len(chosen), 4, squeeze=False), chosen, strict=True):
        print(f"{key:13}  relative error  steps  seconds")
        draw(row, key, *solve(EQUATIONS[key], names, given.steps, given.seed))
    save(figure, given.out)


if __name__ == "__main__":
    main()
