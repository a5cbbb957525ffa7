"""The notebook runs, and holds the outputs of a run of all of it."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "examples/tour.ipynb"
TIME_LIMIT = 170  # seconds; compilation dominates


def code_cells(path):
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def kinds(cell):
    """The types of what a cell has put out: "stream", "image/png", "text/plain", "error"."""
    found = []
    for output in cell["outputs"]:
        data = output.get("data", {})
        found.append(
            "image/png" if "image/png" in data else next(iter(data), output["output_type"])
        )
    return found


def texts(cell):
    return ["".join(x["text"]) for x in cell["outputs"] if x["output_type"] == "stream"]


def check_outputs(cells):
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert set(kinds(cell)) <= {"stream", "image/png"}
        assert {x.get("name", "stdout") for x in cell["outputs"]} <= {"stdout"}  # and not stderr
        for output in cell["outputs"]:
            if png := output.get("data", {}).get("image/png"):
                assert base64.b64decode(png).startswith(b"\x89PNG\r\n\x1a\n")
        assert "nan" not in " ".join(texts(cell)).split()


def test_its_outputs_are_complete():
    cells = code_cells(PATH)
    check_outputs(cells)
    assert sum("image/png" in kinds(cell) for cell in cells) >= 2
    assert "without a Kronecker block" not in "".join(x for c in cells for x in texts(c))
    for cell in cells:
        # What stands in for a picture on the page that is made of the notebook.
        assert ("image/png" in kinds(cell)) == bool(cell["metadata"].get("alt"))


def test_it_is_short():
    lines = [line for cell in code_cells(PATH) for line in "".join(cell["source"]).splitlines()]
    assert len(lines) <= 120
    assert "optax_kron." not in "\n".join(lines).replace("optax_kron as ok", "")


@pytest.mark.subprocess
def test_it_runs(tmp_path):
    out = tmp_path / "tour.ipynb"
    folders = {"IPYTHONDIR": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-m", "tests.notebook", str(PATH), "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **folders},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    before, after = code_cells(PATH), code_cells(out)
    check_outputs(after)
    assert [kinds(cell) for cell in after] == [kinds(cell) for cell in before]
    # The table of layers has no number that the machine could change.
    assert texts(after[1]) == texts(before[1])
