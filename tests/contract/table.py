"""The one table of optimizers, and the small problems that the contract is checked on.

A new optimizer joins the contract by a `Row` in `ROWS`. Every row goes through convergence and the
faults of a gradient. Rows marked `core` also go through everything else (dtypes, tracing, Optax's
wrappers, serialization, every kind of tree), where each check compiles programs of its own, and
stand for the others there: each kind of state and of extra argument needs one core row.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_kron as ok

from .adagrad import adagrad, scale_by_adagrad
from .muon import muon

# ---------------------------------------------------------------------------------------- problems


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A loss of parameters and data, and, where it is an optimization target, its solution."""

    params: Any
    loss_fn: Callable[..., jax.Array]
    args: tuple = ()
    solution: Any = None

    def loss(self, params):
        return self.loss_fn(params, *self.args)


def _abs_sq(x):
    return jnp.real(x * jnp.conj(x))


def _square(p, target):
    """Squared distance of a leaf; marked with its distribution, where the leaf is real.

    The leaf is then a bias, of two data that are alike, so that a capture of layers finds it.
    """
    if jnp.iscomplexobj(p) or not p.size:
        return jnp.sum(_abs_sq(p - target))
    targets = jnp.stack([target, target])
    return 0.5 * jnp.sum(ok.losses.squared_error(jnp.zeros_like(targets) + p[None], targets))


def _squared_distance(solution, scales=None):
    def loss_fn(params):
        terms = jax.tree.map(_square, params, solution)
        weights = jax.tree.map(lambda _: 1.0, solution) if scales is None else scales
        return sum(jax.tree.leaves(jax.tree.map(jnp.multiply, weights, terms)))

    return loss_fn


def parabola():
    solution = jnp.array([1.0, -1.0, 1.0])
    return Problem(jnp.array([-1.0, 2.0, 1.5]), _squared_distance(solution), solution=solution)


def rosenbrock():
    def loss_fn(x):
        return jnp.square(1.0 - x[0]) + 100.0 * jnp.square(x[1] - jnp.square(x[0]))

    return Problem(jnp.zeros(2), loss_fn, solution=jnp.ones(2))


def least_squares():
    """A X = B for a 6×4 matrix A whose squared singular values span two decades."""
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.normal(size=(6, 4)))
    right, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    A = jnp.asarray((left * np.array([2.0, 1.0, 0.5, 0.2])) @ right.T, jnp.float32)
    solution = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)

    def loss_fn(X, A, B):
        return jnp.sum(ok.losses.l2_loss(A @ X, B))

    args = (A, A @ solution)
    return Problem(jnp.zeros((4, 3)), loss_fn, args, solution=solution)


def mixed():
    """A scalar, a vector, a matrix, a 3-D and a 4-D tensor, with unlike scales of the loss."""
    shapes = {
        "cube": (2, 3, 2),
        "kernel": (2, 1, 2, 3),
        "matrix": (3, 4),
        "scalar": (),
        "vector": (4,),
    }
    scales = {"cube": 3.0, "kernel": 0.1, "matrix": 1.0, "scalar": 0.5, "vector": 10.0}
    rng = np.random.default_rng(1)
    solution = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    params = jax.tree.map(jnp.zeros_like, solution)
    return Problem(params, _squared_distance(solution, scales), solution=solution)


def complex_parabola():
    solution = {"matrix": jnp.array([[1 + 1j, -1j], [0.5 + 0j, -1 + 0.5j], [1j, 2 + 0j]])}
    params = jax.tree.map(jnp.zeros_like, solution)
    return Problem(params, _squared_distance(solution), solution=solution)


