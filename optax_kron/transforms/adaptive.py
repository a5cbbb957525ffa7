"""K-FAC and EKFAC that tune themselves: rate, momentum and damping from a model of the loss."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array

from optax_kron.layers.layer import Layer
from optax_kron.layers.plan import check_layers
from optax_kron.transforms import program, validation
from optax_kron.transforms.adaptive_step import Adaptive
from optax_kron.transforms.ekfac import named_ekfac
from optax_kron.transforms.kfac import named_kfac

Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")

_BY_MODEL = "a quadratic model of the loss does that at every step"
# What other optimizers take, and why it is not here.
_NOT_HERE = {
    "learning_rate": _BY_MODEL,
    "momentum": _BY_MODEL,
    "norm_constraint": _BY_MODEL,
    "damping": "initial_damping is that of the first step, and it adapts",
    "weight_decay": "l2 adds its term to the loss",
}


def _tunes_itself(make: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
    """An optimizer that says in words that it takes no learning rate, and the like."""

    @functools.wraps(make)
    def made(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Made:
        unknown = [name for name in _NOT_HERE if name in kwargs]
        if args or unknown:
            name = "learning_rate" if args else unknown[0]
            got = args[0] if args else kwargs[name]
            raise TypeError(
                f"{make.__name__}: there is no {name} to choose, {_NOT_HERE[name]}; got {got!r}. "
                f"All arguments have names: {make.__name__}(layers=layers)."
            )
        return make(*args, **kwargs)

    return made


@_tunes_itself
def adaptive_kfac(
    *,
    layers: Iterable[Layer],
    initial_damping: ArrayLike = 1e-2,
    min_damping: ArrayLike | None = None,
    max_damping: ArrayLike = 1e3,
    damping_decrease: ArrayLike = 0.7,
    damping_increase: ArrayLike = 1.5,
    l2: ArrayLike = 0.0,
    cg_steps: ArrayLike = 2,
    decay: ArrayLike = 0.95,
    bias_correction: bool = True,
    damping_rule: str = "pi",
    basis: str = "power",
    approx: str = "expand",
    factor_every: ArrayLike = 1,
    refresh_every: ArrayLike = 5,
    refresh_factor: ArrayLike = 1.2,
    outlier_clip: ArrayLike | None = 10.0,
    fallback: optax.GradientTransformation | None = None,
    block_size: int | None = None,
    factor_dtype: DTypeLike | None = None,
    rounding: str = "nearest",
    seed: int | Array = 0,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC that tunes itself: no learning rate, no momentum and no damping to choose.

    With the natural gradient and the last update as directions d1 = −P⁻¹g and d2, the update is
    `α·d1 + μ·d2`, where α and μ minimize the exact quadratic model of the loss,
    `½ δᵀ(C + (λ + l2) I)δ + gᵀδ`, C being the generalized Gauss-Newton matrix; `cg_steps` of
    conjugate gradients, preconditioned by P, then lower the model further. The same λ damps P.
    It falls after a step that lowers the loss by more than 3/4 of what the model predicts, grows
    after one that lowers it by less than 1/4, and a step that would raise the loss is not taken:
    its update is zero, and the next has no momentum.

    This is a complete optimizer: its updates are added to the parameters as they are. So it is not
    to be scaled further down a chain, which `mismatched_updates` would count; and as `value_fn` and
    `ggn_fn` take all parameters, it does not go inside of `optax.masked` or `optax.partition`.
    Arguments that are not listed here are those of `scale_by_kfac`.

    Args:
      initial_damping: λ of the first step, > 0.
      min_damping: The least λ, > 0, not above `initial_damping`. `None`: 1e-6, or 1e-12 where
        the factors are float64.
      max_damping: The largest λ, not below `initial_damping`.
      damping_decrease: Factor of λ after a good step, in (0, 1].
      damping_increase: Factor of λ after a poor step, ≥ 1; after a rejected one, its cube.
      l2: Of the term `l2/2·‖params‖²` that is added to the loss, ≥ 0: to its gradient, curvature
        and value, none of which is to have it already.
      cg_steps: Steps of conjugate gradients that improve an update, ≥ 0; 0, not traced, saves half
        of the products.
      refresh_every: The inverses are made anew after so many accepted steps; and, as with
        `scale_by_kfac`, at each of the first.
      refresh_factor: And where λ is more than so many times larger or smaller than they were made
        with, ≥ 1.
      factor_dtype: Real dtype of the stored factors and inverses. `None`: the precision of the
        parameters, but at least float32.

    Returns:
      A transformation. Its `update(grads, state, params, *, taps, value, value_fn, ggn_fn)` takes
      the loss at the parameters, `value`; `value_fn(params)`, the loss of the same batch at others;
      and `ggn_fn(v)`, products with C as of `ok.ggn_vector_product(loss_fn, params, *batch)`. Its
      state is an `AdaptiveState`. A gradient, taps, a value or products that are not finite give a
      zero update, and are counted as `skipped_steps`. But for taps that were taken in before
      products turned out not to be finite, they leave the state as it was.

    Raises:
      ValueError: As `scale_by_kfac`; in `update`, if an argument is missing, a function is none, or
        a loss is no real scalar.

    Cost, beside that of `scale_by_kfac` without momentum: the last update in the state; one more
    evaluation of the loss a step; and `2 + cg_steps` products, of about four evaluations each. With
    `cg_steps=0` they are two, or half of that where `ggn_fn` is what `ok.ggn_vector_product`
    returns, which has `inner_products`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import optax_kron as ok
      >>> def loss_fn(w, x, y):
      ...     return jnp.mean(jnp.sum(ok.losses.squared_error(jnp.tanh(x @ w), y), axis=-1))
      >>> x, w = jax.random.normal(jax.random.key(0), (2, 8, 4))
      >>> batch = x, jnp.tanh(x @ w[:4])
      >>> params = jnp.zeros((4, 4))
      >>> layers = ok.find_layers(loss_fn, params, *batch)
      >>> with_taps = ok.value_and_grad_with_taps(loss_fn, layers, fisher="exact")
      >>> tx = ok.adaptive_kfac(layers=layers)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     loss, grads, taps = with_taps(params, *batch)
      ...     updates, state = tx.update(
      ...         grads,
      ...         state,
      ...         params,
      ...         taps=taps,
      ...         value=loss,
      ...         value_fn=lambda p: loss_fn(p, *batch),
      ...         ggn_fn=ok.ggn_vector_product(loss_fn, params, *batch),
      ...     )
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(20):
      ...     params, state = step(params, state)
      >>> bool(loss_fn(params, *batch) < 1e-3)
      True

    Source: Martens and Grosse (2015), arXiv:1503.05671.
    """
    arguments = dict(locals())
    return _adaptive("adaptive_kfac", named_kfac, arguments)


