"""Measures peak memory while something runs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from metaoptim.core.checks import memory

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def of(run: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """What run() returns, and by how many bytes memory grew at its peak; None where the system doesn't report it.

    On a CUDA device this is what torch allocated there; elsewhere it is the resident memory of the process (Linux).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        found = run()
        return found, torch.cuda.max_memory_allocated(device) - before
    _give_back()
    try:
        _RESET.write_text("5")  # resets the high-water mark
        start = _resident("VmRSS")
    except OSError:
        return run(), None
    found = run()
    return found, max(0, _resident("VmHWM") - start)


def free(device: torch.device) -> int | None:
    """Free memory in bytes; None where the system doesn't report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return _field(Path("/proc/meminfo"), "MemAvailable")
    except OSError:
        return None


def total(device: torch.device) -> int | None:
    """All memory in bytes; None where the system doesn't report it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return memory()


def _resident(name: str) -> int:
    return _field(_STATUS, name)


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{path} has no {name}")


def _give_back() -> None:
    """Returns the allocator's free memory to the system; otherwise using it again would not show as growth."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return  # not the GNU C library
