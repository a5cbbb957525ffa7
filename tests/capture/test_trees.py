"""Trees of parameters as `jax.grad` takes them, and the names of what is in them."""

import collections
import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_kron as ok
from optax_kron.layers.paths import by_path
from optax_kron.layers.plan import plan_layers

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)
Y = jnp.arange(6) % 2


def dense(seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(3, 2)), jnp.float32)


# ------------------------------------------------------------------------------ Python's numbers


def scaled_loss(params, x, y):
    logits = params["s"] * (x @ params["w"]) + params["b"]
    return ok.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()


NUMBERS = {"s": 1.5, "w": dense(), "b": 0.25}
ARRAYS = {name: jnp.asarray(x) for name, x in NUMBERS.items()}


def test_numbers_of_python_are_parameters_as_for_the_gradient():
    layers = ok.find_layers(scaled_loss, NUMBERS, X, Y)
    assert str(layers) == str(ok.find_layers(scaled_loss, ARRAYS, X, Y))
    assert {"s", "b"} <= set(str(layers).split())
    fn = ok.value_and_grad_with_taps(scaled_loss, layers, fisher="exact")
    (value, grads, taps), wanted = fn(NUMBERS, X, Y), fn(ARRAYS, X, Y)
    jax.tree.map(np.testing.assert_array_equal, (value, grads, taps), wanted)
    expected = jax.grad(scaled_loss)(NUMBERS, X, Y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), grads, expected)
    product = ok.ggn_vector_product(scaled_loss, NUMBERS, X, Y)(NUMBERS)
    wanted = ok.ggn_vector_product(scaled_loss, ARRAYS, X, Y)(ARRAYS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), product, wanted)


def test_operators_act_on_numbers_of_python():
    layers = ok.find_layers(scaled_loss, NUMBERS, X, Y)
    *_, taps = ok.value_and_grad_with_taps(scaled_loss, layers, fisher="exact")(NUMBERS, X, Y)
    for op in (
        ok.operators.kfac(taps, layers),
        ok.operators.kfac(taps, layers, params=NUMBERS),
        ok.operators.ggn(scaled_loss, NUMBERS, X, Y),
        ok.operators.identity(NUMBERS),
    ):
        found, wanted = op @ NUMBERS, op @ ARRAYS
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)


OPTIMIZERS = {
    "kron_psgd": ok.kron_psgd(0.1),
    "shampoo": ok.shampoo(0.1),
    "soap": ok.soap(0.1),
    "branch_kfac": ok.branch_kfac(0.1),
    "kfac": None,
    "ekfac": None,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_numbers_of_python(name):
    layers = ok.find_layers(scaled_loss, NUMBERS, X, Y, check=False)
    tx = OPTIMIZERS[name] or getattr(ok, name)(0.1, layers=layers, weight_decay=0.1)
    with_taps = ok.value_and_grad_with_taps(scaled_loss, layers, fisher="exact")

    def step(params, state):
        _, grads, taps = with_taps(params, X, Y)
        extra = {"taps": taps} if "kfac" in name[:5] else {}
        extra |= {"branches": jnp.ones((3, 4))} if name == "branch_kfac" else {}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    found, wanted = (jax.eval_shape(lambda p=p: step(p, tx.init(p))) for p in (NUMBERS, ARRAYS))
    assert found == wanted
    assert jax.tree.map(jnp.shape, found[0]) == {"s": (), "w": (3, 2), "b": ()}


def test_numbers_beside_what_has_no_gradient_are_settings():
    class Scaled(eqx.Module):
        w: jax.Array
        scale: float

    for params in (Scaled(dense(), 2.0), {"w": dense(), "scale": 2.0, "activation": jnp.tanh}):

        def loss_fn(params, x, y):
            w, scale = jax.tree.leaves(params)[-1 if isinstance(params, dict) else 0], 2.0
            return ok.losses.softmax_cross_entropy_with_integer_labels(scale * (x @ w), y).mean()

        layers = ok.find_layers(loss_fn, params, X, Y)
        assert [layer.name for layer in layers] == ["w"]
        assert not layers.uncovered
        _, grads, _ = ok.value_and_grad_with_taps(loss_fn, fisher="exact")(params, X, Y)
        assert list(by_path(grads)) == ["w"]


# ---------------------------------------------------------------------------------------- names


class Actor(NamedTuple):
    policy: jax.Array
    value: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Fields:
    policy: jax.Array
    value: jax.Array


class Module(eqx.Module):
    policy: jax.Array
    value: jax.Array


KINDS = {
    "named_tuple": Actor,
    "dataclass": Fields,
    "equinox": Module,
    "dictionary": lambda a, b: {"policy": a, "value": b},
    "attributes": collections.namedtuple("Attributes", ("policy", "value")),
}


@pytest.mark.parametrize(
    ("kind", "nested"), [("named_tuple", False), *((kind, True) for kind in KINDS)]
)
def test_a_field_named_value_keeps_its_name(kind, nested):
    params = KINDS[kind](dense(1), dense(2))
    params = {"net": params} if nested else params

    def loss_fn(params, x, y):
        a, b = jax.tree.leaves(params)
        h = ok.losses.softmax_cross_entropy_with_integer_labels(x @ a, y)
        return jnp.mean(h + ok.losses.l2_loss(x @ b, jnp.ones((6, 2))).sum(-1))

    layers = ok.find_layers(loss_fn, params, X, Y, check=False)
    names = ["net/policy", "net/value"] if nested else ["policy", "value"]
    assert [layer.name for layer in layers] == names
    assert [layer.kernel for layer in layers] == names
    # By hand they may be written as `keystr` prints them.
    prints = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    written = [ok.Layer(n, kernel=p) for n, p in zip(names, prints, strict=True)]
    plans = [plan_layers("", own, params) for own in (layers, written)]
    assert plans[0].owned == plans[1].owned
    assert list(plans[0].owned) == names
