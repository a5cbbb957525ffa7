"""Without `jax.jit` an update is compiled once, and takes all that `jax.grad` takes."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_kron as ok

from .table import CORE_ROWS, avals, core_rows, norms, regression

COMPILED = re.compile(r"Finished .* compilation of (\S+)")
PLAIN = ("kron_psgd-newton", "kfac-hand", "soap-soap")
CASES = [(row, True) for row in CORE_ROWS] + [(r, False) for r in CORE_ROWS if r.name in PLAIN]


@pytest.mark.parametrize(("row", "injected"), CASES, ids=str)
def test_nothing_is_compiled_after_the_first_steps(row, injected, caplog):
    problem = regression()
    factory = optax.inject_hyperparams(row.factory) if injected else row.factory
    tx = factory(0.01, **row.all_settings(problem))
    make_extras = row.make_extras
    params, state = problem.params, tx.init(problem.params)

    def step(params, state):
        extras = make_extras(problem, params)  # closures among them are new at every step
        updates, state = tx.update(jax.grad(problem.loss)(params), state, params, **extras)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for _ in range(5):
            params, state = step(params, state)
        assert not COMPILED.findall(caplog.text)
        jax.jit(lambda x: x * 2)(1.0)
    assert len(COMPILED.findall(caplog.text)) == 1  # compilations are seen


def _numbers(scale=1.0):
    return {"number": scale, "vector": scale * np.ones(3, np.float32)}


@core_rows
def test_numbers_are_parameters(row):
    """As `jax.grad` takes them; what comes out are arrays."""
    arrays = jax.tree.map(jnp.asarray, _numbers())
    settings = row.all_settings(norms(arrays))
    problem = norms(_numbers())
    tx = row.factory(0.01, **settings)
    state = tx.init(_numbers())
    assert avals(state) == avals(tx.init(jax.tree.map(lambda x: x.astype(float), arrays)))
    extras = row.extras(norms(arrays).loss_fn, arrays)
    if "hvp_fn" in extras:
        extras = {"hvp_fn": ok.hessian_vector_product(problem.loss, _numbers())}
    update = lambda grads, state: tx.update(grads, state, _numbers(), **extras)  # noqa: E731
    updates, after = jax.eval_shape(update, jax.grad(problem.loss)(_numbers()), state)
    assert avals(after) == avals(state)
    assert [x.shape for x in jax.tree.leaves(updates)] == [(), (3,)]
    number, _ = jax.eval_shape(lambda s: tx.update(_numbers(), s, _numbers(), **extras), state)
    assert number["number"].shape == ()
