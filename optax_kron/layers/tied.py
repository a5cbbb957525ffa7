"""Tied embeddings: a table [V, D] that is read by lookups, and is the head of the model as well.

Its taps are those of two uses. Lookups have indices for inputs, and output-gradients over the
width D. The head has inputs over D, and output-gradients over the V rows. Each use has a curvature
that is diagonal over the rows,

    lookups    diag(a_1) ⊗ S_1    a_1 [V] how often rows are read, S_1 [D, D] of output-gradients
    head       diag(a_2) ⊗ S_2    a_2 [V] squares of output-gradients, S_2 [D, D] of inputs

and the layer's block is the product `diag(u) ⊗ M` that is nearest to their sum.
"""

# Worked example: a table [1000, 64], of 7 examples at 5 positions, with fisher="mc".
#
#   lookups    inputs [1, 7, 5, 1]     output_grads [1, 1, 7, 5, 64]
#   head       inputs [1, 7, 5, 64]    output_grads [1, 1, 7, 5, 1000]
#   block      u [1, 1000], of sum one, and M [1, 64, 64]
#
# What it leaves out, besides what K-FAC does of each use: products of what one use and what the
# other gives to one example; for the head all between two rows, as a softmax has; and of the sum
# of the two products its second singular value.

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from optax_kron.kernels import tied
from optax_kron.layers.layer import Layer, declared
from optax_kron.layers.taps import Moments, Tap


def head_of(layer: Layer) -> Layer:
    """A tied layer as its use as a head: inputs over the width, outputs over the rows."""
    assert layer.kernel_view is not None, "views are set by `resolved`"
    blocks, rows, width = layer.kernel_view.roles
    return declared(
        layer,
        (layer.has_diagonal_output, True),
        kernel_view=dataclasses.replace(layer.kernel_view, roles=(blocks, width, rows)),
        is_embedding=False,
        is_tied=False,
    )


def is_of_head(layer: Layer, tap: Tap | Moments) -> bool:
    """Whether a tap of a tied layer is one of its use as a head."""
    if isinstance(tap, Tap):
        return not jnp.issubdtype(tap.inputs.dtype, jnp.integer)
    return jnp.shape(tap.input_factor)[1:] != (layer.d_in,)


def seen_as(layer: Layer, tap: Tap | Moments) -> Layer:
    """The layer as one of its taps sees it."""
    return head_of(layer) if layer.is_tied and is_of_head(layer, tap) else layer


def by_use(layer: Layer, taps: Sequence[Tap | Moments]) -> list[list[Tap | Moments]]:
    """The taps of lookups, and those of the head; all together of a layer that is not tied."""
    if not layer.is_tied:
        return [list(taps)]
    uses: list[list[Tap | Moments]] = [[], []]
    for tap in taps:
        uses[is_of_head(layer, tap)].append(tap)
    return [taps for taps in uses if taps]


def nearest(layer: Layer, uses: Sequence[Moments]) -> Moments:
    """The second moments of a tied layer, from those of its uses.

    Its input factor u is of sum one if there are both uses, as frequencies of rows are.
    """
    laid_out = [
        m._replace(input_factor=m.output_factor, output_factor=m.input_factor)
        if is_of_head(layer, m)
        else m
        for m in uses
    ]
    if len(laid_out) == 1:
        return laid_out[0]
    first, second = laid_out
    u, M = tied.nearest_product(first[:2], second[:2])
    # Both uses see the examples of one loss.
    return Moments(u, M, jnp.maximum(first.weight, second.weight))
