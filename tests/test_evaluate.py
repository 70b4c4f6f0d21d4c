"""The evaluation contract: what a score says of itself, and that it says the truth."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import metaoptim as mo
from metaoptim.core.types import Task
from metaoptim.evaluation import Result, baselines
from metaoptim.evaluation.evaluate import phi_hash, with_normalisation
from metaoptim.evaluation.result import Row
from metaoptim.report import figures
from metaoptim.runs import Run
from metaoptim.tasks import ImageTasks, episodes_hash

LOOP = {"batching": "loop", "memory": "graph", "runtime": "eager"}

SINUSOID = mo.tasks.sinusoid()


def images(shots: int = 2) -> ImageTasks:
    """Twelve classes of 12×12 noise around a picture of their own, four of them in each split."""
    rng = np.random.default_rng(0)
    drawings = rng.integers(0, 120, (12, 1, 12, 12)) + rng.integers(0, 136, (12, 8, 12, 12))
    members = {split: np.arange(i, i + 4) for split, i in (("train", 0), ("val", 4), ("test", 8))}
    return ImageTasks("blobs", drawings.astype(np.uint8), list("abcdefghijkl"), members, 3, shots, 3)


def trained(seed: int = 0, normalisation: Any = "transductive", net: nn.Module | None = None, **options: Any) -> Run:
    torch.manual_seed(seed)
    net = net or mo.nn.conv4(ways=3, size=12, filters=4)
    meta = mo.maml(net, mo.losses.cross_entropy, lr=0.3, steps=2, normalisation=normalisation)
    short: dict[str, Any] = {"iterations": 4, "tasks_per_step": 2, "validate_every": 2, "validate_episodes": 4}
    return mo.train(meta, images(), **short, seed=seed, engine=LOOP, progress=False, **options)


@pytest.fixture(autouse=True)
def few_tuning_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step size of the row "pretrained" is chosen on few episodes, to save time."""
    monkeypatch.setattr(baselines, "TUNING_EPISODES", 4)


@pytest.fixture(scope="module")
def run() -> Run:
    return trained()


def judge(run: Any, **options: Any) -> Result:
    return mo.evaluate(run, images(), **{"episodes": 20, "progress": False} | options)


def reference(run: Run, episodes: Task, t: int, steps: int) -> list[tuple[float, float]]:
    """(loss, accuracy) after 0 … K plain SGD steps with autograd, batch statistics of whatever is fed."""
    net = mo.nn.conv4(ways=3, size=12, filters=4)
    net.load_state_dict(run.phi.weights, strict=False)
    (xs, ys), (xq, yq) = ((x[t], y[t]) for x, y in episodes)
    scores = []
    for k in range(steps + 1):
        if k:
            grads = torch.autograd.grad(nn.functional.cross_entropy(net(xs), ys), list(net.parameters()))
            with torch.no_grad():
                for p, g in zip(net.parameters(), grads, strict=True):
                    p.sub_(0.3 * g)
        with torch.no_grad():
            output = net(xq)
        scores.append((nn.functional.cross_entropy(output, yq).item(), (output.argmax(1) == yq).float().mean().item()))
    return scores


