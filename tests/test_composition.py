"""Choices that no paper mixed: every combination is right by its claim, or refused with a sentence; the docs say which."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import metaoptim as mo
from metaoptim.algorithms.compose import compose
from metaoptim.core.types import Estimator, Rule, Task
from metaoptim.gradcheck.case import prepare
from metaoptim.gradcheck.claims import judge
from metaoptim.learners import GradientLearner
from metaoptim.ledger import source
from metaoptim.recipes import recipe as recipes
from metaoptim.recipes.parts import PARTS
from metaoptim.recipes.schema import ConfigError, options


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))


PAGE = Path(__file__).parent.parent / "docs" / "composition.md"
STEPS = 2

RULES: dict[str, Callable[[], Rule]] = {
    "sgd": lambda: mo.rules.SGD(0.1),
    "momentum": lambda: mo.rules.Momentum(0.1, 0.5),
    "nesterov": lambda: mo.rules.Nesterov(0.1, 0.5),
    "rmsprop": lambda: mo.rules.RMSprop(0.01, eps=0.1),
    "adam": lambda: mo.rules.Adam(0.1, eps=0.1),
    "adamw": lambda: mo.rules.AdamW(0.1, eps=0.1),
    "muon": lambda: mo.rules.Muon(0.1, adam_lr=0.1, eps=0.1),
    "soap": lambda: mo.rules.SOAP(0.1, eps=0.1),
    "schedule_free_adamw": lambda: mo.rules.ScheduleFreeAdamW(0.1, eps=0.1),
    "sgd_hd": lambda: mo.rules.sgd_hd(0.1, 0.01),
    "adam_hd": lambda: mo.rules.adam_hd(0.1, 0.01, eps=0.1),
    "clip, sgd": lambda: mo.rules.chain(mo.rules.Clip(norm=0.5), mo.rules.SGD(0.1)),
    "momentum, schedule": lambda: mo.rules.chain(mo.rules.Momentum(1.0, 0.5), mo.rules.Schedule(0.1, STEPS)),
    "momentum, average": lambda: mo.rules.chain(mo.rules.Momentum(0.1, 0.5), mo.rules.Average(0.15)),
    "step_sizes": lambda: PARTS["rule"]["step_sizes"](low=0.05, high=0.1),
    "layer_step_sizes": lambda: mo.rules.LayerStepSizes(0.1, STEPS),
    "curvature": lambda: PARTS["rule"]["curvature"](lr=0.1),
    "alfa": lambda: PARTS["rule"]["alfa"](lr=0.1, decay=0.01, steps=STEPS),
}
MASKS: dict[str, tuple[Any, Any]] = {
    "all · all": ("all", "all"),
    "head · all": ("head", "all"),
    "body · all": ("body", "all"),
    "all · body": ("all", "body"),
    "head · body": ("head", "body"),
}
ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "unroll": mo.estimators.Unroll,
    "first order": lambda: mo.estimators.Unroll(first_order=True),
    "displacement": mo.estimators.Displacement,
    "implicit, cg": lambda: mo.estimators.Implicit(iterations=40),
    # What is judged is the gradient at the minimum, with the Hessian in full: iterations of the solver are in no comparison.
    "implicit, neumann": lambda: mo.estimators.Implicit(solver="neumann", iterations=40),
    "truncated": lambda: mo.estimators.Truncated(1),
    "last_steps": lambda: mo.estimators.LastSteps(1),
    "sama": mo.estimators.SAMA,
    "finite_differences": mo.estimators.FiniteDifferences,
    "joint": mo.estimators.Joint,
    "truncated_es": lambda: mo.estimators.truncated_es(1, 0.01),
    "pes": lambda: mo.estimators.pes(1, 0.01),
    "nres": lambda: mo.estimators.nres(1, 0.01),
}
OBJECTIVES: dict[str, Any] = {
    "its own": None,
    "trajectory_mean": mo.objectives.trajectory_mean,
    "multi_step": mo.objectives.multi_step([0.25, 0.75]),
    "annealed": mo.objectives.AnnealedMultiStep(10),
}


CHOOSES = ("unroll", "first order")  # estimators that leave the objective open
COLUMNS = [(e, o) for e in ESTIMATORS for o in OBJECTIVES if o == "its own" or e in CHOOSES]


def tasks() -> Task:
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 6, 2, generator=draw), torch.randn(2, 6, 2, generator=draw)
    return Task((x[:, :3], y[:, :3]), (x[:, 3:], y[:, 3:]))


def seen(rule: str, estimator: str, masks: str, objective: str) -> str:
    """What comes of a combination: ✓ where the gradient is what its estimator claims, or the sentence that refuses it."""
    adapts, learns = MASKS[masks]
    try:
        method = compose(
            net(), mo.losses.mse, rule=RULES[rule](), steps=STEPS, adapts=adapts, learns=learns,
            prox=2.0 if estimator.startswith("implicit") else 0.0, objective=OBJECTIVES[objective],
            estimator=ESTIMATORS[estimator](),
        )  # fmt: skip
    except ValueError as error:
        return str(error)
    verdict = judge(prepare(method, method.phi, tasks(), 2), ("loop", "graph", "eager"))
    assert verdict.error <= verdict.limit, f"{rule} × {estimator} × {masks} × {objective}: off by {verdict.error:.2g}"
    return "✓"


def table(rule: str, found: dict[tuple[str, str, str], str], told: list[str]) -> str:
    """The lines of a rule: its masks, and for each estimator (with the objectives that it takes) ✓ or a sentence's number."""

    def cell(text: str) -> str:
        if text == "✓":
            return text
        text = re.sub(r" \([^)]*\)|^objective=.*?: ", "", text)
        if text not in told:
            told.append(text)
        return str(told.index(text) + 1)

    rows = (f"| {rule} | {masks} | {' | '.join(cell(found[e, masks, o]) for e, o in COLUMNS)} |" for masks in MASKS)
    return "\n".join(rows)


