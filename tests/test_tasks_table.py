"""Tables of one's own: how rows become tasks, what is scaled by what, and what is refused in which words."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import metaoptim as mo
from metaoptim.report.html import few_shot
from metaoptim.tasks.readers import reader
from metaoptim.tasks.table import TableReader, TableTasks

TASKS, LEAST = 10, 6


def columns() -> dict[str, list[Any]]:
    """Ten tasks t0 … t9 of 6 to 9 rows; row i of task t has y = 100 t + i, a = 3 t + i and b = −2."""
    rows = [(t, i) for i in range(9) for t in range(TASKS) if i < LEAST + t % 4]
    return {
        "who": [f"t{t}" for t, _ in rows],
        "a": [3 * t + i for t, i in rows],
        "b": [-2] * len(rows),
        "y": [100 * t + i for t, i in rows],
        "kind": ["odd" if i % 2 else "even" for _, i in rows],
    }


class Frame:
    """What a data frame has, and no more."""

    def __init__(self, data: dict[str, list[Any]]) -> None:
        self.data, self.columns = data, list(data)

    def __getitem__(self, name: str) -> NDArray[Any]:
        return np.array(self.data[name])


def write(path: Path, data: dict[str, list[Any]], delimiter: str = ",") -> Path:
    lines = [list(data), *zip(*data.values(), strict=True)]
    path.write_text("\n".join(delimiter.join(map(str, line)) for line in lines) + "\n")
    return path


def family(table: Any, **options: Any) -> TableTasks:
    given = {"task": "who", "target": "y", "shots": 2, "queries": 3, "features": ["a", "b"], "scale_target": False}
    return mo.tasks.from_table(table, **given | options)


def test_an_episode_is_rows_of_one_task() -> None:
    tasks = family(Frame(columns()))
    (xs, ys), (xq, yq) = tasks.sample("train", seed=0, start=0, count=300)
    assert xs.shape == (300, 2, 2) and ys.shape == (300, 2, 1) and xq.shape == (300, 3, 2) and yq.shape == (300, 3, 1)
    assert {x.dtype for x in (xs, ys, xq, yq)} == {torch.float32}
    y = torch.cat([ys, yq], 1)[:, :, 0].long()
    assert ((y // 100) == (y[:, :1] // 100)).all()
    assert all(len(set(row)) == 5 for row in y.tolist())
    members = {int(tasks.names[i][1:]) for i in tasks.members["train"]}
    assert set(y.flatten().tolist()) == {100 * t + i for t in members for i in range(LEAST + t % 4)}


def test_features_and_target_are_scaled_by_the_training_tasks_alone() -> None:
    data = columns()
    tasks = family(Frame(data), scale_target=True)
    train = {tasks.names[i] for i in tasks.members["train"]}
    rows = np.array([who in train for who in data["who"]])
    a, y = np.array(data["a"], float), np.array(data["y"], float)
    assert 0 < rows.sum() < len(rows)
    assert np.allclose(tasks.x[:, 0], (a - a[rows].mean()) / a[rows].std(), atol=1e-6)
    assert np.allclose(tasks.y[:, 0], (y - y[rows].mean()) / y[rows].std(), atol=1e-6)
    assert (tasks.x[:, 1] == 0).all()  # a constant column stays finite
    assert np.isclose(tasks.y[rows].var(), 1, atol=1e-5) and not np.isclose(tasks.y.var(), 1, atol=1e-2)


def test_splits_share_no_task_and_a_file_may_say_them(tmp_path: Path) -> None:
    tasks = family(Frame(columns()))
    sizes = {split: len(members) for split, members in tasks.members.items()}
    assert sizes == {"train": 6, "val": 2, "test": 2}
    assert sorted(int(i) for members in tasks.members.values() for i in members) == list(range(TASKS))
    lines = [f"t{t},{'train' if t > 2 else 'test'}" for t in range(TASKS)]
    (tmp_path / "splits.csv").write_text("\n".join(lines))
    told = family(Frame(columns()), splits=str(tmp_path / "splits.csv"))
    assert [told.names[i] for i in told.members["test"]] == ["t0", "t1", "t2"] and told.splits == ("train", "test")
    assert family(Frame(columns()), split_seed=1).describe("train") != tasks.describe("train")


def test_episodes_depend_on_their_number_alone() -> None:
    tasks = family(Frame(columns()), train_shots=3)
    whole = tasks.sample("train", seed=3, start=0, count=7)
    parts = [tasks.sample("train", seed=3, start=s, count=c) for s, c in ((0, 3), (3, 4))]
    assert whole.query[0].equal(torch.cat([p.query[0] for p in parts])) and whole.support[0].shape[1] == 3
    assert tasks.sample("test", seed=3, start=0, count=1).support[0].shape[1] == 2


def test_classes_are_the_same_in_every_task() -> None:
    tasks = family(Frame(columns()), target="kind", shots=1, queries=2)
    (_, ys), (xq, yq) = tasks.sample("train", seed=0, start=0, count=50)
    assert ys.dtype == torch.int64 and ys.shape == (50, 2) and xq.shape == (50, 4, 2)
    assert (ys.sort(1)[0] == torch.tensor([0, 1])).all() and (yq == torch.tensor([0, 0, 1, 1])).all()
    assert {tuple(row) for row in ys.tolist()} == {(0, 1), (1, 0)}  # the support is shuffled
    assert tasks.options["classes"] == ["even", "odd"]
    i = (tasks.x[:, 0] * tasks.options["spread"][0] + tasks.options["center"][0]).round() % 3  # a = 3 t + i
    assert len(set(i.tolist())) == 3
    ten = columns() | {"kind": [10 if k == "odd" else 9 for k in columns()["kind"]]}
    assert family(Frame(ten), target="kind", kind="classification", shots=1, queries=2).options["classes"] == ["9", "10"]


def test_a_file_is_read_as_a_frame_is(tmp_path: Path) -> None:
    data = columns()
    expected = family(Frame(data))
    plain = write(tmp_path / "plain.csv", data)
    packed = tmp_path / "packed.csv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    marked = tmp_path / "marked.csv"
    marked.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"t0", b'"t0"').replace(b"\n", b"\r\n"))
    files = [plain, packed, marked, write(tmp_path / "semi.csv", data, ";"), write(tmp_path / "tab.csv", data, "\t")]
    for file in files:
        found = family(str(file))
        assert (found.x == expected.x).all() and (found.y == expected.y).all() and list(found.names) == list(expected.names)
        assert found.describe("test") == expected.describe("test") | {"location": {"table": str(file)}}


def test_a_data_frame_lies_nowhere() -> None:
    assert family(Frame(columns())).describe("test")["location"] == {"table": "the data frame"}


def test_what_is_true_or_false_is_a_class_and_a_frame_is_quoted_as_it_prints() -> None:
    class Frame(dict[str, Any]):
        columns = property(dict.keys)

    data = columns()
    frame = Frame({**data, "kind": [value == "even" for value in data["kind"]]})
    options: dict[str, Any] = {"target": "kind", "features": ["a"], "shots": 1, "queries": 1}
    assert family(frame, **options).options["classes"] == ["False", "True"]
    with pytest.raises(ValueError, match="of a table: kind='classification'; for regression: mse"):
        mo.losses.cross_entropy(torch.zeros(3, 2), torch.zeros(3))
    frame["a"] = np.array([np.str_("lo"), *data["a"][1:]], object)
    with pytest.raises(ValueError, match="Row 0 of the data frame has 'lo' in `a`"):
        family(frame, **options)


def test_all_other_columns_are_features_unless_they_are_named() -> None:
    data = {name: values for name, values in columns().items() if name != "kind"}
    assert mo.tasks.from_table(Frame(data), "who", "y", 2, 3).options["features"] == ["a", "b"]
    assert family(Frame(data), features=["a"]).x.shape[1] == 1


def test_a_result_over_few_tasks_says_so() -> None:
    tasks = family(Frame(columns()))
    method = mo.maml(mo.nn.mlp((tasks.x.shape[1], 1)), mo.losses.mse)
    result = mo.evaluate(mo.Run(method, method.phi), tasks, episodes=20, progress=False)
    few = f"over episodes of {len(tasks.members['test'])} tasks, not over tasks"
    assert few in " ".join(str(result).split()) and "not over tasks" not in str(
        replace(result, facts={**result.facts, "tasks": result.facts["tasks"] | {"tasks": 10}})
    )
    assert few in str(few_shot.sections(json.loads(result.json()))[0])
    lines = [line.strip() for line in str(result).splitlines()]
    assert f"episodes {result.facts['episodes_sha256'][:12]}" in lines, "there are no classes to tell, and the hash is whole"


def test_short_tasks_may_be_left_out() -> None:
    with pytest.warns(UserWarning, match=rf"3 of the {TASKS} tasks of .* are left out, for an episode needs 7 rows") as told:
        tasks = family(Frame(columns()), shots=3, queries=4, short="leave_out")
    assert len(told) == 1
    assert list(tasks.names) == [f"t{t}" for t in range(TASKS) if LEAST + t % 4 >= 7]


def test_a_reader_scales_as_the_training_data_were(tmp_path: Path) -> None:
    data = columns()
    tasks = family(Frame(data), scale_target=True)
    known = tasks.describe("train")
    file = write(tmp_path / "one.csv", {name: values[:5] for name, values in data.items()})
    files = reader(known)
    assert isinstance(files, TableReader)
    (x, y), classes = files.support(file)
    assert classes == [] and np.allclose(x, tasks.x[:5]) and np.allclose(y, tasks.y[:5])
    assert np.allclose(files.values(y), np.array(data["y"][:5])[:, None], atol=1e-3)
    queries, heads, cells = files.queries(file)
    assert queries.equal(x) and heads == list(data) and cells[1] == [str(values[1]) for values in data.values()]


def test_a_reader_knows_the_classes(tmp_path: Path) -> None:
    data = columns()
    files = reader(family(Frame(data), target="kind", shots=1, queries=2).describe("train"))
    file = write(tmp_path / "one.csv", {name: values[-4:] for name, values in data.items()})
    (_, y), classes = files.support(file)
    assert [classes[i] for i in y.tolist()] == data["kind"][-4:]
    strange = write(tmp_path / "two.csv", data | {"kind": ["even"] * (len(data["kind"]) - 1) + ["blue"]})
    with pytest.raises(ValueError, match="the class 'blue' in `kind`; the model knows even, odd"):
        files.support(strange)


def test_a_reader_is_for_tasks_from_files() -> None:
    with pytest.raises(ValueError, match="trained on the tasks `sinusoid`, and files can be read for runs on from_folder"):
        reader(mo.tasks.sinusoid().describe("train"))


def without(name: str) -> Callable[[dict[str, list[Any]]], None]:
    return lambda data: data.pop(name) and None


def put(name: str, row: int, value: Any) -> Callable[[dict[str, list[Any]]], None]:
    return lambda data: data[name].__setitem__(row, value)


def cut(rows: int) -> Callable[[dict[str, list[Any]]], None]:
    return lambda data: data.update({name: values[:rows] for name, values in data.items()})


@pytest.mark.parametrize(("change", "options", "words"), [
    (without("y"), {}, ["has no column `y`", "who, a, b, kind"]),
    (without("who"), {}, ["has no column `who`"]),
    (put("a", 3, ""), {}, ["Line 5 of", "no value in `a`;", "missing values are not guessed"]),
    (put("a", 3, "NA"), {}, ["Line 5 of", "no value in `a` ('NA')"]),
    (put("who", 0, " "), {}, ["Line 2 of", "no value in `who`"]),
    (put("y", 1, "nan"), {}, ["Line 3 of", "no value in `y` ('nan')"]),
    (put("a", 3, "red"), {}, ["Line 5 of", "'red' in `a`", "no finite number"]),
    (put("a", 3, "inf"), {}, ["Line 5 of", "'inf' in `a`"]),
    (put("y", 3, "red"), {"kind": "regression"}, ["Line 5 of", "'red' in `y`"]),
    (put("y", 3, "red"), {}, ["Line 5 of", "'red' in `y`"]),
    (put("kind", 3, "rare"), {"target": "kind", "shots": 1},
     ["has 0 rows of the class 'rare'", "9 more tasks have too few); ask for fewer shots or queries."]),
    (None, {"features": ["kind"]}, ["'even' in `kind`", "leave the column out"]),
    (None, {"features": ["a", "y"]}, ["or more columns, each once, beside the task `who` and the target `y`", "found a, y"]),
    (None, {"features": []}, ["found none"]),
    (None, {"features": ["a", "a"]}, ["one or more columns, each once", "found a, a"]),
    (None, {"features": "a"}, ["features='a': it must be a list of columns, such as ['a']"]),
    (None, {"task": "hwo"}, ["has no column `hwo`; its columns are who, "]),
    (None, {"target": "Kinds"}, ["has no column `Kinds`; its columns are kind, "]),
    (None, {"target": "who"}, ["task and target are both `who`", "the column to predict"]),
    (None, {"shots": 0}, ["shots=0", "at least 1"]),
    (None, {"kind": "both"}, ["kind='both'", "regression"]),
    (None, {"short": "drop"}, ["short='drop'", "refuse or leave_out"]),
    (None, {"shots": 4}, ["The task 't0'", "has 6 rows, and an episode needs 7", "2 more tasks", "(short='leave_out')"]),
    (None, {"shots": 9, "short": "leave_out"}, ["'t0'", "needs 12", "ask for fewer shots or queries."]),
    (None, {"target": ["y", "a"]}, ["target=['y', 'a']: it must be the name of one column"]),
    (None, {"splits": {"t0": "train"}}, ["splits is a dict: it must be the path of a file with lines NAME,SPLIT."]),
    (None, {"target": "b", "features": ["a"], "kind": "classification"}, ["is always '-2'", "2 or more"]),
    (lambda data: data.update({n: [v for v, w in zip(vs, list(data["who"]), strict=True) if w in ("t1", "t2")]
                               for n, vs in list(data.items())}), {}, ["There are too few tasks (2)", "with 1 or more"]),
])  # fmt: skip
def test_faults_of_a_table_are_told_in_one_sentence(
    tmp_path: Path, change: Callable[[dict[str, list[Any]]], None] | None, options: dict[str, Any], words: list[str]
) -> None:
    data = columns()
    if change:
        change(data)
    file = write(tmp_path / "data.csv", data)
    with pytest.raises(ValueError) as raised:
        family(str(file), **options)
    told = str(raised.value)
    assert all(word in told for word in words), told
    assert told.endswith(".") and "\n" not in told


@pytest.mark.parametrize(("content", "words"), [
    (b"", ["has no rows"]),
    (b"who,a,b,y\n", ["has no rows", "a line of column names"]),
    (b"who,a,b,y\nt0,1,2,3\nt0,1,2\n", ["Line 3 of", "has 3 fields", "names 4 columns"]),
    (b"who,a,a,y\nt0,1,2,3\n", ["names the column `a` twice"]),
    (b"who,a,,y\nt0,1,2,3\n", ["leaves a column without a name"]),
    (b"who,a,b,y\nt0,\xff\xfe,2,3\n", ["isn't UTF-8 text"]),
    (b'who,a,b,y\nt0,"1,2,3\n', ["Line 2 of", "can't be read", "expected a CSV file"]),
])  # fmt: skip
def test_faults_of_a_file_are_told_in_one_sentence(tmp_path: Path, content: bytes, words: list[str]) -> None:
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(ValueError) as raised:
        family(str(tmp_path / "bad.csv"))
    told = str(raised.value)
    assert all(word in told for word in words), told
    assert told.endswith(".") and "\n" not in told


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"There is no file .*nowhere\.csv; expected a CSV file"):
        family(str(tmp_path / "nowhere.csv"))
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"who,a,b,y\n" * 99)[:25])
    with pytest.raises(ValueError, match="can't be unpacked"):
        family(str(tmp_path / "cut.csv.gz"))
    with pytest.raises(ValueError, match="the path of a CSV file or a data frame with `columns`; found list"):
        family([1, 2])
    with pytest.raises(ValueError, match="the data frame has no value in `a`"):
        family(Frame(columns() | {"a": [None] * len(columns()["a"])}))
    with pytest.raises(ValueError, match="The data frame is empty"):
        family(Frame({"who": []}))


def test_a_run_learns_from_a_table() -> None:
    torch.manual_seed(0)
    method = mo.maml(mo.nn.mlp((2, 8, 1)), mo.losses.mse, lr=0.05)
    tasks = family(Frame(columns()), scale_target=True)
    run = mo.train(method, tasks, iterations=2, tasks_per_step=4, validate_every=1, validate_episodes=4, progress=False)
    result = mo.evaluate(run, tasks, episodes=5, progress=False)
    assert result.metric == "loss" and len(result.rows) == 2 and result.facts["tasks"]["tasks"] == 2
