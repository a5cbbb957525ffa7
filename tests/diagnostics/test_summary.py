"""The table of every parameter, of every optimizer, in every form."""

import io
import itertools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console

import optax_kron as ok
from optax_kron.kernels import psgd
from optax_kron.tables import Table

from ..contract.table import CORE_ROWS, mixed, regression
from .runs import batch, layers, params, run

WEIGHTS = {"bias": jnp.zeros(4), "kernel": jnp.ones((6, 4)), "scale": jnp.ones(())}


def grads(seed=0, like=WEIGHTS):
    keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(like)))
    return jax.tree.map(
        lambda x, key: jax.random.normal(key, x.shape, x.dtype),
        like,
        jax.tree.unflatten(jax.tree.structure(like), list(keys)),
    )


def stepped(tx, steps, like=WEIGHTS):
    """The states after each of some steps."""
    update, state = jax.jit(tx.update), tx.init(like)
    for seed in range(steps):
        _, state = update(grads(seed, like), state, like)
        yield state


def nbytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("row", CORE_ROWS, ids=str)
def test_every_parameter_has_a_line_and_bytes_add_up(row):
    problem = mixed() if not row.name.startswith(("kfac", "ekfac")) else regression()
    tx = row.make(problem)
    state = tx.init(problem.params)
    table = ok.diagnostics.summary(state, problem.params, tx)
    assert table.bytes == nbytes(state)
    if row.name == "branch_kfac":
        assert not table.parameters  # of which it keeps nothing
        return
    named = {path for line in table.parameters for path in line.parameter.split()}
    assert named == set(problem.params)
    blocks = sum(line.bytes for line in table.parameters)
    counters = table.states[0].bytes - blocks
    assert 0 <= counters <= 100, "counters, the schedule and a key alone are of no parameter"


def test_a_line_says_what_is_kept_of_a_parameter():
    tx = ok.shampoo(1e-3, grafting=None, momentum=None, outlier_clip=None)
    (*_, state) = stepped(tx, 3)
    bias, kernel, scale = ok.diagnostics.summary(state, WEIGHTS, tx).parameters
    assert (bias.parameter, kernel.parameter, scale.parameter) == ("bias", "kernel", "scale")
    assert (kernel.blocks, kernel.shape, kernel.factors) == (1, "6x4", ("6 dense", "4 dense"))
    assert bias.factors == ("4 diagonal",)
    assert scale.factors == ("1 diagonal",)
    assert kernel.bytes == 2 * 4 * (36 + 16) + 1  # statistics, roots, and one bool
    assert kernel.optimizer == "shampoo"
    statistics = [f for f in ok.diagnostics.factors(state, WEIGHTS)["kernel"] if f.name == "S"]
    for number, factor in zip(kernel.conditions, statistics, strict=True):
        np.testing.assert_allclose(number, np.linalg.cond(factor.array.astype(float)), rtol=1e-3)


def test_conditions_are_no_larger_than_rounding_tells():
    tx = ok.shampoo(1e-3, momentum=None)
    state = tx.init(WEIGHTS)
    rank_one = jax.tree.map(jnp.ones_like, WEIGHTS)
    _, state = tx.update(rank_one, state)
    kernel = ok.diagnostics.summary(state, WEIGHTS).parameters[1]
    assert kernel.conditions == (1 / np.finfo(np.float32).eps,) * 2


def test_conditions_of_padded_blocks_are_those_of_their_factors():
    like = {"kernel": jnp.ones((5, 7))}
    tx = ok.kron_psgd(1e-3, blocking=ok.Blocking(block_size=3))
    (state,) = stepped(tx, 1, like)
    (row,) = ok.diagnostics.summary(state, like, tx).parameters
    own = [f for f in ok.diagnostics.factors(state, like, tx)["kernel"] if f.name == "P"]
    assert {f.array.shape for f in own} == {(3, 3), (2, 2), (1, 1)}
    for axis, number in enumerate(row.conditions):
        known = [np.linalg.cond(f.array.astype(float)) for f in own if f.axis == axis]
        np.testing.assert_allclose(number, max(known), rtol=1e-3)


