"""What another process that never rests does to a step: every optimizer, with its default settings.

All matrices are refreshed at every step: those of three dense layers, of two sizes. Steps alone and
steps beside so many busy processes take turns, all in one process; a ratio is that of the medians
of a turn and of the one before it, and the median over turns is told. Of
two cores a busy process takes a quarter to a half, which makes ratios of 1.3 to 2; threads that
spin while they wait for each other show as more. The last lines hold the ratios against a bound.

`--decompositions` adds what calls LAPACK. Do not set OPENBLAS_NUM_THREADS: it is what many do not.
"""

import argparse
import os
import subprocess
import sys
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
import peers
import timing
from rich.console import Console
from rich.table import Table

import optax_kron as ok

BOUND = 2.5
BUSY = "while True: pass"
SHAPES = {"a": (256, 256), "b": (256, 256), "c": (256, 64)}
LAYERS = [ok.Layer(name, kernel=name) for name in SHAPES]
EVERY = {"refresh_every": 1}
OPTIMIZERS = {
    "kron_psgd": lambda: ok.kron_psgd(1e-3, update_probability=1.0),
    "soap": lambda: ok.soap(1e-3, **EVERY),
    "kl_soap": lambda: ok.soap(1e-3, variant="kl_soap", **EVERY),
    "shampoo": lambda: ok.shampoo(1e-3, **EVERY),
    "kfac": lambda: ok.kfac(1e-3, layers=LAYERS, **EVERY),
    'kfac, "exact"': lambda: ok.kfac(1e-3, layers=LAYERS, damping_rule="exact", **EVERY),
    "ekfac": lambda: ok.ekfac(1e-3, layers=LAYERS, **EVERY),
}
DECOMPOSITIONS = {
    'soap, "qr"': lambda: ok.soap(1e-3, basis="qr", **EVERY),
    'shampoo, "eigh"': lambda: ok.shampoo(1e-3, root_method="eigh", **EVERY),
    'ekfac, "eigh"': lambda: ok.ekfac(1e-3, layers=LAYERS, basis="eigh", **EVERY),
}


def problem(seed=0, examples=512):
    """Gradients of layers, and what these saw."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    taps = {
        name: ok.Tap(draw(1, examples, 1, d_in), draw(1, 1, examples, 1, d_out))
        for name, (d_in, d_out) in SHAPES.items()
    }
    grads = {k: t.inputs[0, :, 0].T @ t.output_grads[0, 0, :, 0] for k, t in taps.items()}
    return jax.tree.map(lambda x: x / examples, grads), ok.Taps(taps)


def turns(tx, steps, rounds, busy):
    """Medians of milliseconds of the steps of each turn, (alone, beside others)."""
    grads, taps = problem()
    params = jax.tree.map(jnp.ones_like, grads)

    @jax.jit
    def update(grads, state, taps):
        return tx.update(grads, state, params, taps=taps)[1]

    state = update(grads, jax.jit(tx.init)(params), taps)
    pairs = []
    for _ in range(rounds):
        pair = []
        for count in (0, busy):
            others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
            try:
                seconds = []
                for _ in range(steps):
                    elapsed, state = timing.clock(update, grads, state, taps)
                    seconds.append(elapsed)
            finally:
                for other in others:
                    other.kill()
                    other.wait()
            pair.append(1e3 * median(seconds))
        pairs.append(pair)
    return pairs


def main():
    """Measure, print a table and a line for each criterion; exit code 1 on a miss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, default=1, help="processes")
    parser.add_argument("--decompositions", action="store_true")
    args = parser.parse_args()
    chosen = OPTIMIZERS | (DECOMPOSITIONS if args.decompositions else {})
    console = Console(width=None if sys.stdout.isatty() else 100)
    table = Table(title=f"A step that refreshes all, on {os.cpu_count()} cores")
    for column in ("optimizer", "ms alone", f"ms beside {args.busy} busy", "ratio"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    found = {}
    for name, make in chosen.items():
        pairs = turns(make(), args.steps, args.rounds, args.busy)
        found[name] = median(beside / alone for alone, beside in pairs)
        alone, beside = (median(times) for times in zip(*pairs, strict=True))
        table.add_row(name, f"{alone:.0f}", f"{beside:.0f}", f"{found[name]:.2f}")
        print(f"{name}: {alone:.0f} and {beside:.0f} ms", file=sys.stderr, flush=True)
    console.print(table)
    load = os.getloadavg()[0]
    console.print(f"OPENBLAS_NUM_THREADS {os.environ.get('OPENBLAS_NUM_THREADS')}, load {load:.1f}")
    criteria = [(f"{name}: ratio", found[name], BOUND) for name in OPTIMIZERS]
    return peers.report(console, criteria, found, None)


if __name__ == "__main__":
    sys.exit(main())
