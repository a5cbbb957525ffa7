"""The curvature of log ψ, beside the metric that `jax.jacobian` makes of it: in float64."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron import losses
from optax_kron.capture.find import find_layers
from optax_kron.capture.ggn import ggn_vector_product
from optax_kron.capture.taps import value_and_grad_with_taps

from .test_identities import draw, kfac_block

N = 6


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def two_nets(params, x):
    """Amplitude and phase of nets of their own."""
    phase = jnp.tanh(x @ params["v"]) @ params["u"]
    return jnp.log(jnp.cosh(x @ params["w"])).sum(-1) + 1j * phase[:, 0]


def rotated(params, x):
    """Complex activations of real parameters, whose phase and amplitude are not apart."""
    return jnp.log(jnp.cosh((1 + 0.5j) * (x @ params["w"] + params["b"]))).sum(-1)


def linear(params, x):
    """A chain of maps without activations, the last one to amplitude and phase."""
    parts = x @ params["w"] @ params["u"]
    return jax.lax.complex(parts[:, 0], parts[:, 1])


def real(params, x):
    """log |ψ| of a real wave function."""
    return (jnp.tanh(x @ params["w"] + params["b"]) @ params["u"])[:, 0]


def boltzmann(params, x):
    """A restricted Boltzmann machine whose complex kernel is real: both of its parts."""
    parts = jnp.einsum("ni,ipo->npo", x, params["w"]) + params["b"]
    return jnp.log(jnp.cosh(jax.lax.complex(parts[:, 0], parts[:, 1]))).sum(-1)


NETS = {
    "two nets": (two_nets, {"w": (3, 4), "v": (3, 2), "u": (2, 1)}),
    "rotated": (rotated, {"w": (3, 4), "b": (4,)}),
    "linear": (linear, {"w": (3, 4), "u": (4, 2)}),
    "boltzmann": (boltzmann, {"w": (3, 2, 4), "b": (2, 4)}),
    "real": (real, {"w": (3, 4), "b": (4,), "u": (4, 1)}),
}
nets = pytest.mark.parametrize("name", NETS)


def problem(name, n=N):
    log_psi, shapes = NETS[name]
    params = {key: 0.5 * draw(*shape, seed=i) for i, (key, shape) in enumerate(shapes.items())}
    return log_psi, params, draw(n, 3, seed=9)


def jacobian(log_psi, params, x, paths=None):
    """`O = ∂ log ψ / ∂θ`, [N, parameters], of the parameters at some paths."""
    part = {path: params[path] for path in paths or params}
    flat, unflatten = jax.flatten_util.ravel_pytree(part)

    def parts(flat):
        z = log_psi({**params, **unflatten(flat)}, x)
        return jnp.stack([z.real, z.imag * jnp.ones_like(z.real)])

    real, imaginary = jax.jacobian(parts)(flat)
    return real + 1j * imaginary


def gram(o):
    """`E[Re(O* Oᵀ)]`."""
    return (o.conj().T @ o).real / len(o)


def matrix(loss_fn, params, x):
    product = ggn_vector_product(loss_fn, params, x)
    flat, unflatten = jax.flatten_util.ravel_pytree(params)
    return jax.vmap(lambda v: jax.flatten_util.ravel_pytree(product(unflatten(v)))[0])(
        jnp.eye(flat.size)
    )


@nets
def test_the_curvature_is_the_real_part_of_the_geometric_tensor(name):
    log_psi, params, x = problem(name)
    o = jacobian(log_psi, params, x)
    found = matrix(lambda p, x: losses.log_psi(log_psi(p, x)).mean(), params, x)
    np.testing.assert_allclose(found, gram(o), rtol=1e-10, atol=1e-12)

    def centred(p, x):
        z = log_psi(p, x)
        return losses.log_psi(z - z.mean()).mean()

    np.testing.assert_allclose(
        matrix(centred, params, x), gram(o - o.mean(0)), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize(
    ("name", "fisher"),
    [*((name, "exact") for name in NETS), ("rotated", "mc"), ("rotated", "sketch")],
)
def test_columns_of_each_sample_make_its_metric(name, fisher):
    """Summed over positions, input times output-gradient is what each sample has of O."""
    log_psi, params, x = problem(name)
    variance = 0.5

    def loss_fn(p, x):
        return losses.normal(log_psi(p, x), variance=variance).mean()

    layers = find_layers(loss_fn, params, x)
    assert not layers.uncovered, layers
    samples = 1 if fisher == "exact" else 4000
    fn = value_and_grad_with_taps(loss_fn, layers, fisher=fisher, samples=samples)
    value, grads, taps = jax.jit(fn)(params, x, key=jax.random.key(0))
    assert value == 0
    assert all(not jnp.any(g) for g in grads.values())
    for layer in layers:
        (tap,) = taps[layer.name]
        columns = jnp.einsum("bnsi,vbnso->vnbio", tap.inputs, tap.output_grads)
        columns = columns.reshape(*columns.shape[:2], -1)
        o = jacobian(log_psi, params, x, layer.paths)
        if layer.bias is not None:  # its row is the last, and paths are in alphabetical order
            o = jnp.roll(o, -layer.d_out, axis=1)
        expected = jnp.einsum("ni,nj->nij", o.conj(), o).real / variance
        found = jnp.einsum("vni,vnj->nij", columns, columns)
        error = jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)
        assert error < (1e-12 if fisher == "exact" else 0.1)  # 4,000 samples: about 0.03


@pytest.mark.parametrize(
    ("name", "n"), [("linear", N), ("two nets", 1), ("rotated", 1), ("boltzmann", 1)]
)
def test_blocks_are_exact_where_output_gradients_do_not_depend_on_the_sample(name, n):
    log_psi, params, x = problem(name, n)

    def loss_fn(p, x):
        return losses.log_psi(log_psi(p, x)).mean()

    layers = find_layers(loss_fn, params, x)
    _, _, taps = value_and_grad_with_taps(loss_fn, layers, fisher="exact")(params, x)
    for layer in layers:
        expected = gram(jacobian(log_psi, params, x, (layer.kernel,)))
        found = kfac_block(layer, taps[layer.name])
        size = len(expected)  # without the bias
        np.testing.assert_allclose(found[:size, :size], expected, rtol=1e-10, atol=1e-12)


def test_a_complex_kernel_on_real_inputs_has_a_real_block():
    """That of `z = x (V + iW)`: [[Re S, -Im S], [Im S, Re S]], with S of the holomorphic net."""
    log_psi, params, x = problem("boltzmann", 1)

    def holomorphic(kernel):
        bias = params["b"][0] + 1j * params["b"][1]
        return jnp.log(jnp.cosh(x @ kernel + bias)).sum(-1)

    kernel = params["w"][:, 0] + 1j * params["w"][:, 1]
    o = jax.jacobian(holomorphic, holomorphic=True)(kernel).reshape(1, -1)
    s = (o.conj().T @ o).reshape(3, 4, 3, 4)
    expected = np.zeros((3, 2, 4, 3, 2, 4))
    for i, j, part in ((0, 0, s.real), (0, 1, -s.imag), (1, 0, s.imag), (1, 1, s.real)):
        expected[:, i, :, :, j] = part

    def loss_fn(p, x):
        return losses.log_psi(log_psi(p, x)).mean()

    (layer,) = find_layers(loss_fn, params, x)
    _, _, taps = value_and_grad_with_taps(loss_fn, fisher="exact")(params, x)
    found = kfac_block(layer, taps[layer.name])[:24, :24]  # without the bias
    np.testing.assert_allclose(found, expected.reshape(24, 24), rtol=1e-10, atol=1e-12)


def test_complex_parameters_are_declared():
    params = {"w": jnp.ones((3, 4)) * (1 + 1j)}

    def loss_fn(p, x):
        return losses.log_psi(jnp.log(jnp.cosh(x @ p["w"])).sum(-1)).mean()

    layers = find_layers(loss_fn, params, jnp.ones((N, 3)))
    assert not list(layers)
    ((path, reason),) = [(u.path, u.reason) for u in layers.uncovered]
    assert path == "w"
    assert reason == "is complex; a real parameter may hold both of its parts"


def test_the_curvature_joins_a_gradient_of_the_users_own():
    """As that of the energy, by a `custom_jvp` that is not the derivative of its value."""
    log_psi, params, x = problem("two nets")

    @jax.custom_jvp
    def energy(params, x):
        return jnp.mean(log_psi(params, x).real ** 2)

    @energy.defjvp
    def energy_jvp(primals, tangents):
        params, x = primals
        z, dz = jax.jvp(lambda p: log_psi(p, x), (params,), (tangents[0],))
        local = z.real**2 - jnp.mean(z.real**2) + 0.3j * x[:, 0]
        return energy(params, x), 2 * jnp.mean((local.conj() * dz).real)

    def loss_fn(params, x):
        return energy(params, x) + losses.log_psi(log_psi(params, x)).mean()

    layers = find_layers(loss_fn, params, x)
    assert not layers.uncovered, layers
    fn = value_and_grad_with_taps(loss_fn, layers, fisher="exact")
    value, grads, taps = jax.jit(fn)(params, x)
    expected = jax.value_and_grad(energy)(params, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), (value, grads), expected
    )
    assert jnp.any(grads["v"])
    # Of the real part and of the imaginary one: of "v" and "u" the first is zero.
    assert taps["v"][0].output_grads.shape == (2, 1, N, 1, 2)
    assert not jnp.any(taps["v"][0].output_grads[0])
