"""Where numbers come from, as parts of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metaoptim.report.html.document import Code, Note, Part, Section, Table


def section(
    about: str, commands: Sequence[str], environment: Mapping[str, Any], hashes: Mapping[str, Any], texts: Mapping[str, str]
) -> Section:
    """The commands that make it again, versions and machine, hashes, and texts such as recipes by their titles.

    The folder in which something was started is left out: pages are handed on.
    """
    rows = tuple((name, str(x)) for name, x in environment.items() if name != "folder")
    digests = tuple((name, str(x)) for name, x in hashes.items() if x)
    parts: list[Part] = [
        Note(about, "plain", "\n".join(commands)),
        Table(("what", "value"), rows, "Environment") if rows else Note("The environment was not kept.", "missing"),
    ]
    parts += [Table(("what", "SHA-256"), digests, "Hashes")] if digests else []
    return Section("Provenance", (*parts, *(Code(title, text) for title, text in texts.items())))
