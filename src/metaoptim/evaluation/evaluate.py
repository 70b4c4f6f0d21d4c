"""Evaluates runs on held-out episodes, beside the baselines that they must beat."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from metaoptim.core import trees
from metaoptim.core.callers import warn
from metaoptim.core.checks import check_counts, check_memory, check_time
from metaoptim.core.finite import odd_tasks
from metaoptim.core.random import forked
from metaoptim.core.types import Normalisation, Task
from metaoptim.engine import doubts, rollout
from metaoptim.evaluation import baselines as base
from metaoptim.evaluation.result import Result, Row
from metaoptim.learners import placed, with_network
from metaoptim.runs import identity
from metaoptim.runs.adapted import quiet
from metaoptim.runs.environment import environment
from metaoptim.runs.progress import tracked
from metaoptim.runs.run import Run
from metaoptim.tasks import TaskFamily
from metaoptim.tasks.base import check_seed, episodes_hash

Baseline = Literal["untrained", "prototypes", "pretrained", "scratch"]
FINE_TUNING = 10  # steps of the baselines pretrained and scratch if the method takes none
AT_ONCE = 50  # episodes sampled and adapted at a time
SCORE = 32  # bytes, at the least, for each score of the method: two metrics, gathered, and averaged in double precision

ABOUT: dict[str, str] = {
    "method": "the trained φ",
    "untrained": "φ before training, adapted in the same way",
    "prototypes": "nearest mean of the support's features in the trained network, without an inner loop",
    "pretrained": "an ordinary classifier of all training classes (regression: one fit to all tasks), fine-tuned by SGD "
    "from a zero head, its step size chosen on validation episodes",
    "scratch": "the network before training, trained by SGD on each support set alone, its step size chosen on validation "
    "episodes",
}


def evaluate(
    run: Run | Sequence[Run],
    tasks: TaskFamily,
    *,
    split: str = "test",
    episodes: int = 600,
    steps: int | None = None,
    normalisation: Normalisation | None = None,
    baselines: Sequence[Baseline] | None = None,
    pretrain_iterations: int = 2000,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> Result:
    """Scores every method after each inner step, on the same episodes.

    Args:
        run: a run, or runs of one recipe that differ in their seed (scores are averaged over them, episode by episode).
        tasks: the task family that episodes come from.
        split: the family's split to evaluate on.
        episodes: number of episodes E.
        steps: inner steps K at test; as in training if not given.
        normalisation: policy at test; as in training if not given.
        baselines: rows beside the method's: "untrained", "prototypes" (needs classes), "pretrained" (needs training) and
            "scratch" (each task by itself); none given: the first two, as far as the tasks allow.
        pretrain_iterations: training steps for the "pretrained" row, of 128 examples each.
        seed: seed of the episodes.
        device: where it is computed, such as "cuda"; where the run's φ is if not given.
        progress: whether to show a progress bar.

    Raises:
        ValueError: an unknown split or baseline, no episode, no run, runs that are not seeds of one training, prototypes of
            tasks without classes.
    """
    given: list[Any] = list(run) if isinstance(run, list | tuple) else [run]
    runs = [r for r in given if isinstance(r, Run)]
    if len(runs) < len(given):
        raise ValueError(f"evaluate takes runs; found {type(given[0]).__name__}: mo.Run(method, phi) makes one of any φ.")
    if not runs:
        raise ValueError("evaluate needs a run; the list is empty.")
    if hasattr(tasks, "stretch") or hasattr(runs[0].method.learner, "problems"):
        raise ValueError("evaluate scores few-shot learning; learned optimizers are judged by mo.lopt.evaluate(run).")
    check_counts(episodes=episodes, pretrain_iterations=pretrain_iterations)
    check_counts(0, steps=steps)
    check_seed(seed)
    if isinstance(baselines, str):
        raise ValueError(f"baselines={baselines!r}: it must be a list of names, such as [{baselines!r}].")
    for name in baselines or ():
        if name not in get_args(Baseline):
            raise ValueError(f"baseline {name!r} is unknown: choose among {', '.join(get_args(Baseline))}.")
    check_seeds(runs)
    if device is not None:
        runs = [on_device(r, device) for r in runs]
    if normalisation is not None:
        runs = [with_normalisation(r, normalisation) for r in runs]
    count = runs[0].method.learner.steps if steps is None else steps
    check_memory(SCORE * episodes * (count + 1) * len(runs), f"episodes={episodes}, steps={count}: the scores")
    check_time(-(-episodes // AT_ONCE) * (count + 1), f"episodes={episodes}, steps={count}: the evaluation")

    def adapted(r: Run) -> Callable[[Task], dict[str, Tensor]]:
        return lambda batch: rollout(r.method, r.phi, batch, r.inherited, count, r.batching)

    def fine_tuned(r: Run) -> Callable[[Task], dict[str, Tensor]]:
        """As `adapted`; if the method takes no steps, the baseline takes a few of its own."""
        if count:
            return adapted(r)
        return lambda batch: {
            m: x[:, -1:] for m, x in rollout(r.method, r.phi, batch, r.inherited, FINE_TUNING, r.batching).items()
        }

    methods: dict[str, list[Callable[[Task], dict[str, Tensor]]]] = {"method": [adapted(r) for r in runs]}
    one = trees.to(tasks.sample(split, seed=seed, start=0, count=1), runs[0].phi.device)
    classes = base.has_classes(one)
    default: tuple[Baseline, ...] = ("untrained", "prototypes") if classes else ("untrained",)
    wanted = default if baselines is None else baselines
    if "prototypes" in wanted and not classes:
        raise ValueError(
            "baseline 'prototypes' needs tasks with classes, as pairs (x, y) with int64 labels; these have none: leave it out."
        )
    if classes and {"prototypes", "pretrained"} & set(wanted) and (fault := base.fault(runs[0], one)):
        if baselines is not None:
            raise ValueError(f"the baselines prototypes and pretrained can't be had of this network: {fault}")
        warn(f"the row prototypes is left out: {fault}")
        wanted = ("untrained",)
    if "untrained" in wanted:
        methods["untrained"] = [adapted(base.untrained(r)) for r in runs]
    if "prototypes" in wanted:
        methods["prototypes"] = [partial(base.prototypes, r) for r in runs]
    with quiet(*(r.network.net for r in runs)):
        if "pretrained" in wanted:
            with forked(runs[0].phi.device, seed):
                methods["pretrained"] = [
                    fine_tuned(base.pretrained(r, tasks, pretrain_iterations, count or FINE_TUNING, progress)) for r in runs
                ]
        if "scratch" in wanted:
            methods["scratch"] = [fine_tuned(base.scratch(r, tasks, count or FINE_TUNING)) for r in runs]
        scores = _score(methods, tasks, split, seed, episodes, runs[0].phi.device, progress)
    rows = tuple(_row(name, scores[name], runs[0].method.name if name == "method" else name) for name in methods)
    facts = _facts(runs, tasks, split, seed, episodes, count)
    return Result(rows, facts | ({"pretrain_iterations": pretrain_iterations} if "pretrained" in methods else {}))


def check_seeds(runs: Sequence[Run]) -> None:
    """Raises a ValueError where runs that would be averaged differ in anything but the seed, as far as is known of each, or
    are the same."""
    first = runs[0].identity
    for i, run in enumerate(runs[1:], 2):
        other = run.identity
        both = [part for part in first if part in other]
        for field, a, b in identity.differences({k: first[k] for k in both}, {k: other[k] for k in both}):
            if field != "train.seed":
                raise ValueError(
                    f"runs that are judged together must be seeds of one training: {field} is {a} in the first run and {b} in "
                    f"run {i}; evaluate them one by one."
                )
    if len({(phi_hash(r), r.seed, r.selection) for r in runs}) < len(runs):
        raise ValueError("the same run, or the same weights, are given twice; seeds are counted once: leave one of them out.")


def on_device(run: Run, device: str) -> Run:
    """The run, evaluated on another device."""
    method = placed(run.method, device)
    phi, inherited = trees.to((run.phi, run.inherited), method.phi.device)
    return replace(run, method=method, phi=phi, inherited=inherited)


def with_normalisation(run: Run, policy: Normalisation) -> Run:
    """The run, evaluated under another normalisation policy."""
    learner = with_network(run.method.learner, replace(run.network, normalisation=policy))
    return replace(run, method=replace(run.method, learner=learner))


def _score(
    methods: dict[str, list[Callable[[Task], dict[str, Tensor]]]], tasks: TaskFamily, split: str, seed: int, episodes: int,
    device: torch.device, progress: bool,
) -> dict[str, list[dict[str, Tensor]]]:  # fmt: skip
    """Scores (E, K+1) by method, run and metric; every method sees the same episodes."""
    parts: dict[str, list[list[dict[str, Tensor]]]] = {n: [[] for _ in runs] for n, runs in methods.items()}
    odd: dict[int, str] = {}
    with forked(device, seed):
        for start in tracked(range(0, episodes, AT_ONCE), f"evaluating on {split}", progress):
            batch = tasks.sample(split, seed=seed, start=start, count=min(AT_ONCE, episodes - start))
            for doubt in () if start else doubts(batch):
                warn(doubt)
            for name, runs in methods.items():
                for found, judge in zip(parts[name], runs, strict=True):
                    found.append(judge(trees.to(batch, device)))
            bad = torch.stack([~x.isfinite() for found in parts["method"] for x in found[-1].values()]).any(-1).any(0).tolist()
            odd |= {start + t: what for t, what in odd_tasks(batch).items() if bad[t]}
    if odd:
        first, more = min(odd), f", as do those of {len(odd) - 1} more" if len(odd) > 1 else ""
        warn(
            f"the data of episode {first} of seed {seed} (split {split}) hold {odd[first]}{more}: scores of {len(odd)} of the "
            f"{episodes} episodes are not finite, and so are means over them."
        )
    return {name: [{m: torch.cat([p[m] for p in found]) for m in found[0]} for found in runs] for name, runs in parts.items()}


def _row(method: str, scores: list[dict[str, Tensor]], name: str) -> Row:
    """One method over its runs: scores per episode, averaged over the seeds, and each seed's own mean after the last step."""
    together = {m: torch.stack([s[m] for s in scores]).mean(0) for m in scores[0]}
    means = tuple({m: x[:, -1].double().mean().item() for m, x in s.items()} for s in scores)
    return Row(name, ABOUT[method], together, means, tuple(scores))


