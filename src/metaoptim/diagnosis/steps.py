"""The score after every inner step, and beyond those of training.

Threshold: what the last step, or the best one beyond K, changes against step K counts where it is larger than half its paired
95 % interval over episodes.
"""

from __future__ import annotations

import math

from metaoptim.core.brief import plural
from metaoptim.diagnosis.subject import Numbers, Subject, better, interval, shown


def measure(subject: Subject) -> Numbers:
    """The scores after each step, and what the steps beyond K change, paired by episode."""
    row, metric, steps = subject.result.rows[0], subject.result.metric, subject.learner.steps
    scores = row.scores[metric].double()
    gains = better(metric) * (scores - scores[:, steps : steps + 1])
    beyond = range(steps + 1, scores.shape[1])
    changes = [{"step": k, **dict(zip(("gain", "interval"), interval(gains[:, k]), strict=True))} for k in beyond]
    return {
        "metric": metric,
        "episodes": len(scores),
        "training_steps": steps,
        "adapts": subject.adapts,
        "mean": {m: row.mean(m) for m in row.scores},
        "interval": {m: row.interval(m) for m in row.scores},
        "last": changes[-1] if changes else None,
        "best_beyond": max(changes, key=lambda change: change["gain"], default=None),
    }


def read(numbers: Numbers) -> str:
    """The sentence that follows."""
    metric, steps, last, best = (numbers[name] for name in ("metric", "training_steps", "last", "best_beyond"))
    mean, half = numbers["mean"][metric], numbers["interval"][metric]
    here = f"{shown(metric, mean[steps])} ± {shown(metric, half[steps])}"
    if not numbers["adapts"]:
        return f"The {metric} is {here}; no inner step moves anything."
    here = f"The {metric} is {here} after the {plural(steps, 'step')} of training"
    if not all(map(math.isfinite, mean)):
        return f"{here}; it is no longer finite from step {next(k for k, x in enumerate(mean) if not math.isfinite(x))} on."
    if last is None:
        return f"{here}; it was not followed any further."
    if last["gain"] < -last["interval"]:
        return f"{here}; going on makes it worse, {shown(metric, mean[-1])} after {last['step']}."
    if best["gain"] > best["interval"]:
        return f"{here}; going on helps, {shown(metric, mean[best['step']])} after {best['step']}."
    return f"{here}; going on to {last['step']} changes nothing that {numbers['episodes']} episodes can tell."
