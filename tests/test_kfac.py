"""K-FAC as a transformation: its numbers, its stacks, its guards, and Optax's wrappers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_kron import KronState, find_layers, losses, value_and_grad_with_taps
from optax_kron.kernels import packed
from optax_kron.kernels.kfac import APPROXIMATIONS, DAMPING_RULES
from optax_kron.layers.layer import Arrangement, AxisFactor, Layer, arrange
from optax_kron.layers.taps import Tap, Taps
from optax_kron.transforms import ekfac
from optax_kron.transforms import kfac as transforms

from .reference import kfac as reference

# The natural gradient itself, without the norm constraint that is on by default.
kfac = functools.partial(transforms.kfac, norm_constraint=None)
scale_by_kfac = functools.partial(transforms.scale_by_kfac, norm_constraint=None)
scale_by_ekfac = functools.partial(ekfac.scale_by_ekfac, norm_constraint=None)
RTOL = 1e-10  # of float64 against the dense reference
KERNEL = Layer("dense", kernel="kernel")
DENSE = Layer("dense", kernel="kernel", bias="bias")


def draw(*shape, seed=0, dtype=None):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def problem(seed=0, n=6, d_in=3, d_out=2):
    """Gradients of a dense layer with a bias, and what it saw: tall enough for full rank."""
    grads = {"kernel": draw(d_in, d_out, seed=seed), "bias": draw(d_out, seed=seed + 100)}
    inputs = jnp.append(draw(n, d_in, seed=seed + 200), jnp.ones((n, 1)), axis=1)
    return grads, Taps({"dense": Tap(inputs, draw(n, d_out, seed=seed + 300))})


def rows(tree):
    """The canonical form of a dense layer with a bias, in float64."""
    return np.concatenate([np.asarray(tree["kernel"]), np.asarray(tree["bias"])[None]])


def solved(grads, taps, damping=1e-3, rule="pi", approx="expand"):
    """The natural gradient of the first step, by dense Kronecker products."""
    tap = taps["dense"][0]
    A, G = reference.factors(tap.inputs[0], tap.output_grads[:, 0], tap.weights, approx)
    return reference.solve(A, G, rows(grads), damping, rule)


def settings(**changes):
    return {
        "layers": [DENSE],
        "momentum": None,
        "factor_dtype": "float64",
        "basis": "eigh",
        **changes,
    }


def run(tx, stream, params=None):
    """All updates, and the last state."""
    state, updates = tx.init(stream[0][0] if params is None else params), []
    update = jax.jit(lambda grads, state, taps: tx.update(grads, state, taps=taps))
    for grads, taps in stream:
        u, state = update(grads, state, taps)
        updates.append(u)
    return updates, state


def first(tx, grads, taps):
    """The first update, and the state after it."""
    return jax.jit(lambda grads, taps: tx.update(grads, tx.init(grads), taps=taps))(grads, taps)


def kept(state):
    """What a skipped step must leave as it is: all but its counter."""
    return state._replace(skipped_steps=0)


# ------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("rule", [*DAMPING_RULES, "ekfac"])
def test_packed_factors_and_inverses_change_nothing_but_the_state(x64, rule, monkeypatch):
    stream = [problem(seed) for seed in range(3)]
    own = settings(refresh_every=2)

    def make():
        tx = scale_by_ekfac(**own) if rule == "ekfac" else scale_by_kfac(**own, damping_rule=rule)
        updates, state = run(tx, stream)
        return updates, state.stacks["4x2"]

    expected, whole = make()
    monkeypatch.setattr(packed, "LEAST_SIZE", 2)
    updates, stack = make()
    chex.assert_trees_all_close(updates, expected, rtol=RTOL)
    kept = [stack.input_factor, stack.output_factor]
    if rule not in ("exact", "ekfac"):
        kept += stack.inverse
    assert [x.shape[1:] for x in kept] == [(5, 2), (3, 1)] * (len(kept) // 2)
    for i in range(2):
        np.testing.assert_allclose(packed.unpack(stack[i]), whole[i], rtol=RTOL)


@pytest.mark.parametrize("ema", [0.95, 0.5, 0.0, 1.0, 1.5, -0.5])
def test_trace_rule_is_the_layer_of_the_reference(x64, ema):
    """Factors, damping, inverse, natural gradient and average over several updates."""
    layer = reference.Layer(3, 2, ema=ema, damping=1e-3)

    def tx(decay):
        return scale_by_kfac(
            layers=[KERNEL], decay=decay, damping=1e-3, damping_rule="trace", momentum=None,
            refresh_every=1, factor_dtype="float64",
        )  # fmt: skip

    @jax.jit
    def update(decay, grads, state, taps):
        # Where it is traced, and cannot be refused, it is clamped, as the reference's is.
        return tx(decay).update(grads, state, taps=taps)

    state = tx(0.5).init({"kernel": jnp.zeros((3, 2))})
    for step in range(4):
        a, g, W = (draw(*s, seed=10 * step + i) for i, s in enumerate([(5, 3), (5, 2), (3, 2)]))
        layer.update(a, g)
        updates, state = update(ema, {"kernel": W}, state, Taps({"dense": Tap(a, g)}))
        stack = state.stacks["3x2"]
        np.testing.assert_allclose(stack.input_factor[0], layer.A, rtol=RTOL)
        np.testing.assert_allclose(stack.output_factor[0], layer.G, rtol=RTOL)
        for inverse, factor in zip(stack.inverse, (layer.A, layer.G), strict=True):
            np.testing.assert_allclose(inverse[0], np.linalg.inv(layer.damped(factor)), rtol=RTOL)
        natural = layer.natural_gradient(np.asarray(W).T)
        np.testing.assert_allclose(updates["kernel"].T, natural, rtol=RTOL)
        assert state.schedule.factor_updates == layer.updates


def test_alias_steps_down_the_natural_gradient(x64):
    grads, taps = problem()
    tx = kfac(0.1, **settings(damping_rule="trace"))
    updates, _ = first(tx, grads, taps)
    np.testing.assert_allclose(rows(updates), -0.1 * solved(grads, taps, rule="trace"), rtol=RTOL)


@pytest.mark.parametrize("rule", DAMPING_RULES)
@pytest.mark.parametrize("approx", APPROXIMATIONS)
def test_first_update_is_the_dense_inverse(x64, rule, approx):
    grads, _ = problem()
    inputs = jnp.append(draw(1, 6, 4, 3), jnp.ones((1, 6, 4, 1)), axis=-1)
    weights = jnp.array([1.0, 2.0, 0.0, 1.0, 0.5, 1.0])
    taps = Taps({"dense": Tap(inputs, draw(2, 1, 6, 4, 2), weights)})
    tx = scale_by_kfac(**settings(damping=0.1, damping_rule=rule, approx=approx))
    updates, _ = first(tx, grads, taps)
    expected = solved(grads, taps, 0.1, rule, approx)
    np.testing.assert_allclose(rows(updates), expected, rtol=RTOL)


def test_groups_are_averaged_by_cases_and_summed(x64):
    grads, _ = problem()
    many = Tap(draw(1, 4, 2, 4, seed=1), draw(1, 1, 4, 2, 2))
    taps = [many, Tap(draw(1, 3, 1, 4), draw(2, 1, 3, 1, 2))]
    tx = scale_by_kfac(**settings())
    _, state = first(tx, grads, Taps({"dense": taps}))
    pairs = [reference.factors(t.inputs[0], t.output_grads[:, 0]) for t in taps]
    stack = state.stacks["4x2"]
    A = (8 * pairs[0][0] + 3 * pairs[1][0]) / 11
    np.testing.assert_allclose(stack.input_factor[0], A, rtol=RTOL)
    np.testing.assert_allclose(stack.output_factor[0], pairs[0][1] + pairs[1][1], rtol=RTOL)


def test_groups_are_averaged_by_what_their_data_weigh(x64):
    grads, _ = problem()
    many = Tap(draw(1, 4, 2, 4, seed=1), draw(1, 1, 4, 2, 2), 0.1 * jnp.arange(4.0))
    few = Tap(draw(1, 3, 1, 4), draw(2, 1, 3, 1, 2), jnp.array([[2.0], [0.0], [1.0]]))
    _, state = first(scale_by_kfac(**settings()), grads, Taps({"dense": [many, few]}))
    A = [
        reference.factors(t.inputs[0], t.output_grads[:, 0], t.weights.ravel())[0]
        for t in (many, few)
    ]
    expected = (0.6 * A[0] + 3 * A[1]) / 3.6
    np.testing.assert_allclose(state.stacks["4x2"].input_factor[0], expected, rtol=RTOL)


def test_without_columns_the_output_factor_is_the_identity():
    grads, taps = problem()
    taps = Taps({"dense": Tap(taps["dense"][0].inputs, jnp.zeros((0, 1, 6, 1, 2)))})
    tx = scale_by_kfac(layers=[DENSE])
    _, state = first(tx, grads, taps)
    np.testing.assert_array_equal(state.stacks["4x2"].output_factor[0], np.eye(2))


@pytest.mark.parametrize("rule", DAMPING_RULES)
def test_embedding_is_the_one_hot_layer_with_the_diagonal_taken(x64, rule):
    indices = jnp.asarray(np.random.default_rng(0).integers(0, 5, size=(1, 6, 3, 1)))
    columns, grads = draw(1, 1, 6, 3, 2), {"table": draw(5, 2)}
    layer = Layer("dense", kernel="table", is_embedding=True)
    tx = scale_by_kfac(**settings(layers=[layer], damping_rule=rule))
    taps = Taps({"dense": Tap(indices, columns)})
    updates, state = first(tx, grads, taps)
    assert state.stacks["5diagx2"].input_factor.shape == (1, 5)
    A, G = reference.factors(np.eye(5)[indices[0, ..., 0]], columns[:, 0])
    expected = reference.solve(np.diag(np.diag(A)), G, grads["table"], 1e-3, rule)
    np.testing.assert_allclose(updates["table"], expected, rtol=RTOL)


@pytest.mark.parametrize("approx", APPROXIMATIONS)
def test_bias_alone_always_reduces(x64, approx):
    columns, grads = draw(1, 1, 6, 3, 2), {"bias": draw(2)}
    tx = scale_by_kfac(**settings(layers=[Layer("dense", bias="bias")], approx=approx))
    taps = Taps({"dense": Tap(jnp.ones((1, 6, 3, 1)), columns)})
    updates, _ = first(tx, grads, taps)
    A, G = reference.factors(np.ones((6, 3, 1)), columns[:, 0], approx="reduce")
    expected = reference.solve(A, G, grads["bias"][None], 1e-3, "pi")
    np.testing.assert_allclose(updates["bias"], expected[0], rtol=RTOL)


# ------------------------------------------------------------------------------ stacks, parts


def many_layers():
    """Layers of three signatures, one of them with blocks, and unlike numbers of data."""
    layers = [
        Layer("a", kernel="a/kernel", bias="a/bias"),
        Layer("b", kernel="b/kernel"),
        Layer("blocks", kernel="blocks/kernel", block_axes=(0,)),
        Layer("table", kernel="table", is_embedding=True),
    ]
    params = {
        "a": {"kernel": draw(3, 2), "bias": draw(2, seed=1)},
        "b": {"kernel": draw(4, 2, seed=2)},
        "blocks": {"kernel": draw(3, 4, 2, seed=3)},
        "table": draw(5, 3, seed=4),
    }
    taps = Taps(
        {
            "a": Tap(draw(6, 4, seed=5), draw(6, 2, seed=6)),
            "b": Tap(draw(1, 7, 2, 4, seed=7), draw(1, 1, 7, 2, 2, seed=8)),
            "blocks": Tap(draw(3, 8, 1, 4, seed=9), draw(2, 3, 8, 1, 2, seed=10)),
            "table": Tap(jnp.arange(12).reshape(1, 4, 3, 1) % 5, draw(1, 1, 4, 3, 3, seed=11)),
        }
    )
    return layers, params, taps


def test_layers_of_one_signature_share_a_stack_and_each_is_as_if_alone(x64):
    layers, params, taps = many_layers()
    make = functools.partial(scale_by_kfac, factor_dtype="float64")
    tx = make(layers=layers)
    (updates,), state = run(tx, [(params, taps)])
    counts = {label: stack.initialized.shape[0] for label, stack in state.stacks.items()}
    assert counts == {"4x2": 5, "5diagx3": 1}
    for layer in layers:
        own = Taps({layer.name: taps[layer.name]})
        (alone,), _ = run(make(layers=[layer]), [(params, own)])
        name = layer.name
        chex.assert_trees_all_close(updates[name], alone[name], rtol=1e-12)
        others = {k: v for k, v in alone.items() if k != name}
        chex.assert_trees_all_equal(others, {k: params[k] for k in others})


def test_blocks_are_independent(x64):
    layers, params, taps = many_layers()
    (updates,), _ = run(scale_by_kfac(layers=layers, factor_dtype="float64"), [(params, taps)])
    tap = taps["blocks"][0]
    for b in range(3):
        A, G = reference.factors(tap.inputs[b], tap.output_grads[:, b])
        expected = reference.solve(A, G, params["blocks"]["kernel"][b], 1e-3, "pi")
        np.testing.assert_allclose(updates["blocks"]["kernel"][b], expected, rtol=RTOL)


def part(rows, start, stop, columns):
    """Rows of a matrix as a kernel."""
    digits = ((), (AxisFactor(0, 1, stop - start),), (AxisFactor(1, 1, columns),))
    return Arrangement((rows, columns), ((start, stop), (0, columns)), digits)


def parted(*spans, rows=7):
    return [
        Layer(f"rows{i}", kernel="w", kernel_view=part(rows, *span, 2))
        for i, span in enumerate(spans)
    ]


def part_taps(*sizes):
    return Taps(
        {f"rows{i}": Tap(draw(6, d, seed=i), draw(6, 2, seed=9 + i)) for i, d in enumerate(sizes)}
    )


@pytest.mark.parametrize("fallback", [None, optax.scale(-3.0)])
def test_parts_of_a_parameter_may_belong_to_different_layers(x64, fallback):
    params = {"w": draw(7, 2)}
    layers, taps = parted((0, 3), (3, 5)), part_taps(3, 2)
    tx = scale_by_kfac(**settings(layers=layers, fallback=fallback))
    (updates,), _ = run(tx, [(params, taps)])
    for i, span in enumerate([(0, 3), (3, 5)]):
        tap = taps[f"rows{i}"][0]
        A, G = reference.factors(tap.inputs[0], tap.output_grads[:, 0])
        expected = reference.solve(A, G, params["w"][slice(*span)], 1e-3, "pi")
        np.testing.assert_allclose(updates["w"][slice(*span)], expected, rtol=RTOL)
    rest = params["w"][5:] * (1 if fallback is None else -3)
    np.testing.assert_allclose(updates["w"][5:], rest, rtol=RTOL)


def test_fallback_sees_nothing_of_the_part_that_belongs_to_a_layer():
    params = {"w": jnp.ones((7, 2))}
    layers, taps = parted((0, 3), (3, 5)), part_taps(3, 2)
    tx = scale_by_kfac(layers=layers, fallback=optax.normalize_by_update_norm())
    (updates,), _ = run(tx, [(params, taps)])
    np.testing.assert_allclose(updates["w"][5:], 0.5, rtol=1e-6)


def test_fallback_changes_nothing_of_the_part_that_belongs_to_a_layer():
    params = {"w": jnp.ones((7, 2))}
    layers, taps = parted((0, 3), (3, 5)), part_taps(3, 2)
    updates = []
    for fallback in (None, optax.add_decayed_weights(10.0)):
        tx = scale_by_kfac(layers=layers, fallback=fallback)
        updates.append(tx.update(params, tx.init(params), params, taps=taps)[0]["w"])
    np.testing.assert_allclose(updates[1][:5], updates[0][:5], rtol=1e-6)
    np.testing.assert_allclose(updates[1][5:], 11, rtol=1e-6)


# ---------------------------------------------------------------------- fallback, momentum, norm


def with_rest(seed=0):
    grads, taps = problem(seed)
    return {**grads, "scale": draw(4, seed=seed + 400), "none": None}, taps


def test_uncovered_parameters_get_their_gradient_with_the_same_momentum():
    stream = [with_rest(seed) for seed in range(3)]
    updates, _ = run(scale_by_kfac(layers=[DENSE], momentum=0.5), stream)
    g = [grads["scale"] for grads, _ in stream]
    np.testing.assert_allclose(updates[2]["scale"], 0.25 * g[0] + 0.5 * g[1] + g[2], rtol=1e-6)


def test_fallback_transforms_uncovered_parameters_alone():
    stream = [with_rest(seed) for seed in range(3)]
    adam = optax.scale_by_adam()
    updates, state = run(scale_by_kfac(layers=[DENSE], fallback=adam), stream)
    plain, _ = run(scale_by_kfac(layers=[DENSE]), stream)
    expected = adam.init(stream[0][0]["scale"])
    for (grads, _), u, v in zip(stream, updates, plain, strict=True):
        direction, expected = adam.update(grads["scale"], expected)
        np.testing.assert_allclose(u["scale"], direction, rtol=1e-6)
        chex.assert_trees_all_close(rows(u), rows(v), rtol=1e-6)
    assert isinstance(state.fallback.mu["kernel"], optax.MaskedNode)
    assert not state.momentum.rest


def test_fallback_gets_parameters_and_extra_arguments():
    def update(updates, state, params=None, *, factor, **extra):
        del extra
        return jax.tree.map(lambda g, p: g + factor * p, updates, params), state

    fallback = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    grads, taps = with_rest()
    tx = scale_by_kfac(layers=[DENSE], fallback=fallback)
    updates, _ = tx.update(grads, tx.init(grads), grads, taps=taps, factor=2.0)
    np.testing.assert_allclose(updates["scale"], 3 * grads["scale"], rtol=1e-6)


def test_momentum_is_a_velocity_of_preconditioned_gradients(x64):
    stream = [problem(seed) for seed in range(3)]
    plain, state = run(scale_by_kfac(**settings()), stream)
    assert state.momentum is None
    heavy, state = run(scale_by_kfac(**settings(momentum=0.5)), stream)
    u = [rows(x) for x in plain]
    np.testing.assert_allclose(rows(heavy[2]), 0.25 * u[0] + 0.5 * u[1] + u[2], rtol=RTOL)
    np.testing.assert_allclose(state.momentum.blocks["4x2"][0], rows(heavy[2]), rtol=RTOL)
    off, state = run(scale_by_kfac(**settings(momentum=0.0)), stream)
    chex.assert_trees_all_equal(off, plain)
    # Zero is a value: None switches off.
    np.testing.assert_allclose(state.momentum.blocks["4x2"][0], u[2])


@pytest.mark.parametrize("fallback", [None, optax.identity()])
def test_norm_constraint_bounds_the_step_in_the_metric_of_the_curvature(x64, fallback):
    grads, taps = with_rest()
    plain = scale_by_kfac(**settings(fallback=fallback))
    direction, _ = first(plain, grads, taps)
    g, u = rows(grads), rows(direction)
    square = float(np.sum(g * u) + (np.sum(grads["scale"] ** 2) if fallback is None else 0))
    lr = 0.1
    for constraint in (1e-2 * lr**2 * square, 0.5 * lr**2 * square, 2 * lr**2 * square):
        tx = scale_by_kfac(
            **settings(fallback=fallback, norm_constraint=constraint, learning_rate=lr)
        )
        updates, _ = first(tx, grads, taps)
        factor = min(1, np.sqrt(constraint / (lr**2 * square)))
        np.testing.assert_allclose(rows(updates), factor * u, rtol=RTOL)
        expected = grads["scale"] * (factor if fallback is None else 1)
        np.testing.assert_allclose(updates["scale"], expected, rtol=RTOL)


def test_norm_constraint_of_the_alias_follows_the_schedule_over_skipped_steps(x64):
    rates = jnp.array([0.1, 0.2, 0.4])
    tx = kfac(lambda step: rates[step], **settings(norm_constraint=1e-9))
    grads, taps = problem()
    state = tx.init(grads)
    bad = jax.tree.map(lambda g: g * jnp.nan, grads)
    for step, g in enumerate([grads, bad, grads]):
        updates, state = tx.update(g, state, taps=taps)
        if step != 1:
            # The length of the constrained step does not depend on the learning rate.
            length = -np.sum(rows(grads) * rows(updates)) / np.sqrt(
                np.sum(rows(grads) * solved(grads, taps))
            )
            np.testing.assert_allclose(length, np.sqrt(1e-9), rtol=1e-6)


@pytest.mark.parametrize("make", [scale_by_kfac, scale_by_ekfac])
@pytest.mark.parametrize("injected", [False, True])
def test_norm_constraint_may_be_a_schedule_which_counts_skipped_steps(x64, make, injected):
    bounds = jnp.array([0.0, 1e-9, 1e-6, 4e-9, 1.0])  # it may start at zero
    lr, given = 0.1, settings(norm_constraint=lambda step: bounds[step], learning_rate=0.1)
    if injected:
        # Its count is of all steps, as that of the schedule of a learning rate down the chain.
        make = optax.inject_hyperparams(make)
    tx = make(**given)
    grads, taps = problem()
    bad = jax.tree.map(lambda g: g * jnp.nan, grads)
    state, lengths = tx.init(grads), []
    step = jax.jit(lambda g, s: tx.update(g, s, taps=taps))
    for g in (grads, grads, bad, grads, grads):
        updates, state = step(g, state)
        lengths.append(np.sum(rows(grads) * rows(updates)))
    del lengths[2]
    full = lengths[-1]  # which no bound of one binds
    expected = np.sqrt([0.0, 1e-9, 4e-9, lr**2 * full])
    np.testing.assert_allclose(lr * np.asarray(lengths) / np.sqrt(full), expected, rtol=1e-6)


@pytest.mark.parametrize("make", [scale_by_kfac, scale_by_ekfac])
def test_what_is_in_no_layer_keeps_its_precision_without_anything_in_the_state(x64, make):
    grads = {"scale": jnp.asarray(np.random.default_rng(0).normal(size=5))}
    tx = make(layers=[], momentum=None, norm_constraint="auto")
    with pytest.warns(UserWarning, match="no parameter belongs to a layer"):
        updates, _ = first(tx, grads, Taps({}))
    expected = 0.3 * grads["scale"] / np.linalg.norm(grads["scale"])
    np.testing.assert_allclose(updates["scale"], expected, rtol=1e-14)


@pytest.mark.parametrize(("value", "skipped"), [(0.0, 0), (-1e-3, 0), (np.nan, 1)])
def test_norm_constraint_that_a_schedule_ends_at_or_below_zero_lets_no_step_through(value, skipped):
    grads, taps = problem()
    tx = kfac(0.1, layers=[DENSE], norm_constraint=lambda step: jnp.asarray(value))
    updates, state = first(tx, grads, taps)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    assert optax.tree.get(state, "skipped_steps") == skipped


def test_norm_constraint_at_a_learning_rate_or_gradient_of_zero():
    grads, taps = problem()
    for rate, scale in ((0.0, 1.0), (0.1, 0.0)):
        tx = scale_by_kfac(layers=[DENSE], norm_constraint=1e-3, learning_rate=rate)
        given = optax.tree.scale(scale, grads)
        updates, _ = first(tx, given, taps)
        chex.assert_tree_all_finite(updates)


# ------------------------------------------------------------------------------------- cadence


def test_factors_and_inverses_move_when_they_are_due():
    stream = [problem(seed) for seed in range(12)]
    make = functools.partial(scale_by_kfac, layers=[DENSE])
    cases = [
        ({"decay": 0.75, "refresh_every": 5}, 12, {0, 1, 2, 3, 8}),
        ({"decay": 0.75, "refresh_every": 5, "factor_every": 3}, 4, {0, 3, 6, 9}),
        ({"decay": 0.0, "refresh_every": 4, "factor_every": 2}, 6, {0, 4, 8}),
        ({"decay": 1.0, "refresh_every": 6}, 12, {0, 6}),
    ]
    for changes, factor_updates, expected in cases:
        tx = make(**changes)
        state, refreshed = tx.init(stream[0][0]), set()
        update = jax.jit(tx.update)
        for step, (grads, taps) in enumerate(stream):
            before = state
            _, state = update(grads, state, taps=taps)
            if state.refreshes > before.refreshes:
                refreshed.add(step)
            else:
                chex.assert_trees_all_equal(
                    state.stacks["4x2"].inverse, before.stacks["4x2"].inverse
                )
            if state.schedule.factor_updates == before.schedule.factor_updates:
                chex.assert_trees_all_equal(
                    state.stacks["4x2"].input_factor, before.stacks["4x2"].input_factor
                )
        assert state.schedule.factor_updates == factor_updates, changes
        assert refreshed == expected, changes


@pytest.mark.parametrize("make", [scale_by_kfac, scale_by_ekfac])
def test_staggered_refreshes_take_turns(make, x64):
    """While the factors are young all blocks are refreshed, then each once in so many steps."""
    sizes, every, steps = [(3, 2)] * 4 + [(2, 2)], 3, 12
    layers = [Layer(f"l{i}", kernel=f"l{i}") for i in range(len(sizes))]
    params = {f"l{i}": draw(*size, seed=i) for i, size in enumerate(sizes)}

    def taps(step):
        return Taps(
            {
                f"l{i}": Tap(draw(6, m, seed=9 * step + i), draw(6, n, seed=9 * step + i + 400))
                for i, (m, n) in enumerate(sizes)
            }
        )

    # With a decay of 0.5 factors are young for two updates.
    tx = make(layers=layers, decay=0.5, refresh_every=every, stagger=True, momentum=None)
    state, update = tx.init(params), jax.jit(tx.update)

    def made(state):
        """What stands for the inverse of each block's output factor."""
        stacks = [state.stacks[label].inverse for label in ("3x2", "2x2")]
        values = [getattr(x, "output_values", getattr(x, "output", None)) for x in stacks]
        return [np.asarray(row) for x in values for row in x]

    changed = []
    for step in range(steps):
        before = made(state)
        _, state = update(params, state, taps=taps(step))
        changed.append([bool(np.any(x != y)) for x, y in zip(made(state), before, strict=True)])
    assert all(map(all, changed[:2]))
    for start in range(2, steps - every + 1):
        turns = np.sum(changed[start : start + every], axis=0)
        np.testing.assert_array_equal(turns, np.ones(len(sizes)))
    # Five blocks in three turns: no step refreshes more than two.
    assert max(map(sum, changed[2:])) == 2
    assert state.refreshes == steps
    assert state.failed_refreshes == 0


