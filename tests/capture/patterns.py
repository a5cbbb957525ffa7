"""Loss functions in which layers hide: the ways in which people write them.

Each pattern is a mean of marked per-example losses over data on the leading axis of every argument,
so that the loss of one example is the same function on a slice of the arguments.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

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
    # The loss whose gradient a column is, of one example: the likelihood alone, if there is more.
    data_loss: Callable[..., jax.Array] | None = None
    scale: float | None = None  # of the columns; by default that of losses that weigh the same
    axis: int = 0  # of all arguments, which counts the data
    has_examples: bool = True  # whether there is a gradient of a single example


PATTERNS: list[Pattern] = []


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape) * 0.7, jnp.float32)


def labels(classes=3, *shape):
    return jnp.asarray(np.random.default_rng(9).integers(classes, size=(N, *shape)))


def classify(logits, y):
    return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(logits, y))


def regress(out, y):
    return jnp.mean(jnp.sum(losses.squared_error(out, y), axis=tuple(range(1, out.ndim))))


def pattern(params, *args, uncovered=(), layers=None, **kwargs):
    def register(loss_fn):
        name = loss_fn.__name__
        PATTERNS.append(Pattern(name, loss_fn, params, args, uncovered, layers, **kwargs))
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


TIED = {"table": draw(7, 4), "w": draw(4, 4)}


@pattern(TIED, labels(7, 3), labels(7, 3), layers=2)
def tied_embedding(p, x, y):
    return classify(jnp.tanh(p["table"][x] @ p["w"]) @ p["table"].T, y)


@pattern({**TIED, "b": draw(7)}, labels(7, 3), labels(7), layers=3)
def tied_embedding_pooled_under_a_head_with_bias(p, x, y):
    h = jnp.mean(jnp.take(p["table"], x, axis=0), axis=1)
    return classify(jnp.einsum("nd,vd->nv", jnp.tanh(h @ p["w"]), p["table"]) + p["b"], y)


@pattern({"table": draw(7, 4), "w": draw(3, 4, 4)}, labels(7, 3), labels(7, 3), layers=2)
def tied_embedding_around_scanned_layers(p, x, y):
    @jax.checkpoint
    def layer(h, w):
        return h + jnp.tanh(jnp.cumsum(h, axis=1) @ w), None

    h = jax.lax.scan(layer, jnp.take(p["table"], x, axis=0), p["w"])[0]
    # The head takes the positions one by one, as where logits of all would take too much memory.
    logits = jax.lax.map(lambda h: h @ p["table"].T, h.swapaxes(0, 1))
    return classify(logits.swapaxes(0, 1), y)


@pattern(TIED, labels(7, 3), labels(7, 2), layers=2)
def tied_embedding_under_vmap_read_twice(p, x, y):
    def one(x, y):
        def embed(tokens):
            return p["table"][tokens]

        h = jnp.tanh(jnp.sum(embed(x), axis=0) @ p["w"]) + 0.5 * embed(y)
        return h @ p["table"].T

    return classify(jax.vmap(one)(x, y), y)


@pattern({"table": draw(2, 7, 4)}, labels(7, 3), labels(7, 3), layers=1)
def tied_embeddings_of_an_ensemble(p, x, y):
    def add(logits, table):
        return logits + jnp.tanh(table[x]) @ table.T, None

    return classify(jax.lax.scan(add, jnp.zeros((*x.shape, 7)), p["table"])[0], y)


@pattern({"w": draw(4, 3), "out": draw(4, 3)}, draw(N, 4), labels(), uncovered=("w",), layers=1)
def tied_autoencoder(p, x, y):
    return classify(jnp.tanh(x @ p["w"]) @ p["w"].T @ p["out"], y)


@pattern(
    {"prior": draw(7), "w": draw(4, 7)}, labels(7), draw(N, 4), labels(7), uncovered=("prior",)
)
def looked_up_and_added(p, x, h, y):
    return classify(p["prior"][x][:, None] * h @ p["w"] + p["prior"], y)


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
    has_examples=False,
)
def batch_norm(p, x, y):
    # Leaves of `uncovered` touch several examples at once; what follows the norm does not.
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


# ------------------------------------------------------------------------- how functions are called


@pattern(MLP, draw(N, 4), labels(), layers=2)
def nested_jit(p, x, y):
    dense = jax.jit(lambda w, b, x: x @ w + b)

    @jax.jit
    def net(p, x):
        return dense(p["w2"], p["b2"], jnp.tanh(dense(p["w1"], p["b1"], x)))

    return jax.jit(lambda p: classify(net(p, x), y))(p)


@pattern({"w": draw(4, 4), "b": draw(4)}, draw(N, 4), labels(4), layers=1)
def jitted_function_called_twice(p, x, y):
    dense = jax.jit(lambda x: jnp.tanh(x @ p["w"] + p["b"]))
    return classify(dense(dense(x)), y)


@pattern(MLP, draw(N, 6, 4), labels(3, 6), layers=2)
def vmapped_twice_over_odd_axes(p, x, y):
    def net(x):
        return jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]

    out = jax.vmap(jax.vmap(net, in_axes=0, out_axes=1), in_axes=0, out_axes=2)(x)  # [3, 6, N]
    return classify(out.transpose(2, 1, 0), y)


@pattern(MLP, draw(N, 6, 4), labels(3, 6), layers=2)
def mapped_over_positions(p, x, y):
    def net(x):
        return jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]

    return classify(jax.lax.map(net, x.swapaxes(0, 1)).swapaxes(0, 1), y)


def _checkpointed(name, policy):
    def loss_fn(p, x, y):
        first = jax.checkpoint(lambda p, x: jnp.tanh(x @ p["w1"] + p["b1"]))

        def net(p, x):
            return checkpoint_name(first(p, x), "h") @ p["w2"] + p["b2"]

        return classify(jax.checkpoint(net, policy=policy)(p, x), y)

    loss_fn.__name__ = name
    pattern(MLP, draw(N, 4), labels(), layers=2)(loss_fn)


_checkpointed("checkpoint_of_dots", jax.checkpoint_policies.dots_saveable)
_checkpointed("checkpoint_of_names", jax.checkpoint_policies.save_only_these_names("h"))


# ------------------------------------------------------------------------ examples and their losses

MASK = jnp.arange(6) < jnp.arange(2, N + 2)[:, None]
POSITIONS = draw(N, 6, 4), MASK, labels(3, 6)


def _masked_losses(p, x, m, y):
    out = jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
    return losses.softmax_cross_entropy_with_integer_labels(out, y) * m


def _masked_column(p, x, m, y):
    return jnp.sum(_masked_losses(p, x, m, y)) * jnp.sqrt(N / jnp.sum(MASK))


@pattern(MLP, *POSITIONS, layers=2, scale=1, data_loss=_masked_column)
def masked_positions(p, x, m, y):
    return jnp.sum(_masked_losses(p, x, m, y)) / jnp.sum(m)


@pattern(MLP, *POSITIONS, layers=2, scale=1, data_loss=_masked_column)
def masked_by_where(p, x, m, y):
    return jnp.sum(jnp.where(m, _masked_losses(p, x, m, y), 0)) / jnp.sum(m)


@pattern(RNN, draw(6, N, 4), labels(3, 6).T, layers=4, axis=1, scale=6**0.5)
def time_major(p, x, y):
    def step(h, x):
        h = jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])
        return h, h @ p["out"]

    return classify(jax.lax.scan(step, jnp.zeros((x.shape[1], 5)), x)[1], y)


@pattern(RNN, draw(N, 6, 4), labels(3, 6), layers=4)
def losses_inside_a_scan(p, x, y):
    def step(h, xy):
        x, y = xy
        h = jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])
        return h, losses.softmax_cross_entropy_with_integer_labels(h @ p["out"], y)

    start = jnp.zeros((x.shape[0], 5))
    return jnp.mean(jax.lax.scan(step, start, (x.swapaxes(0, 1), y.swapaxes(0, 1)))[1])


@pattern({"w": draw(4, 3)}, draw(N, 4), labels(), layers=1)
def losses_summed_in_a_carry(p, x, y):
    def step(total, xy):
        loss = losses.softmax_cross_entropy_with_integer_labels(xy[0] @ p["w"], xy[1])
        return total + loss, None

    return jax.lax.scan(step, 0.0, (x, y))[0] / x.shape[0]


@pattern(
    {"t": draw(4, 6), "a": draw(6, 3), "b": draw(6, 2)},
    draw(N, 4),
    labels(),
    draw(N, 2),
    layers=3,
    scale=1,
)
def two_heads(p, x, y, z):
    h = jnp.tanh(x @ p["t"])
    return classify(h @ p["a"], y) + regress(h @ p["b"], z)


@pattern({"w": draw(4, 6), "v": draw(6, 3)}, draw(N, 4), draw(N, 4, seed=5), labels(), layers=2)
def two_batches(p, x, u, y):
    def net(x):
        return jnp.tanh(x @ p["w"]) @ p["v"]

    return classify(net(x), y) + classify(net(u), y)


@pattern({"w": draw(4, 6), "v": draw(12, 3)}, draw(N, 4), draw(N, 4, seed=5), labels(), layers=2)
def two_inputs_of_an_example(p, x, u, y):
    def net(x):
        return jnp.tanh(x @ p["w"])

    return classify(jnp.concatenate([net(x), net(u)], axis=-1) @ p["v"], y)


@pattern({"w": draw(4, 6), "v": draw(6, 3)}, draw(N, 6, 4), labels(3, 6), layers=2)
def positions_flattened_inside(p, x, y):
    h = jnp.tanh(x.reshape(-1, 4) @ p["w"]) @ p["v"]
    return classify(h.reshape(*y.shape, 3), y)


# What several examples share has no gradient of an example.
@pattern({"w": draw(4, 3)}, draw(N, 4), labels(N), uncovered=("w",), layers=0)
def data_against_data(p, x, y):
    h = x @ p["w"]
    return classify(h @ h.T, y)


# The curvature is that of the predictions: through the variance and the targets comes none.
@pattern(
    {"m": draw(4, 2), "s": draw(4, 2, seed=1)},
    draw(N, 4),
    draw(N, 2),
    uncovered=("s",),
    layers=1,
    scale=1,
)
def learned_variance(p, x, y):
    variance = jnp.exp(x @ p["s"])
    each = losses.gaussian_negative_log_likelihood(x @ p["m"], y, variance)
    return jnp.mean(jnp.sum(each, axis=-1))


@pattern(
    {"w": draw(4, 3), "v": draw(4, 3, seed=3)}, draw(N, 4), uncovered=("v",), layers=1, scale=1
)
def learned_targets(p, x):
    return regress(x @ p["w"], x @ p["v"])


# ---------------------------------------------------------------------------- between the layers


@pattern(MLP, draw(N, 4), jax.random.split(jax.random.key(3), N), labels(), layers=2)
def dropout(p, x, keys, y):
    h = jnp.tanh(x @ p["w1"] + p["b1"])
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (6,)))(keys)
    return classify(jnp.where(keep, h / 0.5, 0) @ p["w2"] + p["b2"], y)


@jax.custom_jvp
def _squashed(x):
    return jnp.tanh(x)


_squashed.defjvp(lambda p, t: (_squashed(p[0]), t[0] * (1 - jnp.tanh(p[0]) ** 2)))


@pattern(MLP, draw(N, 4), labels(), layers=2)
def custom_jvp_activation(p, x, y):
    return classify(_squashed(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"], y)


@pattern({"w": draw(4, 6), "v": draw(6, 3)}, draw(N, 4), labels(), layers=2)
def functions_of_features(p, x, y):
    h = x @ p["w"]
    h = h * jax.nn.softmax(h) + jax.nn.gelu(h) + jnp.sort(h, -1) + jnp.cumsum(h, -1)
    h = jnp.roll(jnp.flip(h, -1), 2, -1) + jax.nn.standardize(h) + jnp.max(h, -1, keepdims=True)
    return classify(h.at[:, :3].set(0.5) @ p["v"], y)


@pattern({"w": draw(4, 6), "v": draw(6, 3)}, draw(N, 4), labels(), layers=2)
def stacked_and_unstacked(p, x, y):
    z = x @ p["w"]
    a, b = jnp.unstack(jnp.stack([jnp.tanh(z), z], axis=1), axis=1)
    return classify((a * b) @ p["v"], y)


@pattern({"w": draw(4, 3), "v": draw(6, 3)}, draw(N, 4), labels(), layers=2)
def tiled(p, x, y):
    return classify(jnp.tile(jnp.tanh(x @ p["w"]), (1, 2)) @ p["v"], y)


@pattern({"w": draw(4, 6), "v": draw(6, 3)}, draw(N, 4), labels(), layers=2)
def straight_through(p, x, y):
    h = x @ p["w"]
    return classify((h + jax.lax.stop_gradient(jnp.sign(h) - h)) @ p["v"], y)


@pattern({"w": draw(6, 3)}, draw(N, 4), labels(), layers=1)
def padded_inputs(p, x, y):
    return classify(jnp.pad(x, ((0, 0), (1, 1))) @ p["w"], y)


# ------------------------------------------------------------------------------- odd parameters


@pattern({"w": draw(4, 3), "b": draw(1)}, draw(N, 4), labels(), layers=2)
def bias_of_one_element(p, x, y):
    return classify(jnp.tanh(x @ p["w"] + p["b"]), y)


@pattern({"w": draw(4, 3), "b": draw(6, 1)}, draw(N, 6, 4), labels(3, 6), layers=2)
def bias_of_positions(p, x, y):
    return classify(jnp.tanh(x @ p["w"] + p["b"]), y)


@pattern({"w": draw(4, 3), "b": draw(3)}, draw(N, 4), labels(), layers=1)
def bias_first(p, x, y):
    return classify(p["b"] + x @ p["w"], y)


@pattern({"w": draw(4, 3), "b": draw(3)}, draw(N, 4), labels(), layers=2)
def bias_added_twice(p, x, y):
    return classify(x @ p["w"] + p["b"] + p["b"], y)


# What is subtracted has the input -1 beside those of its kernel.
@pattern(MLP, draw(N, 4), labels(), layers=2)
def subtracted_bias(p, x, y):
    return classify(jnp.tanh(x @ p["w1"] - p["b1"]) @ p["w2"] - p["b2"], y)


@pattern(MLP, draw(N, 4), labels(), layers=2)
def bias_minus_product(p, x, y):
    return classify(p["b2"] - (-jnp.tanh(p["b1"] - x @ p["w1"])) @ p["w2"], y)


@pattern(MLP, draw(N, 4), labels(), layers=2)
def bias_of_negated_product(p, x, y):
    return classify(p["b2"] - (-(jnp.tanh(-(x @ p["w1"]) + p["b1"]) @ p["w2"])), y)


@pattern({"w": draw(4, 3), "b": draw(3)}, draw(N, 4), labels(), layers=1)
def negated_kernel(p, x, y):
    return classify(x @ (0 - p["w"]) - p["b"], y)


@pattern({"w": draw(4, 3), "b": draw(3)}, draw(N, 4), labels(), layers=2)
def bias_added_and_subtracted(p, x, y):
    return classify(2 * jnp.tanh(x @ p["w"] + p["b"]) - p["b"], y)


# The derivative of the product is negated before it meets the data.
@pattern(MLP, draw(N, 4), labels(), uncovered=("b2",), layers=2)
def slope_of_a_subtracted_product(p, x, y):
    def net(x):
        return jnp.tanh(p["b1"] - x @ p["w1"]) @ p["w2"] + p["b2"]

    return classify(jax.vmap(lambda x: jax.jvp(net, (x,), (jnp.arange(4.0),))[1])(x), y)


@pattern({"w": draw(4, 3), "center": draw(4)}, draw(N, 4), labels(), layers=2)
def centered_inputs(p, x, y):
    return classify((x - p["center"]) @ p["w"], y)


# A bias of each example: its elements are not shared.
@pattern(
    {"w": draw(4, 3), "b": draw(N, 3)},
    draw(N, 4),
    labels(),
    uncovered=("b",),
    layers=1,
    has_examples=False,
)
def bias_of_every_example(p, x, y):
    return classify(x @ p["w"] + p["b"], y)


@pattern({"w": draw(4, 3), "s": draw(), "t": draw()}, draw(N, 4), labels(), layers=2)
def scalars(p, x, y):
    return classify(p["s"] * jnp.tanh(x @ p["w"]) + p["t"], y)


@pattern({"flat": draw(24 + 6 + 18)}, draw(N, 4), labels(), layers=3)
def everything_from_one_vector(p, x, y):
    w, b, v = jnp.split(p["flat"], (24, 30))
    return classify(jnp.tanh(x @ w.reshape(4, 6) + b) @ v.reshape(6, 3), y)


@pattern({"w": draw(3, 4, 4), "v": draw(4, 3)}, draw(N, 4), labels(), layers=4)
def stacked_layers_indexed(p, x, y):
    for i in range(3):
        x = jnp.tanh(x @ p["w"][i])
    return classify(x @ p["v"], y)


@pattern({"w": draw(6, 4), "v": draw(3, 6)}, draw(N, 4), labels(), layers=2)
def swapped_operands(p, x, y):
    return classify((p["v"] @ jnp.tanh(p["w"] @ x.T)).T, y)


@pattern({"w": draw(4, 4)}, draw(N, 4), draw(N), layers=1)
def quadratic_form(p, x, y):
    form = jnp.einsum("ni,ij,nj->n", x, p["w"], x)
    return jnp.mean(losses.squared_error(form, y))


@pattern({"w": draw(4, 3), "steps": jnp.array(3), "flag": jnp.array(True)}, draw(N, 4), labels())
def integer_parameters(p, x, y):
    return classify(jnp.where(p["flag"], 1.0, 2.0) * (x @ p["w"]) * p["steps"], y)


@pattern({"w": draw(2, 3, 3, 2, 4), "v": draw(4, 3)}, draw(N, 5, 5, 2), labels(), layers=2)
def ensemble_of_convolutions(p, x, y):
    h = jax.vmap(lambda w: _conv(x, w, _2D))(p["w"])
    return classify(jnp.sum(jnp.tanh(h), axis=(0, 2, 3)) @ p["v"], y)


@pattern(
    {"w": draw(2, 4, 6), "b": draw(2, 6), "v": draw(2, 6, 3)},
    draw(N, 4),
    labels(),
    layers=2,
    # The loss of every member weighs a half.
    scale=2**0.5,
)
def ensemble_of_losses(p, x, y):
    def loss(p):
        return classify(jnp.tanh(x @ p["w"] + p["b"]) @ p["v"], y)

    return jnp.mean(jax.vmap(loss)(p))


@pattern({"w": draw(4, 6), "v": draw(6, 3)}, draw(N, 4), labels(), uncovered=("w",), layers=1)
def stopped_kernel(p, x, y):
    return classify(jnp.tanh(x @ jax.lax.stop_gradient(p["w"])) @ p["v"], y)


@pattern({"w": draw(4, 3)}, draw(N, 4), labels(), layers=1)
def kernel_and_its_stopped_copy(p, x, y):
    return classify(x @ p["w"] - 0.5 * (x @ jax.lax.stop_gradient(p["w"])), y)


@pattern({"w": draw(4, 5), "v": draw(5)}, draw(N, 4), draw(N, 4), uncovered=("v", "w"), scale=1)
def gradient_of_an_energy(p, x, y):
    def energy(x):
        return jnp.tanh(x @ p["w"]) @ p["v"]

    return regress(jax.vmap(jax.grad(energy))(x), y)


def largest_singular_value(w):
    u = jnp.ones(4) / 2
    for _ in range(2):
        v = w.T @ u
        v /= jnp.linalg.norm(v)
        u = w @ v
        u /= jnp.linalg.norm(u)
    return jax.lax.stop_gradient(u) @ w @ jax.lax.stop_gradient(v)


# Each of these is a function of the parameter that is no layout of it, times a number.
def _declared(name, params, kernel, d_in=4):
    def loss_fn(p, x, y):
        return classify(x @ kernel(p), y)

    loss_fn.__name__ = name
    pattern(params, draw(N, d_in), labels(), uncovered=tuple(params), layers=0)(loss_fn)


_W, _PAIR = {"w": draw(4, 3)}, {"w": draw(4, 3), "v": draw(4, 3, seed=1)}
_UPPER = jnp.triu(jnp.ones((4, 3)))
_declared("kernel_times_zero", _W, lambda p: 0 * p["w"])
_declared(
    "normalized_weights",
    _W | {"g": draw(3)},
    lambda p: p["g"] * p["w"] / jnp.linalg.norm(p["w"], axis=0),
)
_declared("spectral_norm", _W, lambda p: p["w"] / largest_singular_value(p["w"]))
_declared("doubled_kernel", _W, lambda p: p["w"] + p["w"])
_declared("pruned_kernel", _W, lambda p: p["w"] * _UPPER)
_declared("masked_kernel", _W, lambda p: jnp.where(_UPPER > 0, p["w"], 0))
_declared("flipped_kernel", _W, lambda p: p["w"][::-1])
_declared("sum_of_kernels", _PAIR, lambda p: p["w"] + p["v"])
_declared("outer_product", {"u": draw(4), "v": draw(3)}, lambda p: jnp.outer(p["u"], p["v"]))
_declared(
    "chosen_kernel",
    {"w": draw(2, 4, 3)},
    lambda p: jax.lax.dynamic_index_in_dim(p["w"], jnp.array(1), keepdims=False),
)
_declared("symmetric_kernel", {"w": draw(3, 3)}, lambda p: p["w"] + p["w"].T, d_in=3)
_declared(
    "kernel_from_a_loop",
    _W,
    lambda p: jax.lax.while_loop(lambda w: w[0, 0] > 1e3, jnp.sin, p["w"]),
)
_declared("both_orientations", {"w": draw(4, 4)}, lambda p: p["w"] @ p["w"].T)


@pattern(
    {"w": draw(4, 3) + 1j * draw(4, 3, seed=2), "v": draw(3, 3)},
    draw(N, 4),
    labels(),
    uncovered=("w",),
    layers=1,
)
def complex_kernel(p, x, y):
    return classify(jnp.abs(x.astype(jnp.complex64) @ p["w"]) @ p["v"], y)


# A batch of one: what all examples share is shared all the same.
@pattern(RNN, draw(1, 6, 4), labels()[:1], layers=4, scale=1)
def batch_of_one(p, x, y):
    return recurrent(p, x, y)


# ------------------------------------------------------------ losses that are differentiated inside


def net(p, x):
    return jax.nn.softplus(jnp.tanh(x @ p["w"]) @ p["v"])


NET = {"w": draw(4, 6), "v": draw(6, 3, seed=1)}


def gradient_at(p, x, y):
    loss = lambda x: jnp.sum(losses.squared_error(net(p, x), y))  # noqa: E731
    return jax.value_and_grad(loss)(x)


def likelihood_of_net(p, x, y):
    return regress(net(p, x), y)


@pattern(NET, draw(N, 4), draw(N, 3), layers=2, data_loss=likelihood_of_net, scale=1.0)
def penalised_gradient_of_the_loss(p, x, y):
    values, slopes = jax.vmap(lambda x, y: gradient_at(p, x, y))(x, y)
    return jnp.mean(values) + 0.1 * jnp.mean(jnp.sum(slopes**2, -1))


@pattern(NET, draw(N, 4), draw(N, 3), layers=2, scale=1.0)
def adversarial_input(p, x, y):
    _, slope = gradient_at(p, x, y)
    return regress(net(p, x + 0.1 * jax.lax.stop_gradient(jnp.sign(slope))), y)


@pattern(NET, draw(N, 4), draw(N, 3), layers=2, scale=1.0)
def twice_differentiated_loss(p, x, y):
    curvature = jax.hessian(lambda x: gradient_at(p, x, y)[0])(x)
    step = jax.lax.stop_gradient(jnp.einsum("nini->ni", curvature))
    return regress(net(p, x - 0.1 * step), y)


@pattern(NET, draw(N, 4), labels(), layers=2)
def reduction_of_its_own(p, x, y):
    largest = jax.lax.reduce(x, 0.0, lambda a, b: jnp.maximum(jnp.abs(a), jnp.abs(b)), (1,))
    return classify(net(p, x / (1 + largest[:, None])), y)


# --------------------------------------------------------------------- examples and their positions


@pattern(NET, draw(N, 2, 4), labels(3, 2), layers=2)
def flattened_tokens(p, x, y):
    return classify(net(p, x).reshape(-1, 3), y.reshape(-1))


@pattern(NET, draw(N, 2, 4), draw(N, 2, 3), layers=2, scale=1.0)
def everything_flattened(p, x, y):
    return 6 * jnp.mean(losses.squared_error(net(p, x).ravel(), y.ravel()))


@pattern(NET, draw(2, N, 4), labels(3, 2).T, layers=2, axis=1)
def flattened_tokens_time_major(p, x, y):
    hidden = jnp.tanh(x @ p["w"])
    hidden = hidden + jnp.cumsum(hidden, axis=0)  # the steps are not apart
    return classify((hidden @ p["v"]).reshape(-1, 3), y.reshape(-1))


@pattern(
    {"w": draw(4, 6), "u": draw(6, 6), "v": draw(6, 3), "q": draw(6, 1)},
    draw(3, N, 4),
    labels(3, 3).T,
    draw(3, N),
    layers=4,
    axis=1,
    has_examples=False,
)
def two_heads_time_major(p, x, y, z):
    def step(h, x):
        h = jnp.tanh(x @ p["w"] + h @ p["u"])
        return h, (h @ p["v"], (h @ p["q"])[..., 0])

    _, (logits, values) = jax.lax.scan(step, jnp.zeros((N, 6)), x)
    return classify(logits, y) + jnp.mean(losses.squared_error(values, z))


LAST = jnp.array([5, 2, 0, 3, 4])


def _last_states(p, x, select):
    def step(h, x):
        h = jnp.tanh(x @ p["w"] + h @ p["u"] + p["b"])
        return h, h

    _, h = jax.lax.scan(step, jnp.zeros((x.shape[0], 5)), x.swapaxes(0, 1))
    return select(h.swapaxes(0, 1)) @ p["out"]


def _last(name, select):
    def loss_fn(p, x, last, y):
        return classify(_last_states(p, x, lambda h: select(h, last)), y)

    loss_fn.__name__ = name
    pattern(RNN, draw(N, 6, 4), LAST, labels(), layers=4)(loss_fn)


_last("last_by_two_indices", lambda h, last: h[jnp.arange(len(h)), last])
_last("last_by_negative_indices", lambda h, last: h[jnp.arange(len(h)), last - 6])
_last("last_by_two_indices_time_major", lambda h, last: h.swapaxes(0, 1)[last, jnp.arange(len(h))])
_last("last_along_an_axis", lambda h, last: jnp.take_along_axis(h, last[:, None, None], 1)[:, 0])
_last("last_under_vmap", lambda h, last: jax.vmap(lambda h, i: h[i])(h, last))
_last("last_by_a_slice", lambda h, last: jax.vmap(jax.lax.dynamic_index_in_dim)(h, last)[:, 0])
_last(
    "last_by_one_hot",
    lambda h, last: jnp.einsum("nt,ntd->nd", jax.nn.one_hot(last, 6), h),
)


@pattern(NET, draw(N, 6, 4), LAST, labels(), layers=2)
def last_in_a_flat_batch(p, x, last, y):
    logits = net(p, x).reshape(-1, 3)
    return classify(logits[jnp.arange(len(y)) * 6 + last], y)


# ---------------------------------------------------------------------------------- blocked einsums

BLOCKED = {"w": draw(2, 4, 3, 5, 6), "b": draw(2, 3, 5, 6), "v": draw(90, 3)}


# Blocks b and j, positions i, k inputs, m and n outputs.
@pattern(BLOCKED, draw(N, 2, 7, 5, 4), labels(), layers=2)
def blocked_einsum(p, x, y):
    h = jnp.einsum("zbijk,bkmjn->zbijmn", x, p["w"]) + p["b"].swapaxes(1, 2)[:, None]
    return classify(jnp.tanh(h).sum((1, 2)).reshape(len(y), -1) @ p["v"], y)


@pattern(BLOCKED, draw(N, 2, 7, 5, 4), labels(), layers=2)
def blocked_einsum_under_vmap(p, x, y):
    def one(x):
        h = jnp.einsum("bijk,bkmjn->bijmn", x, p["w"]) + p["b"].swapaxes(1, 2)[:, None]
        return jnp.tanh(h).sum((0, 1)).ravel() @ p["v"]

    return classify(jax.vmap(one)(x), y)


@pattern({"w": draw(4, 2, 3, 2), "v": draw(6, 3)}, draw(N, 2, 3, 2), labels(), layers=2)
def einsum_with_blocks_behind(p, x, y):
    h = jnp.tanh(jnp.einsum("zjki,mjki->zmkj", x, p["w"])).sum(1)
    return classify(h.reshape(len(y), -1) @ p["v"], y)


# A kernel of each example: its elements are not shared.
@pattern(
    {"w": draw(N, 4, 3, 5, 6), "v": draw(90, 3)},
    draw(N, 7, 5, 4),
    labels(),
    uncovered=("w",),
    layers=1,
    has_examples=False,
)
def blocks_that_are_examples(p, x, y):
    h = jnp.einsum("bijk,bkmjn->bijmn", x, p["w"])
    return classify(jnp.tanh(h).sum(1).reshape(len(y), -1) @ p["v"], y)


# ------------------------------------------------------------------------ inputs without batch axis

ATOMS = draw(6, 2)
GEOMETRY = {"w": draw(4, 4), "b": draw(4), "g": draw(2, 4), "v": draw(4, 3)}


# What meets the examples linearly is perturbed there.
@pattern(GEOMETRY, draw(N, 4), labels(), layers=3)
def features_of_one_atom(p, x, y):
    return classify(jnp.tanh(x @ p["w"] + p["b"] - ATOMS[0] @ p["g"]) @ p["v"], y)


# What all examples share before is no function of one of them.
@pattern(GEOMETRY, draw(N, 4), labels(), uncovered=("g",), layers=2)
def features_of_a_molecule(p, x, y):
    molecule = jnp.tanh(ATOMS @ p["g"]).sum(0)
    return classify(jnp.tanh(x @ p["w"] + p["b"] + molecule) @ p["v"], y)


@pattern(GEOMETRY, draw(N, 4), labels(), uncovered=("g",), layers=2)
def envelopes_of_atoms(p, x, y):
    h = jnp.tanh(x @ p["w"] + p["b"])
    return classify(jnp.tanh(h @ jnp.tanh(ATOMS @ p["g"]).T) @ ATOMS @ p["v"][:2], y)


# ------------------------------------------------------------------------ lookups by a single index

TABLE = {"e": draw(7, 4), "v": draw(4, 3)}


@pattern(TABLE, labels(7), labels(), layers=2)
def lookup_by_a_scalar_under_vmap(p, t, y):
    return classify(jnp.tanh(jax.vmap(lambda i: p["e"][i])(t)) @ p["v"], y)


@pattern(TABLE, labels(7, 2), labels(3, 2), layers=2)
def lookup_by_a_scalar_under_two_vmaps(p, t, y):
    return classify(jnp.tanh(jax.vmap(jax.vmap(lambda i: p["e"][i]))(t)) @ p["v"], y)


@pattern(TABLE, labels(7), labels(), layers=2)
def lookup_by_a_scalar_in_a_map(p, t, y):
    return classify(jax.lax.map(lambda i: jnp.tanh(p["e"][i]) @ p["v"], t), y)


@pattern(TABLE, labels(9) - 1, labels(), layers=2)
def lookup_that_clips(p, t, y):
    return classify(jnp.tanh(jnp.take(p["e"], t, axis=0, mode="clip")) @ p["v"], y)


@pattern({"e": draw(7, 4), "u": draw(4, 4), "v": draw(4, 3)}, labels(7, 3), labels(), layers=3)
def lookup_in_a_branch_of_a_scan(p, t, y):
    def step(h, tf):
        t, read = tf
        h = jax.lax.cond(read, lambda: h + p["e"][t], lambda: 0.9 * h)
        return jnp.tanh(h @ p["u"]), None

    h, _ = jax.lax.scan(step, jnp.zeros((N, 4)), (t.T, jnp.array([True, False, True])))
    return classify(h @ p["v"], y)


# --------------------------------------------------------------------------------- nothing to learn


@pattern({"z": jnp.zeros((0, 4, 4)), "v": draw(4, 3)}, draw(N, 4), labels(), uncovered=("z",))
def scan_over_no_layers(p, x, y):
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["z"])
    return classify(h @ p["v"], y)


@pattern({"z": jnp.zeros((4, 0)), "v": draw(4, 3)}, draw(N, 4), labels(), uncovered=("z",))
def reshape_of_nothing(p, x, y):
    empty = x @ p["z"].reshape(2, 2, 0).reshape(4, 0)
    return classify(x @ p["v"] + jnp.sum(empty, -1, keepdims=True), y)


@pattern({"w": draw(4, 6), "v": draw(6, 3)}, draw(N, 4), labels(), uncovered=("w",))
def complex_activations(p, x, y):
    hidden = jnp.fft.fft(x) @ p["w"]
    return classify(jnp.abs(hidden) @ p["v"], y)


@pattern(
    {"k": draw(2, 3, 3, 4, 4), "c": draw(2, 4), "v": draw(4, 3)},
    draw(N, 5, 5, 4),
    labels(),
    layers=2,
)
def scanned_convolutions(p, x, y):
    def layer(h, kb):
        k, b = kb
        h = jax.lax.conv_general_dilated(
            h, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.tanh(h + b), None

    h, _ = jax.lax.scan(layer, x, (p["k"], p["c"]))
    return classify(h.mean((1, 2)) @ p["v"], y)


SOME = jnp.arange(3) < jnp.array([3, 1, 2, 0, 1])[:, None]


@pattern(NET, draw(N, 3, 4), labels(3, 3), layers=2, has_examples=False)
def masked_losses(p, x, y):
    return jnp.sum(SOME * losses.softmax_cross_entropy_with_integer_labels(net(p, x), y))


@pattern(
    {"w": draw(4, 6), "u": draw(6, 6), "v": draw(6, 3)},
    draw(N, 3, 4),
    labels(3, 3),
    layers=3,
    has_examples=False,
)
def masked_steps(p, x, y):
    def step(h, xym):
        x, y, m = xym
        h = jnp.tanh(x @ p["w"] + h @ p["u"])
        return h, m * losses.softmax_cross_entropy_with_integer_labels(h @ p["v"], y)

    _, found = jax.lax.scan(step, jnp.zeros((N, 6)), (x.swapaxes(0, 1), y.T, SOME.T))
    return jnp.sum(found)
