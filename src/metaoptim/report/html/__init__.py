"""Pages of HTML from plain data: `document` is what a page consists of, `render` makes one file of it."""

from metaoptim.report.html.document import Chapter, Page, Section
from metaoptim.report.html.render import render

__all__ = ["Chapter", "Page", "Section", "render"]
