"""Where K-FAC's block is exactly the curvature: identities in float64, with negative controls."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron import losses
from optax_kron.capture.execution.columns import chosen, shared_columns
from optax_kron.capture.find import find_layers
from optax_kron.capture.ggn import ggn_vector_product
from optax_kron.capture.taps import value_and_grad_with_taps
from optax_kron.kernels import kfac
from optax_kron.layers.paths import by_path

from . import patterns

N = 4


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def exact_blocks(loss_fn, params, args, layers):
    """The blocks of the generalized Gauss-Newton matrix on layers, each [B·in·out, B·in·out]."""
    product = ggn_vector_product(loss_fn, params, *args)
    flat, unflatten = jax.flatten_util.ravel_pytree(params)
    matrix = jax.vmap(lambda v: jax.flatten_util.ravel_pytree(product(unflatten(v)))[0])(
        jnp.eye(flat.size)
    )
    places = by_path(unflatten(jnp.arange(flat.size, dtype=float)))
    blocks = {}
    for layer in layers:
        # The layer's part of the parameters, in canonical order.
        order = layer.take(places).ravel().astype(int)
        blocks[layer.name] = matrix[order][:, order]
    return blocks


def kfac_block(layer, taps, approx="expand"):
    """`A ⊗ G` for every block, as one matrix [B·in·out, B·in·out]."""
    factors_a, factors_g, total = 0, 0, 0
    for tap in taps:
        a, g = tap.inputs, tap.output_grads
        weights = jnp.broadcast_to(tap.weights.reshape(a.shape[1], -1), a.shape[1:3])
        if approx == "reduce":
            own = weights.sum(axis=1, keepdims=True)
            a = jnp.einsum("ns,bnsi->bni", weights / own, a)[:, :, None]
            g, weights = g.sum(axis=3, keepdims=True), own
        weights = weights / a.shape[2]
        factors_a += jnp.einsum("ns,bnsi,bnsj->bij", weights, a, a)
        factors_g += jnp.einsum("vbnso,vbnsp->bop", g, g) / a.shape[1]
        total += weights.sum()
    factors_a = factors_a / total
    blocks = [jnp.kron(a, g) for a, g in zip(factors_a, factors_g, strict=True)]
    return jax.scipy.linalg.block_diag(*blocks)


def compare(loss_fn, params, *args, approx="expand", names=None):
    """Relative distance of K-FAC's block to the exact one, for every layer."""
    layers = find_layers(loss_fn, params, *args, check=False)
    assert not layers.uncovered, layers

    @jax.jit  # one program, as most of the time goes into compiling
    def distances(params, *args):
        _, _, taps = value_and_grad_with_taps(loss_fn, layers, fisher="exact")(params, *args)
        blocks = exact_blocks(loss_fn, params, args, layers)
        found = {}
        for layer in layers:
            exact = blocks[layer.name]
            block = kfac_block(layer, taps[layer.name], approx)
            found[layer.name] = jnp.linalg.norm(block - exact) / jnp.linalg.norm(exact)
        return found

    return {name: float(x) for name, x in distances(params, *args).items()}


def assert_exact(distances):
    assert distances
    assert max(distances.values()) < 1e-10, distances


LINEAR = {
    "a": {"w": draw(3, 4), "b": draw(4)},
    "b": {"w": draw(4, 5), "b": draw(5)},
    "c": {"w": draw(5, 2)},
}


def linear_net(p, x):
    h = x @ p["a"]["w"] + p["a"]["b"]
    h = h @ p["b"]["w"] + p["b"]["b"]
    return h @ p["c"]["w"]


def regress(out, y):
    return jnp.mean(jnp.sum(losses.squared_error(out, y), axis=-1))


def test_deep_linear_net_with_squared_error_is_exact():
    assert_exact(
        compare(lambda p, x, y: regress(linear_net(p, x), y), LINEAR, draw(7, 3), draw(7, 2))
    )


def test_deep_linear_net_under_a_sum_loss_is_exact():
    def loss_fn(p, x, y):
        return jnp.sum(losses.l2_loss(linear_net(p, x), y))

    assert_exact(compare(loss_fn, LINEAR, draw(7, 3), draw(7, 2)))


