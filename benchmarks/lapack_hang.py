"""Which batched LAPACK calls hang on CPU: one program with independent calls, in many processes.

XLA's CPU runtime runs the independent operations of a program on a pool of threads, one a core. A
release whose batched LAPACK calls hand parts of their batch to the same pool, and wait for them,
deadlocks when every thread of the pool is such a waiting call. So each program here holds eight
batched calls: four of 8 matrices of 256 rows and four of 32 of 64. In the form "independent" none
needs another; "chained" makes each wait for the one before; "mapped" goes through `lapack_safe`, as
the library does.

Each program runs in a process of its own. One that uses no processor time for `--idle` seconds has
hung; one that is still at work after `--limit` seconds is slow, as OpenBLAS's own threads are where
they outnumber the cores that are free. Both are ended. A row counts them, beside the median time of
one execution in those that finished:

    python benchmarks/lapack_hang.py --pythons .venv/bin/python .venv-oldest/bin/python --runs 5
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

CALLS = ("qr", "inv", "solve", "triangular", "eigh", "cholesky", "svd")
FORMS = ("independent", "chained", "mapped")
SHAPES = 4 * ((8, 256, 256), (32, 64, 64))
EXECUTIONS = 10


def make_call(name):
    """The function of one positive definite matrix."""
    import jax
    import jax.numpy as jnp

    def identity_like(a):
        return jnp.eye(a.shape[-1], dtype=a.dtype)

    return {
        "qr": lambda a: jnp.linalg.qr(a)[0],
        "inv": jnp.linalg.inv,
        "solve": lambda a: jnp.linalg.solve(a, identity_like(a)),
        "triangular": lambda a: jax.lax.linalg.triangular_solve(a, identity_like(a), lower=True),
        "eigh": lambda a: jnp.linalg.eigh(a)[1],
        "cholesky": jnp.linalg.cholesky,
        "svd": lambda a: jnp.linalg.svd(a)[0],
    }[name]


def make_program(name, form):
    """A function of stacks that calls LAPACK on each."""
    import jax

    call = make_call(name)
    if form == "mapped":
        from optax_kron.kernels import linalg

        call = linalg.lapack_safe(call)
    call = jax.vmap(call)

    def program(*stacks):
        outcomes = []
        for stack in stacks:
            if form == "chained" and outcomes:
                # A number that is zero, but not for the compiler.
                stack = stack + 0 * outcomes[-1][0, 0, 0]
            outcomes.append(call(stack))
        return outcomes

    return program


def run_program(name, form):
    """In the child process: execute one program many times and print the seconds of one."""
    import jax
    import numpy as np

    rng = np.random.default_rng(0)
    stacks = []
    for shape in SHAPES:
        noise = rng.standard_normal(shape).astype(np.float32)
        stacks.append(noise @ noise.mT / shape[-1] + np.eye(shape[-1], dtype=np.float32))
    compiled = jax.jit(make_program(name, form)).lower(*stacks).compile()
    seconds = []
    for _ in range(EXECUTIONS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*stacks))
        seconds.append(time.perf_counter() - start)
    print(statistics.median(seconds))


def run_child(python, name, form, threads, idle, limit):
    """How the process ended ("finished", "hung", "slow"), and seconds of one execution."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("OPENBLAS_NUM_THREADS", None)
    if threads:
        environment["OPENBLAS_NUM_THREADS"] = str(threads)
    command = [python, __file__, "--child", name, form]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    started = moved = time.monotonic()
    used = 0.0
    while child.poll() is None:
        time.sleep(0.1)
        now, using = time.monotonic(), processor_seconds(child.pid)
        if using > used + 0.05:
            used, moved = using, now
        if now - moved > idle or now - started > limit:
            child.kill()
            child.wait()
            return ("hung" if now - moved > idle else "slow"), None
    if child.returncode:
        sys.exit(f"{python} {name} {form}: exit code {child.returncode}")
    return "finished", float(child.stdout.read())


def processor_seconds(pid):
    """What a process has used so far (Linux); what it was, if it has ended meanwhile."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def jax_version(python):
    """The release of JAX that a Python imports."""
    command = [python, "-c", "import jax; print(jax.__version__)"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def print_row(python, version, name, form, threads, args):
    """Run one program `args.runs` times and print how often it hung."""
    runs = [run_child(python, name, form, threads, args.idle, args.limit) for _ in range(args.runs)]
    count = {end: sum(e == end for e, _ in runs) for end in ("hung", "slow")}
    seconds = [s for _, s in runs if s is not None]
    median = f"{1e3 * statistics.median(seconds):.1f} ms" if seconds else "-"
    print(
        f"{version:10}{name:12}{form:13}{threads or 'cores':>9}{len(runs):>6}"
        f"{count['hung']:>6}{count['slow']:>6}{median:>12}{os.getloadavg()[0]:>7.1f}",
        flush=True,
    )


def main():
    """Print a table: a row for each release of JAX, call, form and number of OpenBLAS's threads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pythons", nargs="+", default=[sys.executable])
    parser.add_argument("--calls", nargs="+", choices=CALLS, default=CALLS)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument(
        "--threads", nargs="+", type=int, default=(0, 1), help="of OpenBLAS; 0: as many as cores"
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--idle", type=float, default=10)
    parser.add_argument("--limit", type=float, default=60)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return run_program(*args.child)

    print(f"{Path(__file__).name}: {len(os.sched_getaffinity(0))} cores")
    print(
        f"{'JAX':10}{'call':12}{'form':13}{'OpenBLAS':>9}{'runs':>6}{'hung':>6}{'slow':>6}"
        f"{'median':>12}{'load':>7}",
        flush=True,
    )
    for python in args.pythons:
        version = jax_version(python)
        for name in args.calls:
            for form in args.forms:
                for threads in args.threads:
                    print_row(python, version, name, form, threads, args)


if __name__ == "__main__":
    main()
