"""Kronecker-factored second-order optimizers as plain Optax gradient transformations."""

from optax_kron.autodiff import hessian_vector_product
from optax_kron.blocking import Blocking
from optax_kron.transforms.kron_psgd import (
    ScaleByKronPsgdState,
    kron_psgd,
    scale_by_kron_psgd,
    update_probability_schedule,
)

__version__ = "0.1.0"

__all__ = [
    "Blocking",
    "ScaleByKronPsgdState",
    "hessian_vector_product",
    "kron_psgd",
    "scale_by_kron_psgd",
    "update_probability_schedule",
]
