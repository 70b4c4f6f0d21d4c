"""The ledger's measurements as trials, which `recommend` learns from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from metaoptim.design.trials import Trial
from metaoptim.ledger.entry import Entry
from metaoptim.recipes.recipe import Recipe


def trials(entries: Iterable[Entry], recipes: Mapping[str, Recipe]) -> list[Trial]:
    """A trial for the last measurement of each recipe and seed, whose tables are those of the recipe of that name.

    An entry knows its recipe by name and by a hash of its content. What was measured of a recipe that reads otherwise by now is
    left out, and so are learned optimizers.
    """
    known = {name: (recipe, recipe.content_hash) for name, recipe in recipes.items() if "model" in recipe.tables}
    found = {
        (entry.recipe, entry.seed): _trial(entry, known[entry.recipe][0])
        for entry in entries
        if entry.recipe in known and known[entry.recipe][1] == entry.content
    }
    return [found[key] for key in sorted(found)]


def _trial(entry: Entry, recipe: Recipe) -> Trial:
    return Trial(
        recipe=entry.recipe, tables=recipe.content, metric=entry.metric, value=entry.value, interval=entry.interval,
        seed=entry.seed, split=recipe.tables["evaluate"]["split"], steps=entry.steps, episodes=entry.episodes,
        iterations=entry.iterations, tasks_per_step=entry.tasks_per_step,
        seconds=entry.iterations / entry.steps_per_second if entry.steps_per_second else None,
        protocol=str(entry.protocol["name"]), source="reproduce", date=entry.date, version=entry.version,
    )  # fmt: skip
