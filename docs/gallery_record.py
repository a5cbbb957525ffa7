"""Run examples and keep what they print and draw for the gallery: `make gallery`.

python docs/gallery_record.py           # all of them, in an hour on two cores
python docs/gallery_record.py digits    # some
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from gallery_hook import FOLDER, fingerprint
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
# What each is run with: fewer steps, or one optimizer, where its defaults take many minutes.
RUNS = {
    "digits": "",
    "digits_nnx": "",
    "digits_kfac": "",
    "autoencoder": "",
    "characters": "",
    "compare": "--steps 60",
    "laplace": "",
    "influence": "",
    "state_space": "",
    "pinn": "--equation poisson --steps 60",
    "vmc": "--steps 50 --walkers 256",
    "gpt": "--optimizer soap",
    "contest": "",
}
SETTINGS = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
WIDTH, LARGEST = 1000, 150_000  # of a picture: pixels, and bytes that it stays below


def record(name: str) -> None:
    """Runs an example, and writes its picture and what it printed."""
    folder = ROOT / "docs" / FOLDER
    with tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch, f"{name}.png")
        arguments = [f"examples/{name}.py", *RUNS[name].split(), "--out", str(picture)]
        # A cache of compiled programs would belie the times that some print.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | SETTINGS
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        seconds = time.monotonic() - start
        # Neither where the picture went, nor bars of progress.
        lines = [x.rstrip() for x in done.stdout.splitlines() if not x.startswith("Picture:")]
        printed = "\n".join(x for x in lines if "━" not in x).strip("\n")
        shrink(picture, folder / f"{name}.png")
    options = f' ARGS="{RUNS[name]}"' if RUNS[name] else ""
    versions = f"Python {platform.python_version()}, JAX {metadata.version('jax')}"
    head = {
        "command": f"make demo-{name}{options}",
        "with": f"{versions}, on {os.cpu_count()} CPU cores",
        "seconds": f"{seconds:.0f}",
        "program": fingerprint(ROOT, name),
    }
    text = "\n".join(f"{key}: {value}" for key, value in head.items())
    (folder / f"{name}.txt").write_text(f"{text}\n\n{printed}\n", encoding="utf-8")
    sys.stdout.write(f"{name}: {seconds:.0f} s\n")


def shrink(source: Path, target: Path) -> None:
    """Writes a PNG of the width of a page, with as many colours as there is room for."""
    with Image.open(source) as image:
        size = WIDTH, round(image.height * WIDTH / image.width)
        small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    for colours in (256, 128, 64, 32, 16):
        small.quantize(colours, dither=Image.Dither.NONE).save(target, optimize=True)
        if target.stat().st_size < LARGEST:
            return
    raise ValueError(f"{source}: {target.stat().st_size} bytes with 16 colours, above {LARGEST}.")


def main() -> None:
    """Records the examples that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"some of: {', '.join(RUNS)}")
    given = parser.parse_args().names
    if unknown := [name for name in given if name not in RUNS]:
        parser.error(f"no example is named {unknown[0]!r}; expected some of {', '.join(RUNS)}")
    for name in given or RUNS:
        record(name)


if __name__ == "__main__":
    main()