def regression(d_in=3, d_out=2):
    """A dense layer, small if not told: the workhorse of the tests that are not about speed."""
    rng = np.random.default_rng(2)
    shapes = (5, d_in), (5, d_out), (d_in, d_out)
    x, y, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)

    def loss_fn(params, x, y):
        out = x @ params["kernel"] + params["bias"][None]
        return jnp.mean(jnp.sum(ok.losses.squared_error(out, y), axis=-1))

    bias = jnp.resize(jnp.array([0.5, -0.5], jnp.float32), d_out)
    return Problem({"kernel": kernel, "bias": bias}, loss_fn, (x, y))


def perceptron():
    """A tanh network of three layers, 4-4-4-4, on eight examples."""
    rng = np.random.default_rng(3)
    sizes = (4, 4, 4, 4)
    x = jnp.asarray(rng.normal(size=(8, sizes[0])), jnp.float32)
    y = jnp.asarray(rng.normal(size=(8, sizes[-1])), jnp.float32)

    def loss_fn(params, x, y):
        for name in sorted(params):
            x = jnp.tanh(x) @ params[name]["kernel"] + params[name]["bias"][None]
        return jnp.mean(jnp.sum(ok.losses.squared_error(x, y), axis=-1))

    params = {
        f"layer{i}": {
            "kernel": jnp.asarray(rng.normal(size=(d, e)) / np.sqrt(d), jnp.float32),
            "bias": jnp.zeros(e),
        }
        for i, (d, e) in enumerate(itertools.pairwise(sizes))
    }
    return Problem(params, loss_fn, (x, y))


def norms(params):
    """Half the squared norm of any tree: its gradient is the parameters themselves."""

    def loss_fn(params):
        leaves = jax.tree.leaves(params)
        terms = [_square(p, jnp.zeros_like(p)).astype(jnp.float32) for p in leaves]
        return 0.5 * sum(terms, jnp.zeros((), jnp.float32))

    return Problem(params, loss_fn)


def together(problems):
    """The sum of the losses of several problems, each of parameters of its own: a dict of them."""

    def loss_fn(params):
        return sum(problem.loss(params[name]) for name, problem in problems.items())

    return Problem({name: problem.params for name, problem in problems.items()}, loss_fn)


TARGETS = {f.__name__: f for f in (parabola, rosenbrock, least_squares, mixed, complex_parabola)}

# ------------------------------------------------------------------------------------------ rows


def _no_extras(loss_fn, params, *args):
    return {}


def _hvp(loss_fn, params, *args):
    return {"hvp_fn": ok.hessian_vector_product(loss_fn, params, *args)}


def _hvp_not_finite(loss_fn, params, *args):
    hvp = ok.hessian_vector_product(loss_fn, params, *args)
    return {"hvp_fn": lambda v: jax.tree.map(lambda x: x * jnp.nan, hvp(v))}


def _captured_layers(problem):
    args = problem.params, *problem.args
    return {"layers": ok.find_layers(problem.loss_fn, *args, check=False)}


def _captured_taps(loss_fn, params, *args):
    layers = ok.find_layers(loss_fn, params, *args, check=False)
    if not layers:
        return {"taps": ok.Taps({})}
    fn = ok.value_and_grad_with_taps(loss_fn, layers, fisher="exact")
    return {"taps": fn(params, *args)[-1]}


def _paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def hand_layers(params):
    """A layer for every kernel with its bias, and for every other real leaf with elements."""
    leaves, layers = _paths(params), []
    for path, leaf in leaves.items():
        parent, slash, name = path.rpartition("/")
        kernel, bias = (f"{parent}{slash}{name}" for name in ("kernel", "bias"))
        if jnp.iscomplexobj(leaf) or not leaf.size or (name == "bias" and kernel in leaves):
            continue
        if leaf.ndim < 2:
            layers.append(ok.Layer(path, bias=path))
        else:
            blocks = (0,) if leaf.ndim > 2 else ()
            beside = bias if bias in leaves and name == "kernel" else None
            layers.append(ok.Layer(path, kernel=path, bias=beside, block_axes=blocks))
    return layers


