"""Curvature as linear operators on pytrees: to multiply, invert, sample from and look at.

All of them share the methods of `Operator`.
"""

from optax_kron.operators.base import Operator, identity
from optax_kron.operators.blocks import block_diagonal
from optax_kron.operators.bridge import as_lineax
from optax_kron.operators.estimates import ekfac, kfac, kfoc
from optax_kron.operators.exact import ggn
from optax_kron.operators.products import eigen, kronecker

__all__ = [
    "Operator",
    "as_lineax",
    "block_diagonal",
    "eigen",
    "ekfac",
    "ggn",
    "identity",
    "kfac",
    "kfoc",
    "kronecker",
]
