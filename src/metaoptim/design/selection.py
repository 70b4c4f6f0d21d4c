"""Whether a meta-model is worth following: data sets are left out in turn, and it is held to what needs no model.

On a family that was left out, a predictor picks one of the strategies that were tried there. Its cost is minus the score of its
pick; the virtual best (VBS) picks the best one; the single best (SBS) picks the algorithm whose mean score over the other
families is highest; a random pick costs the mean. As in the algorithm selection library (Bischl et al. 2016,
https://doi.org/10.1016/j.artint.2016.04.003), with means over the families,

    gap(m) = (m − VBS) / (SBS − VBS):     0 is as good as can be, 1 no better than one algorithm for all, above 1 worse.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from metaoptim.design.history import CUT, History, Row
from metaoptim.design.predictors import MODELS, Fit, Floats, Predict

FEWEST_SETS = 3
SURE, LEVEL = 0.95, 0.75
CHOSEN, SINGLE, RANDOM = "the chosen model", "single best algorithm", "random choice"
_NAMED = {SINGLE: "one algorithm for all", RANDOM: "a random choice"}


@dataclass(frozen=True)
class Held:
    """What a predictor does on families that it was not told of.

    cost: minus the score of its pick, by family (lower is better). error: the mean distance of prediction and score, families
    weighing the same (None: it predicts no scores). gap: (m − VBS) / (SBS − VBS); None: the single best is the best everywhere.
    """

    cost: Mapping[str, float]
    error: float | None
    gap: float | None

    def document(self) -> dict[str, Any]:
        return {"gap": self.gap, "error": self.error, "cost": dict(self.cost)}


@dataclass(frozen=True)
class Judgement:
    """How predictors do, left out data sets in turn.

    model: the name of the one that does best when every data set is left out once. held: by name, with `CHOSEN`, which chooses
    among the models by leaving out data sets of those that it is told of, so that its numbers are of families that had no part
    in any choice. width: half that of the interval of a prediction. doubt: why the model is not to be followed ("": it is).
    """

    model: str
    held: Mapping[str, Held]
    best: Mapping[str, float]
    width: float
    doubt: str

    @property
    def trusted(self) -> bool:
        return not self.doubt

    def document(self) -> dict[str, Any]:
        """In JSON types."""
        return {
            "model": self.model, "trusted": self.trusted, "doubt": self.doubt, "width": self.width, "level": LEVEL,
            "virtual_best": dict(self.best), "held_out": {name: held.document() for name, held in self.held.items()},
        }  # fmt: skip


def judge(past: History, models: Mapping[str, Fit] = MODELS, say: Callable[[str], None] = lambda text: None) -> Judgement:
    """Leaves out each data set once, and of the rest each once more to choose the model that is told of them.

    say: is told what is fitted. Errors: ValueError for fewer than 3 data sets, which leave nothing to choose by.
    """
    sets = past.data
    if len(sets) < FEWEST_SETS:
        raise ValueError(
            f"there are not enough trials to judge a meta-model by: they are of {len(sets)} data sets, and {FEWEST_SETS} is "
            "the least; pass more of them with --trials."
        )
    fitted: dict[tuple[str, frozenset[str]], Predict] = {}

    def guess(name: str, without: frozenset[str], at: str) -> Floats:
        key = name, without
        if key not in fitted:
            say(f"{name}, without {', '.join(sorted(without))}")
            fitted[key] = models[name]([row for row in past.rows if row.data not in without])
        return fitted[key]([row for row in past.rows if row.data == at])

    def regret(name: str, without: frozenset[str]) -> float:
        """The mean cost of a model's picks, of the families that are not without, each left out in turn."""
        picked: dict[str, float] = {}
        for at in sets:
            if at not in without:
                picked |= picks([r for r in past.rows if r.data == at], guess(name, without | {at}, at))
        return fmean(picked.values())

    costs: dict[str, dict[str, float]] = {name: {} for name in (*models, CHOSEN, SINGLE, RANDOM)}
    misses: dict[str, dict[str, list[float]]] = {name: {} for name in (*models, CHOSEN)}
    best: dict[str, float] = {}
    for at in sets:
        here, rest = [r for r in past.rows if r.data == at], [r for r in past.rows if r.data != at]
        guesses = {name: guess(name, frozenset({at}), at) for name in models}
        choice = min(models, key=lambda name: regret(name, frozenset({at}))) if len(models) > 1 else next(iter(models))
        guesses[CHOSEN] = guesses[choice]
        for name, guessed in guesses.items():
            costs[name] |= picks(here, guessed)
            for row, score in zip(here, guessed, strict=True):
                misses[name].setdefault(row.family, []).append(abs(row.score - float(score)))
        means = standing(rest)
        costs[SINGLE] |= {f: -_of_algorithm(rows, means) for f, rows in by_family(here).items()}
        costs[RANDOM] |= {f: -fmean(r.score for r in rows) for f, rows in by_family(here).items()}
        best |= {f: -max(r.score for r in rows) for f, rows in by_family(here).items()}
    held = {
        name: Held(
            cost, fmean(fmean(m) for m in misses[name].values()) if name in misses else None, gap(cost, costs[SINGLE], best)
        )
        for name, cost in costs.items()
    }
    model = min(models, key=lambda name: fmean(costs[name].values()))
    residuals = {at: [m for f, ms in misses[CHOSEN].items() if _data(past, f) == at for m in ms] for at in sets}
    return Judgement(model, held, best, width(residuals), doubt(costs, past))


