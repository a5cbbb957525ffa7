"""Layers of a tree of parameters: which parts they own, what is left over, and their taps."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import DTypeLike

from optax_kron.layers.layer import Layer
from optax_kron.layers.paths import by_path, paths_of, spellings
from optax_kron.layers.taps import Moments, Tap, Taps, magnitude

PyTree = Any
# Clipping, averages over batches and the like change a gradient's scale by less, the usual loss
# scales by more.
MOST_APART = 128.0
Box = tuple[tuple[int, int], ...]  # for each axis of a parameter, a range of indices


@dataclasses.dataclass(frozen=True)
class Member:
    """A layer in a stack.

    Attributes:
      layer: with views, without the parameters that are hidden from the optimizer.
      columns: of the inputs in its taps, those that belong to the parameters which are there.
      width: number of columns that its taps must have; `None` if not known.
      wide_input: whether second moments of its inputs are diagonal, as of all of the layer.
    """

    layer: Layer
    columns: slice
    width: int | None
    wide_input: bool

    @property
    def is_whole(self) -> bool:
        """Whether none of its parameters is hidden."""
        return self.columns == slice(None)


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """How layers share stacks, and own the parameters of a tree.

    Attributes:
      owner: name of the optimizer, for messages.
      leaves: shapes of all parameters by path.
      stacks: layers by the label of their signature, in order.
      owned: parts of parameters that belong to layers, by path.
      names: of all layers, hidden ones too.
    """

    owner: str
    leaves: Mapping[str, tuple[int, ...]]
    stacks: Mapping[str, Sequence[Member]]
    owned: Mapping[str, Sequence[Box]]
    names: Sequence[str]

    def count(self, label: str) -> int:
        """Number of blocks in a stack."""
        return sum(m.layer.blocks for m in self.stacks[label])

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

    def scales_differ(self, blocks: Mapping[str, Array], taps: Taps) -> Array:
        """Whether gradients are far from the scale of those that taps were made beside, bool [].

        Args:
          blocks: gradients, as `take` returns them.
          taps: of all layers. By hand they need not know, and are not judged.
        """
        given: list[Array] = []
        known: list[Array] = []
        for label, members in self.stacks.items():
            start = 0
            for m in members:
                norm = taps.gradient_norms.get(m.layer.name)
                if norm is not None and m.is_whole:
                    given.append(magnitude(blocks[label][start : start + m.layer.blocks]))
                    known.append(jnp.asarray(norm).astype(given[-1].dtype))
                start += m.layer.blocks
        if not given:
            return jnp.zeros([], bool)
        own, others = (sum(x[1:], x[0]) for x in (given, known))
        # Gradients that vanish, or are not finite, are a matter of their own.
        judged = (own > 0) & jnp.isfinite(own) & (others > 0) & jnp.isfinite(others)
        return judged & ((own / MOST_APART > others) | (others / MOST_APART > own))

    def take(self, leaves: Mapping[str, Array], dtype: DTypeLike) -> dict[str, Array]:
        """Stacks [N, d_in, d_out] of a tree like the parameters, given by path."""
        cast = {path: leaves[path].astype(dtype) for path in self.owned}
        return {
            label: jnp.concatenate([m.layer.take(cast) for m in members])
            for label, members in self.stacks.items()
        }

    def put(self, leaves: dict[str, Array], stacks: Mapping[str, Array]) -> None:
        """Replace what belongs to layers; the inverse of `take`, in place of the mapping."""
        for label, members in self.stacks.items():
            start = 0
            for m in members:
                m.layer.put(leaves, stacks[label][start : start + m.layer.blocks])
                start += m.layer.blocks

    def read_taps(self, taps: Mapping[str, Tap | Iterable[Tap]] | None) -> Taps:
        """Taps of all layers, in canonical form.

        Raises:
          ValueError: if they are missing, or do not fit the layers.
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
        members = [m for group in self.stacks.values() for m in group]
        missing = [m.layer.name for m in members if m.layer.name not in taps]
        unknown = [name for name in taps if name not in self.names]
        if missing or unknown:
            raise ValueError(
                f"{self.owner}: the taps do not match the layers: missing: {missing}; belonging "
                f"to no layer: {unknown}. Expected taps of {list(self.names)}; make them with the "
                "same layers, ok.value_and_grad_with_taps(loss_fn, layers)."
            )
        norms = getattr(taps, "gradient_norms", {})
        found = Taps({m.layer.name: taps[m.layer.name] for m in members}, gradient_norms=norms)
        for m in members:
            if not found[m.layer.name]:
                raise ValueError(f"{self.owner}: the taps of layer {m.layer.name!r} are empty.")
            for tap in found[m.layer.name]:
                self._check_tap(m, tap)
        return found

    def _check_tap(self, member: Member, tap: Tap | Moments) -> None:
        layer = member.layer
        where = f"{self.owner}: layer {layer.name!r} ({', '.join(layer.paths)})"
        if isinstance(tap, Moments):
            self._check_moments(member, tap, where)
            return
        blocks, *_, width = tap.inputs.shape
        if blocks != layer.blocks:
            raise ValueError(
                f"{where}: the taps have {blocks} blocks, in inputs of shape {tap.inputs.shape}; "
                f"expected {layer.blocks}."
            )
        if layer.is_embedding and not jnp.issubdtype(tap.inputs.dtype, jnp.integer):
            raise ValueError(
                f"{where} is an embedding: its taps have inputs of dtype {tap.inputs.dtype}; "
                "expected integer indices [B, N, S, 1]."
            )
        if member.width is not None and width != member.width:
            remedy = ""
            if layer.bias is not None:
                remedy = " The bias needs a column of ones, the last one of the inputs."
            elif layer.is_embedding:
                remedy = " Inputs of an embedding are indices, not one-hot vectors."
            raise ValueError(
                f"{where}: the taps have inputs of width {width}; expected {member.width}.{remedy}"
            )
        if tap.output_grads.shape[-1] != layer.d_out:
            raise ValueError(
                f"{where}: the taps have output_grads of width {tap.output_grads.shape[-1]}; "
                f"expected {layer.d_out}."
            )
        for name, x in (("inputs", tap.inputs), ("output_grads", tap.output_grads)):
            if jnp.iscomplexobj(x):
                raise ValueError(
                    f"{where}: the taps have {name} of dtype {x.dtype}; expected real."
                )

    def _check_moments(self, member: Member, moments: Moments, where: str) -> None:
        layer = member.layer
        width = layer.d_in if layer.is_embedding else member.width
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