@pytest.mark.slow
@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("rule", RULES)
def test_every_combination_is_right_or_refused_with_a_sentence_and_the_docs_say_which(rule: str) -> None:
    found = {names: seen(rule, *names) for names in itertools.product(ESTIMATORS, MASKS, OBJECTIVES)}
    for (estimator, _, objective), text in found.items():
        assert text == "✓" or ("\n" not in text and text.endswith("."))
        assert text != "✓" or objective == "its own" or estimator in CHOOSES
    page = PAGE.read_text(encoding="utf-8")
    told = re.findall(r"^\d+\. (.*)$", page.partition("<!-- sentences -->")[2], re.MULTILINE)
    text = table(rule, found, known := list(told))
    assert known == told, f"{PAGE.name} lacks sentences: {known[len(told) :]}"
    assert text in page, f"{PAGE.name} should say:\n{text}"


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
    learner, wanted = method.learner, expected.learner
    assert isinstance(learner, GradientLearner) and isinstance(wanted, GradientLearner) and learner.rule == wanted.rule
    assert method.estimator == expected.estimator and method.adapting == expected.adapting and learner.steps == 3


@pytest.mark.parametrize(
    ("rule", "more", "words"),
    [
        ('"sdg"', "", r"unknown rule `sdg` in \[algorithm\]; did you mean `sgd`\?"),
        ('"sgd"', "", r'missing key `lr` in \[algorithm\.rule\]; expected a number: write rule = {name = "sgd", lr = …}\.$'),
        ('{name = "sgd", lr = 0.1}', 'objective = "multi_step"', r'objective = {name = "multi_step", weights = …}\.$'),
        ('{name = "sgd", lr = "big"}', "", r'`lr` in \[algorithm\.rule\]: found the text "big", expected a number\.'),
        ("{lr = 0.1}", "", r"`rule` in \[algorithm\]: found .*, expected a name in it: sgd"),
        ('{name = "sgd", lr = 0.1}', 'estimator = "exact"', r"unknown estimator `exact` in \[algorithm\]"),
        ('{name = "sgd", lr = 0.1}', "stepz = 3", r"unknown key `stepz` in \[algorithm\]; did you mean `steps`\?"),
    ],
)
def test_a_part_that_is_none_is_one_sentence(rule: str, more: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parsed(rule, more)


def test_objectives_go_by_the_names_that_recipes_have() -> None:
    def composed(objective: Any) -> Any:
        return mo.compose(net(), mo.losses.mse, rule=mo.rules.SGD(0.1), steps=2, objective=objective).estimator

    for name, objective in (("last", mo.objectives.last), ("trajectory_mean", mo.objectives.trajectory_mean)):
        assert composed(name) == composed(objective)
    wrong: dict[Any, str] = {
        "first": r"objective='first' is unknown: choose one of last, trajectory_mean",
        "multi_step": r"wants weights: give mo\.objectives\.multi_step\(weights\)",
        "annealed_multi_step": r"give mo\.objectives\.AnnealedMultiStep\(multi_step_until\)",
        "ramp": r"give mo\.objectives\.Ramp\(power\)",
        (lambda steps, outer_step: 1.0): r"not iterable\): it must be a function of .* that returns 3 numbers",
        (lambda steps, outer_step: None): "not iterable",
        (lambda steps: [0.0] * steps + [1.0]): "takes 1 positional argument but 2 were given",
        (lambda steps, outer_step: ["1"] * 3): "it gave '1' among its weights",
        3: "'int' object is not callable",
    }
    for objective, words in wrong.items():
        with pytest.raises(ValueError, match=words):
            composed(objective)


def test_an_objective_beside_an_estimators_own_is_refused() -> None:
    with pytest.raises(ValueError, match=r"objective=trajectory_mean: Truncated says itself which states it judges"):
        compose(
            net(), mo.losses.mse, rule=mo.rules.SGD(0.1), steps=2, objective=mo.objectives.trajectory_mean,
            estimator=mo.estimators.Truncated(1),
        )  # fmt: skip


def test_every_part_has_options_that_a_recipe_can_write() -> None:
    for kind, known in PARTS.items():
        for name, build in known.items():
            assert callable(build) and options(build) is not None, (kind, name)


def test_the_ledger_knows_the_code_of_a_composed_recipe() -> None:
    version = source.version(parsed('{name = "curvature", lr = 0.1}'))
    assert version == source.version(parsed('{name = "sgd", lr = 0.1}')) != source.version(recipes.load("sinusoid-maml"))