def test_damping_may_be_a_schedule(x64):
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.1})
    stream = [problem()] * 2
    updates, _ = run(scale_by_kfac(**settings(damping=schedule)), stream)
    for u, damping in zip(updates, (1.0, 0.1), strict=True):
        np.testing.assert_allclose(rows(u), solved(*stream[0], damping), rtol=RTOL)


def test_with_eigen_a_change_of_damping_tells_at_once(x64):
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.1})
    stream = [problem()] * 2
    tx = scale_by_kfac(**settings(damping=schedule, damping_rule="exact", decay=1.0))
    updates, state = run(tx, stream)
    assert state.refreshes == 1
    np.testing.assert_allclose(rows(updates[1]), solved(*stream[0], 0.1, "exact"), rtol=RTOL)


# -------------------------------------------------------------------------------------- guards


def spoil(tree, value):
    """The last entry of the last leaf becomes the value."""
    leaves, structure = jax.tree.flatten(tree)
    leaves[-1] = leaves[-1].at[(-1,) * leaves[-1].ndim].set(value)
    return structure.unflatten(leaves)


@pytest.mark.parametrize("rule", DAMPING_RULES)
def test_what_is_not_finite_changes_nothing_but_its_counter(rule):
    tx = scale_by_kfac(layers=[DENSE], damping_rule=rule, fallback=optax.scale_by_adam())
    update = jax.jit(tx.update)
    (grads, taps), (other, other_taps) = with_rest(0), with_rest(1)
    start = tx.init(grads)
    for before in (start, update(grads, start, taps=taps)[1]):
        state, expected = before, update(other, before, taps=other_taps)
        for what in ("grads", "taps"):
            for value in (np.nan, np.inf, -np.inf):
                given = {"grads": other, "taps": other_taps}
                given[what] = spoil(given[what], value)
                updates, state = update(given["grads"], state, taps=given["taps"])
                chex.assert_trees_all_equal(updates, optax.tree.zeros_like(other))
                chex.assert_trees_all_equal(kept(state), kept(before))
        assert state.skipped_steps == 6
        assert state.failed_refreshes == 0
        updates, recovered = update(other, state, taps=other_taps)
        chex.assert_trees_all_equal(updates, expected[0])
        chex.assert_trees_all_equal(kept(recovered), kept(expected[1]))


