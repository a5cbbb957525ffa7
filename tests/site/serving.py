"""A folder served on this machine, and a browser that reaches nothing else."""

import contextlib
import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
FLAGS = [
    # No name is looked up: what a page would fetch from elsewhere fails.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, without a line for every request."""

    def log_message(self, *_) -> None:
        """Says nothing."""


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serves a folder; gives the address, which ends with a slash."""
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def find_browser() -> str | None:
    """The path of a Chromium of this machine, if there is one."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def launch(playwright):
    """A headless browser; root has no sandbox."""
    return playwright.chromium.launch(executable_path=find_browser(), args=FLAGS)


def open_context(browser, scheme: str, viewport: dict[str, int]):
    """A context that prefers a color scheme, "light" or "dark", in a window of some size."""
    return browser.new_context(color_scheme=scheme, viewport=viewport, reduced_motion="reduce")
