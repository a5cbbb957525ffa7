"""A GPT on the bytes of Python's library, in plain JAX, for contest.py.

The text is the standard library of the Python that runs this, as its sources lie on disk: those
bytes that are ASCII. Positions and head have tables of their own.
"""

import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import optax_kron as ok

BYTES, HEAD_SIZE = 128, 32


def init(key, layers, width, context):
    """Returns the parameters; what a layer adds to the stream is small at first."""
    shapes = {"qkv": (width, 3 * width), "out": (width, width)}
    shapes |= {"up": (width, 4 * width), "down": (4 * width, width)}
    keys, small = iter(jax.random.split(key, 4 * layers + 3)), (2 * layers) ** -0.5

    def kernel(inputs, outputs, scale=1.0):
        return scale * inputs**-0.5 * jax.random.normal(next(keys), (inputs, outputs))

    params = {"bytes": kernel(BYTES, width), "positions": 0.1 * kernel(context, width)}
    params |= {"head": kernel(width, BYTES), "norm": jnp.ones(width)}
    for i in range(layers):
        block = {k: kernel(*x, small if k in ("out", "down") else 1.0) for k, x in shapes.items()}
        params[f"block{i}"] = block | {"norm1": jnp.ones(width), "norm2": jnp.ones(width)}
    return params


def rms_norm(x, scale):
    """Returns x [..., width] at a root mean square of one, times a scale [width]."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def attention(x: jax.Array, params, heads: int, mask: jax.Array | None) -> jax.Array:
    """Returns what each position [batch, T, d] takes from those that the mask lets it see."""
    batch, length, width = x.shape
    qkv = (x @ params["qkv"]).reshape(batch, length, 3, heads, width // heads)
    scores = jnp.einsum("bthd,bshd->bhts", qkv[:, :, 0], qkv[:, :, 1]) * (width // heads) ** -0.5
    weights = jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, -1e9))
    mixed = jnp.einsum("bhts,bshd->bthd", weights, qkv[:, :, 2])
    return mixed.reshape(batch, length, width) @ params["out"]


def loss_fn(params, windows):
    """Returns the mean cross-entropy of all bytes but the first of each window."""
    text = windows[:, :-1]
    mask = jnp.tril(jnp.ones((text.shape[1], text.shape[1]), bool))
    x = params["bytes"][text] + params["positions"]
    for name in sorted(name for name in params if name.startswith("block")):
        block = params[name]
        x = x + attention(rms_norm(x, block["norm1"]), block, x.shape[-1] // HEAD_SIZE, mask)
        x = x + jax.nn.gelu(rms_norm(x, block["norm2"]) @ block["up"]) @ block["down"]
    logits = rms_norm(x, params["norm"]) @ params["head"]
    return ok.losses.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def load_windows(steps, batch, context, seed):
    """Returns windows of the standard library's sources, [steps, batch, context + 1] of ASCII."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = np.frombuffer(b"\n".join(file.read_bytes() for file in files), np.uint8)
    text = text[text < BYTES].astype(np.int32)
    starts = np.random.default_rng(seed).integers(0, len(text) - context, (steps, batch))
    return jnp.asarray(text[starts[..., None] + np.arange(context + 1)])
