"""Seven billion parameters on 64 devices, by the compiler: nothing is run, no array is made.

For each optimizer `update` is lowered and compiled for abstract gradients of a Llama-like
transformer on 64 virtual devices of a CPU, in a process of its own. Of the program of one device
the first table tells, without estimates:

- bytes of state, and the ratio to what a formula says; bytes of temporaries;
- collectives: how many there are in a step, what a device gets in them from others (or sends, where
  that is more), and the largest one, over all devices, in units of all gradients;
- operations of matrix products and of LAPACK's routines, loops counted: of a usual step, and what
  is added where a refresh of factors is due.

The second table is a model, of these counts and of the rates in `scale_times.py`: milliseconds on
H100s, and the share of a training step. Temporaries are those of the program for a CPU, which takes
one block after the other; a GPU takes them all at once.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import peers
import scale_times
from rich.console import Console
from rich.progress import track
from rich.table import Table

OPTIMIZERS = ("adamw", "muon", "kron_psgd", "soap", "kl_soap", "kl_shampoo", "shampoo")
OWN = OPTIMIZERS[2:]
MOST_STATE, MOST_MOVED, MOST_SECONDS = 1.1, 2.0, 900
GIGA, TERA = 1e9, 1e12


def measure(name, tiny):
    """What the compiler says of one optimizer."""
    import scale_hlo
    import scale_model as model

    sizes = model.TINY if tiny else model.FULL
    start = time.perf_counter()
    program, state, params = model.compiled(name, sizes)
    seconds = time.perf_counter() - start
    done = scale_hlo.operations(program.as_text())
    return {
        "seconds": seconds,
        "parameters": model.number(sizes),
        "devices": sizes.devices,
        "gradients": model.bytes_on_a_device(params),
        "all_gradients": 4 * model.number(sizes),
        "state": model.bytes_on_a_device(state),
        "formula": model.state_formula(name, sizes),
        "block_bytes": model.block_bytes(name, sizes),
        "temporaries": program.memory_analysis().temp_size_in_bytes,
        "operations": [x._asdict() | {"total": x.total} for x in done],
    }


def launch(name, args):
    """`measure` in a fresh process; a failure is a row of the table, and not the end."""
    child = [sys.executable, __file__, "--child", name]
    # What goes between devices does not depend on how well the code of one is optimised.
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count"
    settings = {
        "XLA_FLAGS": f"{flags}={8 if args.tiny else 64}",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",  # they find out how often loops run
    }
    done = subprocess.run(
        child + ["--tiny"] * args.tiny, env=os.environ | settings, capture_output=True, text=True
    )
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def measured_table(found):
    """What the compiler says."""
    some = next(iter(found.values()))
    sizes = f"{some['parameters'] / GIGA:.3g} G parameters, {some['devices']} devices"
    gradients = f"{some['gradients'] / GIGA:.3g} GB of gradients on each"
    table = Table(title=f"Measured, by the compiler: {sizes}, {gradients}")
    table.add_column("optimizer")
    columns = ("state GB", "/ formula", "temporaries GB", "collectives", "received GB", "largest")
    for column in (*columns, "Tflop", "+ when due", "compile s"):
        table.add_column(column, justify="right")
    for name, figures in found.items():
        counts = scale_times.counts(figures)
        kinds = ", ".join(f"{n} {kind}" for kind, n in counts["collectives"].items())
        table.add_row(
            name,
            f"{figures['state'] / GIGA:.3g}",
            f"{figures['state'] / figures['formula']:.4f}",
            f"{figures['temporaries'] / GIGA:.3g}",
            kinds or "none",
            f"{counts['received'] / GIGA:.3g}",
            f"{counts['largest']:.2f}",
            f"{counts['usual_flop'] / TERA:.3g}",
            f"{counts['due_flop'] / TERA:.3g}",
            f"{figures['seconds']:.0f}",
        )
    return table


def modelled_table(found):
    """What follows from that, with the rates of H100s."""
    step = scale_times.times(*next(iter(found.items())))["step_s"]
    work = f"{scale_times.TOKENS / 1e6:g} M tokens at {scale_times.UTILISATION:.0%} of the peak"
    table = Table(title=f"Modelled: a training step of {work} takes {step:.3g} s")
    table.add_column("optimizer")
    links = list(scale_times.LINKS)
    columns = ("usual ms", "+ when due ms", "every", *(f"{link} ms" for link in links))
    for column in (*columns, *(f"of the step, {link}" for link in links)):
        table.add_column(column, justify="right")
    for name, figures in found.items():
        times = scale_times.times(name, figures)
        table.add_row(
            name,
            f"{1e3 * times['usual_s']:.3g}",
            f"{1e3 * times['due_s']:.3g}",
            str(scale_times.INTERVALS.get(name, "--")),
            *(f"{1e3 * times['links_s'][link]:.3g}" for link in links),
            *(f"{times['shares'][link]:.1%}" for link in links),
        )
    return table


def criteria(found, seconds):
    """(what, figure, bound)."""
    for name in OWN:
        if name in found:
            figures = found[name]
            yield f"{name}: state / formula", figures["state"] / figures["formula"], MOST_STATE
            largest = scale_times.counts(figures)["largest"]
            yield f"{name}: largest collective / gradients", largest, MOST_MOVED
    yield "seconds for all", seconds, MOST_SECONDS


def main():
    """Compile, print tables and a line for each criterion; exit code 1 on a miss."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    parser.add_argument("--tiny", action="store_true", help="a small model on 8 devices")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args.tiny)))
        return 0
    start = time.perf_counter()
    progress = track(args.optimizers, "compiling", console=Console(stderr=True))
    found = {name: launch(name, args) for name in progress}
    console = Console(width=None if sys.stdout.isatty() else 140)
    for name, figures in found.items():
        if "error" in figures:
            console.print(f"[bold red]MISS[/] {name}: {figures['error']}", markup=True)
    good = {name: figures for name, figures in found.items() if "error" not in figures}
    if good:
        console.print(measured_table(good), modelled_table(good), sep="\n")
    missed = peers.report(
        console, list(criteria(good, time.perf_counter() - start)), found, args.json
    )
    return int(missed or len(good) < len(found))


if __name__ == "__main__":
    sys.exit(main())
