"""What is known of one method of a comparison: its scores on the test episodes, kept on disk, and what its trainings took."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from metaoptim.design.contenders import Contender
from metaoptim.design.statistics import Scores
from metaoptim.design.trials import Trial
from metaoptim.evaluation.evaluate import phi_hash
from metaoptim.recipes.recipe import file_name
from metaoptim.runs import Run, metrics
from metaoptim.runs.checkpoint import strict_json
from metaoptim.runs.store import write_atomic

FILE = "judged.json"


@dataclass(frozen=True)
class Judged:
    """A method's scores (R, E), its baselines' means and intervals, and how all of it was measured.

    tasks: how many the episodes are of, where they are counted, as those of a table.
    """

    metric: str
    scores: Scores = field(repr=False)
    baselines: Mapping[str, tuple[float, float]]
    protocol: str
    steps: int
    episodes: int
    episodes_sha256: str
    tasks: int | None

    @property
    def fault(self) -> str | None:
        """Why it can't be compared, in words; None where every score is finite."""
        bad = (~np.isfinite(self.scores)).any(0)
        return f"of {self.episodes} episodes, {int(bad.sum())} have scores that are not finite" if bad.any() else None


def judge(contender: Contender, runs: Sequence[Run], out: Path, progress: bool) -> Judged:
    """Evaluates runs of one method, or reads what an earlier command has found of the same φ by the same [evaluate].

    Errors: those of `Experiment.evaluate`.
    """
    folder = out / file_name(contender.name)
    key = json.loads(strict_json({"evaluate": contender.recipe.tables["evaluate"], "phi": [phi_hash(run) for run in runs]}))
    if (known := _read(folder / FILE, key)) is not None:
        return known
    found = contender.experiment.evaluate(runs, progress=progress)
    scores = found.of_runs.double().numpy(force=True)
    facts = found.facts
    judged = Judged(
        found.metric, scores, dict(found.beside), found.protocol, facts["steps"], facts["episodes"], facts["episodes_sha256"],
        facts.get("tasks", {}).get("tasks"),
    )  # fmt: skip
    found.save(folder)
    document = {"key": key, **vars(judged), "scores": scores.tolist()}
    write_atomic(folder / FILE, f"{strict_json(document)}\n".encode())
    return judged


def trials_of(contender: Contender, judged: Judged) -> list[Trial]:
    """One for each seed, with the interval over episodes."""
    return [
        Trial(
            recipe=recipe.name, tables=recipe.content, metric=judged.metric, value=_finite(own.mean()),
            interval=_finite(1.96 * own.std(ddof=1) / math.sqrt(len(own))) if len(own) > 1 else None,
            seed=recipe.tables["train"]["seed"], split=recipe.tables["evaluate"].get("split", "test"), steps=judged.steps,
            episodes=judged.episodes, iterations=contender.iterations, tasks_per_step=recipe.experiment().count,
            seconds=metrics.elapsed(folder), protocol=judged.protocol, source="compare",
        )
        for recipe, folder, own in zip(contender.recipes, contender.folders, judged.scores, strict=True)
    ]  # fmt: skip


def _read(file: Path, key: Any) -> Judged | None:
    """What was written there of the same; None for nothing, or for something else."""
    if not file.is_file():
        return None
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        if known.pop("key") != key:
            return None
        scores = np.array(known.pop("scores"), dtype=np.float64)  # null becomes NaN
        baselines = {name: (_number(mean), _number(half)) for name, (mean, half) in known.pop("baselines").items()}
        return Judged(scores=scores, baselines=baselines, **known)
    except (ValueError, TypeError, KeyError):  # cut or altered: it is judged again
        return None


def _finite(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def _number(x: float | None) -> float:
    return math.nan if x is None else x
