"""The examples run as a reader would run them: in a process of their own, from another folder."""

import os
import runpy
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TIME_LIMIT = 170  # seconds; compilation dominates


def run(script, *arguments, cwd):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "100", "JAX_PLATFORMS": "cpu", "NO_COLOR": "1"},
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


def test_digits_prints_the_table_and_draws_the_curves(tmp_path):
    result = run(
        "digits.py", "--steps", "7", "--batch-size", "16", "--out", "new/curves.png", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    for text in ("kron_psgd", "adamw", "to 97%", "final", "accuracy", "per", "compile", "KiB"):
        assert text in result.stdout
    # One starred row for each optimizer, and three rows each.
    assert result.stdout.count("adamw *") == 1
    assert result.stdout.count("kron_psgd *") == 1
    width, height, pixels = read_png(tmp_path / "new" / "curves.png")
    assert width > 1000
    assert height > 400
    assert len(set(pixels)) > 50  # a blank picture would hold a handful of values


def test_digits_runs_one_optimizer_alone(tmp_path):
    result = run("digits.py", "--steps", "1", "--optimizer", "adamw", "--seed", "3", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "kron_psgd" not in result.stdout
    read_png(tmp_path / "digits.png")


@pytest.mark.parametrize(
    ("script", "names", "texts"),
    [
        ("autoencoder.py", ("adamw", "kron_psgd", "kfac"), ("params/Dense_7/kernel", "to 17.5")),
        ("digits_kfac.py", ("adamw", "kfac"), ("params/Conv_2/kernel", "to 97%")),
        ("characters.py", ("adamw", "kfac"), ("MultiHeadDotProductAttention_0/query", "held-out")),
    ],
)
def test_comparisons_with_kfac(script, names, texts, tmp_path):
    result = run(script, "--steps", "2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for text in texts:
        assert text in result.stdout
    for name in names:
        assert result.stdout.count(f"{name} *") == 1
    # The table of layers is whole, and every parameter has a Kronecker block.
    assert "layer  " in result.stdout
    assert "without a Kronecker block" not in result.stdout
    width, height, pixels = read_png(tmp_path / script.replace(".py", ".png"))
    assert width > 1000
    assert height > 400
    assert len(set(pixels)) > 50


@pytest.mark.parametrize("script", ["compare.py", "state_space.py"])
def test_comparisons_with_branch_kfac(script, tmp_path):
    result = run(script, "--steps", "1", "--optimizer", "branch_kfac", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("branch_kfac *") == 1
    read_png(tmp_path / script.replace(".py", ".png"))


def test_layers_are_found_only_for_kfac(tmp_path):
    result = run("autoencoder.py", "--steps", "1", "--optimizer", "adamw", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "kfac" not in result.stdout
    assert "params/Dense_7/kernel" not in result.stdout


def test_digits_nnx_trains(tmp_path):
    result = run("digits_nnx.py", "--steps", "3", "--batch-size", "16", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Test accuracy after 3 steps:" in result.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "texts"),
    [
        (
            "laplace.py",
            ("--steps", "20", "--images", "60", "--samples", "8"),
            ("Laplace, last layer", "Laplace, all layers", "log-evidence", "twice that", "ECE"),
        ),
        (
            "influence.py",
            ("--steps", "20", "--groups", "3"),
            ("params/Dense_1/kernel", "gradients alone", "EKFAC", "Gauss-Newton", "that hurt"),
        ),
    ],
)
def test_uses_of_curvature(script, arguments, texts, tmp_path):
    result = run(script, *arguments, "--out", "new/picture.png", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for text in texts:
        assert text in result.stdout
    assert "nan" not in result.stdout.split()
    width, height, pixels = read_png(tmp_path / "new" / "picture.png")
    assert width > 1000
    assert height > 400
    assert len(set(pixels)) > 50


@pytest.fixture
def stop(monkeypatch, capsys):
    """Runs a script in this process up to its exit; returns the exit code and what it printed."""

    def run_and_stop(script, *arguments):
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return caught.value.code, capsys.readouterr()

    return run_and_stop


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("digits.py", ("--optimizer", "--batch-size", "--out")),
        ("digits_kfac.py", ("--optimizer", "--batch-size", "--out")),
        ("digits_nnx.py", ("--batch-size", "--learning-rate")),
        ("autoencoder.py", ("--optimizer", "--out")),
        ("characters.py", ("--optimizer", "--out")),
        ("laplace.py", ("--images", "--samples", "--out")),
        ("influence.py", ("--weight-decay", "--groups", "--out")),
    ],
)
def test_help(script, options, stop):
    code, printed = stop(script, "--help")
    assert code == 0
    for option in ("--steps", "--seed", *options):
        assert option in printed.out


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("digits.py", ["--steps", "0"], "expected a whole number of at least 1, got '0'"),
        ("digits.py", ["--batch-size", "5000"], "expected at most 1297 training images, got 5000"),
        ("digits.py", ["--optimizer", "sgd"], "invalid choice: 'sgd'"),
        ("digits.py", ["--out", "curves.txt"], "expected the path of a .png file"),
        ("autoencoder.py", ["--optimizer", "both"], "invalid choice: 'both'"),
        ("characters.py", ["--steps", "0"], "expected a whole number of at least 1, got '0'"),
        ("laplace.py", ["--images", "5000"], "expected at most 1297 training images, got 5000"),
        ("influence.py", ["--groups", "2"], "expected a whole number of at least 3, got '2'"),
        ("influence.py", ["--weight-decay", "0"], "expected a number above 0, got '0'"),
        ("digits_nnx.py", ["--steps", "many"], "expected a whole number of at least 1, got 'many'"),
    ],
)
def test_bad_arguments_are_refused(script, arguments, message, stop):
    code, printed = stop(script, *arguments)
    assert code == 2
    assert message in printed.err
