"""Models of Flax Linen and NNX, Equinox and Haiku: the layers are found, and none too many."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import optax_kron as ok
from optax_kron.layers.paths import by_path, paths_of

from .helpers import assert_examples
from .patterns import N, classify, draw, labels

KEY = jax.random.key(0)
X, IMAGES, SERIES, TOKENS = draw(N, 4), draw(N, 6, 6, 2), draw(N, 5, 4), labels(7, 5)
Y = labels()


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    loss_fn: Callable[..., Any]
    params: Any
    args: tuple
    # (d_in, d_out, blocks) of each layer, sorted.
    layers: list[tuple[int, int, int]]
    uncovered: tuple[str, ...] = ()
    scale: float = 1.0
    has_examples: bool = True


CASES: dict[str, Callable[[], Case]] = {}


def case(build):
    CASES[build.__name__] = functools.cache(build)
    return build


def _random(params):
    """Parameters none of which is zero, so that every gradient tells."""

    def move(path, x):
        if not eqx.is_inexact_array(x):
            return x
        return x + draw(*x.shape, seed=len(jax.tree_util.keystr(path))) / 2

    return jax.tree_util.tree_map_with_path(move, params)


# ------------------------------------------------------------------------------------ Flax Linen


def _linen(module, x, y, layers, **kwargs):
    params = jax.eval_shape(module.init, KEY, x)
    params = _random(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), params))

    def loss_fn(params, x, y):
        return classify(module.apply(params, x), y)

    return Case(loss_fn, params, (x, y), layers, **kwargs)


@case
def linen_dense():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.LayerNorm()(nn.relu(nn.Dense(6)(x)))
            x = nn.DenseGeneral((2, 3))(x)
            return nn.DenseGeneral(3, axis=(-2, -1))(jnp.tanh(x))

    # The scale of a norm, and its bias, are layers by themselves.
    return _linen(Model(), X, Y, [(1, 1, 6), (1, 6, 1), (5, 6, 1), (7, 3, 1), (7, 6, 1)])


@case
def linen_convolutions():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
            x = nn.relu(nn.Conv(6, (2, 2), feature_group_count=2)(x))
            return nn.Dense(3)(x.reshape(x.shape[0], -1))

    return _linen(Model(), IMAGES, Y, [(9, 3, 2), (19, 4, 1), (55, 3, 1)])


@case
def linen_optimized_lstm():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.RNN(nn.OptimizedLSTMCell(2))(x)[:, -1])

    # Its four kernels of inputs, and four of states with their biases, are joined in every step.
    return _linen(Model(), SERIES, Y, [(3, 2, 1)] * 4 + [(3, 3, 1)] + [(4, 2, 1)] * 4)


@case
def linen_batch_norm():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4)(x)
            return nn.Dense(3)(nn.relu(nn.BatchNorm(use_running_average=False)(x)))

    model = Model()
    variables = model.init(KEY, X)

    def loss_fn(params, x, y):
        given = {"params": params, "batch_stats": variables["batch_stats"]}
        return classify(model.apply(given, x, mutable=["batch_stats"])[0], y)

    return Case(
        loss_fn,
        _random(variables["params"]),
        (X, Y),
        [(1, 1, 4), (1, 4, 1), (5, 3, 1)],
        uncovered=("Dense_0/bias", "Dense_0/kernel"),
        has_examples=False,
    )


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm()(x)
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(h, h, mask=mask)
        return x + nn.Dense(4)(nn.gelu(nn.Dense(6)(nn.LayerNorm()(x)))), None


class Transformer(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(7, 4)(tokens)
        x = x + self.param("positions", nn.initializers.normal(0.1), (tokens.shape[1], 4))
        scanned = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        return nn.Dense(7)(nn.LayerNorm()(scanned()(x, None)[0]))


@case
def linen_scanned_transformer():
    attention = [(5, 4, 2)] * 4
    norms = [(1, 1, 8), (1, 4, 2)] * 2 + [(1, 1, 4), (1, 4, 1)]
    rest = [(5, 6, 2), (7, 4, 2), (5, 7, 1), (7, 4, 1), (1, 4, 5)]
    layers = sorted([*attention, *norms, *rest])
    return _linen(Transformer(2), TOKENS, labels(7, 5), layers, scale=5**0.5)


@case
def linen_tied_embedding():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(7, 4)
            return embed.attend(jnp.tanh(nn.Dense(4)(embed(tokens))))

    return _linen(Model(), TOKENS, labels(7, 5), [(5, 4, 1), (7, 4, 1)], scale=5**0.5)


@case
def linen_gru():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.RNN(nn.GRUCell(3))(x)[:, -1])

    cell = [(5, 3, 1)] * 3 + [(3, 3, 1)] * 2 + [(4, 3, 1)]
    return _linen(Model(), SERIES, Y, sorted([*cell, (4, 3, 1)]))


# -------------------------------------------------------------------------------------- Flax NNX


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.last = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


NETWORK = [(1, 1, 6), (1, 6, 1), (5, 6, 1), (7, 3, 1)]


@case
def nnx_state():
    graph, state = nnx.split(Network(nnx.Rngs(0)), nnx.Param)

    def loss_fn(state, x, y):
        return classify(nnx.merge(graph, state)(x), y)

    return Case(loss_fn, _random(state), (X, Y), NETWORK)


@case
def nnx_tied_embedding():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(7, 4, rngs=rngs)
            self.hidden = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, tokens):
            return self.embed.attend(jnp.tanh(self.hidden(self.embed(tokens))))

    graph, state = nnx.split(Model(nnx.Rngs(0)), nnx.Param)

    def loss_fn(state, x, y):
        return classify(nnx.merge(graph, state)(x), y)

    layers = [(5, 4, 1), (7, 4, 1)]
    return Case(loss_fn, _random(state), (TOKENS, labels(7, 5)), layers, scale=5**0.5)


def _module_loss(model, x, y):
    return classify(model(x), y)


@case
def nnx_module():
    return Case(_module_loss, Network(nnx.Rngs(0)), (X, Y), NETWORK, has_examples=False)


def test_nnx_optimizer_takes_taps():
    model = Network(nnx.Rngs(0))
    layers = ok.find_layers(_module_loss, model, X, Y)
    optimizer = nnx.Optimizer(model, ok.kfac(0.1, layers=layers), wrt=nnx.Param)
    fn = ok.value_and_grad_with_taps(_module_loss, layers)

    @nnx.jit
    def step(model, optimizer, key):
        loss, grads, taps = fn(model, X, Y, key=key)
        optimizer.update(model, grads, taps=taps)
        return loss

    values = [step(model, optimizer, jax.random.key(i)) for i in range(5)]
    assert values[-1] < 0.9 * values[0]


# --------------------------------------------------------------------------------------- Equinox


@case
def equinox_perceptron():
    model = eqx.nn.MLP(4, 3, 6, 1, key=KEY)

    def loss_fn(model, x, y):
        return classify(jax.vmap(model)(x), y)

    return Case(loss_fn, _random(model), (X, Y), [(5, 6, 1), (7, 3, 1)])


class Vision(eqx.Module):
    conv: eqx.nn.Conv2d
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    last: eqx.nn.Linear

    def __init__(self):
        self.conv = eqx.nn.Conv2d(2, 4, 3, stride=2, key=KEY)
        self.attention = eqx.nn.MultiheadAttention(2, 4, key=KEY)
        self.norm = eqx.nn.LayerNorm(4)
        self.last = eqx.nn.Linear(4, 3, key=KEY)

    def __call__(self, x):
        h = jax.nn.relu(self.conv(x)).reshape(4, -1).T
        h = jax.vmap(self.norm)(h + self.attention(h, h, h))
        return self.last(jnp.tanh(h).mean(axis=0))


@case
def equinox_vision():
    def loss_fn(model, x, y):
        return classify(jax.vmap(model)(x), y)

    layers = sorted([(19, 4, 1), *[(4, 4, 1)] * 4, (2, 1, 4), (5, 3, 1)])
    return Case(loss_fn, _random(Vision()), (IMAGES.transpose(0, 3, 1, 2), Y), layers)


# ----------------------------------------------------------------------------------------- Haiku


def _haiku(model, x, layers):
    model = hk.without_apply_rng(hk.transform(model))
    params = _random(model.init(KEY, x))

    def loss_fn(params, x, y):
        return classify(model.apply(params, x), y)

    return Case(loss_fn, params, (x, Y), layers)


@case
def haiku_convolution():
    def model(x):
        return hk.Sequential([hk.Conv2D(4, 3, stride=2), jax.nn.relu, hk.Flatten(), hk.Linear(3)])(
            x
        )

    return _haiku(model, IMAGES, [(19, 4, 1), (37, 3, 1)])


@case
def haiku_lstm():
    def model(x):
        core = hk.LSTM(3)
        out, _ = hk.dynamic_unroll(core, x.swapaxes(0, 1), core.initial_state(x.shape[0]))
        return hk.Linear(3)(out[-1])

    return _haiku(model, SERIES, [(4, 3, 1), (8, 12, 1)])


# ----------------------------------------------------------------------------------------- tests

every_case = pytest.mark.parametrize("name", CASES)


@functools.cache
def _layers(name):
    case = CASES[name]()
    # Gradients of single examples, where there are any, say more than the check on numbers.
    check = not case.has_examples
    return ok.find_layers(case.loss_fn, case.params, *case.args, check=check)


@every_case
def test_layers_are_those_expected(name):
    case, layers = CASES[name](), _layers(name)
    assert sorted((u.path) for u in layers.uncovered) == list(case.uncovered), layers
    assert sorted((x.d_in, x.d_out, x.blocks) for x in layers) == case.layers, layers
    names = [layer.name for layer in layers]
    assert len(set(names)) == len(names)


@every_case
def test_taps_give_the_gradient_of_every_example(name):
    case = CASES[name]()
    if case.has_examples:
        assert_examples(
            case.loss_fn, case.params, case.args, _layers(name), scale=case.scale, rtol=1e-4
        )


def test_variables_of_nnx_have_the_path_of_what_they_are_in():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    model.value = nnx.Param(jnp.ones(2))  # a variable whose own name is "value"
    _, state, _ = nnx.split(model, nnx.Param, ...)
    assert paths_of(state) == ["bias", "kernel", "value"]
    assert sorted(paths_of((state, state))) == sorted(
        f"{a}/{b}" for a in (0, 1) for b in ("bias", "kernel", "value")
    )
    hidden = jax.tree.map(lambda x: optax.MaskedNode() if x.ndim == 1 else x, state)
    assert paths_of(hidden) == ["kernel"]
    assert paths_of(hidden, lambda x: isinstance(x, optax.MaskedNode)) == paths_of(state)
    holder = nnx.Param({"a": jnp.ones(2), "value": jnp.ones(3)})
    assert paths_of({"x": holder}) == ["x/value/a", "x/value/value"]
    layer = ok.Layer("dense", kernel="['kernel'].value", bias="bias")
    assert layer.resolved(by_path(state)).paths == ("kernel", "bias")
