"""The statistics of a comparison, held to other people's code, to enumeration, and to simulated data."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import norm
from statsmodels.stats.multitest import multipletests

from metaoptim.design import statistics
from metaoptim.design.statistics import Interval


def scores(runs: int, episodes: int, seed: int = 0) -> statistics.Scores:
    return np.random.default_rng(seed).normal(size=(runs, episodes))


@pytest.mark.parametrize("p", [[0.01, 0.04, 0.03], [0.5, 0.5, 0.9, 0.001], [0.2], [1.0, 1.0], [0.03, 0.01, 0.02, 0.04, 0.01]])
def test_holm_is_that_of_statsmodels(p: list[float]) -> None:
    assert statistics.holm(p) == pytest.approx(multipletests(p, method="holm")[1], rel=1e-12)


def test_the_sign_flip_test_enumerates_all_signs_of_few_episodes() -> None:
    x = scores(1, 9)[0] + 0.6
    signs = np.array(list(itertools.product((1, -1), repeat=len(x))))
    means = (signs * x).mean(1)
    upper, lower = (means >= x.mean() - 1e-12).mean(), (means <= x.mean() + 1e-12).mean()
    assert statistics.sign_flip(x) == pytest.approx(min(1.0, 2 * min(upper, lower)), rel=1e-9)


def test_the_sign_flip_test_keeps_its_level_and_sees_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 499)
    drawn = np.random.default_rng(1)
    p = np.array([statistics.sign_flip(drawn.integers(-2, 3, size=20) / 5) for _ in range(300)])  # full of ties and zeros
    assert 0.01 <= (p <= 0.05).mean() <= 0.09
    assert statistics.sign_flip(scores(1, 100)[0] + 1) == pytest.approx(2 / (statistics.RESAMPLES + 1))
    assert statistics.sign_flip(np.zeros(50)) == 1.0


def test_equal_scores_share_their_rank() -> None:
    a, b, c = np.array([[0.9, 0.5, 0.1]]), np.array([[0.9, 0.6, 0.2]]), np.array([[0.8, 0.6, 0.3]])
    assert statistics.mean_ranks({"a": a, "b": b, "c": c}, more_is_better=True) == pytest.approx(
        {"a": (1.5 + 3 + 3) / 3, "b": (1.5 + 1.5 + 2) / 3, "c": (3 + 1.5 + 1) / 3}
    )
    least = statistics.mean_ranks({"a": a, "b": b, "c": c}, more_is_better=False)
    assert least == pytest.approx({"a": (2.5 + 1 + 1) / 3, "b": (2.5 + 2.5 + 2) / 3, "c": (1 + 2.5 + 3) / 3})


def test_the_interquartile_mean_leaves_out_a_quarter_at_both_ends() -> None:
    x = scores(3, 8)
    assert statistics.iqm(x) == pytest.approx(np.sort(x.flatten())[6:18].mean())
    assert statistics.iqm_over_seeds(x[:1]) is None
    two = statistics.iqm_over_seeds(x[:2])
    # Of two seeds there are three resamples, with probabilities 1/4, 1/2 and 1/4: the ends are those of one seed twice.
    assert two == pytest.approx(sorted(statistics.iqm(x[[i, i]]) for i in range(2)))


def test_intervals_are_those_of_the_normal_distribution_for_many_episodes() -> None:
    x = scores(2, 2000)
    low, high = statistics.over_episodes(x) or (0.0, 0.0)
    half = norm.ppf(0.975) * x.mean(0).std(ddof=1) / 2000**0.5
    assert (low, high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.1 * half)
    assert statistics.over_episodes(x) == Interval(low, high), "the same scores give the same numbers"
    assert statistics.over_episodes(x[:, :1]) is None and statistics.over_seeds(x[:1]) is None


@pytest.mark.parametrize("kind", ["normal", "exponential"])
def test_the_bootstrap_interval_covers_as_often_as_it_says(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 499)
    drawn = np.random.default_rng(2)
    samples = drawn.normal(1.0, 1.0, (400, 100)) if kind == "normal" else drawn.exponential(1.0, (400, 100))
    hit = [found.low <= 1.0 <= found.high for x in samples if (found := statistics.mean_interval(x))]
    assert 0.91 <= np.mean(hit) <= 0.98


def test_what_makes_an_episode_hard_for_both_cancels() -> None:
    hard = 10 * scores(1, 300)
    a, b = hard + 0.1 * scores(2, 300, 1), hard + 0.1 * scores(2, 300, 2) + 0.05
    pair = statistics.pairs({"a": a, "b": b}, {"a": (0, 1), "b": (0, 1)})[0]
    assert pair.difference == pytest.approx(a.mean() - b.mean()) and pair.difference < 0
    assert (
        pair.over_episodes is not None and pair.over_episodes.high < 0 < 0.1 > pair.over_episodes.high - pair.over_episodes.low
    )
    assert pair.p < 0.01
    back = pair.turned()
    assert (back.first, back.difference) == ("b", -pair.difference)
    assert back.over_episodes == Interval(-pair.over_episodes.high, -pair.over_episodes.low)


def test_seeds_are_resampled_together_where_they_are_the_same() -> None:
    shared = scores(6, 1)
    a, b = shared + np.zeros((6, 5)), shared + np.ones((6, 5))
    together, apart = (statistics.difference_over_seeds(a, b, paired) for paired in (True, False))
    assert together == pytest.approx((-1, -1))
    assert apart is not None and apart.low < -1.2 and apart.high > -0.8
    assert statistics.difference_over_seeds(a[:1], b, False) is None
