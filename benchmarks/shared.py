"""What every benchmark needs: where it prints, what machine it ran on, and a record of it all in JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from metaoptim.runs.environment import environment

CONSOLE = Console(force_terminal=sys.stdout.isatty(), width=None if sys.stdout.isatty() else 120, highlight=False)
RESULTS = Path("runs/benchmarks")
CACHES = ("METAOPTIM_CACHE", "TORCHINDUCTOR_CACHE_DIR")  # plans and data, and compiled graphs: empty, so that nothing is given


def doing(what: str) -> None:
    """Says on a terminal what is being done, until the next line is printed."""
    if CONSOLE.is_terminal:
        CONSOLE.print(f"  {what} …".ljust(60), end="\r")


@contextmanager
def no_fallback() -> Iterator[None]:
    """Inside, an engine that can't compile raises its warning, rather than being timed under another setting's name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is not to be had here")
        yield


def machine() -> dict[str, Any]:
    """Versions, processor, cores, memory, threads, peers."""
    peers = {}
    for name in ("higher", "torchopt"):
        try:
            peers[name] = version(name)
        except PackageNotFoundError:
            continue
    return environment() | {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1) if os.name == "posix" else None,
        "vector": torch.backends.cpu.get_cpu_capability(),
        "peers": peers,
        "date": time.strftime("%Y-%m-%d"),
    }


def summary() -> str:
    """The machine in one line."""
    facts = machine()
    beside = f", {facts['accelerator']}" if facts["accelerator"] else ""
    return (
        f"{facts['processor']} ({facts['vector']}), {facts['cores']} cores, {facts['threads']} torch threads{beside}, torch "
        f"{facts['torch']}, Python {facts['python']}"
    )


def save(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record with the facts about the machine, whole or not at all; numbers that aren't become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(_strict({"machine": machine(), **record}), indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def matmul_rate(size: int = 2048) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Two large float32 matrices, and the floating-point operations of their product."""
    random = torch.Generator().manual_seed(0)
    a, b = (torch.rand(size, size, generator=random) for _ in range(2))
    return a, b, 2.0 * size**3


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    return [_strict(v) for v in value] if isinstance(value, list | tuple) else value
