"""The built documentation in a real browser: every page of it, also those that are added later.

`make test-site` builds the site and runs these. Each page is opened twice: light in a wide window,
and dark in one as narrow as a phone's.
"""

import contextlib
import functools
import itertools
import os
import urllib.parse
from pathlib import Path

import pytest

from tests.site import serving

SITE = Path(os.environ.get("SITE", ""))
if "SITE" not in os.environ:
    pytest.skip("`make test-site` builds the site and tests it", allow_module_level=True)
if serving.find_browser() is None:
    names = ", ".join(serving.BROWSERS)
    pytest.skip(f"no browser on the PATH: expected one of {names}", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")

AUDIT = Path(__file__).with_name("audit.js").read_text()
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
ERROR = "404.html"  # which stands for any missing page, and no other links to
MODES = {"light": serving.WIDE, "dark": serving.NARROW}
# What is typed into the search, and a page that has to be among the first ten results.
SEARCHES = {
    "tied embeddings": "language_models",
    "Hyperball": "fixed_norm",
    "Laplace": "operators",
    "checkpoint": "guides/checkpoints",
    "wave function": "wave_functions",
}


class Visitor:
    """Opens pages, each once in each mode, and tells what was seen."""

    def __init__(self, browser, address):
        self.address = address
        self.contexts = {
            scheme: serving.open_context(browser, scheme, viewport)
            for scheme, viewport in MODES.items()
        }
        self.visit = functools.cache(self.visit)

    def visit(self, page, scheme="light"):
        """What audit.js returns; and `messages` of the console, `failed` and `foreign` requests."""
        tab = self.contexts[scheme].new_page()
        messages, failed, foreign = [], [], []
        tab.on("console", lambda message: messages.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.on("requestfailed", lambda request: failed.append(request.url))
        tab.on("response", lambda reply: failed.append(reply.url) if reply.status >= 400 else None)
        tab.on("request", lambda request: foreign.append(request.url))
        tab.goto(self.address + page, wait_until="load")
        # Scripts fetch what they need after that.
        tab.wait_for_load_state("networkidle")
        found = tab.evaluate(AUDIT)
        tab.close()
        local = (self.address, "data:", "blob:")
        foreign = [url for url in foreign if not url.startswith(local)]
        return {**found, "messages": messages, "failed": failed, "foreign": foreign}

    def split(self, url):
        """The file of the site that an address is of, and its anchor; `None` if elsewhere."""
        if not url.startswith(self.address):
            return None, ""
        path, _, anchor = url.removeprefix(self.address).partition("#")
        path = urllib.parse.unquote(path.partition("?")[0])
        if path == "" or path.endswith("/"):
            path += "index.html"
        return path, urllib.parse.unquote(anchor)


def expect_none(found, what):
    assert not found, "\n  ".join([f"{what}:", *found])


@pytest.fixture(scope="module")
def visitor():
    with (
        serving.serve(SITE) as address,
        sync_api.sync_playwright() as playwright,
        contextlib.closing(serving.launch(playwright)) as browser,
    ):
        yield Visitor(browser, address)


def test_there_are_pages():
    """Or all tests of each page would hold of none."""
    assert {"index.html", "api/index.html", ERROR} <= set(PAGES)


def test_every_page_is_reached_from_the_first(visitor):
    reached, waiting = set(), ["index.html"]
    while waiting:
        page = waiting.pop()
        if page not in reached and page in PAGES:
            reached.add(page)
            waiting += [visitor.split(url)[0] for url in visitor.visit(page)["links"]]
    assert sorted(set(PAGES) - reached) == [ERROR]


@pytest.mark.parametrize("scheme", MODES)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_loads_by_itself(page, scheme, visitor):
    seen = visitor.visit(page, scheme)
    assert seen["scheme"] == {"light": "default", "dark": "slate"}[scheme]
    expect_none(seen["messages"], "what the console says")
    expect_none(seen["failed"], "requests that failed")
    expect_none(seen["foreign"], "requests to another machine")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page, visitor):
    broken = []
    for url in visitor.visit(page)["links"]:
        target, anchor = visitor.split(url)
        if target is None:
            scheme, host, *_ = urllib.parse.urlsplit(url)
            well = scheme in ("http", "https") and "." in host
        elif target in PAGES:
            well = anchor in ("", *visitor.visit(target)["ids"])
        else:
            well = (SITE / target).is_file()
        if not well:
            broken.append(url)
    expect_none(broken, "links that lead nowhere")


@pytest.mark.parametrize("scheme", MODES)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_can_be_read(page, scheme, visitor):
    seen = visitor.visit(page, scheme)
    expect_none(seen["faint"], "text with too little contrast")
    expect_none(seen["outside"], "cut off at the right")
    assert seen["width"] <= seen["window"], "the page scrolls sideways"


@pytest.mark.parametrize("page", PAGES)
def test_a_page_can_be_read_aloud(page, visitor):
    seen = visitor.visit(page)
    assert seen["lang"] == "en"
    assert seen["title"]
    expect_none(seen["unnamed"], "links and buttons without a name")
    headings, images = seen["headings"], seen["images"]
    assert [x["level"] for x in headings].index(1) == 0, "the first heading is the title"
    expect_none([x["text"] for x in headings[1:] if x["level"] == 1], "more than one title")
    pairs = itertools.pairwise(headings)
    jumps = [after["text"] for before, after in pairs if after["level"] > before["level"] + 1]
    expect_none(jumps, "headings that skip a level")
    expect_none([x["src"] for x in images if not x["alt"].strip()], "pictures without a text")
    expect_none([x["src"] for x in images if not x["width"]], "pictures that are not shown")


@pytest.mark.parametrize(("words", "page"), SEARCHES.items())
def test_search_finds(words, page, visitor):
    tab = visitor.contexts["light"].new_page()
    tab.goto(visitor.address)
    tab.locator("[data-md-component=search-query]").click()
    tab.keyboard.type(words)
    results = tab.locator(".md-search-result__item > a")
    results.first.wait_for()
    found = [visitor.split(link.evaluate("e => e.href"))[0] for link in results.all()[:10]]
    tab.close()
    assert f"{page}/index.html" in found