def picks(rows: Sequence[Row], guessed: Floats) -> dict[str, float]:
    """Minus the score of the strategy with the highest prediction, by family."""
    told: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row, score in zip(rows, guessed, strict=True):
        told[row.family].append((float(score), -row.score))
    return {family: max(pairs, key=lambda pair: pair[0])[1] for family, pairs in told.items()}


def gap(m: Mapping[str, float], single: Mapping[str, float], best: Mapping[str, float]) -> float | None:
    """(m − VBS) / (SBS − VBS) of mean costs; None where the single best is the best everywhere."""
    room = fmean(single.values()) - fmean(best.values())
    return (fmean(m.values()) - fmean(best.values())) / room if room > 1e-12 else None


def standing(rows: Sequence[Row]) -> dict[str, float]:
    """The mean score of each algorithm over families, highest first; 0, the middle, for a family that it was not tried on."""
    families = by_family(rows)
    found: dict[str, list[float]] = defaultdict(list)
    for members in families.values():
        scores: dict[str, list[float]] = defaultdict(list)
        for row in members:
            scores[str(row.strategy["algorithm"])].append(row.score)
        for name, of in scores.items():
            found[name].append(fmean(of))
    means = {name: sum(of) / len(families) for name, of in found.items()}
    return dict(sorted(means.items(), key=lambda item: (-item[1], item[0])))


def width(residuals: Mapping[str, Sequence[float]], level: float = LEVEL) -> float:
    """Half the width of a conformal interval on a new data set, from what predictions missed on G that were left out.

    The smallest w such that Σ_g (share of the misses of g that are ≤ w) / (G + 1) ≥ level: the new data set is one of G + 1
    that could have changed places, and so counts as a miss that is infinite (Lee, Barber and Willett 2023, arXiv 2306.06342, on
    hierarchical data). Scores lie within ±3, so that 6 says nothing.
    """
    share = [(miss, 1 / len(of) / (len(residuals) + 1)) for of in residuals.values() for miss in of]
    total = 0.0
    for miss, part in sorted(share):
        total += part
        if total >= level - 1e-9:
            return miss
    return 2 * CUT


def doubt(costs: Mapping[str, Mapping[str, float]], past: History) -> str:
    """Why the chosen model is not to be followed: it must cost less than both that need none, beyond chance.

    Beyond chance: by a one-sided paired t-test at 5 % over data sets, the gains of families of one data set being averaged.
    With so few of them this asks for a clear gain everywhere; a mean alone would pass noise every other time.
    """
    gains: dict[str, list[float]] = {}
    for other in (SINGLE, RANDOM):
        each: dict[str, list[float]] = defaultdict(list)
        for family, cost in costs[CHOSEN].items():
            each[_data(past, family)].append(costs[other][family] - cost)
        gains[other] = [fmean(of) for of in each.values()]
    least = min(gains, key=lambda other: fmean(gains[other]))  # the better one of the two is named first
    for other in (least, *gains):
        if not _above_zero(gains[other]):
            told = "no better than" if fmean(gains[other]) <= 0 else "better by no more than chance than"
            return f"on data sets that were left out, the meta-model's pick is {told} {_NAMED[other]}"
    return ""


def _above_zero(gains: Sequence[float]) -> bool:
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ValueError("recommend needs scipy, which isn't installed: pip install 'metaoptim[design]'.") from error
    spread = stdev(gains) / math.sqrt(len(gains))
    return fmean(gains) > float(t.ppf(SURE, len(gains) - 1)) * spread


def _of_algorithm(rows: Sequence[Row], means: Mapping[str, float]) -> float:
    """The mean score, here, of the algorithm that stands highest elsewhere; of all, where none was tried elsewhere."""
    here = {str(row.strategy["algorithm"]) for row in rows}
    name = next((name for name in means if name in here), None)
    return fmean(row.score for row in rows if name is None or row.strategy["algorithm"] == name)


def by_family(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows, sorted by family."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.family].append(row)
    return dict(found)


def _data(past: History, family: str) -> str:
    return next(row.data for row in past.rows if row.family == family)
