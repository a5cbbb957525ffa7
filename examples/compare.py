"""All optimizers of the library, and AdamW, on the character transformer of characters.py.

Each is built as a user would, with the better of two peak learning rates (`benchmarks/tournament.py
compare` runs both), and trained in the same loop: `update` gets what a step knows, and an optimizer
takes from that what it needs. K-FAC and EKFAC take the taps; branch_kfac the inputs of the last
layer, as samples of a state.

    python examples/compare.py --help
"""

import time

import jax
import numpy as np
import optax
from characters import WIDTH, Transformer, load_windows, loss_fn
from common import add_optimizer, make_parser, save_curves

import optax_kron as ok

# Heads and their width become one axis again; the layers of a scan are independent blocks.
BLOCKING = ok.Blocking(
    merge_below=WIDTH, stacked_axes=lambda path, shape: 1 if "layers" in path else 0
)
READOUT = "params/readout"
OPTIMIZERS = {
    "adamw": lambda rate, layers: optax.with_extra_args_support(optax.adamw(rate(3e-3))),
    "kron_psgd": lambda rate, _: ok.kron_psgd(rate(3e-3), geometry="QEQ", blocking=BLOCKING),
    "shampoo": lambda rate, _: ok.shampoo(rate(1e-2), blocking=BLOCKING),
    "soap": lambda rate, _: ok.soap(rate(1e-2), blocking=BLOCKING),
    "kl_soap": lambda rate, _: ok.soap(rate(1e-2), variant="kl_soap", blocking=BLOCKING),
    "kl_shampoo": lambda rate, _: ok.soap(rate(1e-2), variant="kl_shampoo", blocking=BLOCKING),
    "kfac": lambda rate, layers: ok.kfac(
        rate(3e-1), layers=layers, damping=1e-2, norm_constraint=1e-3
    ),
    "ekfac": lambda rate, layers: ok.ekfac(
        rate(3e-1), layers=layers, damping=1e-2, norm_constraint=1e-3
    ),
    "branch_kfac": lambda rate, _: ok.branch_kfac(rate(1e-2), damping=0.1),
}


def train(name: str, layers: ok.Layers, params, windows, key):
    """Trains with one optimizer.

    Returns:
      The parameters, the loss of every batch, seconds of every step (the first with compiling) and
      bytes of the state.
    """
    optimizer = OPTIMIZERS[name](
        lambda peak: optax.cosine_decay_schedule(peak, len(windows)), layers
    )
    with_taps = ok.value_and_grad_with_taps(loss_fn, layers)
    state = jax.jit(optimizer.init)(params)

    @jax.jit
    def step(params, state, windows, key):
        loss, grads, taps = with_taps(params, windows, key=key)
        (readout,) = taps[READOUT]
        branches = readout.inputs[0, :, -1, :WIDTH]  # at the last positions
        # XLA leaves out what an optimizer does not use of these.
        updates, state = optimizer.update(grads, state, params, taps=taps, branches=branches)
        return optax.apply_updates(params, updates), state, loss

    losses, seconds = [], []
    for i in range(len(windows)):
        start = time.perf_counter()
        params, state, loss = step(params, state, windows[i], jax.random.fold_in(key, i))
        losses.append(float(loss))
        seconds.append(time.perf_counter() - start)
    return params, losses, seconds, sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def smooth(losses, width: int = 10):
    """Returns (step, mean loss of some batches)."""
    return [(i, np.mean(losses[max(i - width, 0) : i])) for i in range(1, len(losses) + 1)]


def main() -> None:
    """Trains, prints a row for each optimizer and draws the losses."""
    parser = make_parser(__doc__, steps=300, out="compare.png")
    add_optimizer(parser, OPTIMIZERS)
    arguments = parser.parse_args()
    key = jax.random.key(arguments.seed)
    windows, seen, held_out = load_windows(arguments.steps, arguments.seed)
    params = jax.jit(Transformer().init)(key, windows[0, :, :-1])
    layers = ok.find_layers(loss_fn, params, windows[0])
    curves, evaluate = {}, jax.jit(loss_fn)
    print("optimizer    training loss  held-out  ms a step  first step, s  state, KiB")
    for name in OPTIMIZERS:
        if arguments.optimizer in (name, "all"):
            trained, losses, seconds, size = train(name, layers, params, windows, key)
            final, unseen = evaluate(trained, seen), evaluate(trained, held_out)
            milliseconds = 1e3 * np.median(seconds)
            print(
                f"{name:11}  {final:13.3f}  {unseen:8.3f}  {milliseconds:9.0f}  "
                f"{seconds[0]:13.1f}  {size / 2**10:10.0f}"
            )
            curves[name] = smooth(losses)
    save_curves(arguments.out, "All optimizers on one transformer", curves, scale="linear")


if __name__ == "__main__":
    main()
