"""Text, tokenizer and transformer of examples/gpt.py.

The text is the standard library of the Python that runs this, as its sources lie on disk; every
tenth file is held out. The tokenizer is a byte-level BPE that is trained on the others.
"""

import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import optax_kron as ok

WIDTH, BLOCKS, HEADS, CONTEXT, BATCH = 64, 2, 4, 64, 16
VOCABULARY = 8192
EVALUATED = 32  # windows of each kind that the losses are taken on


class Block(nnx.Module):
    """Causal attention, then two dense layers, each after a norm and beside a shortcut."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        """Maps [batch, position, width] to the same."""
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
    """Predicts each token from those before it, with one table for both ends."""

    def __init__(self, rngs: nnx.Rngs):
        small = nnx.initializers.normal(0.02)
        self.tokens = nnx.Embed(VOCABULARY, WIDTH, embedding_init=small, rngs=rngs)
        self.positions = nnx.Embed(CONTEXT, WIDTH, embedding_init=small, rngs=rngs)
        self.blocks = nnx.Sequential(*(Block(rngs) for _ in range(BLOCKS)))
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, text):
        """Maps tokens [batch, position] to logits [batch, position, vocabulary]."""
        x = self.tokens(text) + self.positions(jnp.arange(text.shape[1]))
        return self.tokens.attend(self.norm(self.blocks(x)))


def make_loss(graph):
    """Returns the loss: the mean cross-entropy of all tokens but the first of each window."""

    def loss_fn(params, windows):
        logits = nnx.merge(graph, params)(windows[:, :-1])
        return ok.losses.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    return loss_fn


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Returns a byte-level BPE of `VOCABULARY` entries, so that no text is unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_windows(steps: int, seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns random windows of the text: to train on, others of the same files, and held-out ones.

    They are tokens, [steps, BATCH, CONTEXT + 1] and twice [EVALUATED, CONTEXT + 1].
    """
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    parts = [text for i, text in enumerate(texts) if i % 10], texts[::10]
    tokenizer = train_tokenizer(parts[0])
    train, held_out = (
        np.concatenate([np.array(text.ids, np.int32) for text in tokenizer.encode_batch(part)])
        for part in parts
    )
    length = sum(map(len, texts)) / (len(train) + len(held_out))
    print(f"{tokenizer.get_vocab_size():,} entries, of {length:.1f} characters in the mean")
    print(f"{len(train):,} tokens to train on, {len(held_out):,} held out")

    def draw(text, number, seed):
        starts = np.random.default_rng(seed).integers(0, len(text) - CONTEXT, number)
        return jnp.asarray(text[starts[:, None] + np.arange(CONTEXT + 1)])

    windows = draw(train, steps * BATCH, seed).reshape(steps, BATCH, -1)
    return windows, draw(train, EVALUATED, seed + 1), draw(held_out, EVALUATED, seed)