@pytest.mark.parametrize("masked", [False, True])
def test_uneven_weights_and_masks_keep_the_linear_net_exact(masked):
    weights = jnp.array([0.1, 2.0, 0.0, 0.7, 1.3, 0.2, 5.0]) if not masked else jnp.arange(7) < 4

    def loss_fn(p, x, y):
        each = jnp.sum(losses.squared_error(linear_net(p, x), y), axis=-1)
        return jnp.sum(weights * each) / jnp.sum(weights)

    assert_exact(compare(loss_fn, LINEAR, draw(7, 3), draw(7, 2)))


def test_two_batches_of_different_size_in_one_loss():
    def loss_fn(p, x, y, u, v):
        return regress(linear_net(p, x), y) + 0.3 * regress(linear_net(p, u), v)

    args = draw(7, 3), draw(7, 2), draw(4, 3, seed=1), draw(4, 2, seed=1)
    layers = find_layers(loss_fn, LINEAR, *args, check=False)
    _, _, taps = jax.jit(value_and_grad_with_taps(loss_fn, layers, fisher="exact"))(LINEAR, *args)
    assert {len(groups) for groups in taps.values()} == {2}
    assert sorted(tap.inputs.shape[1] for tap in taps["a"]) == [4, 7]


def exact_taps(loss_fn, params, *args):
    layers = find_layers(loss_fn, params, *args, check=False)
    return jax.jit(value_and_grad_with_taps(loss_fn, layers, fisher="exact"))(params, *args)[2]


def test_heads_have_columns_where_they_reach_alone():
    params = {
        "trunk": draw(3, 4),
        "one": draw(4, 1),
        "two": draw(4, 2),
        "three": draw(4, 1, seed=1),
    }
    targets = draw(7, 1), draw(7, 2), draw(7, 1, seed=1)
    names = ["one", "two", "three"]

    def loss_fn(p, x, *targets):
        h = jnp.tanh(x @ p["trunk"])
        return sum(regress(h @ p[name], y) for name, y in zip(names, targets, strict=True))

    taps = exact_taps(loss_fn, params, draw(7, 3), *targets)
    columns = {name: len(tap.output_grads) for name, (tap,) in taps.items()}
    assert columns == {"trunk": 4, "one": 1, "two": 2, "three": 1}
    for (tap,) in taps.values():
        assert jnp.all(jnp.any(tap.output_grads != 0, axis=(1, 2, 3, 4)))
    for name in names:  # of half the squared error times two
        (tap,) = taps[name]
        G = jnp.einsum("vbnso,vbnsp->op", tap.output_grads, tap.output_grads) / 7
        np.testing.assert_allclose(G, 2 * jnp.eye(len(tap.output_grads)), rtol=1e-12)


@pytest.mark.parametrize("outputs", [1, 2])
def test_heads_of_two_batches_share_their_columns(outputs):
    """As those of the interior and of the boundary of a domain."""
    params = {"a": draw(3, 4), "b": draw(4, outputs)}

    def one(p, x, y):
        return regress(jnp.tanh(x @ p["a"]) @ p["b"], y)

    def both(p, x, y, u, v):
        return one(p, x, y) + 0.3 * one(p, u, v)

    inside, border = (draw(7, 3), draw(7, outputs)), (draw(4, 3, seed=1), draw(4, outputs))
    taps = exact_taps(both, params, *inside, *border)
    alone = exact_taps(one, params, *inside)
    for name, groups in taps.items():
        assert [len(tap.output_grads) for tap in groups] == [outputs, outputs]
        (wanted,) = alone[name]
        (found,) = (tap for tap in groups if tap.inputs.shape[1] == 7)
        # One number of examples scales the columns of both.
        np.testing.assert_allclose(jnp.abs(found.output_grads), jnp.abs(wanted.output_grads))


def test_a_column_is_shared_by_no_two_marks_that_meet():
    numbers = shared_columns([3, 1, 2, 1], [{0, 1}, {1}, {2, 3}, set()])
    assert [n.tolist() for n in numbers] == [[0, 1, 2], [3], [0, 1], [3]]
    x = jnp.arange(5)
    assert chosen(x, [np.array([0]), np.array([3, 4])]).tolist() == [0, 3, 4]
    assert chosen(x, [np.array([1, 2])]).tolist() == [1, 2]


