"""Looks at every link of the built site: python docs/site/check.py build/site

Links within it must lead to a page and a place that are there. Links to elsewhere are not followed, but must be complete
addresses. Nothing may be loaded from elsewhere, so that the site works from a folder, without a network.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ADDRESS = re.compile(r"https?://[\w.-]+\.[a-z]{2,}(:\d+)?(/\S*)?|mailto:\S+@\S+")
LOADED = {("img", "src"), ("script", "src"), ("link", "href"), ("source", "srcset"), ("iframe", "src")}


class Page(HTMLParser):
    """The places of a page, and its links: tag, attribute, target."""

    def __init__(self, text: str) -> None:
        HTMLParser.__init__(self)
        self.places: set[str] = set()
        self.links: list[tuple[str, str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called for each tag."""
        for name, value in attrs:
            if name == "id" and value:
                self.places.add(value)
            elif name in ("href", "src", "srcset") and value:
                self.links.append((tag, name, value))


def faults(site: Path) -> list[str]:
    """A sentence for each link that leads nowhere, is not a complete address, or loads something from elsewhere."""
    pages = {file: Page(file.read_text(encoding="utf-8")) for file in sorted(site.rglob("*.html"))}
    if not pages:
        return [f"{site} holds no page; build it with `make docs`."]
    found = []
    for file, page in pages.items():
        where = file.relative_to(site)
        for tag, name, target in page.links:
            parts = urlsplit(target)
            if parts.scheme == "data":
                continue
            if parts.scheme or parts.netloc:
                if (tag, name) in LOADED:
                    found.append(f"{where}: <{tag}> loads {target} from elsewhere.")
                elif not ADDRESS.fullmatch(target):
                    found.append(f"{where}: {target} is not a complete address.")
                continue
            there = (file.parent / unquote(parts.path)).resolve() if parts.path else file.resolve()
            place = unquote(parts.fragment)
            if not there.is_file():
                found.append(f"{where}: {target} leads nowhere.")
            elif place and there.suffix == ".html" and place not in pages[site / there.relative_to(site.resolve())].places:
                found.append(f"{where}: {target}: there is no such place on that page.")
    return found


if __name__ == "__main__":
    wrong = faults(Path(sys.argv[1]))
    sys.exit("\n".join(wrong) or 0)
