"""Marked losses against Optax's, and their distributions against dense Hessians."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_kron as ok
from optax_kron import distributions, losses

SAMPLES = 3000
MONTE_CARLO = 0.1  # relative error in the Frobenius norm with that many samples

CATEGORICAL = "optax_kron_loss_categorical"
SOFTMAX = losses.softmax_cross_entropy
INTEGER = losses.softmax_cross_entropy_with_integer_labels
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def gaussian(predictions, targets, variance=1.0):
    return -jax.scipy.stats.norm.logpdf(targets, predictions, jnp.sqrt(variance))


def poisson(log_rates, targets):
    return -jax.scipy.stats.poisson.logpmf(targets, jnp.exp(log_rates))


def half_square(predictions, targets, variance=1.0):
    return jnp.abs(predictions - targets) ** 2 / (2 * variance)


# Each elementwise loss: the mark, the loss, and what it should equal.
ELEMENTWISE = {
    "bernoulli": (losses.sigmoid_binary_cross_entropy, optax.losses.sigmoid_binary_cross_entropy),
    "squared_error": (losses.squared_error, optax.losses.squared_error),
    "l2": (losses.l2_loss, optax.losses.l2_loss),
    "gaussian": (losses.gaussian_negative_log_likelihood, gaussian),
    "poisson": (losses.poisson_negative_log_likelihood, poisson),
    "normal": (losses.normal, half_square),
}
WITH_VARIANCE = ("gaussian", "normal")
elementwise = pytest.mark.parametrize("name", ELEMENTWISE)


def mark_of(name):
    """The mark of a loss: `normal` has that of a Gaussian, whose constant it lacks."""
    return distributions.MARK_PREFIX + {"normal": "gaussian"}.get(name, name)


def logits_of(shape, dtype=None, scale=1.0):
    return scale * jax.random.normal(jax.random.key(1), shape, dtype or float)


def marks(fn, *args):
    """The operands' and losses' shapes of all marks in the jaxpr, by name."""
    found = []

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            name = str(eqn.params.get("name", ""))
            if name.startswith(distributions.MARK_PREFIX):
                found.append((name, [x.aval.shape for x in eqn.invars], eqn.outvars[0].aval.shape))
                continue
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
                if is_jaxpr(inner):
                    visit(getattr(inner, "jaxpr", inner))

    visit(jax.make_jaxpr(fn)(*args).jaxpr)
    return found


def is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def assert_same_loss(ours, theirs, logits, rtol=None):
    """Values, dtype and gradients of two functions of logits."""

    @jax.jit
    def evaluate(x):
        def value_and_grad(fn):
            return fn(x), jax.grad(lambda x: jnp.sum(fn(x).astype(jnp.float32) ** 2))(x)

        return value_and_grad(ours), value_and_grad(theirs)

    actual, expected = evaluate(logits)
    assert actual[0].dtype == expected[0].dtype
    rtol = rtol or 8 * float(jnp.finfo(expected[0].dtype).eps)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=rtol, atol=rtol)


# ------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize(
    "name",
    [
        "softmax_cross_entropy",
        "softmax_cross_entropy_with_integer_labels",
        "sigmoid_binary_cross_entropy",
        "squared_error",
        "l2_loss",
    ],
)
def test_arguments_are_those_of_optax(name):
    def arguments(function):
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    assert arguments(getattr(losses, name)) == arguments(getattr(optax.losses, name))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("masked", [False, "full", "batch"])
@pytest.mark.parametrize(
    ("loss", "axis"),
    [*((INTEGER, axis) for axis in (-1, 1, (0, 2))), *((SOFTMAX, axis) for axis in (0, (2, 0)))],
)
def test_softmax_losses_equal_optax(loss, axis, masked, dtype):
    logits = logits_of((3, 4, 5), dtype)
    if loss is SOFTMAX:
        labels = jax.nn.softmax(logits, axis)
    else:
        labels = jnp.argmin(logits, axis) if isinstance(axis, int) else jnp.array([0, 14, 3, 7])
    where = logits_of((3, 4, 5)) > -0.5 if masked else None
    if masked == "batch":
        where = jnp.any(where[:, :, :1], axis)
    theirs = getattr(optax.losses, loss.__name__)
    assert_same_loss(
        lambda x: loss(x, labels, axis, where), lambda x: theirs(x, labels, axis, where), logits
    )


def test_all_axes_may_be_classes():
    logits = logits_of((3, 4))
    assert_same_loss(
        lambda x: SOFTMAX(x, logits, None),
        lambda x: optax.softmax_cross_entropy(x, logits, None),
        logits,
    )


@elementwise
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (2, 3), (0, 3)])
def test_elementwise_losses_equal_their_formula(name, dtype, shape):
    ours, theirs = ELEMENTWISE[name]
    targets = jnp.ones(shape, dtype)
    # Log densities subtract what the loss adds, and half precision notices.
    rtol = 2e-2 if name in ("gaussian", "poisson") and dtype != jnp.float32 else 1e-5
    rtol = rtol if name in ("gaussian", "poisson") else None
    assert_same_loss(
        lambda x: ours(x, targets), lambda x: theirs(x, targets), logits_of(shape, dtype), rtol
    )


def test_what_optax_broadcasts_is_broadcast():
    logits, targets = logits_of((2, 3)), jax.nn.softmax(logits_of((4, 1, 3)))
    for labels in (targets, targets[0, 0]):
        assert_same_loss(
            lambda x, y=labels: SOFTMAX(x, y),
            lambda x, y=labels: optax.softmax_cross_entropy(x, y),
            logits,
        )
    for shape in ((5,), (1,)):
        labels = jnp.ones(shape, int)
        np.testing.assert_allclose(
            INTEGER(logits[:1], labels),
            optax.losses.softmax_cross_entropy_with_integer_labels(logits[:1], labels),
            rtol=1e-6,
        )
    np.testing.assert_allclose(
        losses.sigmoid_binary_cross_entropy(0.5, np.eye(2)),
        optax.sigmoid_binary_cross_entropy(jnp.asarray(0.5), np.eye(2)),
        rtol=1e-6,
    )


def test_targets_and_variance_may_be_left_out_or_plain_numbers():
    x = logits_of((3,), jnp.bfloat16)
    np.testing.assert_array_equal(losses.squared_error(x), optax.losses.squared_error(x))
    np.testing.assert_array_equal(losses.l2_loss(x), optax.losses.l2_loss(x))
    assert losses.l2_loss(3.0, 1.0) == 2.0
    assert losses.gaussian_negative_log_likelihood(x, x, 2.0).dtype == jnp.bfloat16
    assert losses.gaussian_negative_log_likelihood(x, x, jnp.float32(2)).dtype == jnp.float32
    np.testing.assert_allclose(
        losses.gaussian_negative_log_likelihood(jnp.ones(2), jnp.zeros(2), jnp.array([1.0, 4.0])),
        gaussian(jnp.ones(2), jnp.zeros(2), jnp.array([1.0, 4.0])),
        rtol=1e-6,
    )


@pytest.mark.parametrize("labels", [[0, -1], [5, -7]])
def test_labels_outside_of_the_range_are_treated_as_by_optax(labels):
    logits, labels = logits_of((2, 3)), jnp.array(labels)
    ours, theirs = INTEGER, optax.losses.softmax_cross_entropy_with_integer_labels
    np.testing.assert_allclose(ours(logits, labels), theirs(logits, labels), rtol=1e-6)
    np.testing.assert_allclose(
        jax.grad(lambda x: ours(x, labels).sum())(logits),
        jax.grad(lambda x: theirs(x, labels).sum())(logits),
        atol=1e-6,
    )


def test_gradients_reach_targets_and_variance(x64):
    x, y = logits_of((3,)), jnp.array([0.5, 1.0, 2.0])
    assert_same_loss(lambda v: losses.l2_loss(x, v), lambda v: optax.l2_loss(x, v), y)
    assert_same_loss(
        lambda v: losses.gaussian_negative_log_likelihood(x, x + 1, v),
        lambda v: gaussian(x, x + 1, v),
        y,
        rtol=1e-6,  # of float32 sums
    )


def test_losses_work_under_transformations():
    logits, labels = logits_of((2, 4, 3)), jnp.zeros((2, 4), int)
    expected = INTEGER(logits, labels)
    np.testing.assert_allclose(jax.vmap(jax.jit(INTEGER))(logits, labels), expected, rtol=1e-6)
    _, scanned = jax.lax.scan(lambda c, x: (c, INTEGER(*x)), None, (logits, labels))
    np.testing.assert_allclose(scanned, expected, rtol=1e-6)

    def total(x):
        return INTEGER(x, labels).sum()

    gradient = jax.grad(total)(logits)
    np.testing.assert_allclose(jax.grad(jax.checkpoint(total))(logits), gradient, rtol=1e-6)
    _, tangent = jax.jvp(total, (logits,), (gradient,))
    np.testing.assert_allclose(tangent, jnp.vdot(gradient, gradient), rtol=1e-5)


# ------------------------------------------------------------------------------------------- marks


@elementwise
def test_elementwise_losses_are_marked(name):
    loss, _ = ELEMENTWISE[name]
    x = jnp.ones((5, 3))
    operands = [(5, 3)] * (3 if name in WITH_VARIANCE else 2)
    mark = (mark_of(name), operands, (5, 3))
    assert mark[0] in distributions.DISTRIBUTIONS
    assert marks(loss, x, x) == [mark]
    assert marks(lambda x: jax.lax.map(lambda x: loss(x, x), x), x)[0][0] == mark[0]
    assert marks(jax.grad(lambda x: loss(x, x).sum()), x)[0][0] == mark[0]
    # Whichever axes of a batch the operands have, the mark has all of them, in front.
    for axes in [(0, 0), (1, 1), (0, 1), (1, 0), (1, None), (None, 0)]:
        y = jnp.ones((5, 3, 2))
        first, second = (
            y[:, 0, 0] if a is None else jnp.moveaxis(jnp.ones((2, 5)), 0, a) for a in axes
        )
        ((found, shapes, output),) = marks(jax.vmap(loss, axes), first, second)
        assert (found, output) == (mark[0], (2, 5))
        assert shapes == [(2, 5)] * len(operands)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("loss", [SOFTMAX, INTEGER])
def test_softmax_losses_are_marked_with_the_classes_last(loss, masked):
    logits, where = jnp.ones((3, 4)), jnp.ones((3, 4), bool)
    labels = jnp.ones((3, 4)) if loss is SOFTMAX else jnp.ones(4, int)
    arguments = (logits, labels, where) if masked else (logits, labels)

    def along_first(logits, labels, where=None):
        return loss(logits, labels, 0, where)

    shape = (4,) if loss is INTEGER else (4, 3)
    shapes = [(4, 3), shape] + [(4, 3)] * masked
    assert marks(along_first, *arguments) == [(CATEGORICAL, shapes, (4,))]
    assert marks(
        lambda *a: jax.lax.scan(lambda c, _: (c, along_first(*a)), 0, None, 2), *arguments
    ) == [(CATEGORICAL, shapes, (4,))]
    gradient = jax.grad(lambda x: along_first(x, *arguments[1:]).sum())
    assert CATEGORICAL in [name for name, *_ in marks(gradient, logits)]


@pytest.mark.parametrize("loss", [SOFTMAX, INTEGER])
@pytest.mark.parametrize("batched", ["all", "logits", "labels"])
def test_the_axis_of_a_batch_comes_first(loss, batched):
    weight, x = jnp.ones((3, 2)), jnp.ones((5, 2))
    labels = jnp.ones((5, 3)) if loss is SOFTMAX else jnp.ones(5, int)
    where = jnp.ones((3,), bool)
    axes = {"all": (0, 0), "logits": (0, None), "labels": (None, 0)}[batched]
    arguments = [
        a if i is not None else a[0] for a, i in zip((x, labels), axes, strict=True)
    ]  # W @ x puts the batch last

    def one(x, labels):
        return loss(weight @ x, labels, where=where)

    ((name, shapes, output),) = marks(jax.vmap(one, axes), *arguments)
    assert (name, output) == (CATEGORICAL, (5,))
    assert shapes[0] == shapes[2] == (5, 3)
    assert shapes[1] == ((5, 3) if loss is SOFTMAX else arguments[1].shape)


def test_nested_batches_come_first_too():
    logits, targets = jnp.ones((3, 5, 2)), jnp.ones((3, 2))
    nested = jax.vmap(jax.vmap(SOFTMAX, (0, None)), (2, 1))
    assert marks(nested, jnp.moveaxis(logits, 0, 1), targets) == [
        (CATEGORICAL, [(2, 5, 3), (2, 5, 3)], (2, 5))
    ]


def test_an_axis_of_data_maps_with_the_same_values():
    logits, labels = logits_of((4, 3)), jnp.array([0, 1, 2, 0])
    np.testing.assert_allclose(
        jax.vmap(INTEGER, (1, 0))(logits.T, labels), INTEGER(logits, labels), rtol=1e-6
    )


def test_marking_costs_nothing_when_compiled():
    def floats(fn):
        return jax.jit(fn).lower(jnp.ones((64, 8)), jnp.ones(64, int)).compile().cost_analysis()

    ours = floats(lambda x, y: INTEGER(x, y).sum())
    theirs = floats(lambda x, y: optax.losses.softmax_cross_entropy_with_integer_labels(x, y).sum())
    assert ours["flops"] <= theirs["flops"]


# ----------------------------------------------------------------------------------- distributions


def softmax_problem(loss, axis, masked):
    """A softmax loss [4] of logits with classes along `axis`, and the operands of its mark."""
    shape = (3, 4) if axis == 0 else (4, 3)
    logits = logits_of(shape, scale=2.0)
    if loss is SOFTMAX:
        labels = jnp.abs(logits_of(shape)).at[(slice(None), 0) if axis == 0 else 0].set(0)
    else:
        labels = jnp.array([0, 1, 2, 0])
    where = (logits_of(shape) > -0.8) if masked else None
    if masked:
        where = where.at[(slice(None), 1) if axis == 0 else 1].set(False)  # nothing counts

    def fn(x):
        return loss(x, labels, axis, where)

    return fn, logits, [logits, labels, where][: 2 + masked]


def hessians(fn, logits, axis):
    """The Hessian of every loss with respect to its own logits, [N, C, C]."""
    full = jax.hessian(lambda x: fn(x).sum())(logits)
    each = jnp.moveaxis(full, (axis, axis - logits.ndim), (-2, -1))
    return jnp.einsum("nncd->ncd", each)


def grams(columns, axis):
    columns = jnp.moveaxis(columns, axis, -1)
    return jnp.einsum("vnc,vnd->ncd", columns, columns)


softmax_problems = pytest.mark.parametrize(
    ("loss", "axis", "masked"),
    [(loss, axis, masked) for loss in (SOFTMAX, INTEGER) for axis in (0, 1) for masked in (0, 1)],
)


@softmax_problems
def test_exact_columns_of_softmax_make_the_hessian(x64, loss, axis, masked):
    fn, logits, operands = softmax_problem(loss, axis, masked)
    expected = hessians(fn, logits, axis - 2)
    distribution = distributions.DISTRIBUTIONS[CATEGORICAL]
    for given in (axis, axis - 2):
        columns = distribution.exact(operands, given)
        assert columns.shape == (3, *logits.shape)
        np.testing.assert_allclose(grams(columns, axis - 2), expected, rtol=1e-10, atol=1e-12)


@softmax_problems
@pytest.mark.parametrize("method", ["sampled", "sketched"])
def test_random_columns_of_softmax_have_the_hessian_as_mean(x64, loss, axis, masked, method):
    fn, logits, operands = softmax_problem(loss, axis, masked)
    expected = hessians(fn, logits, axis - 2)
    draw = getattr(distributions.DISTRIBUTIONS[CATEGORICAL], method)
    columns = draw(jax.random.key(0), operands, axis, SAMPLES)
    assert columns.shape == (SAMPLES, *logits.shape)
    error = jnp.linalg.norm(grams(columns, axis - 2) - expected) / jnp.linalg.norm(expected)
    assert error < MONTE_CARLO


def test_negative_sums_of_labels_count_as_zero():
    operands = (jnp.zeros((1, 2)), jnp.array([[-1.0, 0.5]]))
    assert not jnp.any(distributions.DISTRIBUTIONS[CATEGORICAL].exact(operands, -1))


def elementwise_problem(name):
    logits = logits_of((5,))
    targets = jnp.array([0.0, 1.0, 1.0, 0.0, 1.0])
    variance = [jnp.array([0.5, 1.0, 2.0, 3.0, 0.1])] * (name in WITH_VARIANCE)
    loss, _ = ELEMENTWISE[name]
    hessian = jax.hessian(lambda x: loss(x, targets, *variance).sum())(logits)
    return (
        distributions.DISTRIBUTIONS[mark_of(name)],
        [logits, targets, *variance],
        hessian,
    )


@elementwise
def test_exact_columns_of_elementwise_losses_make_the_hessian(x64, name):
    distribution, operands, hessian = elementwise_problem(name)
    assert not distribution.has_class_axis
    columns = distribution.exact(operands, None)
    assert columns.shape == (1, 5)
    np.testing.assert_allclose(jnp.diag(columns[0] ** 2), hessian, rtol=1e-10, atol=1e-12)


@elementwise
@pytest.mark.parametrize("method", ["sampled", "sketched"])
def test_random_columns_of_elementwise_losses_have_the_hessian_as_mean(x64, name, method):
    distribution, operands, hessian = elementwise_problem(name)
    columns = getattr(distribution, method)(jax.random.key(0), operands, None, SAMPLES)
    assert columns.shape == (SAMPLES, 5)
    # Between elements too: those of one datum must not be correlated.
    error = jnp.linalg.norm(columns.T @ columns - hessian) / jnp.linalg.norm(hessian)
    assert error < MONTE_CARLO


def test_samples_are_gradients_of_the_loss_at_drawn_targets(x64):
    """Each column times √samples is what `jax.grad` returns for some target."""
    logits, one = logits_of((1, 3)), jax.random.key(3)
    column = distributions.DISTRIBUTIONS[CATEGORICAL].sampled(
        one, (logits, jnp.zeros(1, int)), -1, 4
    )
    possible = [jax.grad(lambda x, y=y: INTEGER(x, jnp.array([y])).sum())(logits) for y in range(3)]
    for draw in 2 * column:
        assert min(float(jnp.abs(draw - g).max()) for g in possible) < 1e-12
    column = distributions.DISTRIBUTIONS["optax_kron_loss_poisson"].sampled(one, (logits,), None, 4)
    counts = jnp.exp(logits) - 2 * column
    np.testing.assert_allclose(counts, jnp.round(counts), atol=1e-9)


def test_large_poisson_rates_are_sampled_without_overflow():
    operands = (jnp.full((1000,), 30.0),)
    distribution = distributions.DISTRIBUTIONS["optax_kron_loss_poisson"]
    columns = distribution.sampled(jax.random.key(0), operands, None, 1)
    root = distribution.exact(operands, None)
    np.testing.assert_allclose(jnp.mean((columns / root) ** 2), 1, rtol=MONTE_CARLO * 2)


@pytest.mark.parametrize("name", distributions.DISTRIBUTIONS)
def test_columns_are_at_least_single_precision(name, strict_promotion):
    distribution = distributions.DISTRIBUTIONS[name]
    assert distribution.name == name
    x, key = jnp.ones((2, 3), jnp.bfloat16), jax.random.key(0)
    # A wider extra does not widen the columns.
    operands = (x, x) if distribution.has_class_axis else (x, x, x.astype(jnp.float32))
    columns = [
        jax.eval_shape(lambda: distribution.exact(operands, -1)),
        jax.eval_shape(lambda: distribution.sampled(key, operands, -1, 2)),
        jax.eval_shape(lambda: distribution.sketched(key, operands, -1, 2)),
    ]
    assert [c.dtype for c in columns] == [jnp.float32] * 3
    assert [c.shape[0] for c in columns] == [3 if distribution.has_class_axis else 1, 2, 2]


def test_sketches_never_form_all_columns():
    operands = (jnp.ones((7, 50)), jnp.zeros(7, int))
    distribution = distributions.DISTRIBUTIONS[CATEGORICAL]
    for draw in (distribution.sampled, distribution.sketched):
        jaxpr = jax.make_jaxpr(lambda k, d=draw: d(k, operands, -1, 2))(jax.random.key(0))
        largest = max(math.prod(v.aval.shape) for e in jaxpr.jaxpr.eqns for v in e.outvars)
        assert largest <= 2 * 7 * 50


# --------------------------------------------------------------------------------- extremes, errors


EXTREMES = {
    "softmax": (SOFTMAX, "categorical", False),
    "softmax with mask": (SOFTMAX, "categorical", True),
    "integer": (INTEGER, "categorical", False),
    "integer with mask": (INTEGER, "categorical", True),
    **{name: (loss, name, False) for name, (loss, _) in ELEMENTWISE.items() if name != "poisson"},
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", EXTREMES)
def test_extreme_logits_stay_finite(case, dtype):
    loss, name, masked = EXTREMES[case]
    distribution = distributions.DISTRIBUTIONS[mark_of(name)]
    targets = jnp.array([1, 0]) if loss is INTEGER else jnp.array([[0.0, 1, 0], [1, 0, 0]], dtype)
    where = [jnp.array([[True, False, True], [False, False, False]])] * masked
    extra = where + [jnp.ones((2, 3), dtype)] * (name in WITH_VARIANCE)

    @jax.jit
    def evaluate(logits, key):
        def value(x):
            return loss(x, targets, where=where[0]) if masked else loss(x, targets)

        operands = (logits, targets, *extra)
        return (
            value(logits),
            jax.grad(lambda x: value(x).sum())(logits),
            distribution.exact(operands, -1),
            distribution.sampled(key, operands, -1, 3),
            distribution.sketched(key, operands, -1, 3),
        )

    logits = jnp.array([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4]], dtype)
    for result in evaluate(logits, jax.random.key(0)):
        assert jnp.all(jnp.isfinite(result))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: SOFTMAX(x, jnp.ones((4, 3))), r"labels has shape \(4, 3\), expected \(2, 3\)"),
        (lambda x: SOFTMAX(x[:, :1], x), r"labels has shape \(2, 3\), expected \(2, 1\)"),
        (lambda x: SOFTMAX(x, x, axis=2), r"axis is 2, expected different axes of logits with 2"),
        (lambda x: SOFTMAX(x, x, axis=(0, -2)), r"axis is \(0, -2\), expected different axes"),
        (lambda x: SOFTMAX(x, x, where=jnp.ones(3)), r"where has shape \(3,\), expected \(2, 3\)"),
        (lambda x: SOFTMAX(x, x, where=jnp.ones((4, 2, 3))), r"where has shape \(4, 2, 3\)"),
        (lambda x: INTEGER(x, jnp.ones(3, int)), r"labels has shape \(3,\), expected \(2,\)"),
        (lambda x: INTEGER(x, jnp.ones((), int)), r"labels has shape \(\), expected \(2,\)"),
        (lambda x: INTEGER(x, jnp.ones(2, int), axis=None), r"axis is None, expected an integer"),
        (
            lambda x: losses.sigmoid_binary_cross_entropy(x, jnp.ones(2)),
            r"sigmoid_binary_cross_entropy: labels has shape \(2,\), expected \(2, 3\)",
        ),
        (lambda x: losses.squared_error(x, x[0]), r"squared_error: targets has shape \(3,\)"),
        (lambda x: losses.l2_loss(x, x[0]), r"l2_loss: targets has shape \(3,\), expected \(2, 3"),
        (
            lambda x: losses.gaussian_negative_log_likelihood(x, x[0]),
            r"gaussian_negative_log_likelihood: targets has shape \(3,\), expected \(2, 3\)",
        ),
        (
            lambda x: losses.gaussian_negative_log_likelihood(x, x, jnp.ones((4, 2, 3))),
            r"gaussian_negative_log_likelihood: variance has shape \(4, 2, 3\), expected \(2, 3\)",
        ),
        (lambda x: losses.normal(x, x[0]), r"normal: targets has shape \(3,\), expected \(2, 3"),
        (
            lambda x: losses.normal(1j * x, None, jnp.ones((4, 2, 3))),
            r"normal: variance has shape \(4, 2, 3\), expected \(2, 3\)",
        ),
        (
            lambda x: losses.poisson_negative_log_likelihood(x, x[0]),
            r"poisson_negative_log_likelihood: targets has shape \(3,\), expected \(2, 3\)",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((2, 3)))


@pytest.mark.parametrize("name", ["gaussian_negative_log_likelihood", "normal"])
def test_a_variance_that_is_none_is_refused_where_it_is_known(name):
    loss, x = getattr(losses, name), jnp.ones(2)
    for bad in (0.0, -1, jnp.array([1.0, 0.0]), np.array([np.nan, 1])):
        with pytest.raises(ValueError, match=f"{name}: variance is .*, expected positive numbers"):
            loss(x, x, bad)
        with pytest.raises(ValueError, match="expected positive numbers"):
            jax.eval_shape(lambda x, bad=bad: loss(x, x, bad), x)
    with pytest.raises(TypeError, match=f"{name}: variance has dtype complex64, expected a real"):
        loss(x, x, 1j * x)
    jax.eval_shape(lambda v: loss(x, x, v), x)  # of which nothing is known


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64], ids=str)
def test_a_sample_where_a_wave_function_is_zero_adds_nothing(dtype):
    log_psi, v = jnp.array([-jnp.inf, 1.0], dtype), jnp.array([2.0, 3.0], dtype)

    def total(z):
        return losses.log_psi(z).sum()

    value, gradient = jax.value_and_grad(total)(log_psi)
    np.testing.assert_array_equal(value, 0)
    np.testing.assert_array_equal(gradient, 0)
    product = ok.ggn_vector_product(total, log_psi)
    np.testing.assert_array_equal(product(v), v * jnp.array([0, 1]))


def test_dtypes_that_do_not_fit_are_named():
    with pytest.raises(TypeError, match="logits has dtype int32, expected a floating-point one"):
        SOFTMAX(jnp.ones((2, 3), int), jnp.ones((2, 3)))
    with pytest.raises(TypeError, match="labels has dtype float32, expected an integer one"):
        INTEGER(jnp.ones((2, 3)), jnp.ones(2))
    with pytest.raises(TypeError, match="normal: predictions has dtype int32, expected a floating"):
        losses.normal(jnp.ones((2, 3), int))
