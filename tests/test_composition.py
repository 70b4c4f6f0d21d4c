"""Choices that no paper mixed, in Python and in recipes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import metaoptim as mo
from metaoptim.algorithms.compose import compose
from metaoptim.recipes import recipe as recipes
from metaoptim.recipes.parts import PARTS
from metaoptim.recipes.schema import ConfigError


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))


# --- In recipes -----------------------------------------------------------------------------------------------------------

TEXT = """
[algorithm]
name = "compose"
loss = "mse"
rule = {rule}
{more}

[model]
name = "mlp"

[tasks]
name = "sinusoid"

[train]
iterations = 2
"""


def parsed(rule: str, more: str = "") -> recipes.Recipe:
    return recipes.parse(TEXT.format(rule=rule, more=more), "composed")


def test_a_recipe_composes_and_keeps_what_it_says() -> None:
    recipe = parsed(
        '[{name = "clip", norm = 10.0}, {name = "momentum", lr = 0.01, decay = 0.5}]',
        'steps = 3\nadapts = "head"\nobjective = "trajectory_mean"\nestimator = {name = "unroll", first_order = true}',
    )
    again = recipes.parse(recipe.text(), "composed")
    assert again == recipe and not recipe.differences(again)
    method, _ = again.build()
    expected = compose(
        mo.nn.mlp(), mo.losses.mse, rule=mo.rules.chain(mo.rules.Clip(norm=10.0), mo.rules.Momentum(0.01, 0.5)), steps=3,
        adapts="head", estimator=mo.estimators.Unroll(True, mo.objectives.trajectory_mean),
    )  # fmt: skip
    assert method.learner.rule == expected.learner.rule and method.estimator == expected.estimator  # type: ignore[attr-defined]
    assert method.adapting == expected.adapting and method.learner.steps == 3


@pytest.mark.parametrize(
    ("rule", "more", "words"),
    [
        ('"sdg"', "", r"unknown rule `sdg` in \[algorithm\]; did you mean `sgd`\?"),
        ('"sgd"', "", r"missing key `lr` in \[algorithm\.rule\]; expected a number\."),
        ('{name = "sgd", lr = "big"}', "", r'`lr` in \[algorithm\.rule\]: found the text "big", expected a number\.'),
        ("{lr = 0.1}", "", r"`rule` in \[algorithm\]: found .*, expected a name in it: sgd"),
        ('{name = "sgd", lr = 0.1}', 'estimator = "exact"', r"unknown estimator `exact` in \[algorithm\]"),
        ('{name = "sgd", lr = 0.1}', "stepz = 3", r"unknown key `stepz` in \[algorithm\]; did you mean `steps`\?"),
    ],
)
def test_a_part_that_is_none_is_one_sentence(rule: str, more: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parsed(rule, more)


def test_an_objective_beside_an_estimators_own_is_refused() -> None:
    with pytest.raises(ValueError, match=r"objective=trajectory_mean: Truncated says itself which states it judges"):
        compose(
            net(), mo.losses.mse, rule=mo.rules.SGD(0.1), steps=2, objective=mo.objectives.trajectory_mean,
            estimator=mo.estimators.Truncated(1),
        )  # fmt: skip


def test_every_part_has_options_that_a_recipe_can_write() -> None:
    for kind, known in PARTS.items():
        for name, build in known.items():
            assert callable(build) and recipes.options(build) is not None, (kind, name)
