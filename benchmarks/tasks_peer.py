"""psgd_jax for `tasks.py`, beside the JAX and the Optax of all others.

psgd_jax 0.2.9 imports a private module of Optax that has moved since, for one function that is
public: it gets a module with that function in its place. Nothing else of it is touched.
"""

import functools
import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path

import optax

PRIVATE = "optax." + "_src"


@functools.cache
def load(folder: Path) -> Callable[..., optax.GradientTransformation]:
    """Returns `psgd_jax.kron.kron`, from a folder that pip has installed it to."""
    if not (folder / "psgd_jax").is_dir():
        message = (
            f"no psgd_jax in {folder}: `make {folder}/.installed` installs it, or leave it out"
        )
        raise FileNotFoundError(message)
    sys.path.append(str(folder))
    stand_in = types.ModuleType(f"{PRIVATE}.clipping")
    stand_in.clip_by_block_rms = optax.clip_by_block_rms
    sys.modules[stand_in.__name__] = stand_in
    importlib.import_module(PRIVATE).clipping = stand_in
    return importlib.import_module("psgd_jax.kron").kron
