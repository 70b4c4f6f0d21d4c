"""Asks a run every question, on episodes of one split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from metaoptim.core.checks import check_counts
from metaoptim.core.random import forked
from metaoptim.core.types import Normalisation
from metaoptim.diagnosis import alignment, curvature, features, gain, permutations, step_sizes, steps
from metaoptim.diagnosis.result import Diagnosis, Reading
from metaoptim.diagnosis.subject import Numbers, Subject
from metaoptim.engine.faults import explained
from metaoptim.evaluation import evaluate
from metaoptim.evaluation.evaluate import on_device, with_normalisation
from metaoptim.runs.adapted import quiet
from metaoptim.runs.run import Run
from metaoptim.tasks import TaskFamily

FURTHER = 10  # inner steps at the least


class Part(NamedTuple):
    """A question: how it is measured, and how a sentence follows from the numbers."""

    measure: Callable[[Subject], Numbers]
    read: Callable[[Numbers], str]


PARTS: dict[str, Part] = {
    "steps": Part(steps.measure, steps.read),
    "gain": Part(gain.measure, gain.read),
    "permutations": Part(permutations.measure, permutations.read),
    "features": Part(features.measure, features.read),
    "step_sizes": Part(step_sizes.measure, step_sizes.read),
    "alignment": Part(alignment.measure, alignment.read),
    "curvature": Part(curvature.measure, curvature.read),
}


def diagnose(
    run: Run,
    tasks: TaskFamily,
    *,
    split: str | None = None,
    episodes: int = 50,
    closely: int = 10,
    steps: int | None = None,
    normalisation: Normalisation | None = None,
    seed: int = 0,
    device: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Diagnosis:
    """What a run does when it adapts: numbers, and a sentence on each; what does not apply to it is left out with a word.

    The run stays as it is, and so do torch's generators.

    Args:
        run: what is looked at.
        tasks: the task family that episodes come from.
        split: the family's split; none: its validation split, else its test split, else its last one.
        episodes: how many are scored, at least 2.
        closely: how many of them single states, gradients and features are read from, at least 2.
        steps: inner steps to go to, at least those of training; none: twice as many as in training, and 10 at the least.
        normalisation: policy at test; as in training if not given.
        seed: seed of the episodes.
        device: where it is computed, such as "cuda"; where the run's φ is if not given.
        say: is called with a few words on what is being done.

    Raises:
        ValueError: no run, an unknown split, too few episodes, fewer steps than in training.
    """
    given: Any = run
    if not isinstance(given, Run):
        raise ValueError(f"diagnose takes one run; found {type(given).__name__}: mo.Run(method, phi) makes one of any φ.")
    check_counts(2, episodes=episodes, closely=closely)
    own = run.method.learner.steps
    check_counts(own, steps=steps)
    run = run if device is None else on_device(run, device)
    run = run if normalisation is None else with_normalisation(run, normalisation)
    where = split or next((name for name in ("val", "test") if name in tasks.splits), tasks.splits[-1])
    far = own if not run.method.adapting else max(FURTHER, 2 * own) if steps is None else steps
    say("scores")
    result = evaluate(run, tasks, split=where, episodes=episodes, steps=far, baselines=(), seed=seed, progress=False)
    subject = Subject(run, tasks, where, seed, min(closely, episodes), result)
    readings: list[Reading] = []
    left_out: dict[str, str] = {}
    with torch.no_grad(), quiet(run.network.net), forked(run.phi.device, seed):
        for name, part in PARTS.items():
            say(name.replace("_", " "))
            try:
                with explained(subject.batch, run.method):
                    numbers = part.measure(subject)
                readings.append(Reading(name, part.read(numbers), numbers))
            except ValueError as reason:  # such as a layer that torch can't differentiate twice
                left_out[name] = str(reason)
    return Diagnosis(tuple(readings), left_out, {**result.facts, "closely": subject.closely})
