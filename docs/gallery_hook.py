"""Fill the pages of the gallery with what their examples say and with what their runs printed.

The page docs/gallery/NAME.md belongs to examples/NAME.py, the picture NAME.png and the record
NAME.txt, which `make gallery` writes. It is written by hand, but for these lines:

    <!-- example: docstring -->       what the example says of itself
    <!-- example: code train main.layers -->
                                      functions, classes and assignments, those in a function too
    <!-- example: output -->          what the recorded run printed
    <!-- example: output params | step  200 -->
                                      its lines with one of these texts, and all folded below
    <!-- example: command -->         how it was run, and where

In the index `<!-- gallery: cards NAME NAME -->` becomes a grid of pictures that lead to the pages.
Nothing of mkdocs is imported, so that tests need no more than Python.
"""

import ast
import hashlib
import html
import re
import textwrap
from pathlib import Path

FOLDER = "gallery"
PART = re.compile(r"^<!-- (example|gallery): (\w+)(?: (.*?))? -->$", re.MULTILINE)
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
# Python-Markdown leaves lists in raw HTML alone, so the grid is put around one that is rendered.
OPEN, CLOSE = "<!-- cards -->", "<!-- end of cards -->"
CARDS = re.compile(rf"{OPEN}\s*(<ul>.*?</ul>)\s*{CLOSE}", re.DOTALL)
CHANGED = """!!! note
    The example has changed since this run was recorded: `make gallery ARGS={name}` records it anew.

"""


def on_page_markdown(markdown, page, config, files):
    """Replaces the lines above in every page of the gallery."""
    del files
    uri = Path(page.file.src_uri)
    if uri.parts[0] != FOLDER:
        return markdown
    return fill(markdown, Path(config.config_file_path).parent, uri.stem)


def on_page_content(html, page, config, files):
    """Puts the list of cards into the grid of the theme."""
    del config, files
    if not page.file.src_uri.startswith(f"{FOLDER}/"):
        return html
    return CARDS.sub(r'<div class="grid cards">\1</div>', html)


def fill(markdown: str, root: Path, name: str) -> str:
    """A page whose lines are replaced by what they stand for."""
    made = {
        ("example", "docstring"): lambda _: docstring(root, name),
        ("example", "code"): lambda items: fence("python", code(root, name, items.split())),
        ("example", "output"): lambda text: output(root, name, text),
        ("example", "command"): lambda _: command(root, name),
        ("gallery", "cards"): lambda names: cards(root, names.split()),
    }

    def replace(match):
        kind, part, rest = match.groups()
        if (kind, part) not in made:
            raise ValueError(f"docs/{FOLDER}/{name}.md: {match[0]!r} is none of {sorted(made)}.")
        return made[kind, part](rest or "")

    return PART.sub(replace, markdown)


def docstring(root: Path, name: str) -> str:
    """The docstring of an example, without the command at its end."""
    text = ast.get_docstring(ast.parse(source(root, name))) or ""
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(p for p in paragraphs if not p.strip().startswith("python examples/"))


def source(root: Path, name: str) -> str:
    """The source of an example."""
    return (root / "examples" / f"{name}.py").read_text(encoding="utf-8")


def code(root: Path, name: str, items: list[str]) -> str:
    """Parts of the source as they stand, such as `train` or, in its body, `train.step`."""
    text = source(root, name)
    lines, tree = text.splitlines(), ast.parse(text)
    parts, last = [], None
    for item in items:
        first, end = span(lines, tree, f"examples/{name}.py", item)
        # Statements that follow each other stay together.
        parts.append("" if last is None else "\n" if first == last else "\n\n")
        parts.append(textwrap.dedent("\n".join(lines[first:end])))
        last = end
    return "".join(parts)


def span(lines: list[str], tree: ast.Module, path: str, item: str) -> tuple[int, int]:
    """First line and the one after the last, with decorators and comments right above."""
    node: ast.AST = tree
    for part in item.split("."):
        found = [child for child in getattr(node, "body", []) if part in names(child)]
        if not found:
            raise ValueError(f"{path} has no {item!r}: expected a function, class or assignment.")
        node = found[0]
    decorators = getattr(node, "decorator_list", [])
    first = min(x.lineno for x in (node, *decorators)) - 1
    while first and lines[first - 1].strip().startswith("#"):
        first -= 1
    return first, node.end_lineno


def names(node: ast.AST) -> set[str]:
    """What a statement defines: itself, or the names that it assigns."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.Expr):
        return {
            x.id for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)
        }
    return set()


def record(root: Path, name: str) -> tuple[dict[str, str], list[str]]:
    """What is known of the recorded run, and the lines that it printed."""
    path = root / "docs" / FOLDER / f"{name}.txt"
    head, _, body = path.read_text(encoding="utf-8").partition("\n\n")
    known = dict(line.split(": ", 1) for line in head.splitlines())
    return known, body.splitlines()


def output(root: Path, name: str, text: str) -> str:
    """The printed lines, or those with one of some texts and all of them folded below."""
    lines = record(root, name)[1]
    if not text:
        return fence("text", "\n".join(lines))
    shown = [line for line in lines if any(part in line for part in text.split(" | "))]
    if not shown:
        raise ValueError(f"docs/{FOLDER}/{name}.txt has no line with {text!r}.")
    everything = html.escape("\n".join(lines))
    folded = f"<details><summary>All that it printed</summary><pre>{everything}</pre></details>"
    # A blank line would end the raw HTML.
    return fence("text", "\n".join(shown)) + "\n\n" + re.sub(r"\n(?=\n)", "\n&nbsp;", folded)


def command(root: Path, name: str) -> str:
    """The command, the machine and the time; and whether the example has changed since."""
    known, _ = record(root, name)
    note = CHANGED.format(name=name) if known["program"] != fingerprint(root, name) else ""
    run = fence("sh", known["command"])
    return f"{note}{run}\n\nRecorded with {known['with']}, in {known['seconds']} seconds."


def fingerprint(root: Path, name: str) -> str:
    """A hash of an example and the neighbours that it imports, but for docstrings and comments."""
    digest, waiting, seen = hashlib.sha256(), [name], set()
    while waiting:
        module = waiting.pop()
        if module in seen or not (root / "examples" / f"{module}.py").exists():
            continue
        seen.add(module)
        text = source(root, module)
        tree, documented = ast.parse(text), set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                waiting.append(node.module or "")
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                documented.update(range(node.lineno - 1, node.end_lineno))
        kept = [line for i, line in enumerate(text.splitlines()) if i not in documented]
        kept = [line for line in kept if line.strip() and not line.strip().startswith("#")]
        digest.update("\n".join([module, *kept]).encode())
    return digest.hexdigest()[:12]


def cards(root: Path, names: list[str]) -> str:
    """A list of pictures and titles, each with the first sentence of its example."""
    items = []
    for name in names:
        page = (root / "docs" / FOLDER / f"{name}.md").read_text(encoding="utf-8")
        title = page.splitlines()[0].removeprefix("# ")
        alt, picture = PICTURE.search(page).groups()
        first = " ".join(docstring(root, name).split("\n\n")[0].split())
        paragraphs = [
            f"[![{alt}]({picture}){{ loading=lazy }}]({name}.md)",
            f"[{title}]({name}.md)",
        ]
        items.append("-   " + "\n\n    ".join([*paragraphs, first]))
    return "\n\n".join([OPEN, *items, CLOSE])


def fence(language: str, text: str) -> str:
    """A block of code."""
    return f"```{language}\n{text}\n```"
