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
    "diagnostics",
    "losses",
    "operators",
    "sharding",
]
LOSSES = [
    name
    for name, value in vars(optax_kron.losses).items()
    if inspect.isfunction(value) and not name.startswith("_")
]
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
PAGES = [page for page, text in TEXTS.items() if "```python\n" in text]
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
    blocks = re.findall(r"^```python\n(.*?)^```$", TEXTS[page], re.DOTALL | re.MULTILINE)
    # One that is indented, as in a list, would not be found.
    assert len(blocks) == TEXTS[page].count("```python\n")
    # Blocks of a page build on each other, as a reader would type them.
    code = "\n".join(block for block in blocks if can_run(block))
    exec(compile(code, page, "exec"), {"__name__": page})


def prose(text):
    """Lines of a page without code, tables and formulas; targets of links take no room."""
    text = re.sub(r"^ *```.*?^ *```$|^\$\$.*?^\$\$$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\]\([^)\s]*\)", "]", text)
    return [line for line in text.splitlines() if not line.lstrip().startswith("|")]


@pytest.mark.parametrize("page", [*TEXTS, "CHANGELOG.md", "CONTRIBUTING.md"])
def test_prose_is_wrapped(page):
    text = TEXTS.get(page) or (ROOT / page).read_text()
    assert not [line for line in prose(text) if len(line) > 100]


def test_readme_is_short_and_names_what_to_type():
    assert len(TEXTS["README.md"].splitlines()) <= 120
    assert {"make demo", "make test"} <= set(re.findall(r"^make \w+", TEXTS["README.md"], re.M))


def test_every_public_name_is_on_one_page_of_the_api():
    pages = [text for page, text in TEXTS.items() if page.startswith("docs/api/")]
    entries = re.findall(r"^::: optax_kron\.(\w+)$", "\n".join(pages), re.MULTILINE)
    assert sorted(entries) == sorted(optax_kron.__all__)


def test_the_site_needs_no_network():
    """Its scripts, styles, fonts and pictures are files of its own, and pictures are small."""
    assets = ROOT / "docs/assets"
    needed = re.findall(r"^  - (assets/\S+)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(needed) >= 3
    styles = (assets / "katex/katex.min.css").read_text()
    needed += [f"assets/katex/{font}" for font in re.findall(r"url\(([^)]*)\)", styles)]
    assert not [file for file in needed if not (ROOT / "docs" / file).is_file()]
    for page, text in TEXTS.items():
        for picture in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text):
            file = (ROOT / page).parent / picture
            assert file.stat().st_size < 200_000, f"{page}: {picture}"


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


@pytest.mark.parametrize("name", optax_kron.diagnostics.__all__)
def test_diagnostics_have_docstrings_and_examples(name):
    documented = getattr(optax_kron.diagnostics, name).__doc__
    assert documented, f"{name} has no docstring"
    if name not in ("ParameterRow", "StateRow", "Summary"):  # which `summary` makes
        assert ">>>" in documented, f"{name} has no example"


@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_examples_and_are_on_their_page(name):
    assert ">>>" in getattr(optax_kron.losses, name).__doc__, f"{name} has no example"
    assert f"| `{name}` |" in (ROOT / "docs/losses.md").read_text()
