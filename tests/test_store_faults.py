"""The run directory under faults: kills in the middle of a save, a full disk."""

from __future__ import annotations

import builtins
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from metaoptim.runs import store
from metaoptim.runs.checkpoint import LAST, PREVIOUS, Checkpoint, unpack
from metaoptim.runs.store import RunDirectory, load_checkpoint


def new_run(path: Path) -> RunDirectory:
    return RunDirectory.create(path / "run", recipe='name = "x"\n', environment={})


def at_step(step: int) -> Checkpoint:
    """A checkpoint whose content tells its step."""
    tensors = {
        "weights.a": torch.arange(40, dtype=torch.float32) * step,
        "rng": torch.full((7,), step).byte(),
    }
    return Checkpoint(step, tensors, {"best": step / 10})


def check_intact(checkpoint: Checkpoint | None, step: int) -> None:
    assert checkpoint is not None
    assert checkpoint.step == step
    assert checkpoint.state == {"best": step / 10}
    expected = at_step(step).tensors
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in expected.items())


# ---- dying in the middle of a save


class Death(BaseException):
    """Nothing catches it, as nothing runs after a SIGKILL."""


class Torn:
    """A file that takes half of what it is given, then raises."""

    def __init__(self, path: Path, error: BaseException) -> None:
        self.path, self.error = path, error

    def __enter__(self) -> Torn:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, data: bytes) -> None:
        self.path.write_bytes(data[: len(data) // 2])
        raise self.error


class Faults:
    """Counts the operations of a save and raises `error` before one of them, or after it (`late`)."""

    def __init__(self, patch: pytest.MonkeyPatch, turn: int, error: BaseException, late: bool = False) -> None:
        self.turn, self.error, self.late, self.seen = turn, error, late, list[str]()
        patch.setattr(os, "fsync", self.wrapped("fsync", os.fsync))
        patch.setattr(os, "replace", self.wrapped("replace", os.replace))
        patch.setattr(store, "open", self.open, raising=False)

    def mine(self, operation: str) -> bool:
        self.seen.append(operation)
        return len(self.seen) == self.turn

    def wrapped(self, operation: str, function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            mine = self.mine(operation)
            if not mine or self.late:
                function(*arguments)
            if mine:
                raise self.error

        return call

    def open(self, path: Path, mode: str) -> Torn | IO[Any]:
        if self.mine("write"):
            return Torn(path, self.error)
        return builtins.open(path, mode)


SAVE = ["write", "fsync", "replace", "replace", "fsync"]  # the last of it: the folder
SAVE_BEST = ["write", "fsync", "replace", "fsync", *SAVE]
STATE = ["write", "fsync", "replace", "fsync"]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("best", "turn"),
    [(False, n) for n in range(1, len(SAVE + STATE) + 1)] + [(True, n) for n in range(1, len(SAVE_BEST + STATE) + 1)],
)
def test_dying_at_each_operation_of_a_save(tmp_path: Path, turn: int, late: bool, best: bool) -> None:
    run = new_run(tmp_path)
    run.save(at_step(1), best=True)
    run.save(at_step(2))
    operations = (SAVE_BEST if best else SAVE) + STATE
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch, turn, Death(), late)
        with pytest.raises(Death):
            run.save(at_step(3), best=best)
    assert faults.seen == operations[:turn]
    run.close()

    run = RunDirectory.reopen(run.path)
    assert not list(run.path.glob(".*.tmp"))
    last_rename = len(operations) - len(STATE) - 1
    saved = turn > last_rename or (turn == last_rename and late)
    check_intact(run.load(), 3 if saved else 2)  # without a warning, which would be an error here
    chosen = load_checkpoint(run.path, "best")
    check_intact(chosen, chosen.step)
    assert chosen.step in ({1, 3} if best else {1})
    if best and saved:
        assert chosen.step == 3  # a run that won't come back to this step needs no second chance

    run.save(at_step(3), best=best)  # and it goes on from there as if nothing had been
    run.save(at_step(4))
    check_intact(run.load(), 4)
    check_intact(unpack((run.path / PREVIOUS).read_bytes()), 3)
    check_intact(load_checkpoint(run.path, "best"), 3 if best else 1)


@pytest.mark.parametrize("turn", [1, 2, 3, 4])
def test_dying_in_the_very_first_save(tmp_path: Path, turn: int) -> None:
    run = new_run(tmp_path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Death):
        Faults(patch, turn, Death())
        run.save(at_step(1))
    run.close()
    run = RunDirectory.reopen(run.path)
    loaded = run.load()
    assert (loaded is None) == (turn < 4)  # write, fsync, the only rename; then the folder's fsync
    run.save(at_step(2))
    check_intact(run.load(), 2)


def test_a_folder_whose_creation_was_cut_short_can_be_used(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Death):
        Faults(patch, 9, Death())  # while recipe.toml, the last of three files, is written
        new_run(tmp_path)
    assert not (tmp_path / "run" / "recipe.toml").exists()
    new_run(tmp_path)


def test_text_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.write("result.json", "old φ")
    for turn in (1, 2, 3):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Death):
            Faults(patch, turn, Death())
            run.write("result.json", "new")
        assert (run.path / "result.json").read_text(encoding="utf-8") == "old φ"
    run.write("result.json", "new")
    assert (run.path / "result.json").read_text() == "new"


KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from metaoptim.runs.store import Checkpoint, RunDirectory
torch.set_num_threads(1)

SIZE = 500_000

def content(step):
    return {"a": torch.arange(SIZE, dtype=torch.int32) ^ step, "b": torch.full((SIZE,), float(step))}

def child(path, pipe):
    run = RunDirectory.reopen(path)
    checkpoint = run.load()
    step = checkpoint.step if checkpoint else 0
    while True:
        step += 1
        run.save(Checkpoint(step, content(step), {"twice": 2 * step}), best=step % 5 == 0)
        os.write(pipe, step.to_bytes(8, "little"))

path, kills = Path(sys.argv[1]), int(sys.argv[2])
RunDirectory.create(path, recipe="", environment={}).close()
chance = random.Random(0)
for _ in range(kills):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(path, writer)
    os.close(writer)
    first = os.read(reader, 8)
    time.sleep(chance.uniform(0, 0.1))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with os.fdopen(reader, "rb") as file:
        reported = (first + file.read())[-8:]
    strays = [stray.name for stray in path.glob(".*.tmp")]
    run = RunDirectory.reopen(path)
    checkpoint = run.load()
    expected = content(checkpoint.step)
    right = all(torch.equal(checkpoint.tensors[name], expected[name]) for name in expected)
    right = right and checkpoint.tensors.keys() == expected.keys()
    right = right and checkpoint.state == {"twice": 2 * checkpoint.step}
    run.close()
    print(json.dumps({
        "reported": int.from_bytes(reported, "little"), "loaded": checkpoint.step, "right": right,
        "strays": strays, "left": len(list(path.glob(".*.tmp"))),
    }))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills are made with fork and SIGKILL")
@pytest.mark.slow
def test_sigkill_at_random_moments_of_saving(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", KILLS, tmp_path / "run", "25"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(store.__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    assert (result.returncode, result.stderr) == (0, "")
    kills = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(kills) == 25
    for kill in kills:
        assert kill["right"], kill
        assert kill["reported"] <= kill["loaded"] <= kill["reported"] + 1, kill
        assert kill["left"] == 0, kill
    assert any(kill["strays"] for kill in kills)  # at least one hit a file that was being written


# ---- a full disk


@pytest.mark.parametrize("turn", range(1, len(SAVE) + 1))
def test_a_full_disk_leaves_earlier_checkpoints(tmp_path: Path, turn: int) -> None:
    run = new_run(tmp_path)
    run.save(at_step(1))
    run.save(at_step(2))
    with pytest.MonkeyPatch.context() as patch:
        Faults(patch, turn, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(OSError) as raised:
            run.save(at_step(3))
    assert str(raised.value) == (
        f"can't write {run.path / LAST} (No space left on device): "
        "what was saved before is intact, so free some space and resume"
    )
    assert not list(run.path.glob(".*.tmp"))
    check_intact(run.load(), 3 if turn == len(SAVE) else 2)
    run.save(at_step(4))
    check_intact(run.load(), 4)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_while_logging(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    (run.path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"^can't write .*metrics\.jsonl \(No space left on device\): "):
        run.log({"step": 1})


def test_a_new_run_that_cannot_be_written_lets_go(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left"):
        Faults(patch, 1, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        new_run(tmp_path)
    new_run(tmp_path)
