"""Kernels are tested with 64-bit types enabled; narrower ones are asked for by name."""

import jax
import jax.numpy as jnp
import pytest

from optax_kron.kernels import grams, linalg


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def norm(matrix, rows):
    """The spectral norm, as the limit of tr((AAᴴ)^m)^(1/2m): matrix products only, so it vmaps."""
    del rows
    power = matrix @ matrix.conj().T
    logarithm = jnp.zeros((), power.real.dtype)
    for doubling in range(40):
        trace = jnp.trace(power).real + jnp.finfo(power.dtype).tiny
        logarithm += jnp.log(trace) / 2**doubling
        power = (power / trace) @ (power / trace)
    return jnp.exp(logarithm / 2)


@pytest.fixture
def exact_norm(monkeypatch):
    """The norm bounds are random; with the norm in their place an update is a plain formula."""

    def norm_of_sum(pair, rows, *, precision):
        return norm(pair.combine(1, precision=precision), rows)

    monkeypatch.setattr(linalg, "norm_bound", norm)
    monkeypatch.setattr(grams.GramPair, "norm_bound", norm_of_sum)
