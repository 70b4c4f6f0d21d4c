"""`metaoptim adapt`: from a trained run and files on disk to a CSV file of predictions."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import metaoptim as mo
from metaoptim import runs as stored
from metaoptim.cli.main import main
from metaoptim.recipes import places
from metaoptim.recipes import recipe as config
from metaoptim.tasks.readers import reader

IMAGES = """
[algorithm]
name = "maml"
loss = "cross_entropy"
[model]
name = "conv4"
channels = 3
size = 8
filters = 4
[tasks]
name = "from_folder"
root = "photos"
ways = 2
shots = 1
queries = 2
size = 8
[train]
iterations = 2
tasks_per_step = 2
validate_every = 0
[evaluate]
episodes = 4
"""
ROWS = """
[algorithm]
name = "maml"
loss = "mse"
[model]
name = "mlp"
sizes = [2, 8, 1]
[tasks]
name = "from_table"
table = "wines.csv"
task = "region"
target = "price"
shots = 3
queries = 2
[train]
iterations = 2
tasks_per_step = 2
validate_every = 0
"""

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METAOPTIM_CACHE", str(tmp_path / "cache"))

    def run(*args: str) -> tuple[int, str, str]:
        code = main(args)
        return code, *capsys.readouterr()

    return run


def photo(path: Path, seed: int, size: tuple[int, int] = (10, 14)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def images(cli: Cli) -> Cli:
    """A run on six classes of photos, and in `new` two classes to learn and three photos to tell."""
    for c in range(6):
        for i in range(3):
            photo(Path("photos", f"class{c}", f"{i}.png"), 10 * c + i)
    for i, name in enumerate(("cat", "dog", "cat", "dog", "dog")):
        photo(Path("new", "known", name, f"{i}.png"), 100 + i, (20, 9))
    for i in range(3):
        photo(Path("new", "unknown", f"{2 - i}.png"), 200 + i)
    Path("images.toml").write_text(IMAGES)
    assert cli("train", "images.toml", "--out", "run")[0] == 0
    return cli


@pytest.fixture
def rows(cli: Cli) -> Cli:
    """A run on six regions' wines, and two tables of a new region."""
    lines = [f"r{t},{i},{i * t % 5},{3 * t + i}" for t in range(6) for i in range(6)]
    Path("wines.csv").write_text("\n".join(["region,age,sugar,price", *lines]))
    Path("known.csv").write_text("age,sugar,price\n1,2,20\n2,0,21\n5,1,24\n4,4,23\n")
    Path("unknown.csv").write_text("bottle,sugar,age\nred,1,3\nwhite,2,6\n")
    Path("rows.toml").write_text(ROWS)
    assert cli("train", "rows.toml", "--out", "run")[0] == 0
    return cli


def table(path: str) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_photos_are_told_apart(images: Cli) -> None:
    shutil.rmtree("photos")  # what it was trained on isn't needed
    code, out, err = images("adapt", "run", "--support", "new/known", "--predict", "new/unknown", "--steps", "2")
    assert (code, out, err) == (0, "3 predictions are in predictions.csv.\n", "")
    head, *lines = table("predictions.csv")
    assert head == ["file", "prediction", "p(cat)", "p(dog)"] and [line[0] for line in lines] == ["0.png", "1.png", "2.png"]

    run = stored.load("run", config.load("run/recipe.toml").experiment().method)
    files = reader(run.trained["tasks"])
    support, names = files.support(Path("new/known"))
    expected = run.adapt(support, 2)(files.queries(Path("new/unknown"))[0]).softmax(1)
    assert torch.allclose(torch.tensor([[float(p) for p in line[2:]] for line in lines]), expected, atol=1e-5)
    assert [line[1] for line in lines] == [names[i] for i in expected.argmax(1).tolist()]


