"""More patterns: parameters that are joined before their use, or stand beside activations."""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from .patterns import _2D, MLP, N, _conv, classify, draw, labels, largest_singular_value, pattern

# ------------------------------------------------------------------------------- joined kernels

QKV = {name: {"w": draw(4, 4, seed=i), "b": draw(4, seed=i)} for i, name in enumerate("qkv")}
TOKENS = draw(N, 5, 4), labels()


def _attend(q, k, v):
    # Without a softmax, after which the bias of the keys would do nothing.
    return jnp.tanh(jnp.tanh(q @ k.swapaxes(-1, -2)) @ v)


def _joined(p, names, leaf, axis=-1):
    return jnp.concatenate([p[name][leaf] for name in names], axis=axis)


@pattern(QKV | {"o": draw(4, 3)}, *TOKENS, layers=4)
def fused_attention(p, x, y):
    qkv = x @ _joined(p, "qkv", "w") + _joined(p, "qkv", "b")
    return classify(_attend(*jnp.split(qkv, 3, axis=-1)).mean(1) @ p["o"], y)


@pattern(QKV | {"o": draw(4, 3)}, *TOKENS, layers=4)
def stacked_attention(p, x, y):
    w, b = (jnp.stack([p[name][leaf] for name in "qkv"]) for leaf in "wb")
    qkv = jnp.einsum("nti,kio->knto", x, w) + b[:, None, None]
    return classify(_attend(*qkv).mean(1) @ p["o"], y)


@pattern(QKV | {"o": draw(4, 3)}, *TOKENS, layers=4)
def fused_heads(p, x, y):
    w = _joined(p, "qkv", "w").reshape(4, 3, 2, 2)
    qkv = jnp.einsum("nti,ikhd->nkhtd", x, w) + _joined(p, "qkv", "b").reshape(3, 2, 1, 2)
    h = jax.vmap(_attend, in_axes=1, out_axes=2)(*qkv.swapaxes(0, 1))
    return classify(h.reshape(*h.shape[:2], 4).mean(1) @ p["o"], y)


@pattern(QKV | {"o": draw(4, 3)}, draw(N, 4), labels(), layers=4)
def slope_of_joined_kernels(p, x, y):
    def net(x):
        h = jnp.tanh(x @ _joined(p, "qkv", "w") - _joined(p, "qkv", "b"))
        return h.reshape(3, 4).sum(0) @ p["o"]

    return classify(jax.vmap(lambda x: jax.jvp(net, (x,), (jnp.arange(4.0),))[1])(x), y)


CELL = {"w": draw(4, 5), "u": draw(5, 5), "b": draw(5), "out": draw(5, 3)}


# The bias is added to the sum of two products.
@pattern(CELL, draw(N, 6, 4), labels(), layers=4)
def joined_inputs(p, x, y):
    def step(h, x):
        kernel = jnp.concatenate([p["w"], p["u"]], 0)
        return jnp.tanh(jnp.concatenate([x, h], -1) @ kernel + p["b"]), None

    return classify(jax.lax.scan(step, jnp.zeros((len(y), 5)), x.swapaxes(0, 1))[0] @ p["out"], y)


# A number in front of a part of the bias alone is that part's input; one that is known only when
# the program runs, as p["s"], leaves the part a layer of its own.
SIGNED = {name: {"w": draw(4, 3, seed=i), "b": draw(3, seed=i)} for i, name in enumerate("uvw")}


@pattern(
    SIGNED | {"s": draw() + 2, "o": draw(9, 3)}, draw(N, 4), labels(), uncovered=["s"], layers=5
)
def joined_biases_of_other_signs(p, x, y):
    biases = [p["u"]["b"], -2 * p["v"]["b"], p["s"] * p["w"]["b"]]
    h = x @ _joined(p, "uvw", "w") - jnp.concatenate(biases)
    return classify(jnp.tanh(h) @ p["o"], y)


DEEP = [{"w": draw(4, 4, seed=i), "b": draw(4, seed=i)} for i in range(3)]


@pattern([*DEEP, draw(4, 3)], draw(N, 4), labels(), layers=4)
def stacked_layers_then_scanned(p, x, y):
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *p[:3])
    h, _ = jax.lax.scan(lambda h, p: (jnp.tanh(h @ p["w"] + p["b"]), None), x, stacked)
    return classify(h @ p[3], y)


PAIRS = {"q": draw(2, 4, 4), "k": draw(2, 4, 4, seed=1), "a": draw(2, 4), "b": draw(2, 4, seed=1)}


@pattern(PAIRS | {"o": draw(4, 3)}, draw(N, 4), labels(), layers=3)
def joined_in_a_scan(p, x, y):
    @jax.checkpoint
    def step(h, layer):
        q, k, a, b = layer
        left, right = jnp.split(h @ jnp.concatenate([q, k], 1) + jnp.concatenate([a, b]), 2, -1)
        return h + jnp.tanh(left) * right, None

    layers = p["q"], p["k"], p["a"], p["b"]
    return classify(jax.lax.scan(step, x, layers)[0] @ p["o"], y)


