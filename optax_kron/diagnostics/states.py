"""The states of this library inside of any pytree: of chains, wrappers, train states."""

# Worked example. Of optax.chain(optax.clip(1.0), optax.partition({"a": ok.soap(1e-3), "b":
# ok.kron_psgd(1e-3)}, labels)), states are found at
#
#   1/inner_states/a/inner_state/0                a KronState, named "a"
#   1/inner_states/b/inner_state/0                a KronState, named "b"
#
# for the state of an alias, such as ok.soap(1e-3), is a chain. Names are what is left of paths once
# keys that all of them begin with, or end in, are gone. With a fallback there are three,
#
#   1/inner_states/b/inner_state/0/fallback/0     another one, named "b/inner_state/0/fallback"
#
# and the others are "a/inner_state" and "b/inner_state".

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.core
import numpy as np
from jaxtyping import Array

from optax_kron.layers.paths import without_variables
from optax_kron.transforms.adaptive_step import AdaptiveState
from optax_kron.transforms.branch_kfac import ScaleByBranchKfacState
from optax_kron.transforms.fixed_norm import FixedNormState
from optax_kron.transforms.preconditioner import KronState
from optax_kron.types import PyTree

OURS = (AdaptiveState, FixedNormState, KronState, ScaleByBranchKfacState)
Keys = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Found:
    """A state, and what is known of where it was found.

    Attributes:
      keys: The path in the tree.
      name: What tells it from others in the tree; empty for the only one.
      state: A `KronState`, `ScaleByBranchKfacState` or `FixedNormState`.
      adaptive: The state of the adaptive optimizer around it, or `None`.
      hyperparams: Settings that `optax.inject_hyperparams` has injected.
      dropped: Steps that `optax.apply_if_finite` has kept from it, or `None`.
    """

    keys: Keys
    name: str
    state: Any
    adaptive: AdaptiveState | None = None
    hyperparams: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dropped: Array | None = None

    @property
    def is_kron(self) -> bool:
        """Whether it has stacks of blocks."""
        return isinstance(self.state, KronState)

    @property
    def stacks(self) -> Mapping[str, Any]:
        """What is kept by kind of block; nothing of a tree without leaves."""
        stacks = getattr(self.state, "stacks", None)
        return stacks if isinstance(stacks, Mapping) else {}

    @property
    def hides_all(self) -> bool:
        """Whether it was made of a tree without leaves."""
        return self.is_kron and not isinstance(self.state.stacks, Mapping)

    @property
    def kind(self) -> str:
        """The optimizer, as far as a state tells."""
        if isinstance(self.state, ScaleByBranchKfacState):
            return "branch_kfac"
        if isinstance(self.state, FixedNormState):
            return "fixed_norm"
        stacks = list(self.stacks.values())
        if not stacks and self.state.layers is not None:
            return "kfac"  # or ekfac, of which nothing tells
        kind = _KINDS.get(type(stacks[0]).__name__, "optimizer") if stacks else "optimizer"
        if kind == "kfac" and hasattr(stacks[0].inverse, "known"):
            kind = "ekfac"
        return kind if self.adaptive is None else f"adaptive_{kind}"


_KINDS = {
    "KronStack": "kron_psgd",
    "ShampooStack": "shampoo",
    "SoapStack": "soap",
    "KfacStack": "kfac",
    "OrthogonalStack": "orthogonalize",
}


def find_states(tree: PyTree) -> list[Found]:
    """The states of this library in a tree, in order; those in a fallback come after its own.

    Raises:
      ValueError: If there is none.
    """
    # An optimizer of Flax NNX is no pytree everywhere, but has its state in a field.
    tree = getattr(tree, "opt_state", tree)
    found = list(_walk(without_variables(tree), (), {}))
    if not found:
        kinds = sorted({type(x).__name__ for x in _nodes(tree)} or {type(tree).__name__})
        raise ValueError(
            "diagnostics: there is no state of an optimizer of optax_kron in this tree, which has "
            f"{', '.join(kinds)}. Pass what tx.init or tx.update returned, or a pytree that holds "
            "it; a checkpoint that was restored without a target has lost the types of its nodes."
        )
    around = [x.keys for x in found if isinstance(x.state, FixedNormState)]
    names = distinguishing([x.keys for x in found if x.keys not in around])
    for keys, name in distinguishing(around).items():
        names[keys] = f"fixed_norm/{name}".removesuffix("/")
    return [dataclasses.replace(x, name=names[x.keys]) for x in found]


def _nodes(tree: PyTree) -> list[Any]:
    """The parts of a chain, or the tree."""
    return list(tree) if type(tree) in (tuple, list) else [tree]


def _walk(tree: PyTree, keys: Keys, around: Mapping[str, Any]) -> Iterator[Found]:
    """States below a path; `around` are fields of `Found` that wrappers tell."""

    def stops(x):
        return isinstance(x, OURS) or hasattr(x, "hyperparams") or hasattr(x, "total_notfinite")

    for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=stops):
        here = (*keys, *(jax.tree_util.keystr((key,), simple=True) for key in path))
        if isinstance(x, AdaptiveState):
            inside = {**around, "adaptive": x}
            yield from _walk(x.preconditioner, (*here, "preconditioner"), inside)
        elif isinstance(x, OURS):
            yield Found(here, "", x, **around)
            name = "inner" if isinstance(x, FixedNormState) else "fallback"
            outside = {k: v for k, v in around.items() if k != "adaptive"}
            yield from _walk(getattr(x, name, None), (*here, name), outside)
        elif stops(x):
            more = dict(around)
            if hasattr(x, "hyperparams"):
                more["hyperparams"] = {**around.get("hyperparams", {}), **x.hyperparams}
            else:
                more["dropped"] = x.total_notfinite
            yield from _walk(x.inner_state, (*here, "inner_state"), more)


def distinguishing(paths: list[Keys]) -> dict[Keys, str]:
    """Short names of paths: without the keys that all begin with, and those that all end in."""
    if len(paths) < 2:
        return dict.fromkeys(paths, "")
    first = _common(paths)
    last = _common([path[first:][::-1] for path in paths])
    return {path: "/".join(path[first : len(path) - last]) for path in paths}


def _common(paths):
    count = 0
    for keys in zip(*paths, strict=False):
        if len(set(keys)) > 1:
            break
        count += 1
    return count


def number(x: Any) -> float | None:
    """A scalar of a state or a setting, if its value is known."""
    if x is None or callable(x) or isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct):
        return None
    return float(np.real(np.asarray(x)))


def check_concrete(owner: str, found: Found) -> None:
    """Raise where a state is that of many members, or traced."""
    count = found.state.count
    if isinstance(count, jax.core.Tracer):
        raise ValueError(
            f"{owner}: the state is traced; expected arrays with values. Call it outside of "
            "jax.jit; inside of it there is ok.diagnostics.metrics."
        )
    check_single(owner, found, "Pass that of one member: jax.tree.map(lambda x: x[0], state).")


def check_single(owner: str, found: Found, remedy: str) -> None:
    """Raise where a state is that of many members."""
    if shape := np.shape(found.state.count):
        raise ValueError(
            f"{owner}: the state is one of an ensemble, with counters of shape {shape}. {remedy}"
        )
