"""The file of trials: what is appended is read again, and a kill loses no more than the line that it cut."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from metaoptim.design import trials
from metaoptim.design.trials import Trial
from metaoptim.recipes import recipe as config


def trial(seed: int = 0) -> Trial:
    recipe = config.load("sinusoid-maml", [f"train.seed={seed}"])
    return Trial(
        recipe=recipe.name, tables=recipe.content, metric="loss", value=0.5, interval=0.01, seed=seed, split="test", steps=10,
        episodes=600, iterations=100, tasks_per_step=25, seconds=1.5, protocol="sinusoid, split test", source="compare",
    )  # fmt: skip


def test_what_is_appended_is_read_again(tmp_path: Path) -> None:
    trials.append(tmp_path / "new", trial())
    trials.append(tmp_path / "new" / trials.FILE, replace(trial(1), value=math.nan))
    first, second = trials.read(tmp_path / "new")
    assert first == replace(trial(), date=first.date) and first.finite and first.version
    assert second.value is None and not second.finite, "what is not finite becomes null"
    assert trials.read(tmp_path) == []


def test_a_line_that_was_cut_is_passed_over_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    trials.append(tmp_path, trial())
    with (tmp_path / trials.FILE).open("a") as file:
        file.write('{"recipe": "cut')
    assert len(trials.read(tmp_path)) == 1
    trials.append(tmp_path, trial(1))
    assert [one.seed for one in trials.read(tmp_path)] == [0, 1]
    with (tmp_path / trials.FILE).open("a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match=r"Line 3 of .*trials\.jsonl is no trial .*; mend it"):
        trials.read(tmp_path)


def test_tables_hold_neither_the_seed_nor_where_data_lie() -> None:
    tables = config.load("omniglot-maml", ["tasks.root=somewhere"]).content
    assert "seed" not in tables["train"] and "root" not in tables["tasks"] and "expected" not in tables
    assert tables["tasks"]["ways"] == 5 and tables["algorithm"]["name"] == "maml"
