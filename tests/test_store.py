"""The run directory in everyday use: wrong paths, logs, what the folder holds, one process at a time."""

from __future__ import annotations

import errno
import json
import os
import pickletools
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from metaoptim.runs import store
from metaoptim.runs.checkpoint import BEST, LAST, PREVIOUS, START, Checkpoint
from metaoptim.runs.store import RunDirectory, load_checkpoint


def new_run(path: Path) -> RunDirectory:
    return RunDirectory.create(path / "run", recipe='name = "x"\n', environment={})


def at_step(step: int) -> Checkpoint:
    return Checkpoint(step, {"weights": torch.full((3,), float(step))}, {})


def step_in(run: RunDirectory) -> int | None:
    loaded = run.load()
    return loaded and loaded.step


# ---- wrong paths


def test_a_new_run_never_replaces_one(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.close()
    refused = "holds a run already \\({}\\): resume it .*--resume., or choose another folder"
    (run.path / "state.json").rename(run.path / "elsewhere")  # what has a recipe and no state is none of ours
    with pytest.raises(ValueError, match=refused.format("no checkpoint yet")):
        new_run(tmp_path)
    (run.path / "elsewhere").rename(run.path / "state.json")
    run = RunDirectory.reopen(run.path)
    run.save(at_step(40))
    run.close()
    with pytest.raises(ValueError, match=refused.format("step 40 reached")):
        new_run(tmp_path)
    (run.path / "recipe.toml").unlink()
    with pytest.raises(ValueError, match=refused.format("step 40 reached")):
        new_run(tmp_path)
    (run.path / LAST).write_bytes(b"")
    with pytest.raises(ValueError, match=refused.format("its checkpoints are damaged")):
        new_run(tmp_path)


def test_a_run_without_a_saved_step_gives_way(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.log({"step": 1, "loss": 1.0})
    with pytest.raises(ValueError, match="another process or run is using"):
        new_run(tmp_path)
    run.close()
    again = RunDirectory.create(run.path, recipe="other = 1\n", environment={}, start=at_step(0))
    assert (run.path / "recipe.toml").read_text() == "other = 1\n" and (run.path / "metrics.jsonl").read_text() == ""
    assert (run.path / START).exists() and step_in(again) is None


def test_where_there_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    for letter in "abcdefg":
        (tmp_path / "other" / f"{letter}.txt").touch()
    (tmp_path / "file").touch()
    table = {
        "missing": "there is no run in {}, for there is no such folder: check the path",
        "empty": "there is no run in {} (found nothing, expected recipe.toml): check the path",
        "other": "there is no run in {} (found a.txt, b.txt, c.txt, d.txt, e.txt, …, expected recipe.toml): check the path",
        "file": "{} is a file, and a run is a folder: give the folder",
    }
    before = sorted(tmp_path.rglob("*"))
    for name, sentence in table.items():
        for attempt in (RunDirectory.reopen, load_checkpoint):
            with pytest.raises(ValueError) as raised:
                attempt(tmp_path / name)
            assert str(raised.value) == sentence.format(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before  # asking leaves nothing behind

    with pytest.raises(ValueError, match=r"file is a file, and a run needs a folder: choose another path$"):
        RunDirectory.create(tmp_path / "file", recipe="", environment={})
    with pytest.raises(OSError, match=r"^can't create the run .*sub \(Not a directory\): check the path and its"):
        RunDirectory.create(tmp_path / "file" / "sub", recipe="", environment={})


def test_no_checkpoint_to_evaluate_yet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no checkpoint yet: train it until the first one is saved"):
        load_checkpoint(new_run(tmp_path).path)


def test_missing_permissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(tmp_path)
    run.save(at_step(1))

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "somewhere")

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(OSError) as raised:
        load_checkpoint(run.path)
    assert str(raised.value) == (f"can't read the run {run.path} (Permission denied): check the path and its permissions")
    monkeypatch.setattr(Path, "mkdir", forbidden)
    with pytest.raises(OSError, match=r"^can't create the run .* \(Permission denied\): check the path"):
        RunDirectory.create(tmp_path / "other", recipe="", environment={})


# ---- what is logged


def steps_logged(run: RunDirectory) -> list[int]:
    return [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def test_rewinding_what_was_logged(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.rewind(0)  # nothing there yet
    for step in range(1, 8):
        run.log({"step": step, "loss": 1 / step, "note": "line\r\nbreak φ"})
    run.close()
    file = run.path / "metrics.jsonl"
    with open(file, "ab") as torn:
        torn.write(b'{"step": 2, "loss": 0.')

    run = RunDirectory.reopen(run.path)
    run.rewind(5)
    assert steps_logged(run) == [1, 2, 3, 4, 5]
    run.log({"step": 6, "loss": 9.0})
    assert steps_logged(run) == [1, 2, 3, 4, 5, 6]
    unchanged = file.stat().st_ino
    run.rewind(6)
    assert file.stat().st_ino == unchanged
    run.rewind(-1)
    assert file.read_bytes() == b""


@pytest.mark.parametrize("torn", [b'{"step": 1}', b"\0\0\0\n", b"3\n", b'{"loss": 1}\n', b'{"step": null}\n', b"\xff\n"])
def test_a_line_that_is_not_whole_is_dropped(tmp_path: Path, torn: bytes) -> None:
    run = new_run(tmp_path)
    (run.path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 0.5}\n' + torn)
    run.rewind(3)
    assert (run.path / "metrics.jsonl").read_bytes() == b'{"step": 1, "loss": 0.5}\n'


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = new_run(tmp_path)
    for step in (1, 2, 3, 4):
        run.log({"step": step, "loss": float(step), "accuracy": None, "phase": "train"})
    run.close()
    time.sleep(1.1)  # event files are told apart by the second, and by a count that is no number for those who sort them
    run = RunDirectory.reopen(run.path)
    run.rewind(2)
    for step in (3, 4):
        run.log({"step": step, "loss": 10.0 * step})
    run.close()
    events = accumulator.EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 1),
        (2, 2),
        (3, 30),
        (4, 40),
    ]


# ---- the folder as a whole


def test_a_run_can_be_moved_and_holds_no_pickle(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    for step in (1, 2):
        run.save(at_step(step), best=True)
        run.log({"step": step, "loss": 0.5})
    run.write("result.json", "{}\n")
    run.close()
    moved = shutil.move(run.path, tmp_path / "moved")
    files = {str(file.relative_to(moved)) for file in Path(moved).rglob("*") if file.is_file()}
    events = {name for name in files if name.startswith("tensorboard")}
    written = {
        "recipe.toml",
        "environment.json",
        "state.json",
        "metrics.jsonl",
        "result.json",
        LAST,
        PREVIOUS,
        BEST,
    }
    assert len(events) == 1
    assert files - events - {".lock"} == written
    for name in files:
        data = (Path(moved) / name).read_bytes()
        assert not zipfile.is_zipfile(Path(moved) / name)
        with pytest.raises(ValueError):
            list(pickletools.genops(data))
    assert step_in(RunDirectory.reopen(moved)) == 2


# ---- one process at a time


SECOND = """
import sys
from metaoptim.runs.store import RunDirectory, load_checkpoint
for attempt in (RunDirectory.reopen, load_checkpoint):
    try:
        print(type(attempt(sys.argv[1])).__name__, flush=True)
    except ValueError as error:
        print(error, flush=True)
sys.stdin.readline()
run = RunDirectory.reopen(sys.argv[1])
print("holds it", flush=True)
sys.stdin.readline()
"""


def test_a_second_process_is_refused_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.save(at_step(1))
    sentence = f"another process or run is using {run.path}: wait until it ends, or choose another folder"
    process = subprocess.Popen(
        [sys.executable, "-c", SECOND, run.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(store.__file__).parents[2])},
    )
    assert process.stdin
    assert process.stdout
    try:
        assert process.stdout.readline().strip() == sentence
        assert process.stdout.readline().strip() == "Checkpoint"  # reading takes no lock
        run.close()
        run.close()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline().strip() == "holds it"
        with pytest.raises(ValueError) as raised:
            RunDirectory.reopen(run.path)
        assert str(raised.value) == sentence
    finally:
        process.kill()
        process.communicate()
    assert step_in(RunDirectory.reopen(run.path)) == 1


def test_two_runs_in_one_process_are_refused(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with pytest.raises(ValueError, match="another process or run is using"):
        RunDirectory.reopen(run.path)
    run.close()
    RunDirectory.reopen(run.path).close()