def nonlinear(p, x):
    return (
        jnp.tanh(jnp.tanh(x @ p["a"]["w"] + p["a"]["b"]) @ p["b"]["w"] + p["b"]["b"]) @ p["c"]["w"]
    )


@pytest.mark.parametrize("count", [1, 6])
def test_one_example_is_exact_for_any_loss_and_more_are_not(count):
    def loss_fn(p, x, y):
        return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(nonlinear(p, x), y))

    distances = compare(loss_fn, LINEAR, draw(count, 3), jnp.arange(count) % 2)
    if count == 1:
        # One column for each class: the sum over columns of outer products is the exact block.
        assert_exact(distances)
    else:
        assert max(distances.values()) > 1e-3


POSITIONWISE = {"a": {"w": draw(3, 4), "b": draw(4)}, "c": {"w": draw(4, 2)}}


def positionwise(p, x):
    return (x @ p["a"]["w"] + p["a"]["b"]) @ p["c"]["w"]


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_expand_and_reduce_are_each_exact_in_their_setting(pooled, approx):
    def loss_fn(p, x, y):
        out = positionwise(p, x)
        return regress(out.mean(axis=1), y[:, 0]) if pooled else regress(out, y)

    # Inputs with a mean: pooling must not make everything vanish.
    distances = compare(loss_fn, POSITIONWISE, draw(5, 6, 3) + 0.5, draw(5, 6, 2), approx=approx)
    if pooled == (approx == "reduce"):
        assert_exact(distances)
    else:
        assert min(distances.values()) > 0.5


MASK = jnp.arange(6) < jnp.array([6, 2, 4, 0, 1])[:, None]


def plain(p, x, y):
    return positionwise(p, x), y, MASK


def flattened(p, x, y):
    return positionwise(p, x).reshape(-1, 2), y.reshape(-1, 2), MASK.ravel()


def time_major(p, x, y):
    return positionwise(p, x.swapaxes(0, 1)), y.swapaxes(0, 1), MASK.T


def scanned(p, x, y):
    _, out = jax.lax.scan(lambda c, x: (c, positionwise(p, x)), 0, x.swapaxes(0, 1))
    return out, y.swapaxes(0, 1), MASK.T


def shifted(p, x, y):
    return positionwise(p, x)[:, :-1], y[:, 1:], MASK[:, 1:]


def shifted_steps(p, x, y):
    out, target, mask = scanned(p, x, y)
    return out[:-1], target[1:], mask[1:]


def backwards(p, x, y):
    return positionwise(p, x)[:, ::-1], y, MASK[:, ::-1]


def thinned(p, x, y):
    return positionwise(p, x)[:, 1:6:2], y[:, ::2], MASK[:, 1::2]


def image(p, x, y):
    out = positionwise(p, x.reshape(5, 2, 3, 3))
    return out.reshape(5, 6, 2), y, MASK


def flat_image(p, x, y):
    out = positionwise(p, x.reshape(5, 2, 3, 3))
    return out.reshape(30, 2), y.reshape(30, 2), MASK.ravel()


def as_image(p, x, y):
    return positionwise(p, x).reshape(5, 2, 3, 2), y.reshape(5, 2, 3, 2), MASK.reshape(5, 2, 3)


def swapped_image(p, x, y):
    out = positionwise(p, x.reshape(5, 2, 3, 3)).swapaxes(1, 2)
    return (
        out.reshape(5, 6, 2),
        y,
        MASK.reshape(5, 2, 3).swapaxes(1, 2).reshape(5, 6),
    )


WHERE_MASKED = [
    *(plain, flattened, time_major, scanned, shifted, shifted_steps, backwards, thinned),
    *(image, flat_image, as_image, swapped_image),
]


@pytest.mark.parametrize("form", WHERE_MASKED, ids=lambda form: form.__name__)
def test_masked_positions_leave_no_trace(form):
    def loss_fn(p, x, y):
        out, target, mask = form(p, x, y)
        return jnp.sum(mask * losses.squared_error(out, target).sum(-1)) / 3

    x, y = draw(5, 6, 3), draw(5, 6, 2)
    kept = MASK
    if form in (shifted, shifted_steps):
        kept = jnp.pad(MASK[:, 1:], ((0, 0), (0, 1)))
    elif form is thinned:
        kept = MASK & (jnp.arange(6) % 2 == 1)
    x = jnp.where(kept[..., None], x, 1e6)  # what is masked may be anything
    assert_exact(compare(loss_fn, POSITIONWISE, x, y))


