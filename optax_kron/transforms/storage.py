"""How averages are stored in fewer bits than they are computed in: to nearest, or stochastically.

What changes little by little, momentum and statistics, may be rounded stochastically. What is made
anew from these, such as inverses and bases, is always rounded to nearest, which errs less.

Random bits are drawn for one block of a stack, and shifted for each block by random bits of its
own, modulo 2¹⁶. So any two numbers are rounded independently, as if all bits had been drawn
(Cranley and Patterson, 1976), and a block gets the same bits on every mesh. Those of a square block
are symmetric. For blocks [3, 2]:

    drawn [6 + N]    bits of block k: drawn[:6] + drawn[6 + k]
"""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree, UInt16

from optax_kron.kernels import contract, rounding
from optax_kron.transforms import validation
from optax_kron.transforms.mesh import ALONE, Share
from optax_kron.transforms.stacks import Change, finite_blocks, guarded

ROUNDINGS = ("nearest", "stochastic")
# What tells the keys of roundings from others that are made of the key in the state.
_PURPOSE = zlib.crc32(b"rounding")


def key_of_step(key: Array, count: Int[Array, ""]) -> Array:
    """The raw key of the roundings of a step, of that in the state."""
    own = jax.random.fold_in(validation.key_of(key), _PURPOSE)
    return jax.random.key_data(jax.random.fold_in(own, count))


def store(new: PyTree, old: PyTree, key: Array | None, name: str, share: Share = ALONE) -> PyTree:
    """Arrays [N, ...] in the dtypes of others.

    Args:
      new: The arrays, of the blocks of one stack.
      old: Those whose dtypes they get, of the same structure.
      key: Raw key of the roundings of a step; `None`: all are to nearest.
      name: What is stored, which makes its random bits others than those of other names.
      share: Which of the blocks are on this device.
    """
    leaves, treedef = jax.tree.flatten(new)
    dtypes = [x.dtype for x in jax.tree.leaves(old)]
    pairs = list(zip(leaves, dtypes, strict=True))
    narrow = [x.shape for x, dtype in pairs if rounding.is_narrower(dtype, x.dtype)]
    if key is None or not narrow:
        return treedef.unflatten([x.astype(dtype) for x, dtype in pairs])
    bits = iter(_random_bits(key, name, narrow, share))
    return treedef.unflatten(
        [
            rounding.stochastic(x, dtype, next(bits))
            if rounding.is_narrower(dtype, x.dtype)
            else x.astype(dtype)
            for x, dtype in pairs
        ]
    )


def _random_bits(
    key: Array, name: str, shapes: Sequence[tuple[int, ...]], share: Share
) -> list[UInt16[Array, "N ..."]]:
    """Random bits for the arrays [N, ...] of one stack."""
    sizes = [math.prod(shape[1:]) for shape in shapes]
    count = shapes[0][0] * share.devices
    key = jax.random.fold_in(validation.key_of(key), zlib.crc32(name.encode()))
    # Two numbers of 16 bits cost as much as one of 32.
    words = jax.random.bits(key, (-(-(sum(sizes) + count) // 2),), jnp.uint32)
    drawn = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)
    shifts = share.own(drawn[sum(sizes) : sum(sizes) + count])
    made, start = [], 0
    for shape, size in zip(shapes, sizes, strict=True):
        block = drawn[start : start + size].reshape(shape[1:])
        if block.ndim == 2 and block.shape[0] == block.shape[1]:  # what is symmetric stays so
            block = jnp.triu(block) + jnp.triu(block, 1).T
        made.append(block + contract.along_axis(shifts, 0, len(shape)))
        start += size
    return made


def averaged(
    move: Callable[[Any], tuple[Any, ...]],
    stack: Any,
    names: Sequence[str],
    key: Array | None,
    label: str,
    share: Share = ALONE,
) -> tuple[Any, ...]:
    """`move(stack)`, with some fields as precise as the arithmetic until they are stored.

    A block that does not fit the dtypes of the stack keeps all that it had, and has failed.

    Args:
      move: From a stack to the new one, which blocks have failed, bool [N], and anything else.
      stack: The old one.
      names: The fields that are moving averages.
      key: Raw key of the roundings of a step; `None`: `move` itself rounds, to nearest.
      label: Of the stack.
      share: Which of the blocks are on this device.

    Returns:
      What `move` does.
    """
    kept = {name: getattr(stack, name) for name in names}
    if key is None or not _narrow(kept):
        return move(stack)
    new, failed, *rest = move(stack._replace(**jax.tree.map(contract.widen, kept)))
    wide = {name: getattr(new, name) for name in names}
    stored = store(wide, kept, key, label, share)
    fits = finite_blocks(_narrow(stored))
    fields = {**new._asdict(), **stored}
    done, missed = guarded(stack, Change(fields, jnp.ones_like(failed), fits))
    return done, failed | missed, *rest


def _narrow(tree):
    return [x for x in jax.tree.leaves(tree) if jnp.finfo(x.dtype).bits < 32]