def with_ages(states, fields):
    """Each state with the age of every block, told by when its numbers changed last."""
    ages, before = {}, None
    for state in states:
        kept = {k: np.asarray(fields(x)) for k, x in optax.tree.get(state, "stacks").items()}
        for label, rows in kept.items():
            new = np.ones(len(rows), bool)
            if before is not None:
                new = np.any((rows != before[label]).reshape(len(rows), -1), axis=1)
            ages[label] = np.where(new, 0, ages.get(label, np.zeros(len(rows))) + 1)
        before = kept
        yield state, {label: x.copy() for label, x in ages.items()}


@pytest.mark.parametrize(("name", "stagger"), [("shampoo", True), ("soap", False), ("soap", True)])
def test_ages_are_those_of_the_last_change(name, stagger):
    shapes = {"a": (6, 4), "b": (4, 6), "c": (6, 4), "d": (3, 2)}
    like = {k: jnp.ones(shape) for k, shape in shapes.items()}
    tx = getattr(ok, name)(1e-3, refresh_every=4, stagger=stagger)

    def fields(stack):
        return stack.roots[0] if name == "shampoo" else stack.bases[0]

    for state, expected in with_ages(stepped(tx, 11, like), fields):
        rows = ok.diagnostics.summary(state, like, tx).parameters
        found = {row.parameter: row.age for row in rows}
        assert [found["a"], found["b"], found["c"]] == expected["6x4"].tolist()
        assert found["d"] == expected["3x2"][0]


@pytest.mark.parametrize("factor_every", [1, 2])
def test_ages_of_staggered_layers_are_those_of_the_last_change(factor_every):
    """All blocks are refreshed while factors are young, and in turns later."""
    settings = {"decay": 0.8, "refresh_every": 5, "stagger": True, "factor_every": factor_every}
    tx = ok.kfac(0.1, layers=layers(), **settings)
    done = run(tx, params(), [batch(seed=i) for i in range(22)], with_taps=True)
    # Made anew of factors that are as they were, inverses are too: that no one sees at first.
    first = 0 if factor_every == 1 else 16
    told = with_ages(done["states"], lambda stack: stack.inverse.input)
    for state, expected in itertools.islice(told, first, None):
        rows = ok.diagnostics.summary(state, params(), tx).parameters
        assert {row.shape: row.age for row in rows} == {k: x[0] for k, x in expected.items()}


@pytest.mark.parametrize("probability", [1.0, 0.3, None, optax.linear_schedule(1.0, 0.1, 10)])
def test_ages_of_kron_psgd_follow_its_schedule(probability):
    tx = ok.kron_psgd(1e-3, update_probability=probability)
    last, before = 0, -1
    for step, state in enumerate(stepped(tx, 20)):
        refreshes = int(optax.tree.get(state, "refreshes"))
        last = step if refreshes > before else last
        before = refreshes
        assert {row.age for row in ok.diagnostics.summary(state, WEIGHTS, tx).parameters} == {
            step - last
        }
    assert {row.age for row in ok.diagnostics.summary(state, WEIGHTS).parameters} == {None}


def test_a_parameter_without_gradient_is_noted():
    tx = ok.soap(1e-3)
    still = {**grads(), "bias": jnp.zeros(4)}
    _, state = tx.update(still, tx.init(WEIGHTS), WEIGHTS)
    notes = {row.parameter: row.note for row in ok.diagnostics.summary(state, WEIGHTS).parameters}
    assert notes == {"bias": "no gradient yet", "kernel": "", "scale": ""}


def test_what_is_in_no_layer_says_what_becomes_of_it():
    made = [ok.Layer("dense", kernel="kernel", bias="bias")]
    for fallback, words in (
        (None, "in no layer: its gradient passes, with momentum"),
        (optax.scale_by_adam(), "in no layer: goes through the fallback"),
    ):
        tx = ok.kfac(0.1, layers=made, fallback=fallback)
        dense, scale = ok.diagnostics.summary(tx.init(WEIGHTS), WEIGHTS, tx).parameters
        assert (dense.layer, dense.parameter) == ("dense", "kernel bias")
        assert dense.factors == ("7 dense", "4 dense")
        assert (scale.parameter, scale.blocks, scale.note) == ("scale", 0, words)


