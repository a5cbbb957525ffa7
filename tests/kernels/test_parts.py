"""Parts of stacks are slices, whichever way they are taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron.kernels.parts import parts

RNG = np.random.default_rng(0)
STACKS = {
    "a": jnp.asarray(RNG.normal(size=(7, 3, 2)), jnp.float32),
    "b": jnp.asarray(RNG.integers(9, size=(4, 5))),
    "c": jnp.zeros((3, 0)),
}
COUNTS = {"a": [1, 2, 1, 1], "b": [1, 3], "c": [3]}  # two rows of "a" belong to no part
WANTED = {
    label: [np.asarray(STACKS[label])[sum(rows[:i]) :][:n] for i, n in enumerate(rows)]
    for label, rows in COUNTS.items()
}


def check(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("jitted", [False, True])
def test_parts_are_slices(devices, jitted, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)

    def take(stacks):
        return parts(stacks, COUNTS)

    check((jax.jit(take) if jitted else take)(STACKS), WANTED)


def test_under_vmap_and_with_derivatives():
    def take(a):
        return parts({"a": a}, {"a": COUNTS["a"]})["a"]

    a = STACKS["a"]
    stacked = jax.jit(jax.vmap(take))(jnp.stack([a, 2 * a]))
    check(stacked, [np.stack([x, 2 * x]) for x in WANTED["a"]])
    gradient = jax.jit(jax.grad(lambda a: sum(k * jnp.sum(x) for k, x in enumerate(take(a), 1))))(a)
    of_rows = np.array([1, 2, 2, 3, 4, 0, 0], np.float32)
    check(gradient, np.broadcast_to(of_rows[:, None, None], a.shape))


def test_equal_parts_are_one_kernel():
    text = jax.jit(lambda a: parts({"a": a}, {"a": [1] * 7})["a"]).lower(STACKS["a"]).as_text()
    assert text.count("stablehlo.dynamic_slice") == 7
    assert "stablehlo.slice" not in text
