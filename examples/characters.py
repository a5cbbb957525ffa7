"""K-FAC on a small character transformer that learns to write Python.

The text is the standard library of the Python that runs this, as its sources lie on disk; every
tenth file is held out. The transformer is plain Flax: its layers are scanned and rematerialised,
attention is `nn.MultiHeadDotProductAttention`, and nothing in it knows of K-FAC. The table of its
layers, printed first, shows that all matrices, embeddings and norms have Kronecker blocks, one for
each scanned layer. Losses are means over characters, in nats; compare.py has others beside it.

    python examples/characters.py --help
"""

import sysconfig
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import make_parser, save_curves

import optax_kron as ok

WIDTH, LAYERS, HEADS, CONTEXT, BATCH = 64, 2, 4, 64, 16
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # any other is read as a question mark
EVALUATED = 96  # windows of each kind that the losses are taken on


class Block(nn.Module):
    """Causal attention, then two dense layers, each after a norm and beside a shortcut."""

    @nn.compact
    def __call__(self, x, mask):
        """Maps [batch, position, width] to the same, and nothing for the scan to stack."""
        x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH)(hidden), None


class Transformer(nn.Module):
    """Predicts each character from those before it."""

    @nn.compact
    def __call__(self, text):
        """Maps characters [batch, position] to logits [batch, position, character]."""
        x = nn.Embed(len(CHARACTERS), WIDTH, name="characters")(text)
        x = x + nn.Embed(CONTEXT, WIDTH, name="positions")(jnp.arange(text.shape[1]))
        layers = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=LAYERS,
        )
        x, _ = layers(name="layers")(x, nn.make_causal_mask(text))
        return nn.Dense(len(CHARACTERS), name="readout")(nn.LayerNorm(name="norm")(x))


def loss_fn(params, windows):
    """Returns the mean cross-entropy of all characters but the first of each window."""
    logits = Transformer().apply(params, windows[:, :-1])
    return ok.losses.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def load_windows(steps: int, seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns random windows of the text: to train on, others of the same text, and held-out ones.

    They are indices of characters, [steps, BATCH, CONTEXT + 1] and twice [EVALUATED, CONTEXT + 1].
    """
    codes = np.full(256, CHARACTERS.index("?"), np.int32)
    codes[[ord(character) for character in CHARACTERS]] = range(len(CHARACTERS))
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [codes[np.frombuffer(file.read_bytes(), np.uint8)] for file in files]
    train = np.concatenate([text for i, text in enumerate(texts) if i % 10])
    held_out = np.concatenate(texts[::10])
    print(f"{len(train):,} characters to train on, {len(held_out):,} held out")

    def draw(text, number, seed):
        starts = np.random.default_rng(seed).integers(0, len(text) - CONTEXT, number)
        return jnp.asarray(text[starts[:, None] + np.arange(CONTEXT + 1)])

    windows = draw(train, steps * BATCH, seed).reshape(steps, BATCH, -1)
    return windows, draw(train, EVALUATED, seed + 1), draw(held_out, EVALUATED, seed)


def main() -> None:
    """Prints the layers, trains and draws the losses."""
    parser = make_parser(__doc__, steps=300, out="characters.png")
    arguments = parser.parse_args()
    steps, key = arguments.steps, jax.random.key(arguments.seed)
    windows, seen, held_out = load_windows(steps, arguments.seed)
    params = jax.jit(Transformer().init)(key, windows[0, :, :-1])

    layers = ok.find_layers(loss_fn, params, windows[0])
    print(layers)
    # Without the constraint, steps would have to be shorter all along to survive the first.
    schedule = optax.cosine_decay_schedule(3e-1, steps)
    optimizer = ok.kfac(schedule, layers=layers, damping=1e-2, norm_constraint=1e-3)
    state = jax.jit(optimizer.init)(params)
    with_taps = ok.value_and_grad_with_taps(loss_fn, layers)

    @jax.jit
    def step(params, state, windows, key):
        _, grads, taps = with_taps(params, windows, key=key)
        updates, state = optimizer.update(grads, state, params, taps=taps)
        return optax.apply_updates(params, updates), state

    evaluate, curves = jax.jit(loss_fn), {"training": [], "held-out": []}
    for i in range(steps):
        params, state = step(params, state, windows[i], jax.random.fold_in(key, i))
        if (i + 1) % 20 == 0 or i + 1 == steps:
            losses = float(evaluate(params, seen)), float(evaluate(params, held_out))
            print(f"step {i + 1:4}  training loss {losses[0]:.3f}  held-out loss {losses[1]:.3f}")
            for curve, loss in zip(curves.values(), losses, strict=True):
                curve.append((i + 1, loss))
    save_curves(arguments.out, "Characters of Python's library: K-FAC", curves, scale="linear")


if __name__ == "__main__":
    main()
