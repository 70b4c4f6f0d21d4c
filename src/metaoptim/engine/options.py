"""The engine's words: what may be asked of it, and how T tasks are cut into pieces."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

from metaoptim.core.types import Memory

MEMORIES: tuple[Memory, ...] = get_args(Memory)
RUNTIMES = ("eager", "trace", "compile")
PRECISIONS = ("full", "bf16")
SETTINGS = ("batching", "memory", "runtime", "precision", "budget", "choice")  # what a user may choose
_BATCHING = re.compile(r"loop|vmap(:[1-9][0-9]*)?|workers:[1-9][0-9]*(:[1-9][0-9]*)?", re.ASCII)


class Cut(NamedTuple):
    """`size` tasks at a time (None: all of them), `workers` threads; a piece is mapped by vmap, or is one task as it is."""

    size: int | None
    vmapped: bool
    workers: int

    def pieces(self, count: int) -> list[slice]:
        size = count if self.size is None else self.size
        return [slice(i, min(i + size, count)) for i in range(0, count, size)]


class Choice(NamedTuple):
    """The way that is taken, the seconds per meta-step that were seen for each where they were measured, and who chose it."""

    batching: str
    memory: str = "graph"
    runtime: str = "eager"
    seconds: Mapping[str, float] = {}
    by: Literal["name", "rule", "measurement"] = "name"

    @property
    def text(self) -> str:
        """The way in one line, as a recipe has it."""
        return " ".join(self[:3])


def chosen(text: str) -> Choice:
    """The choice that "BATCHING MEMORY RUNTIME" stands for, as `Choice.text` writes it."""
    words = text.split()
    if len(words) != 3 or "auto" in words:
        raise ValueError(
            f"engine.choice = {text!r}: it must be a batching, a memory and a runtime, such as 'vmap graph trace'."
        )
    check_settings(words[0], words[1], words[2], "full")
    return Choice(words[0], words[1], words[2], by="measurement")


def cut(batching: str) -> Cut:
    """What "loop", "vmap", "vmap:C", "workers:W" or "workers:W:C" mean."""
    way, *numbers = batching.split(":")
    if way == "workers":
        return Cut(int(numbers[1]) if len(numbers) > 1 else 1, len(numbers) > 1, int(numbers[0]))
    return Cut(1 if way == "loop" else int(numbers[0]) if numbers else None, way == "vmap", 1)


def check_settings(batching: str, memory: str, runtime: str, precision: str) -> None:
    """A ValueError for words that the engine doesn't know, or that don't go together."""
    for name, value, allowed in (
        ("memory", memory, ("auto", *MEMORIES)),
        ("runtime", runtime, ("auto", *RUNTIMES)),
        ("precision", precision, PRECISIONS),
    ):
        if value not in allowed:
            raise ValueError(f"engine.{name} = {value!r} is not offered; choose one of {', '.join(allowed)}.")
    if batching != "auto" and not _BATCHING.fullmatch(batching):
        raise ValueError(
            f"engine.batching = {batching!r} is not offered; choose auto, loop, vmap, vmap:C (C >= 1 tasks at a time), or "
            "workers:W or workers:W:C (W threads, each with one task or C tasks at a time)."
        )
    if batching.startswith("workers") and runtime == "eager":
        raise ValueError(
            f'engine.batching = {batching!r} needs runtime = "trace" or "compile" (or "auto"): called one by one, Python '
            "lets only one thread go on at a time."
        )