def _hand_taps(loss_fn, params, *args, size=5.0):
    """Random data that move with the parameters; their gradients have the loss's scale.

    They are larger than those of the loss, of whose directions they know nothing, to be safe.
    """
    ones = jax.tree.map(jnp.ones_like, params)
    curved = jax.tree.leaves(ok.hessian_vector_product(loss_fn, params, *args)(ones))
    count = max(sum(x.size for x in curved), 1)
    curvature = sum(jnp.sum(jnp.abs(x)).astype(jnp.float32) for x in curved) / count
    leaves, taps = _paths(params), {}
    for layer in hand_layers(params):
        layer = layer.resolved(leaves)
        rng = np.random.default_rng([layer.blocks, layer.d_in, layer.d_out])
        inputs, grads = (
            jnp.asarray(rng.normal(size=(layer.blocks, 8, 1, d)), jnp.float32)
            for d in (layer.d_in, layer.d_out)
        )
        moved = jnp.sin(jnp.sum(jnp.real(leaves[layer.paths[0]])).astype(jnp.float32))
        inputs = inputs * (1 + 0.5 * moved)
        if layer.bias is not None:
            inputs = inputs.at[..., -1].set(1)
        taps[layer.name] = ok.Tap(inputs, size * jnp.sqrt(curvature) * grads[None])
    return {"taps": ok.Taps(taps)}


def _spoilt_hand_taps(loss_fn, params, *args):
    """Finite taps, whose squares are not."""
    return _hand_taps(loss_fn, params, *args, size=1e30)


def _branches(loss_fn, params, *args):
    return {"branches": jnp.asarray(np.random.default_rng(8).normal(size=(16, 8)), jnp.float32)}


