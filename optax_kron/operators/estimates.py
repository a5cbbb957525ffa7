"""Curvature of a loss as an operator on its parameters, from what its layers saw."""

# Worked example: a dense layer, kernel [3, 2], and two batches of 20 and 10 examples at S = 1, with
# fisher="exact", of V = 2 columns.
#
#   kfac    A [1, 3, 3] and G [1, 2, 2] of each batch, averaged with 20/30 and 10/30
#   ekfac   reads the batches once for the bases of A and G, and again for λ [1, 3, 2] in them
#   kfoc    keeps both batches: inputs [1, 30, 1, 3], output_grads [2, 1, 30, 1, 2], and finds by
#           power iteration the A and G whose product is nearest to Σ vec(M) vec(M)ᵀ / 30
#
# The curvature itself is [6, 6]; none of them forms it.

import functools
import math
import numbers
import operator
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from optax_kron.kernels import contract, explicit, linalg
from optax_kron.kernels import kfac as kfac_kernels
from optax_kron.kernels import kfoc as kfoc_kernels
from optax_kron.layers.layer import Layer
from optax_kron.layers.moments import (
    combined,
    masked_inputs,
    moments_of_blocks,
    moments_of_uses,
)
from optax_kron.layers.plan import Member
from optax_kron.layers.spectra import eigenvalues_of_member
from optax_kron.layers.taps import Moments, Tap
from optax_kron.operators.batches import Batches, Groups, Source
from optax_kron.operators.blocks import Stacked
from optax_kron.operators.curvature import Layerwise, layerwise
from optax_kron.operators.damping import check_number
from optax_kron.operators.products import Eigen, Kronecker
from optax_kron.types import PyTree

Case = tuple[Shaped[Array, "B N S d_in"], Float[Array, "V B N S d_out"]]


