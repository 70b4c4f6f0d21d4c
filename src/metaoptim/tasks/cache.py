"""Keeps data that was generated or downloaded, and shows the progress of making it."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress, ProgressColumn, track

from metaoptim.core import folders

Arrays = dict[str, NDArray[Any]]
CHECKSUM = "sha256"


def directory() -> Path:
    """The cache folder, created if it's missing; OSError where that fails."""
    return folder(folders.cache())


def folder(path: Path) -> Path:
    """Creates a folder for data, or raises an OSError that says what to do."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"The cache {path} can't be made ({error.strerror}); name a writable folder in METAOPTIM_CACHE."
        ) from error
    return path


def read(path: Path) -> Arrays | None:
    """The arrays in a cache file, or None if it is missing, damaged, or not what `write` has written there."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception:  # damage makes zipfile and numpy raise nearly anything; the answer is always the same
        return None
    stated = arrays.pop(CHECKSUM, None)
    return arrays if stated is not None and stated.tolist() == checksum(arrays) else None


def write(path: Path, arrays: Arrays) -> None:
    """Writes a cache file as a whole or not at all; OSError where that is impossible."""
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # another process may be making the same file
    try:
        with part.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays, **{CHECKSUM: np.array(checksum(arrays))})
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise OSError(f"{path} can't be written ({error.strerror}); name a writable folder in METAOPTIM_CACHE.") from error
    finally:
        part.unlink(missing_ok=True)


def checksum(arrays: Arrays) -> str:
    """The sha256 of arrays: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def progress(*columns: str | ProgressColumn) -> Progress:
    """A progress bar on stderr, silent unless stderr is a terminal."""
    console = Console(stderr=True, force_terminal=sys.stderr.isatty())  # whatever FORCE_COLOR says
    return Progress(*columns, console=console, disable=not console.is_terminal)


def tracked(items: Sequence[Any], description: str) -> Iterable[Any]:
    """The items, with a progress bar."""
    console = Console(stderr=True, force_terminal=sys.stderr.isatty())  # whatever FORCE_COLOR says
    return track(items, description, console=console, disable=not console.is_terminal)
