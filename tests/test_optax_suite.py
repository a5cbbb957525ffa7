"""Optax's own tests of optimizers, as they are installed with it, on those of this library.

Nothing of them is copied: the installed file is executed with another list of optimizers, whose
names it looks up in a stand-in for `optax.contrib`.
"""

import functools
from pathlib import Path

import optax
import optax.contrib

import optax_kron as ok

FILE = Path(optax.contrib.__file__).parent / "_common_test.py"
LISTS = {"_MAIN_OPTIMIZERS_UNDER_TEST", "_ALL_OPTIMIZERS_UNDER_TEST", "_BASE_OPTIMIZERS"}


def with_taps(name):
    """The factory of a natural gradient whose layers and taps are made of the parameters alone.

    Every leaf is a bias, and has two data whose second moment is the identity.
    """

    @functools.wraps(getattr(ok, name))
    def factory(learning_rate, **settings): ...

    return factory
