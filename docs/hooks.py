"""Fail the build when a public name lacks a docstring, or is not on exactly one API page."""

import re
from collections import Counter
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError

PACKAGE = "optax_kron"
API_PAGES = "api"
ENTRY = re.compile(rf"^::: {PACKAGE}\.(\w+)\s*$", re.MULTILINE)


def on_pre_build(config: MkDocsConfig) -> None:
    root = Path(config.config_file_path).parent
    pages = sorted(Path(config.docs_dir, API_PAGES).glob("*.md"))
    entries = Counter(name for page in pages for name in ENTRY.findall(page.read_text("utf-8")))
    problems = find_problems(root, entries)
    if problems:
        raise PluginError("\n".join(["The public API is not fully documented:", *problems]))


def find_problems(root: Path, entries: Counter[str]) -> list[str]:
    """One line for everything that a public name lacks, or has twice."""
    # The source is read, not imported: a class that Python gives an automatic __doc__, such as a
    # NamedTuple or a dataclass, has no docstring here unless somebody wrote one.
    package = griffe.load(PACKAGE, search_paths=[root])
    names = [str(name) for name in package.exports or ()]
    if not names:
        return [f"{PACKAGE}.__all__ is missing or empty"]
    problems = []
    for name in names:
        docstring = read_docstring(package, name)
        if not docstring:
            problems.append(f"{PACKAGE}.{name} has no docstring")
        if re.search(r"^Example:$", docstring, re.MULTILINE):
            # Only "Examples:" is a section: the site shows the lines of another one as quotations.
            problems.append(f"{PACKAGE}.{name}: its docstring has 'Example:', not 'Examples:'")
        if entries[name] != 1:
            entry = f"'::: {PACKAGE}.{name}'"
            problems.append(f"{entry} stands {entries[name]} times in docs/{API_PAGES}/, not once")
    return problems


def read_docstring(package: griffe.Module | griffe.Alias, name: str) -> str:
    """The docstring as it is written, or an empty string."""
    try:
        docstring = package[name].docstring
    except (KeyError, griffe.AliasResolutionError):
        return ""
    return "" if docstring is None else docstring.value.strip()
