"""What surrounds a loss changes nothing: switches of JAX, placements, effects, and meshes."""

import contextlib
import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optax_kron as ok
from optax_kron.capture.execution.columns import ESTIMATES

RNG = np.random.default_rng(1)
X, LABELS = jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32), jnp.array([0, 1, 1, 0, 1])
PARAMS = {
    "in": jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32),
    "bias": jnp.zeros(4),
    "out": jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32),
}
KEY = jax.random.key(0)


def same(x):
    return x


def loss_with(on_hidden=same, on_params=same):
    def loss_fn(params, x, y):
        params = on_params(params)
        hidden = on_hidden(jnp.tanh(x @ params["in"] + params["bias"]))
        logits = hidden @ params["out"]
        return ok.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return loss_fn


def everything(loss_fn, fisher="mc", reduce=False):
    """The table, the loss, the gradient and the taps."""
    layers = ok.find_layers(loss_fn, PARAMS, X, LABELS)
    fn = ok.value_and_grad_with_taps(loss_fn, layers, fisher=fisher, reduce=reduce)
    return str(layers), fn(PARAMS, X, LABELS, key=KEY)


@functools.cache
def plain(fisher="mc"):
    return everything(loss_with(), fisher)


def assert_same(found, expected):
    assert found[0] == expected[0]
    # Sums of a dozen float32 numbers in two orders, as XLA may make other code of other programs.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, found[1], expected[1])


def mesh():
    return jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def constrained(x):
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh(), PartitionSpec()))


PLACINGS = {
    "with_sharding_constraint": constrained,
    "device_put": lambda x: jax.device_put(x, jax.devices()[0]),
    "device_put_of_a_sharding": lambda x: jax.device_put(x, NamedSharding(mesh(), PartitionSpec())),
    "optimization_barrier": jax.lax.optimization_barrier,
}


@pytest.mark.parametrize("of", ["on_hidden", "on_params"])
@pytest.mark.parametrize("place", PLACINGS.values(), ids=PLACINGS)
def test_where_a_value_lives_changes_nothing(place, of):
    placed = {of: lambda tree: jax.tree.map(place, tree)}
    if place is jax.lax.optimization_barrier:
        placed = {of: place}  # of all parameters in one equation
    assert_same(everything(loss_with(**placed)), plain())


SWITCHES = {
    "disable_jit": jax.disable_jit,
    "enable_checks": lambda: jax.enable_checks(True),
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "strict_promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "no_rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_switches_of_jax_change_nothing(switch):
    def loss_fn(params, x, y):
        # As every switch wants it: no implicit broadcasts or promotions.
        hidden = jnp.tanh(x @ params["in"] + params["bias"][None])
        logits = hidden @ params["out"]
        return ok.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def call():
        product = ok.ggn_vector_product(loss_fn, PARAMS, X, LABELS)(PARAMS)
        table, result = everything(loss_fn)
        return table, (product, result)

    expected = call()
    with switch():
        assert_same(call(), expected)


def marked_losses():
    """A loss of each distribution, of arrays of three examples."""
    logits = jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32)
    targets = jnp.asarray(RNG.uniform(size=(3, 2)), jnp.float32)
    yield "softmax", ok.losses.softmax_cross_entropy, logits, (targets,)
    where = jnp.array([[True, True], [True, False], [True, True]])
    yield (
        "masked",
        lambda f, y: ok.losses.softmax_cross_entropy(f, y, where=where),
        logits,
        (targets,),
    )
    integer = ok.losses.softmax_cross_entropy_with_integer_labels
    yield "integer", integer, logits, (jnp.array([0, 1, 0]),)
    for name in ("sigmoid_binary_cross_entropy", "squared_error", "l2_loss"):
        yield name, getattr(ok.losses, name), logits, (targets,)
    yield "gaussian", ok.losses.gaussian_negative_log_likelihood, logits, (targets, 1 + targets)
    yield "poisson", ok.losses.poisson_negative_log_likelihood, logits, (jnp.round(targets),)


MARKED = {name: rest for name, *rest in marked_losses()}


@pytest.mark.parametrize("name", MARKED)
def test_no_estimate_broadcasts_by_itself(name):
    loss, logits, rest = MARKED[name]

    def loss_fn(params, *rest):
        return jnp.mean(loss(logits @ params["w"] + params["b"][None], *rest))

    params = {"w": jnp.eye(2), "b": jnp.zeros(2)}
    with jax.numpy_rank_promotion("raise"):
        for fisher, reduce in itertools.product(ESTIMATES, (False, True)):
            fn = ok.value_and_grad_with_taps(loss_fn, fisher=fisher, reduce=reduce)
            jax.eval_shape(lambda *args, fn=fn: fn(*args, key=KEY), params, *rest)


def raising(h):
    return eqx.error_if(h, jnp.any(jnp.isnan(h)), "nan in h")


def branch_with_an_effect(calls):
    def note(h):
        jax.debug.callback(lambda: calls.append("taken"))
        return h

    return lambda h: jax.lax.cond(jnp.any(jnp.isnan(h)), note, same, h)


@pytest.mark.parametrize("outer", [same, jax.jit], ids=["eager", "jit"])
def test_a_branch_that_is_not_taken_has_no_effect(outer):
    calls = []
    for on_hidden in (raising, branch_with_an_effect(calls)):
        loss_fn = loss_with(on_hidden)
        table, result = everything(loss_fn, fisher="exact")
        assert table == plain()[0]
        fn = outer(ok.value_and_grad_with_taps(loss_fn, fisher="exact"))
        assert_same((table, fn(PARAMS, X, LABELS)), (table, result))
        ok.ggn_vector_product(loss_fn, PARAMS, X, LABELS)(PARAMS)
    jax.effects_barrier()
    assert not calls


def test_layers_are_found_and_checked_inside_of_a_trace():
    """The numbers are known there, as the caller closes over them."""
    found = []

    @jax.jit
    def traced(z):
        for on_hidden in (same, raising):
            found.append(ok.find_layers(loss_with(on_hidden), PARAMS, X, LABELS))
        return z

    traced(jnp.zeros(()))
    for layers in found:
        assert [layer.name for layer in layers] == ["in", "out"]
        assert layers.checked


@pytest.mark.parametrize("switch", [contextlib.nullcontext, jax.disable_jit])
def test_a_mark_is_placed_at_the_line_of_the_user(switch):
    def loss_fn(params, x, y):
        logits = x @ params["in"] @ jnp.ones((4, 2))
        per_example = ok.losses.softmax_cross_entropy_with_integer_labels(logits, y)
        return -per_example.mean()

    with switch(), pytest.raises(ValueError, match=r"test_contexts\.py:\d+ .*loss_fn"):
        ok.find_layers(loss_fn, PARAMS, X, LABELS)