def test_rows_are_predicted_in_their_own_units(rows: Cli) -> None:
    Path("wines.csv").unlink()
    code, out, _ = rows("adapt", "run", "--support", "known.csv", "--predict", "unknown.csv", "--out", "new/prices.csv")
    assert code == 0 and "2 predictions are in new/prices.csv." in out
    head, *lines = table("new/prices.csv")
    assert head == ["bottle", "sugar", "age", "prediction"]
    assert [line[:3] for line in lines] == [["red", "1", "3"], ["white", "2", "6"]]

    run = stored.load("run", config.load("run/recipe.toml").experiment().method)
    options = run.trained["tasks"]["options"]
    center, spread = torch.tensor(options["center"]), torch.tensor(options["spread"])
    x = (torch.tensor([[1.0, 2.0], [2.0, 0.0], [5.0, 1.0], [4.0, 4.0]]) - center) / spread
    y = (torch.tensor([[20.0], [21.0], [24.0], [23.0]]) - options["target_center"]) / options["target_spread"]
    told = run.adapt((x, y))((torch.tensor([[3.0, 1.0], [6.0, 2.0]]) - center) / spread)
    expected = told.flatten() * options["target_spread"] + options["target_center"]
    assert torch.allclose(torch.tensor([float(line[3]) for line in lines]), expected, atol=1e-3)


def test_a_run_from_python_adapts_too(rows: Cli) -> None:
    torch.manual_seed(0)
    method = mo.maml(mo.nn.mlp((2, 8, 1)), mo.losses.mse)
    tasks = mo.tasks.from_table("wines.csv", "region", "price", shots=3, queries=2)
    run = mo.train(method, tasks, iterations=2, tasks_per_step=2, out="python", validate_every=0, progress=False)
    assert rows("adapt", "python", "--support", "known.csv", "--predict", "unknown.csv")[0] == 0
    files = reader(tasks.describe("train"))
    expected = files.values(run.adapt(files.support(Path("known.csv"))[0])(files.queries(Path("unknown.csv"))[0]))
    assert [float(line[3]) for line in table("predictions.csv")[1:]] == pytest.approx(expected.flatten().tolist(), rel=1e-4)
    _, again = config.load("python/recipe.toml").build()
    assert again.describe("test") == tasks.describe("test")


def test_classes_of_a_table_have_probabilities(rows: Cli) -> None:
    lines = [f"r{t},{i},{i * t % 5},{'dear' if i > 2 else 'cheap'}" for t in range(6) for i in range(6)]
    Path("wines.csv").write_text("\n".join(["region,age,sugar,price", *lines]))
    text = ROWS.replace('"mse"', '"cross_entropy"').replace("8, 1]", "8, 2]").replace("shots = 3", "shots = 1")
    Path("rows.toml").write_text(text)
    Path("known.csv").write_text("age,sugar,price\n1,2,cheap\n2,0,dear\n")
    assert rows("train", "rows.toml", "--out", "classes")[0] == 0
    assert rows("adapt", "classes", "--support", "known.csv", "--predict", "unknown.csv")[0] == 0
    head, *found = table("predictions.csv")
    assert head[3:] == ["prediction", "p(cheap)", "p(dear)"]
    for line in found:
        cheap, dear = map(float, line[4:])
        assert cheap + dear == pytest.approx(1, abs=1e-5) and line[3] == ("cheap" if cheap > dear else "dear")


def test_recipes_name_folders_of_ones_own(images: Cli) -> None:
    shutil.move("photos", "moved")
    code, _, err = images("evaluate", "run")
    assert code == 2 and "There is no folder photos" in err
    assert config.load("run/recipe.toml", ["tasks.root=moved"]).build()[1].splits == ("train", "val", "test")


