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

Accuracy in % where tasks have classes, else the loss, of which less is better; both after the last inner step, and the mean
over the training seeds. ± is the 95 % interval over episodes, for one seed (the root mean square where there are several);
*spread* is the standard deviation over training seeds, where there are two or more. *Judged* compares with what the recipe
expects of its seed: *pass* within both intervals, *fail* worse by more than twice that, *drift* anything else, better scores
too. *Published* is the source's number, and *protocol* says whether it was measured in the same way. Recipes on the same
tasks (their options are in brackets, as in a recipe's `[tasks]`) stand together, the best first; their inner steps and
budgets may differ. Here and below, – is what was not stated or not measured.
"""
SCORES = ("recipe", "score", "seeds", "spread", "expected", "judged", "published", "protocol")
MEASURED = """
## How they were measured

A line for each training seed. The budget is outer steps × tasks in each; steps/s is outer steps per second, the median of
training. *Protocol* says what it was scored on: P1, P2, … are spelt out [below](#protocols). *Episodes* is the beginning of a
hash of the test episodes' tensors: scores with the same one can be compared episode by episode. *Version* is metaoptim's, and
a + behind the commit says that files differed from it.
"""
BASELINES = """
## Beside the baselines

On the same episodes, after the last inner step, the mean over the training seeds; [what they are](evaluation.md#the-rows).
"""
COSTS = """
## What a meta-step costs

One meta-gradient of the recipe's first batch, computed as in a loop of one's own (nothing is traced), beside one of MAML on
the same network and tasks with as many inner steps K, one at the least; *× MAML* is how many times its time and its memory.
The time is the best of five, on one thread; memory is the growth at the peak, in MiB; both for the lowest seed.
"""
PROTOCOLS = """
## Protocols

How episodes are drawn and scored: the tasks with their options, the split, whose statistics batch norms use, the inner steps
at test, the number of episodes and their seed. Scores of one protocol can be compared; the version changes when the way of
drawing or scoring does.

"""


class Group(NamedTuple):
    """The entries of one recipe, one for each seed, of one version of recipe and code."""

    recipe: str
    entries: tuple[Entry, ...]

    @property
    def first(self) -> Entry:
        """The entry of the lowest seed."""
        return self.entries[0]

    @property
    def score(self) -> tuple[float | None, float | None]:
        """Mean and interval of the method's score."""
        return _together([(e.value, e.interval) for e in self.entries])


def page(entries: Sequence[Entry]) -> str:
    """The page, in Markdown."""
    groups = grouped(entries)
    if not groups:
        return TITLE + NOTHING
    names = sorted({_protocol(e) for g in groups for e in g.entries})
    columns = sorted({name for g in groups for e in g.entries for name in e.rows})
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
        mean, _ = group.score
        return math.inf if mean is None else -mean if group.first.metric == "accuracy" else mean

    return [(tasks, sorted(found[tasks], key=worst_last)) for tasks in sorted(found)]


def _together(scores: Sequence[tuple[float | None, float | None]]) -> tuple[float | None, float | None]:
    """The mean over the seeds (None where one is not finite), and the root mean square of the intervals."""
    values, halves = [x for x, _ in scores if x is not None], [h for _, h in scores if h is not None]
    mean = statistics.mean(values) if len(values) == len(scores) else None
    return mean, math.sqrt(statistics.mean(h * h for h in halves)) if halves else None


def _score(group: Group) -> Iterator[str]:
    first, values = group.first, [e.value for e in group.entries if e.value is not None]
    mean, half = group.score
    expected, published = first.expected, first.published
    judged = dict.fromkeys(e.verdict for e in group.entries if e.verdict != "not judged")
    yield f"`{group.recipe}`"
    yield _number(mean, half, first.metric)
    yield ", ".join(str(e.seed) for e in group.entries)
    yield _number(statistics.stdev(values), None, first.metric) if len(values) > 1 and mean is not None else "–"
    metric = expected.get("metric", first.metric)
    wanted = _number(expected["value"], expected.get("interval"), metric) if "value" in expected else "–"
    yield wanted if metric == first.metric or "value" not in expected else f"{wanted} ({metric})"
    yield ", ".join(judged) or "–"
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
    metric = group.first.metric
    yield f"`{group.recipe}`"
    yield _number(*group.score, metric)
    for name in columns:
        found = [tuple(e.rows[name]) for e in group.entries if name in e.rows]
        yield _number(*_together(found), metric) if found else "–"


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


def _table(header: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n" + "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