def test_scores_are_those_of_plain_autograd_on_the_named_episodes(run: Run) -> None:
    result = judge(run, episodes=6, steps=3, seed=4)
    episodes = images().sample("test", seed=4, start=0, count=6)
    expected = torch.tensor([reference(run, episodes, t, 3) for t in range(6)])
    torch.testing.assert_close(result.rows[0].scores["loss"], expected[..., 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.rows[0].scores["accuracy"], expected[..., 1])


def test_facts_and_rows_are_complete_and_the_json_is_strict(run: Run) -> None:
    result = judge(run, baselines=("untrained", "prototypes", "pretrained"), pretrain_iterations=3, steps=3)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} isn't JSON")

    told = json.loads(result.json(), parse_constant=refuse)
    assert [row["name"] for row in told["rows"]] == ["maml", "untrained", "prototypes", "pretrained"]
    assert (told["split"], told["episodes"], told["steps"], told["training_steps"]) == ("test", 20, 3, 2)
    assert told["tasks"]["classes_sha256"] == images().describe("test")["classes_sha256"]
    assert told["episodes_sha256"] == episodes_hash(images(), "test", seed=0, start=0, count=20)
    assert (told["normalisation"], told["selection"], told["seeds"]) == ("transductive", "best", [0])
    assert told["runs"] == [{"path": None, "step": run.step, "phi_sha256": phi_hash(run)}]
    assert told["algorithm"] == "maml" and told["pretrain_iterations"] == 3 and told["engine"] == ["loop"]
    assert told["environment"]["torch"] == torch.__version__
    assert (told["metric"], told["mean"], told["interval"]) == ("accuracy", result.mean, result.interval)
    for row in told["rows"]:
        assert row["about"] and row["seeds"]["count"] == 1 and row["seeds"]["spread"]["accuracy"] is None
        length = 1 if row["name"] == "prototypes" else 4
        assert len(row["accuracy"]["mean"]) == len(row["accuracy"]["interval"]) == length
        assert ("against_first" in row) == (row["name"] != "maml")


def test_intervals_and_paired_differences_against_numpy(run: Run) -> None:
    result = judge(run, episodes=17)
    method, untrained = (row.scores["loss"].double().numpy() for row in result.rows[:2])
    assert result.rows[0].mean("loss") == pytest.approx(method.mean(0))
    assert result.rows[0].interval("loss") == pytest.approx(1.96 * method.std(0, ddof=1) / np.sqrt(17))
    gap = untrained[:, -1] - method[:, -1]
    assert result.rows[1].paired(result.rows[0], "loss") == pytest.approx((gap.mean(), 1.96 * gap.std(ddof=1) / np.sqrt(17)))
    assert result.interval == result.rows[0].interval("accuracy")[-1]
    assert json.loads(judge(run, episodes=1).json())["interval"] is None  # one episode says nothing of the spread


def test_the_json_is_enough_to_get_the_same_numbers(tmp_path: Path) -> None:
    trained(out=tmp_path / "run")
    torch.manual_seed(0)
    meta = mo.maml(mo.nn.conv4(ways=3, size=12, filters=4), mo.losses.cross_entropy, lr=0.3, steps=2)
    options: dict[str, Any] = {"baselines": ("untrained", "prototypes", "pretrained"), "pretrain_iterations": 3}
    told = json.loads(judge(mo.load(tmp_path / "run", meta), seed=3, steps=1, **options).json())
    torch.rand(7)  # whatever was drawn in the meantime
    again = mo.load(told["runs"][0]["path"], meta, told["selection"])
    assert phi_hash(again) == told["runs"][0]["phi_sha256"]
    result = mo.evaluate(
        again, images(), split=told["split"], episodes=told["episodes"], steps=told["steps"], seed=told["episode_seed"],
        normalisation=told["normalisation"], baselines=[row["name"] for row in told["rows"][1:]],
        pretrain_iterations=told["pretrain_iterations"], progress=False,
    )  # fmt: skip
    assert json.loads(result.json()) == told


