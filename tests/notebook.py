"""Runs a notebook from its first cell to its last, and writes it with the outputs of that run.

python -m tests.notebook examples/tour.ipynb --out out/tour.ipynb
"""

import argparse
from pathlib import Path

import nbclient
import nbformat

# What a notebook says of where it was run, besides its outputs: nothing.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def main() -> None:
    """Ends with an error at the first cell that does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--out", type=Path, help="the notebook itself by default")
    arguments = parser.parse_args()
    notebook = nbformat.read(arguments.notebook, as_version=4)
    nbclient.NotebookClient(notebook, timeout=150, record_timing=False).execute()
    notebook.metadata = METADATA
    nbformat.write(notebook, arguments.out or arguments.notebook)


if __name__ == "__main__":
    main()
