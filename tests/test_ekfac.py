"""EKFAC as a transformation: its numbers against dense ones, its stacks and its guards."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_kron as ok
from optax_kron import find_layers, losses, value_and_grad_with_taps
from optax_kron.layers.layer import Layer
from optax_kron.layers.moments import moments_of
from optax_kron.layers.taps import Tap, Taps

# The natural gradient itself, without the norm constraint that is on by default.
ekfac = functools.partial(ok.ekfac, norm_constraint=None)
scale_by_ekfac = functools.partial(ok.scale_by_ekfac, norm_constraint=None)
scale_by_kfac = functools.partial(ok.scale_by_kfac, norm_constraint=None)

RTOL = 1e-9  # of float64 against the dense reference
DENSE = Layer("dense", kernel="kernel")


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape))


def settings(**changes):
    return {
        "layers": [DENSE],
        "momentum": None,
        "factor_dtype": "float64",
        "basis": "eigh",
        **changes,
    }


def problem(seed=0, columns=2, positions=2):
    """A gradient, and taps of full rank at several positions."""
    tap = Tap(draw(1, 7, positions, 4, seed=seed), draw(columns, 1, 7, positions, 3, seed=seed))
    return {"kernel": draw(4, 3, seed=seed + 100)}, Taps({"dense": tap})


def run(tx, stream, params=None):
    """All updates, and the last state."""
    state, updates = tx.init(stream[0][0] if params is None else params), []
    update = jax.jit(lambda grads, state, taps: tx.update(grads, state, taps=taps))
    for grads, taps in stream:
        u, state = update(grads, state, taps)
        updates.append(u)
    return updates, state


class Reference:
    """EKFAC of one layer by loops and dense matrices of size d_in·d_out."""

    def __init__(self, decay, damping, rule="exact"):
        self.decay, self.damping, self.rule = decay, damping, rule
        self.factors, self.values, self.steps, self.corrections = None, None, 0, 0

    def _average(self, old, new, steps):
        beta = self.decay
        weight = beta * (1 - beta**steps) / (1 - beta ** (steps + 1))
        return new if old is None else weight * old + (1 - weight) * new

    def see(self, tap, refresh, correct=True):
        a, g = np.asarray(tap.inputs[0]), np.asarray(tap.output_grads[:, 0])
        (N, S, _), V = a.shape, len(g)
        A = sum(np.outer(a[n, s], a[n, s]) for n in range(N) for s in range(S)) / (N * S)
        G = sum(
            np.outer(g[v, n, s], g[v, n, s]) for v in range(V) for n in range(N) for s in range(S)
        )
        old = self.factors or (None, None)
        self.factors = tuple(
            self._average(x, y, self.steps) for x, y in zip(old, (A, G / N), strict=True)
        )
        if refresh:
            pairs = [np.linalg.eigh(x) for x in self.factors]
            basis = np.kron(*(q for _, q in pairs))
            if self.values is not None:
                kept = self.basis @ np.diag(self.values) @ self.basis.T
                self.values = np.diag(basis.T @ kept @ basis)
            self.basis, self.spectra = basis, [values for values, _ in pairs]
        self.steps += 1
        if not correct:
            return
        values = 0
        for v in range(V):
            for n in range(N):
                gradient = sum(np.outer(a[n, s], g[v, n, s]) for s in range(S))
                values = values + (self.basis.T @ gradient.ravel()) ** 2 / N
        self.values = self._average(self.values, values, self.corrections)
        self.corrections += 1

    def precondition(self, X):
        added = self.damping
        if self.rule == "pi":
            x, y = self.spectra
            pi = np.sqrt(x.mean() / y.mean())
            root = np.sqrt(self.damping)
            added = (np.kron(x + pi * root, y + root / pi) - np.kron(x, y)).ravel()
        matrix = self.basis @ np.diag(self.values + added) @ self.basis.T
        return np.linalg.solve(matrix, np.asarray(X).ravel()).reshape(X.shape)


@pytest.mark.parametrize(
    ("rule", "positions", "correct_every"),
    [("exact", 1, 1), ("exact", 3, 1), ("pi", 1, 1), ("pi", 3, 1), ("exact", 3, 2), ("pi", 1, 4)],
)
def test_updates_are_those_of_the_dense_reference(x64, rule, positions, correct_every):
    """Averages, refreshes every third step once the factors are old, and what is carried over."""
    reference = Reference(0.5, 0.1, rule)
    stream = [problem(seed, positions=positions) for seed in range(9)]
    tx = scale_by_ekfac(
        **settings(damping=0.1, damping_rule=rule, decay=0.5, refresh_every=3),
        correct_every=correct_every,
    )
    updates, state = run(tx, stream)
    refreshed = []
    waited = 0
    for step, ((grads, taps), found) in enumerate(zip(stream, updates, strict=True)):
        waited += 1
        refresh = step == 0 or waited >= 3 or 0.5 * step < 1
        waited = 0 if refresh else waited
        refreshed.append(refresh)
        reference.see(taps["dense"][0], refresh, correct=step % correct_every == 0)
        expected = reference.precondition(grads["kernel"])
        np.testing.assert_allclose(found["kernel"], expected, rtol=RTOL, err_msg=str(step))
    assert state.refreshes == sum(refreshed) < len(stream)


def test_one_datum_gives_the_exact_curvature(x64):
    grads, _ = problem()
    a, g = draw(1, 1, 2, 4, seed=3), draw(3, 1, 1, 2, 3, seed=3)
    one = Taps({"dense": Tap(a[:, :, :1], g[:, :, :, :1])})
    (updates,), _ = run(scale_by_ekfac(**settings(damping=0.1)), [(grads, one)])
    F = sum(
        np.outer(x, x) for x in np.einsum("i,vo->vio", a[0, 0, 0], g[:, 0, 0, 0]).reshape(3, 12)
    )
    expected = np.linalg.solve(F + 0.1 * np.eye(12), np.asarray(grads["kernel"]).ravel())
    np.testing.assert_allclose(updates["kernel"].ravel(), expected, rtol=RTOL)


def test_layers_of_one_signature_are_as_each_alone(x64):
    names = "pqr"
    grads = {name: draw(4, 3, seed=i) for i, name in enumerate(names)}
    taps = Taps({n: problem(i)[1]["dense"][0] for i, n in enumerate(names)})
    tx = scale_by_ekfac(**settings(layers=[Layer(name, kernel=name) for name in names]))
    (together,), state = run(tx, [(grads, taps)])
    assert state.stacks["4x3"].inverse.values.shape == (3, 4, 3)
    for name in names:
        alone = scale_by_ekfac(**settings(layers=[Layer(name, kernel=name)]))
        (u,), _ = run(alone, [({name: grads[name]}, Taps({name: taps[name]}))])
        np.testing.assert_allclose(together[name], u[name], rtol=RTOL)


def test_a_table_is_as_its_one_hot_inputs(x64):
    indices = jnp.array([[0, 2, 2], [1, 1, 1], [3, 0, 2], [4, 4, 0]])[None, ..., None]
    g = draw(2, 1, 4, 3, 3)
    grads = {"kernel": draw(5, 3)}
    table = [Layer("dense", kernel="kernel", is_embedding=True)]
    (found,), _ = run(
        scale_by_ekfac(**settings(layers=table)), [(grads, Taps({"dense": Tap(indices, g)}))]
    )
    one_hot = jax.nn.one_hot(indices[..., 0], 5, dtype=jnp.float64)
    (_, state) = run(scale_by_ekfac(**settings()), [(grads, Taps({"dense": Tap(one_hot, g)}))])
    Q = np.linalg.eigh(state.stacks["5x3"].output_factor[0])[1]
    gradients = np.einsum("nsi,vnso->vnio", one_hot[0], g[:, 0]) @ Q
    values = (gradients**2).sum((0, 1)) / 4
    expected = (np.asarray(grads["kernel"]) @ Q / (values + 1e-3)) @ Q.T
    np.testing.assert_allclose(found["kernel"], expected, rtol=RTOL)


def test_hidden_parameters_are_left_out_of_their_layer(x64):
    layer = Layer("dense", kernel="kernel", bias="bias")
    grads = {"kernel": draw(3, 3), "bias": draw(3)}
    inputs = problem()[1]["dense"][0].inputs.at[..., -1].set(1)
    tap = Tap(inputs, problem()[1]["dense"][0].output_grads)
    tx = optax.masked(scale_by_ekfac(**settings(layers=[layer])), {"kernel": True, "bias": False})
    (found,), _ = run(tx, [(grads, Taps({"dense": tap}))])
    alone = scale_by_ekfac(**settings())
    taps = Taps({"dense": tap._replace(inputs=inputs[..., :-1])})
    (expected,), _ = run(alone, [({"kernel": grads["kernel"]}, taps)])
    np.testing.assert_allclose(found["kernel"], expected["kernel"], rtol=RTOL)
    np.testing.assert_array_equal(found["bias"], grads["bias"])


def test_blocks_in_branches_not_taken_keep_their_eigenvalues(x64):
    def loss_fn(p, x, y, taken):
        def layer(h, wk):
            w, taken = wk
            return jax.lax.cond(taken, lambda h: jnp.tanh(h @ w), lambda h: 0.9 * h, h), None

        h, _ = jax.lax.scan(layer, x, (p["blocks"], taken))
        return jnp.mean(losses.squared_error(h, y))

    params, x, y = {"blocks": draw(3, 4, 4)}, draw(5, 4), draw(5, 4, seed=1)
    layers = find_layers(loss_fn, params, x, y, jnp.ones(3, bool))
    fn = jax.jit(value_and_grad_with_taps(loss_fn, layers, fisher="exact"))
    tx = scale_by_ekfac(**settings(layers=layers, refresh_every=100))
    update, states = jax.jit(tx.update), [tx.init(params)]
    for taken in ([1, 1, 0], [1, 0, 0]):
        _, grads, taps = fn(params, x, y, jnp.array(taken, bool))
        updates, state = update(grads, states[-1], taps=taps)
        states.append(state)
    first, second = (state.stacks["4x4"].inverse for state in states[1:])
    np.testing.assert_array_equal(second.known, [True, True, False])
    assert np.abs(second.values[0] - first.values[0]).max() > 1e-6
    # Made anew with the bases, which for factors that did not change are the same.
    np.testing.assert_allclose(second.values[1], first.values[1], rtol=1e-9)
    np.testing.assert_array_equal(updates["blocks"][2], grads["blocks"][2])


def test_what_is_masked_may_be_anything(x64):
    grads, taps = problem(positions=1)
    tap = taps["dense"][0]
    weights = jnp.arange(7) < 5
    g = tap.output_grads * weights[None, None, :, None, None]
    spoilt = jnp.where(weights[None, :, None, None], tap.inputs, 1e200)
    tx = scale_by_ekfac(**settings())
    pair = [
        run(tx, [(grads, Taps({"dense": Tap(x, g, weights.astype(float))}))])[0][0]["kernel"]
        for x in (tap.inputs, spoilt)
    ]
    np.testing.assert_allclose(*pair, rtol=RTOL)


def test_without_columns_the_output_factor_is_the_identity(x64):
    grads, taps = problem()
    tap = taps["dense"][0]
    none = Taps({"dense": tap._replace(output_grads=tap.output_grads[:0])})
    (found,), _ = run(scale_by_ekfac(**settings(damping=0.1)), [(grads, none)])
    A = np.einsum("bnsi,bnsj->ij", tap.inputs, tap.inputs) / 14
    np.testing.assert_allclose(
        found["kernel"], np.linalg.solve(A + 0.1 * np.eye(4), grads["kernel"]), rtol=RTOL
    )


def test_eigenvalues_that_overflow_are_not_taken():
    grads, taps = problem(columns=1, positions=1)
    good = Taps({"dense": taps["dense"][0]})
    tap = taps["dense"][0]
    # The factors are finite, and their product is not.
    large = Taps({"dense": Tap(1e15 * tap.inputs, 1e15 * tap.output_grads)})
    tx = scale_by_ekfac(layers=[DENSE], momentum=None, decay=0.5)
    updates, state = run(tx, [(grads, good), (grads, large)])
    assert state.failed_refreshes >= 1
    assert np.all(np.isfinite(updates[-1]["kernel"]))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


def test_second_moments_are_refused():
    grads, taps = problem()
    moments = Taps({"dense": moments_of(DENSE.resolved(grads), taps["dense"][0])})
    tx = scale_by_ekfac(layers=[DENSE])
    with pytest.raises(ValueError, match=r"ekfac: eigenvalues need.*'dense'.*reduce=False"):
        tx.update(grads, tx.init(grads), taps=moments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"damping_rule": "trace"}, "ekfac: damping_rule must be one of.*got 'trace'"),
        ({"approx": "mean"}, "ekfac: approx must be one of"),
        ({"damping": -1.0}, "ekfac: damping"),
        ({"layers": "dense"}, "ekfac: layers must be"),
        ({"refresh_every": 0}, "ekfac: refresh_every"),
        ({"bias_correction": "auto"}, "ekfac: bias_correction must be True or False; got 'auto'"),
    ],
)
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ekfac(0.1, **({"layers": [DENSE]} | changes))


def test_without_columns_all_groups_count(x64):
    grads, taps = problem()
    tap = taps["dense"][0]
    few, many = tap._replace(output_grads=tap.output_grads[:0]), draw(1, 9, 1, 4, seed=5)
    groups = Taps({"dense": [few, Tap(1e3 * many, jnp.zeros((0, 1, 9, 1, 3)))]})
    (found,), _ = run(scale_by_ekfac(**settings()), [(grads, groups)])
    (expected,), _ = run(scale_by_kfac(**settings(damping_rule="exact")), [(grads, groups)])
    np.testing.assert_allclose(found["kernel"], expected["kernel"], rtol=RTOL)


def test_factors_that_stay_leave_the_eigenvalues_as_they_are():
    grads, taps = problem()
    tx = scale_by_ekfac(layers=[DENSE], factor_dtype="bfloat16", decay=0.999, refresh_every=1)
    step = jax.jit(lambda state, _: (tx.update(grads, state, taps=taps)[1], None))
    states = [tx.init(grads)]
    for length in (1, 300):
        states.append(jax.lax.scan(step, states[-1], length=length)[0])
    sums = [s.stacks["4x3"].inverse.values.astype(jnp.float32).sum() for s in states[1:]]
    np.testing.assert_allclose(*sums, rtol=0.1)  # of 8 bits, which are averaged 300 times


def test_no_damping_leaves_out_what_is_null():
    def loss_fn(w, x, y):
        return jnp.mean(losses.softmax_cross_entropy_with_integer_labels(x @ w, y))

    w, x, y = draw(3, 3).astype(jnp.float32), draw(8, 3).astype(jnp.float32), jnp.arange(8) % 3
    layers = find_layers(loss_fn, w, x, y)
    _, grads, taps = value_and_grad_with_taps(loss_fn, layers, fisher="exact")(w, x, y)
    for damping in (0.0, lambda count: 0.0 * count):
        tx = scale_by_ekfac(layers=layers, damping=damping, momentum=None)
        updates, _ = tx.update(grads, tx.init(w), taps=taps)
        assert np.abs(updates).max() < 100  # softmax has null directions


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("make", [scale_by_ekfac, scale_by_kfac])
def test_power_iterations_lead_to_the_updates_of_eigendecompositions(make):
    """Of taps that stay as they are, at the first of which the factors are no longer moved."""
    grads, taps = problem()
    stream = [(grads, taps)] * 150
    exact = settings(damping=0.1, damping_rule="exact", refresh_every=1)
    updates, state = run(make(**{**exact, "basis": "power"}), stream)
    (expected, *_), _ = run(make(**exact), stream[:1])
    assert int(state.failed_refreshes) == 0
    np.testing.assert_allclose(updates[-1]["kernel"], expected["kernel"], rtol=1e-3)


@pytest.mark.parametrize("make", [scale_by_ekfac, scale_by_kfac])
def test_a_basis_out_of_range_is_refused(make):
    with pytest.raises(ValueError, match="kfac: basis must be one of eigh, power; got 'qr'"):
        make(layers=[DENSE], basis="qr")


def test_bases_go_on_from_good_factors_where_new_ones_overflow():
    grads, taps = optax.tree.cast(problem(), jnp.float32)
    settings = {"decay": 0.5, "refresh_every": 1, "momentum": None, "outlier_clip": None}
    tx = scale_by_ekfac(layers=[DENSE], **settings)
    tap = taps["dense"][0]
    huge = Taps({"dense": tap._replace(inputs=tap.inputs * 1e30)})
    updates, state = run(tx, [(grads, taps)] * 3)
    updates, after = run(tx, [(grads, taps)] * 3 + [(grads, huge)])
    assert int(state.failed_refreshes) == 0
    assert int(after.failed_refreshes) > 0
    chex.assert_tree_all_finite((updates, after))
    old, new = (x.stacks["4x3"] for x in (state, after))
    chex.assert_trees_all_equal(new[:2], old[:2])
    for Q in (new.inverse.input_basis[0], new.inverse.output_basis[0]):
        np.testing.assert_allclose(Q.T @ Q, np.eye(len(Q)), atol=1e-5)
