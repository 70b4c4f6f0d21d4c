"""How good a learned optimizer is: on problems that nobody has seen, against tuned rules, from the same starts.

In the spirit of AlgoPerf (Dahl et al. 2023, https://arxiv.org/abs/2306.07179): the problems are frozen, every rule has the
same starts and minibatches, the rules by hand are tuned within a budget that is stated, and time counts beside steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.brief import brief
from metaoptim.core.checks import check_counts, check_flags
from metaoptim.core.gradients import held
from metaoptim.core.inner_loop import inner_loop
from metaoptim.core.types import MetaParams, Params, Rule, Task
from metaoptim.lopt.baselines import BASELINES, Baseline, Tuned, curves, tune
from metaoptim.lopt.families import held_out
from metaoptim.lopt.judgement import Judgement, Row
from metaoptim.lopt.learner import Optimizee
from metaoptim.lopt.mixture import Family
from metaoptim.runs import Run
from metaoptim.runs.progress import tracked
from metaoptim.tasks.base import check_seed

TIMED = 10  # steps, of which a few runs are timed


def evaluate(
    learned: Run | Rule,
    psi: Params | None = None,
    families: Mapping[str, Family] | Sequence[Family] | None = None,
    *,
    baselines: Mapping[str, Baseline] | None = None,
    problems: int = 10,
    seeds: int = 3,
    steps: int | None = None,
    step_sizes: int = 14,
    tuned: bool = False,
    seed: int = 1,
    progress: bool = True,
) -> Judgement:
    """Trains fresh problems by a learned rule and by tuned baselines, and says how much better or worse it is.

    Baselines are tuned family by family on problems of split "val", by the mean loss over the last tenth of a run; all are
    judged on those of split "test", with the same starts and minibatches. Losses are in units of knowing nothing, at most 3.

    Args:
        learned: a run of `meta_train`, or a rule.
        psi: ψ of that rule; of a run, its own.
        families: what is trained, by name; `held_out()` where it is not given.
        baselines: what it is compared with, by name; `BASELINES` where it is not given.
        problems: T, fresh problems for each seed, side by side; and as many to tune on.
        seeds: how many times so many.
        steps: K, the steps of a run, as of a run beyond the horizon of meta-training; the family's own where not given.
        step_sizes: values tried for each baseline (with each of its warm-ups).
        tuned: whether the learned rule's `lr` is tuned too, between 1e-4 and 1, as `Celo2` wants it.
        seed: the first seed of the problems.
        progress: whether to show a progress bar.

    Raises:
        ValueError: settings that can't be used.
    """
    check_counts(problems=problems, seeds=seeds, steps=steps)
    check_flags(tuned=tuned, progress=progress)
    check_seed(seed)
    rule, psi, trained = _learned(learned, psi)
    known = dict(BASELINES if baselines is None else baselines)
    if not known:
        raise ValueError("baselines is empty; give one at least, for losses are told relative to the best one.")
    own: Any = rule  # whose fields a Rule doesn't promise
    if tuned and "lr" not in getattr(own, "__dataclass_fields__", {}):
        raise ValueError(f"tuned=True: {brief(rule)} has no step size `lr` of its own; leave it out.")
    chosen = held_out() if families is None else families
    judged = dict(chosen) if isinstance(chosen, Mapping) else {f.name: f for f in chosen}
    name = f"learned {type(rule).__name__}"
    subjects = ({name: Baseline(lambda lr, warmup: replace(own, lr=lr), 1e-4, 1.0)} if tuned else {}) | known
    rows: list[Row] = []
    names = list(judged)
    for i in tracked(range(len(names)), "judging", progress):
        family = judged[names[i]] if steps is None else judged[names[i]].with_(steps=steps)
        val = family.sample("val", seed=seed, start=0, count=problems)
        found = {n: tune(b, family, val, psi if n == name else None, step_sizes) for n, b in subjects.items()}
        found = {name: found.get(name) or Tuned(rule, math.nan, 0, math.nan, False), **found}
        rows += _rows(names[i], family, found, {name: psi}, [seed + s for s in range(seeds)], problems)
    facts = {
        "split": "test", "tuned_on": "val", "problems": problems, "seeds": [seed + s for s in range(seeds)],
        "step_sizes": step_sizes, "trained_steps": trained, "families": {n: f.describe("test") for n, f in judged.items()},
        "torch": torch.__version__,
    }  # fmt: skip
    return Judgement(tuple(rows), name, facts)


def _learned(learned: Run | Rule, psi: Params | None) -> tuple[Rule, Params, int | None]:
    """A rule, its ψ, and the steps of the runs that it was meta-trained on."""
    if not isinstance(learned, Run):
        if psi is None:
            raise ValueError("psi is missing: give ψ of the rule, as of run.phi.rule, or the run itself.")
        return learned, psi, None
    learner: Any = learned.method.learner
    if not isinstance(learner, Optimizee):
        raise ValueError(f"lopt.evaluate takes a run of lopt.meta_train, or a rule; found a run of {learned.method.name}.")
    return learner.rule, learned.phi.rule if psi is None else psi, learner.steps


def _rows(
    name: str, family: Family, found: Mapping[str, Tuned], psi: Mapping[str, Params], seeds: Sequence[int], count: int
) -> list[Row]:
    """The learned rule's row first, each with the runs of all seeds."""
    losses: dict[str, list[Tensor]] = {n: [] for n in found}
    lost: dict[str, list[Tensor]] = {n: [] for n in found}
    timed: dict[str, float] = {}
    for seed in seeds:
        tasks = family.sample("test", seed=seed, start=0, count=count)
        for n, one in found.items():
            own, diverged = curves(family, one.rule, psi.get(n, {}), tasks)
            losses[n].append(own)
            lost[n].append(diverged[:, -1])
            if n not in timed:
                timed[n] = seconds(family, one.rule, psi.get(n, {}), trees.index(tasks, 0))
    return [
        Row(
            name,
            n,
            brief(one.rule),
            one.lr,
            one.warmup,
            one.edge,
            torch.cat(losses[n]),
            torch.cat(lost[n]).mean().item(),
            timed[n],
        )
        for n, one in found.items()
    ]


def seconds(family: Family, rule: Rule, psi: Params, task: Task) -> float:
    """What a training step of one problem takes here, the least of three short runs, judging left out."""
    learner, phi, count = Optimizee(family, rule), MetaParams({}, psi), min(TIMED, family.steps)
    taken = []
    with torch.no_grad():
        for _ in range(3):
            states = inner_loop(learner, phi, task.support, held, count)
            next(states)
            started = time.perf_counter()
            *_, (_, state) = states
            trees.flatten(state)[0].sum().item()  # waits for the device
            taken.append((time.perf_counter() - started) / count)
    return min(taken)
