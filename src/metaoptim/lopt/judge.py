"""How good a learned optimizer is: on problems that nobody has seen, against tuned rules, from the same starts.

In the spirit of AlgoPerf (Dahl et al. 2023, https://arxiv.org/abs/2306.07179): the problems are frozen, every rule has the
same starts and minibatches, the rules by hand are tuned within a budget that is stated, and time counts beside steps.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.brief import brief
from metaoptim.core.callers import warn
from metaoptim.core.checks import check_counts, check_flags
from metaoptim.core.gradients import held
from metaoptim.core.inner_loop import inner_loop
from metaoptim.core.types import MetaParams, Params, Rule, Task
from metaoptim.engine.inspect import check_updates
from metaoptim.evaluation.evaluate import check_seeds, on_device, which
from metaoptim.learners import device_called
from metaoptim.lopt.baselines import BASELINES, Baseline, Tuned, tune
from metaoptim.lopt.checks import check_psi
from metaoptim.lopt.families import held_out
from metaoptim.lopt.judgement import Judgement, Row
from metaoptim.lopt.learner import Optimizee, called
from metaoptim.lopt.mixture import Family, check_family, members
from metaoptim.lopt.trained import curves, final
from metaoptim.runs import Run
from metaoptim.runs.progress import tracked
from metaoptim.tasks.base import check_seed, digest_episodes

TIMED = 10  # steps, of which a few runs are timed


def evaluate(
    learned: Run | Sequence[Run] | Rule,
    psi: Params | None = None,
    *,
    families: Literal["own", "held_out", "both"] | Family | Mapping[str, Family] | Sequence[Family] | None = None,
    baselines: Sequence[str] | Mapping[str, Baseline] | None = None,
    problems: int = 10,
    seeds: int = 3,
    steps: int | None = None,
    step_sizes: int = 14,
    tuned: bool = False,
    seed: int = 1,
    device: str | None = None,
    progress: bool = True,
) -> Judgement:
    """Trains fresh problems by a learned rule and by tuned baselines, and says how much better or worse it is.

    Baselines are tuned family by family on problems of split "val", by the mean loss over the last tenth of a run; all are
    judged on those of split "test", with the same starts and minibatches. Losses are in units of knowing nothing, at most 3.

    Args:
        learned: a run of `meta_train`, or runs that differ in their seed (losses are averaged over them, problem by problem),
            or a rule, or what `mo.optim.load` gives.
        psi: ψ of that rule; of a run, its own; none is needed of a rule that has none.
        families: what is trained: "own" (the families of the run's meta-training, without their `rescaled`), "held_out" or
            "both"; or a family, or several, by name. Not given: both, and of a rule the held-out ones, of which some need data
            (see `load`), and download them where there are none.
        baselines: what it is compared with: names among those of `BASELINES`, or a `Baseline` by name; not given: all of these.
        problems: T, fresh problems for each seed, side by side; and as many to tune on.
        seeds: how many times so many.
        steps: K, the steps of a run, as of a run beyond the horizon of meta-training; the family's own where not given.
        step_sizes: values tried for each baseline (with each of its warm-ups).
        tuned: whether the learned rule's `lr` is tuned too, between 1e-4 and 1, as `Celo2` wants it.
        seed: the first seed of the problems.
        device: where it is computed, such as "cuda"; where ψ is if not given.
        progress: whether to show a progress bar.

    Raises:
        ValueError: settings that can't be used.
    """
    check_flags(progress=progress)
    known = check_asked(baselines, seed, problems=problems, seeds=seeds, steps=steps, step_sizes=step_sizes)
    rule, psis, own, trained = _learned(learned, psi, device)
    check_tuned(rule, tuned)
    numbers: Any = rule  # whose fields a Rule doesn't promise
    judged = judged_families(families, own, steps)
    _check(rule, psis, known, judged, seed)
    name = called(rule) if psis[0] else brief(rule)
    if name in known:
        raise ValueError(f"baselines: {name!r} is what the rule that is judged is called; give the baseline another name.")
    subjects = ({name: Baseline(lambda lr, warmup: replace(numbers, lr=lr), 1e-4, 1.0)} if tuned else {}) | known
    place = psis[0][min(psis[0])].device if psis[0] else None
    rows: list[Row] = []
    digest, drawn = hashlib.sha256(), [seed + s for s in range(seeds)]
    names = list(judged)
    for i in tracked(range(len(names)), "judging", progress):
        n, family = names[i], judged[names[i]]
        val = _placed(family.sample("val", seed=seed, start=0, count=problems), place)
        found = {m: tune(b, family, val, psis if m == name else ({},), step_sizes) for m, b in subjects.items()}
        found = {name: found.get(name) or Tuned(rule, math.nan, 0, math.nan, False), **found}
        tasks = (family.sample("test", seed=s, start=0, count=problems) for s in drawn)
        rows += _rows(n, family, found, {name: psis}, tasks, place, digest)
    facts = {
        "split": "test", "tuned_on": "val", "problems": problems, "seeds": drawn, "step_sizes": step_sizes,
        "steps": max(f.steps for f in judged.values()), "trained_steps": trained, "trained_runs": len(psis),
        "episodes": len(judged) * seeds * problems, "episodes_sha256": digest.hexdigest(),
        "families": {n: f.describe("test") for n, f in judged.items()}, "torch": torch.__version__,
        **which(_runs(learned) if psi is None else ()),  # another ψ is no run's
    }  # fmt: skip
    return Judgement(tuple(rows), name, facts)


def finals(run: Run, *, problems: int, seed: int, steps: int | None = None) -> tuple[Tensor, int]:
    """The final loss of each of T problems of split "val", (T), a mean over the run's families, and the steps K of their runs.

    Without baselines, and so a small part of what `evaluate` takes.
    """
    rule, (psi,), own, _ = _learned(run, None, None)
    others: dict[str, Any] = {"logarithm": False} | ({} if steps is None else {"steps": steps})
    families = [family.with_(**others) for family in own.values()]
    place = psi[min(psi)].device
    tasks = (_placed(family.sample("val", seed=seed, start=0, count=problems), place) for family in families)
    found = [final(curves(family, rule, psi, task)[0]) for family, task in zip(families, tasks, strict=True)]
    return torch.stack(found).mean(0), families[0].steps


def _runs(learned: Any) -> list[Run]:
    """The runs that are to be judged; none where it is a rule."""
    given = list(learned) if isinstance(learned, list | tuple) else [learned]
    return given if all(isinstance(run, Run) for run in given) else []


def _learned(
    learned: Any, psi: Params | None, device: str | None
) -> tuple[Rule, list[Params], dict[str, Family], int | None]:  # fmt: skip
    """A rule, its ψ (one for each run), the families and the steps of the runs that it was meta-trained on."""
    runs = _runs(learned)
    if not runs:
        if hasattr(learned, "rule") and hasattr(learned, "psi"):  # what makes optimizers of a rule
            learned, psi = learned.rule, learned.psi if psi is None else psi
        if isinstance(learned, type | list | tuple) or not hasattr(learned, "update"):
            raise ValueError(
                "lopt.evaluate takes a run of lopt.meta_train (mo.load gives that of a folder), runs, a rule, or what "
                f"mo.optim.load gives; found {brief(learned)}."
            )
        if psi is None:
            check_psi(learned, psi, "psi")
        own_psi = {} if psi is None else psi
        return learned, [own_psi if device is None else trees.to(own_psi, device_called(device))], {}, None
    learner = runs[0].method.learner
    if not isinstance(learner, Optimizee):
        raise ValueError(f"lopt.evaluate takes a run of lopt.meta_train, or a rule; found a run of {runs[0].method.name}.")
    check_seeds(runs)
    placed = runs if device is None else [on_device(run, device) for run in runs]
    psis = [run.phi.rule if psi is None else psi for run in placed]
    return learner.rule, psis, own_families(learner.problems), learner.steps


def _check(
    rule: Rule, psis: Sequence[Params], baselines: Mapping[str, Baseline], families: Mapping[str, Family], seed: int
) -> None:
    """A ValueError for a ψ of another rule, or one that doesn't fit the weights of a family; and for a baseline with a ψ."""
    for family in families.values():
        begun = family.stretch("val", seed, [0], [0], [family.steps], 1).support["start"]
        weights: Params = trees.map_tensors(lambda x: x[0, 0], begun)
        for psi in psis:
            check_psi(rule, psi, "psi", weights)
        here: Params = trees.to(weights, psis[0][min(psis[0])].device) if psis[0] else weights
        check_updates(rule, psis[0], here)
        for name, baseline in baselines.items():
            baseline.check(name, family.steps, weights)


def _families(given: Any, own: Mapping[str, Family]) -> dict[str, Family]:
    """What is trained, by name."""
    if given is None:
        given = "both" if own else "held_out"
    if not isinstance(given, str):
        found = dict(given) if isinstance(given, Mapping) else _by_name(given)
    elif given not in ("own", "held_out", "both"):
        raise ValueError(f"families={given!r}: it must be own, held_out, both, or families.")
    elif given != "held_out" and not own:
        raise ValueError(f"families={given!r}: a rule was trained on none that are known here; give the run, or families.")
    else:
        found = (dict(own) if given != "held_out" else {}) | (held_out() if given != "own" else {})
    if not found:
        raise ValueError("families is empty; give one at least.")
    for family in found.values():
        check_family(family)
    return found


def judged_families(given: Any, own: Mapping[str, Family], steps: int | None) -> dict[str, Family]:
    """What `evaluate` trains, by name, with so many steps."""
    others: dict[str, Any] = {"logarithm": False} | ({} if steps is None else {"steps": steps})
    return {n: f.with_(**others) for n, f in _families(given, own).items()}


def own_families(problems: Family) -> dict[str, Family]:
    """The families of a meta-training as they are judged, without its `rescaled`."""
    return {f.name: f.with_(rescaled=(1.0, 1.0)) for f in members(problems)}


def _by_name(given: Any) -> dict[str, Family]:
    """A family, or several of different names."""
    families = list(given) if isinstance(given, list | tuple) else [given]
    for family in families:
        check_family(family)
    names = [f.name for f in families]
    if twice := [n for n in names if names.count(n) > 1]:
        raise ValueError(
            f"families: {len(twice)} are called `{twice[0]}`; name them, as in families={{'one': a, 'another': b}}."
        )
    return dict(zip(names, families, strict=True))


def check_asked(baselines: Any, seed: int, **counts: Any) -> dict[str, Baseline]:
    """What a rule is compared with, by name. ValueError for that, a seed or counts that can't be used."""
    check_counts(**counts)
    check_seed(seed)
    return _baselines(baselines)


def check_tuned(rule: Rule, tuned: bool) -> None:
    """ValueError for a rule that is to be tuned, and has no step size."""
    check_flags(tuned=tuned)
    if tuned and "lr" not in getattr(rule, "__dataclass_fields__", {}):
        raise ValueError(f"tuned=True: {brief(rule)} has no step size `lr` of its own; leave it out.")


def _baselines(given: Any) -> dict[str, Baseline]:
    """What it is compared with, by name."""
    known = BASELINES if given is None else given
    if not known:
        raise ValueError("baselines is empty; give one at least, for losses are told relative to the best one.")
    if isinstance(known, Mapping):
        if odd := [(n, b) for n, b in known.items() if not isinstance(b, Baseline)]:
            raise ValueError(
                f"baselines: {odd[0][0]!r} is {brief(odd[0][1])}; its step size is tuned, so give how it is built of one, as "
                "in mo.lopt.Baseline(lambda lr, warmup: mo.rules.SGD(lr), 0.01, 1.0)."
            )
        return dict(known)
    if isinstance(known, str) or (odd := [name for name in known if name not in BASELINES]):
        shown = known if isinstance(known, str) else odd[0]
        raise ValueError(f"baselines: found {shown!r}; expected a list of names among: {'; '.join(BASELINES)}.")
    return {name: BASELINES[name] for name in known}


def _placed(task: Task, device: torch.device | None) -> Task:
    return task if device is None else trees.to(task, device)


def _rows(
    name: str, family: Family, found: Mapping[str, Tuned], psis: Mapping[str, Sequence[Params]], tasks: Iterable[Task],
    device: torch.device | None, digest: Any,
) -> list[Row]:  # fmt: skip
    """The learned rule's row first, each with the runs of all seeds; where there are several ψ, averaged over these."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {n: [] for n in found}
    timed: dict[str, float] = {}
    for task in tasks:
        digest_episodes(digest, task)
        here = _placed(task, device)
        for n, one in found.items():
            own = psis.get(n, ({},))
            by_psi = [curves(family, one.rule, psi, here) for psi in own]
            parts[n].append((torch.stack([losses for losses, _ in by_psi]), torch.stack([lost[:, -1] for _, lost in by_psi])))
            if n not in timed:
                timed[n] = seconds(family, one.rule, own[0], trees.index(here, 0))
    rows = []
    for n, one in found.items():
        losses, lost = torch.cat([x for x, _ in parts[n]], 1), torch.cat([x for _, x in parts[n]], 1)
        of_runs = final(losses) if n in psis else None
        told = brief(one.rule), one.lr, one.warmup, one.edge
        rows.append(Row(name, n, *told, losses.mean(0), lost.mean().item(), timed[n], of_runs))
    if all(row.diverged == 1 for row in rows):
        warn(
            f"All runs on {name} diverged, of every rule and baseline, so that nothing is compared there: look for numbers "
            "that are not finite in its examples, its start and its loss."
        )
    return rows


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
