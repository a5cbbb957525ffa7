"""Layers before selections of the examples: exact where the network is linear, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron import losses
from optax_kron.capture.find import find_layers
from optax_kron.capture.taps import value_and_grad_with_taps

from .test_identities import assert_exact, compare, draw

N = 7
NET = {"a": {"w": draw(3, 4), "b": draw(4)}, "c": {"w": draw(4, 2)}}
X, OTHER, MORE = draw(N, 3), draw(3, 3, seed=1), draw(N, 3, seed=2)
ROWS = jnp.array([0, 2, 2, 6, 5])  # one is read twice, others never
MASK = jnp.arange(N) % 3 != 1


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def net(p, x):
    return (x @ p["a"]["w"] + p["a"]["b"]) @ p["c"]["w"]


def half(h, k):
    return h[k * (N // 2) : (k + 1) * (N // 2)]


# Of the outputs of the network and of indices. Each is linear, so that A ⊗ G is the block itself.
SELECTIONS = {
    "rows": lambda h, i: h[i],
    "known_rows": lambda h, i: h[np.array([0, 2, 2, 6])],
    "negative_rows": lambda h, i: h[-1 - i],
    "rows_out_of_bounds": lambda h, i: jnp.take(h, i + 2, axis=0, mode="fill", fill_value=0.0),
    "clipped_rows": lambda h, i: jnp.take(h, i + 2, axis=0, mode="clip"),
    "mapped_rows": lambda h, i: jax.vmap(lambda j: h[j])(i),
    "rows_of_rows": lambda h, i: h[2:][i[:3]][jnp.array([1, 0])],
    "rows_in_a_checkpoint": lambda h, i: jax.checkpoint(lambda h, i: h[i])(h, i),
    "first": lambda h, i: h[:3],
    "one": lambda h, i: h[2:3],
    "strided": lambda h, i: h[1::2],
    "reversed": lambda h, i: h[::-1],
    "nonzero": lambda h, i: h[MASK.nonzero(size=4)],
    "nonzero_filled": lambda h, i: h[jnp.nonzero(i < 4, size=5)[0]],
    "boolean_mask": lambda h, i: h[np.asarray(MASK)],
    "padded": lambda h, i: jnp.pad(h, ((1, 2), (0, 0))),
    "tiled": lambda h, i: jnp.tile(h, (2, 1)),
    "repeated": lambda h, i: jnp.repeat(h, 2, axis=0),
    "repeated_unevenly": lambda h, i: jnp.repeat(h, np.array([1, 2, 0, 3, 1, 1, 1]), axis=0),
    "rolled": lambda h, i: jnp.roll(h, 2, axis=0),
    "rolled_by_a_number": lambda h, i: jnp.roll(h, i[1], axis=0),
    "dynamic_slice": lambda h, i: jax.lax.dynamic_slice_in_dim(h, i[1], 3),
    "permuted": lambda h, i: jax.random.permutation(jax.random.key(1), h),
    "sorted": lambda h, i: h[jnp.argsort(jnp.sin(jnp.arange(N) + i[0]))],
    "parts_joined": lambda h, i: jnp.concatenate([h[:4], h[2:]]),
    "joined_twice": lambda h, i: jnp.concatenate([h, h]),
    "halves": lambda h, i: jnp.concatenate([half(h, 0), half(h, 1)], axis=-1),
    "even_and_odd": lambda h, i: jnp.concatenate([h[0:6:2], h[1:6:2]], axis=-1),
    "split_halves": lambda h, i: jnp.concatenate(jnp.split(h[1:], 2), axis=-1),
    "mirrored_halves": lambda h, i: jnp.concatenate([h[:3], h[:-4:-1]], axis=-1),
    "known_pairs": lambda h, i: jnp.concatenate([h[np.array([0, 3])], h[np.array([5, 2])]], -1),
    "halves_of_unequal_length": lambda h, i: jnp.concatenate(
        [h[:3], jnp.pad(h[3:5], ((0, 1), (0, 0)))], axis=-1
    ),
    "an_action_of_each": lambda h, i: h[jnp.arange(N), jnp.ones(N, int) * (i[0] + 1)],
    "an_action_of_some": lambda h, i: h[jnp.arange(1, N, 2), jnp.ones(3, int) * (i[0] + 1)],
    "an_action_of_rows": lambda h, i: h[i, jnp.ones_like(i)],
    "along_an_axis": lambda h, i: jnp.take_along_axis(h, jnp.zeros((N, 1), int) + i[0], 1)[:, 0],
    "vmapped_action": lambda h, i: jax.vmap(lambda q, a: q[a])(h, jnp.zeros(N, int) + i[0]),
}


def weighted(out, target):
    """A sum of losses that weigh 1, 2, 3, … thirds."""
    each = losses.squared_error(out, jnp.resize(target, out.shape)).reshape(len(out), -1).sum(1)
    return jnp.sum(jnp.arange(1.0, len(out) + 1) * each) / 3


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_linear_net_before_a_selection_is_exact(name):
    def loss_fn(p, x, rows, y):
        return weighted(SELECTIONS[name](net(p, x), rows), y)

    assert_exact(compare(loss_fn, NET, X, ROWS, draw(N, 2)))


def two_batches(p):
    return weighted(jnp.concatenate([net(p, X), net(p, OTHER)]), X)


def two_batches_of_one_size(p):
    return weighted(jnp.concatenate([net(p, X), net(p, MORE)])[3:9], X)


def losses_of_all_and_of_some(p):
    out = net(p, X)
    return weighted(out, X) + weighted(out[ROWS], X) + weighted(out[:3], X)


def some_rows_replaced(p):
    # Whose outputs are no longer the network's weigh nothing: their losses are masked.
    out = net(p, X).at[ROWS].set(0.5)
    read = jnp.zeros(N).at[ROWS].set(1)
    return jnp.sum((1 - read) * losses.squared_error(out, draw(N, 2)).sum(-1))


def losses_of_two_parts(p):
    out = net(p, X)
    return weighted(out[:3], X) + weighted(out[3:], X)


def targets_from_the_next_example(p):
    out = net(p, X)
    return weighted(out[:-1] - jax.lax.stop_gradient(out[1:]), X)


def selected_after_a_map(p):
    return weighted(jax.lax.map(lambda x: net(p, x), X)[ROWS], X)


SEVERAL = [
    some_rows_replaced,
    *(two_batches, two_batches_of_one_size, losses_of_all_and_of_some, losses_of_two_parts),
    *(targets_from_the_next_example, selected_after_a_map),
]


@pytest.mark.parametrize("loss_fn", SEVERAL, ids=lambda f: f.__name__)
def test_several_selections_in_one_loss_are_exact(loss_fn):
    assert_exact(compare(loss_fn, NET))


def test_the_check_on_numbers_agrees():
    """The check compares with the gradient, and takes the cotangent of one example alone."""
    for name in ("rows", "rolled_by_a_number", "halves_of_unequal_length", "an_action_of_each"):

        def loss_fn(p, x, rows, y, name=name):
            return weighted(jnp.tanh(SELECTIONS[name](jnp.tanh(net(p, x)), rows)), y)

        layers = find_layers(loss_fn, NET, X, ROWS, draw(N, 2))
        assert len(layers) == 2, (name, layers)
        assert not layers.uncovered, (name, layers)


def taps_of(selection, fisher="empirical", **kwargs):
    def loss_fn(p, x, y):
        out = selection(net(p, x))
        return jnp.mean(losses.squared_error(out, jnp.resize(y, out.shape)).sum(-1))

    fn = jax.jit(value_and_grad_with_taps(loss_fn, fisher=fisher, **kwargs))
    return fn(NET, X, draw(N, 2), key=jax.random.key(0))


def test_examples_that_are_not_selected_weigh_nothing():
    _, _, taps = taps_of(lambda h: h[ROWS])
    for (tap,) in taps.values():
        np.testing.assert_allclose(tap.weights, 2 * np.array([1, 0, 2, 0, 0, 1, 1]) / 5)
        unread = tap.output_grads[:, :, np.array([1, 3, 4])]
        np.testing.assert_array_equal(unread, np.zeros_like(unread))


def test_halves_of_a_batch_are_two_uses_of_one_example():
    _, _, taps = taps_of(lambda h: half(h[1:], 0) - half(h[1:], 1))
    for (tap,) in taps.values():
        # What is not used is an example of its own, without weight.
        assert tap.inputs.shape[1:3] == (4, 2)
        np.testing.assert_allclose(tap.weights, [[0, 0]] + [[2 / 3] * 2] * 3)
    np.testing.assert_allclose(taps["a"][0].inputs[0, 2, :, :3], X[jnp.array([2, 5])])


@pytest.mark.parametrize("fisher", ["mc", "sketch"])
def test_moments_formed_inside_are_those_of_the_taps(fisher):
    _, _, taps = taps_of(lambda h: h[ROWS], fisher)
    _, _, moments = taps_of(lambda h: h[ROWS], fisher, reduce=True)
    for name, (tap,) in taps.items():
        weights = tap.weights / tap.weights.sum()
        inputs = jnp.einsum("n,bnsi,bnsj->bij", weights, tap.inputs, tap.inputs)
        outputs = jnp.einsum("vbnsi,vbnsj->bij", tap.output_grads, tap.output_grads) / N
        np.testing.assert_allclose(moments[name][0].input_factor, inputs, rtol=1e-10)
        np.testing.assert_allclose(moments[name][0].output_factor, outputs, rtol=1e-10)
        np.testing.assert_allclose(moments[name][0].weight, tap.weights.sum(), rtol=1e-10)


# What mixes examples is declared, with the equation that does it.
MIXED = {
    "neighbours": (lambda h, i: h[1:] - h[:-1], "slice combines examples"),
    "others": (lambda h, i: h[i] - h[: len(i)], "combines examples"),
    "sums_of_rows": (lambda h, i: h[jnp.stack([i, i[::-1]], 1)].sum(1), "gather selects examples"),
    "scattered": (lambda h, i: jnp.zeros_like(h).at[i].set(h[:5]), "scatter mixes examples"),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_examples_is_declared(name):
    selection, reason = MIXED[name]

    def loss_fn(p, x, rows, y):
        return weighted(jnp.tanh(selection(net(p, x), rows)), y)

    layers = find_layers(loss_fn, NET, X, ROWS, draw(N, 2), check=False)
    assert len(layers) == 0, layers
    assert all(reason in u.reason for u in layers.uncovered), layers
