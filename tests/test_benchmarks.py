"""The benchmarks compare like with like: every way computes the same meta-gradient, and operations are counted right."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from metaoptim.core import trees
from metaoptim.engine.options import check_settings

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES = ("hypergradient", "memory", "peers", "rounds", "shared", "sweep", "works")
WORKS = ("sinusoid-1", "sinusoid-5", "omniglot-1", "omniglot-5", "fomaml-1", "fomaml-5", "reptile-5", "mini-imagenet-2")

EXACT = tuple(n for n in WORKS if not n.startswith(("fomaml", "reptile")))  # torchopt has no first-order option


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The modules of the folder, which are scripts and so import each other by their bare names."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in NAMES})
    finally:
        sys.path.remove(str(FOLDER))
        for name in (*NAMES, "jax_peer"):
            sys.modules.pop(name, None)


def shrunk(bench: Any, name: str) -> Any:
    """A work that is measured, with fewer tasks, smaller images and narrower layers."""
    work = next((w for w in bench.works.SPEED if w.name == name), None) or bench.works.mini_imagenet(2)
    small = {"filters": 3, "size": 16 if work.options.get("pool") else 17} if work.model == "conv4" else {}
    return replace(work, tasks=min(work.tasks, 2), query=min(work.query, 5), options={**work.options, **small})


def check(way: Any, work: Any, bench: Any) -> None:
    weights, batch = work.weights(torch.float64), work.batch(0, torch.float64)
    loss, grad = bench.peers.loop(work)(weights, batch)
    found, mine = way(weights, batch)
    assert mine.keys() == grad.keys()
    gap = trees.norm(trees.subtract(mine, grad)) / trees.norm(grad)
    assert gap < 1e-9
    assert found == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("name", WORKS)
def test_our_engine_computes_what_the_written_out_loop_does(bench: Any, name: str) -> None:
    work = shrunk(bench, name)
    check(bench.peers.ours(work, "loop/graph/eager", torch.float64)[0], work, bench)


@pytest.mark.parametrize(("peer", "name"), [("higher", n) for n in WORKS] + [("torchopt", n) for n in EXACT])
def test_peers_compute_what_the_written_out_loop_does(bench: Any, peer: str, name: str) -> None:
    pytest.importorskip(peer)
    work = shrunk(bench, name)
    check(getattr(bench.peers, f"with_{peer}")(work, torch.float64), work, bench)


@pytest.mark.parametrize("name", WORKS)
def test_the_stock_module_is_the_written_out_network(bench: Any, name: str) -> None:
    work = shrunk(bench, name)
    net, weights = bench.peers.stock(work, torch.float64), work.weights(torch.float64)
    net.load_state_dict(weights)
    x = work.batch(0, torch.float64).query[0][0]
    assert torch.allclose(net(x), bench.peers.forward(work)(weights, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in WORKS if not n.startswith("sinusoid")])
def test_operations_are_counted_as_torch_counts_them(bench: Any, name: str) -> None:
    work = shrunk(bench, name)
    with FlopCounterMode(display=False) as counter:
        bench.peers.loop(work)(work.weights(), work.batch())
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "convolution" in str(op))
    # The second backward of torch computes one product that nobody needs: for the gradient of the images themselves.
    side = work.options["size"] if work.options.get("pool") else (work.options["size"] + 1) // 2
    needless = 2 * work.options.get("channels", 1) * work.options["filters"] * 9 * side**2
    images = work.tasks * work.steps * work.support if work.algorithm == "maml" else 0
    assert work.flops() + images * needless == counted


def test_swept_settings_are_words_of_the_engine(bench: Any) -> None:
    assert len(bench.works.SWEEP) >= 12
    assert len({work.name for work in bench.works.SWEEP}) == len(bench.works.SWEEP)
    for work in bench.works.SWEEP:
        found = list(bench.sweep.settings(work, ["eager", "trace", "compile"]))
        assert len(set(found)) == len(found) > 10
        for setting in found:
            check_settings(*setting.split("/"), "full")


def test_ratios_are_paired_by_round(bench: Any) -> None:
    base, other = (bench.rounds.Contender(name, lambda calls, index: 0.0) for name in "ab")
    base.seconds, other.seconds = {0: 1.0, 1: 10.0, 2: 4.0}, {0: 0.5, 2: 1.0}
    assert bench.rounds.ratios(base, other) == [2.0, 4.0]
    assert bench.rounds.quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)


def test_quick_ways_are_called_often_and_slow_ones_seldom(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[int]] = {"quick": [], "slow": []}

    def way(name: str, seconds: float) -> Any:
        def run(calls: int, index: int) -> float:
            asked[name].append(calls)
            return calls * seconds

        return bench.rounds.Contender(name, run)

    contenders = [way("quick", 0.001), way("slow", 9.0)]
    monkeypatch.setattr(bench.rounds, "WARM", 0.0)
    bench.rounds.measure(contenders, rounds=5, batches=2, title="")
    assert asked == {"quick": [1, *[50] * 5], "slow": [1] * 4}
    assert contenders[0].median == pytest.approx(0.001)
    assert len(contenders[1].seconds) == bench.rounds.FEW


@pytest.mark.parametrize("way", ["exact", 'exact, memory="steps"', "engine", "higher", "torchopt"])
def test_hypergradients_are_those_of_the_written_out_loop(bench: Any, way: str) -> None:
    script = bench.hypergradient
    problem = script.Problem(steps=3, rows=8, width=4, dtype=torch.float64)
    hyper = problem.hyper(5)
    if way in ("higher", "torchopt"):
        pytest.importorskip(way)
        run = getattr(script, f"with_{way}")(problem)
    else:
        run = script.compiled(problem, "trace") if way == "engine" else script.ours(problem, **script.OURS[way])
    (loss, grad), (found, mine) = script.loop(problem)(hyper), run(hyper)
    assert mine.keys() == grad.keys() and all(g.norm() > 1e-6 for g in grad.values())
    assert trees.norm(trees.subtract(mine, grad)) < 1e-9 * trees.norm(grad)
    assert found.item() == pytest.approx(loss.item(), rel=1e-12)


def test_memory_is_foretold_on_a_line(bench: Any) -> None:
    seen = {k: [bench.memory.Seen(100 + 7 * k, 1.0, 1.0)] for k in (1, 5, 20)}
    assert bench.memory.extrapolated(seen, 50) == pytest.approx(100 + 7 * 50)
    assert bench.memory.extrapolated({1: seen[1]}, 50) == 0
