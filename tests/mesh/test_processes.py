"""Two processes of four devices each, as two hosts: one may die, and any mesh goes on."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.subprocess, pytest.mark.timeout(600)]

HOST = Path(__file__).parent / "host.py"
EXAMPLES = HOST.parents[2] / "examples"


@pytest.fixture
def launch(monkeypatch):
    """That of the examples; a few steps are no reason to optimise programs."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    from processes import launch_hosts

    return launch_hosts


def losses(folder):
    """By step, in digits as they are printed, of which there are enough to tell all numbers."""
    lines = (folder / "losses").read_text().splitlines()
    return dict(line.split() for line in lines)


def arrays(path):
    with np.load(path) as kept:
        return [kept[name] for name in kept.files]


@pytest.mark.parametrize(
    ("optimizer", "axes", "kill"), [("soap", "Explicit", "1"), ("kfac", "Auto", "0 1")]
)
def test_what_was_killed_goes_on_from_the_last_checkpoint(optimizer, axes, kill, launch, tmp_path):
    first = tmp_path / "killed"
    command = [str(HOST), optimizer, axes, "--folder"]
    with pytest.raises(RuntimeError, match=r"a host failed, .*-9"):
        launch([*command, str(first), "--kill", *kill.split()], hosts=2, devices=4)
    saved, before = arrays(first / "saved.npz"), losses(first)
    assert {"1", "5"} <= before.keys()
    assert "7" not in before
    goes_on = {}
    for hosts, devices in ((2, 4), (1, 4), (1, 1)):
        folder = tmp_path / f"{hosts} of {devices}"
        shutil.copytree(first, folder)
        (folder / "losses").unlink()
        launch([*command, str(folder)], hosts=hosts, devices=devices)
        # Stacks have as many rows as there are devices; those that go were padding.
        restored = arrays(folder / "restored.npz")
        assert {len(x) for x in restored if x.ndim == 3} == {hosts * devices}
        for x, resized, whole in zip(restored, arrays(folder / "resized.npz"), saved, strict=True):
            np.testing.assert_array_equal(x, resized)
            np.testing.assert_array_equal(x, whole[: len(x)] if x.ndim else whole)
        after = losses(folder)
        assert sorted(after) == ["4", "5", "6", "7"]
        # The same program on the same devices: bit by bit.
        assert hosts == 1 or after["5"] == before["5"]
        # On others sums have another order.
        goes_on = goes_on or before | after
        assert all(abs(float(x) - float(goes_on[step])) < 1e-5 for step, x in after.items())


SLEEP = "import time; time.sleep(60)"
FAIL = "import sys, time; '0' in sys.argv[-1] or sys.exit(3); time.sleep(60)"


@pytest.mark.parametrize(
    ("script", "seconds", "message"),
    [(SLEEP, 1, "2 hosts took longer than 1 seconds"), (FAIL, 50, r"exit codes \[None, 3\]")],
)
def test_hosts_that_hang_or_fail_are_an_error(script, seconds, message, launch):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=message):
        launch(["-c", script], hosts=2, devices=1, seconds=seconds)
    assert time.monotonic() - start < 30