def test_masked_positions_of_a_chunked_loss_leave_no_trace():
    def loss_fn(p, x, y):
        def chunk(total, xym):
            x, y, mask = xym
            each = losses.squared_error(x @ p["c"]["w"], y).sum(-1)
            return total + jnp.sum(mask * each), None

        def cut(z):
            return z.reshape(5, 3, 2, *z.shape[2:]).swapaxes(0, 1)

        hidden = x @ p["a"]["w"] + p["a"]["b"]
        return jax.lax.scan(chunk, 0.0, (cut(hidden), cut(y), cut(MASK)))[0]

    x = jnp.where(MASK[..., None], draw(5, 6, 3), 1e6)
    assert_exact(compare(loss_fn, POSITIONWISE, x, draw(5, 6, 2)))


def test_masked_positions_of_heads_of_other_shapes_leave_no_trace():
    def loss_fn(p, x, y):
        hidden = x @ p["a"]["w"] + p["a"]["b"]
        tokens = losses.squared_error(hidden[:, 1:] @ p["c"]["w"], y[:, 1:]).sum(-1)
        entries = losses.squared_error(hidden @ p["d"]["w"], y)  # a loss for each output
        return jnp.sum(MASK[:, 1:] * tokens) + jnp.sum(MASK[..., None] * entries)

    params = POSITIONWISE | {"d": {"w": draw(4, 2)}}
    x, y = jnp.where(MASK[..., None], draw(5, 6, 3), 1e6), draw(5, 6, 2)
    fn = value_and_grad_with_taps(loss_fn, fisher="exact")
    _, _, taps = jax.jit(fn)(params, x, y)
    # Two outputs for each head; six positions, whose mean is what an example weighs.
    expected = 2 * 6 * (jnp.pad(MASK[:, 1:], ((0, 0), (1, 0))) + 1.0 * MASK)
    np.testing.assert_allclose(taps["a"][0].weights, expected, rtol=1e-12)


def test_batches_of_other_sizes_and_weights():
    def loss_fn(p, x, y, u, v):
        near = jnp.mean(losses.squared_error(positionwise(p, x), y))
        return near + 0.01 * jnp.mean(losses.squared_error(positionwise(p, u), v))

    args = draw(5, 6, 3), draw(5, 6, 2), 3 * draw(20, 4, 3, seed=1), draw(20, 4, 2, seed=1)
    assert_exact(compare(loss_fn, POSITIONWISE, *args))


def test_positions_that_others_see_all_count():
    def loss_fn(p, x, y):
        hidden = jnp.cumsum(x @ p["w"], axis=1)
        return jnp.sum(MASK * losses.squared_error(hidden @ p["v"], y).sum(-1))

    fn = value_and_grad_with_taps(loss_fn, fisher="exact")
    _, _, taps = jax.jit(fn)({"w": draw(3, 4), "v": draw(4, 2)}, draw(5, 6, 3), draw(5, 6, 2))
    assert taps["w"][0].weights.shape == (5,)
    np.testing.assert_allclose(taps["v"][0].weights > 0, MASK)


def test_a_weight_used_twice_is_exact_with_its_uses_as_positions():
    def loss_fn(p, x, u, y):
        out = jnp.concatenate([x @ p["w"], u @ p["w"]], axis=-1)
        return regress(out, y)

    args = draw(5, 3), draw(5, 3, seed=1), draw(5, 4)
    assert_exact(compare(loss_fn, {"w": draw(3, 2)}, *args))


