"""The code that users read runs: README, every page, and every docstring."""

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path

import jax
import pytest

import optax_kron

ROOT = Path(__file__).parent.parent
MODULES = [
    "optax_kron",
    *(m.name for m in pkgutil.walk_packages(optax_kron.__path__, "optax_kron.")),
]

# What other functions make, and modules, each of whose functions has an example.
WITHOUT_EXAMPLE = [
    "AdaptiveMetrics",
    "Layers",
    "QuadraticStep",
    "losses",
    "operators",
    "sharding",
]
LOSSES = [
    name
    for name, value in vars(optax_kron.losses).items()
    if inspect.isfunction(value) and not name.startswith("_")
]
PAGES = [
    "README.md",
    "docs/index.md",
    "docs/quickstart.md",
    "docs/conventions.md",
    "docs/kfac.md",
    "docs/ekfac.md",
    "docs/adaptive.md",
    "docs/fixed_norm.md",
    "docs/shampoo.md",
    "docs/soap.md",
    "docs/orthogonalize.md",
    "docs/branch_kfac.md",
    "docs/operators.md",
    "docs/losses.md",
    "docs/language_models.md",
    "docs/physics.md",
    "docs/wave_functions.md",
    "docs/migrating/index.md",
    "docs/migrating/distributed_shampoo.md",
    "docs/migrating/kfac_jax.md",
    "docs/migrating/muon.md",
    "docs/migrating/psgd_jax.md",
    "docs/migrating/soap_jax.md",
    "docs/scale.md",
    "docs/extending.md",
]
# A block that imports one of these runs where it is installed.
OPTIONAL = ["equinox", "haiku", "lineax"]


def can_run(block):
    needed = [name for name in OPTIONAL if re.search(rf"^import {name}\b", block, re.MULTILINE)]
    return all(importlib.util.find_spec(name) for name in needed)


@pytest.fixture
def restored_precision():
    """Undoes what a page does to the precision of all programs after it."""
    before = jax.config.jax_enable_x64
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.usefixtures("restored_precision")
@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks, f"{page} has no Python block"
    # Blocks of a page build on each other, as a reader would type them.
    code = "\n".join(block for block in blocks if can_run(block))
    exec(compile(code, page, "exec"), {"__name__": page})


def test_all_pages_with_python_blocks_are_run():
    pages = {str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md")}
    with_blocks = {page for page in pages if "```python" in (ROOT / page).read_text()}
    assert with_blocks == set(PAGES) - {"README.md"}


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.failed == 0


@pytest.mark.parametrize("name", optax_kron.__all__)
def test_public_names_have_examples_and_docstrings(name):
    assert getattr(optax_kron, name).__doc__, f"{name} has no docstring"
    if name not in WITHOUT_EXAMPLE:
        assert ">>>" in getattr(optax_kron, name).__doc__, f"{name} has no example"


@pytest.mark.parametrize("name", optax_kron.operators.__all__)
def test_operators_have_examples(name):
    if name != "Operator":
        assert ">>>" in getattr(optax_kron.operators, name).__doc__, f"{name} has no example"


@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_examples_and_are_on_their_page(name):
    assert ">>>" in getattr(optax_kron.losses, name).__doc__, f"{name} has no example"
    assert f"| `{name}` |" in (ROOT / "docs/losses.md").read_text()