@pytest.mark.slow
def test_every_method_sees_the_same_episodes_and_the_caller_keeps_its_generator(run: Run) -> None:
    before = torch.get_rng_state()
    twin = replace(run, method=replace(run.method, phi=run.phi))  # so that "untrained" is the method itself
    result = judge(twin, episodes=55, baselines=("untrained", "pretrained"), pretrain_iterations=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert result.rows[1].paired(result.rows[0], "loss") == (0.0, 0.0)
    for metric, x in judge(twin, episodes=7).rows[0].scores.items():  # the first 7 of 55
        torch.testing.assert_close(x, result.rows[0].scores[metric][:7])


def test_the_untrained_row_is_the_start(run: Run) -> None:
    result = judge(run)
    torch.manual_seed(0)
    meta = mo.maml(mo.nn.conv4(ways=3, size=12, filters=4), mo.losses.cross_entropy, lr=0.3, steps=2)
    fresh = judge(Run(meta, meta.phi), baselines=())
    assert result.rows[1].name == "untrained" and [row.name for row in fresh.rows] == ["maml"]
    torch.testing.assert_close(result.rows[1].scores["loss"], fresh.rows[0].scores["loss"], rtol=0, atol=0)
    assert not torch.equal(result.rows[0].scores["loss"], result.rows[1].scores["loss"])


@pytest.mark.parametrize("policy", ["transductive", "inductive", "frozen"])
def test_prototypes_against_a_written_out_reference(run: Run, policy: Any) -> None:
    score = judge(run, episodes=5, normalisation=policy, baselines=("prototypes",)).rows[1].scores["accuracy"]
    trunk = mo.nn.conv4(ways=3, size=12, filters=4)
    trunk.load_state_dict(run.phi.weights, strict=False)
    assert isinstance(trunk, nn.Sequential)
    trunk = trunk[:-1]
    episodes = images().sample("test", seed=0, start=0, count=5)
    for t in range(5):
        (xs, ys), (xq, yq) = ((x[t], y[t]) for x, y in episodes)
        with torch.no_grad(), mo.nn.statistics(frozen=policy == "frozen"):
            fs = trunk(xs)
            # Under "inductive" one query at a time, so that none can see another.
            fq = torch.stack([_behind(trunk, xs, x) for x in xq]) if policy == "inductive" else trunk(xq)
        means = [torch.stack([f for f, y in zip(fs, ys, strict=True) if y == c]).mean(0) for c in range(3)]
        right = [
            int(min(range(3), key=lambda c: (f - means[c]).square().sum().item()) == y) for f, y in zip(fq, yq, strict=True)
        ]
        assert score[t].item() == pytest.approx(sum(right) / len(right))


def _behind(trunk: nn.Module, xs: Tensor, x: Tensor) -> Tensor:
    with mo.nn.statistics(rows=len(xs)):
        features: Tensor = trunk(torch.cat([xs, x[None]]))[-1]
    return features


def test_inductive_predictions_do_not_depend_on_other_queries() -> None:
    """Losses are means over the queries: judged one by one they must average to the same, which transductive ones can't."""
    run = trained(normalisation="inductive")
    (xs, ys), (xq, yq) = images().sample("test", seed=0, start=0, count=1)

    def loss(run: Run, x: Tensor, y: Tensor) -> float:
        tasks = mo.tasks.from_function(lambda generator, split: ((xs[0], ys[0]), (x, y)))
        return mo.evaluate(run, tasks, episodes=1, baselines=(), progress=False).rows[0].mean("loss")[-1]

    policy: Any
    for policy, independent in (("inductive", True), ("frozen", True), ("transductive", False)):
        judged = with_normalisation(run, policy)
        alone = [loss(judged, xq[0, i : i + 1], yq[0, i : i + 1]) for i in range(len(yq[0]))]
        assert (np.mean(alone) == pytest.approx(loss(judged, xq[0], yq[0]), rel=1e-4)) == independent
        facts = judge(run, episodes=2, normalisation=policy, baselines=()).facts
        assert facts["normalisation"] == policy


@pytest.mark.slow
def test_several_runs_are_seeds(run: Run) -> None:
    other = trained(seed=1)
    both, a, b = judge([run, other]), judge(run), judge(other)
    for row, x, y in zip(both.rows, a.rows, b.rows, strict=True):
        torch.testing.assert_close(row.scores["accuracy"], (x.scores["accuracy"] + y.scores["accuracy"]) / 2)
    told = json.loads(both.json())
    means = [a.mean, b.mean]
    assert told["seeds"] == [0, 1] and told["rows"][0]["seeds"]["means"]["accuracy"] == pytest.approx(means)
    assert told["rows"][0]["seeds"]["spread"]["accuracy"] == pytest.approx(np.std(means, ddof=1))


def test_a_result_says_both_where_runs_were_selected_in_different_ways(run: Run) -> None:
    runs = [replace(run, selection=how) for how in ("last", "best")]
    result = judge(runs, episodes=2, baselines=[])
    assert result.facts["selection"] == "best and last" and "checkpoint: best and last" in str(result)
    assert judge(runs[:1], episodes=2, baselines=[]).facts["selection"] == "last"


def test_dropout_is_off_for_every_run_and_back_on_afterwards() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.Dropout(0.9), nn.Linear(8, 3))

    runs = [trained(seed=s, net=net()) for s in (0, 1)]
    together = judge(runs, baselines=())
    alone = [judge(r, baselines=()).rows[0].scores["loss"] for r in runs]
    torch.testing.assert_close(together.rows[0].scores["loss"], torch.stack(alone).mean(0))
    assert all(r.network.net.training for r in runs)


