"""Fixtures that every test may ask for.

Most of a test's time is compilation, so that programs are compiled without optimisation, and by the
older of two code generators, which takes half the time.
"""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys

QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)


def known_flags():
    """Those of QUICK that this version of XLA knows: it ends the process for any other."""
    script = "import jax; jax.devices('cpu')"
    for flags in (QUICK, QUICK[:1]):
        environment = {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", script]
        if not subprocess.run(command, env=environment, stderr=subprocess.DEVNULL).returncode:
            break
    return " ".join(flags)


# Read when JAX starts its backend, which importing it does not do; the workers inherit it.
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = known_flags()
# Threads of LAPACK would only wait for those of the other test processes.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Of a GPU the first process would take most of the memory, which all share.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import pytest

PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")
# Settings of JAX that another run of the same tests may change, by its environment.
VARIED = (
    "jax_remat3",
    "jax_custom_vjp3",
    "jax_custom_jvp3",
    "jax_remat_barrier_no_cotangents",
    "jax_numpy_rank_promotion",
    "jax_default_matmul_precision",
)


def pytest_configure():
    """Off the CPU, float32 products are as exact as there; GPUs would round to ten bits."""
    if jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", "highest")


def pytest_report_header():
    """Which Python, packages, devices and settings of JAX are tested."""
    versions = (f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    settings = (
        f"{name}={getattr(jax.config, name)}" for name in VARIED if hasattr(jax.config, name)
    )
    return [
        f"versions: Python {platform.python_version()}, {', '.join(versions)}",
        f"device: {jax.devices()[0].device_kind}",
        f"settings: {', '.join(settings)}",
    ]


def _group(item):
    """Tests that share compiled programs: of one row of the contract's table, or of one file.

    One that is marked as a `subprocess` shares none, and is free for any worker.
    """
    if item.get_closest_marker("subprocess"):
        return item.nodeid
    parameters = getattr(item, "callspec", None)
    row = parameters.params.get("row") if parameters else None
    return item.nodeid.split("::")[0] if row is None else f"row {row}"


def pytest_collection_modifyitems(items):
    """Tests of one group run side by side, and in one worker."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    items.sort(key=_group)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Compiled programs go with their group.

    Each takes some mappings of memory, of which Linux allows a process 65,530. All of the suite's
    are more, and a compilation that gets none ends the process.
    """
    if nextitem is None or _group(item) != _group(nextitem):
        jax.clear_caches()


@contextlib.contextmanager
def _setting(name, value):
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


@pytest.fixture
def x64():
    """64-bit types on for this test."""
    with _setting("jax_enable_x64", True):
        yield


@pytest.fixture
def strict_promotion():
    """No implicit promotion between dtypes for this test."""
    with _setting("jax_numpy_dtype_promotion", "strict"):
        yield


@pytest.fixture
def nan_is_an_error():
    """Any operation whose result holds a NaN raises FloatingPointError in this test."""
    with _setting("jax_debug_nans", True):
        yield
