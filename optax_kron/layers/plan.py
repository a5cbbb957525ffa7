"""Layers of a tree of parameters: which parts they own, what is left over, and their taps."""

# Worked example. Layers "q" and "k" with kernels [64, 64] and biases [64], "out" with a kernel
# [64, 10] alone, a table "emb" [1000, 64] whose input factor is diagonal, and a scale [64] that is
# in no layer:
#
#   label          stacks[label]   take(...)[label]   factors
#   "65x64"        q, k            [2, 65, 64]        A [2, 65, 65], G [2, 64, 64]
#   "64x10"        out             [1, 64, 10]        A [1, 64, 64], G [1, 10, 10]
#   "1000diagx64"  emb             [1, 1000, 64]      A [1, 1000], G [1, 64, 64]
#   uncovered == ["scale"]
#
# If optax.masked hides k's bias, then k has another signature, "64x64". Its taps still have the
# bias's column, of width 65: Member.columns leaves out the last. If it hides k's kernel, what is
# left is the bias alone, "1x64", of which the last column is the input.

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from optax_kron.kernels.parts import parts
from optax_kron.layers.cuts import Cut, cut_layer
from optax_kron.layers.layer import Layer
from optax_kron.layers.paths import Leaf, by_path, paths_of, spellings
from optax_kron.layers.taps import Moments, Tap, Taps, magnitude
from optax_kron.layers.tied import seen_as
from optax_kron.types import PyTree

# Clipping, averages over batches and the like change a gradient's scale by less, the usual loss
# scales by more.
MOST_APART = 128.0
Box = tuple[tuple[int, int], ...]  # for each axis of a parameter, a range of indices


