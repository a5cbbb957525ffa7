"""An open contest in small: which optimizer takes a GPT on bytes to a loss in the fewest steps?

The contestants are those of modded-nanogpt's third track, which counts steps: Adam, Shampoo, Muon,
PSGD-Kron, SOAP and KL-SOAP, with fixed norms or orthogonal updates. All start from the same weights
and see the same windows; the loss to reach is that at which AdamW ends. Settings make the GPT as
large as the device allows; rates are those for a small one, times the best of some factors. Losses
are means over bytes, in nats.

    python examples/contest.py --help
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import jax
import optax
from byte_gpt import init, load_windows
from common import COLOURS, add_optimizer, draw_curves, make_parser, positive_integer, save
from contest_training import EVERY, compile_step, train
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import optax_kron as ok


def hidden(params):
    """Tells the matrices within blocks from the rest."""

    def is_hidden(path, leaf):
        return leaf.ndim == 2 and jax.tree_util.keystr(path).startswith("['block")

    return jax.tree_util.tree_map_with_path(is_hidden, params)


SOAP, KL = {"refresh_every": 1}, {"refresh_every": 1, "variant": "kl_soap"}
# Of a function from a peak to a schedule; peaks are the best of three or four for a small GPT.
CONTESTANTS = {
    "adamw": lambda rate: optax.adamw(rate(1e-2), b2=0.95, weight_decay=0.0),
    "shampoo": lambda rate: ok.shampoo(rate(1e-2)),
    "muon": lambda rate: optax.contrib.muon(rate(3e-2), weight_decay=0.0, adam_b2=0.95),
    "kron_psgd": lambda rate: ok.kron_psgd(rate(1e-2)),
    "kron_psgd, fixed norms": lambda rate: ok.fixed_norm(ok.kron_psgd(), rate(1e-2)),
    "soap": lambda rate: ok.soap(rate(3e-2), **SOAP),
    "kl_soap": lambda rate: ok.soap(rate(1e-2), **KL),
    "kl_soap, fixed norms": lambda rate: ok.fixed_norm(ok.scale_by_soap(**KL), rate(3e-2)),
    "soap, orthogonal": lambda rate: optax.chain(
        ok.scale_by_soap(**SOAP),
        optax.masked(ok.orthogonalize(scale="consistent_rms"), hidden),
        optax.scale_by_learning_rate(rate(3e-2)),
    ),
}


def show(runs):
    """Prints the contestants at their best rates, fewest steps first, and returns the curves."""
    best = {k: min(found, key=lambda run: min(1e9, run[0][-1])) for k, found in runs.items()}
    target = best["adamw"][0][-1]
    headings = "last loss", "ms a step", "compile, s", "factor"
    table = Table("", f"steps to {target:.3f}", *headings, box=box.SIMPLE)
    steps = {k: next((i for i, x in enumerate(r[0]) if x <= target), None) for k, r in best.items()}
    for name in sorted(best, key=lambda k: (steps[k] is None, steps[k], best[k][0][-1])):
        losses, *others = best[name]
        reached = "never" if steps[name] is None else str(EVERY * (1 + steps[name]))
        table.add_row(name, reached, f"{losses[-1]:.3f}", *(f"{x:.4g}" for x in others))
    Console().print(table)
    return {k: [(EVERY * (i + 1), x) for i, x in enumerate(r[0])] for k, r in best.items()}


def draw(curves, path):
    """Writes a picture of the losses; variants are dashed, in the colour of their optimizer."""
    figure = Figure((7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots(subplot_kw={"title": "A small GPT on the bytes of Python's library"})
    draw_curves(axes, curves)
    for line in axes.lines:
        kind, comma, _ = line.get_label().partition(",")
        line.set(color=COLOURS.get(kind, "#0aa"), linestyle="--" if comma else "-")
    axes.legend(frameon=False)
    save(figure, path)


def main() -> None:
    """Trains with each contestant, prints the order and draws the losses."""
    parser = make_parser(__doc__, steps=100, out="contest.png")
    for option, size in (("--layers", 2), ("--width", 64), ("--context", 64), ("--batch", 16)):
        parser.add_argument(option, type=positive_integer, default=size, help="of the GPT")
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0], help="of the rates")
    parser.add_argument("--threads", type=positive_integer, default=1, help="that compile")
    parser.add_argument("--contest", action="store_true", help=argparse.SUPPRESS)  # of gpt.py
    add_optimizer(parser, CONTESTANTS)
    given = parser.parse_args()
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, given.steps // 10 or 1, given.steps, 0.05)
    windows = load_windows(given.steps, given.batch, given.context, given.seed)
    params = init(jax.random.key(given.seed), given.layers, given.width, given.context)
    print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters")

    def rate(factor, peak):
        return lambda count: factor * peak * shape(count)

    def compiled(name):
        return compile_step(CONTESTANTS[name], rate, params, windows[0])

    runs, chosen = {}, ("adamw", given.optimizer)
    names = [name for name in CONTESTANTS if given.optimizer == "all" or name in chosen]
    with ThreadPoolExecutor(given.threads) as pool, Progress() as bars:
        programs = list(pool.map(compiled, names))  # before any step is timed
        bar = bars.add_task("", total=len(names) * len(given.factors))
        for name, (step, state, seconds) in zip(names, programs, strict=True):
            for factor in given.factors:
                losses, milliseconds = train(step, factor, params, state, windows)
                runs.setdefault(name, []).append((losses, milliseconds, seconds, factor))
                bars.print(f"{name}, rates times {factor:g}: ends at {losses[-1]:.3f}")
                bars.advance(bar)
    draw(show(runs), given.out)


if __name__ == "__main__":
    main()
