"""AdamW and K-FAC side by side: a small character transformer that learns to write Python.

The text is the standard library of the Python that runs this, as its sources lie on disk; every
tenth file is held out. The transformer is plain Flax: its layers are scanned and rematerialised,
attention is `nn.MultiHeadDotProductAttention`, and nothing in it knows of K-FAC. The table of its
layers, printed first, shows that all matrices, embeddings and norms have Kronecker blocks, one for
each scanned layer. Rules of the comparison are those of digits.py; losses are means
over characters, in nats.

    python examples/characters.py --help
"""

import argparse
import sysconfig
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Contestant, Metric, Task, add_comparison, compare, draw, make_parser
from rich.console import Console

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


def load_text() -> tuple[np.ndarray, np.ndarray]:
    """Returns the text to train on and the text held out, as indices of characters."""
    codes = np.full(256, CHARACTERS.index("?"), np.int32)
    codes[[ord(character) for character in CHARACTERS]] = range(len(CHARACTERS))
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [codes[np.frombuffer(file.read_bytes(), np.uint8)] for file in files]
    train = [text for i, text in enumerate(texts) if i % 10]
    return np.concatenate(train), np.concatenate(texts[::10])


def draw_windows(text: np.ndarray, count: int, seed: int) -> jax.Array:
    """Returns random windows of a text, [count, CONTEXT + 1]."""
    starts = np.random.default_rng(seed).integers(0, len(text) - CONTEXT, count)
    return jnp.asarray(text[starts[:, None] + np.arange(CONTEXT + 1)])


def make_task(arguments: argparse.Namespace) -> Task:
    """Returns the task: random windows of the standard library."""
    steps, seed = arguments.steps, arguments.seed
    text, held_out = load_text()
    windows = draw_windows(text, steps * BATCH, seed).reshape(steps, BATCH, -1)
    seen, unseen = draw_windows(text, EVALUATED, seed + 1), draw_windows(held_out, EVALUATED, seed)
    print(f"{len(text):,} characters to train on, {len(held_out):,} held out")
    return Task(
        title="Characters of the Python standard library: a small transformer",
        init=lambda: Transformer().init(jax.random.key(seed), windows[0, :, :-1]),
        loss_fn=loss_fn,
        batch=lambda i: (windows[i],),
        evaluate=lambda params: (loss_fn(params, seen), loss_fn(params, unseen)),
        metrics=(
            Metric("training loss", "final\nloss", "{:.3f}", limits=(1.9, 3.3)),
            Metric("held-out loss", "held-out\nloss", "{:.3f}", limits=(1.9, 3.3)),
        ),
        target=("2.5", lambda values: values[0] <= 2.5),
        steps=steps,
        seed=seed,
    )


def kfac(task: Task, console: Console) -> Contestant:
    """Returns K-FAC for the layers of the loss, which are printed."""
    layers = ok.find_layers(task.loss_fn, task.init(), *task.batch(0))
    console.print(str(layers), highlight=False, soft_wrap=True)

    def make(schedule):
        # Without the constraint, steps would have to be shorter all along to survive the first.
        return ok.kfac(schedule, layers=layers, damping=1e-2, norm_constraint=1e-3)

    return Contestant("kfac", make, (3e-2, 1e-1, 3e-1), "#2e8b57", layers)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = make_parser(__doc__, steps=300, seed_of="weights, windows and sampled labels")
    add_comparison(parser, ("adamw", "kfac"), out="characters.png")
    return parser.parse_args()


def main() -> None:
    """Trains, prints the table and writes the picture."""
    arguments = parse_arguments()
    console = Console()
    task = make_task(arguments)
    contestants = {
        "adamw": lambda: Contestant("adamw", optax.adamw, (1e-3, 3e-3, 1e-2), "#d1701c"),
        "kfac": lambda: kfac(task, console),
    }
    runs = compare(task, contestants, arguments.optimizer, console)
    draw(runs, arguments.out, scale="linear")
    console.print(f"Curves: {arguments.out}")


if __name__ == "__main__":
    main()
