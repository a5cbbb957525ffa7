"""Factors are those of the parameters and blocks that they are said to be of."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_kron as ok
from optax_kron.blocking import plan_blocks
from optax_kron.diagnostics.matrices import unpacked
from optax_kron.kernels import packed

from .runs import batch, layers, params, run

BLOCKINGS = {
    "default": ok.Blocking(),
    "cut": ok.Blocking(block_size=4),
    "merged": ok.Blocking(merge_below=12),
    "stacked": ok.Blocking(stacked_axes=1),
    "stacked and cut": ok.Blocking(stacked_axes=1, block_size=4),
    "merged and cut": ok.Blocking(merge_below=12, block_size=5),
    "diagonal": ok.Blocking(max_size=5),
}
SHAPES = {"cube": (3, 4, 7), "kernel": (5, 9), "scalar": (), "thin": (1, 6), "vector": (6,)}


def draws(shapes=SHAPES, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    made = {k: rng.normal(size=s) for k, s in shapes.items()}
    if jnp.issubdtype(dtype, jnp.complexfloating):
        made = {k: x + 1j * rng.normal(size=np.shape(x)) for k, x in made.items()}
    return {k: jnp.asarray(x, dtype) for k, x in made.items()}


def after_one_step(tx, grads):
    return tx.update(grads, tx.init(grads), grads)[1]


def with_grams(tx, grads, blocking):
    """The state of `shampoo` whose statistics are Gram matrices, made without compiling a step."""
    state, blocks = tx.init(grads), plan_blocks(grads, blocking).split(grads, jnp.float32)
    stacks = {}
    for label, stack in state.stacks.items():
        made = []
        for axis, old in enumerate(stack.statistics):
            x = np.moveaxis(np.asarray(blocks[label]), axis + 1, 1)
            rows = x.reshape(*x.shape[:2], -1)
            grams = rows @ rows.conj().mT
            made.append(jnp.asarray(grams if old.ndim == 3 else np.einsum("nii->ni", grams).real))
        stacks[label] = stack._replace(statistics=tuple(made))
    return state._replace(stacks=stacks)


def by_block(found, name):
    """The factors of one name, by block."""
    blocks = {}
    for factor in found:
        if factor.name == name:
            blocks.setdefault(factor.block, []).append(factor)
    return blocks


def part_of(leaf, factors, count):
    """What of a parameter a block is, and the positions of its factors' axes in that."""
    ordered = sorted(factors, key=lambda factor: factor.axes)
    merged = [int(np.prod([leaf.shape[i] for i in factor.axes])) for factor in ordered]
    members = np.asarray(leaf).reshape(-1, *merged)  # of axes that are stacked
    member = members[factors[0].block * len(members) // count]
    slices = [slice(factor.start, factor.start + len(factor.array)) for factor in ordered]
    return member[tuple(slices)], {factor.axis: ordered.index(factor) for factor in factors}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, jnp.float32) for name in BLOCKINGS),
        ("merged and cut", jnp.bfloat16),
        ("cut", jnp.complex64),
    ],
)
def test_statistics_are_those_of_the_part_of_the_parameter(name, dtype):
    """Here Gram matrices of one gradient."""
    grads = draws(dtype=dtype)
    tx = ok.scale_by_shampoo(blocking=BLOCKINGS[name])
    found = ok.diagnostics.factors(with_grams(tx, grads, BLOCKINGS[name]), grads, tx)
    assert set(found) == set(grads)
    for path, leaf in grads.items():
        blocks = by_block(found[path], "S")
        covered = 0
        for factors in blocks.values():
            part, positions = part_of(leaf, factors, len(blocks))
            covered += part.size
            for factor in factors:
                axis = positions[factor.axis]
                rows = np.moveaxis(part.astype(complex), axis, 0).reshape(part.shape[axis], -1)
                expected = rows @ rows.conj().T
                # Sums of products in float32.
                np.testing.assert_allclose(
                    np.diagonal(factor.matrix) if factor.is_diagonal else factor.matrix,
                    np.diagonal(expected) if factor.is_diagonal else expected,
                    rtol=1e-5,
                    atol=1e-5,
                )
        assert covered == leaf.size


