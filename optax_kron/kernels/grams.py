"""Two positive semi-definite matrices that are known by their square roots, without forming them.

`T1 = F Fᴴ` and `T2 = S Sᴴ`, or `T2 = diag(w)`, with F and S unfoldings of tensors. Where these are
narrow, sums, differences and norms are cheaper by way of F and S than of T1 and T2.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from optax_kron.kernels import contract, linalg

_UPPER_PANELS = 4
_LEAST_PANEL = 256


class GramPair(NamedTuple):
    """`T1 = F Fᴴ`, and `T2 = S Sᴴ` or `T2 = diag(w)`."""

    first: Array  # F [d, k1]
    second: Any  # S [d, k2], or None
    weights: Any  # w [d], real, where S is None

    @property
    def _narrow(self) -> bool:
        width = self.first.shape[1] + (0 if self.second is None else self.second.shape[1])
        return width <= self.first.shape[0]

    @property
    def _root(self) -> Array:
        """`[F, S]`, the root of the sum (but for the weights)."""
        if self.second is None:
            return self.first
        return jnp.concatenate([self.first, self.second], axis=1)

    def combine(self, sign: int, start: int = 0, stop: int | None = None, *, precision) -> Array:
        """Rows start to stop of `T1 + sign·T2`, from the column `start` on.

        Returns:
          [stop - start, d - start]. Cost: 2 operations per entry and column of F and S.
        """

        def product(left, right):
            return jnp.matmul(left[start:stop], right[start:].conj().T, precision=precision)

        if self.second is None:
            result = product(self.first, self.first)
            identity = jnp.eye(*result.shape, dtype=result.dtype)
            return result + sign * identity * self.weights[None, start:]
        if self._narrow:
            return product(jnp.concatenate([self.first, sign * self.second], axis=1), self._root)
        return product(self.first, self.first) + sign * product(self.second, self.second)

    def diagonals(self) -> tuple[Array, Array]:
        """The diagonals of T1 and of T2, real [d] each."""
        first = jnp.sum(contract.squared_magnitude(self.first), axis=1)
        if self.second is None:
            return first, self.weights
        return first, jnp.sum(contract.squared_magnitude(self.second), axis=1)

    def norm_bound(self, rows: Array, *, precision) -> Array:
        """Lower bound of `‖T1 + T2‖`, as `linalg.norm_bound`."""
        if not self._narrow:
            return linalg.norm_bound(self.combine(1, precision=precision), rows)
        root = self._root
        diagonal = jnp.sum(contract.squared_magnitude(root), axis=1)
        if self.weights is not None:
            diagonal = diagonal + self.weights
        scale = jnp.max(diagonal) + jnp.finfo(diagonal.dtype).tiny

        def apply(x):
            result = (x @ root) @ root.conj().T
            if self.weights is not None:
                result = result + x * self.weights[None]
            return result / scale

        longest = jnp.argmax(diagonal)
        top = (root[longest] @ root.conj().T) / scale
        bound = linalg.power_bound(apply, top, rows)
        return scale * jnp.maximum(bound, jnp.max(diagonal) / scale)

    def subtract_upper(self, upper: Array, step: Array, *, precision) -> Array:
        """`Q − step · triu(T1 − T2) Q` for an upper triangular Q, by panels that skip the zeros.

        Args:
          upper: Q [d, d], upper triangular.
          step: real scalar.
          precision: of the matrix products.

        Returns:
          [d, d], upper triangular. Cost, next to that of T1 − T2: d³ operations.
        """
        size = upper.shape[0]
        panel = max(-(-size // _UPPER_PANELS), _LEAST_PANEL)
        moved = []
        for start in range(0, size, panel):
            stop = min(start + panel, size)
            difference = jnp.triu(self.combine(-1, start, stop, precision=precision))
            product = jnp.matmul(difference, upper[start:, start:], precision=precision)
            rows = upper[start:stop, start:] - step * product
            moved.append(jnp.pad(rows, ((0, 0), (start, 0))))
        return jnp.concatenate(moved)
