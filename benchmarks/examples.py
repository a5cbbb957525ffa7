"""The examples as modules: benchmarks take models, losses and data from them.

`from examples import digits` is `examples/digits.py`.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import autoencoder
import byte_gpt
import characters
import common
import data
import digits
import equations
import influence
import laplace
import state_space

__all__ = [
    "autoencoder",
    "byte_gpt",
    "characters",
    "common",
    "data",
    "digits",
    "equations",
    "influence",
    "laplace",
    "state_space",
]