def test_a_masked_parameter_is_hidden_and_an_empty_one_has_no_elements():
    weights = {**WEIGHTS, "counts": jnp.arange(3), "none": jnp.ones((0, 3))}
    mask = {name: name != "counts" for name in weights}
    tx = optax.masked(ok.kron_psgd(1e-3), mask)
    rows = ok.diagnostics.summary(tx.init(weights), weights, tx).parameters
    notes = {row.parameter: row.note for row in rows}
    assert notes["counts"] == "hidden from these optimizers"
    assert notes["none"] == "has no elements"
    assert notes["kernel"] == ""


@pytest.mark.parametrize("weights", [{}, {"x": None}, {"x": jnp.ones((0, 2))}], ids=str)
@pytest.mark.parametrize("make", [ok.kron_psgd, ok.soap, ok.orthogonalize, ok.branch_kfac])
def test_trees_with_nothing_in_them_have_an_empty_table(make, weights):
    tx = make() if make is ok.orthogonalize else make(1e-3)
    state = tx.init(weights)
    table = ok.diagnostics.summary(state, weights, tx)
    assert not any(row.blocks for row in table.parameters)
    assert str(table)
    assert ok.diagnostics.factors(state, weights, tx) == {}
    assert not ok.diagnostics.explain(state, weights, tx)


@pytest.mark.parametrize("weights", [jnp.ones(()), jnp.ones((3, 2), jnp.complex64)], ids=["0", "c"])
def test_a_single_array_is_the_root(weights):
    tx = ok.soap(1e-3)
    _, state = tx.update(weights, tx.init(weights))
    (row,) = ok.diagnostics.summary(state, weights, tx).parameters
    assert row.parameter == "(root)"
    assert not ok.diagnostics.explain(state, weights, tx)


def test_without_layers_lines_are_those_of_stacks_and_a_note_says_why():
    tx = ok.kfac(0.1, layers=[ok.Layer("x", kernel="kernel")])
    table = ok.diagnostics.summary(tx.init(WEIGHTS), WEIGHTS)
    assert [(row.parameter, row.shape) for row in table.parameters] == [("?", "6x4")]
    assert "layers are in the transformation" in table.notes[0]
    assert "Pass tx" in table.notes[0]


def test_a_state_of_shapes_has_a_table_without_numbers():
    tx = ok.kron_psgd(1e-3)
    state = jax.eval_shape(tx.init, WEIGHTS)
    table = ok.diagnostics.summary(state, jax.eval_shape(lambda: WEIGHTS), tx)
    assert table.bytes == nbytes(tx.init(WEIGHTS))
    assert table.states[0].counters["steps"] is None
    assert {row.conditions for row in table.parameters} == {()}


def test_large_matrices_are_left_out_unless_all_are_asked_for():
    weights = {"large": jnp.ones((1700, 2)), "small": jnp.ones((8, 4))}
    state = ok.kron_psgd(1e-3).init(weights)
    table = ok.diagnostics.summary(state, weights)
    large, small = table.parameters
    assert large.conditions[0] is None
    assert None not in small.conditions
    assert "all_conditions=True" in table.notes[0]


def test_the_table_prints_in_every_form():
    tx = ok.soap(1e-3)
    (state,) = stepped(tx, 1)
    table = ok.diagnostics.summary(state, WEIGHTS, tx)
    lines = str(table).splitlines()
    assert lines[0].startswith("soap: 1 steps, 1 refreshes, 0 failed refreshes")
    assert any(line.startswith("kernel") and "6 dense, 4 dense" in line for line in lines)
    page = table._repr_html_()
    assert page.count("<tr>") == 1 + len(table.parameters)
    assert "<td>kernel</td>" in page
    console = rich.console.Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    assert "6 dense, 4 dense" in console.export_text()
    known = json.loads(json.dumps(table.to_dict()))
    assert known["parameters"][1]["factors"] == ["6 dense", "4 dense"]
    assert known["states"][0]["counters"]["steps"] == 1