class Target(NamedTuple):
    """How fast, how long and how close an optimizer is to approach the solution of a target."""

    learning_rate: float
    steps: int
    atol: float


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One optimizer in one setting."""

    name: str
    # The alias: with learning_rate a complete optimizer; without it, the bare preconditioner.
    factory: Callable[..., optax.GradientTransformationExtraArgs]
    # The mathematics alone.
    scale_by: Callable[..., optax.GradientTransformationExtraArgs]
    # The targets of the convergence test that it must reach.
    targets: Mapping[str, Target]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Settings that depend on the problem, such as the layers of a loss.
    settings_for: Callable[[Problem], Mapping[str, Any]] = lambda problem: {}
    # Extra arguments of update, from (loss_fn, params, *args); and the same, spoilt, so that a
    # refresh of the factors would not be finite (None: only the gradients reach the factors).
    extras: Callable[..., dict[str, Any]] = _no_extras
    spoilt_extras: Callable[..., dict[str, Any]] | None = None
    # Fields of the state that hold the curvature, which a failed refresh leaves as they are.
    curvature: tuple[str, ...] = ("stacks",)
    # Numeric settings that may be traced, and changed between two updates, each with another value
    # that must tell in the updates; and the value that switches on those that are off by default.
    tunable: Mapping[str, float] = dataclasses.field(default_factory=dict)
    switched_on: Mapping[str, float] = dataclasses.field(default_factory=dict)
    supports_complex: bool = True
    # Draws random numbers that reach the updates.
    random: bool = True
    # The update of a parameter depends on the gradients of others, and on the scale of the loss.
    mixes: bool = False
    core: bool = False

    def __str__(self):
        return self.name

    def all_settings(self, problem, **overrides):
        return {**self.settings, **self.settings_for(problem), **overrides}

    def make(self, problem, learning_rate=0.01, **overrides):
        return self.factory(learning_rate, **self.all_settings(problem, **overrides))

    def make_extras(self, problem, params):
        return self.extras(problem.loss_fn, params, *problem.args)


# Whitened updates keep their size at a constant learning rate, and end up circling the solution at
# a few times that distance; Newton steps vanish with the gradient.
_WHITENING_TARGETS = dict.fromkeys(TARGETS, Target(0.003, 4000, 0.02)) | {
    "rosenbrock": Target(0.003, 4000, 0.05)
}
# A component whose gradient vanishes gets so large a factor that it holds up the others.
_QEP_TARGETS = _WHITENING_TARGETS | {"parabola": Target(0.01, 4000, 0.02)}
_NEWTON_TARGETS = dict.fromkeys(TARGETS, Target(0.1, 2000, 1e-4)) | {
    "rosenbrock": Target(0.3, 15000, 0.05)  # a vector has a diagonal factor: no help in the valley
}
_PSGD_TUNABLE = {
    "learning_rate": 0.02,
    "momentum": 0.5,
    "precond_lr": 0.5,
    "damping": 1.0,
    "relative_damping": 0.5,
    "rms_clip": 0.1,
    "max_abs_clip": 0.01,
    "weight_decay": 0.1,
}


def _psgd(name, **kwargs):
    settings = kwargs.pop("settings", {})
    return Row(
        f"kron_psgd-{name}",
        ok.kron_psgd,
        ok.scale_by_kron_psgd,
        targets=kwargs.pop("targets", _WHITENING_TARGETS),
        settings=settings,
        tunable=_PSGD_TUNABLE,
        switched_on={"max_abs_clip": 10.0, "relative_damping": 0.01, "weight_decay": 0.01},
        **kwargs,
    )


_KFAC_TARGETS = {
    "parabola": Target(0.1, 4000, 1e-3),
    "least_squares": Target(0.05, 3000, 1e-3),
    "mixed": Target(0.05, 2000, 1e-3),
}
_KFAC_TUNABLE = {
    "learning_rate": 0.02,
    "decay": 0.5,
    "damping": 1.0,
    "momentum": 0.5,
    "factor_every": 3,
    "weight_decay": 0.1,
}


def _kfac(name, rate=1.0, steps=1, method="kfac", **kwargs):
    targets = {
        k: Target(rate * t.learning_rate, steps * t.steps, t.atol) for k, t in _KFAC_TARGETS.items()
    }
    return Row(
        f"{method}-{name}",
        getattr(ok, method),
        getattr(ok, f"scale_by_{method}"),
        targets=targets,
        switched_on={"weight_decay": 0.01},
        random=False,
        **{"core": True} | kwargs,
    )


_CAPTURED = {
    "settings_for": _captured_layers,
    "extras": _captured_taps,
    # A dense layer under a squared error has the same factors at every step: settings of their
    # averages make no difference.
    "tunable": {k: v for k, v in _KFAC_TUNABLE.items() if k not in ("decay", "factor_every")},
}
_HAND = {
    "rate": 10.0,
    # Factors that are soon old, so that the time between refreshes tells.
    "settings": {"decay": 0.5, "refresh_every": 1, "norm_constraint": None},
    "settings_for": lambda problem: {"layers": hand_layers(problem.params)},
    "extras": _hand_taps,
    "spoilt_extras": _spoilt_hand_taps,
    "tunable": _KFAC_TUNABLE | {"decay": 0.9, "refresh_every": 5},
}

_STACK_TUNABLE = {
    "learning_rate": 0.02,
    "momentum": 0.5,
    "weight_decay": 0.1,
}


def _blockwise(method, name, **kwargs):
    tunable = kwargs.pop("tunable", {})
    return Row(
        f"{method}-{name}",
        getattr(ok, method),
        getattr(ok, f"scale_by_{method}"),
        targets=kwargs.pop("targets", _WHITENING_TARGETS),
        tunable=_STACK_TUNABLE | tunable,
        switched_on={"weight_decay": 0.01},
        random=False,
        **kwargs,
    )


_MUON = {"momentum": 0.95, "nesterov": True}

ROWS = (
    _psgd("EQ", core=True),
    _psgd("QEP", settings={"geometry": "QEP"}, targets=_QEP_TARGETS),
    _psgd("QEQ", settings={"geometry": "QEQ"}),
    _psgd("Q0.5EQ1.5", settings={"geometry": "Q0.5EQ1.5"}),
    _psgd("QUAD", settings={"geometry": "QUAD"}),
    _psgd("PRO4P", settings={"geometry": "PRO4P"}),
    _psgd("gradient", settings={"criterion": "whiten_gradient"}),
    _psgd(
        "newton",
        targets=_NEWTON_TARGETS,
        settings={"criterion": "newton"},
        extras=_hvp,
        spoilt_extras=_hvp_not_finite,
        core=True,
    ),
    _psgd(
        "blocks",
        settings={"blocking": ok.Blocking(block_size=2, merge_below=4)},
        core=True,
    ),
    _psgd("no_momentum", settings={"momentum": None}),
    _kfac("captured", core=False, **_CAPTURED),
    # Taps by hand do not say what the examples weigh in the loss: without the bound on steps.
    _kfac("hand", **_HAND),
    _kfac("captured", method="ekfac", core=False, settings={"correct_every": 2}, **_CAPTURED),
    _kfac(
        "hand",
        method="ekfac",
        steps=2,
        **_HAND
        | {
            # Bases of "power" go on also where factors stay as they are.
            "settings": _HAND["settings"] | {"basis": "eigh"},
            "tunable": _HAND["tunable"] | {"correct_every": 3},
        },
    ),
    _blockwise(
        "shampoo",
        "eigh",
        # More damping than rounding makes of the null space of a few gradients.
        settings={"root_method": "eigh", "refresh_every": 1, "relative_damping": 1e-4},
        tunable={"decay": 0.5, "relative_damping": 0.1, "start_step": 5, "refresh_every": 2},
        core=True,
    ),
    _blockwise("shampoo", "newton", settings={"stagger": True}),
    _blockwise(
        "shampoo",
        "sums",
        settings={"decay": None, "grafting": None, "momentum": None},
        # Sums grow, and steps shrink with their roots.
        targets={name: Target(0.1, 4000, 0.02) for name in TARGETS if name not in ("rosenbrock",)},
    ),
    _blockwise("soap", "soap", tunable={"b2": 0.5, "eps": 1.0}, core=True),
    _blockwise("soap", "eigh", settings={"basis": "eigh", "stagger": True}),
    _blockwise("soap", "kl_shampoo", settings={"variant": "kl_shampoo"}),
    _blockwise("soap", "kl_soap", settings={"variant": "kl_soap"}),
    # A vector, which is no matrix, gets its gradient.
    Row(
        "orthogonalize",
        muon,
        ok.orthogonalize,
        targets={
            "parabola": Target(0.1, 1000, 1e-3),
            "least_squares": Target(0.003, 4000, 0.02),
            "mixed": Target(0.003, 3000, 0.02),
            "complex_parabola": Target(0.003, 2000, 0.02),
        },
        settings=_MUON,
        tunable=_STACK_TUNABLE,
        switched_on={"weight_decay": 0.01},
        curvature=(),
        random=False,
        mixes=True,
        core=True,
    ),
    Row(
        "orthogonalize-rms",
        muon,
        ok.orthogonalize,
        targets=_WHITENING_TARGETS,
        settings={
            **_MUON,
            "fallback": optax.scale_by_rms(0.95, 1e-20),
            "polynomial": "polar_express",
        },
        random=False,
    ),
    Row(
        "branch_kfac",
        ok.branch_kfac,
        ok.scale_by_branch_kfac,
        # Random directions, whose steps are those of gradient descent in the mean.
        targets={
            "parabola": Target(0.02, 4000, 0.02),
            "least_squares": Target(0.02, 8000, 0.02),
            "complex_parabola": Target(0.02, 2000, 0.02),
        },
        settings={"damping": 0.5},
        extras=_branches,
        curvature=(),
        tunable={"learning_rate": 0.02, "damping": 2.0, "blocks": 2, "weight_decay": 0.1},
        switched_on={"weight_decay": 0.01},
        mixes=True,
        core=True,
    ),
    # As one of another library, through the frame of all others.
    Row(
        "adagrad",
        adagrad,
        scale_by_adagrad,
        targets={name: Target(0.3, 2000, 0.02) for name in TARGETS if name != "rosenbrock"},
        tunable={"learning_rate": 0.02, "momentum": 0.5, "eps": 1.0, "weight_decay": 0.1},
        switched_on={"weight_decay": 0.01},
        random=False,
        core=True,
    ),
)

CORE_ROWS = tuple(row for row in ROWS if row.core)
every_row = pytest.mark.parametrize("row", ROWS, ids=str)
core_rows = pytest.mark.parametrize("row", CORE_ROWS, ids=str)

# --------------------------------------------------------------------------------------- helpers

# Compiling takes most of the time of these tests, and how well it is done is no matter here.
quick_jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


def updater(row, tx, problem, extras=None):
    """`update(grads, state, params)` with the row's extra arguments made from the problem."""
    extras = row.extras if extras is None else extras

    def update(grads, state, params):
        return tx.update(grads, state, params, **extras(problem.loss_fn, params, *problem.args))

    return update


