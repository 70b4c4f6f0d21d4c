"""The statistics of a comparison: intervals, tests and ranks of methods that were judged on the same episodes.

Two things are uncertain, and they are kept apart. Other EPISODES would have given other scores of the same trained φ; other
SEEDS would have given another φ. What is called `over episodes` holds for these trainings alone, and `over seeds` for these
episodes alone. All random numbers come from one fixed seed, so that the same scores give the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
"""(R, E): the score of each of R runs, which differ in their seed, on each of E episodes."""

RESAMPLES = 9999
SEED = 0
CONFIDENCE = 0.95
AT_ONCE = 500  # resamples that are in memory at a time
QUARTER = 0.25


class Interval(NamedTuple):
    """The ends of a 95 % interval."""

    low: float
    high: float


class Pair(NamedTuple):
    """Two methods: the mean of the first's scores minus the second's, its intervals (None where there is a single episode, or
    one of them has a single seed), and the p-value of no difference, as it is and corrected for all pairs."""

    first: str
    second: str
    difference: float
    over_episodes: Interval | None
    over_seeds: Interval | None
    p: float
    corrected: float

    def turned(self) -> Pair:
        """The same, told from the side of the second."""
        return Pair(
            self.second, self.first, -self.difference, _negative(self.over_episodes), _negative(self.over_seeds), self.p,
            self.corrected,
        )  # fmt: skip


def needed() -> Any:
    """scipy.stats; ValueError where it is not installed."""
    try:
        import scipy.stats
    except ImportError:
        raise ValueError("comparing needs scipy, which is not installed: pip install 'metaoptim[design]'") from None
    return scipy.stats


def mean_interval(values: Scores) -> Interval | None:
    """Of the mean of N values, (N): percentile bootstrap (Efron 1979, https://doi.org/10.1214/aos/1176344552); None for N < 2.

    For N of a hundred or more it covers the mean as often as it says; for a handful of seeds it is too short.
    """
    return None if len(values) < 2 else _bootstrap((values,), lambda x, axis: x.mean(axis))


def over_episodes(scores: Scores) -> Interval | None:
    """Of a method's mean, had other episodes been drawn and were the runs the same; None for a single one."""
    return mean_interval(scores.mean(0))


def over_seeds(scores: Scores) -> Interval | None:
    """Of a method's mean, had other seeds been trained and were the episodes the same; None for a single one."""
    return mean_interval(scores.mean(1))


def difference_over_episodes(first: Scores, second: Scores) -> Interval | None:
    """Of the mean difference, episode by episode: what makes an episode hard for both cancels."""
    return mean_interval(first.mean(0) - second.mean(0))


def difference_over_seeds(first: Scores, second: Scores, paired: bool) -> Interval | None:
    """Of the mean difference, seeds resampled; None where one of them has a single seed.

    paired: whether the runs are of the same seeds in the same order, which began alike: then they are resampled together.
    """
    if min(len(first), len(second)) < 2:
        return None
    means = first.mean(1), second.mean(1)
    return _bootstrap(means, lambda x, y, axis: x.mean(axis) - y.mean(axis), paired=paired)


def sign_flip(differences: Scores) -> float:
    """The two-sided p-value of a mean difference of 0, (E): episodes' signs flipped at random (Fisher 1935; Good 2005).

    If neither method were better, each difference could as well have had the other sign. Wilcoxon's signed-rank test would
    need differences of different sizes, and accuracies of a few queries are full of ties and zeros; and this one tests the mean
    that is reported. The least p-value that so many resamples can tell is 2 / (RESAMPLES + 1).
    """
    found = needed().permutation_test(
        (differences,), lambda x, axis: x.mean(axis), permutation_type="samples", vectorized=True, n_resamples=RESAMPLES,
        batch=AT_ONCE, rng=np.random.default_rng(SEED),
    )  # fmt: skip
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number: the chance of one false claim or more among all stays as stated.

    With p_(1) ≤ … ≤ p_(m), the corrected i-th is max over j ≤ i of min(1, (m − j + 1) p_(j)). Holm 1979,
    https://www.jstor.org/stable/4615733.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1.0)
    return [float(x) for x in corrected]


def mean_ranks(scores: Mapping[str, Scores], more_is_better: bool) -> dict[str, float]:
    """Each method's mean rank over episodes, 1 the best; equal scores share the mean of their ranks."""
    by_episode = np.stack([x.mean(0) for x in scores.values()])
    ranks = needed().rankdata(-by_episode if more_is_better else by_episode, axis=0)
    return {name: float(x) for name, x in zip(scores, ranks.mean(1), strict=True)}


def iqm(scores: Scores) -> float:
    """The interquartile mean over all runs and episodes: without the lowest and the highest quarter.

    Agarwal, Schwarzer, Castro, Courville and Bellemare 2021, https://arxiv.org/abs/2108.13264.
    """
    return float(needed().trim_mean(scores, QUARTER, axis=None))


def iqm_over_seeds(scores: Scores) -> Interval | None:
    """Its interval by a bootstrap stratified by method: seeds are resampled within each; None for a single one.

    Agarwal et al. resample the runs of each task by itself, because there every task is a training of its own. Here one
    training is judged on all episodes, so that a seed is resampled with all its scores.
    """
    if len(scores) < 2:
        return None
    drawn = np.random.default_rng(SEED).integers(len(scores), size=(RESAMPLES, len(scores)))
    # The order of seeds doesn't matter, so that few of the resamples are different ones.
    kinds, which = np.unique(np.sort(drawn, 1), axis=0, return_inverse=True)
    found = np.array([iqm(scores[kind]) for kind in kinds])[which.reshape(-1)]
    return Interval(*(float(x) for x in np.quantile(found, _ends())))


def pairs(scores: Mapping[str, Scores], seeds: Mapping[str, Sequence[int]]) -> list[Pair]:
    """All pairs of methods, the first of each as they are given, with p-values corrected for the number of pairs."""
    names = list(combinations(scores, 2))
    p = [sign_flip(scores[a].mean(0) - scores[b].mean(0)) for a, b in names]
    return [
        Pair(
            a, b, float(scores[a].mean() - scores[b].mean()), difference_over_episodes(scores[a], scores[b]),
            difference_over_seeds(scores[a], scores[b], list(seeds[a]) == list(seeds[b])), plain, corrected,
        )
        for (a, b), plain, corrected in zip(names, p, holm(p), strict=True)
    ]  # fmt: skip


def _bootstrap(samples: Sequence[Scores], statistic: Any, paired: bool = False) -> Interval:
    """The percentile interval."""
    found = needed().bootstrap(
        samples, statistic, n_resamples=RESAMPLES, batch=AT_ONCE, paired=paired, vectorized=True, confidence_level=CONFIDENCE,
        method="percentile", rng=np.random.default_rng(SEED),
    ).confidence_interval  # fmt: skip
    return Interval(float(found.low), float(found.high))


def _negative(interval: Interval | None) -> Interval | None:
    return None if interval is None else Interval(-interval.high, -interval.low)


def _ends() -> tuple[float, float]:
    return (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
