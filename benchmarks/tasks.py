"""Every optimizer at its defaults on eight small tasks, beside tuned AdamW and Muon.

    python benchmarks/tasks.py
    python benchmarks/tasks.py --tasks lstm poisson --optimizers soap

All runs of a task start from the same weights, see the same batches and use the same cosine
schedule; they differ in the optimizer and the peak of its learning rate. The target of a task is
the loss with which AdamW ends at the best of its five rates, and the table tells, at the best rate
of each optimizer, after which share of AdamW's steps and of its seconds the target was reached
first. Seconds are of training steps alone, by the median. "loss, untuned" is with the rate that the
optimizer has on all tasks; "rates" is by which factor rates may differ whose final losses are
within five per cent of the best one.

Runs are kept in a folder that is named after what they depend on, so that a second call, or one
after an interruption, makes only those that are missing.
"""

import argparse
import hashlib
import json
import math
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import Progress
from tasks_optimizers import OPTIMIZERS
from tasks_problems import PROBLEMS
from tasks_table import make_table, summarise
from tournament import train
from tournament_runs import Trainer

HERE = Path(__file__).resolve().parent


def version() -> str:
    """Returns a hash of the library, of these tasks and of JAX's version."""
    digest = hashlib.sha256(jax.__version__.encode())
    sources = [*(HERE.parent / "optax_kron").rglob("*.py"), *HERE.glob("t*.py")]
    sources += (HERE.parent / "examples").glob("*.py")
    for file in sorted(file for file in sources if file.name not in ("tasks.py", "tasks_table.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def measure(task_name: str, optimizer: str, seed: int, bars: Progress) -> list[dict]:
    """Trains at every rate of an optimizer; returns the figures of each run."""
    task = PROBLEMS[task_name](seed)
    contestant = OPTIMIZERS[optimizer](task)
    trainer = Trainer(task, optimizer, contestant)
    runs = []
    for rate in contestant.rates:
        run = train(trainer, rate, bars)
        losses = [value if math.isfinite(value) else None for value in run.curve(0)]
        runs.append(
            {
                "rate": rate,
                "steps": run.steps,
                "losses": losses,
                "step_seconds": run.milliseconds / 1e3,
                "compile_seconds": trainer.compile_seconds,
                "state_bytes": trainer.state_bytes,
            }
        )
        bars.remove_task(bars.task_ids[-1])
    jax.clear_caches()
    return runs


def collect(tasks: list[str], optimizers: list[str], seed: int, folder: Path, console: Console):
    """Returns the runs by task and optimizer; measures those that are not in the folder."""
    results = {}
    with Progress(console=console) as bars:
        whole = bars.add_task("all", total=len(tasks) * len(optimizers))
        for task in tasks:
            for optimizer in optimizers:
                file = folder / f"{task}-{optimizer.replace(' ', '-')}-{seed}.json"
                if not file.exists():
                    bars.update(whole, description=f"{task}, {optimizer}")
                    runs = measure(task, optimizer, seed, bars)
                    partial = file.with_suffix(".part")
                    partial.write_text(json.dumps(runs))
                    partial.rename(file)
                results[task, optimizer] = json.loads(file.read_text())
                bars.advance(whole)
    return results


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=PROBLEMS, default=[*PROBLEMS])
    parser.add_argument(
        "--optimizers", nargs="+", choices=OPTIMIZERS, default=[*OPTIMIZERS], help="beside adamw"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and labels")
    parser.add_argument("--out", type=Path, default=Path("out/tasks"), help="folder of the runs")
    return parser.parse_args()


def main() -> None:
    """Measures what is missing, and prints the table."""
    arguments, console = parse_arguments(), Console(width=110)
    folder = arguments.out / version()
    folder.mkdir(parents=True, exist_ok=True)
    optimizers = ["adamw", *(name for name in arguments.optimizers if name != "adamw")]
    results = collect(arguments.tasks, optimizers, arguments.seed, folder, console)
    for table in (make_table(results), summarise(results)):
        console.print(table)
    console.print(f"Runs: {folder}")


if __name__ == "__main__":
    main()
