"""What is said of versions agrees: metadata, the oldest that are tested, workflow and README."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PREFIX = "Programming Language :: Python :: "
PYTHONS = [c.removeprefix(PREFIX) for c in PROJECT["classifiers"] if c.startswith(PREFIX)]
FIND_PYTHON = str(ROOT / ".ci/find-python")


def oldest():
    """The versions that the oldest supported JAX is tested with, by package."""
    lines = (ROOT / "tests/constraints-oldest.txt").read_text().splitlines()
    return dict(re.split("==|;", x)[:2] for x in lines if not x.startswith("#"))


def minimum(package):
    """What the metadata ask for, as a tuple: "jax>=0.8" is (0, 8)."""
    extras = PROJECT["optional-dependencies"].values()
    needed = [*PROJECT["dependencies"], *(x for extra in extras for x in extra)]
    (version,) = {x.split(">=")[1] for x in needed if x.startswith(f"{package}>=")}
    return tuple(map(int, version.split(".")))


@pytest.mark.parametrize("package", ["jax", "jaxtyping", "optax", "numpy", "flax"])
def test_the_oldest_that_are_supported_are_tested(package):
    least = minimum(package)
    assert tuple(map(int, oldest()[package].split(".")))[: len(least)] == least


def test_workflow_runs_every_python_that_is_supported():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert set(re.findall(r'python: "([\d.]+)", target: test}', workflow)) == set(PYTHONS)
    assert f">={PYTHONS[0]}" == PROJECT["requires-python"]


@pytest.mark.parametrize("page", ["README.md", "docs/install.md"])
def test_pages_name_the_oldest(page):
    text = " ".join((ROOT / page).read_text().split())
    for said in (f"Python {PYTHONS[0]}", f"JAX {oldest()['jax'].removesuffix('.0')}"):
        assert said in text, f"{page} does not name {said}"


def test_every_folder_of_the_oldest_leg_exists():
    (parts,) = re.findall(r"^OLDEST_PARTS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert all((ROOT / part).is_dir() for part in parts.split())


def test_a_python_that_does_not_run_is_passed_over(tmp_path):
    """As a version manager's command is, whose version is not the chosen one."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for name, script in (("9.9", "exit 127"), (version, f'exec "{sys.executable}" "$@"')):
        path = tmp_path / f"python{name}"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    kept = tmp_path / "pyenv/versions"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}
    environment |= {"PYENV_ROOT": str(kept.parent)}

    def find(*versions):
        return subprocess.run(
            [FIND_PYTHON, *versions], env=environment, capture_output=True, text=True, check=False
        )

    found = find("9.9", version)
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()).samefile(sys.executable)
    assert find("9.9").returncode == 1

    # The newest patch release that the manager keeps, and no build of another kind.
    for release in ("9.9.9", "9.9.10", "9.9.11t"):
        path = kept / release / "bin/python9.9"
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\necho {release}\n")
        path.chmod(0o755)
    assert find("9.9", version).stdout.strip() == "9.9.10"
