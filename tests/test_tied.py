"""Tied embeddings: a table that is also the head of the model has one block, of both uses."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_kron as ok
from optax_kron import operators
from optax_kron.layers.layer import Layer
from optax_kron.layers.taps import Moments, Tap, Taps

from .draws import draw
from .reference import kfac as reference

V, D, N, T = 12, 6, 32, 5
cross_entropy = ok.losses.softmax_cross_entropy_with_integer_labels


def tokens(*shape, seed=0):
    """Words by a power law, as in texts."""
    frequencies = 1 / np.arange(1, V + 1)
    rng = np.random.default_rng((seed, *shape))
    return jnp.asarray(rng.choice(V, p=frequencies / frequencies.sum(), size=shape))


def parameters(seed=0, **shapes):
    """Kernels at the usual scale of their start, `1 / √d_in`; so is the table, of its width."""
    rows, rng = {"table": (V, D), **shapes}, np.random.default_rng(seed)
    return {
        k: jnp.asarray(rng.normal(size=s) / (D if k == "table" else s[0]) ** 0.5)
        for k, s in rows.items()
    }


# ----------------------------------------------------------------------------------------- models


def bigram(p, text):
    return cross_entropy(p["table"][text[:, :-1]] @ p["table"].T, text[:, 1:]).mean()


def recurrent(p, text):
    def step(h, x):
        h = jnp.tanh(x @ p["w"] + h @ p["u"])
        return h, h

    x = p["table"][text[:, :-1]].swapaxes(0, 1)
    _, h = jax.lax.scan(step, jnp.zeros((len(text), D), x.dtype), x)
    return cross_entropy(h.swapaxes(0, 1) @ p["table"].T, text[:, 1:]).mean()


def window(p, text):
    """Three words foretell the next, as in the model of Bengio and others of 2003."""
    words = p["table"][text]
    three = jnp.concatenate([words[:, :-3], words[:, 1:-2], words[:, 2:-1]], axis=-1)
    h = jnp.tanh(three @ p["w"] + p["b"]) @ p["v"]
    return cross_entropy(h @ p["table"].T, text[:, 3:]).mean()


def attention(p, text):
    q, k, v = jnp.split(p["table"][text[:, :-1]] @ p["qkv"], 3, axis=-1)
    scores = jnp.einsum("ntd,nsd->nts", q, k) / D**0.5
    weights = jax.nn.softmax(jnp.where(jnp.tri(scores.shape[1], dtype=bool), scores, -1e9))
    h = jnp.einsum("nts,nsd->ntd", weights, v) @ p["out"]
    h = h + jnp.tanh(h @ p["up"]) @ p["down"]
    return cross_entropy(h @ p["table"].T, text[:, 1:]).mean()


MODELS = {
    "bigram": (bigram, {}),
    "recurrent": (recurrent, {"w": (D, D), "u": (D, D)}),
    "window": (window, {"w": (3 * D, 16), "b": (16,), "v": (16, D)}),
    "attention": (
        attention,
        {"qkv": (D, 3 * D), "out": (D, D), "up": (D, 4 * D), "down": (4 * D, D)},
    ),
}


@functools.cache
def seen(name="bigram", fisher="exact", reduce=False, max_size=8192):
    """A model: its loss, parameters, text, layers, gradients and taps, in float64."""
    loss_fn, shapes = MODELS[name]
    with jax.enable_x64(True):
        p, text = parameters(**shapes), tokens(N, T + 1)
        layers = ok.find_layers(loss_fn, p, text, check=False, max_size=max_size)
        fn = ok.value_and_grad_with_taps(loss_fn, layers, fisher=fisher, reduce=reduce)
        _, grads, taps = jax.jit(fn)(p, text, key=jax.random.key(0))
    return loss_fn, p, text, layers, grads, taps


def dense(x):
    return np.stack([np.diag(y) for y in x]) if x.ndim == 2 else np.asarray(x)


def uses_by_hand(lookups, head):
    """`a` [V] and `S` [D, D] of both uses: the factors of dense layers, of one-hot inputs here."""
    hot = np.eye(V)[np.asarray(lookups.inputs)[0, ..., 0]]
    A, S_1 = reference.factors(hot, np.asarray(lookups.output_grads)[:, 0])
    S_2, G = reference.factors(np.asarray(head.inputs)[0], np.asarray(head.output_grads)[:, 0])
    return (np.diag(A), S_1), (np.diag(G), S_2)


def nearest(rows):
    """The nearest `diag(u) ⊗ M`, of blocks [V, D, D] along the diagonal: u of sum one, and M."""
    U, s, W = np.linalg.svd(rows.reshape(len(rows), -1), full_matrices=False)
    total = U[:, 0].sum()
    return U[:, 0] / total, (total * s[0] * W[0]).reshape(rows.shape[1:])


def block(name="bigram"):
    """u and M of a model, by hand."""
    *_, taps = seen(name)
    return nearest(sum(np.einsum("v,ij->vij", *use) for use in uses_by_hand(*taps["table"])))


def columns(product, p):
    """A symmetric operator on the table [V, D, V, D], by products with the unit vectors."""
    zeros = jax.tree.map(jnp.zeros_like, p)
    units = jnp.eye(V * D).reshape(-1, V, D)
    of_units = jax.lax.map(lambda x: product({**zeros, "table": x})["table"], units)
    return of_units.reshape(V, D, V, D)


def off(x, y):
    return np.linalg.norm(x - y) / np.linalg.norm(y)


# ------------------------------------------------------------------------------- what it stands for


def errors(exact, taps):
    """How far products of the form are from the exact block, in Frobenius norm."""
    rows = np.einsum("vivj->vij", exact)
    uses = uses_by_hand(*taps["table"])
    both = nearest(sum(np.einsum("v,ij->vij", *use) for use in uses))
    products = {"nearest": nearest(rows), "tied": both, "lookups": uses[0], "head": uses[1]}
    made = {k: np.einsum("v,ij->vij", *x) for k, x in products.items()}
    # What is off the diagonal over the vocabulary no block of this form has.
    outside = np.sum(exact**2) - np.sum(rows**2)
    return {k: np.sqrt(np.sum((rows - x) ** 2) + outside) for k, x in made.items()}


@pytest.mark.parametrize("name", ["recurrent", "window", "attention"])
def test_the_block_is_within_a_tenth_of_the_nearest_of_its_form(x64, name):
    """In the median of draws: there are some where the two uses of one word meet a lot."""
    loss_fn, shapes = MODELS[name]
    draws = [(parameters(seed, **shapes), tokens(64, T + 1, seed=seed)) for seed in range(8)]
    layers = ok.find_layers(loss_fn, *draws[0], check=False)

    @jax.jit
    def seen_of(p, text):
        taps = ok.value_and_grad_with_taps(loss_fn, layers, fisher="exact")(p, text)[2]
        return columns(ok.ggn_vector_product(loss_fn, p, text), p), taps

    found = [errors(*jax.device_get(seen_of(*drawn))) for drawn in draws]
    ratios = {k: np.median([x[k] / x["nearest"] for x in found]) for k in found[0]}
    assert ratios["tied"] <= 1.1, ratios
    # Neither of the uses alone is a match for both.
    assert min(ratios["lookups"], ratios["head"]) > 1.1, ratios


def apart(p, text, h, y):
    """Both uses without a meeting: in two losses, each linear, and squared."""
    read = jnp.sum(ok.losses.squared_error(p["table"][text] @ draw(D, 3), draw(*text.shape, 3)), -1)
    written = jnp.sum(ok.losses.squared_error(h @ p["table"].T, y), -1)
    return jnp.mean(read) + 0.3 * jnp.mean(written)


@pytest.mark.parametrize("even", [True, False])
def test_uses_that_do_not_meet_make_an_exact_sum_and_equal_frequencies_an_exact_block(x64, even):
    p, text = parameters(), jnp.arange(2 * V).reshape(-1, 3) % V if even else tokens(6, 3)
    args = text, draw(8, D), draw(8, V)
    layers = ok.find_layers(apart, p, *args)
    assert not layers.uncovered
    assert layers.checked
    _, _, taps = ok.value_and_grad_with_taps(apart, layers, fisher="exact")(p, *args)
    exact = columns(ok.ggn_vector_product(apart, p, *args), p)
    found = columns(operators.kfac(taps, layers).mv, p)
    u, M = nearest(np.einsum("vivj->vij", exact))
    assert off(found, np.einsum("v,ij,vw->viwj", u, M, np.eye(V))) < 1e-10
    if even:
        assert off(found, exact) < 1e-10
    else:
        assert off(found, exact) > 0.05


# ------------------------------------------------------------------------------------- optimizers

PLAIN = {
    "momentum": None,
    "norm_constraint": None,
    "factor_dtype": "float64",
    "basis": "eigh",  # of "exact": what the references take, too
}


def first(tx, p, grads, taps):
    return jax.jit(tx.update)(grads, tx.init(p), p, taps=taps)


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("rule", ["pi", "exact", "trace"])
def test_kfac_inverts_the_block(x64, rule, reduce):
    _, p, _, layers, grads, taps = seen(reduce=reduce)
    updates, _ = first(ok.scale_by_kfac(layers=layers, damping_rule=rule, **PLAIN), p, grads, taps)
    u, M = block()
    expected = reference.solve(np.diag(u), M, grads["table"], 1e-3, rule)
    np.testing.assert_allclose(updates["table"], expected, rtol=1e-8)


def test_ekfac_has_the_diagonal_of_both_uses_in_the_basis_of_the_block(x64):
    _, p, _, layers, grads, taps = seen()
    tx = ok.scale_by_ekfac(layers=layers, **PLAIN)
    updates, state = first(tx, p, grads, taps)
    lookups, head = taps["table"]
    _, Q = np.linalg.eigh(block()[1])
    hot = np.eye(V)[np.asarray(lookups.inputs)[..., 0]]
    read = np.einsum("bnsv,cbnsi,ij->cnvj", hot, lookups.output_grads, Q)
    written = np.einsum("cbnsv,bnsi,ij->cnvj", head.output_grads, head.inputs, Q)
    values = np.sum(read**2 + written**2, axis=(0, 1)) / N
    (stack,) = state.stacks.values()
    np.testing.assert_allclose(np.sort(stack.inverse.values[0]), np.sort(values), atol=1e-12)
    expected = (np.asarray(grads["table"]) @ Q / (values + 1e-3)) @ Q.T
    np.testing.assert_allclose(updates["table"], expected, rtol=1e-7)
    assert np.isclose(operators.ekfac(taps, layers).trace(), np.sum(values))


@pytest.mark.parametrize("make", [ok.scale_by_kfac, ok.scale_by_ekfac])
def test_without_columns_inputs_alone_tell(x64, make):
    """Frequencies beside the identity, and the identity beside the inputs of the head."""
    _, p, _, layers, grads, taps = seen(fisher="forward")
    updates, _ = first(make(layers=layers, damping_rule="exact", **PLAIN), p, grads, taps)
    (a, _), (_, S) = uses_by_hand(*taps["table"])
    rows = np.einsum("v,ij->vij", a, np.eye(D)) + S
    if make is ok.scale_by_ekfac:  # the sum itself is diagonal in the basis
        solved = [
            np.linalg.solve(F + 1e-3 * np.eye(D), g)
            for F, g in zip(rows, grads["table"], strict=True)
        ]
        np.testing.assert_allclose(updates["table"], solved, rtol=1e-7)
    else:
        u, M = nearest(rows)
        expected = reference.solve(np.diag(u), M, grads["table"], 1e-3, "exact")
        np.testing.assert_allclose(updates["table"], expected, rtol=1e-7)


def test_the_second_of_two_uses_does_not_count_the_loss_twice(x64):
    _, p, _, layers, grads, taps = seen()
    _, state = first(ok.scale_by_kfac(layers=layers), p, grads, taps)
    np.testing.assert_allclose(optax.tree.get(state, "loss_weight"), 1, rtol=1e-6)


@pytest.mark.parametrize("make", [ok.scale_by_kfac, ok.scale_by_ekfac])
def test_rows_may_be_cut_into_blocks(x64, make):
    _, p, _, layers, grads, taps = seen()
    whole, cut = (
        first(make(layers=layers, damping_rule="exact", block_size=size, **PLAIN), p, grads, taps)
        for size in (None, 3)
    )
    assert cut[1].stacks["3diagx6"].input_factor.shape == (4, 3)
    np.testing.assert_allclose(cut[0]["table"], whole[0]["table"], rtol=1e-8)


def test_a_width_beyond_the_limit_is_diagonal_too(x64):
    _, p, _, layers, grads, taps = seen(max_size=5)
    *_, moments = seen(max_size=5, reduce=True)
    updates, state = first(ok.scale_by_kfac(layers=layers, **PLAIN), p, grads, taps)
    assert list(state.stacks) == ["12diagx6diag"]
    again, _ = first(ok.scale_by_kfac(layers=layers, **PLAIN), p, grads, moments)
    np.testing.assert_allclose(updates["table"], again["table"], rtol=1e-9)
    (a, S), (b, R) = uses_by_hand(*taps["table"])
    diagonals = np.einsum("v,i->vi", a, np.diag(S)) + np.einsum("v,i->vi", b, np.diag(R))
    u, M = nearest(np.einsum("vi,ij->vij", diagonals, np.eye(D)))
    expected = reference.solve(np.diag(u), M, grads["table"], 1e-3, "pi")
    np.testing.assert_allclose(updates["table"], expected, rtol=1e-8)


# ---------------------------------------------------------------------- taps, and those of batches


def test_batches_and_devices_are_put_together_before_uses_are(x64):
    """The block of all is that of all examples, not a mean of blocks."""
    loss_fn, p, text, layers, grads, taps = seen()
    whole = operators.kfac(taps, layers).mv(grads)["table"]

    @jax.jit
    def products(parts):
        def taps_of(text, reduce=False):
            fn = ok.value_and_grad_with_taps(loss_fn, layers, fisher="exact", reduce=reduce)
            return fn(p, text)[2]

        def device(text):
            return taps_of(text, reduce=True).pmean("device")

        shared = jax.vmap(device, axis_name="device")(parts)
        made = [taps_of(part) for part in parts], jax.tree.map(lambda x: x[0], shared)
        return [operators.kfac(x, layers).mv(grads)["table"] for x in made]

    for found in products(text.reshape(2, N // 2, -1)):
        assert off(found, whole) < 1e-12


def test_taps_by_hand(x64):
    _, p, _, found, grads, taps = seen()
    layer = Layer("table", kernel="table", is_embedding=True, is_tied=True)
    by_hand = Taps({"table": [Tap(t.inputs, t.output_grads) for t in taps["table"][::-1]]})
    expected, _ = first(ok.scale_by_kfac(layers=found, **PLAIN), p, grads, taps)
    updates, _ = first(ok.scale_by_kfac(layers=[layer], **PLAIN), p, grads, by_hand)
    np.testing.assert_allclose(updates["table"], expected["table"], rtol=1e-9)
    # One of the uses alone is a layer like others.
    for i, (a, S) in enumerate(uses_by_hand(*taps["table"])):
        alone = Taps({"table": Tap(*taps["table"][i][:2])})
        updates, _ = first(ok.scale_by_kfac(layers=[layer], **PLAIN), p, grads, alone)
        expected = reference.solve(np.diag(a), S, grads["table"], 1e-3, "pi")
        np.testing.assert_allclose(updates["table"], expected, rtol=1e-8)


def test_what_does_not_fit_is_named(x64):
    _, p, _, layers, grads, taps = seen()
    with pytest.raises(ValueError, match="is_tied=True needs is_embedding=True"):
        Layer("table", kernel="table", is_tied=True)
    with pytest.raises(ValueError, match="'table' is a tied embedding, whose two uses"):
        operators.kfoc(taps, layers)
    tx = ok.kfac(0.1, layers=layers)
    lookups, head = taps["table"]
    wrong = head._replace(inputs=jnp.ones((1, N, T, D + 1)))
    with pytest.raises(ValueError, match=f"inputs of width {D + 1}; expected {D}"):
        tx.update(grads, tx.init(p), p, taps=Taps({"table": (lookups, wrong)}))
    wrong = Moments(jnp.ones((1, D, D)), jnp.ones((1, V, V)), jnp.ones(1))
    with pytest.raises(ValueError, match=re.escape(f"expected ((1, {D}, {D}), (1, {V}))")):
        tx.update(grads, tx.init(p), p, taps=Taps({"table": (wrong, wrong)}))


def test_a_square_tied_table_beyond_the_longest_axis_is_refused_early():
    square = Layer("table", kernel="table", is_embedding=True, is_tied=True, max_size=D - 1)
    tx, p = ok.kfac(0.1, layers=[square]), {"table": draw(D, D)}
    with pytest.raises(ValueError, match=f"as many rows as outputs, {D}, needs max_size ≥ {D}"):
        tx.init(p)
    text = jnp.arange(D)[None]
    layers = ok.find_layers(bigram, p, text, max_size=D - 1)
    (left,) = layers.uncovered
    assert not len(layers)
    assert f"needs max_size ≥ {D}" in left.reason
    assert len(ok.find_layers(bigram, p, text, max_size=D)) == 1


# ----------------------------------------------------------------------------------------- sizes


def gpt2(layers, width, vocabulary, context):
    """Abstract parameters of a transformer of GPT-2's shapes, its layers scanned; and its loss."""
    kernels = {
        "qkv": (width, 3 * width),
        "out": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    norms = {name: {"scale": (width,), "bias": (width,)} for name in ("one", "two")}
    stack = {**{k: {"kernel": s, "bias": s[1:]} for k, s in kernels.items()}, **norms}
    is_shape = {"is_leaf": lambda x: isinstance(x, tuple)}
    shapes = {
        "table": (vocabulary, width),
        "positions": (context, width),
        "norm": norms["one"],
        "layers": jax.tree.map(lambda s: (layers, *s), stack, **is_shape),
    }
    abstract = functools.partial(jax.tree.map, lambda s: jax.ShapeDtypeStruct(s, jnp.float32))

    def normalized(p, h):
        h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)
        return h * p["scale"] + p["bias"]

    def apply(p, h):
        return h @ p["kernel"] + p["bias"]

    def layer(h, p):
        q, k, v = jnp.split(apply(p["qkv"], normalized(p["one"], h)), 3, axis=-1)
        scores = jnp.einsum("ntd,nsd->nts", q, k) / width**0.5
        weights = jax.nn.softmax(jnp.where(jnp.tri(context, dtype=bool), scores, -1e9))
        h = h + apply(p["out"], jnp.einsum("nts,nsd->ntd", weights, v))
        return h + apply(p["down"], jax.nn.gelu(apply(p["up"], normalized(p["two"], h)))), None

    def loss_fn(p, text):
        h = p["table"][text[:, :-1]] + p["positions"]
        h = normalized(p["norm"], jax.lax.scan(layer, h, p["layers"])[0])
        return cross_entropy(h @ p["table"].T, text[:, 1:]).mean()

    return loss_fn, abstract(shapes, **is_shape), jax.ShapeDtypeStruct((2, context + 1), jnp.int32)


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(("make", "most"), [(ok.kfac, 4), (ok.adaptive_kfac, 4), (ok.ekfac, 6)])
def test_the_state_for_gpt2_small(make, most):
    loss_fn, p, text = gpt2(layers=12, width=768, vocabulary=50257, context=1024)
    assert 124e6 < size(p) / 4 < 125e6
    layers = ok.find_layers(loss_fn, p, text)
    assert "tied embedding" in str(layers)
    assert [u.path for u in layers.uncovered] == []
    assert size(jax.eval_shape(make(layers=layers).init, p)) < most * size(p)


