"""Loss functions in which layers hide: the ways in which people write them.

Each pattern is a mean of marked per-example losses over data on the leading axis of every argument,
so that the loss of one datum is the same function on a slice of the arguments.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_kron import losses

N = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Pattern:
    name: str
    loss_fn: Callable[..., jax.Array]
    params: Any
    args: tuple
    uncovered: tuple[str, ...] = ()  # paths that must be declared
    layers: int | None = None  # how many layers there must be
    data_loss: Callable[..., jax.Array] | None = None  # the likelihood alone, if there is more


PATTERNS: list[Pattern] = []


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape) * 0.7, jnp.float32)


def labels(classes=3, *shape):
    return jnp.asarray(np.random.default_rng(9).integers(classes, size=(N, *shape)))


def classify(logits, y):
    return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(logits, y))


def regress(out, y):
    return jnp.mean(jnp.sum(losses.squared_error(out, y), axis=tuple(range(1, out.ndim))))


def pattern(params, *args, uncovered=(), layers=None):
    def register(loss_fn):
        name = loss_fn.__name__
        PATTERNS.append(Pattern(name, loss_fn, params, args, uncovered, layers))
        return loss_fn

    return register


# ------------------------------------------------------------------------------------ dense layers

MLP = {"w1": draw(4, 6), "b1": draw(6), "w2": draw(6, 3, seed=1), "b2": draw(3)}


@pattern(MLP, draw(N, 4), labels(), layers=2)
def perceptron(p, x, y):
    return classify(jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"], y)


@pattern(MLP, draw(N, 2, 7, 4), labels(3, 2, 7), layers=2)
def leading_axes(p, x, y):
    return classify(jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"], y)


@pattern(MLP, draw(N, 4), labels(), layers=2)
def inside_jit(p, x, y):
    @jax.jit
    def net(p, x):
        return jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]

    return classify(net(p, x), y)


@pattern(MLP, draw(N, 4), labels(), layers=2)
def vmapped_over_data(p, x, y):
    def one(x, y):
        out = jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
        return losses.softmax_cross_entropy_with_integer_labels(out, y)

    return jnp.mean(jax.vmap(one)(x, y))


@pattern(MLP, draw(N, 4), labels(), layers=2)
def mapped_over_data(p, x, y):
    def one(xy):
        x, y = xy
        out = jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
        return losses.softmax_cross_entropy_with_integer_labels(out, y)

    return jnp.mean(jax.lax.map(one, (x, y)))


@pattern(MLP, draw(N, 4), labels(), layers=2)
def rematerialized(p, x, y):
    net = jax.checkpoint(lambda p, x: jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"])
    return classify(net(p, x), y)


@pattern({"w1": draw(6, 4), "w2": draw(3, 6)}, draw(N, 4), labels(), layers=2)
def transposed_kernels(p, x, y):
    return classify(jnp.tanh(x @ p["w1"].T) @ p["w2"].T, y)


@pattern({"w": draw(2, 3, 4, 5), "v": draw(5, 4, 3)}, draw(N, 2, 3), labels(), layers=2)
def einsums(p, x, y):
    h = jnp.tanh(jnp.einsum("nab,abcd->ndc", x, p["w"]))
    return classify(jnp.einsum("ndc,dck->nk", h, p["v"]), y)


@pattern({"w": draw(4, 3).astype(jnp.float32), "b": draw(3)}, draw(N, 4), labels(), layers=1)
def cast_to_bf16(p, x, y):
    # Exact in bfloat16 only by luck: the loss is compared with itself, in the same arithmetic.
    out = x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16) + p["b"].astype(jnp.bfloat16)
    return classify(out.astype(jnp.float32), y)


@pattern({"w": draw(4, 3), "b": draw(3)}, draw(N, 4), labels(), layers=1)
def bias_behind_reshapes(p, x, y):
    out = (x @ p["w"]).reshape(N if x.shape[0] == N else -1, 3, 1).transpose(2, 0, 1)
    return classify((out + p["b"].reshape(1, 1, 3))[0], y)


@pattern({"w": draw(4, 3), "v": draw(4, 3, seed=1), "b": draw(3)}, draw(N, 4), labels(), layers=3)
def bias_of_two_kernels(p, x, y):
    h = jnp.tanh(x @ p["w"] + p["b"])
    return classify(h + jnp.sin(x @ p["v"] + p["b"]), y)


@pattern({"w": draw(4, 3), "b": draw(3)}, draw(N, 4), labels(), layers=2)
def output_read_twice(p, x, y):
    z = x @ p["w"]
    return classify(jnp.tanh(z + p["b"]) + z, y)


@pattern({"w": draw(4, 9), "b": draw(9)}, draw(N, 4), labels(), layers=1)
def outputs_split(p, x, y):
    q, k, v = jnp.split(x @ p["w"] + p["b"], 3, axis=-1)
    return classify(q * k + v, y)


@pattern({"w": draw(4, 9)}, draw(N, 4), labels(), layers=3)
def kernel_split(p, x, y):
    q, k, v = jnp.split(p["w"], 3, axis=1)
    return classify((x @ q) * jnp.tanh(x @ k) + x @ v, y)


@pattern({"w": draw(4, 4), "out": draw(4, 3)}, draw(N, 4), labels(), layers=2)
def weight_used_twice(p, x, y):
    return classify(jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"]) @ p["out"], y)


@pattern(
    {"table": draw(7, 4), "w": draw(4, 4)},
    labels(7, 3),
    labels(7, 3),
    uncovered=("table",),
    layers=1,
)
def tied_embedding(p, x, y):
    return classify(jnp.tanh(p["table"][x] @ p["w"]) @ p["table"].T, y)


@pattern({"w": draw(4, 3), "a": draw(4, 2), "b": draw(2, 3)}, draw(N, 4), labels(), layers=3)
def low_rank_apart(p, x, y):
    return classify(x @ p["w"] + x @ p["a"] @ p["b"], y)


@pattern(
    {"w": draw(4, 3), "a": draw(4, 2), "b": draw(2, 3)},
    draw(N, 4),
    labels(),
    uncovered=("a", "b"),
    layers=1,
)
def low_rank_merged(p, x, y):
    return classify(x @ (p["w"] + p["a"] @ p["b"]), y)


@pattern({"w": draw(2, 4, 3)}, draw(N, 4), labels(), layers=1)
def ensemble(p, x, y):
    logits = jax.vmap(lambda w: x @ w)(p["w"])
    return classify(jnp.sum(jnp.tanh(logits), axis=0), y)


@pattern(
    {"w": draw(4, 3), "extra": draw(3, 3)}, draw(N, 4), labels(), uncovered=("extra",), layers=1
)
def regularized(p, x, y):
    return classify(x @ p["w"], y) + 0.1 * jnp.sum(p["w"] ** 2) + jnp.sum(p["extra"] ** 2)


PATTERNS[-1] = dataclasses.replace(PATTERNS[-1], data_loss=lambda p, x, y: classify(x @ p["w"], y))


@pattern({"w": draw(4, 3)}, draw(N, 4), labels(), uncovered=("w",), layers=0)
def normalized_kernel(p, x, y):
    return classify(x @ (p["w"] / jnp.linalg.norm(p["w"])), y)


@jax.custom_vjp
def _clipped(x, w):
    return x @ w


_clipped.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, jnp.clip(r[0].T @ g, -1, 1))
)


@pattern(MLP | {"v": draw(3, 3)}, draw(N, 4), labels(), uncovered=("v",), layers=2)
def custom_rule(p, x, y):
    h = jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
    return classify(_clipped(h, p["v"]), y)


# ----------------------------------------------------------------------------------- convolutions


def _conv(x, w, dims, **kwargs):
    kwargs = {"window_strides": (1,) * (x.ndim - 2), "padding": "SAME"} | kwargs
    return jax.lax.conv_general_dilated(x, w, dimension_numbers=dims, **kwargs)


def _conv_pattern(name, x_shape, w_shape, dims, **kwargs):
    out = kwargs.pop("out", w_shape[-1])

    def loss_fn(p, x, y):
        h = jnp.tanh(_conv(x, p["w"], dims, **kwargs) + p["b"])
        return classify(jnp.mean(h, axis=tuple(range(1, h.ndim - 1))) @ p["v"], y)

    loss_fn.__name__ = name
    params = {"w": draw(*w_shape), "b": draw(out), "v": draw(out, 3)}
    pattern(params, draw(N, *x_shape), labels(), layers=2)(loss_fn)


_1D, _2D, _3D = ("NWC", "WIO", "NWC"), ("NHWC", "HWIO", "NHWC"), ("NDHWC", "DHWIO", "NDHWC")
_conv_pattern("conv_1d", (8, 2), (3, 2, 4), _1D)
_conv_pattern("conv_2d", (6, 5, 2), (3, 2, 2, 4), _2D)
_conv_pattern("conv_3d", (4, 4, 3, 2), (2, 2, 2, 2, 4), _3D)
_conv_pattern("conv_strided", (6, 5, 2), (3, 3, 2, 4), _2D, window_strides=(2, 2), padding="VALID")
_conv_pattern("conv_padded", (6, 5, 2), (3, 3, 2, 4), _2D, padding=((2, 1), (0, 3)))
_conv_pattern(
    "conv_input_dilated",
    (4, 5, 2),
    (3, 3, 2, 4),
    _2D,
    lhs_dilation=(2, 3),
    padding=((1, 1), (0, 2)),
)
_conv_pattern("conv_kernel_dilated", (8, 7, 2), (3, 3, 2, 4), _2D, rhs_dilation=(2, 2))
_conv_pattern("conv_grouped", (6, 5, 4), (3, 3, 2, 6), _2D, feature_group_count=2)
_conv_pattern("conv_depthwise", (6, 5, 4), (3, 3, 1, 8), _2D, feature_group_count=4)


@pattern({"w": draw(4, 2, 3, 3), "v": draw(4, 3)}, draw(N, 2, 6, 5), labels(), layers=2)
def conv_channels_first(p, x, y):
    h = jnp.tanh(_conv(x, p["w"], ("NCHW", "OIHW", "NCHW")))
    return classify(jnp.sum(h, axis=(2, 3)) @ p["v"], y)


@pattern({"w": draw(3, 3, 2, 4), "v": draw(4, 3)}, draw(N, 4, 4, 2), labels(), layers=2)
def conv_transposed(p, x, y):
    h = jnp.tanh(jax.lax.conv_transpose(x, p["w"], (2, 2), "SAME"))
    return classify(jnp.sum(h, axis=(1, 2)) @ p["v"], y)


@pattern({"w": draw(3, 3, 2, 4), "v": draw(4, 3)}, draw(N, 6, 6, 2), labels(), layers=2)
def conv_vmapped_and_pooled(p, x, y):
    def one(x):
        h = jax.nn.relu(_conv(x[None], p["w"], _2D)[0])
        h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (2, 2, 1), (2, 2, 1), "VALID")
        return jnp.sum(h, axis=(0, 1)) @ p["v"]

    return classify(jax.vmap(one)(x), y)


# ------------------------------------------------------------------------------- tables and norms


@pattern({"table": draw(7, 4), "w": draw(4, 3)}, labels(7, 6), labels(), layers=2)
def embedding(p, x, y):
    return classify(jnp.mean(jnp.tanh(p["table"][x]), axis=1) @ p["w"], y)


@pattern({"table": draw(7, 4), "at": draw(6, 4), "w": draw(4, 3)}, labels(7, 6), labels(), layers=3)
def positions(p, x, y):
    h = jnp.take(p["table"], x, axis=0) + p["at"]
    return classify(jnp.mean(jnp.tanh(h), axis=1) @ p["w"], y)


@pattern(
    {"w": draw(4, 6), "scale": draw(6), "shift": draw(6), "v": draw(6, 3)}, draw(N, 4), labels()
)
def layer_norm(p, x, y):
    h = x @ p["w"]
    h = (h - h.mean(-1, keepdims=True)) * jax.lax.rsqrt(h.var(-1, keepdims=True) + 1e-5)
    return classify(jnp.tanh(h * p["scale"] + p["shift"]) @ p["v"], y)


@pattern(
    {"w": draw(4, 6), "scale": draw(6), "v": draw(6, 3)},
    draw(N, 4),
    labels(),
    uncovered=("w",),
)
def batch_norm(p, x, y):
    # Leaves of `uncovered` touch several data at once; what follows the norm does not.
    h = x @ p["w"]
    h = (h - h.mean(0)) / (h.std(0) + 1e-2)
    return classify(jnp.tanh(h * p["scale"]) @ p["v"], y)


# ------------------------------------------------------------------------- loops and input slopes

RNN = {"w": draw(4, 5), "u": draw(5, 5), "b": draw(5), "out": draw(5, 3)}


# A bias that is added to the sum of two products belongs to neither.
@pattern(RNN, draw(N, 6, 4), labels(), layers=4)
def recurrent(p, x, y):
    def step(h, x):
        h = jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])
        return h, None

    h, _ = jax.lax.scan(step, jnp.zeros((x.shape[0], 5)), x.swapaxes(0, 1))
    return classify(h @ p["out"], y)


@pattern(RNN, draw(N, 6, 4), labels(), layers=4)
def recurrent_vmapped(p, x, y):
    def one(x):
        def step(h, x):
            h = jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])
            return h, None

        return jax.lax.scan(step, jnp.zeros(5), x)[0] @ p["out"]

    return classify(jax.vmap(one)(x), y)


STACK = {"w": draw(3, 4, 4), "b": draw(3, 4), "out": draw(4, 3)}


@pattern(STACK, draw(N, 4), labels(), layers=2)
def scanned_layers(p, x, y):
    def layer(h, wb):
        return jnp.tanh(h @ wb[0] + wb[1]), None

    return classify(jax.lax.scan(layer, x, (p["w"], p["b"]))[0] @ p["out"], y)


@pattern(STACK, draw(N, 4), labels(), layers=2)
def scanned_rematerialized_layers(p, x, y):
    @jax.checkpoint
    def layer(h, wb):
        return jnp.tanh(h @ wb[0] + wb[1]), None

    return classify(jax.lax.scan(layer, x, (p["w"], p["b"]))[0] @ p["out"], y)


@pattern({"w": draw(4, 4), "out": draw(4, 3)}, draw(N, 4), labels(), layers=2)
def fori_loop(p, x, y):
    h = jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"]), x)
    return classify(h @ p["out"], y)


@pattern(
    {"w": draw(4, 4), "v": draw(4, 4, seed=1), "out": draw(4, 3)}, draw(N, 4), labels(), layers=3
)
def branches(p, x, y):
    h = jax.lax.cond(
        jnp.sum(p["out"]) > -1e3, lambda: jnp.tanh(x @ p["w"]), lambda: jnp.sin(x @ p["v"])
    )
    return classify(h @ p["out"], y)


PINN = {"w1": draw(2, 6), "b1": draw(6), "w2": draw(6, 5), "b2": draw(5), "w3": draw(5, 1)}


def _network(p, x):
    return (jnp.tanh(jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]) @ p["w3"])[0]


@pattern(PINN, draw(N, 2), draw(N), layers=3)
def laplacian_by_forward_mode(p, x, y):
    def laplacian(x):
        def second(e):
            return jax.jvp(lambda x: jax.jvp(lambda x: _network(p, x), (x,), (e,))[1], (x,), (e,))[
                1
            ]

        return second(jnp.array([1.0, 0.0])) + second(jnp.array([0.0, 1.0]))

    return jnp.mean(losses.squared_error(jax.vmap(laplacian)(x), y))