@dataclasses.dataclass(frozen=True)
class Member:
    """A layer in a stack.

    Attributes:
      layer: The layer with views, without the parameters that are hidden from the optimizer, as
        its blocks are.
      uncut: The same as its taps see it: a long axis that is cut into blocks is whole there.
      cut: How it is cut.
      columns: The columns of its taps' inputs that belong to the parameters which are there.
      width: Number of columns that its taps must have; `None` if not known.
      wide_input: Whether second moments of the full layer's inputs are diagonal.
    """

    layer: Layer
    uncut: Layer
    cut: Cut
    columns: slice
    width: int | None
    wide_input: bool

    @property
    def is_whole(self) -> bool:
        """Whether none of its parameters is hidden."""
        return self.columns == slice(None)

    def seen_as(self, tap: Tap | Moments) -> "Member":
        """The member as one of its taps sees it: of a tied embedding, as a table or as a head."""
        layer = seen_as(self.uncut, tap)
        if layer is self.uncut:
            return self
        return dataclasses.replace(
            self, uncut=layer, width=layer.d_in, wide_input=layer.has_diagonal_input
        )


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """How layers share stacks, and own the parameters of a tree.

    Attributes:
      owner: Name of the optimizer, for messages.
      leaves: Shapes of all parameters by path.
      stacks: Layers by the label of their signature, in order.
      owned: Parts of parameters that belong to layers, by path.
      names: Names of all layers, hidden ones too.
      multiple: The number of blocks in each stack is one of this.
    """

    owner: str
    leaves: Mapping[str, tuple[int, ...]]
    stacks: Mapping[str, Sequence[Member]]
    owned: Mapping[str, Sequence[Box]]
    names: Sequence[str]
    multiple: int = 1

    def filled(self, label: str) -> int:
        """Number of blocks in a stack that belong to a layer; those behind them fill it up."""
        return sum(m.layer.blocks for m in self.stacks[label])

    def count(self, label: str) -> int:
        """Number of blocks in a stack."""
        return -(-self.filled(label) // self.multiple) * self.multiple

    def stacked(self, label: str, parts: Sequence[Array]) -> Array:
        """What there is of each layer of a stack, [B, ...], with zeros behind the last."""
        padding = self.count(label) - self.filled(label)
        rest = [jnp.zeros((padding, *parts[0].shape[1:]), parts[0].dtype)] if padding else []
        return jnp.concatenate([*parts, *rest])

    @property
    def members(self) -> list[Member]:
        """The layers of all stacks, in order."""
        return [member for members in self.stacks.values() for member in members]

    def slices(self, label: str) -> list[tuple[Member, slice]]:
        """The layers of a stack, and where the blocks of each are along its first axis."""
        stops = np.cumsum([m.layer.blocks for m in self.stacks[label]]).tolist()
        starts = [0, *stops[:-1]]
        return list(zip(self.stacks[label], map(slice, starts, stops), strict=True))

    def _parts(self, stacks: Mapping[str, Array]) -> list[tuple[Member, Array]]:
        """The layers, and the blocks of each."""
        counts = {label: [m.layer.blocks for m in of] for label, of in self.stacks.items()}
        found = parts(stacks, counts)
        return [pair for k, of in self.stacks.items() for pair in zip(of, found[k], strict=True)]

    @property
    def uncovered(self) -> list[str]:
        """Paths of the parameters that belong to no layer, or only in part."""
        return [
            path
            for path, shape in self.leaves.items()
            if path not in self.owned or sum(map(_volume, self.owned[path])) < np.prod(shape)
        ]

    def without_owned(self, path: str, leaf: Array) -> Array:
        """The leaf with zeros where it belongs to a layer."""
        for box in self.owned.get(path, ()):
            leaf = leaf.at[tuple(slice(*span) for span in box)].set(0)
        return leaf

    def scales_differ(self, blocks: Mapping[str, Array], taps: Taps) -> Bool[Array, ""]:
        """Whether gradients are far from the scale of those that taps were made beside.

        Args:
          blocks: Gradients, as `take` returns them.
          taps: Taps of all layers. By hand they need not know, and are not judged.
        """
        pairs: list[tuple[Array, Array]] = []
        for m, part in self._parts(blocks):
            norm = taps.gradient_norms.get(m.layer.name)
            if norm is not None and m.is_whole:
                given = magnitude(part)
                pairs.append((given, jnp.asarray(norm).astype(given.dtype)))
        if not pairs:
            return jnp.zeros([], bool)
        now, then = (sum(x[1:], x[0]) for x in zip(*pairs, strict=True))
        # Gradients that vanish, or are not finite, are a matter of their own.
        judged = (now > 0) & jnp.isfinite(now) & (then > 0) & jnp.isfinite(then)
        return judged & ((now / MOST_APART > then) | (then / MOST_APART > now))

    def take(
        self, leaves: Mapping[str, Array], dtype: DTypeLike
    ) -> dict[str, Float[Array, "N d_in d_out"]]:
        """Stacks of a tree like the parameters, given by path."""
        cast = {path: leaves[path].astype(dtype) for path in self.owned}
        return {
            label: self.stacked(label, [m.layer.take(cast) for m in members])
            for label, members in self.stacks.items()
        }

    def put(
        self, leaves: dict[str, Array], stacks: Mapping[str, Float[Array, "N d_in d_out"]]
    ) -> None:
        """Replace what belongs to layers; the inverse of `take`, in place of the mapping."""
        for m, part in self._parts(stacks):
            m.layer.put(leaves, part)

    def read_taps(self, taps: Mapping[str, Tap | Moments | Iterable[Tap | Moments]] | None) -> Taps:
        """Taps of all layers, in canonical form.

        Raises:
          ValueError: If they are missing, or do not fit the layers.
        """
        if not self.stacks:
            return Taps({})
        if not isinstance(taps, Mapping):
            raise ValueError(
                f"{self.owner}: update needs taps at every step, a mapping from the names of "
                f"layers to what they saw; got {taps!r:.100}. Pass the taps of "
                "ok.value_and_grad_with_taps(loss_fn, layers)(params, *args) to tx.update(grads, "
                "state, params, taps=taps), or by hand ok.Taps({name: ok.Tap(inputs, "
                "output_grads)})."
            )
        missing = [m.layer.name for m in self.members if m.layer.name not in taps]
        unknown = [name for name in taps if name not in self.names]
        if missing or unknown:
            raise ValueError(
                f"{self.owner}: the taps do not match the layers: missing: {missing}; belonging "
                f"to no layer: {unknown}. Expected taps of {list(self.names)}; make them with the "
                "same layers, ok.value_and_grad_with_taps(loss_fn, layers)."
            )
        norms = getattr(taps, "gradient_norms", {})
        groups = {m.layer.name: taps[m.layer.name] for m in self.members}
        canonical = Taps(groups, gradient_norms=norms)
        for m in self.members:
            if not canonical[m.layer.name]:
                raise ValueError(f"{self.owner}: the taps of layer {m.layer.name!r} are empty.")
            for tap in canonical[m.layer.name]:
                self._check_tap(m, tap)
        return canonical

    def _check_tap(self, member: Member, tap: Tap | Moments) -> None:
        member = member.seen_as(tap)
        layer = member.uncut
        where = f"{self.owner}: layer {layer.name!r} ({', '.join(layer.paths)})"
        if isinstance(tap, Moments):
            self._check_moments(member, tap, where)
            return
        inputs, grads, _ = tap
        blocks, *_, width = inputs.shape
        problem = ""
        if blocks != layer.blocks:
            problem = (
                f"{blocks} blocks, in inputs of shape {inputs.shape}; expected {layer.blocks}."
            )
        elif layer.is_embedding and not jnp.issubdtype(inputs.dtype, jnp.integer):
            problem = (
                f"inputs of an embedding with dtype {inputs.dtype}; expected integer indices "
                "[B, N, S, 1]."
            )
        elif member.width is not None and width != member.width:
            problem = f"inputs of width {width}; expected {member.width}."
            if layer.bias is not None:
                problem += " The bias needs a column of ones, the last one of the inputs."
            elif layer.is_embedding:
                problem += " Inputs of an embedding are indices, not one-hot vectors."
        elif grads.shape[-1] != layer.d_out:
            problem = f"output_grads of width {grads.shape[-1]}; expected {layer.d_out}."
        for name, x in (("inputs", inputs), ("output_grads", grads)):
            if not problem and jnp.iscomplexobj(x):
                problem = f"{name} of dtype {x.dtype}; expected real."
        if problem:
            raise ValueError(f"{where}: the taps have {problem}")

    def _check_moments(self, member: Member, moments: Moments, where: str) -> None:
        layer = member.uncut
        width = layer.table_rows or member.width
        got = jnp.shape(moments.input_factor), jnp.shape(moments.output_factor)
        expected = (
            factor_shape(layer.blocks, width or 0, member.wide_input),
            factor_shape(layer.blocks, layer.d_out, layer.has_diagonal_output),
        )
        if got[1] != expected[1] or (width is not None and got[0] != expected[0]):
            remedy = ""
            if [len(shape) for shape in got] != [len(shape) for shape in expected]:
                remedy = (
                    f" An axis longer than {layer.max_size}, the layer's max_size, has a diagonal "
                    "factor [B, d]: make the taps with the layers that are used here."
                )
            raise ValueError(
                f"{where}: the taps are second moments of shapes {got}; expected {expected}."
                f"{remedy}"
            )


def check_layers(owner: str, layers: object) -> tuple[Layer, ...]:
    """The layers as a tuple.

    Raises:
      ValueError: If they are not layers, or two have one name.
    """
    if not isinstance(layers, Iterable) or isinstance(layers, str | Mapping):
        raise ValueError(
            f"{owner}: layers must be a sequence of ok.Layer, as ok.find_layers returns; got "
            f"{layers!r}."
        )
    checked: list[Layer] = []
    for layer in layers:
        if not isinstance(layer, Layer):
            raise ValueError(f"{owner}: layers must hold nothing but ok.Layer; got {layer!r}.")
        checked.append(layer)
    names = [layer.name for layer in checked]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{owner}: layers must have names of their own; {twice} occur twice.")
    return tuple(checked)


def plan_layers(
    owner: str,
    layers: Sequence[Layer],
    tree: PyTree,
    multiple: int = 1,
    block_size: int | None = None,
) -> LayerPlan:
    """Plan how layers own the parameters of a tree.

    Parameters that a wrapper such as `optax.masked` hides (`None`, masked nodes) are left out of
    their layers: the block of the others is a part of the layer's block. A layer without any other
    is left out.

    Args:
      owner: Name of the optimizer, for messages.
      layers: Layers with names of their own.
      tree: Arrays or `jax.ShapeDtypeStruct`s.
      multiple: Of what the number of blocks in each stack is to be a multiple, so that so many
        devices can share them; blocks of zeros fill it up.
      block_size: Longest run of an axis with a diagonal factor that is one block; `None`: any.

    Raises:
      ValueError: For a parameter that is not floating-point or complex, for layers that do not
        match the parameters, and for a parameter that belongs to two layers.
    """
    leaves = by_path(tree)
    for path, leaf in leaves.items():
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise ValueError(
                f"{owner}: parameter {path or 'at the root'} has dtype {jnp.result_type(leaf)}; "
                "expected floating-point or complex. Leave it out, with optax.masked or "
                "optax.partition."
            )
    stacks: dict[str, list[Member]] = {}
    owned: dict[str, list[tuple[Box, str]]] = {}
    hidden = _hidden_paths(tree)
    for layer in layers if leaves else ():
        member = _visible(layer, leaves, hidden)
        if member is None:
            continue
        cut, how = cut_layer(owner, member.uncut, block_size)
        member = dataclasses.replace(member, layer=cut, cut=how)
        layer = member.layer
        for path, view in layer.views:
            if jnp.iscomplexobj(leaves[path]):
                raise ValueError(
                    f"{owner}: layer {layer.name!r}: parameter {path} is complex; only real "
                    "parameters have Kronecker factors. Leave the layer out, and the parameter "
                    "goes through fallback."
                )
            for box, other in owned.get(path, ()):
                if _overlap(box, view.part):
                    raise ValueError(
                        f"{owner}: parameter {path} belongs to two layers, {other!r} and "
                        f"{layer.name!r}; leave it out of one of them."
                    )
            owned.setdefault(path, []).append((view.part, layer.name))
        stacks.setdefault(_label(layer), []).append(member)
    return LayerPlan(
        owner=owner,
        leaves={path: tuple(jnp.shape(leaf)) for path, leaf in leaves.items()},
        stacks=stacks,
        owned={path: [box for box, _ in boxes] for path, boxes in owned.items()},
        names=[layer.name for layer in layers],
        multiple=multiple,
    )


def _label(layer: Layer) -> str:
    """The signature of a layer's factors: "64x10", or "1000diagx64" for a diagonal one."""
    sides = (layer.d_in, layer.has_diagonal_input), (layer.d_out, layer.has_diagonal_output)
    return "x".join(f"{size}{'diag' if diagonal else ''}" for size, diagonal in sides)


def factor_shape(count: int, size: int, diagonal: bool) -> tuple[int, ...]:
    """Shape of a stack of dense or diagonal factors."""
    return (count, size) if diagonal else (count, size, size)


def _hidden_paths(tree: PyTree) -> list[str]:
    """Paths of what a wrapper has taken out of a tree: leaves, or whole subtrees."""

    def is_hidden(x: object) -> bool:
        return x is None or isinstance(x, optax.MaskedNode)

    leaves = jax.tree.leaves(tree, is_leaf=is_hidden)
    return [path for path, x in zip(paths_of(tree, is_hidden), leaves, strict=True) if is_hidden(x)]


def _is_hidden(path: str, leaves: Mapping[str, Leaf], hidden: Sequence[str]) -> bool:
    """Whether a parameter, or a subtree that holds it, is hidden."""
    forms = spellings(path)
    if any(form in leaves for form in forms):
        return False
    return any(form == other or form.startswith(other + "/") for form in forms for other in hidden)


def _visible(layer: Layer, leaves: Mapping[str, Leaf], hidden: Sequence[str]) -> Member | None:
    """The layer's part that is not hidden; `None` if there is none, or nothing in it."""
    kernel, bias = (
        None if path is None or _is_hidden(path, leaves, hidden) else path
        for path in (layer.kernel, layer.bias)
    )
    if kernel is None and bias is None:
        return None
    visible = dataclasses.replace(
        layer,
        kernel=kernel,
        kernel_view=None if kernel is None else layer.kernel_view,
        bias=bias,
        bias_view=None if bias is None else layer.bias_view,
    ).resolved(leaves)
    if 0 in (visible.blocks, visible.d_in, visible.d_out):
        return None
    columns, width, wide_input = slice(None), visible.d_in, visible.has_diagonal_input
    if layer.is_embedding:
        width = 1
    elif layer.kernel is not None and kernel is None:
        # The bias's column is the last. How wide the others are is known if the kernel was found.
        rows = None if layer.kernel_view is None else layer.kernel_view.arranged_shape[1]
        columns, width = slice(-1, None), None if rows is None else rows + 1
        wide_input = rows is not None and rows > layer.max_size
    elif layer.bias is not None and bias is None:
        columns, width = slice(0, -1), visible.d_in + 1
    return Member(visible, visible, Cut(), columns, width, wide_input)


def _volume(box: Box) -> int:
    return int(np.prod([stop - start for start, stop in box]))


def _overlap(box: Box, other: Box) -> bool:
    return all(a < d and c < b for (a, b), (c, d) in zip(box, other, strict=True))
