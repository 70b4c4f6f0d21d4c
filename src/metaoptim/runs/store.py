"""The run directory: everything a run writes. A kill at any moment, or a damaged file, loses next to nothing.

    recipe.toml  environment.json  metrics.jsonl  tensorboard/  state.json (for people: no run depends on it)
    start.safetensors  checkpoint.safetensors  checkpoint.previous.safetensors  best.safetensors  warnings.txt  .lock

Nothing in it is a pickle, so opening somebody else's run can't run their code.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from metaoptim.core.callers import warn
from metaoptim.runs.checkpoint import BEST, LAST, PREVIOUS, START, Checkpoint, newest, pack, read, strict_json
from metaoptim.runs.events import Events

Status = Literal["running", "interrupted", "finished", "failed"]

RECIPE, STATE, METRICS, SPOILT, WARNINGS = "recipe.toml", "state.json", "metrics.jsonl", "metrics.damaged.jsonl", "warnings.txt"

AGAIN = "free some space and try again"


class RunDirectory:
    """One run's folder, locked by this process until `close`; get one from `create` or `reopen`."""

    def __init__(self, path: Path, lock: FileLock) -> None:
        self.path = path
        self._lock = lock
        self._events = Events(path / "tensorboard")
        self._step = 0
        self._state: dict[str, Any] = {}

    @property
    def step(self) -> int:
        """The step of the last checkpoint that was saved or loaded; 0 before the first."""
        return self._step

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], *, recipe: str, environment: dict[str, Any], start: Checkpoint | None = None
    ) -> RunDirectory:
        """A new run, with its recipe (TOML text), its environment and φ at its start; in place of one without a saved step.

        Raises ValueError if the folder holds another run or another process works there, OSError if it can't be created.
        """
        folder = _folder(path)
        with _explained(f"create the run {folder}"):
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"{folder} is a file, and a run needs a folder: choose another path")
            _refuse_taken(folder)
            folder.mkdir(parents=True, exist_ok=True)
            run = cls(folder, _locked(folder))
        try:
            _refuse_taken(folder)  # which may have been trained until the lock was free
            for name in (RECIPE, WARNINGS):
                (folder / name).unlink(missing_ok=True)
            if (folder / METRICS).exists():
                run.rewind(0)
            if start is not None:
                write_atomic(folder / START, pack(start))
            run.write("environment.json", strict_json(environment, indent=2) + "\n")
            run.mark("running")
            run.write(RECIPE, recipe)  # last, because its presence makes the folder a run
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def reopen(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """Opens the run in that folder to continue it: `load` it next, then `rewind` it.

        Raises ValueError if there is no run or another process holds it, OSError if it can't be opened.
        """
        folder = _folder(path)
        with _explained(f"open the run {folder}"):
            _require_run(folder)
            run = cls(folder, _locked(folder))
            for stray in folder.glob(".*.tmp"):
                stray.unlink(missing_ok=True)
        return run

    def save(self, checkpoint: Checkpoint, *, best: bool = False) -> None:
        """Writes the checkpoint, keeping the one before it; with `best`, writes it as the best too.

        Floats in its state that aren't finite become None. Raises OSError if it can't be written; the earlier
        checkpoints are still intact then.
        """
        data = pack(checkpoint)
        # The best goes first: after a kill in between, the resumed run gets here again and writes the same files.
        # In the other order, it would resume with a state that knows the new best score and a file with the old best.
        if best:
            write_atomic(self.path / BEST, data, full=self._when_full)
        write_atomic(self.path / LAST, data, keep=self.path / PREVIOUS, full=self._when_full)
        self._step, self._state = checkpoint.step, checkpoint.state
        self.mark("running")

    def load(self) -> Checkpoint | None:
        """The newest intact checkpoint, or None before the first one; to be called before `save`.

        Marks the run as running. Warns if it had to skip damaged ones, which are set aside as
        `*.damaged.safetensors`; raises ValueError if none is intact.
        """
        with _explained(f"read the run {self.path}"):
            found, damaged = read(self.path, (LAST, PREVIOUS, BEST))
            # Set aside; otherwise the next save would move the damaged one over the good one before it.
            for name in damaged:
                os.replace(self.path / name, self.path / name.replace(".safetensors", ".damaged.safetensors"))
        if found is not None:
            self._step, self._state = found.step, found.state
        self.mark("running")
        return found

    def log(self, record: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl and its numbers to TensorBoard; `record["step"]` is the outer step."""
        step = record["step"]
        with (
            _explained(f"write {self.path / METRICS}", self._when_full),
            open(self.path / METRICS, "a", encoding="utf-8") as file,
        ):
            file.write(strict_json(record) + "\n")
        self._events.add(step, {n: x for n, x in record.items() if n != "step" and isinstance(x, int | float)})

    def rewind(self, step: int) -> None:
        """Removes what was logged after that step, and lines that a kill left incomplete at the end.

        metrics.jsonl is rewritten; TensorBoard is told to forget those steps. Warns of lines in the middle that
        can't be read, and keeps the file that has them as metrics.damaged.jsonl.
        """
        with _explained(f"read {self.path / METRICS}"):
            data = (self.path / METRICS).read_bytes() if (self.path / METRICS).exists() else b""
        lines = data.splitlines(keepends=True)
        steps = [_step_of(line) for line in lines]
        whole = max((i for i, s in enumerate(steps) if s is not None), default=0)
        if damaged := [str(i + 1) for i in range(whole) if steps[i] is None]:
            write_atomic(self.path / SPOILT, data, full=self._when_full)
            where = ", ".join(damaged[:5]) + (", …" if damaged[5:] else "")
            warn(f"{self.path / METRICS} is damaged in line {where}: what can be read goes on, and {SPOILT} is a copy of all")
        kept = b"".join(line for line, s in zip(lines, steps, strict=True) if s is not None and s <= step)
        if kept != data:
            write_atomic(self.path / METRICS, kept, full=self._when_full)
        self._events = Events(self.path / "tensorboard", purge=step + 1)

    def mark(self, status: Status) -> None:
        """Writes state.json: the status, and the step and state of the last checkpoint saved or loaded."""
        state = {"status": status, "step": self._step, "state": self._state}
        self.write("state.json", strict_json(state, indent=2) + "\n")

    def read(self, name: str) -> str:
        """A text file of that name."""
        return (self.path / name).read_text(encoding="utf-8")

    def write(self, name: str, text: str) -> None:
        """Writes a text file of that name, as a whole or not at all."""
        write_atomic(self.path / name, text.encode(), full=self._when_full)

    def close(self) -> None:
        """Releases the run; may be called twice."""
        self._lock.release()

    @property
    def _when_full(self) -> str:
        if not (self.path / RECIPE).exists():
            return AGAIN
        return f"{'what was saved before is intact' if self._step else 'no step was saved yet'}, so free some space and resume"


def load_checkpoint(path_of_run: str | os.PathLike[str], which: Literal["best", "last"] = "best") -> Checkpoint:
    """A run's best or last checkpoint; takes no lock and changes nothing, so the run may still be training.

    A run without a best one yet gives its last. Warns if it had to skip a damaged one; raises ValueError if
    there is no run, no checkpoint, or none intact.
    """
    folder = _folder(path_of_run)
    with _explained(f"read the run {folder}"):
        _require_run(folder)
        found, _ = read(folder, (BEST, LAST, PREVIOUS) if which == "best" else (LAST, PREVIOUS, BEST))
    if found is None:
        raise ValueError(f"{folder} has no checkpoint yet: train it until the first one is saved")
    return found


def told_state(folder: Path) -> dict[str, Any]:
    """What state.json says of the run there; {} where it can't be read."""
    with suppress(OSError, ValueError, TypeError):
        return dict(json.loads((folder / STATE).read_text(encoding="utf-8")))
    return {}


def write_atomic(path: Path, data: bytes, *, keep: Path | None = None, stale: Path | None = None, full: str = AGAIN) -> None:
    """Writes a file so that, whatever happens, the old or the new one is there; the old one moves to `keep`.

    stale: a file that is not true of the new one, and is removed before that is there. A kill between the two renames leaves
    the old file as `keep` only. Raises OSError if it can't be written, with the advice `full` where the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _explained(f"write {path}", full):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if stale is not None:
                stale.unlink(missing_ok=True)
            if keep is not None and path.exists():
                os.replace(path, keep)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder can't be opened, and renames need no sync
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _folder(path: str | os.PathLike[str]) -> Path:
    """The folder of that name. Its name becomes part of files that are UTF-8 text."""
    name = os.fspath(path)
    if not name:
        raise ValueError("the name of the run's folder is empty: give a path")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the name of the folder {name!a} isn't UTF-8 text: rename it, or choose another folder") from None
    return Path(path)


def _require_run(folder: Path) -> None:
    if not folder.exists():
        raise ValueError(f"there is no run in {folder}, for there is no such folder: check the path")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, and a run is a folder: give the folder")
    if not (folder / RECIPE).exists():
        found = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
        listed = ", ".join(found[:5]) + (", …" if len(found) > 5 else "") if found else "nothing"
        raise ValueError(f"there is no run in {folder} (found {listed}, expected {RECIPE}): check the path")


def _refuse_taken(folder: Path) -> None:
    """Raises a ValueError where the folder holds a run, unless it is one of ours without a step that was saved."""
    found, _, damaged = newest(folder, (LAST, PREVIOUS, BEST))
    untrained = found is None and not damaged
    if untrained and (not (folder / RECIPE).exists() or told_state(folder).get("step") == 0):
        return
    reached = f"step {found.step} reached" if found else "its checkpoints are damaged" if damaged else "no checkpoint yet"
    how = "resume it (resume=True; on the command line, --resume), or choose another folder"
    raise ValueError(f"{folder} holds a run already ({reached}): {how}")


def _locked(folder: Path) -> FileLock:
    """Takes the folder's lock, which the system releases when the process ends, however it ends."""
    lock = FileLock(folder / ".lock", blocking=False, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another process or run is using {folder}: wait until it ends, or choose another folder") from None
    return lock


def _step_of(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl; None where the line isn't whole."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) and line.endswith(b"\n") else None


@contextmanager
def _explained(action: str, full: str = AGAIN) -> Iterator[None]:
    """Turns an operating system error into one sentence; not to be nested."""
    try:
        yield
    except OSError as error:
        advice = "check the path and its permissions"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = full
        raise OSError(f"can't {action} ({error.strerror or error}): {advice}") from error
