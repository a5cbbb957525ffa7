"""What is done to gradients has to be done to taps: scales of the loss, means over devices."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import optax_kron as ok
from optax_kron.layers.moments import moments_of
from optax_kron.layers.plan import plan_layers
from optax_kron.layers.spectra import eigenvalues_of_member
from optax_kron.transforms.kfac import scale_by_kfac

SCALE = 2.0**15
OPTIMIZERS = pytest.mark.parametrize("make", [ok.kfac, ok.ekfac])


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), dtype)


PARAMS = {
    "table": draw(5, 4),
    "in": {"kernel": draw(4, 3, seed=1), "bias": draw(3)},
    "out": draw(3, 2),
    "shift": draw(2),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 5, (8, 2)))
LABELS, WEIGHTS = TOKENS % 2, jnp.asarray([1.0, 2, 0, 1, 3, 1, 0.5, 2])


def loss_fn(params, tokens, labels, weights, scale=1.0):
    h = jnp.tanh(params["table"][tokens] @ params["in"]["kernel"] + params["in"]["bias"])
    logits = 2 * (h @ params["out"]) + params["shift"]
    loss = ok.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return scale * jnp.mean(weights[:, None].astype(logits.dtype) * loss)


ARGS = TOKENS, LABELS, WEIGHTS
LAYERS = ok.find_layers(loss_fn, PARAMS, *ARGS)


def taps_of(fisher="mc", reduce=False):
    fn = ok.value_and_grad_with_taps(loss_fn, LAYERS, fisher=fisher, reduce=reduce)
    return lambda *args, **kwargs: fn(*args, **kwargs, key=jax.random.key(0))


def assert_close(found, wanted, rtol=1e-5):
    """Leaf by leaf, relative to the largest entry of each."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    for x, y in pairs:
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.max(np.abs(y), initial=0))


# ----------------------------------------------------------------------------- scales of the loss


@pytest.mark.parametrize(
    ("fisher", "reduce"),
    [
        ("mc", False),
        ("exact", True),
        ("sketch", True),
        ("empirical", False),
        ("forward", False),
        ("forward", True),
    ],
)
def test_taps_unscale_as_gradients_do(fisher, reduce):
    fn = taps_of(fisher, reduce)

    @jax.jit
    def both(params, scale):
        _, grads, taps = fn(params, *ARGS, scale)
        return (jax.tree.map(lambda g: g / scale, grads), taps.unscale(scale)), fn(params, *ARGS)

    (grads, taps), (_, wanted_grads, wanted) = both(PARAMS, jnp.float32(SCALE))
    assert_close((grads, taps), (wanted_grads, wanted))
    assert jax.tree.structure(taps) == jax.tree.structure(wanted)


def test_a_step_of_scaled_half_precision_is_that_of_full_precision():
    half = jax.tree.map(lambda x: x.astype(jnp.float16), PARAMS)
    tx, fn = ok.kfac(0.1, layers=LAYERS), taps_of("exact")

    @jax.jit
    def both(params, scale):
        full = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        _, wanted, known = fn(full, *ARGS)
        _, grads, taps = fn(params, *ARGS, scale.astype(jnp.float16))
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / scale, grads)
        state = tx.init(full)
        right = tx.update(wanted, state, full, taps=known)
        return right, [tx.update(grads, state, full, taps=t) for t in (taps.unscale(scale), taps)]

    (right, _), [(found, after), (wrong, noticed)] = both(half, jnp.float32(SCALE))
    norm = optax.tree.norm
    assert norm(optax.tree.sub(found, right)) < 0.05 * norm(right)
    assert norm(wrong) < 0.1 * norm(right)
    assert optax.tree.get(after, "mismatched_steps") == 0
    assert optax.tree.get(noticed, "mismatched_steps") == 1


