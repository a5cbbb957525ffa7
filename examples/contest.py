"""An open contest in small: which optimizer takes a GPT on bytes to a loss in the fewest steps?

The contestants are those of modded-nanogpt's third track, which counts steps: Adam, Shampoo, Muon,
PSGD-Kron, SOAP and KL-SOAP, with fixed norms or orthogonal updates. All start from the same weights
and see the same windows; the loss to reach is that at which AdamW ends. Settings make the GPT as
large as the device allows; rates are those for a small one. Losses are means over bytes, in nats.

    python examples/contest.py --help
"""

import argparse
import time

import jax
import numpy as np
import optax
from byte_gpt import init, load_windows, loss_fn
from common import add_optimizer, make_parser, positive_integer, save_curves
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import optax_kron as ok

EVERY = 10  # steps that a point of the curves is the mean of


def hidden(params):
    """Tells the matrices within blocks from the rest."""

    def is_hidden(path, leaf):
        return leaf.ndim == 2 and jax.tree_util.keystr(path).startswith("['block")

    return jax.tree_util.tree_map_with_path(is_hidden, params)


def contestants(rate):
    """Returns the optimizers by name; peak rates are the best of three or four."""
    soap, kl = {"refresh_every": 1}, {"refresh_every": 1, "variant": "kl_soap"}
    orthogonal = optax.masked(ok.orthogonalize(scale="consistent_rms"), hidden)
    down = optax.scale_by_learning_rate
    return {
        "adamw": lambda: optax.adamw(rate(1e-2), b2=0.95, weight_decay=0.0),
        "shampoo": lambda: ok.shampoo(rate(1e-2)),
        "muon": lambda: optax.contrib.muon(rate(3e-2), weight_decay=0.0, adam_b2=0.95),
        "kron_psgd": lambda: ok.kron_psgd(rate(1e-2)),
        "kron_psgd, fixed norms": lambda: ok.fixed_norm(ok.kron_psgd(), rate(1e-2)),
        "soap": lambda: ok.soap(rate(3e-2), **soap),
        "kl_soap": lambda: ok.soap(rate(1e-2), **kl),
        "kl_soap, fixed norms": lambda: ok.fixed_norm(ok.scale_by_soap(**kl), rate(3e-2)),
        "soap, orthogonal": lambda: optax.chain(
            ok.scale_by_soap(**soap), orthogonal, down(rate(3e-2))
        ),
    }


def train(optimizer, params, windows, name):
    """Returns the mean loss of every ten steps and the seconds of a step, and of compiling."""

    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, start = jax.jit(optimizer.init)(params), time.perf_counter()
    step = jax.jit(step).lower(params, state, windows[0]).compile()
    compiling, losses, start = time.perf_counter() - start, [], time.perf_counter()
    for batch in track(windows, f"{name:24}"):
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    seconds = (time.perf_counter() - start) / len(losses)
    means = [float(np.mean(losses[i : i + EVERY])) for i in range(0, len(losses), EVERY)]
    return means, 1e3 * seconds, compiling


def main() -> None:
    """Trains with each contestant, prints the order and draws the losses."""
    parser = make_parser(__doc__, steps=100, out="contest.png")
    for option, size in (("--layers", 2), ("--width", 64), ("--context", 64), ("--batch", 16)):
        parser.add_argument(option, type=positive_integer, default=size, help="of the GPT")
    parser.add_argument("--contest", action="store_true", help=argparse.SUPPRESS)  # of gpt.py
    add_optimizer(parser, contestants(lambda peak: peak))
    given = parser.parse_args()
    warmup = max(given.steps // 10, 1)
    makers = contestants(
        lambda peak: optax.warmup_cosine_decay_schedule(0.0, peak, warmup, given.steps, peak / 20)
    )
    windows = load_windows(given.steps, given.batch, given.context, given.seed)
    params = init(jax.random.key(given.seed), given.layers, given.width, given.context)
    print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters")
    chosen = makers if given.optimizer == "all" else ("adamw", given.optimizer)
    runs = {name: train(makers[name](), params, windows, name) for name in dict.fromkeys(chosen)}
    target = runs["adamw"][0][-1]
    table = Table(
        "", f"steps to {target:.3f}", "last loss", "ms a step", "compile, s", box=box.SIMPLE
    )
    steps = {k: next((i for i, x in enumerate(r[0]) if x <= target), None) for k, r in runs.items()}
    for name in sorted(
        runs, key=lambda name: (steps[name] is None, steps[name], runs[name][0][-1])
    ):
        losses, *times = runs[name]
        reached = "never" if steps[name] is None else str(EVERY * (1 + steps[name]))
        table.add_row(name, reached, f"{losses[-1]:.3f}", *(f"{x:.4g}" for x in times))
    Console().print(table)
    curves = {k: [(EVERY * (i + 1), x) for i, x in enumerate(r[0])] for k, r in runs.items()}
    save_curves(given.out, "A small GPT on the bytes of Python's library", curves, "linear")


if __name__ == "__main__":
    main()
