"""Eigenbases that follow their matrices by subspace iteration, of matrix products only.

One step is `Q ← qr(S Q)`, as LAPACK would make it, up to the signs of columns. The columns of S Q,
ordered by their Rayleigh quotients, are nearly orthogonal where Q nearly is an eigenbasis of S. So
they are made orthonormal by Gram–Schmidt on panels of them, and a panel by Cholesky QR. All of it
is done on rows, of `Qᴴ S`, whose panels need no copy of their columns: a panel Z [w, d] becomes

    Z ← L⁻¹ Z    with    Z Zᴴ = L Lᴴ,    and L⁻¹ as in `positive`.

In floating-point numbers that holds for rows that are well-conditioned. Where they are not, the
same is done again to what has come of it: each round takes the condition number down by a factor of
the root of the rounding error, and nearly always one or two are enough.

Accelerators are at their best in few large products of low precision. There the panels are wider,
each is projected onto all others at once, in the precision of the other products, and what that
leaves is polished: `Z ← Z − ½ (Z Zᴴ − I) Z`, with the one product in brackets exact, squares what
is missing to orthonormality.

Directions of S that are lost in rounding, or zero, are none to follow. There Q stays as it is, but
for being made orthogonal to the rest: S + μ·I, with μ of rounding, leads to Q where S has nothing,
and has the same eigenvectors. Where that is too little to tell rows apart, as of a large matrix of
equal numbers, the same is done with a larger μ.
"""

# A worked example, for stacks [9, 1024, 1024], [16, 256, 256] and [41, 200, 200]:
#
#   1024 is 8 panels of 128 rows, and 256 is two. 200 would be two of 104; to pad it to 256 takes a
#   few more operations, and one program less. So there are two: for [9, 1024, 1024], and for
#   [57, 256, 256], of which 41 go on in the directions 200 to 255 as the identity.
#
#   In each a loop goes over panels Z [N, 128, d], 8 times or twice: in a round every earlier panel
#   is projected out, Z Zᴴ [N, 128, 128] is factorised, and its rows are made orthonormal.

import collections
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Inexact, Int

from optax_kron.kernels import contract, flow, linalg, positive
from optax_kron.kernels.contract import matmul_exact

_WIDTH = 128  # of panels, at most
_ROUNDS = 8
# Squared, how much longer rows may get when they are made orthogonal: errors grow as much. The
# first bounds a round that is the last one, the other a result that may be used.
_GROWTH, _USABLE = 2.0, 64.0
# After a pivot that was not positive.
_LARGER_SHIFT = 16.0
# How often rows are made orthonormal anew, and how much larger μ is each time.
_ATTEMPTS, _LARGER = 3, 128.0
# On accelerators: the sum of squares of a row of `Z Zᴴ − I`, in units of rounding, that a polish is
# enough for, as it squares what is missing; and polishes, at most.
_POLISHED, _POLISHES = 8.0, 6
# Operations more than needed, for a smaller number of programs; and of how many matrices of what
# size they are counted for nothing, as a program takes longer to compile.
_SLACK, _FREE = 0.25, 64**3

Matrices = Inexact[Array, "N d d"]


class Followed(NamedTuple):
    """What a step of subspace iteration makes of a stack."""

    bases: Matrices  # orthonormal columns
    order: Int[Array, "N d"]  # for each column the index of the old one that it was made of
    usable: Bool[Array, " N"]  # whether the columns are orthonormal, and finite


def follow(
    bases: Sequence[Matrices],
    matrices: Sequence[Matrices],
    *,
    precision: contract.Precision = None,
    steps: int = 1,
) -> list[Followed]:
    """Steps of subspace iteration on every matrix of several stacks.

    Args:
      bases: Q, orthonormal columns but for rounding, each stack with its own N and d.
      matrices: S, Hermitian and positive semidefinite, like the bases.
      precision: Precision of the products S Q.
      steps: How many. Each takes what a column has of another, of a larger eigenvalue, down by the
        ratio of the two.

    Returns:
      What has come of each stack, the largest eigenvalues' columns first. Where S is zero the basis
      stays, but for rounding. Cost for each matrix and step: 2·d³ operations for S Q, and for each
      round about 6·d³ where d ≤ 128, 3.5·d³ at 256, 2.3·d³ at 1024; all in all a quarter more at
      most, to share programs. On accelerators a round takes 4·d³, and a polish at the end as much.

    Sources: Wang et al. (2024), arXiv:2405.18144, and Vyas et al. (2024), arXiv:2409.11321, for the
    iteration; Fukaya et al. (2020), arXiv:1809.11085, for shifted Cholesky QR in several rounds.
    """
    found: dict[int, Followed] = {}
    for members, size, panels in _programs(bases):
        lengths = [(len(bases[i]), bases[i].shape[-1]) for i in members]
        Q = _pool([bases[i] for i in members], size, 1)
        S = _pool([matrices[i] for i in members], size, 0)
        once = functools.partial(
            _step, matrices=S, lengths=lengths, panels=panels, precision=precision
        )
        rows, order, usable = _repeated(once, Q.conj().mT, steps)
        new = rows.conj().mT
        start = 0
        for i, (count, d) in zip(members, lengths, strict=True):
            own = slice(start, start + count)
            found[i] = Followed(new[own, :d, :d], order[own, :d], usable[own])
            start += count
    return [found[i] for i in range(len(bases))]