def test_by_hand_the_output_gradients_are_divided_by_the_root():
    taps = ok.Taps({"a": ok.Tap(draw(5, 3), draw(5, 2), WEIGHTS[:5])}).unscale(16)
    np.testing.assert_allclose(taps["a"][0].output_grads[0, 0, :, 0], draw(5, 2) / 4)
    np.testing.assert_allclose(taps["a"][0].weights, WEIGHTS[:5] / 16)
    np.testing.assert_array_equal(taps["a"][0].inputs[0, :, 0], draw(5, 3))
    half = ok.Taps({"a": ok.Tap(draw(5, 3), draw(5, 2, dtype=jnp.float16))})
    assert half.unscale(jnp.float16(2**15))["a"][0].output_grads.dtype == jnp.float32


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), "2", None, np.ones(2), 1j])
def test_a_scale_is_one_positive_number(scale):
    with pytest.raises(ValueError, match=r"Taps\.unscale: loss_scale must be one number > 0"):
        ok.Taps({}).unscale(scale)


# ----------------------------------------------------------------------- scales that do not match


@OPTIMIZERS
def test_gradients_of_another_scale_than_the_taps_are_counted_and_nothing_else(make):
    tx, fn = make(0.1, layers=LAYERS, momentum=None), taps_of("exact")
    _, grads, taps = jax.jit(fn)(PARAMS, *ARGS)
    unknown = ok.Taps(dict(taps))  # as taps by hand are
    state = tx.init(PARAMS)

    @jax.jit
    def step(scale, taps):
        return tx.update(jax.tree.map(lambda g: scale * g, grads), state, taps=taps)

    def counters(state):
        return [int(optax.tree.get(state, n)) for n in ("mismatched_steps", "skipped_steps")]

    for scale, expected in {
        1.0: [0, 0],
        1 / 100: [0, 0],  # clipped
        100.0: [0, 0],
        1 / SCALE: [1, 0],
        SCALE: [1, 0],
        0.0: [0, 0],
        np.inf: [0, 1],
        np.nan: [0, 1],
    }.items():
        updates, after = step(scale, taps)
        assert counters(after) == expected, scale
        same, silent = step(scale, unknown)
        assert counters(silent) == [0, expected[1]]
        jax.tree.map(np.testing.assert_array_equal, updates, same)


def test_hidden_parameters_are_not_compared():
    """Of those that are there, the gradients have the scale of the taps."""
    layers = [ok.Layer("in", kernel="kernel", bias="bias"), ok.Layer("out", kernel="out")]
    params = {"kernel": draw(4, 3), "bias": draw(3), "out": draw(3, 2)}
    taps = {"in": ok.Tap(draw(8, 5), draw(8, 3)), "out": ok.Tap(draw(8, 3), draw(8, 2))}
    norms = {"in": jnp.float32(1e9), "out": jnp.sum(jnp.abs(params["out"]))}
    tx = scale_by_kfac(layers=layers)
    for hidden, expected in ((False, 1), (True, 0)):
        seen = optax.masked(tx, dict.fromkeys(params, True) | {"bias": not hidden})
        state = jax.jit(lambda t, seen=seen: seen.update(params, seen.init(params), taps=t)[1])(
            ok.Taps(taps, gradient_norms=norms)
        )
        assert optax.tree.get(state, "mismatched_steps") == expected


def test_the_scale_is_known_in_micro_batches_and_under_wrappers():
    fn = taps_of("exact", reduce=True)
    tx = optax.inject_hyperparams(ok.kfac)(0.1, layers=LAYERS)

    @jax.jit
    def step(scale):
        def of(part):
            return fn(PARAMS, *part)[1:]

        seen = jax.lax.map(of, jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), ARGS))
        grads, taps = jax.tree.map(lambda z: z.mean(0), seen)
        grads = jax.tree.map(lambda g: scale * g, grads)
        return tx.update(grads, tx.init(PARAMS), PARAMS, taps=taps)[1]

    for scale, expected in ((1.0, 0), (1 / SCALE, 1)):
        assert optax.tree.get(step(scale), "mismatched_steps") == expected


def test_the_automatic_constraint_counts_an_example_once_and_not_at_each_of_its_positions():
    tx, weights = ok.kfac(0.1, layers=LAYERS), WEIGHTS / 2  # up to one they count at the first step

    @jax.jit
    def step(params):
        both = {}
        for reduce in (False, True):
            _, grads, taps = taps_of(reduce=reduce)(params, TOKENS, LABELS, weights)
            both[reduce] = tx.update(grads, tx.init(params), params, taps=taps)
        return both

    both = step(PARAMS)
    for _, state in both.values():
        weight = optax.tree.get(state, "loss_weight")
        np.testing.assert_allclose(weight, jnp.mean(weights), rtol=1e-6)
    assert_close(both[False][0], both[True][0], rtol=1e-4)


