"""Two positive semi-definite matrices that are known by their square roots, without forming them.

`T1 = F Fᴴ` and `T2 = S Sᴴ`, or `T2 = diag(w)`, with F and S unfoldings of tensors. Where these are
narrow, sums, differences and norms are cheaper by way of F and S than of T1 and T2.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from optax_kron.kernels import contract, linalg

# A worked example, for the first axis of a block [1000, 10, 8]: F and S are unfoldings [1000, 80].
# Together [F, S] [1000, 160] is narrower than long, so that rows times (T1 + T2) are two products
# with it, of 2·1000·160 operations a row each, where T1 + T2 [1000, 1000] would take 2·1000·1000.
# For the last axis F and S are [8, 1000], and it pays to form T1 and T2 [8, 8].
_UPPER_PANELS = 4
_LEAST_PANEL = 256


class GramPair(NamedTuple):
    """`T1 = F Fᴴ`, and `T2 = S Sᴴ` or `T2 = diag(w)`."""

    first: Inexact[Array, "d k1"]  # F
    second: Inexact[Array, "d k2"] | Float[Array, " d"]  # S, or w

    @property
    def _weighted(self) -> bool:
        return self.second.ndim == 1

    @property
    def _narrow(self) -> bool:
        """Whether `[F, S]` has no more columns than rows."""
        width = self.first.shape[1] + (0 if self._weighted else self.second.shape[1])
        return width <= self.first.shape[0]

    @property
    def _root(self) -> Inexact[Array, "d k"]:
        """`[F, S]`, a square root of the sum (but for the weights)."""
        if self._weighted:
            return self.first
        return jnp.concatenate([self.first, self.second], axis=1)

    def combine(
        self, sign: int, start: int = 0, stop: int | None = None, *, precision: contract.Precision
    ) -> Inexact[Array, "rows columns"]:
        """Rows start to stop of `T1 + sign·T2`, from the column `start` on.

        Cost: 2 operations per entry and column of F and S.
        """

        def product(left, right):
            return jnp.matmul(left[start:stop], right[start:].conj().T, precision=precision)

        if self._weighted:
            result = product(self.first, self.first)
            identity = jnp.eye(*result.shape, dtype=result.dtype)
            return result + sign * identity * self.second[None, start:]
        if self._narrow:
            return product(jnp.concatenate([self.first, sign * self.second], axis=1), self._root)
        return product(self.first, self.first) + sign * product(self.second, self.second)

    def diagonals(self) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
        """The diagonals of T1 and of T2."""
        first = jnp.sum(contract.squared_magnitude(self.first), axis=1)
        if self._weighted:
            return first, self.second
        return first, jnp.sum(contract.squared_magnitude(self.second), axis=1)

    def norm_bound(
        self, rows: Float[Array, "r e"], *, precision: contract.Precision
    ) -> Float[Array, ""]:
        """Lower bound of `‖T1 + T2‖`, as `linalg.norm_bound`."""
        if not self._narrow:
            return linalg.norm_bound(self.combine(1, precision=precision), rows)
        root = self._root
        diagonal = jnp.sum(contract.squared_magnitude(root), axis=1)
        if self._weighted:
            diagonal = diagonal + self.second
        # No entry of a positive semidefinite matrix is larger than its largest diagonal one: with
        # that as the unit, the norm is in [1, d].
        scale = jnp.max(diagonal) + jnp.finfo(diagonal.dtype).tiny

        def apply(x):
            result = (x @ root) @ root.conj().T
            if self._weighted:
                result = result + x * self.second[None]
            return result / scale

        longest = jnp.argmax(diagonal)
        top = (root[longest] @ root.conj().T) / scale
        bound = linalg.power_bound(apply, top, rows)
        return scale * jnp.maximum(bound, jnp.max(diagonal) / scale)

    def subtract_upper(
        self, upper: Inexact[Array, "d d"], step: Float[Array, ""], *, precision: contract.Precision
    ) -> Inexact[Array, "d d"]:
        """`Q − step · triu(T1 − T2) Q` for an upper triangular Q, by panels that skip the zeros.

        Args:
          upper: The upper triangular Q.
          step: Size of the step.
          precision: Precision of the matrix products.

        Returns:
          An upper triangular matrix. Cost, next to that of T1 − T2: d³ operations.
        """
        size = upper.shape[0]
        panel = max(-(-size // _UPPER_PANELS), _LEAST_PANEL)
        moved = []
        for start in range(0, size, panel):
            stop = min(start + panel, size)
            # Left of `start` both triangles are zero: rows [panel, d − start] of the difference
            # meet rows [d − start, d − start] of Q.
            difference = jnp.triu(self.combine(-1, start, stop, precision=precision))
            product = jnp.matmul(difference, upper[start:, start:], precision=precision)
            rows = upper[start:stop, start:] - step * product
            moved.append(jnp.pad(rows, ((0, 0), (start, 0))))
        return jnp.concatenate(moved)
