"""What calls LAPACK: no step of those that say so, first steps and refreshes included."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_kron as ok
from optax_kron.kernels import psgd

PARAMS = {"dense": jnp.ones((20, 12)), "tensor": jnp.ones((6, 6, 3)), "vector": jnp.ones(5)}
LAYER = [ok.Layer("dense", kernel="dense")]
BY_LAPACK = {
    "shampoo eigh": ok.scale_by_shampoo(root_method="eigh"),
    "ekfac eigh": ok.scale_by_ekfac(layers=LAYER, basis="eigh"),
    "kfac exact eigh": ok.scale_by_kfac(layers=LAYER, damping_rule="exact", basis="eigh"),
    "soap qr": ok.scale_by_soap(basis="qr"),
    "soap eigh": ok.scale_by_soap(basis="eigh"),
}
BY_PRODUCTS = {
    **{f"kron_psgd {x}": ok.scale_by_kron_psgd(geometry=x) for x in psgd.GEOMETRIES},
    **{x: ok.scale_by_soap(variant=x) for x in ("soap", "kl_soap", "kl_shampoo")},
    "soap staggered": ok.scale_by_soap(stagger=True),
    "soap in blocks": ok.scale_by_soap(blocking=ok.Blocking(block_size=8)),
    "shampoo": ok.scale_by_shampoo(),
    "shampoo staggered": ok.scale_by_shampoo(stagger=True),
    "kfac": ok.scale_by_kfac(layers=LAYER),
    "kfac trace": ok.scale_by_kfac(layers=LAYER, damping_rule="trace"),
    "kfac exact": ok.scale_by_kfac(layers=LAYER, damping_rule="exact"),
    "kfac staggered": ok.scale_by_kfac(layers=LAYER, stagger=True),
    "ekfac": ok.scale_by_ekfac(layers=LAYER),
    "ekfac staggered": ok.scale_by_ekfac(layers=LAYER, stagger=True),
    "adaptive_kfac": ok.adaptive_kfac(layers=LAYER),
    "adaptive_kfac exact": ok.adaptive_kfac(layers=LAYER, damping_rule="exact"),
    "adaptive_ekfac": ok.adaptive_ekfac(layers=LAYER),
    "branch_kfac": ok.scale_by_branch_kfac(),
}


def calls_lapack(tx: optax.GradientTransformationExtraArgs) -> bool:
    """Whether the update, as lowered for a CPU, names a routine of LAPACK."""
    draw = np.random.default_rng(0).normal
    inputs, residuals = draw(size=(1, 7, 1, 20)), draw(size=(1, 1, 7, 1, 12))
    tap = ok.Tap(jnp.asarray(inputs, jnp.float32), jnp.asarray(residuals, jnp.float32))

    def update(grads, state, taps, branches):
        more = {"value": jnp.ones([]), "value_fn": optax.tree.sum, "ggn_fn": lambda v: v}
        return tx.update(grads, state, PARAMS, taps=taps, branches=branches, **more)

    state = jax.eval_shape(tx.init, PARAMS)
    given = PARAMS, state, ok.Taps({"dense": tap}), jnp.eye(4, 8)
    return "custom_call @lapack" in jax.jit(update).lower(*given).as_text()


@pytest.mark.parametrize("name", BY_LAPACK)
def test_decompositions_call_lapack(name):
    """So the test below would see it."""
    assert calls_lapack(BY_LAPACK[name])


@pytest.mark.parametrize("name", BY_PRODUCTS)
def test_matrix_products_do_not(name):
    assert not calls_lapack(BY_PRODUCTS[name])
