"""What has to hold where nothing is installed but the wheel and its dependencies.

python -I tests/package/smoke.py
"""

import importlib.metadata
import importlib.util
import runpy
from pathlib import Path

import optax_kron as ok

# Extras, of which the library must not need one.
EXTRAS = ["chex", "equinox", "flax", "haiku", "lineax", "matplotlib", "pytest", "sklearn"]


def main() -> None:
    """Checks where the package comes from and what it says of itself, and trains with it."""
    package = Path(ok.__file__).parent
    installed = importlib.metadata.distribution("optax_kron")
    assert package.parent.name == "site-packages", f"{package} is not the installed package"
    assert Path(str(installed.locate_file("optax_kron"))) == package
    assert ok.__version__ == installed.version, f"{ok.__version__} is not {installed.version}"
    assert (package / "py.typed").is_file(), f"{package} has no py.typed"
    here = [name for name in EXTRAS if importlib.util.find_spec(name)]
    assert not here, f"the environment is not bare: it has {', '.join(here)}"
    for name in ok.__all__:
        assert getattr(ok, name).__doc__, f"optax_kron.{name} has no docstring"
    runpy.run_path(str(Path(__file__).with_name("consumer.py")), run_name="__main__")
    print(f"optax_kron {ok.__version__} works from {package}")


if __name__ == "__main__":
    main()
