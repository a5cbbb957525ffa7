"""Atoms for the example of variational Monte Carlo: their wave functions and local energies.

All lengths are in Bohr, energies in Hartree.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

WIDTH, DETERMINANTS = 32, 4


class Atom(NamedTuple):
    """A nucleus, its electrons, and the energy of the ground state."""

    charge: int
    up: int  # electrons with spin up, of at most two; the others are down
    energy: float  # of the infinitely heavy nucleus, without relativity
    decays: tuple[float, ...]  # of the orbitals, far from the nucleus


# Energies of Drake et al. (2002), Puchalski et al. (2009) and Pachucki and Komasa (2004).
ATOMS = {
    "He": Atom(2, 1, -2.903724, (2.0,)),
    "Li": Atom(3, 2, -7.478060, (3.0, 0.7)),
    "Be": Atom(4, 2, -14.667356, (4.0, 1.0)),
}


def initial(atom: Atom, key):
    """Returns parameters: a net of pairs of electrons, and one of electrons."""
    outputs = 1 + DETERMINANTS * len(atom.decays) * (len(atom.decays) > 1)
    sizes = {"pair": (4, WIDTH), "pairs": (WIDTH, WIDTH), "one": (WIDTH + 1, WIDTH)}
    sizes["out"] = WIDTH, outputs
    params, keys = {}, jax.random.split(key, len(sizes))
    for one, (name, (rows, columns)) in zip(keys, sizes.items(), strict=True):
        scale = (0.1 if name == "out" else 1) / rows**0.5
        kernel = scale * jax.random.normal(one, (rows, columns))
        params[name] = {"kernel": kernel, "bias": jnp.zeros(columns)}
    return params


def distance(x):
    """Returns lengths of vectors [..., 3], with derivatives at zero too."""
    return jnp.sqrt(jnp.sum(x**2, axis=-1) + 1e-12)


def log_psi(params, atom: Atom, x):
    """Returns log |ψ| [N] of electrons at x [N, n, 3], those with spin up first."""
    count = atom.charge
    first, second = np.array([(i, j) for i in range(count) for j in range(count) if i != j]).T
    alike = (first < atom.up) == (second < atom.up)
    r, between = distance(x), distance(x[:, first] - x[:, second])
    spins = jnp.broadcast_to(alike.astype(x.dtype), between.shape)
    pairs = jnp.stack([r[:, first], r[:, second], between, spins], axis=-1)

    def dense(name, h):
        return h @ params[name]["kernel"] + params[name]["bias"]

    h = jnp.tanh(dense("pairs", jnp.tanh(dense("pair", pairs))))
    h = h.reshape(len(x), count, count - 1, WIDTH).mean(axis=2)
    h = dense("out", jnp.tanh(dense("one", jnp.concatenate([r[..., None], h], axis=-1))))
    # Cusps: -Z where an electron meets the nucleus; 1/2, or 1/4 of equal spins, where two meet.
    envelopes = [-d * r - (atom.charge - d) * r / (1 + r) for d in atom.decays]
    cusps = jnp.where(alike, 0.25, 0.5) * between / (1 + between)
    log = (envelopes[-1] + h[..., 0]).sum(axis=1) + cusps.sum(axis=1) / 2
    if len(atom.decays) == 1:
        return log
    scales = jnp.exp(jnp.stack([e - envelopes[-1] for e in envelopes], axis=-1))
    orbitals = 1 + h[..., 1:].reshape(len(x), count, DETERMINANTS, -1)
    orbitals = jnp.moveaxis(scales[..., None, :] * orbitals, 2, 1)  # [N, determinants, n, orbitals]
    spin_up, spin_down = orbitals[:, :, : atom.up], orbitals[:, :, atom.up :]
    total = jnp.sum(determinant(spin_up) * determinant(spin_down), axis=1)
    return log + jnp.log(jnp.abs(total))


def determinant(orbitals):
    """Returns the determinant of the orbitals of one or two electrons."""
    if orbitals.shape[-2] == 1:
        return orbitals[..., 0, 0]
    diagonal = orbitals[..., 0, 0] * orbitals[..., 1, 1]
    return diagonal - orbitals[..., 0, 1] * orbitals[..., 1, 0]


def local_energy(params, atom: Atom, x):
    """Returns Hψ/ψ [N]."""
    shape = x.shape
    directions = jnp.eye(3 * atom.charge, dtype=x.dtype).reshape(-1, 1, *shape[1:])
    gradient = jax.grad(lambda x: log_psi(params, atom, x).sum())
    first, hessian = jax.linearize(gradient, x)

    def second(v):
        return jnp.sum(hessian(jnp.broadcast_to(v, shape)) * v, axis=(1, 2))

    kinetic = -0.5 * (jax.vmap(second)(directions).sum(axis=0) + jnp.sum(first**2, axis=(1, 2)))
    i, j = np.triu_indices(atom.charge, 1)
    repulsion = jnp.sum(1 / distance(x[:, i] - x[:, j]), axis=1)
    return kinetic - atom.charge * jnp.sum(1 / distance(x), axis=1) + repulsion