def kfac(
    taps: Source,
    layers: Iterable[Layer],
    *,
    approx: str = "expand",
    params: PyTree | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Layerwise:
    """K-FAC's approximation of the curvature: `A ⊗ G` for each layer, zero on all else.

    Args:
      taps: What the layers saw, as `ok.value_and_grad_with_taps` returns, with any estimate of the
        Fisher information; also second moments. For several batches: an iterable of taps, or a
        function of no arguments that returns one. Each batch counts by its number of examples, as
        losses that are means over their batch do; give pairs `(weight, taps)` for anything else,
        such as 1.0 for losses that are sums, or the batch's share of the examples.
      layers: The layers that the taps were made with.
      approx: "expand" or "reduce", as in `ok.kfac`.
      params: The parameters, or abstract ones: for layers made by hand, and for some of those that
        were found, which alone do not know of the others' parameters.
      precision: Precision of the matrix products.

    Returns:
      An operator on pytrees like the parameters. Memory: d_in² + d_out² for each layer; factors of
      axes longer than the layer's `max_size` are diagonal, of d numbers. Making it
      takes 2·N·S·(d_in² + V·d_out²) operations. Its inverse for rule="exact" divides by all
      `λ_A·λ_G + δ`.

    Raises:
      ValueError: For taps that do not fit the layers.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> def loss_fn(params, x, y):
      ...     return jnp.mean(ok.losses.l2_loss(x @ params["w"], y))
      >>> params, x, y = {"w": jnp.ones((3, 2))}, jnp.eye(4, 3), jnp.zeros((4, 2))
      >>> layers = ok.find_layers(loss_fn, params, x, y)
      >>> fn = ok.value_and_grad_with_taps(loss_fn, layers, fisher="exact")
      >>> loss, grads, taps = fn(params, x, y)
      >>> curvature = ok.operators.kfac(taps, layers)
      >>> newton = curvature.inverse(damping=1e-3) @ grads

    Sources: Martens and Grosse (2015), arXiv:1503.05671; Eschenhagen et al. (2023),
    arXiv:2311.00636.
    """
    owner = "operators.kfac"
    _check_approx(owner, approx)
    batches = Batches(owner, taps, layers, params)
    blocks = {
        name: Stacked(Kronecker((m.input_factor, m.output_factor)))
        for name, m in _moments(batches, approx, precision).items()
    }
    return layerwise(batches.plan, batches.structure, blocks)


def ekfac(
    taps: Source,
    layers: Iterable[Layer],
    *,
    approx: str = "expand",
    params: PyTree | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Layerwise:
    """EKFAC's approximation of the curvature: its own diagonal in the eigenbasis of K-FAC.

    Of all operators that are diagonal in that basis none is nearer to a layer's curvature in
    Frobenius norm, and the trace is exact. The eigenvalues take the gradient of each example,
    summed over positions before it is squared. Factors are gathered first and eigenvalues then, in
    the fixed basis: batches are read twice, and how the examples are cut into them makes no
    difference.

    Args:
      taps: As in `kfac`, but no second moments; batches must come in an iterable that can be read
        twice, such as a list, or as a function. If they are drawn at random ("mc"), both readings
        should draw the same.
      layers: The layers that the taps were made with.
      approx: Approximation of the factors whose eigenbases are taken, as in `kfac`.
      params: As in `kfac`.
      precision: Precision of the matrix products.

    Returns:
      An operator as of `kfac`; rule="exact" alone. Memory: d_in² + d_out² + d_in·d_out for each
      layer. Making it takes as much as `kfac`, 9·(d_in³ + d_out³) operations for the bases, and
      those of `kernels.ekfac.eigenvalues`.

    Raises:
      ValueError: As `kfac`, for second moments, and for an iterator that can be read but once.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> layers = [ok.Layer("dense", kernel="w")]
      >>> taps = ok.Taps({"dense": ok.Tap(jnp.eye(4, 3), jnp.ones((4, 2)))})
      >>> curvature = ok.operators.ekfac(taps, layers)
      >>> round(float(curvature.trace()), 3)
      1.5

    Source: George et al. (2018), arXiv:1806.03884.
    """
    owner = "operators.ekfac"
    _check_approx(owner, approx)
    batches = Batches(owner, taps, layers, params, times=2)
    bases = {}
    for name, moments in _moments(batches, approx, precision).items():
        factors = contract.widen(moments.input_factor), contract.widen(moments.output_factor)
        bases[name] = [
            None if x.ndim == 2 else linalg.map_blocks(lambda y: kfac_kernels.eigenbasis(y)[0], x)
            for x in factors
        ]

    def eigenvalues(member: Member, taps: Groups) -> Float[Array, "B d_in d_out"]:
        dtype = _dtype(taps)
        make = functools.partial(
            eigenvalues_of_member, owner, member, dtype=dtype, precision=precision
        )
        return explicit.untyped(make, taps, *bases[member.layer.name])

    values = batches.sums(eigenvalues, lambda x, share: x * share, jnp.add)
    blocks = {name: Stacked(Eigen(tuple(bases[name]), values[name])) for name in bases}
    return layerwise(batches.plan, batches.structure, blocks)


def kfoc(
    taps: Source,
    layers: Iterable[Layer],
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 200,
    params: PyTree | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Layerwise:
    """The Kronecker product for each layer that is nearest to its curvature in Frobenius norm.

    It is the top singular pair of the curvature's rearrangement, by power iteration over the
    examples: neither is ever formed. Never farther from the curvature than K-FAC, "expand" or
    "reduce".

    Args:
      taps: As in `kfac`, but no second moments. All batches are in memory at once.
      layers: The layers that the taps were made with.
      tolerance: The iteration ends when the norm changes by less, relatively.
      max_iterations: The iteration ends after so many at the latest.
      params: As in `kfac`.
      precision: Precision of the matrix products.

    Returns:
      An operator as of `kfac`. Where a layer's factor is diagonal, as an embedding's input factor
      and those of wide axes are, it is the nearest among those.
      Making it takes, in each iteration and for each layer, the operations of
      `kernels.kfoc.factors`.

    Raises:
      ValueError: As `kfac`, for second moments, and for settings out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> layers = [ok.Layer("dense", kernel="w")]
      >>> taps = ok.Taps({"dense": ok.Tap(jnp.eye(4, 3), jnp.ones((4, 2)))})
      >>> ok.operators.kfoc(taps, layers).size
      6

    Sources: Van Loan and Pitsianis (1993); Schnaus, Lee and Triebel (2021), Kronecker-factored
    optimal curvature.
    """
    owner = "operators.kfoc"
    check_number(f"{owner}: tolerance", tolerance)
    if not isinstance(max_iterations, numbers.Integral) or max_iterations < 1:
        raise ValueError(f"{owner}: max_iterations must be an int ≥ 1; got {max_iterations!r}.")
    batches = Batches(owner, taps, layers, params)
    for member in batches.plan.members:
        if member.layer.is_tied:
            raise ValueError(
                f"{owner}: layer {member.layer.name!r} is a tied embedding, whose two uses no "
                "power iteration over examples takes together; operators.kfac has the nearest "
                "product to the sum of both. Leave the layer out."
            )

    def cases(member: Member, taps: Groups) -> list[Case]:
        return [explicit.untyped(functools.partial(_case, owner, member), tap) for tap in taps]

    def scaled(cases: list[Case], share: ArrayLike) -> list[Case]:
        # The curvature is quadratic in the gradients.
        return [(x, g * jnp.sqrt(share).astype(g.dtype)) for x, g in cases]

    seen = batches.sums(cases, scaled, operator.add)
    blocks = {}
    for member in batches.plan.members:
        layer = member.layer
        solve = functools.partial(
            kfoc_kernels.factors,
            length=layer.table_rows,
            diagonal=(layer.has_diagonal_input, layer.has_diagonal_output),
            tolerance=tolerance,
            max_iterations=max_iterations,
            precision=precision,
        )
        # Of an embedding an index beyond the table counts for nothing.
        inputs, grads = _joined(seen[layer.name], absent=layer.table_rows or 0)
        factors = linalg.map_blocks(solve, inputs, jnp.moveaxis(grads, 1, 0))
        blocks[layer.name] = Stacked(Kronecker(factors))
    return layerwise(batches.plan, batches.structure, blocks)


def _check_approx(owner: str, approx: str) -> None:
    if approx not in kfac_kernels.APPROXIMATIONS:
        choices = ", ".join(kfac_kernels.APPROXIMATIONS)
        raise ValueError(f"{owner}: approx must be one of {choices}; got {approx!r}.")


def _dtype(taps: Groups) -> jnp.dtype:
    """Dtype of the arithmetic on the taps of a layer."""
    kinds = [x.dtype for x in jax.tree.leaves(taps) if jnp.issubdtype(x.dtype, jnp.floating)]
    return contract.wide_dtype(jnp.result_type(*kinds))


def _moments(batches: Batches, approx: str, precision: contract.Precision) -> dict[str, Moments]:
    """Second moments of every layer, of all batches."""

    def of(member: Member, taps: Groups) -> list[Moments]:
        settings = {"approx": approx, "dtype": _dtype(taps), "precision": precision}
        make = functools.partial(moments_of_uses, batches.owner, member, **settings)
        uses = explicit.untyped(make, taps)
        if all(isinstance(tap, Tap) and tap.weights is None for tap in taps):
            # By hand, they are a mean over their examples, as the weights of a mean loss add up to
            # one: so that batches count by their share alone.
            uses = [m._replace(weight=jnp.ones_like(m.weight)) for m in uses]
        return list(uses)

    def scaled(uses: list[Moments], share: ArrayLike) -> list[Moments]:
        # The input factor is a mean by weights, and the output factor a sum.
        return [
            m._replace(output_factor=share * m.output_factor, weight=share * m.weight) for m in uses
        ]

    def add(uses: list[Moments], more: list[Moments]) -> list[Moments]:
        return [combined(pair) for pair in zip(uses, more, strict=True)]

    sums = batches.sums(of, scaled, add)
    members = {m.layer.name: m for m in batches.plan.members}
    return {name: moments_of_blocks(members[name], uses) for name, uses in sums.items()}


def _case(owner: str, member: Member, tap: Tap | Moments) -> Case:
    """Inputs and gradients whose curvatures are to be added."""
    if isinstance(tap, Moments) or tap.output_grads.shape[0] == 0:
        reason = "are second moments; make them with reduce=False"
        if isinstance(tap, Tap):
            reason = 'have no columns, as of fisher="forward"; operators.kfac is the nearest then'
        raise ValueError(
            f"{owner}: the nearest Kronecker product needs what each example gave, but the taps of "
            f"layer {member.layer.name!r} {reason}."
        )
    inputs, grads, _ = masked_inputs(member, tap)
    dtype = _dtype([tap])
    inputs = inputs if member.layer.is_embedding else inputs.astype(dtype)
    return inputs, grads.astype(dtype) / math.sqrt(inputs.shape[1])


def _joined(cases: Sequence[Case], absent: int) -> Case:
    """All cases as examples of one batch, whose curvature is a mean.

    Of [2, 1, 20, 5, d] and [3, 1, 10, 1, d] gradients it makes [3, 1, 30, 5, d], with zeros.

    Args:
      cases: What `_case` returns for each group of each batch.
      absent: The input of positions that are filled in.
    """
    columns = max(g.shape[0] for _, g in cases)
    positions = max(g.shape[3] for _, g in cases)
    inputs, grads = [], []
    for x, g in cases:
        v, s = columns - g.shape[0], positions - g.shape[3]
        inputs.append(jnp.pad(x, ((0, 0), (0, 0), (0, s), (0, 0)), constant_values=absent))
        grads.append(jnp.pad(g, ((0, v), (0, 0), (0, 0), (0, s), (0, 0))))
    together = jnp.concatenate(grads, axis=2)
    # `_case` divides by each batch's number of examples; the mean divides by that of all.
    return jnp.concatenate(inputs, axis=1), together * math.sqrt(together.shape[2])
