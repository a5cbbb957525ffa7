"""What optimizers keep along the axes of blocks, as matrices of NumPy.

All is computed on the host, outside of JAX: shapes of every kind would each be compiled.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Inexact

from optax_kron.diagnostics.layout import Laid, Place, lay_out
from optax_kron.diagnostics.states import Found, check_concrete, find_states
from optax_kron.kernels import psgd
from optax_kron.types import PyTree

Stack = Any  # a NamedTuple of an optimizer's own
Rows = Inexact[np.ndarray, "N ..."]


@dataclasses.dataclass(frozen=True)
class Factor:
    """One of the matrices that an optimizer keeps of a block.

    Attributes:
      name: What it is. Of `kron_psgd` "Q", and "P", which is `QᴴQ` or kept itself; of `shampoo`
        "S", the statistic, and "root", its inverse root; of `soap` "S", "basis", and in the KL
        variants "eigenvalues"; of `kfac` and `ekfac` "A" along inputs and "G" along outputs, and
        "inverse", or "basis" and "eigenvalues".
      axis: The axis of the block; of a layer 0 is that of inputs, the bias's one last, and 1 that
        of outputs.
      axes: The axes of the parameter that are enumerated along it; of a layer those of its kernel.
      block: The number of the block in the parameter, or the layer.
      start: Where the block begins along the axis, in a parameter that is cut.
      layer: Name of the layer; empty for optimizers of parameters.
      optimizer: Which optimizer keeps it, as `summary` names it.
      array: Dense [d, d], or diagonal [d]; of float32 or wider, without the padding of blocks.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> state = ok.kron_psgd(1e-3).init(params)
      >>> factor = ok.diagnostics.factors(state, params)["kernel"][0]
      >>> factor.name, factor.axes, factor.matrix.shape
      ('Q', (0,), (3, 3))
    """

    name: str
    axis: int
    axes: tuple[int, ...]
    block: int
    start: int
    layer: str
    optimizer: str
    array: Inexact[np.ndarray, "..."]

    @property
    def is_diagonal(self) -> bool:
        """Whether only a diagonal is kept."""
        return self.array.ndim == 1

    @property
    def matrix(self) -> Inexact[np.ndarray, "d d"]:
        """The matrix [d, d], also of a diagonal."""
        return np.diag(self.array) if self.is_diagonal else self.array

    def spectrum(self) -> Inexact[np.ndarray, " d"]:
        """Its singular values, largest first, which of a curvature are its eigenvalues."""
        if self.is_diagonal:
            return np.sort(np.abs(self.array))[::-1]
        return np.linalg.svd(self.array.astype(double(self.array)), compute_uv=False)

    def __repr__(self) -> str:
        size = "×".join(map(str, self.array.shape))
        return f"Factor({self.name!r}, axis={self.axis}, block={self.block}, {size})"


def factors(
    state: PyTree, params: PyTree, tx: optax.GradientTransformation | None = None
) -> dict[str, list[Factor]]:
    """The matrices that optimizers keep of every parameter, unstacked and unpacked.

    Args:
      state: What `tx.init` or `tx.update` returned, or a pytree that holds it.
      params: The parameters, or `jax.ShapeDtypeStruct`s.
      tx: The transformation that made the state. It is needed for `kfac` and `ekfac`, whose layers
        are not in the state, for a `blocking` other than the default, where a wrapper hides
        parameters, such as `optax.masked`, and for `kron_psgd` with a geometry that keeps P in
        place of Q: without it all factors of `kron_psgd` are taken for those of Q.

    Returns:
      By path of the parameter, as "dense/kernel", its factors, block by block, and axis by axis
      within. The factors of a layer are those of its kernel and of its bias. Parameters of which no
      matrix is kept have none.

    Raises:
      ValueError: If the layout is not known without `tx`, or is not that of the state; or if the
        state is traced, of an ensemble, or without values.

    Cost: a copy of all factors on the host, in float32 at least, and for `kron_psgd` a product of
    matrices for each.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> tx, params = ok.shampoo(1e-3), {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
      >>> state = tx.init(params)
      >>> for factor in ok.diagnostics.factors(state, params)["kernel"]:
      ...     print(factor)
      Factor('S', axis=0, block=0, 3×3)
      Factor('root', axis=0, block=0, 3×3)
      Factor('S', axis=1, block=0, 2×2)
      Factor('root', axis=1, block=0, 2×2)
    """
    owner = "diagnostics.factors"
    states = find_states(state)
    laid = lay_out(owner, states, params, tx)
    made: dict[str, list[Factor]] = {}
    for found, layout in zip(states, laid, strict=True):
        if not found.stacks:
            continue
        check_concrete(owner, found)
        if layout is None:
            raise ValueError(
                f"{owner}: the blocks of {found.kind} cannot be assigned to parameters: "
                f"{why_unknown(found)} Pass tx, the transformation that made the state: "
                "factors(state, params, tx)."
            )
        for path, own in factors_of_state(found, layout).items():
            made.setdefault(path, []).extend(own)
    return made


def why_unknown(found: Found) -> str:
    """Why the layout of a state was not guessed."""
    if found.kind.endswith("kfac"):
        return "layers are in the transformation, not in the state."
    return (
        "the default `Blocking` does not lead to the stacks of the state, "
        f"{', '.join(found.stacks)}."
    )


def factors_of_state(found: Found, laid: Laid) -> dict[str, list[Factor]]:
    """The factors of the parameters of one state, by path."""
    made: dict[str, list[Factor]] = {}
    for label in dict.fromkeys(place.label for place in laid.places):
        stored = kept(found.stacks[label], laid.method)
        arrays = [(name, axis, unpacked(on_host(x))) for name, axis, x in stored]
        for place in laid.places:
            if place.label == label:
                own = list(_of_place(place, arrays, found))
                for path in place.paths:
                    made.setdefault(path, []).extend(own)
    order = [path for place in laid.places for path in place.paths]
    return {path: made[path] for path in dict.fromkeys(order) if made.get(path)}


def _of_place(
    place: Place, arrays: Sequence[tuple[str, int, Rows]], found: Found
) -> Iterator[Factor]:
    """The factors of every block of a parameter."""
    for block in range(place.count):
        for axis, axes in enumerate(place.axes):
            size, start = int(place.sizes[block, axis]), int(place.starts[block, axis])
            at = axis, axes, block, start, place.layer, found.name or found.kind
            for name, own, rows in arrays:
                if own == axis:
                    array = trimmed(rows[place.rows], size)[block]
                    yield Factor(name, *at, array)
                    if name == "Q":
                        yield Factor("P", *at, squared(array[None])[0])


def trimmed(rows: Rows, size: int) -> Rows:
    """Factors [N, ...] without padding."""
    return rows[:, :size] if rows.ndim == 2 else rows[:, :size, :size]


def squared(rows: Rows) -> Rows:
    """`QᴴQ` of factors [N, ...]."""
    return np.square(rows) if rows.ndim == 2 else rows.conj().mT @ rows


def kept(stack: Stack, method: Any) -> Iterator[tuple[str, int, Any]]:
    """What a stack keeps along axes: the name, the axis, and factors [N, ...] as stored.

    Args:
      stack: The stack.
      method: The settings. Without them factors of `kron_psgd` are taken for those of Q.
    """
    kind = type(stack).__name__
    if kind == "KronStack":
        of_p = method is not None and psgd.degree(method.geometry) == 1
        pairs = [("P" if of_p else "Q", stack.factors)]
    elif kind == "ShampooStack":
        pairs = [("S", stack.statistics), ("root", stack.roots)]
    elif kind == "SoapStack":
        pairs = [("S", stack.statistics), ("basis", stack.bases)]
        pairs.append(("eigenvalues", stack.values or ()))
    elif kind == "KfacStack":
        yield "A", 0, stack.input_factor
        yield "G", 1, stack.output_factor
        inverse = stack.inverse
        if hasattr(inverse, "input"):
            pairs = [("inverse", (inverse.input, inverse.output))]
        else:
            bases = inverse.input_basis, inverse.output_basis
            pairs = [("basis", bases)]
            pairs.append(("eigenvalues", (inverse.input_values, inverse.output_values)))
    else:
        return
    yield from ((name, axis, x) for name, xs in pairs for axis, x in enumerate(xs) if x is not None)


def tells_q_from_p(found: Found, method: Any) -> bool:
    """Whether it is known of which matrix the factors of `kron_psgd` are; true of other optimizers.

    Without settings a cached P tells, or Q upper triangular, as in the default geometry. Factors
    that have not moved, and diagonals alone, are taken for those of the default.
    """
    if method is not None or found.kind != "kron_psgd":
        return True
    stacks = found.stacks.values()
    if any(stack.preconditioner is not None for stack in stacks):
        return True
    # The first that has moved tells: all are of one geometry.
    for dense in (on_host(q) for stack in stacks for q in stack.factors if q.ndim == 3):
        if np.tril(dense, -1).any():
            return False
        if np.triu(dense, 1).any():
            return True
    return True


def on_host(x: Any) -> np.ndarray:
    """An array as one of NumPy, of 32 bits at least.

    Raises:
      ValueError: If there are no values, or some of them are on devices of other processes.
    """
    if isinstance(x, jax.ShapeDtypeStruct):
        raise ValueError("diagnostics: the state has shapes alone, as of jax.eval_shape.")
    if not getattr(x, "is_fully_addressable", True):
        raise ValueError(
            "diagnostics: a part of the state is on devices of other processes; gather it first."
        )
    array = np.asarray(x)
    small = array.dtype.itemsize < 4 and array.dtype != bool
    return array.astype(np.float32) if small else array


def has_values(found: Found) -> bool:
    """Whether the values of all stacks are there."""
    leaves = jax.tree.leaves(found.stacks)
    return all(
        not isinstance(x, jax.ShapeDtypeStruct) and getattr(x, "is_fully_addressable", True)
        for x in leaves
    )


def unpacked(rows: np.ndarray) -> np.ndarray:
    """Factors [N, d, d] of what `kernels.packed` keeps of them, which is compiled shape by shape.

    Diagonal ones [N, d], and those that are not packed, are what they are.
    """
    if rows.ndim < 3 or rows.shape[1] == rows.shape[2]:
        return rows
    columns, height = rows.shape[2], rows.shape[1]
    size = height if height < 2 * columns else 2 * columns
    half, even = (size + 1) // 2, int(size % 2 == 0)
    cross = rows[:, half + even :]
    lower, upper = np.tril(rows[:, even : half + even]), rows[:, : size - half, 1 - even :]
    first = lower + np.tril(lower, -1).conj().mT
    above = np.triu(upper)
    second = above + np.triu(above, 1).conj().mT
    return np.block([[first, cross.conj().mT], [cross, second]])


def double(x: np.ndarray) -> type:
    """The dtype of 64 bits for an array."""
    return np.complex128 if np.iscomplexobj(x) else np.float64
