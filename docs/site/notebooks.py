"""Jupyter notebooks as pages: their cells, in order; what they print is not kept, so that it can't go stale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from myst_parser.parsers.sphinx_ import MystParser


class NotebookParser(MystParser):
    """Reads a notebook as the Markdown page that it amounts to."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: Any) -> None:
        """Puts a notebook's cells into a document."""
        MystParser.parse(self, as_markdown(inputstring, Path(document["source"]).name), document)


def as_markdown(notebook: str, name: str) -> str:
    """The cells of a notebook, text as it is and code in fences, and a link to the file itself."""
    parts = []
    for cell in json.loads(notebook)["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    parts.insert(1, f"This page is {{download}}`a notebook <{name}>`; run it to see what it prints and draws.")
    return "\n\n".join(parts) + "\n"
