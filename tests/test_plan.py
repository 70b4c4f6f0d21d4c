"""The planner: what is tried, what is taken, what is remembered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metaoptim.algorithms import maml, reptile
from metaoptim.core import objectives, trees
from metaoptim.core.losses import mse
from metaoptim.core.types import Task
from metaoptim.engine import Choice, Engine
from metaoptim.engine.autotune import cache, peak
from metaoptim.engine.autotune.search import Row, Search
from metaoptim.estimators import Unroll
from metaoptim.nn import mlp

GIB, CPU = 2**30, torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("METAOPTIM_CACHE", str(tmp_path))
    torch.manual_seed(0)
    yield


def tasks(count: int = 3) -> Task:
    return Task((torch.randn(count, 6, 3), torch.randn(count, 6, 2)), (torch.randn(count, 5, 3), torch.randn(count, 5, 2)))


class World:
    """Ways that take the seconds that they are given, on a clock that goes on only when one is run."""

    def __init__(self, seconds: Callable[[Choice], float]) -> None:
        self.seconds, self.now, self.ran = seconds, 0.0, list[str]()

    def build(self, choice: Choice) -> Callable[[], None]:
        cost = self.seconds(choice)
        first = iter([100 * cost if choice.runtime == "trace" else 0.0])

        def run() -> None:
            self.ran.append(" ".join(choice[:3]))
            self.now += cost + next(first, 0.0)

        return run

    def search(self, *settings: str, horizon: int = 1000, rows: Any = (), **changed: Any) -> Search:
        given = {
            "memories": ("graph", "steps", "mixed"),
            "count": 8,
            "steps": 5,
            "single": 1,
            "budget": GIB,
            "device": CPU,
        } | changed
        asked: tuple[Any, ...] = settings or ("auto", "auto", "auto")
        return Search(self.build, asked, **given, horizon=horizon, rows=rows, clock=lambda: self.now)


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def cost(choice: Choice) -> float:
    """vmap beats the loop, a graph eager, mixed graph; compiling beats them all."""
    tasks = {"loop": 4.0, "vmap": 2.0, "vmap:2": 2.2, "workers:2": 1.5, "workers:2:4": 1.8}[choice.batching]
    return (
        tasks
        * {"graph": 1.0, "steps": 1.2, "mixed": 0.9}[choice.memory]
        * {"eager": 1.0, "trace": 0.6, "compile": 0.2}[choice.runtime]
    )


def test_the_fastest_way_is_taken(two_threads: None) -> None:
    found = World(cost).search(horizon=10**6).run()
    assert found.choice[:3] == ("workers:2", "graph", "compile")
    assert found.choice.seconds["workers:2, graph, compile"] == pytest.approx(1.5 * 0.2)
    assert found.why == f"the fastest of the {len(found.rows)} ways that were timed, with a peak within 1 GiB"


def test_what_takes_long_to_build_is_tried_where_it_can_pay(two_threads: None) -> None:
    def tried(horizon: int) -> set[str]:
        return {row.runtime for row in World(cost).search(horizon=horizon).run().rows}

    assert tried(10) == {"eager"}
    assert tried(300) >= {"eager", "trace"}
    quick = World(lambda choice: cost(choice) / 1000).search(horizon=1000).run()
    assert {row.runtime for row in quick.rows} == {"eager", "trace"}, "a thousand steps don't win back compiling"
    assert tried(10**6) == {"eager", "trace", "compile"}


def test_two_mappings_that_are_close_are_both_compiled(two_threads: None) -> None:
    def compiling_helps_one(choice: Choice) -> float:
        return 0.1 if choice[:3] == ("workers:2:4", "graph", "compile") else cost(choice)

    found = World(compiling_helps_one).search("auto", "graph", "auto", horizon=10**6).run()
    assert found.choice[:3] == ("workers:2:4", "graph", "compile"), "traced, it is a fifth slower than the best"
    assert not any(row[:3] == ("loop", "graph", "compile") for row in found.rows), "traced, it is too slow"


def test_a_quarter_of_many_tasks_is_tried_in_a_graph(two_threads: None) -> None:
    def small_fits_the_cache(choice: Choice) -> float:
        return 0.1 if choice.batching == "vmap:2" else cost(choice)

    assert World(small_fits_the_cache).search().run().choice.batching == "vmap:2"
    assert "vmap:2" not in World(cost).search().mappings("eager")
    assert "vmap:1" not in World(cost).search(count=7).mappings("trace")


def test_every_way_is_told_of_before_it_is_measured_and_the_others_rest_meanwhile() -> None:
    said: list[str] = []
    world = World(cost)
    search = world.search("auto", "graph", "eager", say=said.append, rest=lambda: world.ran.append("rest"))
    search.run()
    assert said == ["measuring vmap, graph, eager", "measuring loop, graph, eager"]
    warm, peak_ = ["rest", "vmap graph eager"], ["rest", "vmap graph eager"]
    assert world.ran[: len(warm + peak_) + 1] == [*warm, *peak_, "vmap graph eager"]
    assert world.ran.count("rest") == 4


def test_settings_that_are_given_stay() -> None:
    found = World(cost).search("loop", "auto", "eager").run()
    assert {row[0] for row in found.rows} == {"loop"} and {row[2] for row in found.rows} == {"eager"}
    assert World(cost).search("auto", "steps", "auto", horizon=10).run().choice[:3] == ("vmap", "steps", "eager")
    assert World(cost).search("auto", "auto", "compile", horizon=10).run().choice[2] == "compile", "asked for, so built"


def test_a_hopeless_way_is_timed_once() -> None:
    world = World(lambda choice: 0.1 if choice.batching == "vmap" else 10.0)
    world.search("auto", "graph", "eager").run()
    assert world.ran.count("vmap graph eager") == 2 + 3, "once to warm up, once for its memory, three times for its time"
    assert world.ran.count("loop graph eager") == 2 + 1


def test_what_would_exceed_the_budget_is_not_run() -> None:
    world = World(cost)
    found = world.search(single=GIB // 10, budget=GIB, horizon=10).run()  # 8 tasks · 5 steps · 0.1 GiB for the graph
    assert "vmap graph eager" not in world.ran and "vmap steps eager" in world.ran
    assert found.choice[:3] == ("vmap", "steps", "eager")
    chunked = World(lambda choice: 1.0).search(single=GIB // 4, budget=GIB, horizon=10)
    assert "vmap:4" in chunked.mappings("eager")
    assert chunked.foretold("vmap:4", "steps") == GIB == chunked.foretold("workers:2:2", "steps")
    assert chunked.foretold("loop", "graph") == 5 * (GIB // 4)
    with pytest.raises(
        ValueError, match=r"no way keeps to the memory budget of 1 GiB: the least, .* needs about 4 GiB; give a lar"
    ):
        World(cost).search(single=4 * GIB, budget=GIB).run()


def test_among_ways_that_were_run_those_above_the_budget_come_last() -> None:
    search = World(cost).search(single=0)
    search.rows = [Row("vmap", "graph", "eager", 1.0, 2 * GIB), Row("vmap", "steps", "eager", 2.0, GIB // 2)]
    assert search.conclusion().choice[:3] == ("vmap", "steps", "eager")
    search.rows = [Row("vmap", "graph", "eager", 1.0, 3 * GIB), Row("vmap", "steps", "eager", 2.0, 2 * GIB)]
    assert search.conclusion().choice[:3] == ("vmap", "steps", "eager")
    assert search.conclusion().why.startswith("no way keeps to 1 GiB; of the 2 that were timed this one has the lowest peak")


def test_refused_ways_are_told_and_the_others_go_on() -> None:
    def seconds(choice: Choice) -> float:
        if choice.batching == "vmap":
            raise RuntimeError("no batching\nrule")
        return cost(choice)

    found = World(seconds).search(horizon=10).run()
    assert found.choice.batching == "loop"
    assert [row.note for row in found.rows if row.batching == "vmap"] == ["no batching rule"]
    with pytest.raises(RuntimeError, match="no batching"):
        World(seconds).search("vmap", "graph", "eager").run()


def test_what_is_known_is_not_timed_again() -> None:
    first = World(lambda choice: cost(choice) / 100).search(horizon=10).run()
    world = World(lambda choice: cost(choice) / 100)
    again = world.search(horizon=10, rows=first.rows).run()
    assert again.choice == first.choice and world.ran == []
    longer = world.search(horizon=1000, rows=first.rows).run()
    assert longer.choice.runtime == "trace" and all("trace" in ran for ran in world.ran)


def test_the_peak_of_memory_is_seen() -> None:
    def use() -> Tensor:
        return torch.ones(100 * 2**20, dtype=torch.uint8)[:1].clone()

    found, used = peak.of(use, CPU)
    assert found.item() == 1
    if used is not None:  # a system that tells
        assert 90 * 2**20 < used < 200 * 2**20
        _, less = peak.of(lambda: torch.ones(10), CPU)
        assert less is not None and less < 20 * 2**20


# --- In the engine ------------------------------------------------------------------------------------------------------


def test_auto_decides_once_and_keeps_the_choice(tmp_path: Path) -> None:
    optimizer, batch = maml(mlp((3, 4, 2)), mse), tasks()
    engine = Engine(optimizer, horizon=10)
    estimate = engine(optimizer.phi, batch)
    assert engine.choice is not None
    assert {name.split(",")[0] for name in engine.choice.seconds} == {"loop", "vmap"}
    assert len(list((tmp_path / "plans").iterdir())) == 1, "nothing temporary stays behind"
    named = Engine(optimizer, *engine.choice[:3])(optimizer.phi, batch)
    assert all(torch.equal(a, b) for a, b in zip(trees.flatten(estimate.grad), trees.flatten(named.grad), strict=True))
    again = Engine(optimizer, horizon=10)
    again(optimizer.phi, batch)
    assert again.choice == engine.choice, "read, with the same seconds"


@pytest.mark.slow
def test_every_estimator_can_be_planned() -> None:
    optimizer = reptile(mlp((3, 4, 2)), mse, steps=2)
    engine = Engine(optimizer)
    engine(optimizer.phi, tasks(), engine.init(optimizer.phi, tasks()))
    assert engine.choice is not None and engine.choice.memory == "graph"


def test_a_restored_choice_is_taken_over_unless_the_settings_say_otherwise() -> None:
    optimizer, stored = maml(mlp((3, 4, 2)), mse), Choice("vmap", "steps", "trace")
    auto, partly, given = Engine(optimizer), Engine(optimizer, memory="graph"), Engine(optimizer, "loop", "graph", "eager")
    for engine in (auto, partly, given):
        engine.restore(stored)
    assert (auto.choice, partly.choice, given.choice) == (stored, None, Choice("loop", "graph", "eager"))


def test_measuring_leaves_the_random_numbers_alone() -> None:
    # With dropout a first run, which measures, and a second, which remembers, must draw the same masks.
    optimizer = maml(nn.Sequential(nn.Linear(3, 9), nn.Dropout(0.5), nn.Linear(9, 2)), mse)
    batch, losses = tasks(), []
    for _ in range(2):
        torch.manual_seed(7)
        losses.append(Engine(optimizer, horizon=10)(optimizer.phi, batch).loss)
    assert torch.equal(*losses)


# --- What is remembered -------------------------------------------------------------------------------------------------

ROWS = [Row("loop", "graph", "eager", 0.5, None, ""), Row("vmap", "steps", "trace", None, 3, "why")]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"3", b'[["loop"]]', b'[{"a": 1}, 3]'])
def test_a_damaged_cache_is_measured_anew(content: bytes, tmp_path: Path) -> None:
    assert cache.read("k") is None
    cache.write("k", ROWS)
    assert cache.read("k") == ROWS and cache.read("other") is None
    (tmp_path / "plans" / "k.json").write_bytes(content)
    assert cache.read("k") is None
    cache.write("k", ROWS)
    assert cache.read("k") == ROWS


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "plans").write_text("a file where the folder should be")
    cache.write("k", ROWS)
    assert cache.read("k") is None


def test_the_key_tells_work_apart_and_is_the_same_for_the_same_work() -> None:
    batch, base, asked = tasks(), maml(mlp((3, 4, 2)), mse), ("auto", "auto", "auto")
    keys = {
        cache.key(base, base.phi, batch, asked),
        cache.key(base, base.phi, batch, ("loop", "auto", "auto")),
        cache.key(base, base.phi, tasks(4), asked),
        cache.key(base, base.phi, trees.map_tensors(lambda x: x.double(), batch), asked),
        cache.key(maml(mlp((3, 4, 2)), mse, steps=2), base.phi, batch, asked),
        cache.key(replace(base, estimator=Unroll(first_order=True)), base.phi, batch, asked),
        cache.key(base, maml(mlp((3, 5, 2)), mse).phi, batch, asked),
        cache.key(maml(mlp((3, 4, 2), "tanh"), mse), base.phi, batch, asked),
    }
    assert len(keys) == 8
    again = [replace(base, estimator=Unroll(objective=objectives.multi_step([1.0]))) for _ in range(2)]  # two addresses
    assert len({cache.key(m, m.phi, batch, asked) for m in again}) == 1


@pytest.mark.slow
def test_the_key_is_the_same_in_every_process() -> None:
    code = (
        "import torch\nfrom metaoptim import maml, nn, losses, Task\nfrom metaoptim.engine.autotune.cache import key\n"
        "m, x = maml(nn.mlp((1, 1)), losses.mse), torch.ones(2, 3, 1)\nprint(key(m, m.phi, Task((x, x), (x, x)), ()))"
    )
    seen = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": s}
        )
        for s in ("1", "2")
    ]
    assert seen[0].stdout == seen[1].stdout != ""


def test_rows_survive_json() -> None:
    assert [Row(*row) for row in json.loads(json.dumps(ROWS))] == ROWS
