"""Keeps measurements between processes, for the same work on the same machine."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import nn

from metaoptim.core import folders, trees
from metaoptim.core.types import MetaOptimizer, MetaParams, Task
from metaoptim.engine.autotune.search import Row, Way
from metaoptim.learners import modules


def key(method: MetaOptimizer, phi: MetaParams, batch: Task, settings: Sequence[str]) -> str:
    """Identifies work and machine: shapes, dtypes, learner and estimator with their code, settings, versions, threads."""
    work = [[str(tuple(x.shape)), str(x.dtype), str(x.device)] for x in trees.flatten((phi, batch))]
    facts = [
        work,
        sorted(phi.weights),
        method.learner.steps,
        description(method),
        sorted(_code(method.learner)),
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


def _code(owner: Any) -> set[str]:
    """The code of the classes and functions that a learner is made of, and their modules' plain attributes."""
    found: set[str] = set()
    for part in (owner, *modules(owner), *(m for net in modules(owner) for m in net.modules()), *_fields(owner)):
        kind = part if inspect.isfunction(part) else type(part)
        own = (
            [kind] if inspect.isfunction(kind) else [x for k in kind.__mro__ for x in vars(k).values() if inspect.isfunction(x)]
        )
        found.add(f"{kind.__module__}.{kind.__qualname__} {[_instructions(f.__code__) for f in own]}")
        if isinstance(part, nn.Module):
            plain = {n: x for n, x in vars(part).items() if isinstance(x, bool | int | float | str)}
            found.add(f"{kind.__qualname__} {sorted(plain.items())}")
    return found


def _instructions(code: CodeType) -> str:
    """What code does, in every process alike, wherever it stands in its file."""
    constants = [
        _instructions(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts if not isinstance(c, frozenset)
    ]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _fields(owner: Any) -> Iterator[Any]:
    """What the fields of a dataclass hold, at any depth."""
    if is_dataclass(owner) and not isinstance(owner, type):
        for field in fields(owner):
            value = getattr(owner, field.name)
            yield value
            yield from _fields(value)


def read(key: str) -> list[Row] | None:
    """The measured rows; None if there are none, or none that can be read."""
    try:
        return [Row(*row) for row in json.loads(_path(key).read_text())] or None
    except (OSError, ValueError, TypeError):
        return None


def write(key: str, rows: Sequence[Row]) -> None:
    """Stores the rows atomically, but for those of ways that failed, which are tried again."""
    with suppress(OSError):  # a cache that can't be written costs another measurement, nothing else
        _store(_path(key), [row for row in rows if row.seconds is not None or row.bytes is not None])


class Journal:
    """Writes down each way before it is tried, and strikes it out after; what stays is where a process died."""

    def __init__(self, key: str) -> None:
        self.path = folders.cache() / "plans" / f"{key}.trying.json"
        try:
            self.dead: list[Way] = [(a, b, c) for a, b, c in json.loads(self.path.read_text())]
        except (OSError, ValueError, TypeError):
            self.dead = []

    def died(self, way: Way) -> bool:
        return way in self.dead

    @contextmanager
    def __call__(self, way: Way) -> Iterator[None]:
        with suppress(OSError):
            _store(self.path, [*self.dead, way])
        try:
            yield
        finally:
            with suppress(OSError):
                _store(self.path, self.dead) if self.dead else self.path.unlink(missing_ok=True)


def _store(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(value, file)
    os.replace(file.name, path)


def _path(key: str) -> Path:
    return folders.cache() / "plans" / f"{key}.json"