MEMBERS = [jax.tree.map(lambda x, i=i: x + i, MLP) for i in range(2)]


@pattern(MEMBERS, draw(N, 4), labels(), layers=4)
def ensemble_of_a_list(p, x, y):
    def net(p):
        return jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]

    return classify(jax.vmap(net)(jax.tree.map(lambda *a: jnp.stack(a), *p)).sum(0), y)


@pattern(MLP, draw(N, 4), labels(), layers=2)
def raveled_and_unraveled(p, x, y):
    flat, unravel = ravel_pytree(p)
    p = unravel(flat)
    return classify(jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"], y)


NESTED = {"a": draw(2, 4), "b": draw(1, 4), "c": draw(3, 4), "d": draw(3), "e": draw(3, seed=1)}


@pattern(NESTED, draw(N, 4), labels(), layers=4)
def joined_twice_and_transposed(p, x, y):
    kernel = jnp.concatenate([jnp.concatenate([p["a"], p["b"]]), p["c"]]).T
    h = x @ kernel - jnp.concatenate([p["d"], p["e"]])
    return classify(h[:, :3] * jnp.tanh(h[:, 3:]), y)


@pattern({"w": draw(2, 3)}, draw(N, 4), labels(), layers=1)
def joined_with_itself_and_with_zeros(p, x, y):
    h = x @ jnp.concatenate([jnp.concatenate([p["w"], -p["w"]], 1), jnp.zeros((2, 6))])
    return classify(jnp.tanh(h[:, :3]) * jnp.sin(h[:, 3:]), y)


# A bias beside a whole product, and a product beside a whole bias, are layers by themselves.
@pattern(
    {"w": draw(4, 6), "a": draw(2), "b": draw(4), "u": draw(6, 2), "v": draw(6, 1), "c": draw(3)},
    draw(N, 4),
    labels(),
    layers=6,
)
def joined_on_one_side_only(p, x, y):
    h = jnp.tanh(x @ p["w"] + jnp.concatenate([p["a"], p["b"]]))
    return classify(h @ jnp.concatenate([p["u"], p["v"]], 1) + p["c"], y)


@pattern(
    {"w": draw(4, 6), "a": draw(2), "b": draw(4), "v": draw(6, 3)}, draw(N, 4), labels(), layers=4
)
def joined_scales(p, x, y):
    return classify(jnp.tanh(x @ p["w"] * jnp.concatenate([p["a"], p["b"]])) @ p["v"], y)


CONVS = {"a": draw(3, 3, 2, 4), "b": draw(3, 3, 2, 2), "c": draw(4), "d": draw(2)}
GROUPS = {"a": draw(3, 3, 1, 4), "b": draw(3, 3, 1, 4, seed=2), "v": draw(8, 3)}


@pattern(CONVS | {"v": draw(6, 3)}, draw(N, 5, 4, 2), labels(), layers=3)
def joined_convolutions(p, x, y):
    h = _conv(x, jnp.concatenate([p["a"], p["b"]], -1), _2D) + jnp.concatenate([p["c"], p["d"]])
    return classify(jnp.tanh(h).sum((1, 2)) @ p["v"], y)


@pattern(GROUPS, draw(N, 5, 4, 2), labels(), layers=3)
def joined_groups(p, x, y):
    h = _conv(x, jnp.concatenate([p["a"], p["b"]], -1), _2D, feature_group_count=2)
    return classify(jnp.tanh(h).sum((1, 2)) @ p["v"], y)


# Parts that end inside of a group; a table beside another; a part that is no linear use.
@pattern(
    GROUPS | {"b": draw(3, 3, 1, 2), "v": draw(6, 3)},
    draw(N, 5, 4, 2),
    labels(),
    uncovered=("a", "b"),
    layers=1,
)
def joined_inside_of_a_group(p, x, y):
    h = _conv(x, jnp.concatenate([p["a"], p["b"]], -1), _2D, feature_group_count=2)
    return classify(jnp.tanh(h).sum((1, 2)) @ p["v"], y)


@pattern(
    {"a": draw(7, 4), "b": draw(3, 4), "v": draw(4, 3)},
    labels(10),
    labels(),
    uncovered=("a", "b"),
    layers=1,
)
def joined_tables(p, t, y):
    return classify(jnp.tanh(jnp.concatenate([p["a"], p["b"]])[t]) @ p["v"], y)


@pattern({"a": draw(4, 3), "b": draw(4, 3, seed=1)}, draw(N, 4), labels(), uncovered=("b",))
def one_part_is_used_otherwise(p, x, y):
    kernel = jnp.concatenate([p["a"], p["b"]], 1)
    return classify(x @ kernel[:, :3] + x @ jnp.tanh(kernel[:, 3:]), y)


# ------------------------------------------------------------------ parameters beside activations

TOKEN = {"w": draw(4, 4), "token": draw(1, 1, 4), "at": draw(1, 6, 4), "v": draw(4, 3)}


@pattern(TOKEN, *TOKENS, layers=4)
def class_token(p, x, y):
    token = jnp.broadcast_to(p["token"], (len(y), 1, 4))
    h = jnp.concatenate([token, x @ p["w"]], axis=1) + p["at"]
    return classify(_attend(h, h, h)[:, 0] @ p["v"], y)


@pattern(TOKEN, *TOKENS, layers=4)
def class_token_by_tile(p, x, y):
    token = jnp.tile(p["token"], (len(y), 1, 1))
    h = jnp.concatenate([x @ p["w"], token], axis=1) - p["at"]
    return classify(_attend(h, h, h)[:, -1] @ p["v"], y)


@pattern({"w": draw(4, 4), "token": draw(4), "v": draw(4, 3)}, *TOKENS, layers=3)
def class_token_of_one_example(p, x, y):
    def one(x):
        h = jnp.concatenate([p["token"][None], x @ p["w"]])
        return _attend(h, h, h)[0] @ p["v"]

    return classify(jax.vmap(one)(x), y)


@pattern({"prompt": draw(3, 4), "w": draw(4, 4), "v": draw(4, 3)}, *TOKENS, layers=3)
def prompt_before_tokens(p, x, y):
    prompt = jnp.broadcast_to(p["prompt"], (len(y), 3, 4))
    h = jnp.concatenate([prompt, x @ p["w"]], axis=1)
    return classify(_attend(h, h, h).mean(1) @ p["v"], y)


@pattern({"more": draw(2), "v": draw(6, 3)}, draw(N, 4), labels(), layers=2)
def constant_features(p, x, y):
    more = jnp.broadcast_to(p["more"], (len(y), 2))
    return classify(jnp.tanh(jnp.concatenate([x, -more], -1)) @ p["v"], y)


@pattern({"w": draw(4, 4), "token": draw(4), "v": draw(4, 3)}, draw(N, 4), labels(), layers=3)
def stacked_with_a_token(p, x, y):
    h = jnp.stack([jnp.broadcast_to(p["token"], (len(y), 4)), x @ p["w"]], axis=1)
    return classify(_attend(h, h, h)[:, 0] @ p["v"], y)


# One example more than the data has: it is no parameter that all of them share.
@pattern(
    {"w": draw(4, 3), "row": draw(1, 3)},
    draw(N, 4),
    labels(),
    uncovered=("row",),
    layers=1,
    has_examples=False,
)
def parameter_in_the_place_of_an_example(p, x, y):
    return classify(jnp.concatenate([p["row"], (x @ p["w"])[1:]]), y)


# ---------------------------------------------------------- parameters as states and in their place

STATE = {"h": draw(4), "u": draw(4, 4), "v": draw(4, 3)}
STEPS = draw(N, 6, 4), labels()


def _run(p, start, x):
    h, _ = jax.lax.scan(lambda h, x: (jnp.tanh(x + h @ p["u"]), None), start, x.swapaxes(0, 1))
    return h @ p["v"]


@pattern(STATE, *STEPS, layers=3)
def first_carry(p, x, y):
    return classify(_run(p, jnp.broadcast_to(p["h"], (len(y), 4)), x), y)


@pattern(STATE, *STEPS, layers=3)
def first_carry_under_vmap(p, x, y):
    # Steps stand second in `_run`, as the batch axis is first.
    return classify(jax.vmap(lambda x: _run(p, -p["h"][None], x[None])[0])(x), y)


@pattern(STATE, *STEPS, layers=3)
def two_first_carries_of_one(p, x, y):
    def step(carry, x):
        c, h = carry
        h = jnp.tanh(x + h @ p["u"])
        return (c / 2 + h, h), None

    start = jnp.tile(p["h"], (len(y), 1))
    (c, h), _ = jax.lax.scan(step, (start, start), x.swapaxes(0, 1))
    return classify((c * h) @ p["v"], y)


@pattern(STATE, *STEPS, layers=3)
def carry_that_is_reset(p, x, y):
    def step(h, x):
        h = jnp.where(x[:, :1] > 0, p["h"], h)
        return jnp.tanh(x + h @ p["u"]), None

    start = jnp.zeros((len(y), 4))
    return classify(jax.lax.scan(step, start, x.swapaxes(0, 1))[0] @ p["v"], y)


LAYERED = {"h": draw(2, 4), "u": draw(2, 4, 4), "v": draw(4, 3)}


@pattern(LAYERED, *STEPS, layers=3)
def first_carries_of_scanned_layers(p, x, y):
    def layer(x, uh):
        u, h = uh
        start = jnp.broadcast_to(h, (len(y), 4))
        return jax.lax.scan(lambda h, x: (jnp.tanh(x + h @ u),) * 2, start, x)[1], None

    x, _ = jax.lax.scan(layer, x.swapaxes(0, 1), (p["u"], p["h"]))
    return classify(x[-1] @ p["v"], y)


# What is read twice, as a carry and as something else, is perturbed nowhere.
@pattern(STATE, *STEPS, uncovered=("h",), layers=2)
def first_carry_and_more(p, x, y):
    start = jnp.broadcast_to(p["h"], (len(y), 4))
    return classify(_run(p, start, x) + jnp.sin(start) @ p["v"], y)


@pattern({"token": draw(4), "w": draw(4, 4), "v": draw(4, 3)}, *TOKENS, layers=3)
def token_of_what_is_masked(p, x, y):
    h = jnp.where(x[..., :1] > 0, p["token"], x @ p["w"])
    return classify(jnp.tanh(jnp.cumsum(h, 1)[:, -1]) @ p["v"], y)


@pattern({"t": draw(), "least": draw(5, 4), "w": draw(4, 3)}, *TOKENS, layers=3)
def temperature_and_thresholds(p, x, y):
    least = jnp.exp(jnp.broadcast_to(p["least"], x.shape))
    return classify(jnp.maximum(x, least).sum(1) @ p["w"] / p["t"], y)


# ------------------------------------------------------------ parameters that are scaled before use


@pattern(MLP, draw(N, 4), labels(), layers=2)
def scaled_by_numbers(p, x, y):
    h = jnp.tanh(x @ (p["w1"] / 2) + 0.1 * p["b1"])
    return classify(h @ (p["w2"] * 6**-0.5) - p["b2"] / 3, y)


# Of a bias that is scaled by what is known only when the program runs no kernel has one more input.
@pattern(MLP, draw(N, 4), labels(), layers=3)
def scaled_by_values(p, x, y):
    scale = jnp.exp(jnp.cos(jnp.arange(3.0)))[1]
    h = jnp.tanh(x @ (p["w1"] / scale) + p["b1"] * scale)
    return classify(h @ (scale * p["w2"]) + p["b2"], y)


@pattern({"w": draw(4, 3), "s": draw()}, draw(N, 4), labels(), uncovered=("s",), layers=1)
def scaled_by_a_parameter(p, x, y):
    return classify(x @ (p["w"] * p["s"]), y)


@pattern({"w": draw(4, 3), "b": draw(3)}, draw(N, 4), labels(), layers=1)
def spectral_scaling_without_its_derivative(p, x, y):
    scale = jax.lax.stop_gradient(largest_singular_value(p["w"]))
    return classify(x @ (p["w"] / scale) + p["b"], y)


@pattern({"e": draw(7, 4), "v": draw(4, 3)}, labels(7), labels(), layers=2)
def scaled_table(p, t, y):
    return classify(jnp.tanh((p["e"] * jnp.sin(jnp.arange(3.0)[1]))[t]) @ (-2 * p["v"]), y)


@pattern({"w": draw(3, 4, 4), "v": draw(4, 3)}, draw(N, 4), labels(), layers=2)
def scaled_in_a_branch_of_a_scan(p, x, y):
    def layer(h, ws):
        w, s = ws
        h = jax.lax.cond(s > 1.5, lambda: jnp.tanh(h @ (w / jnp.exp(s))), lambda: h @ (w * s))
        return h, None

    h, _ = jax.lax.scan(layer, x, (p["w"], jnp.arange(1.0, 4.0)))
    return classify(h @ p["v"], y)


@pattern(QKV | {"o": draw(4, 3)}, draw(N, 4), labels(), layers=4)
def scaled_joined_and_scanned(p, x, y):
    w = jnp.stack([p[name]["w"] / (1 + i) for i, name in enumerate("qkv")])
    b = jnp.stack([p[name]["b"] for name in "qkv"])

    def layer(h, wbs):
        w, b, s = wbs
        return jnp.tanh(h @ (w * s) - b), None

    h, _ = jax.lax.scan(layer, x, (w, b, jnp.arange(1.0, 4.0)))
    return classify(h @ p["o"], y)


@pattern(MLP, draw(N, 4), labels(), uncovered=("b2",), layers=2)
def slope_of_scaled_kernels(p, x, y):
    def net(x):
        h = jnp.tanh(3 * p["b1"] - x @ (p["w1"] / 2))
        return h @ (p["w2"] * jnp.exp(jnp.ones(()))) + p["b2"]

    return classify(jax.vmap(lambda x: jax.jvp(net, (x,), (jnp.arange(4.0),))[1])(x), y)
