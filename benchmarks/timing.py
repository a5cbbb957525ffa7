"""How the benchmarks measure: the machine's matmul rate, compile time, step time, state bytes.

Compile time is that of `jit(...).lower(...)` (tracing) plus `.compile()`, in a fresh process, with
no cache on disk. Step times are wall-clock seconds of one compiled call whose result is waited for;
the state is donated and handed on, so that memory is reused as in training. Reported is the median,
which a few disturbed steps cannot move, and where steps differ in cost (a factor update every so
often) also the mean over a whole number of cycles.

The FLOPs that XLA reports (`compiled.cost_analysis()`, here `xla_flop`) are a weak measure of work:
they are the program's, not the step's (a conditional counts the same whether its branch is taken or
not), and calls into libraries count as nothing. `step.py` counts from shapes instead.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np


def matmul_rate(sizes=(1024, 2048), repeats=7):
    """FLOP/s of a float32 matrix product on this machine: the best of the sizes' medians."""
    multiply = jax.jit(jnp.matmul)
    rates = []
    for size in sizes:
        a, b = jax.random.normal(jax.random.key(0), (2, size, size))
        multiply(a, b).block_until_ready()
        seconds = [clock(multiply, a, b)[0] for _ in range(repeats)]
        rates.append(2 * size**3 / float(np.median(seconds)))
    return max(rates)


def machine():
    """What a measurement ran on: the version of JAX, the device, FLOP/s of a matrix product."""
    return {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "matmul_flop_s": matmul_rate(),
    }


def clock(function, *args):
    """Seconds that one call took until its result was ready, and the result."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - start, result


def compile_timed(function, *args, donate=()):
    """The compiled function, and a dict: seconds of tracing, of tracing and compiling, FLOPs."""
    start = time.perf_counter()
    lowered = jax.jit(function, donate_argnums=donate).lower(*args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    ready = time.perf_counter()
    figures = {"trace_s": traced - start, "compile_s": ready - start}
    return compiled, {**figures, "xla_flop": _xla_flop(compiled)}


def _xla_flop(compiled):
    """The FLOPs in XLA's cost analysis, `None` where the backend gives none."""
    analysis = compiled.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis  # a list in old versions
    return analysis.get("flops") if analysis else None


def tree_bytes(tree):
    """Bytes of all arrays in a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def all_finite(tree):
    """Whether every number in a tree of arrays is finite (typed PRNG keys pass)."""
    arrays = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return all(bool(jnp.isfinite(x).all()) for x in arrays)


def time_updates(tx, params, gradients, *, steps, warmup):
    """Compile `tx.update` with donated state and time it over a cycle of given gradients.

    Args:
        tx: an Optax gradient transformation.
        params: the parameters.
        gradients: a list of gradient trees, used in turn.
        steps: the number of timed steps.
        warmup: the number of steps before them.

    Returns:
        A dict of seconds (`trace_s`, `compile_s` with tracing, `median_s`, `mean_s`, `best_s`,
        `worst_s`), `state_bytes`, `xla_flop` and `finite`.
    """
    state = jax.jit(tx.init)(params)
    figures = {"state_bytes": tree_bytes(state)}
    update, compile_figures = compile_timed(tx.update, gradients[0], state, params, donate=(1,))
    seconds = []
    for i in range(warmup + steps):
        elapsed, (updates, state) = clock(update, gradients[i % len(gradients)], state, params)
        seconds.append(elapsed)
    timed = seconds[warmup:]
    return {
        **figures,
        **compile_figures,
        "median_s": float(np.median(timed)),
        "mean_s": float(np.mean(timed)),
        "best_s": min(timed),
        "worst_s": max(timed),
        "finite": all_finite(updates) and all_finite(state),
    }
