"""What `metaoptim plan` prints: the cost of each way of computing a recipe's meta-gradient, and the one that training takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from metaoptim.core.checks import check_counts
from metaoptim.engine import Engine, Plan
from metaoptim.engine.faults import explained
from metaoptim.recipes.recipe import Recipe
from metaoptim.training.size import check_inner_run


def measure(recipe: Recipe, say: Callable[[str], None] = lambda text: None) -> Plan:
    """The plan for the recipe's first batch, measured afresh, whatever is cached; training then finds this plan in the cache.

    say: is told which way is measured next.
    """
    experiment = recipe.experiment()
    iterations, method = recipe.tables["train"]["iterations"], experiment.method
    engine = Engine(method, **recipe.tables["engine"], horizon=iterations)
    engine.say = say
    check_counts(iterations=iterations)
    check_inner_run(method)
    batch = experiment.batch()
    with explained(batch, method):
        return engine.plan(method.phi, batch, engine.init(method.phi, batch), again=True)


def table(plan: Plan, recipe: Recipe) -> RenderableType:
    """One row for each way, fastest first; then the choice and the reason for it."""
    shown = Table(title=f"{recipe.name}: one meta-step of {recipe.experiment().count} tasks")
    for name in ("batching", "memory", "runtime", "seconds", "peak memory, MiB", ""):
        shown.add_column(name, justify="right" if name.startswith(("seconds", "peak")) else "left", overflow="fold")
    for row in sorted(plan.rows, key=lambda row: row.seconds or float("inf")):
        seconds = f"{row.seconds:.4f}" if row.seconds is not None else "–"
        used = "–" if row.bytes is None else f"{row.bytes / 2**20:.0f}" if row.bytes >= 2**20 else "< 1"
        taken = row[:3] == plan.choice[:3]
        shown.add_row(*row[:3], seconds, used, "taken" if taken else row.note, style="bold" if taken else None)
    ruled = recipe.tables["engine"]["runtime"] != "auto" and "auto" in recipe.tables["engine"].values()
    who = "The fastest is" if ruled else "Training takes"
    rule = " Training measures nothing where the runtime is given: it follows a rule." if ruled else ""
    return Group(shown, Text(f"{who} {', '.join(plan.choice[:3])}: {plan.why}.{rule}"))


def document(plan: Plan) -> dict[str, Any]:
    """The same in machine-readable form."""
    return {"choice": plan.choice._asdict(), "why": plan.why, "rows": [row._asdict() for row in plan.rows]}
