"""Labels of categorical distributions have their probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron.kernels import categorical

RNG = np.random.default_rng(0)
SIZES = (1, 2, 128, 129, 300, 5000)


@pytest.mark.parametrize("classes", SIZES)
def test_labels_have_their_probabilities(classes):
    p = RNG.exponential(size=(3, classes)) ** 3
    p[:, RNG.integers(classes, size=classes // 3)] = 0
    p[:, 0] += 0.1
    count = 20000
    labels = categorical.draw(jax.random.key(classes), jnp.asarray(p, jnp.float32), count)
    assert labels.shape == (count, 3)
    p /= p.sum(axis=1, keepdims=True)
    for n in range(3):
        found = np.bincount(labels[:, n], minlength=classes)
        assert len(found) == classes
        assert not found[p[n] == 0].any()
        # Pearson's statistic over classes that are expected at least five times, the others in one.
        often = count * p[n] >= 5
        wanted = np.append(count * p[n][often], count * p[n][~often].sum() + 1e-9)
        seen = np.append(found[often], found[~often].sum())
        statistic, degrees = np.sum((seen - wanted) ** 2 / wanted), len(wanted) - 1
        assert statistic < degrees + 5 * np.sqrt(2 * degrees) + 5


@pytest.mark.parametrize("classes", [3, 300])
def test_every_number_has_a_label_of_positive_probability(classes):
    """Also one that is rounded up to the sum of all, and one at the edge of a block."""
    p = np.zeros((4, classes), np.float32)
    p[0, 1] = 1e-38  # subnormal, and zero on most devices
    p[1, -2] = 3e38  # so large that its sum with itself is not finite
    p[2, : classes // 2] = 1 / 3
    p[3, [0, classes // 2]] = 1, 1e-7
    labels = np.asarray(categorical.draw(jax.random.key(0), jnp.asarray(p), 1000))
    for n in (1, 2, 3):
        assert (p[n, labels[:, n]] > 0).all()
    assert labels.min() >= 0
    assert labels.max() < classes


def test_no_label_without_mass_where_sums_of_many_are_rounded():
    """Sums of more than 128 numbers are those of a tree: they grow where nothing is added, too."""
    p = RNG.exponential(size=(100, 1000)) * (RNG.random((100, 1000)) < 0.5)
    p = jnp.asarray(p, jnp.float32)
    sums = jnp.cumsum(p, axis=-1)
    row, place = np.nonzero((jnp.diff(sums) > 0) & (p[:, 1:] == 0))
    assert len(row)
    # Of targets just where the sum grows without mass.
    labels, left = categorical._passed(p[row], sums[row, place])
    assert (p[row, labels] > 0).all()
    assert (left >= 0).all()


def test_no_mass_and_nan_have_some_label():
    p = jnp.array([[0.0] * 200, [jnp.nan] * 200])
    labels = categorical.draw(jax.random.key(0), p, 5)
    assert bool(jnp.all((labels >= 0) & (labels < 200)))


@pytest.mark.usefixtures("x64")
def test_float64_and_programs():
    p = jnp.asarray(RNG.uniform(size=(2, 300)))
    draw = jax.jit(categorical.draw, static_argnums=2)
    labels = draw(jax.random.key(1), p, 4)
    np.testing.assert_array_equal(labels, categorical.draw(jax.random.key(1), p, 4))
    # Its random numbers have 64 bits too.
    assert "bit_width=64" in str(jax.make_jaxpr(draw, static_argnums=2)(jax.random.key(1), p, 4))


def test_one_random_number_for_a_label():
    program = jax.make_jaxpr(categorical.draw, static_argnums=2)
    text = str(program(jax.random.key(0), jnp.ones((7, 5000)), 2))
    assert "shape=(2, 7)" in text
    assert "shape=(2, 7, 5000)" not in text
