"""The contract holds where ranks are never broadcast implicitly, as some projects ask of JAX."""

import jax
import pytest


@pytest.fixture(autouse=True)
def ranks_are_explicit():
    """Operands of unlike rank are an error in every test of the contract."""
    with jax.numpy_rank_promotion("raise"):
        yield
