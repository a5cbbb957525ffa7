"""Parts of stacks, along their first axis, so that one compiled kernel serves for many.

XLA compiles a kernel of its own on a CPU for every slice of an array at a constant index, in some
15 ms each: for a model of 25 leaves that was half of the time in which an update compiled. Slices
at an index that is a value of the program are equal computations where shapes are equal, and share
one kernel, whatever is fused with them.
"""

import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from optax_kron.kernels import flow

_FEW = 2  # so few parts are slices at constant indices


def parts(
    stacks: Mapping[str, Shaped[Array, "N ..."]], counts: Mapping[str, Sequence[int]]
) -> dict[str, list[Shaped[Array, "n ..."]]]:
    """The consecutive parts of some stacks, of `counts[label]` rows each.

    Args:
      stacks: Arrays by label.
      counts: The numbers of rows of the parts, from the first on, of those stacks that are wanted.
    """
    starts = {label: _starts(rows) for label, rows in counts.items()}
    used = sorted({start for of_stack in starts.values() for start in of_stack})
    total = sum(map(len, starts.values()))
    # Elsewhere kernels are not compiled in this way; of several devices each has its own rows.
    alone = jax.default_backend() == "cpu" and jax.device_count() == 1
    alone &= total > _FEW and any(isinstance(stacks[label], jax.core.Tracer) for label in counts)
    values = dict(zip(used, _as_values(used) if alone else used, strict=True))

    def taken(stack, start, count):
        if not alone:
            return stack[start : start + count]
        return jax.lax.dynamic_slice_in_dim(stack, values[start], count)

    return {
        label: [
            taken(stacks[label], *rows) for rows in zip(starts[label], counts[label], strict=True)
        ]
        for label in counts
    }


def _starts(counts: Sequence[int]) -> list[int]:
    return [end - count for end, count in zip(itertools.accumulate(counts), counts, strict=True)]


def _as_values(numbers: Sequence[int]) -> Sequence[Array]:
    """Numbers that the compiler does not know: a loop of two steps, which is not unrolled."""
    chosen = tuple(jnp.int32(number) for number in numbers)
    return flow.fori_loop(0, 2, lambda _, carry: chosen, tuple(map(jnp.zeros_like, chosen)))
