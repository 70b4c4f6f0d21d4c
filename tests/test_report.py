"""`metaoptim report`: what stands on the page, that nothing in it is markup of the user's, and that a browser likes it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from metaoptim.cli.main import main
from metaoptim.design import live
from metaoptim.design.folder import RunFolder
from metaoptim.design.report import opened, page
from metaoptim.recipes import recipe as config
from metaoptim.report.html import comparison, diagnosis, few_shot, optimizers, step_sizes, study, training
from metaoptim.report.html.document import (
    Axis,
    Chapter,
    Chart,
    Code,
    Episode,
    Guide,
    HeatMap,
    Note,
    Page,
    Picture,
    Score,
    Section,
    Series,
    Table,
)  # fmt: skip
from metaoptim.report.html.render import render
from metaoptim.report.html.scales import cut, scale, short, ticks, together, width
from metaoptim.report.html.svg import draw
from metaoptim.report.html.values import table, told

LARGEST = 1_500_000
Cli = Callable[..., tuple[int, str, str]]
NASTY = """<script>alert("x")</script> & 'quoted' 中文名字很长很长很长 """ + "w" * 120
TINY = """
name = "tiny"
[algorithm]
name = "meta_sgd"
loss = "mse"
[model]
name = "mlp"
sizes = [1, 8, 1]
[tasks]
name = "sinusoid"
[train]
iterations = 3
tasks_per_step = 2
validate_every = 2
validate_episodes = 4
log_every = 1
[evaluate]
episodes = 8
steps = 2
[engine]
batching = "loop"
memory = "graph"
runtime = "eager"
"""
IMAGES = TINY.replace('"meta_sgd"\nloss = "mse"', '"maml"\nloss = "cross_entropy"').replace(
    '"mlp"\nsizes = [1, 8, 1]', '"conv4"\nfilters = 4'
).replace('"sinusoid"', '"glyphs"')  # fmt: skip
OPTIMIZERS = """
name = "learned"
[algorithm]
name = "learned_optimizer"
rule = {name = "lstm", hidden = 4}
estimator = {name = "truncated", window = 2}
[tasks]
name = "quadratics"
dim = 2
steps = 4
[train]
iterations = 2
problems_per_step = 2
validate_every = 1
validate_episodes = 2
[evaluate]
families = "own"
problems = 2
seeds = 1
step_sizes = 1
[engine]
batching = "loop"
memory = "graph"
runtime = "eager"
"""


class Read(HTMLParser):
    """What a page holds: its tags with their attributes, and its text; every tag is closed again."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, text: str) -> None:
        HTMLParser.__init__(self)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open and self.open[-1] not in ("script", "style") else ""

    def all(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        """The attributes of the tags of that name that have these."""
        return [own for name, own in self.tags if name == tag and attributes.items() <= own.items()]


def trained(folder: Path, recipe: str) -> Path:
    """A run of a recipe, judged."""
    experiment = config.parse(recipe, "tiny").experiment()
    run = experiment.train(folder, progress=False)
    experiment.evaluate([run], progress=False).save(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of Meta-SGD on sinusoids, judged."""
    return trained(tmp_path_factory.mktemp("runs") / "sinusoid", TINY)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def written(*folders: Path) -> Read:
    return Read(render(page([RunFolder(folder) for folder in folders])))


def everything(name: str = "a name") -> Page:
    """A page with every kind of part, in which all texts are given."""
    buffer = io.BytesIO()
    Image.new("L", (2, 2)).save(buffer, "PNG")
    png = buffer.getvalue()
    xs = [0, 1, 2]
    line = Series(name, xs, [1.0, None, 3.0], [0.5, None, 2.0], [1.5, None, 4.0], notes=[name, name, name])
    bars = tuple(Series(told, xs, [1, 2, 3], shape="bars", colour=i) for i, told in enumerate((name, "more")))
    names = Axis("", names=(name, "b", "c"))
    query = Picture(png, name, "90 %", True), Picture(png, name, "1: 60 %", False)
    parts = (
        Score("90.9", "0.7", f"% {name}", name),
        Chart("forest", Axis("x"), names, (Series("", [1, 2, 3], xs, xs, [2, 3, 4], "dots"),)),
        Chart(name, Axis(name), Axis(name), (line, Series("two", xs, xs, marked=True)), (Guide(1, name), Guide(2, name, "y"))),
        Chart("bars", names, Axis("y"), bars),
        HeatMap("heat", names, names, ((1.0, -1.0, None),) * 3, -1, 1, name, picked=(2, 1)),
        Episode(name, ((name, query[:1], query),), name),
        Table(("what", name), ((name, "1.0"), ("b", "−2.5")), name, name),
        Note(name, "doubt", f"metaoptim train {name}"),
        Code(name, name),
    )
    sections = (Section(name, parts, name), Section("two", (Note("`code` and more"),)), Section("three", ()))
    return Page(name, (Chapter(name, sections, ((name, name),)),), name)


def test_a_page_holds_what_is_known_of_a_run(run: Path) -> None:
    text = render(page([RunFolder(run)]))
    found = Read(text)
    headings = {"Result", "Score after each inner step", "Training", "Episodes", "Learnt step sizes", "Diagnosis", "Provenance"}
    assert {s.title for s in page([RunFolder(run)]).chapters[0].sections} >= headings
    result = json.loads((run / "result.json").read_text())
    assert few_shot.written("loss", result["mean"], result["interval"])[0] in found.text
    for word in (
        "untrained",
        "meta_sgd",
        result["episodes_sha256"],
        "torch",
        "recipe.toml --out RUN",
        "was not diagnosed yet",
    ):
        assert word in found.text
    assert (run / "recipe.toml").read_text().strip() in found.text
    assert str(run) not in re.sub(r"metaoptim \w+ \S+", "", found.text)  # but in a command that names the run
    assert len(text.encode()) <= LARGEST


def test_figures_have_labels_values_and_tables(run: Path) -> None:
    found = written(run)
    charts = found.all("div", role="application", tabindex="0")
    assert len(charts) >= 8 and all(chart["aria-label"] for chart in charts)
    assert len(found.all("svg")) == 2 * len(charts)  # for a large screen and for a small one
    assert len(found.all("details")) == len(charts) + 1  # a table behind each, and the recipe
    spots = [own["data-spots"].split() for name, own in found.tags if "data-spots" in own]
    for chart, large, small in zip(charts, spots[::2], spots[1::2], strict=True):
        assert len(json.loads(chart["data-hover"])) == len(large) == len(small) > 0
    for label in ("outer steps", "inner steps", "query loss", "step size"):
        assert found.text.count(label) >= 2


def test_a_page_loads_nothing(run: Path) -> None:
    text = render(page([RunFolder(run)]))
    found = Read(text)
    policy = found.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy and "http" not in policy
    assert not re.findall(r"(?:src|href|action)=\"(?!#|data:)", text) and "url(" not in text and "@import" not in text
    assert not found.all("meta", **{"http-equiv": "refresh"}) and not any("style" in own for _, own in found.tags)


def test_texts_are_never_markup() -> None:
    text = render(everything(NASTY))
    found = Read(text)
    assert len(found.all("script")) == 1 and text.count("<script") == 1
    assert found.text.count(NASTY) >= 12 and "中文" in found.all("div", role="application")[1]["aria-label"]
    assert Read(render(everything("`"))).text  # a backtick without a partner


def test_missing_parts_are_named_with_the_command_that_makes_them(copy: Path) -> None:
    for name in ("result.json", "metrics.jsonl", "environment.json"):
        (copy / name).unlink()
    (copy / "best.safetensors").unlink()
    (copy / "checkpoint.safetensors").write_bytes(b"cut")
    (copy / "checkpoint.previous.safetensors").unlink(missing_ok=True)
    text = written(copy).text
    for sentence in (
        "was not evaluated yet", f"metaoptim evaluate {copy}", "No step of training was logged", "Episodes can't be shown",
        "environment was not kept",
    ):  # fmt: skip
        assert sentence in text
    (copy / "result.json").write_text("{")
    assert "result.json can't be read" in written(copy).text
    (copy / "result.json").write_text('{"metric": "loss", "mean": 1, "interval": null, "rows": []}')
    assert "not one that this version" in written(copy).text


def test_what_is_doubtful_is_told(copy: Path) -> None:
    state = json.loads((copy / "state.json").read_text())
    (copy / "state.json").write_text(json.dumps(state | {"status": "failed"}))
    (copy / "warnings.txt").write_text("the first inner step raises the support loss\n")
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": null}\n{"step": 5, "lo')
    result = json.loads((copy / "result.json").read_text())
    result["runs"][0]["phi_sha256"] = "another"
    result["rows"][1]["against_first"] = {"mean": -1.0, "interval": 0.5}
    (copy / "result.json").write_text(json.dumps(result))
    text = written(copy).text
    for sentence in (
        "stopped by an error", "--resume", "the first inner step raises", "not finite at outer step 4", "One training seed",
        "other weights than the run has now", "untrained", "is better than the method",
    ):  # fmt: skip
        assert sentence in text


def test_a_run_whose_code_is_gone_still_has_a_page(copy: Path) -> None:
    recipe = (copy / "recipe.toml").read_text().replace('name = "mlp"', 'name = "gone.py:Net"')
    (copy / "recipe.toml").write_text(recipe)
    text = written(copy).text
    assert text.count("gone.py") >= 2 and "Training loss" in text and "can't be shown" in text


def test_several_runs_stand_beside_each_other(run: Path, copy: Path) -> None:
    found = page([RunFolder(run), RunFolder(copy)])
    assert [chapter.title for chapter in found.chapters] == ["Together", "tiny (sinusoid)", "tiny (run)"]
    assert [part.title for part in found.chapters[0].sections[0].parts if isinstance(part, Chart)] == [
        "Training loss", "Validation loss",
    ]  # fmt: skip
    assert "tiny (sinusoid) and 1 more" in Read(render(found)).text


@pytest.mark.slow
def test_images_are_shown_with_their_answers(tmp_path: Path) -> None:
    found = page([RunFolder(trained(tmp_path / "glyphs", IMAGES))])
    episodes = [part for s in found.chapters[0].sections for part in s.parts if isinstance(part, Episode)]
    assert len(episodes) == 4 and all(len(one.classes) == 5 for one in episodes)
    for one in episodes:
        answers = [p for *_, query in one.classes for p in query]
        assert all(p.png.startswith(b"\x89PNG") and p.alt and p.text.endswith("%") for p in answers)
        assert one.about == f"{sum(p.right is True for p in answers)} of {len(answers)} right."
    assert len(render(found).encode()) <= LARGEST


def test_learned_optimizers_have_curves_for_each_family(tmp_path: Path) -> None:
    folder = trained(tmp_path / "learned", OPTIMIZERS)
    found = page([RunFolder(folder)])
    titles = [section.title for section in found.chapters[0].sections]
    assert "Loss curves" in titles and "Episodes" not in titles and "Diagnosis" not in titles
    curves = next(s for s in found.chapters[0].sections if s.title == "Loss curves").parts[0]
    assert isinstance(curves, Chart) and curves.y.log and all(len(s.low) == len(s.y) == 5 for s in curves.series)
    result = json.loads((folder / "result.json").read_text())
    head = optimizers.sections(result)[0].parts[0]
    assert isinstance(head, Score) and head.value == few_shot.written("loss", result["mean"], result["interval"])[0]
    assert Read(render(found)).all("svg")


def test_readings_of_a_diagnosis_are_drawn() -> None:
    score = {"mean": 0.5, "interval": 0.1}
    numbers: dict[str, Any] = {
        "steps": {"mean": {"accuracy": [0.2, 0.9]}, "interval": {"accuracy": [0.1, None]}, "training_steps": 1},
        "gain": {"metric": "accuracy", "before": score, "after": score, "shuffled": None},
        "permutations": {"before": None, "after": {"worst": 0.1, "best": 0.9, "means": [0.4, 0.6]}},
        "features": {"layers": [{"layer": "", "cka": 0.9, "by_chance": 0.1, "head": True}]},
        "step_sizes": {"layers": [{"layer": "0", "mean": 0.1, "least": -1, "most": 1, "mean_at_start": 0.1}]},
        "alignment": {"support_and_query": [[1, -0.5], [None, 1]]},
        "curvature": {"steps": [0, 1], "largest_eigenvalue": {"mean": [1, 2], "most": [2, 3]}, "product": None, "limit": 2},
    }
    readings = {name: {"sentence": f"`{name}` says.", "numbers": x} for name, x in numbers.items()}
    found = diagnosis.section(
        {"readings": readings, "left_out": {"x": "no reason."}, "facts": {"episodes": 4, "split": "val", "closely": 2}}
    )
    assert len(found.parts) == len(diagnosis.DRAWN) + 1
    reused = found.parts[3]
    assert isinstance(reused, Chart) and reused.guides[0].label == "" and "line is at 0.9" in reused.about, "no word on a bar"
    assert Read(render(Page("x", (Chapter("x", (found,)),)))).text.count("says.") == len(diagnosis.DRAWN)


def test_step_sizes_are_dots_where_they_are_few_and_a_histogram_where_they_are_many() -> None:
    (few,) = step_sizes.charts({"a": [0.1, 0.2], "b": [0.3, 0.4]}, {"a": [0.1], "b": [0.1]})
    assert list(few.series[1].y) == [0.1, 0.2, 0.3, 0.4] and list(few.series[1].notes) == ["step 0", "step 1"] * 2
    many = {"a": [i / 100 for i in range(100)]}
    spread, histogram = step_sizes.charts(many, many)
    assert (spread.series[1].low[0], spread.series[1].y[0], spread.series[1].high[0]) == (0.05, 0.5, 0.94)
    assert sum(y or 0 for y in histogram.series[0].y) == pytest.approx(100)


def test_long_curves_are_shortened_by_means() -> None:
    records = [{"step": i + 1, "loss": float(i)} for i in range(1000)]
    (chart,) = training.charts({"x": records}, "loss")
    logged, mean = chart.series
    assert len(logged.y) <= training.POINTS and logged.x[-1] == 1000 and logged.faint
    assert logged.y[0] == pytest.approx(1.5) and mean.y[-1] is not None and mean.y[-1] < 999


def test_ticks_are_round_and_labels_alike() -> None:
    on = scale(Axis("x"), [0.0, 0.93], (None, None), 0, 100)
    assert [text for _, text in ticks(Axis("x"), on, 5)] == ["0.0", "0.2", "0.4", "0.6", "0.8"]
    assert together([0.0, 0.25, 0.5]) == ["0.00", "0.25", "0.50"]
    few = scale(Axis("x"), [0.9, 9.2], (None, None), 0, 100)
    assert [text for _, text in ticks(Axis("x"), few, 3)] == ["2.5", "5.0", "7.5"], "5 alone would not tell how long 1 is"
    log = Axis("x", log=True)
    assert [v for v, _ in ticks(log, scale(log, [0.01, 100.0], (None, None), 0, 1), 5)] == pytest.approx(
        [0.01, 0.1, 1, 10, 100]
    )
    steps = Axis("x", whole=True)
    assert [text for _, text in ticks(steps, scale(steps, [0, 3], (None, None), 0, 1), 5)] == ["0", "1", "2", "3"]
    assert (short(None), short(float("nan")), short(-0.5), short(1e-7), short(1234567)) == (
        "–",
        "–",
        "−0.5",
        "1e−7",
        "1,234,567",
    )
    assert width("中") > width("i") and len(cut("a" * 100, 60)) < 12 and cut("short", 600) == "short"


@pytest.mark.parametrize("values", [[], [None], [1.0], [0.0, 0.0], [-1e-9, 1e12], [float("nan"), 2.0]])
@pytest.mark.parametrize("log", [False, True])
def test_any_values_can_be_drawn(values: list[float | None], log: bool) -> None:
    series = Series("a", list(range(len(values))), [None if v is None or v != v else v for v in values], marked=True)
    for across in (330.0, 500.0):
        chart = Chart("t", Axis("x", whole=True), Axis("y", log=log), (series,))
        drawn = draw(chart, across)
        assert (
            "nan" not in drawn.svg and "inf" not in drawn.svg and len(drawn.spots) == len(told(chart)) == len(table(chart).rows)
        )


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs the command line; gives exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("METAOPTIM_DEBUG", raising=False)

    def call(*args: str) -> tuple[int, str, str]:
        code = main(args)
        return code, *capsys.readouterr()

    return call


def test_the_command_writes_the_page_and_says_where(cli: Cli, copy: Path) -> None:
    assert cli("report", str(copy)) == (0, f"The page is {copy / 'report.html'}.\n", "")
    assert cli("report", str(copy), "--out", "pages/one.html")[0] == 0
    assert Read(Path("pages/one.html").read_text(encoding="utf-8")).all("svg")
    for args, sentence in ((["nowhere"], "there is no nowhere"), ([str(copy), "--out", str(copy)], "is a folder")):
        code, _, err = cli("report", *args)
        assert code == 2 and sentence in err


def test_what_is_no_run_has_no_page(cli: Cli, copy: Path, tmp_path: Path) -> None:
    code, _, err = cli("report", str(copy / "recipe.toml"))
    assert code == 2 and "recipe.toml is a file; expected the folder of a run" in err
    (tmp_path / "planned").mkdir()
    shutil.copy(copy / "recipe.toml", tmp_path / "planned")
    code, _, err = cli("report", str(tmp_path / "planned"))
    assert code == 2 and "planned has a recipe and no training of it; train it: metaoptim train" in err
    assert not (tmp_path / "planned" / "report.html").exists()


def test_live_follows_training_until_it_ends(cli: Cli, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, lines = json.loads((copy / "state.json").read_text()), (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "result.json").unlink()
    (copy / "state.json").write_text(json.dumps(state | {"status": "running"}))
    (copy / "metrics.jsonl").write_text("")
    file, seen = copy / "report.html", []

    def grow() -> None:
        for line in lines:
            before = file.stat().st_mtime_ns if file.exists() else 0
            with open(copy / "metrics.jsonl", "a") as metrics:
                metrics.write(line)
            while not file.exists() or file.stat().st_mtime_ns == before:
                time.sleep(0.01)
            seen.append(file.read_text(encoding="utf-8"))
        (copy / "state.json").write_text(json.dumps(state))

    monkeypatch.setattr(live, "EVERY", 0.01)
    trainer = threading.Thread(target=grow)
    trainer.start()
    code, out, err = cli("report", str(copy), "--live")
    trainer.join()
    assert (code, out) == (0, f"The page is {file}.\n") and "Ctrl-C" in err
    assert all('http-equiv="refresh"' in text and "Episodes" not in text for text in seen)
    assert len(set(seen)) == len(lines) and "Training had not ended" in seen[-1]
    final = file.read_text(encoding="utf-8")
    assert 'http-equiv="refresh"' not in final and "Episodes" in final and "was not evaluated yet" in final


def test_live_can_be_interrupted(cli: Cli, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = json.loads((copy / "state.json").read_text())
    (copy / "state.json").write_text(json.dumps(state | {"status": "running"}))

    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(live.time, "sleep", stop)
    code, _, err = cli("report", str(copy), "--live")
    assert code == 130 and "To go on: metaoptim report" in err
    assert 'http-equiv="refresh"' not in (copy / "report.html").read_text(encoding="utf-8")


def compared() -> dict[str, Any]:
    """What `metaoptim compare` writes of two methods, the better one first."""
    point = {"step": 10, "seconds": 1.0, "accuracy": 0.5}
    cost = {"seconds_per_step": 0.01, "bytes": None, "way": "loop", "training_seconds": [1.0, 2.0], "gradients": 300}
    row = {
        "recipe": "name = 'x'", "seeds": [0, 1], "runs": ["a", "b"], "iterations": 10, "tasks_per_step": 2, "steps": 1,
        "over_seeds": None, "iqm": 0.6, "iqm_over_seeds": None, "rank": 1.5, "cost": cost, "by_seed": [0.5, 0.7],
        "curves": [[point, {**point, "step": 20}], [{**point, "accuracy": 0.7}]],
    }  # fmt: skip
    methods = [
        row | {"name": NASTY, "mean": 0.6, "over_episodes": [0.5, 0.7], "baselines": {"untrained": [0.2, 0.1]}},
        row | {"name": "b", "mean": 0.5, "over_episodes": None, "baselines": {}, "curves": []},
    ]
    pair = {"first": NASTY, "second": "b", "difference": 0.1, "over_episodes": [0.05, 0.2], "over_seeds": None, "p": 0.01}
    return {
        "metric": "accuracy", "budget": {"kind": "steps", "amount": 10}, "episodes": 8, "episodes_sha256": "e" * 64,
        "caveats": {"seeds": "intervals are short", "episodes": "not over tasks", "cost": "a took long"},
        "confidence": 0.95, "resamples": 99, "environment": {"torch": "2", "folder": "/secret"},
        "command": "metaoptim compare a b",
        "date": "2026-01-02T03:04:05", "methods": methods, "pairs": [pair | {"corrected": 0.02}],
    }  # fmt: skip


def searched() -> dict[str, Any]:
    """What `metaoptim tune` writes of three trials, of which the second is picked."""
    done = {"state": "complete", "steps": [0, 1, 2], "error": [0.1] * 3, "folds": [], "seconds": 3.2, "reason": ""}
    trials = [
        done | {"number": 0, "params": {"algorithm.lr": 0.1, "train.first": True}, "train_steps": 2, "mean": [3.0, 2.0, 1.0]},
        done | {"number": 1, "params": {"algorithm.lr": 0.4, "train.first": False}, "train_steps": 1, "mean": [3.0, 1.1, 1.2]},
        done | {"number": 2, "params": {"algorithm.lr": 9.0}, "train_steps": 1, "mean": [], "steps": [], "state": "diverged"},
    ]
    picked = {"trial": 1, "test_steps": 1, "score": 1.1, "error": 0.1, "best": [0, 2, 1.0, 0.1], "rule": "one-se", "why": NASTY}
    return {
        "metric": "loss", "space": {"algorithm.lr": "log:0.1..1", "train.first": "true|false"}, "picked": picked, "said": "",
        "importances": {"algorithm.lr": 0.7, "train.first": 0.3}, "trials": trials, "protocol": "2-fold", "folds": 2,
        "episodes": 8, "iterations": 4, "test_steps": [1, 2], "study": "sinusoid-1a2b", "command": "metaoptim tune sinusoid",
        "date": "2026-01-02T03:04:05", "environment": {}, "recipe": "a", "chosen": "b",
    }  # fmt: skip


def test_a_comparison_has_a_page(tmp_path: Path) -> None:
    assert comparison.against_best(compared()) == [("b", -0.1, [-0.2, -0.05], 0.02)]
    (tmp_path / "comparison.json").write_text(json.dumps(compared()))
    found = opened(tmp_path)
    assert isinstance(found, Chapter)
    curve = next(s for s in found.sections if s.title == "Learning curves").parts[0]
    assert isinstance(curve, Chart) and (list(curve.series[0].x), list(curve.series[0].y)) == ([10, 20], [60, 50])
    text = Read(render(page([found]))).text
    scores, differences = found.sections[0].parts[:2]
    assert isinstance(scores, Chart) and isinstance(differences, Chart)
    drawn = [curve.series[0].colour, *scores.series[0].colours, *differences.series[0].colours]
    assert drawn == [0, 0, 1, 1] and [table(one).header for one in (scores, differences)] == [("", "value")] * 2
    for i, colour in enumerate(("c0", "c1")):
        assert f'class="mark {colour}"' in draw(scores, 500).svg and told(scores)[i].rows[0][0] == colour
    for word in (
        "Intervals are short.",
        "Not over tasks.",
        "A took long.",
        "the same steps, 10",
        "60.0",
        "5.0 to 20.0",
        "+10.0",
        "0.0200",
        "metaoptim compare a b",
        "e" * 64,
    ):
        assert word in text
    assert "secret" not in text


def test_a_search_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(json.dumps(searched()))
    (tmp_path / "recipe.toml").write_text("")  # the chosen one, which doesn't make a run of the folder
    found = opened(tmp_path)
    assert isinstance(found, Chapter)
    figures = [part for s in found.sections for part in s.parts if isinstance(part, Chart | HeatMap)]
    assert [figure.title for figure in figures] == [
        "Score against inner steps in training", "Score after each inner step at test", "Steps in training, steps at test",
        "What makes a trial one of the best", "algorithm.lr",
    ]  # fmt: skip
    heat = figures[2]
    assert isinstance(heat, HeatMap) and heat.rows == ((1.1, 1.2), (2.0, 1.0)) and heat.picked == (0, 0)
    drawn = Read(render(page([found])))
    (star, *_), cells = drawn.all("path", **{"class": "star"}), drawn.all("rect", **{"class": "cell c0"})[:4]
    centre = [float(cells[0][at]) + float(cells[0][size]) / 2 for at, size in (("x", "width"), ("y", "height"))]
    assert float(star["d"][1:].split()[0]) == pytest.approx(centre[0], abs=0.1)
    shades = [float(own["fill-opacity"]) for own in drawn.all("rect", **{"class": "shade c0"})]
    assert 0.15 <= shades[0] < 0.2 and shades[23] > 0.95, "the scale of colours, from the lowest, which is seen, to the highest"
    text = drawn.text
    assert "1.10" in text and NASTY in text and "*1" in text and f"metaoptim train {tmp_path / 'recipe.toml'}" in text


def test_a_trial_that_was_picked_short_of_its_best_is_shown_at_both() -> None:
    found = searched()
    found["picked"] |= {"trial": 0, "test_steps": 1, "score": 2.0}
    parts = [part for s in study.chapter(found, "metaoptim train x").sections for part in s.parts]
    trials, picked = next(part for part in parts if isinstance(part, Chart)).series
    assert (list(trials.x), list(trials.y)) == ([1, 2], [1.1, 1.0]) and (list(picked.x), list(picked.y)) == ([2], [2.0])
    rows = next(part for part in parts if isinstance(part, Table) and part.header[0] == "trial").rows
    assert [(row[0], row[3], str(row[4])[:4]) for row in rows] == [
        ("0", "2", "1.00"), ("*0", "1", "2.00"), ("1", "1", "1.10"), ("2", "–", "–"),
    ]  # fmt: skip


def test_a_search_of_which_nothing_was_picked_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "study.db").touch()
    with pytest.raises(ValueError, match=r"has a search of which nothing was picked yet: .*; go on with it .*resume"):
        opened(tmp_path)


def test_records_that_are_damaged_are_told_in_a_sentence(cli: Cli, tmp_path: Path, copy: Path) -> None:
    for name in ("comparison.json", "study.json"):
        folder = tmp_path / name.removesuffix(".json")
        folder.mkdir()
        for text in ("{", "[]", '{"metric": "loss"}', json.dumps(compared() | {"pairs": []})):
            (folder / name).write_text(text)
            code, _, err = cli("report", str(folder))
            assert code == 2 and "is damaged, or of another version" in err and "(" not in err
    (tmp_path / "study" / "study.json").write_text(json.dumps(searched()))
    assert cli("report", str(copy), str(tmp_path / "study"), "--out", "both.html")[0] == 0
    code, _, err = cli("report", str(tmp_path / "study"), "--live")
    assert code == 2 and "--live follows runs" in err


CHROMIUM = "/usr/bin/chromium"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no browser tests: pip install 'metaoptim[dev]'")
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"no browser tests: there is no {CHROMIUM}; apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def files(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of a run, one of several things, and one with every kind of part and the worst of names."""
    others = [comparison.chapter(compared()), study.chapter(searched(), "metaoptim train x")]
    pages = {"run": page([RunFolder(run)]), "others": page(others), "nasty": everything(NASTY)}
    folder = tmp_path_factory.mktemp("pages")
    for name, one in pages.items():
        (folder / f"{name}.html").write_text(render(one), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in pages}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "others", "nasty"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("across", [390, 1440])
def test_a_browser_shows_it_well(browser: Any, files: dict[str, Path], name: str, scheme: str, across: int) -> None:
    """No error, no request, nothing wider than the screen, and nothing that axe finds serious."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install 'metaoptim[dev]'")
    tab = browser.new_page(viewport={"width": across, "height": 900}, color_scheme=scheme)
    faults: list[str] = []
    requests: list[str] = []
    tab.on("console", lambda message: faults.append(message.text))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(files[name].as_uri())
    assert not faults and [url for url in requests if not url.startswith("data:")] == [files[name].as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") <= across
    shown = tab.locator("svg:visible")
    assert shown.count() == tab.locator(".chart").count() > 0
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(247, 247, 245)" if scheme == "light" else "rgb(18, 21, 26)"
    )
    tab.locator("details").evaluate_all("all => all.forEach(one => { one.open = true; })")
    violations = axe.Axe().run(tab).response["violations"]
    found = [one for one in violations if one["impact"] in ("serious", "critical")]
    assert not found, [(one["id"], [node["html"][:200] for node in one["nodes"][:3]]) for one in found]
    tab.close()


@pytest.mark.slow
def test_values_appear_under_the_pointer_and_by_keys(browser: Any, files: dict[str, Path]) -> None:
    tab = browser.new_page(viewport={"width": 1440, "height": 900}, color_scheme="light")
    tab.goto(files["run"].as_uri())
    chart = tab.locator(".chart").nth(1)
    tip = chart.locator(".tip")
    assert not tip.is_visible()
    chart.hover()
    assert tip.is_visible() and "inner steps" in tip.inner_text() and "meta_sgd" in tip.inner_text()
    told, curves = tip.bounding_box(), chart.bounding_box()
    assert told["y"] + told["height"] <= curves["y"] or told["y"] >= curves["y"] + curves["height"], "it covers no curve"
    tab.mouse.move(0, 0)
    assert not tip.is_visible()
    chart.focus()
    said = []
    for key in ("Home", "ArrowRight", "End"):
        tab.keyboard.press(key)
        said.append(tip.inner_text().splitlines()[0])
    assert said == ["inner steps 0", "inner steps 1", "inner steps 2"]
    tab.keyboard.press("Escape")
    assert not tip.is_visible()
    tab.locator("#theme").click()
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark" and tab.locator("#theme").inner_text() == "Light"
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not tab.locator("#theme").is_visible()
    tab.close()
