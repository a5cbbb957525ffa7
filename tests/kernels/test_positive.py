"""Inverses of positive definite matrices against LAPACK's in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron.kernels import positive


def spectrum(size, condition, seed=0):
    """A matrix with eigenvalues from 1 down to 1 / condition, and its inverse."""
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    values = np.geomspace(1, 1 / condition, size)
    return basis * values @ basis.T, basis / values @ basis.T


def unshifted(stacks):
    return positive.inverses(stacks, [jnp.zeros(len(x), x.dtype) for x in stacks])


def relative(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


# Closed forms, one panel, several panels, one halving and two, with and without padding.
SIZES = [1, 2, 3, 31, 64, 65, 256, 257, 520, 1030]


@pytest.mark.parametrize("size", SIZES)
def test_inverse_in_double_precision(x64, size):
    matrix, expected = spectrum(size, 1e3)
    (inverse,), (finite,) = unshifted([jnp.asarray(matrix)[None]])
    assert finite.all()
    # A backward stable inverse is off by the condition number times rounding.
    assert relative(inverse[0], expected) < 1e3 * 1e-15
    np.testing.assert_allclose(
        inverse[0], inverse[0].T, rtol=0, atol=1e-12 * np.max(np.abs(inverse))
    )


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_inverse_loses_no_more_than_the_condition_number(condition):
    matrix, expected = spectrum(300, condition)
    (inverse,), (finite,) = unshifted([jnp.asarray(matrix, jnp.float32)[None]])
    assert finite.all()
    # Half a unit of rounding, times the condition number: what rounding the matrix alone costs.
    assert relative(inverse[0], expected) < condition * 6e-8


def test_scale_is_immaterial():
    matrix, expected = spectrum(100, 1e2)
    for scale in (1e-30, 1e30):
        (inverse,), _ = unshifted([jnp.asarray(scale * matrix, jnp.float32)[None]])
        assert relative(scale * np.asarray(inverse[0], np.float64), expected) < 1e-4


def test_stacks_of_many_sizes_keep_their_order():
    sizes = [(5, 3), (1, 1), (2, 70), (3, 4), (1, 2), (2, 65), (11, 3)]
    problems = [
        [spectrum(size, 10, seed=10 * i + j) for j in range(count)]
        for i, (count, size) in enumerate(sizes)
    ]
    stacks = [jnp.asarray(np.stack([m for m, _ in p]), jnp.float32) for p in problems]
    inverses, finite = jax.jit(unshifted)(stacks)
    for inverse, are_finite, problem in zip(inverses, finite, problems, strict=True):
        assert are_finite.shape == (len(problem),)
        assert are_finite.all()
        for one, (_, expected) in zip(inverse, problem, strict=True):
            assert relative(one, expected) < 1e-5


@pytest.mark.parametrize("size", [1, 2, 3, 65, 300])
@pytest.mark.parametrize("kind", ["indefinite", "singular", "nan", "infinite"])
def test_what_is_not_positive_definite_is_not_finite_and_leaves_its_neighbours(size, kind):
    matrices = np.stack([spectrum(size, 10, seed)[0] for seed in range(3)])
    bad = {"indefinite": -1.0, "singular": 0.0, "nan": np.nan, "infinite": np.inf}[kind]
    matrices[1, -1, :] = matrices[1, :, -1] = 0
    matrices[1, -1, -1] = bad
    (inverses,), (finite,) = unshifted([jnp.asarray(matrices, jnp.float32)])
    expected, _ = unshifted([jnp.asarray(matrices[::2], jnp.float32)])
    np.testing.assert_allclose(inverses[::2], expected[0], rtol=1e-5)
    assert finite[0]
    assert finite[2]
    if kind != "infinite":  # whose inverse is zero there
        assert not finite[1]
        assert not np.isfinite(inverses[1]).all()


def test_more_matrices_than_go_side_by_side():
    problems = [spectrum(5, 10, seed) for seed in range(19)]
    stack = jnp.asarray(np.stack([m for m, _ in problems]), jnp.float32)
    (inverses,), (finite,) = unshifted([stack])
    assert finite.shape == (19,)
    for one, (_, expected) in zip(inverses, problems, strict=True):
        assert relative(one, expected) < 1e-5


def test_vmap_is_a_loop():
    stack = jnp.asarray(np.stack([spectrum(70, 10, seed)[0] for seed in range(6)]), jnp.float32)
    stack = stack.reshape(3, 2, 70, 70)
    together, _ = jax.jit(jax.vmap(lambda x: unshifted([x])))(stack)
    for one, matrices in zip(together[0], stack, strict=True):
        alone, _ = unshifted([matrices])
        assert relative(one, np.asarray(alone[0], np.float64)) < 1e-6


def test_without_stacks():
    assert positive.inverses([], []) == ([], [])


def test_shifts_are_added_to_the_diagonals():
    sizes = (1, 2, 5, 70, 300, 700)
    pairs = [spectrum(size, 1e2, seed=size)[0] for size in sizes]
    stacks = [jnp.asarray(np.stack([m, m]), jnp.float32) for m in pairs]
    shifts = [jnp.asarray([0.5, 2.0], jnp.float32)] * len(sizes)
    stacks_of_inverses, _ = jax.jit(positive.inverses)(stacks, shifts)
    for inverses, matrix in zip(stacks_of_inverses, pairs, strict=True):
        for inverse, shift in zip(inverses, (0.5, 2.0), strict=True):
            expected = np.linalg.inv(matrix + shift * np.eye(len(matrix)))
            assert relative(inverse, expected) < 1e-5


def test_sizes_that_are_near_share_a_program_and_those_that_are_not_do_not():
    def programs(*shapes):
        return positive._programs([jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes])

    assert programs((1, 1001, 1001), (1, 501, 501), (1, 251, 251)) == [(256, [[2], [1], [0]])]
    assert programs((1, 251, 251), (1, 65, 65)) == [(256, [[0]]), (72, [[1]])]
    assert programs((9, 65, 65), (1, 31, 31)) == [(72, [[0, 1]])]
    assert programs((1, 2, 2), (1, 1, 1), (1, 3, 3)) == [(4, [[2]]), (2, [[0]]), (1, [[1]])]
