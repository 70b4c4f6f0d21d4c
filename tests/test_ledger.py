"""The ledger: what counts as the same measurement, how one is judged, what the page says, and the command that keeps it."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import metaoptim as mo
from metaoptim.algorithms.example import INPUT, example_net
from metaoptim.cli.main import main
from metaoptim.evaluation import Result
from metaoptim.ledger import reproduce, source, store
from metaoptim.ledger.cost import cost
from metaoptim.ledger.entry import Entry, judged
from metaoptim.ledger.page import grouped, page
from metaoptim.recipes import recipe as config

ROOT = Path(__file__).parents[1]

TINY = """
description = "a tiny one"
[algorithm]
name = "fomaml"
loss = "mse"
[model]
name = "mlp"
sizes = [1, 4, 1]
[tasks]
name = "sinusoid"
shots = 4
queries = 4
[train]
iterations = 3
tasks_per_step = 2
validate_every = 0
log_every = 1
[evaluate]
episodes = 6
[published]
value = 0.35
source = "Somebody 2017"
protocol = "70,000 iterations"
"""


def entry(**changes: Any) -> Entry:
    plain: dict[str, Any] = {
        "recipe": "omniglot-maml", "content": "c" * 12, "seed": 0, "code": "a" * 12, "date": "2026-01-31T10:00:00+00:00",
        "version": "0.1.0", "commit": "0123456789ab", "algorithm": "maml", "metric": "accuracy", "value": 0.95,
        "interval": 0.004, "steps": 3, "episodes": 600, "episodes_sha256": "e" * 64,
        "protocol": {"name": "omniglot, 600 episodes", "version": 1}, "iterations": 2600, "tasks_per_step": 16,
        "steps_per_second": 1.625, "verdict": "pass",
        "rows": {"untrained": [0.53, 0.01]}, "expected": {"value": 0.9545, "interval": 0.0042},
        "cost": {"seconds": 0.5, "bytes": 3 * 2**20, "steps": 1, "maml": {"seconds": 0.25, "bytes": 2**20}},
        "published": {"value": 0.987, "interval": 0.004, "source": "Finn 2017", "protocol": "another split"},
        "environment": {"torch": "2.13.0"},
    }  # fmt: skip
    return Entry(**plain | changes)


@pytest.mark.parametrize(("metric", "value", "expected", "verdict"), [
    ("accuracy", 0.951, {"value": 0.95, "interval": 0.004}, "pass"),
    ("accuracy", 0.944, {"value": 0.95, "interval": 0.006}, "pass"),  # √(0.006² + 0.004²) = 0.0072
    ("accuracy", 0.940, {"value": 0.95, "interval": 0.006}, "drift"),
    ("accuracy", 0.930, {"value": 0.95, "interval": 0.006}, "fail"),
    ("accuracy", 0.990, {"value": 0.95, "interval": 0.006}, "drift"),  # better by far: the recipe's number is out of date
    ("loss", 0.990, {"value": 0.95, "interval": 0.006}, "fail"),
    ("loss", 0.930, {"value": 0.95, "interval": 0.006}, "drift"),
    ("loss", 0.95, {"value": 0.9, "interval": [0.8, 1.0]}, "pass"),
    ("loss", 0.95, {"value": 0.95}, "pass"),
    ("loss", math.nan, {"value": 0.95, "interval": 0.006}, "fail"),
    ("accuracy", 0.95, {"value": 0.9, "interval": 0.1, "seed": 3}, "not judged"),
    ("accuracy", 0.95, {"value": 0.9, "interval": 0.1, "metric": "loss"}, "not judged"),
    ("accuracy", 0.95, {}, "not judged"),
])  # fmt: skip
def test_a_value_is_judged(metric: str, value: float, expected: dict[str, Any], verdict: str) -> None:
    assert judged(metric, value, 0.004, 0, expected) == verdict


def test_an_interval_that_is_no_number_counts_for_nothing() -> None:
    assert judged("loss", 0.95, math.nan, 0, {"value": 0.95, "interval": 0.1}) == "pass"
    assert judged("loss", 1.95, math.nan, 0, {"value": 0.95, "interval": 0.1}) == "fail"


def test_a_recipes_content_is_what_changes_its_numbers() -> None:
    def of(*settings: str, text: str = TINY) -> str:
        return config.parse(text, "tiny", settings).content_hash

    same = [of("train.seed=3"), of("engine.choice=loop graph eager"), of(text=TINY.replace("a tiny one", "another"))]
    same += [of(text=TINY.replace("Somebody", "Nobody")), of("expected.value=3")]
    assert set(same) == {of()}
    others = [of("algorithm.lr=0.5"), of("train.iterations=4"), of("tasks.shots=5"), of("evaluate.episodes=7")]
    others += [of("model.sizes=[1, 5, 1]"), of("train.device=meta")]
    assert len({*others, of()}) == 7


def test_where_data_lie_is_no_part_of_a_recipe() -> None:
    recipes = [config.load("fertility-maml", [f"tasks.root={root}"]) for root in ("a", "b")]
    assert recipes[0].content_hash == recipes[1].content_hash == config.load("fertility-maml").content_hash


def test_the_code_that_matters_is_what_is_imported() -> None:
    reached = source._reached([*source.ROOTS, "metaoptim.algorithms.maml", "metaoptim.tasks.sinusoid"])
    wanted = {"algorithms.maml", "algorithms.compose", "tasks.sinusoid", "tasks.base", "engine.engine", "core.inner_loop",
              "estimators.unroll", "nn.models", "runs.run", "training.state", "evaluation.baselines", "rules.sgd"}  # fmt: skip
    assert {f"metaoptim.{name}" for name in wanted} <= reached.keys()
    idle = {"algorithms.reptile", "tasks.omniglot", "tasks.glyphs", "cli.main", "gradcheck.doctor", "runs.progress"}
    assert not {f"metaoptim.{name}" for name in idle} & reached.keys()


def test_versions_differ_by_algorithm_and_tasks() -> None:
    found = {name: source.version(config.load(name)) for name in ("sinusoid-maml", "sinusoid-fomaml", "omniglot-maml")}
    assert len(set(found.values())) == 3
    assert found["sinusoid-maml"] == source.version(config.load("sinusoid-maml", ["train.iterations=3"]))


def test_comments_and_docstrings_are_no_code(tmp_path: Path) -> None:
    texts = ["x = 1\n\n\ndef f(y):\n    return y\n", '"""A."""\n\nx = 1  # one\ndef f(y):\n    """B."""\n    return y\n']
    texts.append(texts[0].replace("return y", "return y + 1"))
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.py").write_text(text)
    first, second, third = (source._bare(tmp_path / f"{i}.py")[0] for i in range(3))
    assert first == second != third


@pytest.mark.parametrize(("table", "key"), [("model", "name"), ("algorithm", "rule"), ("algorithm", "loss")])
def test_code_of_ones_own_counts(table: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "from metaoptim.rules import SGD\n\ndef own(*given):\n    return SGD(0.1)\n"
    found = []
    for name, text in (("a", code), ("b", f"# The same.\n{code}"), ("c", f"{code}x = 2\n")):
        (tmp_path / f"{name}.py").write_text(text)
        text = TINY.replace('"fomaml"', f'"compose"\nrule = "{name}.py:own"') if key == "rule" else TINY
        recipe = config.parse(text, "tiny")
        recipe.tables[table][key] = {"name": f"{name}.py:own"} if key == "rule" else f"{name}.py:own"
        found.append(source.version(recipe))
    assert found[0] == found[1] != found[2]


def test_the_commit_is_that_of_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    found = source.commit()
    assert found == "none" or (len(found.rstrip("+")) == 12 and int(found.rstrip("+"), 16) >= 0)
    monkeypatch.setattr(source, "_git", lambda *_: "/somewhere/else")
    assert source.commit() == "none"


def test_lines_come_back_as_they_went(tmp_path: Path) -> None:
    entries = [entry(), entry(seed=1, value=math.nan, interval=None, cost={})]
    for one in entries:
        store.append(tmp_path, one)
    assert store.read(tmp_path) == [entries[0], replace(entries[1], value=None)]
    assert store.read(tmp_path / "nowhere") == []


def test_a_line_that_a_kill_cut_short_is_replaced(tmp_path: Path) -> None:
    store.append(tmp_path, entry())
    with (tmp_path / store.FILE).open("a") as file:
        file.write('{"recipe": "omni')
    assert len(store.read(tmp_path)) == 1
    store.append(tmp_path, entry(seed=1))
    assert [e.seed for e in store.read(tmp_path)] == [0, 1]


@pytest.mark.parametrize("line", ["{}", "[1]", "no json", '{"recipe": "a", "colour": 1}'])
def test_a_damaged_ledger_is_told_with_its_line(tmp_path: Path, line: str) -> None:
    store.append(tmp_path, entry())
    with (tmp_path / store.FILE).open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=r"Line 2 of .*ledger\.jsonl is no entry of a ledger"):
        store.read(tmp_path)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        store.alone(tmp_path),
        pytest.raises(ValueError, match="another process writes to the ledger in"),
        store.alone(tmp_path),
    ):
        pass
    with store.alone(tmp_path):
        pass


def test_what_is_missing() -> None:
    made = list(reproduce.jobs(["sinusoid-maml"], [0, 1, 1]))
    assert len(reproduce.missing(made, [])) == 2
    known = [entry(content=made[0].key.content, seed=0, code=made[0].key.code)]
    assert [job.key.seed for job in reproduce.missing(made, known)] == [1]
    older = [replace(known[0], code="older")]
    assert [job.key.seed for job in reproduce.missing(made, older)] == [0, 1]
    assert [job.key.seed for job in reproduce.missing(made, older, any_code=True)] == [1]


def test_the_page_is_a_function_of_the_ledger() -> None:
    entries = [
        entry(),
        entry(seed=1, value=0.96),
        entry(
            recipe="a",
            metric="loss",
            value=0.1074,
            interval=0.0124,
            published={},
            protocol={"name": "x, split test", "version": 1},
        ),
        entry(recipe="z", value=0.99),
    ]
    text = page(entries)
    assert text == page(entries) and text.index("### omniglot") < text.index("| `z` |") < text.index("| `omniglot-maml` |")
    assert text.index("| `omniglot-maml` |") < text.index("### x\n") < text.index("| `a` |"), (
        "tasks by name, the best score first"
    )
    rows = [line for line in text.splitlines() if line.startswith("| `omniglot-maml` |")]
    cells = [[cell.strip() for cell in row.split("|")[2:-1]] for row in rows]
    published = ["98.70 ± 0.40 (Finn 2017)", "differs: another split"]
    assert cells[0] == ["95.50 ± 0.40", "0, 1", "0.71", "95.45 ± 0.42", "pass", *published]
    how = ["2600 × 16", "1.62", "P1", f"`{'e' * 12}`", "2026-01-31", "0.1.0", "`0123456789ab`", "2.13.0"]
    assert cells[1:3] == [["0", *how], ["1", *how]]
    assert cells[3] == ["95.50 ± 0.40", "53.00 ± 1.00"]
    assert cells[4] == ["maml", "1", "500", "2.00", "3", "3.00"]
    assert "| `a` | 0.1074 ± 0.0124 | 0 | – |" in text and "- **P1**: omniglot, 600 episodes (version 1)" in text


def test_the_page_shows_the_version_that_was_measured_last() -> None:
    entries = [entry(seed=1), entry(seed=0), entry(seed=0, code="b" * 12), entry(seed=2, code="b" * 12), entry(code="b" * 12)]
    (group,) = grouped(entries)
    assert [e.seed for e in group.entries] == [0, 2] and group.entries[0] is entries[-1]


def test_the_page_survives_what_is_not_there() -> None:
    bare = entry(value=None, interval=None, steps_per_second=None, rows={}, cost={}, expected={}, published={"value": 0.9},
                 verdict="fail", environment={})  # fmt: skip
    assert "| `omniglot-maml` | not finite | 0 | – | – | fail | 90.00 | differs: not stated |" in page([bare])
    assert "| 98.00 | the same |" in page([entry(published={"value": 0.98, "protocol": "same"})])


def test_three_seeds_are_a_mean_with_a_spread_and_every_verdict() -> None:
    verdicts, values = ("pass", "fail", "pass"), (0.95, 0.91, 0.96)
    seeds = [
        entry(seed=s, value=values[s], interval=(0.003, 0.004, 0.005)[s], verdict=verdicts[s],
              rows={"untrained": [0.5 + s / 10, 0.01], **({"scratch": [0.3, 0.02]} if s else {})})
        for s in (2, 0, 1)
    ]  # fmt: skip
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in page(seeds).splitlines() if "| `omniglot" in line]
    assert rows[0][:5] == ["94.00 ± 0.41", "0, 1, 2", "2.65", "95.45 ± 0.42", "pass, fail"]
    assert [row[0] for row in rows[1:4]] == ["0", "1", "2"] and rows[4] == ["94.00 ± 0.41", "30.00 ± 2.00", "60.00 ± 1.00"]
    seeds[0] = replace(seeds[0], value=None)
    assert "| `omniglot-maml` | not finite | 0, 1, 2 | – |" in page(seeds)


def test_a_number_of_another_metric_says_so_on_the_page() -> None:
    other = entry(expected={"metric": "loss", "value": 0.2, "interval": 0.01}, verdict="not judged")
    assert "| 0.2000 ± 0.0100 (loss) | – |" in page([other])


def test_the_page_of_this_repository_is_its_ledgers() -> None:
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == page(store.read(ROOT / "results"))


def test_a_protocol_says_how_it_was_measured() -> None:
    facts = {"tasks": {"family": "omniglot", "options": {"ways": 5, "rotations": True, "train_shots": None, "center": [1.0]}},
             "split": "test", "normalisation": "transductive", "steps": 3, "episodes": 600, "episode_seed": 0}  # fmt: skip
    assert Result((), facts).protocol == (
        "omniglot (rotations, ways=5), split test, transductive normalisation, 3 inner steps, 600 episodes of seed 0"
    )


@pytest.mark.parametrize("name", ["maml", "reptile", "protonet"])
def test_the_cost_of_a_meta_step_stands_beside_mamls(name: str) -> None:
    import torch

    method = mo.ALGORITHMS[name](example_net(name), mo.losses.cross_entropy)
    x, y = torch.rand(2, 4, *INPUT), (torch.arange(4) % 3).expand(2, 4)
    found = cost(method, mo.Task((x, y), (x, y)))
    assert found["seconds"] > 0 and found["maml"]["seconds"] > 0 and found["steps"] == method.learner.steps
    assert found["maml"]["steps"] == max(1, method.learner.steps)
    assert found["bytes"] is None or found["bytes"] >= 0


Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs `metaoptim reproduce` in an empty folder with tiny.toml; gives exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("METAOPTIM_DATA", raising=False)
    (tmp_path / "tiny.toml").write_text(TINY)

    def run(*args: str) -> tuple[int, str, str]:
        code = main(["reproduce", *args])
        return code, *capsys.readouterr()

    return run


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("results/ledger.jsonl").read_text().splitlines()]


def test_a_recipe_is_measured_once(cli: Cli) -> None:
    code, out, _ = cli("tiny.toml", "--seeds", "0,1")
    assert code == 0 and "1 of 2: tiny, seed 0" in out and "tiny, seed 1: not judged" in out
    first, second = lines()
    assert (first["seed"], second["seed"]) == (0, 1) and first["value"] != second["value"]
    assert first["metric"] == "loss" and first["rows"].keys() == {"untrained"} and first["steps_per_second"] > 0
    assert first["published"]["source"] == "Somebody 2017" and first["cost"]["maml"]["seconds"] > 0
    text = Path("docs/results.md").read_text()
    assert "| `tiny` |" in text and "0.3500 (Somebody 2017) | differs: 70,000 iterations |" in text

    before = Path("results/ledger.jsonl").read_bytes()
    code, out, _ = cli("tiny.toml", "--seeds", "0,1")
    assert code == 0 and "2 of 2 are in the ledger already." in out
    assert Path("results/ledger.jsonl").read_bytes() == before and Path("docs/results.md").read_text() == text

    Path("docs/results.md").unlink()
    assert cli("--page-only")[0] == 0 and Path("docs/results.md").read_text() == text


def test_the_number_is_that_of_train_and_evaluate(cli: Cli) -> None:
    assert cli("tiny.toml", "--page", "other/page.md", "--out", "elsewhere")[0] == 0
    (line,) = [json.loads(text) for text in Path("elsewhere/ledger.jsonl").read_text().splitlines()]
    recipe = config.load("tiny.toml")
    method, tasks = recipe.build()
    run = mo.train(method, tasks, **recipe.tables["train"], engine=recipe.tables["engine"], progress=False)
    result = mo.evaluate(run, tasks, **recipe.tables["evaluate"], progress=False)
    assert line["value"] == result.mean and line["interval"] == result.interval
    assert line["episodes_sha256"] == result.facts["episodes_sha256"] and Path("other/page.md").is_file()


def test_what_was_interrupted_goes_on(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    real = reproduce.cost

    def stopped(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "cost", stopped)
    code, _, err = cli("tiny.toml")
    assert code == 130 and "stopped; the same command goes on from there" in err and not Path("results/ledger.jsonl").exists()
    (metrics,) = Path("results/runs").glob("*/metrics.jsonl")
    trained = metrics.read_bytes()
    monkeypatch.setattr(reproduce, "cost", real)
    assert cli("tiny.toml")[0] == 0 and len(lines()) == 1
    assert metrics.read_bytes() == trained and len(list(Path("results/runs").iterdir())) == 1


@pytest.mark.parametrize(("value", "code", "verdict"), [(-1e3, 1, "fail"), (1e3, 0, "drift")])
def test_a_recipe_that_fails_is_an_exit_code(cli: Cli, tmp_path: Path, value: float, code: int, verdict: str) -> None:
    (tmp_path / "judged.toml").write_text(f"{TINY}[expected]\nmetric = 'loss'\nvalue = {value}\ninterval = 0.001\n")
    found, out, err = cli("judged.toml")
    assert found == code and f"judged, seed 0: {verdict} (expected {value})" in out
    assert ("Failed: judged, seed 0." in err) == (code == 1) and lines()[0]["verdict"] == verdict


def test_other_expectations_are_judged_without_another_run(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("tiny.toml")[0] == 0
    monkeypatch.setattr(reproduce, "run", lambda *_: pytest.fail("it was run again"))
    Path("tiny.toml").write_text(f"{TINY}[expected]\nmetric = 'loss'\nvalue = -1000.0\ninterval = 0.001\n")
    code, out, err = cli("tiny.toml")
    assert code == 1 and "Failed: tiny, seed 0." in err
    assert "tiny, seed 0: fail (expected -1000.0), judged anew; it was not judged\n" in out
    assert [line["verdict"] for line in lines()] == ["not judged", "fail"]
    assert "| fail | 0.3500 (Somebody 2017) |" in Path("docs/results.md").read_text()
    assert cli("tiny.toml")[0] == 1 and len(lines()) == 2


def test_expectations_of_another_metric_or_seed_are_told(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "judged.toml").write_text(f"{TINY}[expected]\nmetric = 'accuracy'\nvalue = 0.9\nseed = 0\n")
    assert "seed 0: not judged ([expected] states accuracy 0.9, and loss was measured)" in cli("judged.toml")[1]
    (tmp_path / "judged.toml").write_text(f"{TINY}[expected]\nmetric = 'loss'\nvalue = 0.9\nseed = 3\n")
    assert "seed 0: not judged (expected 0.9 of seed 3), judged anew; it was not judged" in cli("judged.toml")[1]


def test_recipes_of_one_content_stand_under_one_name_which_is_told(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "twin.toml").write_text(TINY.replace("a tiny one", "its twin"))
    for _ in range(2):  # measured, and in the ledger
        code, out, _ = cli("tiny.toml", "twin.toml")
        assert code == 0 and "twin, seed 0 is the same as tiny, seed 0, and stands under that name.\n" in out
    assert [line["recipe"] for line in lines()] == ["tiny"]
    assert "same as" not in cli("tiny.toml")[1]


def test_what_stops_one_recipe_stops_no_other(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "lost.toml").write_text(TINY.replace('"sinusoid"', '"fertility"\nroot = "nowhere"'))
    code, _, err = cli("lost.toml", "tiny.toml")
    assert code == 1 and "error: lost, seed 0: There is no fertility_worldbank.csv" in err and "Failed: lost, seed 0." in err
    assert [line["recipe"] for line in lines()] == ["tiny"]


@pytest.mark.parametrize(("args", "words"), [
    (["tiny.tml"], "unknown recipe `tiny.tml`"),
    (["tiny.toml", "--seeds", "0,x"], "--seeds 0,x: expected whole numbers with commas between them, each once, as in 0,1,2."),
    (["tiny.toml", "--seeds", "1,1"], "each once"),
    (["odd.toml"], "`value` in [published] of odd: found '98.7', expected a number."),
])  # fmt: skip
def test_wrong_input_is_told_before_anything_runs(cli: Cli, args: list[str], words: str) -> None:
    Path("odd.toml").write_text(TINY.replace("0.35", "'98.7'"))
    code, _, err = cli("tiny.toml", *args) if args[0] != "tiny.toml" else cli(*args)
    assert code == 2 and words in err and not Path("results").exists()


def test_only_missing_takes_any_version_of_the_code(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("tiny.toml")[0] == 0
    monkeypatch.setattr(source, "version", functools.partial(lambda text, recipe: text, "newer"))
    assert "1 of 1 are in the ledger already." in cli("tiny.toml", "--only-missing")[1] and len(lines()) == 1
    assert cli("tiny.toml")[0] == 0 and len(lines()) == 2


def test_only_missing_judges_what_another_version_measured(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("tiny.toml")[0] == 0
    monkeypatch.setattr(source, "version", functools.partial(lambda text, recipe: text, "newer"))
    Path("tiny.toml").write_text(f"{TINY}[expected]\nmetric = 'loss'\nvalue = -1000.0\ninterval = 0.001\n")
    code, out, _ = cli("tiny.toml", "--only-missing")
    assert code == 1 and "tiny, seed 0: fail (expected -1000.0), judged anew; it was not judged" in out and len(lines()) == 2
