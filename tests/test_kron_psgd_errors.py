"""Bad settings and inputs of `kron_psgd` raise errors that say what came and what was expected."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_kron as ok

BAD_SETTINGS = [
    ("momentum", -0.1),
    ("momentum", 1.0),
    ("momentum", float("nan")),
    ("momentum", "0.9"),
    ("momentum", 0.9j),
    ("momentum", np.array([0.9, 0.9])),
    ("precond_lr", -0.1),
    ("precond_lr", 0.0),
    ("precond_lr", 1.5),
    ("geometry", "EQQ"),
    ("geometry", "eq"),
    ("geometry", None),
    ("geometry", 3),
    ("criterion", "whiten"),
    ("criterion", None),
    ("update_probability", -0.1),
    ("update_probability", 1.5),
    ("update_probability", "often"),
    ("damping", -1e-9),
    ("damping", float("inf")),
    ("damping", None),
    ("init_scale", -1.0),
    ("init_scale", 0.0),
    ("rms_clip", -1.1),
    ("rms_clip", 0.0),
    ("max_abs_clip", -1.0),
    ("max_abs_clip", 0.0),
    ("blocking", 128),
    ("blocking", None),
    ("factor_dtype", "int32"),
    ("factor_dtype", "complex64"),
    ("factor_dtype", "foo"),
    ("momentum_dtype", "int8"),
    ("momentum_dtype", "foo"),
    ("precision", "rough"),
    ("cache_preconditioner", "auto"),
    ("cache_preconditioner", 1),
    ("seed", "zero"),
    ("seed", 0.5),
]
BAD_BLOCKING = [
    ("max_size", -1),
    ("max_size", 2.5),
    ("max_size", None),
    ("max_size", True),
    ("max_skew", -1.0),
    ("max_skew", float("nan")),
    ("max_skew", "wide"),
    ("block_size", 0),
    ("block_size", -4),
    ("block_size", 2.5),
    ("merge_below", 0),
    ("merge_below", -4),
    ("merge_below", 2.5),
    ("stacked_axes", -1),
]
PARAMS = {"bias": jnp.zeros(3), "kernel": jnp.zeros((2, 3))}


def _ids(cases):
    return [f"{name}={value!r}" for name, value in cases]


@pytest.mark.parametrize("factory", [ok.kron_psgd, ok.scale_by_kron_psgd])
@pytest.mark.parametrize(("name", "value"), BAD_SETTINGS, ids=_ids(BAD_SETTINGS))
def test_bad_setting_is_named_before_anything_is_computed(factory, name, value):
    def use(params):
        tx = factory(**{name: value})
        return tx.update(params, tx.init(params), params)

    with pytest.raises(ValueError, match=_named(name, value)):
        jax.eval_shape(use, PARAMS)


@pytest.mark.parametrize(
    ("name", "value"), [("momentum", -0.1), ("geometry", "x"), ("damping", -1)]
)
def test_bad_setting_is_named_at_construction(name, value):
    with pytest.raises(ValueError, match=_named(name, value)):
        ok.kron_psgd(**{name: value})


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf"), "0.1"])
def test_bad_rate_is_named_at_construction(name, value):
    with pytest.raises(ValueError, match=_named(name, value)):
        ok.kron_psgd(**{name: value})


@pytest.mark.parametrize(("name", "value"), BAD_BLOCKING, ids=_ids(BAD_BLOCKING))
def test_bad_blocking_is_named_before_anything_is_computed(name, value):
    with pytest.raises(ValueError, match=_named(name, value)):
        ok.kron_psgd(blocking=ok.Blocking(**{name: value})).init(PARAMS)


def _named(name, value):
    """The message names the argument and then shows the value."""
    return rf"(?si)\b{name}\b.*({re.escape(str(value))}|{re.escape(repr(value))})"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"momentum": -0.1}, r"\[0, 1\)"),
        ({"update_probability": 2.0}, r"\[0, 1\]"),
        ({"geometry": "x"}, r"EQ.*QEP.*QEQ.*Q0\.5EQ1\.5.*QUAD.*PRO4P.*QUAD4P"),
        ({"criterion": "x"}, "whiten_momentum.*whiten_gradient.*newton"),
        ({"blocking": 3}, "Blocking"),
        ({"factor_dtype": "int8"}, "floating"),
    ],
)
def test_message_says_what_was_expected(settings, expected):
    with pytest.raises(ValueError, match=expected):
        ok.kron_psgd(1e-3, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": None, "rms_clip": None, "max_abs_clip": None, "init_scale": None},
        {"momentum": 0.0, "damping": 0.0, "update_probability": 0.0, "weight_decay": 0.0},
        {"momentum": np.float32(0.9), "precond_lr": jnp.array(0.5), "update_probability": 1},
        {"update_probability": optax.constant_schedule(0.5), "learning_rate": 0},
        {"factor_dtype": jnp.bfloat16, "momentum_dtype": "bfloat16", "precision": "highest"},
        {"blocking": ok.Blocking(max_size=0, max_skew=0, block_size=1, merge_below=1)},
        {"seed": jax.random.key(3)},
        {"seed": np.int32(3)},
    ],
)
def test_edges_of_the_ranges_are_taken(settings):
    tx = ok.kron_psgd(**settings)
    updates, _ = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), PARAMS)
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)


def test_misspelt_setting_is_refused():
    with pytest.raises(TypeError, match="momentun"):
        ok.kron_psgd(1e-3, momentun=0.9)


def test_settings_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        ok.kron_psgd(1e-3, 0.9)


def test_float64_factors_need_64_bit_types():
    with pytest.raises(ValueError, match=r"factor_dtype=float64.*jax_enable_x64"):
        ok.kron_psgd(factor_dtype="float64")


def test_newton_without_hvp_fn():
    tx = ok.kron_psgd(1e-3, criterion="newton")
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"newton.*hvp_fn.*hessian_vector_product"):
        tx.update(PARAMS, state, PARAMS)
    with pytest.raises(ValueError, match="hvp_fn"):
        jax.eval_shape(tx.update, PARAMS, state, PARAMS)


def test_hvp_fn_that_is_no_function():
    tx = ok.kron_psgd(1e-3, criterion="newton")
    with pytest.raises(ValueError, match="hvp_fn must be a function; got dict"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, hvp_fn=PARAMS)


@pytest.mark.parametrize(
    "hvp_fn",
    [
        lambda v: v["kernel"],
        lambda v: {"bias": v["kernel"], "kernel": v["bias"]},
        lambda v: {**v, "more": jnp.zeros(())},
    ],
    ids=["one leaf", "wrong shapes", "one leaf too many"],
)
def test_hvp_fn_with_a_result_unlike_its_argument(hvp_fn):
    tx = ok.kron_psgd(1e-3, criterion="newton")
    with pytest.raises(ValueError, match=r"(?s)hvp_fn.*expected"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, hvp_fn=hvp_fn)


MISMATCHES = [
    pytest.param({"bias": jnp.zeros(3)}, "kernel", id="missing"),
    pytest.param({**PARAMS, "extra": jnp.zeros(5)}, "extra", id="extra"),
    pytest.param({"bias": jnp.zeros(3), "weight": jnp.zeros((2, 3))}, "weight", id="renamed"),
    pytest.param({**PARAMS, "bias": jnp.zeros(4)}, "bias", id="vector"),
    pytest.param({**PARAMS, "kernel": jnp.zeros((3, 3))}, "kernel", id="matrix"),
    pytest.param({**PARAMS, "kernel": jnp.zeros((3, 2))}, "kernel", id="transposed"),
    pytest.param({**PARAMS, "bias": None}, "bias", id="none"),
    pytest.param({}, "bias", id="nothing"),
]


@pytest.mark.parametrize(("grads", "path"), MISMATCHES)
def test_gradients_that_do_not_match_the_parameters(grads, path):
    tx = ok.kron_psgd(1e-3)
    with pytest.raises(ValueError, match=rf"(?s)gradients.*\b{path}\b"):
        tx.update(grads, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize(
    ("grads", "path"), [p for p in MISMATCHES if p.id not in ("renamed", "transposed")]
)
def test_gradients_that_do_not_match_the_state(grads, path, momentum):
    del path  # The state knows blocks, not names.
    tx = ok.kron_psgd(1e-3, momentum=momentum)
    with pytest.raises(ValueError, match=r"(?s)gradients do not match the state.*3x2.*init"):
        tx.update(grads, tx.init(PARAMS))


def test_state_of_another_blocking():
    state = ok.kron_psgd(1e-3, blocking=ok.Blocking(block_size=2)).init(PARAMS)
    with pytest.raises(ValueError, match=r"do not match the state.*init"):
        ok.kron_psgd(1e-3).update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_parameters_that_are_not_floating_point(dtype):
    with pytest.raises(ValueError, match=rf"(?s)kernel.*{dtype}"):
        ok.kron_psgd(1e-3).init({"kernel": jnp.zeros((2, 3), dtype)})


@pytest.mark.parametrize(
    ("stacked_axes", "expected"),
    [({"bias": 0}, "structure"), ({"bias": 0, "kernel": -1}, "kernel"), (lambda *_: -1, "bias")],
    ids=["structure", "negative", "function"],
)
def test_stacked_axes_that_do_not_fit_the_parameters(stacked_axes, expected):
    tx = ok.kron_psgd(1e-3, blocking=ok.Blocking(stacked_axes=stacked_axes))
    with pytest.raises(ValueError, match=rf"(?s)stacked_axes.*{expected}"):
        tx.init(PARAMS)


def test_stacked_axes_of_the_wrong_arity():
    tx = ok.kron_psgd(1e-3, blocking=ok.Blocking(stacked_axes=lambda path: 1))
    with pytest.raises(ValueError, match=r"stacked_axes\(\"\['bias'\]\", \(3,\)\).*path and shape"):
        tx.init(PARAMS)


@pytest.mark.parametrize("mask", [True, np.False_, jnp.array(True)], ids=repr)
def test_mask_that_is_no_tree(mask):
    with pytest.raises(ValueError, match=r"mask must be a tree of bools or a function.*got"):
        ok.kron_psgd(1e-3, weight_decay=0.5, mask=mask)


@pytest.mark.parametrize("jit", [False, True])
def test_mask_that_optax_takes_for_a_schedule(jit):
    def mask(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    settings = {"learning_rate": 0.1, "weight_decay": 0.5, "mask": mask}
    tx = optax.inject_hyperparams(ok.kron_psgd)(**settings)
    with pytest.raises(ValueError, match=r'mask.*inject_hyperparams.*static_args=\("mask",\)'):
        (jax.jit(tx.init) if jit else tx.init)(PARAMS)
    tx = optax.inject_hyperparams(ok.kron_psgd, static_args=("mask",))(**settings)
    params = jax.tree.map(jnp.ones_like, PARAMS)
    updates, _ = tx.update(PARAMS, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)


def test_weight_decay_without_parameters():
    tx = ok.kron_psgd(1e-3, weight_decay=0.1)
    with pytest.raises(ValueError, match="params"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_direction_that_the_parameters_lack():
    hvp_fn = ok.hessian_vector_product(lambda p: jnp.sum(p["bias"] ** 2), PARAMS)
    with pytest.raises(ValueError, match=r"params.*kernels"):
        hvp_fn({"bias": jnp.zeros(3), "kernels": jnp.zeros((2, 3))})


@pytest.mark.parametrize(
    ("name", "value"), [("highest", 1.5), ("lowest", -0.1), ("decay", -1.0), ("flat_steps", -1)]
)
def test_bad_schedule_of_moves(name, value):
    with pytest.raises(ValueError, match=_named(name, value)):
        ok.update_probability_schedule(**{name: value})
