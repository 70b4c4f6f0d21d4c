"""Where files are looked for, and where those that can be made again are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache() -> Path:
    """METAOPTIM_CACHE, else `metaoptim` in the user's cache folder; it need not exist yet."""
    named = os.environ.get("METAOPTIM_CACHE")
    return Path(named).expanduser() if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metaoptim"


def searched(path: Path) -> str:
    """The end of a sentence about a file or folder that isn't there: where it was looked for; "" where its path says so."""
    return "" if path.is_absolute() else f" in {Path.cwd()}, nor beside the recipe, if one names it"
