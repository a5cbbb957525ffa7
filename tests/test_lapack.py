"""What calls LAPACK: no step of those that say so, first steps and refreshes included."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_kron as ok

PARAMS = {"dense": jnp.ones((20, 12)), "tensor": jnp.ones((6, 6, 3)), "vector": jnp.ones(5)}
LAYER = [ok.Layer("dense", kernel="dense")]
# Besides the optimizers that are named here: "eigh" and "qr" wherever they are chosen.
BY_LAPACK = {
    "shampoo": ok.scale_by_shampoo(),
    "ekfac": ok.scale_by_ekfac(layers=LAYER),
    "kfac exact": ok.scale_by_kfac(layers=LAYER, damping_rule="exact"),
    "soap qr": ok.scale_by_soap(basis="qr"),
}
BY_PRODUCTS = {
    **{f"kron_psgd {x}": ok.scale_by_kron_psgd(geometry=x) for x in ("EQ", "QEQ", "QUAD", "QEP")},
    **{x: ok.scale_by_soap(variant=x) for x in ("soap", "kl_soap", "kl_shampoo")},
    "soap staggered": ok.scale_by_soap(stagger=True),
    "soap in blocks": ok.scale_by_soap(blocking=ok.Blocking(block_size=8)),
    "shampoo newton": ok.scale_by_shampoo(root_method="newton", refresh_every=2),
    "shampoo newton staggered": ok.scale_by_shampoo(root_method="newton", stagger=True),
    "kfac": ok.scale_by_kfac(layers=LAYER),
    "kfac trace": ok.scale_by_kfac(layers=LAYER, damping_rule="trace"),
    "ekfac power": ok.scale_by_ekfac(layers=LAYER, basis="power"),
}


def calls_lapack(tx: optax.GradientTransformationExtraArgs) -> bool:
    """Whether the compiled update names a routine of LAPACK."""
    draw = np.random.default_rng(0).normal
    inputs, residuals = draw(size=(1, 7, 1, 20)), draw(size=(1, 1, 7, 1, 12))
    tap = ok.Tap(jnp.asarray(inputs, jnp.float32), jnp.asarray(residuals, jnp.float32))
    update = jax.jit(lambda grads, state, taps: tx.update(grads, state, PARAMS, taps=taps))
    state = jax.eval_shape(tx.init, PARAMS)
    program = update.lower(PARAMS, state, ok.Taps({"dense": tap})).compile().as_text()
    return 'custom_call_target="lapack' in program


@pytest.mark.parametrize("name", BY_LAPACK)
def test_decompositions_call_lapack(name):
    """So the test below would see it."""
    assert calls_lapack(BY_LAPACK[name])


@pytest.mark.parametrize("name", BY_PRODUCTS)
def test_matrix_products_do_not(name):
    assert not calls_lapack(BY_PRODUCTS[name])