def check_layers(owner: str, layers: Any) -> tuple[Layer, ...]:
    """The layers as a tuple.

    Raises:
      ValueError: if they are not layers, or two have one name.
    """
    if not isinstance(layers, Iterable) or isinstance(layers, str | Mapping):
        raise ValueError(
            f"{owner}: layers must be a sequence of ok.Layer, as ok.find_layers returns; got "
            f"{layers!r}."
        )
    layers = tuple(layers)
    for layer in layers:
        if not isinstance(layer, Layer):
            raise ValueError(f"{owner}: layers must hold nothing but ok.Layer; got {layer!r}.")
    names = [layer.name for layer in layers]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{owner}: layers must have names of their own; {twice} occur twice.")
    return layers


def plan_layers(owner: str, layers: Sequence[Layer], tree: PyTree) -> LayerPlan:
    """Plan how layers own the parameters of a tree.

    Parameters that a wrapper such as `optax.masked` hides (`None`, masked nodes) are left out of
    their layers: the block of the others is a part of the layer's block. A layer without any other
    is left out.

    Args:
      owner: name of the optimizer, for messages.
      layers: with names of their own.
      tree: arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: for a parameter that is not floating-point or complex, for layers that do not
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
        layer = member.layer
        for path, view in ((layer.kernel, layer.kernel_view), (layer.bias, layer.bias_view)):
            if path is None or view is None:
                continue
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
    )


def _label(layer: Layer) -> str:
    sides = (layer.d_in, layer.has_diagonal_input), (layer.d_out, layer.has_diagonal_output)
    return "x".join(f"{size}{'diag' if diagonal else ''}" for size, diagonal in sides)


def factor_shape(count: int, size: int, diagonal: bool) -> tuple[int, ...]:
    """That of so many factors."""
    return (count, size) if diagonal else (count, size, size)


def _hidden_paths(tree: PyTree) -> list[str]:
    """Paths of what a wrapper has taken out of a tree: leaves, or whole subtrees."""

    def is_hidden(x):
        return x is None or isinstance(x, optax.MaskedNode)

    leaves = jax.tree.leaves(tree, is_leaf=is_hidden)
    return [path for path, x in zip(paths_of(tree, is_hidden), leaves, strict=True) if is_hidden(x)]


def _is_hidden(path: str, leaves: Mapping[str, Any], hidden: Sequence[str]) -> bool:
    """Whether a parameter, or a subtree that holds it, is hidden."""
    forms = spellings(path)
    if any(form in leaves for form in forms):
        return False
    return any(form == other or form.startswith(other + "/") for form in forms for other in hidden)


def _visible(layer: Layer, leaves: Mapping[str, Any], hidden: Sequence[str]) -> Member | None:
    """The layer's part that can be seen; `None` if there is none, or nothing in it."""
    sees_kernel = layer.kernel is not None and not _is_hidden(layer.kernel, leaves, hidden)
    sees_bias = layer.bias is not None and not _is_hidden(layer.bias, leaves, hidden)
    if not (sees_kernel or sees_bias):
        return None
    seen = dataclasses.replace(
        layer,
        kernel=layer.kernel if sees_kernel else None,
        kernel_view=layer.kernel_view if sees_kernel else None,
        bias=layer.bias if sees_bias else None,
        bias_view=layer.bias_view if sees_bias else None,
    ).resolved(leaves)
    if 0 in (seen.blocks, seen.d_in, seen.d_out):
        return None
    if layer.is_embedding:
        return Member(seen, slice(None), 1, True)
    if layer.kernel is not None and not sees_kernel:
        view = layer.kernel_view
        rows = None if view is None else view.arranged_shape[1]
        wide = rows is not None and rows > layer.max_size
        return Member(seen, slice(-1, None), None if rows is None else rows + 1, wide)
    if layer.bias is not None and not sees_bias:
        return Member(seen, slice(0, -1), seen.d_in + 1, seen.has_diagonal_input)
    return Member(seen, slice(None), seen.d_in, seen.has_diagonal_input)


def _volume(box: Box) -> int:
    return int(np.prod([stop - start for start, stop in box]))


def _overlap(box: Box, other: Box) -> bool:
    return all(a < d and c < b for (a, b), (c, d) in zip(box, other, strict=True))