def stepper(row, tx, problem):
    """`step((params, state)) -> (params, state), loss`: one step of training."""

    def step(carry, _=None):
        params, state = carry
        loss, grads = jax.value_and_grad(problem.loss)(params)
        updates, state = updater(row, tx, problem)(optax.tree.conj(grads), state, params)
        return (optax.apply_updates(params, updates), state), loss

    return step


def train(row, tx, problem, steps, state=None):
    """Train in one `lax.scan`; return the parameters, the state and the loss at every step."""
    step = stepper(row, tx, problem)

    @quick_jit
    def run(params, state):
        state = tx.init(params) if state is None else state
        return jax.lax.scan(step, (params, state), length=steps)

    (params, state), losses = run(problem.params, state)
    return params, state, losses


class Trained(NamedTuple):
    """A row on `regression` after four updates."""

    problem: Problem
    tx: optax.GradientTransformationExtraArgs
    update: Callable[..., Any]  # jitted (grads, state, params)
    params: Any
    state: Any
    traces: int  # of the update


@functools.lru_cache
def trained(row):
    """The row on `regression` after four updates: compiled once in a process, and shared."""
    problem = regression()
    tx = row.make(problem)
    traces = []

    def counted(grads, state, params):
        traces.append(1)
        return updater(row, tx, problem)(grads, state, params)

    update = quick_jit(counted)
    grad = quick_jit(jax.grad(problem.loss))
    params, state = problem.params, tx.init(problem.params)
    for _ in range(4):
        updates, state = update(grad(params), state, params)
        params = optax.apply_updates(params, updates)
    return Trained(problem, tx, update, params, state, len(traces))


def random_like(tree, seed=0, scale=1.0):
    """Normal entries in the shapes and dtypes of a tree, complex where it is complex."""
    rng = np.random.default_rng(seed)

    def draw(x):
        value = rng.normal(size=x.shape)
        if jnp.iscomplexobj(x):
            value = value + 1j * rng.normal(size=x.shape)
        return jnp.asarray(scale * value, x.dtype)

    return jax.tree.map(draw, tree)


def avals(tree):
    """Structure, shapes, dtypes and weak types of a tree of arrays or abstract arrays."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(x.shape, x.dtype, getattr(x, "weak_type", False)) for x in leaves]


def get(state, name):
    """The value of the one field of that name, anywhere in a state."""
    return optax.tree.get(state, name)


def largest_difference(tree, other):
    """The largest absolute difference between two trees of arrays of any dtype."""

    def difference(a, b):
        a, b = (np.asarray(x).astype(complex) for x in (a, b))
        return np.max(np.abs(a - b), initial=0.0)

    return max(jax.tree.leaves(jax.tree.map(difference, tree, other)), default=0.0)
