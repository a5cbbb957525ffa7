"""The fit reaches what it should: `P = |H|⁻¹` in Newton mode, `P = E[ggᴴ]^-½` when it whitens.

The problem has a Kronecker product for its curvature, `H = H_1 ⊗ H_2 ⊗ …` with
`H_i = WWᴴ / d_i + 0.2 I`, so that the fit can be exact. Factors start at the identity; precond_lr
falls linearly from ½ to 0 over 2000 updates; the input is taken as it is, without damping.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_kron.kernels import contract, psgd
from tests.kernels.problems import ROWS, random
from tests.reference import psgd as reference

STEPS = 2000
PROBLEMS = 2
# Bounds on ‖P·HV − V‖ / ‖V‖ over fresh probes.
NEWTON = dict.fromkeys(psgd.GEOMETRIES, 1e-12) | {"EQ": 1e-5}
WHITENING = 0.15
every_geometry = pytest.mark.parametrize("geometry", psgd.GEOMETRIES)


def curvatures(shape, dtype, seed=0):
    """`H_i` for every axis, stacked over a few problems."""
    rng = np.random.default_rng(seed)
    stacks = []
    for d in shape:
        W = random(rng, (PROBLEMS, d, d), dtype)
        stacks.append(jnp.asarray(W @ np.conj(np.swapaxes(W, 1, 2)) / d + 0.2 * np.eye(d)))
    return tuple(stacks)


@functools.partial(jax.jit, static_argnames=("geometry", "newton"))
def fit(curvature, white, probes, *, geometry, newton):
    """Factors fitted on the stream `H·white`, for each problem of the stack.

    Args:
      curvature: the `H_i`, [problems, d_i, d_i].
      white: [steps, d_1, ..., d_k]; in Newton mode the probes, else independent of them.
      probes: [steps, d_1, ..., d_k].
      geometry: of the update.
      newton: of the update.
    """
    steps = len(white)

    def fit_one(curvature):
        def update(carry, inputs):
            step, white, probe = inputs
            return psgd.update_factors(
                *carry,
                contract.apply_factors(curvature, white),
                probe,
                ROWS,
                geometry=geometry,
                precond_lr=(1 - step / steps) / 2,
                newton=newton,
            ), None

        factors = tuple(jnp.eye(len(H), dtype=H.dtype) for H in curvature)
        bounds = jnp.zeros(len(curvature), jnp.finfo(curvature[0].dtype).dtype)
        inputs = (jnp.arange(steps), white, probes)
        return jax.lax.scan(update, (factors, bounds), inputs)[0][0]

    return jax.vmap(fit_one)(curvature)


def fit_newton(curvature, geometry, steps=STEPS):
    shape = tuple(H.shape[-1] for H in curvature)
    probes = random(np.random.default_rng(1), (steps, *shape), curvature[0].dtype)
    return fit(curvature, probes, probes, geometry=geometry, newton=True)


def fit_whitening(curvature, geometry, steps=STEPS):
    shape = tuple(H.shape[-1] for H in curvature)
    white, probes = random(np.random.default_rng(2), (2, steps, *shape), curvature[0].dtype)
    return fit(curvature, white, probes, geometry=geometry, newton=False)


def residuals(factors, curvature, geometry):
    """‖P·HV − V‖ / ‖V‖ for each problem, over 100 fresh probes."""
    rng = np.random.default_rng(99)
    result = []
    for i in range(len(factors[0])):
        Q, H = [np.asarray(q[i]) for q in factors], [np.asarray(h[i]) for h in curvature]
        V = random(rng, (100, *(len(q) for q in Q)), Q[0].dtype)
        errors = [reference.precondition(Q, reference.apply(H, v), geometry) - v for v in V]
        result.append(np.linalg.norm(errors) / np.linalg.norm(V))
    return np.array(result)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((5, 7), np.float64), ((3, 4, 5), np.float64), ((5, 7), np.complex128)],
    ids=["matrix", "tensor", "complex"],
)
@every_geometry
def test_newton_inverts_the_curvature(geometry, shape, dtype):
    curvature = curvatures(shape, dtype)
    factors = fit_newton(curvature, geometry)
    assert np.all(residuals(factors, curvature, geometry) <= NEWTON[geometry])


@every_geometry
def test_whitening_inverts_the_root_of_the_covariance(geometry):
    curvature = curvatures((5, 7), np.float64)
    factors = fit_whitening(curvature, geometry)
    assert np.all(residuals(factors, curvature, geometry) <= WHITENING)


@pytest.mark.parametrize("newton", [False, True], ids=["whitening", "newton"])
def test_p_itself_follows_a_wide_spectrum_in_float32(newton):
    """At condition 1e6, which the other geometries miss by 0.4 or more in as many steps."""
    d, steps = 8, 1500
    rng = np.random.default_rng(0)
    U = np.linalg.qr(random(rng, (d, d)))[0]
    H = (U * np.geomspace(1, 1e-6, d)) @ U.T
    white, probes = random(rng, (2, steps, d, 4 * d), np.float32)
    # The other axis has nothing to whiten.
    curvature = jnp.asarray(H, jnp.float32)[None], jnp.eye(4 * d, dtype=jnp.float32)[None]
    white = probes if newton else white
    factors = fit(curvature, white, probes, geometry="PRO4P", newton=newton)
    assert np.all(residuals(factors, curvature, "PRO4P") <= WHITENING)
    P = np.asarray(factors[0][0], np.float64)
    assert np.linalg.eigvalsh((P + P.T) / 2)[0] > 0


def test_quad4p_moves_p_as_qeq_does():
    curvature = curvatures((5, 7), np.complex128)
    P = fit_whitening(curvature, "QUAD4P", steps=50)
    Q = fit_whitening(curvature, "QEQ", steps=50)
    for p, q in zip(P, Q, strict=True):
        np.testing.assert_allclose(p, np.conj(np.swapaxes(q, 1, 2)) @ q, atol=1e-12)


@every_geometry
def test_whitened_stream_is_white(geometry):
    """The covariance of `P·g` is the identity within 15 %, `‖C − I‖_F / ‖I‖_F`.

    The covariance of the stream is known, `H Hᵀ`, and so is that of `P·g`: nothing is sampled but
    the stream that the factors were fitted on.
    """
    curvature = curvatures((5, 7), np.float64, seed=3)
    factors = fit_whitening(curvature, geometry, steps=5 * STEPS)
    for i in range(PROBLEMS):
        H = reference.kron([h[i] for h in curvature])
        P = reference.kron([q[i] for q in factors])
        P = P if geometry in reference.OF_P else P.T @ P
        identity = np.eye(len(H))
        assert np.linalg.norm(H @ H.T - identity) > 0.5 * np.linalg.norm(identity)
        covariance = P @ H @ H.T @ P.T
        error = np.linalg.norm(covariance - identity) / np.linalg.norm(identity)
        assert error <= 0.15
