"""What an optimizer is doing: tables, metrics, factors, what looks wrong, and figures.

All of it reads states, and none of it changes them. `metrics` is for every step, inside of
`jax.jit`; everything else is for people, outside of it.
"""

from optax_kron.diagnostics.causes import Explanation, Finding, explain
from optax_kron.diagnostics.counters import metrics
from optax_kron.diagnostics.figures import plot
from optax_kron.diagnostics.matrices import Factor, factors
from optax_kron.diagnostics.report import ParameterRow, StateRow, Summary, summary

__all__ = [
    "Explanation",
    "Factor",
    "Finding",
    "ParameterRow",
    "StateRow",
    "Summary",
    "explain",
    "factors",
    "metrics",
    "plot",
    "summary",
]