def test_taps_that_are_not_read_may_be_anything():
    tx = scale_by_kfac(layers=[DENSE], factor_every=2)
    grads, taps = problem()
    _, state = first(tx, grads, taps)
    updates, after = tx.update(grads, state, taps=spoil(taps, np.nan))
    assert after.skipped_steps == 0
    assert after.count == 2
    assert optax.tree.norm(updates) > 0


@pytest.mark.parametrize("rule", DAMPING_RULES)
def test_factors_that_overflow_keep_the_last_ones_of_their_block(rule):
    layers, params, taps = many_layers()
    # Of "exact", bases that follow factors go on where these stay as they are.
    tx = scale_by_kfac(layers=layers, damping_rule=rule, basis="eigh", momentum=None)
    update = jax.jit(tx.update)
    huge = jax.tree.map(lambda x: x, taps)
    huge["b"] = (taps["b"][0]._replace(inputs=taps["b"][0].inputs * 1e30),)
    start = tx.init(params)
    for state in (start, update(params, start, taps=taps)[1]):
        updates, after = update(params, state, taps=huge)
        chex.assert_tree_all_finite((updates, after))
        assert after.failed_refreshes == state.failed_refreshes + 1
        assert after.skipped_steps == 0
        assert after.count == state.count + 1
        of_b = [jax.tree.map(lambda x: x[1], s.stacks["4x2"]) for s in (state, after)]
        chex.assert_trees_all_equal(*of_b)
    # A block that has never had factors moves by its gradient, and starts with the next taps.
    _, after = update(params, start, taps=huge)
    updates, _ = update(params, start, taps=huge)
    unstarted = {"pi": 1, "trace": 1, "exact": 1 / 1.001}[rule]
    chex.assert_trees_all_close(updates["b"], optax.tree.scale(unstarted, params["b"]), rtol=1e-6)
    _, recovered = update(params, after, taps=taps)
    expected = update(params, start, taps=taps)[1]
    chex.assert_trees_all_close(
        recovered.stacks["4x2"].input_factor[1], expected.stacks["4x2"].input_factor[1], rtol=1e-6
    )