@pytest.mark.parametrize(("make", "reduce"), [(ok.kfac, True), (ok.kfac, False), (ok.ekfac, False)])
def test_no_matrix_of_a_vocabulary_is_in_the_compiled_step(make, reduce):
    words, width = 50257, 16
    p = {"table": (words, width), "w": (width, width)}
    p = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in p.items()}
    text = jax.ShapeDtypeStruct((2, 5), jnp.int32)

    def loss_fn(p, text):
        h = jnp.tanh(p["table"][text[:, :-1]] @ p["w"])
        return cross_entropy(h @ p["table"].T, text[:, 1:]).mean()

    layers = ok.find_layers(loss_fn, p, text)
    taps_fn = ok.value_and_grad_with_taps(loss_fn, layers, reduce=reduce)
    tx = make(0.1, layers=layers)

    def step(p, state, text, seed):
        _, grads, taps = taps_fn(p, text, key=jax.random.key(seed))
        updates, state = tx.update(grads, state, p, taps=taps)
        return optax.apply_updates(p, updates), state

    arguments = p, jax.eval_shape(tx.init, p), text, jax.ShapeDtypeStruct((), jnp.uint32)
    compiled = jax.jit(step).lower(*arguments).compile()
    shapes = set(re.findall(r"\[([\d,]+)\]", compiled.as_text()))
    assert any(str(words) in shape for shape in shapes)
    # Nor one that is flat: the largest array is the table, or the gradients of both examples.
    largest = max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)
    assert largest <= 2 * words * width, largest
