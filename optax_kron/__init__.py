"""Kronecker-factored second-order optimizers as plain Optax gradient transformations."""

from optax_kron import diagnostics, losses, operators, sharding
from optax_kron.autodiff import hessian_vector_product
from optax_kron.blocking import Blocking
from optax_kron.capture.find import Layers, find_layers
from optax_kron.capture.ggn import GaussNewton, ggn_vector_product
from optax_kron.capture.taps import value_and_grad_with_taps
from optax_kron.declarations import per_example
from optax_kron.layers.layer import Layer
from optax_kron.layers.taps import Moments, Tap, Taps
from optax_kron.transforms.adaptive import adaptive_ekfac, adaptive_kfac
from optax_kron.transforms.adaptive_step import AdaptiveMetrics, AdaptiveState
from optax_kron.transforms.branch_kfac import (
    ScaleByBranchKfacState,
    branch_kfac,
    scale_by_branch_kfac,
)
from optax_kron.transforms.ekfac import ekfac, scale_by_ekfac
from optax_kron.transforms.fixed_norm import FixedNormState, fixed_norm
from optax_kron.transforms.kfac import kfac, scale_by_kfac
from optax_kron.transforms.kron_psgd import kron_psgd, scale_by_kron_psgd
from optax_kron.transforms.orthogonalize import orthogonalize
from optax_kron.transforms.preconditioner import KronState
from optax_kron.transforms.quadratic import QuadraticStep, quadratic_step
from optax_kron.transforms.schedule import update_probability_schedule
from optax_kron.transforms.shampoo import scale_by_shampoo, shampoo
from optax_kron.transforms.soap import scale_by_soap, soap

__version__ = "0.1.0"

__all__ = [
    "AdaptiveMetrics",
    "AdaptiveState",
    "Blocking",
    "FixedNormState",
    "GaussNewton",
    "KronState",
    "Layer",
    "Layers",
    "Moments",
    "QuadraticStep",
    "ScaleByBranchKfacState",
    "Tap",
    "Taps",
    "adaptive_ekfac",
    "adaptive_kfac",
    "branch_kfac",
    "diagnostics",
    "ekfac",
    "find_layers",
    "fixed_norm",
    "ggn_vector_product",
    "hessian_vector_product",
    "kfac",
    "kron_psgd",
    "losses",
    "operators",
    "orthogonalize",
    "per_example",
    "quadratic_step",
    "scale_by_branch_kfac",
    "scale_by_ekfac",
    "scale_by_kfac",
    "scale_by_kron_psgd",
    "scale_by_shampoo",
    "scale_by_soap",
    "shampoo",
    "sharding",
    "soap",
    "update_probability_schedule",
    "value_and_grad_with_taps",
]