def test_refresh_of_what_is_not_positive_definite_keeps_the_last_inverse():
    tx = scale_by_kfac(layers=[DENSE], damping=0.0)
    grads, taps = problem()
    _, state = first(tx, grads, taps)
    stack = state.stacks["4x2"]
    broken = stack._replace(input_factor=-100 * stack.input_factor)
    state = state._replace(stacks={"4x2": broken})
    updates, after = jax.jit(tx.update)(grads, state, taps=taps)
    chex.assert_trees_all_equal(after.stacks["4x2"].inverse, stack.inverse)
    assert after.failed_refreshes == 1
    assert after.count == 2
    chex.assert_tree_all_finite((updates, after))


def test_update_that_overflows_is_dropped():
    tx = scale_by_kfac(layers=[DENSE], damping=1e-12, outlier_clip=None)
    grads, taps = problem()
    taps = Taps({"dense": jax.tree.map(lambda x: 1e-3 * x, taps["dense"][0])})
    _, state = first(tx, grads, taps)
    updates, after = tx.update(optax.tree.scale(1e37, grads), state, taps=taps)
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(grads))
    chex.assert_trees_all_equal(after.momentum, state.momentum)
    assert (after.count, after.skipped_steps) == (1, 1)


@pytest.mark.parametrize("rule", DAMPING_RULES)
def test_zeros_make_no_nan_on_the_way(rule, nan_is_an_error):
    grads, taps = optax.tree.zeros_like(problem())
    tx = scale_by_kfac(layers=[DENSE], damping_rule=rule, norm_constraint=1.0, learning_rate=0.1)
    state = tx.init(grads)
    for _ in range(2):
        updates, state = tx.update(grads, state, taps=taps)
        chex.assert_tree_all_finite((updates, state))
    assert state.failed_refreshes == 0


