"""The examples run as a reader would run them: in a process of their own, from another folder.

So do the benchmarks that took over their tables and pictures.
"""

import importlib
import json
import os
import runpy
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

pytestmark = pytest.mark.subprocess

ROOT = Path(__file__).resolve().parents[1]
TIME_LIMIT = 170  # seconds; compilation dominates
SMALL = ("--width", "32", "--layers", "1")
VMC = ("--walkers", "8", "--blocks", "2", "--optimizer", "kfac")
# A few steps are no reason to optimise programs.
SETTINGS = {
    "COLUMNS": "100",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PLATFORMS": "cpu",
    "NO_COLOR": "1",
}


def run(script, *arguments, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=cwd,
        env={**os.environ, **SETTINGS},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        check=False,
    )


def read_png(path):
    """Checks signature and checksums, then returns width, height and the decompressed bytes."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = [], 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        (checksum,) = struct.unpack(">I", content[at + 8 + length : at + 12 + length])
        assert zlib.crc32(kind + body) == checksum
        chunks.append((kind, body))
        at += 12 + length
    assert chunks[-1][0] == b"IEND"
    width, height = struct.unpack(">II", chunks[0][1][:8])
    return width, height, zlib.decompress(b"".join(b for kind, b in chunks if kind == b"IDAT"))


def check_picture(path):
    width, height, pixels = read_png(path)
    assert width > 1000
    assert height > 400
    assert len(set(pixels)) > 50  # a blank picture would hold a handful of values


@pytest.mark.parametrize(
    ("script", "arguments", "texts"),
    [
        ("digits.py", ("--optimizer", "kron_psgd"), ("kron_psgd  step    2  training loss",)),
        ("digits_nnx.py", (), ("step    2", "test accuracy")),
        ("digits_kfac.py", ("--optimizer", "kfac"), ("params/Conv_2/kernel", "kfac")),
        ("autoencoder.py", ("--optimizer", "kfac"), ("params/Dense_7/kernel", "after 2 steps")),
        ("characters.py", (), ("MultiHeadDotProductAttention_0/query", "held-out loss")),
        ("gpt.py", ("--optimizer", "adamw"), ("8192 diagonal", "tied embedding", "held-out")),
        (
            "gpt.py",
            ("--contest", "--optimizer", "kron_psgd, fixed norms", *SMALL),
            ("22,624 parameters", "steps to", "adamw", "kron_psgd, fixed norms"),
        ),
        ("state_space.py", ("--optimizer", "branch_kfac"), ("branch_kfac step    2",)),
        ("compare.py", ("--optimizer", "branch_kfac"), ("branch_kfac", "ms a step", "KiB")),
        ("influence.py", (), ("without those that help", "norm of the gradient")),
        ("laplace.py", ("--images", "60", "--samples", "8"), ("Laplace ", "calibration error")),
        (
            "two_processes.py",
            ("--batch-size", "16", "--steps", "9"),
            ("soap  last loss", "largest difference"),
        ),
        (
            "pinn.py",
            ("--equation", "burgers", "--optimizer", "adaptive_kfac"),
            ("burgers        relative error", "adaptive_kfac", "    2  "),
        ),
        (
            "vmc.py",
            ("--walkers", "16", "--blocks", "2"),
            ("pairs", "kfac step     2", "sr   step     2"),
        ),
        ("vmc.py", ("--atom", "Be", *VMC), ("pairs", "kfac step     2", "-14.667356 Ha")),
    ],
)
def test_an_example_trains_and_draws(script, arguments, texts, tmp_path):
    options = ("--steps", "2", *arguments, "--out", "new/picture.png")
    result = run(f"examples/{script}", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for text in texts:
        assert text in result.stdout
    assert "nan" not in result.stdout.split()
    # Where layers are found, every parameter has a Kronecker block.
    assert "without a Kronecker block" not in result.stdout
    check_picture(tmp_path / "new" / "picture.png")


def test_a_tournament_prints_the_table_and_draws_the_curves(tmp_path):
    options = ("--steps", "7", "--batch-size", "16", "--out", "new/curves.png")
    result = run("benchmarks/tournament.py", "digits", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for text in ("to 97%", "final", "accuracy", "per", "compile", "KiB"):
        assert text in result.stdout
    # Three rows for each optimizer, one of which has a star.
    for name in ("adamw", "kron_psgd"):
        assert result.stdout.count(f"{name} *") == 1
        assert result.stdout.count(f"{name}, rate") == 3
    check_picture(tmp_path / "new" / "curves.png")


def test_a_tournament_makes_only_the_contestants_that_are_wanted(tmp_path):
    options = ("--steps", "1", "--optimizer", "branch_kfac", "--seed", "3")
    result = run("benchmarks/tournament.py", "state_space", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("branch_kfac *") == 1
    assert "sgd *" not in result.stdout
    assert "adamw" not in result.stdout
    check_picture(tmp_path / "state_space.png")


@pytest.mark.parametrize(
    ("script", "arguments", "texts"),
    [
        (
            "laplace_calibration.py",
            ("--images", "60", "--samples", "8"),
            ("Laplace, last layer", "Laplace, all layers", "log-evidence", "twice that", "ECE"),
        ),
        (
            "influence_retraining.py",
            ("--groups", "3"),
            ("gradients alone", "EKFAC", "Gauss-Newton", "that hurt"),
        ),
    ],
)
def test_measurements_of_curvature(script, arguments, texts, tmp_path):
    options = ("--steps", "3", *arguments, "--out", "picture.png")
    result = run(f"benchmarks/{script}", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for text in texts:
        assert text in result.stdout
    assert "nan" not in result.stdout.split()
    check_picture(tmp_path / "picture.png")


def test_optimizers_are_measured_on_a_transformer(tmp_path):
    names = ("adamw", "muon", "soap")
    options = ("--tiny", "--only", *names, "--dtypes", "float32", "--seconds", "0", "--out", "new")
    result = run("benchmarks/gpu.py", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    for text in ("gradient (plain", "state MiB", "Whole training steps", "branch_kfac is left out"):
        assert text in result.stdout
    messages = json.loads((tmp_path / "new" / "results.json").read_text())
    for kind in ("update", "train"):
        figures = {m["name"]: m for m in messages if kind in m}
        assert set(figures) == set(names)
        assert all(m["finite"] and m["mean_s"] > 0 for m in figures.values())
        # Ten steps are a cycle, with one refresh.
        assert (figures["soap"]["steps"], figures["soap"]["refreshed_steps"]) == (10, 1)
    losses = {tuple(m["losses"][:1]) for m in messages if "train" in m}
    assert len(losses) == 1  # all begin with the same parameters
    assert "nan" not in (tmp_path / "new" / "results.md").read_text()


def test_measurements_go_on_after_one_that_hangs_or_dies(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu_supervisor import supervise

    script = """if True:
        import json, os, sys, time
        for name in sys.argv[1:]:
            print(json.dumps({"begin": name}), flush=True)
            if name == "hangs":
                time.sleep(100)
            if name == "dies":
                os._exit(3)
            print("a warning", flush=True)
            print(json.dumps({"figure": name}), flush=True)
            print(json.dumps({"end": name}), flush=True)
    """
    names = ("first", "hangs", "second", "dies", "third")
    command = (sys.executable, "-I", "-c", script)
    deadline = time.monotonic() + 100
    messages = list(supervise(lambda left: [*command, *left], names, limit=5.0, deadline=deadline))
    figures = [name for name, message in messages if message.get("figure") == name]
    assert figures == ["first", "second", "third"]
    failures = {name: message["failed"] for name, message in messages if "failed" in message}
    assert set(failures) == {"hangs", "dies"}
    assert "5 s, is over" in failures["hangs"]
    assert "code 3" in failures["dies"]
    assert messages.count(("first", {"note": "a warning"})) == 1


def test_what_the_compiler_says_of_many_devices(tmp_path):
    options = ("--tiny", "--optimizers", "adamw", "soap", "--json", "figures.json")
    result = run("benchmarks/scale.py", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    for text in ("Measured, by the compiler", "Modelled", "6 all-to-all", "pass soap: state"):
        assert text in result.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["adamw"]["operations"] == []
    # Of blocks [m, n] SOAP multiplies 8·mn·(m + n) and of those with one dense axis 8·mn·m, on
    # each of 8 devices; a vocabulary has [2000, 128] and takes a device for itself.
    blocks = [(4, 128, 128), (6, 172, 128)]
    expected = sum(n * 8 * a * b * (a + b) for n, a, b in blocks) + 8 * 2000 * 128**2
    done = [x for x in figures["soap"]["operations"] if x["kind"] == "dot"]
    assert sum(x["total"] for x in done if x["when"] == "always") == expected
    # First bases, and a refresh: for each basis one product of 2·d³ operations, and what makes it
    # orthonormal, about 6·d³ in panels of 128, which pad 172 rows. It is counted once, as how often
    # it is done is not known before.
    due = sum(x["total"] for x in done if x["when"] == "due")
    cubes = (2 * 4 + 6 + 1) * 128**3 + 6 * 172**3
    assert 2 * (2 + 4) * cubes < due < 2 * (2 + 8) * cubes
    kinds = {x["kind"] for x in figures["soap"]["operations"]}
    assert not kinds & {"geqrf", "orgqr", "syevd"}


def test_examples_are_short_and_use_public_names_alone():
    for path in (ROOT / "examples").glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 120, path.name
        assert "optax_kron." not in text.replace("optax_kron as ok", ""), path.name
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 200, path.name


@pytest.fixture
def stop(monkeypatch, capsys):
    """Runs a script in this process up to its exit; returns the exit code and what it printed."""

    def run_and_stop(script, *arguments):
        path = ROOT / script
        monkeypatch.syspath_prepend(str(path.parent))
        monkeypatch.setattr(sys, "argv", [path.name, *arguments])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(path), run_name="__main__")
        return caught.value.code, capsys.readouterr()

    return run_and_stop


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("digits.py", ("--optimizer", "--batch-size")),
        ("digits_kfac.py", ("--optimizer", "--batch-size")),
        ("digits_nnx.py", ("--batch-size", "--learning-rate")),
        ("autoencoder.py", ("--optimizer",)),
        ("characters.py", ()),
        ("compare.py", ("--optimizer",)),
        ("gpt.py", ("--optimizer",)),
        ("contest.py", ("--optimizer", "--layers", "--width", "--context", "--batch")),
        ("state_space.py", ("--optimizer", "--batch-size")),
        ("laplace.py", ("--images", "--samples")),
        ("pinn.py", ("--optimizer", "--equation")),
        ("influence.py", ()),
        ("two_processes.py", ("--batch-size", "--save-every")),
        ("vmc.py", ("--optimizer", "--atom", "--walkers", "--blocks")),
    ],
)
def test_help(script, options, stop):
    code, printed = stop(f"examples/{script}", "--help")
    assert code == 0
    for option in ("--steps", "--seed", "--out", *options):
        assert option in printed.out


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("digits.py", ["--steps", "0"], "expected an integer of at least 1, got '0'"),
        ("digits.py", ["--batch-size", "5000"], "expected at most 1297 training images, got 5000"),
        ("digits.py", ["--optimizer", "sgd"], "invalid choice: 'sgd'"),
        ("digits.py", ["--out", "curves.txt"], "expected the path of a .png file"),
        ("laplace.py", ["--images", "5000"], "expected at most 1297 training images, got 5000"),
        ("digits_nnx.py", ["--steps", "many"], "expected an integer of at least 1, got 'many'"),
    ],
)
def test_bad_arguments_are_refused(script, arguments, message, stop):
    code, printed = stop(f"examples/{script}", *arguments)
    assert code == 2
    assert message in printed.err


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("tournament.py", ["autoencoder", "--optimizer", "both"], "invalid choice: 'both'"),
        ("tournament.py", ["characters", "--steps", "0"], "expected an integer of at least 1"),
        ("tournament.py", ["everything"], "invalid choice: 'everything'"),
        ("gpu.py", ["--only", "sgd"], "invalid choice: 'sgd'"),
        ("influence_retraining.py", ["--groups", "2"], "expected at least 3 groups, got '2'"),
        ("influence_retraining.py", ["--weight-decay", "0"], "expected a number above 0, got '0'"),
    ],
)
def test_benchmarks_refuse_bad_arguments(script, arguments, message, stop):
    code, printed = stop(f"benchmarks/{script}", *arguments)
    assert code == 2
    assert message in printed.err


def test_table_of_tasks_tells_when_a_loss_was_reached(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    table = importlib.import_module("tasks_table")

    def run(rate, *losses, seconds=1.0):
        steps = list(range(0, 10 * len(losses), 10))
        return {"rate": rate, "steps": steps, "losses": losses, "step_seconds": seconds}

    results = {
        ("task", "adamw"): [run(0.1, 9.0, 5.0, 3.0), run(0.3, 9.0, 3.0, 2.0)],
        ("task", "soap"): [run(0.1, 9.0, 4.0, 0.0, seconds=3.0), run(0.3, 9.0, None, None)],
        ("task", "slow"): [run(0.1, 9.0, 8.0, 7.0)],
    }
    # Between 4 at the tenth step and 0 at the twentieth, AdamW's 2 is at the fifteenth.
    assert table.shares(results, "task", "soap") == (0.75, 2.25)
    assert table.shares(results, "task", "adamw") == (1.0, 1.0)
    assert table.share(table.shares(results, "task", "slow")[0]) == "never"
    assert table.good_rates(results["task", "adamw"]) == 1
