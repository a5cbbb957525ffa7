"""What is in the sdist and in the wheel: all that has to be, and nothing else.

python tests/package/archives.py dist
"""

import ast
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Besides PKG-INFO, which holds the metadata.
IN_SDIST = {
    *(".ci", ".github", ".gitignore", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE"),
    *("Makefile", "README.md", "benchmarks", "docs", "examples", "mkdocs.yml", "optax_kron"),
    *("pyproject.toml", "tests"),
}


def version() -> str:
    """Returns the version that stands in the package, without importing it."""
    for node in ast.parse((ROOT / "optax_kron/__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return ast.literal_eval(node.value)
    raise SystemExit('optax_kron/__init__.py: expected a line __version__ = "...", found none')


def expect(found: set[str], wanted: set[str], what: str) -> None:
    """Ends with a message where two sets of names differ."""
    if found != wanted:
        missing, surplus = sorted(wanted - found), sorted(found - wanted)
        raise SystemExit(f"{what}: missing are {missing}, not expected were {surplus}")


def sources() -> set[str]:
    """Returns the files of the package in this checkout."""
    files = (p for p in (ROOT / "optax_kron").rglob("*") if p.is_file())
    return {p.relative_to(ROOT).as_posix() for p in files if "__pycache__" not in p.parts}


def check_wheel(path: Path) -> None:
    """The package and its metadata."""
    info = f"optax_kron-{version()}.dist-info"
    described = {f"{info}/{x}" for x in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")}
    with zipfile.ZipFile(path) as wheel:
        expect(set(wheel.namelist()), sources() | described, path.name)
        metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert "optax_kron/py.typed" in sources(), "optax_kron/py.typed is missing"
    expect({metadata["Version"]}, {version()}, f"{path.name}: Version")
    license_expression = {metadata["License-Expression"]}
    expect(license_expression, {PROJECT["license"]}, f"{path.name}: License-Expression")
    core = {x for x in metadata.get_all("Requires-Dist", []) if "extra ==" not in x}
    expect(core, set(PROJECT["dependencies"]), f"{path.name}: Requires-Dist")
    extras = set(metadata.get_all("Provides-Extra", []))
    expect(extras, set(PROJECT["optional-dependencies"]), f"{path.name}: Provides-Extra")


def check_sdist(path: Path) -> None:
    """What builds, tests and tells, and nothing that lay about in the checkout."""
    top = f"optax_kron-{version()}"
    with tarfile.open(path) as sdist:
        files = [member.name.split("/") for member in sdist.getmembers() if member.isfile()]
    expect({parts[0] for parts in files}, {top}, path.name)
    expect({parts[1] for parts in files}, IN_SDIST | {"PKG-INFO"}, path.name)
    package = {"/".join(parts[1:]) for parts in files if parts[1] == "optax_kron"}
    expect(package, sources(), path.name)


def main() -> None:
    """Checks the one wheel and the one sdist of a folder."""
    folder = Path(sys.argv[1])
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    print(f"{wheel.name} and {sdist.name} hold what they should")


if __name__ == "__main__":
    main()