# ------------------------------------------------------------------------- tracing, wrappers


def test_one_trace_serves_all_steps():
    tx, traces = scale_by_kfac(layers=[DENSE], factor_every=2), []

    @jax.jit
    def update(grads, state, taps):
        traces.append(1)
        return tx.update(grads, state, taps=taps)

    state = tx.init(problem()[0])
    for step in range(7):
        grads, taps = problem(step)
        _, state = update(grads, state, taps)
    assert len(traces) == 1
    assert state.count == 7


@pytest.mark.parametrize("rule", DAMPING_RULES)
def test_scan_and_donation_equal_plain_updates(rule):
    tx = scale_by_kfac(layers=[DENSE], damping_rule=rule)
    stream = [problem(seed) for seed in range(4)]
    expected, state = run(tx, stream)

    def step(state, xs):
        grads, taps = xs
        return tx.update(grads, state, taps=taps)[::-1]

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stream)
    after, updates = jax.jit(lambda s, xs: jax.lax.scan(step, s, xs))(
        tx.init(stream[0][0]), stacked
    )
    chex.assert_trees_all_close(after, state, rtol=1e-5, atol=1e-6)
    last = jax.tree.map(lambda u: u[-1], updates)
    chex.assert_trees_all_close(last, expected[-1], rtol=1e-4, atol=1e-5)

    donating = jax.jit(tx.update, donate_argnums=1)
    donated = tx.init(stream[0][0])
    for grads, taps in stream:
        given = donated
        _, donated = donating(grads, given, taps=taps)
        assert all(x.is_deleted() for x in jax.tree.leaves(given))
    chex.assert_trees_all_close(donated, state, rtol=1e-5, atol=1e-6)


