"""Navigation: the lists of links that the index pages hold are the site's tree too."""

from __future__ import annotations

import posixpath
import re
from typing import Any

ROOT = "docs/index"
NESTED = ("docs/algorithms/index", "docs/decisions/index")
REFERENCE = "docs/api"


def add_navigation(app: Any, page: str, source: list[str]) -> None:
    """Hook of Sphinx: appends hidden tables of contents to an index page."""
    if page == ROOT:
        for caption, pages in sections(source[0]):
            source[0] += _toctree(pages, caption)
    elif page in NESTED:
        folder = posixpath.dirname(page)
        source[0] += _toctree([found for found in linked(source[0], page) if posixpath.dirname(found) == folder])
    elif page == REFERENCE:
        source[0] += _toctree([f"{REFERENCE}/*"])  # whose pages are written when the site is built


def sections(index: str) -> list[tuple[str, list[str]]]:
    """The headings of the main index, each with the pages that it is the first to link; those without any are left out."""
    found, seen = [], set()
    for part in re.split(r"^## ", index, flags=re.M)[1:]:
        pages = [page for page in linked(part, ROOT) if page not in seen]
        seen |= set(pages)
        if pages:
            found.append((part.splitlines()[0].strip(), pages))
    return found


def linked(text: str, page: str) -> list[str]:
    """The pages that a text links, as names without ending, seen from the root; in order, each once."""
    targets = re.findall(r"\]\(([^)\s#:]+)\.(?:md|ipynb)(?:#[^)]*)?\)", text)
    return list(dict.fromkeys(posixpath.normpath(posixpath.join(posixpath.dirname(page), target)) for target in targets))


def _toctree(pages: list[str], caption: str = "") -> str:
    titles = [f":caption: {caption}"] if caption else []
    lines = ["", "", "```{toctree}", ":hidden:", ":glob:", *titles, "", *(f"/{page}" for page in pages), "```", ""]
    return "\n".join(lines)
