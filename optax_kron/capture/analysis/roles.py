"""What the axes of a kernel are in its uses, and whether they are the same in all of them."""

# A table [7, 4], read by lookups and used as `h @ table.T`:
#
#     lookups    inputs: axis 0     outputs: axis 1     the roles of the layer
#     head       inputs: axis 1     outputs: axis 0     the same, the other way round: tied

from collections.abc import Iterable, Sequence

from optax_kron.capture.analysis.uses import Use
from optax_kron.capture.rules.contraction import IndexInputs
from optax_kron.layers.layer import AxisFactor, AxisFactors


def is_lookup(use: Use) -> bool:
    """Whether rows of a table are read."""
    return isinstance(use.contraction.inputs, IndexInputs)


def shared_roles(sides: Sequence[Sequence[Use]]) -> tuple[AxisFactors, ...] | None:
    """The kernel's blocks, inputs and outputs, if all uses agree on them.

    Args:
      sides: Lookups, dense uses, or both: then these have to be those of a head, whose inputs are
        the outputs of the lookups, and the other way round.
    """
    found = []
    for side in sides:
        roles = {tuple(map(use.of_kernel, ("block", "input", "output"))) for use in side}
        if len(roles) > 1:
            return None
        found += roles
    if len(sides) > 1 and any(use.contraction.inputs is None for use in sides[1]):
        return None  # added, as a bias is
    blocks, inputs, outputs = found[0]
    return None if found[1:] not in ([], [(blocks, outputs, inputs)]) else found[0]


def within(factor: AxisFactor, other: AxisFactor) -> bool:
    """Whether a factor is a part of another."""
    inside = factor.axis == other.axis and factor.stride >= other.stride
    return inside and factor.stride * factor.size <= other.stride * other.size


def tiles(part: Sequence[tuple[int, int]], roles: Iterable[AxisFactors]) -> bool:
    """Whether factors enumerate every element of a part once."""
    sizes = [stop - start for start, stop in part]
    factors = sorted((f for role in roles for f in role), key=lambda f: (f.axis, f.stride))
    strides: dict[int, int] = {}
    for factor in factors:
        # Without a gap or an overlap each starts where the faster one ends.
        if factor.stride != strides.get(factor.axis, 1):
            return False
        strides[factor.axis] = factor.stride * factor.size
    return all(strides.get(axis, 1) == size for axis, size in enumerate(sizes))