def test_an_ensemble_under_vmap_equals_a_loop():
    tx = scale_by_kfac(layers=[DENSE])
    streams = [[problem(10 * i + step) for step in range(2)] for i in range(3)]
    singles = [run(tx, stream) for stream in streams]

    def stack(trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    state = jax.vmap(tx.init)(stack([stream[0][0] for stream in streams]))
    together = jax.jit(jax.vmap(lambda g, s, t: tx.update(g, s, taps=t)))
    for step in range(2):
        grads, taps = stack([stream[step] for stream in streams])
        updates, state = together(grads, state, taps)
    chex.assert_trees_all_close(updates, stack([u[-1] for u, _ in singles]), rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(state, stack([s for _, s in singles]), rtol=1e-4, atol=1e-5)


TUNED = {
    "learning_rate": 0.3,
    "decay": 0.9,
    "damping": 0.1,
    "momentum": 0.5,
    "norm_constraint": 1e-6,
    "outlier_clip": 1.0,
    "factor_every": 2,
    "refresh_every": 3,
    "weight_decay": 0.1,
}


def test_injected_hyperparameters_can_be_changed_without_retracing():
    injected = optax.inject_hyperparams(kfac)(
        0.1, layers=[DENSE], decay=0.5, norm_constraint=1e3, weight_decay=0.01, refresh_every=1
    )
    grads, traces = problem()[0], []

    @jax.jit
    def update(grads, state, taps):
        traces.append(1)
        return injected.update(grads, state, grads, taps=taps)

    state = injected.init(grads)
    assert {*TUNED, "seed"} == set(state.hyperparams)  # which counts in `init` alone
    for step in range(3):
        g, taps = problem(step)
        _, state = update(g, state, taps)
    g, taps = problem(5)
    expected, _ = update(g, state, taps)
    for name, value in TUNED.items():
        old = state.hyperparams[name]
        # Integers are weakly typed there, and stay so.
        new = jnp.asarray(value, None if isinstance(value, int) else old.dtype)
        changed = {**state.hyperparams, name: new}
        updates, after = update(g, state._replace(hyperparams=changed), taps)
        difference = optax.tree.norm(optax.tree.sub(updates, expected))
        assert difference > 1e-6, name
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert len(traces) == 1


def test_injected_schedule_equals_a_plain_one():
    schedule = optax.linear_schedule(0.1, 0.0, 3)
    stream = [problem(seed) for seed in range(3)]
    plain, _ = run(kfac(schedule, layers=[DENSE]), stream)
    state = (tx := optax.inject_hyperparams(kfac)(schedule, layers=[DENSE])).init(stream[0][0])
    for (grads, taps), u in zip(stream, plain, strict=True):
        updates, state = tx.update(grads, state, grads, taps=taps)
        chex.assert_trees_all_close(updates, u, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("read", ["dense", "lookup"])
def test_blocks_in_branches_not_taken_keep_their_factors(x64, read, reduce):
    def loss_fn(p, x, t, y, taken):
        def layer(h, wk):
            w, taken = wk
            used = (lambda h: h + w[t]) if read == "lookup" else (lambda h: jnp.tanh(h @ w))
            return jax.lax.cond(taken, used, lambda h: 0.9 * h, h), None

        h, _ = jax.lax.scan(layer, x, (p["blocks"], taken))
        return jnp.mean(losses.squared_error(h @ p["out"], y))

    params = {"blocks": draw(3, 4, 4), "out": draw(4, 2)}
    x, t, y = draw(5, 4), jnp.array([0, 3, 1, 1, 2]), draw(5, 2)
    every = jnp.ones(3, bool)
    layers = find_layers(loss_fn, params, x, t, y, every)
    fn = value_and_grad_with_taps(loss_fn, layers, fisher="exact", reduce=reduce)
    tx = scale_by_kfac(layers=layers, factor_dtype="float64")

    def after(*branches):
        state = tx.init(params)
        for taken in branches:
            _, grads, taps = fn(params, x, t, y, jnp.array(taken, bool))
            state = tx.update(grads, state, taps=taps)[1]
        return next(s for s in state.stacks.values() if s.initialized.shape == every.shape)

    first, both = after([1, 1, 0]), after([1, 1, 0], [1, 0, 0])
    np.testing.assert_array_equal(both.initialized, [True, True, False])
    # What lies behind the first block changed.
    assert np.abs(both.output_factor[0] - first.output_factor[0]).max() > 1e-3
    for old, new in zip(first[:2], both[:2], strict=True):
        np.testing.assert_array_equal(new[1:], old[1:])
    # A block's own factor does not depend on whether others saw anything.
    alone, beside = after([1, 0, 0]), after([1, 1, 1])
    np.testing.assert_allclose(alone.input_factor[0], beside.input_factor[0], rtol=1e-12)


def test_masked_layers_are_left_out(x64):
    layers, params, taps = many_layers()
    mask = {"a": True, "b": {"kernel": False}, "blocks": False, "table": True}
    tx = optax.masked(scale_by_kfac(layers=layers, factor_dtype="float64"), mask)
    (updates,), state = run(tx, [(params, taps)])
    (expected,), _ = run(scale_by_kfac(layers=layers, factor_dtype="float64"), [(params, taps)])
    for name in params:
        source = expected if name in ("a", "table") else params
        chex.assert_trees_all_close(updates[name], source[name], rtol=1e-12)
    assert state.inner_state.stacks["4x2"].initialized.shape == (1,)


@pytest.mark.parametrize("hidden", ["kernel", "bias"])
def test_hidden_parameter_is_left_out_of_its_layer(x64, hidden):
    """What is hidden is constant: the curvature of the rest is its part of the layer's."""
    grads, taps = problem()
    tap, seen = taps["dense"][0], "bias" if hidden == "kernel" else "kernel"
    mask = {name: name != hidden for name in grads}
    (updates,), _ = run(optax.masked(scale_by_kfac(**settings()), mask), [(grads, taps)])
    columns = slice(-1, None) if hidden == "kernel" else slice(0, -1)
    A, G = reference.factors(tap.inputs[0, ..., columns], tap.output_grads[:, 0])
    X = np.asarray(grads[seen]).reshape(len(A), 2)
    expected = reference.solve(A, G, X, 1e-3, "pi")
    np.testing.assert_allclose(updates[seen], expected.reshape(grads[seen].shape), rtol=RTOL)
    chex.assert_trees_all_equal(updates[hidden], grads[hidden])


def test_partition_gives_each_group_its_own_optimizer():
    layers, params, taps = many_layers()
    labels = {"a": "kfac", "b": "sgd", "blocks": "kfac", "table": "sgd"}
    tx = optax.partition({"kfac": kfac(0.1, layers=layers), "sgd": optax.sgd(0.5)}, labels)
    (updates,), _ = run(tx, [(params, taps)])
    (expected,), _ = run(kfac(0.1, layers=layers), [(params, taps)])
    for name, label in labels.items():
        source = expected if label == "kfac" else optax.tree.scale(-0.5, params)
        chex.assert_trees_all_close(updates[name], source[name], rtol=1e-4)


def test_multi_steps_averages_gradients():
    tx = scale_by_kfac(layers=[DENSE])
    multi = optax.MultiSteps(tx, 2)
    (first, _), (second, taps) = problem(0), problem(1)
    update = jax.jit(multi.update)
    _, state = update(first, multi.init(first), taps=taps)
    updates, _ = update(second, state, taps=taps)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    expected, _ = tx.update(mean, tx.init(first), taps=taps)
    chex.assert_trees_all_close(updates, expected, rtol=1e-4)


def test_learning_rate_completes_the_preconditioner():
    stream = [problem(seed) for seed in range(2)]
    whole, _ = run(kfac(0.1, layers=[DENSE]), stream)
    bare = optax.chain(kfac(layers=[DENSE]), optax.scale_by_learning_rate(0.1))
    chex.assert_trees_all_close(run(bare, stream)[0], whole, rtol=1e-6)


def test_weight_decay_is_decoupled_and_masked():
    grads, taps = problem()
    updates = []
    for extra in ({}, {"weight_decay": 0.5, "mask": {"kernel": True, "bias": False}}):
        tx = kfac(0.1, layers=[DENSE], **extra)
        updates.append(tx.update(grads, tx.init(grads), grads, taps=taps)[0])
    difference = optax.tree.sub(updates[1], updates[0])
    np.testing.assert_allclose(difference["kernel"], -0.05 * grads["kernel"], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(difference["bias"], 0)


# ---------------------------------------------------------------------------- trees and dtypes


@pytest.mark.parametrize("rule", DAMPING_RULES)
def test_init_is_abstract(rule):
    layers, params, taps = many_layers()
    tx = scale_by_kfac(layers=layers, damping_rule=rule, fallback=optax.scale_by_adam())
    state, expected = jax.eval_shape(tx.init, params), tx.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, expected)
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(structs), expected)
    _, after = jax.eval_shape(lambda g, s, t: tx.update(g, s, taps=t), params, state, taps)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, expected)
    assert not any(x.weak_type for x in jax.tree.leaves((state, after)))


@pytest.mark.parametrize("tree", [{}, (), None, {"a": None, "b": (optax.MaskedNode(), {})}])
def test_trees_without_leaves(tree):
    tx = kfac(0.1, layers=[DENSE], fallback=optax.scale_by_adam())
    state = tx.init(tree)
    updates, after = tx.update(tree, state, tree)
    chex.assert_trees_all_equal(updates, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_odd_leaves_beside_layers():
    grads, taps = problem()
    odd = {"scalar": jnp.ones(()), "empty": jnp.ones((0, 3)), "none": None}
    for fallback in (None, optax.scale_by_adam()):
        tx = scale_by_kfac(layers=[DENSE], fallback=fallback)
        state = tx.init({**grads, **odd})
        updates, after = tx.update({**grads, **odd}, state, taps=taps)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, {**grads, **odd})
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_without_layers_everything_is_left_over_and_no_taps_are_needed():
    tx = scale_by_kfac(layers=[], momentum=None)
    grads = {"w": jnp.ones((2, 3))}
    message = "no parameter belongs to a layer.*layers is empty"
    with pytest.warns(UserWarning, match=message) as caught:
        state = tx.init(grads)
    assert caught[0].filename == __file__  # the line of the user
    updates, state = tx.update(grads, state)
    chex.assert_trees_all_equal(updates, grads)
    assert state.stacks == {}


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_all_of_the_state_is_of_blocks_to_map_params(momentum):
    layers, params, taps = many_layers()
    tx = scale_by_kfac(layers=layers, momentum=momentum)
    state, others = run(tx, [(params, taps)])[1], []

    def record(leaf, param):
        raise AssertionError("nothing is kept like the parameters")

    def record_rest(leaf):
        others.extend(jax.tree.leaves(leaf))
        return leaf

    same = optax.tree.map_params(tx, record, state, params, transform_non_params=record_rest)
    chex.assert_trees_all_equal(same, state)
    assert len(others) == len(jax.tree.leaves(state))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes_are_kept(dtype):
    grads, taps = optax.tree.cast(problem(), dtype)
    tx = scale_by_kfac(layers=[DENSE])
    state = tx.init(grads)
    updates, after = tx.update(grads, state, taps=taps)
    chex.assert_trees_all_equal_shapes_and_dtypes((updates, after), (grads, state))
    assert {x.dtype.name for x in jax.tree.leaves(state.stacks)} == {"float32", "int32", "bool"}
    assert {x.dtype for x in jax.tree.leaves(state.momentum)} == {jnp.dtype(dtype)}
    assert optax.tree.norm(updates) > 0


@pytest.mark.parametrize("rule", DAMPING_RULES)
def test_no_implicit_promotion(rule, x64, strict_promotion):
    grads, taps = problem()
    grads = {"kernel": grads["kernel"], "bias": grads["bias"].astype(jnp.float32)}
    tx = kfac(0.1, layers=[DENSE], damping_rule=rule, norm_constraint=1.0, factor_dtype="float32")
    state = jax.eval_shape(tx.init, grads)
    _, after = jax.eval_shape(lambda g, s, t: tx.update(g, s, taps=t), grads, state, taps)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert all(x.dtype.itemsize <= 4 for x in jax.tree.leaves(after[0].stacks))


def test_factor_and_momentum_dtype():
    grads, taps = problem()
    tx = scale_by_kfac(layers=[DENSE], factor_dtype="bfloat16", momentum_dtype="bfloat16")
    _, state = first(tx, grads, taps)
    assert state.stacks["4x2"].input_factor.dtype == jnp.bfloat16
    assert state.momentum.blocks["4x2"].dtype == jnp.bfloat16


def test_complex_parameters_may_be_left_over():
    grads, taps = problem()
    grads = {**grads, "phase": jnp.array([1 + 2j, 3 - 1j])}
    tx = scale_by_kfac(layers=[DENSE], momentum=0.5, norm_constraint=1e9, learning_rate=1.0)
    (_, updates), state = run(tx, [(grads, taps)] * 2)
    np.testing.assert_allclose(updates["phase"], 1.5 * grads["phase"], rtol=1e-6)
    assert state.momentum.rest["phase"].dtype == jnp.complex64


# -------------------------------------------------------------------------------------- errors

BAD_SETTINGS = [
    ("decay", "0.9", r"decay.*number"),
    ("decay", float("nan"), r"decay.*number.*nan"),
    ("damping", -1.0, r"damping.*\[0, inf\].*-1"),
    ("damping_rule", "eigen", r"damping_rule.*pi, trace, exact.*eigen"),
    ("approx", "mean", r"approx.*expand, reduce.*mean"),
    ("momentum", 1.0, r"momentum.*\[0, 1\)"),
    ("factor_every", 0, r"factor_every.*\[1, inf\].*0"),
    ("refresh_every", 2.5, r"refresh_every.*integer.*2\.5"),
    ("refresh_every", optax.constant_schedule(2), r"refresh_every.*\[1, inf\].*function"),
    ("stagger", "yes", r"stagger must be True or False; got 'yes'"),
    ("bias_correction", "auto", r"bias_correction must be True, False or None; got 'auto'"),
    ("norm_constraint", 0.0, r"norm_constraint.*\(0, inf\]"),
    ("norm_constraint", 1.0, r"norm_constraint=1\.0 needs learning_rate"),
    ("norm_constraint", optax.constant_schedule(1.0), r"norm_constraint=<function.*learning_rate"),
    ("fallback", lambda g: g, r"fallback.*GradientTransformation"),
    ("factor_dtype", "int32", r"factor_dtype.*floating"),
    ("momentum_dtype", "int8", r"momentum_dtype.*floating"),
    ("layers", DENSE, r"layers must be a sequence of ok\.Layer"),
    ("layers", None, r"layers must be a sequence"),
    ("layers", ["dense"], r"nothing but ok\.Layer; got 'dense'"),
    ("layers", [DENSE, KERNEL], r"\['dense'\] occur twice"),
]


@pytest.mark.parametrize("factory", [kfac, scale_by_kfac])
@pytest.mark.parametrize(("name", "value", "message"), BAD_SETTINGS)
def test_bad_setting_is_named_at_construction(factory, name, value, message):
    with pytest.raises(ValueError, match=message):
        factory(**{"layers": [DENSE], name: value})


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_bad_rate_is_named_at_construction(name):
    with pytest.raises(ValueError, match=rf"{name}.*\[0, inf\].*-1"):
        kfac(**{"layers": [DENSE], name: -1.0})


GRADS, TAPS = problem()
TAP = TAPS["dense"][0]
BAD_TAPS = [
    (None, r"needs taps at every step.*got None.*value_and_grad_with_taps.*ok\.Taps"),
    (TAP, r"a mapping from the names of layers"),
    ({}, r"missing: \['dense'\].*Expected taps of \['dense'\]"),
    ({"dense": TAP, "other": TAP}, r"belonging to no layer: \['other'\]"),
    ({"dense": ()}, r"the taps of layer 'dense' are empty"),
    (
        {"dense": Tap(TAP.inputs[0, :, 0, :-1], TAP.output_grads)},
        r"'dense' \(kernel, bias\).*width 3; expected 4.*column of ones",
    ),
    (
        {"dense": Tap(TAP.inputs, jnp.ones((6, 5)))},
        r"'dense'.*output_grads of width 5; expected 2",
    ),
    (
        {"dense": Tap(jnp.ones((2, 6, 1, 4)), jnp.ones((1, 2, 6, 1, 2)))},
        r"'dense'.*2 blocks.*expected 1",
    ),
    ({"dense": Tap(jnp.ones((0, 4)), jnp.ones((0, 2)))}, r"'dense' has no examples"),
    ({"dense": Tap(jnp.ones((5, 4)), jnp.ones((6, 2)))}, r"'dense'.*same blocks, examples"),
    ({"dense": Tap(1j * TAP.inputs, TAP.output_grads)}, r"'dense'.*complex64; expected real"),
]


@pytest.mark.parametrize(("taps", "message"), BAD_TAPS)
def test_taps_that_do_not_fit_are_named(taps, message):
    tx = scale_by_kfac(layers=[DENSE])
    with pytest.raises(ValueError, match=message):
        tx.update(GRADS, tx.init(GRADS), taps=taps)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (jnp.ones((6, 1)), r"embedding.*float32; expected integer indices"),
        (jnp.ones((6, 4), int), r"width 4; expected 1.*not one-hot"),
    ],
)
def test_taps_of_an_embedding_are_indices(inputs, message):
    tx = scale_by_kfac(layers=[Layer("dense", kernel="w", is_embedding=True)])
    grads = {"w": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match=message):
        tx.update(grads, tx.init(grads), taps={"dense": Tap(inputs, jnp.ones((6, 2)))})


