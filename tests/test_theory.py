"""The page on theory: its closed forms are where the library's meta-gradients vanish, and its references are the exact ones."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import metaoptim as mo

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def theory() -> Iterator[Any]:
    """The script, which imports its neighbour by its bare name."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield __import__("theory")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        for name in ("theory", "shared"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["joint", "maml", "fomaml", "reptile"])
@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("lr", [0.1, 0.4])
def test_a_start_in_closed_form_is_where_the_meta_gradient_vanishes(theory: Any, name: str, steps: int, lr: float) -> None:
    method = theory.method(name, lr, steps)
    engine = mo.Engine(method, **theory.PLAIN)

    def slope(w: float) -> float:
        phi = method.phi._replace(weights={"w": torch.tensor([w], dtype=torch.float64)})
        return float(engine(phi, theory.two_tasks()).grad.weights["w"])

    closed = theory.start(name, lr, steps)
    assert 0 < closed < 1
    assert abs(slope(closed)) < 1e-12 < 1e-4 < slope(closed + 0.1)


def test_training_ends_at_the_closed_form_and_where_first_order_runs_away_there_is_none(theory: Any) -> None:
    assert theory.trained("maml", 0.25, 1, outer=60) == pytest.approx(theory.start("maml", 0.25, 1), abs=1e-6)
    assert math.isnan(theory.start("fomaml", 0.7, 1)) and 0 < theory.start("maml", 0.7, 1) < 1
    losses = [theory.adapted_loss(theory.start("maml", 0.3, 1) + shift, 0.3, 1) for shift in (-1e-3, 0, 1e-3)]
    assert losses[1] < min(losses[0], losses[2])


def test_the_toy_problem_is_the_quadratic_that_it_says(theory: Any) -> None:
    """K steps on ½ (w − c)ᵀ A (w − c) + ½ λ |w − θ|², written out, give the exact meta-gradient by autograd."""
    (a, c), (aq, cq) = ((m, torch.tensor(p, dtype=torch.float64)) for m, p in (theory.SUPPORT, theory.QUERY))
    theta = torch.tensor(theory.START, dtype=torch.float64, requires_grad=True)
    w = theta
    for _ in range(theory.K):
        w = w - theory.LR * (a @ (w - c) + theory.PROX * (w - theta))
    (expected,) = torch.autograd.grad(0.5 * (w - cq) @ aq @ (w - cq), theta)
    method = mo.compose(theory.Vector(), theory.bowl, rule=mo.rules.SGD(theory.LR), steps=theory.K, prox=theory.PROX)
    torch.testing.assert_close(theory.gradients(method, 1)[0], expected, rtol=1e-12, atol=0)


def test_biases_are_told_from_noise(theory: Any) -> None:
    est, mean = mo.estimators, mo.estimators.Unroll(objective=mo.objectives.trajectory_mean)
    assert theory.judged(est.Unroll(), est.Unroll())[:3] == (0, 0, 0)
    assert theory.judged(est.Truncated(window=12), mean).bias == pytest.approx(0, abs=1e-12)
    assert theory.judged(est.Truncated(window=3), mean).bias > 0.1
    for unbiased in (est.pes(3, 0.01), est.nres(3, 0.01)):
        seen = theory.judged(unbiased, mean, runs=2000)
        assert seen.bias < 4 * seen.error and seen.error == pytest.approx(seen.spread / 2000**0.5)
    windows = theory.judged(est.truncated_es(3, 0.01), mean, runs=2000)
    assert windows.bias > 4 * windows.error


def test_a_power_law_is_found_again(theory: Any) -> None:
    x = np.array([5.0, 50, 500])
    assert theory.power_law(x, 30 * x**-0.4) == pytest.approx((-0.4, 30))


def test_every_figure_of_the_page_stands_beside_the_command_that_draws_it(theory: Any) -> None:
    page = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    drawn = re.findall(r"\(images/theory-([\w-]+)\.png\)", page)
    assert drawn == re.findall(r"^python benchmarks/theory\.py ([\w-]+)$", page, re.M) == list(theory.COMMANDS)
    for name in drawn:
        file = ROOT / "docs" / "images" / f"theory-{name}.png"
        assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size < 200_000
