"""The code that users read runs: README, quickstart, and every docstring."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import optax_kron

ROOT = Path(__file__).parent.parent
MODULES = [
    "optax_kron",
    *(m.name for m in pkgutil.walk_packages(optax_kron.__path__, "optax_kron.")),
]


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/quickstart.md"])
def test_python_blocks_run(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks, f"{page} has no Python block"
    # Blocks of a page build on each other, as a reader would type them.
    exec(compile("\n".join(blocks), page, "exec"), {"__name__": page})


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.failed == 0


@pytest.mark.parametrize("name", optax_kron.__all__)
def test_public_names_have_examples_and_docstrings(name):
    assert getattr(optax_kron, name).__doc__, f"{name} has no docstring"
    if name != "ScaleByKronPsgdState":
        assert ">>>" in getattr(optax_kron, name).__doc__, f"{name} has no example"
