"""What every transformation is made with: it works inside `jax.shard_map`, and compiles once."""

from collections.abc import Callable
from typing import Any

import optax

from optax_kron.kernels import flow

PyTree = Any


def transformation(
    init: Callable[[PyTree], PyTree], update: Callable[..., tuple[PyTree, PyTree]]
) -> optax.GradientTransformationExtraArgs:
    """The transformation of two functions, whose state varies over a mesh as the parameters do."""

    def init_like(params: PyTree) -> Any:
        return flow.varying_like(init(params), params)

    return optax.GradientTransformationExtraArgs(init_like, update)
