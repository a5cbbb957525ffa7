"""Orthogonalization of model T's matrices, by `ok.orthogonalize` and by `optax.contrib`, in turn.

Both take five of Muon's iterations in float32. Optax's function for one matrix, which is not
public, is reached by its `scale_by_muon` without an average, whose cost is counted with it.
"""

import argparse
import time

import jax
import models
import numpy as np
import optax.contrib
import timing

import optax_kron as ok


def matrices():
    """The matrices of model T, by path."""
    tree = models.random_tree(0, models.model_t_shapes())
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): x for path, x in leaves if x.ndim == 2}


def contestants(gradients):
    """By name, a transformation."""
    numbers = {k: optax.contrib.MuonDimensionNumbers() for k in gradients}
    theirs = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=numbers)
    return {"optax_kron": ok.orthogonalize(scale=None), "optax.contrib": theirs}


def compiled(tx, gradients):
    """The update, and seconds to trace and compile it."""
    jax.clear_caches()
    state = tx.init(gradients)
    start = time.perf_counter()
    update = jax.jit(lambda grads: tx.update(grads, state, grads)[0]).lower(gradients).compile()
    return update, time.perf_counter() - start


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--compiles", type=int, default=3)
    args = parser.parse_args()
    gradients = matrices()
    rivals = contestants(gradients)
    updates, compiling = {}, {name: [] for name in rivals}
    for _ in range(args.compiles):
        for name, tx in rivals.items():
            updates[name], seconds = compiled(tx, gradients)
            compiling[name].append(seconds)
    running = {name: [] for name in rivals}
    for _ in range(args.steps):
        for name, update in updates.items():
            running[name].append(timing.clock(update, gradients)[0])
    for what, seconds in (("ms to compile", compiling), ("ms a step", running)):
        for name, x in seconds.items():
            print(f"{name}: {1e3 * np.median(x):.0f} {what}")
        ours, theirs = (np.array(x) for x in seconds.values())
        print(f"ratio: {np.median(ours / theirs):.2f}")


if __name__ == "__main__":
    main()
