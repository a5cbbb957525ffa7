"""What operators are handed: vectors, weights and settings of other kinds than expected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_kron as ok

LAYERS = [ok.Layer("dense", kernel="w")]


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape))


def taps_of(rows):
    return ok.Taps({"dense": ok.Tap(draw(10, 3)[rows], draw(10, 2)[rows])})


def loss_fn(params, x, y, scale=1.0):
    hidden = jnp.tanh(x @ params["w"]) @ params["o"]
    return scale * ok.losses.l2_loss(hidden, y).mean()


PARAMS = {"o": jnp.ones((2, 2)), "w": jnp.full((3, 2), 0.1)}
DATA = jnp.ones((5, 3)), jnp.zeros((5, 2))


def of_loss(dtype=jnp.float32):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    layers = ok.find_layers(loss_fn, params, *DATA, check=False)
    taps = ok.value_and_grad_with_taps(loss_fn, layers, fisher="exact")(params, *DATA)[2]
    return params, layers, taps


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["kfac", "ekfac", "kfoc"])
def test_taps_by_hand_may_be_cut_into_uneven_batches(kind, weighted):
    make = getattr(ok.operators, kind)
    cuts = [slice(0, 2), slice(2, 3), slice(3, 10)]
    shares = (0.2, 0.1, 0.7)
    batches = [
        (w, taps_of(c)) if weighted else taps_of(c) for c, w in zip(cuts, shares, strict=True)
    ]
    expected = make(taps_of(slice(None)), LAYERS).as_matrix()
    np.testing.assert_allclose(make(batches, LAYERS).as_matrix(), expected, atol=1e-6)


def test_multiples_and_sums_of_a_matrix_of_a_loss_with_other_arguments():
    op = ok.operators.ggn(loss_fn, PARAMS, *DATA, 0.5)
    np.testing.assert_allclose((2.0 * op).trace(), 2 * op.trace(), rtol=1e-6)
    damped = op + 0.5 * ok.operators.identity(PARAMS)
    back = damped.inverse() @ (damped @ PARAMS)
    np.testing.assert_allclose(back["w"], PARAMS["w"], atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_samples_have_the_dtypes_of_the_parameters(dtype):
    params, layers, taps = of_loss(dtype=dtype)
    for op in (ok.operators.kfac(taps, layers), ok.operators.ggn(loss_fn, params, *DATA)):
        drawn = op.sample(jax.random.key(0), 1.0)
        assert {x.dtype for x in jax.tree.leaves(drawn)} == {jnp.dtype(dtype)}


def operators():
    params, layers, taps = of_loss()
    k = ok.operators.kronecker(0.5 * jnp.eye(2), jnp.eye(3))
    return {
        "kronecker": (k, jnp.ones((2, 3), int)),
        "eigen": (ok.operators.eigen(None, None, jnp.full((2, 3), 0.5)), jnp.ones((2, 3), int)),
        "identity": (0.5 * ok.operators.identity(jnp.ones((2, 3))), jnp.ones((2, 3), int)),
        "dense": (k.inverse(0.5) + k, jnp.ones((2, 3), int)),
        "layers": (ok.operators.ekfac(taps, layers), jax.tree.map(lambda p: 1 + 0 * p, params)),
        "ggn": (ok.operators.ggn(loss_fn, params, *DATA), params),
    }


@pytest.mark.parametrize("name", operators())
def test_whole_numbers_are_taken_as_floating_point(name):
    op, vector = operators()[name]
    whole = jax.tree.map(lambda x: jnp.ones(x.shape, int), vector)
    number = jax.tree.map(lambda x: jnp.ones(x.shape), vector)
    for a, b in zip(jax.tree.leaves(op @ whole), jax.tree.leaves(op @ number), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", operators())
def test_complex_vectors_are_refused(name):
    op, vector = operators()[name]
    with pytest.raises(ValueError, match="complex"):
        op @ jax.tree.map(lambda x: 1j * x, vector)


def test_a_matrix_of_complex_parameters_is_refused():
    with pytest.raises(ValueError, match="real and imaginary"):
        ok.operators.ggn(lambda z: ok.losses.l2_loss(z.imag, jnp.zeros(1)).sum(), jnp.ones(1) * 1j)


def test_the_product_of_complex_parameters_is_positive():
    def imaginary(z):
        return ok.losses.l2_loss(z.imag, jnp.zeros(1)).sum()

    product = ok.ggn_vector_product(imaginary, jnp.array([1.0 + 2j]))
    np.testing.assert_allclose(product(jnp.array([3.0 + 4j])), [4j])


@pytest.mark.parametrize("name", ["ggn", "layers"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: {"w": p["w"]},
        lambda p: {**p, "z": p["w"]},
        lambda p: {**p, "w": p["w"][:1]},
        lambda p: jnp.ones(10),
    ],
)
def test_vectors_of_another_structure_are_refused(name, spoil):
    op, vector = operators()[name]
    with pytest.raises(ValueError, match="the operator acts on"):
        op @ spoil(vector)


def test_operators_of_some_layers_say_how_to_get_all_parameters():
    params, layers, taps = of_loss()
    some = [layer for layer in layers if "w" in layer.name]
    taps = ok.Taps({layer.name: taps[layer.name] for layer in some})
    with pytest.raises(ValueError, match="params="):
        ok.operators.kfac(taps, some) @ params
    op = ok.operators.kfac(taps, some, params=params)
    np.testing.assert_array_equal((op @ params)["o"], 0)


def test_transposes_of_sums_and_multiples():
    n = ok.operators.kronecker(draw(2, 2), draw(3, 3))
    other = ok.operators.kronecker(draw(2, 2, seed=1), draw(3, 3, seed=1))
    for op in (n + other, (n + other) / 2.0):
        np.testing.assert_allclose(op.T.as_matrix(), op.as_matrix().T, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerance": float("nan")}, "tolerance must be"),
        ({"tolerance": -1.0}, "tolerance must be"),
        ({"tolerance": "a"}, "tolerance must be"),
        ({"max_iterations": 0}, "max_iterations must be"),
        ({"max_iterations": 2.5}, "max_iterations must be"),
    ],
)
def test_settings_of_kfoc_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        ok.operators.kfoc(taps_of(slice(None)), LAYERS, **settings)


@pytest.mark.parametrize(
    "weight", [np.float32(-1), jnp.array(-1.0), float("nan"), jnp.ones(2), "a", float("inf")]
)
def test_weights_of_batches_are_checked(weight):
    with pytest.raises(ValueError, match="weights of batches must be"):
        ok.operators.kfac([(weight, taps_of(slice(None)))], LAYERS)


@pytest.mark.parametrize("damping", ["a", None, 1j, float("inf"), float("nan"), -1.0])
def test_damping_is_a_finite_number(damping):
    with pytest.raises(ValueError, match="damping must be"):
        ok.operators.kronecker(jnp.eye(2)).inverse(damping)


def test_what_is_no_operator_is_named():
    k = ok.operators.kronecker(jnp.eye(2))
    with pytest.raises(ValueError, match=r"'b'.* is a str"):
        ok.operators.block_diagonal({"a": k, "b": "x"})
    with pytest.raises(TypeError, match="as_lineax: expected an operator"):
        ok.operators.as_lineax(jnp.eye(2))
    with pytest.raises(ValueError, match="product of two operators"):
        k @ k
    with pytest.raises(TypeError):
        k * "a"
    with pytest.raises(TypeError):
        k * None


def test_block_diagonals_return_the_container_that_they_get():
    k = ok.operators.kronecker(jnp.eye(2))
    op = ok.operators.block_diagonal([k, 2.0 * k])
    x = jnp.ones(2)
    assert type(op @ (x, x)) is tuple
    assert type(op @ [x, x]) is list
    for wrong in (jnp.ones((2, 2)), {0: x, 1: x}, None):
        with pytest.raises(ValueError, match="blocks"):
            op @ wrong


@pytest.mark.usefixtures("x64")
def test_parameters_in_no_layer_have_their_precision():
    params = {"w": jnp.ones(3)}
    layers = ok.find_layers(lambda p: jnp.sum(p["w"]), params, check=False)
    with pytest.warns(UserWarning, match="not a single layer, so the curvature is zero"):
        op = ok.operators.kfac(ok.Taps({}), layers)
    np.testing.assert_allclose(op.inverse(0.1).logdet(), 3 * np.log(10), rtol=1e-14)


def test_a_state_of_another_curvature_is_refused():
    params, layers, taps = of_loss()
    state = ok.scale_by_kfac(layers=layers).init(params)
    with pytest.raises(ValueError, match="the state was made by another optimizer"):
        ok.scale_by_ekfac(layers=layers).update(params, state, params, taps=taps)


def test_layers_can_be_selected():
    _, layers, _ = of_loss()
    first, second = layers
    assert layers[:1] == (first,)
    assert layers[second.name] is second
    assert first.name in layers
    assert "foo" not in layers
    with pytest.raises(KeyError, match=f"there is no layer 'foo'.*{first.name}"):
        layers["foo"]
