"""One measurement of one recipe with one seed: everything that gives the number its meaning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from metaoptim.recipes.recipe import Recipe

Verdict = Literal["pass", "drift", "fail", "not judged"]

PROTOCOL = 1
"""The version of how episodes are drawn and scored; raised when either changes, for then numbers can't be compared."""
STATED = ("metric", "value", "interval", "seed", "source", "protocol")


class Key(NamedTuple):
    """What makes two measurements the same: the recipe's content (a hash), the seed, and the version of the code."""

    content: str
    seed: int
    code: str


@dataclass(frozen=True)
class Entry:
    """A line of the ledger.

    metric, value, interval: of the method after the last of `steps` inner steps, over `episodes` episodes (None: not finite).
    rows: mean and interval of the baselines, by name. protocol: name and version. cost: seconds and bytes of a meta-step, and
    MAML's. expected and published: what the recipe states ({}: nothing).
    """

    recipe: str
    content: str
    seed: int
    code: str
    date: str
    version: str
    commit: str
    algorithm: str
    metric: str
    value: float | None
    interval: float | None
    steps: int
    episodes: int
    episodes_sha256: str
    protocol: Mapping[str, Any]
    iterations: int
    tasks_per_step: int
    steps_per_second: float | None
    verdict: Verdict
    rows: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Any] = field(default_factory=dict)
    expected: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What makes another measurement the same."""
        return Key(self.content, self.seed, self.code)


def stated(recipe: Recipe, table: str) -> dict[str, Any]:
    """What a recipe states in [expected] or [published], as far as the ledger keeps it; ValueError where a number is none."""
    given = recipe.tables.get(table, {})
    for key in ("value", "interval"):
        value = given.get(key, 0.0)
        ends = value if key == "interval" and isinstance(value, list) and len(value) == 2 else [value]
        if not all(isinstance(x, int | float) and math.isfinite(x) for x in ends):
            raise ValueError(f"`{key}` in [{table}] of {recipe.name}: found {value!r}, expected a number.")
    return {key: given[key] for key in STATED if key in given}


def judged(metric: str, value: float, interval: float | None, seed: int, expected: Mapping[str, Any]) -> Verdict:
    """Whether a value is the one that the recipe expects of this seed.

    Of the 95 % intervals of both, h is the root of the sum of squares. "pass": within h; "fail": worse by more than 2 h, or no
    number at all; "drift": anything else, better ones too, which say that the recipe's numbers are to be measured again.
    """
    if "value" not in expected or expected.get("seed", seed) != seed or expected.get("metric", metric) != metric:
        return "not judged"
    if not math.isfinite(value):
        return "fail"
    stated = expected.get("interval", 0.0)
    half = (stated[1] - stated[0]) / 2 if isinstance(stated, list) else stated
    allowed = math.hypot(half, interval if interval is not None and math.isfinite(interval) else 0.0)
    gap = (expected["value"] - value) * (1 if metric == "accuracy" else -1)  # above 0: it is worse
    if abs(gap) <= allowed:
        return "pass"
    return "fail" if gap > 2 * allowed else "drift"
