"""Pure functions of arrays: no pytrees, no state, no Optax.

Every kernel works on one block (a tensor and its factors); callers map it over a stack of blocks
with `jax.vmap`. Shapes stand in the signatures, for people and not for a checker: N counts blocks
of a stack, or examples in the kernels of K-FAC; `B_or_1` is an axis that may be broadcast.
"""