def _programs(stacks: Sequence[Matrices]) -> list[tuple[list[int], int, int]]:
    """Which stacks share a program, the size that it pads them to, and in how many panels."""
    kinds = collections.defaultdict(list)
    for i, stack in enumerate(stacks):
        panels = _panels(stack.shape[-1])
        width = positive.padded_size(-(-stack.shape[-1] // panels))
        kinds[str(stack.dtype), width * panels].append(i)

    def cost(size, members):
        return size**3 * sum(len(stacks[i]) for i in members)

    programs = linalg.joined(kinds, cost, slack=_SLACK, free=_FREE)
    return [(members, size, _panels(size)) for size, members in programs]


def _panels(size: int) -> int:
    """How many panels it takes."""
    return -(-size // _WIDTH)


def _pool(stacks: Sequence[Matrices], size: int, diagonal: int) -> Matrices:
    """All matrices of some stacks, continued to a size by multiples of the identity."""
    padded = []
    for x in stacks:
        extra = size - x.shape[-1]
        rest = np.diag(np.arange(size) >= x.shape[-1]) * diagonal
        padded.append(jnp.pad(x, ((0, 0), (0, extra), (0, extra))) + rest.astype(x.dtype)[None])
    return jnp.concatenate(padded)


def _step(rows, *, matrices, lengths, panels, precision):
    """One step: new rows Qᴴ, the indices of the rows they were made of, and whether all is well."""
    products, rows, order = _products(rows, matrices, lengths, precision)
    rows, usable, _ = _orthonormal_rows(products, rows, panels, precision)
    return rows, order, usable


def _repeated(once, rows, steps):
    """What comes of so many steps, likewise."""
    if steps == 1:
        return once(rows)

    def again(_, carry):
        rows, order, usable = carry
        rows, places, is_usable = once(rows)
        return rows, jnp.take_along_axis(order, places, axis=1), usable & is_usable

    count, size, _ = rows.shape
    order = jnp.tile(jnp.arange(size, dtype=jnp.int32), (count, 1))
    return flow.fori_loop(0, steps, again, (rows, order, jnp.ones(count, bool)))


def _products(rows, matrices, lengths, precision):
    """`Qᴴ S` in units of the largest Rayleigh quotient, and Qᴴ, ordered by them; and the order.

    Rows beyond the lengths, which are those of so many matrices each, stay behind.
    """
    products = jnp.matmul(rows, matrices, precision=precision)
    quotients = jnp.sum((rows.conj() * products).real, axis=2)
    largest = jnp.max(quotients, axis=1)
    unit = contract.safe_divisor(largest)[:, None, None]
    inside = np.arange(rows.shape[1]) < np.repeat(*np.transpose(lengths)[::-1])[:, None]
    keys = jnp.where(inside, -quotients, jnp.inf)
    order = jnp.argsort(keys, axis=1, stable=True).astype(jnp.int32)
    products, rows = (jnp.take_along_axis(x, order[:, :, None], axis=1) for x in (products, rows))
    return products / unit.astype(rows.dtype), rows, order


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _orthonormal_rows(
    products: Matrices, rows: Matrices, panels: int, precision: contract.Precision
) -> tuple[Matrices, Bool[Array, " N"], Float[Array, " N"]]:
    """Orthonormal rows, each in the span of those of `products + μ·rows` up to its own.

    Returns:
      The rows, whether they are orthonormal, and μ.
    """
    dtype = contract.real_dtype(rows.dtype)
    can_be = contract.all_finite(products, axis=(1, 2))

    def is_unfinished(carry):
        attempt, _, usable, _ = carry
        return (attempt < _ATTEMPTS) & jnp.any(can_be & ~usable)

    def once(carry):
        attempt, old, usable, least = carry
        least = jnp.where(usable, least, least * _LARGER)
        new, growth = flow.platform_dependent(
            products + contract.scaled_blocks(rows, least.astype(rows.dtype)),
            cpu=functools.partial(_exact_rows, panels=panels),
            default=functools.partial(_polished_rows, panels=panels, precision=precision),
        )
        new = jnp.where(usable[:, None, None], old, new)
        return attempt + 1, new, usable | (growth <= _USABLE), least  # of NaN it is not

    none = jnp.zeros(len(rows), bool)
    least = jnp.full(len(rows), float(jnp.finfo(dtype).eps) / _LARGER, dtype)
    start = jnp.zeros([], jnp.int32), rows, none, least
    return flow.while_loop(is_unfinished, once, start)[1:]


def _exact_rows(rows: Matrices, panels: int) -> tuple[Matrices, Float[Array, " N"]]:
    """`_orthonormal_rows` by exact products, none of which has numbers that are not needed."""
    width = rows.shape[1] // panels

    def project(Z, rows, index):
        def from_one(i, carry):
            Z, squares = carry
            Q = jax.lax.dynamic_slice_in_dim(rows, i * width, width, axis=1)
            along = matmul_exact(Z, Q.conj().mT)
            squares = squares + jnp.sum(contract.squared_magnitude(along), axis=2)
            return Z - matmul_exact(along, Q), squares

        squares = jnp.zeros(Z.shape[:2], contract.real_dtype(Z.dtype))
        return flow.fori_loop(0, index, from_one, (Z, squares))

    return _by_panels(rows, panels, project)


def _polished_rows(
    rows: Matrices, panels: int, precision: contract.Precision
) -> tuple[Matrices, Float[Array, " N"]]:
    """`_orthonormal_rows` by few products, most of them of low precision, and a polish."""
    is_real = not jnp.iscomplexobj(rows)
    panels = panels // 2 if panels % 2 == 0 and is_real else panels
    places = np.arange(rows.shape[1]) // (rows.shape[1] // panels)

    def project(Z, rows, index):
        along = _product(Z, rows.conj().mT, precision)
        along = jnp.where(places[None, None] < index, along, 0)
        squares = jnp.sum(contract.squared_magnitude(along), axis=2)
        return Z - _product(along, rows, precision), squares

    rows, growth = _by_panels(rows, panels, project)
    rows, done = _polish(rows, precision)
    return rows, jnp.where(done, growth, jnp.inf)


def _polish(rows: Matrices, precision: contract.Precision) -> tuple[Matrices, Bool[Array, " N"]]:
    """Nearly orthonormal rows made orthonormal; and whether they are."""
    identity = np.eye(rows.shape[1], dtype=bool)[None]
    dtype = contract.real_dtype(rows.dtype)
    enough = _POLISHED * float(jnp.finfo(dtype).eps)

    def is_unfinished(carry):
        done, _, error = carry
        return (done < _POLISHES) & jnp.any(error > enough)  # of NaN nothing is to be expected

    def one_polish(carry):
        done, rows, _ = carry
        # A product's sums drift where all numbers are equal.
        excess = jnp.sum(contract.squared_magnitude(rows), axis=2) - 1
        gram = matmul_exact(rows, rows.conj().mT)
        missing = jnp.where(identity, excess[..., None].astype(rows.dtype), gram)
        error = jnp.max(jnp.sum(contract.squared_magnitude(missing), axis=2), axis=1)
        return done + 1, rows - _product(missing / 2, rows, precision), error

    start = jnp.zeros([], jnp.int32), rows, jnp.full(len(rows), jnp.inf, dtype)
    _, rows, error = flow.while_loop(is_unfinished, one_polish, start)
    return rows, error <= enough


def _product(x: Array, y: Array, precision: contract.Precision) -> Array:
    """A product whose rounding is made good for later."""
    return jnp.matmul(x, y, precision=precision)


def _by_panels(
    rows: Matrices, panels: int, project: Callable[[Array, Array, Array], tuple[Array, Array]]
) -> tuple[Matrices, Float[Array, " N"]]:
    """Panels of orthonormal rows, one after the other; and how much rows have grown.

    Args:
      rows: All rows.
      panels: Their number.
      project: From a panel, all rows and the panel's index to what is orthogonal to those of lower
        index, and the squares of what was taken away from each row.
    """
    width = rows.shape[1] // panels
    growth = jnp.ones(len(rows), contract.real_dtype(rows.dtype))

    def make(i, carry):
        rows, growth = carry
        start = i * width
        panel = jax.lax.dynamic_slice_in_dim(rows, start, width, axis=1)
        panel, grown = _orthonormal_panel(panel, lambda Z: project(Z, rows, i))
        rows = jax.lax.dynamic_update_slice_in_dim(rows, panel, start, axis=1)
        return rows, jnp.maximum(growth, grown)

    return flow.fori_loop(0, panels, make, (rows, growth))


@_orthonormal_rows.defjvp
def _orthonormal_rows_jvp(panels, precision, primals, tangents):
    """That of Y = L Z with lower triangular L: `dZ = Ω Z` with Ω skew-Hermitian.

    `L⁻¹ dY Zᴴ = L⁻¹ dL + Ω`, of which the first has nothing above its diagonal, and is real on it.
    """
    Z, usable, least = _orthonormal_rows(*primals, panels, precision)
    Y, dY = (x + contract.scaled_blocks(y, least.astype(y.dtype)) for x, y in (primals, tangents))
    adjoint = Z.conj().mT
    lower = jnp.tril(matmul_exact(Y, adjoint))

    def solve(lower, right):
        highest = jax.lax.Precision.HIGHEST
        return linalg.solve_upper_adjoint([lower.conj().mT], right, precision=highest)

    moved = jax.vmap(solve)(lower, matmul_exact(dY, adjoint))
    upper = jnp.triu(moved, 1)
    turned = upper - upper.conj().mT
    if jnp.iscomplexobj(moved):
        identity = np.eye(moved.shape[-1], dtype=bool)[None]
        turned += jnp.where(identity, jax.lax.complex(jnp.zeros_like(moved.imag), moved.imag), 0)
    constant = np.zeros(usable.shape, jax.dtypes.float0), jnp.zeros_like(least)
    return (Z, usable, least), (matmul_exact(turned, Z), *constant)


def _orthonormal_panel(
    panel: Inexact[Array, "N w d"], project: Callable[[Array], tuple[Array, Array]]
) -> tuple[Inexact[Array, "N w d"], Float[Array, " N"]]:
    """A panel of orthonormal rows, orthogonal to what they are projected onto; and its growth."""

    def is_unfinished(carry):
        done, _, growth = carry
        return (done < _ROUNDS) & jnp.any(~(growth <= _GROWTH))

    def one_round(carry):
        done, panel, growth = carry
        return done + 1, *_round(panel, growth, project)

    growth = jnp.full(len(panel), jnp.inf, contract.real_dtype(panel.dtype))
    start = jnp.zeros([], jnp.int32), panel, growth
    return flow.while_loop(is_unfinished, one_round, start)[1:]


def _round(panel, growth, project):
    """Gram–Schmidt against earlier panels, and Cholesky QR; how much rows have grown by it."""
    width = panel.shape[1]
    Z, squares = project(panel)
    gram = matmul_exact(Z, Z.conj().mT)
    # A product adds squares up one by one, to a sum that drifts where all are equal.
    rest = jnp.sum(contract.squared_magnitude(Z), axis=2)
    scale = jax.lax.rsqrt(jnp.where(rest > 0, rest, 1))
    identity = np.eye(width, dtype=bool)[None]
    weights = (scale[:, None] * scale[..., None]).astype(gram.dtype)
    gram = jnp.where(identity, 1, gram * weights)
    # What rounding errors of a relative size of eps / 2 may add up to, at most, in its eigenvalues.
    rounding = width * float(jnp.finfo(scale.dtype).eps) / 2
    shift = rounding * jnp.where(jnp.isnan(growth), _LARGER_SHIFT, 1).astype(scale.dtype)
    factor = positive.inverse_factors(gram, shift)
    return _normalised(Z, factor, scale, 1 + squares * jnp.square(scale), shift)


def _normalised(Z, R, scale, shrink, shift):
    """`R Z` of rows times their scale, with rows of length one; without R, where it is NaN, `Z`."""
    squares = jnp.sum(contract.squared_magnitude(R), axis=2)
    growth = jnp.max(jnp.maximum(squares, shrink), axis=1)
    # By the shift, rows come out shorter than one.
    length = jnp.sqrt(jnp.maximum(1 - shift[:, None] * squares, 0.25))
    weights = R * (scale[:, None] / length[..., None]).astype(R.dtype)
    kept = np.eye(R.shape[-1], dtype=R.dtype)[None] * scale[:, None].astype(R.dtype)
    failed = jnp.isnan(growth)[:, None, None]
    return matmul_exact(jnp.where(failed, kept, weights), Z), growth
