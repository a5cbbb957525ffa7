"""The state is a plain pytree: abstract, stable, donatable, vmappable, serializable."""

import inspect

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from absl.testing import parameterized

from .table import (
    CORE_ROWS,
    avals,
    core_rows,
    get,
    largest_difference,
    quick_jit,
    random_like,
    stepper,
    trained,
    updater,
)


@core_rows
def test_init_is_abstract(row):
    _, tx, _, params, _, _ = trained(row)
    state = tx.init(params)
    structs = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    assert avals(jax.eval_shape(tx.init, params)) == avals(state)
    assert avals(jax.eval_shape(tx.init, structs)) == avals(state)


@core_rows
def test_update_keeps_the_state_stable_also_under_cond_and_scan(row):
    problem, tx, _, params, state, _ = trained(row)
    update = updater(row, tx, problem)
    assert avals(state) == avals(tx.init(params))

    def maybe(take, grads, state):
        def skip(grads, state, params):
            return jax.tree.map(jnp.zeros_like, grads), state

        return jax.lax.cond(take, update, skip, grads, state, params)

    def scanned(params, state):
        return jax.lax.scan(stepper(row, tx, problem), (params, state), length=3)[0]

    assert avals(jax.eval_shape(maybe, True, params, state)) == avals((params, state))
    assert avals(jax.eval_shape(scanned, params, state)) == avals((params, state))


@core_rows
def test_cond_and_scan_equal_plain_updates(row):
    problem, tx, update, params, _, _ = trained(row)
    stream = [random_like(params, i) for i in range(4)]

    @quick_jit
    def scanned(state, take, stream):
        def body(state, xs):
            grads, take = xs
            return jax.lax.cond(
                take,
                lambda: updater(row, tx, problem)(grads, state, params)[::-1],
                lambda: (state, optax.tree.zeros_like(grads)),
            )

        return jax.lax.scan(body, state, (stream, take))

    take = jnp.array([True, False, True, True])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stream)
    after, updates = scanned(tx.init(params), take, stacked)
    state = tx.init(params)
    for i, grads in enumerate(stream):
        expected = optax.tree.zeros_like(grads)
        if take[i]:
            expected, state = update(grads, state, params)
        got = jax.tree.map(lambda u, i=i: u[i], updates)
        chex.assert_trees_all_close(got, expected, rtol=1e-3, atol=1e-6)
    chex.assert_trees_all_close(after, state, rtol=1e-3, atol=1e-6)


@core_rows
def test_an_ensemble_under_vmap_equals_a_loop(row):
    problem, tx, update, params, _, _ = trained(row)
    size = 3
    together = quick_jit(jax.vmap(updater(row, tx, problem)))
    members = [random_like(params, 10 + i) for i in range(size)]

    def stack(trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    state = jax.vmap(tx.init)(stack(members))
    states = [tx.init(p) for p in members]
    for i in range(2):
        grads = [random_like(params, size * i + j, 10.0**j) for j in range(size)]
        updates, state = together(stack(grads), state, stack(members))
        results = [update(g, s, p) for g, s, p in zip(grads, states, members, strict=True)]
        expected, states = zip(*results, strict=True)
        chex.assert_trees_all_close(updates, stack(expected), rtol=1e-3, atol=1e-6)
    chex.assert_trees_all_close(state, stack(states), rtol=1e-3, atol=1e-5)


@core_rows
def test_donated_state_works(row):
    problem, tx, update, params, _, _ = trained(row)
    donating = quick_jit(updater(row, tx, problem), donate_argnums=1)
    grads = random_like(params)
    state, donated = tx.init(params), tx.init(params)
    for _ in range(2):
        expected, state = update(grads, state, params)
        given = donated
        updates, donated = donating(grads, given, params)
        chex.assert_trees_all_close(updates, expected, rtol=1e-4)
        assert all(x.is_deleted() for x in jax.tree.leaves(given) if x.size)
    assert not any(x.is_deleted() for x in jax.tree.leaves((params, grads)))


def _same_from_here(update, params, state, restored):
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)
    chex.assert_trees_all_equal(restored, state)
    for i in range(3):
        grads = random_like(params, i)
        expected, state = update(grads, state, params)
        updates, restored = update(grads, restored, params)
        chex.assert_trees_all_equal(updates, expected)
    chex.assert_trees_all_equal(restored, state)


@core_rows
def test_orbax_restores_the_state_bit_for_bit(row, tmp_path):
    _, tx, update, params, state, _ = trained(row)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    _same_from_here(update, params, state, restored)


@core_rows
def test_flax_serialization_restores_the_state_bit_for_bit(row):
    _, tx, update, params, state, _ = trained(row)
    data = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(tx.init(params), data)
    _same_from_here(update, params, state, restored)


@core_rows
def test_the_seed_decides_the_trajectory(row):
    if not row.random:
        return
    problem, _, update, params, _, _ = trained(row)

    def run(**seed):
        state = row.make(problem, **seed).init(params)
        for i in range(3):
            updates, state = update(random_like(params, i), state, params)
        return updates, state

    seed = inspect.signature(row.factory).parameters["seed"].default
    default, same, other = run(), run(seed=seed), run(seed=seed + 1)
    chex.assert_trees_all_equal(default, same)
    assert avals(other) == avals(same)
    seen = [
        (updates, *(get(state, name) for name in row.curvature)) for updates, state in (same, other)
    ]
    assert largest_difference(*seen) > 0


def test_optimizers_do_not_disturb_each_other():
    runs = [trained(row) for row in CORE_ROWS]
    stream = [random_like(runs[0].params, i) for i in range(3)]

    def alone(run):
        state = run.tx.init(run.params)
        for grads in stream:
            updates, state = run.update(grads, state, run.params)
        return updates, state

    expected = [alone(run) for run in runs]
    results = [(None, run.tx.init(run.params)) for run in runs]
    for grads in stream:
        results = [
            run.update(grads, state, run.params)
            for run, (_, state) in zip(runs, results, strict=True)
        ]
    chex.assert_trees_all_equal(results, expected)


class VariantsTest(chex.TestCase):
    """Eager and jitted execution agree with the shared compiled update."""

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters((row.name, row) for row in CORE_ROWS[:2])
    def test_update(self, row):
        problem, tx, update, params, _, _ = trained(row)
        state = tx.init(params)
        grads = random_like(params)
        expected = update(grads, state, params)
        got = self.variant(updater(row, tx, problem))(grads, state, params)
        chex.assert_trees_all_close(got, expected, rtol=1e-3, atol=1e-6)
        assert avals(got) == avals(expected)
