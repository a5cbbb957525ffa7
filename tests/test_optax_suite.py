"""Optax's own tests of optimizers, as they are installed with it, on those of this library.

Nothing of them is copied: the installed file is executed with another list of optimizers, whose
names it then looks up here.
"""

import ast
import inspect
import types
from pathlib import Path

import jax.numpy as jnp
import optax
import optax.contrib
import pytest

import optax_kron as ok
from optax_kron.layers.paths import by_path

from .contract.table import hand_layers

FILE = Path(optax.contrib.__file__).parent / "_common_test.py"


def natural(factory):
    """The factory of a natural gradient with layers and taps bound, as the suite knows of none.

    Every leaf is a layer. Leaves of two elements are taken for the parameters of Rosenbrock's
    function, `(1 - x)² + 100·(y - x²)²`, others for those of a squared distance, and the taps give
    the curvature of those: the columns are gradients of residuals.
    """

    def taps_of(layer, leaf):
        if leaf.shape == (2,):
            x = leaf[0].astype(jnp.float32)
            columns = 2**0.5 * jnp.array([[1.0, 0.0], [-20.0 * x, 10.0]])
            return ok.Tap(jnp.ones((1, 1)), columns[:, None, None, None])
        inputs = jnp.broadcast_to(jnp.eye(layer.d_in), (layer.blocks, layer.d_in, layer.d_in))
        columns = 2**0.5 * jnp.eye(layer.d_out)[:, None, None, None]
        columns = jnp.broadcast_to(columns, (layer.d_out, layer.blocks, layer.d_in, 1, layer.d_out))
        return ok.Tap(layer.d_in**0.5 * inputs[:, :, None], columns)

    def bound(**settings):
        def transformation(tree):
            layers = hand_layers(tree) or [ok.Layer("none", bias="none")]
            return factory(layers=layers, **settings)

        def update(updates, state, params=None, **extra_args):
            leaves = by_path(params)
            layers = [layer.resolved(leaves) for layer in hand_layers(params)]
            taps = {layer.name: taps_of(layer, leaves[layer.paths[0]]) for layer in layers}
            inner = transformation(updates)
            return inner.update(updates, state, params, taps=ok.Taps(taps), **extra_args)

        return optax.GradientTransformationExtraArgs(
            lambda params: transformation(params).init(params), update
        )

    signature = inspect.signature(factory)
    kept = [p for p in signature.parameters.values() if p.name != "layers"]
    bound.__signature__ = signature.replace(parameters=kept)
    return bound


def complete(factory):
    """The factory with a learning rate that is not optional, of which the suite tries schedules."""

    def complete(**settings):
        return factory(**settings)

    signature = inspect.signature(factory)
    parameters = dict(signature.parameters)
    rate = parameters["learning_rate"].replace(annotation=optax.ScalarOrSchedule)
    parameters["learning_rate"] = rate
    complete.__signature__ = signature.replace(parameters=list(parameters.values()))
    return complete


FACTORIES = types.SimpleNamespace(
    kron_psgd=complete(ok.kron_psgd),
    shampoo=complete(ok.shampoo),
    soap=complete(ok.soap),
    branch_kfac=complete(ok.branch_kfac),
    kfac=complete(natural(ok.kfac)),
    ekfac=complete(natural(ok.ekfac)),
)
SETTINGS = (
    # It circles the minimum of Rosenbrock's function at up to ten times the learning rate.
    ("kron_psgd", {"learning_rate": 3e-3}),
    ("shampoo", {"learning_rate": 1e-2}),
    ("soap", {"learning_rate": 1e-2}),
    ("soap", {"learning_rate": 1e-2, "variant": "kl_shampoo"}),
    ("soap", {"learning_rate": 1e-2, "variant": "kl_soap"}),
    ("branch_kfac", {"learning_rate": 1e-3}),
    ("kfac", {"learning_rate": 1e-2}),
    ("ekfac", {"learning_rate": 1e-2}),
)


def load():
    """What the installed file defines, with its lists of optimizers replaced."""
    body = ast.parse(FILE.read_text()).body
    first = next(i for i, node in enumerate(body) if isinstance(node, ast.ClassDef))
    names = {"__name__": __name__}
    for part in (body[:first], body[first:]):
        exec(compile(ast.Module(part, []), str(FILE), "exec"), names)
        for listed in ("_MAIN_OPTIMIZERS_UNDER_TEST", "_ALL_OPTIMIZERS_UNDER_TEST", "contrib"):
            assert listed in names, f"{FILE} has changed: it no longer has {listed}."
        optimizers = tuple(
            {"opt_name": name, "opt_kwargs": kwargs, "wrapper_name": None, "wrapper_kwargs": None}
            for name, kwargs in SETTINGS
        )
        names |= {"_MAIN_OPTIMIZERS_UNDER_TEST": optimizers, "contrib": FACTORIES}
        names["_ALL_OPTIMIZERS_UNDER_TEST"] = optimizers
    return names


if FILE.exists():
    OptaxSuite = load()["ContribTest"]
else:

    def test_optax_suite():
        pytest.skip(f"This release of Optax has no {FILE.name} in its wheel.")
