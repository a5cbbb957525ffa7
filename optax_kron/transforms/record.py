"""How the states of a transformation are laid out, as told while it makes them.

A state is arrays by kind of block. Which parameters the blocks are of is in the settings, which the
functions of a transformation hide, the deeper the more wrappers there are. So each `Frame.init`
notes what it has planned, for whoever asks for it, and for nobody otherwise.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

from optax_kron.layers.paths import paths_of
from optax_kron.transforms.preconditioner import AnyPlan, KronState
from optax_kron.types import PyTree


class Note(NamedTuple):
    """What is known of a state when it is made."""

    frame: Any  # the `frame.Frame`, with the settings of `init`
    plan: AnyPlan
    paths: list[str]  # of all parameters that it sees, in order
    state: KronState


_notes: contextvars.ContextVar[list[Note] | None] = contextvars.ContextVar("notes", default=None)


@contextlib.contextmanager
def notes() -> Iterator[list[Note]]:
    """The notes of all states that are made meanwhile."""
    token = _notes.set(made := [])
    try:
        yield made
    finally:
        _notes.reset(token)


def note(frame: Any, plan: AnyPlan, params: PyTree, state: KronState) -> None:
    """Tell of a state that was made."""
    listeners = _notes.get()
    if listeners is not None:
        listeners.append(Note(frame, plan, paths_of(params), state))
