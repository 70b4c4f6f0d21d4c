"""The page of results, made of the ledger alone: the same ledger gives the same bytes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from metaoptim.ledger.entry import Entry

TITLE = """# Results

Written by `metaoptim reproduce` from its ledger; to change a number, measure it again. [How](command-line.md#reproduce)
"""
NOTHING = """
The ledger is empty so far. What was measured before there was one stands in each recipe's `[expected]`, and in the
[README](../README.md#measured).
"""
RESULTS = """
## Scores

Accuracy in %, or the loss, after the last inner step. ± is the 95 % interval over episodes, for one seed (the root mean square
where there are several); *spread* is the standard deviation over training seeds. *Judged* compares with what the recipe expects
of its seed: *pass* within both intervals, *fail* worse by more than twice that, *drift* anything else. *Published* is the
source's number, and *protocol* says whether it was measured in the same way. Recipes on the same tasks stand together, the best
first; their inner steps and budgets may differ.
"""
SCORES = ("recipe", "score", "seeds", "spread", "expected", "judged", "published", "protocol")
MEASURED = """
## How they were measured

The budget is outer steps × tasks in each; steps/s is the median of training. *Episodes* is the hash of their tensors: results
with the same one can be compared episode by episode. P1, P2, … are the [protocols](#protocols).
"""
BASELINES = """
## Beside the baselines

On the same episodes, after the last inner step; [what they are](evaluation.md#the-rows).
"""
COSTS = """
## What a meta-step costs

One meta-gradient of the recipe's first batch, computed as in a loop of one's own (nothing is traced), beside one of MAML on the
same network and tasks with as many inner steps. The time is the best of five, on one thread; memory is the growth at the peak,
in MiB.
"""
PROTOCOLS = """
## Protocols

"""


class Group(NamedTuple):
    """The entries of one recipe, one for each seed, of one version of recipe and code."""

    recipe: str
    entries: tuple[Entry, ...]

    @property
    def first(self) -> Entry:
        """The entry of the lowest seed."""
        return self.entries[0]


def page(entries: Sequence[Entry]) -> str:
    """The page, in Markdown."""
    groups = grouped(entries)
    if not groups:
        return TITLE + NOTHING
    names = sorted({_protocol(e) for g in groups for e in g.entries})
    columns = sorted({name for g in groups for name in g.first.rows})
    return "".join(
        [
            TITLE,
            RESULTS,
            *(f"\n### {tasks}\n{_table(SCORES, map(_score, some))}" for tasks, some in _ranked(groups)),
            MEASURED,
            _table(
                ("recipe", "seed", "budget", "steps/s", "protocol", "episodes", "date", "version", "commit", "torch"),
                (_how(e, names) for g in groups for e in g.entries),
            ),
            BASELINES,
            _table(("recipe", "score", *columns), (_beside(g, columns) for g in groups)),
            COSTS,
            _table(("recipe", "algorithm", "K", "ms", "× MAML", "MiB", "× MAML"), map(_cost, groups)),
            PROTOCOLS,
            "".join(f"- **P{i}**: {name}\n" for i, name in enumerate(names, 1)),
        ]
    )


def grouped(entries: Sequence[Entry]) -> list[Group]:
    """By recipe: the entries of the version that was measured last, the last of each seed, in the order of seeds."""
    last = {entry.recipe: (entry.content, entry.code) for entry in entries}
    seeds: dict[str, dict[int, Entry]] = {}
    for entry in entries:
        if (entry.content, entry.code) == last[entry.recipe]:
            seeds.setdefault(entry.recipe, {})[entry.seed] = entry
    return [Group(name, tuple(found for _, found in sorted(seeds[name].items()))) for name in sorted(seeds)]


def _ranked(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    """The groups on the same tasks, the best score first."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(str(group.first.protocol["name"]).partition(", split ")[0], []).append(group)

    def worst_last(group: Group) -> float:
        mean = _mean(group)
        return math.inf if mean is None else -mean if group.first.metric == "accuracy" else mean

    return [(tasks, sorted(found[tasks], key=worst_last)) for tasks in sorted(found)]


def _mean(group: Group) -> float | None:
    """Over the seeds; None where a score is not finite."""
    values = [e.value for e in group.entries if e.value is not None]
    return statistics.mean(values) if len(values) == len(group.entries) else None


def _score(group: Group) -> Iterator[str]:
    first, mean, values = group.first, _mean(group), [e.value for e in group.entries if e.value is not None]
    expected, published = first.expected, first.published
    judged = [e.verdict for e in group.entries if e.verdict != "not judged"]
    yield f"`{group.recipe}`"
    yield _number(mean, _root_mean_square([e.interval for e in group.entries]), first.metric)
    yield ", ".join(str(e.seed) for e in group.entries)
    yield _number(statistics.stdev(values), None, first.metric) if len(values) > 1 and mean is not None else "–"
    yield _number(expected["value"], expected.get("interval"), first.metric) if "value" in expected else "–"
    yield judged[0] if judged else "–"
    stated = _number(published["value"], published.get("interval"), first.metric) if "value" in published else "–"
    yield f"{stated} ({published['source']})" if "source" in published else stated
    if "value" not in published:
        yield "–"
    else:
        theirs = published.get("protocol", "not stated")
        yield "the same" if theirs == "same" else f"differs: {theirs}"


def _how(entry: Entry, names: Sequence[str]) -> Iterator[str]:
    yield f"`{entry.recipe}`"
    yield str(entry.seed)
    yield f"{entry.iterations} × {entry.tasks_per_step}"
    yield f"{entry.steps_per_second:.3g}" if entry.steps_per_second else "–"
    yield f"P{names.index(_protocol(entry)) + 1}"
    yield f"`{entry.episodes_sha256[:12]}`"
    yield entry.date[:10]
    yield entry.version
    yield f"`{entry.commit}`"
    yield str(entry.environment.get("torch", "–"))


def _beside(group: Group, columns: Sequence[str]) -> Iterator[str]:
    first = group.first
    yield f"`{group.recipe}`"
    yield _number(first.value, first.interval, first.metric)
    for name in columns:
        mean, interval = first.rows.get(name, (None, None))
        yield _number(mean, interval, first.metric) if name in first.rows else "–"


def _cost(group: Group) -> Iterator[str]:
    cost = group.first.cost
    maml = cost.get("maml") or {}
    yield f"`{group.recipe}`"
    yield group.first.algorithm
    yield str(cost.get("steps", "–"))
    for name, unit in (("seconds", 1e-3), ("bytes", 2**20)):
        own, theirs = cost.get(name), maml.get(name)
        yield f"{own / unit:.3g}" if own is not None else "–"
        yield f"{own / theirs:.2f}" if own is not None and theirs else "–"


def _protocol(entry: Entry) -> str:
    return f"{entry.protocol['name']} (version {entry.protocol['version']})"


def _number(value: float | None, interval: Any, metric: str) -> str:
    """A score as the page shows it: accuracy in %, with its interval if there is one."""
    if value is None:
        return "not finite"
    scale, digits = (100, 2) if metric == "accuracy" else (1, 4)
    half = (interval[1] - interval[0]) / 2 if isinstance(interval, list) else interval
    return f"{scale * value:.{digits}f}" + ("" if half is None else f" ± {scale * half:.{digits}f}")


def _root_mean_square(intervals: Sequence[float | None]) -> float | None:
    known = [x for x in intervals if x is not None]
    return math.sqrt(statistics.mean(x * x for x in known)) if known else None


def _table(header: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n" + "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