def test_the_pretrained_row_learns_and_leaves_the_run_alone(run: Run) -> None:
    before = phi_hash(run), {n: x.clone() for n, x in run.network.net.state_dict().items()}
    torch.manual_seed(0)
    base = baselines.pretrained(run, images(), 30, 2, False)
    assert base.phi.weights["head.weight"].count_nonzero() == 0 and base.phi.weights["head.weight"].shape[0] == 3
    assert not torch.equal(base.phi.weights["block0.0.weight"], run.phi.weights["block0.0.weight"])
    assert phi_hash(run) == before[0]
    assert all(torch.equal(x, before[1][n]) for n, x in run.network.net.state_dict().items())
    assert judge(base, baselines=()).mean > 1.2 / 3  # better than chance, from a zero head


def test_rows_that_a_network_has_no_features_for_are_left_out_with_a_reason_or_refused_where_they_are_asked_for() -> None:
    class Misread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.hidden, self.drop = nn.Linear(8, 3), nn.Linear(144, 8), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.drop(self.hidden(x.flatten(1)).relu()))

    bare = nn.Sequential(nn.Conv2d(1, 3, 12), nn.Flatten())
    cases = ((Misread(), r"`hidden` \(Linear\), can't be left out"), (bare, r"one with weights is layer `0` \(Conv2d\)"))
    for net, said in cases:
        run = Run(method := mo.maml(net, mo.losses.cross_entropy), method.phi)
        state = torch.get_rng_state()
        with pytest.warns(UserWarning, match=rf"the row prototypes is left out: .*{said}.*head=\"NAME\""):
            assert [row.name for row in judge(run, episodes=2).rows] == ["maml", "untrained"]
        assert torch.equal(torch.get_rng_state(), state)
        for name in ("prototypes", "pretrained"):
            with pytest.raises(ValueError, match=rf"prototypes and pretrained can't be had of this network: .*{said}"):
                judge(run, episodes=2, baselines=[name])


