"""What takes several devices is tested in processes of its own, with eight virtual ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.subprocess

HERE = Path(__file__).parent
CASES = sorted(path.name for path in HERE.glob("devices_*.py"))


@pytest.mark.timeout(900)  # of a whole file; within it each test has the limit of all others
@pytest.mark.parametrize("name", CASES)
def test_on_eight_devices(name):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    options = ("-q", "-p", "no:cacheprovider", "-o", "python_files=devices_*.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(HERE / name)],
        cwd=HERE.parents[1],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
