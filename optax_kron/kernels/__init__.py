"""Pure functions of arrays: no pytrees, no state, no Optax.

Every kernel works on one block (a tensor and its factors); callers map it over a stack of blocks
with `jax.vmap`.
"""
