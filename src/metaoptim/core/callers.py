"""Whose code is on the stack: this package's, what is installed, or the user's own."""

from __future__ import annotations

import os
import sys
import sysconfig
import traceback
import warnings
from types import CodeType, FrameType
from typing import Any

PACKAGE = __name__.partition(".")[0]
_OTHERS = (
    os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), ""),
    *{os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib", "purelib", "platlib")},
    "<frozen ",  # Python's importer
    "<eval_with_key>",  # torch's graphs
)


def is_ours(part: Any) -> bool:
    """Whether a learner or a rule is of this package, with all the rules that it is made of."""
    held = [x for value in getattr(part, "__dict__", {}).values() for x in (value if isinstance(value, tuple) else (value,))]
    own = type(part).__module__.startswith(f"{PACKAGE}.")
    return own and all(is_ours(x) for x in held if hasattr(x, "init") and hasattr(x, "update"))


def warn(message: str) -> None:
    """A warning that points at the user's line, however deep inside this package it is given."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and not _is_users(frame):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=2 if frame is None else level)


def where(error: BaseException) -> str | None:
    """The last line of the user's own code that an error came through, as `my.py:12, in forward`; None where there is none."""
    lines = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__) if _is_users(frame)]
    return f"{os.path.basename(lines[-1][0].co_filename)}:{lines[-1][1]}, in {lines[-1][0].co_name}" if lines else None


def _is_users(frame: FrameType) -> bool:
    return is_users(frame.f_code, frame.f_globals.get("__name__") or "")


def is_users(code: CodeType, module: str) -> bool:
    """Whether code of a module is the user's own. By its name too, for what a dataclass makes has no file."""
    ours = module == PACKAGE or module.startswith(f"{PACKAGE}.")
    return not (ours or code.co_filename.startswith(_OTHERS))
