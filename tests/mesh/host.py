"""One of the hosts of `test_processes.py`: trains as the example does, and may be killed.

It keeps the losses, one a line, and what was saved and what was restored, whole.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import two_processes
from processes import add_host

import optax_kron as ok

SAVED, KILLED = 3, 6  # steps; what is killed is about to save again


def keep(path, *trees):
    """Writes the leaves of trees, whoever has their rows."""
    leaves = multihost_utils.process_allgather(jax.tree.leaves(trees), tiled=True)
    if jax.process_index() == 0:
        np.savez(path, *leaves)


def restore_and_keep(restore, folder):
    """Keeps what is restored, and what `resize_state` makes of the arrays that were saved."""

    def restore_too(checkpoints, params, tx, mesh):
        step, *trees = restore(checkpoints, params, tx, mesh)
        assert step == SAVED
        keep(folder / "restored.npz", *trees)
        with np.load(folder / "saved.npz") as saved:
            arrays = [saved[name] for name in saved.files]
        _, state = jax.tree.unflatten(jax.tree.structure(trees), arrays)
        keep(folder / "resized.npz", trees[0], ok.sharding.resize_state(tx, state, params))
        return step, *trees

    return restore_too


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("optimizer")
    parser.add_argument("axes")
    parser.add_argument("--kill", nargs="*", type=int, default=())
    add_host(parser)
    arguments = parser.parse_args()
    vars(arguments).update(steps=KILLED + 1, seed=0, batch_size=16, save_every=SAVED)
    folder, process = arguments.folder, arguments.process
    jax.config.update("jax_enable_x64", True)
    if arguments.processes > 1:
        jax.distributed.initialize(arguments.address, arguments.processes, process)
    two_processes.restore = restore_and_keep(two_processes.restore, folder)
    kinds = (AxisType[arguments.axes],)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=kinds)
    with jax.set_mesh(mesh):
        for i, loss, *trees in two_processes.train(arguments.optimizer, mesh, arguments):
            if process == 0:
                with (folder / "losses").open("a") as file:
                    print(i, loss, file=file)
            if i == SAVED:
                keep(folder / "saved.npz", *trees)
            if i == KILLED and process in arguments.kill:
                os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
