"""What a result depends on besides the recipe."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from typing import Any

import torch

import metaoptim


def environment() -> dict[str, Any]:
    """Versions, machine and number of threads."""
    return {
        "metaoptim": metaoptim.__version__, "torch": str(torch.__version__), "python": platform.python_version(),
        "machine": platform.machine(), "system": platform.system(), "threads": torch.get_num_threads(),
    }  # fmt: skip


def folder() -> str:
    """The current folder, in which code of the user's own is found again; "" where it is gone."""
    with suppress(OSError):
        return os.fsencode(os.getcwd()).decode(errors="replace")
    return ""