def test_data_are_found_beside_the_recipe_and_where_a_run_was_started(
    rows: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned/recipe.toml").write_text(config.load("rows.toml").lying_in(tmp_path / "tuned").text())
    assert 'table = "../wines.csv"' in (tmp_path / "tuned/recipe.toml").read_text()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    Path("wines.csv").write_text("another table")
    assert rows("evaluate", "../run")[0] == 0
    for recipe in ("../rows.toml", "../tuned/recipe.toml"):
        assert Path(config.load(recipe).tables["tasks"]["table"]).resolve() == tmp_path / "wines.csv"
    assert config.load("../rows.toml", ["tasks.table=wines.csv"]).tables["tasks"]["table"] == "wines.csv"
    assert rows("train", "../tuned/recipe.toml", "--out", "../run", "--resume")[0] == 0
    Path("wines.csv").unlink()
    Path("../wines.csv").unlink()
    code, _, err = rows("evaluate", "../run")
    assert code == 2 and f"There is no file wines.csv in {Path.cwd()}, nor beside the recipe" in err


def test_members_of_a_mixture_are_found_as_other_code_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").touch()
    tables = {"tasks": {"name": "mixture", "families": [{"name": "own.py:family"}]}}
    (member,) = places.seen_from(tables, tmp_path / "tuned")["tasks"]["families"]
    assert member["name"] == "../own.py:family"
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    (member,) = places.found(tables, [tmp_path])["tasks"]["families"]
    assert member["name"] == f"{(tmp_path / 'own.py').as_posix()}:family"


@pytest.mark.parametrize(("args", "words"), [
    (["nowhere", "--support", "new/known", "--predict", "new/unknown"], "there is no nowhere/recipe.toml"),
    (["run", "--support", "photos", "--predict", "new/unknown"], "class0 (3), class1 (3)"),
    (["run", "--support", "new/known", "--predict", "new"], "There are no images in new"),
    (["run", "--support", "lost", "--predict", "new/unknown"], "There is no folder lost"),
    (["run", "--support", "new/known", "--predict", "new/bad"], "new/bad/x.png can't be read as an image"),
    (["run", "--support", "new/known", "--predict", "new/unknown", "--steps", "-1"], "steps=-1"),
    (["run", "--support", "new/known", "--predict", "new/unknown", "--device", "nowhere"], "device='nowhere'"),
])  # fmt: skip
def test_faults_of_folders_are_told_in_one_sentence(images: Cli, args: list[str], words: str) -> None:
    Path("new/bad").mkdir()
    Path("new/bad/x.png").write_text("no image")
    code, _, err = images("adapt", *args)
    assert code == 2 and words in err and err.count("\n") == 1 and not Path("predictions.csv").exists()


@pytest.mark.parametrize(("known", "unknown", "words"), [
    ("age,price\n1,2\n", "age,sugar\n1,2\n", "known.csv has no column `sugar`; its columns are age, price."),
    ("age,sugar\n1,2\n", "age,sugar\n1,2\n", "known.csv has no column `price`"),
    ("age,sugar,price\n1,2,3\n", "age,sugar\n1,\n", "Line 2 of unknown.csv has no value in `sugar`"),
    ("age,sugar,price\n1,2,3\n", "age,sugar\n", "unknown.csv has no rows"),
])  # fmt: skip
def test_faults_of_tables_are_told_in_one_sentence(rows: Cli, known: str, unknown: str, words: str) -> None:
    Path("known.csv").write_text(known)
    Path("unknown.csv").write_text(unknown)
    code, _, err = rows("adapt", "run", "--support", "known.csv", "--predict", "unknown.csv")
    assert code == 2 and words in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["known.csv", "unknown.csv"])
def test_predictions_replace_neither_input(rows: Cli, name: str) -> None:
    before = Path(name).read_bytes()
    code, _, err = rows("adapt", "run", "--support", "known.csv", "--predict", "./unknown.csv", "--out", f"{Path.cwd() / name}")
    assert code == 2 and f"{name} is the file of --" in err and "give --out another name" in err and err.count("\n") == 1
    assert Path(name).read_bytes() == before


def test_only_runs_on_files_adapt_to_files(rows: Cli) -> None:
    start, end = ROWS.index('"from_table"'), ROWS.index("shots")
    text = (ROWS[:start] + '"sinusoid"\n' + ROWS[end:]).replace("[2,", "[1,")
    Path("waves.toml").write_text(text)
    assert rows("train", "waves.toml", "--out", "waves")[0] == 0
    code, _, err = rows("adapt", "waves", "--support", "known.csv", "--predict", "unknown.csv")
    assert code == 2 and "trained on the tasks `sinusoid`, and files can be read for runs on from_folder and from_table" in err
