"""Keeps measurements between processes, for the same work on the same machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from metaoptim.core import folders, trees
from metaoptim.core.types import MetaOptimizer, MetaParams, Task
from metaoptim.engine.autotune.search import Row


def key(method: MetaOptimizer, phi: MetaParams, batch: Task, settings: Sequence[str]) -> str:
    """Identifies the work and the machine: shapes, dtypes, learner, estimator, settings, torch, processor and threads."""
    work = [[str(tuple(x.shape)), str(x.dtype), str(x.device)] for x in trees.flatten((phi, batch))]
    facts = [
        work,
        sorted(phi.weights),
        method.learner.steps,
        description(method),
        list(settings),
        torch.__version__,
        platform.processor() or platform.machine(),
        os.cpu_count(),
        torch.get_num_threads(),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def description(method: MetaOptimizer) -> str:
    """Learner and estimator in words that are the same in every process."""
    return _address_free(f"{method.estimator!r} {method.learner!r} {method.reduction}")


def _address_free(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)  # a function's address differs between processes


def read(key: str) -> list[Row] | None:
    """The measured rows; None if there are none, or none that can be read."""
    try:
        return [Row(*row) for row in json.loads(_path(key).read_text())] or None
    except (OSError, ValueError, TypeError):
        return None


def write(key: str, rows: Sequence[Row]) -> None:
    """Stores the rows atomically."""
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(rows, file)
        os.replace(file.name, path)
    except OSError:
        return  # a cache that can't be written costs another measurement, nothing else


def _path(key: str) -> Path:
    return folders.cache() / "plans" / f"{key}.json"
