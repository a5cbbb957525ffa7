"""What the pages on migration say of other optimizers: arguments, defaults and updates."""

import ast
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_kron as ok

FOLDER = Path(__file__).parent.parent / "docs" / "migrating"
TARGETS = {
    "index": ok.soap,
    "muon": ok.orthogonalize,
    "psgd_jax": ok.kron_psgd,
    "soap_jax": ok.soap,
    "distributed_shampoo": ok.shampoo,
}
ROW = re.compile(r"^\| `(\w+)` \|(.*?)\|(.*?)\|", re.MULTILINE)
CALL = re.compile(r"(ok|optax)\.(\w+)\((.*)\)")


def rows(page):
    """Argument, default and what takes its place, of every row of a table."""
    found = ROW.findall((FOLDER / f"{page}.md").read_text())
    return [tuple(cell.strip() for cell in row) for row in found]


def spans(page):
    return [x for row in rows(page) for x in re.findall(r"`([^`]+)`", row[2])]


@pytest.mark.parametrize(
    ("page", "function"), [("index", optax.adamw), ("muon", optax.contrib.muon)]
)
def test_every_argument_of_optax_is_there_with_its_default(page, function):
    written = {name: default.strip("`") for name, default, _ in rows(page)}
    parameters = inspect.signature(function).parameters
    assert list(written) == list(parameters)
    for name, parameter in parameters.items():
        has_default = parameter.default is not inspect.Parameter.empty
        assert written[name] == (repr(parameter.default) if has_default else ""), name


@pytest.mark.parametrize("page", TARGETS)
def test_what_takes_the_place_of_an_argument_exists(page):
    known = inspect.signature(TARGETS[page]).parameters
    for span in spans(page):
        if argument := re.match(r"\w+(?==|$)", span):
            assert argument[0] in known, span
        for library, name, arguments in CALL.findall(span):
            function = getattr({"ok": ok, "optax": optax}[library], name)
            keywords = [x.arg for x in ast.parse(f"f({arguments})").body[0].value.keywords]
            assert set(keywords) <= set(inspect.signature(function).parameters), span


def run(tx, params, gradients):
    """The updates of every step."""
    update, state, made = jax.jit(tx.update), tx.init(params), []
    for g in gradients:
        updates, state = update(g, state, params)
        made.append(updates)
    return made


def off(ours, theirs):
    """The norm of the difference in that of the other."""
    return {k: float(np.linalg.norm(ours[k] - x) / np.linalg.norm(x)) for k, x in theirs.items()}


PARAMS = {"wide": jnp.ones((6, 10)), "tall": jnp.ones((12, 5)), "bias": jnp.ones(10)}


def draw(params, steps, scale=1.0, mix=False):
    """Gradients of independent normal elements, or with correlated rows and columns."""
    rng = np.random.default_rng(0)
    mixers = {k: [rng.normal(size=(d, d)) for d in p.shape] for k, p in params.items()}
    for _ in range(steps):
        made = {k: scale * rng.normal(size=p.shape) for k, p in params.items()}
        if mix:
            for k, matrices in mixers.items():
                for axis, A in enumerate(matrices):
                    made[k] = np.moveaxis(np.tensordot(A, made[k], (1, axis)), 0, axis)
        yield {k: jnp.asarray(x, params[k].dtype) for k, x in made.items()}


def muon(nesterov, scale):
    return optax.chain(
        ok.orthogonalize(
            momentum=0.95,
            nesterov=nesterov,
            scale=scale,
            fallback=optax.scale_by_adam(nesterov=nesterov),
        ),
        optax.add_decayed_weights(
            0.01, mask=lambda params: jax.tree.map(lambda p: p.ndim == 2, params)
        ),
        optax.scale_by_learning_rate(0.02),
    )


@pytest.mark.parametrize(("scale", "rms"), [("spectral", None), ("consistent_rms", 0.2)])
def test_muon_has_the_updates_of_optax(scale, rms):
    gradients = list(draw(PARAMS, 12))
    theirs = optax.contrib.muon(0.02, weight_decay=0.01, nesterov=False, consistent_rms=rms)
    ours = run(muon(False, scale), PARAMS, gradients)
    pairs = zip(ours, run(theirs, PARAMS, gradients), strict=True)
    # Five iterations of degree five in float32, in another order of products.
    assert max(max(off(*pair).values()) for pair in pairs) < 1e-5


def test_with_nesterov_the_difference_fades():
    gradients = list(draw(PARAMS, 40))
    theirs = run(optax.contrib.muon(0.02, weight_decay=0.01), PARAMS, gradients)
    ours = run(muon(True, "spectral"), PARAMS, gradients)
    apart = [off(*pair) for pair in zip(ours, theirs, strict=True)]
    assert max(apart[0].values()) < 1e-5
    assert max(x["bias"] for x in apart) < 1e-5
    assert 0.03 < apart[1]["wide"] < 0.2
    assert max(apart[-1].values()) < 0.01


