"""Checks of settings and arguments, and the chain that makes a preconditioner an optimizer."""

import inspect
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array

from optax_kron.types import PyTree

Unchecked = Any  # whatever a user has passed for a setting or an argument

_KEY_IMPL = "threefry2x32"  # of the keys in states, whatever the default


def check_range(
    owner: str,
    name: str,
    value: Unchecked,
    *,
    least: float = 0.0,
    most: float = np.inf,
    open_left: bool = False,
    open_right: bool = False,
    optional: bool = False,
    schedule: bool = False,
) -> None:
    """Raise unless a finite number lies in a range; traced values pass.

    Args:
      owner: name of the function whose argument it is.
      name: of the argument.
      value: a number, array scalar, tracer, schedule or `None`.
      least: lower end of the range.
      most: upper end of the range.
      open_left: exclude the lower end; but not of an array, as `optax.inject_hyperparams` makes one
        of a schedule, which may start there.
      open_right: exclude the upper end.
      optional: let `None` pass too.
      schedule: let callables pass too.

    Raises:
      ValueError: if the value is not a real scalar, or lies outside of the range.
    """
    if isinstance(value, jax.core.Tracer) or (optional and value is None):
        return
    if callable(value) and schedule:
        return
    interval = f"{'(' if open_left else '['}{least:g}, {most:g}{')' if open_right else ']'}"
    expected, given = f"{owner}: {name} must be a number in {interval}", value
    if isinstance(value, jax.Array) and np.iscomplexobj(value) and np.imag(value) == 0:
        value = np.real(value)  # optax.inject_hyperparams gives them the dtype of a parameter
    if callable(value):
        raise ValueError(
            f"{expected}; got a function. Where schedules are not taken as they are, "
            "optax.inject_hyperparams takes them."
        )
    if value is None or isinstance(value, bool | np.bool_ | str):
        raise ValueError(f"{expected}; got {value!r}.")
    if np.ndim(value) or np.iscomplexobj(value):
        raise ValueError(f"{expected}; got {value!r}.")
    number = float(value)
    is_open = open_left and not isinstance(given, jax.Array)
    above = number > least if is_open else number >= least
    below = number < most if open_right else number <= most
    if not (above and below and np.isfinite(number)):
        raise ValueError(f"{expected}; got {number!r}.")


def check_interval(owner: str, name: str, value: Unchecked) -> None:
    """Raise unless a number of steps is a whole one, from 1; traced values pass."""
    check_range(owner, name, value, least=1)
    if not isinstance(value, jax.core.Tracer) and float(value) != round(float(value)):
        raise ValueError(f"{owner}: {name} must be an integer ≥ 1; got {value!r}.")


def whole_number(value: Unchecked) -> int | None:
    """The number, if it is an integer from Python or NumPy; `None` for anything else."""
    if isinstance(value, bool | np.bool_ | jax.core.Tracer):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def interval(value: ArrayLike) -> Array:
    """A number of steps, which may come as a traced float, as an int32 ≥ 1."""
    return jnp.maximum(jnp.round(jnp.asarray(value, jnp.float32)), 1).astype(jnp.int32)


def check_choice(
    owner: str, name: str, value: Unchecked, choices: tuple[str, ...], *, optional: bool = False
) -> None:
    """Raise unless a setting is one of the given strings, or `None` if that is optional."""
    if value not in choices and not (optional and value is None):
        among = f"{', '.join(choices)}{', None' if optional else ''}"
        raise ValueError(f"{owner}: {name} must be one of {among}; got {value!r}.")


def check_switch(owner: str, name: str, value: Unchecked, *, optional: bool = False) -> None:
    """Raise unless a setting is `True` or `False`, or `None` if that is optional."""
    if not (isinstance(value, bool | np.bool_) or (optional and value is None)):
        expected = "True, False or None" if optional else "True or False"
        raise ValueError(f"{owner}: {name} must be {expected}; got {value!r}.")


def check_stacks(owner: str, plan: Unchecked, stacks: Unchecked, source: str) -> None:
    """Raise unless the gradients give the stacks of blocks that are in the state.

    Args:
      owner: name of the function.
      plan: of the gradients; its `stacks` by label, and the `count` of blocks in one.
      stacks: of the state by label; anything else if there are none.
      source: what, beside the gradients, decides on the blocks.

    Raises:
      ValueError: with the stacks that came, and those that `init` made.
    """
    got = {label: plan.count(label) for label in plan.stacks}
    known = stacks if isinstance(stacks, Mapping) else {}
    expected = {label: len(stack.initialized) for label, stack in known.items()}
    if got != expected:
        raise ValueError(
            f"{owner}: the gradients do not match the state: they give stacks of blocks {got}, "
            f"init made {expected}. Pass gradients of the parameters, and the {source}, of init. "
            "On a mesh, or coming from one, ok.sharding.resize_state brings a state there."
        )


