"""Derivatives of a loss function that optimizers ask for."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from optax_kron.kernels import explicit
from optax_kron.types import PyTree


def map_stacked(fn: Callable[[PyTree], PyTree], stacked: PyTree) -> PyTree:
    """`jax.vmap(fn)(stacked)`, also of functions that hold a primitive without a batching rule.

    One element is not batched at all; several are evaluated one by one where a rule is missing, as
    for the derivative of `jax.lax.ragged_dot`, and on an explicit mesh, where rules, as that of a
    convolution, make shapes whose sharding JAX does not tell.

    Args:
      fn: Function of one element.
      stacked: Arrays with the elements along their first axis.

    Returns:
      The results, stacked.
    """
    if {len(x) for x in jax.tree.leaves(stacked)} == {1}:
        return jax.tree.map(lambda x: x[None], fn(jax.tree.map(lambda x: x[0], stacked)))
    if explicit.has_types():
        return jax.lax.map(fn, stacked)
    try:
        return jax.vmap(fn)(stacked)
    except NotImplementedError:  # which is how JAX says that there is no rule
        return jax.lax.map(fn, stacked)


def hessian_vector_product(
    loss_fn: Callable[..., PyTree], params: PyTree, *args: PyTree, has_aux: bool = False
) -> Callable[[PyTree], PyTree]:
    """The map from a direction v to the product Hv with the Hessian of a loss.

    The product is forward-over-reverse: exact, and never forms the Hessian. For complex parameters
    it is the derivative, along v, of the conjugate of `jax.grad`, which is the direction of
    steepest ascent that Optax expects as a gradient.

    Args:
      loss_fn: `loss_fn(params, *args)` returns a real scalar, or `(scalar, aux)` with `has_aux`.
      params: The Hessian is taken here; any pytree of floating-point or complex arrays.
      *args: Passed on to `loss_fn`.
      has_aux: Whether `loss_fn` returns auxiliary data, which is dropped.

    Returns:
      A function of a pytree `v` with the structure of `params`, that returns one like it. Leaves
      that `v` lacks (`None` or `optax.MaskedNode`, as inside `optax.masked`) count as zero, and
      the product lacks them too. Cost of a call: about four evaluations of the loss, and the memory
      of one gradient.

    Raises:
      ValueError: If `v` has a leaf that `params` has not. With Flax NNX, `nnx.Optimizer` passes a
        tree of arrays: `params` must be `nnx.as_pure(nnx.state(model, nnx.Param))`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> loss = lambda params, x: jnp.sum(x * params**2)
      >>> hvp_fn = ok.hessian_vector_product(loss, jnp.ones(2), jnp.array([1.0, 3.0]))
      >>> print(hvp_fn(jnp.array([1.0, 1.0])))
      [2. 6.]

    Source: Pearlmutter (1994), Fast exact multiplication by the Hessian.
    """

    def gradient(point: PyTree) -> PyTree:
        result = jax.grad(loss_fn, has_aux=has_aux)(point, *args)
        return optax.tree.conj(result[0] if has_aux else result)

    def product(v: PyTree) -> PyTree:
        # By path, as `v` may lack leaves of `params`.
        given, treedef = jax.tree_util.tree_flatten_with_path(v)
        given = {jax.tree_util.keystr(path): leaf for path, leaf in given}
        leaves, params_treedef = jax.tree_util.tree_flatten_with_path(params)
        paths = [jax.tree_util.keystr(path) for path, _ in leaves]
        if unknown := sorted(set(given) - set(paths)):
            raise ValueError(
                f"hessian_vector_product: v has leaves that params has not: {_listed(unknown)}. "
                f"params has {_listed(paths)}.{_nnx_hint([*given, *paths])}"
            )
        # Numbers are parameters too, as jax.grad takes them.
        leaves = [(path, jnp.asarray(x)) for path, x in leaves]
        point = params_treedef.unflatten([x for _, x in leaves])
        # Gradients, and so probes like them, may have another dtype than the parameters.
        tangent = [
            jnp.asarray(given[path]).astype(x.dtype) if path in given else jnp.zeros_like(x)
            for path, (_, x) in zip(paths, leaves, strict=True)
        ]
        tangent = params_treedef.unflatten(tangent)
        _, result = jax.jvp(gradient, (point,), (tangent,))
        result = dict(zip(paths, jax.tree.leaves(result), strict=True))
        return treedef.unflatten([result[path] for path in given])

    return product


def _listed(paths: list[str], most: int = 8) -> str:
    shown = [path or "a leaf at the root" for path in paths[:most]]
    return ", ".join([*shown, "..."] if len(paths) > most else shown) or "none"


def _nnx_hint(paths: list[str]) -> str:
    """What to do where one of two trees holds Flax variables, whose arrays are at `.value`."""
    if not any(path.endswith(".value") for path in paths):
        return ""
    return (
        " Arrays and Flax variables are different leaves: with Flax NNX, take the product at "
        "nnx.as_pure(nnx.state(model, nnx.Param))."
    )


def probed_product(
    owner: str, key: Array, like: PyTree, hvp_fn: Callable[[PyTree], PyTree]
) -> tuple[PyTree, PyTree]:
    """A white probe like a tree, and its product with the Hessian.

    Args:
      owner: Name of the optimizer, for messages.
      key: PRNG key of the probe.
      like: Tree of arrays.
      hvp_fn: From a tree to its product with the Hessian.

    Raises:
      ValueError: if `hvp_fn` returns a tree unlike its argument.
    """
    probe = optax.tree.random_like(key, like, sampler=jax.random.normal)
    product = hvp_fn(probe)

    def describe(tree):
        return jax.tree.structure(tree), [jnp.shape(x) for x in jax.tree.leaves(tree)]

    if describe(product) != describe(probe):
        raise ValueError(
            f"{owner}: hvp_fn must return a tree like its argument; got {describe(product)}, "
            f"expected {describe(probe)}."
        )
    return probe, product
