"""Samples of |ψ|² for the example of variational Monte Carlo, and the energy as their mean."""

import jax
import jax.numpy as jnp
import numpy as np
from wave_functions import Atom, initial, local_energy, log_psi


def metropolis(params, atom: Atom, x, key, steps=10):
    """Returns walkers [N, n, 3] after some moves of all electrons, and the share of those taken."""
    width = 0.5 / atom.charge**0.5

    def move(carry, key):
        x, log = carry
        normal, uniform = jax.random.split(key)
        new = x + width * jax.random.normal(normal, x.shape)
        new_log = log_psi(params, atom, new)
        taken = jnp.log(jax.random.uniform(uniform, log.shape)) < 2 * (new_log - log)
        x = jnp.where(taken[:, None, None], new, x)
        return (x, jnp.where(taken, new_log, log)), taken.mean()

    (x, _), taken = jax.lax.scan(move, (x, log_psi(params, atom, x)), jax.random.split(key, steps))
    return x, taken.mean()


def start(atom: Atom, count, key):
    """Returns parameters, and so many walkers that have moved until they follow their |ψ|²."""
    keys = jax.random.split(key, 3)
    params = jax.jit(lambda key: initial(atom, key))(keys[0])
    x = jax.random.normal(keys[1], (count, atom.charge, 3)) / atom.charge**0.5
    x, _ = jax.jit(lambda params, x: metropolis(params, atom, x, keys[2], steps=500))(params, x)
    return params, x


def energy_of(atom: Atom):
    """Returns the energy of walkers as a function whose derivative is that of their density."""

    @jax.custom_jvp
    def energy(params, x):
        return local_energy(params, atom, x).mean()

    @energy.defjvp
    def energy_jvp(primals, tangents):
        params, x = primals
        local = local_energy(params, atom, x)
        _, log_change = jax.jvp(lambda p: log_psi(p, atom, x), (params,), tangents[:1])
        return local.mean(), 2 * jnp.mean(centred(local) * log_change)

    return energy


def centred(local):
    """Returns local energies [N] less their mean; those far from the median count as less far."""
    middle = jnp.median(local)
    far = 5 * jnp.mean(jnp.abs(local - middle))
    clipped = jnp.clip(local, middle - far, middle + far)
    return clipped - clipped.mean()


def measured(params, atom: Atom, x, key, blocks):
    """Returns the energy of a wave function that stands still, its error, and the variance.

    Walkers are independent of each other: the error is that of the mean of their own means.
    """

    def block(x, key):
        x, _ = metropolis(params, atom, x, key)
        return x, local_energy(params, atom, x)

    keys = jax.random.split(key, blocks)
    local = np.asarray(jax.jit(lambda x: jax.lax.scan(block, x, keys)[1])(x), float)
    return local.mean(), local.mean(axis=0).std() / len(x) ** 0.5, local.var()
