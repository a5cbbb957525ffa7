"""Every example has a page in the gallery, with a picture, a recorded run and its source."""

import ast
import importlib.util
import re
import struct
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GALLERY = ROOT / "docs" / "gallery"
# Its page is docs/scale.md.
WITHOUT_PAGE = {"two_processes"}
EXAMPLES = sorted(
    path.stem
    for path in (ROOT / "examples").glob("*.py")
    if "__main__" in path.read_text() and path.stem not in WITHOUT_PAGE
)


@pytest.fixture(scope="module")
def hook():
    spec = importlib.util.spec_from_file_location("gallery_hook", ROOT / "docs/gallery_hook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_page_and_every_page_an_example():
    assert sorted(path.stem for path in GALLERY.glob("*.md")) == sorted([*EXAMPLES, "index"])
    for suffix in ("png", "txt"):
        assert sorted(path.stem for path in GALLERY.glob(f"*.{suffix}")) == EXAMPLES


def test_every_page_is_in_the_index_and_in_the_navigation():
    index = (GALLERY / "index.md").read_text()
    named = [name for names in re.findall(r"cards (.*) -->", index) for name in names.split()]
    assert sorted(named) == EXAMPLES
    in_order = re.findall(r"- gallery/(\w+)\.md", (ROOT / "mkdocs.yml").read_text())
    assert in_order == ["index", *named]


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_page_shows_picture_source_and_record(name, hook):
    page = (GALLERY / f"{name}.md").read_text()
    pictures = hook.PICTURE.findall(page)
    assert [target for _, target in pictures] == [f"{name}.png"]
    assert len(pictures[0][0].split()) > 5, "the picture needs a text in words"
    parts = {part for _, part, _ in hook.PART.findall(page)}
    assert parts == {"docstring", "code", "output", "command"}
    # Of a name that is not there, or a line that was not printed, this is an error.
    filled = hook.fill(page, ROOT, name)
    assert "<!--" not in filled
    assert "```python\n" in filled
    known, lines = hook.record(ROOT, name)
    assert known["command"].startswith(f"make demo-{name}")
    assert lines


def test_every_example_was_recorded_as_it_would_be_again(hook):
    tree = ast.parse((ROOT / "docs/gallery_record.py").read_text())
    (runs,) = [x.value for x in tree.body if "RUNS" in hook.names(x)]
    runs = ast.literal_eval(runs)
    assert sorted(runs) == EXAMPLES
    for name, options in runs.items():
        command = f"make demo-{name}" + (f' ARGS="{options}"' if options else "")
        assert hook.record(ROOT, name)[0]["command"] == command


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_picture_is_small_enough_for_a_page(name):
    content = (GALLERY / f"{name}.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(content) < 150_000
    width, height = struct.unpack(">II", content[16:24])
    assert 600 <= width <= 1200
    assert height >= 250


def test_cards_lead_to_pages_with_pictures_and_sentences(hook):
    filled = hook.fill((GALLERY / "index.md").read_text(), ROOT, "index")
    for name in EXAMPLES:
        assert f"]({name}.png)" in filled
        assert filled.count(f"]({name}.md)") == 2  # of the picture and of the title


@pytest.fixture
def root(tmp_path):
    """An example that imports a neighbour, its page's record, and nothing else."""
    for folder in ("examples", "docs/gallery"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "examples/neighbour.py").write_text('"""Shared."""\n\nWIDTH = 3\n')
    (tmp_path / "examples/one.py").write_text(
        '"""What it shows, in one sentence.\n\nMore.\n\n    python examples/one.py --help\n"""\n\n'
        "import functools\n\nfrom neighbour import WIDTH\n\n\n"
        "def train(steps):\n"
        '    """Trains."""\n'
        "    rate = 0.1\n"
        "    # Why it is compiled once.\n"
        "    @functools.cache\n"
        "    def step(x):\n"
        "        return rate * x * WIDTH\n\n"
        "    return step(steps)\n"
    )
    record = "command: make demo-one\nwith: JAX\nseconds: 3\nprogram: 0\n\na < b\n\nlast line\n"
    (tmp_path / "docs/gallery/one.txt").write_text(record)
    return tmp_path


def test_a_docstring_is_shown_without_the_command(hook, root):
    page = "before\n<!-- example: docstring -->\nafter"
    assert hook.fill(page, root, "one") == "before\nWhat it shows, in one sentence.\n\nMore.\nafter"


def test_code_is_shown_with_its_comments_and_decorators(hook, root):
    filled = hook.fill("<!-- example: code train.rate train.step -->", root, "one")
    # They follow each other in the file, so here too.
    assert filled == (
        "```python\nrate = 0.1\n# Why it is compiled once.\n@functools.cache\n"
        "def step(x):\n    return rate * x * WIDTH\n```"
    )


def test_what_is_not_there_is_refused_in_words(hook, root):
    with pytest.raises(ValueError, match=r"examples/one\.py has no 'train\.steps': expected"):
        hook.fill("<!-- example: code train.steps -->", root, "one")
    with pytest.raises(ValueError, match=r"docs/gallery/one\.txt has no line with 'first'"):
        hook.fill("<!-- example: output first -->", root, "one")
    with pytest.raises(ValueError, match="<!-- example: picture -->"):
        hook.fill("<!-- example: picture -->", root, "one")


def test_chosen_lines_are_shown_above_all_of_them(hook, root):
    filled = hook.fill("<!-- example: output first | last -->", root, "one")
    assert filled.startswith("```text\nlast line\n```\n\n<details>")
    # Markdown ends raw HTML at a blank line, and `<` would begin an element.
    assert "<pre>a &lt; b\n&nbsp;\nlast line</pre>" in filled


def test_a_record_of_another_program_is_marked(hook, root):
    path, recorded = root / "docs/gallery/one.txt", hook.fingerprint(root, "one")
    assert "has changed since" in hook.fill("<!-- example: command -->", root, "one")
    path.write_text(path.read_text().replace("program: 0", f"program: {recorded}"))
    assert "has changed since" not in hook.fill("<!-- example: command -->", root, "one")
    # Words may change.
    example = root / "examples/one.py"
    example.write_text(example.read_text().replace("Trains.", "Trains, or not.\n    "))
    assert hook.fingerprint(root, "one") == recorded
    # A neighbour is part of the program.
    (root / "examples/neighbour.py").write_text("WIDTH = 4\n")
    assert "has changed since" in hook.fill("<!-- example: command -->", root, "one")


def test_the_grid_is_put_around_the_list(hook):
    class Page:
        class file:  # noqa: N801
            src_uri = "gallery/index.md"

    html = f"<p>a</p>{hook.OPEN}\n<ul>\n<li>b</li>\n</ul>\n{hook.CLOSE}<ul></ul>"
    made = hook.on_page_content(html, Page, None, None)
    assert made == '<p>a</p><div class="grid cards"><ul>\n<li>b</li>\n</ul></div><ul></ul>'
