"""Endurance: hundreds of consecutive updates of model T by every optimizer; a hang is a failure.

Each runs in a process of its own, with its state donated: `kron_psgd` in each geometry with factors
that move at every step, the others with roots and bases made anew at every second step. The
process reports every finished step. It is stopped and counted as failed when no step finishes for
`--stall` seconds or when all of it takes longer than `--limit`; also when it crashes, when a number
in the last update or the state is not finite, or when the last update is zero (which is how a step
that met something not finite would end). Any failure gives exit code 1.
"""

import argparse
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

GEOMETRIES = ("EQ", "QEP", "QEQ", "Q0.5EQ1.5", "QUAD", "PRO4P", "QUAD4P")
BRANCHES = (64, 16)  # samples and dimensions of the state that branch_kfac is given
# Those without geometry: the name in the library, and settings.
OTHERS = {
    "shampoo": ("shampoo", {"refresh_every": 10, "stagger": True, "block_size": 256}),
    "shampoo-eigh": (
        "shampoo",
        {"refresh_every": 2, "root_method": "eigh", "block_size": 256},
    ),
    "soap": ("soap", {"refresh_every": 2}),
    "soap-eigh": ("soap", {"refresh_every": 10, "stagger": True, "basis": "eigh"}),
    "kl_shampoo": ("soap", {"refresh_every": 2, "variant": "kl_shampoo"}),
    "kl_soap": ("soap", {"refresh_every": 2, "variant": "kl_soap"}),
    "branch_kfac": ("branch_kfac", {}),
}
OPTIMIZERS = (*GEOMETRIES, *OTHERS)


def make_optimizer(name):
    """The transformation, and the extra arguments of its update."""
    import jax
    import measure

    if name in GEOMETRIES:
        return measure.make_optimizer("optax_kron", 1e-3, 1.0, name), {}
    method, settings = OTHERS[name]
    extras = {}
    if method == "branch_kfac":
        extras["branches"] = jax.random.normal(jax.random.key(0), BRANCHES)
    return measure.from_library(method, 1e-3, settings), extras


def run_updates(name, steps):
    """In the child process: print each finished step, then the verdict."""
    import jax
    import models
    import timing

    shapes = models.model_t_shapes()
    params, *gradients = (models.random_tree(i, shapes) for i in range(5))
    tx, extras = make_optimizer(name)
    state = jax.jit(tx.init)(params)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, **extras), donate_argnums=(1,))
    for i in range(steps):
        updates, state = jax.block_until_ready(update(gradients[i % 4], state, params))
        print(i + 1, flush=True)
    finite = timing.all_finite((updates, state))
    moved = all(bool((leaf != 0).any()) for leaf in jax.tree.leaves(updates))
    print("ok" if finite and moved else f"finite: {finite}, moved: {moved}", flush=True)


def lines_of(process):
    """A queue that a thread fills with the process's lines, then with None."""
    lines = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(line.strip())
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def follow(lines, limit, stall, on_step):
    """Read to the end: the last line that is no step, and why reading stopped early, or None."""
    start, verdict, done = time.monotonic(), "", 0
    while True:
        left = limit - (time.monotonic() - start)
        try:
            line = lines.get(timeout=max(min(stall, left), 0))
        except queue.Empty:
            reason = f"limit of {limit:g} s" if left <= stall else f"HANGS: {stall:g} s idle"
            return verdict, f"{reason}, after step {done}"
        if line is None:
            return verdict, None
        if line.isdecimal():
            done = int(line)
            on_step(done)
        else:
            verdict = line


def soak(name, args, on_step):
    """Run one optimizer in a child process; returns (passed, what happened)."""
    command = [sys.executable, str(Path(__file__)), "--child", name, "--steps", str(args.steps)]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    verdict, stopped = "", None
    try:
        verdict, stopped = follow(lines_of(process), args.limit, args.stall, on_step)
        if not stopped:
            process.wait(timeout=args.stall)
    except subprocess.TimeoutExpired:
        stopped = f"HANGS: does not exit within {args.stall:g} s of its last line"
    finally:
        process.kill()
    code = process.wait()
    if stopped or code or verdict != "ok":
        return False, stopped or f"exit code {code}; {verdict or 'no verdict'}"
    seconds = time.monotonic() - start
    rate = args.steps / seconds
    return True, f"{args.steps} steps, {seconds:.0f} s with compiling, {rate:.2f} steps/s, finite"


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    parser.add_argument("--limit", type=float, default=700, help="seconds for one optimizer")
    parser.add_argument("--stall", type=float, default=180, help="seconds without a step")
    parser.add_argument("--child", choices=OPTIMIZERS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    """Run all of them; the exit code says whether every one passed."""
    args = parse_arguments()
    if args.child:
        run_updates(args.child, args.steps)
        return 0
    console = Console(soft_wrap=True)
    columns = (TextColumn("{task.description:>14}"), BarColumn(), MofNCompleteColumn())
    failures = 0
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for name in args.optimizer:
            task = progress.add_task(name, total=args.steps)
            passed, story = soak(name, args, lambda n, t=task: progress.update(t, completed=n))
            failures += not passed
            mark = "[green]pass[/]" if passed else "[bold red]FAIL[/]"
            progress.console.print(f"{mark} {name}: {story}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
