"""What is told of a run beside its state, and what both say of its parameters."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from optax_kron.diagnostics.layout import Laid
from optax_kron.diagnostics.matrices import on_host
from optax_kron.diagnostics.report import idle_blocks
from optax_kron.diagnostics.states import Found, number
from optax_kron.layers.paths import by_path
from optax_kron.types import PyTree

# Of the momentum of a block beside its usual gradient: 0.9 to the power of 130 steps of zeros.
_SPENT = 1e-6


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that looks wrong.

    Attributes:
      cause: Its name, such as "nan_data".
      evidence: What tells.
      remedy: What to do.
      where: Paths of the parameters, or of the data, that it concerns, if it is not all of them.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> state = optax.masked(ok.soap(1e-3), {"kernel": False}).init(params)
      >>> ok.diagnostics.explain(state, params)[0].cause
      'mask_hides_all'
    """

    cause: str
    evidence: str
    remedy: str
    where: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f" ({_listed(self.where)})" if self.where else ""
        return f"{self.cause}: {self.evidence}{where}. {self.remedy}"


def _listed(names: Sequence[str]) -> str:
    names = [name or "root" for name in names]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What is told beside the state; see `explain`."""

    params: PyTree
    gradients: PyTree
    updates: PyTree
    losses: Float[np.ndarray, " n"] | None
    batch: PyTree

    @functools.cached_property
    def has_risen(self) -> bool:
        """Whether losses have risen to thrice the first, or did so until they were not finite."""
        if self.losses is None or len(self.losses) < 8:
            return False
        finite = np.isfinite(self.losses)
        # What came before the first that is not finite, unless finite ones came after it.
        end = len(finite) if finite[-1] else int(np.argmin(finite))
        known = self.losses[:end][finite[:end]]
        if not len(known):
            return False
        above = known > known[0] + 2 * abs(known[0])
        last = above[-max(len(known) // 4, 1) :]
        return bool(above.mean() > 0.25 or last.mean() > 0.5)

    @property
    def has_diverged(self) -> bool:
        """Whether they have, or parameters are not finite: the state is then no cause of it."""
        return self.has_risen or bool(self.bad_paths(self.params))

    @property
    def has_converged(self) -> bool:
        """Whether losses have fallen to a hundredth, so that small gradients are no wonder."""
        if self.losses is None or not len(self.losses):
            return False
        return bool(np.abs(self.losses[-1]) < 0.01 * np.abs(self.losses[0]))

    @staticmethod
    def bad_paths(tree: PyTree) -> list[str]:
        """Paths of arrays with numbers that are not finite."""
        return [path for path, x in arrays(tree).items() if not bool(jnp.isfinite(x).all())]

    def has_half(self, *trees: PyTree) -> bool:
        """Whether there is float16 in parameters, gradients or other trees."""
        leaves = jax.tree.leaves((self.params, self.gradients, trees))
        return any(getattr(x, "dtype", None) == jnp.float16 for x in leaves)


def arrays(tree: PyTree) -> Mapping[str, Any]:
    """The real and complex arrays of a tree by path."""
    if tree is None:
        return {}
    leaves = {k: x for k, x in by_path(tree).items() if hasattr(x, "dtype")}
    return {k: x for k, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.inexact)}


def count(x: Any) -> int:
    """A counter, or zero where there is none."""
    return int(number(x) or 0)


def name_of(found: Found) -> str:
    """The name of an optimizer, for messages."""
    return f"{found.name} ({found.kind})" if found.name else found.kind


def idle_now(found: Found) -> dict[str, np.ndarray | None]:
    """Blocks without any gradient so far, or whose momentum has all but vanished since."""
    idle = {label: idle_blocks(found, label) for label in found.stacks}
    momentum, usual = found.state.momentum, found.state.usual_norms
    if not isinstance(momentum, Mapping) or not isinstance(usual, Mapping):
        return idle
    spent = {}
    for label, rows in idle.items():
        if rows is not None and label in usual.get("gradients", {}):
            kept = on_host(momentum[label])
            # The largest entry is no longer than the norm, and its square cannot overflow.
            length = np.abs(kept.reshape(len(kept), -1)).max(axis=1, initial=0.0)
            spent[label] = length < _SPENT * np.asarray(usual["gradients"][label].norm)
    # Where all have vanished, that is a minimum.
    if all((x | idle[label]).all() for label, x in spent.items()):
        return idle
    return {k: x if x is None or k not in spent else x | spent[k] for k, x in idle.items()}


def names_of(found: Found, laid: Laid | None, idle: Mapping[str, np.ndarray | None]) -> list[str]:
    """Of parameters all of whose blocks are idle; without a layout, of the stacks of blocks."""
    if laid is not None:
        names = []
        for place in laid.places:
            rows = idle[place.label]
            if rows is not None and rows[place.rows].all():
                names += place.paths
        return names
    names = []
    for label, rows in idle.items():
        devices = getattr(getattr(found.stacks[label], "initialized", None), "devices", set)()
        if rows is not None and rows.any() and len(devices) < 2:  # else some may be padding
            names.append(f"{int(rows.sum())} of {len(rows)} blocks {label}")
    return names
