"""What goes wrong around a run: files that are lost, damaged, of another version, or can't be written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import metaoptim as mo
from metaoptim.core.types import MetaOptimizer
from metaoptim.runs import events, store
from metaoptim.runs.checkpoint import BEST, LAST, PREVIOUS, Checkpoint, FormatError, pack, unpack
from metaoptim.runs.store import RunDirectory
from metaoptim.training import TrainingError

SINUSOID = mo.tasks.sinusoid()
OPTIONS: dict[str, Any] = {"iterations": 4, "tasks_per_step": 2, "validate_every": 1, "validate_episodes": 3, "log_every": 1,
                           "checkpoint_every": 1, "progress": False,
                           "engine": {"batching": "loop", "memory": "graph", "runtime": "eager"}}  # fmt: skip


def build() -> MetaOptimizer:
    torch.manual_seed(0)
    return mo.maml(mo.nn.mlp((1, 4, 1)), mo.losses.mse, lr=0.01)


def train(folder: Path, **options: Any) -> mo.Run:
    return mo.train(build(), SINUSOID, **OPTIONS | options, out=folder / "run")


# ---- the best


def with_best_at(run: Path, step: int) -> None:
    """Rewrites the last checkpoints, so that the best was that step's."""
    for name in (LAST, PREVIOUS):
        found = unpack((run / name).read_bytes())
        best = {"metric": "loss", "score": 0.1, "step": step}
        (run / name).write_bytes(pack(found._replace(state={**found.state, "best": best})))


def test_a_lost_best_is_told_and_the_selection_is_last(tmp_path: Path) -> None:
    train(tmp_path)
    run = tmp_path / "run"
    with_best_at(run, 2)
    (run / BEST).unlink()
    with pytest.warns(UserWarning, match=r"best\.safetensors, the best by validation \(step 2\), is lost: .* step 4$"):
        loaded = mo.load(run, build())
    assert (loaded.selection, loaded.step) == ("last", 4)
    assert mo.load(run, build(), "last").selection == "last"


def test_the_last_is_the_best_where_it_was_the_best(tmp_path: Path) -> None:
    """The same φ: then nothing is lost with the file, and nothing is said."""
    train(tmp_path)
    run = tmp_path / "run"
    with_best_at(run, 4)
    (run / BEST).unlink()
    assert mo.load(run, build()).selection == "best"


# ---- the format


def test_a_run_is_the_same_bytes_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(tmp_path / name, engine={**OPTIONS["engine"], "batching": "auto"})  # measured once, and remembered
    choice = unpack((tmp_path / "a" / "run" / LAST).read_bytes()).state["choice"]
    assert choice.keys() == {"batching", "memory", "runtime", "by"}  # and not what was measured
    for name in (LAST, PREVIOUS, BEST):
        assert (tmp_path / "a" / "run" / name).read_bytes() == (tmp_path / "b" / "run" / name).read_bytes(), name


def test_a_checkpoint_is_the_same_bytes_in_whatever_order_it_was_made() -> None:
    one = pack(Checkpoint(1, {"y": torch.ones(2), "x": torch.zeros(3)}, {"b": 1, "a": {"d": 2, "c": None}}))
    for _ in range(20):  # safetensors would draw an order of its own for the metadata each time
        assert one == pack(Checkpoint(1, {"x": torch.zeros(3), "y": torch.ones(2)}, {"a": {"c": None, "d": 2}, "b": 1}))


def other_format(data: bytes, found: str | None) -> bytes:
    """The checkpoint with another format, and a checksum that fits."""
    checkpoint = unpack(data)
    tensors = safetensors.torch.save(checkpoint.tensors)
    metadata = {"sha256": "0" * 64, "state": "{}", "step": "1"} | ({} if found is None else {"format": found})
    made = bytearray(mo.runs.checkpoint._with_metadata(tensors, metadata))
    start = made.index(b'"sha256":"') + 10
    made[start : start + 64] = mo.runs.checkpoint._digest(made, start)
    return bytes(made)


@pytest.mark.parametrize(("found", "words"), [(None, "states no format"), ("2", "has the format 2")])
def test_another_format_is_one_sentence_and_stays_where_it_is(tmp_path: Path, found: str | None, words: str) -> None:
    train(tmp_path)
    run = tmp_path / "run"
    for name in (LAST, PREVIOUS, BEST):
        (run / name).write_bytes(other_format((run / name).read_bytes(), found))
    before = {name: (run / name).read_bytes() for name in (LAST, PREVIOUS, BEST)}
    for attempt in (lambda: mo.load(run, build()), lambda: train(tmp_path, resume=True), lambda: train(tmp_path)):
        with pytest.raises(FormatError) as error:
            attempt()
        assert words in str(error.value) and "\n" not in str(error.value) and "reads format 1" in str(error.value)
    assert {name: (run / name).read_bytes() for name in before} == before  # not taken for damage, and not set aside


