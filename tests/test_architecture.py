"""Imports go one way, and only public modules of JAX and Optax are used."""

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest

import optax_kron as ok

PACKAGE = Path(__file__).parent.parent / "optax_kron"
# Lowest first.
ROOMS = [
    "types",
    "tables",
    "kernels",
    "blocking",
    "layers",
    "autodiff",
    "declarations",
    "distributions",
    "operands",
    "losses",
    "capture",
    "operators",
    "transforms",
    "sharding",
    "diagnostics",
    "__init__",
]
# Of capture, lowest first: its phases, and the functions on top of them.
PHASES = ["program", "rules", "analysis", "execution"]
# Imported when called.
OPTIONAL = {"bridge.py": {"lineax"}, "figures.py": {"matplotlib"}, "tables.py": {"rich"}}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(parts):
    return parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = ROOMS.index(room(path.relative_to(PACKAGE).parts))
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[0] == "optax_kron" and len(parts) > 1 and parts[1] in ROOMS:
            assert ROOMS.index(parts[1]) <= here, f"{path} imports {module}, from above"


CAPTURE = [p for p in FILES if p.relative_to(PACKAGE).parts[0] == "capture"]


@pytest.mark.parametrize("path", CAPTURE, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_phases_of_capture_import_earlier_ones(path):
    where = path.relative_to(PACKAGE).parts[1]
    here = PHASES.index(where) if where in PHASES else len(PHASES)
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[:2] == ["optax_kron", "capture"] and len(parts) > 2:
            phase = PHASES.index(parts[2]) if parts[2] in PHASES else len(PHASES)
            assert phase <= here, f"{path} imports {module}, of a later phase"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_that_runs_at_every_step_needs_the_tracer(path):
    """Optimizers and operators know what a layer is, not how it is found."""
    where = path.relative_to(PACKAGE)
    # The exact Gauss-Newton matrix is of a loss function, not of layers.
    if where.parts[0] in ("transforms", "operators") and where.parts != ("operators", "exact.py"):
        assert not [m for m in imported_modules(path) if m.startswith("optax_kron.capture")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_public_modules_are_imported(path):
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[0] != "optax_kron":
            assert not any(part.startswith("_") for part in parts), f"{path} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_one_module_reads_equations(path):
    """Their parameters change from one release of JAX to the next."""
    if path.name != "equations.py":
        assert "eqn.params" not in path.read_text()
        assert ".primitive" not in path.read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_core_needs_only_its_declared_dependencies(path):
    standard = sys.stdlib_module_names
    allowed = standard | {"jax", "jaxtyping", "numpy", "optax", "optax_kron"}
    allowed |= OPTIONAL.get(path.name, set())
    assert {module.split(".")[0] for module in imported_modules(path)} <= allowed


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_trees_are_of_a_type_that_checkers_know(path):
    """To them jaxtyping's is unknown, and so would be what users get from the library."""
    assert "jaxtyping.PyTree" not in imported_modules(path)


LOOPS = ("while_loop", "fori_loop", "scan", "cond", "switch", "platform_dependent")
ROOMS_OF_ARRAYS = [p for p in FILES if room(p.relative_to(PACKAGE).parts) != "capture"]


@pytest.mark.parametrize("path", ROOMS_OF_ARRAYS, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_loops_and_branches_are_those_of_flow(path):
    """Which take constants inside of `jax.shard_map` too."""
    if path.name == "flow.py":
        return
    nodes = ast.walk(ast.parse(path.read_text()))
    called = {ast.unparse(n) for n in nodes if isinstance(n, ast.Attribute)}
    assert not called & {f"jax.lax.{name}" for name in LOOPS}


TRANSFORMS = [p for p in FILES if room(p.relative_to(PACKAGE).parts) == "transforms"]


def functions_that_mention(text):
    """Functions and classes of the transforms whose own lines hold a text."""
    return {
        (path.name, node.name)
        for path in TRANSFORMS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and text in ast.unparse(node)
    }


def test_what_is_not_finite_is_kept_out_in_one_place():
    assert functions_that_mention("select_blocks(") <= {
        ("stacks.py", "select_blocks"),
        ("stacks.py", "guarded"),
    }
    assert functions_that_mention("functools.partial(select_blocks") == {("stacks.py", "guarded")}


def test_counters_are_counted_in_one_place():
    for counter in ("refreshes=", "failed_refreshes=", "outlier_steps="):
        found = functions_that_mention(f"{counter}state.{counter[:-1]} +")
        assert {file for file, _ in found} <= {"frame.py", "branch_kfac.py"}


def test_trees_without_leaves_are_told_in_one_place():
    assert functions_that_mention("if not plan.leaves") | functions_that_mention(
        "if plan.leaves"
    ) == {
        ("frame.py", "update"),  # there is nothing to do
        ("stacks.py", "for_tree"),  # nor to keep
    }


@pytest.mark.parametrize("name", ["kron_psgd", "kfac", "ekfac", "shampoo", "soap", "branch_kfac"])
def test_an_alias_has_the_settings_of_its_transformation(name):
    alias = inspect.signature(getattr(ok, name)).parameters
    scale = inspect.signature(getattr(ok, f"scale_by_{name}")).parameters
    added = {"learning_rate", "weight_decay", "mask"} | (
        {"clip"} if name == "branch_kfac" else set()
    )
    assert set(alias) - set(scale) <= added
    assert set(scale) - set(alias) == set()
    for setting in set(scale) - {"learning_rate"}:
        assert alias[setting].default == scale[setting].default, setting
        assert alias[setting].annotation == scale[setting].annotation, setting
    described = inspect.getdoc(getattr(ok, name)).split("Args:")[1].split("Returns:")[0]
    listed = set(re.findall(r"^  (\w+):", described, re.MULTILINE))
    assert listed <= added, "a setting is described once, where the mathematics is"


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_one_that_tunes_itself_has_the_settings_of_its_preconditioner(name):
    adaptive = inspect.signature(getattr(ok, f"adaptive_{name}")).parameters
    scale = inspect.signature(getattr(ok, f"scale_by_{name}")).parameters
    chosen = {"damping", "momentum", "momentum_dtype", "norm_constraint", "learning_rate"}
    assert set(scale) - set(adaptive) == chosen | {"stagger"}  # which needs a fixed interval
    for setting in set(scale) & set(adaptive) - {"bias_correction"}:
        assert adaptive[setting].default == scale[setting].default, setting
        assert adaptive[setting].annotation == scale[setting].annotation, setting
    others = set(inspect.signature(ok.adaptive_kfac).parameters) ^ set(adaptive)
    of_one = set(inspect.signature(ok.scale_by_ekfac).parameters)
    of_one -= set(inspect.signature(ok.scale_by_kfac).parameters)
    assert others <= {"refresh_factor"} | of_one
    described = inspect.getdoc(ok.adaptive_kfac).split("Args:")[1].split("Returns:")[0]
    listed = set(re.findall(r"^  (\w+):", described, re.MULTILINE))
    assert listed >= set(adaptive) - set(scale), "a setting of its own is described"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            documented = node.body[0].end_lineno - node.body[0].lineno + 1
            length = node.end_lineno - node.lineno + 1
            assert length - (documented if len(body) < len(node.body) else 0) <= 60, node.name


def test_an_optimizer_takes_one_short_file():
    assert len((PACKAGE.parent / "tests/contract/adagrad.py").read_text().splitlines()) < 80