# ------------------------------------------------------------------------------ means over devices


def parts(tree, devices=2):
    return jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), tree)


@pytest.mark.parametrize("fisher", ["exact", "forward"])
def test_means_over_devices_are_those_of_the_whole_batch(fisher):
    @jax.jit
    def everything(params):
        _, grads, taps = taps_of(fisher)(params, *ARGS)
        whole = {
            layer.name: tuple(moments_of(layer, t) for t in taps[layer.name]) for layer in LAYERS
        }

        def device(part):
            _, own, gathered = taps_of(fisher)(params, *part)
            _, _, reduced = taps_of(fisher, reduce=True)(params, *part)
            return jax.lax.pmean(own, "device"), gathered.pmean("device"), reduced.pmean("device")

        return (grads, whole, taps), jax.vmap(device, axis_name="device")(parts(ARGS))

    (grads, whole, taps), (own, gathered, reduced) = everything(PARAMS)
    for i in range(2):
        mean, all_taps, moments = jax.tree.map(lambda x, i=i: x[i], (own, gathered, reduced))
        assert_close(mean, grads)
        assert_close(dict(moments), whole)
        assert_close(dict(all_taps), dict(taps))
    plan = plan_layers("", LAYERS, PARAMS)
    (member,) = next(iter(plan.stacks.values()))
    values = [
        eigenvalues_of_member("", member, t[member.layer.name], None, None, dtype=jnp.float32)
        for t in (taps, all_taps)
    ]
    assert_close(*values)


@pytest.mark.parametrize("kind", ["taps", "moments"])
def test_means_are_known_to_be_equal_on_all_devices(kind):
    """Where `shard_map` checks what varies; on one device, as tests have."""
    mesh = jax.make_mesh((1,), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    layer = ok.Layer("a", kernel="a").resolved({"a": jnp.zeros((3, 2))})

    def made(inputs, columns, weights):
        tap = ok.Tap(inputs, columns, weights)
        taps = ok.Taps({"a": tap}, gradient_norms={"a": jnp.sum(weights)})
        if kind == "taps":
            return taps
        return ok.Taps({"a": moments_of(layer, taps["a"][0])}, gradient_norms=taps.gradient_norms)

    sharded = jax.shard_map(
        lambda *args: made(*args).pmean("device"),
        mesh=mesh,
        in_specs=PartitionSpec("device"),
        out_specs=PartitionSpec(),
    )
    args = draw(8, 3), draw(8, 2), WEIGHTS
    assert_close(jax.jit(sharded)(*args), made(*args))


# ---------------------------------------------------------------------------- not a single layer


@OPTIMIZERS
def test_without_layers_there_is_one_warning(make):
    params = {"w": jnp.ones((2, 3))}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tx = optax.chain(make(0.1, layers=[]), optax.scale(1.0))
        state = tx.init(params)
        jax.jit(tx.update)(params, state, params)
    (warning,) = caught
    assert "no parameter belongs to a layer, so all get plain gradients" in str(warning.message)
    hidden = {**jax.tree.map(lambda _: False, PARAMS), "rest": True}
    with pytest.warns(UserWarning, match=r"of those of \['in', 'out', 'shift', 'table'\] there"):
        optax.masked(make(0.1, layers=LAYERS), hidden).init({**PARAMS, "rest": jnp.ones(3)})
    with pytest.warns(UserWarning, match="so all get the updates of the fallback"):
        make(0.1, layers=[], fallback=optax.scale_by_adam()).init(params)


def test_without_parameters_or_elements_there_is_none():
    for params in ({}, {"a": jnp.ones((0, 3))}):
        ok.kfac(0.1, layers=[]).init(params)


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "kfoc"])
def test_operators_on_no_layers_are_refused_in_words(kind):
    with pytest.raises(ValueError, match=f"operators.{kind}: there is not a single layer"):
        getattr(ok.operators, kind)(ok.Taps({}), [])