@_tunes_itself
def adaptive_ekfac(
    *,
    layers: Iterable[Layer],
    initial_damping: ArrayLike = 1e-2,
    min_damping: ArrayLike | None = None,
    max_damping: ArrayLike = 1e3,
    damping_decrease: ArrayLike = 0.7,
    damping_increase: ArrayLike = 1.5,
    l2: ArrayLike = 0.0,
    cg_steps: ArrayLike = 2,
    decay: ArrayLike = 0.95,
    bias_correction: bool = True,
    damping_rule: str = "exact",
    basis: str = "power",
    approx: str = "expand",
    factor_every: ArrayLike = 1,
    correct_every: ArrayLike = 1,
    refresh_every: ArrayLike = 5,
    outlier_clip: ArrayLike | None = 10.0,
    fallback: optax.GradientTransformation | None = None,
    block_size: int | None = None,
    factor_dtype: DTypeLike | None = None,
    rounding: str = "nearest",
    seed: int | Array = 0,
    precision: jax.lax.PrecisionLike = None,
) -> optax.GradientTransformationExtraArgs:
    """EKFAC that tunes itself: no learning rate, no momentum and no damping to choose.

    `adaptive_kfac` with the natural gradient of `scale_by_ekfac`, whose damping needs no refresh to
    act. Arguments are those of the two.

    Returns:
      A transformation, as `adaptive_kfac`.

    Raises:
      ValueError: As `adaptive_kfac`.

    Cost: that of `scale_by_ekfac`, and beside it as of `adaptive_kfac`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> params = {"kernel": jnp.ones((3, 2))}
      >>> tx = ok.adaptive_ekfac(layers=[ok.Layer("dense", kernel="kernel")])
      >>> state = tx.init(params)

    Sources: Martens and Grosse (2015), arXiv:1503.05671; George et al. (2018), arXiv:1806.03884.
    """
    # Of no rule do the bases depend on the damping.
    arguments = {**locals(), "refresh_factor": np.inf}
    return _adaptive("adaptive_ekfac", named_ekfac, arguments)


