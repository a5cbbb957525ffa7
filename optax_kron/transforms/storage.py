"""How averages are stored in fewer bits than they are computed in: to nearest, or stochastically.

What changes little by little, momentum and statistics, may be rounded stochastically. What is made
anew from these, such as inverses and bases, is always rounded to nearest, which errs less.

Random bits are drawn once a step, for the largest block, and every block of every array takes them
shifted by a number of its own, modulo 2¹⁶, that is drawn too. So any two numbers are rounded
independently, but for chance, as if all bits had been drawn (Cranley and Patterson, 1976); and a
block gets the same bits on every mesh. Those of a square block are symmetric. For blocks [3, 2]:

    bits of block k: drawn[:6] + drawn[start + k], where the name of the array tells the start
"""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt16

from optax_kron.kernels import contract, rounding
from optax_kron.transforms import validation
from optax_kron.transforms.mesh import ALONE, Share
from optax_kron.transforms.stacks import Change, finite_blocks, guarded
from optax_kron.types import PyTree

ROUNDINGS = ("nearest", "stochastic")
# What tells the keys of roundings from others that are made of the key in the state.
_PURPOSE = zlib.crc32(b"rounding")
_STARTS = 4096  # at how many places the shifts of an array may start


def random_bits(
    key: Array, count: Int[Array, ""], arrays: PyTree, share: Share = ALONE
) -> UInt16[Array, " n"] | None:
    """The random bits of a step for arrays [N, ...]; `None` if none of them has few bits.

    Args:
      key: The raw key in the state.
      count: The number of steps so far.
      arrays: All that is stored, and more.
      share: Which of the blocks are on this device.
    """
    shapes = [(x.shape or (1,)) for x in _narrow(arrays)]
    if not shapes:
        return None
    largest = max(math.prod(shape[1:]) for shape in shapes)
    length = max(largest, _STARTS + share.devices * max(shape[0] for shape in shapes))
    own = jax.random.fold_in(validation.key_of(key), _PURPOSE)
    # Two numbers of 16 bits cost as much as one of 32.
    words = jax.random.bits(jax.random.fold_in(own, count), (-(-length // 2),), jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)


def store(new: PyTree, old: PyTree, drawn: Array | None, name: str, share: Share = ALONE) -> PyTree:
    """Arrays [N, ...] in the dtypes of others.

    Args:
      new: The arrays, of the blocks of one stack.
      old: Those whose dtypes they get, of the same structure.
      drawn: The random bits of a step; `None`: roundings are to nearest.
      name: What is stored, which makes its random bits others than those of other names.
      share: Which of the blocks are on this device.
    """
    if drawn is None:
        return jax.tree.map(lambda x, y: x.astype(y.dtype), new, old)

    def rounded(path, x, y):
        if not rounding.is_narrower(y.dtype, x.dtype):
            return x.astype(y.dtype)
        bits = _bits_of_stack(drawn, f"{name} {jax.tree_util.keystr(path)}", x.shape, share)
        return rounding.stochastic(x, y.dtype, bits)

    return jax.tree_util.tree_map_with_path(rounded, new, old)


def _bits_of_stack(drawn, name, shape, share):
    """Random bits for an array [N, ...]."""
    block = drawn[: math.prod(shape[1:])].reshape(shape[1:])
    if block.ndim == 2 and shape[1] == shape[2]:  # what is symmetric stays so
        block = jnp.triu(block) + jnp.triu(block, 1).T
    start = zlib.crc32(name.encode()) % _STARTS
    shifts = share.own(drawn[start : start + shape[0] * share.devices])
    return block + contract.along_axis(shifts, 0, len(shape))


def averaged(
    move: Callable[[Any], tuple[Any, ...]],
    stack: Any,
    names: Sequence[str],
    drawn: Array | None,
    label: str,
    share: Share = ALONE,
) -> tuple[Any, ...]:
    """`move(stack)`, with some fields as precise as the arithmetic until they are stored.

    A block that does not fit the dtypes of the stack keeps all that it had, and has failed.

    Args:
      move: From a stack to the new one, which blocks have failed, bool [N], and anything else.
      stack: The old one.
      names: The fields that are moving averages.
      drawn: The random bits of a step; `None`: `move` itself rounds, to nearest.
      label: Of the stack.
      share: Which of the blocks are on this device.

    Returns:
      What `move` does.
    """
    kept = {name: getattr(stack, name) for name in names}
    if drawn is None or not _narrow(kept):
        return move(stack)
    new, failed, *rest = move(stack._replace(**jax.tree.map(contract.widen, kept)))
    wide = {name: getattr(new, name) for name in names}
    stored = store(wide, kept, drawn, label, share)
    fits = finite_blocks(_narrow(stored))
    fields = {**new._asdict(), **stored}
    done, missed = guarded(stack, Change(fields, jnp.ones_like(failed), fits))
    return done, failed | missed, *rest


def _narrow(tree):
    reals = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return [x for x in reals if jnp.finfo(x.dtype).bits < 32]
