"""Inside `jax.shard_map`, with types that say what varies over a mesh, all is as on one device."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from optax_kron.kernels import eigenbases, ekfac, flow, kfoc, linalg, positive, roots, subspace

from .table import ROWS, largest_difference, random_like, regression, updater

MEMBERS = 2
# One of every kind; to compile takes long.
TO_RUN = ("kron_psgd-newton", "kfac-hand", "shampoo-eigh", "soap-kl_soap", "branch_kfac")
SQUARES = {
    "cholesky, by halves": lambda x: positive.inverses([x[None, :300, :300]] * 20, [x[0, :1]] * 20),
    "closed form": lambda x: positive.inverses([x[None, :2, :2]], [x[0, :1]]),
    "substitution by panels": lambda x: linalg.solve_upper_adjoint([x, x[:, 0]], x),
    "norm bound": lambda x: linalg.norm_bound(x, jnp.ones((linalg.PROBE_ROWS, len(x)))),
    "rotation": lambda x: linalg.procrustes_step(x, jnp.ones((linalg.PROBE_ROWS, len(x)))),
    "rotations": lambda x: linalg.rotate_to_hermitian(
        x, jnp.ones((linalg.PROBE_ROWS, len(x))), x[0] > 0
    ),
    "eigenvectors": lambda x: jax.vmap(eigenbases.hermitian_eigen)(x[None]),
    "power iteration": lambda x: jax.vmap(eigenbases.power_iteration)(x[None], x[None]),
    "subspace iteration": lambda x: subspace.follow([x[None]], [x[None]]),
    "root": lambda x: jax.vmap(lambda x: roots.inverse_root(x, 4, 1e-6))(x[None]),
    "root, newton": lambda x: roots.inverse_root(x, 4, 1e-6, method="newton"),
    "kfoc": lambda x: kfoc.factors(x[None, :2, :3], x[None, None, :2, :3]),
    "ekfac": lambda x: ekfac.eigenvalues(
        x[None, None, :2, :3], x[None, None, None, :2, :3], None, None
    ),
}


def program(row, mesh):
    """Training of members that vary over the mesh, and of one that does not: updates and states."""
    problem = regression()
    tx = row.make(problem)

    def train(params, grads):
        def step(carry, grads):
            params, state = carry
            updates, state = updater(row, tx, problem)(grads, state, params)
            return (optax.apply_updates(params, updates), state), updates

        return jax.lax.scan(step, (params, tx.init(params)), grads)

    def member(own, common):
        trained = train(*jax.tree.map(lambda x: x[0], own))
        return jax.tree.map(lambda x: x[None], trained), train(*common)

    specs = PartitionSpec("member"), PartitionSpec()
    return train, jax.shard_map(member, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=True)


def data(steps):
    """Parameters, and gradients of so many steps, of every member."""
    params = regression().params
    members = []
    for i in range(MEMBERS):
        grads = [random_like(params, 10 * i + j, 3.0**i) for j in range(steps)]
        members.append((random_like(params, i), jax.tree.map(lambda *x: jnp.stack(x), *grads)))
    return members


def on_mesh(function, *args):
    """A function of one member, traced for all."""
    mesh = AbstractMesh((MEMBERS,), ("member",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("member")

    def member(*args):
        result = function(*jax.tree.map(lambda x: x[0], args))
        return jax.tree.map(lambda x: x[None], result)

    together = jax.shard_map(member, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=True)
    jax.eval_shape(together, *jax.tree.map(lambda x: jnp.stack([x] * MEMBERS), args))


@pytest.mark.parametrize("row", [r for r in ROWS if "captured" not in r.name], ids=str)
def test_state_has_the_type_of_the_parameters(row):
    problem = regression()
    tx = row.make(problem)

    def step(params):
        state = tx.init(params)
        updates, after = updater(row, tx, problem)(params, state, params)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
        axes = [flow.varying_axes(x) for x in jax.tree.leaves((state, updates))]
        assert set(axes) == {frozenset(["member"])}
        return updates

    on_mesh(step, problem.params)


@pytest.mark.parametrize("name", SQUARES)
def test_kernels_take_what_varies(name):
    on_mesh(SQUARES[name], jnp.zeros((520, 520)))


def main():
    """Compare with single devices, in a process with several."""
    mesh = jax.make_mesh((MEMBERS,), ("member",), axis_types=(AxisType.Auto,))
    members = data(2)
    own = jax.tree.map(lambda *x: jnp.stack(x), *members)
    for row in (row for row in ROWS if row.name in TO_RUN):
        train, together = program(row, mesh)
        train, together = jax.jit(train), jax.jit(together)
        expected = [train(*member) for member in members]
        varying, common = together(own, members[1])
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *expected)
        for got, right in ((varying, stacked), (common, expected[1])):
            scale = max(np.max(np.abs(x), initial=1.0) for x in jax.tree.leaves(right))
            assert largest_difference(got, right) < 1e-4 * scale, row.name
        print(row.name)  # noqa: T201


def test_equal_to_single_devices():
    flags = os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={MEMBERS}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.contract.test_shard_map"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert sorted(done.stdout.split()) == sorted(TO_RUN), done.stderr


if __name__ == "__main__":
    main()
