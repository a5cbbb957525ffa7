"""Kernels are tested with 64-bit types enabled; narrower ones are asked for by name."""

import jax
import jax.numpy as jnp
import pytest

from optax_kron.kernels import grams, linalg


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def exact_norm(monkeypatch):
    """The norm bounds are random; with the norm in their place an update is a plain formula."""

    def norm(matrix, rows):
        return jnp.linalg.norm(matrix, 2)

    def norm_of_sum(pair, rows, *, precision):
        return norm(pair.combine(1, precision=precision), rows)

    monkeypatch.setattr(linalg, "norm_bound", norm)
    monkeypatch.setattr(grams.GramPair, "norm_bound", norm_of_sum)