def test_factors_of_layers_are_those_of_their_inputs_and_outputs():
    rng = np.random.default_rng(0)
    weights = {"b": jnp.zeros(2), "k": jnp.zeros((3, 2)), "many": jnp.zeros((2, 4, 3))}
    made = [
        ok.Layer("dense", kernel="k", bias="b"),
        ok.Layer("heads", kernel="many", block_axes=(0,)),
    ]
    x, z = rng.normal(size=(7, 4)), rng.normal(size=(2, 7, 1, 4))
    x[:, -1] = 1
    g, h = rng.normal(size=(7, 2)), rng.normal(size=(1, 2, 7, 1, 3))
    taps = ok.Taps({"dense": ok.Tap(*map(jnp.asarray, (x, g))), "heads": ok.Tap(z, h)})
    tx = ok.kfac(0.1, layers=made, damping=0.1, norm_constraint=None)
    _, state = tx.update(weights, tx.init(weights), weights, taps=taps)
    found = ok.diagnostics.factors(state, weights, tx)
    assert found["k"] == found["b"]
    dense = {f.name + str(f.axis): f for f in found["k"]}
    np.testing.assert_allclose(dense["A0"].array, x.T @ x / 7, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dense["G1"].array, g.T @ g / 7, rtol=1e-5, atol=1e-6)
    assert dense["A0"].layer == "dense"
    assert (dense["A0"].axes, dense["G1"].axes) == ((0,), (1,))
    # Damped by "pi", an inverse and its factor commute.
    product = dense["inverse0"].array @ dense["A0"].array
    np.testing.assert_allclose(product, product.T, atol=1e-5)
    second = [f for f in found["many"] if f.block == 1]
    assert [(f.name, f.axes) for f in second] == [
        ("A", (1,)),
        ("inverse", (1,)),
        ("G", (2,)),
        ("inverse", (2,)),
    ]
    z = z[1, :, 0]
    np.testing.assert_allclose(second[0].array, z.T @ z / 7, rtol=1e-5, atol=1e-6)


def test_bases_of_ekfac_diagonalize_its_factors():
    tx = ok.ekfac(0.1, layers=layers(), basis="eigh")
    done = run(tx, params(), [batch()], with_taps=True)
    own = ok.diagnostics.factors(done["state"], done["params"], tx)["dense1/kernel"]
    for name, axis in (("A", 0), ("G", 1)):
        kinds = {f.name: f.array for f in own if f.axis == axis}
        assert set(kinds) == {name, "basis", "eigenvalues"}
        turned = kinds["basis"].T @ kinds[name] @ kinds["basis"]
        np.testing.assert_allclose(turned, np.diag(kinds["eigenvalues"]), atol=1e-5)


@pytest.mark.parametrize("geometry", ["EQ", "QEP", "QEQ", "Q0.5EQ1.5", "QUAD", "PRO4P", "QUAD4P"])
def test_the_preconditioner_of_kron_psgd_is_what_updates_are_made_with(geometry):
    """`P_1 G P_2`, for a matrix whose axes are in the order of the block."""
    grads = draws({"kernel": (6, 4)})
    settings = {"geometry": geometry, "momentum": None, "rms_clip": None}
    tx = ok.scale_by_kron_psgd(**settings)
    state = after_one_step(tx, grads)
    found = ok.diagnostics.factors(state, grads, tx)["kernel"]
    P = [f.matrix for f in found if f.name == "P"]
    Q = [f.matrix for f in found if f.name == "Q"]
    assert bool(Q) == (not geometry.endswith("4P"))
    if Q:
        np.testing.assert_allclose(P[0], Q[0].T @ Q[0], rtol=1e-5, atol=1e-6)
    still = ok.scale_by_kron_psgd(**settings, update_probability=0.0)
    updates, _ = still.update(grads, state)
    expected = P[0] @ np.asarray(grads["kernel"]) @ P[1]
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["soap", "kl_shampoo"])
def test_bases_of_soap_are_orthonormal(variant):
    grads = draws({"kernel": (6, 4)})
    tx = ok.soap(1e-3, variant=variant)
    found = ok.diagnostics.factors(after_one_step(tx, grads), grads, tx)["kernel"]
    bases = [factor.matrix for factor in found if factor.name == "basis"]
    assert [len(Q) for Q in bases] == [6, 4]
    for Q in bases:
        np.testing.assert_allclose(Q.T @ Q, np.eye(len(Q)), atol=1e-4)
    assert any(factor.name == "eigenvalues" for factor in found) == (variant == "kl_shampoo")