def test_piecewise_linear_net_has_the_hessian_as_its_gauss_newton_block():
    params = {"a": draw(3, 4), "c": draw(4, 2)}
    x, y = draw(6, 3), draw(6, 2)

    def loss_fn(p, x, y):
        return regress(jax.nn.relu(x @ p["a"]) @ p["c"], y)

    layers = find_layers(loss_fn, params, x, y)
    hessian = jax.jit(jax.hessian(loss_fn))(params, x, y)
    blocks = jax.jit(lambda params, *args: exact_blocks(loss_fn, params, args, layers))(
        params, x, y
    )
    for layer in layers:
        exact = blocks[layer.name]
        own = hessian[layer.kernel][layer.kernel].reshape(exact.shape)
        np.testing.assert_allclose(exact, own, atol=1e-10)


@pytest.mark.parametrize("fisher", ["mc", "sketch"])
def test_estimates_converge_to_the_exact_one(fisher):
    def loss_fn(p, x, y):
        return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(nonlinear(p, x), y))

    x, y = draw(3, 3), jnp.arange(3) % 2
    layers = find_layers(loss_fn, LINEAR, x, y, check=False)
    exactly = value_and_grad_with_taps(loss_fn, layers, fisher="exact")
    _, _, exact = jax.jit(exactly)(LINEAR, x, y)
    estimate = value_and_grad_with_taps(loss_fn, layers, fisher=fisher, samples=3000)
    _, _, taps = jax.jit(estimate)(LINEAR, x, y, key=jax.random.key(0))
    blocks = jax.jit(lambda taps: {x.name: kfac_block(x, taps[x.name]) for x in layers})
    exact, estimated = blocks(exact), blocks(taps)
    for layer in layers:
        wanted, found = exact[layer.name], estimated[layer.name]
        # 3000 samples: a relative standard error of about 1/√3000 per entry, 10 % with margin.
        assert jnp.linalg.norm(found - wanted) < 0.1 * jnp.linalg.norm(wanted)


def test_forward_has_no_columns():
    def loss_fn(p, x, y):
        return regress(linear_net(p, x), y)

    fn = value_and_grad_with_taps(loss_fn, fisher="forward")
    _, _, taps = jax.jit(fn)(LINEAR, draw(7, 3), draw(7, 2))
    assert taps["a"][0].output_grads.shape == (0, 1, 7, 1, 4)


@pytest.mark.parametrize("fisher", ["mc", "exact", "sketch", "empirical"])
@pytest.mark.parametrize("name", ["penalised_gradient_of_the_loss", "twice_differentiated_loss"])
def test_derivatives_of_a_loss_inside_the_loss_add_no_curvature(fisher, name):
    (pattern,) = (p for p in patterns.PATTERNS if p.name == name)
    params, args = pattern.params, pattern.args
    if name.startswith("penalised"):
        plain = pattern.data_loss
    else:  # whose input is moved by what bears no gradient
        hessian = jax.hessian(lambda x: patterns.gradient_at(params, x, args[1])[0])
        moved = jax.jit(hessian)(args[0])
        args = (args[0] - 0.1 * jnp.einsum("nini->ni", moved), args[1])
        plain = patterns.likelihood_of_net
    seen = []
    for loss_fn, given in ((pattern.loss_fn, pattern.args), (plain, args)):
        fn = value_and_grad_with_taps(loss_fn, fisher=fisher)
        seen.append(moments(fn, params, *given, key=jax.random.key(1)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *seen)


@functools.partial(jax.jit, static_argnums=0)
def moments(fn, *args, key):
    _, _, taps = fn(*args, key=key)
    return {
        name: kfac.second_moments(tap.inputs, tap.output_grads, tap.weights)
        for name, (tap,) in taps.items()
    }


def test_rows_that_a_branch_does_not_read_have_no_frequency():
    (pattern,) = (p for p in patterns.PATTERNS if p.name == "lookup_in_a_branch_of_a_scan")
    tokens, y = pattern.args
    tokens = jnp.maximum(tokens, 1)  # none reads the first row
    fn = value_and_grad_with_taps(pattern.loss_fn, fisher="exact")
    _, _, taps = jax.jit(fn)(pattern.params, tokens, y)
    (tap,) = taps["e"]
    found = kfac.index_frequencies(tap.inputs, 7, tap.weights, dtype=jnp.float32)[0]
    read = np.bincount(np.asarray(tokens[:, [0, 2]]).ravel(), minlength=7)
    np.testing.assert_allclose(found / found.sum(), read / read.sum(), rtol=1e-5)