# What the preconditioners take beside what is listed above: the quadratic model does this.
_LEFT_OUT = {
    "momentum": None,
    "momentum_dtype": None,
    "norm_constraint": None,
    "learning_rate": None,
    "stagger": False,  # which needs a fixed interval
}


def _adaptive(
    owner: str,
    named: Callable[[str, Mapping[str, Any]], optax.GradientTransformationExtraArgs],
    arguments: dict[str, Any],
) -> optax.GradientTransformationExtraArgs:
    """The transformation of some preconditioner, with its settings checked."""
    check = validation.check_range
    check(owner, "initial_damping", arguments["initial_damping"], open_left=True)
    check(owner, "min_damping", arguments["min_damping"], open_left=True, optional=True)
    check(owner, "max_damping", arguments["max_damping"], open_left=True)
    _check_order(owner, arguments, "min_damping", "initial_damping")
    _check_order(owner, arguments, "initial_damping", "max_damping")
    check(owner, "damping_decrease", arguments["damping_decrease"], most=1, open_left=True)
    check(owner, "damping_increase", arguments["damping_increase"], least=1)
    check(owner, "l2", arguments["l2"])
    check(owner, "cg_steps", arguments["cg_steps"])
    if owner == "adaptive_kfac":
        check(owner, "refresh_factor", arguments["refresh_factor"], least=1)
    if arguments["damping_rule"] == "exact":  # which comes in when the bases are applied
        arguments = {**arguments, "refresh_factor": np.inf}
    own = {field.name for field in dataclasses.fields(Adaptive)} & set(arguments)
    rest = {name: x for name, x in arguments.items() if name not in own}
    rest["layers"] = check_layers(owner, rest["layers"])

    def preconditioner(**settings: Any) -> optax.GradientTransformationExtraArgs:
        return named(owner, {**_LEFT_OUT, **rest, **settings})

    # Settings of the preconditioner are checked here too, rather than in the first `init`.
    preconditioner(
        damping=0.0,
        refresh_every=arguments["refresh_every"],
        factor_dtype=arguments["factor_dtype"],
    )
    made = Adaptive(owner, preconditioner, **{name: arguments[name] for name in own})
    return program.transformation(made.init, made.update)


def _check_order(owner: str, arguments: Mapping[str, Any], low: str, high: str) -> None:
    """Raise if one bound of the damping is above another; traced values pass."""
    least, most = arguments[low], arguments[high]
    if least is None or not program.is_concrete((least, most)):
        return
    # optax.inject_hyperparams gives them the dtype of a parameter, which may be complex.
    least, most = float(np.real(least)), float(np.real(most))
    if least > most:
        raise ValueError(
            f"{owner}: {low} must be at most {high}; got {low}={least:g} and {high}={most:g}."
        )
