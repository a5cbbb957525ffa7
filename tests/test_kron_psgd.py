"""What each setting of kron_psgd does, seen through the transformation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_kron as ok
from optax_kron.kernels import psgd


def gradients(tree, step):
    """Independent normal gradients like a tree."""
    return optax.tree.random_like(jax.random.key(step), tree)


def run(tx, params, steps, **extra):
    """All updates, and the last state, of a transformation fed with random gradients."""
    state, update, updates = tx.init(params), jax.jit(tx.update), []
    for step in range(steps):
        u, state = update(gradients(params, step), state, params, **extra)
        updates.append(u)
    return updates, state


PARAMS = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6), "tensor": jnp.ones((2, 3, 4))}


def assert_same(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_learning_rate_completes_the_preconditioner():
    whole, _ = run(ok.kron_psgd(1e-3), PARAMS, 3)
    chained, _ = run(optax.chain(ok.kron_psgd(), optax.scale_by_learning_rate(1e-3)), PARAMS, 3)
    assert_same(whole, chained, rtol=0)


def test_bare_preconditioner_points_uphill():
    updates, _ = run(ok.scale_by_kron_psgd(momentum=None), PARAMS, 1)
    g = gradients(PARAMS, 0)
    assert optax.tree.vdot(updates[0], g) > 0


@pytest.mark.parametrize("probability", [1.0, 0.3])
def test_cache_changes_nothing_but_the_state(probability):
    settings = {"update_probability": probability, "rms_clip": None}
    cached, with_cache = run(
        ok.scale_by_kron_psgd(**settings, cache_preconditioner=True), PARAMS, 8
    )
    plain, without = run(ok.scale_by_kron_psgd(**settings, cache_preconditioner=False), PARAMS, 8)
    # (QᴴQ)m and Qᴴ(Qm) differ by float32 rounding.
    assert_same(cached, plain, rtol=2e-5, atol=2e-5)
    sizes = [sum(x.size for x in jax.tree.leaves(s.stacks)) for s in (with_cache, without)]
    assert sizes[0] > 1.5 * sizes[1]


@pytest.mark.parametrize(
    ("geometry", "asked", "cached"),
    [
        ("EQ", None, False),
        ("QEQ", None, True),
        ("QUAD", None, True),
        ("PRO4P", None, False),
        ("QUAD4P", True, False),
    ],
)
def test_there_is_a_cache_where_full_factors_are_not_those_of_p(geometry, asked, cached):
    tx = ok.scale_by_kron_psgd(geometry=geometry, cache_preconditioner=asked)
    stacks = jax.eval_shape(tx.init, PARAMS).stacks
    assert all((x.preconditioner is not None) == cached for x in stacks.values())


def test_refreshes_are_counted_deterministically():
    for probability, expected in [(1.0, 12), (0.25, 3), (0.0, 1), (1 / 3, 4)]:
        _, state = run(ok.scale_by_kron_psgd(update_probability=probability), PARAMS, 12)
        assert state.refreshes == expected, probability


def test_update_probability_may_be_a_schedule():
    schedule = optax.piecewise_constant_schedule(1.0, {4: 0.5})  # 1 for four steps, then 1/2
    _, state = run(ok.scale_by_kron_psgd(update_probability=schedule), PARAMS, 12)
    assert state.refreshes in (8, 9)


def test_default_schedule():
    schedule = ok.update_probability_schedule()
    t = np.array([0, 500, 1500, 100_000])
    expected = np.clip(np.exp(-0.001 * (t - 500)), 0.03, 1)
    np.testing.assert_allclose(schedule(t), expected, rtol=1e-6)


def test_rms_clip_caps_each_parameter():
    updates, _ = run(ok.scale_by_kron_psgd(rms_clip=0.5, init_scale=100.0), PARAMS, 2)
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_allclose(jnp.sqrt(jnp.mean(leaf**2)), 0.5, rtol=1e-5)


def test_max_abs_clip_rescales_the_whole_parameter():
    settings = {"rms_clip": None, "init_scale": 10.0}
    free, _ = run(ok.scale_by_kron_psgd(**settings), PARAMS, 1)
    capped, _ = run(ok.scale_by_kron_psgd(**settings, max_abs_clip=1.0), PARAMS, 1)
    for u, v in zip(jax.tree.leaves(free), jax.tree.leaves(capped), strict=True):
        np.testing.assert_allclose(v, u / jnp.max(jnp.abs(u)), rtol=1e-5)


def test_clips_see_parameters_not_blocks():
    blocking = ok.Blocking(block_size=2)
    updates, state = run(
        ok.scale_by_kron_psgd(rms_clip=0.5, init_scale=100.0, blocking=blocking), PARAMS, 2
    )
    assert any(stack.initialized.shape[0] > 1 for stack in state.stacks.values())
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_allclose(jnp.sqrt(jnp.mean(leaf**2)), 0.5, rtol=1e-5)


def test_weight_decay_is_decoupled_and_masked():
    plain, _ = run(ok.kron_psgd(0.1), PARAMS, 1)
    mask = {"kernel": True, "bias": False, "tensor": True}
    decayed, _ = run(ok.kron_psgd(0.1, weight_decay=0.5, mask=mask), PARAMS, 1)
    difference = jax.tree.map(lambda u, v: v - u, plain[0], decayed[0])
    np.testing.assert_allclose(difference["kernel"], -0.05, rtol=1e-4)
    np.testing.assert_array_equal(difference["bias"], 0)


def test_momentum_is_bias_corrected():
    """Of one and the same gradient, the average is that gradient, at every step."""
    g = gradients(PARAMS, 0)
    settings = {"update_probability": 0.0, "rms_clip": None}
    averaged, plain = (ok.scale_by_kron_psgd(momentum=m, **settings) for m in (0.9, None))
    states = [tx.init(PARAMS) for tx in (averaged, plain)]
    updates = [jax.jit(tx.update) for tx in (averaged, plain)]
    for _ in range(4):
        u, states[0] = updates[0](g, states[0])
        v, states[1] = updates[1](g, states[1])
        assert_same(u, v, rtol=1e-5, atol=1e-6)


def test_stacked_axes_equal_separate_parameters():
    stacked = {"w": jnp.ones((3, 4, 2))}
    separate = {f"w{i}": jnp.ones((4, 2)) for i in range(3)}
    a = ok.scale_by_kron_psgd(blocking=ok.Blocking(stacked_axes=1), rms_clip=None)
    b = ok.scale_by_kron_psgd(rms_clip=None)
    state_a, state_b = a.init(stacked), b.init(separate)
    update_a, update_b = jax.jit(a.update), jax.jit(b.update)
    for step in range(5):
        g = gradients(stacked, step)
        u, state_a = update_a(g, state_a)
        v, state_b = update_b({f"w{i}": g["w"][i] for i in range(3)}, state_b)
        np.testing.assert_allclose(u["w"], jnp.stack(list(v.values())), rtol=1e-6)


def test_a_parameter_and_its_transpose_are_treated_alike():
    tx = ok.scale_by_kron_psgd()
    w = jnp.ones((5, 3))
    state_a, state_b = tx.init(w), tx.init(w.T)
    update = jax.jit(tx.update)
    for step in range(4):
        g = gradients(w, step)
        u, state_a = update(g, state_a)
        v, state_b = update(g.T, state_b)
        np.testing.assert_allclose(u, v.T, rtol=1e-6)


@pytest.mark.parametrize("geometry", psgd.GEOMETRIES)
def test_padded_blocks_stay_finite_and_apart(geometry):
    """Blocks of 3 and 2 rows in one padded stack: hundreds of moves leave the padding alone."""
    w = jnp.ones((5, 4))
    tx = ok.scale_by_kron_psgd(geometry=geometry, blocking=ok.Blocking(block_size=4))
    updates, state = run(tx, w, 300)
    (stack,) = state.stacks.values()
    assert state.failed_refreshes == 0
    assert all(jnp.all(jnp.isfinite(q)) for q in stack.factors)
    padded = np.asarray(stack.factors[1][1])  # the short axis, in the block with two valid rows
    np.testing.assert_array_equal(padded[:2, 2:], 0)
    np.testing.assert_array_equal(padded[2:, :2], 0)
    assert float(jnp.sqrt(jnp.mean(updates[-1] ** 2))) > 0.1


@pytest.mark.parametrize("criterion", ["whiten_momentum", "whiten_gradient"])
def test_gradients_become_white(criterion):
    """Of gradients with covariance B ⊗ A, the preconditioned ones have covariance near I."""
    rows = jnp.diag(jnp.array([3.0, 1.0, 0.1]))
    columns = jnp.diag(jnp.array([5.0, 0.2]))
    tx = ok.scale_by_kron_psgd(
        momentum=None,
        criterion=criterion,
        precond_lr=0.1,
        update_probability=1.0,
        rms_clip=None,
    )

    def step(state, key):
        u, state = tx.update(rows @ jax.random.normal(key, (3, 2)) @ columns, state)
        return state, u

    keys = jax.random.split(jax.random.key(0), 6000)
    _, updates = jax.lax.scan(step, tx.init(jnp.ones((3, 2))), keys)
    flat = updates[3000:].reshape(3000, 6)
    covariance = flat.T @ flat / 3000
    # A stochastic fit at precond_lr = 0.1 fluctuates, and 3000 samples add 3 %.
    np.testing.assert_allclose(jnp.diag(covariance), 1, atol=0.4)
    assert np.abs(covariance - jnp.diag(jnp.diag(covariance))).max() < 0.2


def test_newton_inverts_the_hessian():
    left = jnp.array([[2.0, 0.5], [0.5, 1.0]])
    right = jnp.diag(jnp.array([4.0, 1.0, 0.25]))

    def loss(w):
        return 0.5 * jnp.vdot(w, left @ w @ right)

    tx = ok.scale_by_kron_psgd(
        momentum=None,
        criterion="newton",
        geometry="QEQ",
        update_probability=1.0,
        rms_clip=None,
        precond_lr=0.3,
    )
    w = jnp.ones((2, 3))
    state = tx.init(w)
    hvp_fn = ok.hessian_vector_product(loss, w)
    update = jax.jit(lambda g, s: tx.update(g, s, hvp_fn=hvp_fn))
    for _ in range(300):
        newton_step, state = update(jax.grad(loss)(w), state)
    # The Newton step from w to the minimum, zero, is w itself; float32 sets the tolerance.
    np.testing.assert_allclose(newton_step, w, rtol=1e-3)


def test_hvp_is_called_only_when_the_factors_move():
    calls = []

    def hvp_fn(v):
        jax.debug.callback(lambda: calls.append(1))
        return v

    tx = ok.scale_by_kron_psgd(criterion="newton", update_probability=0.25)
    state = tx.init(PARAMS)
    update = jax.jit(lambda g, s: tx.update(g, s, hvp_fn=hvp_fn))
    for step in range(8):
        _, state = update(gradients(PARAMS, step), state)
    jax.effects_barrier()
    assert len(calls) == int(state.refreshes) == 2


def test_members_of_an_ensemble_may_have_seeds_of_their_own():
    keys = jax.random.split(jax.random.key(0), 3)
    params = jnp.ones((3, 2, 2))
    state = jax.vmap(lambda key, p: ok.kron_psgd(0.1, seed=key).init(p))(keys, params)
    expected = [ok.kron_psgd(0.1, seed=key).init(params[0])[0].key for key in keys]
    np.testing.assert_array_equal(state[0].key, expected)
    assert len({tuple(key.tolist()) for key in state[0].key}) == 3


def test_factors_are_as_precise_as_the_parameters_unless_asked(x64):
    narrow = {"a": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.ones((3, 3), jnp.float32)}
    wide = narrow | {"b": jnp.ones((3, 3), jnp.float64)}
    for params, asked, expected in [
        (narrow, None, jnp.float32),
        (wide, None, jnp.float64),
        (narrow, jnp.float64, jnp.float64),
        (wide, jnp.float32, jnp.float32),
    ]:
        state = ok.scale_by_kron_psgd(factor_dtype=asked).init(params)
        for stack in state.stacks.values():
            assert {q.dtype for q in stack.factors} == {jnp.dtype(expected)}


def test_momentum_dtype():
    state = ok.scale_by_kron_psgd(momentum_dtype=jnp.bfloat16).init(PARAMS)
    assert {m.dtype for m in jax.tree.leaves(state.momentum)} == {jnp.dtype(jnp.bfloat16)}


def test_an_idle_parameter_keeps_its_factors_until_its_first_gradient():
    """As the second factor of a low-rank adapter, whose gradient is zero at the start."""
    tx = ok.scale_by_kron_psgd(momentum=None)
    w = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 2))}
    state, update = tx.init(w), jax.jit(tx.update)
    for step in range(20):
        g = gradients(w, step)
        u, state = update({"a": g["a"], "b": jnp.zeros((3, 2))}, state)
    np.testing.assert_array_equal(u["b"], 0)
    np.testing.assert_array_equal(state.stacks["3x2"].initialized, [True, False])
    u, state = update(gradients(w, 99), state)
    rms = jax.tree.map(lambda x: float(jnp.sqrt(jnp.mean(x**2))), u)
    assert 0.2 < rms["b"] < 1.2


def test_newton_in_a_branch_that_closes_over_arrays():
    """Without jax.jit gradients and state are concrete there, and what is made of them is not."""
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}

    def loss_fn(params):
        return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(params))

    tx = ok.kron_psgd(0.1, criterion="newton")
    wrapped = optax.apply_if_finite(tx, 2)
    given = jax.grad(loss_fn)(params), params, ok.hessian_vector_product(loss_fn, params)
    updates, expected = (
        x.update(given[0], x.init(params), given[1], hvp_fn=given[2])[0] for x in (wrapped, tx)
    )
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