def _facts(runs: list[Run], tasks: TaskFamily, split: str, seed: int, episodes: int, steps: int) -> dict[str, Any]:
    return {
        "tasks": tasks.describe(split),
        "algorithm": runs[0].method.name,
        "split": split,
        "episodes": episodes,
        "episode_seed": seed,
        "episodes_sha256": episodes_hash(tasks, split, seed=seed, start=0, count=episodes),
        "steps": steps,
        "training_steps": runs[0].method.learner.steps,
        "normalisation": runs[0].network.normalisation,
        "seeds": [r.seed for r in runs],
        **which(runs),
        "engine": [r.batching for r in runs],
        "environment": environment(),
        "recipe": recipe.read_text(encoding="utf-8") if (recipe := _recipe(runs[0])) is not None else None,
    }


def _recipe(run: Run) -> Path | None:
    """The recipe in a run's directory, if there is one."""
    path = run.path / "recipe.toml" if run.path else None
    return path if path is not None and path.is_file() else None


def which(runs: Sequence[Run]) -> dict[str, Any]:
    """Which φ were judged, among those that the folders of the runs hold."""
    return {
        "selection": " and ".join(sorted({r.selection for r in runs})),
        "runs": [{"path": str(r.path) if r.path else None, "step": r.step, "phi_sha256": phi_hash(r)} for r in runs],
    }


def phi_hash(run: Run) -> str:
    """The sha256 of φ, names and values."""
    digest = hashlib.sha256()
    for name, p in sorted(trees.named(run.phi).items()):
        digest.update(f"{name}{p.dtype}{tuple(p.shape)}".encode())
        digest.update(p.detach().reshape(-1).contiguous().view(torch.uint8).numpy(force=True).tobytes())
    return digest.hexdigest()
