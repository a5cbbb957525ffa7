"""The structure of a state is decided by what is on, never by a value; numbers may be NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_kron as ok

from .table import avals, core_rows, random_like, regression, updater


@core_rows
@pytest.mark.parametrize("name", ["momentum", "weight_decay"])
def test_zero_is_a_value_and_none_switches_off(row, name):
    problem = regression()
    settings = row.all_settings(problem)
    if name == "momentum" and row.factory is ok.branch_kfac:
        return

    def init(**changed):
        return row.factory(0.01, **{**settings, **changed}).init(problem.params)

    def inits(value):
        return init(**{name: value})

    on = jax.eval_shape(lambda: inits(0.1))
    assert avals(jax.eval_shape(lambda: inits(0.0))) == avals(on)
    assert avals(jax.eval_shape(inits, 0.0)) == avals(on)
    off = jax.eval_shape(lambda: inits(None))
    if name == "momentum":
        assert len(jax.tree.leaves(off)) < len(jax.tree.leaves(on))
    else:
        assert len(off) == len(on) - 1


@core_rows
def test_no_momentum_updates_like_a_momentum_of_zero(row):
    if row.factory is ok.branch_kfac:
        return
    problem = regression()
    results = []
    for momentum in (None, 0.0):
        tx = row.make(problem, momentum=momentum, momentum_dtype=jnp.bfloat16)
        state = tx.init(problem.params)
        for i in range(2):
            grads = random_like(problem.params, i)
            updates, state = updater(row, tx, problem)(grads, state, problem.params)
        results.append(updates)
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


@core_rows
def test_weight_decay_needs_parameters_unless_it_is_known_to_be_zero(row):
    problem = regression()
    extras = row.make_extras(problem, problem.params)
    settings = row.all_settings(problem)

    def update(decay):
        tx = row.factory(0.01, **settings, weight_decay=decay)
        state = jax.eval_shape(tx.init, problem.params)
        return jax.eval_shape(lambda g, s: tx.update(g, s, **extras)[0], problem.params, state)

    for zero in (0.0, 0, np.float32(0), None):
        assert avals(update(zero)) == avals(problem.params)
    for decay in (0.1, jnp.zeros([])):
        with pytest.raises(ValueError, match=r"weight_decay needs the parameters"):
            update(decay)


def test_numbers_of_numpy_are_taken():
    four, yes = np.int64(4), np.bool_(True)
    blocking = ok.Blocking(
        max_size=np.int32(8), block_size=four, merge_below=four, stacked_axes=np.int8(0)
    )
    assert blocking == ok.Blocking(max_size=8, block_size=4, merge_below=4, stacked_axes=0)
    assert ok.Blocking(max_skew=np.float32(2)).max_skew == 2
    params = {"w": jnp.ones((3, 2))}
    layers = [ok.Layer("w", kernel="w")]
    for tx in (
        ok.shampoo(
            np.float32(0.1), root_order=four, refresh_every=four, stagger=yes, blocking=blocking
        ),
        ok.shampoo(0.1, root_order=np.array(4), bias_correction=yes, root_method=np.str_("eigh")),
        ok.soap(0.1, refresh_every=four, variant=np.str_("kl_soap")),
        ok.kron_psgd(
            0.1,
            geometry=np.str_("QEQ"),
            seed=np.int64(-3),
            cache_preconditioner=yes,
            rms_clip=np.float64(1),
        ),
        ok.kfac(0.1, layers=layers, factor_every=np.int64(1), refresh_every=four),
        ok.branch_kfac(0.1, blocks=np.int32(2), redraw=yes, seed=np.uint8(1)),
    ):
        state = jax.eval_shape(tx.init, params)
        taps = ok.Taps({"w": ok.Tap(jnp.ones((5, 3)), jnp.ones((5, 2)))})
        jax.eval_shape(lambda s, tx=tx, taps=taps: tx.update(params, s, params, taps=taps), state)
    seeds = (ok.kron_psgd(seed=seed).init(params)[0].key for seed in (-3, np.int64(-3)))
    assert np.array_equal(*seeds)


@pytest.mark.parametrize("value", [True, np.bool_(True), 1.5, np.float32(4), "4", 0])
def test_root_order_that_is_no_whole_number(value):
    with pytest.raises(ValueError, match="root_order must be an int ≥ 1"):
        ok.shampoo(root_order=value)


@jax.tree_util.register_pytree_node_class
class Model:
    """A callable pytree, as models of some libraries are."""

    def __init__(self, w):
        self.w = w

    def __call__(self, x):
        return x @ self.w

    def tree_flatten(self):
        return (self.w,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_a_tree_of_stacked_axes_may_be_callable():
    tx = ok.kron_psgd(0.1, blocking=ok.Blocking(stacked_axes=Model(np.int64(1))))
    state = jax.eval_shape(tx.init, Model(jnp.ones((5, 3, 2))))
    assert {x.initialized.shape for x in state[0].stacks.values()} == {(5,)}


@pytest.mark.parametrize(
    "stacked",
    [lambda path: 0, lambda path, shape: path.ndim, lambda path, shape: None, Model("x")],
)
def test_stacked_axes_that_cannot_be_used_are_named(stacked):
    tx = ok.kron_psgd(0.1, blocking=ok.Blocking(stacked_axes=stacked))
    with pytest.raises(ValueError, match="Blocking: stacked_axes"):
        tx.init(Model(jnp.ones((3, 2))))


@pytest.mark.parametrize("factory", [ok.kfac, ok.ekfac])
def test_mask_and_decay_of_natural_gradients_are_checked(factory):
    layers = [ok.Layer("w", kernel="w")]
    with pytest.raises(ValueError, match="mask must be a tree of bools"):
        factory(0.1, layers=layers, mask=True)
    for decay in (95, -0.1):
        with pytest.raises(ValueError, match=r"decay must be a number in \[0, 1\]"):
            factory(0.1, layers=layers, decay=decay)
    with pytest.raises(ValueError, match="mask must be a tree"):
        optax.inject_hyperparams(factory)(0.1, layers=layers, mask=lambda p: p).init(jnp.ones(2))