@pytest.mark.parametrize("size", [256, 257])
@pytest.mark.parametrize("is_complex", [False, True])
def test_packed_matrices_are_unpacked(size, is_complex):
    rng = np.random.default_rng(0)
    S = rng.normal(size=(2, size, size))
    if is_complex:
        S = S + 1j * rng.normal(size=S.shape)
    S = (S + S.conj().mT).astype(np.complex64 if is_complex else np.float32)
    kept = np.asarray(packed.keep_factors(jnp.asarray(S)))
    assert kept.shape != S.shape
    np.testing.assert_array_equal(unpacked(kept), S)


def test_the_spectrum_of_a_factor_is_descending():
    grads, tx = draws({"kernel": (6, 4)}), ok.scale_by_shampoo()
    state = with_grams(tx, grads, ok.Blocking())
    factor = ok.diagnostics.factors(state, grads)["kernel"][0]
    expected = np.sort(np.linalg.eigvalsh(factor.array.astype(float)))[::-1]
    # Of rank 4, of 6: two are rounding.
    np.testing.assert_allclose(factor.spectrum(), np.abs(expected), atol=1e-6 * expected[0])


def test_optimizers_without_factors_have_none():
    weights = draws()
    for tx in (ok.orthogonalize(), ok.branch_kfac(1e-3)):
        assert ok.diagnostics.factors(tx.init(weights), weights, tx) == {}


def test_defaults_need_no_transformation_and_layers_do():
    weights = draws()
    for tx in (ok.kron_psgd(1e-3), ok.soap(1e-3), ok.shampoo(1e-3)):
        state = tx.init(weights)
        alone = ok.diagnostics.factors(state, weights)
        told = ok.diagnostics.factors(state, weights, tx)
        assert told
        assert list(told) == list(alone)
        for path, own in told.items():
            for one, other in zip(own, alone[path], strict=True):
                known = [(x.name, x.axis, x.axes, x.block, x.start) for x in (one, other)]
                assert known[0] == known[1]
    state = ok.soap(1e-3, blocking=ok.Blocking(block_size=3)).init(weights)
    with pytest.raises(ValueError, match=r"default `Blocking` does not lead.*Pass tx"):
        ok.diagnostics.factors(state, weights)
    state = ok.kfac(0.1, layers=[ok.Layer("x", kernel="kernel")]).init(weights)
    with pytest.raises(ValueError, match=r"layers are in the transformation.*Pass tx"):
        ok.diagnostics.factors(state, weights)


def test_another_transformation_is_refused_in_words():
    weights = draws()
    state = ok.soap(1e-3).init(weights)
    with pytest.raises(ValueError, match=r"is not one that tx\.init makes"):
        ok.diagnostics.factors(state, weights, ok.soap(1e-3, blocking=ok.Blocking(block_size=3)))
    two = optax.chain(ok.scale_by_soap(), ok.scale_by_kron_psgd())
    with pytest.raises(ValueError, match=r"holds 1 states.*tx\.init makes 2"):
        ok.diagnostics.factors(state, weights, two)
    with pytest.raises(ValueError, match=r"tx must be the optax.GradientTransformation"):
        ok.diagnostics.factors(state, weights, "soap")
    with pytest.raises(ValueError, match="params are needed"):
        ok.diagnostics.factors(state, None, ok.soap(1e-3))
    with pytest.raises(ValueError, match="shapes alone"):
        ok.diagnostics.factors(jax.eval_shape(lambda: state), weights)


def test_parameters_that_a_mask_hides_have_none():
    weights = draws()
    mask = {name: name == "kernel" for name in weights}
    tx = optax.masked(ok.kron_psgd(1e-3), mask)
    assert set(ok.diagnostics.factors(tx.init(weights), weights, tx)) == {"kernel"}


def test_kinds_of_one_parameter_are_those_of_all_its_optimizers():
    weights = draws({"kernel": (6, 4)})
    tx = optax.chain(ok.scale_by_soap(), ok.scale_by_kron_psgd())
    found = ok.diagnostics.factors(tx.init(weights), weights, tx)["kernel"]
    assert {(f.optimizer, f.name) for f in found} == {
        ("0", "S"),
        ("0", "basis"),
        ("1", "Q"),
        ("1", "P"),
    }
