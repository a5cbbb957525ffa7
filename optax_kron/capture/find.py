"""`find_layers`: the layers of any loss function, and what is in none."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import overload

from optax_kron.capture.analysis.layers import Analysis
from optax_kron.capture.analysis.trace import trace_loss
from optax_kron.capture.execution.check import Verdict, judge
from optax_kron.layers.layer import MAX_SIZE, Layer, check_max_size
from optax_kron.tables import Table
from optax_kron.types import PyTree

NO_MARK = (
    "the loss marks no likelihood, so that it is unknown where the examples are, and of which "
    "distribution. Take the loss from ok.losses, which has Optax's names and values; or give taps "
    "by hand, as ok.Taps."
)

_NOT_CHECKED = "not verified numerically yet: check=False, abstract shapes, or numbers not finite"


@dataclasses.dataclass(frozen=True)
class Uncovered:
    """A parameter without a Kronecker block."""

    path: str
    shape: tuple[int, ...]
    reason: str


class Layers:
    """The layers of a loss function: a sequence of `Layer`, printed as a table, in notebooks too.

    `layers[0]`, `layers[:2]` and `layers["name"]` select, `"name" in layers` asks.

    Attributes:
      layers: The layers.
      uncovered: The parameters that are in none, each with the reason.
      checked: Whether the layers were verified on numbers when they were found.
      marked: Whether there is a marked loss at all.
      structure: The parameters as `jax.ShapeDtypeStruct`s, `None` for leaves that are not
        floating-point arrays; `None` if not known.
      analysis: The analysis of the program that they were found in, so that taps of the same
        program need no other; `None` if not known.
    """

    def __init__(
        self,
        layers: tuple[Layer, ...],
        uncovered: tuple[Uncovered, ...],
        checked: bool,
        marked: bool = True,
        structure: PyTree | None = None,
        analysis: Analysis | None = None,
    ):
        self.layers = layers
        self.uncovered = uncovered
        self.checked = checked
        self.marked = marked
        self.structure = structure
        self.analysis = analysis

    def __reduce__(self) -> tuple[type["Layers"], tuple[object, ...]]:
        # A program can't be stored. Without one, that of the loss is analysed again.
        return Layers, (self.layers, self.uncovered, self.checked, self.marked, self.structure)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @overload
    def __getitem__(self, name: int | str) -> Layer: ...

    @overload
    def __getitem__(self, name: slice) -> tuple[Layer, ...]: ...

    def __getitem__(self, name: int | str | slice) -> Layer | tuple[Layer, ...]:
        if isinstance(name, int | slice):
            return self.layers[name]
        for layer in self.layers:
            if layer.name == name:
                return layer
        known = ", ".join(layer.name for layer in self.layers)
        raise KeyError(f"there is no layer {name!r} among {known or 'none'}")

    def __contains__(self, layer: object) -> bool:
        return any(layer in (mine, mine.name) for mine in self.layers)

    def __str__(self) -> str:
        return "\n".join(str(part) for part in self._parts())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(part._repr_html_() for part in self._parts())

    def _parts(self) -> list[Table]:
        """The table of layers, and where there is more to say, what follows it."""
        rows = []
        for layer in self.layers:
            sides = (layer.d_in, layer.has_diagonal_input), (layer.d_out, layer.has_diagonal_output)
            widths = [f"{size} diagonal" if wide else str(size) for size, wide in sides]
            sizes = (str(layer.blocks), widths[0], widths[1])
            rows.append((layer.name, layer.kind, *sizes, " ".join(layer.paths)))
        parts = [Table(("layer", "kind", "blocks", "inputs", "outputs", "parameters"), rows)]
        if self.uncovered:
            without = [(u.path, str(u.shape), u.reason) for u in self.uncovered]
            parts.append(Table((), without, title=("", "without a Kronecker block:")))
        if not self.marked:
            parts.append(Table((), (), notes=("", NO_MARK)))
        elif not self.checked:
            parts.append(Table((), (), notes=("", _NOT_CHECKED)))
        return parts


def find_layers(
    loss_fn: Callable[..., PyTree],
    params: PyTree,
    *args: PyTree,
    has_aux: bool = False,
    check: bool = True,
    max_size: int = MAX_SIZE,
) -> Layers:
    """Find the layers of a loss function: which of its parameters get a Kronecker block.

    The function is traced, each parameter followed to the products, convolutions and lookups that
    consume it, through reshapes, casts, scans, checkpoints and branches. Nothing is registered.
    Printed, the result is a table of all parameters: the block that each got, or why it has none.

    Args:
      loss_fn: `loss_fn(params, *args)` returns a real scalar, or `(scalar, aux)` with `has_aux`.
        Its likelihood has to come from `ok.losses`, which marks where the examples are.
      params: A pytree; leaves that are not floating-point arrays are left alone.
      *args: Given by position: pytrees of arrays or `jax.ShapeDtypeStruct`s, and whatever else the
        function takes.
      has_aux: Whether `loss_fn` returns auxiliary data.
      check: Compare the layers with the gradient, on the given numbers, and leave out those that
        differ. Abstract arguments have no numbers: the check is then made by the first
        `value_and_grad_with_taps` that has some. Nor does it tell anything of layers whose
        gradients are infinite or NaN: those are kept, with a warning.
      max_size: Longest axis that has a dense factor. Of a kernel with more inputs, or more outputs,
        that factor is diagonal: the diagonal of the second moment, of which nothing else is ever
        formed, neither here nor in taps. The table says so.

    Returns:
      The layers.

    Raises:
      ValueError: If the loss is not a real scalar, or max_size no integer.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> def loss_fn(params, x, y):
      ...     logits = jnp.tanh(x @ params["in"]) @ params["out"]
      ...     return jnp.mean(ok.losses.softmax_cross_entropy_with_integer_labels(logits, y))
      >>> params = {"in": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}
      >>> layers = ok.find_layers(loss_fn, params, jnp.ones((5, 3)), jnp.zeros(5, int))
      >>> [layer.name for layer in layers]
      ['in', 'out']
    """
    check_max_size("find_layers", max_size)
    traced = trace_loss(loss_fn, params, args, has_aux)
    analysis = traced.analysis
    verdict = judge(traced) if check and traced.is_concrete else Verdict(analysis, {}, False)
    # With `check` biases may be gone, and layers refused: the analysis that travels has them all.
    sized = [captured.with_max_size(int(max_size)) for captured in verdict.analysis.layers]
    judged = verdict.analysis.of_layers(sized)
    alike = [captured.layer for captured in sized if captured.layer.has_alike_uses]
    refused = dict(verdict.refused) | {
        x.name: f"is tied, with as many rows as outputs: it needs max_size ≥ {x.d_in}"
        for x in alike
    }
    return Layers(
        tuple(captured.layer for captured in sized if captured.layer.name not in refused),
        _uncovered(judged, refused),
        verdict.complete,
        bool(analysis.marks),
        traced.structure,
        None if analysis.closes_over_tracers else analysis,
    )


def _uncovered(analysis: Analysis, refused: Mapping[str, str]) -> tuple[Uncovered, ...]:
    """The parameters in no layer; `refused` are names of layers left out, with the reason."""
    reasons = dict(analysis.uncovered)
    for captured in analysis.layers:
        if captured.layer.name in refused:
            reasons.update(dict.fromkeys(captured.layer.paths, refused[captured.layer.name]))
    return tuple(
        Uncovered(path, value.shape, reasons[path])
        for path, value in analysis.leaves.items()
        if path in reasons
    )
