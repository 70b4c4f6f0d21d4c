"""Recipes: what is filled in, what is refused in which words, and that a resolved one reads back the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from metaoptim import evaluation, training
from metaoptim.algorithms import ALGORITHMS, maml
from metaoptim.core.brief import nearest
from metaoptim.core.trees import flatten
from metaoptim.recipes import recipe as config
from metaoptim.recipes.experiment import Experiment
from metaoptim.recipes.schema import REQUIRED, ConfigError, check, options, spell
from metaoptim.tasks import TASKS

TINY = """
description = "a tiny one"
[algorithm]
name = "maml"
loss = "mse"
[model]
name = "mlp"
sizes = [1, 8, 1]
[tasks]
name = "sinusoid"
[train]
iterations = 3
[expected]
metric = "mse"
value = 0.4
when = 2024-01-31
"""


def tiny(*overrides: str) -> config.Recipe:
    return config.parse(TINY, "tiny", overrides)


def default(function: Callable[..., Any], name: str) -> Any:
    return inspect.signature(function).parameters[name].default


def test_every_option_is_filled_in_from_the_signatures() -> None:
    tables = tiny().tables
    assert tables["algorithm"]["steps"] == default(maml, "steps")
    assert tables["train"] == {**tables["train"], "iterations": 3, "clip": None}
    assert tables["train"]["tasks_per_step"] == default(training.train, "tasks_per_step")
    assert tables["evaluate"]["episodes"] == default(evaluation.evaluate, "episodes")
    autos = {"batching": "auto", "memory": "auto", "runtime": "auto"}
    assert tables["engine"] == {**autos, "precision": "full", "budget": None, "choice": None}
    assert not {"out", "resume", "engine", "recipe", "progress"} & tables["train"].keys()
    assert config.parse(TINY.replace("sizes = [1, 8, 1]", ""), "x").tables["model"]["sizes"] == [1, 40, 40, 1]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("tasks", TASKS)
def test_a_resolved_recipe_reads_back_the_same(algorithm: str, tasks: str) -> None:
    numbers = tasks in ("sinusoid", "fertility", "from_table")
    model, loss = ("mlp", "mse") if numbers else ("conv4", "cross_entropy")
    needed = {"from_folder": 'root = "x", ', "from_table": 'table = "x.csv", task = "who", target = "y", '}
    text = f"""
    algorithm = {{ name = "{algorithm}", loss = "{loss}" }}
    model = {{ name = "{model}" }}
    tasks = {{ name = "{tasks}", {needed.get(tasks, "")}train_shots = 7 }}
    train = {{ iterations = 10, clip = 1, lr = 0.5, validate_steps = "none" }}
    """
    recipe = config.parse(text, "one")
    assert recipe.tables["train"]["clip"] == 1.0
    assert config.parse(recipe.text(), "another name") == recipe
    assert config.parse(recipe.text(), "").text() == recipe.text()


@pytest.mark.parametrize("name", config.names())
def test_shipped_recipes_can_be_read(name: str) -> None:
    recipe = config.load(name)
    assert recipe.name == name and recipe.description
    assert config.parse(recipe.text(), "x") == recipe


def test_a_recipe_is_read_from_a_file_under_its_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(TINY)
    recipe = config.load(path)
    assert (recipe.name, recipe.description) == ("mine", "a tiny one")
    assert recipe.tables == tiny().tables


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("algorithm.steps=5", 5),
        ("algorithm.lr = 1", 1.0),
        ("algorithm.lr=1e-2", 0.01),
        ("algorithm.loss=cross_entropy", "cross_entropy"),
        ('algorithm.loss="mse"', "mse"),
        ("model.sizes=[1, 3, 3, 1]", [1, 3, 3, 1]),
        ("tasks.phase=2pi", "2pi"),
        ("tasks.grid=none", None),
        ("train.clip=10", 10.0),
        ("train.clip=none", None),
        ("train.schedule=cosine", "cosine"),
        ("train.optimizer=AdamW", "AdamW"),
        ("engine.batching=vmap:4", "vmap:4"),
        ("evaluate.steps=10", 10),
        ("expected.note=a = b", "a = b"),
    ],
)
def test_overrides(override: str, value: object) -> None:
    table, key = override.partition("=")[0].strip().split(".")
    found = tiny(override).tables[table][key]
    assert (found, type(found)) == (value, type(value))


def test_the_last_override_counts_and_another_builder_can_be_chosen() -> None:
    assert tiny("algorithm.steps=5", "algorithm.steps=6").tables["algorithm"]["steps"] == 6
    assert tiny("algorithm.name=reptile").tables["algorithm"]["inner"] == "adam"


def test_the_model_takes_its_ways_from_the_tasks_unless_given() -> None:
    base = TINY.replace('"sinusoid"', '"omniglot"').replace('"mlp"', '"conv4"').replace("sizes = [1, 8, 1]", "")
    assert config.parse(base, "x").tables["model"]["ways"] == default(TASKS["omniglot"], "ways")
    assert config.parse(base, "x", ["tasks.ways=20"]).tables["model"]["ways"] == 20
    assert config.parse(base, "x", ["tasks.ways=20", "model.ways=21"]).tables["model"]["ways"] == 21


def test_the_same_recipe_gives_the_same_start_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, tasks = tiny("algorithm.name=meta_sgd", "algorithm.steps=7").build()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, _ = tiny("algorithm.name=meta_sgd", "algorithm.steps=7").build()
    other, _ = tiny("algorithm.name=meta_sgd", "train.seed=1").build()
    assert first.learner.steps == 7
    assert tasks.sample("train", seed=0, start=0, count=2).support[0].shape == (2, 10, 1)
    assert first.phi.rule
    for a, b, c in zip(flatten(first.phi), flatten(again.phi), flatten(other.phi), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_differences_name_the_options_in_which_recipes_differ() -> None:
    other = tiny("algorithm.steps=3", "train.seed=1", "expected.value=1")
    assert tiny().differences(tiny()) == []
    assert tiny().differences(other) == ["algorithm.steps", "train.seed"]
    assert set(tiny().differences(tiny("algorithm.name=meta_sgd"))) >= {"algorithm.name", "algorithm.lr"}


BAD_OVERRIDES = [
    ("algorithm.stpes=5", ["unknown key `stpes` in [algorithm]", "did you mean `steps`?"]),
    ("algorithm.zzz=5", ["unknown key `zzz` in [algorithm]", "expected one of: loss, lr, steps"]),
    ("algorithm.net=5", ["unknown key `net` in [algorithm]"]),
    ("algorithm.steps='5'", ['`steps` in [algorithm]: found the text "5", expected a whole number']),
    ("algorithm.steps=five", ['found the text "five", expected a whole number']),
    ("algorithm.steps=5.0", ["found 5.0, expected a whole number"]),
    ("algorithm.steps=true", ["found true, expected a whole number"]),
    ("algorithm.steps=none", ['found the text "none", expected a whole number']),
    ("algorithm.steps=", ['found the text "", expected a whole number']),
    ("algorithm.lr=false", ["`lr` in [algorithm]: found false, expected a number"]),
    ("algorithm.lr=nan", ["found NaN, expected a number"]),
    ("algorithm.lr=[0.1]", ["found [0.1], expected a number"]),
    ("algorithm.loss=mes", ['expected "cross_entropy" or "mse" or FILE.py:NAME; did you mean `mse`?']),
    ("algorithm.normalisation=inductve", ["did you mean `inductive`?"]),
    ("algorithm.name=mmal", ["unknown algorithm `mmal` in [algorithm]; did you mean `maml`?"]),
    ("algorithm.name=[1]", ["unknown algorithm `[1]`", "expected one of: maml, fomaml"]),
    ("model.name=conv5", ["unknown model `conv5` in [model]; did you mean `conv4`?"]),
    ("model.ways=5", ["unknown key `ways` in [model]"]),
    ("model.sizes=3", ["`sizes` in [model]: found 3, expected a list, each item a whole number"]),
    ("model.sizes=[1, 'a']", ['found [1, "a"], expected a list']),
    ("tasks.name=sinusiod", ["unknown tasks `sinusiod`", "did you mean `sinusoid`?"]),
    ("tasks.phase=3pi", ['expected "pi" or "2pi"']),
    ("train.iteratoins=5", ["unknown key `iteratoins` in [train]; did you mean `iterations`?"]),
    ("train.out=here", ["unknown key `out` in [train]"]),
    ("train.clip=much", ['found the text "much", expected a number or "none"']),
    ("train.schedule=linaer", ["did you mean `linear`?"]),
    ("engine.batch=loop", ["unknown key `batch` in [engine]; did you mean `batching`?"]),
    ("trian.iterations=5", ["unknown table `trian`", "did you mean `train`?"]),
    ("description.x=5", ["unknown table `description`"]),
    ("algorithm=5", ["can't set `algorithm=5`; expected TABLE.KEY=VALUE"]),
    ("algorithm.steps", ["can't set `algorithm.steps`; expected TABLE.KEY=VALUE"]),
    (".steps=5", ["can't set `.steps=5`"]),
]


@pytest.mark.parametrize(("override", "words"), BAD_OVERRIDES, ids=[o for o, _ in BAD_OVERRIDES])
def test_bad_values_are_refused_with_a_sentence(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        tiny(override)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


BAD_TEXTS = {
    "empty": ("# nothing", ["this recipe is empty"]),
    "no algorithm": (TINY.replace("[algorithm]", "[expected.x]"), ["missing key `name` in [algorithm]", "maml"]),
    "no model": (TINY.replace("[model]", "[expected.model]"), ["missing key `name` in [model]"]),
    "no loss": (TINY.replace('loss = "mse"', ""), ["missing key `loss` in [algorithm]", '"mse"']),
    "no iterations": (
        TINY.replace("iterations = 3", ""),
        ["missing key `iterations` in [train]", "a whole number"],
    ),
    "typo and missing": (TINY.replace("iterations", "iteration"), ["did you mean `iterations`?"]),
    "unknown table": (TINY + "[evalute]\nsteps = 1", ["unknown table `evalute`; did you mean `evaluate`?"]),
    "unknown key": ("descripton = 'x'\n" + TINY, ["unknown key `descripton`; did you mean `description`?"]),
    "table is a value": ("engine = 3\n" + TINY, ["`engine`: found 3, expected a table, [engine]"]),
    "text is a number": (TINY.replace('"a tiny one"', "3"), ["`description`: found 3, expected a text"]),
    "array of tables": (TINY + "[[engine]]\ntasks = 'loop'", ["`engine`: found [", "expected a table"]),
    "not TOML": (TINY.replace('"maml"', "maml"), ["not valid TOML", "line 4"]),
    "twice": (TINY + "[train]\niterations = 4", ["not valid TOML", "line"]),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_texts_are_refused_with_a_sentence(case: str, tmp_path: Path) -> None:
    text, words = BAD_TEXTS[case]
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        config.load(path)
    for word in (str(path), *words):
        assert word in str(error.value)


def test_bad_paths_are_refused_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latin.toml").write_bytes(b"description = '\xe9'")
    for name, words in {
        "latin.toml": "isn't UTF-8 text",
        "": "is a folder",
        "none.toml": "there is no file",
        "folder/none": "there is no file",
    }.items():
        with pytest.raises(ConfigError, match=words):
            config.load(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    Path("sensors.toml").touch()
    with pytest.raises(ConfigError, match=r"unknown recipe `sensors`; did you mean the file sensors\.toml\?"):
        config.load("sensors")
    with pytest.raises(ConfigError, match="unknown recipe `no such`"):
        config.load("no such")


def test_nearest_names_the_one_that_was_meant_or_all() -> None:
    assert nearest("MAMLL", ["maml", "fomaml"]) == "; did you mean `maml`?"
    assert nearest("adam", ["SGD", "Adam"]) == "; did you mean `Adam`?"
    assert nearest("xyz", ["maml", "reptile"]) == "; expected one of: maml, reptile."


def example(
    given: int,
    words: Sequence[str] = ("a", "b"),
    pick: Literal["x", "y"] | Callable[[], int] = "x",
    *rest: int,
    maybe: float | None = None,
    function: Callable[[], int] | None = None,
    mapping: Mapping[str, Any] | None = None,
    **others: int,
) -> None:
    """An example.

    Args:
        given: first
            and second line.
        words: some: words.

    Text that is no argument: really.
    """


def test_options_are_what_toml_can_spell_of_a_signature() -> None:
    known = {o.name: o for o in options(example)}
    assert list(known) == ["given", "words", "pick", "maybe", "mapping"]
    assert known["given"].default is REQUIRED and known["given"].meaning == "first and second line."
    assert (known["words"].default, known["words"].meaning) == (["a", "b"], "some: words.")
    assert [spell(o.type) for o in known.values()] == [
        "a whole number",
        "a list, each item a text",
        '"x" or "y"',
        'a number or "none"',
        'a table or "none"',
    ]
    assert [o.name for o in options(example, keyword_only=True)] == ["maybe", "mapping"]
    filled = check("example", {"given": 1, "mapping": {"k": [1]}}, options(example))
    assert filled == {"given": 1, "words": ["a", "b"], "pick": "x", "maybe": None, "mapping": {"k": [1]}}


@pytest.mark.parametrize("table", ["algorithm", "model", "tasks", "train", "evaluate", "engine"])
@pytest.mark.parametrize("kind", config.KINDS)
def test_every_option_says_what_it_means(kind: type[Experiment], table: str) -> None:
    for name in kind.builders.get(table, [""] if table not in kind.refused else []):
        for option in kind.options(table, name):
            assert option.meaning, f"[{table}] {name}: `{option.name}` isn't explained in the docstring's Args"
