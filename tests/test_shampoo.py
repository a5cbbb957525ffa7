"""Shampoo: its numbers against a reference, its refreshes, grafting and guards."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_kron import Blocking, scale_by_shampoo, scale_by_soap, shampoo
from optax_kron.kernels import packed
from tests.reference import shampoo as reference

RTOL = 1e-9  # float64 against the reference
PLAIN = {
    "momentum": None,
    "grafting": None,
    "factor_dtype": "float64",
    "relative_damping": 1e-6,
    "root_method": "eigh",  # right to rounding, where products only estimate the damping
}


def gradients(shape, steps=5, seed=0, is_complex=False):
    rng = np.random.default_rng((seed, *shape))
    drawn = rng.normal(size=(steps, *shape))
    return drawn + 1j * rng.normal(size=drawn.shape) if is_complex else drawn


def run(tx, stream):
    """All updates, and all states."""
    state = tx.init(jnp.asarray(stream[0]))
    update = jax.jit(tx.update)
    updates, states = [], []
    for G in stream:
        u, state = update(jnp.asarray(G), state)
        updates.append(np.asarray(u))
        states.append(state)
    return updates, states


def assert_close(actual, expected, rtol=RTOL):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.max(np.abs(expected)))


SHAPES = {
    (5,): (True,),
    (4, 3): (False, False),
    (4, 1): (True, True),
    (3, 4, 2): (False, False, False),
    (2, 3, 2, 3): (False, False, False, False),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {"decay": None},
        {"decay": 0.9, "corrected": False},
        {"decay": 0.9},
        {"decay": 0.9, "every": 3},
        {"decay": None, "order": 3},
    ],
    ids=str,
)
@pytest.mark.usefixtures("x64")
def test_updates_are_those_of_the_reference(shape, settings):
    stream = gradients(shape)
    stage = reference.Shampoo(shape, SHAPES[shape], epsilon=1e-6, **settings)
    expected = [stage.step(G) for G in stream]
    tx = scale_by_shampoo(
        **PLAIN,
        decay=settings["decay"],
        bias_correction=settings.get("corrected", True),
        root_order=settings.get("order"),
        refresh_every=settings.get("every", 1),
    )
    updates, states = run(tx, stream)
    assert int(states[-1].failed_refreshes) == 0
    for actual, G in zip(updates, expected, strict=True):
        assert_close(actual, G)


@pytest.mark.usefixtures("x64")
def test_complex_gradients():
    stream = gradients((4, 3), is_complex=True)
    stage = reference.Shampoo((4, 3), (False, False), epsilon=1e-6)
    updates, _ = run(scale_by_shampoo(**PLAIN, decay=0.9, refresh_every=1), stream)
    for actual, G in zip(updates, stream, strict=True):
        assert_close(actual, stage.step(G))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("is_complex", [False, True])
def test_long_axes_are_kept_packed(is_complex, monkeypatch):
    monkeypatch.setattr(packed, "LEAST_SIZE", 64)
    stream = gradients((65, 64), steps=3, is_complex=is_complex)
    stage = reference.Shampoo((65, 64), (False, False), epsilon=1e-6, every=2)
    updates, states = run(scale_by_shampoo(**PLAIN, decay=0.9, refresh_every=2), stream)
    for actual, G in zip(updates, stream, strict=True):
        assert_close(actual, stage.step(G))
    (stack,) = states[-1].stacks.values()
    for kept in (stack.statistics, stack.roots):
        assert [x.shape for x in kept] == [(1, 65, 33), (1, 65, 32)]
    for kept, expected in zip(stack.statistics, stage.statistics, strict=True):
        assert_close(packed.unpack(kept)[0], expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(4, 3), (3, 4, 2)], ids=str)
def test_newton_roots_give_the_updates_of_eigendecompositions(shape):
    stream = gradients(shape, steps=8)
    tx = scale_by_shampoo(**{**PLAIN, "relative_damping": 1e-9}, refresh_every=1)
    newton = scale_by_shampoo(
        **{**PLAIN, "relative_damping": 1e-9, "root_method": "newton"}, refresh_every=1
    )
    # After a few gradients the statistics have full rank, and the damping hardly tells.
    assert_close(run(newton, stream)[0][-1], run(tx, stream)[0][-1], rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_blocks_are_preconditioned_one_by_one():
    stream = gradients((4, 6))
    tx = scale_by_shampoo(**PLAIN, refresh_every=1, blocking=Blocking(block_size=3))
    updates, _ = run(tx, stream)
    whole = scale_by_shampoo(**PLAIN, refresh_every=1, blocking=Blocking())
    for columns in (slice(0, 3), slice(3, 6)):
        # Pieces of an axis have the same length, so rows are cut into [:2] and [2:].
        for rows in (slice(0, 2), slice(2, 4)):
            alone, _ = run(whole, stream[:, rows, columns])
            assert_close(updates[-1][rows, columns], alone[-1])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("grafting", "expected"),
    [
        ("sgd", lambda G: G[-1]),
        ("adagrad", lambda G: G[-1] / np.sqrt(np.sum(G**2, axis=0))),
        ("rmsprop", None),
        ("adam", None),
    ],
)
def test_grafting_takes_the_length_of_the_other_optimizer(grafting, expected):
    stream = gradients((4, 3))
    settings = PLAIN | {"grafting": grafting}
    tx = scale_by_shampoo(**settings, b2=0.8, eps=0.0, refresh_every=1)
    bare = scale_by_shampoo(**PLAIN, refresh_every=1)
    weights = 0.2 * 0.8 ** np.arange(len(stream))[::-1]
    second = np.tensordot(weights, stream**2, axes=1)
    if grafting == "rmsprop":
        length = np.linalg.norm(stream[-1] / np.sqrt(second))
    elif grafting == "adam":
        length = np.linalg.norm(stream[-1] / np.sqrt(second / weights.sum()))
    else:
        length = np.linalg.norm(expected(stream))
    plain = run(bare, stream)[0][-1]
    assert_close(run(tx, stream)[0][-1], plain * length / np.linalg.norm(plain))


@pytest.mark.usefixtures("x64")
def test_before_the_start_the_update_is_the_grafted_one():
    stream = gradients((4, 3))
    settings = PLAIN | {"grafting": "sgd"}
    updates, _ = run(scale_by_shampoo(**settings, start_step=3), stream)
    np.testing.assert_array_equal(updates[:2], stream[:2])
    assert not np.allclose(updates[2], stream[2])


@pytest.mark.usefixtures("x64")
def test_momentum_is_preconditioned():
    stream = gradients((4, 3))
    settings = PLAIN | {"momentum": 0.9}
    updates, states = run(scale_by_shampoo(**settings, refresh_every=1), stream)
    weights = 0.9 ** np.arange(len(stream))[::-1]
    average = np.tensordot(weights / weights.sum(), stream, axes=1)
    (stack,) = states[-1].stacks.values()
    assert_close(updates[-1], reference.psgd.apply([r[0] for r in stack.roots], average))


def many_blocks(steps=6):
    rng = np.random.default_rng(7)
    shapes = {"a": (6, 6), "b": (4, 3), "c": (5,)}
    return [
        {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
        for _ in range(steps)
    ]


def test_staggered_refreshes_come_once_for_each_block():
    stream = many_blocks(7)
    tx = shampoo(0.1, refresh_every=3, stagger=True, blocking=Blocking(block_size=3))
    state, update = tx.init(stream[0]), jax.jit(tx.update)
    roots = []
    for grads in stream:
        _, state = update(grads, state)
        stacks = optax.tree.get(state, "stacks")
        roots.append({x: np.asarray(s.roots[0]) for x, s in stacks.items() if s.roots[0].ndim > 2})
    assert optax.tree.get(state, "refreshes") == 7
    for label in roots[0]:
        changed = np.array(
            [
                np.any((b[label] != a[label]).reshape(len(a[label]), -1), axis=1)
                for a, b in itertools.pairwise(roots)
            ]
        )
        # In any three steps every block's roots are made anew, and once.
        np.testing.assert_array_equal(changed[:3].sum(axis=0), 1)
        np.testing.assert_array_equal(changed[3:].sum(axis=0), 1)
    # Six blocks with dense statistics, dealt out to three steps.
    assert max(int(x) for x in _per_step(roots)) <= 2


def test_blocks_of_different_shapes_take_turns():
    params = {str(d): jnp.ones((d, d)) for d in range(2, 8)}
    tx = shampoo(0.1, refresh_every=3, stagger=True)
    state, update = tx.init(params), jax.jit(tx.update)
    roots = []
    for step in range(4):
        _, state = update(jax.tree.map(lambda x, step=step: x * (step + 1), params), state)
        stacks = optax.tree.get(state, "stacks")
        roots.append({label: np.asarray(x.roots[0]) for label, x in stacks.items()})
    # The first gradient sets all of them.
    for label, found in roots[0].items():
        assert not np.array_equal(found[0], np.eye(len(found[0]))), label
    assert [int(x) for x in _per_step(roots)] == [2, 2, 2]


def _per_step(roots):
    for a, b in itertools.pairwise(roots):
        yield sum(
            np.any((b[label] != a[label]).reshape(len(a[label]), -1), axis=1).sum() for label in a
        )


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("method", ["eigh", "newton"])
def test_a_spoilt_statistic_keeps_the_last_root_and_counts(method, stagger):
    stream = many_blocks()
    tx = scale_by_shampoo(root_method=method, refresh_every=1, stagger=stagger)
    assert_keeps_what_it_had(tx, stream, lambda stack: stack.roots)


def assert_keeps_what_it_had(tx, stream, made_of):
    """A block with a NaN in a statistic; the others move on. `made_of` says what is kept."""
    state, update = tx.init(stream[0]), jax.jit(tx.update)
    for grads in stream[:3]:
        _, state = update(grads, state)
    stack = state.stacks["4x3"]
    S = stack.statistics[0].at[0, 1, 1].set(jnp.nan)
    stack = stack._replace(statistics=(S, *stack.statistics[1:]))
    spoilt = state._replace(stacks={**state.stacks, "4x3": stack})
    updates, new = update(stream[3], spoilt)
    assert int(new.failed_refreshes) == 1
    for old, kept in zip(made_of(stack), made_of(new.stacks["4x3"]), strict=True):
        np.testing.assert_array_equal(kept, old)
    moved, before = (made_of(x.stacks["6x6"])[0] for x in (new, state))
    assert not np.array_equal(moved, before)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


def test_a_gradient_whose_square_the_statistics_cannot_hold_is_not_taken_in():
    assert_is_not_taken_in(scale_by_shampoo(factor_dtype="float16", outlier_clip=None), 1e4)


def assert_is_not_taken_in(tx, scale):
    """A gradient of that size, whose square the statistics of float16 cannot hold."""
    state = tx.init(jnp.zeros((4, 3)))
    G = jnp.asarray(gradients((4, 3))[0], jnp.float32)
    _, state = jax.jit(tx.update)(G, state)
    updates, new = jax.jit(tx.update)(G * scale, state)
    assert int(new.failed_refreshes) == 1
    assert int(new.skipped_steps) == 0  # The momentum has taken it in.
    for x, y in zip(new.stacks["4x3"].statistics, state.stacks["4x3"].statistics, strict=True):
        np.testing.assert_array_equal(x, y)
    assert np.isfinite(updates).all()


@pytest.mark.parametrize("method", ["eigh", "newton"])
@pytest.mark.parametrize("epsilon", [0.0, 1e-12])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_noise_in_the_statistics_spoils_no_root(dtype, epsilon, method):
    # Of rank 2 and 8: but for rounding, most eigenvalues are zero.
    rng = np.random.default_rng(3)
    fixed = rng.normal(size=(16, 2))
    stream = [jnp.asarray(fixed @ rng.normal(size=(2, 16)), jnp.float32) for _ in range(8)]
    tx = scale_by_shampoo(
        factor_dtype=dtype,
        relative_damping=epsilon,
        root_method=method,
        refresh_every=1,
        grafting=None,
    )
    updates, states = run(tx, stream)
    assert int(states[-1].failed_refreshes) == 0
    assert np.isfinite(updates).all()
    assert np.max(np.abs(updates)) < 10


@pytest.mark.usefixtures("x64")
def test_newton_roots_of_low_rank_in_float64():
    rng = np.random.default_rng(3)
    stream = [np.outer(rng.normal(size=64), rng.normal(size=64)) for _ in range(2)]
    tx = scale_by_shampoo(
        factor_dtype="float64",
        relative_damping=0.0,
        root_method="newton",
        root_order=8,
        refresh_every=1,
    )
    _, states = run(tx, stream)
    assert int(states[-1].failed_refreshes) == 0


@pytest.mark.parametrize("shift", [0.1, 10.0])
def test_a_root_that_is_none_is_dropped(shift):
    tx = scale_by_shampoo(refresh_every=1)
    G = jnp.asarray(gradients((3, 3))[0], jnp.float32)
    _, state = tx.update(G, tx.init(G))
    stack = state.stacks["3x3"]
    spoilt = stack._replace(
        statistics=(stack.statistics[0] - shift * jnp.eye(3), stack.statistics[1])
    )
    _, new = tx.update(G, state._replace(stacks={"3x3": spoilt}))
    assert int(new.failed_refreshes) == 1
    np.testing.assert_array_equal(new.stacks["3x3"].roots[0], stack.roots[0])


def test_a_gradient_whose_square_vanishes_is_no_failure():
    G = jnp.full((3, 3), 1e-25)
    tx = scale_by_shampoo(refresh_every=1)
    updates, state = tx.update(G, tx.init(G))
    assert int(state.failed_refreshes) == 0
    assert np.isfinite(updates).all()


def test_roots_of_diagonals_are_never_old():
    g, h = jnp.array([1.0, 1e-3, 3.0]), jnp.array([1.0, 1.0, -1.0])
    tx = scale_by_shampoo(grafting=None, momentum=None, refresh_every=100, decay=0.5)
    updates, _ = run(tx, [g, h])
    # The mean square, where both count alike as the average is corrected for its start.
    mean = np.square(g) / 3 + 2 * np.square(h) / 3
    np.testing.assert_allclose(updates[1], h / np.sqrt(mean), rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (1, 4, 1)], ids=str)
def test_axes_of_length_one_make_no_difference(shape):
    G = 100 * gradients((4,)).astype(np.float32)
    settings = {"grafting": None, "momentum": None}
    expected, _ = run(scale_by_shampoo(**settings), G)
    updates, _ = run(scale_by_shampoo(**settings), G.reshape(-1, *shape))
    np.testing.assert_allclose(np.reshape(updates, np.shape(expected)), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(4,), (4, 3)], ids=str)
def test_a_root_that_overflows_where_it_is_kept_is_dropped(shape):
    G = 1e-3 * gradients(shape).astype(np.float32)
    tx = scale_by_shampoo(
        factor_dtype="float16", root_order=1, refresh_every=1, grafting=None, momentum=None
    )
    updates, states = run(tx, G)
    assert int(states[-1].failed_refreshes) == len(G)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(states[-1].stacks))
    # The first roots, of the identity, are kept.
    np.testing.assert_allclose(updates, G)


def test_a_late_vector_makes_no_dense_root():
    tx = scale_by_shampoo()
    stream = [{"k": jnp.ones((4, 3)), "b": jnp.full(3, x)} for x in (0.0, 0.0, 1.0)]
    state = tx.init(stream[0])
    for grads in stream:
        _, state = tx.update(grads, state)
    assert int(state.refreshes) == 1


def test_beside_a_diagonal_dense_roots_wait_for_their_refresh():
    tx = scale_by_shampoo(refresh_every=3, blocking=Blocking(max_size=4))
    _, states = run(tx, gradients((6, 3), steps=5))
    roots = [next(iter(state.stacks.values())).roots for state in states]
    for axis, expected in enumerate(([True] * 4, [False, True, False, False])):
        pairs = itertools.pairwise(x[axis] for x in roots)
        assert [not np.array_equal(*pair) for pair in pairs] == expected


def test_a_failure_in_turn_is_counted_once():
    params = {name: jnp.ones((2, 2)) for name in "abc"}
    tx = scale_by_shampoo(refresh_every=2, stagger=True)
    _, state = tx.update(params, tx.init(params))
    stack = state.stacks["2x2"]
    # The last block of three: its turn has two rows, and so has the other, of which one is empty.
    spoilt = stack._replace(statistics=tuple(x.at[2].set(jnp.nan) for x in stack.statistics))
    state = state._replace(stacks={"2x2": spoilt})
    for _ in range(2):
        _, state = jax.jit(tx.update)(params, state)
    assert int(state.failed_refreshes) == 1


def test_a_gradient_whose_square_overflows_is_not_taken_in():
    tx = scale_by_shampoo(refresh_every=1)
    state = tx.init(jnp.zeros((4, 3)))
    G = jnp.asarray(gradients((4, 3))[0], jnp.float32)
    _, state = jax.jit(tx.update)(G, state)
    updates, new = jax.jit(tx.update)(G * 1e25, state)
    assert int(new.skipped_steps) == 1
    for x, y in zip(jax.tree.leaves(new.stacks), jax.tree.leaves(state.stacks), strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(updates, 0)


def test_without_damping_padding_makes_no_difference():
    settings = {"relative_damping": 0.0, "grafting": None, "momentum": None}
    b, c = jnp.array([1.0, -2, 3]), jnp.ones(7)
    alone, _ = run(scale_by_shampoo(**settings), [b])
    tx = scale_by_shampoo(**settings)
    beside, state = tx.update({"b": b, "c": c}, tx.init({"b": b, "c": c}))
    np.testing.assert_allclose(beside["b"], alone[0], rtol=1e-6)
    assert int(state.failed_refreshes) == 0


def test_a_state_of_another_optimizer_or_setting_is_refused():
    x = jnp.ones((3, 2))
    for maker, user in [
        (scale_by_shampoo(), scale_by_soap()),
        (scale_by_soap(), scale_by_soap(variant="kl_soap")),
        (scale_by_soap(momentum=None), scale_by_soap()),
        (scale_by_shampoo(grafting="sgd"), scale_by_shampoo()),
    ]:
        with pytest.raises(ValueError, match="the state was made by another optimizer"):
            user.update(x, maker.init(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 1.0}, "shampoo: decay must be a number in [0, 1)"),
        ({"root_order": 0}, "shampoo: root_order must be an int ≥ 1 or None; got 0"),
        ({"root_order": 2.5}, "shampoo: root_order must be an int ≥ 1 or None; got 2.5"),
        ({"root_method": "svd"}, "shampoo: root_method must be one of eigh, newton; got 'svd'"),
        ({"relative_damping": -1.0}, "shampoo: relative_damping must be a number in [0, inf]"),
        (
            {"grafting": "lion"},
            "shampoo: grafting must be one of sgd, adagrad, rmsprop, adam, None; got 'lion'",
        ),
        ({"bias_correction": None}, "shampoo: bias_correction must be True or False; got None"),
        ({"refresh_every": len}, "got a function. Where schedules are not taken"),
        ({"root_order": jnp.ones(2, int)}, 'static_args=("root_order",)'),
        ({"refresh_every": 0}, "shampoo: refresh_every must be a number in [1, inf]"),
        ({"refresh_every": 1.5}, "shampoo: refresh_every must be an integer ≥ 1; got 1.5"),
        ({"blocking": 128}, "shampoo: blocking must be an ok.Blocking; got 128"),
        ({"factor_dtype": "int8"}, "shampoo: factor_dtype must be a real floating-point dtype"),
        ({"learning_rate": -1.0}, "shampoo: learning_rate must be a number in [0, inf]"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        shampoo(**settings)


def test_a_staggered_interval_may_not_be_traced():
    ones = jnp.ones((2, 2))
    tx = optax.inject_hyperparams(shampoo)(0.1, refresh_every=3, stagger=True)
    with pytest.raises(ValueError, match="static_args"):
        jax.jit(tx.update)(ones, tx.init(ones), ones)
    factory = optax.inject_hyperparams(shampoo, static_args=("refresh_every",))
    tx = factory(0.1, refresh_every=3, stagger=True)
    jax.jit(tx.update)(ones, tx.init(ones), ones)


@pytest.mark.parametrize("grafting", ["adam", "sgd", "adagrad", None])
def test_a_block_of_one_element_without_gradient_leaves_its_neighbours(grafting):
    # Zero over the tiny numbers of Adam's division, which is zero too, and of a norm.
    tx = shampoo(0.1, grafting=grafting, blocking=Blocking(block_size=1))
    gradient = jnp.array([1.0, 0.0, 2.0, 3.0, 4.0])
    updates, _ = jax.jit(tx.update)(gradient, tx.init(gradient), gradient)
    np.testing.assert_array_equal(updates != 0, gradient != 0)
    assert jnp.all(jnp.isfinite(updates))


@pytest.mark.usefixtures("x64")
def test_roots_of_similar_sizes_share_a_program_and_are_as_each_alone():
    """Of several parameters, one of which gets its first gradient at the second step."""
    shapes = {"a": (12, 9), "b": (9, 7), "c": (3, 8)}
    drawn = {k: gradients(shape, steps=3) for k, shape in shapes.items()}
    drawn["c"][0] = 0
    settings = {**PLAIN, "relative_damping": 1e-3, "refresh_every": 2}

    def updates_of(names, **changes):
        tx = scale_by_shampoo(**{**settings, **changes})
        update, updates = jax.jit(tx.update), []
        state = tx.init({k: jnp.zeros(shapes[k]) for k in names})
        for i in range(3):
            u, state = update({k: jnp.asarray(drawn[k][i]) for k in names}, state)
            updates.append(u)
        assert int(state.failed_refreshes) == 0
        return updates

    together = updates_of(shapes, root_method="newton")
    for name in shapes:
        for one, found in zip(updates_of([name]), together, strict=True):
            # The largest eigenvalue, which damping is relative to, is an estimate.
            assert_close(found[name], one[name], rtol=1e-3)
