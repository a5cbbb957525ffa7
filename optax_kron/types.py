"""Types that signatures name, beside those of JAX and jaxtyping."""

from typing import Any, TypeAlias

# Not jaxtyping's, which type checkers do not know, and then nothing that is made of it.
PyTree: TypeAlias = Any
