"""Axes too wide for a matrix have diagonal factors, of which nothing else is ever formed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_kron as ok
from optax_kron import operators
from optax_kron.kernels import kfac as kernels
from optax_kron.kernels import kfoc
from optax_kron.layers.layer import Layer
from optax_kron.layers.moments import moments_of
from optax_kron.layers.paths import by_path
from optax_kron.layers.plan import plan_layers
from optax_kron.layers.taps import Moments, Tap, Taps
from optax_kron.transforms.ekfac import scale_by_ekfac
from optax_kron.transforms.kfac import scale_by_kfac

from .capture.patterns import PATTERNS
from .reference import kfac as reference

RTOL = 1e-9  # of float64 against dense references
# Which sides are diagonal at each limit, of a kernel with 4 inputs and 6 outputs.
SIZES = {"output": (5, False, True), "both": (3, True, True)}
sides = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape))


def diagonal_if(condition, factor):
    """The matrix without what is off its diagonal."""
    return np.diag(np.diag(factor)) if condition else np.asarray(factor)


def problem(size, columns=2, positions=3):
    """A dense layer with a bias, its gradients and taps, and its two factors."""
    limit, *wide = size
    layer = Layer("dense", kernel="kernel", bias="bias", max_size=limit)
    grads = {"kernel": draw(4, 6), "bias": draw(6)}
    inputs = jnp.concatenate([draw(1, 9, positions, 4), jnp.ones((1, 9, positions, 1))], axis=-1)
    tap = Tap(inputs, draw(columns, 1, 9, positions, 6))
    return layer, grads, tap, wide


def rows(tree):
    return np.concatenate([np.asarray(tree["kernel"]), np.asarray(tree["bias"])[None]])


def first(tx, grads, taps):
    return jax.jit(lambda g, s, t: tx.update(g, s, taps=t))(grads, tx.init(grads), taps)


@sides
@pytest.mark.parametrize(
    ("rule", "approx"), [("pi", "reduce"), *((rule, "expand") for rule in kernels.DAMPING_RULES)]
)
def test_kfac_is_the_dense_solution_with_the_diagonal_taken(x64, size, rule, approx):
    layer, grads, tap, wide = problem(size)
    settings = {"damping_rule": rule, "approx": approx, "momentum": None, "norm_constraint": None}
    tx = scale_by_kfac(layers=[layer], factor_dtype="float64", basis="eigh", **settings)
    updates, state = first(tx, grads, Taps({"dense": tap}))
    factors = reference.factors(tap.inputs[0], tap.output_grads[:, 0], approx=approx)
    A, G = map(diagonal_if, wide, factors)
    expected = reference.solve(A, G, rows(grads), 1e-3, rule)
    np.testing.assert_allclose(rows(updates), expected, rtol=RTOL)
    (stack,) = state.stacks.values()
    assert [stack.input_factor.ndim, stack.output_factor.ndim] == [3 - x for x in wide]


@sides
def test_ekfac_is_diagonal_in_the_basis_with_unit_vectors_on_wide_sides(x64, size):
    layer, grads, tap, wide = problem(size)
    settings = {"norm_constraint": None, "momentum": None, "basis": "eigh"}
    tx = scale_by_ekfac(layers=[layer], factor_dtype="float64", **settings)
    updates, state = first(tx, grads, Taps({"dense": tap}))
    factors = reference.factors(tap.inputs[0], tap.output_grads[:, 0])
    bases = [
        np.eye(len(M)) if x else np.linalg.eigh(M)[1] for x, M in zip(wide, factors, strict=True)
    ]
    examples = np.einsum("nsi,vnso->vnio", tap.inputs[0], tap.output_grads[:, 0])
    turned = np.einsum("ij,vnio,op->vnjp", bases[0], examples, bases[1])
    values = np.sum(turned**2, axis=(0, 1)) / 9
    if all(wide):  # then they are the diagonal of the Fisher information itself
        np.testing.assert_allclose(values, np.sum(examples**2, axis=(0, 1)) / 9)
    (stack,) = state.stacks.values()
    order = np.argsort(values.ravel())
    np.testing.assert_allclose(np.sort(stack.inverse.values[0].ravel()), values.ravel()[order])
    inner = bases[0].T @ rows(grads) @ bases[1] / (values + 1e-3)
    np.testing.assert_allclose(rows(updates), bases[0] @ inner @ bases[1].T, rtol=1e-7)


@pytest.mark.parametrize("make", [scale_by_kfac, scale_by_ekfac])
def test_without_columns_the_wide_output_factor_is_the_identity(x64, make):
    layer, grads, tap, wide = problem(SIZES["both"])
    tap = tap._replace(output_grads=tap.output_grads[:0])
    settings = {"damping_rule": "exact", "momentum": None, "norm_constraint": None}
    settings["basis"] = "eigh"
    tx = make(layers=[layer], factor_dtype="float64", **settings)
    updates, _ = first(tx, grads, Taps({"dense": tap}))
    A, _ = reference.factors(tap.inputs[0], np.zeros((1, 9, 3, 6)))
    expected = reference.solve(diagonal_if(wide[0], A), np.eye(6), rows(grads), 1e-3, "exact")
    np.testing.assert_allclose(rows(updates), expected, rtol=RTOL)


def test_the_limit_is_of_the_kernels_own_axes():
    """The input of the bias does not count: whether it is hidden changes no factor."""
    params = {"kernel": jnp.zeros((8192, 2)), "bias": jnp.zeros(2), "wide": jnp.zeros((8193, 2))}
    layers = [Layer("a", kernel="kernel", bias="bias"), Layer("b", kernel="wide")]
    assert list(plan_layers("", layers, params).stacks) == ["8193x2", "8193diagx2"]
    bias = {"bias": jnp.zeros(50257)}
    assert list(plan_layers("", [Layer("a", bias="bias")], bias).stacks) == ["1x50257diag"]
    stacked = {"kernel": jnp.zeros((2, 3, 9000))}
    layers = [Layer("a", kernel="kernel", block_axes=(0,))]
    state = jax.eval_shape(ok.scale_by_kfac(layers=layers).init, stacked)
    assert state.stacks["3x9000diag"].output_factor.shape == (2, 9000)


@pytest.mark.parametrize("value", [-1, 2.5, True, None])
def test_a_limit_is_an_integer(value):
    with pytest.raises(ValueError, match="max_size must be an integer ≥ 0; got"):
        Layer("dense", kernel="kernel", max_size=value)
    with pytest.raises(ValueError, match="find_layers: max_size must be an integer ≥ 0; got"):
        ok.find_layers(language_loss, *language(5, 2), max_size=value)
    assert Layer("dense", kernel="kernel", max_size=np.int64(4)).max_size == 4


# ---------------------------------------------------------------------------------- from a loss


def language(tokens, width, batch=3, length=4):
    """Abstract parameters of a tiny language model, and its data."""
    shapes = {
        "embedding": (tokens, width),
        "hidden": {"kernel": (2, width, width), "bias": (2, width)},
        "head": {"kernel": (width, tokens), "bias": (tokens,)},
        "shift": (tokens,),
    }
    make = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    params = jax.tree.map(make, shapes, is_leaf=lambda x: isinstance(x, tuple))
    return params, jax.ShapeDtypeStruct((batch, length), jnp.int32)


def language_loss(params, tokens):
    def layer(h, p):
        return jnp.tanh(h @ p["kernel"] + p["bias"]), None

    h, _ = jax.lax.scan(layer, params["embedding"][tokens], params["hidden"])
    logits = h @ params["head"]["kernel"] + params["head"]["bias"]
    logits = logits * 2 + params["shift"]
    return ok.losses.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()


def numbers(params, tokens, count):
    params = jax.tree.map(lambda x: draw(*x.shape, seed=1).astype(x.dtype), params)
    return params, jnp.asarray(np.random.default_rng(0).integers(0, count, tokens.shape))


def convolution():
    """One with groups, whose inputs are patches."""
    (found,) = (p for p in PATTERNS if p.name == "conv_grouped")
    return found.loss_fn, found.params, found.args


def language_model():
    params, tokens = numbers(*language(7, 3), 7)
    return language_loss, params, (tokens,)


@pytest.mark.parametrize(
    ("problem", "fisher"),
    [(language_model, "mc"), (language_model, "forward"), (convolution, "exact")],
)
def test_reduced_taps_are_the_moments_of_taps(problem, fisher):
    loss_fn, params, args = problem()
    layers = ok.find_layers(loss_fn, params, *args, max_size=4, check=False)
    assert any(layer.has_diagonal_input and not layer.is_embedding for layer in layers) or any(
        layer.has_diagonal_output for layer in layers
    )

    @jax.jit
    def both(params, *args):
        seen = [
            ok.value_and_grad_with_taps(loss_fn, layers, fisher=fisher, reduce=reduce)
            for reduce in (False, True)
        ]
        return [fn(params, *args, key=jax.random.key(0))[2] for fn in seen]

    taps, moments = both(params, *args)
    for layer in layers:
        (own,), (tap,) = moments[layer.name], taps[layer.name]
        wanted = moments_of(layer, tap)
        assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, wanted)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-7), own, wanted
        )


def test_the_table_says_which_factors_are_diagonal():
    layers = ok.find_layers(language_loss, *language(50257, 8))
    table = [line.split() for line in str(layers).splitlines()]
    assert ["embedding", "embedding", "1", "50257", "diagonal", "8", "embedding"] in table
    head = ["head", "dense", "1", "9", "50257", "diagonal", "head/kernel", "head/bias"]
    assert head in table
    assert ["shift", "bias", "1", "1", "50257", "diagonal", "shift"] in table


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("make", [ok.kfac, ok.ekfac])
def test_no_matrix_of_a_vocabulary_is_ever_formed(make, reduce):
    params, tokens = language(50257, 64)
    if make is ok.ekfac and reduce:
        return  # its eigenvalues need each datum
    layers = ok.find_layers(language_loss, params, tokens)
    taps_fn = ok.value_and_grad_with_taps(language_loss, layers, reduce=reduce)
    tx = make(0.1, layers=layers)
    state = jax.eval_shape(tx.init, params)
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    assert size(state) < 4 * size(params)

    def step(params, state, tokens, seed):
        _, grads, taps = taps_fn(params, tokens, key=jax.random.key(seed))
        updates, state = tx.update(grads, state, params, taps=taps)
        return optax.apply_updates(params, updates), state

    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    lowered = jax.jit(step).lower(params, state, tokens, seed)
    assert "50257x64x" in lowered.as_text()
    assert not re.search(r"50257x(\d+x)*5025[78]x", lowered.as_text())
    if make is ok.kfac:
        memory = lowered.compile().memory_analysis()
        assert memory is None or memory.temp_size_in_bytes < 30 * size(params)


def test_operators_know_the_wide_axes(x64):
    params, tokens = numbers(*language(7, 3), 7)
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    layers = ok.find_layers(language_loss, params, tokens, max_size=4, check=False)
    fn = ok.value_and_grad_with_taps(language_loss, layers, fisher="exact")
    _, grads, taps = jax.jit(fn)(params, tokens)
    leaves = by_path(grads)

    @jax.jit  # one program, as most of the time goes into compiling
    def products(taps, grads):
        made = [getattr(operators, kind)(taps, layers) for kind in ("kfac", "ekfac", "kfoc")]
        solved = [op.inverse(damping=1e-2).mv(grads) for op in made]
        again = [
            jax.tree.map(lambda x, y: x + 1e-2 * y, op.mv(v), v)
            for op, v in zip(made, solved, strict=True)
        ]
        return made[0].mv(grads), again

    found, again = jax.device_get(products(taps, grads))
    for layer in layers:
        A, G, _ = moments_of(layer, taps[layer.name][0])
        A, G = (x if x.ndim == 3 else np.stack([np.diag(y) for y in x]) for x in (A, G))
        wanted = np.einsum("bij,bjp,bop->bio", A, layer.take(leaves), G)
        np.testing.assert_allclose(layer.take(by_path(found)), wanted, rtol=RTOL, atol=1e-12)
    for tree in again:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-9), tree, grads)


@pytest.mark.parametrize("diagonal", [(True, False), (False, True), (True, True)])
def test_the_nearest_product_among_those_with_diagonal_factors(x64, diagonal):
    a, g = draw(7, 2, 4), draw(2, 7, 2, 3)
    settings = {"tolerance": 1e-15, "max_iterations": 3000}
    A, G = kfoc.factors(a, g, diagonal=diagonal, **settings)
    assert [A.ndim, G.ndim] == [2 - x for x in diagonal]
    examples = np.einsum("nsi,vnso->vnio", a, g)
    exact = np.einsum("vnio,vnjp->ijop", examples, examples) / 7
    # What is off a diagonal is out of reach; the rest is one singular value problem.
    reach = np.ones((4, 4, 3, 3), bool)
    reach &= np.eye(4, dtype=bool)[:, :, None, None] if diagonal[0] else True
    reach &= np.eye(3, dtype=bool) if diagonal[1] else True
    values = np.linalg.svd(np.where(reach, exact, 0).reshape(16, 9), compute_uv=False)
    A, G = (np.diag(x) if x.ndim == 1 else x for x in (A, G))
    residual = np.sum((np.where(reach, exact, 0) - np.einsum("ij,op->ijop", A, G)) ** 2)
    np.testing.assert_allclose(residual, np.sum(values[1:] ** 2), rtol=1e-9)


def test_a_table_with_a_diagonal_output_factor(x64):
    indices = np.random.default_rng(0).integers(0, 5, size=(9, 4, 1))
    g = draw(2, 9, 4, 3)
    settings = {"tolerance": 1e-15, "max_iterations": 3000}
    found = kfoc.factors(jnp.asarray(indices), g, length=5, diagonal=(True, True), **settings)
    hot = jnp.eye(5)[indices[..., 0]]
    wanted = kfoc.factors(hot, g, diagonal=(True, True), **settings)
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-7)


OTHERS = {
    "shampoo": ok.shampoo(0.1),
    "soap": ok.soap(0.1),
    "kl_shampoo": ok.soap(0.1, variant="kl_shampoo"),
    "kl_soap": ok.soap(0.1, variant="kl_soap"),
    **{f"kron_psgd {g}": ok.kron_psgd(0.1, geometry=g) for g in ("EQ", "QUAD")},
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_optimizers_take_a_few_times_the_vocabulary(name):
    params, _ = language(50257, 64)
    tx = OTHERS[name]
    state = jax.eval_shape(tx.init, params)
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    assert size(state) < 4 * size(params)
    lowered = jax.jit(tx.update).lower(params, state, params).as_text()
    assert "50257x64x" in lowered
    assert not re.search(r"50257x(\d+x)*50257x", lowered)


# ------------------------------------------------------------------------- what does not fit


def moments(A, G):
    return Taps({"dense": Moments(jnp.ones(A), jnp.ones(G), jnp.ones(1))})


@pytest.mark.parametrize(
    ("limit", "A", "G"), [(3, (1, 5, 5), (1, 6, 6)), (8, (1, 5), (1, 6)), (4, (1, 5, 5), (1, 6, 6))]
)
def test_moments_of_another_limit_are_refused_in_words(limit, A, G):
    layer = Layer("dense", kernel="kernel", bias="bias", max_size=limit)
    params = {"kernel": jnp.zeros((4, 6)), "bias": jnp.zeros(6)}
    tx = ok.kfac(0.1, layers=[layer])
    message = f"An axis longer than {limit}, the layer's max_size, has a diagonal"
    with pytest.raises(ValueError, match=message):
        tx.update(params, tx.init(params), taps=moments(A, G))
    with pytest.raises(ValueError, match=message):
        operators.kfac(moments(A, G), [layer], params=params)


@pytest.mark.parametrize("hidden", ["kernel", "bias"])
@pytest.mark.parametrize("reduce", [False, True])
def test_hidden_parameters_of_a_wide_layer(x64, hidden, reduce):
    layer, grads, tap, _ = problem(SIZES["both"], positions=1)  # a bias alone is always reduced
    whole = layer.resolved(by_path(grads))
    taps = Taps({"dense": moments_of(whole, tap) if reduce else tap})
    settings = {"momentum": None, "factor_dtype": "float64", "damping_rule": "exact"}
    settings |= {"norm_constraint": None, "basis": "eigh"}
    tx = optax.masked(
        scale_by_kfac(layers=[layer], **settings), {name: name != hidden for name in grads}
    )
    updates, _ = first(tx, grads, taps)
    A, G = reference.factors(tap.inputs[0], tap.output_grads[:, 0])
    own = slice(0, 4) if hidden == "bias" else slice(4, 5)
    A, G = diagonal_if(True, A[own, own]), diagonal_if(True, G)
    seen = "bias" if hidden == "kernel" else "kernel"
    X = rows(grads)[own]
    expected = reference.solve(A, G, X, 1e-3, "exact").reshape(grads[seen].shape)
    np.testing.assert_allclose(updates[seen], expected, rtol=RTOL)
