"""A run that was killed, stopped or damaged goes on to the same floats, to the bit, as one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import metaoptim as mo
from metaoptim.cli.main import main
from metaoptim.core.types import MetaOptimizer, Task
from metaoptim.runs.checkpoint import BEST, LAST, PREVIOUS, Checkpoint
from metaoptim.runs.store import load_checkpoint
from metaoptim.tasks import TaskFamily

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(mo.__file__).parents[1]), "OMP_NUM_THREADS": "1"}

DRIVER = """
import json, os, signal, sys, time, traceback
from importlib import import_module
from pathlib import Path
import torch, torch._dynamo, torch.utils.tensorboard  # once, ahead of the forks
import metaoptim as mo
from metaoptim.runs import store

case, kills, out = *map(json.loads, sys.argv[1:3]), Path(sys.argv[3])

def letters(generator, split):
    means, y = torch.randn(3, 1, 4, 4, generator=generator), torch.arange(3).repeat(2)
    draw = lambda: (means[y] + 0.3 * torch.randn(6, 1, 4, 4, generator=generator), y)
    return draw(), draw()

def train(folder, resume):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if case["letters"]:
        from metaoptim.algorithms.example import plain_net
        method, tasks = eval(case["method"])(plain_net(3), mo.losses.cross_entropy), mo.tasks.from_function(letters)
    else:
        method, tasks = eval(case["method"])(mo.nn.mlp([1, 8, 1]), mo.losses.mse), mo.tasks.sinusoid()
    mo.train(method, tasks, iterations=50, tasks_per_step=2, out=folder, checkpoint_every=1, log_every=1,
             validate_every=7, validate_episodes=5, resume=resume, engine=case["engine"], progress=False)

def child(folder, resume, die_at=0):
    '''A process of its own that trains; it kills itself ahead of its die_at-th rename, where that is given.'''
    pid = os.fork()
    if pid:
        return pid
    renames, replace = iter(range(1, 10**6)), os.replace
    def rename(*arguments):
        if next(renames) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*arguments)
    os.replace = rename
    try:
        train(folder, resume)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

def logged(folder):
    path = folder / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0

os.waitpid(child(out / "whole", False), 0)
story = []
for die_at, delay in kills:
    pid = child(out / "killed", (out / "killed/recipe.toml").exists(), die_at)
    if not die_at:
        before = logged(out / "killed")
        while logged(out / "killed") == before and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    names = {p.name for p in (out / "killed").glob("*")} | {p.name for p in (out / "killed").glob(".*.tmp")}
    story.append([os.WIFSIGNALED(status), any(n.endswith(".tmp") for n in names)])
