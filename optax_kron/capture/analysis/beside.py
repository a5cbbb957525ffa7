"""Which factors of a bias stand beside which factors of the kernel whose output it is added to."""

# Of `(x @ w).reshape(8, 2, 3) + b`, with w [4, 6] and b [2, 3], the output's factor of 6 is cut in
# two, of 2 and of 3, and beside them stand the two axes of b.

from typing import TYPE_CHECKING

from optax_kron.capture.rules import views
from optax_kron.capture.rules.contraction import roles_of
from optax_kron.capture.rules.views import NEW, View
from optax_kron.layers.layer import AxisFactor, AxisFactors

if TYPE_CHECKING:
    from optax_kron.capture.analysis.uses import Use


def beside(
    kernel: "Use", view: View, bias: "Use"
) -> tuple[tuple[AxisFactor, AxisFactors], ...] | None:
    """Which factors of a bias stand beside which of the kernel's blocks and outputs.

    `None` unless they match one to one: then the bias is one more input, of ones, of the kernel.
    """
    pairs = beside_in_steps(kernel.view, bias.view)
    if pairs is None:
        return None
    for factors, others in zip(view.axes, bias.view.axes, strict=True):
        roles = roles_of(factors, kernel.contraction.output_axes, None)
        groups = None if roles is None else views.regroup(others, [role.size for role in roles])
        if roles is None or groups is None:
            return None
        for role, group in zip(roles, groups, strict=True):
            if any((f.axis == NEW) != (role.role == "free") for f in group):
                return None
            if role.role != "free":
                pairs[role.of_kernel] = group
    expected = {f.of_kernel for f in kernel.role_factors if f.role in ("block", "output")}
    return tuple(pairs.items()) if set(pairs) == expected else None


def beside_in_steps(kernel: View, bias: View) -> dict[AxisFactor, AxisFactors] | None:
    """`beside` of the steps of scans alone, which have to be those of the same scans."""
    steps, pairs = dict(bias.steps), {}
    if set(steps) != {scan for scan, _ in kernel.steps}:
        return None
    for scan, factors in kernel.steps:
        groups = views.regroup(steps[scan], [f.size for f in factors])
        if groups is None:
            return None
        pairs.update(zip(factors, groups, strict=True))
    return pairs
