"""Diagonal AdaGrad: what a new optimizer takes. `docs/extending.md` goes through it."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

import optax_kron as ok
from optax_kron.kernels import contract
from optax_kron.transforms import program, validation
from optax_kron.transforms.blockwise import blockwise
from optax_kron.transforms.frame import transformation
from optax_kron.transforms.preconditioner import Preconditioner
from optax_kron.transforms.stacks import Change, guarded, largest_of_blocks, times


class AdagradStack(NamedTuple):
    """What is kept of N blocks."""

    squares: jnp.ndarray  # sum of the squared gradients [N, ...], ≥ float32
    initialized: jnp.ndarray  # whether there has been a gradient other than zero, bool [N]


@program.settings
@dataclasses.dataclass(frozen=True)
class Adagrad(Preconditioner):
    """The settings of `scale_by_adagrad`, and its verbs."""

    eps: float

    def init(self, count, signature, dtype):
        wide = contract.wide_dtype(dtype)
        return AdagradStack(jnp.zeros((count, *signature.shape), wide), jnp.zeros(count, bool))

    def rescale(self, stack, past):
        return stack._replace(squares=times(stack.squares, jnp.square(past)))

    def accumulate(self, stack, seen, step):
        squares = stack.squares + contract.squared_magnitude(seen.gradient)
        nonzero = largest_of_blocks(seen.gradient) != 0
        fields = {"squares": squares, "initialized": jnp.ones_like(nonzero)}
        return guarded(stack, Change(fields, step.accepted & nonzero))

    def precondition(self, stack, seen, step):
        return seen.direction / (jnp.sqrt(stack.squares) + self.eps)


def scale_by_adagrad(
    *,
    eps=1e-8,
    momentum=0.9,
    outlier_clip=10.0,
    blocking=ok.Blocking(),
    factor_dtype=None,
    momentum_dtype=None,
):
    """Scale gradients by AdaGrad."""
    validation.check_range("adagrad", "eps", eps)
    layout = blockwise("adagrad", blocking, momentum, momentum_dtype)
    return transformation("adagrad", Adagrad(eps), layout, outlier_clip, factor_dtype)


def adagrad(
    learning_rate=None,
    *,
    eps=1e-8,
    momentum=0.9,
    outlier_clip=10.0,
    weight_decay=0.0,
    mask=None,
    blocking=ok.Blocking(),
    factor_dtype=None,
    momentum_dtype=None,
):
    """AdaGrad: with a learning rate a complete optimizer."""
    arguments = dict(locals())
    return validation.complete("adagrad", scale_by_adagrad, arguments)