def test_markup_in_names_is_shown_as_it_is():
    table = Table(("<b>", "[red]"), [("a & b", "[bold]")], title=("<i>",))
    assert "&lt;b&gt;" in table._repr_html_()
    assert "a &amp; b" in table._repr_html_()
    console = rich.console.Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    assert "[bold]" in console.export_text()


def test_layers_have_a_form_for_notebooks():
    page = layers()._repr_html_()
    assert page.count("<tr>") == 1 + len(layers())
    assert "<td>dense0</td>" in page

    def unmarked(weights):
        return jnp.sum(weights["kernel"] ** 2)

    page = ok.find_layers(unmarked, {"kernel": jnp.ones((3, 2))})._repr_html_()
    assert "without a Kronecker block:" in page
    assert "the loss marks no likelihood" in page


def test_a_model_of_200_leaves_takes_less_than_a_second():
    weights = {
        f"layer{i}": {"kernel": jnp.ones((128, 128)), "bias": jnp.ones(128)} for i in range(100)
    }
    for tx in (ok.kron_psgd(1e-3), ok.soap(1e-3), ok.shampoo(1e-3)):
        state = jax.block_until_ready(tx.init(weights))
        started = time.process_time()
        table = ok.diagnostics.summary(state, weights, tx)
        str(table)
        assert time.process_time() - started < 1.0
        assert len(table.parameters) == 200


def test_the_adaptive_optimizers_have_a_line_for_each_layer():
    tx = ok.adaptive_ekfac(layers=layers())
    table = ok.diagnostics.summary(tx.init(params()), params(), tx)
    assert table.states[0].kind == "adaptive_ekfac"
    assert table.states[0].counters["rejected_steps"] == 0
    assert [row.layer for row in table.parameters] == [x.name for x in layers()]


def test_layers_have_their_names_and_count_their_steps():
    tx = ok.ekfac(0.1, layers=layers(), refresh_every=3, decay=0.0)
    done = run(tx, params(), [batch()] * 3, with_taps=True)
    table = ok.diagnostics.summary(done["state"], done["params"], tx)
    assert [row.layer for row in table.parameters] == [x.name for x in layers()]
    since = ok.diagnostics.metrics(done["state"])["since_refresh"]
    assert {row.age for row in table.parameters} == {int(since)} == {2}
    assert all(None not in row.conditions for row in table.parameters)


@pytest.mark.parametrize("geometry", psgd.GEOMETRIES)
@pytest.mark.parametrize("cached", [None, False])
def test_without_settings_condition_numbers_are_those_of_p_or_left_out(geometry, cached):
    tx = ok.kron_psgd(1e-3, geometry=geometry, cache_preconditioner=cached)
    params = {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}
    state = tx.init(params)
    scales = jnp.arange(1.0, 7.0)[:, None] ** 2

    @jax.jit
    def step(i, state):
        noise = jax.random.normal(jax.random.key(i), (6, 4))
        return tx.update({"kernel": noise * scales, "bias": noise[0]}, state, params)[1]

    state = jax.lax.fori_loop(0, 20, step, state)
    rows = {x.parameter: x for x in ok.diagnostics.summary(state, params, tx).parameters}
    guessed = ok.diagnostics.summary(state, params)
    for row in guessed.parameters:
        if geometry == "EQ" or (cached is None and psgd.degree(geometry) == 2):
            assert row.conditions == rows[row.parameter].conditions
        else:
            assert set(row.conditions) == {None}
            assert any("of Q or of P" in note for note in guessed.notes)


def test_parameters_that_fixed_norm_alone_sees():
    tx = ok.fixed_norm(optax.scale_by_adam(), 0.1)
    summary = ok.diagnostics.summary(tx.init({"w": jnp.ones((3, 2))}), {"w": jnp.ones((3, 2))}, tx)
    assert [row.note for row in summary.parameters] == ["seen by fixed_norm alone"]
