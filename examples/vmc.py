"""Variational Monte Carlo: the ground state of an atom, by K-FAC, Adam and natural gradients.

The energy is a mean over walkers from |ψ|², and its gradient a covariance, `2 E[(E_loc - E) O]`
with `O = ∂ log|ψ|/∂θ`, which a `custom_jvp` says. The curvature comes from elsewhere: a mark of
log|ψ|, whose value and gradient are zero. Stochastic reconfiguration ("sr") takes the same metric
in full, from the derivatives of all walkers.

    python examples/vmc.py --help
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import add_optimizer, make_parser, positive_integer
from jax.flatten_util import ravel_pytree
from vmc_picture import Run, draw, print_table
from walkers import centred, energy_of, measured, metropolis, start
from wave_functions import ATOMS, local_energy, log_psi

import optax_kron as ok


def kfac(atom, energy, params, x, rate=0.05):
    """Returns the step of K-FAC, and its state."""

    def loss_fn(params, x):
        return energy(params, x) + ok.losses.log_psi(log_psi(params, atom, x)).mean()

    print(layers := ok.find_layers(loss_fn, params, x))
    settings = {"approx": "reduce", "momentum": 0.6, "norm_constraint": 3e-3}
    settings["damping"] = optax.exponential_decay(3e-3, 50, 1 / 3, end_value=1e-3)
    optimizer = ok.kfac(rate, layers=layers, **settings)
    with_taps = ok.value_and_grad_with_taps(loss_fn, layers, fisher="exact")

    def step(params, state, x):
        value, grads, taps = with_taps(params, x)
        updates, state = optimizer.update(grads, state, params, taps=taps)
        return optax.apply_updates(params, updates), state, value

    return step, optimizer.init(params)


def adam(atom, energy, params, x, rate=1e-2):
    """Returns the step of Adam, and its state."""
    optimizer = optax.adam(rate)

    def step(params, state, x):
        value, grads = jax.value_and_grad(energy)(params, x)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step, optimizer.init(params)


def sr(atom, energy, params, x, rate=0.1, shift=1e-3):
    """Returns the step of stochastic reconfiguration, a linear system of walkers; no state."""
    unravel = ravel_pytree(params)[1]

    def log_psi_of_one(flat, x):
        return log_psi(unravel(flat), atom, x[None])[0]

    def step(params, state, x):
        flat, _ = ravel_pytree(params)
        o = jax.vmap(jax.grad(log_psi_of_one), (None, 0))(flat, x)  # [walkers, parameters]
        o = (o - o.mean(axis=0)) / len(x) ** 0.5
        local = local_energy(params, atom, x)
        gram = o @ o.T + shift * jnp.eye(len(x))
        change = o.T @ jnp.linalg.solve(gram, centred(local) / len(x) ** 0.5)
        return unravel(flat - rate * change), state, local.mean()

    return step, None


OPTIMIZERS = {"kfac": kfac, "adam": adam, "sr": sr}


def train(name, atom, params, x, steps, key):
    """Trains and returns errors in mHa, seconds, parameters and walkers."""
    advance, state = OPTIMIZERS[name](atom, energy_of(atom), params, x)

    @jax.jit
    def step(params, state, x, key):
        x, taken = metropolis(params, atom, x, key)
        return *advance(params, state, x), x, taken

    step = step.lower(params, state, x, key).compile()  # no part of the seconds
    energies, seconds, began = [], [], time.perf_counter()
    for i in range(steps):
        params, state, energy, x, taken = step(params, state, x, jax.random.fold_in(key, i))
        energies.append(float(energy))
        seconds.append(time.perf_counter() - began)
        if (i + 1) % 50 == 0 or i + 1 == steps:
            mean = np.mean(energies[-50:])
            print(f"{name:4} step {i + 1:5}  energy {mean:.5f}  {taken:.0%} of moves taken")
    return 1e3 * (np.array(energies) - atom.energy), np.array(seconds), params, x


def main() -> None:
    """Trains with each optimizer, measures the energies and draws their errors."""
    parser = make_parser(__doc__, steps=300, out="vmc.png")
    add_optimizer(parser, OPTIMIZERS)
    parser.add_argument("--atom", choices=ATOMS, default="He", help="whose ground state is sought")
    parser.add_argument("--walkers", type=positive_integer, default=1024, help="samples of a step")
    parser.add_argument("--blocks", type=positive_integer, default=300, help="of a measurement")
    arguments, runs = parser.parse_args(), {}
    atom, keys = ATOMS[arguments.atom], jax.random.split(jax.random.key(arguments.seed), 3)
    params, walkers = start(atom, arguments.walkers, keys[0])
    for name in OPTIMIZERS:
        if arguments.optimizer in (name, "all"):
            *curve, last, x = train(name, atom, params, walkers, arguments.steps, keys[1])
            runs[name] = Run(*curve, *measured(last, atom, x, keys[2], arguments.blocks))
    print_table(runs, atom.energy)
    draw(runs, f"Ground state of {arguments.atom}", arguments.out)


if __name__ == "__main__":
    main()
