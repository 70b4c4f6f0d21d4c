"""Does it adapt, or does it know by heart? The score before and after the inner steps, and after steps on a support whose
targets are shuffled over its rows.

A method that adapts falls to chance with shuffled targets; one that has memorised its tasks loses nothing (Yin et al. 2020,
https://arxiv.org/abs/1912.03820), and knows them by heart where it does better than φ before training did. Thresholds: a
difference counts where it is larger than half its paired 95 % interval; that shuffling costs nothing is said where the upper
end of its interval is below half of what is gained, or known by heart.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from metaoptim.core import trees
from metaoptim.core.types import Task
from metaoptim.diagnosis.subject import Numbers, Subject, better, interval, shown
from metaoptim.evaluation.baselines import untrained
from metaoptim.tasks.base import uniforms


def shuffled(batch: Task, split: str, seed: int, start: int) -> Task:
    """The episodes with the targets of each support in a random order, which the episode's number decides."""
    inputs, targets = batch.support
    count, rows = trees.flatten(targets)[0].shape[:2]
    order = torch.from_numpy(uniforms(seed, f"shuffled/{split}", start, count, rows).argsort(1)).to(trees.device(targets))
    episode = torch.arange(count, device=order.device)[:, None]
    return batch._replace(support=(inputs, trees.map_tensors(lambda y: y[episode, order], targets)))


def same(batch: Task, split: str, seed: int, start: int) -> Task:
    """The episodes as they are."""
    return batch


def measure(subject: Subject) -> Numbers:
    """The score before and after the steps, after steps on shuffled targets, and of φ before training, with paired
    differences."""
    metric, steps = subject.result.metric, subject.learner.steps
    scores = subject.result.rows[0].scores[metric]
    after, before = scores[:, steps], scores[:, 0] if subject.adapts else None
    alone = trees.flatten(subject.batch.support[1])[0].shape[1] == 1  # a row, which no order changes
    apart = None if alone else subject.judged(shuffled, len(scores)).rows[0].scores[metric][:, -1]
    start = None if before is None else replace(subject, run=untrained(subject.run)).judged(same, len(scores), 0)
    at_start = None if start is None else start.rows[0].scores[metric][:, 0]

    def score(x: Any) -> Any:
        return None if x is None else dict(zip(("mean", "interval"), interval(x), strict=True))

    return {
        "metric": metric,
        "episodes": len(scores),
        "untrained": score(at_start),
        "before": score(before),
        "after": score(after),
        "shuffled": score(apart),
        "known": score(None if at_start is None else better(metric) * (scores[:, 0].double() - at_start.double())),
        "gain": score(None if before is None else better(metric) * (after.double() - before.double())),
        "cost_of_shuffling": score(None if apart is None else better(metric) * (after.double() - apart.double())),
    }


def read(numbers: Numbers) -> str:
    """The sentence that follows."""
    metric, gain, cost = numbers["metric"], numbers["gain"], numbers["cost_of_shuffling"]
    before, after, apart = (x and shown(metric, x["mean"]) for x in map(numbers.get, ("before", "after", "shuffled")))
    if cost is None:
        return _unshuffled(metric, gain, before, after)
    seen = f"{numbers['episodes']} episodes"
    counts = cost["mean"] > cost["interval"]
    if gain is None:
        does = "It reads the support" if counts else f"Shuffled targets cost it nothing that {seen} can tell"
        return f"{does}: its {metric} is {after}, and {apart} with shuffled targets."
    way = f"its {metric} goes from {before} to {after}, and to {apart} with shuffled targets"
    if gain["mean"] < -gain["interval"]:
        return f"Its steps do harm: {way}."
    if gain["mean"] > gain["interval"]:
        if counts:
            return f"It adapts: {way}."
        does = "but not" if _nothing(cost, gain) else f"and {seen} can't tell whether"
        return f"It moves, {does} by what the targets say: {way}."
    known = numbers["known"]
    if known["mean"] > known["interval"] and _nothing(cost, known):
        return f"It does not adapt, it knows by heart: {way}."
    return f"Its steps change too little for {seen} to tell: {way}."


def _nothing(cost: Numbers, beside: Numbers) -> bool:
    """Whether a cost is nothing beside another difference."""
    return bool(cost["mean"] + cost["interval"] < beside["mean"] / 2)


def _unshuffled(metric: str, gain: Any, before: Any, after: Any) -> str:
    """The sentence where supports have one row, so that their targets can't be shuffled."""
    reason = "with one row to a support there is nothing to shuffle, so whether it reads the targets is not measured"
    if gain is None:
        return f"Its {metric} is {after}; {reason}."
    does = "It moves" if gain["mean"] > gain["interval"] else "Its steps do harm" if gain["mean"] < -gain["interval"] else ""
    return f"{does or 'Its steps change too little to tell'}: its {metric} goes from {before} to {after}; {reason}."