BAD_LAYERS = [
    ([Layer("x", kernel="weight")], r"'x': no parameter at weight; there are.*kernel"),
    ([Layer("x", kernel="kernel", bias="kernel")], r"'x'.*bias.*does not fit"),
    ([DENSE, Layer("x", bias="bias")], r"parameter bias belongs to two layers, 'dense' and 'x'"),
    (
        [Layer("x", kernel="kernel", kernel_view=arrange((5, 2), (), (0,), (1,)))],
        r"'x'.*shape \(3, 2\).*\(5, 2\)",
    ),
]


@pytest.mark.parametrize(("layers", "message"), BAD_LAYERS)
def test_layers_that_do_not_match_the_parameters_are_named(layers, message):
    with pytest.raises(ValueError, match=message):
        scale_by_kfac(layers=layers).init(GRADS)


def test_parts_that_overlap_are_named():
    with pytest.raises(ValueError, match=r"parameter w belongs to two layers, 'rows0' and 'rows1'"):
        scale_by_kfac(layers=parted((0, 3), (2, 5))).init({"w": jnp.ones((7, 2))})


def test_parameters_of_other_dtypes_are_named():
    tx = scale_by_kfac(layers=[DENSE])
    with pytest.raises(ValueError, match=r"parameter steps has dtype int32; expected floating"):
        tx.init({**GRADS, "steps": jnp.zeros(2, jnp.int32)})
    with pytest.raises(ValueError, match=r"'dense'.*kernel is complex.*fallback"):
        tx.init({**GRADS, "kernel": 1j * GRADS["kernel"]})