@pytest.mark.parametrize("name", ["best", "choice", "seed"])
def test_a_missing_field_is_one_sentence(tmp_path: Path, name: str) -> None:
    train(tmp_path)
    run = tmp_path / "run"
    for file in (LAST, PREVIOUS, BEST):
        found = unpack((run / file).read_bytes())
        (run / file).write_bytes(pack(found._replace(state={k: v for k, v in found.state.items() if k != name})))
    with pytest.raises(ValueError, match=rf"the checkpoint of step \d has no entry `{name}`"):
        mo.load(run, build())


# ---- φ that is not finite


def test_weights_that_are_not_finite_stop_training_and_are_not_saved(tmp_path: Path) -> None:
    def explode(step: int) -> Any:
        class Exploding:
            def __init__(self) -> None:
                self.facts: dict[str, Any] = {}

            def __call__(self, phi: Any, estimate: Any, again: Any) -> Any:
                grow = float("inf") if not explode_at.pop(0) else 1.0
                return mo.MetaParams({n: grow * p for n, p in phi.weights.items()}, phi.rule)

            def state(self) -> dict[str, Any]:
                return {}

            def restore(self, state: Any) -> None: ...

        explode_at = [True] * (step - 1) + [False]
        return Exploding()

    with pytest.raises(TrainingError) as error:
        train(tmp_path, outer_step=explode(3))
    said = str(error.value)
    assert said.startswith("step 3: it made `weights.0.weight` not finite; the last good checkpoint is step 2 in")
    last = unpack((tmp_path / "run" / LAST).read_bytes())
    assert last.step == 2 and all(x.isfinite().all() for x in last.tensors.values())


def test_a_nan_saves_the_state_before_it_whatever_the_interval(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the last good checkpoint is step \d+ in .*run"):
        train(tmp_path, optimizer="SGD", lr=1e12, iterations=20, validate_every=0, checkpoint_every=100)
    last = unpack((tmp_path / "run" / LAST).read_bytes())
    assert last.step >= 1 and all(x.isfinite().all() for x in last.tensors.values())


# ---- logs


def test_tensorboard_that_cannot_be_written_is_one_warning_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(events, "open", full, raising=False)
    with pytest.warns(UserWarning) as caught:
        train(tmp_path)
    (warning,) = caught
    assert str(warning.message) == (
        f"TensorBoard's events can't be written in {tmp_path / 'run' / 'tensorboard'} (No space left on device): training goes "
        "on without them, for metrics.jsonl holds the same numbers"
    )
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4
    assert capfd.readouterr().err == ""


def test_damage_in_the_middle_of_the_metrics_is_told_and_kept(tmp_path: Path) -> None:
    train(tmp_path)
    file = tmp_path / "run" / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    spoilt = lines[0] + b'{"step": 2, "lo\n' + b"\xff\n" + lines[2] + lines[3] + b'{"step": 9'
    file.write_bytes(spoilt)
    with pytest.warns(UserWarning, match=r"metrics\.jsonl is damaged in line 2, 3: .* metrics\.damaged\.jsonl is a copy"):
        train(tmp_path, resume=True, iterations=5)
    assert [json.loads(line)["step"] for line in file.read_bytes().splitlines()] == [1, 3, 4, 5]
    assert (tmp_path / "run" / "metrics.damaged.jsonl").read_bytes() == spoilt
    train(tmp_path, resume=True, iterations=6)  # told once


# ---- advice on a full disk


def test_resume_is_advised_where_something_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = RunDirectory.create(tmp_path / "run", recipe="", environment={})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"\): no step was saved yet, so free some space and resume$"):
            run.save(Checkpoint(1, {}, {}))
        with pytest.raises(OSError, match=r"\): free some space and try again$"):
            store.write_atomic(tmp_path / "result.json", b"")
        with pytest.raises(OSError, match=r"\): free some space and try again$"):
            RunDirectory.create(tmp_path / "other", recipe="", environment={})
    run.save(Checkpoint(1, {}, {}))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"\): what was saved before is intact, so free some space and resume$"):
            run.save(Checkpoint(2, {}, {}))
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_interrupted_write_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.write_atomic(tmp_path / "result.json", b"x")
    assert list(tmp_path.iterdir()) == []
