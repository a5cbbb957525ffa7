"""GPT-2 in plain JAX, for `gpu.py`: float32 parameters, bfloat16 arithmetic, tied embedding.

Every layer has its own leaves, as in a model that is not scanned, so that optimizers need no other
settings than their defaults. The loss stacks and scans them, which compiles in a fraction of the
time. For K-FAC, which follows parameters to the products that consume them, the leaves are stacked
from the start.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import optax_kron as ok


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a model of this kind is made of, and how many windows of text are a batch."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    context: int
    batch: int


# 50257 words, padded to a multiple of 128 as is usual on GPUs: 124 M parameters.
GPT2_SMALL = Shapes(layers=12, width=768, heads=12, vocabulary=50304, context=1024, batch=32)
TINY = Shapes(layers=2, width=16, heads=2, vocabulary=67, context=8, batch=2)


def init(shapes, seed):
    """The parameters, NumPy arrays: kernels are normal, of standard deviation 0.02."""
    d, rng = shapes.width, np.random.default_rng(seed)
    kernels = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}

    def normal(*shape):
        return 0.02 * rng.standard_normal(shape, np.float32)

    def zeros(size):
        return np.zeros(size, np.float32)

    def norm():
        return {"scale": 1 + zeros(d), "bias": zeros(d)}

    def layer():
        dense = {k: {"kernel": normal(*s), "bias": zeros(s[1])} for k, s in kernels.items()}
        return {**dense, "norm_1": norm(), "norm_2": norm()}

    return {
        "words": normal(shapes.vocabulary, d),
        "positions": normal(shapes.context, d),
        "layers": [layer() for _ in range(shapes.layers)],
        "norm": norm(),
    }


def stacked(params, stack=np.stack):
    """The parameters with those of all layers stacked, [layers, ...]."""
    return {**params, "layers": jax.tree.map(lambda *leaves: stack(leaves), *params["layers"])}


def draw_tokens(shapes, seed):
    """A batch of random text, int32 [batch, context + 1]."""
    size = (shapes.batch, shapes.context + 1)
    return np.random.default_rng(seed).integers(0, shapes.vocabulary, size, np.int32)


def _normalize(norm, x):
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    unit = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
    return (unit * norm["scale"] + norm["bias"]).astype(x.dtype)


def _dense(layer, x):
    return x @ layer["kernel"].astype(x.dtype) + layer["bias"].astype(x.dtype)


def _attend(qkv, heads, implementation):
    """Causal attention, [batch, position, 3·width] to [batch, position, width]."""
    batch, length, wide = qkv.shape
    q, k, v = (
        x.reshape(batch, length, heads, wide // 3 // heads) for x in jnp.split(qkv, 3, axis=-1)
    )
    x = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
    return x.reshape(batch, length, wide // 3)


def _layer(layer, x, heads, implementation):
    attend = functools.partial(_attend, heads=heads, implementation=implementation)
    if implementation == "xla":
        # Its weights, [batch, head, position, position], are not kept for the backward pass.
        attend = jax.checkpoint(attend)
    x = x + _dense(layer["out"], attend(_dense(layer["qkv"], _normalize(layer["norm_1"], x))))
    hidden = jax.nn.gelu(_dense(layer["up"], _normalize(layer["norm_2"], x)))
    return x + _dense(layer["down"], hidden)


def make_loss(shapes, implementation):
    """The loss of `(params, tokens)`: the mean cross entropy of the words but the first, float32.

    Args:
        shapes: of the model.
        implementation: of attention, "cudnn" or "xla".
    """
    apply = functools.partial(_layer, heads=shapes.heads, implementation=implementation)

    def loss_fn(params, tokens):
        x = params["words"][tokens[:, :-1]] + params["positions"][jnp.arange(shapes.context)]
        x = x.astype(jnp.bfloat16)
        layers = params["layers"]
        layers = stacked(params, jnp.stack)["layers"] if isinstance(layers, list) else layers
        x, _ = jax.lax.scan(lambda x, layer: (apply(layer, x), None), x, layers)
        x = _normalize(params["norm"], x)
        logits = (x @ params["words"].T.astype(x.dtype)).astype(jnp.float32)
        return ok.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return loss_fn
