"""Which way to map tasks: measured once on the first batch, and remembered for the same work on the same machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from metaoptim import folders, trees
from metaoptim.types import Meta, MetaOptimizer, Task

ROUNDS = 3
HOPELESS = 3.0  # a way this many times slower than the best in its first run is not tried again


class Choice(NamedTuple):
    """The chosen way, and the seconds per meta-step that were seen for each (empty where it was given)."""

    tasks: str
    seconds: Mapping[str, float]


def key(optimizer: MetaOptimizer, meta: Meta, batch: Task) -> str:
    """Names the work and the machine: shapes, types, learner, estimator, torch, processor and threads."""
    work = [[str(tuple(x.shape)), str(x.dtype), str(x.device)] for x in trees.flatten((meta, batch))]
    facts = [
        work,
        sorted(meta.weights),
        optimizer.learner.steps,
        re.sub(r" at 0x[0-9a-f]+", "", repr(optimizer.estimator)),  # a function's address differs in every process
        torch.__version__,
        platform.processor() or platform.machine(),
        os.cpu_count(),
        torch.get_num_threads(),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def choose(key: str, ways: Mapping[str, Callable[[], Any]], clock: Callable[[], float]) -> Choice:
    """The fastest way by its best of a few runs, taken in turns; read from the cache where the same work was timed before."""
    path = folders.cache() / "plans" / f"{key}.json"
    known = _read(path, ways)
    if known is not None:
        return known
    best: dict[str, float] = {}
    refused: dict[str, Exception] = {}
    for turn in range(ROUNDS):
        for name, run in ways.items():
            if name in refused or (turn and best[name] > HOPELESS * min(best.values())):
                continue
            start = clock()
            try:
                run()
            except RuntimeError as error:  # such as a layer that vmap has no rule for
                refused[name] = error
                continue
            seconds = clock() - start
            best[name] = min(seconds, best.get(name, seconds))
    if not best:
        raise refused[next(iter(refused))]
    choice = Choice(min(best, key=lambda name: best[name]), best)
    _write(path, choice)
    return choice


def _read(path: Path, ways: Mapping[str, Any]) -> Choice | None:
    try:
        found = json.loads(path.read_text())
        choice = Choice(str(found["tasks"]), dict(found["seconds"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return choice if choice.tasks in ways else None


def _write(path: Path, choice: Choice) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(choice._asdict(), file)
        os.replace(file.name, path)
    except OSError:
        return  # a cache that can't be written costs a second measurement, nothing else