def test_a_network_that_returns_several_things_is_judged_by_its_loss_and_has_no_prototypes() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(144, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Any:
            z = self.body(x.flatten(1)).relu()
            return self.head(z), z

    method = mo.maml(Several(), lambda output, target: nn.functional.cross_entropy(output[0], target))
    with pytest.warns(UserWarning, match="the row prototypes is left out: without the head, .* returns a tuple"):
        result = judge(Run(method, method.phi), episodes=2)
    assert [row.name for row in result.rows] == ["maml", "untrained"] and result.metric == "loss"


def test_baselines_of_a_network_whose_norms_have_a_version_for_each_step() -> None:
    torch.manual_seed(0)
    method = mo.maml_plus_plus(mo.nn.conv4(ways=3, size=12, filters=4), mo.losses.cross_entropy, steps=2)
    run = Run(method, method.phi)
    base = baselines.pretrained(run, images(), 3, 2, False)
    assert base.phi.weights["block0.1.weight"].shape == (4,) and base.network.per_step("block0.1.weight") is False
    assert run.phi.weights["block0.1.weight"].shape == (3, 4)
    result = judge(run, baselines=("untrained", "prototypes", "pretrained"), pretrain_iterations=3, steps=4, episodes=4)
    assert all(x.isfinite().all() for row in result.rows for x in row.scores.values())
    untrained, own = result.rows[1].scores["loss"], result.rows[0].scores["loss"]
    assert torch.equal(untrained, own) and own.shape == (4, 5)


def test_regression_has_no_prototypes_and_pools_its_tasks() -> None:
    torch.manual_seed(0)
    meta = mo.maml(mo.nn.mlp([1, 8, 1]), mo.losses.mse, lr=0.01)
    run = mo.train(meta, SINUSOID, iterations=2, tasks_per_step=2, validate_every=0, progress=False)
    every: Any = ("untrained", "pretrained")
    result = mo.evaluate(run, SINUSOID, episodes=9, baselines=every, pretrain_iterations=5, progress=False)
    assert [row.name for row in result.rows] == ["maml", "untrained", "pretrained"]
    assert (result.metric, run.selection, result.facts["selection"]) == ("loss", "last", "last")
    assert result.mean == result.rows[0].mean("loss")[-1]
    by_default = mo.evaluate(run, SINUSOID, episodes=3, progress=False)
    assert [row.name for row in by_default.rows] == ["maml", "untrained"]
    with pytest.raises(ValueError, match=r"'prototypes' needs tasks with classes.*: leave it out"):
        mo.evaluate(run, SINUSOID, episodes=3, baselines=["untrained", "prototypes"], progress=False)


def test_the_table_shows_every_row_and_step(run: Run) -> None:
    from rich.console import Console

    console = Console(width=160, force_terminal=False)
    with console.capture() as capture:
        console.print(judge(run, steps=4).table())
    text = capture.get()
    for word in ("blobs, split test: accuracy, % ± 95 % interval over 20 episodes", "maml", "untrained", "prototypes", "±"):
        assert word in text
    assert [w for w in next(line for line in text.splitlines() if "inner steps" in line).split() if w.isdigit()] == list(
        "01234"
    )


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_table_keeps_its_row_names_and_the_last_step_in_a_narrow_terminal(width: int) -> None:
    from rich.console import Console

    names = ("a_method_of_my_own", "untrained", "prototypes", "pretrained")
    rows = tuple(Row(name, "", {"accuracy": torch.rand(9, 51)}) for name in names)
    facts: dict[str, Any] = {"steps": 50, "tasks": {"family": "noise"}, "split": "test", "episodes": 9, "seeds": [0],
                             "normalisation": "transductive", "selection": "best", "episodes_sha256": "0" * 64}  # fmt: skip
    result = Result(rows, facts)
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(result.table(width))
    lines = capture.get().splitlines()
    heads = [word for word in next(line for line in lines if "inner steps" in line).split() if word.isdigit()]
    assert heads[0] == "0" and heads[-1] == "50" and len(heads) >= (2 if width == 80 else 3)
    for row in rows:
        line = next(line for line in lines if f" {row.name} " in line)
        assert line.count("±") == len(heads) + (row is not rows[0]) and "…" not in line and len(line) <= width
        assert f"{100 * row.mean('accuracy')[-1]:.2f}" in line
    assert "tensor(" not in str(result) and "\n" not in repr(result) and "after 50 steps" in repr(result)


def test_a_result_is_saved_with_every_score_so_that_it_can_be_paired_later(run: Run, tmp_path: Path) -> None:
    other = mo.Run(run.method, run.method.phi)
    both = judge([run, other], episodes=5, baselines=("untrained",))
    path = both.save(tmp_path / "a")
    told, scores = json.loads(path.read_text()), safetensors.torch.load_file(tmp_path / "a" / "scores.safetensors")
    for row, said in zip(both.rows, told["rows"], strict=True):
        for metric, x in row.scores.items():
            assert said[metric]["episodes"] == f"scores.safetensors: {row.name}/{metric}"
            assert torch.equal(scores[f"{row.name}/{metric}"], x)
            each = torch.stack([scores[f"{row.name}/{metric}/run{i}"] for i in range(2)])
            torch.testing.assert_close(each.mean(0), x)
    alone = judge(run, episodes=5, baselines=())
    alone.save(tmp_path / "b")
    assert torch.equal(
        safetensors.torch.load_file(tmp_path / "b" / "scores.safetensors")["maml/loss"], scores["maml/loss/run0"]
    )
    assert json.loads(alone.json())["rows"][0]["loss"]["episodes"] == alone.rows[0].scores["loss"].tolist()


def test_a_kill_between_scores_and_json_leaves_no_json_of_other_scores(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier, later = judge(run, episodes=3, baselines=()), judge(run, episodes=4, baselines=())
    numbers = earlier.save(tmp_path)
    before = numbers.read_bytes()

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="free some space"):
        patch.setattr(os, "fsync", full)  # before anything has changed
        later.save(tmp_path)
    assert numbers.read_bytes() == before

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Result, "json", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        later.save(tmp_path)
    assert len(safetensors.torch.load_file(tmp_path / "scores.safetensors")["maml/loss"]) == 4
    assert not numbers.exists()


def test_what_ones_own_loop_trained_is_evaluated_in_one_line() -> None:
    torch.manual_seed(0)
    method = mo.maml(mo.nn.conv4(ways=3, size=12, filters=4), mo.losses.cross_entropy, lr=0.3)
    module = mo.MetaModule(method)
    estimate = module.estimate(images().sample("train", seed=0, start=0, count=4))
    assert 0 <= estimate.info["accuracy"].item() <= 1 and estimate.loss.item() > 0
    assert judge(mo.Run(method, module.phi())).rows[0].name == "maml"


def test_a_method_without_steps_is_drawn_as_bars() -> None:
    scores = {"accuracy": torch.rand(9, 1)}
    facts = {"steps": 0, "tasks": {"family": "noise"}, "split": "test", "episodes": 9}
    axes = Figure().subplots()
    figures._curves(axes, Result((Row("proto", "", scores), Row("untrained", "", scores)), facts))
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([100 * scores["accuracy"].mean().item()] * 2)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["proto", "untrained"]


def test_data_that_are_not_finite_are_told() -> None:
    def sample(generator: torch.Generator, split: str) -> Any:
        x, bad = torch.randn(4, 1, generator=generator), torch.rand(1, generator=generator) < 0.5
        return (torch.where(bad, float("nan"), x), x), (x, x)

    tasks, run = mo.tasks.from_function(sample), Run(*_linear())
    odd = tasks.sample("test", seed=0, start=0, count=20).support[0].isnan().flatten(1).any(1)
    first = int(odd.int().argmax())
    told = f"episode {first} of seed 0 .split test. hold NaN, in the inputs of its support set, as do those of {odd.sum() - 1} "
    with pytest.warns(UserWarning, match=told) as warned:
        result = mo.evaluate(run, tasks, episodes=20, progress=False)
    assert len(warned) == 1 and not np.isfinite(result.mean)


def test_a_support_set_that_is_not_finite_is_refused() -> None:
    run, x = Run(*_linear()), torch.ones(3, 1)
    with pytest.raises(ValueError, match="the support set holds infinity, in the targets, and what was adapted"):
        run.adapt((x, x / 0))
    assert run.adapt((x, x)).weight.isfinite()


def test_one_episode_has_no_interval() -> None:
    result = mo.evaluate(Run(*_linear()), SINUSOID, episodes=1, progress=False)
    assert "nan" not in f"{result}{result!r}" and "after" in repr(result)


def _linear() -> tuple[mo.MetaOptimizer, mo.MetaParams]:
    method = mo.maml(nn.Linear(1, 1), mo.losses.mse, steps=1, lr=0.1)
    return method, method.phi