def check_state(owner: str, made: Unchecked, state: Unchecked) -> None:
    """Raise unless a state has the structure of one that `init` makes, or would make."""
    if jax.tree.structure(made) != jax.tree.structure(state):
        raise ValueError(
            f"{owner}: the state was made by another optimizer, or with other settings; start from "
            "tx.init(params)."
        )


def _known_dtype(dtype: Unchecked) -> jnp.dtype | None:
    """The dtype that a value names, or `None` if there is no such dtype."""
    try:
        return jnp.dtype(dtype)
    except TypeError:
        return None


def is_off(value: Unchecked) -> bool:
    """Whether a setting is switched off: `None`, or a number that is zero. Arrays never are."""
    return value is None or (isinstance(value, int | float | np.number) and value == 0)


def real_factor_dtype(owner: str, dtype: Unchecked) -> jnp.dtype | None:
    """The dtype in which factors are to be stored, if one is asked for.

    Raises:
      ValueError: if the dtype is not real floating-point, or needs x64 while that is off.
    """
    if dtype is None:
        return None
    asked = _known_dtype(dtype)
    if asked is None or not jnp.issubdtype(asked, jnp.floating):
        raise ValueError(
            f"{owner}: factor_dtype must be a real floating-point dtype; got {dtype!r}. Factors of "
            "complex parameters get the complex dtype of the same precision by themselves."
        )
    if jax.dtypes.canonicalize_dtype(asked) != asked:
        raise ValueError(
            f"{owner}: factor_dtype={asked} needs 64-bit types; set jax_enable_x64 first."
        )
    return asked


def check_dtype(owner: str, name: str, dtype: Unchecked) -> None:
    """Raise unless a dtype is floating-point or complex, or `None`."""
    if dtype is None:
        return
    known = _known_dtype(dtype)
    if known is None or not jnp.issubdtype(known, jnp.inexact):
        raise ValueError(
            f"{owner}: {name} must be a floating-point or complex dtype, or None; got {dtype!r}."
        )


def check_mask(owner: str, mask: Unchecked) -> None:
    """Raise unless a mask is `None`, a function, or a tree that is more than one bare leaf.

    `optax.inject_hyperparams` calls a function as a schedule, and so passes what it makes of a
    step: a bool, which would mask everything or nothing.
    """
    if not callable(mask) and jax.tree_util.all_leaves([mask]):
        raise ValueError(
            f"{owner}: mask must be a tree of bools or a function of the parameters; got {mask!r}. "
            "optax.inject_hyperparams takes a function for a schedule, unless told otherwise: "
            'optax.inject_hyperparams(factory, static_args=("mask",)).'
        )


