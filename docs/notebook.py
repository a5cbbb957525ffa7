"""Shows the notebook of the examples as a page of the site, with the outputs that it holds."""

import base64
import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

NOTEBOOK = "examples/tour.ipynb"
PAGE = "tour.md"
COPY = "assets/tour.ipynb"
DOWNLOAD = f"[This page as a notebook]({COPY}); `make notebook` runs it anew.\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page, its pictures and the notebook itself."""
    path = Path(config.config_file_path).parent / NOTEBOOK
    text = path.read_text(encoding="utf-8")
    pictures: dict[str, bytes] = {}
    parts = [part for cell in json.loads(text)["cells"] for part in cell_parts(cell, pictures)]
    # The title stays the first line.
    page = "\n".join([parts[0], DOWNLOAD, *parts[1:]])
    files.append(File.generated(config, PAGE, content=page))
    files.append(File.generated(config, COPY, content=text))
    for name, picture in pictures.items():
        files.append(File.generated(config, name, content=picture))
    return files


def cell_parts(cell: dict[str, Any], pictures: dict[str, bytes]) -> list[str]:
    """Markdown of a cell and of its outputs; the pictures go where they are kept by name."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [f"{source}\n"]
    parts = [fenced("python", source)]
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            name = f"assets/tour-{len(pictures) + 1}.png"
            pictures[name] = base64.b64decode(data["image/png"])
            parts.append(f"![{cell['metadata']['alt']}]({name})\n")
        elif text := "".join(output.get("text", data.get("text/plain", ""))):
            parts.append(fenced("text", text))
        else:
            raise PluginError(
                f"{NOTEBOOK}: a cell that begins {source[:40]!r} has an output of the type "
                f"{output['output_type']!r}, of which no page can be made; expected text or a PNG"
            )
    return parts


def fenced(language: str, text: str) -> str:
    """A block of code or of text."""
    return f"```{language}\n{text.rstrip()}\n```\n"