status = os.waitpid(child(out / "killed", (out / "killed/recipe.toml").exists()), 0)[1]
print(json.dumps({"status": status, "story": story}))
"""

TIMES = random.Random(0)
KILLS = [(0, TIMES.uniform(0.0, 0.05)) if i % 2 else (TIMES.randrange(1, 15), 0.0) for i in range(12)]


def check_same(a: Path, b: Path, which: Any = "last") -> Checkpoint:
    x, y = (load_checkpoint(folder, which) for folder in (a, b))
    assert (x.step, x.state) == (y.step, y.state)
    assert x.tensors.keys() == y.tensors.keys()
    for name, tensor in x.tensors.items():
        assert tensor.dtype == y.tensors[name].dtype
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), y.tensors[name].reshape(-1).view(torch.uint8)), name
    return x


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


COMPOSED = "lambda net, loss: mo.compose(net, loss, rule=mo.rules.Momentum(0.01), steps=12, estimator=mo.estimators.{})"

# What is trained, on letters or sinusoids; what its checkpoints hold besides φ; how often it is killed.
METHODS: dict[str, tuple[str, bool, str, int]] = {
    "maml": ("lambda net, loss: mo.maml(net, loss, lr=0.01, steps=2)", False, "outer/", 12),
    "reptile": ("lambda net, loss: mo.reptile(net, loss, lr=0.01, batch_size=4)", False, "carry/", 12),
    "anil": ("mo.anil", True, "outer/", 4),
    "protonet": ("mo.protonet", True, "outer/", 4),
    "imaml": ("lambda net, loss: mo.imaml(net, loss, lr=0.01, steps=4)", False, "outer/", 4),
    "truncated": (COMPOSED.format("Truncated(3)"), False, "carry/", 4),
    "PES": (COMPOSED.format("pes(3, 0.01, 2)"), False, "carry/", 4),
    "NRES": (COMPOSED.format("nres(3, 0.01, 2)"), False, "carry/", 4),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "name", [name if name == "truncated" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_killed_again_and_again_and_still_the_same_bits(tmp_path: Path, name: str) -> None:
    method, letters, tensors, kills = METHODS[name]
    case = {
        "method": method,
        "letters": letters,
        "engine": {"batching": "loop" if name == "reptile" else "vmap", "memory": "graph", "runtime": "eager"},
    }
    command = [sys.executable, "-c", DRIVER, json.dumps(case), json.dumps(KILLS[:kills]), str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["status"] == 0
    assert sum(killed for killed, _ in told["story"]) >= kills // 2
    assert any(torn for _, torn in told["story"])  # at least one hit a save in the middle
    checkpoint = check_same(tmp_path / "whole", tmp_path / "killed")
    check_same(tmp_path / "whole", tmp_path / "killed", "best")
    assert checkpoint.step == 50 and any(name.startswith(tensors) for name in checkpoint.tensors)
    assert steps(tmp_path / "killed") == list(range(1, 51)) == steps(tmp_path / "whole")
    assert json.loads((tmp_path / "killed" / "state.json").read_text())["status"] == "finished"
    assert not list((tmp_path / "killed").glob(".*.tmp"))


TINY = """
algorithm = { name = "maml", loss = "mse", lr = 0.01 }
model = { name = "mlp", sizes = [1, 8, 1] }
tasks = { name = "sinusoid" }
engine = { batching = "loop", memory = "graph", runtime = "eager" }
train = { iterations = 200, tasks_per_step = 2, log_every = 1, validate_every = 0, checkpoint_every = 1000 }
"""


def test_ctrl_c_saves_and_says_how_to_go_on_and_nobody_else_may_train_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY)
    command = [sys.executable, "-m", "metaoptim.cli.main", "train", "tiny.toml", "--out", "stopped"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 300
        while not Path("stopped/metrics.jsonl").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)  # so that it can't end while it is looked at
        assert main(["train", "tiny.toml", "--out", "stopped", "--resume"]) == 2
        assert "another process" in capsys.readouterr().err
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, ""), err
    checkpoint = load_checkpoint("stopped", "last")
    assert 1 <= checkpoint.step < 200
    assert "stopping when this step is done; once more stops at once" in err
    assert f"stopped after step {checkpoint.step}, saved in stopped" in err and "\x1b" not in err
    assert "To go on: metaoptim train tiny.toml --out stopped --resume" in err and "Traceback" not in err
    assert json.loads(Path("stopped/state.json").read_text())["status"] == "interrupted"

    assert main(["train", "tiny.toml", "--out", "whole"]) == 0
    capsys.readouterr()
    assert main(["train", "tiny.toml", "--out", "stopped", "--resume"]) == 0
    assert f"going on after step {checkpoint.step}\n" in capsys.readouterr().err
    check_same(Path("whole"), Path("stopped"))
    assert steps(Path("stopped")) == list(range(1, 201))


# ---- in one process


@dataclass(frozen=True)
class Stopping:
    """Sinusoids, until the tasks of an outer step come that is beyond `steps`."""

    steps: int
    tasks: TaskFamily
    splits = ("train", "val", "test")

    def sample(self, split: str, *, seed: int, start: int, count: int) -> Task:
        if split == "train" and start // count >= self.steps:
            raise KeyboardInterrupt
        return self.tasks.sample(split, seed=seed, start=start, count=count)

    def describe(self, split: str) -> dict[str, Any]:
        return self.tasks.describe(split)


OPTIONS: dict[str, Any] = {"iterations": 9, "tasks_per_step": 2, "checkpoint_every": 2, "validate_every": 3,
                           "validate_episodes": 5, "log_every": 1, "progress": False,
                           "engine": {"batching": "loop", "memory": "graph", "runtime": "eager"}}  # fmt: skip


def build() -> MetaOptimizer:
    torch.manual_seed(0)
    return mo.meta_sgd(mo.nn.mlp([1, 8, 1]), mo.losses.mse)


def stopped_and_whole(folder: Path, at: int = 7, **options: Any) -> tuple[Path, Path]:
    """A run that ended after the checkpoint of step at − 1, and one that went through."""
    mo.train(build(), mo.tasks.sinusoid(), **OPTIONS | options, out=folder / "whole")
    with pytest.raises(KeyboardInterrupt):
        mo.train(build(), Stopping(at, mo.tasks.sinusoid()), **OPTIONS | options, out=folder / "stopped")
    return folder / "stopped", folder / "whole"


def resume(path: Path, **options: Any) -> None:
    mo.train(build(), mo.tasks.sinusoid(), **OPTIONS | options, out=path, resume=True)


def test_a_damaged_checkpoint_falls_back_says_so_and_ends_at_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped, whole = stopped_and_whole(tmp_path)
    data = bytearray((stopped / LAST).read_bytes())
    data[len(data) // 2] ^= 1
    (stopped / LAST).write_bytes(data)
    with pytest.warns(UserWarning, match=rf"{LAST} is cut or altered: falling back to {PREVIOUS}, step 4"):
        resume(stopped, progress=True)
    assert "going on after step 4\n" in capsys.readouterr().err
    check_same(stopped, whole)
    check_same(stopped, whole, "best")
    assert steps(stopped) == list(range(1, 10))


def test_a_missing_last_checkpoint_goes_on_from_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped, whole = stopped_and_whole(tmp_path)
    (stopped / LAST).unlink()
    resume(stopped, progress=True)
    assert "going on after step 4\n" in capsys.readouterr().err
    check_same(stopped, whole)


def test_nothing_intact_is_one_sentence(tmp_path: Path) -> None:
    stopped, _ = stopped_and_whole(tmp_path)
    for name in (LAST, PREVIOUS, BEST):
        (stopped / name).write_bytes((stopped / name).read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"no checkpoint in .* is intact"):
        resume(stopped)


def test_without_a_checkpoint_it_starts_again(tmp_path: Path) -> None:
    stopped, whole = stopped_and_whole(tmp_path, at=1)
    assert not (stopped / LAST).exists() and steps(stopped) == [1]
    resume(stopped)
    check_same(stopped, whole)
    assert steps(stopped) == list(range(1, 10))


def test_a_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    _, whole = stopped_and_whole(tmp_path)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files(whole)}
    resume(whole)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files(whole)} == before


def test_the_engines_choice_is_stored_in_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's opinion of what is fastest has changed in the meantime; the run must not notice."""
    monkeypatch.setenv("METAOPTIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(import_module("metaoptim.training.train"), "WAIT", 2)
    stopped, whole = stopped_and_whole(tmp_path, engine={"batching": "auto", "runtime": "auto"})
    assert tomllib.loads((whole / "recipe.toml").read_text())["engine"]["choice"].split()[0] in ("loop", "vmap")
    (plan,) = (tmp_path / "cache" / "plans").glob("*.json")
    chosen = load_checkpoint(stopped, "last").state["choice"]
    slower = [[*row[:3], 100.0 if row[0] == chosen["batching"] else 0.1, *row[4:]] for row in json.loads(plan.read_text())]
    plan.write_text(json.dumps(slower))
    resume(stopped, engine={"batching": "auto", "runtime": "auto"})
    assert check_same(stopped, whole).state["choice"] == chosen


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 1}, "train.seed is 0 in the run and 1 here"),
        ({"tasks_per_step": 3}, "train.tasks_per_step is 2 in the run and 3 here"),
        ({"clip": 1.0}, "train.clip is None in the run and 1.0 here"),
        ({"lr": 0.5}, "weights.lr is 0.001 in the run and 0.5 here"),
        ({"optimizer": "SGD"}, "train.optimizer is Adam() in the run and SGD() here"),
        ({"schedule": "linear"}, "train.schedule is constant in the run and linear here"),
        ({"iterations": 3}, "train.iterations is 9 in the run and 3 here"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    stopped, whole = stopped_and_whole(tmp_path)
    with pytest.raises(ValueError) as error:
        resume(stopped, **changed)
    assert words in str(error.value) and "start a new run in another folder" in str(error.value)
    resume(stopped)  # nothing was lost
    check_same(stopped, whole)


def test_another_model_is_refused(tmp_path: Path) -> None:
    stopped, _ = stopped_and_whole(tmp_path)
    other = mo.maml(mo.nn.mlp([1, 9, 1]), mo.losses.mse)
    with pytest.raises(ValueError, match=r"algorithm is meta_sgd in the run and maml here"):
        mo.train(other, mo.tasks.sinusoid(), **OPTIONS, out=stopped, resume=True)


def test_a_constant_schedule_may_be_prolonged(tmp_path: Path) -> None:
    stopped, _ = stopped_and_whole(tmp_path)
    resume(stopped, iterations=12)
    mo.train(build(), mo.tasks.sinusoid(), **{**OPTIONS, "iterations": 12}, out=tmp_path / "longer")
    check_same(stopped, tmp_path / "longer")


def test_another_method_is_refused(tmp_path: Path) -> None:
    def train(resume: bool = False, steps: int = 2, rule: Any = None) -> mo.Run:
        torch.manual_seed(0)
        method = mo.compose(mo.nn.mlp([1, 8, 1]), mo.losses.mse, rule=rule or mo.rules.Momentum(0.01), steps=steps)
        engine = {"batching": "vmap", "memory": "graph", "runtime": "eager"}
        return mo.train(method, mo.tasks.sinusoid(), iterations=2, tasks_per_step=2, out=tmp_path / "run", resume=resume,
                        engine=engine, progress=False)  # fmt: skip

    train()
    assert train(resume=True).step == 2
    before = {path: path.read_bytes() for path in files(tmp_path / "run")}
    for changed, words in (
        ({"steps": 3}, "learner.steps is 2 in the run and 3 here"),
        ({"rule": mo.rules.Momentum(0.02)}, "learner.rule.lr is 0.01 in the run and 0.02 here"),
        ({"rule": mo.rules.SGD(0.01)}, r"learner.rule is Momentum\(lr=0.01, decay=0.9\) in the run and SGD\(lr=0.01\) here"),
    ):
        with pytest.raises(ValueError, match=words):
            train(resume=True, **changed)
    assert before == {path: path.read_bytes() for path in files(tmp_path / "run")}, "it is left alone"
