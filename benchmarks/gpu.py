"""Optimizers on the shapes of GPT-2 small (124 M parameters), on one GPU.

Of every optimizer: seconds to trace and compile its step, `update` and `optax.apply_updates`;
milliseconds of that step between refreshes and at one, medians, and in the mean over whole cycles
of refreshes, for float32 and bfloat16 gradients; bytes of state. Then a whole training step, the
gradient of 32 windows of 1024 words in bfloat16 arithmetic and the optimizer's step, in the mean
over cycles and relative to that with AdamW. Gradient and optimizer are two programs, so that the
first is compiled once for all. Parameters and state are donated. Matrix products have the default
precision: TF32 on NVIDIA GPUs.

Lines come as figures do; `--out` gets results.json and results.md. An optimizer that fails, or
takes longer than its limit, does not keep the others from theirs. `--tiny` runs anywhere.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import gpu_report
import gpu_rows
import gpu_supervisor

DTYPES = ("float32", "bfloat16")
GRACE = 10  # seconds over its limit, in which an optimizer may end by itself


def parse_arguments():
    """The command line."""
    names = [row.name for row in gpu_rows.ROWS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--skip-train", action="store_true", help="no whole training steps")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--minutes", type=float, default=6.0, help="for everything")
    parser.add_argument("--limit", type=float, default=75.0, help="seconds for one optimizer")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timed steps, or a cycle")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a CPU")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), metavar="FOLDER")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def child(args):
    """In a process of its own: measure."""
    import gpu_model
    import gpu_worker

    gpu_worker.run(
        [row for row in gpu_rows.ROWS if row.name in args.only],
        gpu_model.TINY if args.tiny else gpu_model.GPT2_SMALL,
        minutes=args.minutes,
        limit=args.limit,
        seconds=args.seconds,
        train=not args.skip_train,
        dtypes=args.dtypes,
    )


def main():
    """Measure, print and write."""
    args = parse_arguments()
    if args.child:
        return child(args)
    start = time.monotonic()
    deadline = start + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    report = gpu_report.Report()

    def command(names):
        left = max(0.0, deadline - time.monotonic()) / 60
        options = [x for x in sys.argv[1:] if x in ("--tiny", "--skip-train")]
        numbers = ("--minutes", left, "--limit", args.limit, "--seconds", args.seconds)
        lists = ("--dtypes", *args.dtypes, "--only", *names)
        return [sys.executable, __file__, "--child", *options, *map(str, numbers), *lists]

    with tempfile.TemporaryDirectory() as cache:
        environment = {
            # A process that is started anew finds the gradient of the model compiled.
            "JAX_COMPILATION_CACHE_DIR": cache,
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        }
        messages = gpu_supervisor.supervise(
            command, args.only, limit=args.limit + GRACE, deadline=deadline, environment=environment
        )
        for name, message in messages:
            for line in report.add(name, message):
                print(f"{time.monotonic() - start:5.0f} s  {line}", flush=True)
            (args.out / "results.json").write_text(json.dumps(report.messages, indent=1))
            (args.out / "results.md").write_text(report.markdown())
    print(f"\n{report.markdown()}\nwritten to {args.out}", flush=True)
    return 0 if report.complete(args.only) else 1


if __name__ == "__main__":
    sys.exit(main())
