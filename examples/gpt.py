"""A small GPT that learns to write Python, by AdamW, SOAP, K-FAC and adaptive K-FAC.

One table of 8192 entries is embedding and head: for K-FAC a tied embedding, whose block is diagonal
over the vocabulary and dense over the width. All start from the same weights and see the same
windows. Losses are means over tokens, in nats. Model and text are in gpt_model.py.

    python examples/gpt.py --help, or --contest: contest.py, many optimizers on a GPT on bytes
"""

import sys
import time

import contest
import jax
import numpy as np
import optax
from common import COLOURS, add_optimizer, draw_curves, make_parser, save
from flax import nnx
from gpt_model import GPT, load_windows, make_loss
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import optax_kron as ok

NAMES = ("adamw", "soap", "kfac", "adaptive_kfac")
# Of three peak rates, a factor of three apart, the one of least loss on either text at step 150.
PEAKS = {"adamw": 1e-2, "soap": 1e-2, "kfac": 1e-1}
HEADINGS = ("", "peak", "training", "held-out", "ms a step", "compile, s", "state")


def make_optimizer(name, layers, steps):
    """Returns an optimizer; adaptive_kfac chooses all by itself."""
    if name == "adaptive_kfac":
        return ok.adaptive_kfac(layers=layers)
    # Matrices and tables decay, norms and biases do not.
    decay = {"weight_decay": 0.1, "mask": lambda params: jax.tree.map(lambda p: p.ndim > 1, params)}
    rate = optax.warmup_cosine_decay_schedule(0.0, PEAKS[name], max(steps // 10, 1), steps)
    if name == "kfac":
        return ok.kfac(rate, layers=layers, **decay)
    if name == "soap":  # a dense factor of the vocabulary would have 8192² numbers
        return ok.soap(rate, blocking=ok.Blocking(max_size=1024), **decay)
    return optax.with_extra_args_support(optax.adamw(rate, b2=0.95, **decay))


def compile_step(optimizer, loss_fn, layers, *arguments):
    """Returns a step of training, which tells the optimizer all that is known."""
    with_taps = ok.value_and_grad_with_taps(loss_fn, layers)

    @jax.jit
    def step(params, state, windows, key):
        loss, grads, taps = with_taps(params, windows, key=key)
        # XLA leaves out what an optimizer does not use of these.
        known = {"taps": taps, "value": loss, "value_fn": lambda p: loss_fn(p, windows)}
        known["ggn_fn"] = ok.ggn_vector_product(loss_fn, params, windows)
        updates, state = optimizer.update(grads, state, params, **known)
        return optax.apply_updates(params, updates), state

    return step.lower(*arguments).compile()


def train(name, loss_fn, layers, params, windows, others, key):
    """Trains on all windows, and evaluates on others.

    Returns:
      (step, seconds, training loss, held-out loss) after every tenth of the steps, milliseconds of
      a step, seconds of compiling, and the size of the state in that of the parameters.
    """
    optimizer, loss_of = make_optimizer(name, layers, len(windows)), jax.jit(loss_fn)
    state = jax.jit(optimizer.init)(params)
    bytes_of = [sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (state, params)]
    start = time.perf_counter()
    step = compile_step(optimizer, loss_fn, layers, params, state, windows[0], key)
    compiling, seconds, curve = time.perf_counter() - start, [], []
    for i, batch in enumerate(track(windows, f"{name:13}"), start=1):
        start = time.perf_counter()
        params, state = jax.block_until_ready(
            step(params, state, batch, jax.random.fold_in(key, i))
        )
        seconds.append(time.perf_counter() - start)
        if i % max(len(windows) // 10, 1) == 0 or i == len(windows):
            curve.append((i, sum(seconds), *(float(loss_of(params, other)) for other in others)))
    return curve, 1e3 * np.median(seconds), compiling, bytes_of[0] / bytes_of[1]


def draw(curves, path):
    """Draws losses over steps and over seconds: held-out ones, and dashed those of training."""
    figure = Figure(figsize=(12, 4.5), dpi=120, layout="constrained")
    for i, axes in enumerate(figure.subplots(1, 2, sharey=True)):
        draw_curves(axes, {k: [(c[i], c[3]) for c in curve] for k, curve in curves.items()})
        for name, curve in curves.items():
            axes.plot([c[i] for c in curve], [c[2] for c in curve], "--", color=COLOURS[name], lw=1)
        axes.set(xlabel=("step", "seconds of steps")[i], ylabel=("nats per token", "")[i])
    figure.suptitle("A small GPT on Python's library: held-out loss (dashed: of the training text)")
    save(figure, path)


def main() -> None:
    """Trains with each optimizer, prints a table and draws the losses."""
    parser = make_parser(__doc__, steps=150, out="gpt.png")
    add_optimizer(parser, NAMES)
    given = parser.parse_args()
    windows, *others = load_windows(given.steps, given.seed)
    graph, params = nnx.split(GPT(nnx.Rngs(given.seed)))
    loss_fn = make_loss(graph)
    print(layers := ok.find_layers(loss_fn, params, windows[0]))
    table, curves = Table(*HEADINGS, box=box.SIMPLE), {}
    for name in [given.optimizer] if given.optimizer in NAMES else NAMES:
        key = jax.random.key(given.seed)
        curves[name], *costs = train(name, loss_fn, layers, params, windows, others, key)
        numbers = (PEAKS.get(name), *curves[name][-1][2:], *costs)
        table.add_row(name, *(f"{x:.4g}" if x else "" for x in numbers))
    Console().print(table)
    draw(curves, given.out)


if __name__ == "__main__":
    contest.main() if "--contest" in sys.argv else main()
