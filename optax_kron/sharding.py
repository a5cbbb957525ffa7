"""Where the state of an optimizer lives on a mesh."""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from optax_kron.kernels import explicit
from optax_kron.transforms.mesh import allowing
from optax_kron.types import PyTree


def state_shardings(
    tx: optax.GradientTransformation, params: PyTree, mesh: Mesh | AbstractMesh
) -> PyTree:
    """How the state of an optimizer is spread over a mesh, before there is any.

    What is kept of blocks is cut along its first axis, everything else is on all devices, but for
    what Optax keeps like the parameters: it has their shardings, as far as these are given.

    Args:
      tx: A transformation of this library, or a chain or wrapper around some.
      params: The parameters, or `jax.ShapeDtypeStruct`s; their shardings are looked at if they are
        on this mesh.
      mesh: The mesh of `jax.set_mesh`.

    Returns:
      A tree like the state, of `NamedSharding`s: for `out_shardings` of `jax.jit`, for
      `jax.device_put`, or, beside the shapes of `jax.eval_shape(tx.init, params)`, to restore a
      checkpoint. Nothing is computed: it costs one trace of `tx.init`.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> params = {"kernel": jax.ShapeDtypeStruct((64, 32), jnp.float32)}
      >>> shardings = ok.sharding.state_shardings(ok.soap(1e-3), params, mesh)
      >>> with jax.set_mesh(mesh):
      ...     state = jax.jit(ok.soap(1e-3).init, out_shardings=shardings)(
      ...         {"kernel": jnp.zeros((64, 32))}
      ...     )
    """
    # With explicit axes types tell the shardings, and types are known without any array. Where some
    # axes are explicit, others take no part.
    kinds = mesh.axis_types
    if AxisType.Explicit not in kinds:
        kinds = (AxisType.Explicit,) * len(mesh.axis_names)
    typed = AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=kinds)
    names = {n for n, kind in zip(mesh.axis_names, kinds, strict=True) if kind == AxisType.Explicit}

    def abstract(x):
        sharding, spec = getattr(x, "sharding", None), PartitionSpec()
        if isinstance(sharding, NamedSharding) and sharding.mesh.shape == mesh.shape:
            every = (explicit.mesh_axes(sharding.spec, axis) for axis in range(len(sharding.spec)))
            spec = PartitionSpec(*(tuple(n for n in axes if n in names) or None for axes in every))
        shape, dtype = jnp.shape(x), jnp.result_type(x)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(typed, spec))

    with jax.sharding.use_abstract_mesh(typed):
        # `eval_shape` would not tell them of a mesh with axes of both kinds.
        program, state = jax.make_jaxpr(tx.init, return_shape=True)(jax.tree.map(abstract, params))
    found = jax.tree.map(lambda aval: NamedSharding(mesh, aval.sharding.spec), program.out_avals)
    return jax.tree.unflatten(jax.tree.structure(state), found)


def over_axes(
    tx: optax.GradientTransformation, axes: Sequence[str]
) -> optax.GradientTransformationExtraArgs:
    """The same transformation, whose blocks are spread over some axes of the mesh alone.

    Along other axes every device has the same blocks, and does the same work: for axes whose links
    are slow, or whose devices are better left to others.

    Args:
      tx: A transformation of this library, or a chain or wrapper around some.
      axes: Names of axes of the mesh of `jax.set_mesh`, one or more. Without a mesh they are not
        looked at.

    Returns:
      The transformation. It costs what the other does on a mesh of these axes.

    Raises:
      ValueError: In `init` and `update`, if the mesh has no such axes, or has explicit axes, and
        these are not.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> tx = ok.sharding.over_axes(ok.soap(1e-3), ("data",))
      >>> with jax.set_mesh(jax.make_mesh((1, 1), ("data", "model"))):
      ...     state = tx.init(jnp.ones((3, 2)))
    """
    if isinstance(axes, str) or not isinstance(axes, Iterable):
        raise ValueError(f"over_axes: axes must be a sequence of names; got {axes!r}.")
    names, inner = tuple(axes), optax.with_extra_args_support(tx)

    def init(params):
        with allowing(names):
            return inner.init(params)

    def update(updates, state, params=None, **extra_args):
        with allowing(names):
            return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def resize_state(tx: optax.GradientTransformation, state: PyTree, params: PyTree) -> PyTree:
    """A state that was made on another mesh, or on none, for the mesh of `jax.set_mesh`, or none.

    Stacks of blocks are filled up to a multiple of the devices, so that their lengths depend on the
    mesh. What fills them up is added or dropped; all else stays as it is, bit by bit.

    Args:
      tx: The transformation that made it.
      state: Arrays that are on the devices of this mesh, or on the host, as restored from a
        checkpoint. Of an `nnx.Optimizer`, `nnx.as_pure(optimizer.opt_state)`, and likewise of the
        parameters.
      params: The parameters, or `jax.ShapeDtypeStruct`s.

    Returns:
      The state, of the shapes and with the shardings of `tx.init(params)`. Cost: a trace of
      `tx.init`, and a copy of the state; no operations.

    Raises:
      ValueError: If it is no state of such parameters.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_kron as ok
      >>> tx, params = ok.soap(1e-3), jnp.ones((3, 2))
      >>> with jax.set_mesh(jax.make_mesh((1,), ("data",))):
      ...     state = ok.sharding.resize_state(tx, tx.init(params), params)
    """
    made = jax.eval_shape(tx.init, params)
    if jax.tree.structure(made) != jax.tree.structure(state):
        raise ValueError(
            "resize_state: the state has another structure than tx.init(params) gives: it was made "
            "by another transformation, with other settings, or holds variables of Flax NNX, which "
            "nnx.as_pure makes arrays of."
        )
    resized = jax.tree_util.tree_map_with_path(_resized, state, made)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return resized
    specs = jax.tree.map(lambda x: x.spec, state_shardings(tx, params, mesh))
    return jax.jit(lambda x: x, out_shardings=specs)(resized)


def _resized(path, x, like):
    if x.shape == like.shape:
        return x
    if not like.shape or x.shape[1:] != like.shape[1:]:
        raise ValueError(
            f"resize_state: {jax.tree_util.keystr(path)} has shape {x.shape}; expected "
            f"{like.shape}, or more or fewer rows. Pass the parameters that the state was made for."
        )
    rows = jnp.asarray(x)[: like.shape[0]]
    missing = like.shape[0] - len(rows)
    return jnp.pad(rows, [(0, missing), *[(0, 0)] * (rows.ndim - 1)])
