"""Bias, variance and cost of estimators, on a problem of the user's own."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table

from metaoptim.core import trees
from metaoptim.core.callers import warn
from metaoptim.core.checks import check_counts, check_method, check_positive
from metaoptim.core.objectives import trajectory_mean
from metaoptim.core.types import Estimator, MetaOptimizer, Task
from metaoptim.estimators import Truncated, Unroll, nres, pes, truncated_es
from metaoptim.gradcheck.case import Case, in_doubles, recast, unguarded
from metaoptim.gradcheck.claims import over_a_run, self_check
from metaoptim.gradcheck.samples import TASKS, sample
from metaoptim.tasks import TaskFamily

EXACT = Unroll(objective=trajectory_mean)


@dataclass(frozen=True)
class Estimated:
    """How good an estimator is: everything relative to the norm of the exact meta-gradient.

    Args:
        name: of the estimator.
        bias: the distance of its mean from the exact one, with what noise adds to it taken off; `error`: its standard error.
        spread: the standard deviation of one estimate, the mean over all windows of a run.
        seconds: of such an estimate.
    """

    name: str
    bias: float
    error: float
    spread: float
    seconds: float

    @property
    def told(self) -> str:
        """The bias in words: one that noise could have made is told by its bound alone."""
        bound = 2 * self.error
        if not bound:
            return f"{self.bias:.1%}"
        return f"below {bound:.0%}" if self.bias <= bound else f"{self.bias:.1%} ± {self.error:.1%}"


@dataclass(frozen=True)
class Comparison:
    """`print(comparison)` is a table."""

    name: str
    rows: tuple[Estimated, ...]
    facts: Mapping[str, Any]

    def table(self) -> Table:
        """A row for each estimator."""
        facts = self.facts
        title = f"{self.name}: estimators over runs of {facts['steps']} inner steps, {facts['repeats']} repetitions, float64"
        caption = (
            "bias and spread relative to the norm of the exact meta-gradient of the mean loss of a run; below: a bias of less "
            "than two standard errors, which noise alone can make"
        )
        table = Table("estimator", title=title, caption=caption)
        for head in ("bias", "spread of one estimate", "seconds", "of exact"):
            table.add_column(head, justify="right", no_wrap=True)
        whole = self.rows[0].seconds
        for row in self.rows:
            table.add_row(row.name, row.told, f"{row.spread:.0%}", f"{row.seconds:.2g}", f"{row.seconds / whole:.2g} ×")
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110)
        console.print(self.table())
        return cast(io.StringIO, console.file).getvalue().rstrip()

    __repr__ = __str__

    def json(self) -> dict[str, Any]:
        """All of it in JSON's types."""
        return {"name": self.name, "rows": [asdict(row) for row in self.rows], "facts": dict(self.facts)}


def compare_estimators(
    method: MetaOptimizer,
    tasks: Task | TaskFamily | None = None,
    *,
    window: int | None = None,
    sigma: float = 0.01,
    pairs: int = 1,
    repeats: int = 32,
    estimators: Mapping[str, Estimator] | None = None,
) -> Comparison:
    """Bias, spread and cost of PES, NRES, truncated ES and truncated backpropagation against the exact meta-gradient.

    All are taken at the method's own φ, on the same few tasks and whole runs, in float64; the method stays as it is.

    Args:
        method: any meta-optimizer with an inner loop; its own estimator doesn't matter, but for its window.
        tasks: a batch of tasks, or a family, of which 3 are used; none: random ones, where the learner is a network's.
        window: inner steps W of a window; the method's own, or else a fifth of a run.
        sigma, pairs: of the evolution strategies: σ, and antithetic pairs for each task.
        repeats: how often a random estimate is taken, each time with fresh noise.
        estimators: others, by name, to compare in place of these.

    Raises:
        ValueError: settings that can't be used.
    """
    check_method(method, "compare_estimators")
    check_counts(2, repeats=repeats)
    check_counts(pairs=pairs, window=window)
    check_positive(sigma=sigma)
    steps = method.learner.steps
    if not steps:
        raise ValueError(f"{method.name} takes no inner steps, so that estimators have nothing to differ in.")
    fifth = next(w for w in range(max(1, steps // 5), 0, -1) if steps % w == 0)
    width = getattr(unguarded(method).estimator, "window", fifth) if window is None else window
    given = estimators or {
        f"Truncated({width})": Truncated(width),
        f"truncated_es({width}, {sigma:g}, {pairs})": truncated_es(width, sigma, pairs),
        f"pes({width}, {sigma:g}, {pairs})": pes(width, sigma, pairs),
        f"nres({width}, {sigma:g}, {pairs})": nres(width, sigma, pairs),
    }
    learnt, _ = method.split(method.phi)
    for estimator in given.values():
        estimator.check(method.learner, learnt)
    batch = trees.map_tensors(lambda x: x[:TASKS], sample(method, tasks, None))
    case = Case(recast(method, torch.float64), recast(batch, torch.float64))
    if fault := self_check(replace(method, estimator=EXACT), method.phi, batch):
        warn(f"{fault} What is called exact here is wrong by as much.")
    with in_doubles():
        return measured(case, given, repeats)


def measured(case: Case, estimators: Mapping[str, Estimator], repeats: int) -> Comparison:
    """The exact estimator first, then those given."""

    def estimates(estimator: Estimator, count: int) -> tuple[torch.Tensor, float]:
        """(count, numbers of φ), and the seconds of one."""
        method = replace(case.method, estimator=estimator)
        started = time.perf_counter()
        found = [torch.cat([g.flatten() for g in trees.flatten(over_a_run(method, case.batch, s))]) for s in range(count)]
        return torch.stack(found), (time.perf_counter() - started) / count

    exact, seconds = estimates(EXACT, 1)
    size = torch.linalg.vector_norm(exact).item()
    if not math.isfinite(size) or not size:
        raise ValueError(f"the exact meta-gradient has a norm of {size}, so that nothing can be held to it; choose another φ.")
    rows = [Estimated("exact", 0.0, 0.0, 0.0, seconds)]
    for name, estimator in estimators.items():
        found, seconds = estimates(estimator, repeats if estimator.claim == "stochastic" else 1)
        variance = found.var(0).sum().item() if len(found) > 1 else 0.0
        gap = (found.mean(0) - exact[0]).square().sum().item() - variance / len(found)
        error = math.sqrt(variance / len(found)) / size
        rows.append(Estimated(name, math.sqrt(max(gap, 0.0)) / size, error, math.sqrt(variance) / size, seconds))
    facts = {"steps": case.method.learner.steps, "repeats": repeats, "norm": size}
    return Comparison(case.method.name, tuple(rows), facts)
