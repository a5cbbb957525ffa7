"""Axes with a diagonal factor, cut into blocks: exact where damping is that of the product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_kron as ok
from optax_kron.layers.cuts import cut_layer

N, ROWS, WIDTH = 20, 12, 4


def table():
    """An embedding, of which one example reads a row twice."""
    rng = np.random.default_rng(0)
    layer = ok.Layer("words", kernel="words", is_embedding=True)
    params = {"words": jnp.asarray(rng.normal(size=(ROWS, WIDTH)))}
    indices = jnp.asarray(rng.integers(0, ROWS, (1, N, 3, 1)))
    return layer, params, indices, jnp.asarray(rng.normal(size=(1, 1, N, 3, WIDTH)))


def head(biased):
    """A dense layer with more outputs than max_size, in two blocks if it has no bias."""
    rng = np.random.default_rng(1)
    count = 1 if biased else 2
    shape = (WIDTH, ROWS) if biased else (count, ROWS, WIDTH)
    layer = ok.Layer(
        "head",
        kernel="kernel",
        bias="bias" if biased else None,
        block_axes=() if biased else (0,),
        out_axes=(-1,) if biased else (1,),
        max_size=WIDTH + 1,
    )
    params = {"kernel": jnp.asarray(rng.normal(size=shape))}
    if biased:
        params["bias"] = jnp.asarray(rng.normal(size=ROWS))
    inputs = rng.normal(size=(count, N, 2, WIDTH + biased))
    if biased:
        inputs[..., -1] = 1
    return layer, params, jnp.asarray(inputs), jnp.asarray(rng.normal(size=(2, count, N, 2, ROWS)))


def wide():
    """A dense layer with more inputs than max_size, on two axes of its kernel."""
    rng = np.random.default_rng(2)
    layer = ok.Layer("wide", kernel="kernel", max_size=WIDTH)
    params = {"kernel": jnp.asarray(rng.normal(size=(6, 2, 3)))}
    inputs = jnp.asarray(rng.normal(size=(1, N, 2, ROWS)))
    return layer, params, inputs, jnp.asarray(rng.normal(size=(1, 1, N, 2, 3)))


CASES = {
    "table": table,
    "head": lambda: head(biased=False),
    "head with a bias": lambda: head(biased=True),
    "wide": wide,
}


def run(make, case, block_size, steps=4, moments=False, **settings):
    layer, params, inputs, grads = case()
    tx = make(
        layers=[layer],
        damping_rule="exact",
        damping=0.1,
        outlier_clip=None,
        block_size=block_size,
        factor_dtype="float64",
        **settings,
    )
    state, updates = tx.init(params), []
    for k in range(steps):
        scale = 1 + 0.3 * k
        taps = ok.Taps({layer.name: ok.Tap(inputs, grads * scale)})
        gradient = jax.tree.map(lambda p, k=k: jnp.sin((k + 1) * p), params)
        u, state = tx.update(gradient, state, params, taps=taps)
        updates.append(u)
    return updates, state


@pytest.mark.parametrize("make", [ok.scale_by_kfac, ok.scale_by_ekfac], ids=["kfac", "ekfac"])
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_blocks_of_a_long_axis_get_the_updates_of_the_whole(x64, make, case):
    whole, _ = run(make, case, None)
    cut, state = run(make, case, 4)
    (stack,) = state.stacks.values()
    assert len(stack.initialized) > 2
    assert all(4 in x.shape for x in state.momentum.blocks.values())
    # Eigenvectors of one factor, however often: what differs is the order of sums.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12), cut, whole)
    assert int(state.failed_refreshes) == 0


def test_second_moments_are_cut_like_taps(x64):
    layer, params, indices, grads = table()
    tx = ok.scale_by_kfac(layers=[layer], block_size=5, factor_dtype="float64")
    state = tx.init(params)
    tap = ok.Tap(indices, grads)
    from_taps, _ = tx.update(params, state, taps=ok.Taps({"words": tap}))
    counts = jnp.zeros((1, ROWS)).at[0, indices.ravel()].add(1) / indices.size
    G = jnp.einsum("vbnsi,vbnsj->bij", grads, grads) / N
    given = ok.Taps({"words": ok.Moments(counts, G, jnp.asarray(3.0 * N))})
    from_moments, _ = tx.update(params, state, taps=given)
    np.testing.assert_allclose(from_taps["words"], from_moments["words"], rtol=1e-9)


def test_blocks_with_another_basis_keep_their_eigenvalues(x64):
    """As after a refresh that failed in one of them: λ of another basis is none of theirs."""
    layer, params, indices, grads = table()
    tx = ok.scale_by_ekfac(
        layers=[layer], block_size=4, factor_dtype="float64", refresh_every=100, decay=0.0
    )
    taps = ok.Taps({"words": ok.Tap(indices, grads)})
    _, state = tx.update(params, tx.init(params), taps=taps)
    ((label, stack),) = state.stacks.items()
    spectrum = stack.inverse
    turned = spectrum.output_basis.at[1].set(jnp.eye(WIDTH))
    stack = stack._replace(inverse=spectrum._replace(output_basis=turned))
    state = state._replace(stacks={label: stack})
    louder = ok.Taps({"words": ok.Tap(indices, 2 * grads)})
    _, after = tx.update(params, state, taps=louder)
    changed = jnp.any(after.stacks[label].inverse.values != spectrum.values, axis=(1, 2))
    assert changed.tolist() == [True, False, True]


def test_an_axis_without_a_fitting_divisor_raises():
    params = {"words": jnp.ones((13, 2))}
    tx = ok.kfac(layers=[ok.Layer("words", kernel="words", is_embedding=True)], block_size=12)
    with pytest.raises(ValueError, match=r"kfac: layer 'words': an axis of 13 cannot be cut"):
        tx.init(params)
    with pytest.raises(ValueError, match=r"block_size must be an integer ≥ 1 or None; got 0"):
        ok.ekfac(layers=[], block_size=0)


def test_short_axes_and_dense_factors_stay_whole():
    params = {"words": jnp.ones((12, 2)), "kernel": jnp.ones((12, 2))}
    table = ok.Layer("words", kernel="words", is_embedding=True).resolved(params)
    dense = ok.Layer("dense", kernel="kernel").resolved(params)
    assert cut_layer("kfac", table, 12)[0] is table
    assert cut_layer("kfac", dense, 2)[0] is dense
    cut, how = cut_layer("kfac", table, 4)
    assert (cut.blocks, cut.d_in, how.pieces) == (3, 4, 3)
