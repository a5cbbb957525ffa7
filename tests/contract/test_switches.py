"""Every optimizer under JAX's switches that make programs stricter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from .table import ROWS, every_row, norms, updater

SHAPES = {"cube": (2, 3, 4), "kernel": (3, 70), "bias": (70,), "scalar": ()}


def parameters():
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in SHAPES.items()}


def trace(row, params, injected):
    problem = norms(params)
    settings = row.all_settings(problem, **row.switched_on)
    extras = row.make_extras(problem, params)
    with jax.numpy_rank_promotion("raise"), jax.enable_checks(True):
        static = ("refresh_every",) if "stagger" in row.settings else ()
        inject = optax.inject_hyperparams(row.factory, static_args=static)
        factory = inject if injected else row.factory
        tx = factory(0.01, **settings)
        state = jax.eval_shape(tx.init, params)
        update = updater(row, tx, problem, lambda *_: extras)
        jax.eval_shape(update, params, state, params)


@every_row
def test_no_implicit_broadcasting(row):
    params = parameters() | {"half": jnp.ones((3, 2), jnp.bfloat16)}
    if row.supports_complex:
        params["complex"] = jnp.ones((3, 5), jnp.complex64)
    trace(row, params, injected=False)


@pytest.mark.parametrize("row", [row for row in ROWS if not row.core], ids=str)
def test_no_implicit_promotion(row, strict_promotion):
    trace(row, parameters(), injected=True)
