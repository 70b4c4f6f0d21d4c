"""Models that predict the score of a strategy on a family from what both are like; all by scikit-learn, none of them tuned.

Families weigh the same, however many strategies were tried on them. Names are turned into columns of 0 and 1, and what a
strategy doesn't have (a step size) is given the mean, as AutoFolio does (Lindauer, Hoos, Hutter and Schaub 2015,
https://doi.org/10.1613/jair.4726).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metaoptim.design.history import CUT, Row, centred

Floats = NDArray[np.float64]
Predict = Callable[[Sequence[Row]], Floats]
"""Rows to predicted scores, (n,); what the rows say of their own scores is not read."""
Fit = Callable[[Sequence[Row]], Predict]

TREES, LEAF, PAIR_LEAF, PAIRS = 100, 3, 10, 3000


def forest(rows: Sequence[Row]) -> Predict:
    """Random forest regression (Breiman 2001): 100 trees, at least 3 strategies in a leaf."""
    from sklearn.ensemble import RandomForestRegressor

    columns = _Columns(rows)
    model = RandomForestRegressor(TREES, min_samples_leaf=LEAF, random_state=0)
    model.fit(columns(rows), _scores(rows), sample_weight=_weights(rows))
    return lambda asked: np.asarray(model.predict(columns(asked)), np.float64)


def pairwise(rows: Sequence[Row]) -> Predict:
    """A forest that says which of two strategies does better on a family, a mistake costing |y_i − y_j|; votes are counted.

    As in AutoFolio, but for this: there it is one forest for each pair of a few solvers, over many instances; here families are
    few and strategies many, so one forest reads what the family is like, what strategy i is, and how j differs from it.
    The score of a strategy is the mean share of votes that it gets against all others asked of with it on the same family,
    standardised as scores are. At most 3000 pairs of a family are looked at, drawn by a fixed seed.
    """
    from sklearn.ensemble import RandomForestClassifier

    columns, known = _Columns(rows), _scores(rows)
    x, groups, generator = columns(rows), _groups(rows), np.random.default_rng(0)
    firsts, seconds, weights = [], [], []
    for members in groups.values():
        i, j = (part.ravel() for part in np.meshgrid(members, members, indexing="ij"))
        told = np.flatnonzero(known[i] != known[j])
        told = np.sort(generator.choice(told, PAIRS, replace=False)) if len(told) > PAIRS else told
        firsts.append(i[told])
        seconds.append(j[told])
        weights.append(np.abs(known[i] - known[j])[told] / max(len(told), 1))
    i, j = np.concatenate(firsts), np.concatenate(seconds)
    model = RandomForestClassifier(TREES, min_samples_leaf=PAIR_LEAF, random_state=0)
    model.fit(_both(x[i], x[j]), known[i] > known[j], sample_weight=np.concatenate(weights))

    def predict(asked: Sequence[Row]) -> Floats:
        x, votes = columns(asked), np.zeros(len(asked))
        for members in _groups(asked).values():
            i, j = (part.ravel() for part in np.meshgrid(members, members, indexing="ij"))
            wins = model.predict_proba(_both(x[i], x[j]))[:, -1] + 1 - model.predict_proba(_both(x[j], x[i]))[:, -1]
            votes[members] = centred(wins.reshape(len(members), -1).mean(1).tolist()) or 0.0
        return votes

    return predict


def gaussian_process(rows: Sequence[Row]) -> Predict:
    """A Gaussian process with a Matérn kernel (ν = 5/2) and noise, on standardised columns (Rasmussen and Williams 2006)."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
    from sklearn.preprocessing import StandardScaler

    columns, scale = _Columns(rows), StandardScaler()
    x = scale.fit_transform(columns(rows))
    kernel = ConstantKernel() * Matern(length_scale=np.sqrt(x.shape[1]), nu=2.5) + WhiteKernel()
    model = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of length scales at their bounds, which is where they belong for pure noise
        model.fit(x, _scores(rows))
    return lambda asked: np.clip(np.asarray(model.predict(scale.transform(columns(asked)))), -CUT, CUT)


MODELS: Mapping[str, Fit] = {"forest": forest, "pairwise forest": pairwise, "Gaussian process": gaussian_process}


class _Columns:
    """Rows as numbers, with the columns that training has seen."""

    def __init__(self, rows: Sequence[Row]) -> None:
        try:
            from sklearn.feature_extraction import DictVectorizer
            from sklearn.impute import SimpleImputer
            from sklearn.pipeline import make_pipeline
        except ImportError as error:
            raise ValueError("recommend needs scikit-learn, which isn't installed: pip install 'metaoptim[design]'.") from error
        self.way: Any = make_pipeline(DictVectorizer(sparse=False), SimpleImputer(keep_empty_features=True))
        self.way.fit(_dicts(rows))

    def __call__(self, rows: Sequence[Row]) -> Floats:
        return np.asarray(self.way.transform(_dicts(rows)), np.float64)


def _dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [{f"tasks.{k}": x for k, x in row.tasks.items()} | dict(row.strategy) for row in rows]


def _both(i: Floats, j: Floats) -> Floats:
    return np.hstack([i, j - i])


def _scores(rows: Sequence[Row]) -> Floats:
    return np.array([row.score for row in rows])


def _weights(rows: Sequence[Row]) -> Floats:
    count = Counter(row.family for row in rows)
    return np.array([1 / count[row.family] for row in rows])


def _groups(rows: Sequence[Row]) -> dict[str, NDArray[np.intp]]:
    families = np.array([row.family for row in rows])
    return {family: np.flatnonzero(families == family) for family in dict.fromkeys(row.family for row in rows)}
