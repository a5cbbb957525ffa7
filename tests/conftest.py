"""Fixtures that every test may ask for.

Most of a test's time is compilation, so that programs are compiled without optimisation.
"""

import contextlib
import os

# Read when JAX starts its backend, which importing it does not do.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Threads of LAPACK would only wait for those of the other test processes.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest


def pytest_collection_modifyitems(items):
    """Tests of one row of the contract's table run side by side: they share a compiled update."""

    def row_name(item):
        parameters = getattr(item, "callspec", None)
        return str(parameters.params.get("row", "")) if parameters else ""

    items.sort(key=row_name)


@contextlib.contextmanager
def _setting(name, value):
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


@pytest.fixture
def x64():
    """64-bit types on for this test."""
    with _setting("jax_enable_x64", True):
        yield


@pytest.fixture
def strict_promotion():
    """No implicit promotion between dtypes for this test."""
    with _setting("jax_numpy_dtype_promotion", "strict"):
        yield


@pytest.fixture
def nan_is_an_error():
    """Any operation whose result holds a NaN raises FloatingPointError in this test."""
    with _setting("jax_debug_nans", True):
        yield