def test_kernels_of_more_axes_are_left_to_adam():
    def stacked(path, shape):
        del path
        return len(shape) - 1 if len(shape) > 2 else 0

    params = {"conv": jnp.ones((3, 3, 4, 5)), "dense": jnp.ones((4, 5))}
    tx = ok.orthogonalize(
        fallback=optax.scale_by_adam(), blocking=ok.Blocking(stacked_axes=stacked)
    )
    (gradient,) = draw(params, 1)
    (made,) = run(tx, params, [gradient])
    (adam,) = run(optax.scale_by_adam(), params, [gradient])
    np.testing.assert_allclose(made["conv"], adam["conv"], rtol=1e-5)
    assert np.linalg.svd(made["dense"], compute_uv=False).min() > 0.3


class DistributedShampoo:
    """One matrix, as the peer has it: grafted to the gradient's norm, momentum of the outcome."""

    def __init__(self, shape, beta1=0.9, beta2=0.999, epsilon=1e-6):
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        self.statistics = [epsilon * np.eye(d) for d in shape]
        self.momentum = np.zeros(shape)

    def root(self, S):
        values, basis = np.linalg.eigh(S)
        return (basis * (values + self.epsilon * values.max()) ** -0.25) @ basis.T

    def step(self, G):
        b = self.beta2
        self.statistics = [
            b * S + (1 - b) * C for S, C in zip(self.statistics, (G @ G.T, G.T @ G), strict=True)
        ]
        left, right = map(self.root, self.statistics)
        made = left @ G @ right
        made *= np.linalg.norm(G) / np.linalg.norm(made)
        self.momentum = self.beta1 * self.momentum + made
        return made + self.beta1 * self.momentum


def test_shampoo_with_momentum_behind_it_is_the_distributed_one():
    params = {"kernel": jnp.ones((6, 4))}
    tx = optax.chain(
        ok.scale_by_shampoo(
            momentum=None,
            decay=0.999,
            bias_correction=False,
            refresh_every=1,
            grafting="sgd",
            outlier_clip=None,
        ),
        optax.trace(0.9, nesterov=True),
    )
    # Large ones, beside which the first statistics do not count.
    gradients = list(draw(params, 12, scale=1e3))
    reference = DistributedShampoo((6, 4))
    for ours, g in zip(run(tx, params, gradients), gradients, strict=True):
        theirs = {"kernel": reference.step(np.asarray(g["kernel"], np.float64))}
        assert off(ours, theirs)["kernel"] < 1e-4  # float32, and roots right to 1e-5


class SoapJax:
    """One matrix, as the peer has it: no update at the first gradient, which sets the bases."""

    def __init__(self, beta=0.95):
        self.beta, self.steps = beta, 0
        self.m = self.v = self.bases = None

    def average(self, old, new):
        return self.beta * old + (1 - self.beta) * new

    def step(self, G):
        moments = G @ G.T, G.T @ G
        if self.bases is None:
            self.statistics = [(1 - self.beta) * C for C in moments]
            self.bases = [np.linalg.eigh(S)[1][:, ::-1] for S in self.statistics]
            self.m = self.v = np.zeros_like(G)
            return self.m
        self.steps += 1
        left, right = self.bases
        self.m = self.average(self.m, G)
        self.v = self.average(self.v, (left.T @ G @ right) ** 2)
        weight = 1 - self.beta**self.steps
        made = left.T @ self.m @ right / weight / np.sqrt(self.v / weight)
        self.statistics = [
            self.average(S, C) for S, C in zip(self.statistics, moments, strict=True)
        ]
        for axis, (Q, S) in enumerate(zip(self.bases, self.statistics, strict=True)):
            order = np.argsort(-np.diag(Q.T @ S @ Q), kind="stable")
            self.v = np.take(self.v, order, axis)
            self.bases[axis] = np.linalg.qr(S @ Q[:, order])[0]
        return left @ made @ right.T


def test_soap_is_that_of_soap_jax_but_for_the_first_steps():
    params = {"kernel": jnp.ones((8, 5))}
    tx = ok.scale_by_soap(basis="qr", refresh_every=1, outlier_clip=None)
    gradients, reference, apart = list(draw(params, 200, mix=True)), SoapJax(), []
    for ours, g in zip(run(tx, params, gradients), gradients, strict=True):
        theirs = {"kernel": reference.step(np.asarray(g["kernel"], np.float64))}
        apart.append(off(ours, theirs)["kernel"] if reference.steps else np.inf)
    assert apart[10] > 0.1
    assert apart[-1] < 1e-3  # 0.95²⁰⁰ is 4e-5
