"""Where files that can be made again are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache() -> Path:
    """METAOPTIM_CACHE, else `metaoptim` in the user's cache folder; it need not exist yet."""
    named = os.environ.get("METAOPTIM_CACHE")
    return Path(named).expanduser() if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metaoptim"