def check_inexact(owner: str, params: PyTree) -> None:
    """Raise unless all parameters are real or complex numbers."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise ValueError(
                f"{owner}: parameters must be floating-point or complex; got "
                f"{jnp.result_type(leaf)} at {jax.tree_util.keystr(path) or 'the root'}."
            )


def mask_by_path(
    owner: str, mask: PyTree | Callable[[PyTree], PyTree], params: PyTree
) -> list[bool]:
    """For each parameter what a tree of bools, or a function that makes one, says of it.

    The tree may have more, which a wrapper has masked.
    """
    tree = mask(params) if is_function(mask) else mask
    known = dict(jax.tree_util.tree_leaves_with_path(tree))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if paths == [()] and () not in known:
        return [True]  # the placeholder of optax.tree.map_params
    chosen = []
    for path in paths:
        if not isinstance(known.get(path), bool | np.bool_):
            raise ValueError(
                f"{owner}: mask must have a bool for each parameter; at "
                f"{jax.tree_util.keystr(path) or 'the root'} it has "
                f"{repr(known[path]) if path in known else 'nothing'}."
            )
        chosen.append(bool(known[path]))
    return chosen


def is_function(value: Unchecked) -> bool:
    """Whether a setting is a function, and no tree that may be called, as a model may be."""
    return callable(value) and jax.tree_util.all_leaves([value])


def check_fallback(owner: str, fallback: Unchecked) -> None:
    """Raise unless the transformation of what an optimizer leaves out is one, or `None`."""
    if fallback is not None and not isinstance(fallback, optax.GradientTransformation):
        raise ValueError(
            f"{owner}: fallback must be an optax.GradientTransformation, such as "
            f"optax.scale_by_adam(), or None; got {fallback!r}."
        )


def warn_without_layers(owner: str, layers: Sequence[Unchecked], fallback: Unchecked) -> None:
    """Say that nothing will be preconditioned, as no layer has parameters."""
    reason = "layers is empty"
    if layers:
        reason = f"of those of {[layer.name for layer in layers]} there are none here"
    get = "plain gradients" if fallback is None else "the updates of the fallback"
    warnings.warn(
        f"{owner}: no parameter belongs to a layer, so all get {get}: {reason}. "
        "print(ok.find_layers(...)) says why parameters are in no layer.",
        stacklevel=5,  # the caller of `tx.init`
    )


def check_callable(owner: str, name: str, value: Unchecked) -> None:
    """Raise unless a value can be called."""
    if not callable(value):
        raise ValueError(f"{owner}: {name} must be a function; got {type(value).__name__}.")


def checked_hvp_fn(owner: str, hvp_fn: Unchecked) -> Callable[[PyTree], PyTree]:
    """A function for products with the Hessian; raises unless it is given."""
    if hvp_fn is None:
        raise ValueError(
            f"{owner}: criterion='newton' needs hvp_fn at every update: pass "
            "hvp_fn=ok.hessian_vector_product(loss_fn, params, *args) to tx.update."
        )
    check_callable(owner, "hvp_fn", hvp_fn)
    return hvp_fn


def check_seed(owner: str, seed: Unchecked) -> None:
    """Raise unless a seed is an integer or a PRNG key."""
    if seed is None or isinstance(seed, bool | np.bool_ | str | float | np.floating):
        raise ValueError(f"{owner}: seed must be an integer or a PRNG key; got {seed!r}.")


def check_like(
    owner: str,
    given: Unchecked,
    reference: Unchecked,
    names: tuple[str, str] = ("the gradients", "the parameters"),
) -> None:
    """Raise unless a tree has the leaves and shapes of another, as gradients of the parameters.

    Args:
      owner: name of the function.
      given: the tree.
      reference: the other.
      names: of both, plural, for the message.

    Raises:
      ValueError: naming the first path at which they differ.
    """

    def shapes(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}

    got, expected = shapes(given), shapes(reference)
    for path in [*got, *expected]:
        if got.get(path) != expected.get(path):
            raise ValueError(
                f"{owner}: {names[0]} do not match {names[1]}: at {path or 'the root'} "
                f"they have shape {got.get(path, '(no such leaf)')}, {names[1]} "
                f"{expected.get(path, '(no such leaf)')}."
            )


def key_data(seed: Unchecked) -> jax.Array:
    """Raw data, uint32 [2], of a threefry key made from an integer or from any PRNG key."""
    if isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        seed = jax.random.bits(seed, dtype=jnp.uint32)
    elif jnp.ndim(seed) != 0:
        seed = jax.random.bits(jnp.asarray(seed), dtype=jnp.uint32)
    if isinstance(seed, int | np.integer):
        seed = int(seed) % 2**32
    seed = jnp.asarray(seed, dtype=jnp.uint32)
    return jax.random.key_data(jax.random.key(seed, impl=_KEY_IMPL))


def key_of(data: jax.Array) -> jax.Array:
    """The PRNG key of what `key_data` returned."""
    return jax.random.wrap_key_data(data, impl=_KEY_IMPL)


def complete(
    owner: str,
    scale_by: Callable[..., optax.GradientTransformationExtraArgs],
    arguments: Mapping[str, Unchecked],
) -> optax.GradientTransformationExtraArgs:
    """Chain a preconditioner with decoupled weight decay and a learning rate, unless `None`.

    The chain, and with it the structure of the state, is the same for all values.

    Args:
      owner: Name of the optimizer, for messages.
      scale_by: Makes the preconditioner.
      arguments: Those of the optimizer: of `scale_by`, and `learning_rate`, `weight_decay`, `mask`.

    Raises:
      ValueError: for a negative learning rate or weight decay, or a mask that is a single bool.
    """
    added = ("learning_rate", "weight_decay", "mask")
    learning_rate, weight_decay, mask = (arguments[name] for name in added)
    check_range(owner, "learning_rate", learning_rate, optional=True, schedule=True)
    check_range(owner, "weight_decay", weight_decay, optional=True)
    check_mask(owner, mask)
    # Some need the learning rate too, as for a bound on the step.
    shared = inspect.signature(scale_by).parameters
    settings = {name: x for name, x in arguments.items() if name in shared or name not in added}
    preconditioner = scale_by(**settings)
    chain: list[optax.GradientTransformation] = [preconditioner]
    if weight_decay is not None:
        chain.append(_decayed_weights(weight_decay, mask))
    if learning_rate is not None:
        chain.append(optax.scale_by_learning_rate(learning_rate))
    return optax.chain(*chain)


def _decayed_weights(weight_decay: Unchecked, mask: Unchecked) -> optax.GradientTransformation:
    """`optax.add_decayed_weights`, which needs no parameters if the decay is known to be zero."""
    is_tree = callable(mask) and not is_function(mask)
    inner = optax.add_decayed_weights(weight_decay, (lambda _: mask) if is_tree else mask)

    def update(
        updates: Unchecked, state: Unchecked, params: Unchecked = None
    ) -> tuple[Unchecked, Unchecked]:
        if is_off(weight_decay):
            return updates, state
        if params is None:
            raise ValueError(
                "weight_decay needs the parameters, unless it is None or a plain 0.0: pass them, "
                "tx.update(grads, state, params)."
            )
        return inner.update(updates, state, params)

    return optax.GradientTransformation(inner.init, update)