def test_gradients_that_do_not_match_are_named():
    tx = scale_by_kfac(layers=[KERNEL])
    state = tx.init({"kernel": jnp.ones((3, 2))})
    with pytest.raises(ValueError, match=r"do not match the state.*'4x2': 1.*'3x2': 1"):
        tx.update({"kernel": jnp.ones((4, 2))}, state)
    with pytest.raises(ValueError, match=r"do not match the parameters: at \['kernel'\]"):
        tx.update({"kernel": jnp.ones((3, 2))}, state, {"kernel": jnp.ones((4, 2))})


def test_state_is_a_plain_named_tuple():
    state = scale_by_kfac(layers=[DENSE]).init(GRADS)
    assert isinstance(state, KronState)
    assert optax.tree.get(state, "count") == 0


def test_parameters_of_one_path_are_named():
    with pytest.raises(ValueError, match=r"two parameters have one path.*a/b"):
        scale_by_kfac(layers=[]).init({"a/b": jnp.ones(2), "a": {"b": jnp.ones(3)}})


@pytest.mark.parametrize("path", ["a/kernel", "['a']['kernel']"])
def test_layers_of_a_hidden_subtree_are_left_out_however_their_paths_are_written(path):
    tx = scale_by_kfac(layers=[Layer("x", kernel=path), Layer("y", kernel="ab/kernel")])
    for hidden in ({"kernel": None}, None, optax.MaskedNode()):
        params = {"a": hidden, "ab": {"kernel": jnp.ones((2, 3))}}
        stacks = tx.init(params).stacks
        assert {label: len(stack.initialized) for label, stack in stacks.items()} == {"2x3": 1}


@pytest.mark.parametrize(("hidden", "seen"), [("value", "query"), ("w", "w.b")])
def test_hidden_parameters_hide_no_others_of_a_similar_path(hidden, seen):
    params = {"attn": {name: jnp.ones((3, 3)) for name in (hidden, seen)}}
    layers = [Layer(name, kernel=f"attn/{name}") for name in (hidden, seen)]
    tx = optax.masked(
        scale_by_kfac(layers=layers, momentum=None), {"attn": {hidden: False, seen: True}}
    )
    taps = Taps({name: Tap(jnp.eye(3) * 9, jnp.eye(3)) for name in (hidden, seen)})
    updates, _ = tx.update(params, tx.init(params), params, taps=taps)
    assert float(jnp.max(jnp.abs(updates["attn"][seen]))) < 0.5  # and not the gradient, which is 1


@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("count", [1, 2], ids=["refreshed", "between"])
def test_an_update_has_derivatives_in_both_directions(x64, count, stagger):
    settings = {"refresh_every": 2, "decay": 0.5, "factor_dtype": jnp.float64, "stagger": stagger}
    tx = scale_by_kfac(layers=[Layer("dense", kernel="")], **settings)
    draw = np.random.default_rng(0).normal
    params, inputs, grads = jnp.zeros((3, 2)), draw(size=(5, 3)), draw(size=(5, 2))
    state = tx.init(params)
    for _ in range(2 + count):  # past the refreshes of young factors
        _, state = tx.update(params, state, taps=Taps({"dense": Tap(inputs, grads)}))

    def moved(scale):
        taps = Taps({"dense": Tap(scale * inputs, scale * grads)})
        updates, new = tx.update(jnp.ones((3, 2)), state, taps=taps)
        return jnp.sum(jnp.sin(updates)) + jnp.sum(new.stacks["3x2"].inverse.input)

    backwards, forwards = jax.grad(moved)(1.0), jax.jvp(moved, (1.0,), (1.0,))[1]
    np.testing.assert_allclose(backwards, forwards, rtol=1e-10)
    expected = (moved(1 + 1e-6) - moved(1 - 1e-6)) / 2e-6
    np.testing.assert_allclose(backwards, expected, rtol=1e-5, atol=1e-8)
