"""Takes pictures of pages of the built documentation: wide and narrow, light and dark.

python -m tests.site.pictures --site site --out out/site
"""

import argparse
import contextlib
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.site import serving

# One page of each kind: the first of those that a pattern matches.
PATTERNS = ("index.html", "*which*/index.html", "gallery/*/index.html", "api/index.html")


def main() -> None:
    """Writes a PNG of every page in every mode."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--site", type=Path, default=Path("site"), help="the built site")
    parser.add_argument("--out", type=Path, default=Path("out/site"), help="where pictures go")
    parser.add_argument("--pages", nargs="*", default=PATTERNS, help="patterns of files")
    parser.add_argument("--height", type=int, default=1800, help="of a picture, at most")
    arguments = parser.parse_args()
    pages = [
        path for pattern in arguments.pages for path in sorted(arguments.site.glob(pattern))[:1]
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (
        serving.serve(arguments.site) as address,
        sync_playwright() as playwright,
        contextlib.closing(serving.launch(playwright)) as browser,
    ):
        for scheme in ("light", "dark"):
            for kind, viewport in {"wide": serving.WIDE, "narrow": serving.NARROW}.items():
                size = viewport | {"height": arguments.height}
                tab = serving.open_context(browser, scheme, size).new_page()
                for path in pages:
                    page = path.relative_to(arguments.site).as_posix()
                    tab.goto(address + page, wait_until="load")
                    tab.wait_for_load_state("networkidle")
                    name = page.removesuffix("index.html").strip("/").replace("/", "-") or "home"
                    out = arguments.out / f"{name}-{kind}-{scheme}.png"
                    tab.screenshot(path=out)
                    print(out)


if __name__ == "__main__":
    main()
